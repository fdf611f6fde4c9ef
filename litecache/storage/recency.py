"""Recency of chains: a use of a block is a use of everything before it, and tails leave first.

Only the last block of each piece of a chain is noted when it is used; the order of eviction is
brought up to date before something is evicted, tails first, each block moved once on behalf of its
latest use. Chains that have only grown since then are left alone for as long as enough older blocks
stand before them in line: without that a chain written in pieces into a full store would be walked
from its end to its beginning for every piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..hashing import BlockKey
from .block_index import BlockIndex
from .eviction.queues import Queues

_PENDING = 1024
_MARGIN = 256
"""Evictions that one making of room may do without looking again."""


class Recency:
    """Uses of chains that the order of eviction does not show yet.

    Args:
        index: the shard's blocks.
        touch: makes an entry the newest of the tiers in which it lies.
        queues: of the tiers that exist, RAM first.
    """

    def __init__(
        self,
        index: BlockIndex,
        touch: Callable[[int], None],
        queues: Callable[[], list[Queues]],
    ) -> None:
        self._index = index
        self._touch = touch
        self._queues = queues
        self.tails: dict[BlockKey, None] = {}
        # Tails whose chains lie, up to `_settled` or to their beginning, in blocks that are new
        # since the last settling.
        self._grown: set[BlockKey] = set()
        self._settled: set[BlockKey] = set()
        self._patience: list[int] = []

    def note(self, entries: Sequence[int], *, new: bool = False) -> None:
        """Blocks were used, or (`new`) have just been published, all of them."""
        if not entries:
            return
        numbers = np.array(entries, np.int64)
        keys, parents = self._index.words_at(numbers), self._index.parents_at(numbers)
        # chains are mostly used in order: a block whose predecessor comes just before it
        follows = np.zeros(len(numbers) + 1, bool)
        follows[1:-1] = (parents[1:] == keys[:-1]).all(axis=1)
        precedes = np.zeros(len(numbers), bool)
        precedes[1:] = (parents[:-1] == keys[1:]).all(axis=1)
        for last in np.flatnonzero(~follows[1:] & ~precedes).tolist():
            first = last
            while follows[first]:
                first -= 1
            # the piece before this one needs no walk of its own
            self._replace(parents[first].tobytes(), keys[last].tobytes(), new)
        if len(self.tails) > _PENDING:
            self.settle()

    def _replace(self, parent: BlockKey, key: BlockKey, new: bool) -> None:
        known = parent in self._grown or parent in self._settled
        grown = new and (known or self._index.find(parent) < 0)
        for each in (parent, key):
            self.tails.pop(each, None)
            self._grown.discard(each)
        self.tails[key] = None
        if grown:
            self._grown.add(key)

    def note_eviction(self, tier: int) -> None:
        """A block has left a tier, for whatever reason; tiers are numbered as in `queues`."""
        if tier < len(self._patience):
            self._patience[tier] -= 1

    def before_eviction(self) -> None:
        """Bring the order up to date as far as the next evictions depend on it."""
        if len(self._grown) < len(self.tails) or min(self._patience, default=0) <= 0:
            self.settle()

    def settle(self) -> None:
        """Bring the order of eviction up to date: tails first, no head leaves before them."""
        index = self._index
        visited: set[int] = set()
        pieces: list[list[int]] = []
        for key in reversed(self.tails):
            piece: list[int] = []
            entry = index.find(key)
            while entry >= 0 and entry not in visited:
                visited.add(entry)
                piece.append(entry)
                entry = index.find(index.parent_of(entry))
            pieces.append(piece)
        for piece in reversed(pieces):
            for entry in piece:
                self._touch(entry)
        self._settled = set(self.tails)
        self.tails.clear()
        self._grown.clear()
        # With several queues victims come from any of them, and how many stand before is not known.
        self._patience = [
            len(queues) - len(visited) - _MARGIN if queues.single else 0
            for queues in self._queues()
        ]
