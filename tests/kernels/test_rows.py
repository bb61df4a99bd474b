"""Norms, rotary and cached rows in the interpreter: against the bodies, and FP8 codes one by one."""

from __future__ import annotations

import pytest
import torch

from fourfold.core.row_format import RowFormat, RowKind
from fourfold.ops.norm import query_norm_rope
from fourfold.ops.quantize import encode_fp8
from fourfold.ops.registry import Kernel
from fourfold.ops.rope import inverse_frequencies, rotate
from tests.kernels import interpreter
from tests.kernels.given import kept
from tests.kernels.interpreter import (
    assert_close,
    assert_equals_body,
    driver,
    interpreted,
    poisoned,
)

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


def kernels() -> dict[str, Kernel]:
    from fourfold.kernels.triton import norm, rope, rows

    return {k.op: k for k in (*norm.KERNELS, *rope.KERNELS, *rows.KERNELS)}


OPS = ["rms_norm", "query_norm_rope", "rotate", "encode_rows", "norm_rope_rows", "store_rows"]


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_equals_the_body(op: str) -> None:
    assert_equals_body(kernels()[op])


@interpreted
def test_fp8_codes_of_every_bfloat16_number() -> None:
    """Rows whose first number is 448, so that the scale is 1 and codes are those of the numbers."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    kept = every[every.abs() <= 448]
    kept = torch.nn.functional.pad(kept, (0, -len(kept) % 1023)).view(-1, 1023)
    x = torch.cat([torch.full((len(kept), 1), 448.0).bfloat16(), kept], dim=1)
    rows = kernels()["encode_rows"].run(x, RowFormat(RowKind.FP8_WHOLE, 1024, 64))
    assert torch.equal(rows.data()[0], encode_fp8(x))


@interpreted
@pytest.mark.parametrize("kind", list(RowKind), ids=str)
def test_rows_alone_and_in_a_batch_with_what_is_not_finite(kind: RowKind) -> None:
    run, body = kernels()["norm_rope_rows"].run, interpreter.body("norm_rope_rows")
    format = RowFormat(kind, 192, 32)
    x, weight = torch.randn(9, 192).bfloat16() * 20, torch.rand(192).bfloat16()
    x[2, 3], x[3, 190], x[4, 7], x[5] = float("nan"), float("nan"), float("inf"), 3e38
    x[6] = 0
    positions, frequencies = torch.arange(9) * 1000, inverse_frequencies(32, 160000.0, None)
    with poisoned():
        whole = run(x, weight, positions, frequencies, 1e-6, format)
    expected = body(x, weight, positions, frequencies, 1e-6, format)
    for i in (0, 1, 2, 3, 4, 5, 6, 7, 8):
        part = slice(i, i + 1)
        one = run(x[part], weight, positions[part], frequencies, 1e-6, format)
        pairs = [(one.data()[0, 0], whole.data()[0, i], expected.data()[0, i])]
        if format.scale_bytes:
            pairs.append((one.scales()[0, 0], whole.scales()[0, i], expected.scales()[0, i]))
        for alone, together, right in pairs:
            as_bytes = [t.contiguous().view(torch.uint8) for t in (alone, together, right)]
            assert torch.equal(as_bytes[0], as_bytes[1])
            differing = (as_bytes[1] != as_bytes[2]).sum()
            assert differing <= 2, (i, as_bytes)  # a code on a rounding tie


@interpreted
def test_queries_alone_and_in_a_batch_at_far_positions() -> None:
    run = kept(kernels()["query_norm_rope"].run)
    q = torch.randn(6, 5, 48).bfloat16() * 7
    positions = torch.tensor([0, 1, 1000, 65535, 999999, 1048575])
    frequencies = inverse_frequencies(16, 10000.0, None)
    q[3, 2, 1], q[4, 0, 47] = float("nan"), float("inf")
    whole = run(q, positions, frequencies, 1e-6)
    for t in range(6):
        part = slice(t, t + 1)
        alone = run(q[part], positions[part], frequencies, 1e-6)
        assert torch.equal(alone.view(torch.int16), whole[part].view(torch.int16))
    assert_close(whole, query_norm_rope(q, positions, frequencies, 1e-6), 1.6e-2)


@interpreted
@pytest.mark.parametrize("heads", [1, 5])
def test_heads_are_turned_where_they_lie(heads: int) -> None:
    positions, frequencies = torch.arange(6) * 999, inverse_frequencies(16, 10000.0, None)
    q = torch.randn(6, heads, 48).bfloat16()
    for name, definition, rest in (
        ("query_norm_rope", query_norm_rope, (1e-6,)),
        ("rotate", rotate, (True,)),
    ):
        expected = definition(q, positions, frequencies, *rest)
        got = kernels()[name].run(q, positions, frequencies, *rest)
        assert got.data_ptr() == q.data_ptr()
        assert_close(got, expected, 1.6e-2)


@interpreted
def test_nothing_is_nothing() -> None:
    k = kernels()
    format = RowFormat(RowKind.FP8_GROUPS, 128, 16)
    x, positions = torch.empty(0, 128), torch.empty(0, dtype=torch.int64)
    frequencies = inverse_frequencies(16, 10000.0, None)
    rows = k["norm_rope_rows"].run(x, torch.ones(128), positions, frequencies, 1e-6, format)
    assert rows.storage.shape == (1, 0)
    assert k["rms_norm"].run(x, torch.ones(128), 1e-6).shape == (0, 128)
    assert k["rotate"].run(x, positions, frequencies).shape == (0, 128)
