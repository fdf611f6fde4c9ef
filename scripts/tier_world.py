"""An engine with shards, both in this process, as bench_tiers.py and bench_trace.py measure them.

What a group of actors does without Ray's hop, over a disk that can be slowed down or stopped inside
the file layer. Prompts are arrays of token ids; the clock of a request runs from `submit` to the
delta with its first token.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from litecache import CacheConfig
from litecache.storage.disk.files import Files
from litecache.types import Request, SamplingParams, TokenDelta

Tokens = npt.NDArray[np.int64]
GB = 1_000_000_000


class SlowFiles(Files):
    """A folder whose reads are as slow as told, and stop when told.

    Attributes:
        bytes_per_s: of all reads together; 0 = as fast as the disk.
        stall_after: so many bytes from now one read, and all behind it, wait `stall_s`; None = no.
    """

    def __init__(self, bytes_per_s: float = 0.0) -> None:
        self.bytes_per_s = bytes_per_s
        self.stall_after: int | None = None
        self.stall_s = 1.0
        self._free = 0.0
        self._order = threading.Lock()

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, then wait until a disk of that rate would have answered."""
        done = super().read(fd, buffers, offset)
        with self._order:
            now = time.monotonic()
            self._free = max(self._free, now)
            if self.stall_after is not None:
                self.stall_after -= done
                if self.stall_after <= 0:
                    self.stall_after = None
                    self._free += self.stall_s
            if self.bytes_per_s:
                self._free += done / self.bytes_per_s
            wait_s = self._free - now
        if wait_s > 0:
            time.sleep(wait_s)
        return done

    def settle(self) -> None:
        """Wait until what was read so far has been answered."""
        time.sleep(max(0.0, self._free - time.monotonic()))


@dataclass
class Answer:
    """One request: when it was handed over and what came back, seconds of `time.perf_counter`."""

    length: int
    submitted: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    ids: list[int] = field(default_factory=list)
    reused: dict[str, int] = field(default_factory=dict)
    details: Any = None
    error: str | None = None
    done: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)

    @property
    def first_ms(self) -> float:
        """From submission to the first token."""
        return (self.first - self.submitted) * 1e3


