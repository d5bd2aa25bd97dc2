"""The decoder on an NVIDIA GPU: fused kernels and CUDA graphs."""
