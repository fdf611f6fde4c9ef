"""A replica whose engine or device has failed ends its process; what it ran goes on elsewhere."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tiny_config import tiny_config
from transformers import LlamaForCausalLM

from litecache.actors.calls import result
from litecache.actors.naming import replica_name
from litecache.adapter import KVCacheAdapter
from litecache.errors import GroupError, LiteCacheError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
SETTINGS = {"do_sample": True, "seed": 23, "min_new_tokens": 200, "max_new_tokens": 200}


def end_the_thread(cache: Any) -> None:
    """Run in the actor: the engine's thread meets a bug."""

    def bug() -> None:
        raise ZeroDivisionError("planted in the engine's thread")

    cache._loading.result()._inbox.put(bug)


def break_the_device(cache: Any) -> None:
    """Run in the actor: a kernel's assertion fails, and with it all later work of the process."""

    def out_of_range() -> None:
        table = torch.zeros(4, device="cuda")
        table[torch.tensor([1 << 20], device="cuda")]

    cache._loading.result()._inbox.put(out_of_range)


def prompt(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 210, (1, length), generator=torch.Generator().manual_seed(seed))


def check_the_stream_goes_on(llm: KVCacheAdapter, harm: Callable[[Any], None], seed: int) -> None:
    ids = prompt(50, seed)
    name = replica_name(llm.group.spec.group, 0)
    before = llm.group.status()[name]["pid"]
    expected = list(llm.stream(input_ids=ids, as_tokens=True, **SETTINGS))
    stream = llm.stream(input_ids=ids, as_tokens=True, **SETTINGS)
    tokens = [next(stream) for _ in range(20)]
    result(llm.group.replicas[0].__ray_call__.remote(harm), 30)
    tokens += list(stream)
    assert tokens == expected
    assert llm.group.status()[name]["pid"] != before


@pytest.mark.slow
def test_a_stream_goes_on_with_the_same_tokens_when_the_engines_thread_dies(
    llm: KVCacheAdapter,
) -> None:
    check_the_stream_goes_on(llm, end_the_thread, seed=61)


@pytest.mark.gpu
def test_a_stream_goes_on_with_the_same_tokens_when_the_device_fails(
    ray_local: None, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config(tmp_path), device="cuda", max_requests=8)
    with KVCacheAdapter(tiny_llama, cache_config=config) as llm:
        for seed in (62, 63):
            check_the_stream_goes_on(llm, break_the_device, seed)


@pytest.mark.slow
def test_a_replica_that_fails_again_and_again_leaves_the_group_with_the_reason(
    ray_local: None, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path)
    with KVCacheAdapter(tiny_llama, cache_config=config, num_threads=1) as llm:
        check_the_stream_goes_on(llm, end_the_thread, seed=3)
        for number in (1, 2):
            llm.group.coordinator.call("report_failure", 0, f"earlier {number}")
        stream = llm.stream(input_ids=prompt(50, 4), as_tokens=True, **SETTINGS)
        next(stream)
        result(llm.group.replicas[0].__ray_call__.remote(end_the_thread), 30)
        with pytest.raises(
            GroupError, match=r"has left its group: its process ended itself 4 times.*planted in"
        ):
            list(stream)
        with pytest.raises(LiteCacheError, match="left its group"):
            llm.generate(prompt(20, 5), max_new_tokens=2)
