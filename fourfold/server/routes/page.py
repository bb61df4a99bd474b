"""GET /: one static page to talk to the model, which loads nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fourfold.server.call import Call


def page_bytes() -> bytes:
    """The page as it is stored."""
    return files("fourfold.server").joinpath("page.html").read_bytes()


def policy(page: bytes) -> str:
    """What a browser may do with the page: run its own script and style, talk to this server."""

    def allowed(tag: bytes) -> str:
        found = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {allowed(b'script')}; style-src {allowed(b'style')}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def page(call: Call) -> None:
    """The page."""
    content = page_bytes()
    headers = {
        "content-security-policy": policy(content),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
    await call.content(content, b"text/html; charset=utf-8", 200, headers)
