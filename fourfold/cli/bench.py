"""`fourfold bench serve`: vLLM's benchmark of a server, against any OpenAI-compatible URL."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fourfold.cli.bench_load import Outcome, Target, run_load, run_request
from fourfold.cli.bench_report import block, figures, page, samples
from fourfold.core.errors import ConfigError, FourfoldError

_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right book"
)
_PATHS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
_METRICS = ("ttft", "tpot", "itl", "e2el")
_WARNING = (
    "note: random prompts mislead about drafts: what follows nonsense is harder to guess, or repeats, "
    "so acceptance and speed with speculation are not those of real text"
)


class BenchError(FourfoldError):
    """The server cannot be measured."""

    exit_status = 1


@click.group()
def bench() -> None:
    """Measure."""


@bench.command("serve")
@click.option("--backend", type=click.Choice(sorted(_PATHS)), default="openai", show_default=True)
@click.option("--base-url", help="The server's address.  [default: http://HOST:PORT]")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
@click.option("--endpoint", help="Path of the API.  [default: by --backend]")
@click.option("--api-key", envvar="FOURFOLD_API_KEY", metavar="KEY", help="The server's key.")
@click.option("--model", help="Name of the model.  [default: the first the server lists]")
@click.option("--tokenizer", metavar="DIR", help="Makes prompts of exactly the length asked for.")
@click.option("--dataset-name", type=click.Choice(["random"]), default="random", show_default=True)
@click.option("--random-input-len", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--random-output-len", type=click.IntRange(1), default=128, show_default=True)
@click.option("--random-range-ratio", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--random-prefix-len", type=click.IntRange(0), default=0, show_default=True)
@click.option("--num-prompts", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--num-warmups", type=click.IntRange(0), default=0, show_default=True)
@click.option("--request-rate", type=float, default=float("inf"), show_default=True)
@click.option(
    "--burstiness", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True
)
@click.option("--max-concurrency", metavar="N[,N…]", help="At once; several make several runs.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--temperature", type=float, help="Of the requests.")
@click.option("--ignore-eos", is_flag=True, help="Every answer has its full length.")
@click.option("--percentile-metrics", default="ttft,tpot,itl", show_default=True)
@click.option("--metric-percentiles", default="99", show_default=True)
@click.option(
    "--save-result", is_flag=True, help="Write the figures as JSON and a page with plots."
)
@click.option("--save-detailed", is_flag=True, help="With every request's times in the JSON.")
@click.option("--result-dir", type=click.Path(path_type=Path), default=Path("."))
@click.option("--result-filename", help="Name of the JSON file.")
@click.option("--disable-tqdm", is_flag=True, hidden=True)
def bench_serve(**flags: Any) -> None:
    """Send random prompts to a server and print throughput and latencies."""
    metrics = [m for m in flags["percentile_metrics"].split(",") if m]
    unknown = [m for m in metrics if m not in _METRICS]
    if unknown:
        known = ", ".join(_METRICS)
        raise ConfigError(f"--percentile-metrics: there is no {unknown[0]!r}, only {known}")
    percentiles = _numbers(flags["metric_percentiles"], "--metric-percentiles")
    levels: list[int | None] = [None]
    if flags["max_concurrency"]:
        levels = [int(n) for n in _numbers(flags["max_concurrency"], "--max-concurrency")]
        if min(n or 0 for n in levels) < 1:
            raise ConfigError("--max-concurrency must be at least 1")
    if not flags["request_rate"] > 0:
        raise ConfigError("--request-rate must be above 0")
    target = Target(
        flags["base_url"] or f"http://{flags['host']}:{flags['port']}",
        flags["endpoint"] or _PATHS[flags["backend"]],
        chat=flags["backend"] == "openai-chat",
        key=flags["api_key"],
    )
    model = flags["model"] or asyncio.run(_first_model(target))
    click.echo(_WARNING, err=True)
    bodies = _bodies(flags, target, model)
    runs: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    for level in levels:
        outcomes, seconds = asyncio.run(_run(target, bodies, flags, level))
        found = figures(outcomes, seconds, percentiles)
        failed = next((o.error for o in outcomes if o.error), None)
        if failed and not found["completed"]:
            raise BenchError(f"every request failed; the first: {failed}")
        click.echo(block(found, metrics, percentiles, level, flags["request_rate"]))
        if failed:
            click.echo(f"the first failure: {failed}", err=True)
        runs.append(_about(flags, model, level) | found)
    if flags["save_result"] or flags["save_detailed"]:
        _save(flags, runs, outcomes)


async def _run(
    target: Target,
    bodies: Sequence[tuple[dict[str, Any], int]],
    flags: dict[str, Any],
    level: int | None,
) -> tuple[list[Outcome], float]:
    for number in range(flags["num_warmups"]):
        await run_request(target, *bodies[number % len(bodies)])
    rate, bursts = flags["request_rate"], flags["burstiness"]
    return await run_load(target, bodies, rate, bursts, level, flags["seed"])


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(word) for word in str(text).split(",")]
    except ValueError:
        raise ConfigError(f"{flag} must be numbers with commas between, found {text!r}") from None


async def _first_model(target: Target) -> str:
    try:
        status, body = await target.exchange("GET", "/v1/models")
        if status == 200:
            return str(json.loads(body)["data"][0]["id"])
        raise BenchError(f"{target.url}/v1/models answered {status}")
    except (OSError, ValueError, KeyError, IndexError, asyncio.IncompleteReadError) as error:
        raise BenchError(f"{target.url} does not answer: {error}") from None


def _bodies(flags: dict[str, Any], target: Target, model: str) -> list[tuple[dict[str, Any], int]]:
    """Requests with their prompts' lengths; a length is drawn evenly around the one asked for."""
    rng = random.Random(flags["seed"])
    ratio = flags["random_range_ratio"]

    def around(length: int) -> int:
        return max(rng.randint(int(length * (1 - ratio)), int(length * (1 + ratio))), 1)

    text_of = _text_maker(flags["tokenizer"], rng)
    prefix = text_of(flags["random_prefix_len"]) if flags["random_prefix_len"] else ""
    found = []
    for _ in range(flags["num_prompts"]):
        length = around(flags["random_input_len"])
        prompt = prefix + text_of(length)
        body: dict[str, Any] = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": around(flags["random_output_len"]),
        }
        if target.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if flags["ignore_eos"]:
            body["ignore_eos"] = True
        if flags["temperature"] is not None:
            body["temperature"] = flags["temperature"]
        found.append((body, length + flags["random_prefix_len"]))
    return found


