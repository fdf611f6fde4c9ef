"""An OpenAI-compatible server on Ray Serve: `litecache serve`, `serve run litecache.serving:app`.

Needs the extra `litecache[serve]`. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litecache.serving.deployment import build_app
    from litecache.serving.deployment import build_app as app
    from litecache.serving.settings import ServeSettings

__all__ = ["ServeSettings", "app", "build_app"]

_HOMES = {
    "ServeSettings": ("litecache.serving.settings", "ServeSettings"),
    "app": ("litecache.serving.deployment", "build_app"),
    "build_app": ("litecache.serving.deployment", "build_app"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, found = _HOMES[name]
    return getattr(importlib.import_module(module), found)
