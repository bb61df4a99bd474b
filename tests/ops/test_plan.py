"""Kernel plans: chosen once, by features, dtype and shape, with a reason for everything."""

from __future__ import annotations

from types import CodeType

import pytest
import torch

from fourfold import kernels
from fourfold.core.device import ARCHS, Device, Feature
from fourfold.core.errors import KernelError
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import CaseMaker, Kernel, KernelPlan
from tests.support import small_config

FAST = Kernel("rms_norm", "fast", lambda x, weight, eps: x, frozenset({Feature.FP8_MATRIX}), 20)
SLOW = Kernel("rms_norm", "slow", lambda x, weight, eps: 2 * x, frozenset({Feature.TRITON}))


def resolve(
    arch: str, *ks: Kernel, dtype: torch.dtype = torch.bfloat16, **forced: str
) -> KernelPlan:
    device = Device(ARCHS[arch], torch.device("cpu"))
    return KernelPlan.resolve(OPS, ks, device, small_config(), dtype, forced)


def choice(plan: KernelPlan, op: str) -> tuple[str, str, dict[str, str]]:
    found = next(c for c in plan.choices if c.op == op)
    return found.kernel, found.reason, dict(found.rejected)


def test_the_first_that_suits_the_device_is_chosen_and_the_rest_have_reasons() -> None:
    assert choice(resolve("sm_90", SLOW, FAST), "rms_norm")[0] == "fast"
    name, reason, rejected = choice(resolve("sm_80", SLOW, FAST), "rms_norm")
    assert (name, reason) == ("slow", "first that suits sm_80")
    assert "FP8 matrix units" in rejected["fast"]
    name, _, rejected = choice(resolve("cpu", SLOW, FAST), "rms_norm")
    assert name == "body"
    assert set(rejected) == {"fast", "slow"}
    name, _, rejected = choice(resolve("sm_90", FAST, dtype=torch.float64), "rms_norm")
    assert name == "body"
    assert "float64" in rejected["fast"]


def test_shapes_can_be_refused() -> None:
    limited = Kernel("rms_norm", "limited", FAST.run, supports=lambda c: f"hidden {c.hidden_size}")
    name, _, rejected = choice(resolve("sm_90", limited), "rms_norm")
    assert name == "body"
    assert rejected["limited"] == "hidden 64"


def test_an_override_is_obeyed_or_refused_by_name() -> None:
    assert choice(resolve("sm_90", SLOW, FAST, rms_norm="slow"), "rms_norm")[0] == "slow"
    assert choice(resolve("sm_90", FAST, rms_norm="body"), "rms_norm")[0] == "body"
    for forced, words in (
        ({"rms_norm": "none"}, "no such kernel"),
        ({"nothing": "body"}, "no such op"),
    ):
        with pytest.raises(KernelError, match=words):
            resolve("sm_90", FAST, **forced)
    with pytest.raises(KernelError, match="FP8 matrix units"):
        resolve("sm_80", FAST, rms_norm="fast")


def test_the_plan_runs_what_it_says_and_prints_it() -> None:
    plan, x = resolve("sm_90", SLOW), torch.ones(1, 2)
    assert torch.equal(plan.rms_norm(x, x[0], 1e-6), 2 * x)
    assert "rms_norm" in plan.describe()
    with pytest.raises(AttributeError, match="no op"):
        _ = plan.not_an_op


def test_a_composite_reaches_kernels_for_its_parts() -> None:
    seen = []

    def post(
        z: torch.Tensor, streams: torch.Tensor, p: torch.Tensor, c: torch.Tensor
    ) -> torch.Tensor:
        seen.append("part")
        return streams

    plan = resolve("sm_90", Kernel("hc_post", "k", post))
    op = next(o for o in OPS if o.name == "hc_post_pre")
    case = next(iter(op.cases(CaseMaker.seeded(torch.float32))))
    plan.hc_post_pre(**case.arguments)
    assert seen == ["part"]


def test_a_forced_part_is_not_hidden_by_a_kernel_for_the_whole() -> None:
    """Nor by one for a whole of which that whole is a part."""
    whole = [Kernel(name, "fused", lambda *a, **k: None) for name in ("linears", "norm_linears")]
    part = Kernel("linear", "own", lambda *a, **k: None)
    assert chosen(resolve("sm_90", *whole, part)) >= {"linears=fused", "norm_linears=fused"}
    plan = resolve("sm_90", *whole, part, linear="own")
    assert chosen(plan) >= {"linear=own", "linears=body", "norm_linears=body"}
    reasons = {c.op: c.reason for c in plan.choices}
    assert reasons["norm_linears"] == "its part linear is forced by --kernel"
    both = resolve("sm_90", *whole, part, linear="own", linears="fused")
    assert chosen(both) >= {"linear=own", "linears=fused", "norm_linears=body"}


def test_a_whole_forced_to_its_body_is_the_definition_all_the_way_down() -> None:
    part = Kernel("routed_experts", "own", lambda *a, **k: pytest.fail("not by definition"))
    assert chosen(resolve("sm_90", part)) >= {"moe=body", "routed_experts=own"}
    plan = resolve("sm_90", part, moe="body")
    op = next(o for o in OPS if o.name == "moe")
    case = next(iter(op.cases(CaseMaker.seeded(torch.float32))))
    expected = KernelPlan.bodies(OPS).moe(**case.arguments)
    assert torch.equal(plan.moe(**case.arguments), expected)
    assert "moe" in plan.reads_host
    choice = next(c for c in plan.choices if c.op == "moe")
    assert choice.reason == "forced by --kernel, routed_experts in it too"
    assert not choice.batch_invariant
    with pytest.raises(KernelError, match="excludes --kernel routed_experts=own"):
        resolve("sm_90", part, moe="body", routed_experts="own")


def test_parts_are_what_a_body_calls() -> None:
    known = {each.name for each in OPS}
    for op in (each for each in OPS if each.composite):
        assert known.intersection(names_in(op.body.__code__)) == {*op.parts}, op.name


def names_in(code: CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return {*code.co_names}.union(*map(names_in, inner))


def chosen(plan: KernelPlan) -> set[str]:
    return {f"{c.op}={c.kernel}" for c in plan.choices}


def test_a_cpu_loads_no_triton() -> None:
    found = kernels.load(Device(ARCHS["cpu"], torch.device("cpu")))
    assert found
    assert all(k.needs == {Feature.CPU} for k in found)
