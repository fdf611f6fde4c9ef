"""The slot protocol: what a client and a shard say to each other.

Batched, versioned, made of small tuples; between processes a batch is one packed message
(`wire.py`). A *slot* is a piece of the
shard's arena that holds one block; its id is its byte offset divided by `PAGE_BYTES`, so finding
its bytes needs no table. A *lease* is a client's right to touch a slot's bytes; it ends by
`release`, `commit`, `cancel`, `detach`, or by proof that the client's process is gone, never by a
clock. A slot's *generation* changes whenever the slot is given to other contents.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

from ..hashing import BlockKey

PROTOCOL_VERSION = 8
PAGE_BYTES = 4096
ALL_KEYS = 1 << 31
"""More than a message has."""


class ShardMethod(IntEnum):
    """Numbers of a shard's methods on its socket."""

    STAGE = 1
    CANCEL = 2
    RELEASE = 3
    RESERVE = 4
    COMMIT = 5
    QUERY = 6
    TOUCH = 7
    DURABLE = 8


class StageStatus(IntEnum):
    """Answer for one key of `stage`; READY and LOADING come with a lease, ON_DISK without: the
    block is there, and was not to be read."""

    MISS = 0
    READY = 1
    LOADING = 2
    BUSY = 3
    ON_DISK = 4


class SlotState(IntEnum):
    """State in the slot table that clients read through the mapping, without a call."""

    FREE = 0
    RESERVED = 1
    LOADING = 2
    READY = 3
    FAILED = 4


class CommitStatus(IntEnum):
    """Answer for one item of `commit`; false only where nothing was and nothing is stored."""

    STALE = 0
    STORED = 1
    EXISTS = 2


class Retention(IntEnum):
    """How long a block is worth keeping: all LOW ones leave before the first NORMAL one, and those
    before the first HIGH one. Zero is what older stores hold.
    """

    NORMAL = 0
    LOW = 1
    HIGH = 2


class Place(IntFlag):
    """Tiers of a shard that hold a block."""

    NOWHERE = 0
    RAM = 1
    DISK = 2


class SlotRef(NamedTuple):
    """A slot and the generation under which it was given out."""

    slot: int
    generation: int


class StageResult(NamedTuple):
    """What became of one staged key; `slot` and `generation` are -1 without a lease."""

    status: StageStatus
    slot: int = -1
    generation: int = -1


class CommitItem(NamedTuple):
    """A reserved slot whose bytes are complete.

    Attributes:
        slot, generation: as given by `reserve`.
        key: the block's key.
        parent: key of the block before it, or the chain's root key.
        namespace: readable name of what the block belongs to (model, group, salt), at most 200
            characters; quotas and `litecache inspect` go by it.
        expires_s: Unix second from which on the block is a miss; 0: never, but for the shard's
            own `ttl_s`. Of both the earlier counts.
        retention: what leaves before it, and after it.
    """

    slot: int
    generation: int
    key: BlockKey
    parent: BlockKey
    namespace: str = ""
    expires_s: int = 0
    retention: Retention = Retention.NORMAL


class Attachment(NamedTuple):
    """How a client process maps a shard's arena.

    Attributes:
        version: `PROTOCOL_VERSION` of the shard.
        client_id: names the client in every later call.
        epoch: changes with every start of the shard; slots of another epoch mean nothing.
        arena_pid, arena_fd: the mapping is `/proc/<arena_pid>/fd/<arena_fd>`.
        arena_path: a file to open instead where memfd does not exist, else None.
        arena_bytes: bytes of slots, from offset 0; the slot table follows, 32 bytes per page.
        segment_bytes: unit in which memory is allocated; `cudaHostRegister` goes by it.
        arena_device, arena_inode: of the mapping, so that no other file is taken for it.
        address: of the shard's socket (`SocketServer`); None where there is none.
    """

    version: int
    client_id: int
    epoch: int
    arena_pid: int
    arena_fd: int
    arena_path: str | None
    arena_bytes: int
    segment_bytes: int
    arena_device: int
    arena_inode: int
    address: str | None = None


class FlushReport(NamedTuple):
    """What `flush` achieved.

    Attributes:
        written: blocks that became durable during the call.
        pending: blocks still not durable when it returned (timeout, or a failing disk).
        failed: blocks that were dropped by ENOSPC or EIO during the call.
        complete: nothing is pending and nothing failed.
    """

    written: int
    pending: int
    failed: int
    complete: bool


class Deltas(NamedTuple):
    """Changes of a shard's key set since the last call of `drain_deltas`.

    Attributes:
        epoch: the shard's epoch.
        seq: counts the calls; a gap means that one was lost and asks for a resync by `keys()`.
        added, removed: keys, disjoint, net effect only.
        resync: there were too many changes to list; what is in the lists is not all, read `keys()`.
        more: the next call tells of more.
    """

    epoch: int
    seq: int
    added: list[BlockKey]
    removed: list[BlockKey]
    resync: bool = False
    more: bool = False
