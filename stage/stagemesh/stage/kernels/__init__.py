"""Triton kernels of the CUDA engine. Importing a module here needs triton; nothing else of a stage does."""
