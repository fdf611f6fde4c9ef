"""A prefix that one replica alone holds is saved for another one that is to go on with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM

from litecache import CacheConfig, KVCacheAdapter
from litecache.actors.naming import OFFER_PATIENCE_S
from litecache.actors.router import Placement

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def llm(ray_local: None, tiny_llama: LlamaForCausalLM) -> Iterator[KVCacheAdapter]:
    config = CacheConfig(num_blocks=128, dtype="float32", device="cpu", ram_bytes="16MB")
    with KVCacheAdapter(tiny_llama, cache_config=config, replicas=2, num_threads=1) as made:
        yield made


def ask(
    llm: KVCacheAdapter, place: Placement, ids: torch.Tensor, cache: str = "default"
) -> tuple[list[int], dict[str, int]]:
    """Tokens, and what was reused of the prompt, by tier."""
    with pytest.MonkeyPatch.context() as patch:
        coordinator = llm.group.coordinator
        patch.setattr(coordinator, "route", lambda prompts, silent: [place] * len(prompts))
        out = llm.generate(ids, max_new_tokens=6, cache=cache, return_dict_in_generate=True)
    return out.sequences[0].tolist(), out.litecache.reused_tokens[0]


def prompt(seed: int) -> torch.Tensor:
    return torch.randint(3, 200, (1, 100), generator=torch.Generator().manual_seed(seed))


def test_the_second_replica_loads_what_the_first_one_had_not_saved(llm: KVCacheAdapter) -> None:
    ids = prompt(0)
    wanted, cold = ask(llm, Placement(0), ids, cache="read-only")
    assert cold == {}
    # without being asked for it, it stays where it is
    assert ask(llm, Placement(1), prompt(0), cache="read-only") == (wanted, {})
    ids = prompt(1)
    wanted, _ = ask(llm, Placement(0), ids, cache="read-only")
    assert ask(llm, Placement(1, 0, 6, True), ids) == (wanted, {"ram": 96})


def test_a_replica_that_does_not_answer_holds_nobody_up_for_long(llm: KVCacheAdapter) -> None:
    ids = prompt(2)
    wanted, _ = ask(llm, Placement(0), ids, cache="read-only")
    status = llm.group.status()
    (pid,) = [each["pid"] for name, each in status.items() if name.endswith(":gpu:0")]
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert ask(llm, Placement(1, 0, 6, True), ids) == (wanted, {})
        assert time.monotonic() - started < OFFER_PATIENCE_S + 5  # a bound, with slack
    finally:
        os.kill(pid, signal.SIGCONT)
