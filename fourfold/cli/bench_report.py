"""What a benchmark found: vLLM's result block, its JSON, and a page with plots.

Contract: figures are of successful requests; times in milliseconds. The page is one file that loads
nothing. It does not know how requests were made.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence
from typing import Any

from fourfold.cli.bench_load import Outcome

_NAMES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation, as numpy has it; 0 for no values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def samples(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Milliseconds by metric."""
    done = [o for o in outcomes if not o.error]
    return {
        "ttft": [o.ttft * 1e3 for o in done],
        "tpot": [o.tpot * 1e3 for o in done if o.tpot is not None],
        "itl": [gap * 1e3 for o in done for gap in o.itl],
        "e2el": [o.latency * 1e3 for o in done],
    }


def figures(
    outcomes: Sequence[Outcome], seconds: float, percentiles: Sequence[float]
) -> dict[str, Any]:
    """The figures under the names of vLLM's result file."""
    done = [o for o in outcomes if not o.error]
    inputs, outputs = sum(o.prompt_tokens for o in done), sum(o.output_tokens for o in done)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_output_tokens_per_s": _peak(done),
        "max_concurrent_requests": _overlap(done),
    }
    for name, values in samples(outcomes).items():
        found[f"mean_{name}_ms"] = statistics.fmean(values) if values else 0.0
        found[f"median_{name}_ms"] = percentile(values, 50)
        found[f"std_{name}_ms"] = statistics.pstdev(values) if values else 0.0
        for percent in percentiles:
            found[f"p{percent:g}_{name}_ms"] = percentile(values, percent)
    return found


def _peak(done: Sequence[Outcome]) -> float:
    """Most events in one second."""
    seconds: dict[int, int] = {}
    for outcome in done:
        moment = outcome.start + outcome.ttft
        for gap in (0.0, *outcome.itl):
            moment += gap
            seconds[int(moment)] = seconds.get(int(moment), 0) + 1
    return float(max(seconds.values(), default=0))


def _overlap(done: Sequence[Outcome]) -> int:
    """Most requests at one moment."""
    moments = sorted([(o.start, 1) for o in done] + [(o.end, -1) for o in done])
    running = most = 0
    for _, change in moments:
        running += change
        most = max(most, running)
    return most


def block(
    found: dict[str, Any],
    metrics: Sequence[str],
    percentiles: Sequence[float],
    concurrency: int | None,
    rate: float,
) -> str:
    """vLLM's result block."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]

    def line(name: str, value: float) -> None:
        lines.append(
            f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"
        )

    line("Successful requests:", found["completed"])
    line("Failed requests:", found["failed"])
    if concurrency is not None:
        line("Maximum request concurrency:", concurrency)
    if rate != float("inf"):
        line("Request rate configured (RPS):", rate)
    line("Benchmark duration (s):", found["duration"])
    line("Total input tokens:", found["total_input_tokens"])
    line("Total generated tokens:", found["total_output_tokens"])
    line("Request throughput (req/s):", found["request_throughput"])
    line("Output token throughput (tok/s):", found["output_throughput"])
    line("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"])
    line("Peak concurrent requests:", float(found["max_concurrent_requests"]))
    line("Total token throughput (tok/s):", found["total_token_throughput"])
    for name in metrics:
        title, short = _NAMES[name]
        lines.append(f"{title:-^50}")
        line(f"Mean {short} (ms):", found[f"mean_{name}_ms"])
        line(f"Median {short} (ms):", found[f"median_{name}_ms"])
        for percent in percentiles:
            line(f"P{percent:g} {short} (ms):", found[f"p{percent:g}_{name}_ms"])
    lines.append("=" * 50)
    return "\n".join(lines)


# ---- the page


def page(runs: Sequence[dict[str, Any]], distributions: dict[str, list[float]], title: str) -> str:
    """Throughput against concurrency (one run: one point), and distributions of the last run."""
    points = [
        (float(r["max_concurrency"] or r["num_prompts"]), r["output_throughput"]) for r in runs
    ]
    rows = "".join(
        f"<tr><td>{r['max_concurrency'] or 'all'}<td>{r['completed']}<td>{r['failed']}"
        f"<td>{r['output_throughput']:.1f}<td>{r['median_ttft_ms']:.1f}<td>{r['median_itl_ms']:.2f}"
        for r in runs
    )
    plots = [_plot("Output tokens a second against concurrency", points, joined=True)]
    for name in ("ttft", "itl"):
        plots.append(
            _plot(f"{_NAMES[name][0]} (ms), share of samples", _cumulative(distributions[name]))
        )
    style = (
        "body{font:15px system-ui;max-width:50rem;margin:2rem auto}svg{width:100%;height:auto}"
        "td,th{padding:.2rem .8rem;text-align:right;border-top:1px solid #ccc}"
    )
    head = "<th>concurrency<th>done<th>failed<th>tokens/s<th>median TTFT<th>median ITL"
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"
        f"<h1>{html.escape(title)}</h1><table><tr>{head}{rows}</table>{''.join(plots)}\n"
    )


def _cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(percentile(values, p / 2), p / 200) for p in range(201)] if values else []


def _plot(title: str, points: Sequence[tuple[float, float]], joined: bool = False) -> str:
    width, height, left, bottom = 640, 260, 60, 30
    right = max((x for x, _ in points), default=1.0) or 1.0
    top = max((y for _, y in points), default=1.0) or 1.0
    places = [
        (left + (width - left - 10) * x / right, height - bottom - (height - bottom - 10) * y / top)
        for x, y in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = (
        "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places) if joined else ""
    )
    axes = (
        f'<path d="M{left} 10V{height - bottom}H{width - 10}" fill="none" stroke="#888"/>'
        f'<text x="{left - 6}" y="16" text-anchor="end" font-size="12">{top:.4g}</text>'
        f'<text x="{width - 10}" y="{height - 10}" text-anchor="end" font-size="12">{right:.4g}</text>'
    )
    return (
        f"<h2>{html.escape(title)}</h2><svg viewBox='0 0 {width} {height}'>{axes}"
        f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="2"/>{dots}</svg>'
    )
