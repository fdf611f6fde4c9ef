"""Page-aligned memory for one read, as O_DIRECT wants it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def scratch_memory(nbytes: int) -> Iterator[memoryview]:
    """Zeroed, page-aligned memory that goes away afterwards."""
    with mmap.mmap(-1, nbytes) as mapping:
        memory = memoryview(mapping)
        try:
            yield memory
        finally:
            memory.release()
