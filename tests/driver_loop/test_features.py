"""Each thing that transformers' `generate` can do, over an engine, against stock `generate`.

The engine runs in this process; every call is made twice, and the second finds its prompt.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import EngineForward, Harness
from features import FEATURES, Feature, Settings
from scene import Scene, first_layers, smollm2_scene, tiny_scene
from tiny_models import assert_same
from transformers import AutoTokenizer

from litecache.adapter.driver_loop import generate_in_driver
from litecache.adapter.proxy import ModelProxy
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import ConfigError

TEXT = frozenset({"stop_strings", "token_healing"})
# All 30 layers, 83 times, are for scripts/test.sh --long.
WHOLE = os.environ.get("LITECACHE_TEST_PROFILE") == "long"


class Both:
    """Stock generate of a scene, and LiteCache's over an engine with the same weights."""

    def __init__(self, scene: Scene, harness: Harness) -> None:
        self.scene, self.harness = scene, harness
        self._stock = functools.cache(self._stock_plain)

    def call(self, feature: Feature, settings: Settings) -> Settings:
        """All arguments of a call."""
        inputs = getattr(self.scene, feature.inputs)
        call = {**inputs, "max_new_tokens": self.scene.new_tokens, **settings}
        return {**call, "tokenizer": self.scene.tokenizer} if TEXT & {*settings} else call

    def stock(self, call: Settings) -> tuple[Any, torch.Tensor]:
        """What stock generate gives from a seed, and torch's random state after it."""
        torch.manual_seed(17)
        return self.scene.model.generate(**call), torch.get_rng_state()

    def plain(self, feature: Feature) -> Any:
        """What it gives without what changes the output."""
        settings = feature.without(self.scene)
        simple = all(isinstance(value, (bool, int, float, str)) for value in settings.values())
        if simple:
            return self._stock(feature.inputs, tuple(sorted(settings.items())))
        return self.stock(self.call(feature, settings))[0]

    def _stock_plain(self, inputs: str, settings: tuple[tuple[str, Any], ...]) -> Any:
        return self.stock(self.call(Feature("", "", dict, (), inputs), dict(settings)))[0]

    def ours(self, call: Settings) -> tuple[Any, list[list[int]]]:
        """What LiteCache gives, and the tokens that each row of each forward reused."""
        forward = EngineForward(self.harness)
        model = self.scene.model
        proxy = ModelProxy(model.config, model.generation_config, forward)
        given, tokenizer = call.pop("generation_config", None), call.pop("tokenizer", None)
        ids = call.pop("input_ids")
        torch.manual_seed(17)
        return generate_in_driver(proxy, ids, given, call, tokenizer=tokenizer), forward.reused


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    scene, folder = tiny_scene(), str(tmp_path_factory.mktemp("model"))
    scene.model.save_pretrained(folder)
    with Harness(ModelSource(path=folder)) as harness:
        yield Both(scene, harness)


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """Its first layers, with every prompt in the pool."""
    threads, folder = torch.get_num_threads(), str(smollm2_dir)
    if not WHOLE:
        folder = str(tmp_path_factory.mktemp("smollm2"))
        first_layers(str(smollm2_dir), 6).save_pretrained(folder)
        AutoTokenizer.from_pretrained(smollm2_dir).save_pretrained(folder)
    with Harness(ModelSource(path=folder), num_threads=2) as harness:
        torch.set_num_threads(2)
        both = Both(smollm2_scene(folder), harness)
        for inputs in ("batch", "one", "echo", "word", "cut"):
            both.ours(both.call(Feature("", "", dict, (), inputs), {"max_new_tokens": 1}))
        yield both
    torch.set_num_threads(threads)


def check(both: Both, feature: Feature, calls: int) -> Any:
    """Compare so many calls with what stock generate gives, which is returned."""
    expected, random_state = both.stock(both.call(feature, feature.settings(both.scene)))
    for _ in range(calls):
        result, reused = both.ours(both.call(feature, feature.settings(both.scene)))
        assert_same(result, expected)
        assert torch.equal(torch.get_rng_state(), random_state)
    if feature.inputs != "word" and feature is not FEATURES["bos_token_id"]:
        assert all(reused[0]), "the last call's first forward found nothing"
    return expected


def same(one: Any, other: Any) -> bool:
    try:
        assert_same(one, other)
    except AssertionError:
        return False
    return True


@pytest.mark.no_cover
@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_cold_and_with_a_prefix_hit(tiny: Both, name: str) -> None:
    tiny.harness.empty("gpu")
    feature = FEATURES[name]
    expected = check(tiny, feature, calls=2)
    if feature.changes:
        assert not same(tiny.plain(feature), expected), "this value changes nothing"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_on_smollm2_with_a_prefix_hit(smollm2: Both, name: str) -> None:
    check(smollm2, FEATURES[name], calls=1)


# Behind a clock, or with inputs of their own.
ALONE = frozenset({"max_time", "forced_bos_token_id", "token_healing"})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_combinations_of_features_give_what_stock_gives_or_are_refused_by_both(
    tiny: Both, seed: int
) -> None:
    drawn = random.Random(seed)
    for _ in range(20):
        names = drawn.sample(sorted(FEATURES.keys() - ALONE), drawn.choice((2, 2, 3, 4)))
        drafts = any(FEATURES[name].group == "Drafts" for name in names)
        feature = Feature("", "", dict, (), "one" if drafts else "batch")

        def call(names: list[str] = names, feature: Feature = feature) -> Settings:
            merged: Settings = {}
            for name in names:
                merged |= FEATURES[name].settings(tiny.scene)
            return tiny.call(feature, merged)

        try:
            expected, random_state = tiny.stock(call())
        except Exception:
            with pytest.raises(ConfigError):
                tiny.ours(call())
            continue
        assert_same(tiny.ours(call())[0], expected)
        assert torch.equal(torch.get_rng_state(), random_state), names
    tiny.harness.check()
