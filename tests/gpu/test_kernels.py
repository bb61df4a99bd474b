"""Every kernel of every op against the op's body on a GPU, with outputs poisoned first."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.core.device import detect
from fourfold.core.tensor import QuantScheme, QuantTensor
from fourfold.engine.selftest.kernels import available
from fourfold.ops.catalog import OPS
from fourfold.ops.linear import linear as linear_body
from fourfold.ops.registry import CaseMaker, Kernel, KernelPlan
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4
from tests.kernels.given import assert_spared
from tests.ops.test_definitions import tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def here() -> tuple[Kernel, ...]:
    return available(detect("cuda")) if torch.cuda.is_available() else ()


def kernels_of(op: str) -> list[Any]:
    """The kernels of one op, as parameters of a test."""
    return [pytest.param(k, id=f"{op}={k.name}") for k in here() if k.op == op]


def poison() -> None:
    """Leave NaN in the memory that the next allocations get, so that what is not written shows."""
    blocks = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    del blocks


def close(got: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        assert a.dtype == b.dtype
        if a.dtype.is_floating_point:
            finite = torch.isfinite(b)
            assert torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
            if finite.any():
                bound = tolerance * float(b[finite].abs().max())
                assert float((a - b)[finite].abs().max()) <= bound
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", here(), ids=lambda k: f"{k.op}={k.name}")
def test_kernel_equals_body_on_the_ops_cases(kernel: Kernel, dtype: torch.dtype) -> None:
    op = next(o for o in OPS if o.name == kernel.op)
    plans = (KernelPlan(OPS, {kernel.op: kernel}, ()), KernelPlan.bodies(OPS))
    for case in op.cases(CaseMaker.seeded(dtype, "cuda")):
        results = []
        for plan in plans:
            arguments = copy.deepcopy(dict(case.arguments))
            poison()
            out = getattr(plan, op.name)(**arguments)
            assert_spared(op, arguments, dict(case.arguments))
            results.append([*tensors(out), *tensors([arguments[w] for w in op.writes])])
        for a, b in zip(*results, strict=True):
            if a.dtype == torch.uint8:  # FP8 rows: a code may flip on a rounding tie
                assert float((a != b).float().mean()) < 0.02, case.name
            else:
                close(a, b, op.tolerance.of(dtype))


def weight(rows: int, columns: int, scale_format: str, seed: int) -> QuantTensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scale = FP8_BLOCK.quantize(values.cuda() * columns**-0.5, scale_format)
    return QuantTensor(codes, scale, FP8_BLOCK, (rows, columns))


@pytest.mark.parametrize("kernel", kernels_of("linear"))
@pytest.mark.parametrize("scale_format", ["e8m0", "f32"])
@pytest.mark.parametrize("shape", [(1024, 4096), (512, 4096), (200, 300), (4096, 8192)], ids=str)
def test_fp8_linear_equals_its_body_at_every_batch_size(
    shape: tuple[int, int], scale_format: str, kernel: Kernel
) -> None:
    run = kernel.run
    w = weight(*shape, scale_format, 1)
    for tokens in (1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 257, 1000, 4097):
        x: Tensor = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16) * 3
        poison()
        close(run(x, w), linear_body(x, w), 1.6e-2)


@pytest.mark.parametrize("kernel", kernels_of("linear"))
@pytest.mark.parametrize("kind", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "shape", [(1024, 4096), (32768, 1024), (512, 4096), (24, 384), (200, 300)], ids=str
)
def test_a_tokens_result_does_not_depend_on_the_batch(
    shape: tuple[int, int], kind: str, kernel: Kernel
) -> None:
    """Bit for bit: alone, in a decode batch, in a prefill chunk."""
    run = kernel.run
    w = weight(*shape, "e8m0", 2)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    operand = w if kind == "fp8" else w.dequantize(dtype)
    x = torch.randn(4096, shape[1], device="cuda", dtype=dtype)
    poison()
    whole = run(x, operand)
    close(whole, linear_body(x, operand), 1.6e-2 if dtype == torch.bfloat16 else 1e-5)
    for tokens in (1, 3, 16, 33, 64, 65, 128, 200, 256, 257, 1000):
        assert torch.equal(run(x[11 : 11 + tokens], operand), whole[11 : 11 + tokens])


@pytest.mark.parametrize("scheme", [FP8_BLOCK, MXFP4], ids=lambda s: s.name)
def test_other_weights_take_the_exact_way(scheme: QuantScheme) -> None:
    run = next(k for k in here() if k.op == "linear").run
    values = torch.randn(96, 128, generator=torch.Generator().manual_seed(4)).cuda()
    for rounds in (True, False):
        w = QuantTensor(*scheme.quantize(values, "e8m0"), scheme, (96, 128), rounds)
        x = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)
        close(run(x, w), linear_body(x, w), 1.6e-2)


def test_not_a_number_and_huge_inputs_stay_in_their_rows() -> None:
    run = next(k for k in here() if k.op == "linear").run
    w = weight(256, 512, "e8m0", 3)
    x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
    clean = run(x, w)
    x[2, 5], x[4] = float("nan"), 3e38
    got = run(x, w)
    others = [0, 1, 3, 5, 6, 7]
    assert torch.equal(got[others], clean[others])
    assert not torch.isnan(got[2]).any()  # FP8 has no NaN here; the streams' own check sees it


def experts(
    scheme: QuantScheme, scale_format: str, count: int, dim: int, inner: int
) -> list[QuantTensor]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for shape in ((count, inner, dim), (count, dim, inner), (count, inner, dim)):
        values = torch.randn(shape, generator=generator).cuda() * shape[-1] ** -0.5
        made.append(QuantTensor(*scheme.quantize(values, scale_format), scheme, shape))
    return made


EXPERTS = [(MXFP4, "e8m0"), (FP8_BLOCK, "e8m0"), (FP8_BLOCK, "f32")]


def prepared(kernel: Kernel, weights: list[QuantTensor]) -> list[Any]:
    """Copies of weights as the kernel wants them."""
    copies = [replace(w, codes=w.codes.clone(), scale=w.scale.clone()) for w in weights]
    return [kernel.prepare(w) if kernel.prepare else w for w in copies]


@pytest.mark.parametrize("kernel", kernels_of("routed_experts"))
@pytest.mark.parametrize(("scheme", "scale_format"), EXPERTS, ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize(("dim", "inner"), [(512, 256), (160, 96), (1024, 512)])
def test_experts_equal_their_body_and_do_not_depend_on_the_batch(
    scheme: QuantScheme, scale_format: str, dim: int, inner: int, kernel: Kernel
) -> None:
    """All experts and half of them, repeated ids, inputs beyond the limit, 1 to 3,000 tokens."""
    run = kernel.run
    body = next(o for o in OPS if o.name == "routed_experts")
    count, limit = 16, 2.0
    stored = experts(scheme, scale_format, count, dim, inner)
    w1, w2, w3 = prepared(kernel, stored)
    y = torch.randn(3000, dim, device="cuda", dtype=torch.bfloat16) * 4
    ids = torch.randint(count, (3000, 6), device="cuda")
    ids[3] = 5
    weights = torch.rand(3000, 6, device="cuda")
    poison()
    whole = run(y, ids, weights, w1, w2, w3, limit)
    close(whole, body(y, ids, weights, *stored, limit), 1.6e-2)
    for tokens in (1, 2, 5, 16, 33, 200, 1000):
        part = slice(2, 2 + tokens)
        poison()
        assert torch.equal(run(y[part], ids[part], weights[part], w1, w2, w3, limit), whole[part])
    half = [
        replace(w, codes=w.codes[8:], scale=w.scale[8:], shape=(8, *w.shape[1:])) for w in stored
    ]
    poison()
    got = run(y, ids, weights, *prepared(kernel, half), limit, 8)
    close(got, body(y, ids, weights, *half, limit, 8), 1.6e-2)


@pytest.mark.parametrize("kernel", kernels_of("routed_experts"))
def test_an_experts_scales_are_exact_at_any_distance(kernel: Kernel) -> None:
    """Groups of one strip whose exponents are far apart, the smallest one included."""
    count, dim, inner = 4, 512, 512
    stored = experts(MXFP4, "e8m0", count, dim, inner)
    stored[0].scale[:, :, ::2] = 0
    stored[2].scale[:, ::3, 1::4] += 7
    w1, w2, w3 = prepared(kernel, stored)
    body = next(o for o in OPS if o.name == "routed_experts")
    y = torch.randn(20, dim, device="cuda", dtype=torch.bfloat16)
    ids, weights = torch.randint(count, (20, 2), device="cuda"), torch.rand(20, 2, device="cuda")
    poison()
    close(
        kernel.run(y, ids, weights, w1, w2, w3, 10.0), body(y, ids, weights, *stored, 10.0), 1.6e-2
    )


@pytest.mark.parametrize("first", [0, 8])
@pytest.mark.parametrize("experts_here", [16, 256])
def test_both_ways_of_sorting_tokens_agree(first: int, experts_here: int) -> None:
    from fourfold.kernels.triton import moe

    for tokens in (1, 2, 33, 250, 1300):
        for tile in (8, 64):
            ids = torch.randint(experts_here + 2 * first, (tokens, 6), device="cuda")
            ids[:, 0] = 5
            poison()
            got = moe.sort_tokens(ids, experts_here, first, tile)
            most = got.tiles.shape[0]
            expected = moe._sort_many(ids, experts_here, first, tile, most)
            assert torch.equal(got.order, expected.order)
            assert torch.equal(got.tiles, expected.tiles)


@pytest.mark.parametrize("kernel", kernels_of("shared_expert"))
@pytest.mark.parametrize(("dim", "inner"), [(4096, 2048), (512, 256), (160, 96)])
def test_the_shared_expert_equals_its_body_and_does_not_depend_on_the_batch(
    dim: int, inner: int, kernel: Kernel
) -> None:
    linear = next(k for k in here() if (k.op, k.name) == ("linear", "triton"))
    plan, bodies = KernelPlan(OPS, {"linear": linear}, ()), KernelPlan.bodies(OPS)
    w2, dtype = weight(dim, inner, "f32", 2), torch.bfloat16
    gate, up = (torch.randn(2000, inner, device="cuda") * 4 for _ in range(2))
    poison()
    whole = kernel.run(plan, gate, up, w2, 2.0, dtype)
    close(whole, bodies.shared_expert(gate, up, w2, 2.0, dtype), 1.6e-2)
    for tokens in (1, 2, 16, 33, 64, 65, 200, 256, 257):
        part = slice(5, 5 + tokens)
        poison()
        assert torch.equal(kernel.run(plan, gate[part], up[part], w2, 2.0, dtype), whole[part])


# What a model's layers do with one input: (rows, FP8 or plain, unrounded).
TOGETHER = {
    "attention": [
        (1024, True, False),
        (512, True, False),
        (1024, False, True),
        (1024, False, True),
        (256, False, True),
        (256, False, True),
        (64, False, True),
    ],
    "experts": [(256, False, True), (2048, True, True), (2048, True, True)],
    "one": [(4096, True, False)],
    "ragged": [(200, True, True), (24, False, False), (72, True, True)],
}


@pytest.mark.parametrize("kernel", kernels_of("linears"))
@pytest.mark.parametrize("scale_format", ["e8m0", "f32"])
@pytest.mark.parametrize("name", TOGETHER)
def test_several_layers_of_one_input_are_bit_for_bit_each_by_itself(
    name: str, scale_format: str, kernel: Kernel
) -> None:
    """As the kernel of one layer computes each, for every number of tokens; K from one block to 64."""
    # The portable one, but for the kernel that sums in another order.
    name_of_one = kernel.name if kernel.name == "triton_decoded" else "triton"
    alone = next(k for k in here() if (k.op, k.name) == ("linear", name_of_one)).run
    for size in (128, 1024, 4096):
        made = [
            weight(rows, size, scale_format, n) for n, (rows, _, _) in enumerate(TOGETHER[name])
        ]
        plain = [not fp8 for _, fp8, _ in TOGETHER[name]]
        weights = tuple(
            w.dequantize(torch.bfloat16) if p else w for w, p in zip(made, plain, strict=True)
        )
        unrounded = tuple(wide for _, _, wide in TOGETHER[name])
        x = torch.randn(300, size, device="cuda", dtype=torch.bfloat16) * 3
        expected = [alone(x, w, wide) for w, wide in zip(weights, unrounded, strict=True)]
        for tokens in (1, 2, 8, 9, 33, 64, 65, 257):
            poison()
            got = kernel.run(KernelPlan.bodies(OPS), x[7 : 7 + tokens], weights, unrounded)
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b[7 : 7 + tokens])


@pytest.mark.parametrize("kernel", kernels_of("norm_linears"))
@pytest.mark.parametrize("size", [384, 1024, 1536])
def test_layers_behind_a_norm_do_not_depend_on_the_batch(size: int, kernel: Kernel) -> None:
    """Of FP8 weights; nearly what norm and layers give one after the other."""
    weights = tuple(weight(rows, size, "e8m0", rows) for rows in (32768, 8192, 200))
    x = torch.randn(300, size, device="cuda", dtype=torch.bfloat16) * 3
    norm = torch.rand(size, device="cuda", dtype=torch.bfloat16) + 0.5
    bodies, unrounded = KernelPlan.bodies(OPS), (False, False, True)
    whole = kernel.run(bodies, x, norm, 1e-6, weights, unrounded)
    expected = bodies.norm_linears(x, norm, 1e-6, weights, unrounded)
    for a, b in zip(whole, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-2
    for tokens in (1, 2, 8, 33, 64, 65, 200):
        poison()
        got = kernel.run(bodies, x[7 : 7 + tokens], norm, 1e-6, weights, unrounded)
        for a, b in zip(got, whole, strict=True):
            assert torch.equal(a, b[7 : 7 + tokens])


@pytest.mark.parametrize("tokens", [1, 24, 300])
@pytest.mark.parametrize(
    "kernel", [*kernels_of("linear"), *kernels_of("linears"), *kernels_of("routed_experts")]
)
def test_a_captured_graph_replays_what_runs_eagerly(kernel: Kernel, tokens: int) -> None:
    """Products one after another, so that each must wait for the one before it; new inputs each time."""
    dim, inner, count = 1024, 512, 8
    routed = prepared(kernel, experts(MXFP4, "e8m0", count, dim, inner))
    shapes = [(inner, dim), (dim, inner), (inner, dim), (dim, dim)]
    w1, w2, w3, w4 = (weight(*s, "e8m0", n) for n, s in enumerate(shapes))
    plan = KernelPlan(OPS, {k.op: k for k in here() if k.name == kernel.name}, ())
    ids = torch.randint(count, (tokens, 6), device="cuda")
    factors = torch.rand(tokens, 6, device="cuda")

    def step(y: Tensor) -> Tensor:
        for _ in range(3):
            if kernel.op == "linear":
                z = kernel.run(kernel.run(y, w1), w2)
            elif kernel.op == "linears":
                gate, up, z = kernel.run(plan, y, (w1, w3, w4), (True, True, True))
                z = z + plan.shared_expert(gate, up, w2, 2.0, y.dtype)
            else:
                z = kernel.run(y, ids, factors, *routed, 2.0)
            y = (y + z.to(y.dtype)) * 0.5
        return y

    static = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    step(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(static)
    for _ in range(20):
        static.copy_(torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16))
        ids.copy_(torch.randint(count, (tokens, 6), device="cuda"))
        graph.replay()
        got = out.clone()
        assert torch.equal(got, step(static))
