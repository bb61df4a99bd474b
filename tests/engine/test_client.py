"""Clients of an engine: what a request gets, who learns of a death and when, and that nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fourfold.core import errors
from fourfold.core.client import (
    EngineClosedError,
    EngineDeadError,
    EngineInfo,
    EngineState,
    EngineStats,
    Launch,
    StepInfo,
)
from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.errors import CapacityError, FourfoldError, ModelNotFoundError, RequestError
from fourfold.core.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from fourfold.engine import wire
from fourfold.engine.client import InProcessEngineClient, ProcessEngineClient
from fourfold.engine.engine import Engine
from fourfold.engine.start import start_engine
from fourfold.engine.watchdog import Watchdog, WatchdogLimits
from fourfold.engine.worker import EngineLoop
from fourfold.weights.synthetic import write_checkpoint

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
LONG = SamplingParams(max_tokens=1800, temperature=0.0, ignore_eos=True)
SHORT = replace(LONG, max_tokens=6)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    directory = tmp_path_factory.mktemp("client") / "tiny"
    write_checkpoint(directory, "tiny", weights="float32", seed=1)
    config = EngineConfig(str(directory), max_num_seqs=4, max_model_len=2000)
    return Launch(config, "cpu", tuple(range(630)))


@asynccontextmanager
async def started(
    launch: Launch, limits: WatchdogLimits | None = None
) -> AsyncIterator[InProcessEngineClient]:
    client = InProcessEngineClient(launch, limits)
    await client.start()
    try:
        yield client
    finally:
        await client.shutdown()


def request(name: str, params: SamplingParams = SHORT, length: int = 5) -> Request:
    return Request(name, tuple((3 + 7 * i + len(name)) % 600 for i in range(length)), params)


async def collect(client: Any, wanted: Request) -> list[RequestOutput]:
    return [output async for output in client.generate(wanted)]


def tokens(outputs: list[RequestOutput], index: int = 0) -> list[int]:
    return [t for o in outputs if o.index == index for t in o.new_token_ids]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)


async def nothing_left(client: InProcessEngineClient) -> None:
    async def idle() -> bool:
        stats = await client.stats()
        return not (stats.num_running or stats.num_waiting or stats.pages_used)

    await until(idle)


# ---- what a request gets


def test_a_client_gives_what_the_engine_gives(launch: Launch) -> None:
    wanted = [
        request("greedy"),
        request("two", replace(SHORT, n=2, temperature=0.8, seed=3), 300),
        request("probable", replace(SHORT, logprobs=2, prompt_logprobs=1)),
        request("biased", replace(SHORT, logit_bias={5: 100.0}, stop_token_ids=[5])),
    ]
    engine, _ = start_engine(launch)
    expected: dict[str, list[RequestOutput]] = {each.request_id: [] for each in wanted}
    for each in wanted:
        engine.add(each)
    for output in engine.run():
        expected[output.request_id].append(output)

    async def run() -> list[list[RequestOutput]]:
        async with started(launch) as client:
            return await asyncio.gather(*(collect(client, each) for each in wanted))

    for each, got in zip(wanted, asyncio.run(run()), strict=True):
        known = expected[each.request_id]
        for index in range(each.params.n):
            assert tokens(got, index) == tokens(known, index)
        assert [o.logprobs for o in got] == [o.logprobs for o in known]
        assert [o.prompt_logprobs for o in got] == [o.prompt_logprobs for o in known]
        assert got[-1].finish_reason is known[-1].finish_reason
        assert got[-1].stop_reason == known[-1].stop_reason
        assert {o.request_id for o in got} == {each.request_id}


def test_a_refused_request_harms_no_other(launch: Launch) -> None:
    bad = {
        "long": request("long", replace(LONG, max_tokens=1999)),
        "vocabulary": Request("vocabulary", (1, 100_000), SHORT),
        "empty": Request("empty", (), SHORT),
        "type": Request("type", ("a",), SHORT),  # type: ignore[arg-type]
        "object": Request("object", (1,), SHORT, cache_salt=object()),  # type: ignore[arg-type]
    }

    async def run() -> list[Any]:
        async with started(launch) as client:
            work = [collect(client, each) for each in (request("good"), *bad.values())]
            return await asyncio.gather(*work, return_exceptions=True)

    good, long, vocabulary, empty, kind, thing = asyncio.run(run())
    assert len(tokens(good)) == 6
    assert isinstance(long, CapacityError)
    assert "(5 tokens) + max_tokens (1999) = 2004" in str(long)
    assert isinstance(vocabulary, RequestError)
    assert "token 100000" in str(vocabulary)
    assert isinstance(empty, RequestError)
    assert isinstance(kind, RequestError)
    assert "prompt_token_ids" in str(kind)
    assert isinstance(thing, RequestError)


def test_leaving_an_iterator_aborts_the_request(launch: Launch) -> None:
    async def run() -> None:
        async with started(launch) as client:
            async with aclosing(client.generate(request("closed", LONG))) as outputs:
                async for _ in outputs:
                    break
            async for _ in client.generate(request("left", LONG)):
                break
            cancelled = asyncio.create_task(collect(client, request("cancelled", LONG)))
            await asyncio.sleep(0.1)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            await nothing_left(client)
            assert client.health().requests == 0

    asyncio.run(run())


def test_an_id_used_again_meets_no_output_of_its_former_life(launch: Launch) -> None:
    async def run() -> None:
        async with started(launch) as client:
            expected = tokens(await collect(client, request("x")))
            for _ in range(3):
                async with aclosing(client.generate(request("x", LONG, 40))) as outputs:
                    await anext(outputs)
                    with pytest.raises(RequestError, match="'x' is running already"):
                        await collect(client, request("x"))
                assert tokens(await collect(client, request("x"))) == expected

    asyncio.run(run())


def test_a_slow_consumer_holds_nobody_up(launch: Launch) -> None:
    async def run() -> None:
        async with started(launch) as client:
            slow = client.generate(request("slow", replace(SHORT, max_tokens=30)))
            got = [await anext(slow)]
            await nothing_left(client)  # it has run to its end meanwhile
            assert (await client.stats()).generation_tokens == 30
            got += [output async for output in slow]
            assert len(tokens(got)) == 30
            assert got[-1].finish_reason is FinishReason.LENGTH

    asyncio.run(run())


def test_one_of_several_sequences_can_be_aborted(launch: Launch) -> None:
    async def run() -> None:
        async with started(launch) as client:
            params = replace(LONG, n=3, max_tokens=12, temperature=1.0, seed=1)
            expected = await collect(client, request("all", params))
            got = []
            async for output in client.generate(request("few", params)):
                got.append(output)
                if output.index == 1 and output.new_token_ids and len(tokens(got, 1)) == 3:
                    assert await client.abort("few", 1)
                    assert not await client.abort("few", 1)
            assert tokens(got, 1) == tokens(expected, 1)[: len(tokens(got, 1))]
            assert [o.finish_reason for o in got if o.index == 1][-1] is FinishReason.ABORT
            for index in (0, 2):
                assert tokens(got, index) == tokens(expected, index)
            assert not await client.abort("unknown")
            await nothing_left(client)

    asyncio.run(run())


def test_the_first_of_several_sequences_aborted_before_its_prompt_is_done(launch: Launch) -> None:
    engine, _ = start_engine(launch)
    params = replace(SHORT, n=3, temperature=1.0, seed=1)
    engine.add(request("all", params))
    expected = {o.index: [] for o in engine.run()}  # type: ignore[var-annotated]
    engine.add(request("few", params))
    assert engine.abort("few", 0)
    assert engine.abort("few", 2)
    assert {o.index for o in engine.run()} == {1} < set(expected)
    engine.scheduler.cache.pages.check()
    assert engine.scheduler.cache.pages.num_used == 0


def test_counts_and_cache_reset(launch: Launch) -> None:
    async def run() -> None:
        async with started(launch) as client:
            info = client.info
            assert (info.model, info.max_model_len, info.vocab_size) == ("tiny", 2000, 640)
            assert any("tokens of context" in line for line in info.capacity)
            await collect(client, request("a", length=600))
            await collect(client, request("a", length=600))
            stats = await client.stats()
            assert stats.prompt_tokens == 1200
            assert stats.cached_tokens == 599
            assert stats.generation_tokens == 12
            assert stats.pages_cached == 2
            await client.reset_prefix_cache()
            stats = await client.stats()
            assert stats.pages_cached == stats.images == 0
            health = client.health()
            assert health.state is EngineState.READY
            assert health.num_steps == stats.num_steps == health.step.number
            assert not health.in_step

    asyncio.run(run())


# ---- the end


def test_drain_lets_requests_finish_and_takes_no_more(launch: Launch) -> None:
    async def run() -> None:
        async with started(launch) as client:
            running = asyncio.create_task(
                collect(client, request("a", replace(LONG, max_tokens=20)))
            )
            await asyncio.sleep(0)
            draining = asyncio.create_task(client.drain(20.0))
            await asyncio.sleep(0)
            assert client.health().state is EngineState.DRAINING
            with pytest.raises(EngineClosedError, match="no more requests"):
                await collect(client, request("late"))
            assert await draining == 0
            assert len(tokens(await running)) == 20

    asyncio.run(run())


def test_what_does_not_finish_in_time_is_aborted(launch: Launch) -> None:
    async def run() -> None:
        client = InProcessEngineClient(launch)
        with pytest.raises(EngineClosedError, match="not running: it is new"):
            await collect(client, request("early"))
        await client.start()
        running = asyncio.create_task(collect(client, request("a", LONG)))
        await asyncio.sleep(0.1)
        await client.shutdown(timeout=0.1)
        outputs = await running
        assert outputs[-1].finish_reason is FinishReason.ABORT
        assert client.health().state is EngineState.STOPPED
        with pytest.raises(EngineClosedError, match="stopped"):
            await collect(client, request("late"))
        await client.shutdown()

    asyncio.run(run())


def test_a_defect_in_a_step_reaches_everybody(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    async def run() -> None:
        async with started(launch) as client:
            first = await collect(client, request("a"))
            assert len(tokens(first)) == 6
            step, steps = Engine.step, iter(range(3))

            def broken(engine: Engine) -> list[RequestOutput]:
                if next(steps, None) is None:
                    raise ZeroDivisionError("two sequences, no page")
                return step(engine)

            monkeypatch.setattr(Engine, "step", broken)
            work = [collect(client, request(name, LONG)) for name in ("b", "c")]
            for found in await asyncio.gather(*work, return_exceptions=True):
                assert isinstance(found, EngineDeadError)
                expected = r"died after step \d+ \(2 sequences, .*: ZeroDivisionError: two"
                assert re.search(expected, str(found)), found
            assert client.health().state is EngineState.DEAD
            with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
                await client.stats()

    asyncio.run(run())


def test_a_step_that_does_not_end_is_noticed(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def stuck(engine: Engine) -> list[RequestOutput]:
        engine._on_step(StepInfo(1, 1, 5))
        released.wait(20)
        return []

    async def run() -> None:
        limits = WatchdogLimits(tick=0.05, step=0.3)
        async with started(launch, limits) as client:
            monkeypatch.setattr(Engine, "step", stuck)
            with pytest.raises(EngineDeadError) as found:
                await collect(client, request("a"))
            released.set()
            assert "in step 1 (1 sequence, 5 tokens): the step takes" in str(found.value)
            assert found.value.step == 1

    asyncio.run(run())


def test_an_engine_that_cannot_load_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        client = InProcessEngineClient(Launch(EngineConfig(str(tmp_path)), "cpu"))
        with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
            await client.start()
        assert client.health().state is EngineState.STOPPED

    asyncio.run(run())


# ---- the watchdog


class Clock:
    """Time as a test wants it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_silence_counts_only_while_somebody_listens_and_waits() -> None:
    clock = Clock()
    dog = Watchdog(WatchdogLimits(tick=0.5, silence=2.0), clock)
    assert dog.where() == "before its first step"
    dog.begun(StepInfo(1, 1, 9))
    for _ in range(100):
        clock.now += 0.5
        assert dog.tick(has_work=False) is None
    # A client that was held up for a minute has not listened for that minute.
    clock.now += 60
    assert dog.tick(has_work=True) is None
    assert dog.silence > 60
    dog.heard()
    assert dog.silence == 0
    assert [dog.tick(has_work=True) for _ in range(3)] == [None] * 3
    assert dog.tick(has_work=True) == "it gave no sign of life for 2.0 s"


