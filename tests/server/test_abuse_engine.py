"""Abuse that reaches the engine, on a real one: what valid requests get, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fourfold.server.settings import ServerSettings
from tests.server.http import Answer, Site
from tests.server.real import real_site
from tests.server.test_abuse import BODIES, PATHS, raw, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Four places, and sixteen to wait in."""
    settings = ServerSettings(max_waiting_requests=16)
    with real_site(tmp_path_factory.mktemp("abuse") / "tiny", settings, 4) as found:
        yield found


def ask(web: Site, number: int) -> Answer:
    return web.post(
        "/v1/completions", prompt=[20 + number % 500] * 9, max_tokens=8, temperature=0,
        ignore_eos=True, logprobs=0,
    )  # fmt: skip


def said(answer: Answer) -> tuple[Any, ...]:
    """All that a choice says: text and tokens. (Log probabilities on a CPU differ in their last bits
    with the batch: its matrix products are torch's.)"""
    assert answer.status == 200, answer.body
    (choice,) = answer.json["choices"]
    assert choice["finish_reason"] == "length"
    return choice["text"], choice["logprobs"]["tokens"]


def metric(web: Site, name: str) -> float:
    text = web.get("/metrics").body.decode()
    return next(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(f"fourfold:{name} ")
    )


def nothing_left(web: Site) -> None:
    """No sequence, no page in use."""
    until(lambda: web.serving.num_sequences == 0, 60)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    until(lambda: not any(metric(web, name) for name in names), 60)


def test_p4_p11_two_hundred_against_a_queue_of_sixteen(web: Site) -> None:
    alone = [said(ask(web, number)) for number in range(5)]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda number: ask(web, number % 5), range(200)))
    statuses = [answer.status for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 20
    for number, answer in enumerate(answers):
        if answer.status == 200:
            assert said(answer) == alone[number % 5]
        else:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    nothing_left(web)


def test_p1_p3_hostile_neighbours_change_nothing(web: Site) -> None:
    """Broken requests, absurd ones and some that leave, beside valid ones whose every token is compared."""
    alone = [said(ask(web, number)) for number in range(12)]
    stop = threading.Event()

    def hostile(seed: int) -> None:
        rng = random.Random(seed)
        bodies = list(BODIES.values())
        greedy = json.dumps({"prompt": "a", "n": 2, "max_tokens": 90, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        while not stop.is_set():
            with contextlib.suppress(OSError):
                kind = rng.random()
                if kind < 0.4:
                    web.call("POST", rng.choice(PATHS), rng.choice(bodies))
                elif kind < 0.6:
                    raw(web, rng.randbytes(200), timeout=0.05)
                else:  # begins, and leaves
                    length = b"Content-Length: %d\r\n\r\n" % len(greedy)
                    raw(web, head + length + greedy, timeout=0.1)

    hostiles = [threading.Thread(target=hostile, args=(seed,)) for seed in range(3)]
    for each in hostiles:
        each.start()
    try:

        def patient(number: int) -> Answer:
            while (answer := ask(web, number)).status == 429:
                time.sleep(0.2)
            return answer

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(patient, [number % 12 for number in range(24)]))
    finally:
        stop.set()
        for each in hostiles:
            each.join()
    assert [said(answer) for answer in found] == alone * 2
    nothing_left(web)


def test_p5_who_left_costs_two_more_steps(web: Site) -> None:
    connection = socket.create_connection(("127.0.0.1", web.port))
    body = json.dumps({"prompt": "a", "max_tokens": 1500, "stream": True, "ignore_eos": True})
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode())
    )
    assert b"data: " in connection.recv(4096) + connection.recv(4096)
    connection.close()
    until(lambda: web.serving.num_sequences == 0)
    noticed = web.serving.engine.health().num_steps
    nothing_left(web)
    assert web.serving.engine.health().num_steps <= noticed + 2


def test_p5_a_thousand_connect_and_abort(web: Site) -> None:
    body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 300}).encode()
    whole = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    rng = random.Random(1)
    for _ in range(1000):
        with socket.create_connection(("127.0.0.1", web.port)) as connection:
            # A third of them are whole requests.
            connection.sendall(whole[: rng.randrange(len(whole) * 3 // 2)])
    nothing_left(web)
    assert said(ask(web, 3)) == said(ask(web, 3))
