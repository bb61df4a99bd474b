"""The FP4 products of sm_90: what `prepare` lays out, and what the compiler makes of the products."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fourfold.core.device import ARCHS
from fourfold.core.errors import QuantizationError
from fourfold.core.tensor import QuantTensor
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4

triton = pytest.importorskip("triton", reason="Triton is not installed")
moe = pytest.importorskip("fourfold.kernels.nvidia.moe", reason="Triton has no Gluon")


def stack(count: int = 2, rows: int = 512, columns: int = 1024) -> QuantTensor:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(count, rows, columns, generator=generator)
    values *= torch.exp2(
        torch.randint(-9, 9, (count, rows, columns // 32, 1), generator=generator)
    )[..., 0].repeat_interleave(32, -1)
    codes, scale = MXFP4.quantize(values, "e8m0")
    MXFP4.canonicalize(codes)
    return QuantTensor(codes, scale, MXFP4, tuple(values.shape))


@pytest.mark.full
def test_preparing_keeps_the_numbers_and_the_memory() -> None:
    weight = stack(moe.AT_ONCE + 1)
    values, place = weight.dequantize(torch.float32), weight.codes.data_ptr()
    made = moe.prepare(weight)
    assert made.scheme is moe.PREPARED
    assert made.codes.data_ptr() == place
    assert made.nbytes == weight.nbytes
    assert torch.equal(made.dequantize(torch.float32), values)
    assert torch.equal(made[1].dequantize(torch.float32), values[1])


def test_a_thread_finds_its_codes_in_one_row() -> None:
    """Byte (w, g, q, group, b) of a half tile's strip: codes of inputs 32 group + 4 q + b, and + 16."""
    weight = stack(1)
    nibbles = torch.stack([weight.codes & 15, weight.codes >> 4], -1).flatten(-2)[0]
    laid = moe.prepare(weight).codes.view(-1)
    strips = 1024 // 128
    for tile, strip, w, g, q, group, b in (torch.rand(300, 7) * 4).long().tolist():
        place = ((tile * strips + strip) * 128 + w * 32 + g * 4 + q) * 16 + group * 4 + b
        row, column = tile * 32 + w * 8 + g, strip * 128 + group * 32 + q * 4 + b
        assert int(laid[place]) & 15 == int(nibbles[row, column])
        assert int(laid[place]) >> 4 == int(nibbles[row, column + 16])


def test_other_weights_come_back_as_they_are() -> None:
    odd = QuantTensor(*MXFP4.quantize(torch.randn(2, 96, 512), "e8m0"), MXFP4, (2, 96, 512))
    values = torch.randn(2, 512, 512)
    fp8 = QuantTensor(*FP8_BLOCK.quantize(values, "e8m0"), FP8_BLOCK, (2, 512, 512))
    for weight in (values, odd, fp8):
        assert moe.prepare(weight) is weight


def test_a_scale_beyond_the_kernels_range_is_refused() -> None:
    weight = stack(1)
    weight.scale[0, 3, 4] = 249
    with pytest.raises(QuantizationError, match="2\\^122"):
        moe.prepare(weight)
    weight.scale[0, 3, 4] = 248
    assert torch.isfinite(moe.prepare(weight).dequantize(torch.float64)).all()


def test_the_plan_prepares_for_the_kernel_it_chose() -> None:
    from fourfold.ops.catalog import OPS
    from fourfold.ops.registry import KernelPlan

    (kernel,) = moe.KERNELS
    plan = KernelPlan(OPS, {"routed_experts": kernel}, ())
    weight = stack(1)
    assert plan.prepare("linear", weight) is weight
    assert plan.prepare("routed_experts", weight).scheme is moe.PREPARED
    assert KernelPlan.bodies(OPS).prepare("routed_experts", stack(1)).scheme is MXFP4


def compiled(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], **options: int
) -> Any:
    """Compiled for sm_90 with nothing known of the arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    source = GluonASTSource(kernel, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


POINTERS = dict.fromkeys(("w1", "w2", "w3", "w1_scale", "w2_scale", "w3_scale"), "*i32")
POINTERS |= {"x": "*fp8e4nv", "x_scale": "*fp32", "order": "*i32", "weights": "*fp32"}
POINTERS |= {"tiles": "*i32", "hidden": "*bf16", "result": "*fp32", "LIMIT": "fp32"}
POINTERS |= dict.fromkeys(("TURNS", "INNER_TILES", "D_TILES"), "i32")


@pytest.mark.full
@pytest.mark.parametrize("each", [1, 16, 192])
@pytest.mark.parametrize("part", ["_fp4_gate_up", "_fp4_down"])
def test_products_compile_with_the_weight_in_registers(part: str, each: int) -> None:
    kernel = getattr(moe, part)
    options = moe.tile_shape(256 * each, 256).options
    names = ("TT", "AHEAD")
    constants = {n: options.pop(n) for n in names} | ({"TOPK": 6} if part == "_fp4_gate_up" else {})
    arguments = {n: t for n, t in POINTERS.items() if n in kernel.arg_names}
    binary = compiled(kernel, arguments, constants, **options)
    assert binary.metadata.shared <= ARCHS["sm_90"].shared_memory
    ptx = binary.asm["ptx"]
    assert f"wgmma.mma_async.sync.aligned.m64n{constants['TT']}k32.f32.e4m3.e4m3" in ptx
    assert "ld.global.v4.b32" in ptx