def test_a_step_has_a_limit_and_idleness_has_none() -> None:
    clock = Clock()
    dog = Watchdog(WatchdogLimits(silence=None, step=100.0), clock)
    dog.begun(StepInfo(7, 2, 30))
    clock.now = 99
    assert dog.tick(has_work=True) is None
    assert dog.where() == "in step 7 (2 sequences, 30 tokens)"
    dog.done(7)
    clock.now = 1000
    assert dog.tick(has_work=False) is None
    dog.given_work()
    assert dog.tick(has_work=True) is None
    clock.now = 1101
    assert dog.tick(has_work=True) == "no step began for 101 s, more than the 100 s allowed"
    dog.begun(StepInfo(8, 1, 1))
    clock.now = 1300
    assert dog.tick(has_work=True) == "the step takes 199 s, more than the 100 s allowed"


# ---- frames

LOGPROBS = TokenLogprobs(3, -1.5, 2, ((4, -1.0), (3, -1.5)))
OUTPUT = RequestOutput(
    "k", (1, 2), FinishReason.STOP, 1, 2, (LOGPROBS,), (None, LOGPROBS), 7, "why", 1, "error"
)
REQUEST = Request(
    "ä",
    (1, 2**31),
    SamplingParams(stop=("a", "b"), logit_bias={3: -2}, seed=2**63 - 1),
    1,
    "s",
    (1,),
)
COMMANDS = (
    wire.Start(
        Launch(EngineConfig("m", kernels={"a": "b"}, cache=CacheConfig(num_pages=3)), "cpu", (1, 5))
    ),
    wire.Add("k", wire.pack_request(REQUEST)),
    wire.Abort("k", 1),
    wire.AskStats(5),
    wire.ResetCache(6),
    wire.Stop(),
)
EVENTS = (
    wire.Loading("a", 1, 2**40),
    wire.Ready(
        EngineInfo(
            "m",
            None,
            "d",
            "bfloat16",
            1,
            2,
            3,
            4,
            5,
            6,
            ("a",),
            ("b",),
            {"a": [{"b": 1, "c": None}]},
        )
    ),
    wire.Failed("ConfigError", "ü"),
    wire.Beat(),
    wire.StepBegun(StepInfo(1, 2, 3)),
    wire.StepDone(9, (OUTPUT, RequestOutput("b", ()))),
    wire.Refused("k", "RequestError", "no"),
    wire.Answer(5, EngineStats(1, drafted=(1, 2))),
    wire.Crashed("x"),
)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_frames_arrive_as_they_were_sent_however_they_are_cut(size: int) -> None:
    for frames, decode in ((COMMANDS, wire.decode_command), (EVENTS, wire.decode_event)):
        data = b"".join(map(wire.encode, frames))  # type: ignore[arg-type]
        splitter, got = wire.FrameSplitter(), []
        for begin in range(0, len(data), size):
            got += map(decode, splitter.feed(data[begin : begin + size]))
        assert tuple(got) == frames


