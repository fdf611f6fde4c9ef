"""The shards of this node, as the engine's transfer threads use them.

Short calls are packed messages through a `Stub`, with a deadline; bytes go by the shared arena. A
call that fails is a miss, never an error. `stage_async` keeps several batches under way, which
hides the round trip of a call behind the copies of the batches before it.

A call that is late may still take effect on the shard: until its answer is known nothing more is
asked, and what it turns out to have given is returned. A client belongs to one life of the shard:
when that ends it stays silent, `on_lost` is called once, and `AttachedShards` makes a new client
with the new arena. A shard that never comes costs misses, nothing else.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from litecache.actors.calls import result
from litecache.actors.naming import CALL_TIMEOUT_S
from litecache.actors.stub import Answer, Stub
from litecache.errors import GroupUnavailableError, LiteCacheError, RequestTimeout
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.storage import wire
from litecache.storage.arena.view import ArenaView
from litecache.storage.client import ShardClient
from litecache.storage.protocol import (
    ALL_KEYS,
    CommitItem,
    CommitStatus,
    FlushReport,
    ShardMethod,
    SlotRef,
    StageResult,
    StageStatus,
)
from litecache.threads import start_job, start_service

logger = logging.getLogger(__name__)

T = TypeVar("T")
C = TypeVar("C", bound=ShardClient)
_ATTACH_TIMEOUT_S = 30.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.2, 5.0
_MISS = StageResult(StageStatus.MISS)


def _unpack_reserved(message: bytes) -> list[SlotRef]:
    return wire.unpack_slots(message)[1]


@dataclass(eq=False)
class Call(Generic[T]):
    """One call under way; its result is taken once, or it is abandoned.

    Attributes:
        client: who asks.
        name: of the method, for messages.
        answer: None: the shard was not asked.
        failed: the result when the call cannot be made, fails or is late.
        undo: returns what an answer gave that nobody takes any more.
    """

    client: RayShardClient
    name: str
    answer: Answer[T] | None
    failed: T
    undo: Callable[[T], None] | None = None

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for the answer; `failed` when there is none within the client's deadline."""
        return self.client.wait_for(self, timeout_s)

    def abandon(self) -> None:
        """The answer is not wanted any more: what it gives is returned when it comes."""
        if self.answer is not None:
            self.client.settle_later(self)


def _each(method: ShardMethod) -> Callable[[RayShardClient, Sequence[BlockKey]], list[bool]]:
    """A method of the shard that says yes or no of each key; no where it does not answer."""

    def ask(client: RayShardClient, keys: Sequence[BlockKey]) -> list[bool]:
        message, failed = wire.pack_keys(keys, client._client_id), [False] * len(keys)
        return client._ask(method, message, wire.unpack_flags, failed).result()

    return ask


