"""A pinned prefix stays on a disk that is too small for what comes after it."""

from __future__ import annotations

import pytest

from litecache.adapter import KVCacheAdapter
from litecache.errors import ConfigError

PREFIX = list(range(3, 67))


def reused_from_disk(llm: KVCacheAdapter, prompt: list[int]) -> int:
    """Tokens of a prompt that the disk alone still holds."""
    llm.clear("gpu")
    llm.clear("ram")
    before = llm.stats().reused_tokens.get("disk", 0)
    llm.generate_batch([prompt], max_new_tokens=1)
    return llm.stats().reused_tokens.get("disk", 0) - before


def churn(llm: KVCacheAdapter, first: int) -> None:
    """Half as much again as the disk holds, in other prompts."""
    for start in range(first, first + 16):
        prompt = [(start * 17 + i * 29) % 200 + 5 for i in range(384)]
        llm.generate_batch([prompt], max_new_tokens=1)
    llm.flush()


def test_a_pinned_prefix_outlives_what_evicts_the_rest(llm: KVCacheAdapter) -> None:
    other = [token + 60 for token in PREFIX]
    llm.generate_batch([PREFIX, other], max_new_tokens=1)
    assert llm.pin([*PREFIX, 9]) == 64
    assert llm.pin(PREFIX, cache_salt="somebody else's") == 0
    churn(llm, 0)
    assert reused_from_disk(llm, PREFIX) == 64
    assert reused_from_disk(llm, other) == 0
    assert llm.unpin(PREFIX) == 64
    churn(llm, 100)
    assert reused_from_disk(llm, PREFIX) == 0
    with pytest.raises(ConfigError, match="at least one token"):
        llm.pin([])
