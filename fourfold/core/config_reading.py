"""From a config file, in any of three spellings, to a `ModelConfig`.

Contract: reads JSON strictly (no NaN, no duplicate key), refuses what is not DeepSeek-V4 or changes
the network in a way this engine does not implement, and reports every key it did not understand.
Two spellings of one value must agree. Errors are `ConfigError` with the file's name in front and
the key as spelled in it. Nothing from a checkpoint is ever executed: `auto_map` is ignored. The
tables of keys are in core/config_keys.py; it does not know how quantised weights are stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fourfold.core import config_keys as keys
from fourfold.core.config import (
    LAYER_KINDS,
    Described,
    FieldError,
    ModelConfig,
    RopeScaling,
    expect,
    expect_int,
    expect_positive,
    short,
)
from fourfold.core.config_fields import Keys
from fourfold.core.config_rope import read_rope
from fourfold.core.errors import ConfigError

CONFIG_NAME = "config.json"
REFERENCE_CONFIG_NAME = "inference/config.json"
MODELOPT_CONFIG_NAME = "hf_quant_config.json"
DSPARK_STAGES = 3
"""Stages of every DSpark release so far; used only where a file does not let us count them."""


@dataclass(frozen=True)
class ModelConfigReading:
    """A config and what reading it found.

    `unknown_keys`: keys without a meaning here, in file order (nested ones as `rope_scaling.key`).
    `ignored_keys`: known keys that change nothing. `notes`: sentences for the log about values that
    were assumed or left out. `source`: the file, or the name the caller gave.
    """

    config: ModelConfig
    unknown_keys: tuple[str, ...]
    ignored_keys: tuple[str, ...]
    notes: tuple[str, ...]
    source: str


def read_directory(directory: Path) -> ModelConfigReading:
    """Read `directory`/config.json, or the reference program's file where that alone exists.

    A ModelOpt `hf_quant_config.json` beside it stands in for a missing `quantization_config`.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory")
    path = directory / CONFIG_NAME
    if not path.exists():
        path = directory / REFERENCE_CONFIG_NAME
    if not path.exists():
        raise ConfigError(
            f"{directory} holds neither {CONFIG_NAME} nor {REFERENCE_CONFIG_NAME}: "
            "it is not a checkpoint directory"
        )
    data = _load(path)
    beside = directory / MODELOPT_CONFIG_NAME
    if beside.exists() and data.get("quantization_config") is None:
        data["quantization_config"] = _modelopt(beside)
    return read_mapping(data, str(path))


def read_file(path: Path) -> ModelConfigReading:
    """Read one JSON file in any of the three spellings."""
    return read_mapping(_load(path), str(path))


def read_mapping(data: Mapping[str, Any], source: str) -> ModelConfigReading:
    """Read a config that is already parsed; `source` names it in messages."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected a JSON object, found {type(data).__name__}")
    found = Keys(data, source)
    try:
        config = _read(found)
    except FieldError as error:
        raise ConfigError(f"{source}: {found.in_file_spelling(error)}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    ignored = tuple(key for key in data if key in keys.IGNORED)
    unknown = [k for k in data if k not in found.used and k not in keys.IGNORED]
    return ModelConfigReading(
        config, (*unknown, *found.unknown_nested), ignored, tuple(found.notes), source
    )


def _read(found: Keys) -> ModelConfig:
    _check_model_type(found)
    _check_presence(found)
    _check_fixed(found)
    values: dict[str, Any] = {}
    for field, names in keys.INTEGERS.items():
        values[field] = found.get(field, names)
        expect_int(field, values[field])
    for field, names in (keys.NUMBERS | keys.EPSILONS).items():
        values[field] = found.get(field, names)
        if values[field] is None:
            found.note(f"{field} is not in this file; the reference program's 1e-6 is used")
            values[field] = 1e-6
        expect_positive(field, values[field])
    rope = read_rope(found)
    values["rope_theta"], values["compress_rope_theta"], values["rope_scaling"] = rope[:3]
    values["qk_rope_head_dim"] = _rope_head_dim(found, values["head_dim"], rope[3])
    values["compress_ratios"], tail = _ratios(found, values["num_hidden_layers"])
    values["num_hash_layers"] = _hash_layers(found, values["num_hidden_layers"])
    mtp, dspark = _mtp(found, tail)
    values["num_nextn_predict_layers"], values["num_dspark_stages"] = mtp, dspark
    values["max_position_embeddings"] = _max_positions(found, values["rope_scaling"])
    values["torch_dtype"], values["quantization_config"] = _storage(found)
    values["expert_dtype"] = found.get("expert_dtype")
    for field, default in (("bos_token_id", 0), ("eos_token_id", 1)):
        values[field] = _token_id(found, field, default)
    return ModelConfig(**values)


def _check_model_type(found: Keys) -> None:
    model_type = found.get("model_type")
    if model_type is None and not found.is_reference:
        found.fail(f"model_type is missing; this engine runs {keys.MODEL_TYPE!r} only")
    if model_type == "deepseek_v41":
        found.fail(
            "model_type 'deepseek_v41' (DeepSeek-V4.1) is a different network; this engine runs "
            f"{keys.MODEL_TYPE!r} only"
        )
    if model_type not in (None, keys.MODEL_TYPE):
        found.fail(
            f"model_type {short(model_type)} is not supported; this engine runs "
            f"{keys.MODEL_TYPE!r} only"
        )
    if found.data.get("auto_map") is not None:
        found.note("auto_map is ignored: code that comes with a checkpoint is never executed")


def _check_presence(found: Keys) -> None:
    groups = keys.REQUIRED
    if not found.is_reference:
        groups += keys.REQUIRED_OUTSIDE_REFERENCE
    here = found.data.keys()
    nullable = {"rope_scaling"}
    missing = [
        " or ".join(group)
        for group in groups
        if not any(n in here and (n in nullable or found.data[n] is not None) for n in group)
    ]
    if missing:
        found.fail(f"missing {'keys' if len(missing) > 1 else 'key'}: {', '.join(missing)}")


def _check_fixed(found: Keys) -> None:
    """Refuse settings that would make it another network; this engine has no code for them."""
    for field, (names, only) in keys.FIXED.items():
        value = found.get(field, names)
        ok = value is None or (type(value) is type(only) and value == only)
        expect(ok, field, f"{json.dumps(only)} (nothing else is implemented)", value)
    groups, top = found.get("n_group"), found.get("topk_group")
    limited = groups not in (None, 0, 1) or top not in (None, 0, 1)
    if limited and groups != top:
        found.fail(
            f"n_group is {short(groups)} and topk_group {short(top)}: routing limited to groups "
            "of experts is not part of DeepSeek-V4"
        )


def _rope_head_dim(found: Keys, head_dim: int, nested: list[tuple[str, Any]]) -> int:
    """`qk_rope_head_dim`, or `head_dim` times transformers' `partial_rotary_factor`."""
    candidates = found.candidates(keys.QK_ROPE_HEAD_DIM)
    for name, factor in found.candidates(("partial_rotary_factor",)) + nested:
        expect_positive(name, factor)
        expect(factor <= 1, name, "at most 1", factor)
        width = head_dim * factor
        whole = math.isclose(width, round(width), rel_tol=1e-6)
        expect(whole, name, f"a whole number of head_dim's {head_dim} dimensions", factor)
        candidates.append((f"head_dim × {name}", round(width)))
    width = found.agree("qk_rope_head_dim", candidates)
    expect_int("qk_rope_head_dim", width)
    return int(width)


