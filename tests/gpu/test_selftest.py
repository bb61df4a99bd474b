"""On a GPU: a quick selftest passes, and what is explained is what runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fourfold.core.config import EngineConfig
from fourfold.core.device import detect
from fourfold.engine.explain import explain_model, model_of_geometry, target_device
from fourfold.engine.loading import random_model
from fourfold.engine.selftest.models import make_subject, model_config
from fourfold.engine.selftest.run import run_selftest
from fourfold.engine.verdicts import Verdicts
from fourfold.ops.registry import BODY
from fourfold.weights.layout import FORMATS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_quick_selftest_passes() -> None:
    report = run_selftest(detect("cuda"), quick=True)
    assert not report.failures, report.table()
    assert report.failed_kernels == {}
    assert any(c["kernel"] != BODY for c in report.explanation["kernels"])


def test_here_it_runs_in_bfloat16_with_equal_bits() -> None:
    subject = make_subject("native", detect("cuda"), Verdicts())
    holds = explain_model(model_of_geometry("flash"), detect("cuda"), EngineConfig("m"))
    assert subject.exact is holds["bit_equality"]["holds"]


def test_what_is_explained_for_this_gpu_by_name_is_what_its_engine_chooses() -> None:
    config = model_config("native", wide=True)
    device, engine = detect("cuda"), EngineConfig("m")
    loaded = random_model(config, FORMATS["native"], engine, device)
    for target in (None, device.arch.name):
        told = explain_model(model_of_geometry("flash"), target_device(target), engine)
        chosen = [(c.op, c.kernel, c.reason) for c in loaded.kernel_plan.choices]
        assert [(c["op"], c["kernel"], c["reason"]) for c in told["kernels"]] == chosen
