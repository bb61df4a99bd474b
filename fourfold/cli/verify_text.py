"""What `fourfold verify` asks of the small files beside the weights: tokenizer, sampling defaults,
prompt format.

Contract: findings only; no fault of a file raises. The tokenizer is held against the vocabulary of
config.json: every id that ordinary text or a chat prompt can hold needs a row of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.core.config import ModelConfig
from fourfold.core.errors import FourfoldError
from fourfold.core.findings import Finding, Severity
from fourfold.text import markers
from fourfold.text.profiles import ENCODER_FILE, detect_profile
from fourfold.text.tokenizer import TOKENIZER_FILE, Tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
_GET = "get the file that belongs to these weights"
_CHAT = (markers.USER, markers.ASSISTANT, markers.THINK, markers.END_THINK, markers.DSML)


@dataclass(frozen=True)
class TextCheck:
    """The findings, and a line about the tokenizer and one about the prompt format."""

    findings: tuple[Finding, ...]
    tokenizer: str
    profile: str


def check_text(directory: Path, config: ModelConfig | None) -> TextCheck:
    """Look at the small files in `directory`; `config` is the model's (None: it cannot be read)."""
    findings: list[Finding] = []
    tokenizer = None
    try:
        tokenizer = Tokenizer.from_directory(directory)
    except FourfoldError as error:
        text = str(error).removeprefix(f"{directory / TOKENIZER_FILE}").lstrip(": ")
        findings.append(Finding(Severity.ERROR, text, file=TOKENIZER_FILE, fix=_GET))
    line = "none"
    if tokenizer is not None:
        line = f"{tokenizer.vocab_size:,} tokens"
        findings += _special(tokenizer)
        if config is not None:
            line += f" for {config.vocab_size:,} rows of the embedding"
            findings += _against_vocabulary(tokenizer, config)
        findings += _tokenizer_config(directory, tokenizer)
    if config is not None:
        findings += _generation_config(directory, config)
    found = detect_profile(directory)
    if not found.certain:
        present = (directory / ENCODER_FILE).exists()
        severity = Severity.WARNING if present else Severity.NOTE
        findings.append(Finding(severity, f"prompt format: {found.reason}", file=ENCODER_FILE))
    how = found.reason if found.certain else "a guess"
    return TextCheck(tuple(findings), line, f"{found.profile.value} ({how})")


def _special(tokenizer: Tokenizer) -> Iterator[Finding]:
    missing = [text for text in _CHAT if text not in tokenizer.special_tokens]
    if missing:
        text = f"has no {', '.join(missing)}: chat prompts cannot be written"
        yield Finding(Severity.WARNING, text, file=TOKENIZER_FILE, fix=_GET)


def _against_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> Iterator[Finding]:
    size, special = config.vocab_size, tokenizer.special_tokens
    beyond = sorted(token for token in tokenizer.known_ids() if token >= size)
    unused = set(special.values()) - {special.get(text) for text in _CHAT}
    needed = [token for token in beyond if token not in unused]
    if needed:
        text = (
            f"{len(needed)} tokens have ids from {needed[0]} on, but config.json's vocab_size is "
            f"{size}: the embedding has no row for them"
        )
        yield Finding(Severity.ERROR, text, file=TOKENIZER_FILE, fix=_GET)
    elif beyond:
        text = (
            f"{len(beyond)} special tokens from id {beyond[0]} on have no row: refused in prompts"
        )
        yield Finding(Severity.NOTE, text, file=TOKENIZER_FILE)
    for field, marker in (("bos_token_id", markers.BOS), ("eos_token_id", markers.EOS)):
        expected, found = getattr(config, field), special.get(marker)
        if found != expected:
            text = f"gives {marker} the id {found}, config.json's {field} is {expected}"
            yield Finding(Severity.ERROR, text, file=TOKENIZER_FILE, fix=_GET)


def _load(directory: Path, name: str) -> tuple[Mapping[str, Any], list[Finding]]:
    """A JSON object; an empty one where there is none, with what is wrong."""
    path = directory / name
    if not path.exists():
        return {}, []
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, [Finding(Severity.WARNING, f"cannot be read: {error}", file=name, fix=_GET)]
    if not isinstance(data, dict):
        return {}, [Finding(Severity.WARNING, "must hold a JSON object", file=name, fix=_GET)]
    return data, []


def _tokenizer_config(directory: Path, tokenizer: Tokenizer) -> Iterator[Finding]:
    data, faults = _load(directory, TOKENIZER_CONFIG)
    yield from faults
    for field, marker in (("bos_token", markers.BOS), ("eos_token", markers.EOS)):
        value = data.get(field)
        said = value.get("content") if isinstance(value, dict) else value
        if said is not None and said != marker and marker in tokenizer.special_tokens:
            text = f"{field} is {said!r}; this model's is {marker}, which is used"
            yield Finding(Severity.WARNING, text, file=TOKENIZER_CONFIG, fix=_GET)


def _generation_config(directory: Path, config: ModelConfig) -> Iterator[Finding]:
    data, faults = _load(directory, GENERATION_CONFIG)
    yield from faults
    for field in ("bos_token_id", "eos_token_id"):
        value, expected = data.get(field), getattr(config, field)
        ids = value if isinstance(value, list) else [value]
        if value is not None and expected not in ids:
            text = f"{field} is {value}, config.json says {expected}"
            yield Finding(Severity.WARNING, text, file=GENERATION_CONFIG, fix=_GET)
