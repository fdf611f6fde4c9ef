"""The `GpuCache` actor: model, block pool and engine of one replica.

A thin async shell over `Engine`, which steps in a thread of its own; the event loop takes requests
and hands out results and never waits for either. The engine is built by a background thread: on
the first start when the driver says `begin` (the shards of the node are up then), after a crash at
once, because everything it needs is in the constructor's arguments.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray

from litecache.actors.calls import ReplicaLeftError, actor_names, find_actor, was_restarted
from litecache.actors.coordinator import CoordinatedSource, CoordinatorClient
from litecache.actors.group_spec import GroupSpec
from litecache.actors.messages import ReplicaMethod, answering, unpack_call
from litecache.actors.metrics_export import MetricsExporter
from litecache.actors.naming import (
    CALL_TIMEOUT_S,
    REPORT_INTERVAL_S,
    replica_name,
    role_of,
    shard_name,
)
from litecache.actors.outbox import Outbox
from litecache.actors.placement import going_nodes
from litecache.actors.router import FAILURE_WINDOW_S, ReplicaLoad
from litecache.actors.shard_client import AttachedShards, RayShardClient
from litecache.checks import check_integer, check_real
from litecache.engine.engine_info import check_short_text
from litecache.errors import (
    ConfigError,
    GroupError,
    GroupUnavailableError,
    LiteCacheError,
    shorten,
    told,
)
from litecache.metrics import Metrics
from litecache.paths import hold_model
from litecache.sockets.frames import handler_of
from litecache.sockets.server import AsyncHandler, AsyncSocketServer
from litecache.spans import Span, record_spans, recorded_spans
from litecache.threads import fault_counts, start_job, start_service, take_short_turns
from litecache.types import Guidance, PollReply, Request, TokenDelta

if TYPE_CHECKING:
    from litecache.engine.engine import Engine

logger = logging.getLogger(__name__)

_LONGEST_HOLD_S = 600.0
# A process that ends itself gives its last answers this time to leave it.
_LAST_WORDS_S = 0.1
# A turn of the engine's thread takes seconds on a GPU, be it with kernels to compile: one that has
# not ended in this time, while the process ran, never will. On a CPU a step may take minutes.
STUCK_S = 180.0
# So often a replica whose process ended itself is started again, within FAILURE_WINDOW_S.
MAX_RESTARTS = 3
# With so many reports it looks whether its node is to go; then it saves what it can for so long.
_LOOK_EVERY, _SAVE_S = 3, 30.0


def _of_engine(name: str) -> Any:
    """The engine's method of this name as one of the actor, in a thread: it waits for steps."""

    async def call(self: GpuCache, *args: Any) -> Any:
        engine = await self._ready()
        return await asyncio.to_thread(getattr(engine, name), *args)

    return call


