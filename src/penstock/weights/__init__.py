"""Weights as bytes: where each tensor lies in the files of a checkpoint."""
