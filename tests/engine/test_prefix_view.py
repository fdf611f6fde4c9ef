from __future__ import annotations

from pathlib import Path

import pytest
from engine_harness import VOCAB, Harness, family_source

from litecache.errors import CapacityError, ConfigError
from litecache.hashing import chain_keys
from litecache.storage.protocol import Place
from litecache.token_ids import TokenIds

PROMPT = [1 + i * 7 % (VOCAB - 2) for i in range(6 * 16 + 5)]


def below(harness: Harness, prompt: list[int], salt: str = "") -> list[list[str]]:
    """Where the harness' shard has each block, as a driver would tell it."""
    (store,), info = harness.stores, harness.engine.info
    found = []
    for root in info.roots(salt):
        places = store.places(chain_keys(root, prompt, info.block_size))
        names = {Place.NOWHERE: "", Place.DISK: "disk:shard0"}
        found.append([names.get(Place(place), "ram:shard0") for place in places])
    return found


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_is_told_of_a_prompt_is_what_it_then_finds(family: str, tmp_path: Path) -> None:
    with Harness(family_source(family), folders=[tmp_path / "s"]) as harness:
        look = harness.engine.view_prefix
        cold = look(TokenIds(PROMPT), "", below(harness, PROMPT))
        assert (cold.known, cold.in_pool, cold.load_s, cold.branches) == (0, 0, None, False)
        assert cold.plan is not None
        assert cold.plan.load_from == cold.plan.load_end
        harness.run([PROMPT], 1)
        assert harness.reused == [{}]
        harness.empty()
        hit = look(TokenIds(PROMPT), "", below(harness, PROMPT))
        assert (hit.known, hit.in_pool, set(hit.sources)) == (6, 6, {"gpu"})
        for tiers, source in ((("gpu",), "ram"), (("gpu", "ram"), "disk")):
            harness.empty(*tiers)
            view = look(TokenIds(PROMPT), "", below(harness, PROMPT))
            assert {name.partition(":")[0] for name in view.sources} == {source}
            assert view.plan is not None
            assert (view.known, view.plan.load_from, view.plan.load_end) == (6, 0, 6)
            assert view.load_s == view.plan.first_token_s
            harness.run([PROMPT], 1)
            assert harness.reused == [{source: 6 * 16}]


def test_a_look_at_a_prompt_changes_nothing(tmp_path: Path) -> None:
    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        harness.run([PROMPT], 1)
        harness.empty("gpu")
        (store,) = harness.stores
        places = below(harness, PROMPT)
        before = harness.engine.stats(), store.stats(), store.metrics.snapshot()
        for prompt in (PROMPT, PROMPT[:40], PROMPT[:20] + PROMPT):
            harness.engine.view_prefix(TokenIds(prompt), "", below(harness, prompt))
        root = harness.engine.info.roots("")[0]
        assert store.has_follower(root)
        assert not store.has_follower(bytes(16))
        assert list(store.namespaces().values()) == [6]
        assert below(harness, PROMPT) == places
        assert (harness.engine.stats(), store.stats(), store.metrics.snapshot()) == before


def test_a_prompt_that_parts_from_a_known_one_is_told_where(tmp_path: Path) -> None:
    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        harness.run([PROMPT], 1)
        harness.empty()

        def look(prompt: list[int]) -> tuple[int, int, bool]:
            view = harness.engine.view_prefix(TokenIds(prompt), "", below(harness, prompt))
            return view.known, view.shared_tokens, view.branches

        other = [*PROMPT[:39], VOCAB - 1, *PROMPT[40:]]
        assert look(other) == (2, 7, True)
        harness.run([other], 1)
        assert harness.reused == [{"gpu": 39}]
        assert look([*PROMPT[:32], VOCAB - 1, *PROMPT[33:]]) == (2, 0, True)
        assert look([VOCAB - 1, *PROMPT[1:]]) == (0, 0, True)
        assert look(PROMPT[:10]) == (0, 10, False)


def test_keys_of_another_salt_are_found_when_they_are_asked_for() -> None:
    with Harness(family_source("llama"), folders=[None]) as harness:
        harness.run([PROMPT], 1)
        info = harness.engine.info
        mine, theirs = (
            chain_keys(info.roots(salt)[0], PROMPT[:16], 16)[0] for salt in ("", "theirs")
        )
        view = harness.engine.view_prefix(
            TokenIds(PROMPT), "theirs", below(harness, PROMPT, "theirs"), [mine, theirs]
        )
        assert (view.known, view.branches) == (0, False)
        assert view.others_known == (True, False)


def test_an_engine_without_tiers_tells_its_pool_and_bad_prompts_are_refused() -> None:
    with Harness(family_source("llama"), max_model_len=128) as harness:
        look = harness.engine.view_prefix
        view = look(TokenIds(PROMPT), "", [[""] * 6])
        assert (view.known, view.plan, view.compute_s) == (0, None, None)
        with pytest.raises(ConfigError, match="below"):
            look(TokenIds(PROMPT), "", [[""] * 5])
        with pytest.raises(ConfigError, match="input_ids"):
            look(TokenIds([VOCAB]), "", [[]])
        with pytest.raises(CapacityError, match="takes 128"):
            look(TokenIds([1] * 200), "", [[""] * 12])
