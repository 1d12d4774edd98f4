"""What only a real accelerator can show; `PENSTOCK_GPU_TESTS=cpu` runs them on the CPU, to see that they run."""
