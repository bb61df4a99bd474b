"""Per-layer rules of Quark, compressed-tensors, ModelOpt and transformers, and their failures."""

from dataclasses import replace

import pytest

from fourfold.core.errors import FourfoldError, QuantizationError
from fourfold.core.parameters import EXPERT_ROLES, Role
from fourfold.quant.resolve import resolve
from fourfold.quant.rules import Stage
from tests.quant.stored import CT_WEIGHTS, FP8, QUARK, checkpoint, fp4, plain, small


@pytest.mark.parametrize("dot", ["", "."])
def test_the_experts_prefix_with_and_without_its_trailing_dot(dot: str) -> None:
    config = small("fp4", FP8)
    resolution = resolve(config, checkpoint(config))
    dotted = resolution.decision("layers.1.", Role.EXPERT_W1)
    assert resolution.decision(f"layers.1{dot}", Role.EXPERT_W1) is dotted
    everything = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_block"}}
    for pattern in (
        f"layers.*.ffn.experts{dot}",
        f"*.ffn.experts{dot}",
        f"model.layers.1.ffn.experts{dot}",
    ):
        rules = {"quant_method": "quark", "layer_quant_config": {pattern: everything}}
        planned = resolve(small(None, rules))
        for role in EXPERT_ROLES:
            decision = planned.decision("layers.1", role)
            assert (decision.scheme, decision.stage) == ("fp8_block", Stage.RULES), pattern
        shared = planned.decision("layers.1", Role.SHARED_W1)
        assert shared.stage is not Stage.RULES, "ffn.shared_experts is not ffn.experts"


def test_rules_of_layer_1_do_not_reach_layer_10() -> None:
    config = replace(small(), num_hidden_layers=11, compress_ratios=(0,) * 11)
    for rules in (
        {"quant_method": "compressed-tensors", "ignore": ["layers.1.attn.wq_a"]},
        QUARK | {"exclude": ["layers.1.*"]},
        {"quant_method": "fp8", "modules_to_not_convert": ["layers.1"]},
    ):  # fmt: skip
        resolution = resolve(replace(config, quantization_config=rules))
        stages = {
            layer: resolution.decision(f"layers.{layer}", Role.WQ_A).stage for layer in (1, 10)
        }
        assert stages[1] is Stage.RULES
        assert stages[10] is not Stage.RULES


def test_quark_rules_apply_in_their_own_order() -> None:
    weight = QUARK["global_quant_config"]["weight"]
    fp8_block = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_block"}}
    config = small(
        None,
        QUARK
        | {
            "exclude": ["*.attn.wo_a", "re:.*wq_b"],
            "layer_quant_config": {
                "*.attn.*": fp8_block,
                "*shared_experts*": {"weight": weight},
                "*.w2": fp8_block,
                "layers.2.ffn.experts.*": {"weight": weight},
                "layers.3.ffn.experts.*": {"weight": weight},
            },
        },
    )
    planned = resolve(config)

    def scheme(prefix: str, role: Role) -> tuple[str, Stage]:
        one = planned.decision(prefix, role)
        return one.scheme, one.stage

    assert scheme("layers.1", Role.WO_A) == ("plain", Stage.RULES)
    assert scheme("layers.1", Role.WQ_B) == ("plain", Stage.RULES)
    assert scheme("layers.1", Role.WQ_A) == ("fp8_block", Stage.RULES)
    assert scheme("layers.1", Role.SHARED_W2) == ("mxfp4", Stage.RULES)
    assert scheme("layers.1", Role.EXPERT_W1) == ("mxfp4", Stage.METHOD)
    assert scheme("mtp.0", Role.EXPERT_W1) == ("mxfp4", Stage.RULES)  # layer 3 of 3 is mtp.0
    assert scheme("mtp.0", Role.E_PROJ) == ("mxfp4", Stage.METHOD)


def test_compressed_tensors_prefers_names_to_patterns_to_classes() -> None:
    mxfp4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    config = small(
        None,
        {
            "quant_method": "compressed-tensors",
            "ignore": ["re:.*indexer.*", "lm_head"],
            "config_groups": {
                "all": {"targets": ["Linear"], "weights": CT_WEIGHTS},
                "experts": {"targets": [r"re:.*experts\.\d+\.w[123]$"], "weights": mxfp4},
                "one": {"targets": ["layers.0.attn.wkv"], "weights": mxfp4},
            },
        },
    )
    planned = resolve(config)
    for prefix, role, scheme in [
        ("layers.0", Role.WKV, "mxfp4"),
        ("layers.1", Role.WKV, "fp8_block"),
        ("layers.1", Role.INDEXER_WQ_B, "plain"),
        ("layers.1", Role.SHARED_W1, "fp8_block"),
        ("layers.1", Role.EXPERT_W3, "mxfp4"),
    ]:
        decision = planned.decision(prefix, role)
        assert (decision.scheme, decision.stage) == (scheme, Stage.RULES)


