"""A checkpoint's tokenizer: text to token ids and back, byte for byte.

Contract: reads `tokenizer.json` (byte-level BPE) and nothing else. Nothing is inserted: the prompt
carries its own begin-of-sentence marker. Special tokens are found by spelling, never by number.
Plain text that happens to spell a marker stays plain text unless the caller allows specials. It
does not know chat formats, models or the size of the embedding; ids may have gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer as Bpe

from fourfold.core.errors import ConfigError, RequestError

TOKENIZER_FILE = "tokenizer.json"
_LONG = 10_000  # characters


def _byte_alphabet() -> Mapping[str, int]:
    """The character that byte-level BPE writes for each byte: itself where it is printable and no
    space, else the next free one from U+0100 on (GPT-2's convention)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return MappingProxyType(table)


BYTE_ALPHABET = _byte_alphabet()


class Tokenizer:
    """Encodes and decodes. Build it with `from_directory`; it never changes afterwards."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        """`data` is the parsed `tokenizer.json`; `source` names it in messages."""
        _check_byte_level(data, source)
        self._source = source
        self._with_special = _build(data, source)
        # A second encoder without the markers: removing them is the only way to be sure that none
        # is cut out of plain text before the merges run.
        self._plain = _build({**data, "added_tokens": []}, source)
        added = self._with_special.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items()}
        for token in data.get("added_tokens") or ():
            if self._special.get(token["content"]) != token["id"]:
                found = self._special.get(token["content"])
                raise ConfigError(
                    f"{source}: added token {token['content']} must get id {token['id']}, but the "
                    f"vocabulary leads to {found}"
                )
        vocabulary: dict[str, int] = self._with_special.get_vocab(with_added_tokens=False)
        self._bytes = {index: _token_bytes(text) for text, index in vocabulary.items()}
        self._bytes |= {index: text.encode() for text, index in self._special.items()}

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read `directory`/tokenizer.json. Raises `ConfigError` naming the file."""
        path = Path(directory) / TOKENIZER_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing: a checkpoint brings its own tokenizer") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path} must hold a JSON object, found {type(data).__name__}")
        return cls(data, str(path))

    @property
    def vocab_size(self) -> int:
        """How many ids decode to something. The largest id may be above this: ids may have gaps."""
        return len(self._bytes)

    def known_ids(self) -> frozenset[int]:
        """The ids that decode to something; no other may be sampled."""
        return frozenset(self._bytes)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Spelling of every marker -> its id."""
        return MappingProxyType(self._special)

    def special_id(self, spelling: str) -> int:
        """The id of a marker. Raises `ConfigError` if the tokenizer has none of that spelling."""
        if spelling not in self._special:
            raise ConfigError(f"{self._source} has no special token {spelling}")
        return self._special[spelling]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; nothing is added at either end.

        With `allow_special` a marker spelled in `text` becomes its one id; without, its characters
        become ordinary tokens. Raises `RequestError` for half a surrogate pair.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode: half a surrogate pair at character {error.start}"
            ) from None
        encoder = self._with_special if allow_special else self._plain
        if len(text) < _LONG:
            ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
            return ids
        # The same tokens; this call lets other threads run meanwhile.
        (found,) = encoder.encode_batch_fast([text], add_special_tokens=False)
        ids = found.ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, not necessarily whole characters.

        Raises `RequestError` for an id without an entry.
        """
        if token_id not in self._bytes:
            raise RequestError(f"token id {token_id} has no entry in {self._source}")
        return self._bytes[token_id]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of `token_ids`, markers included; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")


def _build(data: Mapping[str, Any], source: str) -> Bpe:
    try:
        encoder = Bpe.from_str(json.dumps(data))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{source} is not a usable tokenizer: {error}") from error
    # What a file may ask for beyond tokens would change a prompt's length behind our back.
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _token_bytes(text: str) -> bytes:
    """The bytes of a vocabulary entry: one for each character, unless it is not byte-level text."""
    if all(character in BYTE_ALPHABET for character in text):
        return bytes(BYTE_ALPHABET[character] for character in text)
    return text.encode()


def _check_byte_level(data: Mapping[str, Any], source: str) -> None:
    """Only byte-level BPE decodes token by token into bytes, which all the rest relies on."""
    model = data.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE":
        raise ConfigError(f"{source}: model.type must be 'BPE', found {kind!r}")
    decoder = data.get("decoder")
    kind = decoder.get("type") if isinstance(decoder, dict) else None
    if kind != "ByteLevel":
        raise ConfigError(f"{source}: decoder.type must be 'ByteLevel', found {kind!r}")
