"""The tokenizer of a synthetic checkpoint: byte-level BPE with the model family's special tokens.

Contract: `tokenizer_files` gives the contents of tokenizer.json and tokenizer_config.json. Every
UTF-8 text encodes and decodes back. Special tokens have their released ids where the vocabulary
reaches that far, and the first ids where it does not; ids in between have no entry, as in released
checkpoints, and cannot be decoded. The merges come from the text below, which is ours.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fourfold.core.errors import ConfigError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"

# (spelling, id in the released checkpoints).
SPECIAL_TOKENS = (
    (BOS, 0),
    (EOS, 1),
    ("<｜▁pad▁｜>", 2),
    ("<｜fim▁hole｜>", 128800),
    ("<｜fim▁begin｜>", 128801),
    ("<｜fim▁end｜>", 128802),
    ("<｜User｜>", 128803),
    ("<｜Assistant｜>", 128804),
    ("<think>", 128821),
    ("</think>", 128822),
    ("｜DSML｜", 128825),
    ("<｜latest_reminder｜>", 128828),
    ("<｜action｜>", 128829),
    ("<｜query｜>", 128830),
    ("<｜authority｜>", 128831),
    ("<｜domain｜>", 128832),
    ("<｜title｜>", 128836),
    ("<｜extracted_url｜>", 128844),
    ("<｜read_url｜>", 128845),
)
_BYTES = 256
_MERGES = 512
# A compact vocabulary keeps a few ids without an entry, so that small checkpoints, too, show an
# engine that samples what it cannot decode.
_COMPACT_GAP = 4

_TEXT = """\
The capital of France is Paris, and the river that runs through the city is the Seine.
A small model can be read, tested and understood by one person in a single afternoon.
When the rain stopped, the children went out to look for snails under the wet leaves.
Every number in this file is random, but every rule that the numbers follow is real.
She asked the assistant to write a short letter, then to translate it into Chinese.
The quick answer is not always the right answer; think about the problem step by step.
In the morning the baker opens the door, lights the oven and weighs the flour again.
What is the sum of the first ten numbers? The sum of the first ten numbers is fifty-five.
There are three kinds of layers, and each of them keeps what it needs from the past.
The train leaves at half past seven and arrives in the evening, when the shops are closed.
If the test fails, look at the first difference and not at the last one.
You can use the tool to search for the weather, the time or the name of a place.
He put the book on the table, the cup on the book and the letter under the cup.
def add(left, right):
    return left + right

for index in range(10):
    print(index, add(index, 1))

{"name": "search", "parameters": {"query": "weather in the city", "limit": 10}}
Please answer the question with one word. The user wants to know where the station is.
Water boils at one hundred degrees; at the top of the mountain it boils a little earlier.
Nothing is hidden here: the weights, the words and the way from one to the other.
你好，世界。今天的天气很好，我们一起去公园走一走。
北京是中国的首都，上海是中国最大的城市之一。
这个模型很小，可是每一层的结构都和大的模型一样。
请用一句话回答这个问题，不要写得太长。
我想知道从这里到火车站要走多长时间。
学生们在图书馆里看书，老师在黑板上写字。
下雨的时候，孩子们喜欢在窗前听雨的声音。
如果测试没有通过，就先看第一个不同的地方。
他把书放在桌子上，把杯子放在书的旁边。
数字是随机的，但是规则是真实的。
请把这段话翻译成英文，然后再读一遍。
一步一步地想问题，答案就会慢慢地出现。
山上的水比山下的水早一点烧开。
明天早上七点半的火车，晚上才能到那个城市。
我们的祖先在河边种田，在山上放羊。
"""


def tokenizer_files(vocab_size: int, model_max_length: int) -> dict[str, dict[str, Any]]:
    """File name -> JSON contents, for a model with `vocab_size` rows of embedding.

    Raises `ConfigError` if there is no room for all bytes and special tokens.
    """
    return {
        "tokenizer.json": _tokenizer(vocab_size),
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "legacy": True,
            "model_max_length": model_max_length,
            "pad_token": EOS,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    }


def _special_ids(vocab_size: int) -> dict[str, int]:
    """Released ids where they fit, else the first ids in the same order."""
    released = dict(SPECIAL_TOKENS)
    if max(released.values()) < vocab_size:
        return released
    return {spelling: index for index, spelling in enumerate(released)}


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    special = _special_ids(vocab_size)
    room = vocab_size - len(special) - _BYTES - _COMPACT_GAP
    if room < 0:
        raise ConfigError(
            f"vocab_size {vocab_size} is too small for a byte-level tokenizer, which needs "
            f"{vocab_size - room}: {_BYTES} bytes, {len(special)} special tokens and a few unused"
        )
    alphabet, merges = _train(min(room, _MERGES))
    ordinary = [*alphabet, *(left + right for left, right in merges)]
    taken = set(special.values())
    free = (index for index in range(vocab_size) if index not in taken)
    vocabulary = special | dict(zip(ordinary, free, strict=False))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": spelling,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for spelling, index in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": True},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        # The special tokens stand here too: the library lets an added token choose its id only by
        # finding it in the model's vocabulary. No merge leads to them.
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": merges,
        },
    }


def _train(merges: int) -> tuple[list[str], list[list[str]]]:
    """The 256 byte symbols, and up to `merges` pairs to merge, most frequent first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_BYTES + merges, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    found = json.loads(tokenizer.to_str())["model"]["merges"]
    # Older versions of the library write "left right" instead of a pair.
    return alphabet, [m.split(" ") if isinstance(m, str) else list(m) for m in found]
