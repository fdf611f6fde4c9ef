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
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from litecache.engine.scheduling.step_law import Floats, StepLaw
from litecache.errors import ConfigError

Loads = Literal["model", "all", "none"] | Callable[[int, int], int]

PRIOR_FLOPS = {"cuda": 700e12, "cpu": 50e9}
"""Of a prefill: more than most have, so that computing looks cheap until it is measured."""
PRIOR_STEP_S = {"cuda": 5e-3, "cpu": 2e-3}
PRIOR_SOURCES = {"ram": (40e9, 5e-4), "disk": (2e9, 2e-3), "remote": (0.5e9, 1e-2)}
"""Bytes per second and latency, by the tier in front of a source's colon. Rather too much: a source
that is never asked is never measured, and asking one that is slow costs a chunk at most."""
COPY_BYTES_PER_S = 50e9
"""Of what was read ahead: it still has to be copied."""
TOLERANCE, TOLERANCE_S = 1.01, 1e-4
"""Of the plans that are this near to the best, the one is taken that takes the least seconds of
disks and GPU together: copies from RAM are cheap."""
WORTH, WORTH_S = 1.02, 5e-4
"""A plan that loads must beat computing all by this much; one that asks a disk by a step, too: so
much is lost where the disk does not answer."""
BESIDE_RAM = 0.25
"""What computing beside a load from RAM must save of it, and a step at least: launching steps and
launching copies take turns on one interpreter, so that each slows the other down."""
SPAN_S = 0.02
"""Landings of a source are summed over so long before they count as one reading of its rate."""
LATE_S, LATE_RAM_S = 2e-3, 0.05
OVERDUE_S = 0.1
PROBE_S, MAX_PROBE_S = 1.0, 30.0
FORGET_S = 5.0
"""A slow source is believed to be twice as fast, up to its best, after each so long unasked."""
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


