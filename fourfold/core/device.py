"""Devices: which architecture this is and what it can do.

Contract: `ARCHS` is the one table of architectures; `detect` finds the device in use; kernels state
needs as `Feature`s and nothing else in the project asks for a vendor. It does not know kernels, only the
names of those that are known to be bad somewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from fourfold.core.errors import ConfigError


class Feature(Enum):
    """What a kernel may need of a device."""

    CPU = "a CPU"
    TRITON = "Triton"
    BF16_MATRIX = "BF16 matrix units"
    FP8_MATRIX = "FP8 matrix units"
    FP8_OCP = "OCP E4M3 casts"
    FP8_FNUZ = "FNUZ E4M3 casts"
    FP4_MATRIX = "FP4 matrix units"
    WGMMA = "warp-group matrix instructions"
    EARLY_LAUNCH = "programmatic dependent launch"


class Fp8Dialect(Enum):
    """How a device reads an E4M3 byte. FNUZ reads the same byte as half the OCP value."""

    OCP = "ocp"
    FNUZ = "fnuz"

    @property
    def product_factor(self) -> float:
        """What a kernel multiplies its result by for each FP8 operand it fed to this device."""
        return 2.0 if self is Fp8Dialect.FNUZ else 1.0


@dataclass(frozen=True)
class KnownBad:
    """Kernels that an architecture has every feature for and that are not to be chosen there, and why.

    `kernel` is a name as `--kernel` takes it, of `op` or, where that is empty, of any. With
    `unless_triton` it is so only where another release of Triton is installed. `reason` follows "it".
    """

    kernel: str
    reason: str
    op: str = ""
    unless_triton: str = ""

    def hits(self, op: str, kernel: str, triton: str) -> bool:
        """Whether it speaks of this kernel under Triton `triton` (empty: not known, or none)."""
        if kernel != self.kernel or self.op not in ("", op):
            return False
        if not self.unless_triton:
            return True
        release = self.unless_triton.split(".")
        return bool(triton) and triton.split(".")[: len(release)] != release


@dataclass(frozen=True)
class Arch:
    """One architecture: name as its compiler spells it, limits in bytes, width in lanes."""

    name: str
    features: frozenset[Feature]
    fp8: Fp8Dialect = Fp8Dialect.OCP
    shared_memory: int = 0
    wave_size: int = 0
    known_bad: tuple[KnownBad, ...] = ()

    def why_bad(self, op: str, kernel: str, triton: str) -> str | None:
        """Why a kernel is known to be bad here, in words that follow "it"; None if nothing is known."""
        for each in self.known_bad:
            if each.hits(op, kernel, triton):
                under = f" with Triton {triton}" if each.unless_triton else ""
                return f"is known to be bad on {self.name}{under}: it {each.reason}"
        return None


_GPU = frozenset({Feature.TRITON, Feature.BF16_MATRIX})
_FP8 = _GPU | {Feature.FP8_MATRIX, Feature.FP8_OCP}
_FP4 = _FP8 | {Feature.FP4_MATRIX, Feature.EARLY_LAUNCH}
_SM90 = _FP8 | {Feature.WGMMA, Feature.EARLY_LAUNCH}
_FNUZ = _GPU | {Feature.FP8_MATRIX, Feature.FP8_FNUZ}
_OCP, _NUZ = Fp8Dialect.OCP, Fp8Dialect.FNUZ
# Gluon, in which these kernels lay out their operands by hand, is no stable language.
_GLUON = KnownBad(
    "sm90",
    "is written for Triton 3.6, and its language changes between releases",
    unless_triton="3.6",
)

ARCHS = {
    arch.name: arch
    for arch in (
        Arch("cpu", frozenset({Feature.CPU})),
        Arch("sm_80", _GPU, _OCP, 166_912, 32),
        Arch("sm_89", _FP8, _OCP, 101_376, 32),
        Arch("sm_90", _SM90, _OCP, 232_448, 32, (_GLUON,)),
        Arch("sm_100", _FP4, _OCP, 232_448, 32),
        Arch("sm_120", _FP4, _OCP, 101_376, 32),
        Arch("gfx90a", _GPU, _NUZ, 65_536, 64),
        Arch("gfx942", _FNUZ, _NUZ, 65_536, 64),
        Arch("gfx950", _FP8 | {Feature.FP4_MATRIX}, _OCP, 163_840, 64),
        Arch("gfx1151", _GPU, _OCP, 65_536, 32),
        Arch("gfx1201", _FP8, _OCP, 65_536, 32),
    )
}


@dataclass(frozen=True)
class Device:
    """A device the engine runs on."""

    arch: Arch
    torch_device: torch.device
    name: str = ""

    @property
    def features(self) -> frozenset[Feature]:
        return self.arch.features


def detect(wanted: str = "auto") -> Device:
    """The device called `wanted`: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises `ConfigError` for a device that is not there or an architecture that is not in `ARCHS`.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind == "cpu" and not index:
        return Device(ARCHS["cpu"], torch.device("cpu"), "CPU")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ConfigError(f"--device {wanted}: expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {wanted}: this torch ({torch.__version__}) finds no GPU")
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"--device {wanted}: this machine has {count} GPU(s)")
    properties = torch.cuda.get_device_properties(number)
    if torch.version.hip:
        arch = properties.gcnArchName.partition(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    if arch not in ARCHS:
        raise ConfigError(
            f"{properties.name} is a {arch}, which is not supported; supported are "
            + ", ".join(ARCHS)
        )
    return Device(ARCHS[arch], torch.device("cuda", number), properties.name)
