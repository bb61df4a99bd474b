"""The rename table is total and exact: a name has one place, or none."""

import pytest

from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Role, Storage, parameters, scale_name
from fourfold.weights.names import LeftOut, NameTable, Part, Place, native_weight_names, role_of
from tests.weights.written import flash_config, tiny_config


def inventory(config) -> dict[str, tuple[ParamSpec, Part, int | None]]:
    """Every native checkpoint name of a quantised release, and what it stands for."""
    result = {}
    for spec in parameters(config):
        quantised = spec.storage in (Storage.LINEAR, Storage.EXPERT)
        for number, name in enumerate(spec.checkpoint_names):
            expert = number if spec.role in EXPERT_ROLES else None
            result[name] = (spec, Part.WEIGHT, expert)
            if quantised:
                result[scale_name(name)] = (spec, Part.SCALE, expert)
    return result


@pytest.fixture(scope="module")
def flash():
    config = flash_config()
    return NameTable(config), inventory(config)


def test_every_tensor_of_flash_has_its_own_place(flash) -> None:
    table, names = flash
    assert len(names) == 69187  # published
    places = set()
    for name, (spec, part, expert) in names.items():
        place = table.find(name)
        assert isinstance(place, Place), name
        assert (place.specs, place.part, place.expert) == ((spec,), part, expert), name
        places.add((spec.name, part, expert))
        assert table.find(f"model.{name}") == place
    assert len(places) == len(names)


def test_a_rename_rule_that_swallows_a_neighbour(flash) -> None:
    """Substring rules lost 381 of 2,519 parameters to their neighbours; here look-alikes keep a
    place each, in both spellings."""
    table, _ = flash
    lookalikes = [
        ("norm.weight", "layers.2.attn.q_norm.weight", "layers.2.attn.kv_norm.weight",
         "layers.2.attn_norm.weight", "layers.2.ffn_norm.weight", "mtp.0.norm.weight",
         "mtp.0.enorm.weight", "mtp.0.hnorm.weight", "layers.2.attn.compressor.norm.weight",
         "layers.2.attn.indexer.compressor.norm.weight"),
        ("head.weight", "hc_head_fn", "hc_head_base", "hc_head_scale", "mtp.0.hc_head_fn"),
        ("layers.2.ffn.gate.weight", "layers.2.attn.compressor.wgate.weight",
         "layers.2.attn.indexer.compressor.wgate.weight"),
        ("layers.2.attn.wkv.weight", "layers.2.attn.compressor.wkv.weight",
         "layers.2.attn.indexer.compressor.wkv.weight"),
        ("layers.2.attn.wq_b.weight", "layers.2.attn.indexer.wq_b.weight"),
        ("layers.2.ffn.experts.0.w1.weight", "layers.2.ffn.shared_experts.w1.weight"),
        ("layers.1.ffn.experts.1.w1.weight", "layers.11.ffn.experts.1.w1.weight",
         "layers.1.ffn.experts.11.w1.weight"),
        ("layers.2.hc_attn_scale", "layers.2.attn.wq_a.scale", "layers.2.hc_ffn_scale"),
        ("layers.2.attn.compressor.ape", "layers.2.attn.indexer.compressor.ape"),
        ("model.layers.2.self_attn.kv_norm.weight",
         "model.layers.2.self_attn.compressor.kv_norm.weight",
         "model.layers.2.self_attn.compressor.indexer.kv_norm.weight", "model.norm.weight"),
        ("model.layers.2.self_attn.q_b_proj.weight",
         "model.layers.2.self_attn.compressor.indexer.q_b_proj.weight"),
        ("model.layers.2.mlp.shared_experts.gate_proj.weight",
         "model.layers.2.self_attn.compressor.gate_proj.weight",
         "model.layers.2.self_attn.compressor.indexer.gate_proj.weight"),
    ]  # fmt: skip
    for group in lookalikes:
        places = [table.find(name) for name in group]
        assert all(isinstance(place, Place) for place in places), group
        keys = {(place.specs[0].name, place.part, place.expert) for place in places}
        assert len(keys) == len(group), group


