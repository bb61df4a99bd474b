"""lm_eval with the command line that people know, on tasks of our own in the usual forms."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fourfold.core.request import Request
from fourfold.server.settings import ServerSettings
from fourfold.weights.synthetic_tokenizer import tokenizer_files
from tests.server.http import site
from tests.server.real import real_site

pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytestmark = pytest.mark.slow

SUMS = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {train: DIR/train.json, test: DIR/test.json}}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]
generation_kwargs:
  {until: ["Question:", "</s>", "<|im_end|>"], do_sample: false, temperature: 0.0, max_gen_toks: LONGEST}
repeats: 1
num_fewshot: 5
filter_list:
  - name: strict-match
    filter:
      - {function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}
      - {function: take_first}
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"}
      - {function: take_first}
"""
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/test.json}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["no", "certainly not so in any case at all"]
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def documents(count: int, first: int) -> str:
    lines = []
    for i in range(first, first + count):
        doc = {"question": f"What is {i} and {i}?", "answer": f"It is #### {2 * i}", "label": i % 2}
        lines.append(json.dumps(doc))
    return "\n".join(lines)


def write_tasks(directory: Path, count: int, longest: int) -> None:
    (directory / "train.json").write_text(documents(8, 100))
    (directory / "test.json").write_text(documents(count, 10))
    for name, text in (("sums", SUMS), ("choices", CHOICES)):
        text = text.replace("DIR", str(directory)).replace("LONGEST", str(longest))
        (directory / f"{name}.yaml").write_text(text)


def evaluated(directory: Path, model: str, port: int, tokenizer: Path, tokenized: bool) -> Any:
    """The results of the command line that people know."""
    arguments = (
        f"model={model},base_url=http://localhost:{port}/v1/completions,"
        f"num_concurrent=64,max_retries=3,tokenized_requests={tokenized},tokenizer={tokenizer}"
    )
    out = directory / f"out-{tokenized}"
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args",
            arguments, "--tasks", "sums,choices", "--include_path", str(directory),
            "--output_path", str(out), "--log_samples",
        ],
        capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    (path,) = out.rglob("results_*.json")
    samples = {
        path.name.split("_")[1]: [json.loads(line)["resps"] for line in path.open()]
        for path in out.rglob("samples_*.jsonl")
    }
    return json.loads(path.read_text())["results"], samples


@pytest.mark.parametrize("tokenized", [False, True])
def test_both_kinds_of_task_with_64_at_a_time(tmp_path: Path, tokenized: bool) -> None:
    write_tasks(tmp_path, 20, 256)
    for name, content in tokenizer_files(900, 4096).items():
        (tmp_path / name).write_text(json.dumps(content))
    with site(max_model_len=8000, max_num_seqs=16) as web:

        def script(request: Request, index: int) -> list[int]:
            """Right for even numbers; always says more than it should."""
            asked = re.findall(
                r"What is (\d+)", web.engine.tokenizer.decode(request.prompt_token_ids)
            )
            number = int(asked[-1])
            answer = 2 * number if number % 2 == 0 else 7
            return [*web.text(f" It is #### {answer}\n\nQuestion: What is 1?"), 1]

        web.engine.script = script
        results, _ = evaluated(tmp_path, "stub/model", web.port, tmp_path, tokenized)
        kinds = {type(r.params.prompt_logprobs) for r in web.engine.requests}
    assert results["sums"]["exact_match,strict-match"] == 0.5
    assert results["sums"]["exact_match,flexible-extract"] == 0.5
    # The stub finds every token equally likely, so that the shorter choice wins.
    assert results["choices"]["acc,none"] == 0.5
    assert kinds == {int, type(None)}


def test_a_real_engine_says_the_same_to_texts_and_tokens(tmp_path: Path) -> None:
    """A tiny checkpoint knows nothing, but the same in both forms: every text, every likelihood."""
    write_tasks(tmp_path, 6, 12)
    model = tmp_path / "tiny"
    with real_site(model, ServerSettings(), 16) as web:
        found = [evaluated(tmp_path, "tiny", web.port, model, each) for each in (False, True)]
    (results, samples), (others, other_samples) = found
    assert set(samples) == {"sums", "choices"}
    assert samples["sums"] == other_samples["sums"]
    for one, two in zip(samples["choices"], other_samples["choices"], strict=True):
        for [[likelihood, greedy]], [[other, other_greedy]] in zip(one, two, strict=True):
            assert float(likelihood) == pytest.approx(float(other), rel=1e-4)
            assert greedy == other_greedy
    assert results["choices"]["acc,none"] == others["choices"]["acc,none"]
