"""The engine in-process: tokens equal to stock transformers, from every tier."""

from __future__ import annotations

import dataclasses
import os
import queue
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import Harness, family_source
from plan_driver import FAMILIES, random_prompt, stock_generate, tiny_model

from litecache.config import CacheConfig
from litecache.engine.engine import Engine
from litecache.engine.running.model_runner import StepHandle
from litecache.engine.scheduling.orders import StepPlan
from litecache.engine.transfer import loader
from litecache.errors import CapacityError, ConfigError
from litecache.storage.arena.view import ArenaView
from litecache.storage.client import LocalShardClient
from litecache.storage.disk.inspect import inspect_store
from litecache.storage.namespaces import label_of, namespace_of, salt_digest
from litecache.storage.protocol import SlotState
from litecache.storage.shard_store import ShardStore
from litecache.types import FinishReason, Request, SamplingParams, TokenDelta

LENGTHS = (1, 15, 16, 17, 40, 77)
# Two blocks' worth in the fast set.
NEW_TOKENS = 32 if os.environ.get("LITECACHE_TEST_PROFILE", "fast") == "fast" else 64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_stock_generate_cold_and_from_every_tier(family: str, tmp_path: Path) -> None:
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    loaded = tiny_model(family)
    wanted = [stock_generate(loaded, prompt, NEW_TOKENS) for prompt in prompts]
    full = sum(len(prompt) // 16 * 16 for prompt in prompts)

    def reused(harness: Harness, tier: str) -> int:
        return sum(counts.get(tier, 0) for counts in harness.reused)

    with Harness(family_source(family), folders=[tmp_path / "s"]) as harness:
        assert harness.run(prompts, NEW_TOKENS) == wanted, "cold"
        assert reused(harness, "gpu") == reused(harness, "disk") == 0
        assert harness.run(prompts, NEW_TOKENS) == wanted, "warm on the pool"
        assert reused(harness, "gpu") >= full
        harness.empty("gpu")
        assert harness.run(prompts, NEW_TOKENS) == wanted, "warm in RAM"
        assert reused(harness, "ram") == full
        harness.empty("gpu", "ram")
        assert harness.run(prompts, NEW_TOKENS) == wanted, "warm on disk"
        assert reused(harness, "disk") == full
        harness.empty()
    with Harness(family_source(family), folders=[tmp_path / "s"]) as harness:
        assert harness.run(prompts, NEW_TOKENS) == wanted, "after a restart"
        assert reused(harness, "disk") == full


def test_small_pool_preempts_and_still_gives_the_same_tokens(tmp_path: Path) -> None:
    prompts = [random_prompt(20 + i, seed=i) for i in range(6)]
    loaded = tiny_model("llama")
    wanted = [stock_generate(loaded, prompt, 40) for prompt in prompts]
    with Harness(family_source("llama"), folders=[tmp_path / "s"], num_blocks=14) as harness:
        assert harness.run(prompts, 40) == wanted
        assert harness.engine.stats()["preemptions"] > 0


def test_chunked_prefill_gives_the_same_tokens() -> None:
    prompts = [random_prompt(length, seed=length) for length in (3, 50, 90)]
    loaded = tiny_model("gemma2")
    wanted = [stock_generate(loaded, prompt, 32) for prompt in prompts]
    with Harness(family_source("gemma2"), max_batch_tokens=16) as harness:
        assert harness.run(prompts, 32) == wanted
    with Harness(family_source("gemma2"), max_batch_tokens=32, deterministic=True) as harness:
        assert harness.run(prompts, 32) == wanted


def test_two_shards_both_hold_bytes_and_give_back_what_they_hold(tmp_path: Path) -> None:
    prompts = [random_prompt(64, seed=i) for i in range(12)]
    with Harness(family_source("llama"), folders=[tmp_path / "a", tmp_path / "b"]) as harness:
        wanted = harness.run(prompts, 8)
        harness.empty("gpu", "ram")
        assert all(store.keys() for store in harness.stores)
        assert harness.run(prompts, 8) == wanted
        assert [counts.get("disk") for counts in harness.reused] == [64] * 12


def test_full_hit_leaves_the_published_bytes_unchanged() -> None:
    prompt = random_prompt(64, seed=5)
    with Harness(family_source("llama")) as harness:
        wanted = harness.run([prompt], 1)
        (pool,) = harness.engine._pools
        published = [b for b in range(1, 257) if harness.engine._scheduler.cache.pools[0].key(b)]
        before = pool.buffer[published].clone()
        assert len(published) == 4
        assert harness.run([prompt], 1) == wanted
        assert harness.reused == [{"gpu": 64}]
        assert torch.equal(pool.buffer[published], before)
        assert before.any()


def test_partial_block_is_reused_to_the_token() -> None:
    prompt = random_prompt(64, seed=6)
    fork = [*prompt[:41], (prompt[41] + 1) % 211, *prompt[42:60]]
    loaded = tiny_model("llama")
    with Harness(family_source("llama")) as harness:
        harness.run([prompt], 1)
        assert harness.run([fork], 16) == [stock_generate(loaded, fork, 16)]
        assert harness.reused == [{"gpu": 41}]


def test_reads_of_a_shard_that_died_are_misses_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(64, seed=8)
    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        wanted = harness.run([prompt], 8)
        harness.empty("gpu")
        with monkeypatch.context() as dead:
            # Never ready and never given up by the clock: only `lost` can end the wait.
            dead.setattr(loader, "LOAD_TIMEOUT_S", 1e9)
            loading = SlotState.LOADING
            dead.setattr(ArenaView, "state", lambda self, slot, generation: loading)
            dead.setattr(ArenaView, "states", lambda self, slots, _: np.full(len(slots), loading))
            dead.setattr(LocalShardClient, "lost", True)
            assert harness.run([prompt], 8) == wanted
            assert harness.reused == [{}]


def test_blocks_of_a_salt_are_stored_under_its_own_name(tmp_path: Path) -> None:
    prompt = random_prompt(40, seed=3)
    source = family_source("llama")
    with Harness(source, folders=[tmp_path / "s"], salt_quotas={"alice": "1MB"}) as harness:
        for number, salt in enumerate(["", "alice", "bob"]):
            request = Request(f"q{number}", "c", prompt, SamplingParams(1), cache_salt=salt)
            harness.engine.submit([request])
            while not any(d.finish_reason for _, d in harness.deltas.get(timeout=60)):
                pass
        assert harness.engine.flush()["complete"]
        label = harness.engine.info.label
    (report,) = inspect_store(str(tmp_path / "s"))
    blocks = {name.name: name.blocks for name in report.namespaces}
    salted = {f"{label} salt-{salt_digest(salt)}": 2 for salt in ("alice", "bob")}
    assert blocks == {label: 2, **salted}


@pytest.mark.parametrize(
    "name", ["long-" * 40, "ünï/" + "深" * 60, "\udcff\udcfe", "line\n\t"], ids=ascii
)
def test_blocks_of_a_model_of_any_name_are_saved(tmp_path: Path, name: str) -> None:
    prompt = random_prompt(40, seed=3)
    source = dataclasses.replace(family_source("llama"), label=name)
    for reused in ({}, {"disk": 32}):
        with Harness(source, folders=[tmp_path / "s"]) as harness:
            harness.run([prompt], 1)
            assert harness.reused == [reused]
            assert harness.engine.flush()["complete"]


def test_labels_tell_long_names_apart_and_leave_room_for_a_salt() -> None:
    paths = [f"/{first}/{'folder/' * 60}model" for first in "ab"]
    labels = [label_of(path, "@fp/bfloat16/16") for path in (*paths, "plain", "\0", "?")]
    assert len(set(labels)) == 5
    assert labels[2] == "plain@fp/bfloat16/16"
    assert labels[0].endswith("folder/model@fp/bfloat16/16")
    named = [namespace_of(label, "alice", {"alice"}) for label in labels]
    assert max(map(len, named)) <= 200
    assert all(name.isprintable() and name.encode() for name in named)


def test_another_salt_shares_nothing(tmp_path: Path) -> None:
    prompt = tuple(random_prompt(64, seed=1))
    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        for number, salt in enumerate(["", "tenant", ""]):
            request = Request(f"s{number}", "c", prompt, SamplingParams(1), cache_salt=salt)
            harness.engine.submit([request])
            ((_, delta),) = harness.deltas.get(timeout=60)
            assert delta.reused_tokens == ({"gpu": 64} if number == 2 else {})


def test_abort_frees_the_blocks_and_reports_the_end() -> None:
    with Harness(family_source("llama")) as harness:
        request = Request("x", "c", tuple(random_prompt(30, 1)), SamplingParams(200))
        harness.engine.submit([request])
        harness.deltas.get(timeout=60)
        harness.engine.abort(["x"])
        deltas = []
        while not deltas or deltas[-1].finish_reason is None:
            deltas += [delta for _, delta in harness.deltas.get(timeout=60)]
        assert deltas[-1].finish_reason is FinishReason.ABORT
        assert sum(len(delta.token_ids) for delta in deltas) < 199


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "words"),
    [
        ((), SamplingParams(1), ConfigError, "input_ids"),
        ((1, 211), SamplingParams(1), ConfigError, "input_ids=211 is invalid"),
        ((-1,), SamplingParams(1), ConfigError, "input_ids=-1"),
        ((1,), SamplingParams(0), ConfigError, "max_new_tokens"),
        ((1,), SamplingParams(256), CapacityError, "the model takes 256"),
        ((1,) * 100, SamplingParams(20), CapacityError, "the pool holds 112"),
        ((1,), SamplingParams(1, top_p=0.0), ConfigError, "top_p"),
        ((1,), SamplingParams(1, temperature=float("nan")), ConfigError, "temperature"),
    ],
)
def test_bad_request_is_refused_before_anything_is_queued(
    prompt: tuple[int, ...], sampling: SamplingParams, error: type[Exception], words: str
) -> None:
    with Harness(family_source("llama"), num_blocks=7) as harness:
        good = Request("good", "c", (1, 2, 3), SamplingParams(1))
        with pytest.raises(error, match=words):
            harness.engine.submit([good, Request("bad", "c", prompt, sampling)])
        assert harness.engine.stats()["waiting"] == harness.engine.stats()["running"] == 0


