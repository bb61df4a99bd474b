"""Attention: queries, the one key/value row, the compressor, the indexer, the grouped output.

    y ─ wq_a ─ norm ─ qr ─ wq_b ─ per-head norm ─ rotary ─ q ───────────────┐
    │                  └─ indexer: best compressed rows ──────────── list ──┤
    ├─ wkv ─ norm ─ rotary ─ encode ─ own rows (then the ring) ─────────────┼─ sparse attention
    └─ compressor: fold m tokens ─ norm ─ rotary ─ encode ─ pages ──────────┘        │
                                          z ◄─ wo_b ◄─ wo_a by group ◄─ inverse rotary

Contract: compressed rows are written before attention reads them (the token that completes a row sees
it), the ring after, since early queries of a run need rows that its late tokens overwrite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.parameters import Role
from fourfold.core.rows import RowPages
from fourfold.core.state import CompressedState, LayerState
from fourfold.core.tensor import Weight
from fourfold.model.parts import Context, Notes, Parameters
from fourfold.ops.rope import inverse_frequencies

MAIN = (Role.COMPRESSOR_WKV, Role.COMPRESSOR_WGATE, Role.COMPRESSOR_APE, Role.COMPRESSOR_NORM)
INDEX = (Role.INDEXER_WKV, Role.INDEXER_WGATE, Role.INDEXER_APE, Role.INDEXER_NORM)


class Compressor:
    """Pools every m tokens into one row and writes it to its page."""

    def __init__(
        self,
        context: Context,
        p: Parameters,
        roles: tuple[Role, Role, Role, Role],
        ratio: int,
        inv_freq: Tensor,
    ):
        self.ops, self.ratio, self.inv_freq = context.ops, ratio, inv_freq
        self.eps = context.config.rms_norm_eps
        wkv, wgate, ape, norm = roles
        self.wkv, self.wgate = p.weight(wkv), p.weight(wgate)
        self.ape, self.norm = p.tensor(ape), p.tensor(norm)

    def __call__(
        self,
        kv: Tensor,
        gate: Tensor,
        batch: ForwardBatch,
        state: CompressedState,
        dtype: torch.dtype,
    ) -> RowPages:
        """Fold `kv = wkv y` and `gate = wgate y` of `y [T, D]`, a tensor of `dtype`, into the state and
        store the rows they complete, which are returned."""
        emission = batch.emissions[self.ratio]
        rows: RowPages = self.ops.compress_rows(
            kv,
            gate,
            self.ape,
            self.norm,
            self.inv_freq,
            self.eps,
            state.pages,
            state.folds,
            batch,
            emission,
            self.ratio,
            dtype,
        )
        return rows


class Indexer:
    """Chooses the compressed rows each query attends to."""

    def __init__(self, context: Context, p: Parameters, ratio: int, inv_freq: Tensor, name: str):
        c = context.config
        self.ops, self.config, self.name = context.ops, c, name
        self.ratio, self.inv_freq = ratio, inv_freq
        self.compressor = Compressor(context, p, INDEX, ratio, inv_freq)
        self.wq_b = p.weight(Role.INDEXER_WQ_B)
        self.weights_proj = p.weight(Role.INDEXER_WEIGHTS)
        self.scale = (c.index_n_heads * c.index_head_dim) ** -0.5

    def __call__(
        self,
        q: Tensor,
        kv: Tensor,
        gate: Tensor,
        weights: Tensor,
        batch: ForwardBatch,
        state: CompressedState,
        note: Notes,
    ) -> Tensor:
        """Rows to attend to, `[T, index_topk]`, −1 padded.

        `q` is wq_b qr; `kv`, `gate` and `weights` are its compressor's and its heads' products with y.
        """
        keys = self.compressor(kv, gate, batch, state, q.dtype)
        note(f"{self.name}.index_keys", keys.data()[0])
        q = q.unflatten(-1, (-1, self.config.index_head_dim))
        q = self.ops.rotate(q, batch.positions, self.inv_freq)
        weights = weights * self.scale
        note(f"{self.name}.index_q", q)
        note(f"{self.name}.index_weights", weights)
        listed: Tensor = self.ops.index_topk(
            q, weights, state.pages, batch, self.ratio, self.config.index_topk
        )
        note(f"{self.name}.listed", listed)
        return listed


class Attention:
    """One layer's attention; `ratio` is its compress ratio (0: window only)."""

    def __init__(self, context: Context, p: Parameters, ratio: int, name: str):
        c = context.config
        self.ops, self.comm, self.config = context.ops, context.comm, c
        self.beside = context.beside
        self.ratio, self.name = ratio, name
        theta, scaling = (c.compress_rope_theta, c.rope_scaling) if ratio else (c.rope_theta, None)
        sink = p.tensor(Role.ATTN_SINK)
        inv_freq = inverse_frequencies(c.qk_rope_head_dim, theta, scaling).to(sink.device)
        self.sink, self.inv_freq = sink, inv_freq
        self.wq_a, self.q_norm = p.weight(Role.WQ_A), p.tensor(Role.Q_NORM)
        self.wq_b, self.wkv = p.weight(Role.WQ_B), p.weight(Role.WKV)
        self.kv_norm = p.tensor(Role.KV_NORM)
        self.wo_a, self.wo_b = p.weight(Role.WO_A), p.weight(Role.WO_B)
        self.compressor = Compressor(context, p, MAIN, ratio, inv_freq) if ratio else None
        self.indexer = Indexer(context, p, ratio, inv_freq, name) if c.has_indexer(ratio) else None
        # All products with y, and all with qr behind its norm.
        self.of_y: tuple[Weight, ...] = (self.wq_a, self.wkv)
        self.of_qr: tuple[Weight, ...] = (self.wq_b,)
        if self.compressor:
            self.of_y += (self.compressor.wkv, self.compressor.wgate)
        if self.indexer:
            own = self.indexer.compressor
            self.of_y += (own.wkv, own.wgate, self.indexer.weights_proj)
            self.of_qr += (self.indexer.wq_b,)

    def __call__(self, y: Tensor, batch: ForwardBatch, state: LayerState, note: Notes) -> Tensor:
        """`y [T, D]` → `[T, D]`; reads and writes the layer's state."""
        ops, main = self.ops, state.main
        q, own, listed = self._inputs(y, batch, state, note)
        # From here to wo_a one memory holds queries, what they attended to, and that turned back.
        attended = ops.sparse_attention(
            q,
            self.sink,
            own,
            state.ring,
            main.pages if main else None,
            listed,
            batch,
            self.config.sliding_window,
            self.ratio,
        )
        del q
        ops.store_rows(state.ring, own, batch.ring_slots)
        note(f"{self.name}.attended", attended)
        grouped = ops.wo_a(attended, self.wo_a, batch.positions, self.inv_freq)
        del attended
        return self.comm.all_reduce(ops.linear(grouped, self.wo_b))

    def _inputs(
        self, y: Tensor, batch: ForwardBatch, state: LayerState, note: Notes
    ) -> tuple[Tensor, RowPages, Tensor | None]:
        """Queries `[T, H, d]`, the step's own rows and, with an indexer, the compressed rows to attend
        to. All else that is made on the way is gone behind it, and compressed rows are in their pages."""
        ops, c, eps = self.ops, self.config, self.config.rms_norm_eps
        compressor, indexer, main = self.compressor, self.indexer, state.main
        compressed = listed = None
        unrounded = (False, False, *[True] * (len(self.of_y) - 2))
        qr, kv, *wide = ops.linears(y, self.of_y, unrounded)
        if compressor and main:
            compressed = self.beside(lambda: compressor(wide[0], wide[1], batch, main, y.dtype))
        rounded = (False,) * len(self.of_qr)
        q, *index_q = ops.norm_linears(qr, self.q_norm, eps, self.of_qr, rounded)
        if indexer and (keys := state.indexer):
            kv_i, gate_i, heads = wide[2:]
            listed = self.beside(
                lambda: indexer(index_q[0], kv_i, gate_i, heads, batch, keys, note)
            )
        q = q.unflatten(-1, (-1, c.head_dim))
        q = ops.query_norm_rope(q, batch.positions, self.inv_freq, eps)
        note(f"{self.name}.q", q)
        own = ops.norm_rope_rows(
            kv,
            self.kv_norm,
            batch.positions,
            self.inv_freq,
            eps,
            state.ring.format,
        )
        note(f"{self.name}.kv", own.data()[0])
        if compressed:
            note(f"{self.name}.compressed", compressed().data()[0])
        return q, own, listed() if listed else None
