"""Kernels that both services run on a GPU."""