def _ratios(found: Keys, layers: int) -> tuple[tuple[int, ...], int | None]:
    """The main layers' ratios, and how many entries follow them (None if the file cannot say)."""
    _check_rates(found)
    types = found.get("layer_types")
    from_types = None if types is None else _ratios_of_types(types, layers)
    ratios = found.get("compress_ratios")
    if ratios is None:
        assert from_types is not None  # _check_presence saw one of the two
        return from_types, None
    expect(isinstance(ratios, list | tuple), "compress_ratios", "a list of integers", ratios)
    for index, ratio in enumerate(ratios):
        ok = type(ratio) is int and ratio in LAYER_KINDS
        expect(ok, f"compress_ratios[{index}]", "0 (SWA), 4 (CSA) or 128 (HCA)", ratio)
    wanted = f"a list of {layers} ratios (num_hidden_layers) and one more for each MTP layer"
    expect(len(ratios) >= layers, "compress_ratios", wanted, Described(f"{len(ratios)} entries"))
    main, tail = tuple(ratios[:layers]), ratios[layers:]
    for index, ratio in enumerate(tail, layers):
        expect(ratio == 0, f"compress_ratios[{index}]", "0, being an MTP layer's", ratio)
    if from_types is not None and from_types != main:
        layer = next(i for i in range(layers) if from_types[i] != main[i])
        found.fail(
            f"compress_ratios[{layer}] is {main[layer]} but layer_types[{layer}] is "
            f"{types[layer]!r}; they mean the same thing and must agree"
        )
    return main, len(tail)


def _ratios_of_types(types: object, layers: int) -> tuple[int, ...]:
    expect(isinstance(types, list | tuple), "layer_types", "a list of names", types)
    assert isinstance(types, list | tuple)
    wanted = f"a list of {layers} names, one for each of the num_hidden_layers"
    expect(len(types) == layers, "layer_types", wanted, Described(f"{len(types)} entries"))
    for index, name in enumerate(types):
        ok = isinstance(name, str) and name in keys.LAYER_TYPES
        expect(ok, f"layer_types[{index}]", "one of " + ", ".join(keys.LAYER_TYPES), name)
    return tuple(keys.LAYER_TYPES[name] for name in types)


def _check_rates(found: Keys) -> None:
    """transformers lets a file set the compression rates; only 4 and 128 are implemented."""
    rates = found.get("compress_rates")
    expect(rates is None or isinstance(rates, Mapping), "compress_rates", "an object", rates)
    given = [(f"compress_rates.{name}", name, rate) for name, rate in (rates or {}).items()]
    for key, name in keys.COMPRESS_RATES.items():
        given += [(key, name, rate) for _, rate in found.candidates((key,))]
    for key, name, rate in given:
        if name not in keys.LAYER_TYPES:
            found.unknown_nested.append(key)
            continue
        only = keys.LAYER_TYPES[name]
        ok = type(rate) is int and rate == only
        expect(ok, key, f"{only}, the only rate implemented for that kind of layer", rate)


