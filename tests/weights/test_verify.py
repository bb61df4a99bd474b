"""`verify` names every corruption, raises at none, and finds nothing in a clean checkpoint."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fourfold.core.config import ModelConfig
from fourfold.core.errors import FourfoldError
from fourfold.core.findings import Finding, Severity, exit_status
from fourfold.weights.loader import open_checkpoint
from fourfold.weights.synthetic import write_checkpoint
from fourfold.weights.verify import Verification, verify
from fourfold.weights.verify_deep import deep_check
from tests.weights.corruptions import DATA, HEADERS, INDEX, Copy, Entry
from tests.weights.test_loader import as_transformers
from tests.weights.written import tiny_config, write

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
# Findings that one corruption may make, where it is not two: a name that is wrong on both sides, and
# files whose every tensor is elsewhere.
MOST = {
    "renamed": 4,
    "a namesake of another layer": 5,
    "unknown dtype": 4,
    "size that does not fit": 4,
    "swapped": 220,
    "replaced by its neighbour": 220,
    "tensors of NVFP4": 1,
    "hidden_size": 1,
    "experts": 1,
    "flipped expert_dtype": 1,
    "a layer too few": 1,
    "deleted": 1,
}
FLAVOURS = ("native", "fp8", "bf16", "float32")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each flavour, headers only; the Base's carries copies of embedding and head."""
    root = tmp_path_factory.mktemp("clean")
    for weights in FLAVOURS:
        write_checkpoint(root / weights, "tiny", weights=weights, holes=True)
    return {weights: root / weights for weights in FLAVOURS}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With data; four layers have every kind of layer and router, two are enough of plain ones."""
    root = tmp_path_factory.mktemp("full")
    for weights, layers in zip(FLAVOURS, (4, 4, 2, 2), strict=True):
        write_checkpoint(root / weights, "tiny", layers=layers, weights=weights, seed=3)
    return {weights: root / weights for weights in FLAVOURS}


def serious(findings: tuple[Finding, ...] | list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity is not Severity.NOTE]


def names(finding: Finding, text: str) -> bool:
    if text.startswith("layers."):
        return finding.tensor == text
    return any(text in part for part in (finding.tensor, finding.file, finding.message) if part)


def found_in(folder: Path, deep: bool = False) -> tuple[Verification, list[Finding]]:
    verified = verify(folder)
    findings = list(verified.findings)
    if deep:
        findings += deep_check(verified, hashing=False)[1]
    return verified, findings


# ---- no false alarm


@pytest.mark.parametrize("weights", FLAVOURS)
def test_nothing_is_wrong_with_a_clean_checkpoint(full: dict[str, Path], weights: str) -> None:
    verified, findings = found_in(full[weights], deep=True)
    assert serious(findings) == []
    assert verified.model == verified.config
    schemes = {one.scheme for one in verified.checked.resolution.decisions.values()}
    expected = {"native": {"mxfp4", "fp8_block"}, "fp8": {"fp8_block"}}
    assert schemes == expected.get(weights, {"plain"})


def written_config(folder: Path, **changes: object) -> None:
    data = dataclasses.asdict(tiny_config(**changes))
    data = {k: v for k, v in data.items() if v is not None} | {"model_type": "deepseek_v4"}
    data["compress_ratios"] = [*data["compress_ratios"], *[0] * data["num_nextn_predict_layers"]]
    data["rope_scaling"] = {"type": "yarn", **data["rope_scaling"]}
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize("experts", ["fp4", "fp8", "plain"])
def test_nothing_is_wrong_with_files_of_another_writer(tmp_path: Path, experts: str) -> None:
    """The safetensors library's files, partial blocks everywhere."""
    write(tiny_config(), experts, "plain" if experts == "plain" else "fp8").save(tmp_path)
    written_config(tmp_path)
    assert serious(found_in(tmp_path, deep=True)[1]) == []


def test_nothing_is_wrong_with_transformers_names(tmp_path: Path) -> None:
    """Stacked experts, one file without an index, no MTP layer."""
    written = write(tiny_config(), "plain", "plain", plain=torch.float32)
    safetensors.torch.save_file(as_transformers(written), tmp_path / "model.safetensors")
    written_config(tmp_path, num_nextn_predict_layers=0)
    verified, findings = found_in(tmp_path, deep=True)
    assert serious(findings) == []
    assert verified.model == verified.config


def test_a_dequantised_wo_a_may_leave_its_scale_in_the_index(
    clean: dict[str, Path], tmp_path: Path
) -> None:
    copy = Copy(clean["native"], tmp_path / "c")
    stale = {t: f for t, f in copy.json(INDEX)["weight_map"].items() if t.endswith("wo_a.scale")}

    def plain(header: dict[str, Entry]) -> None:
        for tensor in stale.keys() & header.keys():
            del header[tensor]
            header[tensor.replace("scale", "weight")]["dtype"] = "BF16"

    for file in set(stale.values()):
        copy.rebuild(file, plain)
    copy.index(lambda index: index["weight_map"].update(stale))
    findings = found_in(copy.folder)[1]
    assert serious(findings) == []
    assert {f.tensor for f in findings if "nothing needs it" in f.message} == set(stale)


