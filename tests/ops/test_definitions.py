"""Every op's body on its own cases: precision, purity, gradients. A kernel's test compares with these."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fourfold.core.rows import RowPages
from fourfold.ops.catalog import OPS
from fourfold.ops.compare import tensors
from fourfold.ops.registry import CaseMaker, KernelPlan, Op

BODIES = KernelPlan.bodies(OPS)


def run(op: Op, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Outputs of the op's body on each of its cases; for a writing op, what it wrote."""
    results = {}
    for case in op.cases(CaseMaker.seeded(dtype)):
        arguments = copy.deepcopy(dict(case.arguments))
        out = getattr(BODIES, op.name)(**arguments)
        results[case.name] = tensors([arguments[w] for w in op.writes] if op.writes else out)
    return results


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_op_has_cases_a_docstring_and_a_unique_name(op: Op) -> None:
    cases = list(op.cases(CaseMaker.seeded(torch.float32)))
    assert cases
    assert len({c.name for c in cases}) == len(cases)
    assert op.body.__doc__
    assert [o.name for o in OPS].count(op.name) == 1


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_float32_body_agrees_with_float64_within_tolerance(op: Op) -> None:
    narrow, wide = run(op, torch.float32), run(op, torch.float64)
    for name in narrow:
        for a, b in zip(narrow[name], wide[name], strict=True):
            if not a.dtype.is_floating_point:
                if "fp8" not in name or a.dtype == torch.uint8:
                    # Codes may flip on a rounding tie.
                    assert int((a != b).sum()) <= 0.02 * a.numel(), name
                continue
            good = torch.isfinite(b)
            bound = op.tolerance.of(torch.float32) * float(b[good].abs().max()) if good.any() else 0
            assert float((a.double() - b)[good].abs().max()) <= bound, name


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_body_is_deterministic_and_changes_only_what_it_writes(op: Op) -> None:
    for case in op.cases(CaseMaker.seeded(torch.float32)):
        before = copy.deepcopy(dict(case.arguments))
        after = copy.deepcopy(dict(case.arguments))
        first = tensors(getattr(BODIES, op.name)(**after))
        for key, value in before.items():
            pairs = zip(tensors(value), tensors(after[key]), strict=True)
            same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
            assert same or key in op.writes, f"{case.name}: {key} was changed"
        second = tensors(getattr(BODIES, op.name)(**copy.deepcopy(before)))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", [o for o in OPS if o.differentiable], ids=lambda op: op.name)
def test_gradients_match_finite_differences(op: Op) -> None:
    """`gradcheck` in float64 with respect to every plain float input (quantised rows have none)."""
    for case in op.cases(CaseMaker.seeded(torch.float64)):
        if "fp8" in case.name or "tied" in case.name:
            continue
        names = [
            k
            for k, v in case.arguments.items()
            if isinstance(v, Tensor) and v.is_floating_point() and k not in ("inv_freq", *op.writes)
        ]

        def body(*values: Tensor, names=names, case=case) -> tuple[Tensor, ...]:
            arguments = copy.deepcopy({k: v for k, v in case.arguments.items() if k not in names})
            out = getattr(BODIES, op.name)(**arguments, **dict(zip(names, values, strict=True)))
            kept = tensors([arguments[w] for w in op.writes] if op.writes else out)
            return tuple(t for t in kept if t.is_floating_point() and t.requires_grad)

        inputs = [case.arguments[n].detach().clone().requires_grad_() for n in names]
        if inputs and body(*inputs):
            assert torch.autograd.gradcheck(body, inputs, atol=1e-5, fast_mode=True), case.name


def test_rows_written_in_place_carry_gradients() -> None:
    """A fresh state of plain rows is a differentiable intermediate, not a cache."""
    store = next(o for o in OPS if o.name == "store_rows")
    case = next(c for c in store.cases(CaseMaker.seeded(torch.float64)) if c.name == "plain")
    pages, rows, slots = (case.arguments[k] for k in ("pages", "rows", "slots"))
    values = rows.storage.clone().requires_grad_()
    store.body(pages, RowPages(values, rows.format, rows.rows_per_page), slots)
    pages.storage.square().sum().backward()
    expected = torch.where(slots.view(1, -1, 1) >= 0, 2 * rows.storage, 0)
    assert torch.allclose(values.grad, expected)
