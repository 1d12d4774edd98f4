"""Calls of a denoiser over ranks: the branches of guidance, or the samples of a batch."""
