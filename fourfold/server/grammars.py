"""Grammars of requests, checked in a process of their own before the engine sees them.

Contract: a check takes at most `_SECONDS` and the process's bound of memory; a grammar that takes more
is refused, and the next one meets a fresh process. What was found good lately is not checked again. It
does not know what grammars mean.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from fourfold.core.errors import RequestError
from fourfold.core.request import Grammar

_SECONDS = 5.0
_KNOWN = 256
_BOOT = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from fourfold.text.grammar import check_forever; check_forever()"
)


class GrammarChecker:
    """One process, one check at a time; it begins with the first grammar."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def check(self, grammar: Grammar) -> None:
        """Raises `RequestError` unless the grammar can be used."""
        key = (grammar.kind, grammar.source)
        if key in self._known:
            self._known.move_to_end(key)
            return
        async with self._turn:
            asking = asyncio.get_running_loop().run_in_executor(self._thread, self._ask, grammar)
            try:
                async with asyncio.timeout(_SECONDS):
                    wrong = await asking
            except (TimeoutError, OSError, ValueError):
                self._kill()
                wrong = f"the {grammar.kind} is too expensive to compile"
            except asyncio.CancelledError:
                self._kill()  # its answer would be taken for the next one's
                raise
        if wrong is not None:
            raise RequestError(wrong)
        self._known[key] = None
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    def _ask(self, grammar: Grammar) -> str | None:
        """Blocks; ends when the process does. Raises `ValueError` or `OSError` then."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *sys.path],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"kind": grammar.kind, "source": grammar.source}) + "\n")
        process.stdin.flush()
        answer: str | None = json.loads(process.stdout.readline())
        return answer

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def close(self) -> None:
        """End the process."""
        self._kill()
        self._thread.shutdown(wait=False, cancel_futures=True)
