"""Who owns which block of one KV group's pool; no bytes, no torch.

A block is free, private (in use by sequences, its content still changing), loading (a copy from a
lower tier may write to it), published (full, immutable, in the prefix index, in use) or idle
(published, in use by nobody, evictable). A partial block may be published, too, for others to copy
its beginning; such blocks are the first to be evicted. References count the sequences and the
copies in flight that need the block. Block 0 is the trash block and is never handed out.

The pool is used by the scheduler's thread alone.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from litecache.engine.kv_layout import TRASH_BLOCK
from litecache.errors import CapacityError
from litecache.hashing import BlockKey


class BlockState(str, enum.Enum):
    """States of a block; the values label the gauge `litecache_pool_blocks`."""

    FREE = "free"
    PRIVATE = "private"
    LOADING = "loading"
    PUBLISHED = "published"
    IDLE = "idle"


class BlockPool:
    """Allocates, shares, publishes and evicts the blocks of one KV group.

    Args:
        num_blocks: blocks to hand out, numbered from 1; the trash block comes on top.
        on_evict: called with the key of an idle block that is about to be used for other tokens.
        quotas: by owner (the root key of a salt), how many published blocks it may have; beyond
            that its idle ones leave, the first of them first. What is in use stays.

    Attributes:
        evictions: full published blocks dropped so far.
        reserved: available blocks that are kept for sequences whose loads may be late.
        used_in: per block, the last step of a sequence that has given it back.
    """

    def __init__(
        self,
        num_blocks: int,
        on_evict: Callable[[BlockKey], None] | None = None,
        quotas: Mapping[BlockKey, int] | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.evictions = 0
        self.reserved = 0
        self.used_in = [0] * (num_blocks + 1)
        self._on_evict = on_evict
        self._refs = [0] * (num_blocks + 1)
        self._keys: list[BlockKey | None] = [None] * (num_blocks + 1)
        self._loading: set[int] = set()
        self._free = list(range(num_blocks, 0, -1))
        self._partial: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._idle_partial: OrderedDict[int, None] = OrderedDict()
        self._quotas = quotas or {}
        # of owners with a quota: whose a published block is, how many each has, its idle ones
        self._owners: dict[int, BlockKey] = {}
        self._owned: Counter[BlockKey] = Counter()
        self._idle_of: defaultdict[BlockKey, OrderedDict[int, None]] = defaultdict(OrderedDict)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now: free and idle ones, but for the reserve."""
        return len(self._free) + len(self._idle) + len(self._idle_partial) - self.reserved

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with one reference each, evicting idle ones as needed.

        Raises:
            CapacityError: fewer than `count` are available; nothing changed.
        """
        if count > self.num_available:
            raise CapacityError(
                f"{count} blocks wanted, {self.num_available} of {self.num_blocks} available"
            )
        left = max(0, len(self._free) - count)
        blocks = self._free[left:][::-1]
        del self._free[left:]
        blocks += [self._evict_oldest() for _ in range(count - len(blocks))]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks in use or idle."""
        for block in blocks:
            if self._refs[block] == 0:
                self._leave_idle(block)
            self._refs[block] += 1

    def release(self, blocks: Sequence[int], step: int = 0) -> None:
        """Drop a reference to each block of a chain, given head first.

        The tail is released first, so that eviction takes tails before their heads. Entries of
        the trash block (what a sliding window has left behind) are passed over.

        Args:
            blocks: of the chain.
            step: the last one that uses them for whoever gives them back.
        """
        for block in reversed(blocks):
            if block == TRASH_BLOCK:
                continue
            assert self._refs[block] > 0, f"block {block} released more often than acquired"
            self._refs[block] -= 1
            if step > self.used_in[block]:
                self.used_in[block] = step
            if self._refs[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._become_idle(block)
        if self._owners:
            self._hold_to_quotas(blocks)

    def _become_idle(self, block: int) -> None:
        self._idle_like(block)[block] = None
        if block in self._owners:
            self._idle_of[self._owners[block]][block] = None

    def _leave_idle(self, block: int) -> None:
        del self._idle_like(block)[block]
        if block in self._owners:
            del self._idle_of[self._owners[block]][block]

    def _hold_to_quotas(self, blocks: Iterable[int]) -> None:
        for owner in {self._owners[block] for block in blocks if block in self._owners}:
            idle = self._idle_of[owner]
            while idle and self._owned[owner] > self._quotas[owner]:
                self.evict(next(iter(idle)))

    def _disown(self, block: int) -> None:
        owner = self._owners.pop(block, None)
        if owner is not None:
            self._owned[owner] -= 1

    def _idle_like(self, block: int) -> OrderedDict[int, None]:
        return self._idle_partial if block in self._partial else self._idle

    def begin_copies(self, blocks: Sequence[int]) -> None:
        """Copies will write to private blocks: each is referenced until its `end_copies`."""
        refs = self._refs
        assert all(map(refs.__getitem__, blocks)), "a block is not in use"
        assert not any(map(self._keys.__getitem__, blocks)), "a block is published"
        for block in blocks:
            refs[block] += 1
        self._loading.update(blocks)

    def end_copies(self, blocks: Sequence[int]) -> None:
        """Copies have ended, or never began; their references are still to be released."""
        for block in blocks:
            self._loading.remove(block)

    def publish(
        self, block: int, key: BlockKey, *, partial: bool = False, owner: BlockKey = b""
    ) -> None:
        """Declare a private block immutable under `key`: full, or with `partial` its beginning."""
        assert self._refs[block] > 0, f"block {block} is not in use"
        assert self._keys[block] is None, f"block {block} is already published"
        assert block not in self._loading, f"block {block} is still being copied to"
        self._keys[block] = key
        if partial:
            self._partial.add(block)
        if owner in self._quotas:
            self._owners[block] = owner
            self._owned[owner] += 1
            self._hold_to_quotas([block])

    def rename(self, block: int, key: BlockKey) -> None:
        """Publish a published block in use under another key, as nobody's."""
        assert self._refs[block] > 0, f"block {block} is not in use"
        assert self._keys[block] is not None, f"block {block} is not published"
        self._keys[block] = key
        self._disown(block)

    def is_writable(self, block: int) -> bool:
        """Whether its sequence may compute into a block: private, and no copy writes to it."""
        return block != TRASH_BLOCK and self._keys[block] is None and block not in self._loading

    def ref_count(self, block: int) -> int:
        """References to a block."""
        return self._refs[block]

    def key(self, block: int) -> BlockKey | None:
        """The key a block is published under."""
        return self._keys[block]

    def state(self, block: int) -> BlockState:
        """State of one block."""
        if self._refs[block] == 0:
            return BlockState.FREE if self._keys[block] is None else BlockState.IDLE
        if self._keys[block] is not None:
            return BlockState.PUBLISHED
        return BlockState.LOADING if block in self._loading else BlockState.PRIVATE

    def evict(self, block: int) -> None:
        """Evict one idle block."""
        self._leave_idle(block)
        self._forget(block)
        self._free.append(block)

    def evict_idle(self) -> int:
        """Evict every idle block; returns how many."""
        count = len(self._idle) + len(self._idle_partial)
        for _ in range(count):
            self._free.append(self._evict_oldest())
        return count

    def stats(self) -> dict[str, int]:
        """Blocks by state; the values add up to `num_blocks`.

        Another thread may ask at any time, and may then be off by what a step has just changed.
        """
        # Nothing here goes through the blocks in Python: no step waits for it.
        idle = len(self._idle) + len(self._idle_partial)
        keyed = len(self._keys) - self._keys.count(None)
        in_use = self.num_blocks - len(self._free) - keyed
        return {
            BlockState.FREE.value: len(self._free),
            BlockState.PRIVATE.value: max(0, in_use - len(self._loading)),
            BlockState.LOADING.value: len(self._loading),
            BlockState.PUBLISHED.value: max(0, keyed - idle),
            BlockState.IDLE.value: idle,
        }

    def check_integrity(self) -> None:
        """Assert that every block is in exactly one state and nothing is lost."""
        free, idle = set(self._free), {*self._idle, *self._idle_partial}
        assert len(idle) == len(self._idle) + len(self._idle_partial), "a block is idle twice"
        assert self._idle_partial.keys() <= self._partial, "a full block is evicted first"
        assert not self._idle.keys() & self._partial, "a partial block is evicted as a full one"
        assert all(self._keys[block] is not None for block in self._partial), "partial of nothing"
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & idle, f"blocks both free and idle: {free & idle}"
        assert TRASH_BLOCK not in free | idle, "the trash block was handed in"
        for block in range(1, self.num_blocks + 1):
            unused = self._refs[block] == 0
            assert self._refs[block] >= 0, f"block {block} has {self._refs[block]} references"
            assert (block in free) == (unused and self._keys[block] is None), f"block {block} lost"
            assert (block in idle) == (unused and self._keys[block] is not None), (
                f"block {block} published but neither in use nor idle"
            )
        assert 0 <= self.reserved <= len(free) + len(idle), "more is reserved than there is"
        for block in self._loading:
            assert self._refs[block] > 0, f"block {block} is loading for nobody"
            assert self._keys[block] is None, f"block {block} was published before it was loaded"
        states = Counter(self.state(block).value for block in range(1, self.num_blocks + 1))
        assert {state: n for state, n in self.stats().items() if n} == states, "stats disagree"
        keys = [key for key in self._keys if key is not None]
        assert len(keys) == len(set(keys)), "two blocks are published under one key"
        assert all(self._keys[block] for block in self._owners), "a private block is owned"
        assert Counter(self._owners.values()) == +self._owned, "owned blocks are miscounted"
        of_owners = {block for mine in self._idle_of.values() for block in mine}
        assert of_owners == idle & self._owners.keys(), "idle blocks of owners are off"
        for owner, mine in self._idle_of.items():
            assert not mine or self._owned[owner] <= self._quotas[owner], "a quota is exceeded"

    def _evict_oldest(self) -> int:
        block = next(iter(self._idle_partial or self._idle))
        self._leave_idle(block)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        self._keys[block] = None
        self._disown(block)
        if block in self._partial:
            self._partial.remove(block)
        else:
            self.evictions += 1
        if self._on_evict is not None:
            self._on_evict(key)
