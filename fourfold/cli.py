"""The command line: the only place that knows both the engine and what a person types.

Contract: a user's mistake is one line on stderr and exit status 2, never a traceback. Flags are vLLM's
names first, other engines' spellings as aliases; dashes and underscores are the same. `--help` does
not import torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fourfold import __version__
from fourfold.core.config import (
    EXPERT_DTYPES,
    MODEL_DTYPES,
    CacheConfig,
    EngineConfig,
    ParallelConfig,
)
from fourfold.core.errors import ConfigError, FourfoldError
from fourfold.core.request import FinishReason, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from fourfold.engine.engine import Engine
    from fourfold.text.detokenize import IncrementalDetokenizer
    from fourfold.text.tokenizer import Tokenizer

DEFAULT_PROMPTS = ("The capital of France is", "你好，世界")
CACHE_DTYPE_ALIASES = {"bf16": "bfloat16", "fp8_e4m3": "fp8", "fp8_ds_mla": "fp8"}
CACHE_DTYPES = ("auto", "fp8", "bfloat16", "float32", "float64", *CACHE_DTYPE_ALIASES)

# Flags that other engines' command lines carry and that change nothing here, with the reason.
NO_EFFECT = {
    "trust_remote_code": "no code from a checkpoint is ever executed",
    "block_size": "a cache page is always 256 tokens",
    "port": "generate opens no port",
    "level": "there is no compilation level",
    "cudagraph_capture_sizes": "no graphs are captured yet",
    "enable_dp_attention": "it needs data parallelism",
}


class UserGroup(click.Group):
    """Turns `FourfoldError`s into one line and their exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FourfoldError as error:
            click.echo(f"fourfold: error: {error}", err=True)
            ctx.exit(error.exit_status)
        except BrokenPipeError:
            # The reader of our output left; nothing more can be said to it.
            sys.stderr.close()
            ctx.exit(1)


def _same_spelling(name: str) -> str:
    return name.replace("_", "-")


@click.group(
    cls=UserGroup,
    context_settings={
        "token_normalize_func": _same_spelling,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="fourfold")
def main() -> None:
    """fourfold: an inference engine for the DeepSeek-V4 model family."""


def _stack(options: Sequence[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Any]:
    def decorate(command: Callable[..., Any]) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


engine_options = _stack(
    [
        click.argument("model_argument", metavar="[MODEL]", required=False),
        click.option(
            "--model", "--model-path", "model_flag", metavar="MODEL", help="Same as the argument."
        ),
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", *MODEL_DTYPES]),
            default="auto",
            show_default=True,
            help="Dtype of activations; auto follows the checkpoint.",
        ),
        click.option(
            "--expert-dtype",
            type=click.Choice([_same_spelling(n) for n in EXPERT_DTYPES]),
            default="auto",
            show_default=True,
            help="Confirms how routed experts are stored; the files decide.",
        ),
        click.option(
            "--kv-cache-dtype",
            type=click.Choice([_same_spelling(n) for n in CACHE_DTYPES]),
            default="auto",
            show_default=True,
            help="Format of cached rows.",
        ),
        click.option(
            "--index-cache-dtype",
            type=click.Choice([_same_spelling(n) for n in CACHE_DTYPES]),
            default="auto",
            show_default=True,
            help="Format of cached indexer rows; auto follows --kv-cache-dtype.",
        ),
        click.option(
            "--max-model-len",
            "--context-length",
            type=click.IntRange(1),
            help="Longest prompt plus output, in tokens.",
        ),
        click.option(
            "--max-num-seqs",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Sequences running at once.",
        ),
        click.option(
            "--max-num-batched-tokens",
            type=click.IntRange(1),
            default=8192,
            show_default=True,
            help="Tokens a step.",
        ),
        click.option(
            "--gpu-memory-utilization",
            "--mem-fraction-static",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.9,
            show_default=True,
            help="Share of a GPU's memory to use.",
        ),
        click.option("--enforce-eager", is_flag=True, help="Capture no graphs (none are today)."),
        click.option(
            "--kernel",
            "kernels",
            multiple=True,
            metavar="OP=NAME",
            help="Force the kernel of an op; repeatable.",
        ),
        click.option(
            "--tensor-parallel-size", "-tp", "--tp", type=click.IntRange(1), default=1, hidden=True
        ),
        click.option(
            "--data-parallel-size", "-dp", "--dp", type=click.IntRange(1), default=1, hidden=True
        ),
        click.option("--enable-expert-parallel", is_flag=True, hidden=True),
        click.option("--trust-remote-code", is_flag=True, hidden=True),
        click.option("--block-size", "--page-size", type=click.IntRange(1), hidden=True),
        click.option("--port", type=int, hidden=True),
        click.option("--level", type=int, hidden=True),
        click.option("--cudagraph-capture-sizes", hidden=True),
        click.option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            default=True,
            show_default=True,
            help="Reuse the state of prompts that begin alike.",
        ),
        click.option(
            "--state-interval",
            type=click.IntRange(1),
            default=4096,
            show_default=True,
            help="Prompt tokens between two kept state images.",
        ),
        click.option(
            "--method", type=click.Choice(["mtp"]), help="Draft tokens with the MTP layer."
        ),
        click.option(
            "--num-speculative-tokens",
            type=click.IntRange(1, 3),
            help="Drafts a step.  [default: 1 with --method]",
        ),
        click.option(
            "--speculative-config",
            metavar="JSON",
            help='The same as JSON: {"method": "mtp", "num_speculative_tokens": 3}.',
        ),
        click.option("--enable-dp-attention", is_flag=True, hidden=True),
    ]
)