class RayShardClient:
    """`ShardClient` over a `StorageShard` actor.

    Args:
        handle: the actor.
        shard_id: names the shard.
        timeout_s: deadline of a call, from the moment its answer is waited for.
        metrics: counts failed calls as misses with a reason.
        on_lost: called once, from any thread, when the actor's process is gone.

    Attributes:
        arena: the slots of the shard's present life.

    Raises:
        LiteCacheError: the shard does not answer, or refuses.
    """

    cancel = _each(ShardMethod.CANCEL)
    query = _each(ShardMethod.QUERY)
    durable = _each(ShardMethod.DURABLE)

    def __init__(
        self,
        handle: Any,
        shard_id: str,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        metrics: Metrics | None = None,
        on_lost: Callable[[RayShardClient], None] | None = None,
    ) -> None:
        self._handle, self.shard_id, self.timeout_s = handle, shard_id, timeout_s
        self._metrics = metrics or Metrics()
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._late: deque[Call[Any]] = deque()
        self._settling = self._lost = False
        self._stub = Stub(handle, shard_id)
        attached = handle.attach.remote(os.getpid())
        attachment = result(attached, _ATTACH_TIMEOUT_S, f"{shard_id}: attach")
        self._client_id = attachment.client_id
        self._stub.connect(attachment.address)
        self.arena = ArenaView(attachment)

    @property
    def lost(self) -> bool:
        """The shard's process is gone, or this is closed."""
        channel = self._stub.channel
        if not self._lost and channel is not None and channel.hung_up:
            logger.warning("%s has closed its socket", self.shard_id)
            self._lose()
        return self._lost

    def stage(self, keys: Sequence[BlockKey]) -> list[StageResult]:
        """See `ShardStore.stage`."""
        return self.stage_async(keys).result()

    def stage_async(
        self,
        keys: Sequence[BlockKey],
        released: Sequence[SlotRef] = (),
        reads: int = ALL_KEYS,
    ) -> Call[list[StageResult]]:
        """Begin a `stage`; leases in `released` end with the same message.

        Raises:
            ConfigError: a key is not 16 bytes.
        """
        message = wire.pack_stage(self._client_id, keys, released, reads)
        missed = [_MISS] * len(keys)
        call = self._ask(ShardMethod.STAGE, message, wire.unpack_staged, missed, self._undo_stage)
        if call.answer is None:
            self.release(released)
        return call

    def _undo_stage(self, results: list[StageResult]) -> None:
        self.release([SlotRef(r.slot, r.generation) for r in results if r.slot >= 0])

    def wait(self, slots: Sequence[SlotRef], timeout_s: float = 30.0) -> list[bool]:
        """Sleep until leased slots have stopped loading; see `ArenaView.wait`."""
        return self.arena.wait(slots, timeout_s, lambda: self.lost)

    def release(self, slots: Sequence[SlotRef]) -> None:
        """See `ShardStore.release`; does not wait for the answer."""
        if slots and not self._lost:
            self._stub.tell(ShardMethod.RELEASE, wire.pack_slots(slots, self._client_id))

    def reserve(self, block_bytes: int, n: int) -> list[SlotRef]:
        """See `ShardStore.reserve`."""
        message, nothing = wire.pack_reserve(self._client_id, block_bytes, n), list[SlotRef]()
        return self._ask(
            ShardMethod.RESERVE, message, _unpack_reserved, nothing, self.release
        ).result()

    def commit(self, items: Sequence[CommitItem]) -> list[CommitStatus]:
        """See `ShardStore.commit`; when the answer is late the blocks count as not stored."""
        message, lost = wire.pack_commits(items, self._client_id), [CommitStatus.STALE] * len(items)
        return self._ask(ShardMethod.COMMIT, message, wire.unpack_statuses, lost).result()

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """See `ShardStore.touch`; does not wait for the answer."""
        if keys and not self._lost:
            self._stub.tell(ShardMethod.TOUCH, wire.pack_keys(keys))

    def flush(self, timeout_s: float) -> FlushReport:
        """See `ShardStore.flush`."""
        answer: Answer[FlushReport] | None = None
        if self._may_ask():
            answer = Answer(self._handle.flush.remote(timeout_s), None, lambda report: report)
        call = Call(self, f"{self.shard_id}: flush", answer, FlushReport(0, 0, 0, False))
        return call.result(timeout_s + self.timeout_s)

    def close(self) -> None:
        """Detach, which ends all leases, and unmap the arena."""
        if not self.lost:
            self._handle.detach.remote(self._client_id)
        self._lost = True
        self._stub.disconnect()
        self.arena.close()

    def _ask(
        self,
        method: ShardMethod,
        message: bytes,
        decode: Callable[[Any], T],
        failed: T,
        undo: Callable[[T], None] | None = None,
    ) -> Call[T]:
        answer: Answer[T] | None = None
        if self._may_ask():
            try:
                answer = self._stub.ask(method, message, decode)
            except GroupUnavailableError as error:
                self._note_lost(error)
        name = f"{self.shard_id}: {method.name.lower()}"
        return Call(self, name, answer, failed, undo)

    def _may_ask(self) -> bool:
        if self._lost or self._late:
            self._count("shard_unavailable")
            self._start_settling()
            return False
        return True

    def wait_for(self, call: Call[T], timeout_s: float | None) -> T:
        """See `Call.result`."""
        if call.answer is None:
            return call.failed
        try:
            # while an earlier call is late, only an answer that is there already counts
            patience_s = 0.0 if self._late else timeout_s or self.timeout_s
            return call.answer.get(patience_s, call.name, again=True)
        except RequestTimeout as error:
            logger.warning("%s; its blocks count as misses until it answers", error)
            self._count("shard_timeout")
            self.settle_later(call)
        except GroupUnavailableError as error:
            self._note_lost(error)
        except LiteCacheError as error:
            logger.warning("%s", error)
            self._count("shard_error")
        return call.failed

    def settle_later(self, call: Call[Any]) -> None:
        """Nobody waits for this call any more: undo it once it is answered."""
        with self._lock:
            self._late.append(call)
        self._start_settling()

    def _start_settling(self) -> None:
        with self._lock:
            if self._settling or not self._late:
                return
            try:
                start_job(self._settle, "late-shard-calls", lambda _: self._lose())
                self._settling = True
            except RuntimeError as error:
                # no room for a thread: the next call tries again
                logger.warning("%s: late calls wait: %s", self.shard_id, error)

    def _settle(self) -> None:
        while True:
            with self._lock:
                if not self._late:
                    self._settling = False
                    return
                call = self._late[0]
                assert call.answer is not None
            try:
                answer = call.answer.get(None, call.name, again=True)
                if call.undo is not None:
                    call.undo(answer)
            except GroupUnavailableError:
                self._lose()
            except LiteCacheError as error:
                logger.warning("%s", error)
            with self._lock:
                self._late.popleft()

    def _note_lost(self, error: GroupUnavailableError) -> None:
        logger.warning("%s", error)
        self._count("shard_lost")
        self._lose()

    def _lose(self) -> None:
        with self._lock:
            first, self._lost = not self._lost, True
        if first and self._on_lost is not None:
            self._on_lost(self)

    def _count(self, reason: str) -> None:
        self._metrics.inc("litecache_misses", tier="shard", reason=reason)


