"""Matrix instructions of the interpreter of AMD machine code, against float64 products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tools.test_gcn import F32, POINTERS, U32, program
from tools.gcn import Kernel


def matrix_program(opcode: str, words: int, results: int) -> str:
    """A from row 0 …, B after it, zero C; every register of D is stored."""
    loads = [
        f"\tglobal_load_dword v{10 + n}, v1, s[4:5] offset:{256 * n}" for n in range(2 * words)
    ]
    clear = [f"\tv_accvgpr_write_b32 a{n}, 0" for n in range(results)]
    stores = [
        f"\tv_accvgpr_read_b32 v5, a{n}\n\tglobal_store_dword v1, v5, s[6:7] offset:{256 * n}"
        for n in range(results)
    ]
    last = 9 + words
    operands = f"a[0:{results - 1}], v[10:{last}], v[{last + 1}:{last + words}], a[0:{results - 1}]"
    body = "\n".join([*loads, *clear, f"\t{opcode} {operands}", *stores])
    return program(body + "\n\ts_endpgm")


@pytest.mark.parametrize(
    ("opcode", "target", "size", "depth", "dtype"),
    [
        ("v_mfma_f32_32x32x16_fp8_fp8", "gfx942", 32, 16, torch.float8_e4m3fnuz),
        ("v_mfma_f32_32x32x16_fp8_fp8", "gfx950", 32, 16, torch.float8_e4m3fn),
        ("v_mfma_f32_16x16x32_fp8_fp8", "gfx942", 16, 32, torch.float8_e4m3fnuz),
        ("v_mfma_f32_32x32x8_bf16", "gfx942", 32, 8, torch.bfloat16),
        ("v_mfma_f32_16x16x16_bf16", "gfx942", 16, 16, torch.bfloat16),
        ("v_mfma_f32_32x32x16_bf16", "gfx950", 32, 16, torch.bfloat16),
    ],
)
def test_matrix_products(
    opcode: str, target: str, size: int, depth: int, dtype: torch.dtype
) -> None:
    """Lane l holds row l mod size and the depth's part l div size; the result's rows come in fours."""
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(size, depth, generator=generator).to(dtype) for _ in range(2))
    groups = 64 // size
    packed = [
        m.view(size, groups, depth // groups).transpose(0, 1).contiguous().view(torch.uint8)
        for m in (a, b)
    ]
    inputs = np.concatenate([p.numpy().reshape(64, -1).view(U32).T.reshape(-1) for p in packed])
    words, results = len(inputs) // 128, size * size // 64
    out = np.zeros(64 * results, U32)
    kernel = Kernel(matrix_program(opcode, words, results), target, POINTERS, 0, 1)
    kernel.launch((1,), [np.resize(inputs, max(len(inputs), 192)), out])
    expected = a.float().double() @ b.float().double().T
    got = out.view(F32).reshape(results, 64)
    for register in range(results):
        for lane in range(0, 64, 7):
            row = 8 * (register // 4) + 4 * (lane // 32) + register % 4
            row = row if size == 32 else 4 * (lane // 16) + register
            assert got[register, lane] == pytest.approx(
                float(expected[row, lane % size]), rel=1e-6, abs=1e-6
            )
