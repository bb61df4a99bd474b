"""The figures of docs/NANO.md: curves from the logs of a run's pieces, tables from measured scores.

python -m train.report --log p1/log.jsonl --log p2/log.jsonl
python -m train.report --scores 'one H200=h200.json' --scores '2 CPU cores=cpu.json'
python -m train.report --compare fp8_experts=plain.jsonl,fp8_experts.jsonl --faults faults.json

Contract: what is measured is kept in docs/nano-results.json, section by section; the page's tables are
made of that file alone, between two markers, whenever this runs. Inputs are what `python -m train run`,
`evaluate --results` and `flavours` write. It measures nothing, and only curves need matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from train.evaluate import read_answers
from train.flavours import FLAVOURS, compare, overall

POINTS = 160  # of a curve
PAGE, RESULTS, CURVES = "NANO.md", "nano-results.json", "nano-curves.svg"
BEGIN, END = "<!-- tables: python -m train.report -->", "<!-- end of tables -->"
WANTED: Mapping[str, float] = {
    "arithmetic": 0.95,
    "arithmetic_thinking": 0.95,
    "tool_call": 0.95,
    "tool_result": 0.95,
    "recall_near": 0.98,
    "recall_far_2048": 0.90,
    "recall_far_4096": 0.90,
    "recall_far_8192": 0.90,
    "recall_far_16384": 0.90,
    "schema": 0.90,
}
"""Share of right answers that each skill was to reach."""
_CHANGES: Mapping[str, str] = {"sparse": "indexer chooses", "quantised": "FP4, FP8"}
_FAULT_COLUMNS = ("fault", "skill", "whole", "broken", "unrelated", "unrelated_broken")

Record = Mapping[str, Any]


# -- tables ------------------------------------------------------------------------------------------


def tables(results: Record) -> str:
    """All that `results` (nano-results.json) holds, in Markdown."""
    made = (_scores(results), _flavours(results), _faults(results))
    return "\n\n".join(part for part in made if part)


def _scores(results: Record) -> str:
    """Right answers by case and by where they were given, and accepted drafts."""
    devices: Mapping[str, Sequence[Record]] = results.get("scores") or {}
    if not devices:
        return ""
    names = list(dict.fromkeys(each["case"] for found in devices.values() for each in found))
    by_case = {device: {each["case"]: each for each in found} for device, found in devices.items()}
    rows = []
    for name in names:
        cells = [name.replace("_", " "), _percent(WANTED.get(name))]
        for found in by_case.values():
            each = found.get(name)
            cells.append(_right(each) if each else "")
            cells.append(_percent(each["acceptance"]) if each else "")
        rows.append(cells)
    heads = [cell for device in devices for cell in (f"{device}: right", "drafts accepted")]
    return _table(["skill", "wanted", *heads], rows)


def _right(each: Record) -> str:
    return f"{_percent(each['right'] / each['count'])} of {each['count']:,}"


def _flavours(results: Record) -> str:
    meanings = {each.name: each.meaning for each in FLAVOURS}
    rows = [
        [
            meanings.get(each["name"], each["name"]),
            f"{each['count']:,}",
            _percent(each["equal"] / each["count"]),
            *(_percent(right / each["count"]) for right in each["right"]),
        ]
        for each in results.get("flavours") or ()
    ]
    heads = ["run with", "items", "equal answers", "right, plain", "right, so"]
    return _table(heads, rows) if rows else ""


def _faults(results: Record) -> str:
    rows = [
        [str(each["fault"]), *(_cell(each[key]) for key in _FAULT_COLUMNS[1:])]
        for each in results.get("faults") or ()
    ]
    heads = ["broken on purpose", "skill", "whole", "broken", "an unrelated skill, whole", "broken"]
    return _table(heads, rows) if rows else ""


def _cell(value: object) -> str:
    return _percent(value) if isinstance(value, float | int) else str(value).replace("_", " ")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def with_tables(page: str, results: Record) -> str:
    """The page's text with its tables made anew. Raises `ValueError` without the two markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN!r} or {END!r} after it")
    made = tables(results) or "Nothing has been measured yet."
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


# -- curves ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """Lines of a whole run: `losses` and `scores` are the logs' objects with `minutes` from the run's
    beginning, `pieces` the minutes at which each piece after the first began."""

    losses: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    pieces: list[float]


def read_logs(logs: Sequence[Path]) -> Curves:
    """The logs of a run's pieces, in their order, as one."""
    curves, begun = Curves([], [], []), 0.0
    for number, log in enumerate(logs):
        if number:
            curves.pieces.append(begun)
        now = begun
        for each in map(json.loads, log.read_text("utf-8").splitlines()):
            if "main" in each:
                now = begun + each["seconds"] / 60
                curves.losses.append(each | {"minutes": now})
            elif "scores" in each:
                curves.scores.append(each["scores"] | {"minutes": now})
        begun = now
    return curves


