"""`fourfold bench decode`, `prefill` and `op`: how fast random weights run on this device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fourfold.cli.group import same_spelling
from fourfold.cli.options import CACHE_DTYPES, cache_dtype_of, kernel_overrides, stacked
from fourfold.core.errors import ConfigError

if TYPE_CHECKING:
    from fourfold.engine.benchmark import Setting

_CACHE_CHOICE = click.Choice([same_spelling(name) for name in CACHE_DTYPES])

_setting_options = stacked(
    [
        click.option(
            "--geometry",
            type=click.Choice(["flash", "pro", "flash-base", "tiny"]),
            default="flash",
            show_default=True,
            help="Shapes of the model.",
        ),
        click.option(
            "--layers",
            type=click.IntRange(0),
            default=8,
            show_default=True,
            help="Its first layers; 0: all.  Tiny has 6.",
        ),
        click.option(
            "--weights",
            type=click.Choice(["native", "fp8", "bf16", "float32"]),
            help="Storage: native is FP4 experts and FP8 linears.  "
            "[default: native; fp8 for flash-base]",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda[:N]."),
        click.option(
            "--step-tokens",
            "--max-num-batched-tokens",
            "step_tokens",
            type=click.IntRange(1),
            default=8192,
            show_default=True,
            help="Tokens a step.",
        ),
        click.option("--kv-cache-dtype", type=_CACHE_CHOICE, default="auto"),
        click.option(
            "--gpu-memory-utilization",
            "memory",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.9,
            show_default=True,
        ),
        click.option("--enforce-eager", is_flag=True, help="Capture no graphs."),
        click.option("--kernel", "kernels", multiple=True, metavar="OP=NAME", help="Repeatable."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
        click.option("--repeats", type=click.IntRange(1), default=2, show_default=True),
        click.option(
            "--json",
            "json_file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Write the whole document, kernel plan included, to this file.",
        ),
        click.option(
            "--profile/--no-profile", default=True, show_default=True, help="Where the time goes."
        ),
        click.option(
            "--details", is_flag=True, help="Op families, kernels and gaps of every line."
        ),
    ]
)


@click.command("decode")
@_setting_options
@click.option(
    "--batch",
    "batches",
    multiple=True,
    metavar="N[,N…]",
    help="Sequences; repeatable.  [default: 1,2,4,…,256]",
)
@click.option("--context", type=click.IntRange(1), default=1024, show_default=True)
@click.option(
    "--drafts",
    "--num-speculative-tokens",
    "drafts",
    type=click.IntRange(0, 3),
    default=0,
    show_default=True,
    help="Tokens the MTP layer drafts a step.",
)
@click.option(
    "--long-run",
    type=click.IntRange(3),
    default=66,
    show_default=True,
    help="Output tokens of the longer run; the shorter one's are 2.",
)
@click.option(
    "--steady-steps",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Steps to time one by one.",
)
def bench_decode(
    batches: tuple[str, ...],
    context: int,
    repeats: int,
    json_file: Path | None,
    details: bool,
    profile: bool,
    **flags: Any,
) -> None:
    """Time of a decode step: the difference of 66- and 2-token runs through the engine."""
    from fourfold.engine import benchmark
    from fourfold.engine import benchmark_report as report

    setting, shown = _setting(flags), ""
    sizes = _numbers("--batch", batches) or benchmark.BATCHES

    def tell(document: dict[str, Any], result: dict[str, Any]) -> None:
        nonlocal shown
        _write(json_file, document)
        if not shown:
            click.echo(f"{report.head(document)}\n")
        profiled = "profile" in result
        head = report.PROFILE_HEAD if profiled else report.DECODE_HEAD
        if shown != head:
            click.echo(head)
            shown = head
        click.echo(report.profile_line(result) if profiled else report.decode_line(result))
        if details and profiled:
            click.echo(report.details(result) + "\n")

    benchmark.decode(setting, sizes, context, repeats, profile, tell)


@click.command("prefill")
@_setting_options
@click.option(
    "--context", type=click.IntRange(1), default=8192, show_default=True, help="Tokens a prompt."
)
@click.option(
    "--num-prompts",
    "prompts",
    type=click.IntRange(1),
    help="[default: as many as make 8 full steps]",
)
def bench_prefill(
    context: int,
    prompts: int | None,
    repeats: int,
    json_file: Path | None,
    details: bool,
    profile: bool,
    **flags: Any,
) -> None:
    """Prompt tokens a second."""
    from fourfold.engine import benchmark
    from fourfold.engine import benchmark_report as report

    setting = _setting(flags)
    count = prompts or max(1, 8 * setting.step_tokens // context)
    document = benchmark.prefill(setting, context, count, repeats, profile)
    _write(json_file, document)
    (result,) = document["results"]
    click.echo(f"{report.head(document)}\n\n{report.prefill_line(result)}")
    if details and profile:
        click.echo(report.details(result))


@click.command("op")
@click.argument("name", metavar="NAME")
@click.option("--tokens", multiple=True, metavar="N[,N…]", help="[default: 1,8,64,256,8192]")
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Repeatable.")
@click.option("--weights", multiple=True, metavar="FORMAT", help="fp4, fp8, bfloat16; repeatable.")
@click.option("--shape", "shapes", multiple=True, help="NxK, or for wo_a GxNxK; repeatable.")
@click.option("--experts", type=click.IntRange(1), default=256, show_default=True)
@click.option("--dim", type=click.IntRange(1), default=4096, show_default=True)
@click.option("--inner", type=click.IntRange(1), default=2048, show_default=True)
@click.option(
    "--routing",
    type=click.Choice(["random", "even"]),
    default="random",
    show_default=True,
    help="How tokens choose experts.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda[:N].")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write a list."
)
def bench_op(name: str, tokens: tuple[str, ...], json_file: Path | None, **flags: Any) -> None:
    """Time of one op: routed_experts, linear or wo_a; one JSON object a measurement.

    wo_a is measured in every form the device has: BF16 on dequantised weights, one batched FP8
    launch, one FP8 launch a group.
    """
    from fourfold.engine.benchmark_op import NAMES, OpSetting, measure_op

    sizes = _numbers("--tokens", tokens)
    if not sizes and NAMES.get(name) == "wo_a":
        sizes = tuple(2**power for power in range(11))
    given: dict[str, Any] = {**flags, "tokens": sizes} if sizes else flags
    records: list[dict[str, Any]] = []
    for record in measure_op(name, OpSetting(**given)):
        records.append(record)
        short = {k: _rounded(v) for k, v in record.items()}
        click.echo(json.dumps(short, ensure_ascii=False))
        _write(json_file, records)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def _setting(flags: dict[str, Any]) -> Setting:
    from fourfold.engine.benchmark import Setting

    given = dict(flags)
    given["layers"] = flags["layers"] or None
    if flags["geometry"] == "tiny" and given["layers"]:
        given["layers"] = min(given["layers"], 6)
    given["kernels"] = kernel_overrides(flags["kernels"])
    given["kv_cache_dtype"] = cache_dtype_of(flags["kv_cache_dtype"])
    return Setting(**given)


def _numbers(flag: str, texts: tuple[str, ...]) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for text in texts for word in text.replace(",", " ").split())
    except ValueError:
        raise ConfigError(f"{flag} must be numbers, found {' '.join(texts)!r}") from None
    if any(size < 1 for size in found):
        raise ConfigError(f"{flag} must be at least 1")
    return found


def _write(path: Path | None, document: Any) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
