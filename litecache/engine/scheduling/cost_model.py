"""What a request costs: computing a prefix, loading it, or doing both until they meet.

Pure: all times are given, nothing is asked of a clock. The scheduler, its only user, asks it for a
plan when it admits a request and again while blocks arrive, and tells it what steps and reads took.
From that it keeps two laws: what a step takes (`step_law.py`), and that a source (a tier of a
shard, "disk:2") takes `latency + nbytes / rate`. Requests in front of both are queues.
Before anything was measured, priors that favour computing stand in.

The plan "compute from the front while loading from the back" is Cake's (arXiv 2410.03065).
"""

from __future__ import annotations

import copy
import math
import os
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from litecache.engine.scheduling.sources import PRIOR_SOURCES, Source
from litecache.engine.scheduling.step_law import Floats, StepLaw
from litecache.errors import ConfigError
from litecache.storage.protocol import ALL_KEYS

Loads = Literal["model", "all", "none"] | Callable[[int, int], int]

PRIOR_FLOPS = {"cuda": 700e12, "cpu": 50e9}
"""Of a prefill: more than most have, so that computing looks cheap until it is measured."""
PRIOR_STEP_S = {"cuda": 5e-3, "cpu": 2e-3}
TOLERANCE, TOLERANCE_S = 1.01, 1e-4
"""Of the plans that are this near to the best, the one is taken that takes the least seconds of
disks and GPU together: copies from RAM are cheap."""
WORTH, WORTH_S = 1.02, 5e-4
"""A plan that loads must beat computing all by this much; one that asks a disk by a step, too: so
much is lost where the disk does not answer."""
READ_MORE = 1.5
"""Times what the laws say is worth reading is read, since they may be wrong."""
BESIDE_RAM = 0.25
"""What computing beside a load from RAM must save of it, and a step at least: launching steps and
launching copies take turns on one interpreter, so that each slows the other down."""
SLOWED, SLOWED_FOR_S = 1.05, 30.0
"""Loads and steps are seen to slow each other down where a prediction is missed by more than that;
it is believed to be half as much after so many seconds."""
REMEMBERED = 4096


class Found(NamedTuple):
    """Where a block of a prefix lies: "" = nowhere, "gpu" = in the pool, else a source."""

    source: str
    nbytes: int


class FoundBlocks(NamedTuple):
    """Where the blocks of a prefix lie: the kinds there are, and each block's number of them."""

    kinds: Sequence[Found]
    codes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, found: Sequence[Found]) -> FoundBlocks:
        """From a `Found` for each block."""
        kinds = {kind: number for number, kind in enumerate(dict.fromkeys(found))}
        return cls(list(kinds), np.array([kinds[kind] for kind in found], dtype=np.int64))


class LoadPlan(NamedTuple):
    """Load blocks [load_from, load_end), compute what is missing of the rest; none = compute all.

    Attributes:
        first_token_s: predicted seconds from now until the first token.
        load_s, compute_s: until the loaded part has landed, and the part in front of it is
            computed, with the queues in front of each.
        beside: something is computed while it loads.
    """

    load_from: int
    first_token_s: float
    load_s: float
    compute_s: float
    load_end: int
    beside: bool = False


def prior(num_parameters: int, device_type: str) -> tuple[float, float]:
    """Seconds of a prefill token and of an empty step, for `CostModel`, from a model's size."""
    kind = "cuda" if device_type == "cuda" else "cpu"
    return 2 * num_parameters / PRIOR_FLOPS[kind], PRIOR_STEP_S[kind]


def chosen_loads(loads: Loads | None) -> Loads:
    """What was asked for, or what `LITECACHE_LOADS` says; ConfigError where that is neither."""
    if loads is not None:
        return loads
    name = os.environ.get("LITECACHE_LOADS", "model")
    if name in ("model", "all", "none"):
        return cast("Loads", name)
    raise ConfigError("LITECACHE_LOADS", name, "'model', 'all' or 'none'")


