"""Measure one op, kernel by kernel, against what its bytes and operations would take.

Contract: `measure_op` yields a record a measurement. `us` is the median of graph replays, so launches are
not in it (on a CPU, of calls); weights rotate so that none is still in the device's cache. `weight_TB_s`
counts the bytes of the weights that are touched, codes and scales, once; `TFLOP_s` the products alone;
`kernels` are the microseconds of each GPU kernel of one call; `roof_us` is what the device needs at
least, by ceilings measured in the same run; `error` is ‖out − body‖ / ‖body‖. Weights are random codes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fourfold import kernels
from fourfold.core.device import Device, detect
from fourfold.core.errors import ConfigError
from fourfold.core.tensor import QuantScheme, QuantTensor, Weight
from fourfold.engine.kernel_plan import installed_triton
from fourfold.engine.profile import trace_steps
from fourfold.engine.roofline import Ceilings, Cost, measure
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import BODY, Kernel
from fourfold.ops.rope import inverse_frequencies
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4

IN_ROTATION = 160e6  # bytes that weights in rotation take together at least
LIMIT, TOPK = 10.0, 6  # of the experts
HEAD_DIM, ROPE_DIM = 512, 64
LINEAR_SHAPES = ("512x4096", "1024x4096", "2048x4096", "4096x2048", "4096x8192", "32768x1024")
GROUP_SHAPES = ("2x1024x4096", "8x1024x4096")

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "routed_experts": "routed_experts",
        "moe": "routed_experts",
        "linear": "linear",
        "wo_a": "wo_a",
    }
)
"""What can be measured, and the op it is."""


@dataclass(frozen=True)
class OpSetting:
    """What to measure: batch sizes in tokens; kernels by name (none: what a plan would choose, and for
    wo_a every form there is); how weights are stored (fp4, fp8, bfloat16; none: by op); shapes: "N×K"
    of linear layers, "G×N×K" of grouped ones; `routing`: experts are chosen at random, or evenly, each
    by as many tokens as any other, give or take one."""

    tokens: tuple[int, ...] = (1, 8, 64, 256, 8192)
    kernels: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    experts: int = 256
    dim: int = 4096
    inner: int = 2048
    routing: str = "random"
    device: str = "auto"


def measure_op(name: str, setting: OpSetting) -> Iterator[dict[str, Any]]:
    """Records of op `name`, the first about the device. Raises `ConfigError`."""
    if name not in NAMES:
        raise ConfigError(f"bench op measures {', '.join(NAMES)}, found {name!r}")
    torch.manual_seed(0)
    device = detect(setting.device)
    bench = OpBench(NAMES[name], setting, device, measure(device))
    ceilings = bench.ceilings
    yield {
        "device": device.name or device.arch.name,
        "torch": torch.__version__,
        "copy_TB_s": ceilings.bytes_per_s / 1e12,
        "bf16_TFLOP_s": ceilings.bf16_per_s / 1e12,
        "fp8_TFLOP_s": ceilings.fp8_per_s / 1e12,
    }
    runs = {
        "routed_experts": bench.experts,
        "linear": bench.linear,
        "wo_a": bench.grouped,
    }
    yield from runs[bench.op]()


class OpBench:
    """One op on one device."""

    def __init__(self, op: str, setting: OpSetting, device: Device, ceilings: Ceilings):
        self.op, self.setting, self.ceilings = op, setting, ceilings
        self.device, self._device = device.torch_device, device
        self.body = next(each.body for each in OPS if each.name == op)

    def chosen(self, all_of_them: bool = False) -> list[Kernel]:
        """The kernels to measure. Raises `ConfigError` for names that do not exist here."""
        found = [k for k in kernels.load(self._device) if k.op == self.op]
        found = [k for k in found if k.needs <= self._device.features]
        found.append(Kernel(self.op, BODY, self.body, priority=0))
        triton, arch = installed_triton(self._device), self._device.arch
        bad = {k.name: arch.why_bad(k.op, k.name, triton) is not None for k in found}
        found.sort(key=lambda kernel: (bad[kernel.name], -kernel.priority))
        names = {kernel.name: kernel for kernel in found}
        for wanted in self.setting.kernels:
            if wanted not in names:
                raise ConfigError(
                    f"--kernel {wanted}: {self.op} has {', '.join(names)} on this device"
                )
        if self.setting.kernels:
            return [names[wanted] for wanted in self.setting.kernels]
        return found if all_of_them else found[:1]

    def experts(self) -> Iterator[dict[str, Any]]:
        """Routed experts, for every number of tokens."""
        count, dim, inner = self.setting.experts, self.setting.dim, self.setting.inner
        for kernel in self.chosen():
            for stored in self.setting.weights or ("fp4",):
                shapes = ((count, inner, dim), (count, dim, inner), (count, inner, dim))
                weights = _prepared(kernel, [self.weight(stored, *shape) for shape in shapes])
                for tokens in self.setting.tokens:
                    yield self._experts(kernel, weights, stored, tokens)

    def _experts(
        self, kernel: Kernel, weights: list[Weight], stored: str, tokens: int
    ) -> dict[str, Any]:
        count, dim, inner = self.setting.experts, self.setting.dim, self.setting.inner
        topk = min(TOPK, count)
        inputs = []
        for _ in range(3):
            ids = self.routed(tokens, count, topk)
            factors = torch.rand(tokens, topk, device=self.device)
            inputs.append((self.values(tokens, dim), ids, factors))
        touched = sum(ids.unique().numel() for _, ids, _ in inputs) / len(inputs)
        calls = [partial(kernel.run, *each, *weights, LIMIT) for each in inputs]
        cost = Cost(
            "experts",
            "",
            bytes=touched / count * sum(weight.nbytes for weight in weights),
            flops=6.0 * tokens * topk * dim * inner,
            rate="bf16" if stored == "bfloat16" else "fp8",
        )
        record = self.record(kernel, calls, cost, weights=stored, tokens=tokens)
        products = sum(us for name, us in record["kernels"].items() if _is_product(name))
        if products:
            record["products_TB_s"] = cost.bytes / products / 1e6
        return {**record, "routing": self.setting.routing, "experts_touched": round(touched)}

    def routed(self, tokens: int, count: int, topk: int) -> Tensor:
        """Experts' ids `[tokens, topk]` as the setting says."""
        if self.setting.routing == "random":
            return torch.rand(tokens, count, device=self.device).topk(topk).indices
        experts = torch.randperm(count, device=self.device)
        ids = experts[torch.arange(tokens * topk, device=self.device) % count]
        return ids.view(tokens, topk)[torch.randperm(tokens, device=self.device)]

    def linear(self) -> Iterator[dict[str, Any]]:
        """A linear layer, quantising activations included."""
        for kernel in self.chosen():
            for shape in self.setting.shapes or LINEAR_SHAPES:
                rows, columns = _sizes(shape, 2)
                for stored in self.setting.weights or ("fp8", "bfloat16"):
                    weights = _prepared(kernel, self.rotation(stored, rows, columns))
                    for tokens in self.setting.tokens:
                        x = self.values(tokens, columns)
                        few = weights if tokens <= 512 else weights[:2]
                        calls = [partial(kernel.run, x, weight) for weight in few]
                        rate = "fp8" if stored == "fp8" else "bf16"
                        flops = 2.0 * tokens * rows * columns
                        cost = Cost("linear", "", weights[0].nbytes, flops=flops, rate=rate)
                        yield self.record(
                            kernel, calls, cost, shape=shape, weights=stored, tokens=tokens
                        )

    def grouped(self) -> Iterator[dict[str, Any]]:
        """Inverse rotary and grouped `wo_a`, in every form."""
        for shape in self.setting.shapes or GROUP_SHAPES:
            groups, rank, size = _sizes(shape, 3)
            if groups * size % HEAD_DIM:
                raise ConfigError(f"--shape {shape}: G·K must be a multiple of {HEAD_DIM}")
            inv_freq = inverse_frequencies(ROPE_DIM, 10000.0, None).to(self.device)
            for stored in self.setting.weights or ("fp8",):
                weights = self.rotation(stored, groups * rank, size)
                for tokens in self.setting.tokens:
                    heads = groups * size // HEAD_DIM
                    x = self.values(tokens, heads, HEAD_DIM)
                    positions = torch.arange(tokens, device=self.device)
                    expected = self.body(x, weights[0], positions, inv_freq).float()
                    flops = 2.0 * tokens * groups * rank * size
                    for kernel in self.chosen(all_of_them=True):
                        rate = "fp8" if kernel.name.startswith("fp8") else "bf16"
                        few = _prepared(kernel, weights if tokens <= 512 else weights[:2])
                        cost = Cost("wo_a", "", few[0].nbytes, flops=flops, rate=rate)
                        # The output may reuse its input's memory.
                        calls = [
                            partial(kernel.run, x.clone(), w, positions, inv_freq) for w in few
                        ]
                        out = kernel.run(x.clone(), few[0], positions, inv_freq).float()
                        error = float((out - expected).norm() / expected.norm())
                        yield self.record(
                            kernel, calls, cost, shape=shape, weights=stored, tokens=tokens,
                            error=error,
                        )  # fmt: skip

    def values(self, *shape: int) -> Tensor:
        """Random inputs."""
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def rotation(self, stored: str, rows: int, columns: int) -> list[Weight]:
        """Weights of one shape, more of them than a device's cache holds."""
        size = rows * columns * (1 if stored == "fp8" else 2)
        count = max(2, min(40, int(IN_ROTATION / size))) if self.device.type != "cpu" else 2
        return [self.weight(stored, rows, columns) for _ in range(count)]

    def weight(self, stored: str, *shape: int) -> Weight:
        """A weight of random codes, or of random numbers. Raises `ConfigError`."""
        if stored == "bfloat16":
            return self.values(*shape)
        schemes: dict[str, QuantScheme] = {"fp4": MXFP4, "fp8": FP8_BLOCK}
        if stored not in schemes:
            raise ConfigError(f"--weights must be fp4, fp8 or bfloat16, found {stored!r}")
        scheme = schemes[stored]
        size = scheme.codes_shape(shape)
        codes = torch.randint(256, size, dtype=torch.uint8, device=self.device)
        if scheme is FP8_BLOCK:
            codes &= 0xBF  # no NaN
        scheme.canonicalize(codes)
        size = scheme.scale_shape(shape)
        scale = torch.randint(112, 124, size, dtype=torch.uint8, device=self.device)
        return QuantTensor(codes, scale, scheme, shape)

    def record(
        self, kernel: Kernel, calls: Sequence[Callable[[], Any]], cost: Cost, **rest: Any
    ) -> dict[str, Any]:
        """Time `calls`, one after another."""
        is_cpu = self.device.type == "cpu"
        # A body may read numbers back from the device, which a graph cannot.
        plain = is_cpu or kernel.name == BODY
        us = _calls_us(calls, self.device) if plain else _graph_us(calls)
        parts = {} if is_cpu else {k.name: k.us for k in trace_steps(calls[0], 1, {}).kernels}
        return {
            "op": kernel.op,
            "kernel": kernel.name,
            **rest,
            "us": us,
            "weight_TB_s": cost.bytes / us / 1e6,
            "TFLOP_s": cost.flops / us / 1e6,
            "roof_us": self.ceilings.floor(cost) * 1e6,
            "kernels": parts,
        }


def _prepared(kernel: Kernel, weights: list[Weight]) -> list[Weight]:
    """Weights as the kernel wants them stored; those passed may be lost."""
    return [kernel.prepare(weight) for weight in weights] if kernel.prepare else weights


def _is_product(name: str) -> bool:
    return "gate_up" in name or "_down" in name


def _sizes(shape: str, count: int) -> list[int]:
    words = shape.split("x")
    if len(words) != count or not all(word.isdigit() and int(word) for word in words):
        wanted = {2: "NxK", 3: "GxNxK"}[count]
        raise ConfigError(f"--shape must be {wanted}, found {shape!r}")
    return [int(word) for word in words]


def _graph_us(calls: Sequence[Callable[[], Any]], replays: int = 9) -> float:
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


def _calls_us(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Median microseconds of one of `calls`, launches included."""
    times = []
    calls[0]()
    for _ in range(3):
        for call in calls:
            if device.type != "cpu":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)