def test_a_request_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [random_prompt(20, seed=i) for i in range(3)]
    poison = [210] * 9
    with Harness(family_source("llama")) as harness:
        wanted = harness.run(prompts, 4)
        harness.empty("gpu")
        runner = harness.engine._runner
        original = runner.execute
        rows: dict[int, tuple[int, ...]] = {}

        def execute(plan: StepPlan) -> StepHandle:
            rows.update({new.row: new.token_ids for new in plan.new_rows})
            if any(rows[step.row][:9] == tuple(poison) for step in plan.rows):
                raise RuntimeError("planted")
            return original(plan)

        monkeypatch.setattr(runner, "execute", execute)
        outputs = harness.run([*prompts[:2], poison, prompts[2]], 4)
        assert [*outputs[:2], outputs[3]] == wanted
        assert harness.reasons[2] is FinishReason.ERROR
        assert "planted" in str(harness.errors[2])
        assert outputs[2] == []


def test_out_of_memory_in_a_step_shrinks_the_batch_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [random_prompt(60, seed=i) for i in range(4)]
    loaded = tiny_model("llama")
    with Harness(family_source("llama")) as harness:
        runner = harness.engine._runner
        original = runner.execute

        def execute(plan: StepPlan) -> StepHandle:
            if plan.num_tokens > 50:
                raise torch.OutOfMemoryError("planted")
            return original(plan)

        monkeypatch.setattr(runner, "execute", execute)
        assert harness.run(prompts, 8) == [stock_generate(loaded, p, 8) for p in prompts]
        assert harness.engine.metrics.value("litecache_failed_steps", kind="out_of_memory") > 0


