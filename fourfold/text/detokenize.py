"""Text from token ids as they arrive, in whole characters.

Contract: what `push` and `finish` return, joined, equals `Tokenizer.decode` of all the ids. A
character whose bytes are spread over several tokens appears with the last of them; bytes that can
no longer become a character appear as U+FFFD. It does not know stop strings or chat markup.
"""

from __future__ import annotations

import codecs

from fourfold.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The detokeniser of one generated sequence."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes, possibly none.

        Raises `RequestError` for an id without an entry, and is then unchanged.
        """
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character, else nothing.

        Afterwards the detokeniser is as new.
        """
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
