"""The fixed-width record of one block on disk, shared by the snapshot and the journal.

80 bytes, little-endian, each with its own checksum, so that one damaged record costs one block.
The checksum is a multiply-xorshift mix over the nine words before it, computed with numpy for all
records of a file at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RECORD = np.dtype(
    [
        ("key", "<u8", (2,)),
        ("parent", "<u8", (2,)),
        ("checksum", "<u8"),
        ("slot", "<u4"),
        ("pages", "<u4"),
        ("namespace", "<u4"),
        ("created_s", "<u4"),
        ("expires_s", "<u4"),
        ("hits", "<u4"),
        ("used_s", "<u4"),
        ("flags", "<u4"),
        ("mix", "<u8"),
    ]
)
RECORD_BYTES = RECORD.itemsize
FLAG_PINNED = 1
FLAG_DOUBTFUL = 2

Records = npt.NDArray[np.void]

_PRIMES = np.array([0x9FB21C651E98DF25, 0xD6E8FEB86659FD93], np.uint64)
_SEED = np.uint64(0x6C69746563616368)


def _mix(records: Records) -> npt.NDArray[np.uint64]:
    words = records.view("<u8").reshape(len(records), RECORD_BYTES // 8)
    mixed = np.full(len(records), _SEED)
    for column in range(words.shape[1] - 1):
        mixed ^= words[:, column]
        mixed *= _PRIMES[column % 2]
        mixed ^= mixed >> np.uint64(32)
    return mixed


def seal(records: Records) -> bytes:
    """Set each record's checksum; the bytes to write."""
    records["mix"] = _mix(records)
    return records.tobytes()


def unseal(raw: bytes | memoryview) -> Records:
    """The sound records among `raw`; a damaged one is left out, as is a torn end."""
    whole = len(raw) // RECORD_BYTES * RECORD_BYTES
    records = np.frombuffer(raw[:whole], RECORD)
    sound: Records = records[_mix(records) == records["mix"]]
    return sound
