"""Tokens over ranks: Ulysses, Ring, or both, on unmodified denoisers."""
