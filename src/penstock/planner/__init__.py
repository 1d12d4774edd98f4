"""Arithmetic on bytes: where every unit goes. No torch."""
