"""Sizes of segments and of regions: they follow from the sizes of tier and block alone.

Regions start at multiples of their segments, so a slot's region is known without being written
down.
"""

from __future__ import annotations

from typing import NamedTuple

from .protocol import PAGE_BYTES

_LARGEST_SEGMENT_BYTES = 64 << 20
_LARGEST_REGION_PAGES = (64 << 20) // PAGE_BYTES
_WASTE = 0.125


def pick_segment_bytes(total_bytes: int) -> int:
    """Segment size for a tier: 64 MiB, or a sixteenth of a small tier, a power of two."""
    size = _LARGEST_SEGMENT_BYTES
    while size > 64 << 10 and size * 16 > total_bytes:
        size //= 2
    return size


class RegionSize(NamedTuple):
    """Segments of a region, and the slots that they are cut into."""

    segments: int
    slots: int


def region_size(segment_pages: int, block_pages: int) -> RegionSize:
    """Size of the regions of a block size: the fewest segments that waste little of their end."""
    smallest = -(-block_pages // segment_pages)
    largest = max(smallest, _LARGEST_REGION_PAGES // segment_pages)
    for count in range(smallest, min(largest, smallest + 16) + 1):
        slots, wasted = divmod(count * segment_pages, block_pages)
        if wasted <= _WASTE * count * segment_pages:
            return RegionSize(count, slots)
    return RegionSize(smallest, smallest * segment_pages // block_pages)
