"""Names under which blocks are stored, for reports, and bounds on what some of them take of a tier.

They are no part of a block's key.

Blocks of a salt get a namespace of their own, so that all of a salt can be found and deleted. It
names the salt by a digest, because a salt may be a secret and names are written to disk. Blocks
without a salt go by the model's label alone, and so does "" with a quota of its own. Where the
table of names is full, blocks of further salts share the namespace "".
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from .eviction.queues import Queues
from .protocol import PAGE_BYTES

LONGEST_NAMESPACE = 200
_MARK = " salt-"
_LONGEST_LABEL = 160
_LONGEST_MODEL = 96


def label_of(model: str, details: str) -> str:
    """A readable name of a model, short and plain enough for a namespace, also with a salt's mark.

    Args:
        model: its name or path, any text; of a long one the end is kept, after a digest of it all.
        details: what tells it from others of that name.
    """
    plain = "".join(c if c.isprintable() else "?" for c in model)
    if len(plain) > _LONGEST_MODEL or plain != model:
        digest = hashlib.blake2b(model.encode("utf-8", "surrogatepass"), digest_size=6)
        plain = f"{digest.hexdigest()}...{plain[-_LONGEST_MODEL + 15 :]}"
    return f"{plain}{details}"[:_LONGEST_LABEL]


def salt_digest(salt: str) -> str:
    """16 hex digits that stand for a salt."""
    return hashlib.blake2b(salt.encode(), digest_size=8).hexdigest()


def namespace_of(label: str, salt: str, with_quota: Collection[str]) -> str:
    """Namespace of a request's blocks.

    Args:
        label: readable name of the model.
        salt: the request's.
        with_quota: salts that have a quota.
    """
    return f"{label}{_MARK}{salt_digest(salt)}" if salt or salt in with_quota else label


def split_namespace(namespace: str) -> tuple[str, bool]:
    """The model's label, and whether the blocks are a salt's."""
    label, marked, _ = namespace.rpartition(_MARK)
    return (label, True) if marked else (namespace, False)


def may_hold(namespace: str, digest: str) -> bool:
    """Whether a salt's blocks may lie under this name, of whatever model.

    Names that are lost (a damaged record), and the one for what found no room in the table, may
    hold blocks of any salt.
    """
    if not namespace or namespace.startswith("unknown-"):
        return True
    _, marked, salt = namespace.rpartition(_MARK)
    return (salt if marked else salt_digest("")) == digest


def quota_of(namespace: str, quotas: Mapping[str, int]) -> int | None:
    """Bytes that a namespace may take of a tier: by its own name, or by its salt's digest."""
    return quotas.get(namespace, quotas.get(namespace.rpartition(_MARK)[2]))


class Quotas:
    """Holds namespaces to their quotas in one tier; under the store's lock.

    Args:
        limits: namespace, or digest of a salt (`namespaces.py`), to the bytes it may take.
        queues: of the tier; they know what each namespace holds, and are told its quota.

    Attributes:
        pinned: pages by namespace that are in no queue, since nothing may evict them.
    """

    def __init__(self, limits: Mapping[str, int], queues: Queues) -> None:
        self._limits = limits
        self._queues = queues
        self._unplaced: dict[int, int] = {}
        self.pinned: Counter[int] = Counter()

    def note_name(self, number: int, name: str) -> None:
        """A namespace has got its number."""
        limit = quota_of(name, self._limits)
        if limit is not None:
            self._queues.quota_pages[number] = limit // PAGE_BYTES

    def holds(self, namespace: int) -> bool:
        """Whether a namespace has a quota."""
        return namespace in self._queues.quota_pages

    def exceeded(self, namespace: int) -> bool:
        """Whether a namespace holds more than its quota."""
        held = self._queues.held_pages(namespace) + self.pinned[namespace]
        return held > self._queues.quota_pages[namespace]

    def room_for(self, namespace: int, pages: int, n: int, evict: Callable[[], bool]) -> int:
        """How many of `n` blocks a namespace may add, after its oldest have made room.

        Args:
            namespace: its number.
            pages: size of a block.
            n: blocks wanted.
            evict: lets the namespace's oldest block of that size go; False when none may.
        """
        quota = self._queues.quota_pages.get(namespace)
        if quota is None:
            return n
        free = quota - self._unplaced.get(namespace, 0) - self.pinned[namespace]
        n = min(n, max(0, free // pages))
        while self._queues.held_pages(namespace) + n * pages > free:
            if not evict():
                return max(0, (free - self._queues.held_pages(namespace)) // pages)
        return n

    def begin_writes(self, namespace: int, pages: int) -> None:
        """Slots were allocated; their blocks are not in the queues yet."""
        self._unplaced[namespace] = self._unplaced.get(namespace, 0) + pages

    def end_writes(self, namespace: int, pages: int) -> None:
        """Slots that were allocated have been placed or freed."""
        self._unplaced[namespace] -= pages