def _text_maker(directory: str | None, rng: random.Random) -> Any:
    """Makes a text of so many tokens: exactly with a tokenizer, else of as many common words."""
    words = _WORDS.split()
    if directory is None:
        return lambda length: " ".join(rng.choices(words, k=length))
    from fourfold.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(directory)

    def exact(length: int) -> str:
        ids = tokenizer.encode(" ".join(rng.choices(words, k=length)))[:length]
        text = tokenizer.decode(ids)
        # A cut may join tokens anew; a few rounds settle it.
        for _ in range(8):
            now = tokenizer.encode(text)
            if len(now) == length:
                break
            text = tokenizer.decode(now[:length]) if len(now) > length else text + rng.choice(" .,")
        return text

    return exact


def _about(flags: dict[str, Any], model: str, level: int | None) -> dict[str, Any]:
    rate = flags["request_rate"]
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": flags["backend"],
        "endpoint_type": flags["backend"],
        "model_id": model,
        "tokenizer_id": flags["tokenizer"] or model,
        "num_prompts": flags["num_prompts"],
        "request_rate": "inf" if rate == float("inf") else rate,
        "burstiness": flags["burstiness"],
        "max_concurrency": level,
        "random_input_len": flags["random_input_len"],
        "random_output_len": flags["random_output_len"],
        "random_range_ratio": flags["random_range_ratio"],
    }


def _save(flags: dict[str, Any], runs: list[dict[str, Any]], outcomes: list[Outcome]) -> None:
    """The JSON (several runs: a list of them) and the page beside it."""
    last = runs[-1]
    if flags["save_detailed"]:
        last |= {
            "input_lens": [o.prompt_tokens for o in outcomes],
            "output_lens": [o.output_tokens for o in outcomes],
            "ttfts": [o.ttft for o in outcomes],
            "itls": [o.itl for o in outcomes],
            "generated_texts": [o.text for o in outcomes],
            "errors": [o.error for o in outcomes],
        }
    short = last["model_id"].rpartition("/")[2]
    name = flags["result_filename"] or (
        f"{last['backend']}-{last['request_rate']}qps-{short}-{last['date']}.json"
    )
    directory: Path = flags["result_dir"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / name
        path.write_text(json.dumps(runs[0] if len(runs) == 1 else runs), encoding="utf-8")
        report = path.with_suffix(".html")
        report.write_text(page(runs, samples(outcomes), f"fourfold bench: {short}"), "utf-8")
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}") from None
    click.echo(f"saved {path} and {report}", err=True)
