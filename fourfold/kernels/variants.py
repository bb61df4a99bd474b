"""What a kernel is compiled as: variants, recorded from the launches that ops make.

    with record(ARCHS["sm_90"]) as variants:
        plan.linear(x, weight)                # meta or CPU tensors of the shapes in question
    [*variants]                               # what the launches ask to be compiled; nothing was

Contract: there is no list of variants kept by hand. A `Variant` is what Triton would compile for a launch
on that architecture: function, argument types, constants, what is known of the arguments, and options.
`entry_points` finds the functions that can be launched, so that one never recorded shows.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from triton import knobs
from triton.runtime.jit import JITFunction

from fourfold.core.device import Arch
from fourfold.kernels.targets import stand_in

Path = tuple[int, ...]  # of an argument; longer than one inside a tuple
Kind = str | tuple["Kind", ...]  # Triton's name of a type, or those inside a tuple
DIVISIBLE = ("tt.divisibility", 16)


@dataclass(frozen=True)
class Variant:
    """One binary of the function `module`.`name`.

    `signature`: (parameter, type or tuple of them), constants as "constexpr"; `constants`: (path,
    value); `known`: (path, facts) such as that an argument is divisible by 16, with paths of which
    nothing is known, as they are part of Triton's key; `options`: warps, stages and what else the
    compiler takes.
    """

    module: str
    name: str
    signature: tuple[tuple[str, Kind], ...]
    constants: tuple[tuple[Path, Any], ...]
    known: tuple[tuple[Path, tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def function(self) -> JITFunction[Any]:
        """The function, imported."""
        found: JITFunction[Any] = getattr(importlib.import_module(self.module), self.name)
        return found

    @property
    def family(self) -> str:
        """The file it stands in: `triton.linear`."""
        return self.module.removeprefix("fourfold.kernels.")

    def describe(self) -> str:
        """Constants, types and facts in one line."""
        names = [name for name, _ in self.signature]
        constants = [f"{names[path[0]]}={value}" for path, value in self.constants]
        types = [f"{name}:{kind}" for name, kind in self.signature if kind != "constexpr"]
        divisible = [names[path[0]] for path, facts in self.known if DIVISIBLE in facts]
        options = dict(self.options)
        launch = [f"warps={options['num_warps']}", f"stages={options['num_stages']}"]
        return " ".join([*constants, *launch, *types, f"/16: {','.join(divisible) or 'none'}"])

    def divisible(self, all_of_them: bool) -> Variant:
        """This variant with every argument known to be divisible by 16, or none.

        What the function declares not to be specialised stays unknown.
        """
        known = {path: dict(facts) for path, facts in self.known}
        for number, ((_, kind), parameter) in enumerate(
            zip(self.signature, self.function.params, strict=True)
        ):
            fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            for path, each in _leaves((number,), kind):
                facts = known.setdefault(path, {})
                facts.pop(DIVISIBLE[0], None)
                if all_of_them and not fixed and (each.startswith("*") or each[0] in "iu"):
                    facts[DIVISIBLE[0]] = DIVISIBLE[1]
        return replace(self, known=_facts({path: facts for path, facts in known.items() if facts}))


def _leaves(path: Path, kind: Kind) -> Iterator[tuple[Path, str]]:
    """Every type in `kind`, with its path."""
    if isinstance(kind, str):
        yield path, kind
        return
    for number, each in enumerate(kind):
        yield from _leaves((*path, number), each)


def _facts(
    known: dict[Path, dict[str, int]],
) -> tuple[tuple[Path, tuple[tuple[str, int], ...]], ...]:
    return tuple((path, tuple(facts.items())) for path, facts in sorted(known.items()))


def _hashable(value: Any) -> Any:
    """Lists as tuples, all the way down: what JSON made of an option."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _variant(asked: Any, function: JITFunction[Any]) -> Variant:
    """From what Triton tells of a compilation it is about to start."""
    (known,) = asked["configs"]
    options = json.loads(asked["specialization_data"])["options"]
    facts = {path: dict(each) for path, each in known.items()}
    return Variant(
        function.__module__,
        function.__name__,
        tuple(asked["signature"].items()),
        tuple(asked["constants"].items()),
        _facts(facts),
        tuple((name, _hashable(value)) for name, value in options.items()),
    )


@contextmanager
def record(arch: Arch, label: Callable[[], str] = str) -> Iterator[dict[Variant, str]]:
    """Collect the variants that launches inside the block would compile for `arch`, in order.

    Each comes with what `label()` said when it was launched first. Nothing is compiled and nothing runs:
    outputs stay as they were allocated.
    """
    found: dict[Variant, str] = {}
    functions: list[JITFunction[Any]] = []
    with stand_in(arch) as here, knobs.runtime.scope():

        def note(*, key: str, fn: Any, compile: Any, **rest: Any) -> bool:
            found.setdefault(_variant(compile, fn.jit_function), label())
            functions.append(fn.jit_function)
            # The next launch alike finds this and does not ask again.
            fn.jit_function.device_caches[here][0][key] = _NOT_COMPILED
            return True  # tells Triton not to compile

        knobs.runtime.jit_cache_hook = note
        try:
            yield found
        finally:
            for function in functions:
                function.device_caches.pop(here, None)


class _NotCompiled:
    """What a launch finds in place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *launch: Any) -> None:
        return None

    def run(self, *launch: Any) -> None:
        return None


_NOT_COMPILED = _NotCompiled()


def entry_points(module: str) -> dict[str, JITFunction[Any]]:
    """The functions of a module that are launched: no other function, here or in the kernels' modules
    that were imported, calls them."""
    own = _functions(module)
    modules = [name for name in sys.modules if name.startswith(__package__ + ".")]
    callers = [function for name in modules for function in _functions(name).values()]
    called = {
        name
        for name, function in own.items()
        if any(other is not function and re.search(rf"\b{name}\(", other.src) for other in callers)
    }
    return {name: value for name, value in own.items() if name not in called}


def _functions(module: str) -> dict[str, JITFunction[Any]]:
    """The device functions that a module defines."""
    return {
        name: value
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, JITFunction) and value.__module__ == module
    }
