"""What has to be known of a denoiser class to split it: one row of data per class."""
