"""Grammars of strangers, tried in a process of their own before an engine sees them.

    check(grammar) ─▶ known verdict?  ─▶ one at a time ─▶ compiler's process: compiled, or why not
                                                          (processor time, memory and wall time bounded)

Contract: `check` never takes longer than its bounds, whatever the grammar holds, and never harms this
process: a compiler that runs over its limits, or crashes, is replaced, and its grammar refused. What
passes compiles in the engine with the same work. The process needs no model and holds one small table of
tokens. It does not know the server, and imports no compiler here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
import signal
import sys
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress

from fourfold.core.errors import FourfoldError, RequestError
from fourfold.core.request import Grammar
from fourfold.text.grammar import check_source

CPU_SECONDS = 0.25  # of one grammar
MEMORY_BYTES = 1 << 30  # of the process's address space, some 0.2 GiB of which it needs to run
WALL_SECONDS = 10.0  # of one grammar; more only if the machine is overloaded or the process stopped
MAX_WAITING = 64
_VERDICTS = 512
_LINE_BYTES = 1 << 20
_BOOT = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from fourfold.text.grammar_check import main; sys.exit(main())"
)


class GrammarsBusyError(FourfoldError):
    """Too many grammars wait to be checked: come back later."""

    exit_status = 1


class GrammarChecker:
    """Says whether grammars can be used, for one event loop. The process starts with the first one;
    `close` ends it, as does the end of this process.

    `special_tokens` maps spellings to ids, as `Tokenizer.special_tokens`.
    """

    def __init__(self, special_tokens: Mapping[str, int], vocab_size: int, eos_token_id: int):
        special = {text: token for text, token in special_tokens.items() if token < vocab_size}
        self._first = _line({"special": special, "size": vocab_size, "eos": eos_token_id})
        self._process: asyncio.subprocess.Process | None = None
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._turn = asyncio.Lock()
        self._waiting = 0

    @staticmethod
    def bound() -> str:
        """The bounds, for a person."""
        return (
            f"bound: a grammar {CPU_SECONDS:g} s of processor time and {MEMORY_BYTES >> 20} MiB to be "
            f"compiled, outside the engine; {MAX_WAITING} wait for that"
        )

    async def check(self, grammar: Grammar) -> None:
        """Return if the grammar can be used. Raises `RequestError` saying why it cannot, or
        `GrammarsBusyError`."""
        check_source(grammar)
        key = hashlib.sha256(f"{grammar.kind}\n{grammar.source}".encode()).digest()
        if key not in self._verdicts:
            if self._waiting >= MAX_WAITING:
                raise GrammarsBusyError(f"{MAX_WAITING} grammars are waiting to be checked")
            self._waiting += 1
            try:
                async with self._turn:
                    if key not in self._verdicts:
                        self._verdicts[key] = await self._tried(grammar)
            finally:
                self._waiting -= 1
        verdict = self._verdicts[key]
        self._verdicts.move_to_end(key)
        if len(self._verdicts) > _VERDICTS:
            self._verdicts.popitem(last=False)
        if verdict is not None:
            raise RequestError(verdict)

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _tried(self, grammar: Grammar) -> str | None:
        """What the process says: None, or why not. A caller that leaves ends the process, which else
        would answer the next one with this one's verdict."""
        whole = False
        try:
            async with asyncio.timeout(WALL_SECONDS):
                answer = await self._ask(grammar)
            whole = answer is not None
        except TimeoutError:
            answer = None
        finally:
            if not whole:
                await self.close()
        if answer is None:
            return (
                f"the {grammar.kind} cannot be used: compiling it takes more than {CPU_SECONDS:g} s or "
                f"{MEMORY_BYTES >> 20} MiB"
            )
        verdict: str | None = json.loads(answer)
        return verdict

    async def _ask(self, grammar: Grammar) -> bytes | None:
        """The process's answer, None if it died of the question."""
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _BOOT, *sys.path),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # a crash would write parts of a request there
                start_new_session=True,
            )
            assert self._process.stdin is not None
            self._process.stdin.write(self._first)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(_line([grammar.kind, grammar.source]))
            await stdin.drain()
            answer = await stdout.readline()
        except ConnectionError:
            return None
        return answer if answer.endswith(b"\n") else None


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def main() -> int:
    """The compiler's process: a line with the vocabulary, then a line a grammar, and a line back for
    each. Ends with its input, or by SIGPROF when a grammar has used up its time."""
    from fourfold.text.grammar_mask import compiled, guided_tokenizer

    first = json.loads(sys.stdin.readline())
    special: dict[int, bytes] = {token: text.encode() for text, token in first["special"].items()}
    # Whether a grammar can be used depends on no token but the special ones; the others only have to
    # be able to spell everything.
    tokens = [special.get(token, b"") for token in range(first["size"])]
    plain = (token for token in range(first["size"]) if token not in special | {first["eos"]: b""})
    table = dict(zip(range(256), plain, strict=False))
    for byte, token in table.items():
        tokens[token] = bytes([byte])

    def encode(text: str) -> list[int]:
        return [table[byte] for byte in text.encode()]

    tokenizer = guided_tokenizer(tokens, {*special, first["eos"]}, first["eos"], encode)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in iter(sys.stdin.readline, ""):
        kind, source = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            compiled(Grammar(kind, source), tokenizer)
            verdict = None
        except RequestError as error:
            verdict = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(verdict) + "\n")
        sys.stdout.flush()
    return 0
