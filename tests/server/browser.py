"""A Chromium that tests drive as a person would: keys and clicks, through the DevTools pipe."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1000,800", "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One tab. `events` is all that DevTools has told of it."""

    def __init__(self, ours: int, theirs: int):
        self._read, self._write = ours, theirs
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None and not method.startswith("Browser."):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (found := self._take(20)).get("id") != self._number:
            self.events.append(found)
        assert "error" not in found, (method, found["error"])
        result: dict[str, Any] = found["result"]
        return result

    def _take(self, timeout: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], timeout)[0], "the browser does not answer"
            data = os.read(self._read, 1 << 16)
            assert data, "the browser has gone"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def told(self, method: str) -> list[dict[str, Any]]:
        return [each["params"] for each in self.events if each.get("method") == method]

    # ---- what a person does

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def find(self, script: str) -> Any:
        """The value of an expression; one that throws is an error."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
            userGesture=True,
        )  # fmt: skip
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 15) -> Any:
        end = time.monotonic() + seconds
        while not (found := self.find(script)):
            assert time.monotonic() < end, (script, self.find("document.body.innerText"))
            time.sleep(0.02)
        return found

    def click(self, selector: str) -> None:
        """Press the middle of what a selector finds, wherever that is on the screen."""
        x, y = self.find(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            "found.scrollIntoView({block: 'nearest'});"
            "const b = found.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str, enter: bool = False) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp") if enter else ():
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                windowsVirtualKeyCode=13,
            )  # fmt: skip


@contextmanager
def browser(chromium: str, profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile. It reads commands from descriptor 3 and answers on 4."""
    their_read, our_write = os.pipe()
    our_read, their_write = os.pipe()
    command = f'exec "$@" 3<&{their_read} 4>&{their_write}'
    with (profile / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", command, "-", chromium, *QUIET, f"--user-data-dir={profile}"],
            pass_fds=(their_read, their_write),
            stdout=log,
            stderr=log,
        )
    os.close(their_read)
    os.close(their_write)
    try:
        yield Browser(our_read, our_write)
    finally:
        os.close(our_write)  # the end of its commands is the end of the browser
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(our_read)