def _engine_config(flags: dict[str, Any], seed: int) -> EngineConfig:
    """The engine's configuration from parsed flags; says once which flags change nothing."""
    model = flags["model_argument"] or flags["model_flag"]
    if not model:
        raise ConfigError("MODEL is missing: a checkpoint directory or org/name[@revision]")
    if flags["model_argument"] and flags["model_flag"]:
        raise ConfigError("MODEL was given twice: as an argument and with --model")
    if flags["data_parallel_size"] > 1:
        raise ConfigError("--data-parallel-size above 1 is not supported yet")
    idle = [name for name in NO_EFFECT if flags[name] is not None and flags[name] is not False]
    for name in idle:
        click.echo(f"--{_same_spelling(name)} has no effect here: {NO_EFFECT[name]}", err=True)
    ranks = flags["tensor_parallel_size"]
    return EngineConfig(
        model=model,
        dtype=flags["dtype"],
        max_model_len=flags["max_model_len"],
        max_num_seqs=flags["max_num_seqs"],
        max_num_batched_tokens=flags["max_num_batched_tokens"],
        gpu_memory_utilization=flags["gpu_memory_utilization"],
        enforce_eager=flags["enforce_eager"],
        num_speculative_tokens=_num_drafts(flags),
        expert_dtype=flags["expert_dtype"].replace("-", "_"),
        kernels=_kernel_overrides(flags["kernels"]),
        seed=seed,
        cache=CacheConfig(
            kv_cache_dtype=_cache_dtype(flags["kv_cache_dtype"]),
            index_cache_dtype=_cache_dtype(flags["index_cache_dtype"]),
            enable_prefix_caching=flags["enable_prefix_caching"],
            state_interval=flags["state_interval"],
        ),
        parallel=ParallelConfig(
            tensor_parallel_size=ranks,
            expert_parallel_size=ranks if flags["enable_expert_parallel"] else 1,
        ),
    )


