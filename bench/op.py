"""Measure one op on this GPU, kernel by kernel, against what its bytes and operations would take.

    python bench/op.py routed_experts [--tokens 1 64 8192] [--experts 256] [--dim 4096] [--inner 2048]
    python bench/op.py linear [--tokens 1 64 8192] [--shape 1024x4096 ...] [--weights fp8 bfloat16]
        either with [--kernel NAME ...]     default: what a plan would choose

Contract: prints one JSON object a measurement. `us` is the median of graph replays, launches excluded;
weights are rotated so that none is still in the cache. `weight_TB_s` counts the bytes of the weights
that are touched, codes and scales, once; `TFLOP_s` the products alone; `kernels` are the microseconds
of each GPU kernel of one call, and `roof_us` what the device needs at least for bytes (by the copy
measured in the same run) or operations. Weights are random codes, not numbers from anywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fourfold import kernels
from fourfold.core.device import detect
from fourfold.core.tensor import QuantTensor, Weight
from fourfold.ops.registry import Kernel
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4

CACHE = 160e6  # bytes that weights in rotation take together at least
LIMIT = 10.0
TOPK = 6


def graph_us(calls: list[Callable[[], Any]], replays: int = 9) -> float:
    """Median microseconds of one of `calls`, run one after another in a captured graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:])


def parts_us(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each GPU kernel that one call runs, by name."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.device_time_total]
    return {e.key[:60]: round(e.device_time_total, 1) for e in events}


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / graph_us([lambda: torch.neg(a, out=b)], 3) * 1e6


def chosen(op: str, names: list[str] | None) -> list[Kernel]:
    """The kernels to measure: by name, or the one of highest priority."""
    device = detect("cuda")
    found = [k for k in kernels.load(device) if k.op == op and k.needs <= device.features]
    if names:
        return [k for k in found if k.name in names]
    return [max(found, key=lambda k: k.priority)]


def fp4(*shape: int) -> QuantTensor:
    """A weight of random FP4 codes and scales."""
    codes = torch.randint(256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device="cuda")
    MXFP4.canonicalize(codes)
    size = (*shape[:-1], shape[-1] // 32)
    scale = torch.randint(112, 124, size, dtype=torch.uint8, device="cuda")
    return QuantTensor(codes, scale, MXFP4, shape)


def fp8(*shape: int) -> QuantTensor:
    """A weight of random FP8 codes and block scales."""
    codes = torch.randint(256, shape, dtype=torch.uint8, device="cuda")
    codes &= 0xBF  # no NaN
    FP8_BLOCK.canonicalize(codes)
    size = FP8_BLOCK.scale_shape(shape)
    return QuantTensor(
        codes, torch.randint(112, 124, size, dtype=torch.uint8, device="cuda"), FP8_BLOCK, shape
    )


def report(kernel: Kernel, us: float, moved: float, flops: float, copy: float, **rest: Any) -> None:
    """Print one measurement: `moved` bytes of weights, `flops` operations, `copy` bytes a second."""
    print(
        json.dumps(
            {
                "op": kernel.op,
                "kernel": kernel.name,
                **rest,
                "us": round(us, 1),
                "weight_TB_s": round(moved / us / 1e6, 2),
                "TFLOP_s": round(flops / us / 1e6, 1),
                "roof_us": round(max(moved / copy, flops / 1.4e15) * 1e6, 1),
            }
        ),
        flush=True,
    )


def experts(arguments: argparse.Namespace, copy: float) -> None:
    """Measure `routed_experts`: tokens choose experts uniformly at random."""
    count, dim, inner = arguments.experts, arguments.dim, arguments.inner
    make = fp4 if arguments.weights[0] == "fp4" else fp8
    for kernel in chosen("routed_experts", arguments.kernel):
        weights = [make(count, inner, dim), make(count, dim, inner), make(count, inner, dim)]
        if kernel.prepare:
            weights = [kernel.prepare(w) for w in weights]
        w1, w2, w3 = weights
        for tokens in arguments.tokens:
            inputs = []
            for _ in range(3):
                y = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
                ids = torch.rand(tokens, count, device="cuda").topk(TOPK).indices
                inputs.append((y, ids, torch.rand(tokens, TOPK, device="cuda")))
            touched = sum(i.unique().numel() for _, i, _ in inputs) / len(inputs)
            calls = [partial(kernel.run, *i, w1, w2, w3, LIMIT) for i in inputs]
            us, parts = graph_us(calls), parts_us(calls[0])
            moved = touched / count * sum(w.nbytes for w in weights)
            products = sum(v for k, v in parts.items() if "gate_up" in k or "_down" in k)
            report(
                kernel, us, moved, 6.0 * tokens * TOPK * dim * inner, copy, tokens=tokens,
                experts_touched=round(touched), kernels=parts,
                products_TB_s=round(moved / max(products, 1e-9) / 1e6, 2),
            )  # fmt: skip


def stored(kind: str, rows: int, columns: int) -> Iterator[Weight]:
    """Weights of one shape, more of them than the cache holds."""
    size = rows * columns * (1 if kind == "fp8" else 2)
    for _ in range(max(2, min(40, int(CACHE / size)))):
        if kind == "fp8":
            yield fp8(rows, columns)
        else:
            yield torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)


def linear(arguments: argparse.Namespace, copy: float) -> None:
    """Measure `linear`, quantising activations included."""
    for kernel in chosen("linear", arguments.kernel):
        for shape in arguments.shape:
            rows, columns = (int(n) for n in shape.split("x"))
            for kind in arguments.weights:
                weights = list(stored(kind, rows, columns))
                for tokens in arguments.tokens:
                    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
                    few = weights if tokens <= 512 else weights[:2]
                    calls = [partial(kernel.run, x, w) for w in few]
                    report(
                        kernel, graph_us(calls), weights[0].nbytes, 2.0 * tokens * rows * columns,
                        copy, shape=shape, weights=kind, tokens=tokens, kernels=parts_us(calls[0]),
                    )  # fmt: skip


SHAPES = ["512x4096", "1024x4096", "2048x4096", "4096x2048", "4096x8192", "32768x1024"]


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure one op on this GPU.")
    parser.add_argument("op", choices=("routed_experts", "linear"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 8192])
    parser.add_argument("--kernel", nargs="+")
    parser.add_argument("--weights", nargs="+", help="fp4 or fp8; for linear fp8, bfloat16")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    arguments = parser.parse_args()
    experts_asked = arguments.op == "routed_experts"
    arguments.weights = arguments.weights or (["fp4"] if experts_asked else ["fp8", "bfloat16"])
    torch.manual_seed(0)
    copy = copy_bandwidth()
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_TB_s": round(copy / 1e12, 2)}))
    (experts if experts_asked else linear)(arguments, copy)


if __name__ == "__main__":
    main()
