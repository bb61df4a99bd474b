"""The source of portable kernels: nothing in it is one vendor's or takes a warp's width for granted.

A width shows as arithmetic: a place cut by 32 or 64 into a warp and a lane, or a size made of the number of
warps. Instructions of one vendor show as calls. What these rules would take for such and is not, is listed
with the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "fourfold" / "kernels" / "triton"
FILES = sorted(FOLDER.glob("*.py"))
# Names that lead to one vendor's instructions, to a language below Triton, or to a device's own width.
NOT_PORTABLE = (
    "inline_asm_elementwise", "libdevice", "gluon", "extra", "nvidia", "amd", "hip", "cuda",
    "dot_scaled", "warp_size", "warpSize", "wave_size", "get_device_properties", "num_threads",
    "globaltimer", "smid",
)  # fmt: skip
CUTS = {ast.FloorDiv: (32, 64), ast.Mod: (32, 64), ast.BitAnd: (31, 63), ast.RShift: (5, 6),
        ast.LShift: (5, 6)}  # fmt: skip
# By file: (what is found, why it is none).
NONE: Mapping[str, Mapping[str, str]] = {
    "moe.py": {"K // 32": "32 inputs of an FP4 row share a scale"},
    "early.py": {
        "triton.language.extra.cuda": "only with EARLY, which needs a feature, is it compiled"
    },
}


def _is_jitted(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(each).split("(")[0].split(".") for each in node.decorator_list)


def _names_of_warps(node: ast.AST) -> bool:
    names = (getattr(each, "id", getattr(each, "attr", "")) for each in ast.walk(node))
    return any(name.lower().endswith("warps") for name in names)


def _of_one_vendor(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None)
            for name in [module] if module else [alias.name for alias in node.names]:
                if set(name.split(".")) & {*NOT_PORTABLE}:
                    yield name
            for alias in node.names:
                if alias.name in NOT_PORTABLE:
                    yield alias.name
        elif isinstance(node, ast.Attribute) and node.attr in NOT_PORTABLE:
            yield ast.unparse(node)
        elif isinstance(node, ast.Name) and node.id in NOT_PORTABLE:
            yield node.id


def _widths(tree: ast.Module) -> Iterator[str]:
    """In what runs on the GPU: places cut by a width, and anything made of the number of warps."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or not _is_jitted(function):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp):
                right = node.right.value if isinstance(node.right, ast.Constant) else None
                if right in CUTS.get(type(node.op), ()):
                    yield ast.unparse(node)
            named = getattr(node, "id", getattr(node, "arg", getattr(node, "attr", ""))) or ""
            if isinstance(named, str) and ("warp" in named.lower() or "wave" in named.lower()):
                yield named


def _sizes_of_warps(tree: ast.Module) -> Iterator[str]:
    """On the host: a launch's number of warps goes nowhere but into the launch's own option."""
    for node in ast.walk(tree):
        size: ast.AST | None = None
        if isinstance(node, ast.keyword) and node.arg != "num_warps":
            size = node.value
        elif isinstance(node, ast.Subscript):
            size = node.slice
        if size is not None and _names_of_warps(size):
            yield ast.unparse(node)


def faults(source: str) -> set[str]:
    tree = ast.parse(source)
    return {*_of_one_vendor(tree), *_widths(tree), *_sizes_of_warps(tree)}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_portable_kernels_take_no_width_and_no_vendor_for_granted(file: Path) -> None:
    found = faults(file.read_text("utf-8"))
    allowed = {*NONE.get(file.name, {})}
    assert found == allowed & found, found - allowed
    assert allowed <= found, "an exception that nothing needs any more"


BAD = {
    "import triton.language.extra.libdevice": "triton.language.extra.libdevice",
    "from triton.language.extra import libdevice": "libdevice",
    "from triton.experimental import gluon": "gluon",
    "x = tl.inline_asm_elementwise('', '', [], tl.int32, True, 1)": "tl.inline_asm_elementwise",
    "x = tl.dot_scaled(a, b, c, d, e, f)": "tl.dot_scaled",
    "w = torch.cuda.get_device_properties(0).warp_size": "warp_size",
    "@triton.jit\ndef f(x):\n    i = tl.arange(0, 128) // 32": "tl.arange(0, 128) // 32",
    "@triton.jit\ndef f(x):\n    i = x % 64": "x % 64",
    "@triton.jit(do_not_specialize=['x'])\ndef f(x):\n    i = x & 31": "x & 31",
    "@triton.jit\ndef f(x):\n    i = x >> 5": "x >> 5",
    "@triton.jit\ndef f(x, NUM_WARPS: tl.constexpr):\n    pass": "NUM_WARPS",
    "f[1](x, BLOCK=32 * shape.warps, num_warps=shape.warps)": "BLOCK=32 * shape.warps",
    "f[(n // (warps * 32),)](x)": "f[n // (warps * 32),]",
}


@pytest.mark.parametrize("source", BAD)
def test_what_is_not_portable_is_found(source: str) -> None:
    assert any(BAD[source] in each for each in faults(source)), faults(source)


def test_what_only_looks_like_it_is_not() -> None:
    for source in (
        "f[(n // 32,)](x, ROWS=32, num_warps=min(max(n // 256, 1), 8))",
        "@triton.jit\ndef f(x):\n    i = tl.program_id(0) * 32 + tl.arange(0, 32)",
        "class Shape:\n    warps: int\n\nWIDE = Shape(warps=8)",
    ):
        assert faults(source) == set(), source
