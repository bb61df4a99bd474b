"""Ahead-of-time compilation: nothing is left to compile later, and a store belongs to one build."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner

from fourfold.cache.image import StateImage
from fourfold.cli import main
from fourfold.core.config import EngineConfig
from fourfold.core.device import ARCHS
from fourfold.core.errors import KernelError
from fourfold.core.request import MAX_LOGPROBS, MAX_STOP_TOKENS, Request, SamplingParams
from fourfold.core.tensor import QuantTensor
from fourfold.engine.compile import (
    Collector,
    steps,
    subject_of_checkpoint,
    subject_of_geometry,
    token_counts,
)
from fourfold.engine.scheduler import Restoring, Step
from fourfold.engine.sequence import Run
from fourfold.engine.sequence import Sequence as Running
from fourfold.ops.step import Key
from fourfold.weights.locate import locate
from fourfold.weights.synthetic import write_checkpoint

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full


def random_steps(count: int) -> Iterator[Key]:
    """Decodes, and chunks of prompts among decoding sequences."""
    rng = random.Random(1)
    for _ in range(count):
        if rng.random() < 0.4:
            yield [(1, 0, True)] * rng.randrange(1, 257)
            continue
        left, runs = rng.randrange(1, 8193), []
        while left and len(runs) < 12:
            tokens = min(left, rng.choice([1, 1, rng.randrange(1, 4096)]))
            left -= tokens
            runs.append((tokens, 0, rng.random() < 0.5))
        yield runs


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_no_batch_needs_a_variant_that_was_not_compiled(name: str) -> None:
    """Or a request would wait for a compiler: nothing a kernel is specialised on varies freely."""
    subject, engine = subject_of_geometry("flash"), EngineConfig(model="flash")
    collector = Collector(subject, ARCHS[name], engine)
    known = {each.variant for each in collector.collect(steps(engine, token_counts(8192)))}
    met = Collector(subject, ARCHS[name], engine).collect(random_steps(60))
    missing = {each.variant.name for each in met if each.variant not in known}
    assert not missing, f"specialised on what varies from batch to batch: {', '.join(missing)}"


class Mask:
    """Allows anything, and never says so in advance."""

    failure, open_for = None, 0

    def __init__(self, vocabulary: int):
        self._words = -(-vocabulary // 32)

    def allowed(self, drafts: Sequence[int]) -> npt.NDArray[np.int32]:
        return np.full((1 + len(drafts), self._words), -1, np.int32)

    def commit(self, tokens: Sequence[int]) -> None:
        raise AssertionError("no token comes from a device without data")


def random_params(rng: random.Random) -> SamplingParams:
    """Mostly plain ones, and anything that can be asked for."""

    def sometimes(asked: Any, plain: Any) -> Any:
        return asked if rng.random() < 0.2 else plain

    return SamplingParams(
        temperature=rng.choice([0.0, 0.7]),
        top_p=sometimes(0.9, 1.0),
        top_k=sometimes(40, 0),
        min_p=sometimes(0.1, 0.0),
        max_tokens=1000,
        min_tokens=sometimes(1000, 0),
        presence_penalty=sometimes(0.5, 0.0),
        frequency_penalty=sometimes(0.5, 0.0),
        repetition_penalty=sometimes(1.2, 1.0),
        logit_bias=sometimes(dict.fromkeys(range(rng.randrange(1, 40)), 1.0), {}),
        logprobs=sometimes(rng.randrange(MAX_LOGPROBS + 1), None),
        prompt_logprobs=sometimes(rng.randrange(MAX_LOGPROBS + 1), None),
    )


def random_runs(rng: random.Random, drafts: int, vocabulary: int) -> tuple[Run, ...]:
    """A step's: decodes with and without drafts, chunks of prompts, everything requests ask for."""
    runs: list[Run] = []
    for number in range(rng.choice([1, 1, 2, 3, 16, rng.randrange(1, 65)])):
        if sum(run.count for run in runs) > 1800:
            break
        prompt = tuple(rng.randrange(vocabulary) for _ in range(rng.randrange(1, 200)))
        request = Request(str(number), prompt, random_params(rng))
        decodes = rng.random() < 0.7
        output = [rng.randrange(vocabulary) for _ in range(rng.randrange(1, 20) * decodes)]
        stops = tuple(range(rng.choice([0, 1, 1, 2, 3, rng.randrange(MAX_STOP_TOKENS + 2)])))
        sequence = Running(request, number, 0, 0, 1000, stops, b"", [*prompt, *output])
        sequence.block_ids, sequence.state_slot = array("q", range(8)), number % 4
        sequence.mask = Mask(vocabulary) if rng.random() < 0.1 else None
        if decodes:
            k = rng.randrange(drafts + 1)
            sequence.drafts = [5] * k
            runs.append(Run(sequence, len(sequence.token_ids) - 1, 1 + k, True, k, True))
        else:
            begin = rng.randrange(len(prompt))
            count = rng.randrange(1, len(prompt) - begin + 1)
            runs.append(Run(sequence, begin, count, begin + count == len(prompt)))
    return tuple(runs)


