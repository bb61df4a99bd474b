"""All ops of the model, by name. A new op is one more entry here."""

from __future__ import annotations

from fourfold.ops.attention import sparse_attention
from fourfold.ops.checks import nonfinite_sequences
from fourfold.ops.compressor import compress, compress_rows, store_folds
from fourfold.ops.indexer import index_topk
from fourfold.ops.linear import embed, grouped_output, linear
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
    sample,
    token_logprobs,
    uniform,
)

OPS: tuple[Op, ...] = (
    embed,
    hc_pre,
    hc_post,
    hc_post_pre,
    hc_head,
    linear,
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
    grouped_output,
    route_topk,
    route_hash,
    routed_experts,
    shared_expert,
    moe,
    nonfinite_sequences,
    adjust_logits,
    uniform,
    sample,
    count_accepted,
    token_logprobs,
)
