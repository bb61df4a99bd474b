"""Cached rows byte by byte: sizes, places, rounding."""

from __future__ import annotations

import struct

import pytest
import torch

from fourfold.core.row_format import RowFormat, RowKind
from fourfold.core.rows import RowPages
from fourfold.ops.quantize import decode_fp8
from fourfold.ops.rows import encode_rows, index_round, read_rows, store_rows

MAIN = RowFormat(RowKind.FP8_GROUPS, 512, 64)
INDEXER = RowFormat(RowKind.FP8_WHOLE, 128, 64)
CPU = torch.device("cpu")


def test_sizes_of_the_released_geometry() -> None:
    assert (MAIN.data_bytes, MAIN.scale_bytes, MAIN.row_bytes) == (576, 8, 584)
    assert (INDEXER.data_bytes, INDEXER.scale_bytes, INDEXER.row_bytes) == (128, 4, 132)
    assert [MAIN.page_bytes(n) for n in (64, 2, 256)] == [37_440, 1_728, 149_760]
    assert INDEXER.page_bytes(64) == 8_448
    assert RowFormat(RowKind.PLAIN, 512, 64).row_bytes == 1_024


@pytest.mark.parametrize(
    ("nope", "rope", "bytes_"), [(64, 8, 88), (65, 2, 77), (512, 64, 648), (520, 0, 536)]
)
def test_general_row_size(nope: int, rope: int, bytes_: int) -> None:
    groups = -(-nope // 64)
    assert RowFormat(RowKind.FP8_GROUPS, nope + rope, rope).row_bytes == bytes_
    assert bytes_ == nope + 2 * rope + 8 * -(-groups // 8)


def test_main_page_is_split_by_field_at_these_byte_offsets() -> None:
    rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 3
    rows[5, 64:128] = 1000.0  # a group of its own scale: 1000 ≤ 448·2^2
    page = RowPages.zeros(MAIN, 2, 64, CPU)
    store_rows(page, encode_rows(rows, MAIN), torch.arange(64) + 64)
    raw = page.storage[1].numpy().tobytes()
    assert len(raw) == 37_440
    row, scales = 5 * 576, 64 * 576 + 5 * 8
    exponents = raw[scales : scales + 7]
    assert raw[scales + 7] == 0
    assert exponents[1] - 127 == 2
    for dim in (0, 64, 100, 447):
        value = float(decode_fp8(torch.tensor([raw[row + dim]], dtype=torch.uint8), torch.float32))
        expected = float(rows[5, dim].bfloat16())
        assert value * 2.0 ** (exponents[dim // 64] - 127) == pytest.approx(
            expected, rel=2**-4, abs=1e-2
        )
    for index in (0, 63):
        word = struct.unpack_from("<H", raw, row + 448 + 2 * index)[0]
        assert struct.unpack("<f", struct.pack("<I", word << 16))[0] == float(
            rows[5, 448 + index].bfloat16()
        )
    assert raw[64 * 584 :] == bytes(37_440 - 64 * 584)
    assert not bool(page.storage[0].any())


def test_indexer_page_keeps_scales_behind_all_codes() -> None:
    rows = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    rows[9] *= 1e4
    raw = encode_rows(rows, INDEXER).storage[0].numpy().tobytes()
    scale = struct.unpack_from("<f", raw, 64 * 128 + 9 * 4)[0]
    assert scale == 2.0 ** round(torch.tensor(scale).log2().item())
    codes = torch.frombuffer(bytearray(raw[9 * 128 : 10 * 128]), dtype=torch.uint8)
    assert torch.allclose(decode_fp8(codes, torch.float32) * scale, rows[9], rtol=2**-4, atol=scale)


@pytest.mark.parametrize("format", [MAIN, INDEXER, RowFormat(RowKind.PLAIN, 512, 64, "float32")])
def test_rows_read_back_as_encoded_from_scattered_slots_and_nowhere_gives_zeros(
    format: RowFormat,
) -> None:
    rows = torch.randn(7, format.dim, generator=torch.Generator().manual_seed(2))
    encoded = encode_rows(rows, format)
    pages = RowPages.zeros(format, 4, 16, CPU)
    slots = torch.tensor([63, 0, -1, 17, 30, 5, 40])
    store_rows(pages, encoded, slots)
    back = read_rows(pages, slots, torch.float32)
    direct = read_rows(encoded, torch.arange(7), torch.float32)
    kept = slots >= 0
    assert torch.equal(back[kept], direct[kept])
    assert not back[2].any()
    assert float((direct - rows).abs().max()) < 0.3


def test_encoding_what_was_decoded_changes_nothing() -> None:
    rows = torch.randn(9, 512, generator=torch.Generator().manual_seed(3))
    once = read_rows(encode_rows(rows, MAIN), torch.arange(9), torch.float32)
    twice = read_rows(encode_rows(once, MAIN), torch.arange(9), torch.float32)
    assert torch.equal(once, twice)


def test_indexer_queries_and_keys_round_by_one_function() -> None:
    """Index Q transformed and K not (or the other way round) loses recall at a distance."""
    generator = torch.Generator().manual_seed(4)
    keys, query = (
        torch.randn(400, 128, generator=generator),
        torch.randn(1, 128, generator=generator),
    )
    stored = read_rows(encode_rows(keys, INDEXER), torch.arange(400), torch.float32)
    assert torch.equal(index_round(keys), stored)
    exact, rounded = (query @ keys.T)[0], (index_round(query) @ stored.T)[0]
    want, got = set(exact.topk(40).indices.tolist()), set(rounded.topk(40).indices.tolist())
    assert len(want & got) >= 36
