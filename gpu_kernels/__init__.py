"""What both services run on a GPU: graph capture, attention over packed sequences, norms, rotary embedding and GEMMs.

It is below both services and independent of images and requests. Triton compiles its kernels; matrix products are
cuBLAS's, quack-kernels' or Triton's, whichever an autotuner measures fastest at a size.
"""
