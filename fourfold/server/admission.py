"""Who may wait, and who is told to come back.

Contract: at most `max_running + max_waiting` sequences are admitted, and at most `max_tokens` prompt
tokens wait for their first step (one prompt may always wait if no other does). A refusal costs no
tokenising, and says in how many seconds a place is likely. A ticket is given back exactly once.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from fourfold.server.errors import ApiError, bad_request, busy

_HISTORY = 64
_LONGEST_WAIT = 60


class Ticket:
    """Places for one request's sequences; a context manager that gives them back."""

    def __init__(self, admission: Admission, sequences: int) -> None:
        self._admission, self.sequences = admission, sequences
        self._tokens = 0
        self._open = True

    def wait_with(self, tokens: int) -> None:
        """The request's prompts hold this many tokens. Raises 429 if too many wait."""
        self._admission.take_tokens(tokens)
        self._tokens += tokens

    def started(self, tokens: int) -> None:
        """The engine has begun with a prompt of so many tokens: it waits no more."""
        tokens = min(tokens, self._tokens)
        self._admission.waiting_tokens -= tokens
        self._tokens -= tokens

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.started(self._tokens)
        if self._open:
            self._open = False
            self._admission.give_back(self.sequences, finished=error is None)


class Admission:
    """Counts who runs and waits. `on_reject` is told the reason of every refusal."""

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        max_tokens: int,
        on_reject: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_sequences = max_running + max_waiting
        self.max_tokens = max_tokens
        self._max_running = max_running
        self._on_reject, self._clock = on_reject, clock
        self._finished: deque[float] = deque(maxlen=_HISTORY)
        self.sequences = 0
        self.waiting_tokens = 0

    def ticket(self, sequences: int) -> Ticket:
        """Places for `sequences`. Raises 429, or 400 if there will never be so many."""
        if sequences > self.max_sequences:
            raise bad_request(
                f"the request asks for {sequences} sequences at once; at most "
                f"{self.max_sequences} are taken"
            )
        self.check(sequences)
        self.sequences += sequences
        return Ticket(self, sequences)

    def check(self, sequences: int = 1) -> None:
        """Raise 429 unless there is room, before any work is spent on the request."""
        if self.sequences + sequences > self.max_sequences:
            raise self._refuse("requests", f"{self.sequences} sequences run or wait")
        if self.waiting_tokens >= self.max_tokens:
            raise self._refuse("tokens", f"{self.waiting_tokens} prompt tokens wait")

    def take_tokens(self, tokens: int) -> None:
        """Count waiting prompt tokens. Raises 429."""
        if self.waiting_tokens and self.waiting_tokens + tokens > self.max_tokens:
            raise self._refuse("tokens", f"{self.waiting_tokens} prompt tokens wait")
        self.waiting_tokens += tokens

    def give_back(self, sequences: int, finished: bool) -> None:
        """Free the places of a request that has ended."""
        self.sequences -= sequences
        if finished:
            self._finished.append(self._clock())

    def retry_after(self) -> int:
        """Seconds until the queue is likely to have moved, from how fast requests ended lately."""
        recent = self._finished
        if len(recent) < 2:
            return 1
        rate = len(recent) / max(self._clock() - recent[0], 1e-3)
        excess = max(self.sequences - self._max_running, 1)
        return min(max(math.ceil(excess / rate / 2), 1), _LONGEST_WAIT)

    def _refuse(self, reason: str, what: str) -> ApiError:
        self._on_reject(reason)
        return busy(f"the server is busy: {what}", self.retry_after())
