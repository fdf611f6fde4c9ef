"""What a call leaves in pool and shards is what its `cache` says, and its tokens are the same."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from litecache.adapter import KVCacheAdapter
from litecache.adapter.surface.cache_control import WARMED_AT_ONCE
from litecache.errors import ConfigError

PROMPT = [(i * i * 7 + i * 3) % 200 + 5 for i in range(100)]


def call(llm: KVCacheAdapter, way: str, **kwargs: Any) -> list[int]:
    """New tokens of one of the ways to ask."""
    if way == "generate":
        row = llm.generate(torch.tensor([PROMPT]), max_new_tokens=30, **kwargs)[0]
        return [int(token) for token in row[len(PROMPT) :]]
    if way == "generate_batch":
        return llm.generate_batch([PROMPT], max_new_tokens=30, **kwargs)[0]
    return list(llm.stream(PROMPT, as_tokens=True, max_new_tokens=30, **kwargs))


@pytest.mark.parametrize("way", ["generate", "generate_batch", "stream"])
def test_a_no_store_call_leaves_no_block_and_a_read_only_one_none_below_the_pool(
    llm: KVCacheAdapter, way: str
) -> None:
    salt = f"use of {way}"
    tokens = call(llm, way, cache_salt=salt, cache="no-store")
    assert llm.flush()["complete"]
    assert llm.delete(cache_salt=salt) == 0
    for _ in range(2):
        assert call(llm, way, cache_salt=salt, cache="read-only") == tokens
    llm.clear("gpu")  # saves what waits to be saved
    assert llm.delete(cache_salt=salt) == 0
    call(llm, way, cache_salt=salt, cache="read-only")
    assert llm.delete(cache_salt=salt) == 8, "in the pool"
    call(llm, way, cache_salt=salt)
    llm.clear("gpu")
    assert call(llm, way, cache_salt=salt, cache="no-store") == tokens, "from below"
    assert llm.delete(cache_salt=salt) == 8, "in a shard, and not in the pool again"


def test_what_a_call_saves_is_gone_after_its_ttl(llm: KVCacheAdapter) -> None:
    salt = "for a second"
    for ttl_s in (1, 600):
        salt += "s"
        call(llm, "generate", cache_salt=salt, cache_ttl_s=ttl_s, retention="high")
        llm.clear("gpu")
        time.sleep(2.1)  # the end is a whole second
        out = llm.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=1,
            return_dict_in_generate=True,
            cache_salt=salt,
            cache="no-store",
        )
        assert bool(out.litecache.found_tokens[0]) == (ttl_s == 600)


@pytest.mark.parametrize("name", ["stats", "flush", "clear", "unpin", "generate"])
def test_a_closed_adapter_says_so(
    llm: KVCacheAdapter, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(llm, "_finalizer", SimpleNamespace(alive=False))
    given = {"unpin": [PROMPT], "generate": [torch.tensor([PROMPT])]}
    with pytest.raises(ConfigError, match="adapter='closed' is invalid: an open adapter"):
        getattr(llm, name)(*given.get(name, []))


def test_one_prompt_that_is_refused_leaves_all_uncomputed(llm: KVCacheAdapter) -> None:
    before = llm.stats().prompt_tokens
    prompts = [PROMPT] * WARMED_AT_ONCE
    with pytest.raises(ConfigError, match="input_ids=211"):
        llm.warm([*prompts, [211]], cache_salt="warmed in part")
    assert llm.stats().prompt_tokens == before


@pytest.mark.parametrize("nothing", [[], (), False])
def test_an_empty_past_is_no_cache(llm: KVCacheAdapter, nothing: Any) -> None:
    row = llm.generate(torch.tensor([PROMPT]), max_new_tokens=3, past_key_values=nothing)
    assert row[0, len(PROMPT) :].tolist() == call(llm, "generate_batch")[:3]
