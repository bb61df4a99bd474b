"""The command line of training.

python -m train run --out DIR --minutes 8 [--resume FILE]
python -m train export --weights FILE --tokenizer DIR --out DIR
python -m train convert --model DIR --out DIR
python -m train evaluate --model DIR --count 200 --results FILE
python -m train flavours --model DIR --out DIR --count 50
python -m train compare ANSWERS ANSWERS
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from train import files
from train.data.encode import Encoder
from train.data.mixture import Mixture
from train.evaluate import FAR_LENGTHS, Case, cases, measure, read_answers, write_answers
from train.export import convert, export
from train.flavours import FLAVOURS, PLAIN, answers_of, compare, load, table, write_results
from train.geometry import nano_config, small_config
from train.run import Options, run
from train.schedule import Schedule
from train.tokenizer import write_tokenizer

_DIRECTORY = click.Path(path_type=Path)
_GEOMETRIES = {"nano": nano_config, "small": small_config}


@click.group()
def main() -> None:
    """Train fourfold's built-in checkpoint."""


@main.command("run")
@click.option("--out", type=_DIRECTORY, required=True, help="Where weights, log and tokenizer go.")
@click.option("--minutes", default=25.0, show_default=True, help="End this piece after so long.")
@click.option("--steps", default=9000, show_default=True, help="Steps of the whole run.")
@click.option("--tokens", default=32768, show_default=True, help="Tokens a step.")
@click.option("--rate", default=3e-3, show_default=True, help="Highest learning rate.")
@click.option("--resume", type=_DIRECTORY, help="Weights to go on from.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--workers", default=12, show_default=True, help="Processes that make rows.")
@click.option("--geometry", type=click.Choice(sorted(_GEOMETRIES)), default="nano")
@click.option("--short", default=2048, show_default=True, help="Tokens of a usual row.")
@click.option("--long", "long_rows", default="8192,16384", show_default=True)
@click.option("--mixing", type=click.Choice(["auto", "triton", "torch"]), default="auto")
@click.option("--check-every", default=150.0, show_default=True, help="Seconds between scores.")
@click.option("--check-count", default=64, show_default=True, help="Questions a skill for them.")
def run_command(geometry: str, dtype: str, **given: Any) -> None:
    """Train, or go on training."""
    long = tuple(int(part) for part in given["long_rows"].split(",") if part)
    schedule = Schedule(given["steps"], given["tokens"], given["rate"], given["short"], long)
    scores = run(
        Options(
            given["out"],
            _GEOMETRIES[geometry](),
            schedule,
            given["minutes"],
            given["resume"],
            given["seed"],
            given["device"],
            getattr(torch, dtype),
            given["workers"],
            check_every=given["check_every"],
            check_count=given["check_count"],
            mixing=given["mixing"],
            far=tuple(length for length in (2048, 8192) if length <= max(long, default=0)),
        )
    )
    click.echo(json.dumps(scores))


@main.command("export")
@click.option("--weights", type=_DIRECTORY, required=True)
@click.option("--tokenizer", type=_DIRECTORY, required=True, help="Directory of its files.")
@click.option("--out", type=_DIRECTORY, required=True)
@click.option("--geometry", type=click.Choice(sorted(_GEOMETRIES)), default="nano")
@click.option("--weight-format", default="native", show_default=True)
def export_command(
    weights: Path, tokenizer: Path, out: Path, geometry: str, weight_format: str
) -> None:
    """Write a checkpoint."""
    masters, step = files.read(weights, torch.device("cpu"))
    size = export(out, _GEOMETRIES[geometry](), masters, tokenizer, weight_format)
    click.echo(json.dumps({"step": step, "bytes": size}))


@main.command("convert")
@click.option("--model", type=_DIRECTORY, required=True)
@click.option("--out", type=_DIRECTORY, required=True)
@click.option("--weight-format", default="fp8", show_default=True)
def convert_command(model: Path, out: Path, weight_format: str) -> None:
    """Write a checkpoint in another format."""
    done = convert(model, out, weight_format)
    click.echo(json.dumps({"bytes": done.nbytes, "numbers": done.numbers, "changed": done.changed}))


@main.command("tokenizer")
@click.option("--out", type=_DIRECTORY, required=True)
@click.option("--seed", default=0, show_default=True)
def tokenizer_command(out: Path, seed: int) -> None:
    """Train the tokenizer alone; `run` does so where its directory has none."""
    out.mkdir(parents=True, exist_ok=True)
    config = nano_config()
    write_tokenizer(out, config["vocab_size"], config["max_position_embeddings"], seed)


