"""What the lower tiers hold of one sequence's blocks, and what of it is being loaded.

Columns by KV group and block, not an object a block: a prompt may have thousands of them, and its
first copy waits for all that is done with them before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BlockRef = tuple[int, int]
"""(group, index of the block in its sequence)."""
Refs = npt.NDArray[np.int64]
"""Block references as rows, `[n, 2]`."""
Numbers = npt.NDArray[np.int64]
NO_REFS: Refs = np.zeros((0, 2), np.int64)


def as_refs(pairs: Iterable[BlockRef]) -> Refs:
    """Pairs as rows."""
    return np.array(list(pairs), dtype=np.int64).reshape(-1, 2)


def as_pairs(refs: Refs) -> list[BlockRef]:
    """Rows as pairs."""
    return [(group, index) for group, index in refs.tolist()]


class FoundBelow(NamedTuple):
    """Blocks that lower tiers hold.

    Attributes:
        refs: `[n, 2]`.
        sources: of each, its number in `names`, `[n]`.
        names: of sources, "tier:shard".
        unread: what disks hold beside that and were not to read, `[m, 2]`.
    """

    refs: Refs
    sources: Numbers
    names: tuple[str, ...]
    unread: Refs = NO_REFS

    @classmethod
    def of(cls, found: Mapping[BlockRef, str]) -> FoundBelow:
        """From a source for each block."""
        names = tuple(dict.fromkeys(found.values()))
        sources = [names.index(name) for name in found.values()]
        return cls(as_refs(found), np.array(sources, dtype=np.int64), names)

    def as_dict(self) -> dict[BlockRef, str]:
        """The inverse of `of`."""
        sources = [self.names[source] for source in self.sources.tolist()]
        return dict(zip(as_pairs(self.refs), sources, strict=True))


class _State(IntEnum):
    UNASKED, ASKED, UNREAD, STAGED, LOADING = range(5)


class Below:
    """State and source of each block of a sequence in the tiers below the pool.

    A block is not asked for, asked for, unread (found on a disk, where it stays), staged (found,
    its lease taken by no load yet) or loading.

    Attributes:
        names: of sources, by their number; number 0 is none.
        num_staged: blocks that are staged.
        left: loading blocks by KV group and source number.
        first: no loading block's index is lower.
    """

    def __init__(self, num_groups: int) -> None:
        self._state = np.zeros((num_groups, 0), np.uint8)
        self._source = np.zeros((num_groups, 0), np.int16)
        self.names = [""]
        self.num_staged = 0
        self.left: Counter[tuple[int, int]] = Counter()
        self.first = 0

    @property
    def num_loading(self) -> int:
        """Blocks that are loading."""
        return self.left.total()

    def is_loading(self, group: int, index: int) -> bool:
        """Whether a block is."""
        return self._is(group, index, _State.LOADING)

    def is_staged(self, group: int, index: int) -> bool:
        """Whether a block is."""
        return self._is(group, index, _State.STAGED)

    def _is(self, group: int, index: int, state: _State) -> bool:
        return index < self._state.shape[1] and bool(self._state[group, index] == state)

    def sources(self, first: int, end: int) -> npt.NDArray[np.int16]:
        """Number of the source of blocks `first` to `end`, staged or loading; `[groups, n]`."""
        held = self._state[:, first:end] >= _State.STAGED
        return np.where(held, self._source[:, first:end], 0).astype(np.int16)

    def unasked(self, there: npt.NDArray[np.bool_]) -> Refs:
        """Of the blocks in a mask `[groups, blocks]`, those not asked for, from the back."""
        more = there.shape[1] - self._state.shape[1]
        if more > 0:
            self._state = np.pad(self._state, ((0, 0), (0, more)))
            self._source = np.pad(self._source, ((0, 0), (0, more)))
        return _from_the_back(there & (self._state[:, : there.shape[1]] == _State.UNASKED))

    def unread(self, first: int) -> Numbers:
        """Indices from `first` on of unread blocks of the first group."""
        return first + np.flatnonzero(self._state[0, first:] == _State.UNREAD)

    def staged(self, first: int, end: int) -> Refs:
        """Staged blocks from `first` to `end`, from the back."""
        refs = _from_the_back(self._state[:, first:end] == _State.STAGED)
        refs[:, 1] += first
        return refs

    def loading(self, first: int = 0, end: int | None = None) -> Refs:
        """Loading blocks from `first` to `end`, from the back."""
        if not self.num_loading:
            return NO_REFS
        refs = _from_the_back(self._state[:, first:end] == _State.LOADING)
        refs[:, 1] += first
        return refs

    def ask(self, refs: Refs) -> None:
        """Blocks are asked for."""
        self._state[refs[:, 0], refs[:, 1]] = _State.ASKED

    def stage(self, found: FoundBelow) -> None:
        """Blocks that were asked for have been found."""
        groups, indices = found.refs.T
        self.names += [name for name in found.names if name not in self.names]
        numbers = np.array([self.names.index(name) for name in found.names], dtype=np.int16)
        self._state[groups, indices] = _State.STAGED
        self._source[groups, indices] = numbers[found.sources] if len(numbers) else 0
        self._state[found.unread[:, 0], found.unread[:, 1]] = _State.UNREAD
        self.num_staged += len(groups)

    def forget_staged(self) -> None:
        """The leases that no load has taken have ended."""
        self._state[self._state == _State.STAGED] = _State.ASKED
        self.num_staged = 0

    def load(self, refs: Refs) -> Counter[tuple[int, int]]:
        """Staged blocks are loaded from here on; how many by KV group and source number."""
        groups, indices = refs.T
        more: Counter[tuple[int, int]] = Counter()
        if not len(refs):
            return more
        lowest = int(indices.min())
        self.first = min(self.first, lowest) if self.num_loading else lowest
        self._state[groups, indices] = _State.LOADING
        self.num_staged -= len(refs)
        more = _counts(groups, self._source[groups, indices])
        self.left.update(more)
        return more

    def take(self, refs: Refs) -> Numbers:
        """Blocks are not loaded any more: of each the number of its source, 0 where it was not."""
        groups, indices = refs.T
        inside = np.minimum(indices, self._state.shape[1] - 1)
        was = (self._state[groups, inside] == _State.LOADING) & (inside == indices)
        groups, indices = groups[was], indices[was]
        self._state[groups, indices] = _State.ASKED
        sources = np.zeros(len(refs), dtype=np.int64)
        sources[was] = self._source[groups, indices]
        self.left.subtract(_counts(groups, sources[was]))
        return sources

    def check_integrity(self) -> None:
        """Assert that the counts are those of the columns."""
        loading = self._state == _State.LOADING
        groups, indices = np.nonzero(loading)
        assert self.num_staged == np.count_nonzero(self._state == _State.STAGED), (
            "staged miscounted"
        )
        assert +self.left == _counts(groups, self._source[loading]), "loading blocks are miscounted"
        assert not len(indices) or self.first <= indices.min(), "a block in front of the first one"


def _counts(groups: Numbers, sources: npt.NDArray[np.integer]) -> Counter[tuple[int, int]]:
    kinds, counts = np.unique(groups << 16 | sources, return_counts=True)
    pairs = zip(kinds.tolist(), counts.tolist(), strict=True)
    return Counter({(kind >> 16, kind & 0xFFFF): count for kind, count in pairs})


def _from_the_back(mask: npt.NDArray[np.bool_]) -> Refs:
    """Where a mask `[groups, blocks]` is true, the last block first, its groups in order."""
    places = np.flatnonzero(mask.T[::-1])
    last, groups = mask.shape[1] - 1, mask.shape[0]
    return np.stack((places % groups, last - places // groups), axis=1)
