"""Looking for numbers that are not finite, on GPUs: programs that find one mark its sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.device import Feature
from fourfold.ops.registry import Kernel

BLOCK = 4096


@triton.jit
def _nonfinite(values, sequence_ids, found, SIZE, SEQUENCES, BLOCK: tl.constexpr):
    """A part of one token's numbers. Whoever marks a sequence writes the same 1."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + token * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    # x − x is 0 for finite numbers and NaN for all others.
    bad = tl.max((value - value != 0.0).to(tl.int32))
    sequence = tl.load(sequence_ids + token)
    if (bad > 0) & (sequence >= 0) & (sequence < SEQUENCES):
        tl.store(found + sequence, 1)


@triton.jit(do_not_specialize=["SIZE"])
def _check(logits, tokens, sequence_ids, found, SIZE, BLOCK: tl.constexpr):
    """A part of one row of logits."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    bad = tl.max((value - value != 0.0).to(tl.int32))
    if bad > 0:
        tl.store(found + tl.load(sequence_ids + tl.load(tokens + row)), 1)


def nonfinite_sequences(streams: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """The op `nonfinite_sequences` (ops/checks.py)."""
    found = torch.zeros(num_sequences, dtype=torch.uint8, device=streams.device)
    if streams.numel():
        streams = streams.contiguous()
        size = streams[0].numel()
        _nonfinite[(streams.shape[0], -(-size // BLOCK))](
            streams, sequence_ids, found, size, num_sequences, BLOCK=BLOCK, num_warps=4
        )
    return found.view(torch.bool)


def check_logits(found: Tensor, logits: Tensor, batch: ForwardBatch) -> None:
    """The op `check_logits` (ops/checks.py)."""
    if logits.numel():
        rows, size = logits.shape
        _check[(rows, -(-size // BLOCK))](
            logits.contiguous(), batch.logits_tokens, batch.sequence_ids, found.view(torch.uint8),
            size, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


_NEEDS = frozenset({Feature.TRITON})
KERNELS = (
    Kernel("nonfinite_sequences", "triton", nonfinite_sequences, _NEEDS),
    Kernel("check_logits", "triton", check_logits, _NEEDS),
)
