"""`litecache doctor`: what this machine has, and what would go wrong on it.

What can be tried is tried (a kernel compiled, huge pages made, a disk written and read), rather
than looked up; nothing that is made for it stays.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from litecache.adapter.stats import CacheStats
from litecache.config import CacheConfig
from litecache.errors import KernelError, LiteCacheError, told
from litecache.paths import litecache_home
from litecache.storage.arena.mapping import HUGE_PAGE_BYTES, SharedMapping
from litecache.storage.disk.folder import check_folder
from litecache.storage.disk.raw_disk import MIB, RawDisk

PACKAGES = ("torch", "transformers", "ray", "triton", "numpy", "xxhash", "msgpack")
_SHM_COMFORT_BYTES = 1 << 30
_ENOUGH_FILES = 8192
# Of a disk that is measured, in turns: what a slow one writes in some seconds.
_TURN_BYTES, _TURNS = 32 << 20, 2
_SLOW_DISK_GBPS = 0.5


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
        "triton": _triton,
        "memory": _memory,
        "huge pages": _huge_pages,
        "limits": _limits,
        "home": _home,
        "ray_auth": _ray_auth,
        "storage": lambda: _storages(storage_dir),
    }
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
    detail = f"{_gib(size)}; Ray's object store lives there"
    if size < _SHM_COMFORT_BYTES:
        detail += ", and falls back to disk: give a container more by `docker run --shm-size=4g`"
    yield Finding("/dev/shm", "ok" if size >= _SHM_COMFORT_BYTES else "note", detail)


def _triton() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("kernels", "ok", "torch's, on the CPU; Triton is for GPUs")
        return
    advice = (
        "it compiles with a C compiler (`apt-get install gcc`) into TRITON_CACHE_DIR or "
        "~/.triton, which must be writable"
    )
    try:
        seconds = _run_kernel()
    except Exception as error:  # compilers and drivers raise whatever they like
        yield Finding("kernels", "bad", f"Triton runs no kernel here ({told(error)}): {advice}")
    else:
        yield Finding("kernels", "ok", f"Triton compiled and ran one in {seconds:.1f} s")


def _run_kernel() -> float:
    """Run one of ours, compiled anew where it is not in Triton's cache; its seconds."""
    import torch

    from litecache.kernels.dispatch import copy_blocks

    started = time.perf_counter()
    pool = torch.arange(2 * 4096, device="cuda").to(torch.uint8).view(2, 4096)
    pool[1] = 0
    copy_blocks(pool, *(torch.tensor([block], device="cuda") for block in (0, 1)))
    if not torch.equal(pool[0], pool[1]):
        raise KernelError("a copied block has other bytes")
    return time.perf_counter() - started


def _huge_pages() -> Iterator[Finding]:
    """Make an arena of two, as shards do, and ask the kernel how it is mapped."""
    fd = os.memfd_create("litecache-doctor") if hasattr(os, "memfd_create") else -1
    if fd < 0:
        return
    nbytes = 2 * HUGE_PAGE_BYTES
    try:
        os.ftruncate(fd, nbytes)
        before = _mapped_huge_bytes()
        mapping = SharedMapping(fd, nbytes, nbytes)
        mapping.make(fd, 0, nbytes)
        huge = _mapped_huge_bytes() - before >= nbytes
        mapping.close()
    finally:
        os.close(fd)
    if huge:
        yield Finding("huge pages", "ok", "the arena lies in pages of 2 MiB")
        return
    detail = (
        "the kernel gives none to shared memory, so the arena is made and pinned page by page, "
        "several times slower: as root, `echo advise > "
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled`"
    )
    yield Finding("huge pages", "note", detail)


def _mapped_huge_bytes() -> int:
    """Shared memory that this process has mapped by huge pages."""
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("ShmemPmd")) * 1024


def _limits() -> Iterator[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or files >= _ENOUGH_FILES:
        yield Finding("open files", "ok", _limit(files))
    else:
        detail = (
            f"{files:,}: Ray and the sockets of many clients need more; `ulimit -n "
            f"{max(_ENOUGH_FILES, 65536)}` before `ray start` (at most {_limit(most)} without root)"
        )
        yield Finding("open files", "note", detail)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    detail = f"{_limit(locked, lambda nbytes: f'{nbytes >> 20:,} MiB')}; "
    import torch

    if not torch.cuda.is_available():
        yield Finding("memlock", "ok", f"{detail}nothing is pinned without a GPU")
        return
    try:
        torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        detail += (
            f"memory cannot be pinned for the GPU ({told(error)}), so copies are slow: "
            "`ulimit -l unlimited`, or `docker run --ulimit memlock=-1`"
        )
        yield Finding("memlock", "note", detail)
    else:
        yield Finding("memlock", "ok", f"{detail}memory can be pinned for the GPU")