def _hash_layers(found: Keys, layers: int) -> int:
    count = found.get("num_hash_layers", keys.NUM_HASH_LAYERS)
    if count is not None:
        expect_int("num_hash_layers", count, minimum=0)
    types = found.get("mlp_layer_types")
    if types is None:
        return int(count)
    expect(isinstance(types, list | tuple), "mlp_layer_types", "a list of names", types)
    wanted = f"a list of {layers} names, one for each of the num_hidden_layers"
    expect(len(types) == layers, "mlp_layer_types", wanted, Described(f"{len(types)} entries"))
    for index, name in enumerate(types):
        expect(name in ("hash_moe", "moe"), f"mlp_layer_types[{index}]", "hash_moe or moe", name)
    hashed = list(types).count("hash_moe")
    if "hash_moe" in types[hashed:]:
        found.fail("mlp_layer_types must name all hash_moe layers before the first moe layer")
    if count is not None and min(count, layers) != hashed:
        found.fail(
            f"{found.spelling['num_hash_layers']} is {count} but mlp_layer_types names {hashed} "
            "hash_moe layers; they mean the same thing and must agree"
        )
    return hashed


def _mtp(found: Keys, tail: int | None) -> tuple[int, int]:
    """(MTP layers to run, DSpark stages to leave out), from the length of `compress_ratios` first.

    DSpark releases keep `num_nextn_predict_layers` 1 although three `mtp.*` stages exist, so that
    key cannot count them.
    """
    declared = found.get("num_nextn_predict_layers", keys.NUM_MTP_LAYERS)
    if declared is not None:
        expect_int("num_nextn_predict_layers", declared, minimum=0)
    dspark = [key for key in found.data if key.startswith(keys.DSPARK_PREFIX)]
    found.used.update(dspark)
    if (tail or 0) > 1 or any(found.data[key] is not None for key in dspark):
        stages = tail or DSPARK_STAGES
        found.note(
            f"a DSpark checkpoint: its {stages} mtp.* stages are left out and the main model runs "
            "without drafts"
        )
        return 0, stages
    if declared is None:
        return tail or 0, 0
    expect(declared <= 1, "num_nextn_predict_layers", "0 or 1", declared)
    if tail is not None and tail != declared:
        found.note(
            f"{found.spelling['num_nextn_predict_layers']} is {declared} although compress_ratios "
            f"has {tail} entries after the main layers"
        )
    return declared, 0


def _max_positions(found: Keys, scaling: RopeScaling | None) -> int:
    limit = found.get("max_position_embeddings")
    if limit is None:
        expect(
            scaling is not None, "max_position_embeddings", "given where there is no YaRN", limit
        )
        assert scaling is not None
        reach = scaling.factor * scaling.original_max_position_embeddings
        expect_positive("max_position_embeddings", reach)
        limit = round(reach)
        found.note(f"max_position_embeddings is not in this file; YaRN's range of {limit} is used")
    expect_int("max_position_embeddings", limit)
    return int(limit)


def _storage(found: Keys) -> tuple[str, Mapping[str, Any] | None]:
    """The model dtype, and the quantisation config (both one key in the reference program)."""
    quantization = found.get("quantization_config", keys.QUANTIZATION)
    if found.is_reference:
        storage, scale = found.get("dtype"), found.get("scale_fmt")
        expect(storage in (None, "fp8", "bf16"), "dtype", "fp8 or bf16", storage)
        if storage == "fp8" and quantization is None:
            quantization = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "scale_fmt": scale,
                "weight_block_size": [128, 128],
            }
        names: tuple[str, ...] = ("torch_dtype",)
    else:
        names = ("torch_dtype", "dtype")
    dtype = found.get("torch_dtype", names)
    if dtype is None:
        found.note("torch_dtype is not in this file; bfloat16 is used")
        dtype = "bfloat16"
    is_object = quantization is None or isinstance(quantization, Mapping)
    expect(is_object, "quantization_config", "an object", quantization)
    return dtype, quantization


def _token_id(found: Keys, field: str, default: int) -> int:
    value = found.get(field)
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None:
        found.note(f"{field} is not in this file; {default} is used")
        return default
    expect_int(field, value, minimum=0)
    return int(value)


def _load(path: Path) -> dict[str, Any]:
    """Parse one JSON object, refusing what the json module lets through."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is out of range")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"key {twice!r} occurs twice")
        return result

    try:
        data = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=constant,
            parse_float=number,
            object_pairs_hook=unique,
        )
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _modelopt(path: Path) -> dict[str, Any]:
    """The `quantization` object of a ModelOpt file, in the shape of a `quantization_config`."""
    quantization = _load(path).get("quantization")
    if not isinstance(quantization, dict):
        raise ConfigError(f"{path}: quantization must be an object, found {short(quantization)}")
    return {"quant_method": "modelopt", **quantization}