class AttachedShards(Generic[C]):
    """Clients by name: all at the start, and what is lost as soon as it is back.

    Each is attached by a thread of its own: one that hangs keeps neither the others nor, for
    longer than `patience_s`, the start waiting, and is there as soon as it answers.

    Args:
        names: the shards of the node.
        connect: attaches to the shard of a name and calls the function given with it when that is
            gone; raises LiteCacheError when the shard does not answer.
        patience_s: how long the start waits for all of them.
    """

    def __init__(
        self,
        names: Sequence[str],
        connect: Callable[[str, Callable[..., None]], C],
        patience_s: float = _ATTACH_TIMEOUT_S,
    ) -> None:
        self._names = list(names)
        self._connect = connect
        self._clients: dict[str, C] = {}
        self._attaching: set[str] = set()
        self._changed: Callable[[list[C]], None] | None = None
        self._condition, self._telling = threading.Condition(), threading.Lock()
        self._untold = self._closed = False
        self._attach(self._names)
        with self._condition:
            self._condition.wait_for(lambda: not self._attaching, patience_s)
        self._thread: threading.Thread | None = None

    def clients(self) -> list[C]:
        """The shards that are attached now."""
        with self._condition:
            self._untold = False
            return [self._clients[name] for name in self._names if name in self._clients]

    def client(self, name: str) -> C | None:
        """One shard, if it is attached now."""
        client = self._clients.get(name)
        return None if client is None or client.lost else client

    def watch(self, changed: Callable[[list[C]], None] | None = None) -> None:
        """From now on attach again what is lost, and call `changed` with the clients then.

        A lost client is dropped, not closed: other threads may still copy from its mapping.
        """
        with self._condition:
            self._changed = changed
        self._tell()
        self._thread = start_service(self._watch, "shard-watch")

    def close(self) -> None:
        """Stop watching; the clients stay as they are."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _attach(self, names: Sequence[str]) -> None:
        """Begin to attach to shards, unless that is under way."""
        for name in names:
            with self._condition:
                if name in self._attaching:
                    continue
                self._attaching.add(name)

            def attach(_: BaseException | None = None, name: str = name) -> None:
                self._attach_one(name)

            try:
                # a fault that comes again is left to the watch, which waits in between
                start_job(attach, "shard-attach", attach)
            except RuntimeError as error:
                logger.warning("%s is not attached: %s", name, error)  # no room for a thread
                self._attached(name)

    def _attached(self, name: str) -> None:
        """An attempt has ended, well or not."""
        with self._condition:
            self._attaching.discard(name)
            self._condition.notify_all()

    def _attach_one(self, name: str) -> None:
        try:
            client = self._connect(name, lambda *_: self._lost(name))
            with self._condition:
                if self._closed:
                    client.close()
                    return
                self._clients[name], self._untold = client, True
            if client.lost:  # before it was in its place
                self._lost(name)
            self._tell()
        except LiteCacheError as error:
            logger.info("%s is not attached: %s", name, error)
        finally:
            self._attached(name)

    def _tell(self) -> None:
        """Tell whoever watches of those that have come since the last time."""
        with self._telling:  # what is told last is what there is
            if self._untold and self._changed is not None:
                self._changed(self.clients())

    def _lost(self, name: str) -> None:
        with self._condition:
            self._clients.pop(name, None)
            self._condition.notify_all()

    def _missing(self) -> list[str]:
        return [name for name in self._names if name not in self._clients]

    def _watch(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or bool(self._missing()))
                if self._closed:
                    return
                missing = self._missing()
            self._attach(missing)
            with self._condition:
                self._condition.wait_for(
                    lambda: self._closed or not (self._attaching or self._missing()), retry_s
                )
                if self._closed:
                    return
                retry_s = min(2 * retry_s, _LAST_RETRY_S) if self._missing() else _FIRST_RETRY_S
