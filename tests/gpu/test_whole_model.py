"""Eight layers of Flash, with FP4 experts and with FP8 ones, as an engine runs them on a GPU: every op of
its steps against the op's definition, and the logits against a model that runs by definitions alone."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.core.config import CacheConfig
from fourfold.core.device import detect
from fourfold.core.request import Request, SamplingParams
from fourfold.core.row_format import RowKind
from fourfold.core.rows import RowPages
from fourfold.dist.comm import SingleComm
from fourfold.engine.benchmark import Setting
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel, random_model
from fourfold.engine.oneshot import one_shot
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.catalog import OPS
from fourfold.ops.compare import FLIPPED, tensors
from fourfold.ops.registry import Kernel, KernelPlan
from fourfold.ops.rows import read_rows
from tests.kernels.launches import mapped
from tests.support import prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DEVICE, LARGE = "cuda", 1 << 28
BY_NAME, BODIES = {op.name: op for op in OPS}, KernelPlan.bodies(OPS)


class Compared:
    """Wraps what runs each op: the op's definition gets copies of the same arguments first.

    `found`: by op, the largest difference of floats as a multiple of the op's tolerance, the largest
    share of integers that differ, and how many calls there were.
    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float, int]] = {}
        self._within = False

    def watch(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        op = BY_NAME[name]

        def compared(*given: Any, **named: Any) -> Any:
            if (
                self._within or run is op.body
            ):  # a part of what is compared, or the definition itself
                return run(*given, **named)
            begin = 1 if op.composite else 0
            ours = (*given[begin:], *named.values())
            theirs = mapped(ours, copied)
            expected = getattr(BODIES, name)(
                *theirs[: len(given) - begin],
                **dict(zip(named, theirs[len(given) - begin :], strict=True)),
            )
            self._within = True
            try:
                got = run(*given, **named)
            finally:
                self._within = False
            places = list(op.body.__code__.co_varnames[begin : op.body.__code__.co_argcount])
            order = [*places[: len(given) - begin], *named]
            written = [order.index(argument) for argument in op.writes]
            self._note(
                name,
                [got, *(ours[at] for at in written)],
                [expected, *(theirs[at] for at in written)],
            )
            return got

        return compared

    def _note(self, name: str, got: Any, expected: Any) -> None:
        worst, flipped, calls = self.found.get(name, (0.0, 0.0, 0))
        allowed = BY_NAME[name].tolerance.of(torch.bfloat16)
        for a, b in zip(leaves(got), leaves(expected), strict=True):
            assert (a.tensor.dtype, a.tensor.shape) == (b.tensor.dtype, b.tensor.shape), name
            x, y = a.tensor, b.tensor
            if not x.numel():
                continue
            if not x.dtype.is_floating_point:
                flipped = max(flipped, float((x != y).double().mean()))
                continue
            fine = torch.isfinite(y)
            assert torch.equal(torch.isfinite(x), fine), name
            error = (x.double() - y.double()).abs()[fine]
            largest = float(y[fine].abs().max()) if fine.any() else 0.0
            if b.coded:
                off = (error > allowed * y.abs()[fine]).double().mean()
                flipped = max(flipped, float(off))
            elif error.numel() and (most := float(error.max())):
                exact = not allowed * largest
                worst = math.inf if exact else max(worst, most / (allowed * largest))
        self.found[name] = worst, flipped, calls + 1


def copied(tensor: Tensor) -> Tensor:
    """Weights are not written to, and large."""
    return tensor if tensor.numel() >= LARGE else tensor.clone()


@dataclass(frozen=True)
class Leaf:
    """A tensor of a result; `coded` if its numbers come from FP8 codes, where neighbours count as flipped."""

    tensor: Tensor
    coded: bool = False


def leaves(value: Any) -> list[Leaf]:
    """The tensors of a result, cached rows as numbers."""
    if isinstance(value, RowPages):
        slots = torch.arange(value.storage.shape[0] * value.rows_per_page, device=value.device)
        coded = value.format.kind is not RowKind.PLAIN
        return [Leaf(read_rows(value, slots, torch.float64), coded)]
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in leaves(each)]
    return [Leaf(tensor) for tensor in tensors(value)]


