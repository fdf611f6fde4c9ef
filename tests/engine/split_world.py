"""Prompts with shared beginnings, split between loading and computing wherever they can be.

One engine has every tier: its pool, RAM and disks of two shards. A second one finds nothing at home
and asks those shards as an engine of another node does. What they say is compared with an engine
without tiers, and that with stock transformers.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_harness import Harness, family_source
from plan_driver import random_prompt, stock_generate, tiny_model

from litecache.hashing import BlockKey
from litecache.storage.client import LocalShardClient

BLOCK_SIZE = 16
NEW_TOKENS = 3
# Chunks of two blocks: a load of ten is met after several of them.
SMALL_STEPS = {"max_batch_tokens": 32, "max_prefill_tokens": 32}
SOURCES = ("ram", "disk", "mixed", "remote")


def shared_prefixes(count: int, rng: random.Random) -> list[list[int]]:
    """Prompts that share beginnings of any length with each other."""
    heads = [random_prompt(176, seed=seed) for seed in range(3)]
    return [
        rng.choice(heads)[: rng.randrange(176)] + random_prompt(rng.randrange(1, 40), seed=100 + n)
        for n in range(count)
    ]


def tokens_without_tiers(family: str, prompts: Sequence[list[int]]) -> list[list[int]]:
    """What an engine without tiers gives."""
    with Harness(family_source(family), **SMALL_STEPS) as harness:
        return harness.run(prompts, NEW_TOKENS)


class OtherNode:
    """Shards as the engines of other nodes ask them."""

    def __init__(self, clients: Sequence[LocalShardClient]) -> None:
        self._clients = {f"far {client.shard_id}": client for client in clients}

    def locate(self, keys: Sequence[BlockKey]) -> list[str | None]:
        """Which shard has each."""
        places: list[str | None] = [None] * len(keys)
        for shard_id, client in self._clients.items():
            held = client.query(keys)
            places = [shard_id if there else p for there, p in zip(held, places, strict=True)]
        return places

    def fetch(self, shard_id: str, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Their bytes."""
        return [data for _, data in self._clients[shard_id].store.fetch(keys)]


class Splits:
    """Two engines of a family with every tier between them.

    Args:
        family: of `plan_driver.FAMILIES`.
        count: of prompts.
        folders: of two shards.
        seed: of prompts and order.

    Attributes:
        runs: prompts that ran, by where their blocks lay.
        reused: tokens of theirs that were reused, by tier.
        split: prompts of which some blocks were loaded and others, found as well, computed.
        wrong: what was given instead of what engine and transformers give without tiers.
    """

    def __init__(self, family: str, count: int, folders: Sequence[Path], seed: int = 0) -> None:
        self._family, self._rng = family, random.Random(f"{family} {seed}")
        self.prompts = shared_prefixes(count, self._rng)
        self._wanted = tokens_without_tiers(family, self.prompts)
        self._place = 0
        self.runs: Counter[str] = Counter()
        self.reused: Counter[str] = Counter()
        self.split = 0
        self.wrong: list[str] = []
        source = family_source(family)

        def place(first: int, end: int) -> int:
            return self._place

        self._engines = contextlib.ExitStack()
        add = self._engines.enter_context
        self._home = add(Harness(source, folders=folders, loads=place, **SMALL_STEPS))
        far = OtherNode(self._home.clients)
        self._away = add(Harness(source, folders=[None], loads=place, remote=far, **SMALL_STEPS))
        for harness in (self._home, self._away):
            harness.engine._overlap = 1  # the next step is planned while one runs, as on a GPU
        self._home.run(self.prompts, NEW_TOKENS)
        self._home.engine.flush()

    def compare_with_transformers(self) -> None:
        """Ask stock transformers what the prompts give."""
        loaded = tiny_model(self._family)
        for number, prompt in enumerate(self.prompts):
            stock = stock_generate(loaded, prompt, NEW_TOKENS)
            if stock != self._wanted[number]:
                self.wrong.append(f"prompt {number} without tiers: transformers give {stock}")

    def run_all(self, together: int = 4) -> None:
        """Every prompt at every place, `together` at once; each place from another source."""
        order = list(range(len(self.prompts)))
        self._rng.shuffle(order)
        sources = itertools.cycle(SOURCES)
        for first in range(0, len(order), together):
            group = order[first : first + together]
            blocks = max(len(self.prompts[number]) for number in group) // BLOCK_SIZE
            for self._place in range(blocks + 1):
                self._run(group, next(sources))

    def _run(self, group: Sequence[int], source: str) -> None:
        harness = self._home if source != "remote" else self._away
        harness.empty("gpu")
        if source == "remote":
            harness.stores[0].clear("all")
        elif source != "ram":
            harness.empty("ram")
        if source == "mixed":
            # some of it in RAM, some in the pool, too, most on disk alone
            self._run_part(harness)
            harness.empty("gpu")
            self._run_part(harness)
        numbers = [n for n in group if len(self.prompts[n]) >= BLOCK_SIZE * self._place]
        given = harness.run([self.prompts[number] for number in numbers], NEW_TOKENS)
        self.runs[source] += len(numbers)
        for number, tokens in zip(numbers, given, strict=True):
            if tokens != self._wanted[number]:
                self.wrong.append(f"prompt {number} from {source} at {self._place}: {tokens}")
        for found, reused in zip(harness.found, harness.reused, strict=True):
            self.reused.update(reused)
            loaded = sum(reused.values()) - reused.get("gpu", 0)
            self.split += 0 < loaded < sum(found.values()) - found.get("gpu", 0)

    def _run_part(self, harness: Harness) -> None:
        prompt = self._rng.choice(self.prompts)
        harness.run([prompt[: self._rng.randint(1, len(prompt))]], 1)

    def __enter__(self) -> Splits:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._engines.__exit__(*raised)
