"""How much memory this process may have: the machine's, bounded by every cgroup above it.

The one place that knows. A memory cgroup bounds all that lie below it, so the process's own group
and each of its parents are read, up to the root of what is mounted: in the one hierarchy of
version 2, or in that of version 1's memory controller (`/proc/self/cgroup` and
`/proc/self/mountinfo` say where both are).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Names(NamedTuple):
    """What a version of cgroups calls its files."""

    limits: tuple[str, ...]
    usage: str
    idle_pages: str


# `high` does not kill, but shared memory cannot be reclaimed: beyond it the process all but stops
_V2 = _Names(("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The most this process could ever have: physical memory, or the lowest limit above it.

    Args:
        root: the file system in which `proc` and what it names are looked up.
    """
    limits = [limit for folder, names in _groups(root) for limit in _limits(folder, names)]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])


def available_memory_bytes(root: Path = Path("/")) -> int:
    """What can still be taken: of the machine, and below each limit; never less than 0.

    Pages of files that nobody used lately count as free, as the kernel gives them up first.

    Args:
        root: the file system in which `proc` and what it names are looked up.
    """
    rooms = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):
        rooms.append(_field(root / "proc/meminfo", "MemAvailable:") * 1024)
    for folder, names in _groups(root):
        with contextlib.suppress(OSError, ValueError):
            used = int((folder / names.usage).read_text())
            with contextlib.suppress(OSError, ValueError):
                used -= _field(folder / "memory.stat", names.idle_pages)
            rooms += [limit - used for limit in _limits(folder, names)]
    return max(0, min(rooms))


def _groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """The folders of the process's memory cgroups, its own first."""
    try:
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
        mine = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if kind[0] == "cgroup2":
            names, controller = _V2, ""
        elif kind[0] == "cgroup" and "memory" in kind[-1].split(","):
            names, controller = _V1, "memory"
        else:
            continue
        top, point = _plain(fields[3]), root / _plain(fields[4]).lstrip("/")
        for line in mine:
            _, controllers, path = [*line.split(":", 2), "", ""][:3]
            if path and controller in controllers.split(","):
                # a container may see a path from outside of what is mounted: then the top is all
                inside = os.path.relpath(path, top)
                parts = [] if inside.startswith("..") or inside == "." else inside.split("/")
                for depth in range(len(parts), -1, -1):
                    yield point.joinpath(*parts[:depth]), names


def _limits(folder: Path, names: _Names) -> Iterator[int]:
    for name in names.limits:
        # "max", or a file that the root of a hierarchy does not have: no limit
        with contextlib.suppress(OSError, ValueError):
            yield int((folder / name).read_text())


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.split(" ", 1)[0] == name:
            return int(line.split()[1])
    raise ValueError(name)


def _plain(path: str) -> str:
    """A path as mountinfo writes it, with its blanks as octal numbers."""
    return re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), path)
