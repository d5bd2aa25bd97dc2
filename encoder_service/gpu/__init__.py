"""The GPU path of the vision towers: fused kernels, packed attention, CUDA graphs. Its plain twin is in `models/`."""
