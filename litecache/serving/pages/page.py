"""`GET /`: a small chat with the model for people, which shows what each answer reused.

One static page without outside resources. Its policy lets it run its own script alone, by the
script's digest, and talk to its own server alone; what a model or a user writes is set as text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources


@cache
def page() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The page, and the headers that it is sent with."""
    text = (
        resources.files("litecache.serving.pages").joinpath("page.html").read_text(encoding="utf-8")
    )
    rules = {
        "default-src": "'none'",
        "script-src": _digests("script", text),
        "style-src": _digests("style", text),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in rules.items())
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), [(name.encode(), value.encode()) for name, value in headers.items()]


def _digests(tag: str, text: str) -> str:
    found = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (hashlib.sha256(each.encode()).digest() for each in found)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
