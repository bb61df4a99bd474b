"""What a config may not say: each refusal names the file, the key and the value."""

from pathlib import Path

import pytest

from fourfold.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig
from fourfold.core.errors import ConfigError
from tests.core.configs import FLASH_RATIOS, changed, error, hugging_face, read, released


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window",
        "compress_ratios", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
        "moe_intermediate_size", "num_hash_layers", "routed_scaling_factor", "swiglu_limit",
        "index_n_heads", "index_head_dim", "index_topk", "hc_mult", "hc_sinkhorn_iters",
        "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta", "rope_scaling",
        "max_position_embeddings", "model_type",
    ],
)  # fmt: skip
def test_a_missing_key_is_named(key: str) -> None:
    text = error(changed(drop=(key,)))
    assert "missing" in text
    assert key in text
    if key not in ("rope_scaling", "model_type"):
        assert key in error(changed(**{key: None}))


def test_all_missing_keys_are_named_at_once() -> None:
    text = error(changed(drop=("hidden_size", "hc_mult")))
    assert text == "missing keys: hidden_size or dim, hc_mult"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # types and ranges
        ({"hidden_size": "4096"}, "hidden_size must be a positive integer, found '4096'"),
        ({"hidden_size": 4096.0}, "hidden_size must be a positive integer, found 4096.0"),
        ({"hidden_size": 2**70}, "hidden_size must be a positive integer, found 1180591620717"),
        ({"partial_rotary_factor": 1e308}, "partial_rotary_factor must be at most 1"),
        ({"hidden_size": True}, "hidden_size must be a positive integer, found True"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, found 0"),
        ({"sliding_window": -128}, "sliding_window must be a positive integer, found -128"),
        ({"num_hash_layers": -1}, "num_hash_layers must be a non-negative integer, found -1"),
        ({"swiglu_limit": 0}, "swiglu_limit must be a positive finite number, found 0"),
        ({"hc_eps": "1e-6"}, "hc_eps must be a positive finite number, found '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive finite number"),
        ({"rope_theta": False}, "rope_theta must be a positive finite number, found False"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive finite number"),
        ({"n_shared_experts": 0}, "n_shared_experts must be a positive integer, found 0"),
        ({"expert_dtype": 4}, "expert_dtype must be a string, found 4"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object, found 'fp8'"),
        ({"bos_token_id": -1}, "bos_token_id must be a non-negative integer, found -1"),
        ({"eos_token_id": [1, 2]}, "eos_token_id must be a non-negative integer, found [1, 2]"),
        ({"eos_token_id": 129280}, "eos_token_id must be below vocab_size (129280)"),
        # relations between fields
        ({"num_attention_heads": 60}, "num_attention_heads must be a multiple of o_groups (8)"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even, found 63"),
        ({"qk_rope_head_dim": 512}, "qk_rope_head_dim must be below head_dim (512), found 512"),
        ({"index_head_dim": 32}, "index_head_dim must be at least qk_rope_head_dim (64)"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok must be at most n_routed_experts"),
        # layers
        ({"compress_ratios": [0, 4]}, "compress_ratios must be a list of 43 ratios"),
        ({"compress_ratios": "0044"}, "compress_ratios must be a list of integers"),
        ({"compress_ratios": [*FLASH_RATIOS[:-1], 8, 0]}, "compress_ratios[42] must be 0 (SWA), 4"),
        ({"compress_ratios": [False, *FLASH_RATIOS]}, "compress_ratios[0] must be 0 (SWA), 4"),
        ({"layer_types": ["full_attention"] * 43}, "layer_types[0] must be one of sliding"),
        ({"layer_types": ["sliding_attention"]}, "layer_types must be a list of 43 names"),
        ({"mlp_layer_types": ["moe"] * 42 + ["hash_moe"]}, "must name all hash_moe layers before"),
        (
            {"compress_rates": {"compressed_sparse_attention": 8}},
            "compress_rates.compressed_sparse_attention must be 4, the only rate implemented",
        ),
        ({"compress_rate_hca": 64}, "compress_rate_hca must be 128, the only rate implemented"),
        # other networks
        ({"scoring_func": "sigmoid"}, 'scoring_func must be "sqrtsoftplus"'),
        ({"topk_method": "greedy"}, 'topk_method must be "noaux_tc"'),
        ({"norm_topk_prob": False}, "norm_topk_prob must be true"),
        ({"hidden_act": "gelu"}, 'hidden_act must be "silu"'),
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ({"num_key_value_heads": 8}, "num_key_value_heads must be 1"),
        ({"num_key_value_heads": True}, "num_key_value_heads must be 1"),
        ({"n_group": 8, "topk_group": 4}, "n_group is 8 and topk_group 4: routing limited to"),
        ({"torch_dtype": "float16"}, "torch_dtype must be one of bfloat16, float32, float64"),
        ({"torch_dtype": "float32", "dtype": "bfloat16"}, "must agree"),
        # rope
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, found 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type must be yarn"),
        ({"rope_scaling": {"factor": 16}}, "rope_scaling.type must be yarn"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "must agree"),
        ({"rope_scaling": {"type": "yarn"}}, "missing key: rope_scaling.factor"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(changes: dict, expected: str) -> None:
    assert expected in error(changed(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mscale": 1.0}, "rope_scaling.mscale is 1.0"),
        ({"mscale_all_dim": 0.707}, "rope_scaling.mscale_all_dim is 0.707"),
        ({"factor": 0}, "rope_scaling.factor must be a positive finite number, found 0"),
        ({"factor": 0.5}, "rope_scaling.factor must be at least 1, found 0.5"),
        ({"original_max_position_embeddings": 1.5}, "original_max_position_embeddings must be a"),
        ({"beta_fast": 0.5}, "rope_scaling.beta_fast must be at least beta_slow (1.0)"),
        ({"attention_factor": 1.277}, "rope_scaling.attention_factor must be 1 or absent"),
        ({"truncate": False}, "rope_scaling.truncate must be True or absent"),
        ({"rope_theta": 160000}, "rope_theta is 10000 but rope_scaling.rope_theta is 160000"),
    ],
)
def test_a_bad_yarn_value_is_refused_by_name(changes: dict, expected: str) -> None:
    yarn = released("flash")["rope_scaling"] | changes
    assert expected in error(changed(rope_scaling=yarn))


def test_rope_parameters_of_the_wrong_shape_are_refused() -> None:
    nested = hugging_face()["rope_parameters"]
    text = error(hugging_face(rope_parameters={"main": nested["main"]}))
    assert "rope_parameters must be given with main and compress" in text
    swapped = {"main": nested["compress"] | {"rope_theta": 10000}, "compress": nested["compress"]}
    assert "rope_parameters.main.rope_type must be default" in error(
        hugging_face(rope_parameters=swapped)
    )
    odd = {**nested, "main": nested["main"] | {"partial_rotary_factor": 0.1}}
    assert "must be a whole number of head_dim's 512 dimensions" in error(
        hugging_face(rope_parameters=odd)
    )


def test_group_limits_that_mean_nothing_are_tolerated() -> None:
    for groups in (
        {"n_group": 1, "topk_group": 1},
        {"n_group": 8, "topk_group": 8},
        {"n_group": None},
    ):
        assert read(changed(**groups)) == read(released("flash"))


def test_null_means_absent_for_optional_keys() -> None:
    config = read(changed(expert_dtype=None, quantization_config=None, scoring_func=None))
    assert config.expert_dtype is None
    assert config.quantization_config is None
    assert read(changed(rope_scaling=None)).rope_scaling is None


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("deepseek_v41", "model_type 'deepseek_v41' (DeepSeek-V4.1) is a different network"),
        ("deepseek_v3", "model_type 'deepseek_v3' is not supported"),
        (4, "model_type 4 is not supported"),
        (None, "model_type is missing"),
    ],
)
def test_other_models_are_refused_in_one_sentence(model_type: object, expected: str) -> None:
    text = error({"model_type": model_type})
    assert expected in text
    assert "this engine runs 'deepseek_v4' only" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ('{"hc_eps": NaN}', "NaN is not JSON"),
        ('{"hc_eps": Infinity}', "Infinity is not JSON"),
        ('{"hc_eps": 1e999}', "1e999 is out of range"),
        ('{"a": 1, "a": 2}', "key 'a' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "expected a JSON object, found list"),
        ("null", "expected a JSON object, found NoneType"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "is not valid JSON"),
    ],
    ids=lambda value: value[:12],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_file(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_nesting_beyond_reason_is_refused() -> None:
    deep: object = 1
    for _ in range(5000):
        deep = {"a": deep}
    assert error(changed(quantization_config=deep)) == "nested too deeply"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json cannot be read: No such file"):
        ModelConfig.from_file(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        ModelConfig.from_file(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON: .*utf-8"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: CacheConfig(page_size=100), "page_size must be a multiple of 128 tokens"),
        (lambda: CacheConfig(kv_cache_dtype="int8"), "kv_cache_dtype must be one of auto, fp8"),
        (lambda: CacheConfig(index_cache_dtype="fp4"), "index_cache_dtype must be one of auto"),
        (lambda: CacheConfig(num_pages=0), "num_pages must be a positive integer"),
        (lambda: ParallelConfig(tensor_parallel_size=0), "tensor_parallel_size must be a positive"),
        (lambda: ParallelConfig(4, 3), "expert_parallel_size must be 1 or tensor_parallel_size"),
        (lambda: ParallelConfig(4, 4, rank=4), "rank must be below 4, found 4"),
        (lambda: EngineConfig(model=""), "model must be a name"),
        (lambda: EngineConfig("m", dtype="float16"), "dtype must be one of auto, bfloat16"),
        (lambda: EngineConfig("m", max_model_len=0), "max_model_len must be a positive integer"),
        (lambda: EngineConfig("m", gpu_memory_utilization=1.5), "must be at most 1, found 1.5"),
        (lambda: EngineConfig("m", gpu_memory_utilization=0), "must be a positive finite number"),
        (lambda: EngineConfig("m", expert_dtype="int4"), "expert_dtype must be one of auto, fp4"),
        (lambda: EngineConfig("m", enforce_eager=1), "enforce_eager must be true or false"),
        (lambda: EngineConfig("m", seed=-1), "seed must be a non-negative integer"),
    ],
)
def test_engine_settings_are_refused_by_name(build, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    assert expected in str(caught.value)