# Native to transformers' spelling, at least one name for every line of their own mapping.
HF = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
    "layers.2.attn_norm.weight": "model.layers.2.input_layernorm.weight",
    "layers.2.ffn_norm.weight": "model.layers.2.post_attention_layernorm.weight",
    "layers.2.hc_attn_fn": "model.layers.2.attn_hc.fn",
    "layers.2.hc_attn_scale": "model.layers.2.attn_hc.scale",
    "layers.2.hc_ffn_base": "model.layers.2.ffn_hc.base",
    "layers.2.attn.attn_sink": "model.layers.2.self_attn.sinks",
    "layers.2.attn.wq_a.weight": "model.layers.2.self_attn.q_a_proj.weight",
    "layers.2.attn.q_norm.weight": "model.layers.2.self_attn.q_a_norm.weight",
    "layers.2.attn.wkv.weight": "model.layers.2.self_attn.kv_proj.weight",
    "layers.2.attn.wo_a.weight": "model.layers.2.self_attn.o_a_proj.weight",
    "layers.2.attn.compressor.ape": "model.layers.2.self_attn.compressor.position_bias",
    "layers.2.attn.compressor.wgate.weight": "model.layers.2.self_attn.compressor.gate_proj.weight",
    "layers.2.attn.compressor.norm.weight": "model.layers.2.self_attn.compressor.kv_norm.weight",
    "layers.2.attn.indexer.compressor.wkv.weight":
        "model.layers.2.self_attn.compressor.indexer.kv_proj.weight",
    "layers.2.attn.indexer.wq_b.weight":
        "model.layers.2.self_attn.compressor.indexer.q_b_proj.weight",
    "layers.2.attn.indexer.weights_proj.weight":
        "model.layers.2.self_attn.compressor.indexer.scorer.weights_proj.weight",
    "layers.3.ffn.gate.bias": "model.layers.3.mlp.gate.e_score_correction_bias",
    "layers.2.ffn.shared_experts.w1.weight": "model.layers.2.mlp.shared_experts.gate_proj.weight",
    "layers.2.ffn.shared_experts.w2.weight": "model.layers.2.mlp.shared_experts.down_proj.weight",
    "layers.2.ffn.shared_experts.w3.weight": "model.layers.2.mlp.shared_experts.up_proj.weight",
}  # fmt: skip


@pytest.mark.parametrize("native", HF)
def test_both_spellings_have_one_place(flash, native: str) -> None:
    table, _ = flash
    place = table.find(native)
    assert isinstance(place, Place)
    assert table.find(HF[native]) == place


@pytest.mark.full
def test_transformers_own_names_reach_every_parameter_once() -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    config = tiny_config(num_nextn_predict_layers=0)
    theirs = transformers.DeepseekV4Config(
        vocab_size=96, hidden_size=160, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
        q_lora_rank=32, o_groups=2, o_lora_rank=16, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=96, index_n_heads=2, index_head_dim=16,
        compress_ratios=[0, 4, 128, 4], num_hash_layers=2,
    )  # fmt: skip
    with torch.device("meta"):
        state = transformers.DeepseekV4ForCausalLM(theirs).state_dict()
    table, reached = NameTable(config), []
    for name, tensor in state.items():
        place = table.find(name)
        assert isinstance(place, Place), name
        rows = sum(spec.shape[-2] for spec in place.specs) if len(place.specs) > 1 else None
        if rows is not None:
            assert tuple(tensor.shape) == (4, rows, 160)
        else:
            assert tuple(tensor.shape) == place.specs[0].shape, name
        reached += [spec.name for spec in place.specs]
    assert sorted(reached) == sorted(spec.name for spec in parameters(config))


def test_converter_spellings() -> None:
    """What DeepSeek's own converter accepts, mixed."""
    table = NameTable(tiny_config())
    place = table.find("layers.0.attn.wq_a.scale")
    assert table.find("model.layers.0.self_attn.wq_a.weight_scale_inv") == place
    assert table.find("model.layers.0.self_attn.q_a_proj.weight_scale") == place
    bias = table.find("layers.2.ffn.gate.bias")
    assert isinstance(bias, Place)
    assert table.find("model.layers.2.mlp.gate.e_score_correction_bias") == bias
    one = table.find("layers.2.ffn.experts.3.w3.scale")
    assert table.find("model.layers.2.mlp.experts.3.up_proj.weight_scale_inv") == one


