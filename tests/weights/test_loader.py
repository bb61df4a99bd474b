"""Loading: every tensor once, by value, or an error that says which and where."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fourfold.core.errors import FourfoldError
from fourfold.core.parameters import Role, Storage, parameters
from fourfold.core.tensor import QuantTensor, dense
from fourfold.weights.loader import CheckpointPlan, load, open_checkpoint
from fourfold.weights.raw import reinterpret
from tests.weights.written import (
    CONFIG,
    SCALE,
    W1,
    WQ_A,
    Written,
    check_values,
    edit_index,
    loaded,
    raw_entries,
    refused,
    save_raw,
    tiny_config,
    write,
)


@pytest.mark.parametrize(
    ("experts", "linears", "scales", "plain"),
    [
        ("fp4", "fp8", "e8m0", torch.bfloat16),  # Flash, Pro
        ("fp8", "fp8", "f32", torch.bfloat16),  # the Base
        ("fp8", "fp8", "e8m0", torch.bfloat16),
        ("fp4", "plain", "e8m0", torch.bfloat16),
        ("plain", "plain", "e8m0", torch.bfloat16),
        ("plain", "plain", "e8m0", torch.float32),
        ("plain", "plain", "e8m0", torch.float64),
    ],
)
def test_values_are_those_written(
    tmp_path: Path, experts: str, linears: str, scales: str, plain: torch.dtype
) -> None:
    written = write(CONFIG, experts, linears, scales, plain)
    weights = loaded(written.save(tmp_path))
    check_values(weights, written)
    scheme = {"fp4": "mxfp4", "fp8": "fp8_block"}
    for spec in parameters(CONFIG):
        weight = weights[spec.name]
        kind = {Storage.EXPERT: experts, Storage.LINEAR: linears}.get(spec.storage, "plain")
        assert isinstance(weight, QuantTensor) == (kind != "plain")
        if isinstance(weight, QuantTensor):
            assert weight.scheme.name == scheme[kind]
            assert weight.quantize_activations
            e8m0 = kind == "fp4" or scales == "e8m0"
            assert weight.scale.dtype == (torch.uint8 if e8m0 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_plain_weights_take_the_model_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = loaded(write(CONFIG).save(tmp_path), dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = {Storage.MODEL: dtype, Storage.FLOAT: wide, Storage.INTEGER: torch.int64}
    for spec in parameters(CONFIG):
        weight = weights[spec.name]
        if spec.storage in expected:
            assert isinstance(weight, Tensor)
            assert weight.dtype == expected[spec.storage], spec.name
            assert weight.data_ptr() % 16 == 0


def test_model_dtypes_are_the_three(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="dtype must be one of"):
        loaded(write(CONFIG).save(tmp_path), dtype=torch.float16)


def test_float_parameters_may_be_stored_in_bfloat16(tmp_path: Path) -> None:
    written = write(CONFIG)
    for name in ("hc_head_fn", "layers.1.attn.attn_sink"):
        written.tensors[name] = written.tensors[name].to(torch.bfloat16)
        written.values[name] = written.tensors[name].double()
    check_values(loaded(written.save(tmp_path)), written)


def test_expert_ids_may_be_stored_in_32_bits(tmp_path: Path) -> None:
    written = write(CONFIG)
    name = "layers.0.ffn.gate.tid2eid"
    written.tensors[name] = written.tensors[name].to(torch.int32)
    check_values(loaded(written.save(tmp_path)), written)


def test_activation_quantization_can_be_switched_off(tmp_path: Path) -> None:
    weights = loaded(write(CONFIG).save(tmp_path), activation_quantization=False)
    quantised = [weight for weight in weights.values() if isinstance(weight, QuantTensor)]
    assert quantised
    assert not any(weight.quantize_activations for weight in quantised)


def test_scales_stored_as_plain_bytes(tmp_path: Path) -> None:
    """Writers without an E8M0 dtype store the same bytes as U8."""
    written = write(CONFIG)
    for name, tensor in written.tensors.items():
        if tensor.dtype == torch.float8_e8m0fnu:
            written.tensors[name] = tensor.view(torch.uint8)
    check_values(loaded(written.save(tmp_path)), written)


def test_fp4_codes_stored_as_u8_or_f4(tmp_path: Path) -> None:
    written = write(CONFIG)
    entries = raw_entries(written.tensors)
    for name, (dtype, shape, data) in list(entries.items()):
        if dtype == "I8":
            entries[name] = ("F4", [shape[0], 2 * shape[1]], data)
    save_raw(tmp_path / "model.safetensors", entries)
    check_values(loaded(tmp_path), written)
    for name, (dtype, shape, data) in list(entries.items()):
        if dtype == "F4":
            entries[name] = ("U8", [shape[0], shape[1] // 2], data)
    save_raw(tmp_path / "model.safetensors", entries)
    check_values(loaded(tmp_path), written)


@pytest.mark.parametrize("pad", ["", " ", "  ", "   ", "     "])
def test_misaligned_data(tmp_path: Path, pad: str) -> None:
    """Files promise no alignment: the header is as long as it happens to be."""
    written = write(CONFIG)
    save_raw(tmp_path / "model.safetensors", raw_entries(written.tensors), pad)
    check_values(loaded(tmp_path), written)


def test_misaligned_by_one_byte(tmp_path: Path) -> None:
    written = write(CONFIG, scales="f32")
    entries = raw_entries(written.tensors)
    for pad in range(8):
        save_raw(tmp_path / "model.safetensors", entries, " " * pad)
        plan = open_checkpoint(tmp_path, CONFIG)
        if plan.index.headers[SCALE].offset_begin % 4 == 1:
            break
    else:
        pytest.fail("no padding misaligns the scale")
    check_values(load(plan, dtype=torch.float64), written)


def test_negative_zero_becomes_zero(tmp_path: Path) -> None:
    written = write(CONFIG)
    written.tensors[WQ_A].view(torch.uint8)[0, :4] = torch.tensor([0x80, 0, 0x81, 0x80]).byte()
    written.tensors[W1].view(torch.uint8)[0, :4] = torch.tensor([0x88, 0x80, 0x08, 0x89]).byte()
    weights = loaded(written.save(tmp_path))
    linear, expert = weights[WQ_A], weights["layers.1.ffn.experts.w1.weight"]
    assert isinstance(linear, QuantTensor)
    assert isinstance(expert, QuantTensor)
    assert linear.codes[0, :4].tolist() == [0, 0, 0x81, 0]
    assert expert.codes[2, 0, :4].tolist() == [0, 0, 0, 0x09]
    assert not bool((linear.codes == 0x80).any())
    for nibble in (expert.codes & 0x0F, expert.codes >> 4):
        assert not bool((nibble == 8).any())


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    plan = open_checkpoint(write(CONFIG).save(tmp_path), CONFIG)
    load(plan, progress=lambda *step: seen.append(step))
    prefixes = ["", "layers.0.", "layers.1.", "layers.2.", "layers.3.", "", "mtp.0."]
    assert [prefix for prefix, _, _ in seen] == prefixes
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
    assert seen[-1][1] == seen[-1][2] == plan.nbytes == plan.index.nbytes


def sources(plan: CheckpointPlan) -> list[tuple[str, int, int]]:
    return [
        (source.header.file, source.begin, source.end)
        for parameter in plan.parameters
        for source in parameter.weights + parameter.scales
    ]


def test_every_byte_is_used_exactly_once(tmp_path: Path) -> None:
    plan = open_checkpoint(write(CONFIG).save(tmp_path), CONFIG)
    used = sorted(sources(plan))
    stored = sorted((h.file, h.offset_begin, h.offset_end) for h in plan.index.headers.values())
    assert used == stored


# Other spellings.


def as_transformers(written: Written) -> dict[str, Tensor]:
    """The tensors in transformers' spelling, experts fused, made with a table of their own."""
    tails = {
        "embed.weight": "model.embed_tokens.weight",
        "head.weight": "lm_head.weight",
        "norm.weight": "model.norm.weight",
        "hc_head_fn": "model.hc_head.hc_fn",
        "hc_head_base": "model.hc_head.hc_base",
        "hc_head_scale": "model.hc_head.hc_scale",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "hc_attn_fn": "attn_hc.fn", "hc_attn_base": "attn_hc.base",
        "hc_attn_scale": "attn_hc.scale",
        "hc_ffn_fn": "ffn_hc.fn", "hc_ffn_base": "ffn_hc.base", "hc_ffn_scale": "ffn_hc.scale",
        "attn.attn_sink": "self_attn.sinks", "attn.wq_a": "self_attn.q_a_proj",
        "attn.q_norm": "self_attn.q_a_norm", "attn.wq_b": "self_attn.q_b_proj",
        "attn.wkv": "self_attn.kv_proj", "attn.kv_norm": "self_attn.kv_norm",
        "attn.wo_a": "self_attn.o_a_proj", "attn.wo_b": "self_attn.o_b_proj",
        "attn.compressor.ape": "self_attn.compressor.position_bias",
        "attn.compressor.wkv": "self_attn.compressor.kv_proj",
        "attn.compressor.wgate": "self_attn.compressor.gate_proj",
        "attn.compressor.norm": "self_attn.compressor.kv_norm",
        "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
        "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
        "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
        "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
        "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
        "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
        "ffn.gate.weight": "mlp.gate.weight", "ffn.gate.tid2eid": "mlp.gate.tid2eid",
        "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
        "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
        "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
        "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
    }  # fmt: skip
    result: dict[str, Tensor] = {}
    for spec in parameters(CONFIG):
        values = written.values[spec.name]
        values = values if spec.storage is Storage.INTEGER else values.float()
        tail = spec.role.value
        if spec.prefix.startswith("mtp."):
            continue
        if spec.role is Role.EXPERT_W1:
            up = written.values[spec.prefix + Role.EXPERT_W3.value].float()
            result[f"model.{spec.prefix}mlp.experts.gate_up_proj"] = torch.cat([values, up], dim=1)
        elif spec.role is Role.EXPERT_W2:
            result[f"model.{spec.prefix}mlp.experts.down_proj"] = values
        elif spec.role is not Role.EXPERT_W3 and not spec.prefix:
            result[tails[tail]] = values
        elif spec.role is not Role.EXPERT_W3:
            stem, leaf = (tail[:-7], ".weight") if tail[:-7] in tails else (tail, "")
            result[f"model.{spec.prefix}{tails[stem]}{leaf}"] = values
    return result