class TierEngine:
    """An engine over shards of one folder.

    Args:
        model: config of a geometry; the weights are random.
        config: of the cache; its tiers' bounds are the shards'.
        files: the file system of the first shard, or None for a plain one.

    Attributes:
        beats: set to a list, it collects when tokens came out, once a step.
    """

    def __init__(
        self, model: dict[str, Any], config: CacheConfig, files: SlowFiles | None = None
    ) -> None:
        from litecache.engine.engine import Engine
        from litecache.engine.loading.model_source import ModelSource

        self.config, self._files = config, files
        self._stores: list[Any] = []
        self._clients: list[Any] = []
        self._answers: dict[str, Answer] = {}
        self._number = 0
        self.beats: list[float] | None = None
        source = ModelSource(config=model, weights="random")
        tiered = config.ram_bytes > 0 and config.admission != "none"
        self.engine = Engine(
            source, config, sink=self._receive, shards=self._open() if tiered else ()
        )
        self.block_bytes = sum(self.engine.info.block_bytes)
        self.vocab = int(model["vocab_size"])

    def _open(self) -> list[Any]:
        from litecache.storage.client import LocalShardClient
        from litecache.storage.shard_store import ShardStore

        folders = self.config.shard_folders
        for folder in folders:
            files = None if self._stores or folder is None else self._files
            self._stores.append(
                ShardStore(
                    folder,
                    storage_bytes=self.config.storage_bytes // len(folders) if folder else 0,
                    ram_bytes=self.config.ram_bytes // len(folders),
                    fsync=self.config.fsync,
                    eviction=self.config.eviction,
                    files=files,
                )
            )
        self._clients = [LocalShardClient(s, f"shard{i}") for i, s in enumerate(self._stores)]
        return self._clients

    # Requests

    def _receive(self, deltas: list[tuple[str, TokenDelta]]) -> None:
        now = time.perf_counter()
        if self.beats is not None:
            self.beats.append(now)
        for _, delta in deltas:
            answer = self._answers[delta.request_id]
            if delta.token_ids:
                answer.first = answer.first or now
                answer.last = now
                answer.tokens += len(delta.token_ids)
                answer.ids += delta.token_ids
                answer.started.set()
            if delta.reused_tokens is not None:
                answer.reused, answer.details = delta.reused_tokens, delta
            if delta.finish_reason is not None:
                answer.error = delta.error
                answer.done.set()
                answer.started.set()
                del self._answers[delta.request_id]

    def submit(self, prompt: Tokens, new_tokens: int = 1) -> tuple[str, Answer]:
        """Hand a request over; returns its id and what it will get."""
        self._number += 1
        name = f"{self._number}"
        sampling = SamplingParams(new_tokens, new_tokens, seed=self._number)
        request = Request(name, "bench", prompt, sampling)  # type: ignore[arg-type]
        answer = self._answers[name] = Answer(len(prompt), time.perf_counter())
        self.engine.submit([request])
        return name, answer

    def ask(self, prompt: Tokens, new_tokens: int = 1, timeout_s: float = 300.0) -> Answer:
        """Answer one request."""
        _, answer = self.submit(prompt, new_tokens)
        if not answer.done.wait(timeout_s):
            raise TimeoutError(f"no answer to {len(prompt)} tokens within {timeout_s:g} s")
        if answer.error:
            raise RuntimeError(answer.error)
        return answer

    @contextlib.contextmanager
    def decoding(self, count: int, length: int, rng: np.random.Generator) -> Iterator[None]:
        """So many requests decode meanwhile."""
        limit = self.engine.info.max_model_len - length
        open_ = [self.submit(self.prompt(length, rng), limit) for _ in range(count)]
        for _, answer in open_:
            answer.started.wait(120)
        try:
            yield
        finally:
            self.engine.abort([name for name, _ in open_])
            for _, answer in open_:
                answer.done.wait(60)

    def prompt(self, length: int, rng: np.random.Generator) -> Tokens:
        """Random tokens."""
        return rng.integers(10, self.vocab - 10, size=length)

    # Tiers

    def saving(self, on: bool) -> None:
        """Whether what is computed from now on is saved."""
        policy = self.config.admission if on else "none"
        saves = self.engine._scheduler._saves
        self.engine.call(lambda: setattr(saves, "_admission", policy))

    def tiers(self, on: bool) -> None:
        """Without them the engine neither looks up nor saves, as one that was made without."""
        costs = self.engine._costs if on else None
        self.engine.call(lambda: setattr(self.engine._scheduler._loads, "_cost", costs))
        self.saving(on)

    def forgive(self) -> None:
        """Plan with every source again, also those that were left out."""
        costs = self.engine._costs
        sources = costs._sources.values() if costs is not None else ()
        self.engine.call(lambda: [setattr(source, "out", False) for source in sources])

    def flush(self) -> None:
        """All that was ordered to be saved lies on disk."""
        report = self.engine.flush(120.0)
        if not report["complete"]:
            raise RuntimeError(f"not everything was saved: {report}")

    def clear(self, *tiers: str) -> None:
        """Drop what the pool ("gpu") and the arenas ("ram") hold."""
        if "gpu" in tiers:
            self.engine.clear_pool(120.0)
        if "ram" in tiers:
            for store in self._stores:
                store.clear("ram")

    def keys(self, prompt: Tokens) -> list[bytes]:
        """Of the full blocks of a prompt, every KV group's."""
        from litecache.hashing import chain_keys

        size = self.config.block_size
        full = prompt[: len(prompt) // size * size]
        roots = self.engine.info.roots("")
        return [key for root in roots for key in chain_keys(root, full, size)]

    def stored(self, prompt: Tokens) -> int:
        """How many of its blocks the shards hold."""
        keys = self.keys(prompt)
        held = [client.query(keys) for client in self._clients]
        return sum(any(column) for column in zip(*held, strict=True))

    def fill_ram(self, prompt: Tokens) -> None:
        """Read a prompt's blocks from disk into RAM, without the engine."""
        keys = self.keys(prompt)
        for client in self._clients:
            staged = client.stage(keys)
            slots = [_slot(result) for result in staged if result.slot >= 0]
            client.wait(slots, 120.0)
            client.release(slots)

    def restart_shards(self, config: CacheConfig | None = None) -> None:
        """Close the shards and open them again from what lies on disk, or others."""
        self.flush()
        self.engine.clear_pool(120.0)
        self.config = config or self.config
        old = self._clients, self._stores
        self._stores, self._clients = [], []
        for client in old[0]:
            client.close()
        for store in old[1]:
            store.close()
        self.engine.set_shards(self._open())

    def counter(self, name: str, label: str) -> dict[str, float]:
        """A counter of the engine by one of its labels."""
        return self.engine.metrics.by_label(name, label)

    def close(self) -> None:
        """End it all; the folder stays."""
        self.engine.close()
        for client in self._clients:
            client.close()
        for store in self._stores:
            store.close()


def _slot(result: Any) -> Any:
    from litecache.storage.protocol import SlotRef

    return SlotRef(result.slot, result.generation)


@contextlib.contextmanager
def scratch(parent: Path | None, keep: bool = False) -> Iterator[Path]:
    """A folder for the shards: a temporary one, or a named one that is kept when told."""
    if parent is not None and keep:
        parent.mkdir(parents=True, exist_ok=True)
        yield parent
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-tiers-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_rate(device: str) -> float:
    """Bytes per second from host memory to the pool's device, pinned where that is a GPU."""
    import torch

    nbytes = (256 if device == "cpu" else 1024) << 20
    cuda = device != "cpu"
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        target.copy_(source)
        if cuda:
            torch.cuda.synchronize()
        best = max(best, nbytes / (time.perf_counter() - started))
    return best


def model_limits(config: dict[str, Any]) -> int:
    """The longest sequence of a geometry."""
    return int(config["max_position_embeddings"])


def free_disk_bytes(folder: Path) -> int:
    """What may still be written there."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
