"""`fourfold generate`: continue prompts and print the text as it comes."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from fourfold.cli.options import engine_options, llm_arguments, say_no_effect
from fourfold.core.errors import FourfoldError
from fourfold.core.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from fourfold.llm import LLM, RequestOutput

DEFAULT_PROMPTS = ("The capital of France is", "你好，世界")
_NO_EFFECT = {"port": "generate opens no port"}


@click.command()
@engine_options
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeatable.")
@click.option("--max-tokens", type=int, default=16, show_default=True, help="Tokens an answer.")
@click.option("--temperature", type=float, default=0.6, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus to sample from.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@click.option("--port", type=int, hidden=True)
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
    """Continue prompts, batched together, and print the text as it comes.

    MODEL is a directory, org/name[@revision], or nano, the built-in model; nano if left out.
    """
    from fourfold.llm import LLM

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    say_no_effect(flags, _NO_EFFECT)
    llm = LLM(**llm_arguments(flags, seed))
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
