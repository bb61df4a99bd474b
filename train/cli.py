"""The command line of training.

python -m train run --out DIR --minutes 8 [--resume FILE]
python -m train export --weights FILE --tokenizer DIR --out DIR
python -m train convert --model DIR --out DIR
python -m train evaluate --model DIR --count 200
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from train import files
from train.data.encode import Encoder
from train.data.mixture import Mixture
from train.evaluate import FAR_LENGTHS, answering, ask, cases
from train.export import convert, export
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


@main.command("evaluate")
@click.option("--model", required=True)
@click.option("--count", default=200, show_default=True, help="Questions a skill.")
@click.option("--far-count", default=20, show_default=True, help="Questions at each distance.")
@click.option("--lengths", default=",".join(map(str, FAR_LENGTHS)), show_default=True)
@click.option("--only", multiple=True, help="A case's name; may be given again. All by default.")
@click.option("--device", default="auto", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--set", "settings", multiple=True, help="NAME=JSON, an argument of LLM; again.")
@click.option("--answers", type=_DIRECTORY, help="Where every answer goes, a JSON object a line.")
def evaluate_command(
    model: str,
    count: int,
    far_count: int,
    lengths: str,
    only: tuple[str, ...],
    device: str,
    seed: int,
    settings: tuple[str, ...],
    answers: Path | None,
) -> None:
    """Score a checkpoint through the engine."""
    from fourfold import LLM

    pairs = (setting.partition("=") for setting in settings)
    llm = LLM(model, device=device, **{name: json.loads(value) for name, _, value in pairs})
    mixture = Mixture(Encoder(llm.get_tokenizer()))
    wanted = cases([int(part) for part in lengths.split(",") if part])
    with answers.open("w", encoding="utf-8") if answers else nullcontext() as file:
        for case in wanted:
            if only and case.name not in only:
                continue
            number = far_count if case.length else count
            found = ask(mixture, case, number, answering(llm), seed)
            right = sum(each.right for each in found) / len(found)
            click.echo(json.dumps({"case": case.name, "count": number, "right": right}))
            if file is not None:
                file.writelines(json.dumps(asdict(each)) + "\n" for each in found)
