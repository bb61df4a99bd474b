"""What a benchmark's document says, as tables for a person.

Contract: pure functions of the document (benchmark.py); every figure stands in it too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from fourfold.engine.roofline import kind

_MOST = 14  # lines of kernels


def head(document: dict[str, Any]) -> str:
    """What was measured, on what, and the device's ceilings."""
    setting, ceilings = document["setting"], document["ceilings"]
    seconds = document["start_seconds"]
    weights = setting["weights"] or "as released"
    lines = [
        f"{document['benchmark']}: {setting['geometry']}, ratios {document['compress_ratios']}, "
        f"weights {weights}, context {document['context']}, drafts {setting['drafts']}",
        f"{document['device'] or document['arch']}, torch {document['versions']['torch']}, "
        f"triton {document['versions']['triton']}: {ceilings['bytes_per_s'] / 1e12:.3g} TB/s, "
        f"{ceilings['bf16_per_s'] / 1e12:.3g} TFLOP/s bf16, "
        f"{ceilings['fp8_per_s'] / 1e12:.3g} fp8",
        f"weights {document['weight_bytes'] / 2**30:.2f} GiB "
        f"({document['weight_bytes'] / document['checkpoint_bytes'] - 1:+.2%} of the checkpoint's) "
        f"in {seconds['weights']:.1f} s, kernels in {seconds['kernels']:.1f} s, "
        f"engine in {seconds['engine']:.1f} s",
        *document["engine_notes"],
        "kernels: " + ", ".join(f"{c['op']}={c['kernel']}" for c in document["plan"]),
    ]
    return "\n".join(lines)


DECODE_HEAD = (
    f"{'batch':>5} {'ms/step':>9} {'steady':>9} {'tokens/s':>10} {'GB':>8} {'GFLOP':>9} "
    f"{'floor ms':>9} {'of roof':>8}"
)
PROFILE_HEAD = (
    f"{'batch':>5} {'traced ms':>9} {'launches':>9} {'idle':>7} {'matmul':>7} {'attention':>10} "
    f"{'bookkeeping':>12}"
)


def decode_line(result: dict[str, Any]) -> str:
    """A batch's measurement, below `DECODE_HEAD`."""
    return (
        f"{result['batch']:>5} {result['ms_per_step']:>9.3f} {result['steady_ms_per_step']:>9.3f} "
        f"{result['tokens_per_s']:>10.1f} {result['bytes'] / 1e9:>8.3f} "
        f"{result['flops'] / 1e9:>9.3f} {result['floor_ms']:>9.3f} "
        f"{result['fraction_of_roofline']:>8.1%}"
    )


def profile_line(result: dict[str, Any]) -> str:
    """A batch's profile, below `PROFILE_HEAD`."""
    profile = result["profile"]
    matmul, attention, rest = _kinds(profile)
    return (
        f"{result['batch']:>5} {profile['span_us'] / 1e3:>9.3f} {profile['launches']:>9.0f} "
        f"{_idle(profile):>7.1%} {matmul:>7.1%} {attention:>10.1%} {rest:>12.1%}"
    )


def prefill_line(result: dict[str, Any]) -> str:
    """The speed, its distance from the floor, and where the time goes."""
    line = (
        f"{result['tokens_per_s']:,.0f} tokens/s over {result['prompts']} prompts in "
        f"{result['steps']} steps of {result['ms_per_step']:.2f} ms; floor "
        f"{result['floor_ms']:.1f} ms in all, {result['fraction_of_roofline']:.1%} of roofline; "
        f"workspace {result['workspace_bytes'] / 2**20:.0f} MiB"
    )
    if "profile" in result:
        matmul, attention, rest = _kinds(result["profile"])
        line += (
            f"; idle {_idle(result['profile']):.1%}, matmul {matmul:.1%}, attention "
            f"{attention:.1%}, bookkeeping {rest:.1%}"
        )
    return line


def details(result: dict[str, Any]) -> str:
    """One result's op families against their floors, its largest kernels and gaps."""
    profile = result["profile"]
    floors: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for part in result["parts"]:
        floors[part["family"]] += part["floor_us"]
        moved[part["family"]] += part["bytes"]
    # The parts are of all measured steps, the profile of one.
    steps = result.get("steps", 1)
    span = profile["span_us"] or 1.0
    lines = [
        f"profiled step: {span / 1e3:.3f} ms, {profile['launches']:.0f} launches, idle "
        f"{profile['idle_us']:.0f} us",
        f"{'family':<12} {'kind':<12} {'us':>9} {'share':>7} {'floor us':>9} {'MB':>9}",
    ]
    for family in dict.fromkeys([*profile["families"], *floors]):
        us = profile["families"].get(family, 0.0)
        lines.append(
            f"{family:<12} {kind(family):<12} {us:>9.1f} {us / span:>7.1%} "
            f"{floors[family] / steps:>9.1f} {moved[family] / steps / 1e6:>9.2f}"
        )
    lines.append(f"{'us':>9} {'calls':>7}  kernel [grid]")
    for launch in profile["kernels"][:_MOST]:
        grid = f" [{launch['grid']}]" if launch["grid"] else ""
        lines.append(f"{launch['us']:>9.1f} {launch['calls']:>7.1f}  {launch['name']}{grid}")
    for gap in profile["gaps"]:
        lines.append(
            f"{gap['us']:>9.1f} {gap['calls']:>7.1f}  idle between {gap['after']} and "
            f"{gap['before']}"
        )
    return "\n".join(lines)


def _idle(profile: dict[str, Any]) -> float:
    return float(profile["idle_us"]) / (profile["span_us"] or 1.0)


def _kinds(profile: dict[str, Any]) -> list[float]:
    """Shares of a step by kind."""
    span = profile["span_us"] or 1.0
    return [
        profile["kinds"].get(name, 0.0) / span for name in ("matmul", "attention", "bookkeeping")
    ]
