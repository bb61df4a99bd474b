"""`fourfold verify`: what can be said of a checkpoint before it is loaded, from headers and small files.

Contract: `verify` finds everything that loading would refuse, and more, without reading tensor data; no
fault of a file makes it raise. Torch-free. The tokenizer and the prompt's format are text's to check
(cli/verify.py), the data itself verify_deep.py's.

    directory ─► verify_files ─► headers ─┬─► verify_geometry ─► config that fits ─► verify_tensors
                 config.json ─────────────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from fourfold.core.config import ModelConfig
from fourfold.core.config_reading import (
    CONFIG_NAME,
    REFERENCE_CONFIG_NAME,
    ModelConfigReading,
    read_directory,
    read_file,
)
from fourfold.core.errors import ConfigError
from fourfold.core.findings import Finding, Severity
from fourfold.core.frozen import FrozenDict
from fourfold.quant.resolve import Resolution
from fourfold.weights.coverage import may_be_stale
from fourfold.weights.names import Parsed, parse
from fourfold.weights.verify_dspark import check_stages
from fourfold.weights.verify_files import FoundFiles, check_files
from fourfold.weights.verify_geometry import compare_geometry
from fourfold.weights.verify_tensors import CheckedTensors, check_tensors

# (tensors, bytes of them) of published checkpoints, and what they are called.
_PUBLISHED = {
    (69_187, 159_609_485_896): "DeepSeek-V4-Flash, preview (revision 60d8d707)",
    (72_317, 166_878_536_440): "DeepSeek-V4-Flash-0731 (revision 7872f01b)",
    (145_116, 864_704_792_696): "DeepSeek-V4-Pro, preview (revision b5968e91)",
}
# What the reference program's file leaves out or says otherwise, by its nature.
_NOT_IN_REFERENCE = (
    "torch_dtype",
    "quantization_config",
    "expert_dtype",
    "num_nextn_predict_layers",
    "num_dspark_stages",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "hc_eps",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class Verification:
    """What was found. `config` is config.json's (None: it cannot be read), `model` what the tensors
    were written for, `family` the name of the model in words, `parsed` what tensors' names say.
    `checked` is None where there is no model to hold tensors against."""

    files: FoundFiles
    config: ModelConfig | None
    model: ModelConfig | None
    family: str
    findings: tuple[Finding, ...]
    checked: CheckedTensors | None = None
    parsed: Mapping[str, Parsed] = field(default_factory=FrozenDict)

    @property
    def num_tensors(self) -> int:
        return len(self.files.headers)


def verify(directory: Path) -> Verification:
    """Check the checkpoint in `directory`."""
    files = check_files(directory, may_be_stale)
    findings = list(files.findings)
    reading, name = _config(directory, findings)
    if reading is None:
        family = "unknown: its configuration cannot be read"
        return Verification(files, None, None, family, tuple(findings))
    config = reading.config
    findings += (Finding(Severity.NOTE, note, file=name) for note in reading.notes)
    for key in reading.unknown_keys:
        text = f"key {key!r} has no meaning here and is ignored"
        findings.append(Finding(Severity.NOTE, text, file=name))
    if not files.headers:
        return Verification(files, config, None, "unknown: no tensors", tuple(findings))
    parsed = {each: found for each in files.headers if (found := parse(each)) is not None}
    geometry = compare_geometry(config, files.headers, parsed, not files.lost, name)
    findings += geometry.findings
    findings += _reference(directory, name, config)
    checked = check_tensors(geometry.config, files, parsed, name)
    findings += checked.findings
    findings += check_stages(geometry.config, files)
    family = _family(files, geometry.config, geometry.released, checked.resolution)
    return Verification(files, config, geometry.config, family, tuple(findings), checked, parsed)


def _config(directory: Path, findings: list[Finding]) -> tuple[ModelConfigReading | None, str]:
    """The configuration and the name of its file."""
    name = CONFIG_NAME if (directory / CONFIG_NAME).exists() else REFERENCE_CONFIG_NAME
    try:
        return read_directory(directory), name
    except ConfigError as error:
        text = str(error).removeprefix(f"{directory / name}: ")
        fix = "correct it, or get it again; tensors cannot be held against a model without it"
        findings.append(Finding(Severity.ERROR, text, file=name, fix=fix))
        return None, name


def _reference(directory: Path, name: str, config: ModelConfig) -> Iterator[Finding]:
    """The reference program's own configuration file, where there are two."""
    path = directory / REFERENCE_CONFIG_NAME
    if name == REFERENCE_CONFIG_NAME or not path.exists():
        return
    try:
        other = read_file(path).config
    except ConfigError as error:
        text = f"cannot be read ({error}); {name} is used"
        yield Finding(Severity.NOTE, text, file=REFERENCE_CONFIG_NAME)
        return
    for each in fields(ModelConfig):
        mine, theirs = getattr(config, each.name), getattr(other, each.name)
        if mine != theirs and each.name not in _NOT_IN_REFERENCE:
            yield Finding(
                Severity.WARNING,
                f"{each.name} is {theirs}, but {mine} in {name}, which is used",
                file=REFERENCE_CONFIG_NAME,
                fix="get both files again from one revision",
            )


def _family(
    files: FoundFiles, config: ModelConfig, released: str | None, resolution: Resolution | None
) -> str:
    """The model in words: as published, or by its widths and how its experts are stored."""
    published = _PUBLISHED.get((len(files.headers), files.nbytes))
    if published is not None:
        return published
    schemes = {one.scheme for one in resolution.decisions.values()} if resolution else set()
    if released is None:
        return (
            f"a DeepSeek-V4 of its own: {config.num_hidden_layers} layers, "
            f"hidden_size {config.hidden_size}, {config.n_routed_experts} experts"
        )
    full = {"flash": 43, "pro": 61}[released]
    base = "-Base" if schemes == {"fp8_block"} else ""
    name = f"DeepSeek-V4-{released.capitalize()}{base}"
    if config.num_dspark_stages:
        name += " with DSpark stages"
    if schemes == {"plain"}:
        name += ", not quantised"
    if config.num_hidden_layers != full:
        name += f", {config.num_hidden_layers} of its {full} layers"
    return name
