"""Whatever a message holds, it harms its own request alone, and the engine answers the next one."""

from __future__ import annotations

import copy
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_harness import Harness, family_source

from litecache.engine.engine import Engine
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.errors import ConfigError, LiteCacheError, RequestTimeout
from litecache.types import FinishReason, Request, SamplingParams, TokenDelta

NAN, INF = float("nan"), float("inf")
GOOD = Request("good", "c", (1, 2, 3), SamplingParams(2))


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    torch.set_num_threads(1)
    with Harness(family_source("llama")) as made:
        yield made


def ends_of(harness: Harness, *request_ids: str) -> dict[str, TokenDelta]:
    """The last deltas of these requests."""
    ends: dict[str, TokenDelta] = {}
    while len(ends) < len(request_ids):
        for _, delta in harness.deltas.get(timeout=60):
            if delta.finish_reason is not None and delta.request_id in request_ids:
                ends[delta.request_id] = delta
    return ends


def with_field(name: str, value: object) -> Request:
    """A good request with one field changed, as an unpickled message could bring it."""
    request, sampling = copy.copy(GOOD), copy.copy(GOOD.sampling)
    on_request = name in {field.name for field in dataclasses.fields(Request)}
    object.__setattr__(request if on_request else sampling, name, value)
    if not on_request:
        object.__setattr__(request, "sampling", sampling)
    return request


