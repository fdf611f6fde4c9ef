"""A long soak of the engine: random requests, aborts and priorities over a tiny model.

    python scripts/soak_engine.py [--requests 10000] [--seed 0] [--json FILE]

The engine runs in this process over a pool that is far too small for the load, with a RAM tier
below it, so that preemption, eviction, saving and loading all happen. At the end no block may be
in use, no request unanswered, every book in order; greedy outputs of a sample of 200 requests are
compared with stock transformers in float32, penalties, biases and forbidden tokens included, and so
are the logits of 200 of those that ask for them, many of which go on from earlier ones. Exits 1
when anything is wrong.

The share of slots that are taken and empty is told, too: about half a block per running request,
which is much of this tiny pool (tests/engine/test_pool_waste.py measures usual lengths).
"""

from __future__ import annotations

import argparse
import copy
import json
import queue
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_common import machine_info
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import LlamaConfig, LogitsProcessor, LogitsProcessorList

from litecache.config import CacheConfig
from litecache.engine.engine import Engine
from litecache.engine.loading.model_loader import random_model
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.running.hf_attention import register
from litecache.storage.client import LocalShardClient
from litecache.storage.shard_store import ShardStore
from litecache.types import FinishReason, Request, SamplingParams, TokenDelta

VOCAB = 211
IN_FLIGHT = 48
SAMPLE = 200
STUCK_S = 120.0


def tiny_llama() -> LlamaConfig:
    """Two layers, weights wide enough that greedy choices are no ties."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )


def hf_rules(sampling: SamplingParams) -> dict[str, Any]:
    """What transformers calls a request's rules."""
    words = [list(ids) for ids in sampling.bad_words_ids]
    return {
        "min_new_tokens": sampling.min_new_tokens,
        "repetition_penalty": float(sampling.repetition_penalty),
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size,
        "bad_words_ids": words or None,
        "suppress_tokens": list(sampling.suppress_tokens) or None,
        "begin_suppress_tokens": list(sampling.begin_suppress_tokens) or None,
        "sequence_bias": [[list(ids), bias] for ids, bias in sampling.sequence_bias] or None,
    }


class OutputPenalties(LogitsProcessor):  # type: ignore[misc]
    """Presence and frequency penalties, which transformers does not have."""

    def __init__(self, request: Request) -> None:
        self.prompt, self.sampling = len(request.prompt), request.sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(scores)
        output = input_ids[:, self.prompt :]
        counts.scatter_add_(1, output, torch.ones_like(output, dtype=scores.dtype))
        scores = scores - self.sampling.frequency_penalty * counts
        return scores - self.sampling.presence_penalty * (counts > 0)


