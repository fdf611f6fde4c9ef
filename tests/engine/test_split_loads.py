"""Loading and computing at once gives the tokens of an engine without tiers, whatever fails."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_harness import Harness, family_source
from plan_driver import random_prompt, stock_generate, tiny_model
from split_world import (
    NEW_TOKENS,
    SMALL_STEPS,
    SOURCES,
    Splits,
    shared_prefixes,
    tokens_without_tiers,
)

from litecache.engine.running.model_runner import StepHandle
from litecache.engine.scheduling.cost_model import CostModel
from litecache.engine.scheduling.orders import StepPlan, StepResult
from litecache.engine.transfer import loader
from litecache.errors import StorageError
from litecache.storage.arena.view import ArenaView
from litecache.storage.client import LocalShardClient, PendingStage
from litecache.storage.protocol import SlotRef, SlotState


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def at_random_places(
    family: str,
    prompts: Sequence[list[int]],
    folders: list[Path],
    rng: random.Random,
    enough: Callable[[], bool] = lambda: True,
) -> int:
    """Run prompts from emptied tiers, again until it is enough; returns the tokens loaded."""
    wanted = tokens_without_tiers(family, prompts)
    loaded = 0
    with Harness(
        family_source(family),
        folders=folders,
        loads=lambda first, end: rng.randint(first, end),
        **SMALL_STEPS,
    ) as harness:
        harness.engine._overlap = 1  # the next step is planned while one runs, as on a GPU
        assert harness.run(prompts, NEW_TOKENS) == wanted
        starts = range(0, len(prompts), 5)
        for start in itertools.chain(starts, itertools.islice(itertools.cycle(starts), 100)):
            harness.empty(*rng.choice([("gpu",), ("gpu", "ram")]))
            part = slice(start, start + 5)
            assert harness.run(prompts[part], NEW_TOKENS) == wanted[part]
            loaded += sum(n for row in harness.reused for tier, n in row.items() if tier != "gpu")
            if start == starts[-1] and enough():
                break
    return loaded


@pytest.mark.parametrize(("family", "count"), [("llama", 40), ("gemma2", 10), ("mistral", 10)])
def test_random_shared_prefixes_split_at_random_places_give_the_same_tokens(
    family: str, count: int, tmp_path: Path
) -> None:
    rng = random.Random(family)
    prompts = shared_prefixes(count, rng)
    assert at_random_places(family, prompts, [tmp_path / "a", tmp_path / "b"], rng) > 16 * count


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_a_prefix_split_at_every_place_gives_the_same_tokens(family: str, tmp_path: Path) -> None:
    prompt = random_prompt(165, seed=3)
    (wanted,) = tokens_without_tiers(family, [prompt])
    place = 0
    with Harness(
        family_source(family),
        folders=[tmp_path / "s"],
        loads=lambda first, end: place,
        **SMALL_STEPS,
    ) as harness:
        harness.run([prompt], NEW_TOKENS)
        for place in range(11):
            harness.empty("gpu")
            assert harness.run([prompt], NEW_TOKENS) == [wanted]
            reused = sum(harness.reused[0].values())
            # A model that slides only goes on behind its window as soon as that has landed.
            assert reused == 160 - 16 * place or (family == "mistral" and reused > 160 - 16 * place)


def test_every_tier_together_and_any_split_give_the_tokens_of_an_engine_without(
    tmp_path: Path,
) -> None:
    # scripts/fuzz_splits.py is the long form
    with Splits("llama", 2, [tmp_path / "a", tmp_path / "b"]) as splits:
        splits.compare_with_transformers()
        splits.run_all()
        assert splits.wrong == []
        assert set(splits.runs) == set(SOURCES)
        assert splits.reused.keys() == {"gpu", "ram", "disk", "remote"}
        assert splits.split > 4


def test_what_a_disk_was_not_to_read_is_found_and_computed_by_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(161, seed=7)
    with Harness(family_source("llama"), folders=[tmp_path / "a", tmp_path / "b"]) as harness:
        wanted = harness.run([prompt], 4)
        assert harness.engine.flush()["complete"]
        for reads, reused in ((3, {"disk": 48}), (0, {}), (10, {"disk": 160})):
            harness.empty("gpu", "ram")
            monkeypatch.setattr(CostModel, "worth_reading", lambda *a, n=reads, **k: n)
            assert harness.run([prompt], 4) == wanted
            assert (harness.reused, harness.found) == ([reused], [{"disk": 160}])
        assert [store.stats()["leases"] for store in harness.stores] == [0, 0]


class Chaos:
    """Shards fail, stall, answer late with other contents, and die, at random but repeatably."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
        self.happened: set[str] = set()
        states, confirm = ArenaView.states, ArenaView.confirm
        stage, release = LocalShardClient.stage_async, LocalShardClient.release

        def strikes(what: str, one_in: float) -> bool:
            if rng.random() * one_in >= 1:
                return False
            self.happened.add(what)
            return True

        def broken_states(arena: ArenaView, slots: Any, generations: Any) -> Any:
            told = states(arena, slots, generations)
            for place in range(len(told)):
                if strikes("failed read", 60):
                    told[place] = SlotState.FAILED
                elif strikes("stall", 1.25):
                    told[place] = SlotState.LOADING
            return told

        def broken_confirm(arena: ArenaView, *leased: Any) -> Any:
            fine = confirm(arena, *leased)
            return fine & np.array([not strikes("changed slot", 8) for _ in fine])

        def broken_stage(
            client: LocalShardClient, keys: Sequence[bytes], **fields: Any
        ) -> PendingStage:
            if strikes("lookup failed", 8):
                raise StorageError("planted")
            return stage(client, keys, **fields)

        def broken_release(client: LocalShardClient, slots: Sequence[SlotRef]) -> None:
            release(client, slots)
            if strikes("release failed", 8):
                raise StorageError("planted")

        monkeypatch.setattr(ArenaView, "states", broken_states)
        monkeypatch.setattr(ArenaView, "confirm", broken_confirm)
        monkeypatch.setattr(LocalShardClient, "stage_async", broken_stage)
        monkeypatch.setattr(LocalShardClient, "release", broken_release)
        monkeypatch.setattr(
            LocalShardClient, "lost", property(lambda self: strikes("shard died", 20))
        )
        monkeypatch.setattr(
            CostModel, "sooner", lambda self, *args, **kwargs: not strikes("take-over", 2)
        )
        monkeypatch.setattr(loader, "LOAD_TIMEOUT_S", 0.05)

    def is_complete(self) -> bool:
        """Everything has happened that can."""
        return len(self.happened) == 7


