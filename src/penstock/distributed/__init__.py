"""Splitting the work over ranks: sequence, tensor, guidance, pipeline and VAE parallelism."""