def test_requests_arrive_whole() -> None:
    got = wire.unpack_request(wire.pack_request(REQUEST))
    stops = tuple(got.params.stop)
    assert replace(got, params=replace(got.params, stop=stops)) == replace(
        REQUEST, params=replace(REQUEST.params, stop_token_ids=[])
    )


def test_bytes_that_are_no_frame_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(wire.WireError, match="4294967295 bytes"):
        wire.FrameSplitter().feed(b"\xff\xff\xff\xff")
    for body in (b"", b"\xc1", b"\x91\xa4none", b"\x93\xa5abort\x01\xc0", b"\x80"):
        with pytest.raises(wire.WireError):
            wire.decode_command(body)
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    assert wire.encode(wire.Crashed("x" * 80))
    with pytest.raises(CapacityError, match="longer than the 100 allowed"):
        wire.encode(wire.Crashed("x" * 100))


def test_every_error_comes_back_as_what_it_was() -> None:
    kinds = [
        k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, FourfoldError)
    ]
    assert len(kinds) >= 8
    for kind in kinds:
        again = wire.restored(wire.error_kind(kind("why")), "why")
        assert type(again) is kind
        assert str(again) == "why"
    assert wire.error_kind(EngineClosedError("x")) == "FourfoldError"
    with pytest.raises(wire.WireError):
        wire.restored("listing", "x")