def test_out_of_memory_that_no_batch_size_cures_fails_the_request_and_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def execute(plan: StepPlan) -> StepHandle:
        raise torch.OutOfMemoryError("planted")

    with Harness(family_source("llama")) as harness:
        monkeypatch.setattr(harness.engine._runner, "execute", execute)
        harness.run([random_prompt(60, seed=i) for i in range(3)], 4)
        assert harness.reasons == [FinishReason.ERROR] * 3


def test_logits_that_are_not_finite_fail_their_request_with_its_name_and_the_step() -> None:
    prompts = [random_prompt(20, seed=i) for i in range(2)]
    loaded = tiny_model("llama")
    wanted = [stock_generate(loaded, prompt, 12) for prompt in prompts]
    poison = next(t for t in range(211) if not any(t in w for w in (*wanted, *prompts)))
    with Harness(family_source("llama")) as harness:
        with torch.inference_mode():
            harness.engine._runner._model.model.embed_tokens.weight[poison] = float("nan")
        outputs = harness.run([prompts[0], [5, poison, 6], prompts[1]], 12)
        assert [outputs[0], outputs[2]] == wanted
        assert outputs[1] == []
        assert harness.reasons[1] is FinishReason.ERROR
        told = str(harness.errors[1])
        assert re.fullmatch(r"request r1: the logits of step 1 at position 2 are not finite", told)


