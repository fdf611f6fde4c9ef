"""Restoring: a disk tier's blocks, as its metadata told them, enter space, index and queues."""

from __future__ import annotations

import logging

import numpy as np

from ..block_index import BlockIndex
from ..eviction.queues import Queues
from ..segments import SegmentSpace
from .files import NO_SPACE
from .records import FLAG_DOUBTFUL, FLAG_PINNED, Records
from .slab import Slab

logger = logging.getLogger(__name__)


def fit_slab(slab: Slab, space: SegmentSpace, at_most: int) -> None:
    """Make slab and space agree on whole segments, `at_most` so many."""
    size, segment = slab.size(), space.segment_bytes
    segments = -(-size // segment)
    if segments > at_most:
        slab.truncate(at_most * segment)
        segments = at_most
    elif size % segment:
        try:
            slab.grow(size, segments * segment - size)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            # the last segment is there in part: what lies in that part is read all the same
            logger.warning("the slab's last segment cannot be made whole: %s", error)
    space.grow(range(segments))


def restore(
    records: Records, space: SegmentSpace, index: BlockIndex, queues: Queues, *, intact: bool
) -> None:
    """Take in the blocks of a store that was opened again; those that do not fit are left out.

    Args:
        records: one per key, oldest use first.
        space: empty, with the segments that exist.
        index: empty.
        queues: empty; they get what is not pinned.
        intact: False makes every block doubtful.
    """
    n = len(records)
    fits = space.occupy(
        records["slot"].astype(np.int64), records["pages"].astype(np.int64), np.arange(n)
    )
    kept = records[fits]
    if len(kept) < n:
        # entry numbers are positions among the kept: say so to the space
        logger.info("%d blocks do not fit the store any more", n - len(kept))
        renumbered = np.cumsum(fits) - 1
        space.rebind(renumbered)
    if not intact:
        # any slot may have been given to another block whose record is lost
        kept["flags"] |= FLAG_DOUBTFUL
    entries = index.load(kept)
    queues.extend(
        entries,
        kept["pages"].astype(np.int64),
        kept["namespace"].astype(np.int64),
        index.keys,
        index.parents,
    )
    for entry in np.flatnonzero(kept["flags"] & FLAG_PINNED).tolist():
        queues.remove(entry)
