"""Which blocks of one KV group hold which tokens: a flat map from block key to block.

Flat, because blocks load from the back: a child may be present without its parent. Every entry
keeps its token ids and its parent links its children in the order of their tokens, so that a
partial tail is found by comparing tokens with two of them: prompts that differ from their first
block on are all children of one root. Keys that are being computed or loaded are PENDING with their
owner, so that another request can wait for them instead of computing the same again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from litecache.hashing import BlockKey

TokenArray = npt.NDArray[np.int64]

MISSING, PENDING = -1, -2
"""In place of a block: the pool does not hold it; somebody computes or loads it."""


_Child = tuple[bytes, BlockKey]


TOKEN_BYTES = 4


def sortable(tokens: TokenArray) -> bytes:
    """Token ids as bytes that sort as the ids do, `TOKEN_BYTES` each."""
    return tokens.astype(">u4").tobytes()


class Entry(NamedTuple):
    """A published block; of a partial one the first tokens; `tokens` are `sortable`."""

    block: int
    parent: BlockKey
    tokens: bytes
    root: BlockKey = b""


class PartialMatch(NamedTuple):
    """A published block whose first `num_tokens` tokens are the wanted ones."""

    key: BlockKey
    block: int
    num_tokens: int


class PrefixIndex:
    """Published and pending blocks of one KV group."""

    def __init__(self) -> None:
        self._entries: dict[BlockKey, Entry] = {}
        self._children: dict[BlockKey, list[_Child]] = {}
        self._pending: dict[BlockKey, str] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._entries

    def block(self, key: BlockKey) -> int | None:
        """The block that holds `key`'s tokens, if any."""
        entry = self._entries.get(key)
        return None if entry is None else entry.block

    def look(self, keys: Sequence[BlockKey]) -> list[int]:
        """Per key its block, or `PENDING` or `MISSING`."""
        entries, pending = self._entries, self._pending
        return [
            entries[key].block if key in entries else PENDING if key in pending else MISSING
            for key in keys
        ]

    def published_keys(self) -> list[BlockKey]:
        """All published keys."""
        return list(self._entries)

    def match_partial(self, parent: BlockKey, tokens: TokenArray) -> PartialMatch | None:
        """The child of `parent` that shares the most leading tokens with `tokens`, if any."""
        best: PartialMatch | None = None
        children = self._children.get(parent, [])
        # in lexicographic order the longest common beginning is that of a neighbour
        place = bisect_left(children, (sortable(tokens),))
        for held, key in children[max(0, place - 1) : place + 1]:
            theirs = np.frombuffer(held, ">u4")
            length = min(len(theirs), len(tokens))
            differs = theirs[:length] != tokens[:length]
            shared = int(np.argmax(differs)) if differs.any() else length
            if shared and (best is None or shared > best.num_tokens):
                best = PartialMatch(key, self._entries[key].block, shared)
        return best

    def has_child(self, parent: BlockKey) -> bool:
        """Whether some published block follows this one."""
        return parent in self._children

    def of_root(self, root: BlockKey) -> list[BlockKey]:
        """Keys of all published blocks whose chain began with `root`, whatever lies between."""
        return [key for key, entry in self._entries.items() if entry.root == root]

    def insert(
        self,
        key: BlockKey,
        block: int,
        parent: BlockKey,
        tokens: bytes,
        root: BlockKey = b"",
    ) -> bool:
        """Add a published block, its tokens `sortable`; False when the key is present already
        (nothing changes)."""
        self._pending.pop(key, None)
        if key in self._entries:
            return False
        self._entries[key] = Entry(block, parent, tokens, root)
        insort(self._children.setdefault(parent, []), (tokens, key))
        return True

    def remove(self, key: BlockKey) -> None:
        """Forget a block; its children stay and are found again once it is back."""
        entry = self._entries.pop(key)
        siblings = self._children[entry.parent]
        del siblings[bisect_left(siblings, (entry.tokens, key))]
        if not siblings:
            del self._children[entry.parent]

    def set_pending(self, keys: Sequence[BlockKey], owner: str) -> None:
        """Announce that `owner` computes or loads these keys; the first owner stays."""
        entries, pending = self._entries, self._pending
        for key in keys:
            if key not in entries:
                pending.setdefault(key, owner)

    def pending_owner(self, key: BlockKey) -> str | None:
        """Who computes or loads `key` right now."""
        return self._pending.get(key)

    def clear_pending(self, keys: Sequence[BlockKey], owner: str) -> None:
        """Withdraw what `owner` announced of these keys."""
        for key in keys:
            if self._pending.get(key) == owner:
                del self._pending[key]

    def check_integrity(self) -> None:
        """Assert that entries, children and pending keys agree."""
        children = {(e.parent, key) for key, e in self._entries.items()}
        linked = {(parent, key) for parent, kids in self._children.items() for _, key in kids}
        assert children == linked, "parents and children disagree"
        assert all(self._children.values()), "an empty list of children was kept"
        for kids in self._children.values():
            assert kids == sorted(kids), "children are out of order"
            for tokens, key in kids:
                assert tokens == self._entries[key].tokens, "a child's tokens differ"
        both = self._pending.keys() & self._entries.keys()
        assert not both, f"{len(both)} keys are both pending and published"
        blocks = [entry.block for entry in self._entries.values()]
        assert len(blocks) == len(set(blocks)), "one block is indexed under two keys"
