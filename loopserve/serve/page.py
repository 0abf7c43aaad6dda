"""Serve the page to talk on: one HTML document that holds its style and script, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter()
_SCRIPTS = ("markdown.js", "figures.js", "server.js", "page.js")


@dataclass(frozen=True)
class Page:
    """Hold the document and the policy that a browser enforces on it."""

    html: str
    content_security_policy: str


@cache
def page() -> Page:
    """Put the document together from the package's files. Only the script and the style within it may run, by their hashes."""
    folder = files("loopserve.serve") / "static"
    text = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *_SCRIPTS)}
    style, script = text["page.css"], "".join(text[name] for name in _SCRIPTS)
    html = text["page.html"].replace("/*style*/", style, 1).replace("/*script*/", script, 1)
    rules = (
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return Page(html, "; ".join(rules))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@router.get("/", include_in_schema=False)
async def show_page() -> Response:
    """Return the page. It holds no data and no key: all it shows comes from the API, with the key that its user gives."""
    found = page()
    headers = {
        "Content-Security-Policy": found.content_security_policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return Response(found.html, media_type="text/html", headers=headers)
