"""One tiny model and one group of actors with all tiers, shared by the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from shared_adapter import SharedAdapter
from tiny_config import small_llama, tiny_config
from transformers import LlamaForCausalLM

from litecache.adapter import KVCacheAdapter

# Whatever is found is loaded, however fast so small a model computes it on this machine.
os.environ["LITECACHE_LOADS"] = "all"


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """Random weights; its end token is out of the way so that lengths are exact."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    return LlamaForCausalLM(small_llama()).eval()


@pytest.fixture(scope="session")
def shared_adapter(
    ray_local: None, tiny_llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedAdapter]:
    config = tiny_config(tmp_path_factory.mktemp("storage"))
    shared = SharedAdapter(lambda: KVCacheAdapter(tiny_llama, cache_config=config, num_threads=1))
    yield shared
    shared.adapter.close()


@pytest.fixture
def llm(shared_adapter: SharedAdapter) -> KVCacheAdapter:
    """The adapter that these tests share; each leaves it usable for the next one."""
    return shared_adapter.adapter
