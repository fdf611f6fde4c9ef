"""A driver that forks, loses its Ray, or has an actor that answers nothing."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from test_failures import shard_of, wait_for

from litecache.actors.naming import replica_name
from litecache.adapter import KVCacheAdapter
from litecache.errors import GroupError, GroupUnavailableError, LiteCacheError, RequestAborted

ENDLESS = {"max_new_tokens": 400, "eos_token_id": 210, "as_tokens": True}


def prompt(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 210, (1, length), generator=torch.Generator().manual_seed(seed))


def in_forked_child(work: Any, timeout_s: float = 30) -> str:
    """What `work` returns in a child made by `os.fork`, or the class of what it raises."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            text = repr(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode()[:4000])
        os._exit(0)
    os.close(writing)
    ended: list[str] = []

    def read() -> None:
        with os.fdopen(reading) as pipe:
            ended.append(pipe.read())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout_s)
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return ended[0] if ended else "it hung"


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_at_once_and_the_parent_goes_on_untouched(
    llm: KVCacheAdapter,
) -> None:
    ids, other = prompt(20, seed=31), prompt(21, seed=32)
    expected = llm.generate(ids, max_new_tokens=8).tolist()
    stream = llm.stream(input_ids=ids, **ENDLESS)
    while len(stream.token_ids) < 3:  # more have come than were taken before the fork
        time.sleep(0.01)
    first = next(stream)
    for call in (
        lambda: llm.generate(other, max_new_tokens=8),
        lambda: llm.generate_batch([[5, 6]], max_new_tokens=2),
        lambda: list(llm.stream([5, 6], as_tokens=True)),
        lambda: next(stream),
        llm.stats,
        llm.flush,
        llm.clear,
        lambda: llm.abort(stream.request_id),
        lambda: llm.pin([5] * 16),
        lambda: KVCacheAdapter(llm.config, weights="random"),
    ):
        said = in_forked_child(call)
        assert said.startswith("GroupError"), said
        assert "forked" in said
    # A child that drops or closes what it inherited ends nothing of the parent's.
    assert in_forked_child(lambda: (stream.close(), llm.close())) == "(None, None)"
    assert llm.generate(ids, max_new_tokens=8).tolist() == expected
    assert [first, *(next(stream) for _ in range(7))] == expected[0][20:]
    stream.close()


def test_an_adapter_that_is_pickled_or_copied_says_how_to_share_a_group(
    llm: KVCacheAdapter,
) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(LiteCacheError, match=r"join it .*group=NAME"):
            attempt(llm)


@pytest.mark.slow
def test_a_request_aborted_while_its_replica_restarts_is_not_submitted_again(
    llm: KVCacheAdapter,
) -> None:
    expected = list(llm.stream(input_ids=prompt(30, seed=35), **ENDLESS))
    # asked for before: the streams are to be in their midst when it is killed
    pid = llm.group.status()[replica_name(llm.group.spec.group, 0)]["pid"]
    closed = llm.stream(input_ids=prompt(30, seed=33), **ENDLESS)
    aborted = llm.stream(input_ids=prompt(30, seed=34), **ENDLESS)
    kept = llm.stream(input_ids=prompt(30, seed=35), **ENDLESS)
    first = [next(stream) for stream in (closed, aborted, kept)]
    os.kill(pid, signal.SIGKILL)
    closed.close()
    llm.abort(aborted.request_id)
    with pytest.raises(RequestAborted):
        list(aborted)
    assert [first[2], *kept] == expected  # it has gone on in the restarted replica
    outcomes = wait_for(lambda: llm.stats().requests)
    assert sum(outcomes.values()) == 1


@pytest.mark.slow
def test_what_a_stopped_shard_knows_is_reported_as_unavailable_within_seconds(
    llm: KVCacheAdapter,
) -> None:
    name = shard_of(llm)
    llm.generate(prompt(40, seed=36), max_new_tokens=3)
    pid = llm.group.status()[name]["pid"]
    with stopped(pid):
        started = time.monotonic()
        assert llm.stats().unavailable == (name,)
        assert llm.stats().blocks
        with pytest.raises(GroupUnavailableError, match=f"clear: no answer from {name}"):
            llm.clear()
        with pytest.raises(GroupUnavailableError, match=f"unpin: no answer from {name}"):
            llm.unpin([5] * 32)
        report = llm.flush()
        assert (report["complete"], report["unavailable"]) == (False, [name])
        assert time.monotonic() - started < 25  # it was 15 to 30 s for each
    assert wait_for(lambda: not llm.stats().unavailable)


def test_a_stopped_replica_is_reported_as_unavailable_within_seconds(llm: KVCacheAdapter) -> None:
    name = replica_name(llm.group.spec.group, 0)
    pid = llm.group.status()[name]["pid"]
    with stopped(pid):
        started = time.monotonic()
        assert llm.stats().unavailable == (name,)
        report = llm.flush()
        assert (report["complete"], report["unavailable"]) == (False, [name])
        assert time.monotonic() - started < 10
    assert wait_for(lambda: not llm.stats().unavailable)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpu", "shard"])
def test_an_adapter_closes_within_seconds_though_one_of_its_actors_is_stopped(
    ray_local: None, kind: str
) -> None:
    from tiny_config import endless_llama

    from litecache.actors.calls import actor_names
    from litecache.config import CacheConfig

    config = CacheConfig(num_blocks=64, ram_bytes="4MB", max_model_len=512)
    llm = KVCacheAdapter(endless_llama(), weights="random", cache_config=config, num_threads=1)
    actors = llm.group.status()
    (pid,) = [actor["pid"] for name, actor in actors.items() if f":{kind}" in name]
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        llm.close()
        assert time.monotonic() - started < 15
        assert actor_names(llm.group.spec.group) == []
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_group_errors_of_a_lost_ray_are_no_passing_ones() -> None:
    """A poll is not tried again for minutes when the process has no Ray any more."""
    from litecache.actors.calls import UNREACHABLE
    from litecache.actors.cluster import RayConnection

    gone = RayConnection(os.getpid(), "session-of-before", "01")
    with pytest.raises(GroupError) as caught:
        gone.check()
    assert not isinstance(caught.value, UNREACHABLE)
