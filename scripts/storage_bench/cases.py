"""All rows of one block size: shard and limit alternate, the figure is the paired ratio."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from bench_common import Report, Row, alternate, summarise
from rich.progress import Progress

from litecache.storage.disk.raw_disk import MIB, RawDisk
from storage_bench.aging import age
from storage_bench.backends import Actor, InProcess
from storage_bench.memory import cached_bytes
from storage_bench.shard_turns import ShardTurns

SIZES = {"360 KiB": 360 << 10, "2 MiB": 2 << 20, "16 MiB": 16 << 20}


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    Attributes:
        rounds: pairs of turns.
        disk_bytes, ram_bytes: bounds of the store.
        threads: its I/O threads.
        in_process: measure a store of this process instead of the actor.
        quick: a smoke test.
    """

    rounds: int
    disk_bytes: int
    ram_bytes: int
    threads: int
    in_process: bool
    quick: bool


class SizeBench:
    """One block size on one disk.

    Args:
        report: where the rows go.
        folder: scratch space on the disk.
        raw: the bare disk.
        name: of the block size.
        settings: see there.
    """

    def __init__(
        self, report: Report, folder: str, raw: RawDisk, name: str, settings: Settings
    ) -> None:
        self._report, self._raw, self._name, self._settings = report, raw, name, settings
        self._folder = os.path.join(folder, f"shard-{SIZES[name]}")
        self._best = {kind: raw.best(kind, settings.quick) for kind in ("read", "write")}
        say = ", ".join(f"{kind} {t} x {r >> 20} MiB" for kind, (t, r) in self._best.items())
        report.console.print(f"{name}: the raw limit is the best of threads x request: {say}")
        options = {
            "directory": self._folder,
            "storage_bytes": settings.disk_bytes,
            "ram_bytes": settings.ram_bytes,
            "io_threads": settings.threads,
            "fsync": "interval",
        }
        self._backend = InProcess(options) if settings.in_process else Actor(options)
        self._turns = ShardTurns(self._backend, SIZES[name], raw.turn_bytes)

    def run(self) -> None:
        """All cases, in an order in which each finds the state that it needs."""
        turns, disk_bytes = self._turns, self._settings.disk_bytes
        new = max(2, disk_bytes // self._raw.turn_bytes // 2)
        self._against_disk("write, new files", turns.write, "write", new)
        keep = self._fill()
        self._against_disk("write, overwriting", turns.write, "write")
        turns.turns = turns.turns[-keep:]
        self._against_disk("bare read with checksums", self._raw.checked_read, "read")
        self._against_disk("cold read", turns.read, "read")
        turns.turns = turns.turns[-1:]
        self._pairs("RAM hit", turns.hit, turns.memcpy, self._settings.rounds, "memcpy")
        self._say("aging: the store is written four times over")
        age(turns, disk_bytes)
        self._against_disk("cold read, aged store", turns.read, "read")
        cached = cached_bytes(os.path.join(self._folder, "slab"))
        self._report.add(
            Row(self._name, "page cache of the slab", cached / MIB, "MiB", 0, None, "bound")
        )

    def _fill(self) -> int:
        """Write until the slab has its full size; how many turns of blocks it holds."""
        turns = self._turns
        blocks = -1
        while True:
            stats = self._backend.stats()
            full = stats["slab_bytes"] >= self._settings.disk_bytes * 0.9
            if full or stats["blocks"] <= blocks:
                return max(1, int(stats["blocks"]) // turns.turn_blocks - 1)
            blocks = stats["blocks"]
            self._say(f"filling: {stats['slab_bytes'] >> 20} MiB")
            turns.write()

    def _against_disk(
        self, metric: str, ours: Callable[[], float], kind: str, rounds: int | None = None
    ) -> None:
        def bare() -> float:
            return self._raw.turn(kind, *self._best[kind])

        peer = f"O_DIRECT p{kind}v"
        self._pairs(metric, ours, bare, rounds or self._settings.rounds, peer)

    def _pairs(
        self,
        metric: str,
        ours: Callable[[], float],
        limit: Callable[[], float],
        rounds: int,
        peer: str,
    ) -> None:
        """Add the median of paired ratios, with quartiles, and both rates."""
        console = self._report.console
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"{self._name}: {metric}", total=rounds + 1)

            def turn() -> float:
                rate = ours()
                progress.advance(task)
                return rate

            samples = alternate(rounds, {"ours": turn, "limit": limit})
        mine, bound = summarise(samples["ours"]), summarise(samples["limit"])
        ratio = summarise([a / b for a, b in zip(samples["ours"], samples["limit"], strict=True)])
        name = self._name
        self._report.add(
            Row(name, metric, mine.median, "GB/s", bound.median, ratio.median, peer, mine.spread,
                rounds),
            Row(name, f"{metric}, paired", ratio.median, "", 1, None, "ratio", ratio.spread,
                rounds),
        )  # fmt: skip

    def _say(self, text: str) -> None:
        self._report.console.print(f"  {self._name}: {text}", highlight=False)

    def close(self) -> None:
        """End the shard and remove its files."""
        self._backend.close()
        shutil.rmtree(self._folder, ignore_errors=True)
