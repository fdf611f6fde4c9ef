"""`litecache serve` as a user runs it: tenants, streams, clients that leave or stall, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from schema_fuzz import SchemaFuzz, fault
from served import ALICE, BOB, Server, ray_folder, save_tiny_model, start, write_keys

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]
PROMPT = "a prompt that two tenants send to the same server, and of some length"
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def again(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts the server, each time over the same folder of blocks."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "store").mkdir()
    keys = write_keys(folder / "keys")
    cache = {"storage_dir": folder / "store", "num_blocks": 128, "ram_bytes": "16MB"}
    with ray_folder() as ray:
        yield lambda: start(model_folder, ray, "--api-keys", str(keys), **cache)


@pytest.fixture(scope="module")
def server(again: Any) -> Iterator[Server]:
    started = again()
    yield started
    if started.process.poll() is None:
        started.stop()


NOTHING = {"reused_tokens": {}, "found_tokens": {}}
COUNTERS = ("found_tokens_total", "reused_tokens_total")


def told(server: Server, prompt: str, key: str) -> dict[str, Any]:
    """An answer, without what tells it from another one to the same request."""
    answer = server.post("/v1/completions", {**BODY, "prompt": prompt}, key)
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def counters(server: Server) -> list[str]:
    """What the server's metrics tell of reuse."""
    with server.client(BOB) as client:
        lines = client.get("/metrics").text.splitlines()
    return [line for line in lines if any(name in line for name in COUNTERS)]


@pytest.mark.parametrize("tier", ["gpu", "ram"])
def test_two_keys_share_nothing_in_any_tier_and_each_finds_its_own(
    server: Server, tier: str
) -> None:
    prompt = f"in {tier}: {PROMPT}"
    told(server, prompt, ALICE)
    if tier == "ram":  # more than the pool holds
        for number in range(16):
            told(server, f"{number}, " * 80, ALICE)
    before = counters(server)
    bobs = told(server, prompt, BOB)
    assert (bobs["usage"]["prompt_tokens_details"], bobs["usage"]["litecache"]) == (
        {"cached_tokens": 0},
        NOTHING,
    )
    assert counters(server) == before
    # as of a prompt that nobody has sent, in every word
    alices = told(server, prompt, ALICE)
    assert list(alices["usage"]["litecache"]["found_tokens"]) == [tier]
    assert alices["usage"]["litecache"]["found_tokens"][tier] >= 48
    assert {**alices, "usage": None} == {**bobs, "usage": None}
    assert told(server, prompt, BOB)["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48


def test_cache_control_tells_a_key_nothing_of_another_one(server: Server) -> None:
    known, unknown = "a prompt that alice alone has had kept on disk, pinned", "another prompt"
    server.post("/v1/cache/warm", {"prompt": known})
    assert server.post("/v1/cache/pin", {"prompt": known})["tokens"] >= 32
    salts = [{}, {"cache_salt": ""}, {"cache_salt": "alice"}, {"cache_salt": "key:0"}]
    with server.client(BOB) as client:
        client.post("/v1/cache/delete", json={})  # his own
        for salt in salts:
            for action in ("unpin", "pin", "export"):
                answers = [
                    client.post(f"/v1/cache/{action}", json={"prompt": prompt, **salt})
                    for prompt in (known, unknown)
                ]
                assert len({answer.status_code for answer in answers}) == 1, action
                assert "error" in answers[0].json() or answers[0].json()["tokens"] == 0
                if answers[0].is_error:
                    assert answers[0].json() == answers[1].json()
            assert client.post("/v1/cache/delete", json=salt).json()["blocks"] == 0
        warmed = client.post("/v1/cache/warm", json={"prompt": known}).json()
        assert warmed["tokens"]["computed"] == warmed["prompt_tokens"]
        assert client.post("/v1/cache/delete", json={}).json()["blocks"] > 0
    # nothing that bob did has changed what alice has
    assert server.post("/v1/cache/unpin", {"prompt": known})["tokens"] >= 32
    assert told(server, known, ALICE)["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32


def test_who_has_no_key_gets_no_answer(server: Server) -> None:
    with server.client("nobody-0123456789") as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/ready").status_code == 200


def test_a_stream_comes_piece_by_piece_and_equals_the_whole_answer(server: Server) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key=ALICE)
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "é🙂?"}],
        "max_tokens": 40,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == whole
    assert len([text for text in texts if text]) > 10


def test_a_client_that_goes_away_frees_its_blocks(server: Server) -> None:
    body = {**BODY, "max_tokens": 400, "ignore_eos": True}
    for stream in (True, False):

        async def leave(stream: bool = stream) -> None:
            headers = {"authorization": f"Bearer {ALICE}"}
            async with httpx2.AsyncClient(base_url=server.url, headers=headers) as client:
                call = client.post("/v1/completions", json={**body, "stream": stream})
                with pytest.raises((TimeoutError, asyncio.TimeoutError, httpx2.HTTPError)):
                    await asyncio.wait_for(call, 0.2)

        asyncio.run(leave())
        server.await_idle(10)