def _limit(value: int, show: Callable[[int], str] = "{:,}".format) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else show(value)


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


def _storages(storage_dir: str | None) -> Iterator[Finding]:
    folders = [storage_dir] if storage_dir is not None else list(CacheConfig().storage_dir or ())
    if not folders:
        detail = (
            "none: nothing outlives the actors; set storage_dir (or LITECACHE_STORAGE_DIR), and "
            "check a folder by --storage-dir FOLDER"
        )
        yield Finding("storage_dir", "note", detail)
    for folder in folders:
        yield from _storage(folder)


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
    free = shutil.disk_usage(parent).free
    yield Finding("storage_dir", "ok", f"{_gib(free)} free in {parent}")
    if free < 4 * _TURNS * _TURN_BYTES:
        yield Finding("disk", "bad", f"{_gib(free)} free: make room, or choose another folder")
        return
    with tempfile.TemporaryDirectory(prefix="litecache-doctor-", dir=parent) as scratch:
        yield from _disk(os.path.join(scratch, "probe"))


def _disk(path: str) -> Iterator[Finding]:
    """Write and read a file past the page cache."""
    try:
        disk = RawDisk(path, _TURNS * _TURN_BYTES, _TURN_BYTES)
    except OSError as error:
        if error.errno != errno.EINVAL:
            yield Finding("disk", "bad", f"it cannot be written ({error.strerror}): see `dmesg`")
            return
        detail = (
            "refused by the file system: buffered I/O instead, slower for large blocks; ext4 and "
            "xfs take it, tmpfs and many network file systems do not"
        )
        yield Finding("direct I/O", "note", detail)
        return
    try:
        rates = {
            kind: max(disk.turn(kind, 4, 4 * MIB) for _ in range(_TURNS))
            for kind in ("write", "read")
        }
    finally:
        disk.close()
    yield Finding("direct I/O", "ok", "O_DIRECT works")
    detail = f"reads {rates['read']:.2f} GB/s, writes {rates['write']:.2f} GB/s"
    slow = rates["read"] < _SLOW_DISK_GBPS
    if slow:
        detail += (
            ": a load from it is seldom sooner than computing, but for large models on slow GPUs; "
            "`litecache bench MODEL --dir FOLDER` tells for yours, a local NVMe disk is better"
        )
    yield Finding("disk", "note" if slow else "ok", detail)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def cluster_findings() -> list[Finding]:
    """What a running Ray cluster says, for those who are connected to one."""
    import ray

    from litecache.actors.found_groups import list_groups
    from litecache.actors.operating.watch import GroupWatch, statuses

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
            views = GroupWatch(name).look()
        except LiteCacheError as error:
            found.append(Finding(f"group {name}", "bad", str(error)))
            continue
        for actor, view in views.items():
            if view.state in ("silent", "failed", "gone"):
                detail = f"{view.state}: {view.error}; `litecache status --group {name}` shows it"
                found.append(Finding(actor, "bad", detail))
        found += group_findings(name, CacheStats.from_status(statuses(views)))
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
