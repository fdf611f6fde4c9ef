"""The commands and files that users serve a model with, as they stand, answering real chats."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from own_ray import OwnRay, own_ray

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAME = "SmolLM2-135M-Instruct"
COUNT = 8
SYSTEM = "You know all about the mill. " + " ".join(
    f"Wheel number {n} was built by miller {n * n}." for n in range(24)
)
QUESTIONS = ("Who built wheel 3?", "And wheel 5?", "How many wheels are there?")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ADAPTER = """
import json, sys, ray
from litecache import KVCacheAdapter
ray.init("auto", log_to_driver=False, logging_level="error")
messages, told = [{"role": "system", "content": sys.argv[1]}], []
with KVCacheAdapter(sys.argv[2], group="litecache") as llm:
    for question in sys.argv[4:]:
        messages.append({"role": "user", "content": question})
        ids = llm.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        (row,) = llm.submit(
            [list(ids)], max_new_tokens=int(sys.argv[3]), do_sample=False, cache_salt="adapter"
        )
        text = llm.tokenizer.decode(row.wait(), skip_special_tokens=True)
        told.append([text, sum(row.reused_tokens.values())])
        messages.append({"role": "assistant", "content": text})
print("told:", json.dumps(told))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_ready(url: str) -> None:
    until = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=10).close()
            return
        except OSError:  # not there yet, or 503
            assert time.monotonic() < until
            time.sleep(0.2)


def curl(*arguments: str) -> Any:
    """What the real one prints, as JSON."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    done = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def chat(url: str, questions: Sequence[str] = QUESTIONS) -> list[tuple[str, dict[str, Any]]]:
    """The text and the usage of each turn."""
    messages, told = [{"role": "system", "content": SYSTEM}], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        body = {"model": NAME, "messages": messages, "max_tokens": COUNT, "temperature": 0}
        header = "Content-Type: application/json"
        answer = curl(f"{url}/v1/chat/completions", "-H", header, "-d", json.dumps(body))
        text = answer["choices"][0]["message"]["content"]
        told.append((text, answer["usage"]))
        messages.append({"role": "assistant", "content": text})
    return told


def adapters_chat(ray: OwnRay) -> list[list[Any]]:
    """The same turns through the adapter of another process, under a salt of its own."""
    words = (SYSTEM, MODEL, str(COUNT), *QUESTIONS)
    printed = ray.run(sys.executable, "-c", ADAPTER, *words, cwd=ray.folder)
    (line,) = [each for each in printed.splitlines() if each.startswith("told: ")]
    return list(json.loads(line.removeprefix("told: ")))


@pytest.fixture
def hub(smollm2_dir: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has the model of deploy/ in its Hugging Face cache."""
    revision = "0" * 40
    kept = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(revision)
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / revision).symlink_to(smollm2_dir)
    return {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}


def test_serve_deploy_takes_what_is_shipped_and_tells_what_the_adapter_reuses(
    hub: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir(mode=0o700)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    shipped = (ROOT / "deploy" / "serve.yaml").read_text()
    # a port that nobody else has, and the folder that the file proposes in a comment
    changed = shipped.replace("port: 8000", f"port: {port}")
    changed = changed.replace("# storage_dir: /data/litecache", f"storage_dir: {store}")
    assert changed.count(str(store)) == changed.count(str(port)) == 1
    (tmp_path / "serve.yaml").write_text(changed)
    with own_ray(num_cpus=4, **hub) as ray:
        deploy = [str(BIN / "serve"), "deploy", "-a", ray.dashboard]
        ray.run(*deploy, str(tmp_path / "serve.yaml"), cwd=ray.folder)
        await_ready(url)
        assert curl(f"{url}/v1/models")["data"][0]["id"] == NAME
        first = chat(url)
        assert [
            [text, usage["prompt_tokens_details"]["cached_tokens"]] for text, usage in first
        ] == adapters_chat(ray)
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for _, usage in first]
        assert cached[0] == 0
        assert cached[1] >= 0.9 * first[0][1]["prompt_tokens"]
        assert cached == sorted(cached)


def heed_ctrl_c() -> None:
    """As in a terminal: what a shell starts in the background ignores SIGINT, and so do Python's
    children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def serve_run(ray: OwnRay, command: list[str]) -> Iterator[str]:
    """`serve run` until Ctrl-C, where Ray Serve's proxy has a port of its own; its address."""
    port = free_port()
    ray.run(str(BIN / "serve"), "start", "--http-port", str(port), cwd=ray.folder)
    with (ray.folder / "run.log").open("w+") as log:
        process = subprocess.Popen(
            command,
            env=ray.env,
            cwd=ray.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=heed_ctrl_c,
        )
        try:
            await_ready(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait(120)
        log.seek(0)
        assert status == 0, log.read()


def test_serve_run_ends_with_ctrl_c_and_the_next_one_over_its_folder_answers_alike(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir(mode=0o700)
    documents = (ROOT / "docs" / "serving.md").read_text().splitlines()
    (line,) = [each for each in documents if each.startswith("serve run ")]
    line = line.replace("/models/smollm2", str(smollm2_dir)).replace("/data/litecache", str(store))
    command = [*line.split(), f"served_name={NAME}"]
    assert str(smollm2_dir) in line
    assert str(store) in line
    with own_ray(num_cpus=4) as ray:
        lives = []
        for _ in range(2):
            with serve_run(ray, command) as url:
                lives.extend(chat(url, QUESTIONS[:1]))
            ray.run(str(BIN / "litecache"), "down", cwd=ray.folder)
    (text, computed), (again, found) = lives
    assert again == text
    assert computed["litecache"]["found_tokens"] == {}
    # a busy machine may look it up too late: whatever is found is on the disk
    assert set(found["litecache"]["found_tokens"]) <= {"disk"}


def test_the_readmes_command_serves_and_its_curl_answers(smollm2_dir: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme.partition("## Serve it")[2].partition("```bash\n")[2].partition("```")[0]
    commands = block.replace("\\\n", " ").strip().splitlines()
    setup, serve, ask = commands
    assert setup == "bash scripts/setup.sh cpu && . .venv/bin/activate"
    port = free_port()
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    folder = Path(tempfile.mkdtemp(prefix="lc-rd-", dir="/tmp"))  # sockets want short paths
    home = str(smollm2_dir.parents[1])
    env = {**os.environ, "PATH": path, "RAY_TMPDIR": str(folder), "LITECACHE_HOME": home}
    del env["RAY_AUTH_MODE"]  # as most users have it
    process = subprocess.Popen(
        ["bash", "-c", f"exec {serve} --port {port}"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        await_ready(f"http://127.0.0.1:{port}")
        done = subprocess.run(
            ["bash", "-c", re.sub(r"\b8000\b", str(port), ask)],
            capture_output=True,
            text=True,
            check=True,
        )
        answer = json.loads(done.stdout)
        assert answer["model"] == "smollm2"
        assert "Hello" in answer["choices"][0]["message"]["content"]
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        shutil.rmtree(folder, ignore_errors=True)
    assert process.returncode == 0, output
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in output
    # nothing of Ray's that sounds like a fault
    assert "raylet" not in output
    assert "authentication" not in output
