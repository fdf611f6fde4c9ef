"""Opening a shard: its memory and its folder, both or neither."""

from __future__ import annotations

from ..errors import StorageError, StorageFullError
from ..metrics import Metrics
from .admission import get_admission
from .arena import Arena
from .disk.files import NO_SPACE, Files
from .disk.tier import DiskTier
from .eviction import get_policy
from .segment_sizes import pick_segment_bytes
from .tiers import Tiers


def open_tiers(
    directory: str | None,
    *,
    storage_bytes: int,
    ram_bytes: int,
    epoch: int,
    eviction: str,
    admission: str,
    ttl_s: float | None,
    quotas: dict[str, int],
    metrics: Metrics,
    files: Files,
    direct: bool,
    use_memfd: bool,
    retired_bytes: int,
) -> Tiers:
    """Make the arena and read back the folder; see `ShardStore` for what the options mean.

    Raises:
        ConfigError, StorageFullError, StorageLockedError, StorageFormatError: see `ShardStore`.
        StorageError: the disk refused. Nothing stays open.
    """
    get_policy(eviction)
    admit = get_admission(admission)
    segment_bytes = pick_segment_bytes(ram_bytes)
    arena = Arena(
        ram_bytes // segment_bytes * segment_bytes, segment_bytes, epoch, use_memfd=use_memfd
    )
    tiers = Tiers(arena, eviction, admit, ttl_s, metrics)
    if directory is None:
        return tiers
    try:
        tiers.disk = DiskTier(
            files,
            directory,
            storage_bytes=storage_bytes,
            index=tiers.index,
            policy=eviction,
            on_evict=tiers.on_disk_evict,
            quotas=quotas,
            direct=direct,
            retired_bytes=retired_bytes,
        )
    except OSError as error:
        arena.close()
        kind = StorageFullError if error.errno in NO_SPACE else StorageError
        raise kind(f"the store in {directory} cannot be opened: {error}") from error
    except BaseException:
        arena.close()
        raise
    return tiers
