"""The prefix index against a plain list of sequences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from litecache.engine.scheduling.prefix_index import PrefixIndex, sortable
from litecache.hashing import block_key, chain_keys, root_key

SIZE = 4
ROOT = root_key({"test": True})
TOKENS = st.lists(st.integers(0, 1), min_size=0, max_size=16)


def split(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + SIZE]) for i in range(0, len(tokens) - SIZE + 1, SIZE)]


class PrefixIndexMachine(RuleBasedStateMachine):
    """The model is a dict from the whole prefix, as a tuple, to a block."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.model: dict[tuple[int, ...], int] = {}
        self.pending: dict[tuple[int, ...], str] = {}
        self.blocks = 0

    @rule(tokens=TOKENS, skip=st.integers(0, 2))
    def insert(self, tokens: list[int], skip: int) -> None:
        """Blocks may come without their parents: they load from the back."""
        keys = chain_keys(ROOT, tokens, SIZE)
        for i in range(skip, len(keys)):
            prefix = tuple(tokens[: (i + 1) * SIZE])
            self.blocks += 1
            own = sortable(np.array(prefix[-SIZE:]))
            added = self.index.insert(keys[i], self.blocks, keys[i - 1] if i else ROOT, own)
            assert added == (prefix not in self.model)
            self.model.setdefault(prefix, self.blocks)
            self.pending.pop(prefix, None)

    @rule(pick=st.integers(0, 99))
    def remove(self, pick: int) -> None:
        if self.model:
            prefix = sorted(self.model)[pick % len(self.model)]
            self.index.remove(chain_keys(ROOT, prefix, SIZE)[-1])
            del self.model[prefix]

    @rule(tokens=TOKENS, owner=st.sampled_from("ab"))
    def announce(self, tokens: list[int], owner: str) -> None:
        for i, key in enumerate(chain_keys(ROOT, tokens, SIZE)):
            prefix = tuple(tokens[: (i + 1) * SIZE])
            self.index.set_pending([key], owner)
            if prefix not in self.model:
                self.pending.setdefault(prefix, owner)

    @rule(tokens=TOKENS, owner=st.sampled_from("ab"))
    def withdraw(self, tokens: list[int], owner: str) -> None:
        keys = chain_keys(ROOT, tokens, SIZE)
        self.index.clear_pending(keys, owner)
        for i in range(len(keys)):
            prefix = tuple(tokens[: (i + 1) * SIZE])
            if self.pending.get(prefix) == owner:
                del self.pending[prefix]

    @rule(tokens=TOKENS)
    def match(self, tokens: list[int]) -> None:
        keys = chain_keys(ROOT, tokens, SIZE)
        count = 0
        while count < len(keys) and tuple(tokens[: (count + 1) * SIZE]) in self.model:
            count += 1
        for i, key in enumerate(keys):
            prefix = tuple(tokens[: (i + 1) * SIZE])
            assert self.index.block(key) == self.model.get(prefix)
            assert self.index.pending_owner(key) == self.pending.get(prefix)
        parent = keys[count - 1] if count else ROOT
        rest = tokens[count * SIZE :][:SIZE]
        found = self.index.match_partial(parent, np.array(rest, dtype=np.int64))
        best = 0
        for prefix in self.model:
            if len(prefix) == (count + 1) * SIZE and list(prefix[:-SIZE]) == tokens[: count * SIZE]:
                own = prefix[-SIZE:]
                same = [a == b for a, b in zip(own, rest, strict=False)]
                best = max(best, same.index(False) if False in same else len(same))
        assert (0 if found is None else found.num_tokens) == best

    @invariant()
    def integrity(self) -> None:
        self.index.check_integrity()
        assert len(self.index) == len(self.model)


TestPrefixIndex = pytest.mark.no_cover(PrefixIndexMachine.TestCase)


@given(TOKENS, TOKENS)
def test_keys_are_equal_exactly_when_the_whole_prefix_is(a: list[int], b: list[int]) -> None:
    keys_a, keys_b = chain_keys(ROOT, a, SIZE), chain_keys(ROOT, b, SIZE)
    for i, (key_a, key_b) in enumerate(zip(keys_a, keys_b, strict=False)):
        assert (key_a == key_b) == (a[: (i + 1) * SIZE] == b[: (i + 1) * SIZE])


def test_keys_are_the_same_in_every_process_and_release() -> None:
    tokens = np.arange(4, dtype=np.int64)
    root = root_key({"model": "m", "block_size": 4, "tp": (1, 0), "salt": ""})
    assert root.hex() == "c15011208b486ee86803e155b1ce7973"
    assert block_key(root, tokens).hex() == "9868359526c0e309cbd49f7467d31267"


def test_namespace_fields_cannot_run_into_each_other() -> None:
    variants = [
        {"a": "1", "b": ""},
        {"a": "", "b": "1"},
        {"a": 1, "b": ""},
        {"a": True, "b": ""},
        {"a": 1.0, "b": ""},
        {"a": b"1", "b": ""},
        {"a": None, "b": ""},
        {"a": ("1",), "b": ""},
        {"a": "1b"},
    ]
    assert len({root_key(fields) for fields in variants}) == len(variants)
