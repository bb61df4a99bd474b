"""Op bodies and the whole model on a GPU against the CPU. Needs pytest, torch and a GPU alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.core.config import EngineConfig
from fourfold.core.device import detect
from fourfold.core.request import Request, SamplingParams
from fourfold.engine.engine import Engine
from fourfold.engine.loading import load_model
from fourfold.engine.oneshot import one_shot
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import CaseMaker, KernelPlan, Op
from fourfold.weights.loader import load, open_checkpoint
from fourfold.weights.locate import locate
from fourfold.weights.synthetic import write_checkpoint
from tests.ops.test_definitions import tensors
from tests.support import build, prompts, write_small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
BODIES = KernelPlan.bodies(OPS)


def run(op: Op, dtype: torch.dtype, device: str) -> dict[str, list[Tensor]]:
    results = {}
    for case in op.cases(CaseMaker.seeded(dtype, device)):
        arguments: dict[str, Any] = copy.deepcopy(dict(case.arguments))
        out = getattr(BODIES, op.name)(**arguments)
        kept = tensors([arguments[w] for w in op.writes] if op.writes else out)
        results[case.name] = [t.cpu() for t in kept]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_body_on_gpu_equals_body_on_cpu(op: Op, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    here, there = run(op, dtype, "cpu"), run(op, dtype, "cuda")
    for name in here:
        for a, b in zip(here[name], there[name], strict=True):
            assert a.shape == b.shape, name
            if not a.numel():
                continue
            if a.dtype.is_floating_point:
                good = torch.isfinite(a)
                bound = op.tolerance.of(dtype) * float(a[good].abs().max()) if good.any() else 0.0
                assert float((a - b)[good].abs().max()) <= bound, name
            else:
                assert float((a != b).float().mean()) < 0.02, name


@pytest.mark.parametrize("weights", ["float32", "native", "fp8"])
@torch.inference_mode()
def test_model_on_gpu_equals_model_on_cpu(weights: str, tmp_path: Path) -> None:
    directory = write_small(tmp_path / "c", weights, seed=1)
    from fourfold.core.config import ModelConfig

    config = ModelConfig.from_directory(directory).config
    plan, tokens = open_checkpoint(directory, config), prompts(192, (140, 9), 1)
    quantise = False  # one flipped code would grow through the layers
    logits = [
        one_shot(
            build(config, load(plan, d, torch.float64, activation_quantization=quantise)), tokens
        ).logits.cpu()
        for d in ("cpu", "cuda")
    ]
    assert float((logits[0] - logits[1]).abs().max()) < 1e-9


def test_generation_on_gpu_gives_the_tokens_of_the_cpu(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", "tiny", weights="float32")
    answers = []
    for device in ("cpu", "cuda"):
        config = EngineConfig(
            model=str(tmp_path / "tiny"), dtype="float64", max_num_seqs=4, max_model_len=512
        )
        engine = Engine(load_model(locate(config.model), config, detect(device)), config)
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        for n, prompt in enumerate(prompts(600, (5, 150, 33), 2)):
            engine.add(Request(str(n), tuple(prompt), params))
        tokens: dict[str, list[int]] = {}
        for output in engine.run():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
        answers.append(tokens)
    assert answers[0] == answers[1]
