"""`litecache doctor`: what this machine has, and what would go wrong on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from litecache.adapter.stats import CacheStats
from litecache.errors import LiteCacheError, told
from litecache.paths import litecache_home
from litecache.storage.disk.folder import check_folder

PACKAGES = ("torch", "transformers", "ray", "triton", "numpy", "xxhash", "msgpack")
_SHM_COMFORT_BYTES = 1 << 30


class Finding(NamedTuple):
    """One checked thing.

    Attributes:
        name: what was checked.
        status: "ok", "note" (works, but know it) or "bad" (will not work).
        detail: what was found, and what to do about it.
    """

    name: str
    status: str
    detail: str


def examine(storage_dir: str | None = None) -> list[Finding]:
    """Check everything; a check that fails unexpectedly is a finding of its own.

    Args:
        storage_dir: a folder for the disk tier to check, too.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "platform": _platform,
        "devices": _devices,
        "memory": _memory,
        "home": _home,
        "ray_auth": _ray_auth,
    }
    if storage_dir is not None:
        checks["storage"] = lambda: _storage(storage_dir)
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            findings.extend(check())
        except Exception as error:  # a doctor reports, whatever it meets
            findings.append(Finding(name, "bad", told(error)))
    return findings


def _platform() -> Iterator[Finding]:
    if sys.platform != "linux":
        yield Finding("platform", "bad", f"{sys.platform}: LiteCache runs on Linux")
    status = "ok" if sys.version_info >= (3, 10) else "bad"
    yield Finding("python", status, platform.python_version())
    yield Finding("cores", "ok", str(len(os.sched_getaffinity(0))))
    for package in PACKAGES:
        try:
            yield Finding(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            status = "note" if package == "triton" else "bad"
            yield Finding(package, status, f"not installed: pip install {package}")


def _devices() -> Iterator[Finding]:
    import torch

    from litecache.engine.kv_layout import FP8_CAPABILITY

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding("gpu", "note", "none: models run on the CPU")
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        detail = f"{properties.name}, {_gib(properties.total_memory)}"
        if (properties.major, properties.minor) < FP8_CAPABILITY:
            detail += '; no fp8: kv_dtype and tier_codec take "int8" alone'
        yield Finding(f"gpu {index}", "ok", detail)


def _memory() -> Iterator[Finding]:
    from litecache.actors.group_spec import MEMORY_SHARE
    from litecache.machine_memory import memory_limit_bytes

    share = f"ram_bytes, Ray's object store and weights may take {MEMORY_SHARE:.0%}"
    yield Finding("memory", "ok", f"{_gib(memory_limit_bytes())}; {share}")
    if hasattr(os, "memfd_create"):
        os.close(os.memfd_create("litecache-doctor"))
        yield Finding("arena", "ok", "memfd")
    else:
        yield Finding("arena", "note", "no memfd: the arena is a file in /dev/shm")
    size = shutil.disk_usage("/dev/shm").total
    status = "ok" if size >= _SHM_COMFORT_BYTES else "note"
    yield Finding("/dev/shm", status, f"{_gib(size)}; Ray's object store lives there")


def _home() -> Iterator[Finding]:
    home = litecache_home()
    parent = next(folder for folder in (home, *home.parents) if folder.exists())
    status = "ok" if os.access(parent, os.W_OK) else "bad"
    free = _gib(shutil.disk_usage(parent).free)
    yield Finding("cache folder", status, f"{home}, {free} free")


def _ray_auth() -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE")
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    has_token = token_file.is_file() or "RAY_AUTH_TOKEN" in os.environ
    if mode == "token" and not has_token:
        detail = "RAY_AUTH_MODE=token without a token: run `ray get-auth-token --generate`"
        yield Finding("ray auth", "bad", detail)
    elif mode is None and has_token:
        detail = (
            f"{token_file} exists: a Ray started now asks for it, so export RAY_AUTH_MODE=token "
            "wherever you connect from"
        )
        yield Finding("ray auth", "note", detail)
    else:
        yield Finding("ray auth", "ok", mode or "off")


def _storage(storage_dir: str) -> Iterator[Finding]:
    try:
        if not os.path.isabs(storage_dir):
            raise LiteCacheError(f"{storage_dir} is not absolute")
        parent = check_folder(storage_dir)
        if not os.access(parent, os.W_OK):
            raise LiteCacheError(f"{parent} is not writable")
    except LiteCacheError as error:
        yield Finding("storage_dir", "bad", str(error))
        return
    yield Finding("storage_dir", "ok", f"{_gib(shutil.disk_usage(parent).free)} free in {parent}")
    with tempfile.NamedTemporaryFile(dir=parent) as probe:
        try:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
            yield Finding("direct I/O", "ok", "O_DIRECT works")
        except OSError:
            detail = "refused by the file system: buffered I/O instead, slower for large blocks"
            yield Finding("direct I/O", "note", detail)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def cluster_findings() -> list[Finding]:
    """What a running Ray cluster says, for those who are connected to one."""
    import ray

    from litecache.actors.group import Group, list_groups

    resources: dict[str, Any] = ray.cluster_resources()
    has = ", ".join(f"{k} {resources[k]:g}" for k in ("CPU", "GPU") if k in resources)
    nodes = sum(node["Alive"] for node in ray.nodes())
    found = [Finding("ray cluster", "ok", f"{nodes} node(s), {has}")]
    try:
        names = list_groups()
    except LiteCacheError as error:
        return [*found, Finding("groups", "ok", str(error))]
    found.append(Finding("groups", "ok", ", ".join(names) or "none"))
    for name in names:
        try:
            actors = Group.attach(name, timeout_s=5).status()
        except LiteCacheError as error:
            found.append(Finding(f"group {name}", "bad", str(error)))
        else:
            found += group_findings(name, CacheStats.from_status(actors))
    return found


def group_findings(name: str, stats: CacheStats) -> list[Finding]:
    """Shards whose disk tier is out, and what a group could not save."""
    found = [
        Finding(shard, "bad", f"the disk tier is out until the next start: {store['disk_lost']}")
        for shard, store in stats.shards.items()
        if store.get("disk_lost")
    ]
    if stats.drops:
        drops = ", ".join(f"{count:,} {reason}" for reason, count in sorted(stats.drops.items()))
        found.append(Finding(f"group {name}", "note", f"blocks not saved, by reason: {drops}"))
    return found
