"""Kernels compile ahead of time, without a GPU, within each target's shared memory."""

from __future__ import annotations

from typing import Any

import pytest

from fourfold.core.device import ARCHS

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full

TARGETS = {"sm_90": ("cuda", 90), "gfx942": ("hip", "gfx942")}
INTEGERS = dict.fromkeys(("T", "N", "K", "BLOCKS"), "i32")
FP8 = {"sm_90": "fp8e4nv", "gfx942": "fp8e4b8"}


def compiled(
    kernel: Any, arch: str, signature: dict[str, str], constants: dict[str, Any], **options: int
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, number = TARGETS[arch]
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    target = GPUTarget(backend, number, ARCHS[arch].wave_size)
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("kind", ["fp8", "bf16", "fp32"])
@pytest.mark.parametrize(("tile", "split"), [(16, True), (64, True), (128, True), (128, False)])
def test_linear(arch: str, kind: str, tile: int, split: bool) -> None:
    from fourfold.kernels.triton import linear

    fp8, stored = kind == "fp8", FP8[arch] if kind == "fp8" else kind
    pointers = {
        "w": f"*{stored}",
        "w_scale": "*u8" if fp8 else f"*{stored}",
        "x": f"*{stored}",
        "x_scale": "*fp32" if fp8 else f"*{stored}",
        "out": "*fp32",
    }
    options = linear.launch_options(tile, split)
    constants = {
        "CHUNK": 4,
        "CHUNKS": 8,
        "SPLIT": split,
        "FP8": fp8,
        "E8M0": fp8,
        "FNUZ": arch == "gfx942",
        "WHOLE": True,
        "TN": options.pop("TN"),
        "TK": {"fp8": 128, "bf16": 64, "fp32": 32}[kind],
        "TT": tile,
    }
    binary = compiled(linear._linear, arch, pointers | INTEGERS, constants, **options)
    assert binary.metadata.shared <= ARCHS[arch].shared_memory
    text = binary.asm.get("ptx") or binary.asm["amdgcn"]
    if fp8:
        assert ("wgmma" if arch == "sm_90" else "fp8_fp8") in text


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("by_group", [True, False])
@pytest.mark.parametrize("count", [1, 32])
def test_quantize_activations(arch: str, by_group: bool, count: int) -> None:
    from fourfold.kernels.triton import linear

    signature = {"x": "*bf16", "codes": "*u8", "scale": "*fp32"}
    signature |= dict.fromkeys(("T", "K", "GROUPS"), "i32")
    constants = {"BY_GROUP": by_group, "FNUZ": arch == "gfx942", "COUNT": count, "GROUP": 128}
    binary = compiled(linear._quantize_activations, arch, signature, constants, num_warps=1)
    assert binary.metadata.shared <= ARCHS[arch].shared_memory


@pytest.mark.parametrize("arch", TARGETS)
def test_sort_slots(arch: str) -> None:
    from fourfold.kernels.triton import moe

    signature = {"ids": "*i64", "order": "*i32", "tiles": "*i32"}
    signature |= dict.fromkeys(("SLOTS", "FIRST", "EXPERTS", "MOST"), "i32")
    constants = {"TILE": 16, "BINS": 512, "BLOCK": 512, "SHARE": 32}
    binary = compiled(moe._sort_slots, arch, signature, constants, num_warps=4)
    assert binary.metadata.shared <= ARCHS[arch].shared_memory


EXPERT_POINTERS = {
    "gate_up": {
        "w1": "*u8", "w1_scale": "*u8", "w3": "*u8", "w3_scale": "*u8", "x": "*u8", "x_scale": "*fp32",
        "order": "*i32", "weights": "*fp32", "tiles": "*i32", "hidden": "*bf16",
        "K": "i32", "INNER": "i32", "SCALES": "i32", "LIMIT": "fp32",
    },
    "down": {
        "w2": "*u8", "w2_scale": "*u8", "hidden": "*u8", "hidden_scale": "*fp32", "order": "*i32",
        "tiles": "*i32", "result": "*fp32", "K": "i32", "D": "i32", "SCALES": "i32",
    },
}  # fmt: skip


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("fp4", [True, False], ids=["fp4", "fp8"])
@pytest.mark.parametrize("part", EXPERT_POINTERS)
def test_experts(arch: str, tile: int, fp4: bool, part: str) -> None:
    from fourfold.kernels.triton import moe

    constants = {"FP4": fp4, "E8M0": True, "FNUZ": arch == "gfx942", "TN": moe.ROWS, "TT": tile}
    if part == "gate_up":
        constants["TOPK"] = 6
    kernel = moe._gate_up if part == "gate_up" else moe._down
    pointers = dict(EXPERT_POINTERS[part])
    for name in ("x", "hidden") if part == "gate_up" else ("hidden",):
        pointers[name] = f"*{FP8[arch]}" if (name, part) != ("hidden", "gate_up") else "*bf16"
    for name in () if fp4 else ("w1", "w2", "w3"):
        pointers |= {name: f"*{FP8[arch]}"} if name in pointers else {}
    options = {"num_warps": 4, "num_stages": 3}
    binary = compiled(kernel, arch, pointers, constants, **options)
    assert binary.metadata.shared <= ARCHS[arch].shared_memory
    text = binary.asm.get("ptx") or binary.asm["amdgcn"]
    assert ("wgmma" if arch == "sm_90" else "fp8_fp8") in text
