"""All ops of the model, by name. A new op is one more entry here."""

from __future__ import annotations

from fourfold.ops.attention import sparse_attention
from fourfold.ops.checks import check_logits, nonfinite_sequences
from fourfold.ops.compressor import compress, compress_rows, store_folds
from fourfold.ops.indexer import index_topk
from fourfold.ops.linear import embed, linear, linears, norm_linears, wo_a
from fourfold.ops.mhc import hc_head, hc_post, hc_post_pre, hc_pre
from fourfold.ops.moe import moe, route_hash, route_topk, routed_experts, shared_expert
from fourfold.ops.norm import query_norm_rope, rms_norm
from fourfold.ops.quantize import quantize_activations
from fourfold.ops.registry import Op
from fourfold.ops.rope import rotate
from fourfold.ops.rows import encode_rows, norm_rope_rows, store_rows
from fourfold.ops.sampling import (
    adjust_logits,
    count_accepted,
    likeliest,
    sample,
    token_logprobs,
    uniform,
)
from fourfold.ops.step import (
    keep_drafts,
    next_tokens,
    place_step,
    seat_runs,
    settle_step,
    step_after,
)

OPS: tuple[Op, ...] = (
    embed,
    hc_pre,
    hc_post,
    hc_post_pre,
    hc_head,
    linear,
    linears,
    norm_linears,
    quantize_activations,
    rms_norm,
    rotate,
    query_norm_rope,
    norm_rope_rows,
    encode_rows,
    store_rows,
    compress,
    store_folds,
    compress_rows,
    index_topk,
    sparse_attention,
    wo_a,
    route_topk,
    route_hash,
    routed_experts,
    shared_expert,
    moe,
    nonfinite_sequences,
    check_logits,
    adjust_logits,
    uniform,
    sample,
    count_accepted,
    likeliest,
    token_logprobs,
    seat_runs,
    place_step,
    settle_step,
    next_tokens,
    step_after,
    keep_drafts,
)
