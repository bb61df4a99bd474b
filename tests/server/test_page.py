"""The page at /: what it is made of, and (where a Chromium is) what it does."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fourfold.server.routes.page import page_bytes, policy
from fourfold.server.settings import ServerSettings
from tests.server.http import Site, site


def test_the_page_is_small_and_loads_nothing(web: Site) -> None:
    answer = web.get("/")
    assert answer.status == 200
    assert answer.body == page_bytes()
    assert len(answer.body) <= 60_000
    text = answer.body.decode()
    assert not re.search(
        r"https?://|//[a-z]|@import|[^c]url\(|innerHTML|eval\(|localStorage|cookie", text
    )
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
def test_in_chromium_a_question_is_answered(tmp_path: Path) -> None:
    """Type, stream, stop, key: driven through the DevTools protocol's own command line is too little,
    so a script that stands for the person is put into a copy of the page."""
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with site(ServerSettings(api_keys=("k",))) as web:
        web.says("Hm", "</think>", "\n\nHello there")
        person = """
        const wait = (ready) => new Promise((go) => {
          const look = () => ready() ? go() : setTimeout(look, 20);
          look();
        });
        (async () => {
          await wait(() => $("door").open); $("key").value = "k"; $("door").close("ok");
          await wait(() => $("model").textContent);
          $("say").value = "hi"; $("send").click();
          await wait(() => document.querySelector(".facts:last-child") && !running);
          document.title = JSON.stringify([$("log").innerText, messages]);
        })();
        """
        text = page_bytes().decode().replace("</script>", person + "</script>")
        original, web_page = page_bytes, text.encode()
        import fourfold.server.routes.page as module

        module.page_bytes = lambda: web_page  # type: ignore[assignment]
        try:
            done = subprocess.run(
                [
                    chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                    f"--user-data-dir={tmp_path}", "--virtual-time-budget=15000",
                    f"http://127.0.0.1:{web.port}/",
                ],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
        finally:
            module.page_bytes = original  # type: ignore[assignment]
        title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
        assert title, done.stderr[-2000:]
        shown, said = json.loads(html.unescape(title[1])) if title[1].startswith("[") else ("", [])
        assert "Hello there" in shown
        assert said[-1]["content"] == "Hello there"
