"""Kernels compile ahead of time, without a GPU, within each target's shared memory."""

from __future__ import annotations

from typing import Any

import pytest

from fourfold.core.device import ARCHS

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full

TARGETS = {"sm_90": ("cuda", 90), "gfx942": ("hip", "gfx942")}
POINTERS = {"w": "*u8", "w_scale": "*u8", "x": "*u8", "x_scale": "*fp32", "out": "*fp32"}
INTEGERS = dict.fromkeys(("T", "N", "K", "BLOCKS"), "i32")


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
@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("split", [True, False])
def test_fp8_linear(arch: str, tile: int, split: bool) -> None:
    from fourfold.kernels.triton import linear

    constants = {
        "CHUNK": 4,
        "CHUNKS": 8,
        "SPLIT": split,
        "E8M0": True,
        "FNUZ": arch == "gfx942",
        "TN": 128,
        "TK": 128,
        "TT": tile,
    }
    options = linear.launch_options(tile, wide=False)
    binary = compiled(linear._fp8_linear, arch, POINTERS | INTEGERS, constants, **options)
    assert binary.metadata.shared <= ARCHS[arch].shared_memory
    text = binary.asm.get("ptx") or binary.asm["amdgcn"]
    assert ("wgmma" if arch == "sm_90" else "fp8_fp8") in text


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("tile", [16, 128])
def test_plain_linear(arch: str, dtype: str, tile: int) -> None:
    from fourfold.kernels.triton import linear

    wide = dtype == "fp32"
    pointers = {"w": f"*{dtype}", "x": f"*{dtype}", "out": "*fp32"}
    constants = {"CHUNK": 4, "CHUNKS": 8, "SPLIT": False, "TN": 128, "TT": tile}
    constants["TK"] = linear.plain_block(wide)
    options = linear.launch_options(tile, wide)
    binary = compiled(linear._plain_linear, arch, pointers | INTEGERS, constants, **options)
    assert binary.metadata.shared <= ARCHS[arch].shared_memory


@pytest.mark.parametrize("arch", TARGETS)
def test_quantize_activations(arch: str) -> None:
    from fourfold.kernels.triton import linear

    signature = {"x": "*bf16", "codes": "*u8", "scale": "*fp32", "K": "i32", "GROUPS": "i32"}
    constants = {"FNUZ": arch == "gfx942", "GROUP": 128}
    binary = compiled(linear._quantize_activations, arch, signature, constants, num_warps=1)
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
    options = {"num_warps": 4, "num_stages": 3}
    binary = compiled(kernel, arch, EXPERT_POINTERS[part], constants, **options)
    assert binary.metadata.shared <= ARCHS[arch].shared_memory
    text = binary.asm.get("ptx") or binary.asm["amdgcn"]
    assert ("wgmma" if arch == "sm_90" else "fp8_fp8") in text
