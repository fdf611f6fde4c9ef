"""What is known of a source of blocks, a tier of a shard: how fast it is, and whether it answers.

Pure, as the `CostModel` that keeps one for each name ("disk:2"): a source takes `latency + bytes /
rate`, after what others wait for. Rates are learnt from landings; a source that failed or is long
overdue is left out until it answers or is probed.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from litecache.engine.scheduling.step_law import Floats

PRIOR_SOURCES = {"ram": (40e9, 5e-4), "disk": (2e9, 2e-3), "remote": (0.5e9, 1e-2)}
"""Bytes per second and latency, by the tier in front of a source's colon. Rather too much: a source
that is never asked is never measured, and asking one that is slow costs a chunk at most."""
COPY_BYTES_PER_S = 50e9
"""Of what was read ahead: it still has to be copied."""
SPAN_S = 0.02
"""Landings of a source are summed over so long before they count as one reading of its rate."""
LATE_S, LATE_RAM_S = 2e-3, 0.05
OVERDUE_S = 0.1
PROBE_S, MAX_PROBE_S = 1.0, 30.0
FORGET_S = 5.0
"""A slow source is believed to be twice as fast, up to its best, after each so long unasked."""


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
