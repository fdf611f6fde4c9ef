"""The scheduler and its cost model on a simulated GPU, disk and copy engine, in virtual time.

Steps, reads and copies take what simple laws say, messages come when they would, and the loop is
the engine's: one step is planned while another runs. So what a hit costs can be tested to the
millisecond on any machine.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from litecache.engine.kv_layout import KVLayout, KVSpec
from litecache.engine.scheduling.below import BlockRef, FoundBelow, as_pairs, as_refs
from litecache.engine.scheduling.cost_model import CostModel, prior
from litecache.engine.scheduling.orders import (
    CancelOrder,
    LoadOrder,
    LoadReport,
    Schedule,
    StageOrder,
    StepPlan,
    StepResult,
)
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.hashing import BlockKey, chain_keys, root_key
from litecache.types import Request, SamplingParams

Tokens = npt.NDArray[np.int64]
ROOT = root_key({"group": 0})
READ_BLOCKS = 8  # 16 MiB
HOST_S, LOOKUP_S, TELL_S = 8e-4, 1e-3, 1e-4
CHUNK, LONE_CHUNK = 2048, 8192


class VirtualMachine:
    """An H100 with the 8B geometry, unless told otherwise.

    Args:
        disk, copy: bytes per second.
        token_s, pair_s, step_s: laws of a step.
    """

    def __init__(
        self,
        *,
        disk: float = 1.8e9,
        copy: float = 50e9,
        token_s: float = 23.2e-6,
        pair_s: float = 9.5e-10,
        step_s: float = 5e-3,
    ) -> None:
        self.disk, self.copy = disk, copy
        self.token_s, self.pair_s, self.step_s = token_s, pair_s, step_s
        layout = KVLayout.from_specs([KVSpec(8, 128, 128, "bfloat16")] * 32, 16)
        self.block_bytes = layout.groups[0].block_bytes
        prior_token_s, prior_step_s = prior(8_000_000_000, "cuda")
        self.costs = CostModel(
            16, token_s=prior_token_s, step_s=prior_step_s,
            chunk_tokens=CHUNK, prefill_tokens=LONE_CHUNK,
        )  # fmt: skip
        self.scheduler = Scheduler(
            PrefixCache(layout.groups, 24_000), lambda salt: (ROOT,),
            max_requests=64, max_batch_tokens=CHUNK, max_prefill_tokens=LONE_CHUNK,
            cost=self.costs, admission="none",
        )  # fmt: skip
        self.stored: dict[BlockKey, str] = {}
        self.reused: dict[str, dict[str, int]] = {}
        self.found: dict[str, int] = {}
        self.num_read = 0
        self.stall: tuple[float, float] | None = None
        self.now = self._event_s = self._gpu_free_s = 0.0
        self._first: dict[str, float] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._messages: list[Callable[[], Schedule]] = []
        self._in_flight: list[tuple[StepPlan, float]] = []
        self._leases: dict[int, dict[BlockRef, BlockKey]] = {}
        self._ready: set[tuple[int, BlockRef]] = set()
        self._reads: list[tuple[int, list[BlockRef]]] = []
        self._loads: dict[int, list[BlockRef]] = {}
        self._waited: dict[int, bool] = {}
        self._reading = self._copying = False
        self._numbers = itertools.count()
        self._rng = np.random.default_rng(0)

    # What tests ask

    def tokens(self, count: int) -> Tokens:
        """Tokens that nobody has seen."""
        return self._rng.integers(0, 100_000, size=count)

    def store(self, prompt: Tokens, tier: str) -> None:
        """A prefix lies in "ram" or on "disk", and not in the pool."""
        self.scheduler.cache.evict_idle()
        for key in chain_keys(ROOT, prompt, 16):
            self.stored[key] = tier

    def ask(self, prompt: Tokens) -> float:
        """Seconds to the first token; its blocks stay in the pool."""
        name = self.submit(prompt, 1)
        asked_s = self._event_s = self.now = self.now + 0.01
        while name not in self._first:
            assert self._turn(), "nothing moves"
        return self._first[name] - asked_s

    def submit(self, prompt: Tokens, new_tokens: int) -> str:
        """A request comes in ten milliseconds."""
        name = f"r{next(self._numbers)}"
        request = Request(name, "client", prompt, SamplingParams(new_tokens, new_tokens))
        add = self.scheduler.add
        self._at(self.now + 0.01, lambda: self._messages.append(lambda: add(request, self.now)))
        return name

    def step_seconds(self, first: int, end: int) -> float:
        """Of a step that computes these positions."""
        tokens = end - first
        return self.step_s + tokens * (self.token_s + self.pair_s * (first + end) / 2)

    def cold_seconds(self, tokens: int) -> float:
        """Of computing a prompt alone, in steps."""
        ends = [*range(LONE_CHUNK, tokens, LONE_CHUNK), tokens]
        return sum(
            self.step_seconds(first, end) for first, end in zip([0, *ends], ends, strict=False)
        )

    # The loop of the engine

    def _turn(self) -> bool:
        out = self.scheduler.schedule(self.now)
        self._carry_out(out)
        if out.plan is not None:
            self.now += HOST_S
            begins_s = max(self.now, self._gpu_free_s)
            self._gpu_free_s = begins_s + self._plan_seconds(out.plan)
            self._in_flight.append((out.plan, self._gpu_free_s))
        if len(self._in_flight) > (out.plan is not None):
            plan, ended_s = self._in_flight.pop(0)
            self._happen(ended_s)
            self.now = max(self.now, ended_s) + TELL_S
            tokens = tuple(1 for row in plan.rows for _ in range(int(row.sample)))
            self._carry_out(self.scheduler.on_result(StepResult(plan.step, tokens), self.now))
        elif out.plan is None:
            wake_s = self.scheduler.next_deadline()
            next_s = self._events[0][0] if self._events else math.inf
            next_s = min(next_s, math.inf if wake_s is None else wake_s)
            if next_s == math.inf and not self._messages:
                return False
            if not self._messages:
                self.now = max(self.now, next_s)
        self._happen(self.now)
        while self._messages:
            self._carry_out(self._messages.pop(0)())
        return True

    def _plan_seconds(self, plan: StepPlan) -> float:
        parts = [row for row in plan.rows if row.num_tokens > 1]
        spent = sum(self.step_seconds(p.start, p.start + p.num_tokens) for p in parts)
        return spent + self.step_s * (1 - len(parts)) + 5e-5 * (len(plan.rows) - len(parts))

    def _carry_out(self, out: Schedule) -> None:
        for stage in out.stages:
            self._at(self.now + LOOKUP_S, lambda stage=stage: self._stage(stage))  # type: ignore[misc]
        for order in out.loads:
            self._load(order)
        for ticket in out.discards:
            self._drop(ticket)
        for cancel in out.cancels:
            self._cancel(cancel)
        for _, delta in out.deltas:
            if delta.token_ids and delta.request_id not in self._first:
                self._first[delta.request_id] = self.now
                self.reused[delta.request_id] = delta.reused_tokens or {}
                self.found = delta.found_tokens or {}

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), act))

    def _happen(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self._event_s, _, act = heapq.heappop(self._events)
            act()

    # Shard and loader

    def _stage(self, order: StageOrder) -> None:
        leases = self._leases.setdefault(order.ticket, {})
        found: dict[BlockRef, str] = {}
        unread: list[BlockRef] = []
        for place, (ref, key) in enumerate(zip(as_pairs(order.refs), order.keys, strict=True)):
            if self.stored.get(key) == "disk" and place >= order.reads:
                unread.append(ref)
            elif key in self.stored:
                found[ref], leases[ref] = f"{self.stored[key]}:0", key
                if self.stored[key] == "ram":
                    self._ready.add((order.ticket, ref))
        reads = [ref for ref, source in found.items() if source == "disk:0"]
        self.num_read += len(reads)
        for start in range(0, len(reads), READ_BLOCKS):
            self._reads.append((order.ticket, reads[start : start + READ_BLOCKS]))
        self._read()
        self._messages.append(
            lambda: self.scheduler.loads.on_staged(
                order.ticket, FoundBelow.of(found)._replace(unread=as_refs(unread))
            )
        )

    def _read(self) -> None:
        while self._reads and not self._reading:
            ticket, refs = self._reads.pop(0)
            wanted = [ref for ref in refs if ref in self._leases.get(ticket, {})]
            if not wanted:
                continue
            self._reading = True
            begins_s = max(self.now, self._event_s)
            spent = len(wanted) * self.block_bytes / self.disk
            if self.stall is not None and begins_s >= self.stall[0]:
                spent += self.stall[1]
                self.stall = None
            self._at(begins_s + spent, lambda t=ticket, w=wanted: self._has_read(t, w))  # type: ignore[misc]

    def _has_read(self, ticket: int, refs: list[BlockRef]) -> None:
        self._reading = False
        self._ready.update((ticket, ref) for ref in refs)
        self._read()
        self._copy()

    def _load(self, order: LoadOrder) -> None:
        self._loads.setdefault(order.ticket, []).extend(as_pairs(order.refs))
        self._waited[order.ticket] = False
        self._copy()

    def _copy(self) -> None:
        for ticket, refs in self._loads.items():
            part = [ref for ref in refs if (ticket, ref) in self._ready][:32]
            if self._copying or not part:
                self._waited[ticket] |= not part
                continue
            self._copying = True
            self._loads[ticket] = [ref for ref in refs if ref not in set(part)]
            spent = len(part) * self.block_bytes / self.copy + 2e-4
            waited = self._waited[ticket]
            ends_s = max(self.now, self._event_s) + spent
            self._at(ends_s, lambda t=ticket, p=part, w=waited: self._has_copied(t, p, w))  # type: ignore[misc]

    def _has_copied(self, ticket: int, part: list[BlockRef], waited: bool) -> None:
        self._copying = False
        for ref in part:
            self._leases[ticket].pop(ref, None)
        report = LoadReport(ticket, as_refs(part), at_s=self._event_s, waited=waited)
        self._messages.append(lambda: self.scheduler.loads.on_loaded(report))
        self._copy()

    def _drop(self, ticket: int) -> None:
        held = set(self._loads.get(ticket, ()))
        leases = self._leases.get(ticket, {})
        self._leases[ticket] = {ref: key for ref, key in leases.items() if ref in held}

    def _cancel(self, cancel: CancelOrder) -> None:
        refs = self._loads.get(cancel.ticket, [])
        given_up = refs if cancel.refs is None else as_pairs(cancel.refs)
        lost = [ref for ref in refs if ref in given_up]
        self._loads[cancel.ticket] = [ref for ref in refs if ref not in set(lost)]
        for ref in lost:
            self._leases[cancel.ticket].pop(ref, None)
        if cancel.refs is None:
            self._drop(cancel.ticket)
        if lost:
            report = LoadReport(cancel.ticket, lost=as_refs(lost))
            self._messages.append(lambda: self.scheduler.loads.on_loaded(report))