def model_of(geometry: str, compared: Compared | None = None) -> LoadedModel:
    setting = Setting(geometry=geometry, device=DEVICE, layers=8 if geometry != "tiny" else None)
    config = setting.engine(64, 4096)
    watch = compared.watch if compared else None
    return random_model(setting.model, setting.format, config, detect(DEVICE), watch)


@pytest.fixture(scope="module", params=["flash", "flash-base"])
def geometry(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    gc.collect()
    torch.cuda.empty_cache()


def test_every_op_of_an_engines_steps_is_within_its_tolerance(geometry: str) -> None:
    """Prompts in one piece and in chunks, and decode steps, of ten requests."""
    compared = Compared()
    loaded = model_of(geometry, compared)
    setting = Setting(geometry=geometry, device=DEVICE, enforce_eager=True, step_tokens=500)
    cache = CacheConfig(num_pages=64, enable_prefix_caching=False)
    engine = Engine(loaded, replace(setting.engine(10, 4096), cache=cache))
    vocabulary = loaded.config.vocab_size
    for number, tokens in enumerate(prompts(vocabulary, (700, 1, 130, 40, 260, 9, 3, 2, 77, 5), 3)):
        params = SamplingParams(
            max_tokens=3, temperature=0.7 * (number % 2), seed=number, ignore_eos=True, logprobs=2
        )
        engine.add(Request(str(number), tuple(tokens), params))
    for output in engine.run():
        assert output.error is None, output.error
    for name, (worst, flipped, calls) in compared.found.items():
        print(f"{name:22} {calls:4} calls: {worst:.3f} of the tolerance, {flipped:.3%} flipped")
    assert {"linear", "routed_experts"} & compared.found.keys() or DEVICE == "cpu"
    over = {name: each for name, each in compared.found.items() if each[0] > 1 or each[1] > FLIPPED}
    assert not over, over


def nudged(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body`, whose bfloat16 results are one unit in the last place off, up or down, a third of them not."""

    def nudge(x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.numel() >= LARGE:
            return x
        return x * (1 + (torch.randint_like(x, -1, 2) * 2**-8))

    return lambda *given, **named: mapped(body(*given, **named), nudge)


def test_logits_are_those_of_the_definitions(geometry: str) -> None:
    """Row by row, at every token of three prompts, relative to the row's length.

    What is allowed is measured: eight layers of random weights carry a last bit far, as a router's choice
    between experts that are nearly equal, or a code at a tie, falls to either side. So the definitions
    are compared with themselves too, with results that are one last bit off; kernels whose every op is
    within its tolerance may be as far from them.
    """
    loaded = model_of(geometry)
    parameters = dict(loaded.weights)
    off = {op.name: Kernel(op.name, "nudged", nudged(op.body), frozenset()) for op in OPS}
    plans = (BODIES, KernelPlan(OPS, off, ()))
    exact, other = (DeepseekV4(loaded.config, parameters, plan, SingleComm()) for plan in plans)
    tokens = prompts(loaded.config.vocab_size, (300, 1, 90), 4)
    torch.manual_seed(0)
    with torch.inference_mode():
        expected, got, moved = (
            one_shot(model, tokens).logits.float() for model in (exact, loaded.model, other)
        )
    assert torch.isfinite(got).all()
    found = {}
    for name, each in (("kernels", got), ("a last bit", moved)):
        error = (each - expected).norm(dim=-1) / expected.norm(dim=-1)
        agreeing = float((each.argmax(-1) == expected.argmax(-1)).float().mean())
        found[name] = float(error.median()), agreeing
        print(
            f"{geometry}, {name}: relative error of logits: median {error.median():.2e}, 90 % "
            f"{error.quantile(0.9):.2e}, most {error.max():.2e}; first choices agree {agreeing:.1%}"
        )
    (ours, agree), (floor, floor_agrees) = found["kernels"], found["a last bit"]
    assert ours < MORE * floor
    assert 1 - agree < MORE * (1 - floor_agrees) + 0.01


MORE = 1.5


def test_what_is_compared_is_seen_to_differ() -> None:
    """The comparison itself: a result off by twice the tolerance, and flipped integers."""
    compared, x, w = Compared(), torch.randn(3, 64), torch.ones(64)
    body = BY_NAME["rms_norm"].body
    compared.watch("rms_norm", lambda x, w, eps: body(x, w, eps) * (1 + 2 * 1.6e-2))(x, w, 1e-6)
    assert compared.found["rms_norm"][0] > 1
