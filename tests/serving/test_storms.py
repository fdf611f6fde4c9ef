"""Many clients at once, clients that leave, and bodies that nobody would write."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_server import LocalAdapter, client_of, make_service

from litecache.serving.http_app import POSTS, HttpApp
from litecache.serving.service import ModelService

COUNTS = [60, pytest.param(1000, marks=pytest.mark.slow)]
NEW_TOKENS = 24


class Streamer:
    """One client of a stream, which may go away after some events."""

    def __init__(self, prompt: str, leaves_after: int | None) -> None:
        self.prompt, self._leaves_after = prompt, leaves_after
        self.status = 0
        self.data = b""
        self._gone = asyncio.Event()
        self._sent = False

    async def run(self, app: HttpApp) -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Any:
        if not self._sent:
            self._sent = True
            body = {"model": "tiny", "prompt": self.prompt, "max_tokens": NEW_TOKENS}
            body |= {"temperature": 0, "stream": True, "ignore_eos": True}
            return {"type": "http.request", "body": json.dumps(body).encode()}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.data += message["body"]
        if self._leaves_after is not None and self.data.count(b"data:") > self._leaves_after:
            self._gone.set()

    @property
    def left(self) -> bool:
        return self._gone.is_set()

    @property
    def text(self) -> str:
        *events, end = self.data.decode().split("\n\n")[:-1]
        assert end == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", COUNTS)
def test_of_many_streams_none_is_wrong_and_those_that_leave_hold_no_block(
    adapter: LocalAdapter, count: int
) -> None:
    dice = random.Random(count)
    service = make_service(adapter, max_waiting=2 * count)
    prompts = [f"prompt number {i} of some length" for i in range(16)]
    rows = adapter.submit(
        [adapter.tokenizer(p)["input_ids"] for p in prompts],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=[],
    )
    decode = adapter.tokenizer.decode
    expected = {
        p: decode(row.wait(), skip_special_tokens=True)
        for p, row in zip(prompts, rows, strict=True)
    }
    leavers = [dice.choice([None, 0, 1, 3]) for _ in range(count)]
    streams: list[Streamer] = []

    async def storm() -> None:
        streams.extend(Streamer(dice.choice(prompts), leaves) for leaves in leavers)
        await asyncio.gather(*(stream.run(HttpApp(service)) for stream in streams))
        for _ in range(2000):  # an abort is told to the engine, which ends it within a step
            if not adapter._replicas.rows and not service.admission.running:
                return
            await asyncio.sleep(0.005)
        raise AssertionError((adapter._replicas.rows, service.admission.running))

    asyncio.run(storm())
    service.stop_threads()
    stayed = [stream for stream in streams if not stream.left]
    assert len(stayed) >= count // 5
    for stream in stayed:
        assert (stream.status, stream.text) == (200, expected[stream.prompt])
    assert (service.open_streams, service.admission.waiting) == (0, 0)
    adapter.check()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["tiny", "user", "text", "json_schema", "auto", "\x00", "🙂", "0"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "schema", "function", "name", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
    },
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
    "/v1/cache/warm": {"prompt": "x"},
}
LONG = ("max_tokens", "max_completion_tokens", "n")
FIELDS = {path: sorted(POSTS[path][0].model_fields) for path in GOOD}


@st.composite
def bodies(draw: Any) -> tuple[str, bytes]:
    """A good body with a few fields of any value, or bytes cut or flipped."""
    path = draw(st.sampled_from(sorted(GOOD)))
    changed = draw(st.dictionaries(st.sampled_from(FIELDS[path]), VALUES, max_size=3))
    # what runs for long is no bad input
    changed = {k: v for k, v in changed.items() if k not in LONG or isinstance(v, (str, list))}
    data = bytearray(json.dumps({**GOOD[path], **changed}).encode())
    if draw(st.booleans()):
        place = draw(st.integers(0, len(data) - 1))
        data[place] = draw(st.integers(0, 255))
    return path, bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.fixture
def loop() -> Any:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def check_bodies(service: ModelService, loop: Any, case: tuple[str, bytes]) -> None:
    path, data = case

    async def ask() -> Any:
        async with client_of(service) as client:
            return await client.post(path, content=data)

    check_answer(loop.run_until_complete(ask()))


def check_answer(answer: Any) -> None:
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_no_body_makes_the_server_fail(service: ModelService, loop: Any) -> None:
    @settings(max_examples=150)
    @given(bodies())
    def run(case: tuple[str, bytes]) -> None:
        check_bodies(service, loop, case)

    run()


def any_value(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(9 if depth < 3 else 7)
    if kind < 5:
        odd = [None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "0", "tiny", "user"]
        return dice.choice([*odd, "\x00", "\ud800", "🙂", "json_schema", "text", [], {}])
    if kind < 7:
        return dice.randrange(-300, 300)
    if kind == 7:
        return [any_value(dice, depth + 1) for _ in range(dice.randrange(4))]
    names = ["role", "content", "type", "schema", "json_schema", "function", "name", "x"]
    return {dice.choice(names): any_value(dice, depth + 1) for _ in range(dice.randrange(4))}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_bodies_do_not_either(service: ModelService, loop: Any) -> None:
    dice = random.Random(7)
    statuses: Counter[int] = Counter()

    async def ask() -> None:
        async with client_of(service) as client:
            for _ in range(10_000):
                path = dice.choice(sorted(GOOD))
                fields = [f for f in FIELDS[path] if f not in LONG]
                body = dict(GOOD[path])
                for field in dice.choices(fields, k=dice.randrange(4)):
                    body[field] = any_value(dice) if dice.random() < 0.5 else None
                data = bytearray(json.dumps(body).encode())
                if dice.random() < 0.3:
                    data[dice.randrange(len(data))] = dice.randrange(256)
                answer = await client.post(path, content=bytes(data))
                check_answer(answer)
                statuses[answer.status_code] += 1

    loop.run_until_complete(ask())
    assert min(statuses[200], statuses[400]) > 500  # some of them are good