def as_dspark(copy: Copy) -> str:
    """Three stages instead of the MTP layer; returns their file."""
    file = copy.json(INDEX)["weight_map"]["mtp.0.e_proj.weight"]
    beside = ("e_proj", "h_proj", "enorm", "hnorm", "norm", "hc_head")

    def stages(header: dict[str, Entry]) -> None:
        block = {k[6:]: v for k, v in header.items() if not k[6:].startswith(beside)}
        head = {k[6:]: v for k, v in header.items() if k[6:].startswith(("norm", "hc_head"))}
        header.clear()
        header |= {f"mtp.{n}.{k}": dict(v) for n in range(3) for k, v in block.items()}
        header |= {f"mtp.2.{k}": dict(v) for k, v in head.items()}
        for name, dtype, shape in (
            ("mtp.0.main_proj.weight", "F8_E4M3", [128, 384]),
            ("mtp.0.main_proj.scale", "F8_E8M0", [1, 3]),
            ("mtp.0.main_norm.weight", "BF16", [128]),
            ("mtp.2.markov_head.markov_w1.weight", "BF16", [640, 16]),
            ("mtp.2.markov_head.markov_w2.weight", "BF16", [640, 16]),
            ("mtp.2.confidence_head.proj.weight", "BF16", [1, 144]),
        ):
            header[name] = {"dtype": dtype, "shape": shape}

    copy.rebuild(file, stages)
    copy.config(compress_ratios=[0, 0, 4, 128, 4, 128, 0, 0, 0], dspark_block_size=5)
    return file


def test_dspark_stages_are_left_out_and_checked(clean: dict[str, Path], tmp_path: Path) -> None:
    copy = Copy(clean["native"], tmp_path / "c")
    file = as_dspark(copy)
    assert serious(found_in(copy.folder)[1]) == []
    wrong = {
        "mtp.0.main_norm.weight": lambda h: h.pop("mtp.0.main_norm.weight"),
        "mtp.0.main_proj.weight": lambda h: h.pop("mtp.0.main_proj.scale"),
        "mtp.1.attn.wq_a.weight": lambda h: h["mtp.1.attn.wq_a.weight"].update(shape=[96, 64]),
        "mtp.1.ffn.experts.3.w1.weight": lambda h: h.pop("mtp.1.ffn.experts.3.w1.weight"),
        "mtp.2.confidence_head.proj.weight": lambda h: h[
            "mtp.2.confidence_head.proj.weight"
        ].update(shape=[1, 128]),
        "mtp.2.attn.extra": lambda h: h.update(
            {"mtp.2.attn.extra": {"dtype": "F32", "shape": [2]}}
        ),
    }
    copy.rebuild(file, lambda header: [change(header) for change in wrong.values()] and None)
    bad = serious(found_in(copy.folder)[1])
    assert {f.severity for f in bad} == {Severity.WARNING}
    assert {f.tensor for f in bad} == {*wrong, "mtp.1.ffn.experts.3.w1.scale"}


# ---- corruptions


@pytest.mark.parametrize("name", HEADERS)
def test_every_corruption_is_named(clean: dict[str, Path], tmp_path: Path, name: str) -> None:
    """By tensor or file, with the exit status it deserves, and what is an error does not load. The rest
    of the checkpoint is not blamed."""
    kind, corrupt, status = HEADERS[name]
    copy = Copy(clean[kind], tmp_path / "c")
    needle = corrupt(copy, random.Random(name))
    _, findings = found_in(copy.folder)
    bad = serious(findings)
    assert any(names(finding, needle) for finding in bad), (needle, bad)
    assert exit_status(findings) == status, bad
    assert all(finding.fix for finding in bad), bad
    assert len(bad) <= MOST.get(name, 2), bad
    if status == 1:
        open_checkpoint(copy.folder, ModelConfig.from_directory(copy.folder).config)
        return
    with pytest.raises(FourfoldError):
        open_checkpoint(copy.folder, ModelConfig.from_directory(copy.folder).config)


@pytest.mark.parametrize("name", DATA)
def test_every_corruption_of_data_is_named(
    full: dict[str, Path], tmp_path: Path, name: str
) -> None:
    kind, corrupt, status = DATA[name]
    copy = Copy(full[kind], tmp_path / "c")
    needle = corrupt(copy, random.Random(name))
    assert serious(found_in(copy.folder)[1]) == []  # headers cannot tell
    _, findings = found_in(copy.folder, deep=True)
    bad = serious(findings)
    assert [finding.tensor for finding in bad] == [needle], bad
    assert exit_status(bad) == status
    # The first bad byte, in an item of up to 8.
    assert bad[0].offset is not None
    before, after = ((folder / bad[0].file).read_bytes() for folder in (full[kind], copy.folder))
    first = next(
        at for at, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]
    )
    if status == 2:
        assert bad[0].offset <= first < bad[0].offset + 8