BAD_FIELDS: list[tuple[str, Any]] = [
    ("request_id", None),
    ("request_id", ""),
    ("request_id", ["a"]),
    ("client_id", 7),
    ("client_id", "\ud800"),
    ("prompt", (1, 2)),
    ("prompt", None),
    ("sampling", {"max_new_tokens": 1}),
    ("num_resumed_tokens", 3),
    ("num_resumed_tokens", -1),
    ("num_resumed_tokens", "1"),
    ("cache_salt", "\udcff"),
    ("cache_salt", ["a"]),
    ("cache_salt", None),
    ("cache_salt", "s" * 5000),
    ("cache", "no_store"),
    ("cache", ""),
    ("cache", None),
    ("cache", ["default"]),
    ("cache", True),
    ("expires_s", -1),
    ("expires_s", 2**32),
    ("expires_s", 1.5),
    ("retention", "highest"),
    ("retention", 2),
    ("priority", "urgent"),
    ("priority", None),
    ("priority", 0.5),
    ("priority", 10**400),
    ("max_time_s", "1"),
    ("max_time_s", NAN),
    ("max_time_s", INF),
    ("max_time_s", 10**400),
    ("max_time_s", 0),
    ("logits", -1),
    ("logits", 2**63),
    ("logits", True),
    ("logits", None),
    ("logits", 1.0),
    ("mask", b""),
    ("mask", bytes(28)),
    ("mask", b"\x01" * 27),
    ("mask", "x" * 28),
    ("mask", [1] * 28),
    ("version", 2),
    ("max_new_tokens", "4"),
    ("max_new_tokens", 2.0),
    ("max_new_tokens", True),
    ("min_new_tokens", -1),
    ("min_new_tokens", 2**63),
    ("temperature", "hot"),
    ("temperature", 1e39),
    ("temperature", None),
    ("top_k", 2**63),
    ("top_k", 1.5),
    ("top_p", 0),
    ("top_p", NAN),
    ("min_p", -0.1),
    ("seed", 2**63),
    ("seed", None),
    ("sample_index", -1),
    ("eos_token_ids", (211,)),
    ("eos_token_ids", (-1,)),
    ("eos_token_ids", (1.0,)),
    ("eos_token_ids", 5),
    ("logprobs", 212),
    ("logprobs", "all"),
    ("suppress_tokens", (211,)),
    ("suppress_tokens", "ab"),
    ("suppress_tokens", tuple(range(211))),
    ("begin_suppress_tokens", (-1,)),
    ("begin_suppress_tokens", None),
    ("bad_words_ids", ((),)),
    ("bad_words_ids", ((1, 211),)),
    ("bad_words_ids", (1, 2)),
    ("sequence_bias", (((1,), NAN),)),
    ("sequence_bias", (((1,), INF),)),
    ("sequence_bias", (((1,), 1e39),)),
    ("sequence_bias", (((1,), "x"),)),
    ("sequence_bias", (((), 1.0),)),
    ("sequence_bias", (((211,), 1.0),)),
    ("sequence_bias", ((1.0,),)),
    ("repetition_penalty", 0),
    ("repetition_penalty", INF),
    ("presence_penalty", NAN),
    ("frequency_penalty", "x"),
    ("no_repeat_ngram_size", -1),
    ("no_repeat_ngram_size", 1.0),
    ("columns", (-1,)),
    ("padding", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_bad_field_is_refused_by_name_and_the_next_request_is_answered(
    harness: Harness, name: str, value: object
) -> None:
    told = {"prompt": "input_ids", "max_time_s": "max_time"}.get(name, name)
    with pytest.raises(ConfigError, match=rf"^{told}="):
        harness.engine.submit([with_field(name, value)])
    assert len(harness.run([[1, 2, 3]], 2)[0]) == 2


def test_every_field_of_a_request_is_among_those_that_are_tried() -> None:
    fields = {f.name for kind in (Request, SamplingParams) for f in dataclasses.fields(kind)}
    assert fields == {name for name, _ in BAD_FIELDS}


@pytest.mark.parametrize("requests", [None, "ab", 5, [None], [7], [SamplingParams(1)], {}])
def test_what_is_no_list_of_requests_is_refused(harness: Harness, requests: Any) -> None:
    with pytest.raises(ConfigError, match=r"^requests?="):
        harness.engine.submit(requests)
    assert len(harness.run([[1, 2, 3]], 2)[0]) == 2


@pytest.mark.parametrize("ids", [None, "r1", 5, [None], [["a"]], [""], ["\udc80"], {"a": 1}])
def test_what_are_no_request_ids_is_refused_by_every_call_that_takes_them(
    harness: Harness, ids: Any
) -> None:
    for call in (harness.engine.abort, harness.engine.pause, harness.engine.resume):
        with pytest.raises(ConfigError, match=r"^request_ids="):
            call(ids)
    assert len(harness.run([[1, 2, 3]], 2)[0]) == 2


@pytest.mark.parametrize("timeout", [None, "1", NAN, -1.0, INF])
def test_a_timeout_that_is_no_number_is_refused(harness: Harness, timeout: Any) -> None:
    for call in (harness.engine.flush, harness.engine.clear_pool):
        with pytest.raises(ConfigError, match="timeout_s="):
            call(timeout)


@pytest.mark.parametrize("client_id", [None, 5, "", ["c"], "\ud800"])
def test_what_is_no_client_id_is_refused(harness: Harness, client_id: Any) -> None:
    with pytest.raises(ConfigError, match="client_id="):
        harness.engine.abort_client(client_id)


def test_a_deadline_of_centuries_holds_up_nobody(harness: Harness) -> None:
    for number, far in enumerate((9.3e9, 3e38)):
        slow = Request(f"far{number}", "c", (1, 2, 3), SamplingParams(200), max_time_s=far)
        harness.engine.submit([slow])
        harness.engine.pause([slow.request_id])
        assert len(harness.run([[1, 2, 3]], 2)[0]) == 2
        harness.engine.stats()
        harness.engine.abort([slow.request_id])
        (end,) = ends_of(harness, slow.request_id).values()
        assert end.finish_reason is FinishReason.ABORT


def test_the_id_of_an_open_request_is_refused_and_the_open_one_goes_on(harness: Harness) -> None:
    first = Request("twin", "c", (1, 2, 3), SamplingParams(200))
    harness.engine.submit([first])
    other = Request("twin", "d", (4,), SamplingParams(1))
    with pytest.raises(ConfigError, match=r"request_id='twin'.*no other open request"):
        harness.engine.submit([other])
    once = Request("once", "d", (4,), SamplingParams(1))
    with pytest.raises(ConfigError, match="request_id='once'"):
        harness.engine.submit([once, once])
    assert ends_of(harness, "twin")["twin"].finish_reason is FinishReason.LENGTH
    harness.engine.submit([other, once])
    assert set(ends_of(harness, "twin", "once")) == {"twin", "once"}


def test_an_abort_that_overtakes_its_request_ends_it(harness: Harness) -> None:
    harness.engine.abort(["late"])
    harness.engine.submit([Request("late", "c", (1, 2, 3), SamplingParams(200))])
    assert ends_of(harness, "late")["late"].finish_reason is FinishReason.ABORT


def test_a_request_that_cannot_be_queued_fails_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Scheduler.add

    def add(self: Scheduler, request: Request, now: float) -> Any:
        if request.request_id == "poison":
            raise ZeroDivisionError("planted")
        return original(self, request, now)

    monkeypatch.setattr(Scheduler, "add", add)
    names = ("a", "poison", "b")
    harness.engine.submit([dataclasses.replace(GOOD, request_id=name) for name in names])
    ends = ends_of(harness, *names)
    assert ends["poison"].finish_reason is FinishReason.ERROR
    assert "planted" in str(ends["poison"].error)
    assert {ends[name].finish_reason for name in "ab"} == {FinishReason.LENGTH}


@pytest.mark.parametrize("method", ["abort", "set_paused"])
def test_a_message_that_raises_does_not_end_the_thread(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(Scheduler, method, broken)
        harness.engine.abort(["x"])
        harness.engine.pause(["x"])
        harness.engine.stats()
    assert len(harness.run([[1, 2, 3]], 2)[0]) == 2


def test_a_call_that_is_not_answered_in_time_says_so(harness: Harness) -> None:
    gate = threading.Event()
    blocked = threading.Thread(target=harness.engine.call, args=(gate.wait,))
    blocked.start()
    try:
        with pytest.raises(RequestTimeout, match=r"not answered within 0\.05 s"):
            harness.engine.call(lambda: None, 0.05)
    finally:
        gate.set()
        blocked.join()


def dead_engine(monkeypatch: pytest.MonkeyPatch, on_death: Callable | None) -> Harness:
    """An engine whose thread has met a bug while a request runs."""
    made = Harness(family_source("llama"))
    made.engine._on_death = on_death
    made.engine.submit([Request("open", "c", (1, 2, 3), SamplingParams(200))])
    made.deltas.get(timeout=60)

    def schedule(self: Scheduler, now: float) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    return made


def test_an_engine_whose_thread_dies_ends_its_requests_and_refuses_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = dead_engine(monkeypatch, None)
    end = ends_of(made, "open")["open"]
    assert end.finish_reason is FinishReason.ERROR
    assert "planted" in str(end.error)
    for call in (made.engine.stats, made.engine.flush, lambda: made.engine.submit([])):
        with pytest.raises(LiteCacheError, match=r"the engine has failed.*planted"):
            call()
    made.close()


def test_an_engine_whose_thread_dies_tells_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    told: queue.Queue[BaseException] = queue.Queue()
    made = dead_engine(monkeypatch, told.put)
    assert isinstance(told.get(timeout=60), ZeroDivisionError)
    made.close()


def test_a_call_under_way_when_the_thread_dies_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Harness(family_source("llama"))
    gate, entered = threading.Event(), threading.Event()

    def die() -> None:
        entered.set()
        gate.wait()
        raise SystemExit("planted")

    made.engine._inbox.put(die)
    entered.wait()
    errors: queue.Queue[Exception] = queue.Queue()

    def ask() -> None:
        try:
            made.engine.call(lambda: None, 600)
        except LiteCacheError as error:
            errors.put(error)

    asking = threading.Thread(target=ask)
    asking.start()
    gate.set()
    assert "planted" in str(errors.get(timeout=30))
    asking.join()
    made.close()


def test_a_device_that_answers_nothing_more_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not that of a request: no later step of this process could succeed."""
    from litecache.engine import engine as module

    def broken(device: torch.device, error: BaseException) -> None:
        raise LiteCacheError(f"{device} has failed: planted")

    def execute(plan: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    told: queue.Queue[BaseException] = queue.Queue()
    made = Harness(family_source("llama"))
    made.engine._on_death = told.put
    monkeypatch.setattr(module, "check_device", broken)
    monkeypatch.setattr(made.engine._runner, "execute", execute)
    made.engine.submit([GOOD])
    assert "has failed: planted" in str(told.get(timeout=60))
    engine: Engine = made.engine
    engine._thread.join(60)
    with pytest.raises(LiteCacheError, match="has failed: planted"):
        engine.submit([])
    made.close()
