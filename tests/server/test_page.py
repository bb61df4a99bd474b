"""The page at /: what it is made of, and (where a Chromium is) what it does."""

from __future__ import annotations

import html.parser
import json
import re
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from fourfold.server.routes.page import page_bytes, policy
from fourfold.server.settings import ServerSettings
from tests.server.browser import Browser, browser, find_chromium
from tests.server.http import Site, site


def test_the_page_is_small_and_loads_nothing(web: Site) -> None:
    answer = web.get("/")
    assert answer.status == 200
    assert answer.body == page_bytes()
    assert len(answer.body) <= 60_000
    text = answer.body.decode()
    outside = r"https?://|//[a-z]|@import|[^c]url\("
    careless = r"innerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|cookie"
    assert not re.search(f"{outside}|{careless}", text)
    attributes: list[tuple[str, str]] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            attributes.extend((tag, name) for name, _ in attrs)

    Reader().feed(text)
    assert not [a for _, a in attributes if a.startswith("on") or a in ("src", "href", "style")]


def test_the_policy_allows_its_own_script_alone(web: Site) -> None:
    found = web.get("/").headers["content-security-policy"]
    assert found == policy(page_bytes())
    for word in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"):
        assert word in found
    assert "unsafe" not in found
    assert found.count("'sha256-") == 2


def test_the_page_can_be_turned_off_and_needs_no_key() -> None:
    with site(ServerSettings(ui=False)) as web:
        assert web.get("/").status == 404
    with site(ServerSettings(api_keys=("k",))) as web:
        assert web.get("/").status == 200
        assert web.call("POST", "/").status == 401


