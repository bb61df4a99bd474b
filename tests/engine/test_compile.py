"""Ahead-of-time compilation: nothing is left to compile later, and a store belongs to one build."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fourfold.cli import main
from fourfold.core.config import EngineConfig
from fourfold.core.device import ARCHS
from fourfold.core.errors import KernelError
from fourfold.core.tensor import QuantTensor
from fourfold.engine.compile import (
    Collector,
    steps,
    subject_of_checkpoint,
    subject_of_geometry,
    token_counts,
)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--geometry", "tiny", "--target", "gfx7"], "no such target; there are sm_80"),
        (["--target", "sm_90"], "give either MODEL or --geometry"),
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
