"""Takes out of Triton's interpreter what it does again and again to no effect: it runs three times as fast.

Its results are the same; a type made twice is the same type, and what it computes is computed as before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def hasten() -> None:
    """For the rest of this process."""
    _patch_once()
    _check_no_overflow()
    _know_numpy_types()
    _know_block_types()
    _name_tuples_late()
    _reduce_xor_at_once()


def _patch_once() -> None:
    """The interpreter's own functions are put into `triton.language` at every launch and at every call of a
    kernel's function by another, and taken out after a launch: here they stay, once there."""
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang
    seen: set[Any] = set()

    def patched_once(function: Any) -> Any:
        if function not in seen:
            patch_lang(function)
            seen.add(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patched_once


def _check_no_overflow() -> None:
    """Integer results are computed a second time in 64 bits for an assertion that is only there in debug
    mode, which the interpreter does not have."""
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    if not options.debug:
        interpreter_builder.options = replace(options, sanitize_overflow=False)


def _know_numpy_types() -> None:
    """A table of numpy's types is made for every value."""
    from triton.runtime import interpreter

    numpy_type = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def known_type(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = numpy_type(kind)
        return known[name]

    interpreter._get_np_dtype = known_type


def _know_block_types() -> None:
    """A block's type is made, and its name written, for every value."""
    from triton.language import core

    make = core.block_type.__init__
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def make_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
        key = (element_ty.name, *sizes)
        if key not in known:
            make(self, element_ty, shape)
            known[key] = dict(vars(self))
        else:
            vars(self).update(known[key])

    core.block_type.__init__ = make_once


def _name_tuples_late() -> None:
    """Every shape is a tuple with a type that nobody asks for."""
    from triton.language import core

    make = core.tuple.__init__

    def make_untyped(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            make(self, args, type)

    def get(self: Any) -> Any:
        if "_type" not in vars(self):
            self._type = core._type_for_tuple_values(self.values)
        return self._type

    def put(self: Any, value: Any) -> None:
        self._type = value

    core.tuple.type = property(get, put)
    core.tuple.__init__ = make_untyped


def _reduce_xor_at_once() -> None:
    """A sort's exclusive or goes through a block element by element, in Python."""
    import numpy as np
    from triton.language import standard
    from triton.runtime.interpreter import ReduceOps

    apply = ReduceOps.apply_impl

    def apply_xor(self: Any, given: Any) -> Any:
        if self.combine_fn != standard._xor_combine or self.axis is None:
            return apply(self, given)
        values = [
            np.bitwise_xor.reduce(t.handle.data, self.axis, keepdims=self.keep_dims) for t in given
        ]
        return [self.to_tensor(v, t.dtype) for v, t in zip(values, given, strict=True)]

    ReduceOps.apply_impl = apply_xor
