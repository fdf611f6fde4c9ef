"""The adapter that the tests of this folder share, whose actors may be started anew."""

from __future__ import annotations

from collections.abc import Callable

from litecache.adapter import KVCacheAdapter


class SharedAdapter:
    """Tests change `adapter` by `restart` alone."""

    def __init__(self, start: Callable[[], KVCacheAdapter]) -> None:
        self._start = start
        self.adapter = start()

    def restart(self) -> KVCacheAdapter:
        """Stop all actors and start others over the same folder."""
        self.adapter.close()
        self.adapter = self._start()
        return self.adapter
