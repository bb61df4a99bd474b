"""Measure generation on a small checkpoint, through the command line as a user would.

Contract: writes a tiny checkpoint with `fourfold synth` into a temporary folder, or takes the one that
`--model` names, runs `fourfold generate --json` on it several times for each batch size and prompt
length, and prints one JSON object a run: what was asked, what was measured, and on what. The tiny
geometry with random weights says how much the engine itself costs on a CPU; it says nothing about a
full-size model or about any GPU.

`wall_s` is the whole process: start-up, loading and generation. `generate` is the program's own
report, unchanged; `output_tokens_per_s` is computed from it, loading excluded:
output tokens / (time to first token + time per output token × (longest output − 1)).
"""

import argparse
import importlib.metadata as metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from fourfold import __version__

PROMPT = "The capital of France is"
FOURFOLD = [sys.executable, "-m", "fourfold"]


def call(arguments: list[str]) -> tuple[str, float]:
    """Standard output and wall seconds of one `fourfold` command; a failure ends the benchmark."""
    start = time.perf_counter()
    done = subprocess.run([*FOURFOLD, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"fourfold {arguments[0]} left with exit status {done.returncode}")
    return done.stdout, seconds


def prompt(words: int, number: int) -> str:
    """A prompt of so many words, unlike the others from its first one on; 0: a short sentence."""
    drawn = random.Random(number)
    return " ".join(drawn.choice(PROMPT.split()) for _ in range(words)) or PROMPT


def summary(output: str) -> dict[str, float]:
    """The last JSON object that `generate --json` printed: the totals of the run."""
    report = json.loads(output.strip().splitlines()[-1])
    wanted = ("output_tokens", "longest_output", "ttft_s", "tpot_s")
    missing = [name for name in wanted if name not in report]
    if missing:
        sys.exit(f"fourfold generate --json reported no {', '.join(missing)}")
    return report


def machine() -> dict[str, str | int | float]:
    """What a figure depends on besides the code."""
    return {
        "fourfold": __version__,
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Run every batch size `--runs` times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--weights", default="native")
    parser.add_argument("--model", help="a checkpoint; otherwise a tiny one is written")
    parser.add_argument(
        "--words", type=int, nargs="+", default=[0], help="words of a prompt; 0: a short sentence"
    )
    parser.add_argument("--kernel", action="append", default=[], metavar="OP=NAME")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fourfold-bench-") as folder:
        model = args.model or str(Path(folder, "tiny"))
        if not args.model:
            geometry = ["--geometry", "tiny", "--weights", args.weights, "--seed", "1"]
            call(["synth", model, *geometry])
        forced = [word for each in args.kernel for word in ("--kernel", each)]
        for batch, words in product(args.batch, args.words):
            asked = ["--max-tokens", str(args.max_tokens), "--seed", "1", "--ignore-eos", *forced]
            prompts = [word for each in range(batch) for word in ("--prompt", prompt(words, each))]
            for number in range(1, args.runs + 1):
                output, wall = call(["generate", model, *prompts, *asked, "--json"])
                report = summary(output)
                busy = report["ttft_s"] + report["tpot_s"] * (report["longest_output"] - 1)
                record = {
                    "benchmark": "forward",
                    "model": args.model or f"tiny, {args.weights} weights",
                    "kernels": args.kernel,
                    "batch": batch,
                    "words": words,
                    "max_tokens": args.max_tokens,
                    "run": number,
                    "wall_s": round(wall, 3),
                    "output_tokens_per_s": round(report["output_tokens"] / busy, 2),
                    "generate": report,
                    **machine(),
                }
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
