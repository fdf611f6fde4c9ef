"""What is published, what of it is saved to the lower tiers, and what they hear of its use.

A key is published only after its bytes exist. What is published becomes eligible for saving by the
admission policy: "all" and "frequent" at once (of the latter the shards write less to disk),
"reused" on second sight, "none" never. What was dropped is tried
again when it is used again, what found no room as soon as there is some; a tail is of use without
its head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq

from litecache.engine.kv_layout import TRASH_BLOCK
from litecache.engine.scheduling.orders import SaveOrder, Schedule
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.sequence import KeyChain, Sequence
from litecache.hashing import BlockKey
from litecache.storage.protocol import Retention
from litecache.types import Request

RUN_BYTES = 16 << 20
"""Bytes of a chain that go to one shard together."""
MOST_REFUSED = 1 << 16
"""Saves without room that are remembered."""

_Held = tuple[int, int, int]
"""KV group, index in a chain, and the block of the pool."""


class Saves:
    """Publishes what was computed and orders its saving.

    Args:
        cache: pools and indexes.
        admission: which published blocks are saved: "all", "frequent", "reused" or "none".
    """

    def __init__(self, cache: PrefixCache, admission: str) -> None:
        self._cache = cache
        self._admission = admission
        self._refused: dict[BlockKey, SaveOrder] = {}
        self._computed: dict[Sequence, list[tuple[int, int]]] = {}
        # blocks of a chain that go to one shard together
        self._runs = [max(1, RUN_BYTES // group.tier_bytes) for group in cache.groups]

    def computed(self, seq: Sequence, start: int, end: int) -> None:
        """Positions [start, end) are computed: `publish` the blocks that are full now, before the
        request gives them back."""
        self._computed.setdefault(seq, []).append((start, end))

    def publish(self, seq: Sequence, out: Schedule) -> None:
        """Publish what is full of one request, and order its saving."""
        for start, end in self._computed.pop(seq, ()):
            self._publish(seq, start, end, out)

    def publish_all(self, out: Schedule) -> None:
        """`publish` of every request."""
        for seq in list(self._computed):
            self.publish(seq, out)

    def _publish(self, seq: Sequence, start: int, end: int, out: Schedule) -> None:
        size = self._cache.block_size
        last = min(end // size, len(seq.chain.keys[0]))
        published = []
        for group, table in enumerate(seq.tables):
            indices = [i for i in range(start // size, last) if table[i] != TRASH_BLOCK]
            blocks = [table[i] for i in indices]
            fresh = self._cache.publish(seq, group, indices, blocks)
            published += [(i, group) for i in fresh]
        seq.num_published = max(seq.num_published, last)
        if self._admission in ("all", "frequent") and seq.request.cache == "default":
            if len(seq.tables) > 1:
                published.sort()
            blocks_of = [(g, i, seq.tables[g][i]) for i, g in published]
            out.saves += self._orders(seq.chain, seq.request, blocks_of)
        else:
            for index, group in published:
                self._cache.unsaved[group].add(seq.chain.keys[group][index])

    def on_hit(self, seq: Sequence, num_blocks: int, out: Schedule) -> None:
        """A request has found its first blocks in the pool: unsaved ones are saved if it is one
        that saves, the shards hear of all.

        They are told the last key of each run of the chain: a use of a block is one of those
        before it, and runs may lie on different shards.
        """
        if self._admission == "none":
            return
        if seq.request.cache == "default" and any(self._cache.unsaved):
            held = (
                (group, index, table[index])
                for index in range(num_blocks)
                for group, table in enumerate(seq.tables)
                if table[index] != TRASH_BLOCK
            )
            out.saves += self._orders(seq.chain, seq.request, self._take_unsaved(seq.chain, held))
        for run, keys in zip(self._runs, seq.chain.keys, strict=True):
            ends = [*range(run, num_blocks, run), num_blocks]
            out.touches += [keys[end - 1] for end in reversed(ends) if end]

    def save_prefix(self, chain: KeyChain, owner: Request | str, *, everything: bool) -> Schedule:
        """Save what the pools hold of a prefix, whatever the admission policy says.

        Args:
            chain: of the prefix.
            owner: the request that wants it, or just the salt.
            everything: also what was saved once: the lower tiers may have evicted it since.
        """
        out = Schedule()
        for group, blocks in enumerate(self._cache.look_whole(chain)):
            held = [index for index, block in enumerate(blocks) if block >= 0]
            if everything:
                self._cache.unsaved[group].update(chain.keys[group][index] for index in held)
            of_group = ((group, index, blocks[index]) for index in held)
            out.saves += self._orders(chain, owner, self._take_unsaved(chain, of_group))
        return out

    def on_refused(self, orders: Iterable[SaveOrder]) -> None:
        """There was no room for these: they are ordered again as others end, while the pool still
        holds them."""
        orders = list(orders)
        self.on_saved((), orders)
        self._refused.update((order.key, order) for order in orders)
        while len(self._refused) > MOST_REFUSED:
            del self._refused[next(iter(self._refused))]

    def _again(self, count: int) -> Schedule:
        """Order up to so many of the refused, oldest first."""
        out = Schedule()
        while self._refused and len(out.saves) < count:
            key, order = next(iter(self._refused.items()))
            del self._refused[key]
            block = self._cache.indexes[order.group].block(key)
            if block is not None and key in self._cache.unsaved[order.group]:
                self._cache.unsaved[order.group].discard(key)
                self._cache.pools[order.group].acquire([block])
                out.saves.append(order._replace(block=block))
        return out

    def on_saved(self, orders: Seq[SaveOrder], dropped: Iterable[SaveOrder] = ()) -> Schedule:
        """Copies ended: give their references back; the dropped ones are unsaved again, and may be
        saved on a later sight. As many of the refused are ordered again as have ended."""
        for order in orders:
            self._cache.pools[order.group].release([order.block])
        for order in dropped:
            if order.key in self._cache.indexes[order.group]:
                self._cache.unsaved[order.group].add(order.key)
            self._cache.pools[order.group].release([order.block])
        return self._again(len(orders))

    def _take_unsaved(self, chain: KeyChain, held: Iterable[_Held]) -> Iterator[_Held]:
        """Those of some blocks that are not saved yet; they count as saved from here on."""
        for group, index, block in held:
            key, unsaved = chain.keys[group][index], self._cache.unsaved[group]
            if key in unsaved:
                unsaved.discard(key)
                yield group, index, block

    def _orders(
        self, chain: KeyChain, owner: Request | str, blocks: Iterable[_Held]
    ) -> list[SaveOrder]:
        """Orders to save blocks, for a request or just under a salt."""
        terms: tuple[str, int, Retention]
        if isinstance(owner, str):
            terms = (owner, 0, Retention.NORMAL)
        else:
            terms = (owner.cache_salt, owner.expires_s, Retention[owner.retention.upper()])
        orders = []
        for group, index, block in blocks:
            # The copy in flight keeps the block from being evicted under it.
            self._cache.pools[group].acquire((block,))
            keys, parent = chain.keys[group], chain.parent(group, index)
            run_key = keys[index - index % self._runs[group]]
            orders.append(SaveOrder(group, block, keys[index], parent, run_key, *terms))
        return orders
