"""How a call uses the cache: what it shares, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import math
import time
import uuid
from dataclasses import dataclass
from typing import Any

from litecache.checks import check_real, check_text

MAX_TTL_S = 10 * 366 * 86_400


@dataclass(frozen=True)
class CacheUse:
    """The fields of `Request` of the same names; `cache` and `retention` are checked with it."""

    cache_salt: str
    cache: Any = "default"
    expires_s: int = 0
    retention: Any = "normal"

    @classmethod
    def of(cls, salt: Any, default_salt: str, cache: Any, ttl_s: Any, retention: Any) -> CacheUse:
        """From a call's arguments.

        Raises:
            ConfigError: `cache_salt` or `cache_ttl_s` is no such thing.
        """
        salt = default_salt if salt is None else check_text("cache_salt", salt)
        expires_s = 0
        if ttl_s is not None:
            ttl_s = check_real("cache_ttl_s", ttl_s, 0, MAX_TTL_S, above=True)
            expires_s = math.ceil(time.time() + ttl_s)
        return cls(salt, cache, expires_s, retention)

    def for_forwards(self) -> CacheUse:
        """For the forward passes of one call, each of which finds what those before have computed:
        where nobody else may find it, under a salt that nobody else knows."""
        if self.cache != "no-store":
            return self
        return dataclasses.replace(
            self, cache="read-only", cache_salt=f"{self.cache_salt}#{uuid.uuid4().hex}"
        )

    def fields(self) -> dict[str, Any]:
        """By name."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
