"""The interpreter of AMD machine code, instruction by instruction, against numpy and torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tools.gcn import Fault, Kernel, Unsupported

POINTERS = {"inputs": "*u32", "out": "*u32"}
U32, I32, F32 = np.uint32, np.int32, np.float32
Array = Any

# Lane n reads word n of three rows of inputs into v2, v3, v4; v5 goes to word n of the output.
BEFORE = """
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 2, v0
	global_load_dword v2, v1, s[4:5]
	global_load_dword v3, v1, s[4:5] offset:256
	global_load_dword v4, v1, s[4:5] offset:512
	s_waitcnt vmcnt(0)
"""
AFTER = "\tglobal_store_dword v1, v5, s[6:7]\n\ts_endpgm\n"
DESCRIPTOR = """
	.amdhsa_user_sgpr_count 2
	.amdhsa_user_sgpr_kernarg_segment_ptr 1
	.amdhsa_kernarg_size 32
	.amdhsa_system_sgpr_workgroup_id_x 1
	.amdhsa_private_segment_fixed_size 64
"""


def program(body: str) -> str:
    return f"\t.text\nkernel:\n{BEFORE}{body}\n{AFTER}\t.section .rodata\n{DESCRIPTOR}"


def launch(
    body: str, inputs: Array, target: str = "gfx942", shared: int = 0, warps: int = 1
) -> Array:
    """v5 of every lane after `body`, from three rows of 64 words."""
    out = np.zeros(64 * warps, U32)
    kernel = Kernel(program(body), target, POINTERS, shared, warps)
    assert kernel.unsupported() == {}
    kernel.launch((1, 1, 1), [np.ascontiguousarray(inputs).view(U32), out])
    return out


def random_words(seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 2**32, (3, 64), dtype=np.uint64).astype(U32)


def random_floats(seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((3, 64)) * 10.0 ** rng.integers(-3, 4, (3, 64))).astype(F32)
    values[:, :4] = [0.0, -0.0, np.inf, np.nan]
    return values


def wide(a: Array) -> Array:
    return a.astype(np.uint64)


INTEGER: dict[str, Callable[..., Array]] = {
    "v_add_u32_e32 v5, v2, v3": lambda a, b, c: a + b,
    "v_sub_u32_e32 v5, v2, v3": lambda a, b, c: a - b,
    "v_subrev_u32_e32 v5, v2, v3": lambda a, b, c: b - a,
    "v_and_b32_e32 v5, v2, v3": lambda a, b, c: a & b,
    "v_xor_b32_e32 v5, -1, v3": lambda a, b, c: ~b,
    "v_lshlrev_b32_e32 v5, v2, v3": lambda a, b, c: b << (a & 31),
    "v_ashrrev_i32_e32 v5, 5, v3": lambda a, b, c: (b.view(I32) >> 5).view(U32),
    "v_mul_lo_u32 v5, v2, v3": lambda a, b, c: (wide(a) * wide(b)).astype(U32),
    "v_mul_hi_u32 v5, v2, v3": lambda a, b, c: (wide(a) * wide(b) >> np.uint64(32)).astype(U32),
    "v_max_i32_e32 v5, v2, v3": lambda a, b, c: np.maximum(a.view(I32), b.view(I32)).view(U32),
    "v_min_u32_e32 v5, v2, v3": lambda a, b, c: np.minimum(a, b),
    "v_add3_u32 v5, v2, v3, v4": lambda a, b, c: a + b + c,
    "v_lshl_add_u32 v5, v2, 3, v4": lambda a, b, c: (a << 3) + c,
    "v_and_or_b32 v5, v2, v3, v4": lambda a, b, c: (a & b) | c,
    "v_bfe_u32 v5, v2, 7, 9": lambda a, b, c: (a >> 7) & 511,
    "v_bfe_i32 v5, v2, 7, 9": lambda a, b, c: ((a << 16).view(I32) >> 23).view(U32),
    "v_bfi_b32 v5, v2, v3, v4": lambda a, b, c: (a & b) | (~a & c),
    "v_perm_b32 v5, v2, v3, 0x07060100": lambda a, b, c: (a & 0xFFFF0000) | (b & 0xFFFF),
    "v_alignbit_b32 v5, v2, v3, 8": lambda a, b, c: (a << 24) | (b >> 8),
    "v_mad_i32_i24 v5, v2, -60, v4": lambda a, b, c: (
        ((a << 8).view(I32) >> 8) * -60 + c.view(I32)
    ).view(U32),
    "v_bfrev_b32_e32 v5, v2": lambda a, b, c: np.array(
        [int(f"{n:032b}"[::-1], 2) for n in a.tolist()], U32
    ),
    "v_ffbh_u32_e32 v5, v2": lambda a, b, c: np.array([32 - n.bit_length() for n in a.tolist()]),
    "v_bcnt_u32_b32 v5, v2, v3": lambda a, b, c: (
        np.array([n.bit_count() for n in a.tolist()], U32) + b
    ),
    "v_add_u32_sdwa v5, v2, sext(v3) dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_1 "
    "src1_sel:WORD_1": lambda a, b, c: ((a >> 8 & 255).view(I32) + (b.view(I32) >> 16)).view(U32),
    "v_cmp_lt_u32_e32 vcc, v2, v3\n\tv_cndmask_b32_e32 v5, v2, v3, vcc": lambda a, b, c: np.where(
        a < b, b, a
    ),
    "v_add_co_u32_e32 v5, vcc, v2, v3\n\tv_addc_co_u32_e32 v5, vcc, 0, v4, vcc": lambda a, b, c: (
        c + (wide(a) + wide(b) >> np.uint64(32)).astype(U32)
    ),
    "v_mad_u64_u32 v[6:7], s[8:9], v2, v3, 0\n\tv_mov_b32_e32 v5, v7": lambda a, b, c: (
        (wide(a) * wide(b)) >> np.uint64(32)
    ).astype(U32),
    "v_bitop3_b32 v5, v2, v3, v4 bitop3:0x96": lambda a, b, c: a ^ b ^ c,
}


@pytest.mark.parametrize("body", INTEGER, ids=lambda body: body.split()[0])
def test_integer_arithmetic(body: str) -> None:
    rows = random_words()
    with np.errstate(over="ignore"):
        expected = INTEGER[body](*rows)
    np.testing.assert_array_equal(launch("\t" + body, rows), expected.astype(U32))


FLOAT: dict[str, Callable[..., Array]] = {
    "v_add_f32_e32 v5, v2, v3": lambda a, b, c: a + b,
    "v_sub_f32_e64 v5, |v2|, -v3": lambda a, b, c: np.abs(a) + b,
    "v_mul_f32_e32 v5, 0.5, v3": lambda a, b, c: b * F32(0.5),
    "v_fma_f32 v5, v2, v3, -v4": lambda a, b, c: (
        a.astype(np.float64) * b - c.astype(np.float64)
    ).astype(F32),
    "v_max_f32_e32 v5, v2, v3": lambda a, b, c: np.fmax(a, b),
    "v_min_f32_e32 v5, v2, v3": lambda a, b, c: np.fmin(a, b),
    "v_maximum3_f32 v5, v2, v3, v4": lambda a, b, c: np.maximum(np.maximum(a, b), c),
    "v_exp_f32_e32 v5, v2": lambda a, b, c: np.exp2(a.astype(np.float64)).astype(F32),
    "v_rcp_f32_e32 v5, v2": lambda a, b, c: F32(1) / a,
    "v_rndne_f32_e32 v5, v2": lambda a, b, c: np.rint(a),
    "v_cvt_f32_f16_e32 v5, v2": lambda a, b, c: (
        (a.view(U32) & 0xFFFF).astype(np.uint16).view(np.float16).astype(F32)
    ),
    "v_cvt_f32_i32_e32 v5, v2": lambda a, b, c: a.view(I32).astype(F32),
    "v_add_f32_e64 v5, v2, v3 clamp": lambda a, b, c: np.nan_to_num(np.clip(a + b, 0, 1), nan=0.0),
    "v_cvt_f64_f32_e32 v[6:7], v2\n\tv_cvt_f64_f32_e32 v[8:9], v3\n"
    "\tv_mul_f64 v[6:7], v[6:7], v[8:9]\n\tv_cvt_f32_f64_e32 v5, v[6:7]": lambda a, b, c: a * b,
}


@pytest.mark.parametrize("body", FLOAT, ids=lambda body: body.split()[0])
def test_float_arithmetic(body: str) -> None:
    rows = random_floats()
    with np.errstate(all="ignore"):
        expected = FLOAT[body](*rows)
    np.testing.assert_array_equal(launch("\t" + body, rows).view(F32), expected.astype(F32))


def test_division_is_exact() -> None:
    body = """
	v_div_scale_f32 v6, s[8:9], v3, v3, v2
	v_rcp_f32_e32 v7, v6
	v_fma_f32 v8, -v6, v7, 1.0
	v_div_fmas_f32 v8, v8, v7, v7
	v_div_fixup_f32 v5, v8, v3, v2"""
    rows = random_floats()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(launch(body, rows).view(F32), rows[0] / rows[1])


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("lt", lambda a, b: a < b),
        ("nlt", lambda a, b: ~(a < b)),
        ("lg", lambda a, b: (a < b) | (a > b)),
        ("neq", lambda a, b: ~(a == b)),
        ("o", lambda a, b: ~(np.isnan(a) | np.isnan(b))),
        ("u", lambda a, b: np.isnan(a) | np.isnan(b)),
    ],
)
def test_comparisons_with_nan(condition: str, expected: Callable[..., Array]) -> None:
    rows = random_floats()
    rows[1, 10:20] = rows[0, 10:20]
    body = f"\tv_cmp_{condition}_f32_e32 vcc, v2, v3\n\tv_cndmask_b32_e64 v5, 0, 1, vcc"
    np.testing.assert_array_equal(launch(body, rows), expected(rows[0], rows[1]))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(0x3, np.isnan), (0x204, np.isinf), (0x60, lambda a: a == 0), (0x20, lambda a: a < -1e-37)],
)
def test_classes(bits: int, expected: Callable[..., Array]) -> None:
    rows = random_floats()
    rows[0, 0] = -0.0
    body = f"\tv_mov_b32_e32 v6, {bits}\n\tv_cmp_class_f32_e32 vcc, v2, v6\n"
    got = launch(body + "\tv_cndmask_b32_e64 v5, 0, 1, vcc", rows)
    if bits == 0x20:
        expected = lambda a: (a == 0) & np.signbit(a)  # noqa: E731
    np.testing.assert_array_equal(got, expected(rows[0]))


def _s(value: int) -> int:
    return value - 2**32 if value >> 31 else value


SCALAR: dict[str, Callable[[int, int], int]] = {
    "s_add_u32 s8, s9, s10": lambda a, b: a + b,
    "s_sub_i32 s8, s9, s10": lambda a, b: a - b,
    "s_mul_i32 s8, s9, s10": lambda a, b: a * b,
    "s_mul_hi_u32 s8, s9, s10": lambda a, b: a * b >> 32,
    "s_mul_hi_i32 s8, s9, s10": lambda a, b: _s(a) * _s(b) >> 32,
    "s_ashr_i32 s8, s9, 3": lambda a, b: _s(a) >> 3,
    "s_max_i32 s8, s9, s10": lambda a, b: max(_s(a), _s(b)),
    "s_bfe_u32 s8, s9, 0x80004": lambda a, b: a >> 4 & 255,
    "s_bfe_i32 s8, s9, 0x80004": lambda a, b: (a >> 4 & 255 ^ 128) - 128,
    "s_andn2_b32 s8, s9, s10": lambda a, b: a & ~b,
    "s_lshl2_add_u32 s8, s9, s10": lambda a, b: 4 * a + b,
    "s_movk_i32 s8, 0xffc4": lambda a, b: -60,
    "s_mov_b32 s8, s9\n\ts_addk_i32 s8, 0xffc4": lambda a, b: a - 60,
    "s_mov_b32 s8, 7\n\ts_mulk_i32 s8, 0xfffd": lambda a, b: -21,
    "s_cmpk_lt_i32 s9, 0xffc4\n\ts_cselect_b32 s8, 5, 6": lambda a, b: 5 if _s(a) < -60 else 6,
    "s_cmp_gt_u32 s9, s10\n\ts_cselect_b32 s8, s9, s10": lambda a, b: max(a, b),
    "s_cmp_lt_i32 s9, s10\n\ts_cselect_b32 s8, s9, s10": lambda a, b: min(_s(a), _s(b)),
    "s_add_u32 s8, s9, s10\n\ts_addc_u32 s8, 0, 0": lambda a, b: a + b >> 32,
    "s_flbit_i32_b32 s8, s9": lambda a, b: 32 - a.bit_length(),
    "s_flbit_i32 s8, s9": lambda a, b: 32 - (a ^ 0xFFFFFFFF if a >> 31 else a).bit_length(),
    "s_ff1_i32_b32 s8, s9": lambda a, b: (a & -a).bit_length() - 1,
    "s_bcnt1_i32_b32 s8, s9": lambda a, b: a.bit_count(),
    "s_sext_i32_i8 s8, s9": lambda a, b: (a & 255 ^ 128) - 128,
    "s_bfe_i64 s[8:9], s[9:10], 0x80004": lambda a, b: (a >> 4 & 255 ^ 128) - 128,
    "s_lshl_b64 s[8:9], s[10:11], 36\n\ts_mov_b32 s8, s9": lambda a, b: b << 4,
}


@pytest.mark.parametrize("body", SCALAR, ids=lambda body: body.split()[0])
def test_scalar_arithmetic(body: str) -> None:
    for a, b in ((0xFFFFFFF0, 0x12345678), (77, 0x80000001), (0x7FFFFFFF, 3)):
        setup = f"\ts_mov_b32 s9, {a}\n\ts_mov_b32 s10, {b}\n\ts_mov_b32 s11, 0\n"
        got = launch(f"{setup}\t{body}\n\tv_mov_b32_e32 v5, s8", random_words())
        assert set(got.tolist()) == {SCALAR[body](a, b) & 0xFFFFFFFF}, (hex(a), hex(b))


LANES = np.arange(64)
MOVES: dict[str, Callable[[Array], Array]] = {
    "v_mov_b32_dpp v5, v2 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf": lambda a: a[LANES ^ 1],
    "v_mov_b32_dpp v5, v2 row_ror:4 row_mask:0xf bank_mask:0xf": lambda a: a[
        (LANES & 48) | ((LANES - 4) & 15)
    ],
    "v_mov_b32_dpp v5, v2 row_shl:1 row_mask:0xf bank_mask:0xf bound_ctrl:1": lambda a: np.where(
        LANES % 16 < 15, a[np.minimum(LANES + 1, 63)], 0
    ),
    "v_mov_b32_dpp v5, v2 row_half_mirror row_mask:0xf bank_mask:0xf": lambda a: a[LANES ^ 7],
    "v_lshlrev_b32_e32 v6, 2, v3\n\tds_bpermute_b32 v5, v6, v2": None,  # type: ignore[dict-item]
    "ds_swizzle_b32 v5, v2 offset:swizzle(SWAP,16)": lambda a: a[LANES ^ 16],
    "ds_swizzle_b32 v5, v2 offset:0x041f": lambda a: a[LANES ^ 1],
    "v_mov_b32_e32 v5, v2\n\tv_mov_b32_e32 v6, v3\n\tv_permlane32_swap_b32 v5, v6": None,  # type: ignore[dict-item]
    "v_readlane_b32 s8, v2, 9\n\tv_mov_b32_e32 v5, s8": lambda a: np.full(64, a[9]),
    "v_mbcnt_lo_u32_b32 v5, -1, 0\n\tv_mbcnt_hi_u32_b32 v5, -1, v5": lambda a: LANES,
}


@pytest.mark.parametrize("body", MOVES, ids=lambda body: body.replace("\n\t", " ")[:40])
def test_between_lanes(body: str) -> None:
    rows = random_words()
    rows[1] = np.random.default_rng(1).permutation(64)
    expected = MOVES[body]
    if expected is None and "bpermute" in body:
        wanted = rows[0][rows[1]]
    elif expected is None:
        wanted = np.concatenate([rows[0][:32], rows[1][:32]])
    else:
        wanted = expected(rows[0])
    np.testing.assert_array_equal(launch("\t" + body, rows), wanted.astype(U32))


def test_lanes_that_are_off_keep_their_values() -> None:
    body = """
	v_mov_b32_e32 v5, 7
	v_cmp_gt_u32_e32 vcc, 10, v0
	s_and_saveexec_b64 s[8:9], vcc
	v_mov_b32_e32 v5, v2
	s_mov_b64 exec, s[8:9]"""
    rows = random_words()
    np.testing.assert_array_equal(launch(body, rows), np.where(LANES < 10, rows[0], 7))


def test_branches_and_loops() -> None:
    body = """
	s_mov_b32 s8, 0
	v_mov_b32_e32 v5, 0
