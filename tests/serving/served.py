"""`litecache serve` as a user runs it: a process with Ray, Ray Serve and a group of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch
from local_server import model_config, tokenizer
from transformers import LlamaForCausalLM

ALICE, BOB = "alice-secret-0123456789", "bob-secret-0123456789"


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    output: list[str]

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def client(self, key: str = ALICE) -> httpx2.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=120)

    def post(self, path: str, body: Any, key: str = ALICE) -> Any:
        with self.client(key) as client:
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

    def metric(self, name: str) -> float:
        """One of the numbers without labels, or with the labels that `name` holds."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        (found,) = [line for line in lines if line.startswith(f"litecache_server_{name} ")]
        return float(found.rpartition(" ")[2])

    def await_idle(self, seconds: float = 60) -> None:
        """Wait until nothing runs and no request holds a block."""
        names = ["engine_requests_running", "engine_requests_waiting", "sequences_running"]
        names += ["requests_waiting", "open_streams"]
        names += [f'pool_blocks{{state="{state}"}}' for state in ("private", "published")]
        until = time.monotonic() + seconds
        while held := {name: value for name in names if (value := self.metric(name))}:
            assert time.monotonic() < until, held
            time.sleep(0.05)

    def stop(self) -> None:
        """As with Ctrl-C; nothing of it stays."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(120) == 0, self.output
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive


def save_tiny_model(folder: Path) -> Path:
    """A model that fits in a test, with its tokenizer."""
    torch.manual_seed(1)
    LlamaForCausalLM(model_config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_keys(path: Path) -> Path:
    """A file with the keys of alice and bob."""
    path.touch(mode=0o600)
    path.write_text(f"{ALICE} alice\n{BOB} bob\n")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def ray_folder() -> Iterator[Path]:
    """For Ray's files: short, since the path of a socket ends at 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="lc-sv-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start(model: Path, ray: Path, *options: str, **cache: Any) -> Server:
    """Run it until it is ready.

    Args:
        model: its folder.
        ray: for Ray's files.
        options: of the command.
        cache: fields of `CacheConfig`.
    """
    port = free_port()
    command = [sys.executable, "-m", "litecache.cli", "serve", str(model), "--port", str(port)]
    command += [word for name, value in cache.items() for word in ("--set", f"{name}={value}")]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_TMPDIR": str(ray), "RAY_SERVE_LOG_TO_STDERR": "0"},
    )
    server = Server(process, f"http://127.0.0.1:{port}", [])
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
