"""An engine with shards, both in this process, whose tiers can be filled and emptied at will.

What a group of actors does without Ray's hop. Prompts are arrays of token ids; the clock of a
request runs from `submit` to the delta with its first token.
"""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from litecache.config import CacheConfig
from litecache.engine.engine import Engine
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import LiteCacheError, RequestTimeout
from litecache.hashing import chain_keys
from litecache.storage.client import LocalShardClient
from litecache.storage.disk.files import Files
from litecache.storage.protocol import SlotRef
from litecache.storage.shard_store import ShardStore
from litecache.threads import take_short_turns
from litecache.token_ids import TokenIds
from litecache.types import Request, SamplingParams, TokenDelta

Tokens = npt.NDArray[np.int64]


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
        source: the model.
        config: of the cache; its tiers' bounds are the shards'.
        files: the file system of the first shard, or None for a plain one.
    """

    def __init__(
        self, source: ModelSource, config: CacheConfig, files: Files | None = None
    ) -> None:
        self.config, self._files = config, files
        self._stores: list[ShardStore] = []
        self._clients: list[LocalShardClient] = []
        self._answers: dict[str, Answer] = {}
        self._number = 0
        tiered = config.ram_bytes > 0 and config.admission != "none"
        shards: dict[str, Any] = {}
        try:
            if tiered:
                shards["shards"] = self._open()
            self.engine = Engine(source, config, sink=self._receive, **shards)
        except BaseException:
            self._close_shards()
            raise
        # as a GpuCache actor does; a look through all of a model takes 0.3 s
        gc.collect()
        gc.freeze()
        take_short_turns()
        self.block_bytes = sum(self.engine.info.block_bytes)
        self.vocab = self.engine.info.vocab_size

    def _open(self) -> list[LocalShardClient]:
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

    def submit(
        self, prompt: Tokens, new_tokens: int = 1, *, save: bool = True
    ) -> tuple[str, Answer]:
        """Hand a request over; returns its id and what it will get.

        Args:
            prompt: token ids.
            new_tokens: exactly so many are drawn.
            save: RAM and disk get what it computes.
        """
        self._number += 1
        name = f"{self._number}"
        sampling = SamplingParams(new_tokens, new_tokens, seed=self._number)
        use = "default" if save else "read-only"
        request = Request(name, "bench", TokenIds(prompt), sampling, cache=use)
        answer = self._answers[name] = Answer(len(prompt), time.perf_counter())
        self.engine.submit([request])
        return name, answer

    def ask(
        self, prompt: Tokens, new_tokens: int = 1, timeout_s: float = 300.0, *, save: bool = True
    ) -> Answer:
        """Answer one request.

        Raises:
            RequestTimeout: not in time; it is aborted.
            LiteCacheError: it ended with an error.
        """
        name, answer = self.submit(prompt, new_tokens, save=save)
        if not answer.done.wait(timeout_s):
            self.engine.abort([name])
            raise RequestTimeout(f"no answer to {len(prompt):,} tokens within {timeout_s:g} s")
        if answer.error:
            raise LiteCacheError(answer.error)
        return answer

    def prompt(self, length: int, rng: np.random.Generator) -> Tokens:
        """Random tokens."""
        return rng.integers(10, self.vocab - 10, size=length)

    # Tiers

    def flush(self) -> None:
        """All that was ordered to be saved lies on disk; LiteCacheError where it does not."""
        report = self.engine.flush(120.0)
        if not report["complete"]:
            raise LiteCacheError(f"not everything was saved: {report}")

    def clear(self, *tiers: str) -> None:
        """Drop what the pool ("gpu") and the arenas ("ram") hold."""
        if "gpu" in tiers:
            self.engine.clear_pool(120.0)
        if "ram" in tiers:
            for store in self._stores:
                store.clear("ram")

    def keys(self, prompt: Tokens) -> list[bytes]:
        """Of the full blocks of a prompt, every KV group's."""
        size = self.config.block_size
        full = prompt[: len(prompt) // size * size]
        roots = self.engine.info.roots("")
        return [key for root in roots for key in chain_keys(root, full, size)]

    def fill_ram(self, prompt: Tokens) -> None:
        """Read a prompt's blocks from disk into RAM, without the engine."""
        keys = self.keys(prompt)
        for client in self._clients:
            staged = client.stage(keys)
            slots = [SlotRef(r.slot, r.generation) for r in staged if r.slot >= 0]
            client.wait(slots, 120.0)
            client.release(slots)

    def close(self) -> None:
        """End it all; the folder stays."""
        gc.unfreeze()
        self.engine.close()
        self._close_shards()

    def _close_shards(self) -> None:
        clients, stores = self._clients, self._stores
        self._clients, self._stores = [], []
        for client in clients:
            client.close()
        for store in stores:
            store.close()


def copy_rate(device: str) -> float:
    """Bytes per second from host memory to the pool's device, pinned where that is a GPU."""
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
