"""What a slot of the arena is doing: the states of its life in RAM.

A slot in use is in one of these; only CLEAN slots without leases may be evicted:

    RESERVED  a client fills it            -> DIRTY or CLEAN (commit), DEAD (its lease ended)
    LOADING   is being read from disk      -> CLEAN (arrived), DEAD (unreadable, cancelled)
    DIRTY     committed, not on disk yet   -> WRITING (taken)
    WRITING   is being written             -> CLEAN (written), DIRTY (found no place), DEAD (failed)
    CLEAN     readable, nothing to do      -> DIRTY (worth the disk after all), free (evicted)
    DEAD      void: dropped from any state -> free, once no lease and no I/O holds it

`Tiers` alone takes a slot from one to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from ..hashing import BlockKey
from .protocol import StageResult, StageStatus


class RamState(IntEnum):
    """What a slot is doing."""

    RESERVED = 0
    LOADING = 1
    DIRTY = 2
    WRITING = 3
    CLEAN = 4
    DEAD = 5


MISS = StageResult(StageStatus.MISS)
LOADED = (RamState.DIRTY, RamState.WRITING, RamState.CLEAN)
UNWRITTEN = (RamState.DIRTY, RamState.WRITING)


@dataclass(eq=False, slots=True)
class RamBlock:
    """One slot in use.

    Attributes:
        slot, nbytes, generation: where, how big, and under which number it was given out.
        handle: small integer from 1 on, for the eviction queues.
        staged: what `stage` answers for the block in it; MISS while there is none.
        entry: of the block in it; -1 while RESERVED or DEAD.
        leases: of all clients together.
        busy: a read or a write is under way, and touches the slot.
    """

    slot: int
    nbytes: int
    generation: int
    handle: int
    entry: int = -1
    leases: int = 0
    state: RamState = RamState.RESERVED
    busy: bool = False
    staged: StageResult = MISS

    def answer(self, status: StageStatus) -> None:
        """From now on `stage` tells of the slot like this."""
        self.staged = StageResult(status, self.slot, self.generation)


class WriteBatch(NamedTuple):
    """Dirty blocks of one size that one request will write, and their keys.

    Attributes:
        namespace: of all of them, where it has a quota; else -1.
    """

    blocks: list[RamBlock]
    keys: list[BlockKey]
    pages: int
    namespace: int
