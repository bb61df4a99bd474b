"""A run in pieces, its files, the checkpoint made of them, and the engine on that checkpoint."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fourfold import LLM
from fourfold.core.config import ModelConfig
from fourfold.core.tensor import QuantTensor
from fourfold.text.generation import read_generation_defaults
from fourfold.text.profiles import ChatProfile, detect_profile
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.layout import FORMATS, checkpoint_layout
from fourfold.weights.loader import load, open_checkpoint
from train import files, parameters
from train.data.encode import Encoder
from train.data.mixture import Mixture
from train.evaluate import Case, answering, evaluate, questions
from train.export import convert, export, numbers_of
from train.forced import forced, on_device, pack
from train.geometry import model_config, nano_config, small_config
from train.run import LOG, WEIGHTS, Options, run
from train.schedule import QUANTISED_FROM, SPARSE_FROM, WARM_UP, Schedule
from train.step import Mode, Trainer
from train.tokenizer import write_tokenizer

CPU = torch.device("cpu")
CONFIG = small_config(vocab_size=400)
SCHEDULE = Schedule(steps=10, tokens=256, short=256, long=(512,))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, 400, 4096, seed=0, texts=4)
    return directory


def options(out: Path, tokenizer: Path, **changes: object) -> Options:
    out.mkdir()
    for file in tokenizer.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    made = Options(
        out,
        CONFIG,
        SCHEDULE,
        minutes=5.0,
        device="cpu",
        dtype=torch.float32,
        workers=0,
        log_every=1,
        check_count=0,
        far=(),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def lines(out: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    return [line for line in found if "total" in line]


@pytest.mark.full
def test_a_run_goes_through_its_schedule_and_goes_on(tmp_path: Path, tokenizer: Path) -> None:
    whole = options(tmp_path / "whole", tokenizer)
    run(whole)
    found = lines(whole.out)
    assert [line["step"] for line in found] == list(range(10))
    assert {(line["length"], line["sparse"], line["quantised"]) for line in found} == {
        (256, False, False),
        (512, False, False),
        (256, True, False),
        (512, True, False),
        (256, True, True),
    }
    assert all(math.isfinite(line["total"]) for line in found)

    first = options(tmp_path / "first", tokenizer, minutes=0.0)
    run(first)
    assert [line["step"] for line in lines(first.out)] == [0]
    again = options(tmp_path / "again", tokenizer, resume=first.out / WEIGHTS, minutes=0.0)
    run(again)
    (line,) = lines(again.out)
    # The same step on the same rows, from weights that were rounded to float16 in between.
    assert line["step"] == 1
    assert abs(line["main"] - found[1]["main"]) < 2e-3
    assert line["rate"] < found[1]["rate"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_seed_is_the_same_run(tmp_path: Path, tokenizer: Path) -> None:
    """To the last bit, with kernels and captured steps, whoever makes the rows."""
    runs = [
        options(tmp_path / f"{n}", tokenizer, device="cuda", dtype=torch.bfloat16, workers=n)
        for n in (0, 2)
    ]
    for each in runs:
        run(each)
    one, other = ([line["total"] for line in lines(each.out)] for each in runs)
    assert one == other
    assert len(one) == SCHEDULE.steps
    first, second = ((each.out / WEIGHTS).read_bytes() for each in runs)
    assert first == second


def test_the_schedule_follows_from_the_step_alone() -> None:
    schedule = Schedule(steps=1000)
    kinds = [schedule.at(n) for n in range(1000)]
    assert not any(kind.mode.sparse for kind in kinds[: int(1000 * SPARSE_FROM)])
    assert all(kind.mode.quantised for kind in kinds[int(1000 * QUANTISED_FROM) :])
    assert {kind.length for kind in kinds} == {2048, 8192, 16384}
    assert all(kind.rows * kind.length <= schedule.tokens for kind in kinds)
    rates = [schedule.rate_at(n, n) for n in range(1000)]
    assert (
        rates[0] < rates[WARM_UP - 1] == schedule.rate == rates[699] > rates[800] > rates[999] > 0
    )
    assert schedule.rate_at(600, 0) == pytest.approx(rates[600] / WARM_UP)


def test_masters_survive_their_file(tmp_path: Path) -> None:
    masters = parameters.initial(model_config(CONFIG), 1, CPU)
    files.save(tmp_path / "w.safetensors", masters, 17)
    found, step = files.read(tmp_path / "w.safetensors", CPU)
    assert step == 17
    assert found.keys() == masters.keys()
    for name, value in masters.items():
        assert found[name].dtype == value.dtype
        assert torch.allclose(found[name].double(), value.double(), atol=1e-6, rtol=1e-3), name


def test_files_are_small_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masters = parameters.initial(model_config(nano_config()), 0, CPU)
    assert files.save(tmp_path / "w.safetensors", masters, 0) <= 16 * 2**20
    layout = checkpoint_layout(model_config(nano_config()), FORMATS["native"])
    # The tokenizer, the index and the rest are a tenth of a megabyte.
    assert layout.file_bytes < 7_900_000
    monkeypatch.setattr(files, "LIMIT", 1000)
    with pytest.raises(ValueError, match="more than 1000"):
        files.save(tmp_path / "w.safetensors", masters, 0)


def test_export_holds_the_masters_as_training_rounded_them(tmp_path: Path, tokenizer: Path) -> None:
    config = model_config(CONFIG)
    masters = parameters.initial(config, 2, CPU)
    export(tmp_path / "native", CONFIG, masters, tokenizer)
    stored = ModelConfig.from_directory(tmp_path / "native").config
    loaded = load(open_checkpoint(tmp_path / "native", stored), "cpu", torch.float32)
    weights = parameters.StepWeights(config, masters, torch.bfloat16)
    weights.refresh(quantised=True)
    for name, value in weights.values.items():
        values = value if isinstance(value, torch.Tensor) else value.value  # type: ignore[union-attr]
        read = loaded[name] if masters[name].dtype == torch.int64 else numbers_of(loaded[name])
        assert torch.equal(values.to(read.dtype), read), name

    profile = detect_profile(tmp_path / "native")
    assert (profile.profile, profile.certain) == (ChatProfile.PREVIEW, True)
    assert read_generation_defaults(tmp_path / "native").temperature == 0

    done = convert(tmp_path / "native", tmp_path / "fp8")
    assert done.changed == 0
    again = ModelConfig.from_directory(tmp_path / "fp8").config
    experts = load(open_checkpoint(tmp_path / "fp8", again), "cpu", torch.float32)
    expert = experts["layers.1.ffn.experts.w2.weight"]
    assert isinstance(expert, QuantTensor)
    assert expert.scheme.name == "fp8_block"
    assert expert.scale.dtype == torch.float32
    with pytest.raises(ValueError, match="must be new or empty"):
        export(tmp_path / "fp8", CONFIG, masters, tokenizer)


@pytest.mark.slow
def test_the_engine_answers_what_was_learned_by_heart(tmp_path: Path, tokenizer: Path) -> None:
    config = model_config(CONFIG)
    trainer = Trainer(config, parameters.initial(config, 0, CPU), torch.float32)
    mixture = Mixture(Encoder(Tokenizer.from_directory(tokenizer)))
    case, count, steps = Case("arithmetic"), 8, 120
    documents = [mixture.encoder.document(item) for item in questions(mixture, case, count)]
    ((rows, _),) = pack(documents, 1024)
    trainer.bias_rate.fill_(1e-3)
    for step in range(steps):
        trainer.lr.fill_(3e-3 * min(1.0, (step + 1) / 10, 2 * (1 - step / steps)))
        quantised = step >= steps // 2
        trainer.step(on_device(rows, CPU), Mode(sparse=quantised, quantised=quantised))
    mode = Mode(sparse=True, quantised=True)
    assert forced(trainer, mixture, [case], count, mode)[case.name] == 1
    masters = {name: value.detach() for name, value in trainer.masters.items()}
    export(tmp_path / "native", CONFIG, masters, tokenizer)
    llm = LLM(tmp_path / "native", device="cpu", max_num_seqs=8)
    assert evaluate(mixture, [case], count, answering(llm)) == {case.name: 1.0}
