"""Abuse of a server on a stub engine, each with the promise of docs/RELIABILITY.md it belongs to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.core.client import EngineState
from fourfold.server.settings import ServerSettings
from tests.server.http import Answer, Site, site

pytestmark = pytest.mark.full

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
HELLO = [{"role": "user", "content": "hi"}]


def raw(web: Site, data: bytes, timeout: float = 10) -> bytes:
    """What comes back for bytes on a connection of their own, until it is closed or silent."""
    with socket.create_connection(("127.0.0.1", web.port), timeout=timeout) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        found = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while part := connection.recv(1 << 16):
                found += part
                if b"\r\n\r\n" in found and b"chunked" not in found:
                    head, _, body = found.partition(b"\r\n\r\n")
                    length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
                    if length.isdigit() and len(body) >= int(length):
                        break
        return found


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def healthy(web: Site) -> None:
    """Nothing is left behind, and the next request is answered."""
    until(lambda: web.engine.running == 0 and web.serving.num_sequences == 0)
    until(lambda: web.serving._bodies == 0)
    web.says("fine")
    answer = web.post("/v1/completions", prompt="a")
    assert answer.json["choices"][0]["text"] == "fine"


# ---- P2: no input causes a 5xx


BODIES = {
    "nothing": b"",
    "no json": b"{",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "not utf-8": b'{"prompt": "\xff\xfe"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "1e400": b'{"prompt": "a", "temperature": 1e400}',
    "1e400 in a message": b'{"messages": [{"role": "user", "content": "a", "x": 1e400}]}',
    "huge integer": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "large integer": b'{"prompt": "a", "seed": ' + b"9" * 400 + b"}",
    "large integers everywhere": b'{"messages": [{"role": "user", "content": "a"}], "prompt": ['
    + b"9" * 400
    + b'], "tokens": ['
    + b"9" * 400
    + b"]}",
    "large temperature": b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}",
    "large bias": b'{"prompt": "a", "logit_bias": {"5": ' + b"9" * 400 + b"}}",
    "large bias token": b'{"prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
    "superscript bias token": '{"prompt": "a", "logit_bias": {"²": 1}}'.encode(),
    "lone surrogate": b'{"prompt": "\\ud800 x", "stop": "y"}',
    "lone low surrogate": b'{"prompt": "\\udc00 x"}',
    "lone surrogate in a stop": b'{"prompt": "a", "stop": "\\udc00"}',
    "lone surrogate in a name": b'{"prompt": "a", "model": "\\udc00"}',
    "lone surrogate in a key": b'{"prompt": "a", "\\udc00": 1}',
    "lone surrogate in a message": b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
    "lone surrogate as a role": b'{"messages": [{"role": "\\udc00", "content": "a"}]}',
    "lone surrogate in a salt": b'{"prompt": "a", "cache_salt": "\\udc00"}',
    "lone surrogate in a tool": b'{"messages": [{"role": "user", "content": "a"}], "tools": '
    b'[{"function": {"name": "\\udc00", "parameters": {"\\udc00": "\\udc00"}}}]}',
    "deep lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"messages": [{"role": "user", "content": "a", "x": '
    + b'{"a":' * 900
    + b"1"
    + b"}" * 900
    + b"}]}",
    "deep schema": b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"function": '
    b'{"name": "f", "parameters": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}}]}",
    "deep arguments": json.dumps(
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"function": {"name": "f", "arguments": "[" * 50_000 + "]" * 50_000}}
                    ],
                },
            ]
        }
    ).encode(),
    "null bytes": b'{"prompt": "\\u0000\\u0000", "stop": "\\u0000"}',
    "a million keys": b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",
    "the same key twice": b'{"prompt": "a", "prompt": ["b", 1]}',
    "a long unknown key": b'{"' + b"k" * 100_000 + b'": 1}',
    "a long model name": b'{"prompt": "a", "model": "' + b"m" * 100_000 + b'"}',
    "a long role": b'{"messages": [{"role": "' + b"r" * 100_000 + b'", "content": "a"}]}',
    "trailing words": b'{"prompt": "a"} and more',
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
}


@pytest.mark.parametrize("name", BODIES)
def test_p2_hostile_json_is_the_clients_mistake(web: Site, name: str) -> None:
    for path in PATHS:
        answer = web.call("POST", path, BODIES[name])
        assert answer.status < 500, (path, answer.body[:300])
        if answer.status >= 400:
            assert answer.error["message"]
            assert "Traceback" not in answer.error["message"]
    healthy(web)


FIELDS = (
    *("prompt", "messages", "n", "stop", "seed", "temperature", "top_p", "top_k", "min_p"),
    *("max_tokens", "min_tokens", "logprobs", "top_logprobs", "echo", "suffix", "stream", "tools"),
    *("tool_choice", "logit_bias", "stop_token_ids", "thinking", "reasoning_effort", "tokens"),
    *("chat_template_kwargs", "response_format", "stream_options", "cache_salt", "model"),
    *("continue_final_message", "add_generation_prompt", "best_of", "repetition_penalty"),
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "system", "tool", "function", "required", "type"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def test_p2_wrong_types_anywhere(web: Site) -> None:
    """Every field gets values of every shape."""
    rng = random.Random(0)

    @given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=6))
    def hold(body: dict[str, Any]) -> None:
        path = rng.choice(PATHS)
        whole = {"prompt": "a", "messages": HELLO, "tokens": [5]}
        kept = {"/tokenize": ("prompt",), "/detokenize": ("tokens",)}.get(path)
        names = kept or (("prompt",) if path == "/v1/completions" else ("messages",))
        answer = web.post(path, **({name: whole[name] for name in names} | body))
        assert answer.status < 500, (path, body, answer.body)

    hold()
    healthy(web)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /%ff%fe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/models/%00%ff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://evil/health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
        b"\r\n" * 1000,
    ],
)
def test_p2_broken_http_is_the_clients_mistake(web: Site, data: bytes) -> None:
    found = raw(web, data, timeout=0.5)
    assert not found.startswith(b"HTTP/1.1 5"), found
    healthy(web)


# ---- P4: every queue, body, header and wait is bounded


def test_p4_a_body_of_256_mib_is_refused_before_it_is_read(web: Site) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % (256 << 20)
    )
    assert b" 413 " in raw(web, head)
    healthy(web)


def test_p4_a_body_that_does_not_tell_its_length_is_bounded_too() -> None:
    with site(ServerSettings(max_request_bytes=200_000)) as web:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"%x\r\n" % 100_000 + b"a" * 100_000 + b"\r\n"
        assert b" 413 " in raw(web, head + chunk * 3 + b"0\r\n\r\n")
        assert b" 400 " in raw(web, head + chunk + b"0\r\n\r\n")
        healthy(web)


def test_p4_all_bodies_together_are_bounded() -> None:
    settings = ServerSettings(max_request_bytes=1 << 20, max_bodies_bytes=3 << 20)
    with site(settings) as web:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (1 << 20)
        )
        sockets = []
        for _ in range(3):
            sockets.append(socket.create_connection(("127.0.0.1", web.port)))
            sockets[-1].sendall(head + b"a" * (1_040_000))
        until(lambda: web.serving._bodies > 3_000_000)
        answer = web.call("POST", "/v1/completions", b'{"prompt": "' + b"a" * 100_000 + b'"}')
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert int(answer.headers["Retry-After".lower()]) >= 1
        for each in sockets:
            each.close()
        healthy(web)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /live HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000,
        b"GET /live HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
        b"GET /" + b"a" * 100_000,
    ],
)
def test_p4_heads_are_bounded(web: Site, head: bytes) -> None:
    found = raw(web, head + b"\r\n\r\n", timeout=5)
    assert (
        not found or b" 400 " in found[:20] or b" 414 " in found[:20] or b" 431 " in found[:20]
    ), found[:50]
    assert web.get("/live?" + "a" * 5000).status == 414
    healthy(web)


def test_p4_slow_and_half_sent_requests_are_closed() -> None:
    settings = ServerSettings(header_timeout=0.3, body_timeout=0.5, keep_alive=1)
    with site(settings) as web:
        start = time.monotonic()
        assert raw(web, b"") == b""
        assert raw(web, b"POST /v1/compl") == b""
        half = (
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in raw(web, half)
        assert time.monotonic() - start < 8
        # A byte now and then does not help, also not after a first request.
        with socket.create_connection(("127.0.0.1", web.port), timeout=5) as connection:
            connection.sendall(b"GET /live HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b" 200 " in connection.recv(4096)
            begin = time.monotonic()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for byte in b"GET /live HTTP/1.1\r\nHost: aaaaaaaaaaaaaaaaaaaaaaaa":
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
            assert time.monotonic() - begin < 2
        healthy(web)


def test_p4_a_client_that_does_not_read_is_given_up() -> None:
    with site(ServerSettings(write_timeout=0.5), max_model_len=1 << 20) as web:
        tokens = web.text("word ") * 200_000
        web.engine.script = lambda request, index: tokens
        web.engine.tokens_a_step = 2000
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", web.port))
            body = json.dumps({"prompt": "a", "stream": True, "logprobs": 5}).encode()
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            until(lambda: bool(web.engine.requests))
            until(lambda: web.engine.closed == 1, 60)
        healthy(web)


def test_p4_connections_are_bounded() -> None:
    with site(ServerSettings(max_connections=5)) as web:
        held = [socket.create_connection(("127.0.0.1", web.port)) for _ in range(5)]
        time.sleep(0.1)
        extra = socket.create_connection(("127.0.0.1", web.port))
        with contextlib.suppress(ConnectionResetError):
            assert extra.recv(10) == b""
        for each in [*held, extra]:
            each.close()
        time.sleep(0.1)
        healthy(web)


def test_p4_p11_two_hundred_against_a_queue_of_sixteen() -> None:
    with site(ServerSettings(max_waiting_requests=16), max_num_seqs=4) as web:
        web.engine.pace = 0.03
        web.says("one two three four")

        def ask(number: int) -> Answer:
            return web.post("/v1/completions", prompt=f"prompt {number}")

        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(ask, range(200)))
        served = [a for a in answers if a.status == 200]
        refused = [a for a in answers if a.status == 429]
        assert len(served) + len(refused) == 200
        assert len(served) >= 20
        assert refused
        assert all(a.json["choices"][0]["text"] == "one two three four" for a in served)
        for answer in refused:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        text = web.get("/metrics").body.decode()
        assert f'request_rejected_total{{reason="requests"}} {float(len(refused))}' in text
        # What was refused was never tokenised nor shown to the engine.
        assert len(web.engine.requests) == len(served)
        healthy(web)


def test_p4_waiting_tokens_are_bounded() -> None:
    with site(ServerSettings(max_waiting_tokens=300)) as web:
        web.engine.pace = 0.5
        long = [10] * 250
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(web.post, "/v1/completions", prompt=long, max_tokens=1)
            until(lambda: web.engine.running == 1)
            second = web.post("/v1/completions", prompt=long, max_tokens=1)
            assert (second.status, second.error["code"]) == (429, "queue_full")
            assert "tokens wait" in second.error["message"]
            assert web.post("/v1/completions", prompt=[10], max_tokens=1).status == 200
            assert first.result().status == 200
        healthy(web)


def test_p4_more_sequences_than_there_will_ever_be_is_the_clients_mistake() -> None:
    with site(ServerSettings(max_waiting_requests=4), max_num_seqs=4) as web:
        answer = web.post("/v1/completions", prompt=["a"] * 9)
        assert answer.status == 400
        assert "at most 8" in answer.error["message"]


# ---- P5: a client that left costs nothing more


@pytest.mark.parametrize("stream", [True, False])
def test_p5_a_client_that_left_is_noticed(web: Site, stream: bool) -> None:
    web.engine.pace = 0.02
    web.engine.script = lambda request, index: [10] * 1500
    body = json.dumps({"prompt": "a", "stream": stream}).encode()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", web.port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            until(lambda: web.engine.running == 1)
        until(lambda: web.engine.running == 0, 1)
    assert web.engine.closed == 5
    assert 'finished_reason="abort"} 5.0' in web.get("/metrics").body.decode()
    assert all("status=" in line for line in web.lines(5))
    healthy(web)


def test_p5_a_thousand_connect_and_abort(web: Site) -> None:
    web.engine.pace = 0.01
    web.engine.script = lambda request, index: [10] * 500
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    whole = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    rng = random.Random(1)
    for _ in range(1000):
        connection = socket.create_connection(("127.0.0.1", web.port))
        connection.sendall(whole[: rng.randrange(len(whole) + 1)])
        if rng.random() < 0.5:  # a reset instead of an end
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
    healthy(web)


# ---- P1, P3: neighbours


def test_p1_p3_hostile_neighbours_change_nothing(web: Site) -> None:
    """Valid requests get their bytes while every kind of abuse goes on beside them."""
    tokenizer = web.engine.tokenizer
    texts = [f"answer number {i} 你好 " * 3 for i in range(40)]

    def script(request: Any, index: int) -> list[int]:
        words = tokenizer.decode(request.prompt_token_ids)
        number = words.rpartition(" ")[2]
        return [*tokenizer.encode(texts[int(number)] if number.isdigit() else "noise"), 1]

    web.engine.script, web.engine.pace = script, 0.001
    stop = threading.Event()

    def hostile(seed: int) -> None:
        rng = random.Random(seed)
        bodies = list(BODIES.values())
        while not stop.is_set():
            with contextlib.suppress(OSError):
                if rng.random() < 0.5:
                    web.call("POST", rng.choice(PATHS), rng.choice(bodies))
                else:
                    raw(web, rng.randbytes(200), timeout=0.05)

    hostiles = [threading.Thread(target=hostile, args=(i,)) for i in range(3)]
    for each in hostiles:
        each.start()
    try:

        def ask(number: int) -> tuple[str, Any]:
            answer = web.post("/v1/completions", prompt=f"say {number}", stream=number % 2 == 0)
            if number % 2:
                choice = answer.json["choices"][0]
                return choice["text"], choice["finish_reason"]
            ends = [e["choices"][0]["finish_reason"] for e in answer.events]
            assert answer.body.endswith(b"data: [DONE]\n\n")
            return answer.deltas("text"), "".join(filter(None, ends))

        with ThreadPoolExecutor(8) as pool:
            for number, found in enumerate(pool.map(ask, range(40))):
                assert found == (texts[number], "stop")
    finally:
        stop.set()
        for each in hostiles:
            each.join()
    healthy(web)


# ---- failures of the engine


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 9}),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 9, "model": "stub/model"}),
    ],
)
def test_p2_an_answer_that_cannot_go_on_is_no_fault_of_the_engine(
    web: Site, path: str, body: dict[str, Any]
) -> None:
    """As when a grammar leads nowhere: 400 with its reason, and no answer is counted as not finite."""
    web.engine.fails = "the grammar does not lead on: it ends here"
    answer = web.post(path, **body)
    assert answer.status == 400
    assert "does not lead on" in answer.error["message"]
    stream = web.post(path, **body, stream=True)
    assert stream.status == 200
    assert "does not lead on" in stream.body.decode()
    assert "engine fault" not in stream.body.decode()
    assert "nonfinite_logits_total 0.0" in web.get("/metrics").body.decode()
    web.engine.fails = None
    healthy(web)


def test_p1_numbers_that_are_not_finite_end_one_request_by_name(web: Site) -> None:
    web.engine.fails = "the model's numbers were not finite"
    answer = web.post("/v1/chat/completions", messages=HELLO)
    assert (answer.status, answer.error["code"]) == (500, "nonfinite_logits")
    assert "engine fault" in answer.error["message"]
    stream = web.post("/v1/chat/completions", messages=HELLO, stream=True)
    assert stream.status == 200
    assert stream.events[-2]["choices"][0]["finish_reason"] == "error"
    assert stream.events[-1]["error"]["code"] == "nonfinite_logits"
    assert "nonfinite_logits_total 2.0" in web.get("/metrics").body.decode()
    web.engine.fails = None
    healthy(web)


def test_p1_p10_a_dying_engine_ends_everything_and_tells_no_path(web: Site) -> None:
    web.engine.pace = 0.1
    web.engine.script = lambda request, index: [10] * 100
    with ThreadPoolExecutor(4) as pool:
        whole = pool.submit(web.post, "/v1/completions", prompt="a")
        stream = pool.submit(web.post, "/v1/completions", prompt="a", stream=True)
        until(lambda: web.engine.running == 2)
        time.sleep(0.25)
        web.engine.state = EngineState.DEAD
        answer = whole.result()
        assert (answer.status, answer.error["code"]) == (500, "engine_dead")
        assert "step 7" in answer.error["message"]
        assert b"secret" not in answer.body
        last = stream.result().events[-1]
        assert last["error"]["code"] == "engine_dead"
        assert b"secret" not in stream.result().body
    assert "secret" not in web.log.getvalue()


def test_a_defect_is_a_500_without_a_word_about_it(web: Site) -> None:
    def broken(request: Any, index: int) -> list[int]:
        raise ValueError("a prompt's words, /a/path")

    web.engine.script = broken
    answer = web.post("/v1/completions", prompt="a")
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert b"path" not in answer.body
    assert "defect" in web.lines(2)[0]
    assert "words" not in web.log.getvalue()
    healthy(web)


def test_a_defect_in_a_stream_ends_it_with_an_error(
    web: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def broken(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise ValueError("a prompt's words")

    monkeypatch.setattr("fourfold.server.generation.Generation._observe", broken)
    stream = web.post("/v1/completions", prompt="a", stream=True)
    assert stream.events[-1]["error"]["code"] == "internal_error"
    assert b"words" not in stream.body
    monkeypatch.undo()
    healthy(web)


# ---- promises about time


def test_the_first_event_leaves_before_the_last_token_exists(web: Site) -> None:
    web.engine.pace = 0.05
    web.engine.script = lambda request, index: [10] * 40
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", web.port), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        found = b""
        while b"data: " not in found:
            found += connection.recv(4096)
        assert web.engine.running == 1
        assert found.count(b"data: ") < 10


def test_a_silent_stream_says_that_it_lives() -> None:
    with site(ServerSettings(heartbeat=0.1)) as web:
        web.engine.pace = 1.3
        answer = web.post("/v1/completions", prompt="a", stream=True, max_tokens=2)
        assert answer.body.count(b": still working\n\n") >= 2
        assert answer.body.endswith(b"data: [DONE]\n\n")


def test_long_texts_are_tokenised_beside_the_loop() -> None:
    """A stream goes on while a text of many megabytes is tokenised."""
    with site(max_model_len=1 << 22) as web:
        web.engine.pace = 0.01
        web.engine.script = lambda request, index: [10] * 300
        long: list[Any] = []

        async def longest_pause() -> float:
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            body = json.dumps({"prompt": "a", "stream": True}).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            last, worst = None, 0.0
            while b"[DONE]" not in (data := await reader.read(1 << 16)):
                assert data
                now = time.monotonic()
                if last is None:
                    long.append(pool.submit(web.post, "/tokenize", prompt=text))
                worst = max(worst, now - last) if last else 0.0
                last = now
            writer.close()
            return worst

        with ThreadPoolExecutor(1) as pool:
            text = "some words in a row, " * 100_000
            worst = asyncio.run(longest_pause())
            assert long[0].result().json["count"] > 100_000
        assert worst < 0.5, worst