def test_log_probabilities_too_long_for_a_frame_end_their_request_alone() -> None:
    sent: list[wire.StepDone] = []
    aborted: list[tuple[str, int]] = []

    class Link:
        def send(self, event: wire.StepDone) -> None:
            if len(event.outputs) > 1 or len(event.outputs[0].new_token_ids) > 1:
                raise CapacityError("too long")
            sent.append(event)

    engine = SimpleNamespace(
        stats=SimpleNamespace(num_steps=4), abort=lambda *which: aborted.append(which)
    )
    loop = EngineLoop(engine, Link())  # type: ignore[arg-type]
    loop._report([RequestOutput("big", (1, 2), index=1), RequestOutput("small", (3,))])
    (big,), (small,) = (event.outputs for event in sent)
    assert aborted == [("big", 1)]
    assert (big.finish_reason, big.error, big.index) == (FinishReason.ERROR, "too long", 1)
    assert small.new_token_ids == (3,)


# ---- an engine in a process of its own


def alive(process_id: int) -> bool:
    status = Path(f"/proc/{process_id}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def all_learn_of(
    launch: Launch, end: Callable[[int], None]
) -> tuple[list[BaseException], float]:
    """What everybody who waits for an engine gets when `end` is done to its process, and when."""
    client = ProcessEngineClient(launch)
    await client.start()
    process_id = client.process_id
    assert process_id is not None
    try:
        names = [f"{n}" for n in range(6)]  # two more than run at once
        work = [asyncio.create_task(collect(client, request(n, LONG))) for n in names]
        async with asyncio.timeout(20):
            while client.health().num_steps < 3:
                await asyncio.sleep(0.01)
        work.append(asyncio.create_task(client.stats()))
        await asyncio.sleep(0)
        began = time.monotonic()
        end(process_id)
        found = await asyncio.gather(*work, return_exceptions=True)
        took = time.monotonic() - began
        assert client.health().state is EngineState.DEAD
        with pytest.raises(EngineDeadError):
            await collect(client, request("later"))
    finally:
        await client.shutdown()
    assert not alive(process_id)
    return found, took  # type: ignore[return-value]


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.full
@pytest.mark.usefixtures("one_thread")
def test_a_killed_engine_gives_every_waiting_client_an_error_within_5_s(launch: Launch) -> None:
    found, took = asyncio.run(all_learn_of(launch, lambda pid: os.kill(pid, signal.SIGKILL)))
    assert took < 5
    for error in found:
        assert isinstance(error, EngineDeadError)
        assert error.step is not None
        assert "killed by SIGKILL" in str(error)
        assert f"step {error.step} (" in str(error)