def test_fields_without_a_shape_are_held_against_the_released_model(tmp_path: Path) -> None:
    """And against the reference program's own file, where there is one."""
    write_checkpoint(tmp_path / "c", "flash", layers=1, holes=True)
    copy = Copy(tmp_path / "c", tmp_path / "d")
    data = json.loads((CONFIGS / "flash_reference.json").read_text())
    (copy.folder / "inference").mkdir()
    reference = {**data, "n_layers": 1, "n_hash_layers": 3, "compress_ratios": [0, 0]}
    copy.write_json("inference/config.json", reference)
    verified, findings = found_in(copy.folder)
    assert serious(findings) == []
    assert verified.family == "DeepSeek-V4-Flash, 1 of its 43 layers"
    copy.config(sliding_window=256, compress_rope_theta=10000, swiglu_limit=7.0)
    bad = serious(found_in(copy.folder)[1])
    assert {f.severity for f in bad} == {Severity.WARNING}
    named = sorted((f.file, f.message.split()[0]) for f in bad)
    fields = ("compress_rope_theta", "sliding_window", "swiglu_limit")
    files = ("config.json", "inference/config.json")
    assert named == [(file, field) for file in files for field in fields]


def test_several_corruptions_are_all_named(clean: dict[str, Path], tmp_path: Path) -> None:
    """The search goes on after the first."""
    together = ("renamed", "another FP8", "wrong total_size", "extra file", "hash layers")
    copy = Copy(clean["native"], tmp_path / "c")
    needles = [HEADERS[name][1](copy, random.Random(name)) for name in together]
    needles.append(copy.config(expert_dtype="fp8"))
    bad = serious(found_in(copy.folder)[1])
    for needle in needles:
        assert any(names(finding, needle) for finding in bad), needle


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """A byte changed, some removed, some put in, or the end cut off; mostly in a file's header."""
    head = 8 + int.from_bytes(raw[:8], "little") if rng.random() < 0.9 else len(raw)
    at = rng.randrange(max(1, min(head, len(raw))))
    how = rng.randrange(4)
    if how == 0:
        return raw[:at] + rng.randbytes(1) + raw[at + 1 :]
    if how == 1:
        return raw[:at] + raw[at + rng.randrange(1, 20) :]
    if how == 2:
        words = (b"0", b"9", b'"', b"-1", b"null", b"[]", b"{}", b"1e999", b"true")
        return raw[:at] + rng.choice(words) + raw[at:]
    return raw[: rng.randrange(len(raw) or 1)]


def test_no_damage_makes_it_raise_or_pass_what_does_not_load(
    clean: dict[str, Path], tmp_path: Path
) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        copy = Copy(clean["native"], tmp_path / str(seed))
        names = ["config.json", INDEX, *copy.shards()]
        for name in rng.sample(names, rng.choice([1, 1, 3])):
            copy.write(name, damaged((copy.folder / name).read_bytes(), rng))
        findings = found_in(copy.folder)[1]
        loads = True
        try:
            open_checkpoint(copy.folder, ModelConfig.from_directory(copy.folder).config)
        except FourfoldError:
            loads = False
        assert loads or exit_status(findings) == 2, (seed, findings)


def test_holes_are_data_that_never_arrived(clean: dict[str, Path]) -> None:
    bad = serious(found_in(clean["bf16"], deep=True)[1])
    assert {f.severity for f in bad} == {Severity.WARNING}
    assert any(f.tensor == "embed.weight" and "never arrived" in f.message for f in bad)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "files", "tensors", "size", "family"),
    [
        ("flash", 46, 69_187, 159_609_485_896, "DeepSeek-V4-Flash, preview"),
        ("flash-base", 46, 69_189, 294_673_469_000, "DeepSeek-V4-Flash-Base"),
        ("pro", 64, 145_116, 864_704_792_696, "DeepSeek-V4-Pro, preview"),
    ],
)
def test_a_whole_checkpoint_is_judged_within_ten_seconds(
    tmp_path: Path, geometry: str, files: int, tensors: int, size: int, family: str
) -> None:
    """Counts and bytes are the published ones; one wrong byte of a header among them is found."""
    write_checkpoint(tmp_path / "c", geometry, holes=True)
    began = time.process_time()
    verified = verify(tmp_path / "c")
    seconds = time.process_time() - began
    assert serious(verified.findings) == []
    assert verified.family.startswith(family)
    assert (len(verified.files.files), verified.num_tensors, verified.files.nbytes) == (
        files,
        tensors,
        size,
    )
    assert seconds < 10
    name = "layers.7.ffn.experts.200.w2.weight"
    file = verified.files.headers[name].file
    with (tmp_path / "c" / file).open("r+b") as shard:
        at = shard.read(1 << 20).index(f'"{name}"'.encode())
        shard.seek(at + 1)
        shard.write(b"L")
    bad = serious(verify(tmp_path / "c").findings)
    assert {f.tensor for f in bad} == {name, "L" + name[1:], name.replace("weight", "scale")}