@pytest.mark.parametrize(
    ("name", "drafts"),
    [("sm_90", 0), ("sm_90", 2), pytest.param("gfx942", 0, marks=pytest.mark.slow)],
)
def test_no_request_needs_a_variant_that_was_not_compiled(
    name: str, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it asks for, beside whatever others ask for: whole steps, as the engine launches them."""
    from fourfold.kernels.variants import record

    subject = subject_of_geometry("flash")
    # Fewer sequences than a tile of a prompt has rows.
    engine = EngineConfig(model="flash", num_speculative_tokens=drafts, max_num_seqs=64)
    collector = Collector(subject, ARCHS[name], engine)
    known = {each.variant for each in collector.collect(steps(engine, token_counts(2048)))}
    runner, rng = Collector(subject, ARCHS[name], engine).runner, random.Random(2)
    monkeypatch.setattr(runner, "_home", lambda tensor: tensor)
    monkeypatch.setattr("fourfold.engine.runner.restore", lambda *image: None)
    with record(ARCHS[name]) as met:
        for _ in range(80):
            runs = random_runs(rng, drafts, subject.config.vocab_size)
            resumed = (run.sequence for run in runs if run.begin and rng.random() < 0.3)
            image = StateImage(1, 0, (), torch.empty(0))
            restorings = tuple(Restoring(sequence, image, 0) for sequence in resumed)
            runner.enter(Step((), tuple(run.sequence for run in runs), (), restorings, runs))
            runner.launch(runs)
    missing = {each.name for each in met if each not in known}
    assert len(met) > 20
    assert not missing, f"specialised on what requests ask for: {', '.join(missing)}"


def test_every_size_up_to_the_largest_is_between_two_that_are_tried() -> None:
    counts = token_counts(8192)
    assert counts[0] == 1
    assert counts[-1] == 8192
    for power in (16, 64, 1024, 4096):
        assert {power - 1, power, power + 1, power + 16} <= set(counts)
    assert max(token_counts(100)) == 100


def test_a_checkpoint_and_its_geometry_want_the_same(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", "tiny", holes=True)
    engine = EngineConfig(model=str(tmp_path / "tiny"))
    stored = subject_of_checkpoint(locate(engine.model), engine)
    drawn = subject_of_geometry("tiny")
    assert stored.config == drawn.config
    assert stored.dtype == drawn.dtype
    assert stored.parameters.keys() == drawn.parameters.keys()
    for name, weight in stored.parameters.items():
        other = drawn.parameters[name]
        assert type(weight) is type(other), name
        if isinstance(weight, QuantTensor) and isinstance(other, QuantTensor):
            assert (weight.scheme, weight.shape) == (other.scheme, other.shape), name
            assert weight.scale.dtype == other.scale.dtype, name
        elif isinstance(weight, torch.Tensor):
            assert (weight.shape, weight.dtype) == (other.shape, other.dtype), name


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("store")
    command = [
        *("compile", "--geometry", "tiny", "--target", "gfx942", "--cache-dir", str(folder)),
        *("--max-num-batched-tokens", "3", "--max-num-seqs", "1", "--json", "-j", "1"),
    ]
    return folder, command


def run(command: list[str]) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-m", "fourfold", *command], capture_output=True, text=True, check=False
    )
    found: list[dict[str, object]] = json.loads(done.stdout)[0]["variants"]
    assert done.returncode == (1 if any(v["error"] for v in found) else 0), done.stderr[-2000:]
    return found


@pytest.mark.slow
def test_a_second_process_compiles_nothing(compiled: tuple[Path, list[str]]) -> None:
    folder, command = compiled
    first, second = run(command), run(command)
    assert not any(v["cached"] for v in first)
    assert first
    assert [v["function"] for v in second if not v["cached"]] == [
        v["function"] for v in second if v["error"]
    ]
    assert (folder / "gfx942" / "fourfold.json").is_file()


def test_another_builds_store_is_refused_by_name(tmp_path: Path) -> None:
    from fourfold.kernels import store

    arch = ARCHS["gfx942"]
    with pytest.raises(KernelError, match=r"has no fourfold\.json"):
        store.check(tmp_path, arch)
    store.write_manifest(tmp_path, arch)
    store.check(tmp_path, arch)
    with pytest.raises(KernelError, match="target gfx942 and not gfx950"):
        store.check(tmp_path, ARCHS["gfx950"])
    made = json.loads((tmp_path / store.MANIFEST).read_text())
    made["triton"] = "3.5.0"
    (tmp_path / store.MANIFEST).write_text(json.dumps(made))
    for refused in (store.check, store.write_manifest, store.use):
        with pytest.raises(KernelError, match=r"another build.*triton 3\.5\.0 and not"):
            refused(tmp_path, arch)
    (tmp_path / store.MANIFEST).write_text("{")
    with pytest.raises(KernelError, match="not valid JSON"):
        store.check(tmp_path, arch)


def test_the_table_of_kernels_and_targets() -> None:
    from fourfold.engine.compile_report import Report, Row, as_json, matrix
    from fourfold.kernels.compile import Compiled
    from fourfold.kernels.variants import Variant

    def report(target: str, *faults: str) -> Report:
        options = (("num_warps", 4), ("num_stages", 1))
        rows = tuple(
            Row(
                "linear=a",
                Compiled(Variant("m", "_product", (), (), (), options), target, 0, error=e),
            )
            for e in faults
        )
        return Report("flash", ARCHS[target], "plan", rows, 0.0)

    reports = [report("sm_90", "", ""), report("gfx942", "", "too large"), report("gfx950")]
    head, line = matrix(reports).splitlines()
    assert head.split() == ["sm_90", "gfx942", "gfx950"]
    assert line.split() == ["linear=a", "_product", "2", "1", "of", "2", "-"]
    assert "too large" in reports[1].summary()
    assert reports[1].table().splitlines()[1].split()[:3] == ["linear=a", "_product", "2"]
    found = json.loads(as_json(reports))
    assert [each["target"] for each in found] == ["sm_90", "gfx942", "gfx950"]
    assert [v["error"] for v in found[1]["variants"]] == [None, "too large"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--geometry", "tiny", "--target", "gfx7"], "no such target; there are sm_80"),
        (["model", "--geometry", "tiny", "--target", "sm_90"], "give either MODEL or --geometry"),
        (["--geometry", "tiny", "--target", "sm_90", "--kernel", "linear=x"], "no such kernel"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["compile", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_plan_without_a_gpu_is_refused() -> None:
    from fourfold.kernels.targets import triton_target

    with pytest.raises(KernelError, match="cpu is no GPU"):
        triton_target(ARCHS["cpu"])
