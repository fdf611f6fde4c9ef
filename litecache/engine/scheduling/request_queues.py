"""Which requests wait, which run, and in which row: the scheduler's books of who is where."""

from __future__ import annotations

import bisect

from litecache.engine.scheduling.sequence import Sequence, SequenceStatus


class RequestQueues:
    """Waiting and running requests, each list in the order of `Sequence.order`.

    Args:
        max_requests: rows.

    Attributes:
        waiting: requests without a row, STAGING and LOADING ones included.
        running: requests with a row; the last one is the first to give way.
    """

    def __init__(self, max_requests: int) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._max_requests = max_requests
        self._free_rows = list(range(max_requests - 1, -1, -1))

    @property
    def has_row(self) -> bool:
        """Another request may start."""
        return bool(self._free_rows)

    def add(self, seq: Sequence) -> None:
        """Queue a request."""
        bisect.insort(self.waiting, seq, key=lambda s: s.order)

    def start(self, seq: Sequence) -> None:
        """A waiting request takes a row."""
        self.waiting.remove(seq)
        bisect.insort(self.running, seq, key=lambda s: s.order)
        seq.status = SequenceStatus.RUNNING
        seq.row = self._free_rows.pop()

    def preempt(self, seq: Sequence) -> None:
        """A running request gives its row back and waits again."""
        self.remove(seq)
        seq.row = -1
        seq.status = SequenceStatus.WAITING
        self.add(seq)

    def remove(self, seq: Sequence) -> None:
        """Take a request out of the queue that it is in."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._free_rows.append(seq.row)
        else:
            self.waiting.remove(seq)

    def check_integrity(self) -> None:
        """Assert that no row is lost and the queue is in order."""
        rows = [seq.row for seq in self.running]
        assert sorted(rows + self._free_rows) == list(range(self._max_requests)), "a row is lost"
        assert sorted(self.waiting, key=lambda s: s.order) == self.waiting, "queue out of order"
