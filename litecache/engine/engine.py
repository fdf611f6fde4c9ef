"""The engine: one thread that schedules, steps the model and moves blocks between tiers.

Callers talk to it from any thread. They post messages; the stepping thread alone touches the
scheduler, so nothing here is locked. New tokens leave through the sink, called once a step.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from litecache.checks import check_real
from litecache.config import CacheConfig
from litecache.engine import progress
from litecache.engine.engine_info import EngineInfo, check_short_text, check_texts
from litecache.engine.inbox import CALL_TIMEOUT_S, Inbox
from litecache.engine.kv_layout import KVLayout, KVPool, check_tier_codec
from litecache.engine.loading.memory import choose_num_blocks, memory_for
from litecache.engine.loading.model_loader import load_model
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.running.device_errors import check_device, is_out_of_memory
from litecache.engine.running.model_runner import ModelRunner
from litecache.engine.running.steps_in_flight import StepsInFlight
from litecache.engine.scheduling.cost_model import CostModel, Loads, chosen_loads, prior
from litecache.engine.scheduling.orders import Executor, SaveOrder, Schedule
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.prefix_view import PrefixView
from litecache.engine.scheduling.scheduler import (
    LOAD_CHUNK_TOKENS,
    LOOKUP_PATIENCE_S,
    Scheduler,
)
from litecache.engine.transfer.lower_tiers import LowerTiers
from litecache.engine.transfer.shard_set import RemoteSource
from litecache.errors import (
    ConfigError,
    LiteCacheError,
    RequestTimeout,
    shorten,
    told,
)
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.storage.client import ShardClient
from litecache.storage.namespaces import namespace_of
from litecache.storage.shard_options import check_tiers
from litecache.threads import start_job
from litecache.token_ids import TokenIds
from litecache.types import FinishReason, Guidance, Request, SamplingParams, TokenDelta

logger = logging.getLogger(__name__)

Sink = Callable[[list[tuple[str, TokenDelta]]], None]
T = TypeVar("T")

_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
WATCH_S = 2e-4
"""Between two looks at a step that runs, while loads may land."""
LONGEST_WAIT_S = 3600.0
"""Of an idle engine, whatever the deadlines of its requests."""


class Engine:
    """Runs one model over a paged, tiered KV cache.

    Args:
        source: the model.
        config: sizes and limits.
        shards: clients of the shards on this node; None = no lower tiers. There may be none yet:
            see `set_shards`.
        remote: blocks of other nodes.
        loads: "model" chooses what is loaded of what the tiers hold, and what is computed instead;
            "all", "none" or a function force it, see `CostModel`. None = `LITECACHE_LOADS`, or
            "model".
        sink: receives (client id, delta) pairs, in order, on the engine's thread; must not block.
        num_threads: torch's threads on CPU; None = the machine's cores.
        metrics: where to count.
        on_death: called on the engine's thread when it ends by an exception, or because the device
            has failed: nothing in this process can go on with either. None = the open requests end
            with an error, and later calls raise.

    Raises:
        LiteCacheError: the model is refused or does not fit; nothing stays behind.
    """

    def __init__(
        self,
        source: ModelSource,
        config: CacheConfig,
        *,
        sink: Sink,
        shards: Sequence[ShardClient] | None = None,
        remote: RemoteSource | None = None,
        loads: Loads | None = None,
        num_threads: int | None = None,
        metrics: Metrics | None = None,
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        _open_engines.add(self)
        self.metrics = metrics or Metrics()
        self._sink = sink
        self._on_death = on_death
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self._num_threads)
        with memory_for(f"the weights of {source.name}", "take a smaller model or dtype"):
            loaded = load_model(source, config)
        check_tier_codec(config.tier_codec, loaded.specs, loaded.device)
        layout = KVLayout.from_specs(loaded.specs, config.block_size, config.tier_codec)
        if shards is not None:
            check_tiers(config, [group.tier_bytes for group in layout.groups])
        num_blocks = choose_num_blocks(loaded, layout, config)
        with memory_for(f"a pool of {num_blocks} blocks", "lower num_blocks"):
            self._pools = [KVPool(group, num_blocks + 1, loaded.device) for group in layout.groups]
        with memory_for("the buffers of steps", "lower gpu_memory_fraction or num_blocks"):
            self._runner: Executor = ModelRunner(
                loaded,
                layout,
                self._pools,
                max_requests=config.max_requests,
                max_model_len=loaded.max_model_len,
                max_batch_tokens=config.prefill_tokens(loaded.device.type),
                deterministic=config.deterministic,
            )
        self.info = EngineInfo.of(source, config, loaded, layout, num_blocks, self._num_threads)
        self._overlap = 1 if loaded.device.type == "cuda" else 0
        self._device = loaded.device
        costs, loads = None, chosen_loads(loads)
        if shards is not None:
            num_parameters = sum(p.numel() for p in loaded.model.parameters())
            token_s, step_s = prior(num_parameters, loaded.device.type)
            costs = CostModel(
                config.block_size,
                token_s=token_s,
                step_s=step_s,
                chunk_tokens=min(LOAD_CHUNK_TOKENS, config.max_batch_tokens),
                prefill_tokens=config.prefill_tokens(loaded.device.type),
                loads=loads,
            )
        self._costs = costs
        self._admission = config.admission
        quotas = {
            root: count
            for salt, count in config.salt_pool_quotas.items()
            for root in self.info.roots(salt)
        }
        self._scheduler = Scheduler(
            PrefixCache(layout.groups, num_blocks, quotas),
            self.info.roots,
            max_requests=config.max_requests,
            max_batch_tokens=config.max_batch_tokens,
            max_prefill_tokens=config.prefill_tokens(loaded.device.type),
            cost=costs,
            admission=config.admission,
            deterministic=config.deterministic,
            # who forces a plan has it carried out, however busy the machine
            lookup_patience_s=LOOKUP_PATIENCE_S if loads == "model" else math.inf,
        )
        self._open: set[str] = set()
        self._open_lock = threading.Lock()
        self._inbox = Inbox(self.metrics, self._check_alive)
        self._failure: BaseException | None = None
        self._turns, self._waits = 0, True
        self._closing = False
        self._resting = threading.Event()
        copies = shards is not None and self._device.type == "cuda"
        self._in_flight = StepsInFlight(self._runner, self.metrics, with_events=copies)
        self._tiers: LowerTiers | None = None
        if shards is not None:
            quota_salts = frozenset(config.salt_quotas)
            self._tiers = LowerTiers(
                *(self._pools, shards, remote),
                scheduler=self._scheduler,
                post=self._inbox.put,
                carry_out=self._carry_out,
                device=self._device,
                event_of=self._in_flight.events.get,
                namespace_of=lambda salt: namespace_of(self.info.label, salt, quota_salts),
                resting=self._resting,
                metrics=self.metrics,
            )
        warm: Future[None] = Future()
        self._thread = start_job(
            lambda: self._run(warm), "engine", lambda error: self._died(error, warm)
        )
        try:
            warm.result()
        except BaseException:
            self.close()
            raise

    # Callers' side

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none.

        Raises:
            ConfigError: a request is invalid, or its id is that of an open one.
            CapacityError: a request can never fit.
        """
        self._check_alive()
        _check_each("requests", requests, "a list of requests", self.info.check)
        ids = [request.request_id for request in requests]
        with self._open_lock:
            fresh: set[str] = set()
            for name in ids:
                if name in self._open or name in fresh:
                    raise ConfigError("request_id", name, "the id of no other open request")
                fresh.add(name)
            self._open |= fresh
        now = time.monotonic()

        def add() -> None:
            for request in requests:
                try:
                    self._carry_out(self._scheduler.add(request, now))
                except Exception as error:
                    name = shorten(request.request_id, progress.MOST_LOGGED)
                    logger.exception(
                        "request %s could not be queued", name, extra={"request_id": name}
                    )
                    self._fail(request.client_id, request.request_id, error)
                else:
                    self.metrics.inc("litecache_prompt_tokens", len(request.prompt))

        self._inbox.post(add)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests with what they have; one that is still to come ends as it comes."""
        ids = check_texts("request_ids", request_ids)
        self._inbox.post(lambda: self._carry_out(self._scheduler.abort(ids)))

    def abort_client(self, client_id: str) -> None:
        """End all requests of a client."""
        check_short_text("client_id", client_id)

        def end() -> None:
            ids = [name for client, name in self._scheduler.open_requests() if client == client_id]
            self._carry_out(self._scheduler.abort(ids))

        self._inbox.post(end)

    def guide(self, guidance: Sequence[Guidance]) -> None:
        """What drivers allow guided requests next; what no request waits for is passed over.

        Raises:
            ConfigError: no such answers; none was taken.
        """
        self._check_alive()
        _check_each("guidance", guidance, "a list of Guidance", self.info.check_guidance)

        def take() -> None:  # all before the next step, which they share
            for each in guidance:
                self._carry_out(self._scheduler.guide(each))

        self._inbox.post(take)

    def pause(self, request_ids: Sequence[str]) -> None:
        """Stop decoding requests whose client does not take their tokens."""
        ids = check_texts("request_ids", request_ids)
        self._inbox.post(lambda: self._scheduler.set_paused(ids, True))

    def resume(self, request_ids: Sequence[str]) -> None:
        """The inverse of `pause`."""
        ids = check_texts("request_ids", request_ids)
        self._inbox.post(lambda: self._scheduler.set_paused(ids, False))

    def stats(self) -> dict[str, Any]:
        """Blocks by state, requests and counters, consistent with one moment."""
        return self.call(self._stats)

    def queued_tokens(self) -> int:
        """Tokens of prompts that are still to be computed; any thread may ask, and none waits."""
        scheduler = getattr(self, "_scheduler", None)
        return 0 if scheduler is None else scheduler.num_queued_tokens

    def turn(self) -> int | None:
        """The number of the turn that the engine's thread is in; None while it has nothing to do.

        Any thread may ask. One that stays the same for long does not end: the device hangs.
        """
        return None if self._waits else self._turns

    def flush(self, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """Save what is only in the pool and make the shards write it out.

        Returns:
            `{"complete": bool, "written": blocks, "pending": blocks, "failed": blocks}`.
        """
        check_real("timeout_s", timeout_s, 0)
        self._check_alive()
        deadline = time.monotonic() + timeout_s
        if self._tiers is None:
            return {"complete": True, "written": 0, "pending": 0, "failed": 0}
        # A call in between makes sure that orders of steps already done have been queued.
        self.call(lambda: None)
        return self._tiers.flush(deadline)

    def clear_pool(self, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """Evict all blocks that no request uses, after saving is through; returns how many."""
        check_real("timeout_s", timeout_s, 0)
        if self._tiers is not None:
            self.call(lambda: None)
            self._tiers.drain(timeout_s)
        return self.call(self._scheduler.cache.evict_idle)

    def delete_salt(self, salt: str, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """Forget the pool's blocks of a salt and wait until none of them is being saved.

        Requests of that salt that are open go on, and leave nothing behind from here on.

        Returns:
            How many blocks there were.

        Raises:
            RequestTimeout: saves are still under way.
        """
        count = self.call(lambda: self._scheduler.delete_salt(salt))
        if self._tiers is not None and not self._tiers.drain(timeout_s):
            raise RequestTimeout(f"blocks were still being saved after {timeout_s:g} s")
        return count

    def save_prefix(self, tokens: TokenIds, salt: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Save what the pool alone holds of a prefix, and wait for it."""

        def save(everything: bool) -> int:
            schedule = self._scheduler.save_prefix(tokens, salt, everything=everything)
            self._carry_out(schedule)
            return len(schedule.saves)

        if self._tiers is None:
            return
        left, before = self.call(lambda: save(True)), 0
        # as many at a time as may wait to be saved
        while left and left != before:
            self._tiers.drain(timeout_s)
            left, before = self.call(lambda: save(False)), left

    def view_prefix(
        self,
        tokens: TokenIds,
        salt: str,
        below: Sequence[Sequence[str]],
        others: Sequence[BlockKey] = (),
    ) -> PrefixView:
        """What a prompt would find and cost if it came now; nothing is changed.

        Args:
            tokens: the prompt.
            salt: its cache salt.
            below: per KV group and whole block, where the lower tiers hold it, or "".
            others: keys of KV group 0 that are looked for in the pool as well.

        Raises:
            ConfigError: a token id is no token, or `below` has not the prompt's shape.
            CapacityError: the prompt can never fit.
        """
        request = Request("explain", "explain", tokens, SamplingParams(1), cache_salt=salt)
        self.info.check(request)
        blocks = len(tokens) // self.info.block_size
        if [len(its) for its in below] != [blocks] * len(self.info.block_bytes):
            shape = f"{len(self.info.block_bytes)} lists of {blocks} sources"
            raise ConfigError("below", [len(its) for its in below], shape)
        return self.call(
            lambda: self._scheduler.view_prefix(request, below, others, time.monotonic())
        )

    def offer(self, request: Request, timeout_s: float) -> bool:
        """Save what the pool holds of a request's prompt, ahead of all that waits to be saved.

        Another replica is about to run that request, and loads from the shards what it finds there
        by then. What the shards hold already is not copied again. Nothing is saved where the
        admission policy is "none", or for a request that saves nothing.

        Returns:
            Whether all of it was saved in that time.
        """
        if self._tiers is None or self._admission == "none" or request.cache != "default":
            return False
        tiers, deadline = self._tiers, time.monotonic() + timeout_s

        def save() -> list[SaveOrder]:
            found = self._scheduler.save_prefix(request.prompt, request, everything=True)
            return tiers.save_first(found.saves)

        orders = self.call(save, timeout_s)
        return tiers.wait_saved(orders, deadline - time.monotonic())

    def set_shards(self, shards: Sequence[ShardClient]) -> None:
        """Use these local shards from now on: one came back, with another arena.

        Leases and copies under way end with the clients that they began with. An engine that
        was made with None stays without.
        """
        if self._tiers is not None:
            self._tiers.replace(shards)

    def check_integrity(self) -> None:
        """Assert that the scheduler's books are in order."""
        self.call(self._scheduler.check_integrity)

    def call(self, function: Callable[[], T], timeout_s: float = CALL_TIMEOUT_S) -> T:
        """Run a function on the engine's thread between two steps.

        Raises:
            RequestTimeout: it has not run in time.
            LiteCacheError: the engine has failed.
        """
        return self._inbox.call(function, timeout_s)

    def close(self) -> None:
        """End the thread and give everything back; unfinished requests are aborted.

        Whoever keeps the engine keeps no weights, no pool, no graphs and no pinned memory.
        """
        if self._closing:
            return
        self._closing = True
        self._inbox.put(lambda: None)
        self._thread.join()
        if self._tiers is not None:
            self._tiers.close()
            self._tiers = None
        if self._failure is not None:
            traceback.clear_frames(self._failure.__traceback__)
        del self._runner, self._in_flight, self._pools, self._scheduler
        gc.collect()  # a model's modules are linked in circles
        _open_engines.discard(self)
        if self._device.type == "cuda":
            if not _open_engines:
                # 32 MiB a stream that a product ran on; graphs of another engine may hold theirs.
                torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    # The engine's thread

    def _run(self, warm: Future[None]) -> None:
        advice = "lower gpu_memory_fraction or num_blocks"
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            # On this thread, because the libraries keep handles and plans of their own for each.
            with memory_for("CUDA graphs beside the pool", advice):
                self._runner.warm_up(progress.progress_bar("Preparing steps"))
        except BaseException as error:
            warm.set_exception(error)
            return
        warm.set_result(None)
        while not self._closing:
            self._turn()

    def _died(self, error: BaseException, warm: Future[None]) -> None:
        # A bug, or the device.
        if self._on_death is not None:
            self._on_death(error)
        self._failure = error
        for client_id, request_id in self._scheduler.open_requests():
            self._fail(client_id, request_id, error)
        if not warm.done():  # whoever makes the engine still waits for it
            warm.set_exception(error)

    def _turn(self) -> None:
        """Take messages, launch one step, finish the one before."""
        self._turns, self._waits = self._turns + 1, False
        started, waited_s = time.perf_counter(), 0.0
        schedule = self._scheduler.schedule(time.monotonic())
        self._carry_out(schedule)
        if schedule.plan is not None:
            try:
                self._in_flight.launch(schedule.plan)
            except Exception as error:
                self._undo(schedule.plan.step, error)
        idle = schedule.plan is None and not self._in_flight
        if schedule.plan is None and self._in_flight and self._hears_first():
            return
        if len(self._in_flight) > (self._overlap if schedule.plan is not None else 0):
            waited_s = self._finish_step()
        if schedule.plan is not None:
            host_s = time.perf_counter() - started - waited_s
            self.metrics.observe("litecache_step_seconds", host_s, kind="host")
        wait_s = 0.0
        if idle:
            self._waits = True
            self._resting.set()
            deadline = self._scheduler.next_deadline()
            wait_s = LONGEST_WAIT_S if deadline is None else deadline - time.monotonic()
        self._inbox.take(min(max(wait_s, 0.0), LONGEST_WAIT_S))

    def _hears_first(self) -> bool:
        """While the last step runs: whether news of loads has come before its end.

        What it lets be computed is launched behind that step, and not after it.
        """
        if not self._scheduler.loads.awaits_news:
            return False
        while not self._in_flight.ready():
            if self._inbox.take(WATCH_S):
                return True
        return False

    def _finish_step(self) -> float:
        """Take the oldest step's result; returns the seconds that the thread waited for it."""
        step = self._in_flight.oldest
        self._resting.set()
        try:
            result, waited_s = self._in_flight.finish()
        except Exception as error:
            self._undo(step, error)
            return 0.0
        now = time.monotonic()
        self._carry_out(self._scheduler.on_result(result, now, self._carry_out))
        return waited_s

    def _undo(self, step: int, error: Exception) -> None:
        """A step raised: its requests run again, smaller or alone."""
        check_device(self._device, error)
        out_of_memory = is_out_of_memory(error)
        kind = "out_of_memory" if out_of_memory else "error"
        self.metrics.inc("litecache_failed_steps", kind=kind)
        logger.warning("step %d failed: %s", step, error, exc_info=not out_of_memory)
        if out_of_memory:
            torch.cuda.empty_cache()
        message = f"step {step} failed: {told(error)}"
        self._carry_out(self._scheduler.undo_step(step, message, out_of_memory=out_of_memory))

    def _fail(self, client_id: str, request_id: str, error: BaseException) -> None:
        """End a request that no schedule knows any more."""
        kind = type(error).__name__ if isinstance(error, LiteCacheError) else "LiteCacheError"
        delta = TokenDelta(request_id, (), FinishReason.ERROR, told(error), kind)
        self._carry_out(Schedule(deltas=[(client_id, delta)]))

    def _carry_out(self, schedule: Schedule) -> None:
        """Hand the scheduler's orders to those who execute them."""
        if schedule.deltas:
            progress.count_deltas(self.metrics, schedule, self._costs)
            progress.log_deltas(logger, schedule.deltas)
            for _, delta in schedule.deltas:
                if delta.finish_reason is not None:
                    self._open.discard(delta.request_id)
            self._sink(schedule.deltas)
        if self._tiers is not None:
            self._tiers.carry_out(schedule)

    def refresh_metrics(self) -> None:
        """Bring the gauges up to date; any thread may ask, and the engine's is not held up."""
        scheduler = getattr(self, "_scheduler", None)
        if scheduler is not None:
            progress.set_gauges(self.metrics, scheduler)

    def _stats(self) -> dict[str, Any]:
        scheduler = self._scheduler
        self.refresh_metrics()
        return {
            "blocks": scheduler.cache.stats(),
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "preemptions": scheduler.preemptions,
            "evictions": scheduler.cache.num_evictions,
            "kv_dtype": self.info.kv_dtype,
            "tier_codec": self.info.tier_codec,
            "pool_bytes": sum(pool.buffer.numel() for pool in self._pools),
            "metrics": self.metrics.snapshot(),
            "costs": None if self._costs is None else self._costs.stats(),
        }

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise LiteCacheError(f"the engine has failed: {self._failure}") from self._failure
        if self._closing:
            raise ConfigError("engine", "closed", "an open engine")


def _check_each(name: str, values: Any, valid: str, check: Callable[[Any], None]) -> None:
    if not isinstance(values, (list, tuple)):
        raise ConfigError(name, type(values).__name__, valid)
    for value in values:
        check(value)
