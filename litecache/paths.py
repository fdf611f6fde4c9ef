"""Where LiteCache keeps what it can make again: converted models, fingerprints, compiled code.

One folder, `$LITECACHE_HOME` or `~/.cache/litecache`; deleting it costs time, never data. The KV
itself lives in `CacheConfig.storage_dir`, not here. Model folders in it are complete from the
moment they can be seen, held by a lock while a process uses them, and removed oldest unused first.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from litecache.errors import ConfigError, LiteCacheError, StorageFullError, shorten

_UNFINISHED = "."
_NAME_FILE = "litecache.json"
_MOST_SHORT = 64
# A folder that somebody has just made may not be locked yet.
_UNLOCKED_S = 60.0


def litecache_home() -> Path:
    """The cache folder, read from the environment at each call; it need not exist yet.

    Raises:
        ConfigError: `LITECACHE_HOME` is not an absolute path.
    """
    text = os.environ.get("LITECACHE_HOME")
    if not text:
        return Path.home() / ".cache" / "litecache"
    home = Path(text).expanduser()
    if not home.is_absolute():
        raise ConfigError("LITECACHE_HOME", text, "an absolute path")
    return home


def make_private(folder: Path) -> None:
    """Make a folder and what is missing above it, for this user alone, whatever the umask is.

    Raises:
        OSError: it cannot be made.
    """
    for each in (*reversed(folder.parents), folder):
        if not each.is_dir():
            each.mkdir(mode=0o700, exist_ok=True)


def models_folder() -> Path:
    """Where converted and handed-over models lie, one folder per fingerprint."""
    return litecache_home() / "models"


class ModelHold:
    """Keeps a model's folder from being removed, until `release` or the end of the process."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go; once more does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    __del__ = release

    def __enter__(self) -> ModelHold:
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()


def hold_model(path: str | Path | None) -> ModelHold | None:
    """Hold a folder of `models_folder` and note that it is used now.

    Returns:
        None when there is no such folder; for any other path a hold on nothing.
    """
    if path is None or Path(path).parent != models_folder():
        return ModelHold(None)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # there, but of another user: whoever loads it will tell
        return ModelHold(None)
    hold = ModelHold(descriptor)
    with suppress(OSError):  # a file system without locks; a folder of another user
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.utime(descriptor)
    try:
        # It may have been removed before the lock was there.
        if os.stat(path).st_ino != os.fstat(descriptor).st_ino:
            return None
    except OSError:
        return None
    return hold


def find_or_make_model(
    name: str, make: Callable[[Path], None], *, label: str, most_bytes: int | None = None
) -> tuple[Path, ModelHold]:
    """A folder of `models_folder`, made if it is not there, and held.

    Args:
        name: of the folder; tells its contents.
        make: writes into the empty folder that it is given.
        label: what people call the model.
        most_bytes: of all folders when one is added; others are removed for it. None = no bound.

    Raises:
        LiteCacheError: the folder cannot be written.
    """
    target = models_folder() / name
    made = False
    while (hold := hold_model(target)) is None:
        with _errors_of(target):
            make_private(target.parent)
            scratch = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}making-", dir=target.parent))
        try:
            with hold_model(scratch) or ModelHold(None):
                make(scratch)
                with _errors_of(target):
                    _publish(scratch, target, label)
            made = True
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if made and most_bytes is not None:
        prune_models(most_bytes)
    return target, hold


def _publish(scratch: Path, target: Path, label: str) -> None:
    """Make a finished folder visible under its name; whoever made it first wins."""
    (scratch / _NAME_FILE).write_text(json.dumps({"name": label}))
    for file in scratch.iterdir():
        if file.is_file():
            with file.open("rb") as handle:
                os.fchmod(handle.fileno(), 0o600)
                os.fsync(handle.fileno())
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StorageFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else LiteCacheError
        raise kind(f"cannot write {folder}: {error.strerror}") from error


class StoredModel(NamedTuple):
    """A folder of `models_folder`.

    Attributes:
        path: of the folder.
        name: what people call the model.
        bytes: of its files.
        used_s: when it was last used, in seconds of the system's clock.
        in_use: some process holds it.
    """

    path: Path
    name: str
    bytes: int
    used_s: float
    in_use: bool


def name_of_model(folder: Path) -> str:
    """What people call the model in a folder of `models_folder`; of another, the folder's name."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if folder.parent == models_folder():
            return str(json.loads((folder / _NAME_FILE).read_text())["name"])
    return folder.name


def short_model_name(name: str) -> str:
    """For the labels of a dashboard: a name of the hub, or the last part of a path; bounded.

    A model that was written to `models_folder` has the name that it was made from.
    """
    name = name_of_model(Path(name)) if os.path.isabs(name) else name
    return shorten(os.path.basename(name) if os.path.isabs(name) else name, _MOST_SHORT)


def list_models() -> list[StoredModel]:
    """The folders of `models_folder`, oldest use first; unfinished ones as well."""
    found = []
    with suppress(OSError):
        for folder in models_folder().iterdir():
            with suppress(OSError):  # it may just be going
                name = name_of_model(folder)
                size = sum(f.lstat().st_size for f in folder.rglob("*") if not f.is_dir())
                used = folder.stat().st_mtime
                with _alone(folder) as alone:
                    found.append(StoredModel(folder, name, size, used, not alone))
    return sorted(found, key=lambda model: model.used_s)


def prune_models(most_bytes: int) -> list[StoredModel]:
    """Remove folders that nobody uses, oldest use first, until the rest is within a bound.

    What a process left unfinished goes in any case.

    Returns:
        What was removed.
    """
    models = list_models()
    total = sum(model.bytes for model in models)
    removed = []
    for model in sorted(models, key=lambda model: not model.path.name.startswith(_UNFINISHED)):
        unfinished = model.path.name.startswith(_UNFINISHED)
        if not unfinished and total <= most_bytes:
            break
        if unfinished and time.time() - model.used_s < _UNLOCKED_S:
            continue
        with suppress(OSError), _alone(model.path) as alone:
            if alone:
                # whoever comes later finds it gone as a whole
                name = f"{_UNFINISHED}going-{os.getpid()}-{model.path.name.lstrip('.')}"
                going = model.path.rename(model.path.with_name(name))
                total -= model.bytes
                removed.append(model)
                shutil.rmtree(going, ignore_errors=True)
    return removed


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether nobody uses a folder; then nobody begins to meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    alone = False
    try:
        with suppress(OSError):  # locked; or no locks here, and then nobody knows
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        yield alone
    finally:
        os.close(descriptor)