def test_transformers_spelling_with_fused_experts(tmp_path: Path) -> None:
    written = write(CONFIG, "plain", "plain", plain=torch.float32)
    config = tiny_config(num_nextn_predict_layers=0)
    safetensors.torch.save_file(as_transformers(written), tmp_path / "model.safetensors")
    plan = open_checkpoint(tmp_path, config)
    weights = load(plan, dtype=torch.float64)
    assert list(weights) == [spec.name for spec in parameters(config)]
    for name, weight in weights.items():
        assert torch.equal(dense(weight, torch.float64) if weight.is_floating_point() else weight,
                           written.values[name]), name  # fmt: skip
    # Both halves of every fused matrix, each byte once.
    used = sorted(sources(plan))
    for (file, _, end), (other, begin, _) in pairwise(used):
        assert file == other
        assert end == begin
    assert sum(end - begin for _, begin, end in used) == plan.index.nbytes


@pytest.mark.full
@pytest.mark.parametrize("original", [True, False])
def test_what_transformers_saves_itself(tmp_path: Path, original: bool) -> None:
    """Both of its formats; the one it calls original spells kv_norm `attn.norm`."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DeepseekV4Config(
        vocab_size=96, hidden_size=160, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
        q_lora_rank=32, o_groups=2, o_lora_rank=16, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=96, index_n_heads=2, index_head_dim=16,
        compress_ratios=[0, 4, 128, 4], num_hash_layers=2,
    )  # fmt: skip
    model = transformers.DeepseekV4ForCausalLM(theirs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path, save_original_format=original)
    weights = loaded(tmp_path, tiny_config(num_nextn_predict_layers=0), dtype=torch.float32)
    state = model.state_dict()
    for layer in range(4):
        ours = f"layers.{layer}."
        their = f"model.layers.{layer}."
        norm = weights[ours + "attn.kv_norm.weight"]
        assert torch.equal(norm, state[their + "self_attn.kv_norm.weight"])
        both = torch.cat(
            [weights[ours + "ffn.experts.w1.weight"], weights[ours + "ffn.experts.w3.weight"]], 1
        )
        assert torch.equal(both, state[their + "mlp.experts.gate_up_proj"])
    sums = sorted(float(w.double().sum()) for w in weights.values() if isinstance(w, Tensor))
    theirs_sums = []
    for name, tensor in state.items():
        halves = tensor.chunk(2, dim=1) if name.endswith("gate_up_proj") else [tensor]
        theirs_sums += [float(half.double().sum()) for half in halves]
    assert sums == pytest.approx(sorted(theirs_sums))


def test_fused_quantised_experts(tmp_path: Path) -> None:
    """FP8 stacks of both matrices, where each ends with a whole block."""
    config = tiny_config(moe_intermediate_size=128, num_nextn_predict_layers=0)
    written = write(config, "fp8", "fp8")
    tensors = {name: t for name, t in written.tensors.items() if ".experts." not in name}
    for layer in range(4):
        stem = f"layers.{layer}.ffn.experts"
        for leaf, suffix in (("weight", ""), ("scale", "_scale_inv")):

            def stack(matrix: str, stem: str = stem, leaf: str = leaf) -> Tensor:
                return torch.stack(
                    [
                        written.tensors[f"{stem}.{k}.{matrix}.{leaf}"].view(torch.uint8)
                        for k in range(4)
                    ]
                )

            both = torch.cat([stack("w1"), stack("w3")], dim=1)
            kind = written.tensors[f"{stem}.0.w1.{leaf}"].dtype
            tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj{suffix}"] = both.view(kind)
            tensors[f"model.layers.{layer}.mlp.experts.down_proj{suffix}"] = stack("w2").view(kind)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    weights = loaded(tmp_path, config)
    for spec in parameters(config):
        found = weights[spec.name]
        if spec.storage is not Storage.INTEGER:
            assert torch.equal(dense(found, torch.float64), written.values[spec.name]), spec.name


def test_fused_quantised_experts_that_share_a_block_are_refused(tmp_path: Path) -> None:
    config = tiny_config(num_nextn_predict_layers=0)  # 96 rows each: the second block holds both
    written = write(config, "fp8", "plain")
    tensors = {name: t for name, t in written.tensors.items() if ".experts." not in name}
    for layer in range(4):
        stem = f"model.layers.{layer}.mlp.experts."
        tensors[stem + "gate_up_proj"] = torch.zeros(4, 192, 160).to(torch.float8_e4m3fn)
        tensors[stem + "gate_up_proj_scale_inv"] = torch.ones(4, 2, 2)
        tensors[stem + "down_proj"] = torch.zeros(4, 160, 96).to(torch.float8_e4m3fn)
        tensors[stem + "down_proj_scale_inv"] = torch.ones(4, 2, 1)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "gate_up_proj", "do not end with a block of 128", config=config)


# Known oddities of released checkpoints.


def test_wo_a_in_bf16_beside_fp8_linears(tmp_path: Path) -> None:
    """Its scale may be left behind in the index."""
    written = write(CONFIG)
    for layer in ("layers.0", "layers.1", "layers.2", "layers.3", "mtp.0"):
        name = f"{layer}.attn.wo_a.weight"
        written.tensors[name] = written.values[name].to(torch.bfloat16)
        written.values[name] = written.tensors[name].double()
        del written.tensors[f"{layer}.attn.wo_a.scale"]
    written.save(tmp_path)
    first = "model-00002-of-00006.safetensors"
    edit_index(tmp_path, lambda files: files.update({"layers.0.attn.wo_a.scale": first}))
    plan = open_checkpoint(tmp_path, CONFIG)
    assert any("layers.0.attn.wo_a.scale" in note for note in plan.notes)
    check_values(load(plan, dtype=torch.float64), written)


def test_a_stale_scale_of_another_matrix_is_no_oddity(tmp_path: Path) -> None:
    written = write(CONFIG)
    written.tensors[WQ_A] = written.values[WQ_A].to(torch.bfloat16)
    del written.tensors[SCALE]
    written.save(tmp_path)
    edit_index(tmp_path, lambda files: files.update({SCALE: files[WQ_A]}))
    refused(tmp_path, "stale", SCALE, "byte")


def test_copies_of_embedding_and_head_under_mtp(tmp_path: Path) -> None:
    written = write(CONFIG)
    written.tensors["mtp.0.emb.tok_emb.weight"] = written.tensors["embed.weight"].clone()
    written.tensors["mtp.0.head.weight"] = written.tensors["head.weight"].clone()
    plan = open_checkpoint(written.save(tmp_path), CONFIG)
    check_values(load(plan, dtype=torch.float64), written)
    assert {header.name for header in plan.left_out} == {
        "mtp.0.emb.tok_emb.weight",
        "mtp.0.head.weight",
    }
    text = "\n".join(plan.notes)
    assert "left out mtp.0.head.weight" in text
    assert "no copy" not in text


def test_a_copy_that_is_none_is_said(tmp_path: Path) -> None:
    written = write(CONFIG)
    written.tensors["mtp.0.head.weight"] = written.tensors["embed.weight"].clone()
    plan = open_checkpoint(written.save(tmp_path), CONFIG)
    assert any("no copy of head.weight" in note for note in plan.notes)


def test_a_copy_of_another_shape_is_refused(tmp_path: Path) -> None:
    written = write(CONFIG)
    written.tensors["mtp.0.head.weight"] = written.tensors["head.weight"][:-1].clone()
    refused(written.save(tmp_path), "mtp.0.head.weight", "expected a copy of head.weight")


def test_dspark_stages_are_left_out_and_counted(tmp_path: Path) -> None:
    written = write(CONFIG)
    stage = [name for name in written.tensors if name.startswith("mtp.0.")]
    written.tensors["mtp.0.main_proj.weight"] = torch.ones(4, 4)
    written.tensors["mtp.2.markov_head.markov_w1.weight"] = torch.ones(4, 4)
    config = tiny_config(num_nextn_predict_layers=0, num_dspark_stages=3)
    plan = open_checkpoint(written.save(tmp_path), config)
    text = "\n".join(plan.notes)
    assert f"left out mtp.0 ({len(stage) + 1} tensors" in text
    assert "left out mtp.2 (1 tensor, 64 bytes): a DSpark stage" in text
    assert set(load(plan)) == {spec.name for spec in parameters(config)}


def test_reinterpret_changes_no_byte() -> None:
    data = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32):
        back = reinterpret(reinterpret(data, dtype), torch.uint8)
        assert torch.equal(back, data)
        assert back.data_ptr() == data.data_ptr()


def test_nothing_is_unpickled_or_executed(tmp_path: Path) -> None:
    """Modelling code and pickles beside the weights stay untouched."""
    written = write(CONFIG)
    written.save(tmp_path)
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('executed')")
    (tmp_path / "training_args.bin").write_bytes(b"cos\nabort\n(tR.")
    (tmp_path / "config.json").write_text(
        json.dumps({"auto_map": {"AutoModel": "modeling_evil.X"}})
    )
    check_values(loaded(tmp_path), written)