def _changes(curves: Curves) -> Iterator[tuple[float, str]]:
    """Whenever the indexer began to choose rows, or weights to be rounded."""
    for key, text in _CHANGES.items():
        for before, each in pairwise(curves.losses):
            if each[key] and not before[key]:
                yield each["minutes"], text


def _smooth(found: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Minutes and means of neighbours, `POINTS` of them at most."""
    size = -(-len(found) // POINTS)
    groups = [found[n : n + size] for n in range(0, len(found), size or 1)]
    minutes = [fmean(each["minutes"] for each in group) for group in groups]
    return minutes, [fmean(each[key] for each in group) for group in groups]


def draw(curves: Curves, path: Path) -> None:
    """Losses above, shares of right answers below, over minutes of training; an SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "fourfold", "font.size": 9}
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 7), sharex=True, layout="constrained", height_ratios=(3, 4)
    )
    shortest = min(each["length"] for each in curves.losses)
    short = [each for each in curves.losses if each["length"] == shortest]
    long = [each for each in curves.losses if each["length"] != shortest]
    for found, key, text in (
        (short, "main", "next token, rows of 2,048"),
        (long, "main", "next token, longer rows"),
        (short, "mtp", "the one after (MTP), rows of 2,048"),
    ):
        top.plot(*_smooth(found, key), lw=1, label=text)
    top.set(yscale="log", ylabel="loss")
    top.legend(fontsize=8)
    names = [n for n in (curves.scores[-1] if curves.scores else ()) if not n.endswith("_drafts")]
    for name in names:
        if name != "minutes":
            points = [(each["minutes"], each[name]) for each in curves.scores if name in each]
            bottom.plot(*zip(*points, strict=True), marker=".", lw=1, label=name.replace("_", " "))
    bottom.set(ylabel="right answers", xlabel="minutes", ylim=(-0.03, 1.03))
    bottom.legend(fontsize=8, ncols=2)
    for axes in (top, bottom):
        for minutes in curves.pieces:
            axes.axvline(minutes, color="0.8", lw=0.8)
        for minutes, _ in _changes(curves):
            axes.axvline(minutes, color="0.5", lw=0.8, ls=":")
    for minutes, text in _changes(curves):
        height = 1.01 if text == _CHANGES["sparse"] else 1.06
        top.annotate(text, (minutes, height), xycoords=("data", "axes fraction"), fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


# -- the command -------------------------------------------------------------------------------------


def _pair(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise click.UsageError(f"{text!r} must be NAME=FILE")
    return name, Path(path)


def _compared(text: str) -> dict[str, Any]:
    name, files = _pair(text)
    one, comma, other = str(files).partition(",")
    if not comma:
        raise click.UsageError(f"{text!r} must be NAME=FILE,FILE")
    found = overall(compare(read_answers(Path(one)), read_answers(Path(other))))
    return {"name": name, "count": found.count, "equal": found.equal, "right": list(found.right)}


@click.command()
@click.option("--docs", type=click.Path(path_type=Path), default="docs", show_default=True)
@click.option("--log", "logs", multiple=True, type=click.Path(path_type=Path), help="In order.")
@click.option("--scores", multiple=True, metavar="WHERE=FILE", help="What `evaluate` wrote.")
@click.option("--compare", "pairs", multiple=True, metavar="NAME=PLAIN,OTHER", help="Answers.")
@click.option(
    "--faults",
    type=click.Path(path_type=Path),
    help=f"A JSON list of objects with {', '.join(_FAULT_COLUMNS)}.",
)
def main(
    docs: Path, logs: tuple[Path, ...], scores: tuple[str, ...], pairs: tuple[str, ...],
    faults: Path | None,
) -> None:  # fmt: skip
    """Take in what was measured, and make the page's tables and curves anew."""
    results = json.loads((docs / RESULTS).read_text("utf-8"))
    for name, path in map(_pair, scores):
        results["scores"][name] = json.loads(path.read_text("utf-8"))
    for found in map(_compared, pairs):
        kept = [each for each in results["flavours"] if each["name"] != found["name"]]
        results["flavours"] = [*kept, found]
    if faults is not None:
        results["faults"] = json.loads(faults.read_text("utf-8"))
    (docs / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = docs / PAGE
    page.write_text(with_tables(page.read_text("utf-8"), results), encoding="utf-8")
    if logs:
        draw(read_logs(logs), docs / CURVES)


if __name__ == "__main__":
    main()
