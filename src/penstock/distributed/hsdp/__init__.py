"""Sharded weights: each rank holds a part of every block, and gathers the whole block just ahead of its use."""
