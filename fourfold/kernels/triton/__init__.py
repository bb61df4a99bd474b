"""Portable Triton kernels: the default on every GPU. One file an op family; each defines `KERNELS`."""