@dataclass
class Source:
    """Rate and latency of one source, what is ordered of it, and whether it answers.

    Attributes:
        tier: "ram", "disk" or "remote"; a disk reads ahead from the lookup on.
        rate, best: bytes per second, now and at most.
        ordered: bytes that each ticket still waits for.
        out: it failed or is long overdue: left out of plans until it answers or is probed.
    """

    tier: str
    rate: float
    latency_s: float
    best: float
    ordered: dict[int, int] = field(default_factory=dict)
    out: bool = False
    _measured: bool = False
    _probe_s: float = 0.0
    _backoff_s: float = PROBE_S
    _batch: float = 16 << 20
    _begun_s: float = -math.inf
    _landed_s: float = -math.inf
    _read_s: float = 0.0
    _busy: int = 0
    _span: tuple[float, int] = (0.0, 0)
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=3))

    def order(self, ticket: int, nbytes: int, now: float, asked_s: float | None) -> None:
        """A ticket's blocks are wanted, and have been read ahead since `asked_s`."""
        if not self.ordered:
            self._begun_s = self._busy_since(now, asked_s)
            self._busy, self._span = 0, (self._begun_s, 0)
        self.ordered[ticket] = self.ordered.get(ticket, 0) + nbytes
        if self.out:
            self._backoff_s = min(2 * self._backoff_s, MAX_PROBE_S)
            self._probe_s = now + self._backoff_s

    def land(self, ticket: int, nbytes: int, now: float, *, waited: bool) -> None:
        """Some of them are there."""
        self.out, self._backoff_s = False, PROBE_S
        if ticket not in self.ordered:
            return  # of a load that was given up
        since = self._since(now)
        counts = waited or self.tier != "disk"
        if not self._busy and counts:
            extra = max(0.0, since - nbytes / self.rate)
            self.latency_s += 0.2 * (min(extra, 4 * self.latency_s + 1e-4) - self.latency_s)
        self.ordered[ticket] -= nbytes
        if self.ordered[ticket] <= 0:
            del self.ordered[ticket]
        began, total = self._span
        total += nbytes
        taken = now - began - (self.latency_s if began == self._begun_s else 0.0)
        taken = max(taken, (now - began) / 4)
        # What is little takes its latency, whatever the rate.
        much = total > 2 * self.latency_s * self.rate
        if counts and (taken >= SPAN_S or (much and not self.ordered)):
            self.note(total, taken, now)
            began, total = now, 0
        self._span = (began, total)
        self._batch += 0.3 * (nbytes - self._batch)
        self._landed_s, self._busy = now, self._busy + nbytes

    def end(self, ticket: int, now: float) -> None:
        """A ticket wants nothing more; what is overdue then is slower than was believed."""
        left = self.ordered.get(ticket, 0)
        if left and self.overdue(now):
            self.rate = min(self.rate, min(left, self._batch) / self._since(now))
            self.leave_out(now)
        self.ordered.pop(ticket, None)

    def note(self, nbytes: int, seconds: float, now: float) -> None:
        """Bytes have taken so long; 0 bytes: it has failed."""
        self._read_s = now
        if nbytes <= 0:
            return self.leave_out(now)
        self.out, self._backoff_s = False, PROBE_S
        self._last.append(nbytes / max(seconds, 1e-9))
        rate = statistics.median(self._last) if len(self._last) > 2 else self._last[-1]
        change = math.log(rate / self.rate)
        if not self._measured or abs(change) > math.log(2):
            self.rate = rate
        else:
            self.rate *= math.exp(0.4 * change)
        self._measured = True
        self.best = max(self.best, self.rate)

    def leave_out(self, now: float) -> None:
        """It failed, or is overdue."""
        if not self.out:
            self.out, self._probe_s = True, now + self._backoff_s

    def usable(self, now: float) -> bool:
        """It may be planned with."""
        if self.ordered and self.overdue(now, 4, OVERDUE_S):
            self.leave_out(now)
        return not self.out or now >= self._probe_s

    def speed(self, now: float, hopeful: bool) -> float:
        """Bytes per second to plan with; `hopeful`: as it may be by now, unasked for so long."""
        if not hopeful or self.out:
            return self.rate
        age = min(max(0.0, now - self._read_s) / FORGET_S, 60.0)
        return min(self.best, self.rate * math.pow(2, age))

    def load_s(
        self, wanted: Floats, speed: float, ticket: int | None, now: float, asked_s: float | None
    ) -> Floats:
        """Seconds until so many bytes have landed, if they are ordered now."""
        others = sum(nbytes for owner, nbytes in self.ordered.items() if owner != ticket)
        ahead_s = others / self.rate if others else self._busy_since(now, asked_s) - now
        spent = np.maximum(self.latency_s + ahead_s + wanted / speed, 0.0)
        return np.asarray((wanted > 0) * np.maximum(spent, wanted / COPY_BYTES_PER_S))

    def arrival_s(self, nbytes: int, now: float) -> float:
        """Seconds until this many more have landed."""
        since = self._since(now)
        if self.overdue(now):  # it will take as long again as it has
            return nbytes / self.rate + since
        if not self._busy:
            return max(0.0, self.latency_s + nbytes / self.rate - since)
        # A disk that has become slow shows first in what it has done since it had something to do.
        spent = self._landed_s - self._begun_s - self.latency_s
        spent = max(spent, self._busy / self.best, 1e-6)
        return max(0.0, nbytes / min(self.rate, self._busy / spent) - since)

    def _busy_since(self, now: float, asked_s: float | None) -> float:
        """When it began with what is asked for, nobody else waiting."""
        if asked_s is None or self.tier != "disk" or not math.isfinite(asked_s):
            return now
        return min(now, max(asked_s, self._landed_s))

    def _since(self, now: float) -> float:
        return max(0.0, now - max(self._begun_s, self._landed_s))

    def overdue(self, now: float, times: float = 2.0, more_s: float | None = None) -> bool:
        """It has taken longer than so many times its usual, and a little."""
        if more_s is None:
            # memory does not stall, but for its first copy the host prepares a while
            more_s = LATE_RAM_S if self.tier == "ram" else LATE_S
        usual_s = self.latency_s + self._batch / self.rate
        return self._since(now) > times * usual_s + more_s


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
