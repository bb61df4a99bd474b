"""The tokenizer of the built-in checkpoint, trained on generated conversations.

Contract: byte-level BPE with the model family's special tokens on the first ids and one token a digit,
so that sums are columns and not words. `tokenizer_files` gives the contents of tokenizer.json and
tokenizer_config.json; equal arguments give equal files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fourfold.text.tokenizer import Tokenizer as Reader
from fourfold.weights.synthetic_tokenizer import SPECIAL_TOKENS
from fourfold.weights.synthetic_tokenizer import tokenizer_files as base_files
from train.data.encode import Encoder, answer_segments, encoded
from train.data.mixture import SKILLS, Mixture

_BYTES = 256
TEXTS = 1500  # conversations a skill
_FAR = 300  # tokens of a far recall's text


def corpus(seed: int, texts: int) -> Iterator[str]:
    """The plain text of training conversations, `texts` of each skill; markers are left out."""
    small = base_files(len(SPECIAL_TOKENS) + _BYTES + 8, 1)["tokenizer.json"]
    mixture = Mixture(Encoder(Reader(small, "bytes")), seed)
    for skill in SKILLS:
        random = Random(f"{seed}/{skill}")
        for _ in range(texts):
            item = mixture.item(skill, random, False, 4 * _FAR)
            for segment in (*encoded(item, item.messages).segments, *answer_segments(item)):
                if not segment.special:
                    yield segment.text


def tokenizer_files(
    vocab_size: int, model_max_length: int, seed: int = 0, texts: int = TEXTS
) -> dict[str, Any]:
    """File name -> JSON contents."""
    merges = vocab_size - _BYTES - len(SPECIAL_TOKENS)
    found = _merges(corpus(seed, texts), merges)
    files = base_files(vocab_size, model_max_length)
    data: dict[str, Any] = files["tokenizer.json"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [name for name, _ in SPECIAL_TOKENS]
    special = dict(zip(entries, range(len(entries)), strict=True))
    ordinary = [*alphabet, *(left + right for left, right in found)]
    vocabulary = special | {text: len(special) + n for n, text in enumerate(ordinary)}
    data["model"] |= {"vocab": vocabulary, "merges": [list(pair) for pair in found]}
    data["pre_tokenizer"] = json.loads(_splitter())
    added = data["added_tokens"][0]
    data["added_tokens"] = [added | {"id": n, "content": name} for name, n in special.items()]
    return files


def _splits() -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _splitter() -> str:
    holder = Tokenizer(models.BPE())
    holder.pre_tokenizer = _splits()
    return json.dumps(json.loads(holder.to_str())["pre_tokenizer"])


def _merges(texts: Iterator[str], count: int) -> list[tuple[str, str]]:
    """The pairs to merge, most frequent first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _splits()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_BYTES + count,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    found = [tuple(p.split(" ")) if isinstance(p, str) else tuple(p) for p in pairs]
    return [(left, right) for left, right in found]


def write_tokenizer(
    directory: Path, vocab_size: int, model_max_length: int, seed: int, texts: int = TEXTS
) -> None:
    """Train and write both files."""
    for name, data in tokenizer_files(vocab_size, model_max_length, seed, texts).items():
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        (directory / name).write_text(text + "\n", encoding="utf-8")
