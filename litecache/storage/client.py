"""What the engine's transfer calls: one shard, seen from a client process.

`ShardClient` is the contract; `LocalShardClient` fulfils it over a `ShardStore` of the same
process. The Ray one lives in `litecache.actors`. All methods return at once except `flush`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from ..hashing import BlockKey
from .arena.view import ArenaView
from .protocol import ALL_KEYS, CommitItem, CommitStatus, FlushReport, SlotRef, StageResult
from .shard_store import ShardStore

P = ParamSpec("P")
R = TypeVar("R")


class PendingStage(Protocol):
    """A `stage` under way; whoever began it calls `result` or `abandon`, else its leases stay."""

    def result(self) -> list[StageResult]:
        """Wait for the answer; a shard that is late or gone answers MISS."""

    def abandon(self) -> None:
        """The answer is not wanted any more: its leases end as soon as it comes."""


class ShardClient(Protocol):
    """One shard, as one client process uses it; see `ShardStore` for each method's contract."""

    @property
    def shard_id(self) -> str:
        """Names the shard in logs, counters and rendezvous hashing."""

    @property
    def arena(self) -> ArenaView:
        """The shard's slots, mapped into this process."""

    @property
    def lost(self) -> bool:
        """The shard's process is gone: what it was loading will never be ready."""

    def stage(self, keys: Sequence[BlockKey]) -> list[StageResult]:
        """Lease the blocks that are there; start reading those that are on disk."""

    def stage_async(
        self,
        keys: Sequence[BlockKey],
        released: Sequence[SlotRef] = (),
        reads: int = ALL_KEYS,
    ) -> PendingStage:
        """Begin a `stage` without waiting; leases in `released` end on the way, as by `release`.
        Of keys behind the first `reads` no disk is read."""

    def wait(self, slots: Sequence[SlotRef], timeout_s: float = 30.0) -> list[bool]:
        """Sleep until leased slots have stopped loading; which of them hold their block."""

    def cancel(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Give up reads that have not begun; True ends that key's lease."""

    def release(self, slots: Sequence[SlotRef]) -> None:
        """End leases."""

    def reserve(self, block_bytes: int, n: int) -> list[SlotRef]:
        """Up to `n` slots to fill; fewer or none means back-pressure."""

    def commit(self, items: Sequence[CommitItem]) -> list[CommitStatus]:
        """Publish filled slots; the leases end."""

    def query(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys the shard holds, without a lease."""

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Refresh recency of a chain, given head first."""

    def durable(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys are safe on disk under the shard's fsync policy."""

    def flush(self, timeout_s: float) -> FlushReport:
        """Write out and sync everything that was committed before the call."""

    def close(self) -> None:
        """Detach, which ends all leases."""


class _Staged(NamedTuple):
    """A `stage` that is done already."""

    client: LocalShardClient
    results: list[StageResult]

    def result(self) -> list[StageResult]:
        return self.results

    def abandon(self) -> None:
        self.client.release([SlotRef(r.slot, r.generation) for r in self.results if r.slot >= 0])


def _as_client(
    method: Callable[Concatenate[ShardStore, int, P], R],
) -> Callable[Concatenate[LocalShardClient, P], R]:
    """A method of the store, with the client's own id."""

    @wraps(method)
    def call(client: LocalShardClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(client.store, client.client_id, *args, **kwargs)

    return call


def _of_store(
    method: Callable[Concatenate[ShardStore, P], R],
) -> Callable[Concatenate[LocalShardClient, P], R]:
    """A method of the store that does not ask who calls."""

    @wraps(method)
    def call(client: LocalShardClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(client.store, *args, **kwargs)

    return call


class LocalShardClient:
    """A `ShardClient` over a `ShardStore` in the same process, with which it lives and dies."""

    lost = False
    stage = _as_client(ShardStore.stage)
    cancel = _as_client(ShardStore.cancel)
    release = _as_client(ShardStore.release)
    reserve = _as_client(ShardStore.reserve)
    commit = _as_client(ShardStore.commit)
    query = _of_store(ShardStore.query)
    touch = _of_store(ShardStore.touch)
    durable = _of_store(ShardStore.durable)
    flush = _of_store(ShardStore.flush)
    wait = _of_store(ShardStore.wait)

    def __init__(self, store: ShardStore, shard_id: str = "local") -> None:
        self.store, self.shard_id = store, shard_id
        attachment = store.attach(os.getpid())
        self.client_id = attachment.client_id
        try:
            self.arena = ArenaView(attachment)
        except BaseException:
            store.detach(self.client_id)
            raise

    def stage_async(
        self,
        keys: Sequence[BlockKey],
        released: Sequence[SlotRef] = (),
        reads: int = ALL_KEYS,
    ) -> PendingStage:
        """Stage at once; only undoing it is left."""
        return _Staged(self, self.stage(keys, released, reads))

    def close(self) -> None:
        """Detach, which ends all leases, and unmap the arena."""
        self.store.detach(self.client_id)
        self.arena.close()