def test_a_prefix_goes_out_as_a_file_and_comes_back_under_its_keys_salt(server: Server) -> None:
    prompt = "This prefix is warmed, pinned, exported, deleted and imported again"
    asked = {"prompt": prompt}
    count = server.post("/tokenize", asked)["count"]
    assert server.post("/v1/cache/warm", asked)["tokens"]["computed"] == count
    assert server.post("/v1/cache/pin", asked)["tokens"] >= 48
    assert server.post("/v1/cache/unpin", asked)["tokens"] >= 48
    with server.client() as client:
        file = client.post("/v1/cache/export", json=asked)
        assert file.status_code == 200
        missing = client.post("/v1/cache/export", json={"prompt": "nothing of this"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_stored")
        assert server.post("/v1/cache/delete", {})["blocks"] > 0
        nothing = server.post("/v1/completions", {**BODY, "prompt": prompt, "max_tokens": 1})
        assert nothing["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        server.post("/v1/cache/delete", {})
        back = client.post("/v1/cache/import", content=file.content)
        assert back.status_code == 200, back.text
        assert back.json()["tokens"] >= 48
        damaged = bytearray(file.content)
        damaged[len(damaged) // 2] ^= 1
        assert client.post("/v1/cache/import", content=bytes(damaged)).status_code == 400
    with server.client(BOB) as client:  # it belongs to the salt of the other key
        assert client.post("/v1/cache/import", content=file.content).status_code == 400
    found = server.post("/v1/completions", {**BODY, "prompt": prompt, "max_tokens": 1})
    assert found["usage"]["litecache"]["found_tokens"].keys() & {"ram", "disk"}


async def streamed(address: tuple[str, int], body: Any, leaves_after: int | None) -> str | None:
    """The text of a stream over a connection of its own; None = its client left."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        data = json.dumps({**body, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ALICE}\r\n"
        head += f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        if leaves_after == 0:
            await asyncio.sleep(random.random() / 2)
            return None
        assert b" 200 " in await reader.readline()
        text = ""
        events = 0
        async for line in reader:  # a chunk's size and its end stand in lines of their own
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                return text
            text += json.loads(line[6:])["choices"][0]["text"]
            events += 1
            if events == leaves_after:
                return None
        raise AssertionError(f"a stream without its end: {text!r}")
    finally:
        if random.random() < 0.5:  # some go without a word
            hard = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hard)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def test_of_a_thousand_streams_none_is_wrong_and_those_that_leave_hold_no_block(
    server: Server,
) -> None:
    dice = random.Random(5)
    body = {**BODY, "max_tokens": 24, "ignore_eos": True}
    prompts = [f"prompt number {i} of some length" for i in range(16)]
    expected = {
        prompt: server.post("/v1/completions", {**body, "prompt": prompt})["choices"][0]["text"]
        for prompt in prompts
    }
    chosen = [(dice.choice(prompts), dice.choice([None, 0, 1, 3])) for _ in range(1000)]

    async def storm() -> list[str | None]:
        calls = (
            streamed(server.address, {**body, "prompt": prompt}, leaves)
            for prompt, leaves in chosen
        )
        return await asyncio.gather(*calls)

    texts = asyncio.run(storm())
    for (prompt, leaves), text in zip(chosen, texts, strict=True):
        # events are merged: a stream may end before its client has seen as many
        assert text in ([expected[prompt]] if leaves is None else [expected[prompt], None])
    assert None in texts
    server.await_idle()


def test_requests_against_the_openapi_document_are_answered_and_none_with_500(
    server: Server,
) -> None:
    with server.client() as client:
        fuzz = SchemaFuzz(client.get("/openapi.json").json(), "tiny")
        statuses = set()
        for seed in range(400):
            method, path, headers, body = fuzz.request(seed)
            answer = client.request(method, path, headers=headers, content=body)
            assert fault(answer.status_code, answer.text, method) is None, (seed, path, body)
            statuses.add(answer.status_code)
    assert statuses >= {200, 400, 404, 405}
    assert server.post("/v1/completions", BODY)["usage"]["completion_tokens"] == 16
    server.await_idle()


def test_a_thousand_connections_that_stall_stop_nobody(server: Server) -> None:
    def connect() -> socket.socket:
        return socket.create_connection(server.address, timeout=30)

    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ALICE}\r\n"
    halves = [
        b"",
        b"POST /v1/completions HT",
        b"\x00\xff\xfe\r\n\r\n",
        b"GET / HTTP/1.1\r\n" * 50,
        head.encode(),
        f"{head}content-length: 999\r\n\r\n{{".encode(),
        f"{head}transfer-encoding: chunked\r\n\r\n5\r\n{{".encode(),
        f"{head}content-length: 99999999999\r\n\r\n{{".encode(),
    ]
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(connect()) for _ in range(1000)]
        for index, connection in enumerate(stalled):
            connection.sendall(halves[index % len(halves)])
        for _ in range(5):
            assert server.post("/v1/completions", BODY)["usage"]["completion_tokens"] == 16
            for index, connection in enumerate(stalled):
                with contextlib.suppress(OSError):  # those that are no HTTP were closed
                    connection.sendall(b" "[: index % len(halves) in (5, 6)])
    assert server.post("/v1/completions", BODY)["usage"]["completion_tokens"] == 16
    server.await_idle()


def test_stopped_it_answers_what_is_open_and_starts_again_with_what_is_on_disk(
    server: Server, again: Any
) -> None:
    answered: list[dict[str, Any]] = []
    body = {**BODY, "max_tokens": 300, "ignore_eos": True}
    asking = threading.Thread(
        target=lambda: answered.append(server.post("/v1/completions", body)), daemon=True
    )
    asking.start()
    until = time.monotonic() + 60
    while not answered and not server.metric("engine_requests_running"):
        assert time.monotonic() < until
    alone = "a prompt of alice's alone, of which bob asks after everything was stopped"
    server.post("/v1/completions", {**BODY, "prompt": alone})
    server.stop()
    asking.join(30)
    assert [answer["usage"]["completion_tokens"] for answer in answered] == [300]
    later = again()
    try:
        assert told(later, alone, BOB)["usage"]["litecache"] == NOTHING
        first = later.post("/v1/completions", BODY)
        assert first["usage"]["litecache"]["found_tokens"].get("disk", 0) >= 48
        assert answered[0]["choices"][0]["text"].startswith(first["choices"][0]["text"][:4])
    finally:
        later.stop()