class GpuCache:
    """Plain class behind the actor.

    Args:
        spec: settings of the group.
        index: of the replica.
    """

    flush = _of_engine("flush")
    clear_pool = _of_engine("clear_pool")
    delete_salt = _of_engine("delete_salt")
    save_prefix = _of_engine("save_prefix")
    view_prefix = _of_engine("view_prefix")

    def __init__(self, spec: GroupSpec, index: int) -> None:
        # The engine's threads wait for shards with `ray.get`; only the event loop must not.
        os.environ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"
        self._spec, self._index = spec, index
        self._model = hold_model(spec.source.path)
        self._node_id = ray.get_runtime_context().get_node_id()
        self._name = replica_name(spec.group, index)
        self._epoch = uuid.uuid4().hex[:12]
        self._metrics = Metrics()
        self._coordinator = CoordinatorClient(spec.group)
        here = spec.shards_of, self._node_id
        self._remote = CoordinatedSource(*here, self._coordinator, self._metrics)
        self._loading: concurrent.futures.Future[Engine] = concurrent.futures.Future()
        self._begun = threading.Lock()
        self._methods: dict[int, AsyncHandler] = {
            method: answering(method, getattr(self, method.name.lower()))
            for method in ReplicaMethod
        }
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox: Outbox | None = None
        self._door: AsyncSocketServer | None = None
        self._stopped = threading.Event()
        self._ending: BaseException | None = None
        self._draining_until = 0.0
        take_short_turns()
        if "RAY_PROFILING" in os.environ:
            record_spans()
        self._preloading = start_job(self._preload, "preload")
        self._restarted = was_restarted()
        if self._restarted:
            self._begin()

    def __repr__(self) -> str:
        spec = self._spec
        device = spec.config.device or ("cuda" if spec.num_gpus else "cpu")
        return (
            f"GpuCache(group={spec.group}, replica={self._index}, model={spec.source.short_name}, "
            f"device={device}, node={self._node_id[:8]})"
        )

    async def where(self) -> dict[str, Any]:
        """Process, node, state and the address of the socket, without waiting for the model."""
        if self._door is None:
            self._door = AsyncSocketServer(self._epoch, self._methods)
            try:
                await self._door.start()
            except OSError as error:
                logger.warning("%s has no socket: drivers call the actor: %s", self._name, error)
        return {
            "pid": os.getpid(),
            "node_id": self._node_id,
            "name": self._name,
            "epoch": self._epoch,
            "ready": self._ending is None
            and self._loading.done()
            and not self._loading.exception()
            and not self._is_draining(),
            "address": self._door.address or None,
        }

    async def call(self, code: int, message: bytes) -> bytes:
        """What the socket answers, for drivers that cannot reach it."""
        return await handler_of(self._methods, code)(message)

    async def begin(self) -> None:
        """Attach to the shards of the node and load the model, in the background."""
        self._begin()

    async def info(self) -> Any:
        """The engine's `EngineInfo`; waits for the model and raises what refused it."""
        return (await self._ready()).info

    async def submit(self, client_id: str, requests: Sequence[Request]) -> str:
        """Start requests, all or none.

        Returns:
            The epoch under which their tokens will be polled.

        Raises:
            GroupUnavailableError: the model is still loading.
            LiteCacheError: a request is refused; nothing was started.
        """
        if not self._loading.done():
            # A caller that gave up waiting could not tell whether its requests run.
            raise GroupUnavailableError(f"{self._name} is loading its model")
        return await self._accept(await self._ready(), client_id, requests)

    async def poll(
        self,
        client_id: str,
        epoch: str,
        ack: int,
        hold_s: float,
        gap_s: float = 0.0,
        requests: Sequence[Request] = (),
    ) -> PollReply:
        """Tokens after `ack`, as soon as there are any; see `Outbox.poll`.

        While the model loads the reply is empty and its epoch is "".

        Args:
            client_id, epoch, ack, hold_s, gap_s: see `Outbox.poll`.
            requests: submitted first, in the same call; not while the model loads.
        """
        check_short_text("client_id", client_id)
        check_short_text("epoch", epoch, empty=True)
        check_integer("ack", ack, 0)
        check_real("hold_s", hold_s, 0, _LONGEST_HOLD_S)
        check_real("gap_s", gap_s, 0, _LONGEST_HOLD_S)
        if not self._loading.done():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._ready()), hold_s)
            return PollReply(1)
        engine = await self._ready()
        if requests:
            await self._accept(engine, client_id, requests)
        reply = await self._opened_outbox().poll(client_id, epoch, ack, hold_s, gap_s)
        if not reply.deltas:
            # No token in all that time: submitting nothing raises what ended the engine's thread.
            (await self._ready()).submit([])
        return reply

    async def guide(self, guidance: Sequence[Guidance]) -> None:
        """See `Engine.guide`."""
        (await self._ready()).guide(guidance)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; their last delta says ABORT."""
        engine = await self._ready()
        engine.abort(request_ids)

    async def stats(self) -> dict[str, Any]:
        """The engine's figures and counters."""
        engine = await self._ready()
        figures = await asyncio.to_thread(engine.stats)
        return {
            **await self.where(),
            "engine": figures,
            "metrics": self._metrics.snapshot(),
            "outbox": self._opened_outbox().stats(),
            "shards": [client.shard_id for client in self._shards.clients()],
            "remote_shards": self._remote.remote_shards,
            "thread_faults": fault_counts(),
        }

    async def timeline(self) -> list[Span] | None:
        """The last spans of this process; None where none are recorded."""
        return recorded_spans()

    async def offer(self, message: bytes, timeout_s: float) -> bool:
        """See `Engine.offer`; the request as `pack_call` packs it. False while the model loads."""
        _, (request,) = unpack_call(message)
        check_real("timeout_s", timeout_s, 0, _LONGEST_HOLD_S)
        if not self._loading.done():
            return False
        engine = await self._ready()
        engine.info.check(request)
        return await asyncio.to_thread(engine.offer, request, timeout_s)

    async def drain(self, hold_s: float) -> int:
        """Take no new requests, for so long at least; 0 s: take them again from now on.

        Returns:
            How many requests are open.
        """
        check_real("hold_s", hold_s, 0, _LONGEST_HOLD_S)
        self._draining_until = time.monotonic() + hold_s
        if hold_s:
            try:
                await asyncio.to_thread(self._coordinator.call, "retire_replica", self._index)
            except LiteCacheError as error:  # it hears no report, either
                logger.info("%s: the coordinator was not told: %s", self._name, error)
        return self._outbox.live_requests if self._outbox is not None else 0

    def _is_draining(self) -> bool:
        return time.monotonic() < self._draining_until

    async def stop(self, timeout_s: float) -> dict[str, Any]:
        """Flush and close the engine; the actor is of no use afterwards."""
        if not self._loading.done() or self._loading.exception() is not None:
            return {}
        engine = self._loading.result()
        report = await asyncio.to_thread(engine.flush, timeout_s)
        self._stopped.set()
        if self._door is not None:
            self._door.close()
        for close in (self._shards.close, engine.close, self._exporter.close):
            await asyncio.to_thread(close)
        return report

    async def _accept(self, engine: Engine, client_id: str, requests: Sequence[Request]) -> str:
        check_short_text("client_id", client_id)
        if not isinstance(requests, (list, tuple)):
            raise ConfigError("requests", type(requests).__name__, "a list of requests")
        if self._is_draining():
            raise GroupUnavailableError(f"{self._name} is to go, and takes no more requests")
        for request in requests:
            engine.info.check(request)
            if request.client_id != client_id:
                raise ConfigError("client_id", request.client_id, f"{client_id!r}, the sender's")
        outbox = self._opened_outbox()
        epoch, new = outbox.register(client_id, [r.request_id for r in requests])
        fresh = [r for r in requests if r.request_id in new]
        try:
            engine.submit(fresh)
        except BaseException:
            outbox.forget(client_id, new)
            raise
        return epoch

    def _begin(self) -> None:
        if self._begun.acquire(blocking=False):
            start_job(self._load, "load", self._not_loaded)

    async def _ready(self) -> Engine:
        if self._ending is not None:  # others need not wait for the socket to close
            raise GroupUnavailableError(f"{self._name} ends its process: {told(self._ending)}")
        if self._stopped.is_set():
            raise GroupUnavailableError(f"{self._name} has been stopped")
        if self._loading.done():
            return self._loading.result()
        return await asyncio.shield(asyncio.wrap_future(self._loading))

    def _opened_outbox(self) -> Outbox:
        # Made by the first call on the event loop that will own it; no output can precede it.
        if self._outbox is None:
            engine = self._loading.result()
            self._loop = asyncio.get_running_loop()
            self._outbox = Outbox(self._epoch, engine)
        return self._outbox

    def _sink(self, items: list[tuple[str, TokenDelta]]) -> None:
        if self._loop is not None and self._outbox is not None:
            self._loop.call_soon_threadsafe(self._outbox.push, items)

    def _preload(self) -> None:
        # While the shards of the node start.
        from litecache.engine.loading.model_source import preload

        # Nearly all that imports make stays: to look through it again and again for garbage costs
        # a seventh of their time.
        gc.disable()
        try:
            preload(self._spec.source, cuda=self._spec.num_gpus > 0)
        finally:
            gc.freeze()
            gc.enable()

    def _load(self) -> None:
        self._preloading.join()
        try:
            if self._restarted:
                self._check_failures()
            self._loading.set_result(self._make_engine())
        except LiteCacheError as error:
            if self._restarted and not isinstance(error, ReplicaLeftError):
                # What was taken once and is refused now (memory that the process before has not
                # given back yet, a file that is away) may be taken the next time.
                self._end_process(error)
            self._loading.set_exception(error)

    def _not_loaded(self, error: BaseException) -> None:
        if self._restarted:
            # what broke the last process broke this one's start: once more, or leave
            self._end_process(error)
        self._loading.set_exception(GroupError(f"{self._name}: {told(error)}"))

    def _check_failures(self) -> None:
        """Leave the group rather than start once more, when that has not helped.

        Raises:
            ReplicaLeftError: with the reason; every later call gets it.
        """
        try:
            failures = self._coordinator.call("failures", self._index)
        except LiteCacheError as error:
            logger.warning("%s: it is not known how often it failed: %s", self._name, error)
            return
        if len(failures) > MAX_RESTARTS:
            raise ReplicaLeftError(
                f"{self._name} has left its group: its process ended itself {len(failures)} times "
                f"within {FAILURE_WINDOW_S:g} s, at last because of {failures[-1]}"
            )

    def _make_engine(self) -> Engine:
        from litecache.engine.engine import Engine

        spec = self._spec
        config = spec.config
        if spec.num_gpus and config.device not in (None, "cuda"):
            # Ray shows the actor only its own GPU.
            config = dataclasses.replace(config, device="cuda")
        if not spec.num_gpus and config.device is None:
            config = dataclasses.replace(config, device="cpu")
        # After a restart nobody has waited for the shards: those that hang may join later.
        patience = (CALL_TIMEOUT_S,) if self._restarted else ()
        prefix = shard_name(spec.shards_of, self._node_id, 0).removesuffix("0")
        names = [name for name in actor_names(spec.shards_of) if name.startswith(prefix)]
        self._shards = AttachedShards(names, self._connect, *patience)
        engine = Engine(
            spec.source,
            config,
            shards=self._shards.clients(),
            remote=self._remote,
            sink=self._sink,
            num_threads=spec.num_threads or len(os.sched_getaffinity(0)),
            metrics=self._metrics,
            on_death=self._end_process,
        )
        self._shards.watch(engine.set_shards)
        tags = {
            "group": spec.group,
            "actor": role_of(self._name),
            "model": spec.source.short_name,
        }
        self._exporter = MetricsExporter(self._metrics, tags, refresh=engine.refresh_metrics)
        # A full collection walks through the 400,000 objects of torch and transformers and holds
        # up the steps for a third of a second. What is there now stays: leave it out.
        gc.collect()
        gc.freeze()
        # Only now: a replica that reports is given requests.
        self._report(engine)
        start_service(lambda: self._keep_reporting(engine), "replica-report")
        return engine

    def _connect(self, name: str, on_lost: Callable[..., None]) -> RayShardClient:
        shard_id, handle = name.split(":shard:", 1)[1], find_actor(name)
        client = RayShardClient(handle, shard_id, metrics=self._metrics, on_lost=on_lost)
        if self._spec.shard_group is not None:
            handle.serve.remote(self._spec.group, self._spec.source.path)
        return client

    def _keep_reporting(self, engine: Engine) -> None:
        seen, stuck_s = None, 0.0
        for number in itertools.count(1):
            if self._stopped.wait(REPORT_INTERVAL_S):
                return
            if number % _LOOK_EVERY == 0:
                self._look_at_node(engine)
            self._report(engine)
            turn = engine.turn()
            stuck_s = stuck_s + REPORT_INTERVAL_S if turn is not None and turn == seen else 0.0
            seen = turn
            if stuck_s >= STUCK_S and engine.info.device.startswith("cuda"):
                text = f"{engine.info.device} hangs: a step has not ended in {STUCK_S:g} s"
                self._end_process(GroupError(text))

    def _look_at_node(self, engine: Engine) -> None:
        """Leave the work to others while Ray drains this node, and save what only the pool holds.

        Where there is nobody else it goes on to the end.
        """
        going = going_nodes()
        if self._node_id not in going:
            return
        try:
            members: dict[int, str] = self._coordinator.call("members")
            if not set(members.values()) - going:
                return
            first = not self._is_draining()
            hold_s = 2 * _LOOK_EVERY * REPORT_INTERVAL_S + (_SAVE_S if first else 0.0)
            self._draining_until = time.monotonic() + hold_s
            self._coordinator.call("retire_replica", self._index)
            if first:
                logger.warning("%s: its node is to go: others take its requests", self._name)
                engine.flush(_SAVE_S)
        except LiteCacheError as error:
            logger.warning("%s: its node is to go: %s", self._name, error)

    def _report(self, engine: Engine) -> None:
        if self._is_draining():
            return
        load = ReplicaLoad(
            queued_tokens=engine.queued_tokens(),
            requests=self._outbox.live_requests if self._outbox is not None else 0,
            rows=engine.info.max_requests,
            pool_blocks=engine.info.num_blocks,
            epoch=self._epoch,
        )
        try:
            shards = self._coordinator.report_replica(self._index, self._node_id, load)
            self._remote.remote_shards = shards
        except LiteCacheError as error:
            # What it said last stands: the other nodes' shards are still there.
            logger.info("%s: not reported: %s", self._name, error)

    def _end_process(self, error: BaseException) -> None:
        """Nothing here can go on: Ray makes a new process, and clients submit to that."""
        self._ending = error
        if self._loop is not None and self._outbox is not None:
            self._loop.call_soon_threadsafe(self._outbox.wake_all)
        logger.critical("%s: its process ends: %s", self._name, error)
        with contextlib.suppress(Exception):  # it ends whether anybody hears why or not
            self._coordinator.call("report_failure", self._index, shorten(told(error)))
        # Drivers on other nodes hear it from their polls; Ray would take more than a second.
        time.sleep(_LAST_WORDS_S)
        logging.shutdown()
        os._exit(1)
