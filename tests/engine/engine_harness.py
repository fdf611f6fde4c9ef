"""An engine in this process, with shards in this process, for tests."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import plan_driver
import torch
from plan_driver import FAMILIES, VOCAB

from litecache.adapter.forward import logits_tensor
from litecache.config import CacheConfig
from litecache.engine.engine import Engine
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.scheduling.cost_model import Loads
from litecache.engine.transfer.shard_set import RemoteSource
from litecache.storage.client import LocalShardClient, ShardClient
from litecache.storage.shard_store import ShardStore
from litecache.types import FinishReason, Request, SamplingParams, TokenDelta, TokenLogprobs

ANSWER_TIMEOUT_S = 60.0


def family_source(family: str, seed: int = 0) -> ModelSource:
    """A tiny random model of a family."""
    fields = {**FAMILIES[family], "model_type": family}
    return ModelSource(config=fields, weights="random", seed=seed)


class Harness:
    """Engine, optional shards, and a blocking `run`; `shards` are clients that others close."""

    def __init__(
        self,
        source: ModelSource,
        *,
        folders: Sequence[Path | None] = (),
        ram_bytes: int = 32 << 20,
        storage_bytes: int = 256 << 20,
        loads: Loads = "all",
        remote: RemoteSource | None = None,
        shards: Sequence[ShardClient] = (),
        num_threads: int = 1,
        **config: object,
    ) -> None:
        self._names = itertools.count()
        self.deltas: queue.Queue[list[tuple[str, TokenDelta]]] = queue.Queue()
        self.stores = [
            ShardStore(
                None if folder is None else str(folder),
                storage_bytes=storage_bytes,
                ram_bytes=ram_bytes,
            )
            for folder in folders
        ]
        clients = [LocalShardClient(store, f"shard{i}") for i, store in enumerate(self.stores)]
        self.clients = clients
        fields: dict[str, object] = {"num_blocks": 256, "dtype": "float32"}
        fields["device"] = plan_driver.DEVICE
        if plan_driver.DEVICE != "cpu":
            fields["max_requests"] = 8  # few graphs to capture
        self.engine = Engine(
            source,
            CacheConfig(**{**fields, **config}),  # type: ignore[arg-type]
            sink=self.deltas.put,
            shards=[*clients, *shards] or None,
            loads=loads,
            remote=remote,
            num_threads=num_threads,
        )
        self.reused: list[dict[str, int]] = []
        self.found: list[dict[str, int]] = []
        self.reasons: list[FinishReason] = []
        self.errors: list[str | None] = []
        self.logprobs: list[list[TokenLogprobs]] = []
        self.logits: list[bytes] = []

    def run(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, **fields: object
    ) -> list[list[int]]:
        """Generate for all prompts at once; `reused`, `reasons`, `errors` are set per prompt."""
        sampling = SamplingParams(max_new_tokens, **fields)  # type: ignore[arg-type]
        return self.serve([Request("", "c", tuple(p), sampling) for p in prompts])

    def forward(
        self, rows: Sequence[Sequence[int]], wanted: Sequence[int], salt: str = ""
    ) -> list[torch.Tensor]:
        """Logits `[wanted, vocab]` of the last positions of each row."""
        info = self.engine.info
        pairs = zip(rows, wanted, strict=True)
        sampling = SamplingParams(0)
        self.serve(
            [Request("", "c", tuple(r), sampling, cache_salt=salt, logits=n) for r, n in pairs]
        )
        assert not any(self.errors), self.errors
        dtype = getattr(torch, info.dtype)
        return [
            logits_tensor(told, count, info.vocab_size, dtype)
            for told, count in zip(self.logits, wanted, strict=True)
        ]

    def serve(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer requests, all at once, under names of their own; others are not listened to."""
        names = [f"r{next(self._names)}" for _ in requests]
        named = zip(requests, names, strict=True)
        self.engine.submit([replace(request, request_id=name) for request, name in named])
        outputs: dict[str, list[int]] = {name: [] for name in names}
        ends: dict[str, TokenDelta] = {}
        reused: dict[str, dict[str, int]] = {}
        found: dict[str, dict[str, int]] = {}
        logprobs: dict[str, list[TokenLogprobs]] = {name: [] for name in names}
        while len(ends) < len(names):
            for _, delta in self.deltas.get(timeout=ANSWER_TIMEOUT_S):
                if delta.request_id not in outputs:
                    continue  # of a request that a test had sent by itself and goes on with
                outputs[delta.request_id] += delta.token_ids
                logprobs[delta.request_id] += delta.logprobs
                if delta.reused_tokens is not None:
                    reused[delta.request_id] = delta.reused_tokens
                    found[delta.request_id] = delta.found_tokens or {}
                if delta.finish_reason is not None:
                    ends[delta.request_id] = delta
        self.reused = [reused.get(name, {}) for name in names]
        self.found = [found.get(name, {}) for name in names]
        self.reasons = [ends[name].finish_reason or FinishReason.ERROR for name in names]
        self.logprobs = [logprobs[name] for name in names]
        self.errors = [ends[name].error for name in names]
        self.logits = [ends[name].logits or b"" for name in names]
        return [outputs[name] for name in names]

    def empty(self, *tiers: str) -> None:
        """Drop what the pool ("gpu") or the arenas ("ram") hold, after it was saved."""
        assert self.engine.flush()["complete"]
        if "gpu" in tiers:
            self.engine.clear_pool()
        if "ram" in tiers:
            for store in self.stores:
                store.clear("ram")

    def check(self) -> None:
        """Every part's books are in order and nothing holds a block."""
        self.engine.flush()  # a copy under way still holds its block
        self.engine.check_integrity()
        blocks = self.engine.stats()["blocks"]
        assert blocks["private"] == blocks["loading"] == blocks["published"] == 0, blocks
        for store in self.stores:
            store.check_integrity()

    def close(self) -> None:
        self.engine.close()
        for client in self.clients:
            client.close()
        for store in self.stores:
            store.close()

    def __enter__(self) -> Harness:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.check()
        finally:
            self.close()


class EngineForward:
    """A `Forward` of the driver's over an engine in this process.

    Attributes:
        reused: of each forward, per row, the tokens that were not computed.
    """

    def __init__(self, harness: Harness) -> None:
        info = harness.engine.info
        self.vocab_size = info.vocab_size
        self.dtype: torch.dtype = getattr(torch, info.dtype)
        self.reused: list[list[int]] = []
        self._harness = harness

    def __call__(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[torch.Tensor]:
        logits = self._harness.forward(rows, wanted)
        self.reused.append([sum(found.values()) for found in self._harness.reused])
        return logits


__all__ = ["VOCAB", "EngineForward", "Harness", "family_source"]
