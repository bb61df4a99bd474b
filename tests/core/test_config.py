"""Reading config.json in its three spellings."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fourfold.core.config import EngineConfig, ModelConfig, ParallelConfig
from fourfold.core.errors import ConfigError
from fourfold.core.frozen import FrozenDict, freeze, thaw
from fourfold.core.parameters import parameters
from tests.core.configs import (
    CONFIGS,
    FLASH_RATIOS,
    PRO_RATIOS,
    YARN,
    changed,
    error,
    hugging_face,
    read,
    released,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "flash",
            {
                "vocab_size": 129280, "hidden_size": 4096, "num_hidden_layers": 43,
                "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64,
                "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128,
                "compress_ratios": FLASH_RATIOS, "n_routed_experts": 256,
                "num_experts_per_tok": 6, "n_shared_experts": 1, "moe_intermediate_size": 2048,
                "num_hash_layers": 3, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
                "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "hc_mult": 4,
                "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
                "rope_theta": 1e4, "compress_rope_theta": 1.6e5, "rope_scaling": YARN,
                "max_position_embeddings": 1048576, "num_nextn_predict_layers": 1,
                "num_dspark_stages": 0, "torch_dtype": "bfloat16", "bos_token_id": 0,
                "eos_token_id": 1, "expert_dtype": "fp4",
            },
        ),
        ("flash_base", {"expert_dtype": "fp8", "compress_ratios": FLASH_RATIOS}),
        (
            "pro",
            {
                "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
                "q_lora_rank": 1536, "o_groups": 16, "index_topk": 1024,
                "n_routed_experts": 384, "moe_intermediate_size": 3072,
                "routed_scaling_factor": 2.5, "compress_ratios": PRO_RATIOS,
                "expert_dtype": "fp4", "num_nextn_predict_layers": 1,
            },
        ),
    ],
)  # fmt: skip
def test_released_configs_are_read_whole(name: str, expected: dict) -> None:
    reading = ModelConfig.from_file(CONFIGS / f"{name}.json")
    assert {key: getattr(reading.config, key) for key in expected} == expected
    assert reading.config.quantization_config == freeze(released(name)["quantization_config"])
    assert reading.unknown_keys == ()
    assert reading.notes == ()
    assert "use_cache" in reading.ignored_keys
    assert reading.source == str(CONFIGS / f"{name}.json")


def test_layer_kinds_of_the_released_models() -> None:
    def kinds(name: str) -> dict[str, list[int]]:
        config = read(released(name))
        layers = range(config.num_hidden_layers)
        return {
            kind: [layer for layer in layers if config.layer_kind(layer) == kind]
            for kind in ("SWA", "CSA", "HCA")
        }

    flash, pro = kinds("flash"), kinds("pro")
    assert flash == {"SWA": [0, 1], "CSA": [*range(2, 43, 2)], "HCA": [*range(3, 42, 2)]}
    assert pro == {"SWA": [], "CSA": [*range(2, 61, 2)], "HCA": [0, 1, *range(3, 60, 2)]}
    config = read(released("flash"))
    assert [config.is_hash_layer(layer) for layer in (0, 2, 3, 42)] == [True, True, False, False]
    assert [config.has_indexer(ratio) for ratio in (0, 4, 128)] == [False, True, False]
    assert [config.compressor_series(ratio) for ratio in (4, 128)] == [2, 1]
    assert config.nope_head_dim == 448


def test_released_configs_give_the_published_number_of_tensors() -> None:
    """69,187 tensors in Flash and 145,116 in Pro, counting a scale for each quantised weight."""

    def tensors(name: str) -> int:
        config = read(released(name))
        return sum(
            len(spec.checkpoint_names) * (2 if "quantis" in spec.storage.value or
                                          "expert" in spec.storage.value else 1)
            for spec in parameters(config)
        )  # fmt: skip

    assert tensors("flash") == 69_187
    assert tensors("pro") == 145_116


def test_reference_program_spelling_means_the_same_model() -> None:
    reading = ModelConfig.from_file(CONFIGS / "flash_reference.json")
    assert reading.config == read(released("flash"))
    assert reading.unknown_keys == ()
    assert {note.split()[0] for note in reading.notes} == {
        "rms_norm_eps", "hc_eps", "max_position_embeddings", "torch_dtype", "bos_token_id",
        "eos_token_id",
    }  # fmt: skip


def test_reference_program_spelling_without_fp8_or_yarn() -> None:
    config = read(changed("flash_reference", dtype="bf16"))
    assert config.quantization_config is None
    assert config.torch_dtype == "bfloat16"
    plain = changed("flash_reference", original_seq_len=0, max_position_embeddings=4096)
    assert read(plain).rope_scaling is None
    assert "dtype must be fp8 or bf16" in error(changed("flash_reference", dtype="int8"))
    text = error(changed("flash_reference", rope_factor=0.5))
    assert text == "rope_factor must be at least 1, found 0.5"
    extra = ModelConfig.from_dict(changed("flash_reference", n_routed_experts_score=128), "c")
    assert extra.unknown_keys == ("n_routed_experts_score",)


def test_transformers_spelling_means_the_same_model() -> None:
    reading = ModelConfig.from_dict(hugging_face(), "config.json")
    assert reading.config == read(released("flash"))
    assert reading.unknown_keys == ()
    assert reading.notes == ()


def test_both_spellings_in_one_file_must_agree() -> None:
    both = hugging_face(**released("flash"))
    assert read(both) == read(released("flash"))
    ratios = [0, 0, 128, *FLASH_RATIOS[3:], 0]
    text = error(both | {"compress_ratios": ratios})
    assert "compress_ratios[2] is 128 but layer_types[2] is 'compressed_sparse_attention'" in text
    assert "num_hash_layers is 4 but mlp_layer_types names 3" in error(
        both | {"num_hash_layers": 4}
    )
    text = error(both | {"num_local_experts": 128})
    assert "n_routed_experts is 256 but num_local_experts is 128" in text
    text = error(both | {"partial_rotary_factor": 0.25})
    assert "qk_rope_head_dim is 64 but head_dim × partial_rotary_factor is 128" in text
    text = error(both | {"rope_theta": 5000})
    assert "rope_theta is 5000 but rope_parameters.main.rope_theta is 10000" in text


@pytest.mark.parametrize("name", ["flash", "flash_base", "pro"])
def test_what_transformers_saves_from_a_released_config(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    config = read(released(name))
    transformers.DeepseekV4Config(**released(name)).save_pretrained(tmp_path)
    reading = ModelConfig.from_directory(tmp_path)
    moved = freeze({**released(name)["quantization_config"], "expert_dtype": config.expert_dtype})
    assert reading.config == replace(config, quantization_config=moved)
    assert reading.unknown_keys == ()
    assert reading.notes == ()


def test_what_transformers_saves_by_default(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    transformers.DeepseekV4Config().save_pretrained(tmp_path)
    reading = ModelConfig.from_directory(tmp_path)
    ratios = (128, 128, *(128, 4) * 20, 128)
    assert reading.config.compress_ratios == ratios
    assert reading.config.rope_scaling is None
    assert reading.config.num_hash_layers == 3
    assert reading.config.qk_rope_head_dim == 64
    assert reading.config.quantization_config is None
    assert reading.unknown_keys == ()
    assert reading.notes == ("torch_dtype is not in this file; bfloat16 is used",)


def test_dspark_stages_are_counted_by_the_ratios_and_left_out() -> None:
    reading = ModelConfig.from_file(CONFIGS / "flash_dspark.json")
    config = reading.config
    assert (config.num_nextn_predict_layers, config.num_dspark_stages) == (0, 3)
    assert config.compress_ratios == FLASH_RATIOS
    assert reading.unknown_keys == ()
    assert len(reading.notes) == 1
    assert "DSpark" in reading.notes[0]
    assert not any(spec.prefix.startswith("mtp") for spec in parameters(config))
    ratios = released("flash_dspark")["compress_ratios"]
    assert read(changed(compress_ratios=ratios)) == config
    reference = read(changed("flash_reference", compress_ratios=ratios))
    assert (reference.num_nextn_predict_layers, reference.num_dspark_stages) == (0, 3)
    keys = {key: value for key, value in released("flash_dspark").items() if "dspark" in key}
    without_count = ModelConfig.from_dict(hugging_face(**keys), "config.json").config
    assert (without_count.num_nextn_predict_layers, without_count.num_dspark_stages) == (0, 3)


def test_mtp_layers_follow_the_file() -> None:
    ratios = list(FLASH_RATIOS)
    assert read(changed(drop=("num_nextn_predict_layers",))).num_nextn_predict_layers == 1
    short = ModelConfig.from_dict(changed(compress_ratios=ratios), "config.json")
    assert short.config.num_nextn_predict_layers == 1
    assert "0 entries after the main layers" in short.notes[0]
    none = changed(compress_ratios=ratios, num_nextn_predict_layers=0)
    assert read(none).num_nextn_predict_layers == 0
    assert "num_nextn_predict_layers must be 0 or 1, found 2" in error(
        changed(num_nextn_predict_layers=2)
    )
    assert "compress_ratios[43] must be 0" in error(changed(compress_ratios=[*ratios, 4]))


def test_unknown_keys_are_reported_and_known_irrelevant_ones_are_not() -> None:
    data = changed(speculation=3, auto_map={"AutoModel": "evil.py"}, kv_lora_rank=512)
    data["rope_scaling"] = data["rope_scaling"] | {"wobble": 1}
    reading = ModelConfig.from_dict(data, "config.json")
    assert reading.unknown_keys == ("speculation", "kv_lora_rank", "rope_scaling.wobble")
    assert "auto_map" in reading.ignored_keys
    assert any("never executed" in note for note in reading.notes)
    flat = ModelConfig.from_dict(changed(beta_fast=32), "config.json")
    assert flat.unknown_keys == ("beta_fast",)


def test_a_directory_is_searched_for_either_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds neither config\.json nor inference/config\.json"):
        ModelConfig.from_directory(tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        ModelConfig.from_directory(tmp_path / "absent")
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "config.json").write_text(json.dumps(released("flash_reference")))
    assert ModelConfig.from_directory(tmp_path).source.endswith("inference/config.json")
    (tmp_path / "config.json").write_text(json.dumps(released("pro")))
    assert ModelConfig.from_directory(tmp_path).config.num_hidden_layers == 61


def test_a_modelopt_file_stands_in_for_the_quantization_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(quantization_config=None)))
    quantization = {"quant_algo": "NVFP4", "group_size": 16}
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"quantization": quantization}))
    config = ModelConfig.from_directory(tmp_path).config
    assert config.quantization_config == {"quant_method": "modelopt", **quantization}
    beside.write_text('{"quantization": 4}')
    with pytest.raises(ConfigError, match="quantization must be an object, found 4"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(released("flash")))
    assert ModelConfig.from_directory(tmp_path).config == read(released("flash"))


def test_model_config_checks_itself_when_built_or_replaced() -> None:
    config = read(released("flash"))
    with pytest.raises(ConfigError, match="compress_ratios must be a list of 2 ratios"):
        replace(config, num_hidden_layers=2)
    with pytest.raises(ConfigError, match="num_dspark_stages must be 0 where an MTP layer runs"):
        replace(config, num_dspark_stages=3)
    short = replace(config, num_hidden_layers=2, compress_ratios=(4, 128))
    assert [short.layer_kind(layer) for layer in (0, 1)] == ["CSA", "HCA"]
    with pytest.raises(AttributeError):
        config.hidden_size = 1  # type: ignore[misc]


def test_model_config_travels_and_compares() -> None:
    config = read(released("flash"))
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert len({config, read(released("flash")), read(released("pro"))}) == 2
    assert config.quantization_config is not None
    with pytest.raises(TypeError):
        config.quantization_config["fmt"] = "e5m2"  # type: ignore[index]
    assert thaw(config.quantization_config) == released("flash")["quantization_config"]


def test_frozen_dict_is_a_mapping_and_nothing_more() -> None:
    frozen = freeze({"a": [1, {"b": 2}]})
    assert frozen == {"a": (1, FrozenDict(b=2))}
    assert hash(frozen) == hash(freeze({"a": [1, {"b": 2}]}))
    assert repr(frozen) == "FrozenDict({'a': (1, FrozenDict({'b': 2}))})"
    with pytest.raises(AttributeError):
        frozen.x = 1
    with pytest.raises(AttributeError):
        frozen._items = {}


def test_engine_config_is_frozen_all_the_way() -> None:
    config = EngineConfig("dir", kernels={"moe": "triton"}, parallel=ParallelConfig(8, 8, rank=7))
    assert config.parallel.world_size == 8
    assert config.kernels == {"moe": "triton"}
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(TypeError):
        config.kernels["moe"] = "torch"  # type: ignore[index]


def test_reading_a_config_needs_no_torch() -> None:
    code = (
        "import sys; from fourfold.core.config import ModelConfig; import fourfold.core.checkpoint;"
        f"ModelConfig.from_file({str(CONFIGS / 'pro.json')!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parents[2])
