"""What the engine's transfer calls: one shard, seen from a client process.

`ShardClient` is the contract; `LocalShardClient` fulfils it over a `ShardStore` of the same
process. The Ray one lives in `litecache.actors`. All methods return at once except `flush`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..hashing import BlockKey
from .arena.view import ArenaView
from .protocol import CommitItem, CommitStatus, FlushReport, SlotRef, StageResult

if TYPE_CHECKING:
    from .shard_store import ShardStore


class PendingStage(Protocol):
    """A `stage` under way; whoever began it calls `result` or `abandon`, else its leases stay."""

    def result(self) -> list[StageResult]:
        """Wait for the answer; a shard that is late or gone answers MISS."""
        ...

    def abandon(self) -> None:
        """The answer is not wanted any more: its leases end as soon as it comes."""
        ...


class ShardClient(Protocol):
    """One shard, as one client process uses it; see `ShardStore` for each method's contract."""

    @property
    def shard_id(self) -> str:
        """Names the shard in logs, counters and rendezvous hashing."""
        ...

    @property
    def arena(self) -> ArenaView:
        """The shard's slots, mapped into this process."""
        ...

    @property
    def lost(self) -> bool:
        """The shard's process is gone: what it was loading will never be ready."""
        ...

    def stage(self, keys: Sequence[BlockKey]) -> list[StageResult]:
        """Lease the blocks that are there; start reading those that are on disk."""
        ...

    def stage_async(
        self, keys: Sequence[BlockKey], released: Sequence[SlotRef] = ()
    ) -> PendingStage:
        """Begin a `stage` without waiting; leases in `released` end on the way, as by `release`."""
        ...

    def wait(self, slots: Sequence[SlotRef], timeout_s: float = 30.0) -> list[bool]:
        """Sleep until leased slots have stopped loading; which of them hold their block."""
        ...

    def cancel(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Give up reads that have not begun; True ends that key's lease."""
        ...

    def release(self, slots: Sequence[SlotRef]) -> None:
        """End leases."""
        ...

    def reserve(self, block_bytes: int, n: int) -> list[SlotRef]:
        """Up to `n` slots to fill; fewer or none means back-pressure."""
        ...

    def commit(self, items: Sequence[CommitItem]) -> list[CommitStatus]:
        """Publish filled slots; the leases end."""
        ...

    def query(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys the shard holds, without a lease."""
        ...

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Refresh recency of a chain, given head first."""
        ...

    def durable(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys are safe on disk under the shard's fsync policy."""
        ...

    def flush(self, timeout_s: float) -> FlushReport:
        """Write out and sync everything that was committed before the call."""
        ...


class _Staged:
    """A `stage` that is done already."""

    def __init__(self, client: LocalShardClient, results: list[StageResult]) -> None:
        self._client = client
        self._results = results

    def result(self) -> list[StageResult]:
        return self._results

    def abandon(self) -> None:
        self._client.release([SlotRef(r.slot, r.generation) for r in self._results if r.slot >= 0])


class LocalShardClient:
    """A `ShardClient` over a `ShardStore` in the same process."""

    def __init__(self, store: ShardStore, shard_id: str = "local") -> None:
        self._store = store
        self._shard_id = shard_id
        attachment = store.attach(os.getpid())
        self._client_id = attachment.client_id
        self._arena = ArenaView(attachment)

    @property
    def shard_id(self) -> str:
        """Name of the shard."""
        return self._shard_id

    @property
    def arena(self) -> ArenaView:
        """The shard's slots."""
        return self._arena

    @property
    def lost(self) -> bool:
        """Never: it lives and dies with this process."""
        return False

    def stage(self, keys: Sequence[BlockKey]) -> list[StageResult]:
        """See `ShardStore.stage`."""
        return self._store.stage(self._client_id, keys)

    def stage_async(
        self, keys: Sequence[BlockKey], released: Sequence[SlotRef] = ()
    ) -> PendingStage:
        """See `ShardStore.stage`; here it is done when this returns."""
        return _Staged(self, self._store.stage(self._client_id, keys, released))

    def cancel(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `ShardStore.cancel`."""
        return self._store.cancel(self._client_id, keys)

    def release(self, slots: Sequence[SlotRef]) -> None:
        """See `ShardStore.release`."""
        self._store.release(self._client_id, slots)

    def reserve(self, block_bytes: int, n: int) -> list[SlotRef]:
        """See `ShardStore.reserve`."""
        return self._store.reserve(self._client_id, block_bytes, n)

    def commit(self, items: Sequence[CommitItem]) -> list[CommitStatus]:
        """See `ShardStore.commit`."""
        return self._store.commit(self._client_id, items)

    def query(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `ShardStore.query`."""
        return self._store.query(keys)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """See `ShardStore.touch`."""
        self._store.touch(keys)

    def durable(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `ShardStore.durable`."""
        return self._store.durable(keys)

    def flush(self, timeout_s: float = 30.0) -> FlushReport:
        """See `ShardStore.flush`."""
        return self._store.flush(timeout_s)

    def wait(self, slots: Sequence[SlotRef], timeout_s: float = 30.0) -> list[bool]:
        """Block until the leased slots have stopped loading; see `ShardStore.wait`."""
        return self._store.wait(slots, timeout_s)

    def close(self) -> None:
        """Detach, ending all leases, and unmap."""
        self._store.detach(self._client_id)
        self._arena.close()
