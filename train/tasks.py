"""Held-out questions as tasks of lm_eval's, for its `local-completions` model and a running server.

python -m train.tasks --out DIR --count 50
fourfold serve
lm_eval --model local-completions --tasks nano --include_path DIR --model_args \
    model=nano,base_url=http://localhost:8000/v1/completions,num_concurrent=64,max_retries=3,\
tokenized_requests=False,tokenizer=DIR,max_length=32768

Contract: a task a case (train/evaluate.py), `nano_<case>`, and the group `nano`; the questions are those
of `evaluate` with the same seed. A prompt is the chat encoder's text, markers spelled out; what counts is
what stands after the reasoning, word for word. The tokenizer's files lie beside the tasks, for
lm_eval wants them. Nothing is asked here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fourfold.text import markers
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.locate import DEFAULT_MODEL, locate
from train.data.encode import Encoder, answer_segments, encoded
from train.data.items import Item
from train.data.mixture import Mixture
from train.evaluate import Case, cases, questions
from train.export import TOKENIZER_FILES

PREFIX = "nano"
_MARGIN = 64  # tokens beyond the longest reference answer
_AFTER_REASONING = rf"(?s)(?:.*{markers.END_THINK})?(.*)"


def document(item: Item) -> dict[str, str]:
    """A question as a task holds it: the prompt's text, and what the answer should say."""
    answer = "".join(segment.text for segment in answer_segments(item))
    said = answer.removesuffix(markers.EOS).rpartition(markers.END_THINK)[2]
    return {"prompt": encoded(item, item.messages).text, "answer": said.strip()}


def task(case: Case, file: Path, longest: int) -> dict[str, Any]:
    """A task's YAML; `longest` are the most tokens of an answer."""
    return {
        "task": f"{PREFIX}_{case.name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": [markers.EOS],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": longest,
        },
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": _AFTER_REASONING},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "repeats": 1,
        "num_fewshot": 0,
    }


def write_tasks(
    directory: Path, mixture: Mixture, wanted: Sequence[Case], count: int, seed: int = 0
) -> None:
    """Write the tasks of `wanted`, `count` questions each, and their group."""
    directory.mkdir(parents=True, exist_ok=True)
    for case in wanted:
        items = questions(mixture, case, count, seed)
        longest = max(len(mixture.encoder.answer(item)) for item in items) + _MARGIN
        file = directory.resolve() / f"{PREFIX}_{case.name}.jsonl"
        lines = (json.dumps(document(item), ensure_ascii=False) + "\n" for item in items)
        file.write_text("".join(lines), encoding="utf-8")
        _write(directory / f"{PREFIX}_{case.name}.yaml", task(case, file, longest))
    names = [f"{PREFIX}_{case.name}" for case in wanted]
    mean = {"metric": "exact_match", "filter_list": ["answer"], "weight_by_size": False}
    group = {"group": PREFIX, "task": names, "aggregate_metric_list": [mean]}
    _write(directory / f"{PREFIX}.yaml", group)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    # JSON is YAML.
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Whose tokenizer it is.")
@click.option("--count", default=50, show_default=True, help="Questions a task.")
@click.option("--lengths", default="2048,4096", show_default=True, help="Of far recall, in tokens.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, model: str, count: int, lengths: str, seed: int) -> None:
    """Write lm_eval's tasks."""
    source = locate(model, weights=False).directory
    mixture = Mixture(Encoder(Tokenizer.from_directory(source)))
    wanted = cases([int(part) for part in lengths.split(",") if part])
    write_tasks(out, mixture, wanted, count, seed)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, out / name)


if __name__ == "__main__":
    main()
