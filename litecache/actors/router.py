"""Which replica of the model a request goes to.

The replica with the longest prefix among those whose load is acceptable. A prefix counts where
the shards of the replica's node hold it, or where earlier requests with it were sent: what those
left in the pool of the GPU is not reported, but it is there. A replica whose process ends itself
says why before, and is not chosen until it reports again.
"""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from litecache.actors.naming import MEMBER_TIMEOUT_S
from litecache.hashing import BlockKey

# A replica may have this many requests more than the least loaded one and still be chosen.
LOAD_SLACK = 8
MAX_REMEMBERED_KEYS = 1 << 17
# Failures of a replica are remembered for so long, and no more of them.
FAILURE_WINDOW_S, _FAILURES = 600.0, 64


@dataclass
class _Replica:
    """A replica that reports; requests sent to it since then count in its `load`."""

    node_id: str
    load: int
    last_seen: float


class Router:
    """Chooses replicas; remembers where prefixes went.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._replicas: dict[int, _Replica] = {}
        self._failures: defaultdict[int, deque[tuple[float, str]]]
        self._failures = defaultdict(lambda: deque(maxlen=_FAILURES))
        self._sent: OrderedDict[BlockKey, int] = OrderedDict()
        self._clock = clock

    def report(self, index: int, node_id: str, load: int) -> None:
        """Take a replica for alive, with so many requests running and waiting."""
        self._replicas[index] = _Replica(node_id, load, self._clock())

    def note_failure(self, index: int, reason: str) -> None:
        """A replica's process is about to end itself: it gets no requests until it reports."""
        self._replicas.pop(index, None)
        self._failures[index].append((self._clock(), reason))

    def failures(self, index: int) -> list[str]:
        """Why a replica's process ended itself lately, the last reason last."""
        oldest = self._clock() - FAILURE_WINDOW_S
        return [reason for at, reason in self._failures[index] if at >= oldest]

    def route(
        self,
        keys: Sequence[BlockKey],
        prefix_by_node: Mapping[str, int],
        *,
        leaves_blocks: bool = True,
    ) -> int | None:
        """Choose a replica for a prompt with these blocks; remember it where it leaves them.

        `prefix_by_node` says how many leading keys each node's shards hold. None: no replica is
        known to be alive.
        """
        live = {i: r for i, r in self._replicas.items() if self._is_live(r)}
        if not live:
            return None
        sent = self._sent_prefixes(keys)
        most = min(replica.load for replica in live.values()) + LOAD_SLACK

        def rank(index: int) -> tuple[int, int, int, int]:
            replica, in_pool = live[index], sent.get(index, 0)
            in_shards = prefix_by_node.get(replica.node_id, 0)
            return (max(in_shards, in_pool), in_pool, -replica.load, -index)

        chosen = max((i for i, replica in live.items() if replica.load <= most), key=rank)
        live[chosen].load += 1
        if leaves_blocks:
            self._remember(keys, chosen)
        return chosen

    def replicas(self) -> dict[int, dict[str, object]]:
        """Replica index to node, load and whether it is alive."""
        return {
            index: {"node_id": r.node_id, "load": r.load, "alive": self._is_live(r)}
            for index, r in self._replicas.items()
        }

    def _is_live(self, replica: _Replica) -> bool:
        return replica.last_seen >= self._clock() - MEMBER_TIMEOUT_S

    def _sent_prefixes(self, keys: Sequence[BlockKey]) -> dict[int, int]:
        lengths: dict[int, int] = {}
        for position, key in enumerate(keys):
            index = self._sent.get(key)
            if index is None:
                break
            # The key says who had it last; whoever got it had all keys before it, too.
            lengths[index] = position + 1
        return lengths

    def _remember(self, keys: Sequence[BlockKey], index: int) -> None:
        # Tail first, so that the head of a chain is the last to be forgotten.
        for key in reversed(keys[:MAX_REMEMBERED_KEYS]):
            self._sent[key] = index
            self._sent.move_to_end(key)
        while len(self._sent) > MAX_REMEMBERED_KEYS:
            self._sent.popitem(last=False)
