"""The block pool against a plain model of reference counts."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from litecache.engine.scheduling.block_pool import BlockPool, BlockState
from litecache.errors import CapacityError

NUM_BLOCKS = 7
OWNER, QUOTA = b"alice's root key", 2


class BlockPoolMachine(RuleBasedStateMachine):
    """Random sharing, publishing and eviction; the model is a dict of counts and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[bytes] = []
        self.pool = BlockPool(NUM_BLOCKS, self.evicted.append, {OWNER: QUOTA})
        self.refs: dict[int, int] = {}
        self.keys: dict[int, bytes] = {}
        self.idle: list[int] = []
        self.copying: list[int] = []
        self.next_key = 0

    @rule(count=st.integers(0, 4), reserved=st.integers(0, 3))
    def allocate(self, count: int, reserved: int) -> None:
        free = NUM_BLOCKS - len(self.refs) - len(self.idle)
        self.pool.reserved = min(reserved, free + len(self.idle))
        if count > free + len(self.idle) - self.pool.reserved:
            with pytest.raises(CapacityError):
                self.pool.allocate(count)
            self.pool.reserved = 0
            return
        gone, self.idle = self.idle[: max(0, count - free)], self.idle[max(0, count - free) :]
        before = len(self.evicted)
        blocks = self.pool.allocate(count)
        self.pool.reserved = 0
        assert self.evicted[before:] == [self.keys.pop(block) for block in gone]
        assert len(set(blocks)) == count
        assert not set(blocks) & (set(self.refs) | set(self.idle)), "a block in use given out"
        self.refs.update(dict.fromkeys(blocks, 1))

    @rule(pick=st.integers(0, 30))
    def acquire(self, pick: int) -> None:
        choices = sorted(self.refs) + self.idle
        if choices:
            block = choices[pick % len(choices)]
            self.pool.acquire([block])
            if block in self.idle:
                self.idle.remove(block)
            self.refs[block] = self.refs.get(block, 0) + 1

    @rule(picks=st.lists(st.integers(0, 30), max_size=4, unique=True))
    def release_chain(self, picks: list[int]) -> None:
        # a copy keeps the last reference to itself
        held = [b for b in sorted(self.refs) if self.refs[b] > (b in self.copying)]
        self.release_chain_of(list(dict.fromkeys(held[p % len(held)] for p in picks if held)))

    def release_chain_of(self, chain: list[int]) -> None:
        self.pool.release([0, *chain])
        for block in reversed(chain):
            self.refs[block] -= 1
            if not self.refs[block]:
                del self.refs[block]
                if block in self.keys:
                    self.idle.append(block)
        self.hold_to_quota()

    def hold_to_quota(self) -> None:
        """The owner's idle blocks leave, the first of them first, while it has too many."""
        owned = [block for block, key in self.keys.items() if key[0] % 2]
        idle = [block for block in self.idle if block in owned]
        for block in idle[: max(0, len(owned) - QUOTA)]:
            self.idle.remove(block)
            del self.keys[block]

    @rule(pick=st.integers(0, 30))
    def begin_copy(self, pick: int) -> None:
        private = [block for block in sorted(self.refs) if self.pool.is_writable(block)]
        if private:
            block = private[pick % len(private)]
            self.pool.begin_copies([block])
            self.refs[block] += 1
            self.copying.append(block)

    @rule(pick=st.integers(0, 30))
    def end_copy(self, pick: int) -> None:
        if self.copying:
            block = self.copying.pop(pick % len(self.copying))
            self.pool.end_copies([block])
            assert self.pool.is_writable(block)
            self.release_chain_of([block])

    @rule(pick=st.integers(0, 30))
    def publish(self, pick: int) -> None:
        private = [block for block in sorted(self.refs) if self.pool.is_writable(block)]
        if private:
            block = private[pick % len(private)]
            self.next_key += 1
            self.keys[block] = self.next_key.to_bytes(16, "little")
            owner = OWNER if self.next_key % 2 else b"another's"
            self.pool.publish(block, self.keys[block], owner=owner)
            self.hold_to_quota()

    @rule()
    def evict_idle(self) -> None:
        assert self.pool.evict_idle() == len(self.idle)
        for block in self.idle:
            del self.keys[block]
        self.idle = []

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_available == NUM_BLOCKS - len(self.refs)
        for block in range(1, NUM_BLOCKS + 1):
            assert self.pool.ref_count(block) == self.refs.get(block, 0)
            assert self.pool.key(block) == self.keys.get(block)
            writable = block in self.refs and block not in self.keys and block not in self.copying
            assert self.pool.is_writable(block) == writable or block not in self.refs
        assert sum(self.pool.stats().values()) == NUM_BLOCKS


TestBlockPool = pytest.mark.no_cover(BlockPoolMachine.TestCase)


def test_eviction_takes_the_tail_of_a_chain_first() -> None:
    evicted: list[bytes] = []
    pool = BlockPool(3, evicted.append)
    chain = pool.allocate(3)
    for number, block in enumerate(chain):
        pool.publish(block, bytes([number]) * 16)
    pool.release(chain)
    pool.allocate(2)
    assert evicted == [bytes([2]) * 16, bytes([1]) * 16]


def test_every_state_is_reached_and_reported() -> None:
    pool = BlockPool(5)
    private, published, idle = pool.allocate(3)
    (loading,) = pool.allocate(1)
    pool.begin_copies([loading])
    pool.publish(published, b"p" * 16)
    pool.publish(idle, b"i" * 16)
    pool.release([idle])
    states = {pool.state(block) for block in (private, published, idle, loading, 5)}
    assert states == set(BlockState)
    assert set(pool.stats().values()) == {1}