@pytest.mark.full
@pytest.mark.usefixtures("one_thread")
def test_a_stopped_engine_is_noticed_within_5_s_and_ended(launch: Launch) -> None:
    found, took = asyncio.run(all_learn_of(launch, lambda pid: os.kill(pid, signal.SIGSTOP)))
    assert took < 5
    for error in found[:-1]:
        assert isinstance(error, EngineDeadError)
        assert "no sign of life" in str(error)
        assert f"step {error.step} (" in str(error)


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
@pytest.mark.usefixtures("one_thread")
def test_an_engine_process_listens_on_no_network(launch: Launch) -> None:
    """Neither it nor its client holds a TCP or UDP socket."""

    async def run() -> set[str]:
        client = ProcessEngineClient(launch)
        await client.start()
        try:
            await collect(client, request("a"))
            return sockets("self") | sockets(str(client.process_id))
        finally:
            await client.shutdown()

    held = asyncio.run(run())
    assert held
    tables = [Path("/proc/net", name) for name in ("tcp", "tcp6", "udp", "udp6", "raw")]
    rows = [line.split() for t in tables if t.exists() for line in t.read_text().splitlines()[1:]]
    assert not held & {f"socket:[{row[9]}]" for row in rows}


def sockets(process: str) -> set[str]:
    """The sockets a process holds."""
    links = [
        os.readlink(entry) for entry in Path(f"/proc/{process}/fd").iterdir() if entry.exists()
    ]
    return {link for link in links if link.startswith("socket:")}


