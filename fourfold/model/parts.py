"""What the model's modules share: their parameters, their observer, the chain of sublayers.

Contract: a module is built from the config, its part of the parameters, the kernel plan and the
communicator, and is then a pure function of its inputs and of the state it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from fourfold.core.config import ModelConfig
from fourfold.core.errors import CheckpointError
from fourfold.core.parameters import Role
from fourfold.core.tensor import QuantTensor, Weight
from fourfold.dist.comm import Comm
from fourfold.ops.mhc import Site
from fourfold.ops.registry import KernelPlan

Observer = Callable[[str, Tensor], None]
Result = TypeVar("Result")


class Beside(Protocol):
    """Starts `work` beside what the caller does next; the call returned joins it and gives its result.

    Until then the work may run at any moment: it shares no output with what the caller does, and what
    it reads must live on. It is always joined.
    """

    def __call__(self, work: Callable[[], Result]) -> Callable[[], Result]: ...


def in_turn(work: Callable[[], Result]) -> Callable[[], Result]:
    """`Beside` where nothing runs side by side: the work is done at once."""
    result = work()
    return lambda: result


class Parameters:
    """The parameters below one prefix (`""`, `layers.N.`, `mtp.N.`), looked up by role."""

    def __init__(self, values: Mapping[str, Weight], prefix: str = ""):
        self.values = values
        self.prefix = prefix

    def at(self, prefix: str) -> Parameters:
        return Parameters(self.values, prefix)

    def weight(self, role: Role) -> Weight:
        """A matrix, plain or quantised."""
        name = self.prefix + role.value
        if name not in self.values:
            raise CheckpointError(f"the model needs the parameter {name}, which was not loaded")
        return self.values[name]

    def tensor(self, role: Role) -> Tensor:
        """A parameter that is never quantised."""
        value = self.weight(role)
        if isinstance(value, QuantTensor):
            name = self.prefix + role.value
            raise CheckpointError(f"{name} must be a plain tensor, found {value.scheme.name}")
        return value


@dataclass(frozen=True)
class Context:
    """What every module is built from."""

    config: ModelConfig
    ops: KernelPlan
    comm: Comm
    beside: Beside = in_turn


class Notes:
    """Hands named intermediates to an observer, if there is one: copies, as ops may write their results
    where an intermediate lay."""

    def __init__(self, observe: Observer | None):
        self.observe = observe

    def __call__(self, name: str, value: Tensor) -> None:
        if self.observe is not None:
            self.observe(name, value.clone())


def site(p: Parameters, config: ModelConfig, roles: tuple[Role, Role, Role, Role]) -> Site:
    """A hyper-connection site from the roles of its fn, base, scale and norm."""
    fn, base, scale, norm = (p.tensor(role) for role in roles)
    return Site(
        fn,
        base,
        scale,
        norm,
        norm_eps=config.rms_norm_eps,
        hc_eps=config.hc_eps,
        iterations=config.hc_sinkhorn_iters,
    )


@dataclass(frozen=True)
class Sublayer:
    """A site and what runs between its two halves: `run(y [T, D]) -> z [T, D]`."""

    name: str
    site: Site
    run: Callable[[Tensor], Tensor]


def run_sublayers(
    ops: KernelPlan, streams: Tensor, sublayers: Sequence[Sublayer], note: Notes
) -> Tensor:
    """Streams `[T, S, D]` through all sublayers; the post step of one and the pre step of the next
    touch the same data and are one op."""
    y, post, comb = ops.hc_pre(streams, sublayers[0].site)
    for current, following in zip(sublayers, [*sublayers[1:], None], strict=True):
        note(f"{current.name}.y", y)
        z = current.run(y)
        note(f"{current.name}.z", z)
        if following is None:
            streams = ops.hc_post(z, streams, post, comb)
        else:
            streams, y, post, comb = ops.hc_post_pre(z, streams, post, comb, following.site)
        del z  # in a prompt's step there is no room for what nobody reads
        note(f"{current.name}.streams", streams)
    return streams


@dataclass(frozen=True)
class ForwardOutput:
    """Logits `[L, V]` float32 (float64) of the tokens asked for, streams `[T, S, D]` after the last
    layer, and which sequences `[S]` met a number that is not finite."""

    logits: Tensor
    streams: Tensor
    nonfinite: Tensor


class Head:
    """Streams to logits: hc_head, norm, output head. The MTP layer has its own hc_head and norm."""

    def __init__(self, context: Context, p: Parameters, head: Weight):
        self.ops, self.comm, self.config = context.ops, context.comm, context.config
        self.fn = p.tensor(Role.HC_HEAD_FN)
        self.base = p.tensor(Role.HC_HEAD_BASE)
        self.scale = p.tensor(Role.HC_HEAD_SCALE)
        self.norm = p.tensor(Role.NORM)
        self.head = head

    def __call__(self, streams: Tensor) -> Tensor:
        """`streams [L, S, D]` → logits `[L, V]`."""
        c = self.config
        hidden = self.ops.hc_head(
            streams, self.fn, self.base, self.scale, self.norm, c.rms_norm_eps, c.hc_eps
        )
        logits = self.ops.linear(hidden, self.head, unrounded=True)
        return self.comm.all_gather(logits, dim=-1)
