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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fourfold import __version__
from fourfold.core.config import EXPERT_DTYPES, MODEL_DTYPES
from fourfold.core.errors import ConfigError, FourfoldError
from fourfold.core.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from fourfold.llm import LLM, RequestOutput

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


def _llm_arguments(flags: dict[str, Any], seed: int) -> dict[str, Any]:
    """What `LLM` is made of, from parsed flags; says once which flags change nothing."""
    model = flags["model_argument"] or flags["model_flag"]
    if not model:
        raise ConfigError("MODEL is missing: a checkpoint directory or org/name[@revision]")
    if flags["model_argument"] and flags["model_flag"]:
        raise ConfigError("MODEL was given twice: as an argument and with --model")
    if flags["data_parallel_size"] > 1:
        raise ConfigError("--data-parallel-size above 1 is not supported yet")
    for name, reason in NO_EFFECT.items():
        if flags[name] is not None and flags[name] is not False:
            click.echo(f"--{_same_spelling(name)} has no effect here: {reason}", err=True)
    same = (
        "dtype",
        "device",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "enforce_eager",
        "enable_prefix_caching",
        "state_interval",
        "tensor_parallel_size",
    )
    return {name: flags[name] for name in same} | {
        "model": model,
        "seed": seed,
        "expert_dtype": flags["expert_dtype"].replace("-", "_"),
        "kv_cache_dtype": _cache_dtype(flags["kv_cache_dtype"]),
        "index_cache_dtype": _cache_dtype(flags["index_cache_dtype"]),
        "kernels": _kernel_overrides(flags["kernels"]),
        "speculative_config": _speculative_config(flags),
    }


def _speculative_config(flags: dict[str, Any]) -> dict[str, Any] | None:
    """What `--speculative-config` says, or the two plain flags; None without any."""
    method, count, text = (
        flags["method"],
        flags["num_speculative_tokens"],
        flags["speculative_config"],
    )
    if text is None:
        if method is None and count is not None:
            raise ConfigError("--num-speculative-tokens needs --method mtp")
        return None if method is None else {"method": method, "num_speculative_tokens": count or 1}
    if method is not None or count is not None:
        raise ConfigError("--speculative-config stands for --method and --num-speculative-tokens")
    try:
        config: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--speculative-config is not valid JSON: {error}") from None
    return config


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

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes."""
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()


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
    from fourfold.llm import LLM

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    llm = LLM(**_llm_arguments(flags, seed))
    if not as_json:
        click.echo("\n".join([*llm.info.notes, *llm.info.capacity]), err=True)
    began = time.perf_counter()
    answers = _stream(llm, list(prompts or DEFAULT_PROMPTS), params, quiet=as_json)
    result = _result(answers, time.perf_counter() - began)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
        return
    click.echo(
        f"\n{result['input_tokens']} input tokens, {result['output_tokens']} output tokens in "
        f"{result['total_s']:.3f} s; time to first token {result['ttft_s']:.3f} s, "
        f"time per output token {result['tpot_s']:.4f} s"
    )


def _stream(
    llm: LLM, prompts: list[str], params: SamplingParams, quiet: bool
) -> list[RequestOutput]:
    """Run all prompts; print the first unfinished answer live and the others when their turn comes."""
    answers: dict[int, RequestOutput] = {}
    turn, shown = 0, 0  # whose answer is printed, and how much of it has been
    if not quiet:
        click.echo(f"\n{prompts[0]}", nl=False)
    for answer in llm.stream(prompts, params):
        answers[int(answer.request_id)] = answer
        while not quiet and (current := answers.get(turn)) is not None:
            click.echo(current.outputs[0].text[shown:], nl=False)
            shown = len(current.outputs[0].text)
            if not current.finished or turn + 1 == len(prompts):
                break
            turn, shown = turn + 1, 0
            click.echo(f"\n\n{prompts[turn]}", nl=False)
    if not quiet:
        click.echo()
    for answer in answers.values():
        if answer.outputs[0].finish_reason == FinishReason.ERROR.value:
            raise FourfoldError(f"{answer.prompt!r}: {answer.outputs[0].error}")
    return [answers[number] for number in sorted(answers)]


def _result(answers: list[RequestOutput], took: float) -> dict[str, Any]:
    """What a machine wants to know of a run; times in seconds, means over the prompts."""
    first, later = [], []
    for answer in answers:
        metrics, after = answer.metrics, len(answer.outputs[0].token_ids) - 1
        start = (metrics.first_token_latency if metrics else None) or 0.0
        end = (metrics.last_token_latency if metrics else None) or 0.0
        first.append(start)
        later.append((end - start) / after if after else 0.0)
    counts = [len(a.outputs[0].token_ids) for a in answers]
    return {
        "input_tokens": sum(len(a.prompt_token_ids) for a in answers),
        "output_tokens": sum(counts),
        "longest_output": max(counts),
        "total_s": took,
        "ttft_s": sum(first) / len(first),
        "tpot_s": sum(later) / len(later),
        "answers": [
            {
                "prompt": a.prompt,
                "text": a.outputs[0].text,
                "token_ids": a.outputs[0].token_ids,
                "finish_reason": a.outputs[0].finish_reason,
            }
            for a in answers
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
