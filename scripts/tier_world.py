"""What bench_tiers.py, bench_trace.py and chaos_loads.py put below an engine: a disk that can be
slowed down or stopped inside the file layer, and a scratch folder."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from litecache import CacheConfig
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.measuring.tier_engine import TierEngine
from litecache.storage.disk.files import Files

GB = 1_000_000_000


class SlowFiles(Files):
    """A folder whose reads are as slow as told, and stop when told.

    Attributes:
        bytes_per_s: of all reads together; 0 = as fast as the disk.
        stall_after: so many bytes from now one read, and all behind it, wait `stall_s`; None = no.
    """

    def __init__(self, bytes_per_s: float = 0.0) -> None:
        self.bytes_per_s = bytes_per_s
        self.stall_after: int | None = None
        self.stall_s = 1.0
        self._free = 0.0
        self._order = threading.Lock()

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, then wait until a disk of that rate would have answered."""
        done = super().read(fd, buffers, offset)
        with self._order:
            now = time.monotonic()
            self._free = max(self._free, now)
            if self.stall_after is not None:
                self.stall_after -= done
                if self.stall_after <= 0:
                    self.stall_after = None
                    self._free += self.stall_s
            if self.bytes_per_s:
                self._free += done / self.bytes_per_s
            wait_s = self._free - now
        if wait_s > 0:
            time.sleep(wait_s)
        return done

    def settle(self) -> None:
        """Wait until what was read so far has been answered."""
        time.sleep(max(0.0, self._free - time.monotonic()))


class BenchEngine(TierEngine):
    """One whose parts are switched off for comparison, which no user can do.

    Args:
        model: config of a geometry; the weights are random.
        config, files: see `TierEngine`.
    """

    def __init__(
        self, model: dict[str, Any], config: CacheConfig, files: Files | None = None
    ) -> None:
        super().__init__(ModelSource(config=model, weights="random"), config, files)

    def saving(self, on: bool) -> None:
        """Whether what is computed from now on is saved."""
        policy = self.config.admission if on else "none"
        saves = self.engine._scheduler._saves
        self.engine.call(lambda: setattr(saves, "_admission", policy))

    def tiers(self, on: bool) -> None:
        """Without them the engine neither looks up nor saves, as one that was made without."""
        costs = self.engine._costs if on else None
        self.engine.call(lambda: setattr(self.engine._scheduler._loads, "_cost", costs))
        self.saving(on)

    def forgive(self) -> None:
        """Plan with every source again, also those that were left out."""
        costs = self.engine._costs
        sources = costs._sources.values() if costs is not None else ()
        self.engine.call(lambda: [setattr(source, "out", False) for source in sources])


@contextlib.contextmanager
def scratch(parent: Path | None, keep: bool = False) -> Iterator[Path]:
    """A folder for the shards: a temporary one, or a named one that is kept when told."""
    if parent is not None and keep:
        parent.mkdir(parents=True, exist_ok=True)
        yield parent
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-tiers-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def model_limits(config: dict[str, Any]) -> int:
    """The longest sequence of a geometry."""
    return int(config["max_position_embeddings"])
