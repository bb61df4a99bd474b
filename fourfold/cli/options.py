"""Flags that every command with an engine takes, and what they become.

Contract: the flags' names are vLLM's, with aliases of SGLang and ATOM; those that other engines carry
and that change nothing here are accepted and say so in one line. Importing this loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from fourfold.cli.group import same_spelling
from fourfold.core.config import EXPERT_DTYPES, MODEL_DTYPES
from fourfold.core.errors import ConfigError
from fourfold.weights.locate import DEFAULT_MODEL, MODEL_FORMS

CACHE_DTYPE_ALIASES = {"bf16": "bfloat16", "fp8_e4m3": "fp8", "fp8_ds_mla": "fp8"}
CACHE_DTYPES = ("auto", "fp8", "bfloat16", "float32", "float64", *CACHE_DTYPE_ALIASES)


# Flags that other engines' command lines carry and that change nothing here, with the reason.
NO_EFFECT: Mapping[str, str] = {
    "trust_remote_code": "no code from a checkpoint is ever executed",
    "block_size": "a cache page is always 256 tokens",
    "level": "there is no compilation level",
    "cudagraph_capture_sizes": "the engine chooses what to capture",
    "cudagraph_mode": "decode steps are captured unless --enforce-eager is given",
    "compilation_config": "nothing here is compiled by torch",
    "enable_dp_attention": "it needs data parallelism",
    "enable_expert_parallel": "it needs more than one GPU",
    "node_rank": "there is one node",
    "master_addr": "there is one node",
    "master_port": "there is one node",
}
# What SGLang calls drafting with the MTP layer.
_SPECULATIVE_ALGORITHMS = ("EAGLE", "NEXTN")
# A number above 1 of any of these needs what does not exist yet.
_PARALLEL = (
    "tensor_parallel_size",
    "data_parallel_size",
    "pipeline_parallel_size",
    "expert_parallel_size",
    "nnodes",
)


def stacked(options: Sequence[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Any]:
    """Several options as one decorator, in this order."""

    def decorate(command: Callable[..., Any]) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


engine_options = stacked(
    [
        click.argument("model_argument", metavar="[MODEL]", required=False),
        click.option(
            "--model",
            "--model-path",
            "model_flag",
            metavar="MODEL",
            help=f"Same as the argument: {MODEL_FORMS}.  [default: {DEFAULT_MODEL}]",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            envvar="FOURFOLD_DEVICE",
            help="auto, cpu, cuda or cuda:N.",
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
            type=click.Choice([same_spelling(n) for n in EXPERT_DTYPES]),
            default="auto",
            show_default=True,
            help="Confirms how routed experts are stored; the files decide.",
        ),
        click.option(
            "--kv-cache-dtype",
            type=click.Choice([same_spelling(n) for n in CACHE_DTYPES]),
            default="auto",
            show_default=True,
            help="Format of cached rows.",
        ),
        click.option(
            "--index-cache-dtype",
            type=click.Choice([same_spelling(n) for n in CACHE_DTYPES]),
            default="auto",
            show_default=True,
            help="Format of cached indexer rows; auto follows --kv-cache-dtype.",
        ),
        click.option(
            "--max-model-len",
            "--context-length",
            envvar="FOURFOLD_MAX_MODEL_LEN",
            type=click.IntRange(1),
            help="Longest prompt plus output, in tokens.",
        ),
        click.option(
            "--max-num-seqs",
            envvar="FOURFOLD_MAX_NUM_SEQS",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Sequences running at once.",
        ),
        click.option(
            "--max-num-batched-tokens",
            "--chunked-prefill-size",
            type=click.IntRange(1),
            default=8192,
            show_default=True,
            help="Tokens a step.",
        ),
        click.option(
            "--gpu-memory-utilization",
            "--mem-fraction-static",
            envvar="FOURFOLD_GPU_MEMORY_UTILIZATION",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.9,
            show_default=True,
            help="Share of a GPU's memory to use.",
        ),
        click.option("--enforce-eager", is_flag=True, help="Capture no graphs of decode steps."),
        click.option(
            "--async-scheduling/--no-async-scheduling",
            default=None,
            help="Schedule a step while the one before runs.  [default: on a GPU]",
        ),
        click.option(
            "--compile-cache",
            metavar="DIR",
            help="Kernels that `fourfold compile --cache-dir` has compiled for this GPU.",
        ),
        click.option(
            "--kernel",
            "kernels",
            multiple=True,
            metavar="OP=NAME",
            help="Force the kernel of an op; repeatable.",
        ),
        click.option(
            "--tensor-parallel-size",
            "-tp",
            "--tp",
            "--tp-size",
            type=click.IntRange(1),
            default=1,
            hidden=True,
        ),
        click.option(
            "--data-parallel-size",
            "-dp",
            "--dp",
            "--dp-size",
            type=click.IntRange(1),
            default=1,
            hidden=True,
        ),
        click.option(
            "--pipeline-parallel-size",
            "-pp",
            "--pp",
            "--pp-size",
            type=click.IntRange(1),
            hidden=True,
        ),
        click.option("--expert-parallel-size", "--ep-size", type=click.IntRange(1), hidden=True),
        click.option("--nnodes", type=click.IntRange(1), hidden=True),
        click.option("--enable-expert-parallel", is_flag=True, hidden=True),
        click.option("--trust-remote-code", is_flag=True, hidden=True),
        click.option("--block-size", "--page-size", type=click.IntRange(1), hidden=True),
        click.option("--level", type=int, hidden=True),
        click.option("--cudagraph-capture-sizes", "--graph-sizes", hidden=True),
        click.option("--cudagraph-mode", hidden=True),
        click.option("--compilation-config", hidden=True),
        click.option("--node-rank", type=click.IntRange(0), hidden=True),
        click.option("--master-addr", "--dist-init-addr", hidden=True),
        click.option("--master-port", type=click.IntRange(1), hidden=True),
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
            "--speculative-num-steps",
            type=click.IntRange(1, 3),
            help="Drafts a step.  [default: 1 with --method]",
        ),
        click.option(
            "--speculative-config",
            metavar="JSON",
            help='The same as JSON: {"method": "mtp", "num_speculative_tokens": 3}.',
        ),
        click.option(
            "--speculative-algorithm",
            type=click.Choice(_SPECULATIVE_ALGORITHMS, case_sensitive=False),
            hidden=True,
        ),
        click.option("--speculative-eagle-topk", type=click.IntRange(1, 1), hidden=True),
        click.option("--enable-dp-attention", is_flag=True, hidden=True),
    ]
)


def llm_arguments(flags: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What `LLM` is made of, from parsed flags; says once which flags change nothing."""
    model = flags["model_argument"]
    source = click.get_current_context().get_parameter_source("model_flag")
    if model is not None and source is ParameterSource.COMMANDLINE:
        raise ConfigError("MODEL was given twice: as an argument and with --model")
    if model is None:
        model = DEFAULT_MODEL if flags["model_flag"] is None else flags["model_flag"]
    for name in _PARALLEL:
        if (flags[name] or 1) > 1:
            raise ConfigError(f"--{same_spelling(name)} above 1 is not supported yet")
    say_no_effect(flags, NO_EFFECT)
    same = (
        "dtype",
        "device",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "enforce_eager",
        "async_scheduling",
        "compile_cache",
        "enable_prefix_caching",
        "state_interval",
        "tensor_parallel_size",
    )
    return {name: flags[name] for name in same} | {
        "model": model,
        "seed": seed,
        "expert_dtype": flags["expert_dtype"].replace("-", "_"),
        "kv_cache_dtype": cache_dtype_of(flags["kv_cache_dtype"]),
        "index_cache_dtype": cache_dtype_of(flags["index_cache_dtype"]),
        "kernels": kernel_overrides(flags["kernels"]),
        "speculative_config": _speculative_config(flags),
    }


def say_no_effect(flags: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """One line for each of these flags that was given."""
    for name, reason in reasons.items():
        if flags[name] is not None and flags[name] is not False:
            click.echo(f"--{same_spelling(name)} has no effect here: {reason}", err=True)


def _speculative_config(flags: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `--speculative-config` says, or the two plain flags; None without any."""
    method = flags["method"] or ("mtp" if flags["speculative_algorithm"] else None)
    count, text = flags["num_speculative_tokens"], flags["speculative_config"]
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


def cache_dtype_of(name: str) -> str:
    """What the engine calls a cache dtype of any spelling."""
    spelled = name.replace("-", "_")
    return CACHE_DTYPE_ALIASES.get(spelled, spelled)


def kernel_overrides(pairs: Sequence[str]) -> dict[str, str]:
    """Kernel names by op, from OP=NAME pairs. Raises `ConfigError`."""
    overrides: dict[str, str] = {}
    for pair in pairs:
        op, equals, name = pair.partition("=")
        if not (op and equals and name):
            raise ConfigError(f"--kernel {pair}: expected OP=NAME")
        if op in overrides:
            raise ConfigError(f"--kernel {op} was given twice: {overrides[op]} and {name}")
        overrides[op] = name
    return overrides
