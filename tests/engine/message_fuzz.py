"""Fuzzed messages to an engine and to the actor around it, and the good request after each.

Messages are made by changing good ones: a request with some fields drawn anew (of another type,
out of range, at a bound, or valid), ids, numbers and texts of the other calls likewise, and the
bytes of a driver's packed call. Each must be taken or refused by a LiteCacheError, and the next
good request must get exactly the tokens that it got from the fresh engine.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import dataclasses
import queue
import random
import string
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from engine_harness import Harness, family_source
from plan_driver import VOCAB

from litecache.actors.gpu_cache import GpuCache
from litecache.actors.messages import ReplicaMethod, answering, pack_call, pack_guidance
from litecache.errors import LiteCacheError
from litecache.token_ids import TokenIds
from litecache.types import (
    CACHE_USES,
    MESSAGE_VERSION,
    RETENTIONS,
    FinishReason,
    Guidance,
    Request,
    SamplingParams,
    TokenDelta,
    mask_bytes,
)

ANSWER_TIMEOUT_S = 60.0
POLL_S = 0.02
REQUEST_FIELDS = [each.name for each in dataclasses.fields(Request)]
SAMPLING_FIELDS = [each.name for each in dataclasses.fields(SamplingParams)]
FIELDS = (
    *REQUEST_FIELDS,
    *SAMPLING_FIELDS,
    *("epoch", "ack", "hold_s", "gap_s", "timeout_s", "request_ids", "abort_client"),
    *("guidance", "num_tokens", "token_ids"),
)
IDS = ("request_ids", "eos_token_ids", "suppress_tokens", "begin_suppress_tokens")
MASK = b"\xff" * mask_bytes(VOCAB)
_BIASES = ("sequence_bias", "bad_words_ids")
_FLOATS = (
    *("max_time_s", "temperature", "top_p", "min_p", "hold_s", "gap_s", "timeout_s"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


@dataclass
class Tally:
    """What a run saw.

    Attributes:
        kinds: messages by kind; accepted: those that were taken.
        changed: by field, how often it was drawn anew.
        raw: errors that are no LiteCacheError, with the message's number.
        unanswered: messages after which the good request was not answered as before.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    raw: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)

    @property
    def share_accepted(self) -> float:
        """Of all messages."""
        return self.accepted.total() / max(1, self.kinds.total())


