"""What RAM and disk are worth to one model on one machine: first tokens by where a prefix lies.

An engine with one shard in this process, over a scratch folder. Lengths double until the time, the
disk or the model ends; what was measured by then is told.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from litecache.config import CacheConfig
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.tier_engine import TierEngine, Tokens, copy_rate
from litecache.errors import CapacityError, ConfigError, RequestTimeout
from litecache.storage.disk.raw_disk import MIB, RawDisk

Progress = Callable[[str, int, int], None]

QUESTION_TOKENS = 16
SHORTEST_TOKENS = 128
# Each length's rounds, after one that is not counted: it teaches the cost model.
ROUNDS = 2
# A length twice as long takes so much longer at most, and each is asked cold so often.
_GROWTH, _COLD_ASKS = 3.0, ROUNDS + 2
_RAW_TURN_BYTES, _RAW_TURNS = 64 * MIB, 2
_LEAST_DISK_BYTES = 4 * _RAW_TURNS * _RAW_TURN_BYTES
_ARENA_SHARE = 0.8


class ColdCurve:
    """Milliseconds of a cold prompt by its length: `a + b n + c n^2`, fitted to what was measured.

    The fit is of relative errors, so that short prompts count as much as long ones.
    """

    def __init__(self) -> None:
        self._samples: dict[int, list[float]] = {}

    def add(self, length: int, ms: float) -> None:
        """A cold prompt has taken so long."""
        self._samples.setdefault(length, []).append(ms)

    def __call__(self, lengths: Any) -> Any:
        """What prompts of these lengths take."""
        points = {n: statistics.median(ms) for n, ms in self._samples.items()}
        at = np.array(sorted(points), dtype=float)
        ms = np.array([points[int(n)] for n in at])
        degree = min(2, len(at) - 1)
        law = np.polynomial.polynomial.polyfit(at / at[-1], ms, degree, w=1 / ms)
        fitted = np.polynomial.polynomial.polyval(np.asarray(lengths) / at[-1], law)
        return np.maximum(fitted, 0.0)


@dataclass(frozen=True)
class LengthTimes:
    """First tokens of a prompt: a prefix of `tokens` and a question behind it.

    Attributes:
        cold_ms: nothing is known of it; the median, as of the others.
        pool_ms, ram_ms, disk_ms: the prefix lies there.
        ram_loaded, disk_loaded: tokens of it that were loaded; the others were computed meanwhile,
            since that was sooner.
    """

    tokens: int
    cold_ms: float
    pool_ms: float
    ram_ms: float
    disk_ms: float
    ram_loaded: int
    disk_loaded: int


@dataclass(frozen=True)
class TierWorth:
    """All that was measured.

    Attributes:
        token_bytes: of KV in RAM and on disk.
        load_s: until the model was there.
        disk_read_gbps, disk_write_gbps: of the bare disk with O_DIRECT; None = it is refused.
        copy_gbps: from RAM to the device.
        times: by length.
        prefill_tokens_s: of the longest cold prompt.
        break_even: by tier, the prefix from which on loading all of it at these rates is sooner
            than computing it; None = none up to the longest one.
        stopped: why no longer prefix was measured.
    """

    model: str
    device: str
    form: str
    block_size: int
    token_bytes: float
    load_s: float
    disk_read_gbps: float | None
    disk_write_gbps: float | None
    copy_gbps: float
    times: tuple[LengthTimes, ...]
    prefill_tokens_s: float
    break_even: dict[str, int | None]
    stopped: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def measure_worth(
    source: ModelSource,
    config: CacheConfig,
    folder: str,
    *,
    disk_bytes: int,
    seconds: float,
    lengths: Sequence[int] = (),
    progress: Progress = lambda what, done, total: None,
) -> TierWorth:
    """Measure a model with its tiers in an empty folder, which the caller removes.

    Args:
        source: the model.
        config: its settings; where they name tiers, their sizes are replaced.
        folder: on the disk to be measured.
        disk_bytes: taken of it at most.
        seconds: for all but loading the model.
        lengths: of prefixes, in tokens; none = they double from 128 on.
        progress: is told what is done, and how much of how much.

    Raises:
        ConfigError: a length or `disk_bytes` is too small, or a length too large.
        CapacityError: not even the shortest prefix could be measured in time.
        LiteCacheError: the model is refused, or the disk is full.
    """
    if disk_bytes < _LEAST_DISK_BYTES:
        raise ConfigError("disk_bytes", disk_bytes, f"at least {_LEAST_DISK_BYTES:,}")
    progress("disk", 0, 1)
    rates = _disk_rates(os.path.join(folder, "raw"))
    ram_bytes = min(config.ram_bytes, disk_bytes)
    tiered = dataclasses.replace(
        config,
        storage_dir=(folder,),
        storage_bytes=disk_bytes,
        ram_bytes=ram_bytes,
        admission="all",
        storage_write_bytes_per_s=None,
    )
    progress("loading the model", 0, 1)
    started = time.monotonic()
    world = TierEngine(source, tiered)
    try:
        load_s = time.monotonic() - started
        run = _Run(world, min(ram_bytes * _ARENA_SHARE, disk_bytes / 2), seconds, progress)
        copy_gbps = copy_rate(world.engine.info.device) / 1e9
        times, stopped = run.all(lengths)
        info = world.engine.info
        return TierWorth(
            model=source.short_name,
            device=info.device,
            form=f"{info.kv_dtype}, {info.tier_codec} below" if info.tier_codec else info.kv_dtype,
            block_size=info.block_size,
            token_bytes=run.token_bytes,
            load_s=load_s,
            disk_read_gbps=rates.get("read"),
            disk_write_gbps=rates.get("write"),
            copy_gbps=copy_gbps,
            times=tuple(times),
            prefill_tokens_s=(times[-1].tokens + QUESTION_TOKENS) / times[-1].cold_ms * 1e3,
            break_even={
                tier: break_even(times, run.curve, info.block_size, run.token_bytes, gbps)
                if gbps
                else None
                for tier, gbps in (("ram", copy_gbps), ("disk", rates.get("read")))
            },
            stopped=stopped,
        )
    finally:
        world.close()


def _disk_rates(path: str) -> dict[str, float]:
    """GB/s by "read" and "write" of the bare disk; nothing where O_DIRECT is refused."""
    try:
        disk = RawDisk(path, _RAW_TURNS * _RAW_TURN_BYTES, _RAW_TURN_BYTES)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return {}
        raise
    try:
        return {
            kind: statistics.median(disk.turn(kind, 4, 8 * MIB) for _ in range(2 * _RAW_TURNS))
            for kind in ("write", "read")
        }
    finally:
        disk.close()


class _Run:
    """The prompts of one engine, length after length, until the time is over.

    Attributes:
        curve: of the cold prompts so far.
        token_bytes: of KV in RAM and on disk.
    """

    def __init__(
        self, world: TierEngine, tier_bytes: float, seconds: float, progress: Progress
    ) -> None:
        self._world, self._progress = world, progress
        self._deadline, self._seconds = time.monotonic() + seconds, seconds
        self._rng = np.random.default_rng()
        self.curve = ColdCurve()
        info = world.engine.info
        self.token_bytes = world.block_bytes / info.block_size
        room = min(info.max_model_len, info.capacity_tokens // 2) - QUESTION_TOKENS - 1
        self._longest = int(min(room, tier_bytes / self.token_bytes))
        self._longest -= self._longest % info.block_size

    def all(self, lengths: Sequence[int]) -> tuple[list[LengthTimes], str]:
        """Times by length, and why there are no more."""
        info = self._world.engine.info
        for length in lengths:
            if length < info.block_size or length > self._longest:
                valid = f"from {info.block_size} to {self._longest} tokens here"
                raise ConfigError("lengths", length, valid)
        wanted = sorted(lengths) or self._doubling()
        if not wanted:
            raise CapacityError(
                f"the model, the pool, RAM or disk has room for a prefix of {self._longest} tokens "
                f"alone: at least {info.block_size} are needed"
            )
        times: list[LengthTimes] = []
        for number, length in enumerate(wanted):
            if times:
                next_s = times[-1].cold_ms / 1e3 * (length / times[-1].tokens) ** np.log2(_GROWTH)
                if next_s * _COLD_ASKS > self._deadline - time.monotonic():
                    return times, f"{length:,} tokens would not have ended within the time"
            try:
                times.append(self._measure(length, number, len(wanted)))
            except RequestTimeout:
                if not times:
                    raise CapacityError(
                        f"not even {length} tokens could be measured within {self._seconds:g} s"
                    ) from None
                return times, f"the time was over at {length:,} tokens"
        return times, "" if lengths else f"there is room for {self._longest:,} tokens"

    def _doubling(self) -> list[int]:
        lengths = []
        length = min(SHORTEST_TOKENS, self._longest)
        while self._world.engine.info.block_size <= length <= self._longest:
            lengths.append(length)
            length *= 2
        return lengths

    def _measure(self, length: int, number: int, total: int) -> LengthTimes:
        world = self._world
        prefix = world.prompt(length, self._rng)
        self._ask(prefix, save=True)
        world.flush()
        samples: dict[str, list[float]] = {}
        loaded: dict[str, int] = {}
        for turn in range(-1, ROUNDS):
            for kind in ("cold", "ram", "pool", "disk"):
                done = number * (ROUNDS + 1) + turn + 1
                self._progress(f"{length:,} tokens, {kind}", done, total * (ROUNDS + 1))
                if kind != "pool":
                    world.clear("gpu")
                if kind == "ram":
                    world.fill_ram(prefix)
                if kind == "disk":
                    world.clear("ram")
                prompt = world.prompt(length, self._rng) if kind == "cold" else prefix
                ms, reused = self._ask(prompt)
                if turn >= 0:
                    samples.setdefault(kind, []).append(ms)
                    loaded[kind] = sum(n for tier, n in reused.items() if tier != "gpu")
                    if kind == "cold":
                        self.curve.add(length, ms)
        middle = {kind: statistics.median(each) for kind, each in samples.items()}
        return LengthTimes(
            tokens=length,
            cold_ms=middle["cold"],
            pool_ms=middle["pool"],
            ram_ms=middle["ram"],
            disk_ms=middle["disk"],
            ram_loaded=loaded["ram"],
            disk_loaded=loaded["disk"],
        )

    def _ask(self, prefix: Tokens, *, save: bool = False) -> tuple[float, dict[str, int]]:
        """Milliseconds to the first token behind a prefix and a new question; what was reused."""
        question = self._world.prompt(QUESTION_TOKENS, self._rng)
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise RequestTimeout("the time is over")
        prompt = np.concatenate([prefix, question])
        answer = self._world.ask(prompt, timeout_s=left_s, save=save)
        return answer.first_ms, answer.reused


def break_even(
    times: Sequence[LengthTimes], curve: ColdCurve, block_size: int, token_bytes: float, gbps: float
) -> int | None:
    """The shortest prefix from which on loading all of it is sooner than computing it.

    Args:
        times: what was measured, by length.
        curve: of cold prompts.
        block_size: tokens of a block.
        token_bytes: of KV, as it is loaded.
        gbps: at which it is loaded.

    Returns:
        Tokens, whole blocks; None where the longest prefix that was measured is not sooner.
    """
    at = np.arange(block_size, times[-1].tokens + 1, block_size)
    pool_ms = np.interp(at, [t.tokens for t in times], [t.pool_ms for t in times])
    sooner = pool_ms + at * token_bytes / gbps / 1e6 < curve(at)
    if not sooner[-1]:
        return None
    later = np.flatnonzero(~sooner)
    return int(at[later[-1] + 1 if len(later) else 0])
