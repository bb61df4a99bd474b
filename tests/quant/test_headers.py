"""What dtypes and shapes prove: schemes recognised, and the others refused by name."""

import pytest

from fourfold.core.errors import QuantizationError
from fourfold.quant.resolve import resolve
from tests.quant.stored import (
    FP8,
    Headers,
    Store,
    checkpoint,
    experts,
    fp4,
    fp8,
    fp8_f32,
    header,
    plain,
    small,
)


def test_stacked_experts_are_found_under_the_parameters_own_name() -> None:
    config = small()
    headers = {
        name: one
        for name, one in checkpoint(config, plain, plain).items()
        if ".experts." not in name
    }
    for prefix in ("layers.0.", "layers.1.", "layers.2.", "mtp.0."):
        headers |= header(f"{prefix}ffn.experts.gate_up_proj", "F8_E4M3", 3, 768, 256)
        headers |= header(f"{prefix}ffn.experts.gate_up_proj_scale_inv", "F32", 3, 6, 2)
        headers |= header(f"{prefix}ffn.experts.down_proj", "F8_E4M3", 3, 256, 384)
        headers |= header(f"{prefix}ffn.experts.down_proj_scale_inv", "F32", 3, 2, 3)

    def native(name: str) -> tuple[str, ...]:
        stem, _, leaf = name.rpartition(".")
        stacks = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
        return tuple(f"{stem}.{one}.weight" for one in stacks.get(leaf, ())) or (name,)

    assert experts(resolve(config, headers, native=native), config) == {("fp8_block", "f32")}


@pytest.mark.parametrize("dtype", ["I8", "U8", "F4"])
def test_fp4_is_recognised_under_all_its_dtypes(dtype: str) -> None:
    config = small("fp4", FP8)
    headers = checkpoint(config, lambda name, o, i: fp4(name, o, i, dtype))
    assert experts(resolve(config, headers), config) == {("mxfp4", "e8m0")}


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8"])
def test_scales_are_found_under_their_other_names(leaf: str, dtype: str) -> None:
    def store(name: str, rows: int, columns: int) -> Headers:
        stem = name.removesuffix("weight")
        return header(name, "U8", rows, columns // 2) | header(
            stem + leaf, dtype, rows, columns // 32
        )

    config = small("fp4", FP8)
    assert experts(resolve(config, checkpoint(config, store)), config) == {("mxfp4", "e8m0")}


TARGET = "layers.1.ffn.experts.2.w1"
W = f"{TARGET}.weight"


def target(tensors: str, file: str = "model.safetensors") -> Headers:
    """Headers of one expert's matrix from "leaf dtype shape, leaf dtype shape …"."""
    headers: Headers = {}
    for tensor in tensors.split(", "):
        leaf, dtype, *shape = tensor.split()
        headers |= header(f"{TARGET}.{leaf}", dtype, *map(int, shape), file=file)
    return headers