def test_shards_that_fail_stall_and_die_in_mid_load_cost_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    prompts = shared_prefixes(10, rng)
    with monkeypatch.context() as planted:
        chaos = Chaos(planted, rng)
        folders = [tmp_path / "a", tmp_path / "b"]
        assert at_random_places("llama", prompts, folders, rng, chaos.is_complete) > 0
    assert chaos.is_complete()


def test_what_was_found_and_what_of_it_was_computed_by_plan_is_told_by_tier(tmp_path: Path) -> None:
    prompt = random_prompt(165, seed=3)
    with Harness(
        family_source("llama"), folders=[tmp_path / "s"], loads=lambda first, end: 6
    ) as harness:
        harness.run([prompt], 1)
        assert harness.found == harness.reused == [{}]
        harness.run([prompt], 1)
        assert harness.found == harness.reused == [{"gpu": 160}]
        for tiers, name in ((("gpu",), "ram"), (("gpu", "ram"), "disk")):
            harness.empty(*tiers)
            harness.run([prompt], 1)
            assert (harness.found, harness.reused) == ([{name: 160}], [{name: 64}])
            assert harness.engine.metrics.value("litecache_found_tokens", tier=name) == 160
        costs = harness.engine.stats()["costs"]
        assert costs["first_tokens"] == 2
        assert {"ram:shard0", "disk:shard0"} <= costs["sources"].keys()


def test_a_block_that_a_window_jumped_over_is_copied_by_nobody(tmp_path: Path) -> None:
    # the first goes on behind its window: what lies in front was neither loaded nor computed
    first = random_prompt(159, seed=1)
    second = first[:37] + random_prompt(10, seed=2)
    # one that decodes leaves 31 positions of a step: the first block but one is published late, and
    # the second prompt begins when the first has gone on behind its window
    prompts = [random_prompt(14, seed=3), first, second]
    loaded = tiny_model("mistral")
    wanted = [stock_generate(loaded, prompt, 16) for prompt in prompts]
    with Harness(
        family_source("mistral"), folders=[tmp_path], loads=lambda *_: 2, **SMALL_STEPS
    ) as harness:
        harness.engine._overlap = 1
        harness.run([first], 1)
        harness.engine.flush()
        for _ in range(20):
            harness.empty("gpu", "ram")
            assert harness.run(prompts, 16) == wanted
            if harness.found[2] == {"gpu": 32}:
                break
        else:  # where the disk is late, the second prompt comes before those blocks are in the pool
            pytest.fail(f"the second prompt never found them: {harness.found[2]}")


class HeldStep:
    """A step on a device: the engine asks whether it is over, and fetches what it gave."""

    def __init__(
        self, step: StepHandle, asked: Callable[[], bool], fetched: Callable[[], None]
    ) -> None:
        self._step, self._asked, self._fetched = step, asked, fetched

    def ready(self) -> bool:
        return self._asked()

    def result(self) -> StepResult:
        self._fetched()
        return self._step.result()


@pytest.mark.parametrize("first", ["news", "end"])
def test_while_a_step_runs_the_engine_hears_of_loads_and_of_its_end_as_either_comes(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(96, seed=4)
    landed, notes, number = False, list[str](), itertools.count()
    states, deadline = ArenaView.states, time.monotonic() + 60

    def held_states(arena: ArenaView, slots: Any, generations: Any) -> Any:
        told = states(arena, slots, generations)
        return told if landed else np.full(len(told), SlotState.LOADING)

    def asked() -> bool:
        """The loads land now, or the step is over at the second question."""
        nonlocal landed
        landed = landed or first == "news"
        launched = sum("launched" in note for note in notes)
        return launched > 1 or time.monotonic() > deadline or (first == "end" and next(number) > 0)

    def fetched() -> None:
        nonlocal landed
        landed = True
        notes.append("finished")

    with Harness(family_source("llama"), folders=[tmp_path / "s"], loads=lambda *_: 3) as harness:
        wanted = harness.run([prompt], 1)
        harness.empty("gpu")
        engine = harness.engine
        engine._overlap = 1
        execute = engine._runner.execute

        def launch(plan: StepPlan) -> HeldStep:
            notes.append(f"{plan.num_tokens} launched")
            return HeldStep(execute(plan), asked, fetched)

        monkeypatch.setattr(ArenaView, "states", held_states)
        monkeypatch.setattr(engine._runner, "execute", launch)
        assert harness.run([prompt], 1) == wanted
        assert harness.reused == [{"ram": 48}]
    # what the load lets be computed goes behind the step that runs, or does not hold that one up
    in_turn = ["finished", "1 launched"] if first == "end" else ["1 launched", "finished"]
    assert notes == ["48 launched", *in_turn, "finished"]
