"""Vector instructions on float64, two registers a lane.

A fused multiply-add rounds twice here. Of the division sequence only the last instruction matters: it
divides exactly by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.gcn.assembly import Instruction, Operand
from tools.gcn.errors import Unsupported
from tools.gcn.formats import F32, F64, I32, U32, U64, Array, Bits, bits_of
from tools.gcn.vector_tables import signed, to_integer
from tools.gcn.wave import LANES, MASK32, Effect, Reader, Wave, put, put64, row_of, vector, vector64


def doubles(operand: Operand) -> Reader:
    """Reads a float64 a lane, its sign modified; an inline float constant is one of float64."""
    if operand.kind == "f":
        constant = np.full(LANES, np.array(operand.index, U32).view(F32), F64)
        return lambda w: constant
    read = vector64(operand)
    negate, absolute = operand.negate, operand.absolute

    def value(w: Wave) -> Array:
        wide = read(w).view(F64)
        wide = np.abs(wide) if absolute else wide
        return -wide if negate else wide

    return value


def _fma(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "v_add_f64": np.add,
    "v_mul_f64": np.multiply,
    "v_fma_f64": _fma,
    "v_max_f64": np.fmax,
    "v_min_f64": np.fmin,
    "v_rndne_f64": np.rint,
    "v_floor_f64": np.floor,
    "v_ceil_f64": np.ceil,
    "v_trunc_f64": np.trunc,
    "v_fract_f64": lambda a: a - np.floor(a),
    "v_sqrt_f64": np.sqrt,
    "v_rsq_f64": lambda a: 1 / np.sqrt(a),
    "v_rcp_f64": lambda a: 1 / a,
    "v_div_fmas_f64": _fma,
    "v_div_fixup_f64": lambda a, b, c: c / b,
}
_WIDEN: dict[str, Callable[[Bits], Array]] = {
    "v_cvt_f64_f32": lambda bits: bits.view(F32).astype(F64),
    "v_cvt_f64_i32": lambda bits: signed(bits).astype(F64),
    "v_cvt_f64_u32": lambda bits: bits.astype(F64),
}
_NARROW: dict[str, Callable[[Array], Bits]] = {
    "v_cvt_f32_f64": lambda value: bits_of(value.astype(F32)),
    "v_cvt_i32_f64": lambda v: to_integer(v, -(2**31), 2**31 - 1).astype(I32).view(U32),
    "v_cvt_u32_f64": lambda v: to_integer(v, 0, MASK32).astype(U32),
}


def double_effect(x: Instruction, name: str) -> Effect | None:
    """What an instruction on float64 does, or None if it is none of these."""
    o = x.operands
    if name in _ARITHMETIC:
        row, compute, reads = row_of(o[0]), _ARITHMETIC[name], [doubles(each) for each in o[1:]]
        return lambda w: put64(w, row, compute(*(read(w) for read in reads)).view(U64))
    if name in _WIDEN:
        if o[1].negate or o[1].absolute:
            raise Unsupported(f"sign modifier: {x.text}")
        row, widen, source = row_of(o[0]), _WIDEN[name], vector(o[1])
        return lambda w: put64(w, row, widen(source(w)).view(U64))
    if name in _NARROW:
        row, narrow, wide = row_of(o[0]), _NARROW[name], doubles(o[1])
        return lambda w: put(w, row, narrow(wide(w)))
    return _special(x, name)


def _special(x: Instruction, name: str) -> Effect | None:
    o = x.operands
    if name == "v_fmac_f64":
        row, a, b, c = row_of(o[0]), doubles(o[1]), doubles(o[2]), doubles(o[0])
        return lambda w: put64(w, row, _fma(a(w), b(w), c(w)).view(U64))
    if name == "v_ldexp_f64":
        row, a, power = row_of(o[0]), doubles(o[1]), vector(o[2])
        return lambda w: put64(w, row, np.ldexp(a(w), signed(power(w))).view(U64))
    if name != "v_div_scale_f64":
        return None
    row, out, source = row_of(o[0]), o[1].index, vector64(o[2])

    def scale(w: Wave) -> None:
        put64(w, row, source(w))
        w.set_scalar(out, 0, 2)

    return scale
