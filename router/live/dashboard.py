"""The live page as one document: markup, style and script in one answer, and headers that allow nothing else.

Knows nothing of what it shows: the script asks /admin/live. The three parts lie beside this file.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

import msgspec


class Page(msgspec.Struct, frozen=True):
    body: bytes
    headers: dict[str, str]


@cache
def page() -> Page:
    """Read once. Raises OSError if the package was installed without its page."""
    html, css, script = (_part(suffix) for suffix in ("html", "css", "js"))
    body = html.replace("/*style*/", css).replace("/*script*/", script)
    policy = {
        "default-src": "'none'",
        "style-src": _hash(css),
        "script-src": _hash(script),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon that is none: browsers ask for one otherwise
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # Nothing that the script is told can become markup: it has no way to make any from text.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Opener-Policy": "same-origin",
    }
    return Page(body.encode(), headers)


def _part(suffix: str) -> str:
    return Path(__file__).with_suffix(f".{suffix}").read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