class MessageFuzz:
    """A tiny engine with a RAM shard below it, the actor's methods over it, and one fuzzer."""

    def __init__(self) -> None:
        self.harness = Harness(family_source("llama"), folders=[None], max_requests=16)
        self.engine = self.harness.engine
        self.door = _door_over(self.harness)
        self.tally = Tally()
        self._deltas: queue.SimpleQueue[list[tuple[str, TokenDelta]]] = queue.SimpleQueue()
        self.engine._sink = self._sink
        self.loop = asyncio.new_event_loop()
        self._number = 0
        self._expected = self.ask()

    def _sink(self, items: list[tuple[str, TokenDelta]]) -> None:
        self.door._sink(items)
        self._deltas.put(items)

    def ask(self) -> tuple[int, ...]:
        """The good request's tokens."""
        name = f"good-{uuid.uuid4()}"
        self.engine.submit([Request(name, "good", (5, 6, 7, 8), SamplingParams(3))])
        tokens: tuple[int, ...] = ()
        while True:
            for _, delta in self._deltas.get(timeout=ANSWER_TIMEOUT_S):
                if delta.request_id == name:
                    tokens += delta.token_ids
                    if delta.finish_reason is FinishReason.LENGTH:
                        return tokens
                    assert delta.finish_reason is None, delta

    def round(self, rng: random.Random) -> None:
        """One message, and the good request after it."""
        self._number += 1
        kind, send = self._message(rng)
        self.tally.kinds[kind] += 1
        label = f"message {self._number} ({kind})"
        try:
            send()
        except LiteCacheError:
            pass
        except Exception as error:
            self.tally.raw.append(f"{label}: {type(error).__name__}: {error}"[:300])
        else:
            self.tally.accepted[kind] += 1
        try:
            answered = self.ask() == self._expected
        except Exception as error:
            answered, label = False, f"{label}: {type(error).__name__}: {error}"[:300]
        if not answered:
            self.tally.unanswered.append(label)
        # what was taken is not waited for
        self.engine.call(lambda: self.engine._carry_out(self._end_all()))

    def _end_all(self) -> Any:
        scheduler = self.engine._scheduler
        return scheduler.abort([name for _, name in scheduler.open_requests()])

    def check(self) -> None:
        """Nothing is left behind, no thread has ended, no message failed inside the engine."""
        metrics = self.engine.metrics
        assert self.engine._thread.is_alive()
        assert metrics.value("litecache_failed_messages") == 0
        assert metrics.value("litecache_failed_steps", kind="error") == 0
        names = {thread.name for thread in threading.enumerate()}
        assert {"litecache-engine", "litecache-save"} <= names
        self.harness.check()

    def close(self) -> None:
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.harness.close()

    # Messages

    def _message(self, rng: random.Random) -> tuple[str, Callable[[], object]]:
        engine, door = self.engine, self.door
        kind = rng.choices(
            (
                "submit",
                "actor submit",
                "actor poll",
                "wire",
                "guide",
                "ids",
                "actor abort",
                "other",
            ),
            (40, 15, 15, 8, 6, 8, 4, 8),
        )[0]
        if kind == "submit":
            requests = self._requests(rng)
            return kind, lambda: engine.submit(requests)
        if kind == "actor submit":
            client, requests = self._client(rng), self._requests(rng)
            return kind, lambda: self._run(door.submit(client, requests))
        if kind == "actor poll":
            poll = [self._client(rng)]
            poll += [self._maybe(rng, n, v) for n, v in (("epoch", ""), ("ack", 0))]
            poll += [self._maybe(rng, n, v) for n, v in (("hold_s", 0.001), ("gap_s", 0.0))]
            requests = self._requests(rng) if rng.random() < 0.3 else ()
            return kind, lambda: self._run(door.poll(*poll, requests))
        if kind == "wire":
            method, data = self._packed(rng)
            handler = answering(method, (door.submit, door.poll, door.guide)[method - 1])
            return kind, lambda: self._run(handler(data))
        if kind == "ids":
            call = rng.choice([engine.abort, engine.pause, engine.resume])
            ids = self._maybe(rng, "request_ids", [f"r{rng.randrange(9)}"], 0.5)
            return f"engine {call.__name__}", lambda: call(ids)
        if kind == "guide":
            guidance = self._maybe(rng, "guidance", self._guidance(rng))
            call = rng.choice([engine.guide, lambda each: self._run(door.guide(each))])
            return kind, lambda: call(guidance)
        if kind == "actor abort":
            ids = self._maybe(rng, "request_ids", [f"r{rng.randrange(9)}"], 0.5)
            return kind, lambda: self._run(door.abort(ids))
        timeout = self._maybe(rng, "timeout_s", 5.0, 0.5)
        client = self._maybe(rng, "abort_client", "c", 0.5)
        calls: dict[str, Callable[[], object]] = {
            "engine flush": lambda: engine.flush(timeout),
            "engine clear_pool": lambda: engine.clear_pool(timeout),
            "engine abort_client": lambda: engine.abort_client(client),
            "engine stats": engine.stats,
            "actor flush": lambda: self._run(door.flush(timeout)),
            "actor clear_pool": lambda: self._run(door.clear_pool()),
            "actor stats": lambda: self._run(door.stats()),
            "actor info": lambda: self._run(door.info()),
        }
        name = rng.choice(list(calls))
        return name, calls[name]

    def _run(self, call: Coroutine[Any, Any, object]) -> object:
        async def bounded() -> object:
            # a poll that is held has been taken
            done, waiting = await asyncio.wait({asyncio.ensure_future(call)}, timeout=POLL_S)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            return [task.result() for task in done]

        return self.loop.run_until_complete(bounded())

    def _client(self, rng: random.Random) -> Any:
        return self._maybe(rng, "client_id", "c", 0.05)

    def _requests(self, rng: random.Random) -> Any:
        if rng.random() < 0.02:
            return rng.choice([None, "ab", 7, [None], [[]], {}, [{}], [SamplingParams(1)]])
        requests = [self._request(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        return requests + requests[:1] if rng.random() < 0.03 else requests

    def _guidance(self, rng: random.Random) -> list[Guidance]:
        """For requests that are open as like as not."""
        names = [name for _, name in self.engine.call(self.engine._scheduler.open_requests)]
        good = Guidance(rng.choice([*names, "r0"]), rng.randint(2, 9), (1, 2), MASK)
        changed = {name: self._maybe(rng, name, getattr(good, name)) for name in Guidance._fields}
        return [good, good._replace(**changed)][rng.randrange(2) :]

    def _request(self, rng: random.Random) -> Request:
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 4, 16, 17, 40]))]
        sampling = SamplingParams(rng.randint(1, 4), eos_token_ids=(rng.randrange(VOCAB),))
        request = Request(f"r{self._number}-{rng.randrange(1 << 30)}", "c", prompt, sampling)
        chosen = rng.sample((*REQUEST_FIELDS, *SAMPLING_FIELDS), rng.choice([0, 1, 1, 1, 2, 4]))
        # as an unpickled message could bring them: no constructor has seen the values
        request, sampling = copy.copy(request), copy.copy(sampling)
        object.__setattr__(request, "sampling", sampling)
        for name in chosen:
            target: Any = sampling if name in SAMPLING_FIELDS else request
            object.__setattr__(target, name, self._draw(rng, name, getattr(target, name)))
        return request

    def _packed(self, rng: random.Random) -> tuple[ReplicaMethod, bytes]:
        method = rng.choice(list(ReplicaMethod))
        arguments: list[Any] = ["c"]
        if method is ReplicaMethod.POLL:
            arguments += ["", 0, 0.001, 0.0]
        good = Request(f"w{self._number}", "c", (1, 2, 3), SamplingParams(2))
        if rng.random() < 0.1:
            arguments = arguments[: rng.randrange(len(arguments))] + [None] * rng.randrange(3)
        data = bytearray(pack_call(*arguments, requests=[good]))
        if method is ReplicaMethod.GUIDE:
            data = bytearray(pack_guidance([Guidance("w", 3, (1, 2), MASK)] * rng.randrange(3)))
        for _ in range(rng.choice([0, 1, 1, 2, 8])):
            place = rng.randrange(len(data))
            change = rng.randrange(4)
            if change == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif change == 1:
                data[place] = rng.randrange(256)
            elif change == 2:
                del data[place : place + rng.randrange(1, 9)]
                data = data or bytearray(b"\x00")
            else:
                data[place:place] = rng.randbytes(rng.randrange(1, 9))
        return method, bytes(data)

    # Values

    def _maybe(self, rng: random.Random, name: str, good: Any, share: float = 0.2) -> Any:
        return self._draw(rng, name, good) if rng.random() < share else good

    def _draw(self, rng: random.Random, name: str, good: Any) -> Any:
        """Another value for a field: half of them are such as a caller could mean."""
        self.tally.changed[name] += 1
        return self._plausible(rng, name, good) if rng.random() < 0.5 else self._any(rng)

    def _plausible(self, rng: random.Random, name: str, good: Any) -> Any:
        ids = [rng.randrange(VOCAB) for _ in range(rng.randrange(6))]
        if name == "prompt":
            return TokenIds(ids or [1])
        if name == "sampling":
            return SamplingParams(1, temperature=rng.random(), top_k=rng.randrange(9))
        if name == "mask":
            return rng.choice([MASK, b"", MASK[:-1], b"\1" + MASK[1:]])
        if name == "token_ids":
            return tuple(ids)
        if name == "guidance":
            return []
        if name == "version":
            return rng.choice([MESSAGE_VERSION, MESSAGE_VERSION - 1])
        if name == "sequence_bias":
            return tuple(((i, *ids[:2]), rng.choice([-1.5, 3.0, float("-inf")])) for i in ids)
        if name == "bad_words_ids":
            return tuple((i, *ids[:2]) for i in ids)
        if name in IDS[1:]:
            return tuple(ids)
        if name == "request_ids":
            return [f"r{i}" for i in ids]
        if name == "cache":
            return rng.choice(CACHE_USES)
        if name == "retention":
            return rng.choice(RETENTIONS)
        if name in ("cache_salt", "request_id", "epoch", "client_id", "abort_client"):
            return good if rng.random() < 0.3 else "".join(rng.choices(string.printable, k=9))
        if name in ("top_p", "min_p"):
            return rng.random() or 1.0
        if name in ("hold_s", "gap_s"):
            return rng.random() * 0.01
        if name in _FLOATS:
            return rng.choice([0.001, 0.7, 1, 1.5, 7.0, 9.3e9, 1e-40])
        if name == "logprobs":
            return rng.choice([None, 0, 3, VOCAB])
        return rng.choice([0, 1, 2, 3, 17, np.int64(2)])

    def _any(self, rng: random.Random) -> Any:
        nan, inf = float("nan"), float("inf")
        choices: list[Any] = [
            *(None, True, 0, -1, VOCAB, 2**31, 2**63 - 1, 2**63, -(2**63), 2**70, 10**400),
            *(0.5, -0.0, nan, inf, -inf, 1e39, 1e308, 5e-324, 1 + 2j),
            *("", "x", "1", "\x00", "\udcff", "s" * 5000, b"", b"\xff"),
            *((), [], {}, set(), [None], (1, "2"), ((1,),), ((),), [[1]], ["a"], ("r1",), [-1]),
            *(((1,), nan), (((1, 2), 1e39),), (((VOCAB,), 0.5),), {"a": 1}, range(4)),
            *(np.array([1, 2]), np.float32(0.5), np.int64(-1), object(), int, len),
            *((VOCAB,), (2**70,), (1.5,), tuple(range(VOCAB)), frozenset({1})),
        ]
        return rng.choice(choices)


def _door_over(harness: Harness) -> GpuCache:
    """The actor's class around an engine that is there, without Ray."""
    door = object.__new__(GpuCache)
    loading: concurrent.futures.Future[Any] = concurrent.futures.Future()
    loading.set_result(harness.engine)

    class NoShards:
        def clients(self) -> list[Any]:
            return []

    class NoRemote:
        remote_shards = 0

    class NoSocket:
        address = ""

    vars(door).update(
        _name="fuzzed",
        _epoch="e",
        _draining_until=0.0,
        _node_id="n",
        _loading=loading,
        _loop=None,
        _outbox=None,
        _door=NoSocket(),
        _shards=NoShards(),
        _remote=NoRemote(),
        _metrics=harness.engine.metrics,
        _stopped=threading.Event(),
        _ending=None,
    )
    return door
