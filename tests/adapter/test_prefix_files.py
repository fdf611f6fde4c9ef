"""A prefix leaves as a file and comes back as hits; a salt's blocks can all be deleted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tiny_config import tiny_config
from transformers import LlamaForCausalLM

from litecache.adapter import KVCacheAdapter
from litecache.errors import ConfigError, PrefixFileError, StorageError
from litecache.hashing import chain_keys


def prompt_of(seed: int, length: int = 100) -> list[int]:
    return [(seed * 31 + i * i * 7 + i) % 200 + 5 for i in range(length)]


def found(llm: KVCacheAdapter, prompt: list[int], **kwargs: object) -> dict[str, int]:
    """By tier, where a call found this prompt's KV, whatever it planned to load of that."""
    output = llm.generate(
        torch.tensor([prompt]), max_new_tokens=1, return_dict_in_generate=True, **kwargs
    )
    return dict(output.litecache.found_tokens[0])


def wait_for_locations(llm: KVCacheAdapter, prompt: list[int], salt: str, *, known: bool) -> None:
    """Until the coordinator knows a prefix's blocks, or knows none of them."""
    keys = [key for root in llm.info.roots(salt) for key in chain_keys(root, prompt, 16)]
    deadline = time.monotonic() + 60
    while {place is not None for place in llm.group.coordinator.locate(keys, "")} != {known}:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_warming_computes_each_prompt_once_and_tells_where_it_was(llm: KVCacheAdapter) -> None:
    first, second = prompt_of(1), prompt_of(2, 40)
    counts = llm.warm([first, second], cache_salt="warm")
    assert counts == [{"computed": 100}, {"computed": 40}]
    assert llm.flush()["complete"]
    again = llm.warm([torch.tensor(first), prompt_of(3, 40)], cache_salt="warm")
    assert again[1] == {"computed": 40}
    assert again[0] == {"gpu": 96, "computed": 4}
    longest = prompt_of(4, llm.info.max_model_len)
    assert sum(llm.warm([longest], cache_salt="warm")[0].values()) == len(longest) - 1
    with pytest.raises(ConfigError, match=r"prompts\[1\]"):
        llm.warm([first, []])


def test_an_exported_prefix_is_found_again_after_everything_was_cleared(
    llm: KVCacheAdapter, tmp_path: Path
) -> None:
    prompt, path = prompt_of(5), tmp_path / "prefix.kv"
    wanted = llm.generate_batch([prompt], max_new_tokens=8)
    report = llm.export_prefix(prompt, path)
    assert report == (96, 100, path.stat().st_size)
    llm.clear("all")
    assert found(llm, [*prompt[:96], 9]) == {}
    llm.clear("all")
    assert llm.import_prefix(path) == (96, 96, report.nbytes)
    deadline = time.monotonic() + 60
    # a shard that answers late is a miss for that moment, and what is computed then is not saved
    seen: list[dict[str, int]] = []
    while not seen or seen[-1] not in ({"ram": 96}, {"disk": 96}):
        assert time.monotonic() < deadline, seen
        llm.clear("gpu")
        seen.append(found(llm, prompt, cache="read-only"))
    assert llm.generate_batch([prompt], max_new_tokens=8) == wanted
    assert llm.import_prefix(path).tokens == 96, "what is there already counts"


def test_export_tells_how_much_of_a_prompt_is_stored(llm: KVCacheAdapter, tmp_path: Path) -> None:
    prompt, path = prompt_of(6), tmp_path / "prefix.kv"
    with pytest.raises(StorageError, match="nothing of this prompt is stored"):
        llm.export_prefix(prompt, path)
    assert not list(tmp_path.iterdir())
    llm.warm([prompt[:50]])
    assert llm.export_prefix(prompt, path)[:2] == (48, 100)
    with pytest.raises(StorageError, match="nothing of this prompt is stored"):
        llm.export_prefix(prompt, path, cache_salt="another")
    with pytest.raises(StorageError, match="cannot be written"):
        llm.export_prefix(prompt, tmp_path / "no" / "folder")
    with pytest.raises(ConfigError, match="path"):
        llm.export_prefix(prompt, "")


