"""The stages of a DSpark release: `mtp.*` tensors that the engine leaves out, checked all the same.

    mtp.0      a block without compressor, and what projects the target layers' hidden states
    mtp.1 …    a block
    the last   a block, its head, and the two small heads that DSpark drafts with

Contract: findings are warnings, for nothing here is loaded. Widths that config.json does not name (the
number of target layers, the rank) are read from the tensors and must agree. Headers only; torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.config import ModelConfig
from fourfold.core.findings import Finding, Severity
from fourfold.core.parameters import Role
from fourfold.weights.coverage import Matching
from fourfold.weights.header import printable
from fourfold.weights.names import parse
from fourfold.weights.verify_files import GET_AGAIN, FoundFiles

_FIRST = ("main_proj.weight", "main_norm.weight")
_MARKOV = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
_CONFIDENCE = "confidence_head.proj.weight"
_HEAD = ("norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")
_NOT_IN_A_BLOCK = {Role.E_PROJ, Role.H_PROJ, Role.ENORM, Role.HNORM, Role.NORM}
_NOT_IN_A_BLOCK |= {Role.HC_HEAD_FN, Role.HC_HEAD_BASE, Role.HC_HEAD_SCALE}


def check_stages(config: ModelConfig, files: FoundFiles) -> Iterator[Finding]:
    """What is wrong with the stages that are there; nothing for a checkpoint without any."""
    count = config.num_dspark_stages
    # The same block under the names of an MTP layer, whose inventory is known.
    shadow = replace(config, num_dspark_stages=0, num_nextn_predict_layers=1)
    for stage in range(count):
        own = {
            name.split(".", 2)[2]: header
            for name, header in files.headers.items()
            if name.startswith(f"mtp.{stage}.")
        }
        if own:
            extra = (_FIRST if stage == 0 else ()) + (_last() if stage == count - 1 else ())
            yield from _extras(config, own, stage, extra)
            yield from _block(shadow, files, own, stage, extra)


def _last() -> tuple[str, ...]:
    return (*_HEAD, *_MARKOV, _CONFIDENCE)


def _warning(message: str, tensor: str, file: str, offset: int | None = None) -> Finding:
    fix = f"{GET_AGAIN}, if DSpark is wanted: nothing here loads it"
    return Finding(Severity.WARNING, message, printable(tensor), file, offset, fix)


def _extras(
    config: ModelConfig, own: Mapping[str, TensorHeader], stage: int, extra: tuple[str, ...]
) -> Iterator[Finding]:
    """What a stage has beside its block."""
    d, s, v = config.hidden_size, config.hc_mult, config.vocab_size
    ranks = {own[name].shape[-1] for name in _MARKOV if name in own and own[name].shape}
    targets = max(own[_FIRST[0]].shape[-1] // d, 1) if _FIRST[0] in own else 1
    rank = max(ranks, default=0)
    shapes = {
        "main_proj.weight": (d, targets * d),
        "main_norm.weight": (d,),
        "norm.weight": (d,),
        "hc_head_fn": (s, s * d),
        "hc_head_base": (s,),
        "hc_head_scale": (1,),
        _CONFIDENCE: (1, d + rank),
    } | dict.fromkeys(_MARKOV, (v, rank))
    for name in extra:
        header, full = own.get(name), f"mtp.{stage}.{name}"
        if header is None:
            yield _warning("is missing", full, next(iter(own.values())).file)
        elif header.shape != shapes[name]:
            text = f"has shape {list(header.shape)}, expected {list(shapes[name])}"
            yield _warning(text, full, header.file, header.offset_begin)
    weight = own.get(_FIRST[0])
    if weight is not None and weight.dtype.startswith("F8") and "main_proj.scale" not in own:
        text = f"is {weight.dtype} without a scale"
        yield _warning(text, f"mtp.{stage}.{_FIRST[0]}", weight.file, weight.offset_begin)


def _block(
    shadow: ModelConfig,
    files: FoundFiles,
    own: Mapping[str, TensorHeader],
    stage: int,
    extra: tuple[str, ...],
) -> Iterator[Finding]:
    """The block's tensors against those of an MTP layer's."""
    known = {*extra, "main_proj.scale"} if stage == 0 else set(extra)
    block = {
        f"mtp.0.{name}": replace(header, name=f"mtp.0.{name}")
        for name, header in own.items()
        if name not in known
    }
    matching = Matching(files.directory, block, shadow)
    place = f"mtp.{stage}."
    for name in matching.missing:
        parsed = parse(name)
        if name.startswith("mtp.0.") and parsed and parsed.roles[0] not in _NOT_IN_A_BLOCK:
            file = next(iter(own.values())).file
            yield _warning("is missing", place + name.removeprefix("mtp.0."), file)
    wrong = [(mismatch.header, mismatch.reason) for mismatch in matching.mismatched]
    wrong += [(block[name], "is no tensor of a DSpark stage") for name in matching.unexpected]
    for header, reason in wrong:
        name = place + header.name.removeprefix("mtp.0.")
        yield _warning(reason, name, header.file, header.offset_begin)
