"""Kernels for a CPU, in plain torch: the definitions' arithmetic in fewer and larger operations.

    weights.py     what linear layers and experts read: numbers made once, at load
    rounding.py    FP8 rounding of activations and rows
    linear, moe, mhc, rows, compressor, indexer, attention      bodies of the ops of the same files in ops/

Contract: as for every kernel (kernels/__init__.py). Nothing is compiled. All but attention take the
definitions' steps in their order and so give their bits, as far as torch orders the sums of equal products
alike. It may order them by the batch's size: such kernels do not promise equal bits in every batch, as the
definitions do not.

Measured on an AMD EPYC (AVX-512, 2 cores beside other programs), torch 2.13, geometry of the built-in
checkpoint, random weights, processor time of one thread against the definitions' on one thread: a decode
step 21 ms behind 40 tokens, 25 ms behind 4,000 (47, 55), of 8 sequences behind 200 tokens 34 ms (114); a
prompt of 200 tokens 0.10 s, of 2,000 0.78 s, of 4,000 1.7 s (0.18, 3.1, 10.5).
"""
