"""`litecache serve` as a user runs it: a process with Ray, Ray Serve and a group of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from local_server import model_config, tokenizer
from transformers import LlamaForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]
ALICE, BOB = "alice-secret-0123456789", "bob-secret-0123456789"
PROMPT = "a prompt that two tenants send to the same server, and of some length"
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}


@dataclass
class Server:
    """A running `litecache serve`."""

    process: subprocess.Popen[str]
    url: str
    folder: Path
    output: list[str]

    def client(self, key: str = ALICE) -> httpx2.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=120)

    def post(self, path: str, body: Any, key: str = ALICE) -> Any:
        with self.client(key) as client:
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

    def metric(self, name: str) -> float:
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        (found,) = [line for line in lines if line.startswith(f"litecache_server_{name} ")]
        return float(found.rpartition(" ")[2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "RAY_TMPDIR": str(folder), "RAY_SERVE_LOG_TO_STDERR": "0"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    LlamaForCausalLM(model_config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def start(model: Path, folder: Path, ray_folder: Path, *options: str) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "litecache.cli", "serve", str(model), "--port", str(port)]
    settings = (f"storage_dir={folder / 'store'}", "num_blocks=128", "ram_bytes=16MB")
    command += [word for setting in settings for word in ("--set", setting)]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(ray_folder),
    )
    server = Server(process, f"http://127.0.0.1:{port}", folder, [])
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.output.append(line)
            if line.startswith("curl "):
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    assert ready.wait(240)
    assert process.poll() is None, server.output
    return server


def stop(server: Server) -> None:
    family = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(120) == 0, server.output
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    import shutil
    import tempfile

    folder = tmp_path_factory.mktemp("serve")
    (folder / "store").mkdir()
    keys = folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{ALICE} alice\n{BOB} bob\n")
    ray_folder = Path(tempfile.mkdtemp(prefix="lc-sv-", dir="/tmp"))  # sockets want short paths
    yield folder, ray_folder
    shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.fixture(scope="module")
def server(model_folder: Path, folders: tuple[Path, Path]) -> Iterator[Server]:
    started = start(model_folder, *folders, "--api-keys", str(folders[0] / "keys"))
    yield started
    if started.process.poll() is None:
        stop(started)


def test_two_keys_share_nothing_and_each_finds_its_own(server: Server) -> None:
    cached = []
    for key in (ALICE, BOB, ALICE, BOB):
        usage = server.post("/v1/completions", BODY, key)["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[:2] == [0, 0]
    assert cached[2] == cached[3] >= 48
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
        until = time.monotonic() + 10
        while server.metric("engine_requests_running") or server.metric("sequences_running"):
            assert time.monotonic() < until
            time.sleep(0.05)


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
        assert client.post("/v1/cache/export", json={"prompt": "nothing of this"}).is_error
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


def test_idle_connections_and_halves_of_requests_stop_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=30) for _ in range(300)]
    halves = [b"", b"POST /v1/completions HT", b"\x00\xff\xfe\r\n\r\n", b"GET / HTTP/1.1\r\n" * 50]
    halves.append(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n{")
    try:
        for index, connection in enumerate(idle):
            connection.sendall(halves[index % len(halves)])
        assert server.post("/v1/completions", BODY)["usage"]["completion_tokens"] == 16
    finally:
        for connection in idle:
            connection.close()
    assert server.post("/v1/completions", BODY)["usage"]["completion_tokens"] == 16


def test_stopped_it_answers_what_is_open_and_starts_again_with_what_is_on_disk(
    server: Server, model_folder: Path, folders: tuple[Path, Path]
) -> None:
    answered: list[dict[str, Any]] = []
    body = {**BODY, "max_tokens": 300, "ignore_eos": True}
    asking = threading.Thread(
        target=lambda: answered.append(server.post("/v1/completions", body)), daemon=True
    )
    asking.start()
    until = time.monotonic() + 20
    while not answered and not server.metric("engine_requests_running"):
        assert time.monotonic() < until
    stop(server)
    asking.join(30)
    assert [answer["usage"]["completion_tokens"] for answer in answered] == [300]
    again = start(model_folder, *folders, "--api-keys", str(folders[0] / "keys"))
    try:
        first = again.post("/v1/completions", BODY)
        assert first["usage"]["litecache"]["found_tokens"].get("disk", 0) >= 48
        assert answered[0]["choices"][0]["text"].startswith(first["choices"][0]["text"][:4])
    finally:
        stop(again)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--api-keys", "/nowhere/keys"], "api_keys"),
        (["--port", "0"], "--port"),
        (["--set", "block_size=7"], "block_size"),
        (["--config", "/nowhere.yaml"], "--config"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    model_folder: Path, options: list[str], told: str
) -> None:
    command = [sys.executable, "-m", "litecache.cli", "serve", str(model_folder), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert told in ended.stderr
