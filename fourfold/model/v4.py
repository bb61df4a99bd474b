"""DeepSeek-V4, the one definition.

    token ids ─ embed ─ copied to S streams ─ [attention, experts] × L ─ hc_head ─ norm ─ head ─ logits
                                                        │
                                                        └─ streams ─ MTP layer (mtp.py)

Contract: parameters arrive by their checkpoint names, plain or quantised; `forward` handles the flat
tokens of several sequences, reading and writing `state` where `batch` says. With a fresh state of plain
rows it is differentiable, and is the definition to train through. No vendor, device or storage format
is known here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.config import ModelConfig
from fourfold.core.parameters import Role
from fourfold.core.state import ModelState
from fourfold.core.tensor import Weight
from fourfold.dist.comm import Comm
from fourfold.model.block import Block
from fourfold.model.mtp import MTPLayer
from fourfold.model.parts import (
    Beside,
    Context,
    ForwardOutput,
    Head,
    Notes,
    Observer,
    Parameters,
    in_turn,
    run_sublayers,
)
from fourfold.ops.registry import KernelPlan


class Embedding:
    """The (vocabulary-sharded) token embedding, shared with the MTP layer."""

    def __init__(self, context: Context, p: Parameters):
        self.ops, self.comm = context.ops, context.comm
        self.table = p.tensor(Role.EMBED)
        self.first_token = context.comm.rank() * self.table.shape[0]

    def __call__(self, token_ids: Tensor) -> Tensor:
        """`token_ids [T]` → `[T, D]`."""
        return self.comm.all_reduce(self.ops.embed(token_ids, self.table, self.first_token))


class DeepseekV4:
    """The model. `parameters` maps logical parameter names (core/parameters.py) to weights; `beside`
    may run independent work of a layer side by side."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, Weight],
        ops: KernelPlan,
        comm: Comm,
        beside: Beside = in_turn,
    ):
        context = Context(config, ops, comm, beside)
        p = Parameters(parameters)
        self.config, self.ops = config, ops
        self.embed = Embedding(context, p)
        self.layers = [
            Block(context, p.at(f"layers.{n}."), ratio, config.is_hash_layer(n))
            for n, ratio in enumerate(config.compress_ratios)
        ]
        head = p.weight(Role.HEAD)
        self.head = Head(context, p, head)
        self.mtp = [
            MTPLayer(context, p.at(f"mtp.{n}."), self.embed, head)
            for n in range(config.num_nextn_predict_layers)
        ]

    def forward(
        self, batch: ForwardBatch, state: ModelState, observe: Observer | None = None
    ) -> ForwardOutput:
        """One step over `batch`; `observe(name, tensor)` sees every named intermediate."""
        note = Notes(observe)
        sublayers = [
            sublayer
            for layer, layer_state in zip(self.layers, state.layers, strict=True)
            for sublayer in layer.sublayers(batch, layer_state, note)
        ]
        # Not by a name, so that nothing holds the first streams behind the first layer.
        streams = run_sublayers(self.ops, self._copies(batch, note), sublayers, note)
        logits = self.head(streams[batch.logits_tokens])
        note("logits", logits)
        flags = self.ops.nonfinite_sequences(streams, batch.sequence_ids, batch.num_sequences)
        return ForwardOutput(logits, streams, flags)

    def _copies(self, batch: ForwardBatch, note: Notes) -> Tensor:
        """The embedding as every stream, `[T, S, D]`, in memory once."""
        embedded = self.embed(batch.token_ids)
        note("embed", embedded)
        return embedded.unsqueeze(1).expand(-1, self.config.hc_mult, -1)
