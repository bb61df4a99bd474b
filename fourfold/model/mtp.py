"""Multi-token prediction: one more layer that guesses the token after next.

    stream_i = e_proj(enorm(embed(token t+1))) + h_proj(hnorm(X_t,i)),  one SWA block, own hc_head

Contract: row t predicts token t+2 from the main model's streams X_t (before its hc_head) and token
t+1; positions and ring rows are those of t. Embedding and head are the main model's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.parameters import Role
from fourfold.core.state import LayerState
from fourfold.core.tensor import Weight
from fourfold.model.block import Block
from fourfold.model.parts import (
    Context,
    ForwardOutput,
    Head,
    Notes,
    Observer,
    Parameters,
    run_sublayers,
)


class MTPLayer:
    """One MTP layer, `mtp.N.` in the checkpoint."""

    def __init__(
        self, context: Context, p: Parameters, embed: Callable[[Tensor], Tensor], head: Weight
    ):
        self.ops, self.config, self.embed = context.ops, context.config, embed
        self.name = p.prefix.removesuffix(".")
        self.enorm, self.hnorm = p.tensor(Role.ENORM), p.tensor(Role.HNORM)
        self.e_proj, self.h_proj = p.weight(Role.E_PROJ), p.weight(Role.H_PROJ)
        self.block = Block(context, p, ratio=0, hashed=False)
        self.head = Head(context, p, head)

    def forward(
        self,
        streams: Tensor,
        next_token_ids: Tensor,
        batch: ForwardBatch,
        state: LayerState,
        observe: Observer | None = None,
    ) -> ForwardOutput:
        """`streams [T, S, D]` and `next_token_ids [T]` of the batch's tokens → logits of token t+2.

        The streams in the result are what the layer is fed for the draft after this one.
        """
        ops, note = self.ops, Notes(observe)
        sublayers = self.block.sublayers(batch, state, note)
        out = run_sublayers(ops, self._input(streams, next_token_ids, note), sublayers, note)
        logits = self.head(out[batch.logits_tokens])
        note(f"{self.name}.logits", logits)
        flags = ops.nonfinite_sequences(out, batch.sequence_ids, batch.num_sequences)
        return ForwardOutput(logits, out, flags)

    def _input(self, streams: Tensor, next_token_ids: Tensor, note: Notes) -> Tensor:
        """The layer's own streams `[T, S, D]`."""
        ops, eps = self.ops, self.config.rms_norm_eps
        hidden = ops.rms_norm(streams.flatten(0, 1), self.hnorm, eps)
        projected = ops.linear(hidden, self.h_proj).view_as(streams)
        del hidden
        embedded = ops.rms_norm(self.embed(next_token_ids), self.enorm, eps)
        mixed = ops.linear(embedded, self.e_proj).unsqueeze(1) + projected
        note(f"{self.name}.input", mixed)
        return mixed
