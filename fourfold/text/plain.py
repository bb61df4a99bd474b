"""Generated tokens as plain text, for completions: everything is content, markers included.

Contract: the interface and events of the parsers in parse.py, so that whoever reads answers need not
know which one it feeds. However the tokens arrive, the text is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from fourfold.text.detokenize import IncrementalDetokenizer
from fourfold.text.events import ContentDelta, Event, Finish
from fourfold.text.stop import StopMatcher
from fourfold.text.tokenizer import Tokenizer


class PlainParser:
    """Reads one generated sequence of token ids."""

    reasoning_tokens = 0
    in_reasoning = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special: bool = False,
    ) -> None:
        """`stop` strings end the text once more than `min_tokens` tokens have come; `include_stop`
        keeps the one that did; `skip_special` leaves markers out. Raises `RequestError` for an empty
        stop string."""
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop = StopMatcher(stop, include_stop)
        self._skipped = (
            frozenset(tokenizer.special_tokens.values()) if skip_special else frozenset()
        )
        self._min_tokens = min_tokens
        self._tokens = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the text; whatever follows is dropped."""
        return self._stop.matched

    def push(self, token_id: int) -> list[Event]:
        """The text that becomes certain with one more token. Raises `RequestError` for an unknown
        id."""
        self._tokens += 1
        if token_id in self._skipped:
            return self._show(self._detokenizer.finish())
        return self._show(self._detokenizer.push(token_id))

    def finish(self, reason: str) -> list[Event]:
        """What is left when the engine has ended the sequence for `reason`; `Finish` comes last."""
        events: list[Event] = []
        if self.stopped is None:
            events = self._show(self._detokenizer.finish())
        if self.stopped is None:
            rest = self._stop.finish()
            return [*events, *([ContentDelta(rest)] if rest else ()), Finish(reason)]
        return [*events, Finish("stop", self.stopped)]

    def _show(self, text: str) -> list[Event]:
        # Before min_tokens nothing ends an answer.
        text = text if self._tokens <= self._min_tokens else self._stop.push(text)
        return [ContentDelta(text)] if text else []
