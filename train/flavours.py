"""One checkpoint run in many ways that should change no answer, and item by item whether they did.

    plain    fp8_experts  bf16 | kv_bf16 | chunked  prefix_hits  mtp | bodies
             how weights are   how rows    how a prompt is cut,        the definition of every op,
             stored            are kept    found, drafted for          on the CPU

Contract: a `Flavour` says how to make the checkpoint, how to load it and how often to ask; `answers_of` gives
its answers and what shows that it took effect; `compare` sets answers side by side, whichever machine
they come from. Answers are equal if all of their token ids are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.encode import Encoder
from train.data.mixture import Mixture
from train.evaluate import Answered, Case, Score, measure

if TYPE_CHECKING:
    from fourfold import LLM

PLAIN = "plain"
_CHUNK = 133  # tokens; a multiple of no compress ratio and of no page


@dataclass(frozen=True)
class Flavour:
    """A way to run a checkpoint. `weights` is the format it is converted to first, `settings` are
    arguments of `LLM`, `bodies` asks for every op's definition on the CPU, and what counts are the
    answers when asked for the `times`-th time."""

    name: str
    meaning: str
    weights: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    bodies: bool = False
    times: int = 1

    def arguments(self) -> dict[str, Any]:
        """Arguments of `LLM` beside the model."""
        if not self.bodies:
            return dict(self.settings)
        from fourfold.ops.catalog import OPS
        from fourfold.ops.registry import BODY

        return {**self.settings, "device": "cpu", "kernels": {op.name: BODY for op in OPS}}


FLAVOURS = (
    Flavour(PLAIN, "as the device runs the checkpoint of itself"),
    Flavour("fp8_experts", "experts in FP8, float32 scales", weights="fp8"),
    Flavour("bf16", "every weight dequantised, inputs not rounded", weights="bf16"),
    Flavour(
        "kv_bf16",
        "rows cached in bfloat16",
        settings={"kv_cache_dtype": "bfloat16", "index_cache_dtype": "bfloat16"},
    ),
    Flavour(
        "chunked",
        f"prompts cut into {_CHUNK} tokens",
        settings={
            "max_num_batched_tokens": _CHUNK,
            "max_num_seqs": 64,
            "enable_prefix_caching": False,
        },
    ),
    Flavour("prefix_hits", "prompts found in the cache", settings={"state_interval": 256}, times=2),
    Flavour(
        "mtp",
        "a token drafted ahead",
        settings={"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
    ),
    Flavour("bodies", "every op's definition, on the CPU", bodies=True),
)


def checkpoint(flavour: Flavour, model: Path, workspace: Path) -> Path:
    """The checkpoint to load: `model`, or what it is converted to, kept in `workspace`."""
    if flavour.weights is None:
        return model
    from train.export import convert

    directory = workspace / f"{model.resolve().name}_{flavour.weights}"
    if not directory.exists():
        convert(model, directory, flavour.weights)
    return directory


def load(flavour: Flavour, model: Path, workspace: Path, **settings: Any) -> LLM:
    """The model as `flavour` runs it; `settings` are arguments of `LLM`, the flavour's own go first."""
    from fourfold import LLM

    return LLM(checkpoint(flavour, model, workspace), **{**settings, **flavour.arguments()})


def answers_of(
    flavour: Flavour, llm: LLM, wanted: Sequence[tuple[Case, int]], seed: int = 0
) -> list[tuple[Score, list[Answered]]]:
    """Scores and answers, case by case; `wanted` are cases with how many questions of each."""
    mixture = Mixture(Encoder(llm.get_tokenizer()))
    return [measure(llm, mixture, case, count, seed, flavour.times) for case, count in wanted]


@dataclass(frozen=True)
class Comparison:
    """How many of a case's items were answered alike, and how many rightly by either."""

    case: str
    count: int
    equal: int
    right: tuple[int, int]

    @property
    def share(self) -> float:
        """Of equal answers."""
        return self.equal / self.count


def compare(one: Iterable[Answered], other: Iterable[Answered]) -> list[Comparison]:
    """Answers side by side, by case; items that only one side has are left out."""
    others = {(each.case, each.number): each for each in other}
    pairs: dict[str, list[tuple[Answered, Answered]]] = {}
    for each in one:
        if found := others.get((each.case, each.number)):
            pairs.setdefault(each.case, []).append((each, found))
    return [
        Comparison(
            case,
            len(met),
            sum(a.ids == b.ids for a, b in met),
            (sum(a.right for a, _ in met), sum(b.right for _, b in met)),
        )
        for case, met in pairs.items()
    ]


def overall(found: Sequence[Comparison]) -> Comparison:
    """All cases together."""
    right = sum(each.right[0] for each in found), sum(each.right[1] for each in found)
    return Comparison("all", sum(e.count for e in found), sum(e.equal for e in found), right)


def table(name: str, found: Sequence[Comparison]) -> str:
    """A line a case, the last for all."""
    lines = []
    for each in (*found, overall(found)):
        share = 100 * each.share if each.count else 0.0
        lines.append(
            f"{name:<12} {each.case:<20} {each.count:>6} items  {each.equal:>6} equal {share:6.2f} %"
            f"   right {each.right[0]} and {each.right[1]}"
        )
    return "\n".join(lines)


def write_results(path: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """JSON, one document."""
    path.write_text(json.dumps(list(results), indent=1) + "\n", encoding="utf-8")
