"""The spellings of the special tokens of the chat format.

Contract: constants only. The bar is U+FF5C and the word separator U+2581; ASCII look-alikes are other
strings. Ids are the tokenizer's business: a marker is always found by its spelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
# One token without the angle brackets; everything around it is ordinary text.
DSML = "｜DSML｜"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"

# Name of a quick-instruction task -> its marker.
TASKS: Mapping[str, str] = MappingProxyType(
    {
        "action": "<｜action｜>",
        "query": "<｜query｜>",
        "authority": "<｜authority｜>",
        "domain": "<｜domain｜>",
        "title": "<｜title｜>",
        "read_url": "<｜read_url｜>",
    }
)
