"""Bad checkpoints: one readable message each, with the tensor and the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fourfold.core.errors import CheckpointError
from fourfold.weights.coverage import CoverageError, fold
from fourfold.weights.loader import load, open_checkpoint
from tests.weights.written import (
    CONFIG,
    SCALE,
    W1,
    W1_SCALE,
    WQ_A,
    refused,
    tiny_config,
    write,
)

Spoil = Callable[[dict[str, Tensor]], None]


def drop(*names: str) -> Spoil:
    return lambda tensors: [tensors.pop(name) for name in names] and None


def put(name: str, make: Callable[[dict[str, Tensor]], Tensor]) -> Spoil:
    return lambda tensors: tensors.update({name: make(tensors)})


def poke(name: str, byte: int, kind: torch.dtype = torch.uint8) -> Spoil:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.uint8)[1, 1] = byte

    return spoil


def fill(name: str, value: float) -> Spoil:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return spoil


BAD: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "missing weight": (
        drop("layers.2.attn.wkv.weight", "layers.2.attn.wkv.scale"),
        ("1 missing", "layers.2.attn.wkv.weight"),
    ),
    "missing norm": (drop("mtp.0.enorm.weight"), ("1 missing", "mtp.0.enorm.weight")),
    "missing expert": (drop(W1, W1_SCALE), ("1 missing", W1)),
    "missing scale": (drop(SCALE), ("1 mismatched", WQ_A, "F8_E4M3 without a scale")),
    "missing expert scale": (drop(W1_SCALE), (W1, "I8 without a scale")),
    "missing weight of a scale": (
        drop(WQ_A),
        ("1 missing", "1 mismatched", "a scale without a weight"),
    ),
    "unexpected tensor": (
        put("layers.1.attn.bias", lambda t: torch.ones(1)),
        ("1 unexpected", "layers.1.attn.bias"),
    ),
    "unexpected expert": (
        put("layers.1.ffn.experts.4.w1.weight", lambda t: t[W1].clone()),
        ("1 unexpected", "layers.1.ffn.experts.4.w1.weight"),
    ),
    "unexpected layer": (
        put("layers.4.attn_norm.weight", lambda t: torch.ones(160)),
        ("1 unexpected",),
    ),
    "unexpected stage": (put("mtp.1.hnorm.weight", lambda t: torch.ones(160)), ("1 unexpected",)),
    "scale of a norm": (put("norm.scale", lambda t: torch.ones(1)), ("1 unexpected", "norm.scale")),
    "wrong shape": (
        put("norm.weight", lambda t: torch.ones(161)),
        ("norm.weight has shape [161], expected [160]", "byte"),
    ),
    "transposed weight": (
        put(WQ_A, lambda t: t[WQ_A].view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)),
        ("has shape [160, 32], expected [32, 160]",),
    ),
    "wrong scale shape": (put(SCALE, lambda t: torch.ones(2, 1)), (WQ_A,)),
    "wrong expert shape": (put(W1, lambda t: t[W1][:-1].clone()), (W1,)),
    "unpacked expert": (put(W1, lambda t: torch.zeros(96, 160, dtype=torch.int8)), (W1,)),
    "integer norm": (
        put("norm.weight", lambda t: torch.ones(160, dtype=torch.int64)),
        ("norm.weight is I64, expected BF16 or F16 or F32 or F64",),
    ),
    "float expert ids": (
        put("layers.0.ffn.gate.tid2eid", lambda t: torch.ones(96, 2)),
        ("tid2eid is F32, expected I64 or I32",),
    ),
    "fp8 norm": (
        put("norm.weight", lambda t: torch.ones(160).to(torch.float8_e4m3fn)),
        ("is F8_E4M3",),
    ),
    "scale of a plain weight": (
        put(WQ_A, lambda t: torch.ones(32, 160)),
        (SCALE, "is a scale, but its weight is plain F32"),
    ),
    "bf16 scale": (put(SCALE, lambda t: torch.ones(1, 2, dtype=torch.bfloat16)), (WQ_A, "BF16")),
    "one expert in another format": (
        put(W1, lambda t: torch.ones(96, 160).to(torch.float8_e4m3fn)),
        (W1, "other experts are I8"),
    ),
    "two spellings of one tensor": (
        put("model.layers.1.self_attn.q_a_proj.weight", lambda t: t[WQ_A].clone()),
        ("is the same parameter as",),
    ),
    "a stack beside single experts": (
        put("model.layers.1.mlp.experts.down_proj", lambda t: torch.ones(4, 160, 96)),
        ("is the same parameter as",),
    ),
    "nvfp4": (
        put("layers.1.ffn.experts.2.w1.weight_scale_2", lambda t: torch.ones(1)),
        (W1, "NVFP4", "not supported"),
    ),
    "static activation scales": (
        put("layers.1.attn.wq_a.input_scale", lambda t: torch.ones(1)),
        (WQ_A, "input_scale"),
    ),
    "nan code": (poke(WQ_A, 0x7F), (WQ_A, ".safetensors", "0x7F, which is NaN")),
    "negative nan code": (poke(WQ_A, 0xFF), (WQ_A, ".safetensors", "0xFF, which is NaN")),
    "nan scale": (poke(W1_SCALE, 255), (W1, ".safetensors", "scale at [1, 1] is nan")),
    "nan weight": (
        fill("norm.weight", float("nan")),
        ("norm.weight", ".safetensors", "[3] is nan"),
    ),
    "infinite weight": (fill("hc_head_base", float("inf")), ("hc_head_base", "[3] is inf")),
    "expert id too large": (
        fill("layers.1.ffn.gate.tid2eid", 4),
        ("layers.1.ffn.gate.tid2eid", "[1, 1] is 4, expected 0 to 3"),
    ),
    "negative expert id": (fill("layers.1.ffn.gate.tid2eid", -1), ("[1, 1] is -1",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path: Path, case: str) -> None:
    written = write(CONFIG)
    spoil, parts = BAD[case]
    spoil(written.tensors)
    error = refused(written.save(tmp_path), *parts)
    assert len(str(error)) < 600


def test_zero_f32_scale_is_refused(tmp_path: Path) -> None:
    written = write(CONFIG, "fp8", scales="f32")
    written.tensors[SCALE][0, 1] = 0
    refused(written.save(tmp_path), WQ_A, "scale at [0, 1] is 0")


def test_value_that_overflows_the_model_dtype_is_refused(tmp_path: Path) -> None:
    written = write(CONFIG, "plain", "plain", plain=torch.float64)
    written.tensors["norm.weight"][7] = 1e300
    refused(written.save(tmp_path), "norm.weight", "[7] is inf in torch.bfloat16")


def test_an_override_the_bytes_cannot_satisfy(tmp_path: Path) -> None:
    refused(write(CONFIG).save(tmp_path), "--expert-dtype", override="fp8")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    plan = open_checkpoint(write(CONFIG).save(tmp_path), CONFIG)
    path = tmp_path / plan.index.headers[WQ_A].file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="became shorter"):
        load(plan)


def test_every_finding_is_listed_at_once(tmp_path: Path) -> None:
    """Headers are read to the end before anything is refused, and no tensor has been loaded."""
    written = write(CONFIG)
    lost = [
        name
        for name in written.tensors
        if name.endswith((".w1.weight", ".w1.scale")) and ".experts." in name
    ]
    for name in lost:
        del written.tensors[name]
    written.tensors["extra.0.a"] = torch.ones(1)
    written.tensors["extra.1.a"] = torch.ones(1)
    written.tensors["norm.weight"] = torch.ones(3)
    error = refused(written.save(tmp_path), "20 missing, 2 unexpected, 1 mismatched")
    assert isinstance(error, CoverageError)
    assert set(error.missing) == {name for name in lost if name.endswith("weight")}
    assert set(error.unexpected) == {"extra.0.a", "extra.1.a"}
    lines = str(error).splitlines()
    assert "  layers.{0-3}.ffn.experts.{0-3}.w1.weight   (16 tensors)" in lines
    assert "  mtp.0.ffn.experts.{0-3}.w1.weight   (4 tensors)" in lines
    assert "  extra.{0-1}.a   (2 tensors)" in lines


def test_a_config_of_another_size_is_told_by_every_tensor(tmp_path: Path) -> None:
    directory = write(CONFIG).save(tmp_path)
    error = refused(
        directory, "mismatched", "embed.weight has shape", config=tiny_config(vocab_size=97)
    )
    assert isinstance(error, CoverageError)
    assert {m.header.name.rpartition(".")[2] for m in error.mismatched} == {"weight", "tid2eid"}
    refused(directory, "missing", "layers.4.attn.wkv.weight",
            config=tiny_config(num_hidden_layers=5, compress_ratios=(0, 4, 128, 4, 0)))  # fmt: skip


def test_folding_loses_no_name() -> None:
    names = [f"layers.{n}.e.{k}.w" for n in (0, 1, 3) for k in (0, 1, 2, 7)] + [
        "layers.1.e.9.w",
        "a",
        "7",
    ]
    assert fold(names) == [
        "layers.{0,3}.e.{0-2,7}.w   (8 tensors)",
        "layers.1.e.{0-2,7,9}.w   (5 tensors)",
        "a",
        "7",
    ]
    assert fold([]) == []
    assert fold(["layers.3.x"]) == ["layers.3.x"]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (SCALE, torch.ones(2, 1).byte(), "has shape [2, 1], expected [1, 2]"),
        (SCALE, torch.ones(1, 2), "is F32, expected F8_E8M0 or U8"),
        (W1_SCALE, torch.zeros(96, 10, dtype=torch.uint8), "has shape [96, 10], expected [96, 5]"),
        (W1, torch.zeros(96, 160, dtype=torch.int8), "has shape [96, 160], expected [96, 80]"),
    ],
)
def test_codes_and_scales_are_checked_whatever_was_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tensor: Tensor, message: str
) -> None:
    """How weights are stored is decided elsewhere; that the bytes are there is the loader's word."""
    written = write(CONFIG)
    (tmp_path / "good").mkdir()
    resolution = open_checkpoint(written.save(tmp_path / "good"), CONFIG).resolution
    monkeypatch.setattr("fourfold.weights.loader.resolve", lambda *arguments: resolution)
    written.tensors[name] = tensor
    error = refused(written.save(tmp_path), f"{name} {message}", "1 mismatched")
    assert isinstance(error, CoverageError)