class Soak:
    """The load generator and its books."""

    def __init__(self, seed: int, total: int) -> None:
        self.rng = random.Random(seed)
        self.total = total
        self.deltas: queue.Queue[list[tuple[str, TokenDelta]]] = queue.Queue()
        self.store = ShardStore(None, ram_bytes=8 << 20)
        self.client = LocalShardClient(self.store)
        source = ModelSource(config=tiny_llama().to_dict(), weights="random", seed=0)
        config = CacheConfig(
            num_blocks=36, device="cpu", dtype="float32", max_requests=16, max_batch_tokens=128
        )
        self.engine = Engine(source, config, sink=self.deltas.put, shards=[self.client])
        self.prefixes = [self.tokens(self.rng.randrange(16, 120)) for _ in range(40)]
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[FinishReason, int] = {}
        self.rows: list[list[int]] = [[]]
        self.to_check: list[tuple[Request, list[int]]] = []
        self.logits_to_check: list[tuple[Request, bytes]] = []
        self.problems: list[str] = []
        self.waste: list[float] = []

    def tokens(self, count: int) -> list[int]:
        return self.rng.choices(range(VOCAB), k=count)

    def make_forward(self, number: int) -> Request:
        """Logits of a new row, of one that goes on from an earlier one, or of a part of that."""
        rng = self.rng
        row = rng.choice(self.rows) if rng.random() < 0.8 else rng.choice(self.prefixes)
        row = row[: rng.choice([len(row), len(row), rng.randrange(len(row) + 1)])]
        row = [*row[:200], *self.tokens(rng.choice([1, 1, 1, 5, 40]))]
        self.rows = [*self.rows[-15:], row]
        wanted = rng.choice([1, 1, rng.randrange(1, len(row) + 1)])
        salt = rng.choice(["", "", "tenant"])
        name, sampling = f"r{number}", SamplingParams(0)
        return Request(name, "soak", tuple(row), sampling, cache_salt=salt, logits=wanted)

    def make_request(self, number: int) -> Request:
        rng = self.rng
        if rng.random() < 0.4:
            return self.make_forward(number)
        prompt = rng.choice(self.prefixes) if rng.random() < 0.7 else []
        prompt = prompt[: rng.randrange(len(prompt) + 1)] + self.tokens(rng.randrange(1, 30))
        greedy = rng.random() < 0.6
        length = rng.randrange(1, 48)
        eos = (rng.randrange(VOCAB),) if rng.random() < 0.3 else ()
        sampling = SamplingParams(
            length,
            **self.make_rules(eos),
            min_new_tokens=min(rng.choice([0, 0, 4]), length),
            logprobs=rng.choice([None, None, 0, 3]),
            temperature=0.0 if greedy else rng.uniform(0.2, 2.0),
            top_k=rng.choice([0, 0, 1, 5, 50]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.1]),
            seed=rng.randrange(2**31),
            eos_token_ids=eos,
        )
        return Request(
            f"r{number}",
            "soak",
            tuple(prompt),
            sampling,
            priority=rng.randrange(3),
            cache_salt=rng.choice(["", "", "tenant"]),
        )

    def make_rules(self, eos: tuple[int, ...]) -> dict[str, Any]:
        """Half of the requests have no rules, the others some of all kinds."""
        rng = self.rng
        if rng.random() < 0.5:
            return {}
        rules: dict[str, Any] = {
            "repetition_penalty": rng.choice([1.0, 1.3, 0.8]),
            "presence_penalty": rng.choice([0.0, 0.0, 0.6]),
            "frequency_penalty": rng.choice([0.0, 0.0, 0.3]),
            "no_repeat_ngram_size": rng.choice([0, 0, 2, 3]),
        }
        if rng.random() < 0.4:
            words = [self.tokens(rng.randrange(1, 4)) for _ in range(5)]
            # The adapter leaves an end token alone out of the bad words, as transformers does.
            rules["bad_words_ids"] = tuple(tuple(word) for word in words if tuple(word) != eos)
        if rng.random() < 0.4:
            rules["sequence_bias"] = (((rng.randrange(VOCAB),), rng.uniform(-4, 4)),)
        if rng.random() < 0.4:
            rules["suppress_tokens"] = tuple(self.tokens(10))
            rules["begin_suppress_tokens"] = tuple(self.tokens(10))
        return rules

    def sample_waste(self) -> None:
        """Note how many of the pool's taken slots hold no token."""

        def look() -> float:
            scheduler = self.engine._scheduler
            (pool,) = scheduler.cache.pools
            # Blocks of several requests count once, with the tokens that they hold.
            filled: dict[int, int] = {}
            for seq in scheduler._queues.running:
                for index, block in enumerate(seq.tables[0]):
                    tokens = seq.num_computed - index * scheduler.cache.block_size
                    tokens = min(scheduler.cache.block_size, max(tokens, 0))
                    filled[block] = max(filled.get(block, 0), tokens)
            taken = len(filled) * scheduler.cache.block_size
            return (taken - sum(filled.values())) / (pool.num_blocks * scheduler.cache.block_size)

        self.waste.append(self.engine.call(look))

    def run(self, progress: Progress) -> None:
        task = progress.add_task("requests", total=self.total)
        number = done = 0
        open_ids: set[str] = set()
        while done < self.total:
            fresh = []
            while len(open_ids) < IN_FLIGHT and number < self.total:
                request = self.make_request(number)
                self.requests[request.request_id] = request
                self.outputs[request.request_id] = []
                open_ids.add(request.request_id)
                fresh.append(request)
                number += 1
            if fresh:
                self.engine.submit(fresh)
            if self.rng.random() < 0.05:
                self.engine.abort([self.rng.choice(sorted(open_ids))])
            try:
                deltas = self.deltas.get(timeout=STUCK_S)
            except queue.Empty:
                self.problems.append(f"{len(open_ids)} requests got nothing for {STUCK_S} s")
                return
            for _, delta in deltas:
                if delta.request_id not in open_ids:
                    self.problems.append(f"{delta.request_id} spoke after its end")
                    continue
                self.outputs[delta.request_id] += delta.token_ids
                self.check_logprobs(delta)
                if delta.finish_reason is not None:
                    open_ids.discard(delta.request_id)
                    self.finish(delta)
                    done += 1
                    progress.advance(task)
                    if done % 20 == 0 and number < self.total:
                        self.sample_waste()

    def finish(self, delta: TokenDelta) -> None:
        reason = delta.finish_reason
        assert reason is not None
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        request = self.requests.pop(delta.request_id)
        output = self.outputs.pop(delta.request_id)
        if reason is FinishReason.ERROR:
            self.problems.append(f"{delta.request_id}: {delta.error}")
        if reason is FinishReason.LENGTH and len(output) != request.sampling.max_new_tokens:
            self.problems.append(f"{delta.request_id} ended after {len(output)} tokens")
        if request.logits:
            if delta.logits is not None:
                self.logits_to_check.append((request, delta.logits))
                if len(self.logits_to_check) > SAMPLE:
                    self.logits_to_check.pop(self.rng.randrange(SAMPLE))
            elif reason is not FinishReason.ABORT:
                self.problems.append(f"{delta.request_id} has no logits")
        elif reason is not FinishReason.ABORT and request.sampling.temperature == 0:
            # A reservoir, so that early and late requests are equally likely to be compared.
            self.to_check.append((request, output))
            if len(self.to_check) > SAMPLE * 4:
                self.to_check.pop(self.rng.randrange(len(self.to_check)))

    def check_logprobs(self, delta: TokenDelta) -> None:
        wanted = self.requests[delta.request_id].sampling.logprobs
        if len(delta.logprobs) != (0 if wanted is None else len(delta.token_ids)):
            self.problems.append(f"{delta.request_id}: {len(delta.logprobs)} log-probabilities")
        for told in delta.logprobs:
            if len(told.top) != wanted or not told.logprob <= 1e-6:
                self.problems.append(f"{delta.request_id}: log-probabilities {told}")

    def check_books(self) -> dict[str, Any]:
        self.engine.flush()
        self.engine.check_integrity()
        stats = self.engine.stats()
        self.store.check_integrity()
        used = {s: n for s, n in stats["blocks"].items() if n and s not in ("free", "idle")}
        if used or stats["running"] or stats["waiting"]:
            self.problems.append(f"leaked: {used}, {stats['running']}, {stats['waiting']}")
        stats["reused"] = self.engine.metrics.by_label("litecache_reused_tokens", "tier")
        return stats

    def check_greedy(self) -> int:
        """Compare a sample with stock transformers; returns how many were compared."""
        register()
        model = random_model(tiny_llama(), 0, torch.device("cpu"), torch.float32).eval()
        model.set_attn_implementation("sdpa")
        sample = self.rng.sample(self.to_check, min(SAMPLE, len(self.to_check)))
        for request, output in sample:
            config = copy.deepcopy(model.generation_config)
            config.update(
                max_new_tokens=request.sampling.max_new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=list(request.sampling.eos_token_ids) or None,
                **hf_rules(request.sampling),
            )
            ids = torch.tensor([request.prompt])
            mask = torch.ones_like(ids)
            penalties = LogitsProcessorList([OutputPenalties(request)])
            wanted = model.generate(
                ids, attention_mask=mask, generation_config=config, logits_processor=penalties
            )
            if wanted[0, len(request.prompt) :].tolist() != output:
                self.problems.append(f"{request.request_id} has other tokens than transformers")
        return len(sample)

    def check_logits(self) -> int:
        """The same for logits."""
        model = random_model(tiny_llama(), 0, torch.device("cpu"), torch.float32).eval()
        model.set_attn_implementation("sdpa")
        for request, logits in self.logits_to_check:
            with torch.inference_mode():
                wanted = model(torch.tensor([request.prompt])).logits[0, -request.logits :]
            found = torch.frombuffer(bytearray(logits), dtype=torch.float32).view(wanted.shape)
            if not torch.allclose(found, wanted, atol=1e-3, rtol=1e-3):
                self.problems.append(f"{request.request_id} has other logits than transformers")
        return len(self.logits_to_check)

    def close(self) -> None:
        self.engine.close()
        self.client.close()
        self.store.close()


def main() -> int:
    """Soak, check, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    soak = Soak(options.seed, options.requests)
    started = time.perf_counter()
    with Progress() as progress:
        soak.run(progress)
    seconds = time.perf_counter() - started
    stats = soak.check_books()
    compared = soak.check_greedy()
    soak.close()
    rows = {
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "outcomes": {reason.value: count for reason, count in soak.reasons.items()},
        "preemptions": stats["preemptions"],
        "evictions": stats["evictions"],
        "reused tokens": stats["reused"],
        "greedy outputs compared": compared,
        "logits compared": soak.check_logits(),
        "pool slots taken and empty, mean %": round(100 * sum(soak.waste) / len(soak.waste), 2)
        if soak.waste
        else None,
        "problems": soak.problems[:20],
    }
    table = Table("figure", "value")
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine_info(), **rows}, indent=1))
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
