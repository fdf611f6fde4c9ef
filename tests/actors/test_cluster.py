"""Finding Ray: a cluster that is gone is named, and never waited for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from litecache.actors import cluster
from litecache.actors.cluster import open_ray
from litecache.adapter import KVCacheAdapter
from litecache.errors import GroupUnavailableError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A process that has no Ray; what `ray.init` is called with."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **options: calls.append(args))
    monkeypatch.setattr(cluster, "ANSWER_TIMEOUT_S", 0.3)
    return calls


@pytest.fixture
def silent() -> Any:
    """The address of a port that takes connections and says nothing, as a stopped process does."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def closed_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_recorded_cluster_that_does_not_answer_is_named_and_not_waited_for(
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    silent: str,
    address: str | None,
) -> None:
    (tmp_path / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for recorded in (silent, closed_port()):
        (tmp_path / "ray" / "ray_current_cluster").write_text(recorded)
        begun = time.monotonic()
        with pytest.raises(GroupUnavailableError, match=rf"{recorded} .*recorded.*`ray stop`"):
            open_ray(address)
        assert time.monotonic() - begun < 5
    assert started == []


def test_an_adapter_says_that_the_cluster_of_ray_address_is_gone(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    monkeypatch.setenv("RAY_ADDRESS", silent)
    with pytest.raises(GroupUnavailableError, match=rf"{silent} \(of RAY_ADDRESS\)"):
        KVCacheAdapter(config, weights="random")
    with pytest.raises(GroupUnavailableError, match=r"\(given\)"):
        open_ray(f"ray://{silent}")
    assert started == []


def test_without_a_recorded_cluster_or_with_local_ray_starts_as_it_would(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for address in (None, "local"):
        open_ray(address)
    assert started == [(None,), ("local",)]


def test_a_cluster_that_runs_is_joined(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    running = ray.get_runtime_context().gcs_address
    calls: list[Any] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **options: calls.append(args))
    open_ray(running)
    assert calls == [(running,)]
    monkeypatch.setenv("RAY_ADDRESS", running)
    open_ray()
    assert calls[1:] == [(None,)]
    assert os.environ["RAY_ADDRESS"] == running


TOKENS = """
import os, sys, time
from litecache.actors.cluster import open_ray
from litecache.errors import GroupUnavailableError
from ray._raylet import AuthenticationTokenLoader

address, *paths = sys.argv[1:]
for path in paths:
    os.environ["RAY_AUTH_TOKEN_PATH"] = path
    AuthenticationTokenLoader.instance().reset_cache()
    begun = time.monotonic()
    try:
        open_ray(address)
    except GroupUnavailableError as error:
        print(time.monotonic() - begun < 5, error)
"""


def test_a_cluster_that_takes_another_token_is_named_at_once_with_what_to_run(
    ray_local: None, tmp_path: Path
) -> None:
    wrong, missing = tmp_path / "wrong", tmp_path / "missing"
    wrong.touch(mode=0o600)
    wrong.write_text("f" * 64)
    address = ray.get_runtime_context().gcs_address
    # Ray reads its mode once in a process
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOKENS, address, *map(str, paths)],
            env={**os.environ, "RAY_AUTH_MODE": mode},
            stdout=subprocess.PIPE,
            text=True,
        )
        for mode, paths in (("token", (wrong, missing)), ("disabled", (wrong,)))
    ]
    said = [line for each in processes for line in each.communicate(timeout=60)[0].splitlines()]
    beginnings = (
        f"True the Ray cluster {address} takes another token than this process's: ",
        "True RAY_AUTH_MODE asks for a token, and there is none",
        f"True the Ray cluster {address} asks for a token: ",
    )
    for line, begins in zip(said, beginnings, strict=True):
        assert line.startswith(begins)
        assert "`export RAY_AUTH_MODE=token`" in line
        assert "f" * 64 not in line
