"""The pool's size: what the user said, or what fits, or a refusal with the numbers."""

from __future__ import annotations

import pytest
from plan_driver import tiny_model

from litecache.config import CacheConfig
from litecache.engine import kv_layout
from litecache.engine.kv_layout import KVLayout
from litecache.engine.loading import memory
from litecache.errors import CapacityError


@pytest.fixture(scope="module")
def loaded():
    return tiny_model("llama")


def choose(loaded, **config):
    layout = KVLayout.from_specs(loaded.specs, 16)
    return memory.choose_num_blocks(loaded, layout, CacheConfig(device="cpu", **config))


def test_num_blocks_is_taken_as_given(loaded):
    assert choose(loaded, num_blocks=37) == 37


def test_by_default_the_pool_is_bounded_by_what_requests_can_use(loaded):
    # 256 tokens are 16 blocks, and one to copy a shared tail into.
    assert choose(loaded, max_requests=3) == 3 * 17


def test_by_default_the_pool_is_bounded_by_the_machine(loaded, monkeypatch):
    block_bytes = KVLayout.from_specs(loaded.specs, 16).block_bytes
    monkeypatch.setattr(kv_layout, "available_memory_bytes", lambda: 4 * 101 * block_bytes)
    assert choose(loaded) == 100


def test_a_pool_that_cannot_fit_is_refused_with_the_numbers(loaded, monkeypatch):
    with pytest.raises(CapacityError, match=r"num_blocks=1000000000 needs .* bytes"):
        choose(loaded, num_blocks=10**9)
    monkeypatch.setattr(kv_layout, "available_memory_bytes", lambda: 100_000)
    with pytest.raises(CapacityError, match=r"needs 17: free memory or set num_blocks"):
        choose(loaded)


def test_the_machine_has_memory():
    assert kv_layout.available_memory_bytes() > 1 << 20
