"""Compiles one variant ahead of time, on any machine, and reads what the binary needs.

Contract: `compile_variant` compiles a variant as Triton would on the device and puts it where Triton
looks for it; `Resources` are read from the binary, and `excess` says what of them the target does not
have. The compiler itself rejects neither too much shared memory nor spills. What fails comes back as a
`Compiled` with the reason; nothing is raised. Many at once: compile_many.py.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError
from triton.experimental.gluon._runtime import GluonASTSource

from fourfold.core.device import Arch
from fourfold.kernels.targets import triton_target
from fourfold.kernels.variants import Variant

_REGISTERS_A_BLOCK = 65_536  # NVIDIA: of all threads of a block
_TENSOR_MEMORY = 512  # columns
# ELF: the attributes of each function stand in `.nv.info`, as (symbol, value).
_EIATTR_FRAME_SIZE, _EIATTR_REGCOUNT = 0x11, 0x2F
_SIZED_ATTRIBUTE = 0x04


@dataclass(frozen=True)
class Resources:
    """What a binary takes: `shared` bytes a workgroup, `registers` a thread (vector registers on AMD),
    `scratch` bytes a thread that spilt registers and local arrays take in slow memory, and
    `tensor_memory` columns."""

    shared: int
    registers: int
    scratch: int
    num_warps: int
    tensor_memory: int = 0

    def excess(self, arch: Arch) -> str:
        """What is more than `arch` has, or an empty string."""
        found = []
        if self.shared > arch.shared_memory:
            found.append(f"shared memory {self.shared:,} of {arch.shared_memory:,} bytes")
        threads = self.num_warps * arch.wave_size
        if arch.name.startswith("sm_") and self.registers * threads > _REGISTERS_A_BLOCK:
            found.append(f"{self.registers} registers for each of {threads} threads")
        if self.tensor_memory > _TENSOR_MEMORY:
            found.append(f"{self.tensor_memory} of {_TENSOR_MEMORY} columns of tensor memory")
        return "; ".join(found)


@dataclass(frozen=True)
class Compiled:
    """What became of one variant. `error` is the compiler's reason, or what the target lacks."""

    variant: Variant
    arch: str
    seconds: float
    resources: Resources | None = None
    error: str = ""
    cached: bool = False  # it was there already
    digest: str = ""  # its name in the cache

    @property
    def ok(self) -> bool:
        return not self.error


def _amd_resources(metadata: Any, text: str) -> Resources:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return Resources(
        metadata.shared,
        value("vgpr_count"),
        value("private_segment_fixed_size"),
        metadata.num_warps,
    )


def _sections(elf: bytes) -> dict[str, bytes]:
    """Content of each section of a 64-bit little-endian ELF file, by name."""
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + size * n) for n in range(count)]
    begin = headers[names][4]
    found = {}
    for header in headers:
        start = begin + header[0]
        name = elf[start : elf.index(b"\0", start)].decode()
        found[name] = elf[header[4] : header[4] + header[5]]
    return found


def _nvidia_resources(metadata: Any, cubin: bytes) -> Resources:
    """The most registers and the largest stack of any function, from `.nv.info`."""
    attributes, at = _sections(cubin)[".nv.info"], 0
    most = {_EIATTR_FRAME_SIZE: 0, _EIATTR_REGCOUNT: 0}
    while at + 4 <= len(attributes):
        form, kind, size = struct.unpack_from("<BBH", attributes, at)
        if form != _SIZED_ATTRIBUTE:
            at += 4
            continue
        if kind in most:
            most[kind] = max(most[kind], struct.unpack_from("<II", attributes, at + 4)[1])
        at += 4 + size
    columns = getattr(metadata, "tmem_size", 0) or 0
    registers, stack = most[_EIATTR_REGCOUNT], most[_EIATTR_FRAME_SIZE]
    return Resources(metadata.shared, registers, stack, metadata.num_warps, columns)


def resources(binary: Any) -> Resources:
    """What a compiled kernel takes."""
    if "cubin" in binary.asm:
        return _nvidia_resources(binary.metadata, binary.asm["cubin"])
    return _amd_resources(binary.metadata, binary.asm["amdgcn"])


def compiled_binary(variant: Variant, arch: Arch) -> Any:
    """What Triton makes of a variant, from its cache where it is there. Raises what the compiler does."""
    function = variant.function
    # Gluon's functions are traced by another front end.
    front = GluonASTSource if function.is_gluon() else ASTSource
    source = front(
        function,
        dict(variant.signature),
        dict(variant.constants),
        {path: [list(fact) for fact in facts] for path, facts in variant.known},
    )
    return triton.compile(source, triton_target(arch), dict(variant.options))


# The compiler's passes raise RuntimeError, its front end CompilationError and what a kernel's own Python
# raises while it is traced.
_COMPILER_ERRORS = (CompilationError, RuntimeError, ValueError, TypeError, AssertionError)


def compile_variant(variant: Variant, arch: Arch) -> Compiled:
    """Compile one variant for `arch`, or find it in the cache."""
    hits: list[bool] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
        return compile_heard(variant, arch, hits)


def compile_heard(variant: Variant, arch: Arch, hits: Sequence[bool]) -> Compiled:
    """`compile_variant`, for a caller that listens to Triton itself: it says into `hits` whether what
    was asked for was in the cache."""
    began = time.perf_counter()
    try:
        binary = compiled_binary(variant, arch)
    except _COMPILER_ERRORS as error:
        took = time.perf_counter() - began
        return Compiled(variant, arch.name, took, error=_reason(error))
    needs = resources(binary)
    took = time.perf_counter() - began
    return Compiled(variant, arch.name, took, needs, needs.excess(arch), all(hits), binary.hash)


def _reason(error: BaseException) -> str:
    """The last line that says something, of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