PARENT = """
import asyncio, json, sys
from fourfold.core.client import Launch
from fourfold.core.config import EngineConfig
from fourfold.core.errors import FourfoldError
from fourfold.core.request import Request, SamplingParams
from fourfold.engine.client import ProcessEngineClient

async def main(model, what):
    client = ProcessEngineClient(Launch(EngineConfig(model, max_model_len=2000), "cpu"))
    parts = []
    await client.start(lambda part, done, total: parts.append((done, total)))
    print(client.process_id, flush=True)
    tokens = 6 if what == "run" else 1800
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    got = []
    async for output in client.generate(Request("a", (3, 10, 17), params)):
        got += output.new_token_ids
        if what == "leave":
            return
    await client.shutdown()
    print(json.dumps({"tokens": got, "progress": parts[-1], "torch": "torch" in sys.modules}))

try:
    asyncio.run(main(*sys.argv[1:]))
except FourfoldError as error:
    print(type(error).__name__, error)
"""


def parent(launch: Launch, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, launch.config.model, what],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def gone_soon(process_id: int) -> bool:
    end = time.monotonic() + 5
    while alive(process_id) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(process_id)


@pytest.mark.full
@pytest.mark.usefixtures("one_thread")
def test_a_process_gives_the_same_tokens_and_its_client_never_loads_torch(launch: Launch) -> None:
    with parent(launch, "run") as script:
        out, _ = script.communicate(timeout=60)
    process_id, result = out.splitlines()
    got = json.loads(result)
    assert got["torch"] is False
    assert got["progress"][0] == got["progress"][1] > 0
    assert gone_soon(int(process_id))

    async def run() -> list[int]:
        async with started(replace(launch, allowed_token_ids=None)) as client:
            return tokens(await collect(client, Request("a", (3, 10, 17), SHORT)))

    assert got["tokens"] == asyncio.run(run())


@pytest.mark.full
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("how", ["killed", "leave"])
def test_an_engine_does_not_outlive_its_client(launch: Launch, how: str) -> None:
    with parent(launch, how) as script:
        assert script.stdout is not None
        process_id = int(script.stdout.readline())
        if how == "killed":
            script.kill()
        script.wait(timeout=20)
    assert gone_soon(process_id)


@pytest.mark.full
def test_a_process_that_cannot_load_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        client = ProcessEngineClient(Launch(EngineConfig(str(tmp_path)), "cpu"))
        with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
            await client.start()
        assert client.process_id is not None
        assert not alive(client.process_id)

    asyncio.run(run())
