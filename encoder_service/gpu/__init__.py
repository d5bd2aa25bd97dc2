"""Vision towers on a GPU: fused kernels, packed attention, CUDA graphs. The plain towers are in `models/`."""
