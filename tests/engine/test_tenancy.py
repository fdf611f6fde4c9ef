"""Salts: no tier, and nothing that is told of one, shows another tenant what somebody computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from engine_harness import Harness, family_source
from plan_driver import random_prompt

from litecache.actors.locations import LocationMap, LocationReport
from litecache.actors.router import Placement, ReplicaLoad, RoutedPrompt, Router
from litecache.engine.engine_info import EngineInfo
from litecache.hashing import BlockKey, chain_keys
from litecache.storage.client import LocalShardClient
from litecache.storage.namespaces import salt_digest
from litecache.storage.shard_store import ShardStore
from litecache.types import Request, SamplingParams

PROMPT = random_prompt(96, seed=5)
TIERS = ("gpu", "ram", "disk")


def request(salt: str, prompt: list[int] = PROMPT, tokens: int = 4) -> Request:
    return Request("", "c", prompt, SamplingParams(tokens), cache_salt=salt)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    folder = tmp_path_factory.mktemp("tenancy")
    quotas = {"alice": 4}
    with Harness(family_source("llama"), folders=[folder], salt_pool_quotas=quotas) as made:
        yield made


@pytest.mark.parametrize("tier", TIERS)
def test_no_tier_gives_a_tenant_what_another_computed(harness: Harness, tier: str) -> None:
    for salt in ("", "bob"):
        (wanted,) = harness.serve([request(salt)])
    assert harness.engine.flush()["complete"]
    for gone in TIERS[: TIERS.index(tier)]:
        harness.empty(gone)
    # the owner finds it there, and who has another salt, or hardly another one, finds nothing
    for salt in ("eve", "bob ", "Bob", "bo", "bob\0"):
        assert harness.serve([request(salt)]) == [wanted]
        assert (harness.reused, harness.found) == ([{}], [{}])
        harness.engine.delete_salt(salt)
        harness.stores[0].delete_salt(salt_digest(salt))
    assert harness.serve([request("bob")]) == [wanted]
    assert list(harness.reused[0]) == [tier]


def test_a_tenant_learns_nothing_from_a_part_of_a_block_or_from_who_computes_it(
    harness: Harness,
) -> None:
    prompt = random_prompt(50, seed=9)
    # at the same time: neither waits for the other's blocks, nor copies a beginning of them
    both = harness.serve([request("one", prompt, 12), request("two", prompt, 12)])
    assert both[0] == both[1]
    assert harness.reused == [{}, {}]
    harness.serve([request("three", prompt[:41])])
    assert harness.reused == [{}]
    harness.serve([request("one", prompt[:41])])
    assert harness.reused == [{"gpu": 40}]


def test_neither_locations_nor_routing_tell_of_another_salts_blocks(harness: Harness) -> None:
    info: EngineInfo = harness.engine.info

    def keys(salt: str) -> list[BlockKey]:
        return chain_keys(info.roots(salt)[0], PROMPT, info.block_size)

    assert not set(keys("bob")) & set(keys("eve"))
    located = LocationMap()
    located.report(LocationReport("s0", "n0", 1, 0, keys("bob"), part=0, last=True))
    assert located.locate(keys("bob")) == ["s0"] * 6
    assert located.locate(keys("eve")) == [None] * 6
    assert located.prefix_by_node(keys("eve")) == {"n0": 0}
    for first in ("bob", "eve"):
        # wherever the other's went, this one's goes where it would have gone alone
        router = Router(info.block_size)
        for index in range(2):
            router.report(index, f"n{index}", ReplicaLoad(queued_tokens=10 * (1 - index)))
        if first == "bob":
            assert router.place(RoutedPrompt(keys("bob"), len(PROMPT)), {}) == Placement(1)
            router.report(1, "n1", ReplicaLoad(queued_tokens=20))
            assert router.place(RoutedPrompt(keys("bob"), len(PROMPT)), {}) == Placement(1)
            router.report(1, "n1", ReplicaLoad(queued_tokens=20))
            router.report(0, "n0", ReplicaLoad(queued_tokens=10))
        else:
            router.report(1, "n1", ReplicaLoad(queued_tokens=20))
        assert router.place(RoutedPrompt(keys("eve"), len(PROMPT)), {}) == Placement(0)


def test_a_salt_keeps_to_its_share_of_the_pool_and_others_lose_nothing(harness: Harness) -> None:
    harness.empty("gpu")
    others = random_prompt(96, seed=21)
    (wanted,) = harness.serve([request("bob", others)])
    for seed in range(22, 26):
        prompt = random_prompt(96, seed=seed)
        # more than its quota while it runs, and no more than that afterwards
        assert harness.serve([request("alice", prompt)]) == harness.serve([request("b", prompt)])
    pool = harness.engine._scheduler.cache.pools[0]
    root = harness.engine.info.roots("alice")[0]
    assert harness.engine.call(lambda: pool._owned[root]) == 4
    harness.engine.check_integrity()
    harness.serve([request("alice", prompt)])
    assert harness.reused[0]["gpu"] == 64  # the head of what came last
    assert harness.serve([request("bob", others)]) == [wanted]
    assert harness.reused == [{"gpu": 96}]


def test_a_salt_with_quotas_in_all_tiers_gets_the_same_tokens(tmp_path: Path) -> None:
    prompts = [random_prompt(80, seed=seed) for seed in range(30, 34)]
    with Harness(family_source("llama")) as harness:
        wanted = [harness.serve([request("", prompt)])[0] for prompt in prompts]
    quotas = {salt_digest("alice"): 32 << 10}
    options = {"storage_bytes": 8 << 20, "ram_bytes": 4 << 20}
    folder = str(tmp_path / "s")
    with (
        ShardStore(folder, quotas=quotas, ram_quotas=quotas, **options) as store,
        closing(LocalShardClient(store)) as client,
        Harness(family_source("llama"), shards=[client], salt_pool_quotas={"alice": 1}) as harness,
    ):
        for _ in range(2):
            for prompt, tokens in zip(prompts, wanted, strict=True):
                assert harness.serve([request("alice", prompt)]) == [tokens]
        harness.engine.flush()
        harness.engine.check_integrity()
        store.check_integrity()
        (each,) = harness.engine.info.block_bytes
        stats = store.stats()
        assert 0 < int(stats["disk_blocks"]) * each <= 32 << 10
        assert 0 < int(stats["ram_slots"]["clean"]) * each <= 32 << 10
