"""Many clients at once, clients that leave, and requests that nobody would write.

`test_ray_serve.py` does the same with a thousand over sockets, `scripts/fuzz_serve.py` with 10,000.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import pytest
from local_server import LocalAdapter, client_of, make_service
from schema_fuzz import SchemaFuzz, fault

from litecache.serving.http_app import GETS, POSTS, HttpApp
from litecache.serving.pages import openapi
from litecache.serving.service import ModelService

COUNT = 60
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


def test_of_many_streams_none_is_wrong_and_those_that_leave_hold_no_block(
    adapter: LocalAdapter,
) -> None:
    dice = random.Random(COUNT)
    service = make_service(adapter, max_waiting=2 * COUNT)
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
    leavers = [dice.choice([None, 0, 1, 3]) for _ in range(COUNT)]
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
    assert len(stayed) >= COUNT // 5
    for stream in stayed:
        assert (stream.status, stream.text) == (200, expected[stream.prompt])
    assert (service.open_streams, service.admission.waiting) == (0, 0)
    adapter.check()


# those that need no group of actors
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/cache/warm")


@pytest.mark.slow
def test_no_request_of_the_openapi_document_makes_the_server_fail(service: ModelService) -> None:
    fuzz = SchemaFuzz(openapi(POSTS, GETS), "tiny", PATHS)
    statuses: Counter[int] = Counter()

    async def ask() -> None:
        async with client_of(service) as client:
            for seed in range(400):
                method, path, headers, body = fuzz.request(seed)
                if path.startswith("/v1/cache/") and path not in PATHS:
                    continue
                answer = await client.request(method, path, headers=headers, content=body)
                assert fault(answer.status_code, answer.text, method) is None, (seed, path, body)
                statuses[answer.status_code] += 1

    asyncio.run(ask())
    assert min(statuses[200], statuses[400]) > 40  # some of them are good