def _num_drafts(flags: dict[str, Any]) -> int:
    """Draft tokens a step from `--speculative-config` or the two plain flags; 0 without either."""
    method, count, text = (
        flags["method"],
        flags["num_speculative_tokens"],
        flags["speculative_config"],
    )
    if text is None:
        if count is not None and method is None:
            raise ConfigError("--num-speculative-tokens needs --method mtp")
        return 0 if method is None else count or 1
    if method is not None or count is not None:
        raise ConfigError("--speculative-config stands for --method and --num-speculative-tokens")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--speculative-config is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("method") != "mtp":
        raise ConfigError(f'--speculative-config needs "method": "mtp", found {text}')
    unknown = set(config) - {"method", "num_speculative_tokens"}
    if unknown:
        raise ConfigError(f"--speculative-config: unknown {', '.join(sorted(unknown))}")
    count = config.get("num_speculative_tokens", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 3:
        raise ConfigError(
            f"--speculative-config: num_speculative_tokens must be 1 to 3, found {count}"
        )
    return count


def _cache_dtype(name: str) -> str:
    spelled = name.replace("-", "_")
    return CACHE_DTYPE_ALIASES.get(spelled, spelled)


def _kernel_overrides(pairs: Sequence[str]) -> dict[str, str]:
    overrides: dict[str, str] = {}
    for pair in pairs:
        op, equals, name = pair.partition("=")
        if not (op and equals and name):
            raise ConfigError(f"--kernel {pair}: expected OP=NAME")
        if op in overrides:
            raise ConfigError(f"--kernel {op} was given twice: {overrides[op]} and {name}")
        overrides[op] = name
    return overrides


class Progress:
    """A bar of bytes done."""

    def __init__(self, what: str, quiet: bool):
        from tqdm import tqdm

        self.bar = tqdm(
            unit="B", unit_scale=True, desc=what, disable=quiet or not sys.stderr.isatty()
        )

    def of_part(self, part: str, done: int, total: int) -> None:
        """`done` of `total` bytes, `part` just finished."""
        self.bar.set_postfix_str(part, refresh=False)
        self(done, total)

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes."""
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()


@dataclass
class Answer:
    """One prompt's output as it grows; times in seconds since the first step began."""

    prompt: str
    num_prompt_tokens: int
    detokenizer: IncrementalDetokenizer
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    first_token: float = 0.0
    last_token: float = 0.0
    finish_reason: FinishReason | None = None

    def take(self, output: RequestOutput, now: float) -> str:
        """Add a step's output; the text it completes."""
        fresh = ""
        for token in output.new_token_ids:
            if not self.token_ids:
                self.first_token = now
            self.last_token = now
            self.token_ids.append(token)
            fresh += self.detokenizer.push(token)
        if output.finish_reason:
            self.finish_reason = output.finish_reason
            fresh += self.detokenizer.finish()
        self.text += fresh
        return fresh

    @property
    def tpot(self) -> float:
        """Mean seconds a token after the first; 0 where there is only one."""
        after = len(self.token_ids) - 1
        return (self.last_token - self.first_token) / after if after > 0 else 0.0


@main.command()
@engine_options
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeatable.")
@click.option("--max-tokens", type=int, default=16, show_default=True, help="Tokens an answer.")
@click.option("--temperature", type=float, default=0.6, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus to sample from.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def generate(
    prompts: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    ignore_eos: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Continue prompts, batched together, and print the text as it comes."""
    config = _engine_config(flags, seed)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    engine, tokenizer = _start(config, flags["device"], quiet=as_json)
    answers = _submit(engine, tokenizer, prompts or DEFAULT_PROMPTS, params)
    took = _stream(engine, answers, quiet=as_json)
    result = _result(answers, took)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
        return
    click.echo(
        f"\n{result['input_tokens']} input tokens, {result['output_tokens']} output tokens in "
        f"{took:.3f} s; time to first token {result['ttft_s']:.3f} s, "
        f"time per output token {result['tpot_s']:.4f} s"
    )


def _start(config: EngineConfig, device_name: str, quiet: bool) -> tuple[Engine, Tokenizer]:
    """Load the model and its tokenizer, saying what was decided."""
    from fourfold.core.device import detect
    from fourfold.engine.engine import Engine
    from fourfold.engine.loading import load_model
    from fourfold.text.tokenizer import Tokenizer
    from fourfold.weights.locate import locate

    began = time.perf_counter()
    location, device = locate(config.model), detect(device_name)
    tokenizer = Tokenizer.from_directory(location.directory)
    loaded = load_model(location, config, device, Progress("loading", quiet).of_part)
    engine = Engine(loaded, config, tokenizer.known_ids())
    if not quiet:
        for line in (*loaded.checkpoint.resolution.lines(), *loaded.notes):
            click.echo(line, err=True)
        click.echo(
            f"{location.name} on {device.name} in {loaded.dtype}, loaded in "
            f"{time.perf_counter() - began:.1f} s; requests up to "
            f"{engine.capacity.max_model_len} tokens",
            err=True,
        )
        click.echo("\n".join(engine.capacity.describe()), err=True)
    return engine, tokenizer


def _submit(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], params: SamplingParams
) -> dict[str, Answer]:
    from fourfold.text.detokenize import IncrementalDetokenizer

    answers = {}
    for number, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt, allow_special=True)
        engine.add(Request(str(number), tuple(ids), params))
        answers[str(number)] = Answer(prompt, len(ids), IncrementalDetokenizer(tokenizer))
    return answers


def _stream(engine: Engine, answers: dict[str, Answer], quiet: bool) -> float:
    """Run all requests; print the first unfinished answer live and the others when their turn comes.

    Returns the seconds it took.
    """
    turn = iter(answers.values())
    shown = next(turn)
    began = time.perf_counter()
    if not quiet:
        click.echo(f"\n{shown.prompt}", nl=False)
    for output in engine.run():
        answer = answers[output.request_id]
        fresh = answer.take(output, time.perf_counter() - began)
        if quiet:
            continue
        if answer is shown:
            click.echo(fresh, nl=False)
        while shown.finish_reason and (following := next(turn, None)):
            shown = following
            click.echo(f"\n\n{shown.prompt}{shown.text}", nl=False)
    if not quiet:
        click.echo()
    failed = [a.prompt for a in answers.values() if a.finish_reason is FinishReason.ERROR]
    if failed:
        raise FourfoldError(f"the model produced numbers that are not finite for: {failed}")
    return time.perf_counter() - began


def _result(answers: dict[str, Answer], took: float) -> dict[str, Any]:
    """What a machine wants to know of a run; times in seconds."""
    every = list(answers.values())
    return {
        "input_tokens": sum(a.num_prompt_tokens for a in every),
        "output_tokens": sum(len(a.token_ids) for a in every),
        "longest_output": max(len(a.token_ids) for a in every),
        "total_s": took,
        "ttft_s": sum(a.first_token for a in every) / len(every),
        "tpot_s": sum(a.tpot for a in every) / len(every),
        "answers": [
            {
                "prompt": a.prompt,
                "text": a.text,
                "token_ids": a.token_ids,
                "finish_reason": a.finish_reason.value if a.finish_reason else None,
            }
            for a in every
        ],
    }


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--geometry",
    type=click.Choice(["tiny", "flash", "flash-base", "pro"]),
    default="tiny",
    show_default=True,
    help="Shapes of the model.",
)
@click.option("--layers", type=click.IntRange(1), help="Keep the first N main layers only.")
@click.option(
    "--weights",
    type=click.Choice(["native", "fp8", "bf16", "float32"]),
    help="Storage: native is FP4 experts and FP8 linears, fp8 the Base models' format.  "
    "[default: native; fp8 for flash-base]",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--holes", is_flag=True, help="Real headers and sizes, data as file holes.")
def synth(
    directory: Path, geometry: str, layers: int | None, weights: str | None, seed: int, holes: bool
) -> None:
    """Write a checkpoint with random weights in exactly the released format."""
    from fourfold.weights.synthetic import write_checkpoint

    began = time.perf_counter()
    layout = write_checkpoint(
        directory,
        geometry=geometry,
        layers=layers,
        weights=weights,
        seed=seed,
        holes=holes,
        progress=Progress("writing", quiet=False),
    )
    click.echo(
        f"{directory}: {len(layout.files)} shards, {len(layout.weight_map()):,} tensors, "
        f"{layout.total_size:,} bytes of data in {time.perf_counter() - began:.1f} s"
    )