def _asked(count: int, far_count: str, lengths: str, only: Sequence[str]) -> list[tuple[Case, int]]:
    """Cases and how many questions of each. Raises `UsageError`."""
    far = [int(part) for part in lengths.split(",") if part]
    counts = [int(part) for part in far_count.split(",")]
    counts = counts * len(far) if len(counts) == 1 else counts
    if len(counts) != len(far):
        raise click.UsageError(f"--far-count has {len(counts)} numbers for {len(far)} lengths")
    at = dict(zip(far, counts, strict=True))
    found = [(case, at[case.length] if case.length else count) for case in cases(far)]
    unknown = set(only) - {case.name for case, _ in found}
    if unknown:
        raise click.UsageError(f"--only {', '.join(sorted(unknown))}: no such case")
    return [(case, n) for case, n in found if n and (not only or case.name in only)]


def _questions_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What evaluate and flavours ask."""
    for option in (
        click.option("--seed", default=0, show_default=True),
        click.option("--only", multiple=True, help="A case's name; again. All by default."),
        click.option("--lengths", default=",".join(map(str, FAR_LENGTHS)), show_default=True),
        click.option(
            "--far-count",
            default="20",
            show_default=True,
            help="At each distance, or at all of them.",
        ),
        click.option("--count", default=200, show_default=True, help="Questions a skill."),
        click.option("--device", default="auto", show_default=True),
        click.option(
            "--set", "settings", multiple=True, help="NAME=JSON, an argument of LLM; again."
        ),
    ):
        command = option(command)
    return command


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    return {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in pairs)}


@main.command("evaluate")
@click.option("--model", required=True)
@click.option("--drafts", type=click.IntRange(0, 3), default=1, show_default=True)
@click.option("--results", type=_DIRECTORY, help="Where scores go, one JSON document.")
@click.option("--answers", type=_DIRECTORY, help="Where every answer goes, a JSON object a line.")
@_questions_options
def evaluate_command(
    model: str,
    drafts: int,
    results: Path | None,
    answers: Path | None,
    count: int,
    far_count: str,
    lengths: str,
    only: tuple[str, ...],
    device: str,
    seed: int,
    settings: tuple[str, ...],
) -> None:
    """Score a checkpoint through the engine."""
    from fourfold import LLM

    wanted = _asked(count, far_count, lengths, only)
    drafted = {"method": "mtp", "num_speculative_tokens": drafts} if drafts else None
    llm = LLM(model, device=device, **{"speculative_config": drafted, **_settings(settings)})
    mixture = Mixture(Encoder(llm.get_tokenizer()))
    scores = []
    for case, number in wanted:
        score, found = measure(llm, mixture, case, number, seed)
        scores.append(score.to_json())
        click.echo(json.dumps(scores[-1]))
        if results:
            write_results(results, scores)
        if answers:
            write_answers(answers, found)


@main.command("flavours")
@click.option("--model", type=_DIRECTORY, required=True)
@click.option("--out", type=_DIRECTORY, required=True, help="Answers and results go here.")
@click.option("--workspace", type=_DIRECTORY, help="Where converted checkpoints are.  [--out]")
@click.option(
    "--flavour",
    "names",
    multiple=True,
    type=click.Choice([each.name for each in FLAVOURS]),
    help="Again; all by default.",
)
@_questions_options
def flavours_command(
    model: Path,
    out: Path,
    workspace: Path | None,
    names: tuple[str, ...],
    count: int,
    far_count: str,
    lengths: str,
    only: tuple[str, ...],
    device: str,
    seed: int,
    settings: tuple[str, ...],
) -> None:
    """Ask the same questions of a checkpoint run in many ways, and compare with the plain one."""
    wanted = _asked(count, far_count, lengths, only)
    out.mkdir(parents=True, exist_ok=True)
    for flavour in FLAVOURS:
        if names and flavour.name not in names:
            continue
        llm = load(flavour, model, workspace or out, device=device, **_settings(settings))
        file = out / f"{flavour.name}.jsonl"
        file.unlink(missing_ok=True)
        scores = []
        for case in wanted:
            for score, found in answers_of(flavour, llm, [case], seed):
                scores.append(score.to_json())
                write_answers(file, found)
                write_results(out / f"{flavour.name}.json", scores)
        del llm  # its memory is the next one's
        gc.collect()
        if flavour.name != PLAIN and (out / f"{PLAIN}.jsonl").exists():
            _show(flavour.name, out / f"{PLAIN}.jsonl", file)


@main.command("compare")
@click.argument("one", type=_DIRECTORY)
@click.argument("other", type=_DIRECTORY)
def compare_command(one: Path, other: Path) -> None:
    """Set two files of answers side by side."""
    _show(other.stem, one, other)


def _show(name: str, one: Path, other: Path) -> None:
    click.echo(table(name, compare(read_answers(one), read_answers(other))))