def test_rules_in_the_files_own_spelling_are_matched() -> None:
    """transformers' names in file and rules, native names inside."""
    config = small(None, QUARK | {"layer_quant_config": {"model.layers.0.self_attn.q_a_proj": {}}})
    name = "model.layers.0.self_attn.q_a_proj.weight"
    headers = checkpoint(config, fp4, fp4, {"layers.0.attn.wq_a.weight": lambda *_: {}})
    headers |= plain(name, 256, 256)

    def native(file_name: str) -> tuple[str, ...]:
        return ("layers.0.attn.wq_a.weight",) if file_name == name else (file_name,)

    decision = resolve(config, headers, native=native).decision("layers.0", Role.WQ_A)
    assert decision.reason.startswith(name)
    rule = next(one for one in decision.stages if one.stage is Stage.RULES)
    assert (rule.scheme, decision.scheme) == ("plain", "plain")


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (FP8 | {"weight_block_size": [64, 64]}, "weight_block_size [64, 64] says FP8 in blocks"),
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2' says FP8 in format 'e5m2'"),
        (FP8 | {"activation_scheme": "static"}, "says FP8 with static activation scales"),
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "g": {
                        "targets": ["re:.*wkv$"],
                        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                    }
                },
            },
            "config_groups.g target 're:.*wkv$' says FP8 per channel",
        ),
    ],
)
def test_a_field_that_contradicts_the_linear_layers_is_refused(
    quantization: dict, expected: str
) -> None:
    config = small(None, quantization)
    with pytest.raises(QuantizationError) as caught:
        resolve(config, checkpoint(config))
    assert expected in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_a_layer_that_a_tool_left_alone_may_still_be_quantised() -> None:
    config = small("fp4", FP8 | {"modules_to_not_convert": ["wo_a"], "ignore": ["mtp.0.e_proj"]})
    resolution = resolve(config, checkpoint(config))
    assert resolution.decision("layers.0", Role.WO_A).scheme == "fp8_block"
    assert any("'wo_a' (plain) is overruled" in line for line in resolution.lines())
    planned = resolve(config)
    assert planned.decision("layers.0", Role.WO_A).scheme == "plain"
    assert planned.decision("mtp.0", Role.E_PROJ).scheme == "plain"
    assert planned.decision("mtp.0", Role.H_PROJ).scheme == "fp8_block"


def grouped(**weights) -> dict:
    groups = {"g": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


def quark(group_size: int) -> dict:
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": group_size}
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}}


MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}},
}
INT8_W2 = {"layer_quant_config": {"*w2": {"weight": {"dtype": "int8", "qscheme": "per_channel"}}}}


@pytest.mark.parametrize(
    ("expert_dtype", "quantization", "expected"),
    [
        (
            "nvfp4",
            FP8,
            "expert_dtype 'nvfp4': layers.0.ffn.experts.w1.weight would be stored as NV",
        ),
        ("int4", FP8, "would be stored as expert dtype 'int4', which is not supported"),
        ("fp4", FP8 | {"moe_quant_algo": "NVFP4"}, "moe_quant_algo 'NVFP4'"),
        ("fp4", MODELOPT, "as NVFP4"),
        (None, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
        (None, {"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8 per tensor"),
        (None, {"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        (None, grouped(num_bits=4, type="int", group_size=128), "int4 weights in groups of 128"),
        (None, grouped(num_bits=4, type="float", group_size=16), "NVFP4"),
        (None, quark(128), "FP4 in groups of 128"),
        (None, QUARK | INT8_W2, "Quark int8 per_channel"),
        (None, FP8 | {"weight_block_size": [1, 128]}, "FP8 in blocks of 1×128"),
    ],
)
def test_without_files_other_schemes_are_refused_by_name(
    expert_dtype: str | None, quantization: dict, expected: str
) -> None:
    with pytest.raises(QuantizationError) as caught:
        resolve(small(expert_dtype, quantization))
    assert expected in str(caught.value)
    assert "supported are plain weights" in str(caught.value)


def test_rules_that_tell_the_experts_of_a_layer_apart_are_refused() -> None:
    config = small(None, QUARK | {"exclude": ["layers.1.ffn.experts.1.w1"]})
    with pytest.raises(QuantizationError, match=r"gives plain to.*must share one scheme"):
        resolve(config)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": 3}, "quantization_config.quant_method must be a string, found 3"),
        ({"exclude": "lm_head"}, "quantization_config.exclude must be a list of strings"),
        ({"ignore": [1]}, "quantization_config.ignore must be a list of strings"),
        ({"layer_quant_config": []}, "quantization_config.layer_quant_config must be an object"),
        ({"layer_quant_config": {"*": 1}}, "layer_quant_config.* must be an object, found 1"),
        ({"config_groups": {"g": None}}, "config_groups.g must be an object, found None"),
        ({"quantized_layers": {"a": 2}}, "quantized_layers.a must be an object, found 2"),
        ({"expert_dtype": 4}, "quantization_config.expert_dtype must be a string, found 4"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size must be a list"),
        ({"ignore": ["re:("]}, "ignore 're:(' is no regular expression"),
    ],
)
def test_malformed_quantization_fields_are_named(quantization: dict, expected: str) -> None:
    with pytest.raises(FourfoldError) as caught:
        resolve(small(None, quantization))
    assert expected in str(caught.value)