def test_rules_that_leave_no_token_fail_the_request_with_the_reason() -> None:
    everything = tuple(((token,), float("-inf")) for token in range(211))
    with Harness(family_source("llama")) as harness:
        assert harness.run([[5, 6]], 4, sequence_bias=everything) == [[]]
        assert harness.reasons == [FinishReason.ERROR]
        assert "its rules leave no token to draw" in str(harness.errors[0])


def test_a_request_over_the_pool_is_refused_while_others_run() -> None:
    with Harness(family_source("llama"), num_blocks=7) as harness:
        harness.engine.submit([Request("runs", "c", (1, 2, 3), SamplingParams(60))])
        with pytest.raises(
            CapacityError, match=r"120 tokens.*the pool holds 112 \(7 blocks of 16\)"
        ):
            harness.engine.submit([Request("big", "c", (1,) * 100, SamplingParams(20))])
        tokens = 0
        while tokens < 60:
            for _, delta in harness.deltas.get(timeout=60):
                assert delta.request_id == "runs"
                tokens += len(delta.token_ids)


def test_max_time_ends_a_request_with_what_it_has_while_others_go_on() -> None:
    with Harness(family_source("llama")) as harness:
        short = Request("short", "c", (1, 2, 3), SamplingParams(250), max_time_s=0.05)
        harness.engine.submit([short, Request("long", "c", (3, 2, 1), SamplingParams(250))])
        ends: dict[str, FinishReason] = {}
        counts = {"short": 0, "long": 0}
        while len(ends) < 2:
            for _, delta in harness.deltas.get(timeout=60):
                counts[delta.request_id] += len(delta.token_ids)
                if delta.finish_reason is not None:
                    ends[delta.request_id] = delta.finish_reason
        assert list(ends) == ["short", "long"]
        assert set(ends.values()) == {FinishReason.LENGTH}
        assert counts["short"] < counts["long"] == 250


def test_closed_engine_refuses_instead_of_hanging() -> None:
    harness = Harness(family_source("llama"))
    harness.close()
    with pytest.raises(ConfigError, match="closed"):
        harness.engine.submit([Request("x", "c", (1,), SamplingParams(1))])
    engine: Engine = harness.engine
    engine.close()


def test_every_steps_time_is_told_in_two_parts() -> None:
    with Harness(family_source("llama")) as harness:
        harness.run([random_prompt(40, seed=1)], max_new_tokens=5)
        histograms = harness.engine.stats()["metrics"]["histograms"]
    steps = {
        dict(labels)["kind"]: histogram
        for name, labels, histogram in histograms
        if name == "litecache_step_seconds"
    }
    # one step for the prompt and the first token, then one a token
    assert {kind: histogram["count"] for kind, histogram in steps.items()} == {"host": 5, "wait": 5}
    assert all(histogram["sum"] > 0 for histogram in steps.values())


def test_tiers_that_cannot_hold_a_block_are_refused_at_the_start(tmp_path: Path) -> None:
    source = family_source("llama")
    for bound in ({"ram_bytes": 65_536}, {"storage_bytes": 1 << 17}):
        (name,) = bound
        config = CacheConfig(num_blocks=16, storage_dir=str(tmp_path), **bound)
        with (
            Harness(source, folders=[None]) as harness,
            pytest.raises(ConfigError, match=rf"{name}=.* a block \([0-9,]+ bytes"),
        ):
            Engine(source, config, sink=print, shards=harness.clients)


def test_an_engine_that_starts_while_no_shard_answers_uses_them_once_they_do() -> None:
    """A replica restarts beside a shard that hangs: it is not without tiers for ever."""
    prompt = random_prompt(70, seed=3)
    with ShardStore(None, ram_bytes=32 << 20) as store:
        client = LocalShardClient(store)
        config = CacheConfig(num_blocks=64, dtype="float32", device="cpu")
        deltas: queue.Queue[list[tuple[str, TokenDelta]]] = queue.Queue()
        source = family_source("llama")
        made = Engine(source, config, sink=deltas.put, shards=[], loads="all", num_threads=1)

        def reused(name: str) -> dict[str, int]:
            made.submit([Request(name, "c", prompt, SamplingParams(1))])
            while (delta := deltas.get(timeout=60)[0][1]).ttft_s is None:
                pass
            made.flush()
            made.clear_pool()
            return dict(delta.reused_tokens or {})

        assert reused("without") == {}
        made.set_shards([client])
        assert reused("saved") == {}
        assert reused("found") == {"ram": 64}
        made.close()
        client.close()