def test_a_refused_file_stores_nothing(llm: KVCacheAdapter, tmp_path: Path) -> None:
    prompt, path = prompt_of(7), tmp_path / "prefix.kv"
    llm.warm([prompt], cache_salt="mine")
    llm.export_prefix(prompt, path, cache_salt="mine")
    llm.clear("all")
    with pytest.raises(PrefixFileError, match="another cache_salt"):
        llm.import_prefix(path, cache_salt="yours")
    data = path.read_bytes()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), data[:-4000] + bytes(4000)):
        path.write_bytes(damaged)
        with pytest.raises(PrefixFileError, match="cannot be imported"):
            llm.import_prefix(path, cache_salt="mine")
        assert found(llm, prompt, cache_salt="mine") == {}
        llm.clear("all")


def test_deleting_a_salt_leaves_the_hits_of_others(llm: KVCacheAdapter, tmp_path: Path) -> None:
    prompt = prompt_of(8)
    for salt in ("alice", "bob", None):
        llm.warm([prompt], cache_salt=salt)
    assert llm.flush()["complete"]
    wait_for_locations(llm, prompt, "alice", known=True)
    assert llm.delete(cache_salt="nobody") == 0
    assert llm.delete(cache_salt="alice") > 0
    assert llm.delete(cache_salt="alice") == 0
    with pytest.raises(StorageError, match="nothing of this prompt is stored"):
        llm.export_prefix(prompt, tmp_path / "it", cache_salt="alice")
    wait_for_locations(llm, prompt, "alice", known=False)
    wait_for_locations(llm, prompt, "bob", known=True)
    assert found(llm, prompt, cache_salt="bob") == {"gpu": 96}
    assert found(llm, prompt) == {"gpu": 96}
    llm.clear("gpu")
    assert found(llm, prompt, cache_salt="alice") == {}
    assert found(llm, prompt, cache_salt="bob") == {"ram": 96}
    with pytest.raises(ConfigError, match="cache_salt"):
        llm.delete(cache_salt=None)  # type: ignore[arg-type]


def test_a_request_that_is_open_when_its_salt_is_deleted_ends_and_leaves_nothing(
    llm: KVCacheAdapter,
) -> None:
    prompt = prompt_of(9)
    (alone,) = llm.generate_batch([prompt], max_new_tokens=300, cache_salt="before")
    stream = llm.stream(input_ids=prompt, as_tokens=True, max_new_tokens=300, cache_salt="open")
    tokens = [next(stream)]
    assert llm.delete(cache_salt="open") > 0
    beside = found(llm, prompt, cache_salt="open")
    assert beside == {}, "a later call neither finds the old blocks nor waits for their owner"
    assert llm.delete(cache_salt="open") > 0
    tokens += list(stream)
    assert tokens == alone
    assert llm.flush()["complete"]
    assert llm.delete(cache_salt="open") == 0, "the rest of it was not stored"


@pytest.mark.slow
def test_a_prefix_goes_to_a_group_with_another_storage_and_gives_the_same_tokens(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    prompt, path = prompt_of(10, 160), tmp_path / "prefix.kv"
    wanted = llm.generate_batch([prompt], max_new_tokens=12)
    report = llm.export_prefix(prompt, path)
    config = tiny_config(tmp_path / "other")
    with KVCacheAdapter(tiny_llama, cache_config=config, num_threads=1) as other:
        assert other.import_prefix(path) == (160, 160, report.nbytes)
        assert other.generate_batch([prompt], max_new_tokens=12) == wanted
        other.clear("gpu")
        other.clear("ram")
        assert found(other, prompt) == {"disk": 160}
