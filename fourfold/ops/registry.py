"""Ops, kernels and the plan that joins them.

Contract: an `Op` is a name, a typed signature and a body in plain torch; the body *is* the definition.
A `Kernel` is another body for the same op with the features it needs. `KernelPlan.resolve` picks one
kernel for every op, once, before any weight is read; the model receives the plan and calls
`plan.<op>(...)`. Nothing here is mutable and nothing here knows a particular op, vendor or model.

A composite op's body takes the plan as its first argument and calls smaller ops through it, so that a
fused kernel for the whole replaces the parts without a second model, and kernels for the parts serve
where there is none for the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fourfold.core.config import ModelConfig
from fourfold.core.device import Device, Feature
from fourfold.core.errors import KernelError
from fourfold.core.tensor import Weight, dtype_name

BODY = "body"


@dataclass(frozen=True)
class Case:
    """Named arguments for one test of an op."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CaseMaker:
    """Makes an op's test inputs: seeded, on one device, in one dtype."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    @staticmethod
    def seeded(dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> CaseMaker:
        target = torch.device(device)
        return CaseMaker(dtype, target, torch.Generator("cpu").manual_seed(seed))

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, rounded through bfloat16 so that every dtype sees the same values."""
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(torch.bfloat16).to(dtype or self.dtype).to(self.device)

    def randint(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Tolerance:
    """Largest |kernel − body| allowed, relative to the output's largest magnitude, by model dtype.

    Integer outputs (codes, indices) must be equal.
    """

    float32: float = 1e-5
    bfloat16: float = 1.6e-2
    float64: float = 1e-12

    def of(self, dtype: torch.dtype) -> float:
        return float(getattr(self, dtype_name(dtype)))


@dataclass(frozen=True)
class Op:
    """An operation of the model. Calling it runs the body.

    `writes` names the arguments the op changes in place; every other op is pure. `consumes` names those
    that the caller gives up with the call: a kernel may leave its result in their memory, or anything
    else, and nothing but the result may be read afterwards. The body leaves them as they are. A kernel
    does so only if every element of its result that a program stores there depends on all that any
    other program, or another thread of its own, still has to read from that place. `parts` are the ops
    that the body of a composite op calls: where one of them is forced to a kernel, no kernel for the
    whole takes its place; where the whole is forced to its body, they run by definition in it.
    `differentiable` says that autograd through the body is meaningful, `reads_host` that the body reads
    numbers back from the device, so that a step that runs it cannot be captured, `batch_invariant` that
    a token's result has the same bits in every batch: the body copies, or works on each element by
    itself. Beside its parts, which count for themselves, a composite does no more.
    """

    name: str
    body: Callable[..., Any]
    cases: Callable[[CaseMaker], Iterator[Case]]
    tolerance: Tolerance
    writes: tuple[str, ...] = ()
    consumes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    differentiable: bool = True
    reads_host: bool = False
    batch_invariant: bool = False

    @property
    def composite(self) -> bool:
        """Whether the body takes the plan first and calls other ops through it."""
        return bool(self.parts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)


def op(
    cases: Callable[[CaseMaker], Iterator[Case]],
    *,
    tolerance: Tolerance | None = None,
    writes: tuple[str, ...] = (),
    consumes: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
    differentiable: bool = True,
    reads_host: bool = False,
    batch_invariant: bool = False,
) -> Callable[[Callable[..., Any]], Op]:
    """Declare a function as the body of the op of the same name."""

    def declare(body: Callable[..., Any]) -> Op:
        return Op(
            name=body.__name__,
            body=body,
            cases=cases,
            tolerance=tolerance or Tolerance(),
            writes=writes,
            consumes=consumes,
            parts=parts,
            differentiable=differentiable,
            reads_host=reads_host,
            batch_invariant=batch_invariant or bool(parts),
        )

    return declare


@dataclass(frozen=True)
class Kernel:
    """Another body for op `op`, available where `needs` ⊆ the device's features.

    `dtypes` are the model dtypes it takes; `supports` says why a model's shapes do not suit it (None:
    they do). Larger `priority` is tried first; the body has priority 0. `prepare` gives a weight as
    `run` wants it stored, changing it in place where it can; `run` takes other weights too.
    `batch_invariant` promises what every kernel here is tested for: a token's result has the same bits
    alone and in any batch.
    """

    op: str
    name: str
    run: Callable[..., Any]
    needs: frozenset[Feature] = frozenset()
    priority: int = 10
    dtypes: frozenset[torch.dtype] = frozenset({torch.bfloat16, torch.float32})
    supports: Callable[[ModelConfig], str | None] = field(default=lambda config: None)
    prepare: Callable[[Weight], Weight] | None = None
    batch_invariant: bool = True


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for one op, why, and why the others were not.

    `rejected` are (kernel, why) of those tried before; `others` are those that would have been tried
    after. `batch_invariant`: see `Op` and `Kernel`.
    """

    op: str
    kernel: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    batch_invariant: bool = False


class KernelPlan:
    """One kernel for every op: `plan.linear(x, w)` runs the one chosen for `linear`.

    `defined` names composite ops that run by definition all the way down, their parts too.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        chosen: Mapping[str, Kernel],
        choices: Iterable[Choice],
        defined: Collection[str] = (),
    ):
        self.choices = tuple(choices)
        reading = {o.name for o in ops if o.reads_host}
        self.reads_host = tuple(
            o.name
            for o in ops
            if (o.name in reading and o.name not in chosen)
            or (o.name in defined and not reading.isdisjoint(_parts(o, ops)))
        )
        self._prepare = {name: kernel.prepare for name, kernel in chosen.items() if kernel.prepare}
        self._run: dict[str, Callable[..., Any]] = {}
        for each in ops:
            kernel = chosen.get(each.name)
            run = kernel.run if kernel else each.body
            if each.name in defined:
                self._run[each.name] = partial(each.body, KernelPlan.bodies(ops))
            else:
                self._run[each.name] = self._bind(run) if each.composite else run

    def prepare(self, op: str, weight: Weight) -> Weight:
        """`weight` as the kernel chosen for `op` wants it stored: to be called once, when it is loaded.

        What was passed may have been changed in place and is not to be used again.
        """
        change = self._prepare.get(op)
        return change(weight) if change else weight

    def _bind(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: run(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return self.__dict__["_run"][name]
        except KeyError:
            raise AttributeError(f"no op is called {name!r}") from None

    @staticmethod
    def bodies(ops: Sequence[Op]) -> KernelPlan:
        """The plan that runs every op's definition."""
        chosen = [
            Choice(o.name, BODY, "definition", batch_invariant=o.batch_invariant) for o in ops
        ]
        return KernelPlan(ops, {}, chosen)

    @staticmethod
    def resolve(
        ops: Sequence[Op],
        kernels: Sequence[Kernel],
        device: Device,
        config: ModelConfig,
        dtype: torch.dtype,
        overrides: Mapping[str, str] | None = None,
        failed: Mapping[tuple[str, str], str] | None = None,
        triton: str = "",
    ) -> KernelPlan:
        """Choose a kernel for every op of a model that runs in `dtype`.

        `overrides` maps op names to kernel names (`--kernel OP=NAME`); `KernelError` if either does
        not exist or the kernel cannot run here, or if two exclude each other: a composite op that is
        forced to its body runs by definition with its parts. `failed` says of (op, kernel) how it
        failed a check of this machine: such a kernel is chosen only where it is forced, and so is one
        that is known to be bad on the device's architecture under this release of `triton` (empty:
        there is none).
        """
        forced = dict(overrides or {})
        known = {o.name for o in ops}
        for name in forced:
            if name not in known:
                raise KernelError(
                    f"--kernel {name}: no such op; ops are {', '.join(sorted(known))}"
                )
        defined = [o for o in ops if o.composite and forced.get(o.name) == BODY]
        for each in defined:
            for within in _parts(each, ops):
                if forced.get(within, BODY) != BODY:
                    raise KernelError(
                        f"--kernel {each.name}={BODY} runs {within}, a part of it, by definition too: "
                        f"it excludes --kernel {within}={forced[within]}"
                    )
        chosen: dict[str, Kernel] = {}
        choices = []
        for each in ops:
            candidates = [
                _Candidate(
                    k,
                    _refusal(k, device, config, dtype),
                    device.arch.why_bad(k.op, k.name, triton) or (failed or {}).get((k.op, k.name)),
                )
                for k in sorted(kernels, key=lambda k: -k.priority)
                if k.op == each.name
            ]
            if each.name in forced:
                kernel, choice = _forced(each, candidates, forced[each.name], ops)
            elif part := next((part for part in _parts(each, ops) if part in forced), None):
                kernel, choice = _in_parts(each, candidates, part)
            else:
                kernel, choice = _choose(each, candidates, device)
            if kernel:
                chosen[each.name] = kernel
            choices.append(choice)
        return KernelPlan(ops, chosen, choices, [each.name for each in defined])

    def describe(self) -> str:
        """The plan as a table, one line an op, with reasons."""
        lines = []
        for c in self.choices:
            lines.append(f"{c.op:<22} {c.kernel:<12} {c.reason}")
            lines.extend(f"{'':<22} not {name}: {why}" for name, why in c.rejected)
        return "\n".join(lines)


@dataclass(frozen=True)
class _Candidate:
    """A kernel, why it cannot run here, and how it failed a check here or is known to be bad."""

    kernel: Kernel
    refusal: str | None
    failure: str | None

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def standing(self) -> str | None:
        """Why it is not to be chosen."""
        return self.refusal or self.failure


def _forced(
    op: Op, candidates: Sequence[_Candidate], wanted: str, ops: Sequence[Op]
) -> tuple[Kernel | None, Choice]:
    others = tuple((c.name, c.standing or "could run here") for c in candidates if c.name != wanted)
    reason = "forced by --kernel"
    if wanted == BODY:
        parts = set(_parts(op, ops))
        if parts:
            reason += f", {', '.join(sorted(parts))} in it too"
        same_bits = op.batch_invariant and all(o.batch_invariant for o in ops if o.name in parts)
        return None, Choice(op.name, BODY, reason, (), others, same_bits)
    found = next((c for c in candidates if c.name == wanted), None)
    if found is None:
        names = ", ".join([*(c.name for c in candidates), BODY])
        raise KernelError(f"--kernel {op.name}={wanted}: no such kernel; {op.name} has {names}")
    if found.refusal:
        raise KernelError(f"--kernel {op.name}={wanted}: {found.refusal}")
    if found.failure:
        reason += f", although it {found.failure}"
    kernel = found.kernel
    return kernel, Choice(op.name, wanted, reason, (), others, kernel.batch_invariant)


def _parts(op: Op, ops: Sequence[Op]) -> Iterator[str]:
    """The parts of an op and theirs."""
    for part in op.parts:
        yield part
        yield from _parts(next(each for each in ops if each.name == part), ops)


def _in_parts(op: Op, candidates: Sequence[_Candidate], part: str) -> tuple[None, Choice]:
    why = f"its part {part} is forced by --kernel"
    rejected = tuple((c.name, c.standing or why) for c in candidates)
    return None, Choice(op.name, BODY, why, rejected, (), op.batch_invariant)


def _choose(
    op: Op, candidates: Sequence[_Candidate], device: Device
) -> tuple[Kernel | None, Choice]:
    at = next((n for n, c in enumerate(candidates) if c.standing is None), len(candidates))
    rejected = tuple((c.name, c.standing or "") for c in candidates[:at])
    if at == len(candidates):
        reason = "no kernel suits this device" if candidates else "the op's definition"
        return None, Choice(op.name, BODY, reason, rejected, (), op.batch_invariant)
    kernel = candidates[at].kernel
    others = tuple(
        (c.name, c.standing or f"stands behind {kernel.name}") for c in candidates[at + 1 :]
    )
    reason = f"first that suits {device.arch.name}"
    return kernel, Choice(op.name, kernel.name, reason, rejected, others, kernel.batch_invariant)


def _refusal(kernel: Kernel, device: Device, config: ModelConfig, dtype: torch.dtype) -> str | None:
    missing = kernel.needs - device.features
    if missing:
        names = ", ".join(sorted(f.value for f in missing))
        return f"needs {names}, which {device.arch.name} lacks"
    if dtype not in kernel.dtypes:
        return f"does not take {dtype}"
    return kernel.supports(config)
