"""The spellings of a DeepSeek-V4 config's keys, as tables.

Contract: data only. Three programs write these files: the released config.json, transformers
(`layer_types`, `rope_parameters`, `num_local_experts` …), and the reference program's
inference/config.json (`dim`, `n_layers` …). No key means different things in two of them except
`dtype`, which core/config_reading.py handles.
"""

from __future__ import annotations

MODEL_TYPE = "deepseek_v4"

INTEGERS = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "head_dim": ("head_dim",),
    "q_lora_rank": ("q_lora_rank",),
    "o_groups": ("o_groups",),
    "o_lora_rank": ("o_lora_rank",),
    "sliding_window": ("sliding_window", "window_size"),
    "n_routed_experts": ("n_routed_experts", "num_local_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "n_activated_experts"),
    "n_shared_experts": ("n_shared_experts",),
    "moe_intermediate_size": ("moe_intermediate_size", "moe_inter_dim", "intermediate_size"),
    "index_n_heads": ("index_n_heads",),
    "index_head_dim": ("index_head_dim",),
    "index_topk": ("index_topk",),
    "hc_mult": ("hc_mult",),
    "hc_sinkhorn_iters": ("hc_sinkhorn_iters",),
}
"""Field -> its spellings; all required, all positive integers."""

NUMBERS = {
    "routed_scaling_factor": ("routed_scaling_factor", "route_scale"),
    "swiglu_limit": ("swiglu_limit",),
}
"""Field -> its spellings; all required, all positive numbers."""

EPSILONS = {
    "rms_norm_eps": ("rms_norm_eps", "norm_eps"),
    "hc_eps": ("hc_eps",),
}
"""Like NUMBERS, but the reference program's file leaves them to its code, where they are 1e-6."""

QK_ROPE_HEAD_DIM = ("qk_rope_head_dim", "rope_head_dim")
NUM_HASH_LAYERS = ("num_hash_layers", "n_hash_layers")
NUM_MTP_LAYERS = ("num_nextn_predict_layers", "n_mtp_layers")
QUANTIZATION = ("quantization_config", "compression_config")

REQUIRED = (
    *INTEGERS.values(),
    *NUMBERS.values(),
    (*QK_ROPE_HEAD_DIM, "partial_rotary_factor"),
    (*NUM_HASH_LAYERS, "mlp_layer_types"),
    ("compress_ratios", "layer_types"),
    ("rope_theta", "rope_parameters"),
    ("compress_rope_theta", "rope_parameters"),
    ("rope_scaling", "rope_parameters", "rope_factor"),
)
"""At least one key of each group must be there, in every kind of file."""

REQUIRED_OUTSIDE_REFERENCE = (*EPSILONS.values(), ("max_position_embeddings",))
"""Keys that the reference program's own file leaves to its code."""

FIXED: dict[str, tuple[tuple[str, ...], str | bool | int]] = {
    "scoring_func": (("scoring_func", "score_func"), "sqrtsoftplus"),
    "topk_method": (("topk_method",), "noaux_tc"),
    "norm_topk_prob": (("norm_topk_prob",), True),
    "hidden_act": (("hidden_act",), "silu"),
    "attention_bias": (("attention_bias",), False),
    "mlp_bias": (("mlp_bias",), False),
    "tie_word_embeddings": (("tie_word_embeddings",), False),
    "num_key_value_heads": (("num_key_value_heads",), 1),
}
"""Field -> its spellings and the one value that is DeepSeek-V4; absent or null means that value."""

LAYER_TYPES = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
"""transformers' name of a layer's attention -> its compress ratio."""

COMPRESS_RATES = {
    "compress_rate_csa": "compressed_sparse_attention",
    "compress_rate_hca": "heavily_compressed_attention",
}
"""transformers' older scalar keys -> the layer type whose rate they give."""

DSPARK_PREFIX = "dspark_"

IGNORED = frozenset(
    {"architectures", "auto_map", "attention_dropout", "initializer_range", "use_cache"}
    | {"transformers_version", "pad_token_id", "_name_or_path", "return_dict", "id2label"}
    | {"label2id", "output_attentions", "output_hidden_states", "output_router_logits"}
    | {"router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux", "ep_size"}
    | {"pretraining_tp", "first_k_dense_replace", "moe_layer_freq", "is_encoder_decoder"}
    | {"chunk_size_feed_forward", "problem_type", "max_seq_len", "max_batch_size"}
)
"""Keys that change nothing here: training, another program's runtime, code that is never run."""

ROPE_KEYS = frozenset(
    {"type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    | {"rope_theta", "partial_rotary_factor", "attention_factor", "truncate"}
    | {"mscale", "mscale_all_dim"}
)
"""Keys of a rope object that are read, or refused unless they say nothing."""