class CostModel:
    """Plans what to load and what to compute; see the module.

    Args:
        block_size: tokens of a block.
        token_s, step_s: priors, see `prior`.
        chunk_tokens: prefill tokens of a step beside loads or decodes.
        prefill_tokens: the same for a prefill that is alone.
        loads: "all" and "none" force a plan; a function is given the first block and the end of the
            longest run that can be loaded and returns from where to load it.
    """

    def __init__(
        self,
        block_size: int,
        *,
        token_s: float = 1e-4,
        step_s: float = 5e-3,
        chunk_tokens: int = 2048,
        prefill_tokens: int | None = None,
        loads: Loads = "model",
    ) -> None:
        self._block_size = block_size
        self._chunk = chunk_tokens
        self._lone_chunk = max(chunk_tokens, prefill_tokens or chunk_tokens)
        self._loads = loads
        self._steps = StepLaw(token_s, step_s)
        self._sources: dict[str, Source] = {}
        # of a ticket: its plan, and what overhead and slowdown it was told with
        self._predicted: OrderedDict[int, tuple[LoadPlan, float, float]] = OrderedDict()
        self._misjudged: deque[float] = deque(maxlen=7)
        # What first tokens take beyond the laws: launches, messages, the way to the client.
        self._overhead_s = 0.0
        # How much longer it takes to load and compute at once than each by itself says, and when
        # that was seen.
        self._slowdowns: deque[float] = deque(maxlen=7)
        self._slowed_s = -math.inf
        self._errors: deque[float] = deque(maxlen=32)
        self._judged: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._decodes = 0
        self._now = -math.inf

    def plan(
        self,
        *,
        num_tokens: int,
        start: int,
        found: FoundBlocks,
        queued_tokens: int,
        num_decodes: int,
        now: float,
        ticket: int | None = None,
        asked_s: float | None = None,
        busy_s: float = 0.0,
        num_waiting: int = 0,
    ) -> LoadPlan:
        """The plan with the soonest first token; of equal ones the one that asks least of disks.

        Args:
            num_tokens: known tokens of the request.
            start: block index where the pool's prefix ends.
            found: where the blocks from `start` lie.
            queued_tokens: prefill tokens that are computed before this request's.
            num_decodes: requests that decode meanwhile.
            now: in seconds, of any clock, the same in all calls.
            ticket: of a load under way, whose own reservations are no queue.
            asked_s: when the blocks were looked up, which made disks read them ahead.
            busy_s: until the steps that are under way have ended, see `left_s`.
            num_waiting: requests behind this one, which wait for all that it computes: a plan that
                computes less is better by that, unless it is slower than computing all.
        """
        self._now = max(self._now, now)
        self._decodes = num_decodes
        size, (kinds, codes) = self._block_size, found
        count = len(codes)
        base, token, pair, read, decode = self._steps.law
        base += decode * num_decodes
        sources = {
            name: self._source(name)
            for name in {kinds[code].source for code in np.unique(codes).tolist()} - {"", "gpu"}
            if self._source(name).usable(now) and self._loads != "none"
        }

        # Few kinds of blocks: what is computed of them is computed once for each kind.
        def per_block(value: Callable[[str, int], float]) -> Floats:
            return np.array([float(value(*kind)) for kind in kinds] or [0.0])[codes]

        def compute_s(
            tokens: Floats, seconds: Floats, context: Floats | float, chunk: int
        ) -> Floats:
            plain = seconds + (base + read * context) * np.ceil(tokens / chunk)
            return np.asarray(plain * self._steps.chunks(tokens, chunk))

        # Tokens to compute and their seconds, as sums over the blocks in front of each.
        places = np.arange(count)
        missing = per_block(lambda name, _: size * (name != "gpu"))
        tokens = _sums(missing)
        seconds = _sums(missing * (token + pair * size * (start + places + 0.5)))
        rest = max(1, num_tokens - (start + count) * size)
        rest_s = rest * (token + pair * (num_tokens - rest / 2))
        mean_context = min(queued_tokens, 4 * self._lone_chunk) / 2
        queued_s = busy_s + queued_tokens * (token + pair * mean_context)
        queued_s += base * math.ceil(queued_tokens / self._chunk)
        chunk = self._chunk if num_decodes else self._lone_chunk
        all_s = queued_s + float(
            compute_s(
                tokens[-1] + rest, seconds[-1] + rest_s, (start * size + num_tokens) / 2, chunk
            )
        )
        nothing = LoadPlan(start + count, all_s + self._overhead_s, 0.0, all_s, start + count)
        if not sources:
            return nothing

        # Where the gap-free run that a block is in ends, and when the run from it has landed.
        here = per_block(lambda name, _: name in sources or name == "gpu") > 0
        ends = np.minimum.accumulate(np.where(here, count, places)[::-1])[::-1]
        wanted: dict[str, Floats] = {}
        for name in sources:
            below = _sums(per_block(lambda other, n, name=name: n * (other == name)))  # type: ignore[misc]
            wanted[name] = below[ends] - below[:-1]
        context = (start + places / 2) * size
        front_s = compute_s(tokens[:-1], seconds[:-1], context, self._chunk)
        if chunk > self._chunk:  # beside a load they become shorter, see `Loads.chunk`
            fewer = compute_s(tokens[:-1] + 3 * chunk, seconds[:-1], context, chunk)
            front_s = np.minimum(front_s, fewer)
        front_s += queued_s
        behind_s = seconds[-1] - seconds[ends] + rest_s
        behind = tokens[-1] - tokens[ends] + rest
        behind_s = compute_s(behind, behind_s, (start + ends) * size, self._chunk)

        beside = tokens[:-1] > 0

        def chosen(first: int, load_s: Floats, total_s: Floats) -> LoadPlan:
            told_s, end = float(total_s[first]) + self._overhead_s, start + int(ends[first])
            parts_s = (float(load_s[first]), float(front_s[first]))
            return LoadPlan(start + first, told_s, *parts_s, end, bool(beside[first]))

        for hopeful in (False, True):
            # A source too slow to be asked may have become faster: it is asked now and then.
            load_s = np.max(
                [
                    source.load_s(wanted[name], source.speed(now, hopeful), ticket, now, asked_s)
                    for name, source in sources.items()
                ],
                axis=0,
            )
            total_s = np.where(here, np.maximum(front_s, load_s) + behind_s, math.inf)
            total_s *= np.where(beside, self._slowdown(now), 1.0)
            if self._loads != "model":
                first = int(np.argmax(np.where(here, ends - places, 0)))
                if callable(self._loads):
                    asked = self._loads(start + first, start + int(ends[first])) - start
                    first = max(first, min(asked, int(ends[first])))
                return chosen(first, load_s, total_s) if first < count and here[first] else nothing
            cost_s = total_s + num_waiting * (front_s + behind_s - queued_s)
            disks = np.zeros(count)  # seconds of theirs
            for name, source in sources.items():
                disks += wanted[name] / source.rate * (source.tier != "ram")
            # Each for itself: a load from RAM may be worth it where one from a disk is not.
            all_cost_s = all_s + num_waiting * (all_s - queued_s)
            worth = cost_s * WORTH + np.where(disks > 0, base, WORTH_S) <= all_cost_s
            if not (worth & (total_s <= all_s)).any():
                continue
            cost_s = np.where(worth & (total_s <= all_s), cost_s, math.inf)
            slack_s = np.where(disks > 0, 0.0, np.maximum(base, BESIDE_RAM * load_s))
            near = cost_s - slack_s <= cost_s.min() * TOLERANCE + TOLERANCE_S
            taken_s = disks + (front_s + behind_s - queued_s)
            return chosen(int(np.argmin(np.where(near, taken_s, math.inf))), load_s, total_s)
        return nothing

    def begin(
        self,
        ticket: int,
        plan: LoadPlan,
        sources: Mapping[str, int],
        now: float,
        asked_s: float | None = None,
    ) -> None:
        """A plan is carried out: reserve its bytes at its sources; `asked_s` as in `plan`."""
        self._now = max(self._now, now)
        slowdown = self._slowdown(now) if plan.beside else 1.0
        self._predicted[ticket] = (plan, self._overhead_s, slowdown)
        while len(self._predicted) > REMEMBERED:
            self._predicted.popitem(last=False)
        for name, nbytes in sources.items():
            if nbytes > 0:
                self._source(name).order(ticket, nbytes, now, asked_s)

    def progress(
        self, ticket: int, source: str, nbytes: int, now: float, *, waited: bool = True
    ) -> None:
        """A batch has landed at `now`; not `waited` for: it had been read ahead."""
        self._now = max(self._now, now)
        self._source(source).land(ticket, nbytes, now, waited=waited)

    def end(self, ticket: int) -> None:
        """Nothing more of a ticket is loaded."""
        for source in self._sources.values():
            source.end(ticket, self._now)

    def sooner(
        self,
        ticket: int,
        remaining: Mapping[str, int],
        chunk_bytes: int,
        chunk_tokens: int,
        context_tokens: int,
        now: float,
        busy_s: float = 0.0,
    ) -> bool:
        """Whether what still loads is there before the next chunk would be computed, or hardly
        later than if that were computed meanwhile.

        A plan that is forced is waited for.

        Args:
            ticket: whose load.
            remaining: bytes that have not landed, by source.
            chunk_bytes: of them, what would not be loaded if the chunk were computed.
            chunk_tokens, context_tokens: of the chunk, and in front of it.
            busy_s: as in `plan`: the chunk would begin after that.
        """
        self._now = max(self._now, now)
        if self._loads != "model":
            return True
        compute_s = busy_s + self._steps.seconds(chunk_tokens, context_tokens, self._decodes)
        arrival_s = rest_s = 0.0
        from_ram = True
        for name, nbytes in remaining.items():
            source = self._source(name)
            if nbytes > 0:
                if not source.usable(now) and ticket in source.ordered:
                    return False
                arrival_s = max(arrival_s, source.arrival_s(nbytes, now))
                rest_s = max(rest_s, source.arrival_s(max(0, nbytes - chunk_bytes), now))
                from_ram = from_ram and source.tier == "ram" and not source.overdue(now)
        if arrival_s <= compute_s:
            return True
        told = self._predicted.get(ticket)
        told_s = max(arrival_s, told[0].first_token_s if told else 0.0)
        return from_ram and arrival_s - max(rest_s, compute_s) <= BESIDE_RAM * told_s

    def note_step(
        self, *, prefill_tokens: int, context_tokens: int, num_decodes: int, seconds: float
    ) -> None:
        """A step has taken so long, see `StepLaw`."""
        self._steps.note(prefill_tokens, context_tokens, num_decodes, seconds)

    def compute_s(self, num_tokens: int, num_cached: int) -> float:
        """Seconds of a prefill behind what is cached, on an idle engine."""
        return self._steps.seconds(num_tokens, num_cached, 0)

    def worth_reading(
        self, nbytes: int, compute_s: float, wait_s: float, num_tokens: int, now: float
    ) -> int:
        """How many blocks of a prefix, from its end, disks could deliver before all of them are
        computed; none where a step costs more than computing so many.

        Args:
            nbytes: of a block.
            compute_s: of all that is asked for.
            wait_s: until its first step; inf = nobody knows.
            num_tokens: known tokens of the request.
            now: as in `plan`.
        """
        disks = [source for source in self._sources.values() if source.tier == "disk"]
        if self._loads != "model" or not (disks and self._steps.count and wait_s < math.inf):
            return ALL_KEYS
        disks = [source for source in disks if source.usable(now)]
        rate = sum(source.speed(now, hopeful=True) for source in disks)
        latency_s = min((source.latency_s for source in disks), default=0.0)
        count = math.ceil(READ_MORE * rate * max(0.0, wait_s + compute_s - latency_s) / nbytes)
        base, token, pair, *_ = self._steps.law
        spared_s = count * self._block_size * (token + pair * num_tokens)
        return count if READ_MORE * spared_s > base else 0

    def left_s(self, steps: Iterable[tuple[int, int, int]], began_s: float, now: float) -> float:
        """Seconds until steps under way have ended, the first of which began at `began_s`.

        Args:
            steps: of each, prefill tokens, tokens in front of them, decodes.
            began_s, now: as `now` in `plan`.
        """
        total_s = sum(self._steps.seconds(*step) for step in steps)
        return max(0.0, total_s - max(0.0, now - began_s))

    def note_read(self, source: str, nbytes: int, seconds: float) -> None:
        """A source has delivered outside of tickets, or (0 bytes) failed."""
        self._source(source).note(nbytes, seconds, self._now)

    def note_first_token(self, ticket: int, seconds: float) -> None:
        """The first token came so long after the plan that `begin` was given."""
        plan, overhead_s, slowdown = self._predicted.pop(ticket, (None, 0.0, 1.0))
        if plan is None or plan.first_token_s <= 0 or seconds <= 0:
            return
        predicted_s = plan.first_token_s
        self._errors.append(abs(predicted_s - seconds) / seconds)
        self._judged.append((predicted_s, seconds))
        if plan.beside:
            alone_s = max(predicted_s - overhead_s, 1e-6) / slowdown
            self._slowdowns.append(min(max((seconds - overhead_s) / alone_s, SLOWED), 2.0))
            self._slowed_s = self._now
        else:
            self._misjudged.append(seconds - predicted_s + overhead_s)
            self._overhead_s = max(0.0, statistics.median(self._misjudged))

    def _slowdown(self, now: float) -> float:
        """Of computing beside a load: launches and copies take turns on one interpreter."""
        if len(self._slowdowns) < 2:
            return 1.0
        age = max(0.0, now - self._slowed_s) / SLOWED_FOR_S
        seen = max(0.0, statistics.median_low(self._slowdowns) - SLOWED)
        return 1 + seen * math.pow(0.5, age)

    def take_judged(self) -> list[tuple[float, float]]:
        """(predicted, actual) seconds of the first tokens noted since the last time."""
        judged = list(self._judged)
        self._judged.clear()
        return judged

    def fork(self, loads: Loads | None = None) -> CostModel:
        """One that plans as this one does, or as `loads` says, without this one's being told."""
        twin = copy.copy(self)
        twin._sources = {name: copy.copy(source) for name, source in self._sources.items()}
        twin._loads = loads or self._loads
        return twin

    def stats(self) -> dict[str, Any]:
        """The laws as they are, and how well they have predicted."""
        names = ("base_s", "token_s", "pair_s", "read_s", "decode_s")
        return {
            "step": dict(zip(names, self._steps.law, strict=True)),
            "measured": self._steps.count > 0,
            "sources": {
                name: {
                    "bytes_per_s": source.rate,
                    "latency_s": source.latency_s,
                    "ordered_bytes": sum(source.ordered.values()),
                    "out": source.out,
                }
                for name, source in self._sources.items()
            },
            "first_token_error": statistics.median(self._errors) if self._errors else None,
            "first_tokens": len(self._errors),
        }

    def _source(self, name: str) -> Source:
        found = self._sources.get(name)
        if found is None:
            tier = name.partition(":")[0]
            rate, latency_s = PRIOR_SOURCES[tier]
            found = self._sources[name] = Source(tier, rate, latency_s, rate)
        return found


def _sums(values: Floats) -> Floats:
    """Sums over everything in front of each index, one more than values."""
    return np.concatenate(([0.0], np.cumsum(values)))
