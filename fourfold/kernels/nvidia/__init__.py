"""Kernels that use what only NVIDIA's devices have; each says which feature it needs."""