@pytest.mark.parametrize(
    ("tensors", "scheme"),
    [
        # NVFP4 in its three dialects
        ("weight U8 384 128, weight_scale F8_E4M3 384 16, weight_scale_2 F32", "NVFP4"),
        ("weight U8 384 128, weight_scale F8_E4M3 384 16, input_scale F32", "NVFP4"),
        (
            "weight_packed U8 384 128, weight_scale F8_E4M3 384 16, weight_global_scale F32 1",
            "NVFP4",
        ),
        # other groups and scales of FP4
        ("weight I8 384 128, scale F8_E8M0 384 2", "FP4 in groups of 128"),
        ("weight I8 384 128, scale F8_E8M0 384 16", "FP4 in groups of 16"),
        ("weight I8 384 128, scale F32 384 8", "packed 4-bit codes with F32 scales for 32 inputs"),
        (
            "weight I8 384 128, scale F8_E8M0 8 384",
            "packed 4-bit codes with scales of shape [8, 384]",
        ),
        (
            "weight_packed U8 384 128, weight_scale U8 384 8",
            "weight_packed codes of compressed-tensors",
        ),
        # integers
        ("weight_packed I32 384 32, weight_scale BF16 384 2, weight_shape I64 2", "W4A16"),
        ("weight_packed I32 384 64, weight_scale BF16 384 2", "W8A16"),
        ("qweight I32 32 384, qzeros I32 2 48, scales F16 2 384", "GPTQ or AWQ"),
        ("weight I8 384 256, weight_scale F32 384 1", "8-bit integers (W8A8)"),
        (
            "weight I8 384 256, weight_scale F32 384 1, weight_offset F32 384 1",
            "integers with offsets (W8A8 or W4A8)",
        ),
        (
            "weight I8 384 128, weight_scale F32 384 1, weight_offset F32 384 1",
            "integers with offsets (W8A8 or W4A8)",
        ),
        # other granularities of FP8
        ("weight F8_E4M3 384 256, weight_scale F32", "FP8 per tensor"),
        ("weight F8_E4M3 384 256, weight_scale F32 1", "FP8 per tensor"),
        (
            "weight F8_E4M3 384 256, weight_scale F32, input_scale F32",
            "FP8 with static activation scales",
        ),
        ("weight F8_E4M3 384 256, weight_scale F32 384 1", "FP8 per channel"),
        ("weight F8_E4M3 384 256, weight_scale F32 384", "FP8 per channel"),
        ("weight F8_E4M3 384 256, weight_scale U8 384 8", "MXFP8 (groups of 32)"),
        ("weight F8_E4M3 384 256, weight_scale F32 384 2", "FP8 in groups of 128"),
        ("weight F8_E4M3 384 256, scale F32 6 4", "FP8 in blocks of 64×64"),
        ("weight F8_E4M3 384 256, scale BF16 3 2", "FP8 E4M3 with BF16 scales"),
        ("weight F8_E5M2 384 256, scale F32 3 2", "F8_E5M2 storage"),
        ("weight BOOL 384 256", "BOOL storage"),
    ],
)  # fmt: skip
def test_other_schemes_are_recognised_and_refused_by_name(tensors: str, scheme: str) -> None:
    config = small(None, None)
    headers = checkpoint(config, special={W: lambda *_: {}})
    headers |= target(tensors, "model-00003.safetensors")
    for override in ("auto", "fp4", "fp8"):
        with pytest.raises(QuantizationError) as caught:
            resolve(config, headers, override)
        text = str(caught.value)
        assert scheme in text
        assert text.startswith(f"{TARGET}.")
        assert "model-00003.safetensors" in text
        assert "supported are plain weights" in text


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ("weight F8_E4M3 384 256", f"is FP8 E4M3 without a scale ({TARGET}.scale)"),
        ("weight I8 384 128", f"is packed FP4 without a scale ({TARGET}.scale)"),
        ("weight BF16 384 256, scale F32 3 2", "is not quantised, yet"),
        ("weight I8 384 64, scale F8_E8M0 384 8", "should have 128 columns"),
        ("weight F8_E4M3 384 256, scale F32 3 2, weight_scale F32 3 2", "has two scales"),
        ("weight BF16 384", "a tensor that is no matrix"),
    ],
)  # fmt: skip
def test_half_a_quantised_weight_is_refused(tensors: str, expected: str) -> None:
    config = small(None, None)
    headers = checkpoint(config, special={W: lambda *_: {}})
    headers |= target(tensors)
    with pytest.raises(QuantizationError) as caught:
        resolve(config, headers)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(W)


@pytest.mark.parametrize("name", ["layers.1.ffn.experts.2.w1", "layers.1.ffn.experts.0.w3"])
@pytest.mark.parametrize("store", [fp8, fp8_f32, plain])
def test_one_expert_in_another_format_is_refused(name: str, store: Store) -> None:
    config = small(None, FP8)
    headers = checkpoint(config, special={f"{name}.weight": store})
    with pytest.raises(QuantizationError) as caught:
        resolve(config, headers)
    text = str(caught.value)
    assert "the routed experts of layers.1 are stored in two formats" in text
    assert "layers.1.ffn.experts.0.w1.weight is I8" in text
    assert f"{name}.weight is" in text


def test_two_scale_formats_in_one_layers_experts_are_refused() -> None:
    config = small("fp8", FP8)
    headers = checkpoint(config, fp8, fp8, {"layers.0.ffn.experts.1.w2.weight": fp8_f32})
    with pytest.raises(QuantizationError, match=r"fp8_block with e8m0 scales.*with f32 scales"):
        resolve(config, headers)