.LOOP:
	v_add_u32_e32 v5, v5, v0
	s_add_i32 s8, s8, 1
	s_cmp_lg_u32 s8, 5
	s_cbranch_scc1 .LOOP
	s_branch .END
	v_mov_b32_e32 v5, 0
.END:"""
    np.testing.assert_array_equal(launch(body, random_words()), 5 * LANES)


def test_a_loop_without_end_is_a_fault() -> None:
    kernel = Kernel(program(".LOOP:\n\ts_branch .LOOP"), "gfx942", POINTERS, 0, 1)
    with pytest.raises(Fault, match="does not end"):
        kernel.launch((1,), [random_words(), np.zeros(64, U32)], limit=1000)


def test_waves_meet_at_a_barrier() -> None:
    """Each of four waves writes local memory that another one reads."""
    body = """
	v_and_b32_e32 v2, 63, v0
	v_lshlrev_b32_e32 v6, 2, v0
	v_mul_u32_u24_e32 v7, 3, v0
	ds_write_b32 v6, v7
	s_waitcnt lgkmcnt(0)
	s_barrier
	v_xor_b32_e32 v6, 0x3fc, v6
	ds_read_b32 v5, v6"""
    got = launch(body, np.zeros((3, 256), U32), shared=1024, warps=4)
    np.testing.assert_array_equal(got, 3 * (np.arange(256) ^ 255))


@pytest.mark.parametrize(
    ("store", "load"),
    [
        ("ds_write_b32 v6, v2", "ds_read_b32 v5, v6"),
        ("ds_write2_b32 v6, v3, v2 offset0:64 offset1:128", "ds_read_b32 v5, v6 offset:512"),
        ("ds_write_b32 v6, v2", "ds_read2st64_b32 v[4:5], v6 offset0:1 offset1:0"),
        ("ds_write_b16 v6, v2\n\tds_write_b16_d16_hi v6, v2 offset:2", "ds_read_b32 v5, v6"),
        ("scratch_store_dword off, v2, off offset:16", "scratch_load_dword v5, off, off offset:16"),
    ],
)
def test_what_is_stored_is_loaded(store: str, load: str) -> None:
    rows = random_words()
    body = f"\tv_lshlrev_b32_e32 v6, 2, v0\n\t{store}\n\ts_barrier\n\t{load}"
    np.testing.assert_array_equal(launch(body, rows, shared=1024), rows[0])


def test_sub_word_loads_extend_and_keep_halves() -> None:
    body = """
	global_load_sbyte v6, v1, s[4:5]
	v_mov_b32_e32 v5, v3
	global_load_short_d16_hi v5, v1, s[4:5] offset:2
	v_add_u32_e32 v5, v5, v6"""
    rows = random_words()
    low = (rows[0] << 24).view(I32) >> 24
    halves = (rows[1] & 0xFFFF) | (rows[0] & 0xFFFF0000)
    np.testing.assert_array_equal(launch(body, rows), halves + low.view(U32))


def test_buffer_loads_beyond_the_end_give_zero() -> None:
    body = """
	s_mov_b32 s8, s4
	s_mov_b32 s9, s5
	s_mov_b32 s10, 40
	s_mov_b32 s11, 0x27000
	buffer_load_dword v5, v1, s[8:11], 0 offen"""
    rows = random_words()
    np.testing.assert_array_equal(launch(body, rows), np.where(LANES < 10, rows[0], 0))


def test_atomics_add_every_lane() -> None:
    body = """
	v_mov_b32_e32 v6, 0
	v_mov_b32_e32 v7, 0
	ds_write_b32 v6, v7
	ds_add_u32 v6, v0
	ds_read_b32 v5, v6"""
    assert set(launch(body, random_words(), shared=64).tolist()) == {63 * 32}
    rows = np.zeros((3, 64), U32)
    body = "\tv_mov_b32_e32 v6, 0\n\tglobal_atomic_add v5, v6, v0, s[4:5] sc0"
    np.testing.assert_array_equal(launch(body, rows), np.cumsum(LANES) - LANES)
    assert rows[0, 0] == 63 * 32


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_fp8_casts_follow_the_targets_dialect(target: str) -> None:
    """gfx942 is FNUZ and gfx950 OCP: the same codes, half the value."""
    dtype = torch.float8_e4m3fnuz if target == "gfx942" else torch.float8_e4m3fn
    limit = 240.0 if target == "gfx942" else 448.0
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)) * 60
    values[0, :3] = torch.tensor([0.0, -0.0, limit])
    values = values.clamp(-limit, limit)
    got = launch(
        "\tv_cvt_pk_fp8_f32 v5, v2, v3\n\tv_and_b32_e32 v5, 0xffff, v5", values.numpy(), target
    )
    codes = values.to(dtype).view(torch.uint8).numpy().astype(U32)
    np.testing.assert_array_equal(got, codes[0] | codes[1] << 8)
    words = torch.arange(192, dtype=torch.int32).view(3, 64)
    words[0] += 64  # codes with both signs of the exponent, and NaN
    back = launch("\tv_cvt_f32_fp8_sdwa v5, v2 src0_sel:BYTE_0", words.numpy(), target)
    expected = words[0].to(torch.uint8).view(dtype).float().numpy()
    np.testing.assert_array_equal(back.view(F32), expected)


def test_bfloat16_rounds_to_even() -> None:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    values[0, 0] = 1.00390625  # a tie
    got = launch("\tv_cvt_pk_bf16_f32 v5, v2, v3", values.numpy(), "gfx950")
    codes = values.bfloat16().view(torch.int16).numpy().view(np.uint16).astype(U32)
    np.testing.assert_array_equal(got, codes[0] | codes[1] << 16)


def test_every_workgroup_knows_its_place_and_the_grid() -> None:
    """Workgroup n adds its number and the number of workgroups to word n."""
    body = """
	s_load_dword s9, s[0:1], 0x10
	s_lshl_b32 s10, s2, 2
	v_mov_b32_e32 v6, s10
	v_mov_b32_e32 v5, s9
	v_add_u32_e32 v5, s2, v5
	global_store_dword v6, v5, s[6:7]
	s_endpgm"""
    metadata = "\n  - .offset: 16\n    .size: 4\n    .value_kind: hidden_block_count_x\n"
    out = np.zeros(64, U32)
    kernel = Kernel(program(body) + metadata, "gfx942", POINTERS, 0, 1)
    kernel.launch((5,), [random_words(), out])
    assert out[:6].tolist() == [5, 6, 7, 8, 9, 0]


def test_registers_and_local_memory_start_poisoned() -> None:
    assert set(launch("\tv_mov_b32_e32 v5, v99", random_words()).tolist()) == {0xDEADBEEF}
    body = "\tv_mov_b32_e32 v6, 0\n\tds_read_b32 v5, v6"
    assert set(launch(body, random_words(), shared=64).tolist()) == {0xA5A5A5A5}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("\tglobal_load_dword v5, v1, s[4:5] offset:1024", "outside every buffer"),
        ("\tglobal_store_dword v1, v2, s[6:7] offset:4", "outside every buffer"),
        ("\tds_write_b32 v1, v2 offset:1024", "outside the 1024 bytes of local memory"),
        ("\tscratch_load_dword v5, off, off offset:4000", "outside scratch memory"),
        ("\ts_trap 2", "s_trap"),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        launch(body, random_words(), shared=1024)


def test_too_much_local_memory_is_refused() -> None:
    for target, limit in (("gfx942", 65_536), ("gfx950", 163_840)):
        Kernel(program(""), target, POINTERS, limit, 1)
        with pytest.raises(Fault, match=f"{target} has {limit}"):
            Kernel(program(""), target, POINTERS, limit + 1, 1)


@pytest.mark.parametrize(
    "instruction",
    ["v_frobnicate_b32 v5, v2", "s_frobnicate s4", "ds_frobnicate v1", "v_mfma_f32_4x4x4_16b_f16"],
)
def test_unknown_instructions_are_named(instruction: str) -> None:
    kernel = Kernel(program("\t" + instruction), "gfx942", POINTERS, 0, 1)
    assert list(kernel.unsupported()) == [instruction.split()[0]]
    with pytest.raises(Unsupported, match=instruction.split()[0]):
        kernel.launch((1,), [random_words(), np.zeros(64, U32)])


def test_wrong_arguments_are_refused() -> None:
    kernel = Kernel(program(""), "gfx942", POINTERS, 0, 1)
    arguments: Sequence[Array] = [random_words()]
    with pytest.raises(Fault, match="1 arguments for 2 parameters"):
        kernel.launch((1,), arguments)
