"""What leaves a tier first: policies over single blocks, and queues that keep chains together."""

from __future__ import annotations

from .policies import EvictionPolicy, get_policy, register

__all__ = ["EvictionPolicy", "get_policy", "register"]
