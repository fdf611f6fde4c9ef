"""Eviction policies by name; `register` adds one."""

from __future__ import annotations

from ...errors import ConfigError
from .base import EvictionPolicy, Links
from .lfu import Lfu
from .lru import Lru
from .s3fifo import S3Fifo

__all__ = ["EvictionPolicy", "Lfu", "Links", "Lru", "S3Fifo", "get_policy", "register"]

_POLICIES: dict[str, type[EvictionPolicy]] = {"lru": Lru, "lfu": Lfu, "s3fifo": S3Fifo}


def register(name: str, policy: type[EvictionPolicy]) -> None:
    """Make a policy available under `name`."""
    _POLICIES[name] = policy


def get_policy(name: str) -> type[EvictionPolicy]:
    """The policy called `name`.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if name not in _POLICIES:
        raise ConfigError("eviction", name, "one of " + ", ".join(sorted(_POLICIES)))
    return _POLICIES[name]
