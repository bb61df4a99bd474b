"""A forward pass of packed sequences with no cache behind it.

Contract: state is made fresh for the call, of plain rows, and thrown away; with parameters that want
gradients the result is differentiable. The same model, the same ops, the same batch as when serving:
this is the definition to train and to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourfold.cache.pool import allocate
from fourfold.cache.rows import RowFormats, row_formats
from fourfold.core.batch import ForwardBatch, ScheduledBatch, ScheduledSequence, lower
from fourfold.core.row_format import pages_for
from fourfold.core.state import ModelState
from fourfold.core.tensor import dtype_name
from fourfold.model.parts import ForwardOutput, Observer
from fourfold.model.v4 import DeepseekV4


def pack(
    model: DeepseekV4, sequences: Sequence[Sequence[int]], formats: RowFormats | None = None
) -> tuple[ForwardBatch, ModelState]:
    """A batch of whole sequences, logits wanted at every token, and fresh state for it.

    `formats` are the rows' formats: plain rows of the model's dtype unless given.
    """
    config, table = model.config, model.embed.table
    dtype, device = table.dtype, table.device
    runs, pages = [], 0
    for token_ids in sequences:
        count = pages_for(len(token_ids))
        runs.append(ScheduledSequence(token_ids, block_ids=range(pages, pages + count)))
        pages += count
    name = dtype_name(dtype)
    formats = formats or row_formats(config, name, name, name)
    state = allocate(config, formats, max(pages, 1), 1, dtype, device)
    batch = lower(ScheduledBatch(tuple(runs)), config.compress_ratios, 1, device)
    return batch, state


def one_shot(
    model: DeepseekV4,
    sequences: Sequence[Sequence[int]],
    formats: RowFormats | None = None,
    observe: Observer | None = None,
) -> ForwardOutput:
    """Logits `[T, V]` at every token of `sequences`, laid flat one after another."""
    batch, state = pack(model, sequences, formats)
    return model.forward(batch, state, observe)


def one_shot_with_mtp(
    model: DeepseekV4, sequences: Sequence[Sequence[int]], formats: RowFormats | None = None
) -> tuple[ForwardOutput, Tensor]:
    """As `one_shot`, plus the MTP layer's logits `[T, V]`: row t predicts token t+2 of its sequence.

    The token after a sequence's last is not known; its rows are fed token 0 and mean nothing.
    """
    batch, state = pack(model, sequences, formats)
    out = model.forward(batch, state)
    following = [t for s in sequences for t in [*s[1:], 0]]
    ids = torch.tensor(following, dtype=torch.int64, device=out.streams.device)
    return out, model.mtp[0].forward(out.streams, ids, batch, state.mtp[0]).logits
