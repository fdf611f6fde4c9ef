"""A shard of the same node, as the engine's transfer threads use it.

Control goes through the shard's socket, or by calls of its actor where no socket can be reached,
with a deadline, each batch as one packed message; bytes go by the shared arena. A call that fails
is a miss, never an error (`ShardCalls`). `stage_async` keeps several batches under way, which
hides the round trip of a call behind the copies of the batches before it. A client belongs to one
life of the shard: when that ends it stays silent, `on_lost` is called once, and whoever watches
makes a new client with the new arena.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from litecache.actors.calls import result
from litecache.actors.naming import CALL_TIMEOUT_S
from litecache.actors.shard_calls import Call, ShardCalls
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.sockets.channel import SocketChannel
from litecache.storage import wire
from litecache.storage.arena.view import ArenaView
from litecache.storage.protocol import (
    CommitItem,
    CommitStatus,
    FlushReport,
    ShardMethod,
    SlotRef,
    StageResult,
    StageStatus,
)

logger = logging.getLogger(__name__)

_ATTACH_TIMEOUT_S = 30.0
_MISS = StageResult(StageStatus.MISS)


class RayShardClient:
    """`ShardClient` over a `StorageShard` actor.

    Args:
        handle: the actor.
        shard_id: names the shard.
        timeout_s: deadline of every call.
        metrics: counts failed calls as misses with a reason.
        on_lost: called once, from any thread, when the actor's process is gone.

    Raises:
        LiteCacheError: the shard does not answer, or refuses.
    """

    def __init__(
        self,
        handle: Any,
        shard_id: str,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        metrics: Metrics | None = None,
        on_lost: Callable[[RayShardClient], None] | None = None,
    ) -> None:
        self._handle, self._shard_id = handle, shard_id
        self._calls = ShardCalls(
            handle,
            shard_id,
            timeout_s,
            metrics or Metrics(),
            lambda: on_lost(self) if on_lost is not None else None,
        )
        attachment = result(
            handle.attach.remote(os.getpid()), _ATTACH_TIMEOUT_S, f"{shard_id}: attach"
        )
        self._client_id = attachment.client_id
        self._calls.channel = _connected(attachment.address, shard_id)
        self._arena = ArenaView(attachment)

    @property
    def shard_id(self) -> str:
        """Names the shard."""
        return self._shard_id

    @property
    def arena(self) -> ArenaView:
        """The slots of the shard's present life."""
        return self._arena

    @property
    def lost(self) -> bool:
        """The shard's process is gone."""
        return self._calls.lost

    def stage(self, keys: Sequence[BlockKey]) -> list[StageResult]:
        """See `ShardStore.stage`."""
        return self.stage_async(keys).result()

    def stage_async(
        self, keys: Sequence[BlockKey], released: Sequence[SlotRef] = ()
    ) -> Call[list[StageResult]]:
        """Begin a `stage`; leases in `released` end with the same message.

        Raises:
            ConfigError: a key is not 16 bytes.
        """
        call = self._calls.ask(
            ShardMethod.STAGE,
            wire.pack_stage(self._client_id, keys, released),
            decode=wire.unpack_staged,
            failed=[_MISS] * len(keys),
            undo=self._undo_stage,
        )
        if not call.sent:
            self.release(released)
        return call

    def _undo_stage(self, results: list[StageResult]) -> None:
        self.release([SlotRef(r.slot, r.generation) for r in results if r.slot >= 0])

    def wait(self, slots: Sequence[SlotRef], timeout_s: float = 30.0) -> list[bool]:
        """Sleep until leased slots have stopped loading; see `ArenaView.wait`."""
        return self._arena.wait(slots, timeout_s, lambda: self._calls.lost)

    def cancel(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `ShardStore.cancel`."""
        return self._flags(ShardMethod.CANCEL, keys)

    def release(self, slots: Sequence[SlotRef]) -> None:
        """See `ShardStore.release`; does not wait for the answer."""
        if slots:
            self._calls.tell(ShardMethod.RELEASE, wire.pack_slots(slots, self._client_id))

    def reserve(self, block_bytes: int, n: int) -> list[SlotRef]:
        """See `ShardStore.reserve`."""
        nothing: list[SlotRef] = []
        return self._calls.ask(
            ShardMethod.RESERVE,
            wire.pack_reserve(self._client_id, block_bytes, n),
            decode=wire.unpack_slots,
            failed=nothing,
            undo=self.release,
        ).result()

    def commit(self, items: Sequence[CommitItem]) -> list[CommitStatus]:
        """See `ShardStore.commit`; when the answer is late the blocks count as not stored."""
        return self._calls.ask(
            ShardMethod.COMMIT,
            wire.pack_commits(items, self._client_id),
            decode=wire.unpack_statuses,
            failed=[CommitStatus.STALE] * len(items),
        ).result()

    def query(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `ShardStore.query`."""
        return self._flags(ShardMethod.QUERY, keys)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """See `ShardStore.touch`; does not wait for the answer."""
        if keys:
            self._calls.tell(ShardMethod.TOUCH, wire.pack_keys(keys))

    def durable(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `ShardStore.durable`."""
        return self._flags(ShardMethod.DURABLE, keys)

    def flush(self, timeout_s: float) -> FlushReport:
        """See `ShardStore.flush`."""

        def same(report: FlushReport) -> FlushReport:
            return report

        failed = FlushReport(0, 0, 0, False)
        call = self._calls.ask_actor("flush", (timeout_s,), decode=same, failed=failed)
        return call.result(timeout_s + self._calls.timeout_s)

    def close(self) -> None:
        """Detach, which ends all leases, and unmap the arena."""
        if not self._calls.lost:
            self._handle.detach.remote(self._client_id)
        self._calls.close()
        self._arena.close()

    def _flags(self, method: ShardMethod, keys: Sequence[BlockKey]) -> list[bool]:
        return self._calls.ask(
            method,
            wire.pack_keys(keys, self._client_id),
            decode=wire.unpack_flags,
            failed=[False] * len(keys),
        ).result()


def _connected(address: str | None, shard_id: str) -> SocketChannel | None:
    """The shard's socket; None where it has none or this process cannot reach it."""
    if address is None:
        return None
    try:
        return SocketChannel(address)
    except OSError as error:
        logger.info("%s is called through Ray, its socket cannot be reached: %s", shard_id, error)
        return None
