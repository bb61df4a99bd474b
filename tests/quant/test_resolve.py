"""Which scheme stores which weight: headers decide, fields are checked, every stage is shown."""

from dataclasses import replace

import pytest

from fourfold.core.config import EXPERT_DTYPES, ModelConfig
from fourfold.core.errors import ConfigError, QuantizationError
from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Role, Storage, parameters
from fourfold.quant.resolve import Resolution, resolve
from fourfold.quant.rules import Stage
from tests.quant.stored import (
    AGREE,
    BASE_HEADERS,
    COMPRESSED,
    CONFIGS,
    FLASH_HEADERS,
    FP8,
    QUARK,
    SGLANG_HEADERS,
    STORED,
    checkpoint,
    experts,
    fp8,
    plain,
    small,
)


def expert_stage(resolution: Resolution) -> Stage:
    return resolution.decision("layers.0.", Role.EXPERT_W1).stage


# What a config says of the routed experts, then the headers that fit it; the others contradict it.
VARIANTS = {
    "April 2026, without expert_dtype": (None, FP8, {"flash", "base", "sglang", "plain"}),
    "no quantization_config at all": (None, None, {"flash", "base", "sglang", "plain"}),
    "empty quantization_config": (None, {}, {"flash", "base", "sglang", "plain"}),
    "Flash and Pro": ("fp4", FP8, {"flash"}),
    "Flash-Base": ("fp8", FP8, {"base", "sglang"}),
    "in quantization_config, fp4": (None, FP8 | {"expert_dtype": "fp4"}, {"flash"}),
    "in quantization_config, fp8": (None, FP8 | {"expert_dtype": "fp8"}, {"base", "sglang"}),
    "expert_dtype alone": ("fp8", None, {"base", "sglang"}),
    "plain experts": ("bf16", FP8, {"plain"}),
    "quant_method mxfp4": (None, {"quant_method": "mxfp4"}, {"flash"}),
    "fmt e2m1": (None, FP8 | {"fmt": "e2m1"}, {"flash"}),
    "Quark": (None, QUARK, {"flash"}),
    "compressed-tensors": (None, COMPRESSED, {"base", "sglang"}),
    "an unknown word": ("int3", FP8, set()),
    "NVFP4 announced": ("fp4", FP8 | {"moe_quant_algo": "NVFP4"}, set()),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_config_with_every_header_gives_the_scheme_or_names_both(
    variant: str, stored: str
) -> None:
    expert_dtype, quantization, fits = VARIANTS[variant]
    config = small(expert_dtype, quantization)
    headers = checkpoint(config, **STORED[stored])
    if stored in fits:
        resolution = resolve(config, headers)
        assert experts(resolution, config) == {AGREE[stored]}
        assert expert_stage(resolution) is Stage.HEADER
        return
    with pytest.raises(QuantizationError) as caught:
        resolve(config, headers)
    text = str(caught.value)
    assert "layers.0.ffn.experts.0.w1.weight is" in text
    assert "model.safetensors" in text
    assert any(field in text for field in ("expert_dtype", "quant", "fmt", "config_groups"))
    word = {"mxfp4": "fp4", "fp8_block": "fp8", "plain": "bf16"}[AGREE[stored][0]]
    assert f"--expert-dtype {word}" in text
    confirmed = resolve(config, headers, word)
    assert experts(confirmed, config) == {AGREE[stored]}
    assert any("is overruled" in line for line in confirmed.lines())


@pytest.mark.parametrize("word", EXPERT_DTYPES)
@pytest.mark.parametrize("stored", STORED)
def test_an_override_must_fit_the_bytes(word: str, stored: str) -> None:
    config = small(None, FP8)
    headers = checkpoint(config, **STORED[stored])
    words = {"mxfp4": {"fp4"}, "fp8_block": {"fp8", "fp8_block", "fp8_per_block"}}
    if word in {"auto"} | words.get(AGREE[stored][0], {"bf16"}):
        assert experts(resolve(config, headers, word), config) == {AGREE[stored]}
        return
    with pytest.raises(QuantizationError) as caught:
        resolve(config, headers, word)
    assert f"--expert-dtype {word} asks for" in str(caught.value)
    assert "layers.0.ffn.experts.0.w1.weight is" in str(caught.value)


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(ConfigError, match="--expert-dtype must be one of auto, fp4, fp8"):
        resolve(small(), None, "int4")


@pytest.mark.parametrize(
    ("expert_dtype", "quantization", "override", "scheme", "stage"),
    [
        ("fp4", FP8, "fp8", "fp8_block", Stage.EXPLICIT),
        ("fp8", FP8, "auto", "fp8_block", Stage.EXPERT_DTYPE),
        (None, FP8 | {"expert_dtype": "fp8"}, "auto", "fp8_block", Stage.EXPERT_DTYPE),
        (None, COMPRESSED, "auto", "fp8_block", Stage.RULES),
        (None, QUARK, "auto", "mxfp4", Stage.METHOD),
        (None, None, "auto", "plain", Stage.METHOD),
        (None, FP8, "auto", "mxfp4", Stage.FAMILY),
    ],
)
def test_without_files_each_stage_decides_when_the_earlier_ones_are_silent(
    expert_dtype: str | None, quantization: dict | None, override: str, scheme: str, stage: Stage
) -> None:
    config = small(expert_dtype, quantization)
    resolution = resolve(config, None, override)
    decision = resolution.decision("layers.2.", Role.EXPERT_W2)
    assert (decision.scheme, decision.stage) == (scheme, stage)
    order = list(Stage)
    earlier = [one for one in decision.stages if order.index(one.stage) < order.index(stage)]
    assert [one.scheme for one in earlier] == [None] * len(earlier)
    assert list(dict.fromkeys(one.stage for one in decision.stages)) == order
    line = resolution.lines()[0]
    assert line.startswith(f"routed experts: {scheme}")
    assert f"decided by {stage.value} (" in line


def test_the_header_decides_over_silence_and_says_so() -> None:
    config = small("fp4", FP8)
    line = resolve(config, checkpoint(config)).lines()[0]
    assert line == (
        "routed experts: mxfp4 with e8m0 scales in 4 layers, decided by header "
        "(layers.0.ffn.experts.0.w1.weight is I8 [384, 128] with F8_E8M0 scale [384, 8], "
        "model.safetensors); --expert-dtype auto; expert_dtype 'fp4' agrees; there are no "
        "per-layer rules; quantization_config.quant_method 'fp8', fmt 'e4m3' leaves the routed "
        "experts open; DeepSeek-V4 as released agrees"
    )


def test_an_fp4_checkpoint_whose_config_lost_expert_dtype_is_not_read_as_fp8() -> None:
    for quantization in (FP8, {"quant_method": "fp8"}, None):
        config = small(None, quantization)
        stored = resolve(config, checkpoint(config, **FLASH_HEADERS))
        assert experts(stored, config) == {("mxfp4", "e8m0")}
    planned = resolve(small(None, FP8))
    assert experts(planned, small()) == {("mxfp4", "e8m0")}


def test_an_fp8_checkpoint_whose_config_lost_expert_dtype_is_not_read_as_fp4() -> None:
    config = small(None, FP8)
    stored = resolve(config, checkpoint(config, **BASE_HEADERS))
    assert experts(stored, config) == {("fp8_block", "f32")}


def test_wo_a_and_mtp_projections_may_be_plain_beside_fp8_layers() -> None:
    config = small("fp8", FP8)
    names = [f"layers.{n}.attn.wo_a.weight" for n in range(3)] + ["mtp.0.e_proj.weight"]
    headers = checkpoint(config, **SGLANG_HEADERS, special=dict.fromkeys(names, plain))
    resolution = resolve(config, headers)
    assert resolution.decision("layers.2", Role.WO_A).scheme == "plain"
    assert resolution.decision("mtp.0", Role.E_PROJ).scheme == "plain"
    assert resolution.decision("mtp.0", Role.H_PROJ).scheme == "fp8_block"
    assert any("attn.wo_a, e_proj): plain in 4 layers" in line for line in resolution.lines())


def test_only_quantisable_parameters_have_a_decision() -> None:
    config = small("fp4", FP8)
    resolution = resolve(config, checkpoint(config))
    for spec in parameters(config):
        quantisable = spec.storage in (Storage.LINEAR, Storage.EXPERT)
        assert (resolution.of(spec) is not None) == quantisable
    with pytest.raises(KeyError):
        resolution.decision("layers.0", Role.GATE)


def test_layers_may_differ_when_no_field_forbids_it() -> None:
    config = small(None, FP8)
    mtp = [s for s in parameters(config) if s.prefix == "mtp.0." and s.role in EXPERT_ROLES]
    special = {name: fp8 for spec in mtp for name in spec.checkpoint_names}
    resolution = resolve(config, checkpoint(config, special=special))
    assert resolution.decision("layers.0", Role.EXPERT_W1).scheme == "mxfp4"
    assert resolution.decision("mtp.0", Role.EXPERT_W1).scheme == "fp8_block"
    assert sum(line.startswith("routed experts") for line in resolution.lines()) == 2
    with pytest.raises(QuantizationError, match=r"expert_dtype 'fp4' says mxfp4, but mtp\.0\."):
        resolve(replace(config, expert_dtype="fp4"), checkpoint(config, special=special))


def test_without_files_two_fields_may_not_contradict_each_other() -> None:
    config = small("fp4", FP8 | {"expert_dtype": "fp8"})
    with pytest.raises(QuantizationError) as caught:
        resolve(config)
    assert "expert_dtype 'fp4' says mxfp4, but quantization_config.expert_dtype 'fp8'" in str(
        caught.value
    )
    assert experts(resolve(config, None, "fp8"), config) == {("fp8_block", "f32")}
    assert experts(resolve(config, checkpoint(config), "fp4"), config) == {("mxfp4", "e8m0")}


@pytest.mark.parametrize(
    ("expert_dtype", "quantization", "expected"),
    [
        ("fp4", FP8, "e8m0"),
        ("fp8", FP8, "f32"),
        ("fp4", FP8 | {"scale_fmt": None}, "f32"),
        ("bf16", FP8, "e8m0"),
    ],
)
def test_planned_scales_are_those_of_the_released_checkpoints(
    expert_dtype: str, quantization: dict, expected: str
) -> None:
    planned = resolve(small(expert_dtype, quantization))
    assert planned.decision("layers.0", Role.WKV).scale_format == expected


def test_missing_weights_leave_the_header_silent_for_the_loader_to_report() -> None:
    config = small("fp4", FP8)
    headers = checkpoint(config, special={"layers.0.attn.wkv.weight": lambda *_: {}})
    decision = resolve(config, headers).decision("layers.0", Role.WKV)
    assert (decision.scheme, decision.stage) == ("fp8_block", Stage.METHOD)
    assert decision.stages[0].reason == "the files do not hold it"


@pytest.mark.parametrize(
    ("name", "scheme"), [("flash", "mxfp4"), ("flash_base", "fp8_block"), ("pro", "mxfp4")]
)
def test_released_configs_resolve_without_files(name: str, scheme: str) -> None:
    config = ModelConfig.from_file(CONFIGS / f"{name}.json").config
    resolution = resolve(config)
    assert {pair[0] for pair in experts(resolution, config)} == {scheme}
    spec = ParamSpec(Role.WQ_A, "layers.5.", (1, 1))
    assert resolution.of(spec) == resolution.decision("layers.5", Role.WQ_A)
    assert len(resolution.lines()) == 2
