"""Batched, differentiable bodies of the model's ops for training, registered as kernels of a plan."""
