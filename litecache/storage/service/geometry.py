"""Which page size a prefix was written with; a store of another one is kept aside, not misread."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import logging
import os
import shutil

from ...errors import StorageLockedError

logger = logging.getLogger(__name__)

_SUFFIX = ".geometry.json"


def set_aside_others(path: str, wanted: dict[str, int]) -> None:
    """Rename folders `<path>_<shard>` that hold blocks of another geometry.

    Raises:
        StorageLockedError: they are in use.
    """
    found = _noted(path)
    if found != wanted:
        for folder in _shards(path):
            _set_aside(folder, (found or {}).get("page_bytes", 0))


def note_geometry(path: str, wanted: dict[str, int]) -> None:
    """The folders are open and hold blocks of this geometry, or none yet."""
    if _noted(path) != wanted:
        temporary = path + _SUFFIX + ".new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(wanted, file)
        os.replace(temporary, path + _SUFFIX)


def _noted(path: str) -> dict[str, int] | None:
    with contextlib.suppress(OSError, ValueError), open(path + _SUFFIX) as file:
        found = json.load(file)
        return found if isinstance(found, dict) else None
    return None


def _shards(path: str) -> list[str]:
    folders = glob.glob(glob.escape(path) + "_*")
    return [f for f in folders if f[len(path) + 1 :].isdigit() and os.path.isdir(f)]


def _set_aside(folder: str, page_bytes: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(f"{folder}/lock", os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageLockedError(f"{folder} is in use by another service") from None
        finally:
            os.close(fd)
    target = f"{folder}.pages-{page_bytes}"
    # one store aside per page size: a third geometry in turn must not fill the disk
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)
    logger.info("%s holds pages of %d bytes: kept as %s", folder, page_bytes, target)