def test_its_script_is_javascript(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    found = re.search(r"<script>(.*?)</script>", page_bytes().decode(), re.DOTALL)
    assert found
    script = tmp_path / "page.js"
    script.write_text(found[1])
    done = subprocess.run(
        [node, "--check", str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_in_chromium(tmp_path: Path) -> None:
    """One visit: the key, a question and its answer as it comes, a stop, a tool, a command to copy."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with (
        site(ServerSettings(api_keys=("sesame",))) as web,
        browser(chromium, tmp_path) as tab,
    ):
        origin = f"http://127.0.0.1:{web.port}"
        tab.open(f"{origin}/")
        give_the_key(web, tab)
        see_an_answer_come(web, tab)
        stop_an_answer(web, tab)
        use_a_tool(web, tab)
        copy_a_command(web, tab)
        for fault in ("Log.entryAdded", "Runtime.exceptionThrown"):
            found = [each for each in tab.told(fault) if "401" not in json.dumps(each)]
            assert not found
        asked = [each["request"]["url"] for each in tab.told("Network.requestWillBeSent")]
        assert {url for url in asked if not url.startswith(f"{origin}/")} == set()
        assert f"{origin}/v1/chat/completions" in asked
        try_to_break_out(tab)


def give_the_key(web: Site, tab: Browser) -> None:
    """A wrong one is asked for again; the right one is nowhere to be found afterwards."""
    for key in ("wrong", "sesame"):
        tab.until("$('door').open && document.activeElement.id === 'key'")
        tab.type(key, enter=True)
    assert tab.until("$('model').textContent") == "stub/model"
    assert not tab.find("$('door').open")
    kept = "document.documentElement.outerHTML + [...document.querySelectorAll('input')]"
    kept += ".map((i) => i.value) + JSON.stringify([localStorage, sessionStorage, document.cookie])"
    assert "sesame" not in tab.find(kept)


def see_an_answer_come(web: Site, tab: Browser) -> None:
    """The beginning is there before the end is; the reasoning is folded until it is opened."""
    web.says("Let me think", "</think>", "\n\nHello " + "dear " * 40 + "friend <b>x</b>")
    web.engine.pace = 0.02
    tab.click("#say")
    tab.type("hi <i>there</i>", enter=True)
    assert tab.find("document.querySelector('.user').innerText") == "hi <i>there</i>"
    tab.until("document.querySelector('.answer .text')?.innerText.startsWith('Hello dear')")
    assert tab.find("$('stop').checkVisibility() && !$('send').checkVisibility()")
    assert not tab.find("document.querySelector('.facts:last-child')")
    assert web.engine.running == 1
    shown = "document.querySelector('.answer .thought').checkVisibility()"
    assert not tab.find(shown)
    assert "Let me think" not in tab.find("$('log').innerText")
    facts = tab.until("document.querySelector('.answer .facts')?.innerText")
    assert re.search(r"[0-9.]+ tokens/s · \d+ tokens · \d+ in, 4 of them cached", facts)
    text = "Hello " + "dear " * 40 + "friend <b>x</b>"
    assert tab.find("document.querySelector('.answer .text').innerText") == text
    tab.click(".answer summary")
    assert tab.find(shown)
    assert tab.find("document.querySelector('.answer .thought').innerText") == "Let me think"


def stop_an_answer(web: Site, tab: Browser) -> None:
    """The server hears of it, the part that came stays, and the conversation goes on from it."""
    web.says("</think>", "\n\n" + "word " * 500)
    tab.click("#say")
    tab.type("go on")
    tab.click("#send")
    tab.until(
        "[...document.querySelectorAll('.answer .text')].at(-1).innerText.includes('word word')"
    )
    tab.click("#stop")
    facts = tab.until("document.querySelectorAll('.answer .facts')[1]?.innerText")
    assert facts.endswith("stopped")
    tab.until("$('send').checkVisibility() && !$('stop').checkVisibility()")
    end = time.monotonic() + 5
    while web.engine.running and time.monotonic() < end:
        time.sleep(0.01)
    assert web.engine.running == 0  # it would have gone on for ten seconds


def use_a_tool(web: Site, tab: Browser) -> None:
    """A call is shown; what is said next is its result."""
    web.engine.pace = 0.0
    call = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    web.says("</think>", call)
    tab.click("header summary")
    tab.click("#tools")
    tab.type('[{"type": "function", "function": {"name": "weather"}}]')
    tab.click("header summary")
    tab.click("#say")
    tab.type("weather?", enter=True)
    tab.until("document.querySelectorAll('.answer .facts').length === 3")
    assert tab.find("document.querySelector('.call').innerText") == 'weather\n{"city": "Oslo"}'
    web.says("</think>", "\n\nIt is cold.")
    tab.type("-3 degrees", enter=True)
    tab.until("document.querySelectorAll('.answer .facts').length === 4")
    asked = web.engine.tokenizer.decode(web.engine.requests[-1].prompt_token_ids)
    assert "<tool_result>-3 degrees</tool_result>" in asked
    assert "hi <i>there</i>" in asked
    assert "word word" in asked


def copy_a_command(web: Site, tab: Browser) -> None:
    """It says what the page would send, without the key, and works in a shell."""
    tab.call(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    tab.click("#say")
    tab.type("it's one last question")
    tab.click("#curl")
    tab.until("navigator.clipboard.readText().then((text) => text.startsWith('curl'))")
    command, *words = shlex.split(tab.find("navigator.clipboard.readText()"))
    assert command == "curl"
    assert "Authorization: Bearer YOUR_KEY" in words
    body = json.loads(words[words.index("-d") + 1])
    assert body["messages"][-1] == {"role": "user", "content": "it's one last question"}
    headers = dict(w.split(": ") for w in words if ": " in w and not w.startswith("{"))
    path = words[0].removeprefix(f"http://127.0.0.1:{web.port}")
    web.says("</think>", "\n\nYes.")
    answer = web.call("POST", path, body, headers | {"Authorization": "Bearer sesame"})
    assert answer.json["choices"][0]["message"]["content"] == "Yes."


def try_to_break_out(tab: Browser) -> None:
    """What an injected script would do is refused by the browser."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0)
        tab.find(
            "window.refused = []; document.addEventListener('securitypolicyviolation',"
            "(e) => refused.push(e.effectiveDirective)); "
            "const made = document.createElement('script'); made.textContent = 'window.in = 1';"
            "document.body.append(made); const image = new Image();"
            f"image.src = 'http://127.0.0.1:{other.getsockname()[1]}/';"
            f"fetch('http://127.0.0.1:{other.getsockname()[1]}/').catch(() => 0); 0"
        )
        tab.until("['script-src-elem', 'img-src', 'connect-src'].every((d) => refused.includes(d))")
        assert tab.find("window.in") is None
        with pytest.raises(BlockingIOError):
            other.accept()
