"""Synthetic checkpoints have the released sizes to the byte, sane contents, and equal bytes for
equal seeds."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fourfold.core.config import ModelConfig
from fourfold.core.errors import CapacityError, CheckpointError, ConfigError
from fourfold.core.parameters import Role, Storage, parameters
from fourfold.core.tensor import QuantTensor
from fourfold.ops.quantize import canonical_fp8, fp4_as_fp8
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4
from fourfold.weights.geometry import GEOMETRIES, config_json, with_storage
from fourfold.weights.index import read_index
from fourfold.weights.layout import FORMATS, CheckpointLayout, WeightFormat, checkpoint_layout
from fourfold.weights.random_values import distribution, tensor_bytes
from fourfold.weights.safetensors_writer import Entry, arrange, write_file
from fourfold.weights.synthetic import write_checkpoint, write_model

pytestmark = pytest.mark.full


def config_of(geometry: str, layers: int | None = None) -> ModelConfig:
    data = with_storage(config_json(geometry, layers), "bfloat16", None, False)
    return ModelConfig.from_dict(data, geometry).config


def layout_of(geometry: str, weights: str, duplicates: bool = False) -> CheckpointLayout:
    return checkpoint_layout(config_of(geometry), FORMATS[weights], duplicates)


def dtype_counts(layout: CheckpointLayout) -> dict[str, int]:
    return dict(Counter(tensor.dtype for tensor in layout.tensors()))


def read(directory: Path, name: str) -> torch.Tensor:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    with safe_open(directory / index["weight_map"][name], "pt") as file:
        return file.get_tensor(name)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    for weights in FORMATS:
        write_checkpoint(root / weights, "tiny", weights=weights, seed=7)
    return {weights: root / weights for weights in FORMATS}


# ---- sizes of the released checkpoints


def test_flash_has_the_released_inventory() -> None:
    layout = layout_of("flash", "native")
    assert len(layout.files) == 46
    assert layout.total_size == 159_609_485_896
    assert layout.file_bytes == 159_617_149_040
    counts = {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792}
    assert dtype_counts(layout) == counts
    assert sum(counts.values()) == 69_187 == len(layout.weight_map())


def test_flash_files_have_the_released_sizes() -> None:
    files = list(layout_of("flash", "native").files.items())
    assert files[0][0] == "model-00001-of-00046.safetensors"
    sizes = [(layout.payload_bytes, layout.file_bytes) for _, layout in files]
    assert sizes[0] == (1_059_061_760, 1_059_061_856)
    assert sizes[1] == sizes[2] == (3_566_148_952, 3_566_321_192)
    assert sizes[3] == (3_596_055_640, 3_596_229_272)
    for layer in range(3, 43):
        csa = layer % 2 == 0
        payload = 3_589_851_224 if csa else 3_568_596_312
        one_digit, two_digits = (3_590_024_776, 3_590_026_352)
        if not csa:
            one_digit, two_digits = (3_568_768_976, 3_568_770_544)
        assert sizes[layer + 1] == (payload, one_digit if layer < 10 else two_digits)
    assert sizes[44] == (1_059_332_116, 1_059_332_516)
    assert sizes[45] == (3_593_787_756, 3_593_956_092)
    per_layer = [len(layout.entries) for _, layout in files]
    assert per_layer[:5] == [1, 1565, 1565, 1576, 1569]
    assert per_layer[-2:] == [5, 1575]


def test_pro_has_the_released_inventory() -> None:
    layout = layout_of("pro", "native")
    assert len(layout.files) == 64
    assert layout.total_size == 864_704_792_696
    assert layout.file_bytes == 864_721_029_744
    counts = {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71_952, "I64": 3, "I8": 71_424}
    assert dtype_counts(layout) == counts
    assert sum(counts.values()) == 145_116
    payload = [file.payload_bytes for file in layout.files.values()]
    assert payload[0] == 1_853_358_080
    assert payload[1] == payload[2] == 13_874_466_328
    assert payload[3] == 13_909_746_200
    assert set(payload[4:62:2]) == {13_868_262_424}
    assert set(payload[5:62:2]) == {13_903_542_296}
    assert payload[62:] == [1_853_831_188, 13_956_587_692]


def test_flash_base_has_the_reported_size() -> None:
    layout = layout_of("flash-base", "fp8", duplicates=True)
    assert f"{layout.file_bytes / 2**30:.2f}" == "274.44"
    main = {name: file for name, file in layout.weight_map().items() if not name.startswith("mtp.")}
    assert (len(main), len(set(main.values()))) == (67_612, 45)
    assert set(dtype_counts(layout)) == {"BF16", "F32", "F8_E4M3", "I64"}
    scales = [t for t in layout.tensors() if t.name.endswith(".scale")]
    assert {t.dtype for t in scales} == {"F32"}
    (w2,) = [t for t in scales if t.name == "layers.0.ffn.experts.255.w2.scale"]
    assert w2.shape == (32, 16)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_cut_geometry_keeps_its_first_layers(geometry: str) -> None:
    whole, cut = config_json(geometry), config_json(geometry, 4)
    assert cut["compress_ratios"] == [*whole["compress_ratios"][:4], 0]
    assert set(cut) == set(whole)
    config = config_of(geometry, 4)
    names = {tensor.name for tensor in checkpoint_layout(config, FORMATS["bf16"]).tensors()}
    assert any(name.startswith("layers.3.") for name in names)
    assert not any(name.startswith("layers.4.") for name in names)
    assert "mtp.0.e_proj.weight" in names


# ---- files


def test_holes_write_full_flash_at_once(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    with probe.open("wb") as file:
        file.truncate(1 << 30)
    if probe.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")
    layout = write_checkpoint(tmp_path / "flash", "flash", holes=True)
    on_disk = {p.name: p.stat() for p in (tmp_path / "flash").glob("*.safetensors")}
    assert {name: s.st_size for name, s in on_disk.items()} == {
        name: file.file_bytes for name, file in layout.files.items()
    }
    assert sum(s.st_blocks * 512 for s in on_disk.values()) < 64 << 20
    index = read_index(tmp_path / "flash")
    assert len(index.headers) == 69_187
    assert index.nbytes == 159_609_485_896
    with safe_open(tmp_path / "flash" / "model-00002-of-00046.safetensors", "pt") as file:
        codes = file.get_slice("layers.0.ffn.experts.0.w1.weight")
        assert codes.get_shape() == [2048, 2048]
        assert not codes[:4].any()


@pytest.mark.parametrize("weights", FORMATS)
def test_tiny_reads_back_as_laid_out(tiny: dict[str, Path], weights: str) -> None:
    directory = tiny[weights]
    reading = ModelConfig.from_directory(directory)
    assert reading.unknown_keys == ()
    layout = checkpoint_layout(reading.config, FORMATS[weights])
    index = read_index(directory)
    assert index.nbytes == layout.total_size
    for name, file in layout.files.items():
        raw = (directory / name).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        assert length % 8 == 0
        assert "__metadata__" not in header
        assert len(raw) == file.file_bytes
        assert list(header) == [entry.name for entry in file.entries]
    for tensor in layout.tensors():
        found = index.headers[tensor.name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)


def test_storage_keys_follow_the_weights(tiny: dict[str, Path]) -> None:
    found = {w: ModelConfig.from_directory(path).config for w, path in tiny.items()}
    said = {w: (c.torch_dtype, c.expert_dtype) for w, c in found.items()}
    assert said == {
        "native": ("bfloat16", "fp4"),
        "fp8": ("bfloat16", "fp8"),
        "bf16": ("bfloat16", None),
        "float32": ("float32", None),
    }
    assert [c.quantization_config is None for c in found.values()] == [False, False, True, True]
    kinds = {found["native"].layer_kind(layer) for layer in range(6)}
    assert kinds == {"SWA", "CSA", "HCA"}
    assert 0 < found["native"].num_hash_layers < 6
    assert sum(p.stat().st_size for p in tiny["native"].iterdir()) < 8 << 20


def test_dtypes_of_the_float32_format() -> None:
    layout = layout_of("tiny", "float32")
    assert {t.dtype for t in layout.tensors() if t.spec.storage is not Storage.INTEGER} == {"F32"}


def test_equal_seeds_give_equal_bytes(tiny: dict[str, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "again", "tiny", weights="native", seed=7)
    write_checkpoint(tmp_path / "other", "tiny", weights="native", seed=8)
    first, again, other = map(bytes_of, (tiny["native"], tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {
        name for name in first if name.endswith(".safetensors")
    }


def test_contents_do_not_depend_on_the_number_of_layers(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "cut", "tiny", layers=3, weights="native", seed=7)
    for number in (1, 2, 3, 4):
        whole = tiny["native"] / f"model-0000{number}-of-00009.safetensors"
        cut = tmp_path / "cut" / f"model-0000{number}-of-00006.safetensors"
        assert whole.read_bytes() == cut.read_bytes()


def test_large_tensors_come_in_small_pieces() -> None:
    config = config_of("flash", 1)
    layout = checkpoint_layout(config, FORMATS["native"])
    wanted = {"embed.weight", "layers.0.ffn.gate.tid2eid", "layers.0.attn.wq_b.weight"}
    for tensor in layout.tensors():
        if tensor.name in wanted:
            piece = next(tensor_bytes(tensor, 0, config.n_routed_experts))
            assert 0 < piece.nbytes <= 32 << 20


# ---- contents


def quantised(directory: Path, name: str, scheme: str) -> QuantTensor:
    codes = read(directory, f"{name}.weight").view(torch.uint8)
    scale = read(directory, f"{name}.scale")
    if scale.dtype != torch.float32:
        scale = scale.view(torch.uint8)
    if scheme == "mxfp4":
        return QuantTensor(codes, scale, MXFP4, (codes.shape[0], codes.shape[1] * 2))
    return QuantTensor(canonical_fp8(codes), scale, FP8_BLOCK, tuple(codes.shape))


@pytest.mark.parametrize("weights", ["native", "fp8"])
def test_quantised_matrices_have_the_amplitude_of_plain_ones(
    tiny: dict[str, Path], weights: str
) -> None:
    config = ModelConfig.from_directory(tiny[weights]).config
    ratios = []
    for spec in parameters(config):
        if spec.storage not in (Storage.LINEAR, Storage.EXPERT):
            continue
        scheme = "mxfp4" if weights == "native" and spec.storage is Storage.EXPERT else "fp8"
        name = spec.checkpoint_names[-1].removesuffix(".weight")
        weight = quantised(tiny[weights], name, scheme)
        weight.scheme.validate(weight.codes, weight.scale, name)
        ratios.append(float(weight.dequantize(torch.float32).std()) / distribution(spec)[1])
    # A small matrix has one FP8 block, whose own scale is up to two binades from the middle.
    assert all(1 / 6 < ratio < 6 for ratio in ratios)
    assert 0.7 < float(np.exp(np.mean(np.log(ratios)))) < 1.4


def test_fp4_groups_vary_and_some_strips_do_not_fit_one_fp8_scale(tiny: dict[str, Path]) -> None:
    all_exact = []
    for expert in range(8):
        weight = quantised(tiny["native"], f"layers.3.ffn.experts.{expert}.w1", "mxfp4")
        spread = weight.scale.to(torch.int32) - int(weight.scale.to(torch.int32).median())
        assert spread.max() == 3
        assert spread.min() <= -12
        nibbles = torch.cat([weight.codes & 0xF, weight.codes >> 4])
        assert set(nibbles.unique().tolist()) == set(range(16))
        all_exact.append(fp4_as_fp8(weight.codes, weight.scale)[2])
    share = torch.cat(all_exact).float().mean()
    assert 0.95 < share < 1


def test_fp8_codes_cover_the_range_and_hold_negative_zeros(tiny: dict[str, Path]) -> None:
    codes = read(tiny["native"], "layers.3.attn.wq_b.weight").view(torch.uint8)
    present = set(codes.unique().tolist())
    assert {0x00, 0x80, 0x7E, 0xFE} <= present
    assert not {0x7F, 0xFF} & present
    scale = read(tiny["fp8"], "layers.3.attn.wq_b.scale")
    assert scale.dtype == torch.float32
    assert bool((torch.frexp(scale)[0] == 0.5).all())
    assert len(scale.unique()) > 1


def test_bfloat16_is_float32_rounded(tiny: dict[str, Path]) -> None:
    names = ("embed.weight", "layers.4.attn.compressor.wkv.weight", "mtp.0.norm.weight")
    for name in (*names, "layers.2.ffn.experts.3.w2.weight"):
        wide, narrow = read(tiny["float32"], name), read(tiny["bf16"], name)
        assert torch.equal(wide.to(torch.bfloat16), narrow)
    assert torch.equal(
        read(tiny["float32"], "layers.4.attn.attn_sink"),
        read(tiny["native"], "layers.4.attn.attn_sink"),
    )


def test_plain_values_have_their_distribution(tiny: dict[str, Path]) -> None:
    for spec in parameters(config_of("tiny")):
        if spec.numel < 1000 or spec.role is Role.TID2EID:
            continue
        values = read(tiny["float32"], spec.checkpoint_names[0])
        mean, deviation = distribution(spec)
        assert abs(float(values.mean()) - mean) < 0.2 * deviation, spec.name
        assert 0.8 < float(values.std()) / deviation < 1.2, spec.name


def test_hash_routes_are_distinct_and_even(tiny: dict[str, Path]) -> None:
    first, second = (read(tiny["native"], f"layers.{layer}.ffn.gate.tid2eid") for layer in range(2))
    assert first.dtype == torch.int64
    assert first.shape == (640, 3)
    assert not torch.equal(first, second)
    assert all(len(set(row)) == 3 for row in first.tolist())
    for slot in range(3):
        counts = torch.bincount(first[:, slot], minlength=8)
        assert len(counts) == 8
        assert 40 < int(counts.min()) <= int(counts.max()) < 120


def test_the_base_repeats_embedding_and_head(tmp_path: Path) -> None:
    write_model(tmp_path / "base", config_json("tiny", 1), "fp8", mtp_duplicates=True)
    copy = read(tmp_path / "base", "mtp.0.emb.tok_emb.weight")
    assert torch.equal(copy, read(tmp_path / "base", "embed.weight"))
    copy = read(tmp_path / "base", "mtp.0.head.weight")
    assert torch.equal(copy, read(tmp_path / "base", "head.weight"))


def test_a_format_can_leave_roles_plain(tmp_path: Path) -> None:
    plain_wo_a = WeightFormat(linear=FP8_BLOCK, expert=FP8_BLOCK, plain=frozenset({Role.WO_A}))
    layout = write_model(tmp_path / "x", config_json("tiny", 1), plain_wo_a)
    stored = {tensor.name: tensor.dtype for tensor in layout.tensors()}
    assert stored["layers.0.attn.wo_a.weight"] == "BF16"
    assert "layers.0.attn.wo_a.scale" not in stored
    assert stored["layers.0.attn.wo_b.scale"] == "F8_E8M0"
    assert stored["layers.0.ffn.experts.0.w1.weight"] == "F8_E4M3"


def test_transformers_loads_the_float32_checkpoint(tiny: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    model, report = transformers.DeepseekV4ForCausalLM.from_pretrained(
        tiny["float32"], output_loading_info=True
    )
    unexpected = {k for k in report["unexpected_keys"] if not k.startswith("mtp.")}
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not unexpected
    assert model.dtype == torch.float32
    seen: dict[str, float] = {}
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda _, __, out, layer=layer: seen.update({f"streams {layer}": float(out.std())})
        )
        block.mlp.shared_experts.gate_proj.register_forward_hook(
            lambda _, __, out: seen.update(gate=max(seen.get("gate", 0), float(out.max())))
        )
    with torch.no_grad():
        logits = model(torch.arange(96)[None] * 5 % 636).logits
    assert bool(torch.isfinite(logits).all())
    assert 0.5 < float(logits.std()) < 5
    assert seen.pop("gate") > 10, "the SwiGLU limit is never reached"
    assert all(0.3 < size < 30 for size in seen.values()), seen


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"geometry": "huge"}, ["geometry", "'huge'", "flash-base"]),
        ({"layers": 0}, ["layers", "1 to 6", "found 0"]),
        ({"layers": 7}, ["layers", "1 to 6", "found 7"]),
        ({"weights": "int4"}, ["weights", "'int4'", "native"]),
        ({"seed": -1}, ["seed", "-1"]),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, arguments: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        write_checkpoint(tmp_path / "x", **({"geometry": "tiny"} | arguments))
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "weights", "words"),
    [
        ({"moe_intermediate_size": 40}, "native", ["experts.w2", "multiple of 32", "40"]),
        ({"vocab_size": 200}, "bf16", ["vocab_size 200", "279"]),
        ({"compress_ratios": [0, 0, 4, 128, 4, 128, 0, 0, 0]}, "bf16", ["DSpark"]),
        ({"o_groups": 3}, "bf16", ["num_attention_heads", "o_groups (3)"]),
    ],
)
def test_bad_configs_are_named(
    tmp_path: Path, change: dict[str, object], weights: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        write_model(tmp_path / "x", config_json("tiny") | change, weights)
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "x").exists()


def test_a_small_vocabulary_needs_no_tokenizer(tmp_path: Path) -> None:
    config = config_json("tiny", 1) | {"vocab_size": 50}
    write_model(tmp_path / "x", config, "float32", tokenizer=False)
    assert not (tmp_path / "x" / "tokenizer.json").exists()
    assert read(tmp_path / "x", "head.weight").shape == (50, 128)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match=r"new or empty, but holds mine\.txt"):
        write_checkpoint(tmp_path, "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        write_checkpoint(tmp_path / "file", "tiny")


def test_a_full_disk_is_seen_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CapacityError, match=r"needs 6,\d+,\d+ bytes, but .* room for 1,000"):
        write_checkpoint(tmp_path / "x", "tiny")
    write_checkpoint(tmp_path / "holes", "tiny", holes=True)


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    layout = write_checkpoint(
        tmp_path / "x", "tiny", layers=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (layout.total_size, layout.total_size)


def test_data_of_the_wrong_length_is_a_defect(tmp_path: Path) -> None:
    layout = arrange([Entry("a", "F32", (2, 3))])
    short = np.zeros(5, np.float32)
    with pytest.raises(ValueError, match="a needs 24 bytes, got 20"):
        write_file(tmp_path / "x", layout, lambda entry: [short.data], lambda count: None)
