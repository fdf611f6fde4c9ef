"""Making room in a tier: the oldest leave first, whatever their size.

Slots are given back one by one among blocks of the size that needs them. Where the oldest block of
all has another size, the segments in which it lies are emptied for the size that needs them.
"""

from __future__ import annotations

from collections.abc import Callable

from .eviction.queues import Queues
from .segments import SegmentSpace


def make_room(
    queues: Queues,
    space: SegmentSpace,
    pages: int,
    n: int,
    *,
    slot_of: Callable[[int], int],
    allowed: Callable[[int], bool],
    give_up: Callable[[int], None],
) -> None:
    """Evict until `n` slots of a block size are free, or a region of it can be assigned.

    Fewer become free when what is left is in use.

    Args:
        queues, space: of the tier.
        pages: block size.
        n: slots wanted.
        slot_of: where a handle lies.
        allowed: whether a handle may go now.
        give_up: called with each handle that left the queues.
    """
    stuck = False
    while n > 0:
        # asked anew for each victim: behind one old block of this size may come one of another
        other = None if stuck else queues.oldest_elsewhere(pages)
        if other is None or not space.worth_emptying(slot_of(other), pages):
            victim = queues.evict(pages, allowed)
            if victim is None:
                return
            give_up(victim)
            n -= 1
            continue
        for handle in space.in_the_way(slot_of(other), pages):
            if handle in queues and allowed(handle):
                queues.remove(handle)
                give_up(handle)
        if space.allocatable(pages):
            return
        # one emptied segment may not be enough: another must go to make room for metadata
        stuck = other in queues or not space.over_bound(pages)