def test_fused_stacks_feed_two_parameters() -> None:
    table = NameTable(tiny_config())
    both = table.find("model.layers.0.mlp.experts.gate_up_proj")
    assert isinstance(both, Place)
    assert both.fused
    assert [spec.role for spec in both.specs] == [Role.EXPERT_W1, Role.EXPERT_W3]
    down = table.find("model.layers.0.mlp.experts.down_proj")
    assert isinstance(down, Place)
    assert [spec.role for spec in down.specs] == [Role.EXPERT_W2]
    assert native_weight_names("model.layers.0.mlp.experts.gate_up_proj") == (
        "layers.0.ffn.experts.w1.weight",
        "layers.0.ffn.experts.w3.weight",
    )
    assert native_weight_names("model.layers.0.mlp.experts.7.up_proj.weight") == (
        "layers.0.ffn.experts.7.w3.weight",
    )
    assert native_weight_names("layers.0.ffn.experts.7.w3.scale") == ()


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "weight", "model", "model.", "norm", "norms.weight", "xnorm.weight",
        "layers.0.norm.weight",  # only the tail and the MTP layer have one
        "layers.4.attn.wq_a.weight",  # one layer too many
        "layers.00.attn.wq_a.weight", "layers.+1.attn.wq_a.weight", "layers.١.attn.wq_a.weight",
        "layers.-1.attn.wq_a.weight", "layers.1e1.attn.wq_a.weight",
        "layers.0.ffn.experts.4.w1.weight",  # one expert too many
        "layers.0.ffn.experts.*.w1.weight", "layers.0.ffn.experts.w1.weight",
        "layers.0.ffn.experts.00.w1.weight", "layers.0.ffn.experts.0.w4.weight",
        "layers.0.ffn.experts", "layers.0.ffn.experts.", "layers.0.ffn.experts0.w1.weight",
        "layers.0.ffn.experts.0.w1.weight_scale_2", "layers.0.ffn.experts.0.w1.input_scale",
        "layers.0.attn.wq_a", "layers.0.attn.wq_a.weight.", "layers.0.attn.wq_a.bias",
        "layers.0.attn.compressor.ape",  # layer 0 has no compressor
        "layers.2.attn.indexer.wq_b.weight",  # an HCA layer has no indexer
        "layers.0.ffn.gate.bias",  # a hash layer has no bias
        "layers.2.ffn.gate.tid2eid",  # and a learned one no table
        "mtp.1.attn.wq_a.weight", "mtp.0.e_proj.bias", "mtp.0.emb.tok_emb.scale",
        "model.model.norm.weight", "layers.0.layers.0.attn.wq_a.weight",
        "layers.0.attn.wq_a.weight\n", "LAYERS.0.attn.wq_a.weight",
    ],
)  # fmt: skip
def test_unknown_names(name: str) -> None:
    assert NameTable(tiny_config()).find(name) is None


def test_the_prefix_of_the_experts_with_and_without_its_trailing_dot() -> None:
    """What begins with `ffn.experts` is no expert, and what begins with `ffn.experts.` is one."""
    table = NameTable(tiny_config())
    for spec in parameters(tiny_config()):
        if spec.role in EXPERT_ROLES:
            places = [table.find(name) for name in spec.checkpoint_names]
            assert [place.expert for place in places] == [0, 1, 2, 3]
    for stem in ("layers.0.ffn.experts", "layers.0.ffn.experts_gate", "layers.0.ffn.expertsx.0.w1"):
        assert table.find(f"{stem}.weight") is None


def test_dspark_stages_are_left_out() -> None:
    table = NameTable(tiny_config(num_nextn_predict_layers=0, num_dspark_stages=3))
    for name in (
        "mtp.0.main_proj.weight",
        "mtp.2.markov_head.markov_w1.weight",
        "mtp.1.hc_attn_fn",
    ):
        found = table.find(name)
        assert isinstance(found, LeftOut)
        assert found.group == ".".join(name.split(".")[:2])
        assert "DSpark" in found.reason
    assert isinstance(table.find("layers.0.hc_attn_fn"), Place)


def test_mtp_is_left_out_where_the_config_has_none() -> None:
    found = NameTable(tiny_config(num_nextn_predict_layers=0)).find("mtp.0.e_proj.scale")
    assert isinstance(found, LeftOut)


def test_copies_of_shared_matrices_are_left_out() -> None:
    table = NameTable(tiny_config())
    for name, role in (("mtp.0.emb.tok_emb.weight", Role.EMBED), ("mtp.0.head.weight", Role.HEAD)):
        found = table.find(name)
        assert isinstance(found, LeftOut)
        assert found.twin is not None
        assert found.twin.role is role
    assert table.find("mtp.1.head.weight") is None


def test_schemes_with_tensors_of_their_own_are_noticed() -> None:
    table = NameTable(tiny_config())
    assert table.stands_beside_known("model.layers.0.mlp.experts.1.gate_proj.weight_scale_2")
    assert table.stands_beside_known("layers.0.attn.wq_a.input_scale")
    assert not table.stands_beside_known("layers.0.attn.wq_a.scale")
    assert not table.stands_beside_known("visual.0.weight_scale_2")


def test_role_of_a_parameter() -> None:
    for spec in parameters(tiny_config()):
        assert role_of(spec.name) is spec.role
    with pytest.raises(ValueError, match="nonsense"):
        role_of("layers.0.nonsense")
