from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from any_values import TEXTS
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.main import get_command
from typer.testing import CliRunner

import litecache
from litecache.actors.calls import actor_names
from litecache.actors.operating.cluster_file import read_cluster_file
from litecache.actors.operating.watch import ActorView
from litecache.adapter import KVCacheAdapter
from litecache.adapter.inspection.doctor import cluster_findings, group_findings
from litecache.adapter.stats import CacheStats
from litecache.cli import app, main
from litecache.cli.options import group_names, parse_settings
from litecache.cli.watch import print_status
from litecache.config import CacheConfig
from litecache.errors import ConfigError, GroupUnavailableError, KernelError
from litecache.storage import CommitItem, LocalShardClient, ShardStore
from litecache.storage.disk.raw_disk import RawDisk

WORDS = [f"w{number}" for number in range(64)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def invoke(*arguments: str) -> Any:
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["litecache", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, out.getvalue(), err.getvalue()


def refused(*arguments: str) -> str:
    """The one line that a refused command prints."""
    status, _, err = run(*arguments)
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert len(line) < 2200
    return line


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune for minutes")
def test_tuning_without_a_gpu_or_a_folder_writes_nothing(tmp_path: Path) -> None:
    for path, error in ((tmp_path / "t.json", KernelError), (tmp_path / "n" / "t", ConfigError)):
        done = CliRunner().invoke(app, ["tune", str(path)])
        assert isinstance(done.exception, error)
        assert not path.exists()


@pytest.fixture(scope="module")
def group(ray_local: None, model: Path) -> Iterator[str]:
    """A group that `up` has started and `down` stops."""
    settings = ["--set", "num_blocks=32", "--set", "ram_bytes=4MB", "--set", "dtype=float32"]
    settings += ["--set", "kv_dtype=int8"]
    started = invoke("up", str(model), "--group", "cli", "--num-threads", "1", *settings)
    try:
        assert started["device"] == "cpu"
        assert started["actors"] == actor_names("cli")
        yield "cli"
    finally:
        stopped = invoke("down", "--group", "cli")
    assert list(stopped) == ["cli"]
    assert actor_names("cli") == []


def test_a_group_answers_and_shows_itself(group: str, model: Path, tmp_path: Path) -> None:
    prompt = " ".join(WORDS[1:41])
    first, second = (
        invoke("generate", str(model), prompt, "--group", group, "--max-new-tokens", "9")
        for _ in range(2)
    )
    assert first["text"] == second["text"]
    assert len(first["text"].split()) == first["tokens"] == 9
    assert (first["reused_tokens"], second["reused_tokens"]) == ({}, {"gpu": 39})
    shown = invoke("status", "--group", group)
    assert sorted(shown["actors"]) == actor_names(group)
    assert shown["stats"]["prompt_tokens"] == 80
    assert shown["stats"]["hit_rate"] == pytest.approx(39 / 80)
    table = CliRunner().invoke(app, ["status", "--group", group]).stdout
    assert "80 prompt tokens, 49% reused (gpu 39), 18 generated" in table
    assert "int8 blocks" in " ".join(table.split())
    assert group_names("cl") == ["cli"]
    assert group_names("x") == []
    trace = tmp_path / "trace.json"
    assert "export RAY_PROFILING=1" in refused("timeline", str(trace), "--group", group)
    assert not trace.exists()
    check_silent_replica(group, shown["actors"]["litecache:cli:gpu:0"]["pid"])
    check_top(group)
    check_explanation(group, model, prompt)
    check_prefix_commands(group, prompt, tmp_path)


def check_explanation(group: str, model: Path, prompt: str) -> None:
    """Where a prompt's blocks lie, where another parts from it, and nothing of a salt or a text."""
    told = invoke("explain", prompt, "--group", group)
    assert (told["tokens"], told["blocks"], told["known_blocks"]) == (40, 2, 2)
    (run,) = told["runs"]
    assert (run["first"], run["end"], run["pools"]) == (0, 2, ["gpu:0"])
    assert run["ram"][0].startswith("shard:")
    (replica,) = told["replicas"]
    assert (replica["blocks"], replica["load_from"]) == ({"gpu": 2}, replica["load_end"])
    assert 0 < replica["first_token_s"] <= replica["compute_s"] + 0.1
    other = " ".join([*WORDS[1:21], *WORDS[40:60]])
    assert invoke("explain", str(model), other)["known_tokens"] == 20
    here = ("--group", group, "--salt", "my-secret")
    salted = CliRunner().invoke(app, ["explain", prompt, *here]).stdout
    assert "nothing known" in salted
    assert "known under another salt" in salted
    assert "block(s) of this model, without a salt" in salted
    assert not any(word in salted for word in ("my-secret", "w1 ", "w20"))
    assert "RAM and disk hold whole blocks" in " ".join(
        CliRunner().invoke(app, ["explain", "w9 w8", "--group", group]).stdout.split()
    )
    assert "tiny runs in no such group (running: " in refused("explain", tiny_beside(model), prompt)
    status = invoke("status", "--group", group)
    assert status["stats"]["prompt_tokens"] == 80


@pytest.mark.slow
def test_bench_tells_what_tiers_are_worth_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    small = ("--dir", str(tmp_path), "--disk-bytes", "600MB", "--set", "num_blocks=32")
    told = invoke("bench", str(model), *small, "--length", "64", "--seconds", "60")
    assert [row["tokens"] for row in told["times"]] == [64]
    assert told["break_even"].keys() == {"ram", "disk"}
    assert list(tmp_path.iterdir()) == []
    done = CliRunner().invoke(app, ["bench", str(model), *small, "--length", "32"])
    assert "From disk, " in done.stdout
    command = [sys.executable, "-m", "litecache.cli", "bench", str(model), *small]
    begun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()):
        assert begun.poll() is None
        time.sleep(0.02)
    begun.send_signal(signal.SIGTERM)
    out, err = begun.communicate(timeout=60)
    assert (begun.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def tiny_beside(model: Path) -> str:
    """A folder with the config of another model."""
    folder = model.parent / "tiny"
    folder.mkdir()
    LlamaConfig(vocab_size=64, hidden_size=16, num_attention_heads=2).save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig.from_pretrained(model)).save_pretrained(folder)
    return str(folder)


def check_top(group: str) -> None:
    """One interval as JSON and as plain text."""
    seen = invoke("top", "--once", "--interval", "0.1", "--group", group)
    assert (seen["model"], seen["coordinator"], seen["without_figures"]) == ("model0", "up", {})
    assert [replica["state"] for replica in seen["replicas"]] == ["up"]
    assert sum(seen["replicas"][0]["blocks"].values()) == 32
    assert seen["hit_share_ever"] == pytest.approx(39 / 80)
    text = CliRunner().invoke(app, ["top", "--once", "--interval", "0.1", "--group", group]).stdout
    assert "\x1b" not in text
    assert "gpu:0" in text
    assert "RAM" in text


@pytest.mark.slow
def test_explain_and_doctor_name_a_replica_that_does_not_answer(group: str) -> None:
    name = "litecache:cli:gpu:0"
    pid = invoke("status", "--group", group)["actors"][name]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.perf_counter()
        assert "no replica of group 'cli' answers" in refused("explain", "w1", "--group", group)
        (silent,) = [found for found in cluster_findings() if found.name == name]
        assert time.perf_counter() - begun < 20
    finally:
        os.kill(pid, signal.SIGCONT)
    assert silent.status == "bad"
    assert "silent: no answer" in silent.detail
    assert invoke("status", "--group", group, "--timeout", "20")["states"][name] == "up"


@pytest.mark.slow
def test_top_leaves_the_terminal_as_it_was_when_it_is_interrupted(group: str) -> None:
    import ray

    def own_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # a shell's background job ignores it, and so would all that it starts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    outside, inside = pty.openpty()
    before = termios.tcgetattr(inside)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "litecache.cli", "top", "--group", group, "--interval", "0.2"]
    begun = subprocess.Popen(
        [*command, "--address", address],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=own_terminal,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
    )
    shown = b""
    while b"gpu:0" not in shown:
        shown += os.read(outside, 65536)
    os.write(outside, b"\x03")
    while b"\x1b[?1049l" not in shown:
        shown += os.read(outside, 65536)
    assert begun.wait(30) == 0
    assert shown.count(b"\x1b[?1049h") == shown.count(b"\x1b[?1049l") == 1
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert b"Traceback" not in shown
    assert termios.tcgetattr(inside) == before
    for end in (outside, inside):
        os.close(end)


def check_silent_replica(group: str, pid: int) -> None:
    """A replica that is stopped is named in time, and its figures come when it runs on."""
    name = f"litecache:{group}:gpu:0"
    os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.perf_counter()
        shown = invoke("status", "--group", group, "--timeout", "0.5")
        assert time.perf_counter() - begun < 5
    finally:
        os.kill(pid, signal.SIGCONT)
    assert shown["states"].pop(name) == "silent"
    assert set(shown["states"].values()) == {"up"}
    assert shown["stats"]["unavailable"] == [name]
    assert "no answer" in shown["actors"][name]["error"]
    assert invoke("status", "--group", group, "--timeout", "20")["states"][name] == "up"


def check_prefix_commands(group: str, prompt: str, folder: Path) -> None:
    """A prefix goes to a file and back, is warmed under a salt, and deleted with it."""
    text, file = folder / "prompt.txt", folder / "prefix.kv"
    text.write_text(prompt)
    exported = invoke("export", str(text), "-o", str(file), "--group", group)
    assert exported == {"tokens": 32, "asked": 40, "nbytes": file.stat().st_size}
    assert invoke("export", prompt, "-o", str(file), "--group", group) == exported
    imported = invoke("import", str(file), "--group", group)
    assert imported == {**exported, "asked": 32}
    here = ("--group", group, "--salt", "s")
    assert invoke("warm", str(text), *here) == [{"file": str(text), "computed": 40}]
    assert "another cache_salt" in refused("import", str(file), *here)
    assert invoke("delete", *here)["blocks"] == 4  # two in the pool, and copies of them in RAM
    assert invoke("delete", *here)["blocks"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["down", "--group", "nobody"], "there is no group 'nobody'"),
        (["status", "--group", "nobody"], "there is no group 'nobody'"),
        (["inspect", "/no/such/store"], "dir='/no/such/store' is invalid"),
        (["up", "/no/such/model"], "model='/no/such/model' is invalid"),
        (["up", "m", "--set", "blocksize=3"], "--set='blocksize=3' is invalid: NAME=VALUE"),
        (["up", "m", "--set", "block_size=12"], "block_size=12 is invalid: a power of two"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(
    ray_local: None, arguments: list[str], message: str
) -> None:
    assert message in refused(*arguments)


def test_nobody_who_reads_is_no_finding_of_a_check(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "litecache.cli", "verify", str(filled_store(tmp_path))]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def filled_store(folder: Path) -> Path:
    with ShardStore(str(folder / "shard-0"), storage_bytes=8 << 20, ram_bytes=1 << 20) as store:
        client = LocalShardClient(store)
        slots = client.reserve(4096, 3)
        items = []
        for number, slot in enumerate(slots, start=1):
            client.arena.buffer(slot.slot, 4096)[:] = bytes([number]) * 4096
            items.append(CommitItem(*slot, bytes([number]) * 16, bytes(16), "model-a"))
        client.commit(items)
        client.flush()
        client.close()
    return folder


def test_a_storage_folder_is_inspected_and_verified(tmp_path: Path) -> None:
    folder = filled_store(tmp_path)
    (report,) = invoke("inspect", str(folder))
    assert report["blocks"] == 3
    assert [name["name"] for name in report["namespaces"]] == ["model-a"]
    text = CliRunner().invoke(app, ["inspect", str(folder)]).stdout
    assert "3 blocks" in text
    assert "model-a: 3 blocks" in text
    (sound,) = invoke("verify", str(folder))
    assert (sound["ok"], sound["checked"]) == (True, 3)


def test_verify_finds_a_flipped_byte_and_exits_with_1(tmp_path: Path) -> None:
    folder = filled_store(tmp_path)
    slab = folder / "shard-0" / "slab"
    content = bytearray(slab.read_bytes())
    content[content.index(bytes([2]) * 4096) + 100] ^= 1
    slab.write_bytes(content)
    done = CliRunner().invoke(app, ["verify", str(folder)])
    assert done.exit_code == 1
    assert "1 bad" in done.stdout
    assert (bytes([2]) * 16).hex() in done.stdout


def test_inspect_shows_sizes_ages_and_pins_beside_a_live_store(tmp_path: Path) -> None:
    folder = filled_store(tmp_path)
    with ShardStore(str(folder / "shard-0"), storage_bytes=8 << 20, ram_bytes=1 << 20) as store:
        store.pin([bytes([1]) * 16])
        text = CliRunner().invoke(app, ["inspect", str(folder)]).stdout
        (report,) = invoke("inspect", str(folder))
    assert "1 pinned" in text
    assert "3 of 4,096 bytes" in text
    assert "age: 3 under 1 minute" in text
    assert report["ages"]["1 minute"] == 3
    assert report["block_sizes"] == {"4096": 3}


def test_verify_exits_with_2_when_it_cannot_check(tmp_path: Path) -> None:
    folder = filled_store(tmp_path)

    def line() -> str:
        return refused("verify", str(folder))

    with ShardStore(str(folder / "shard-0"), storage_bytes=8 << 20, ram_bytes=1 << 20):
        assert "in use by another store (process" in line()
    superblock = folder / "shard-0" / "superblock"
    content = bytearray(superblock.read_bytes())
    content[8] ^= 1
    superblock.write_bytes(content)
    assert "superblock is damaged" in line()
    superblock.unlink()
    assert "a storage folder (with shard-*/superblock in it)" in line()


def test_settings_are_parsed_as_fields_of_the_config() -> None:
    parsed = parse_settings(
        ["block_size=32", "storage_dir=/data/kv", "ram_bytes=2GB", "deterministic=true"]
    )
    assert parsed == CacheConfig(
        block_size=32, storage_dir="/data/kv", ram_bytes="2GB", deterministic=True
    )
    with pytest.raises(ConfigError, match="--set"):
        parse_settings(["block_size"])


def test_the_doctor_finds_what_works_and_what_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = {f["name"]: f for f in invoke("doctor", "--storage-dir", str(tmp_path))}
    assert findings["torch"]["status"] == "ok"
    assert findings["storage_dir"]["status"] == "ok"
    assert findings["ray auth"] == {"name": "ray auth", "status": "ok", "detail": "token"}
    for name in ("kernels", "huge pages", "open files", "memlock", "/dev/shm", "direct I/O"):
        assert findings[name]["status"] in ("ok", "note")
    assert "GB/s" in findings["disk"]["detail"]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no-token"))
    done = CliRunner().invoke(app, ["doctor", "--storage-dir", "relative"])
    assert done.exit_code == 1
    assert "bad   ray auth" in done.stdout
    assert "relative is not absolute" in done.stdout


def test_the_doctor_says_what_to_do_about_a_limit_and_a_folder_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 2048), hard))
    try:
        findings = {f["name"]: f for f in invoke("doctor")}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert findings["open files"]["status"] == "note"
    assert "`ulimit -n 65536`" in findings["open files"]["detail"]
    assert findings["storage_dir"]["status"] == "note"
    assert "--storage-dir FOLDER" in findings["storage_dir"]["detail"]


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_bare_disk_is_measured_by_a_file_that_has_no_name(tmp_path: Path, kind: str) -> None:
    disk = RawDisk(str(tmp_path / "probe"), 2 << 20, 1 << 20)
    try:
        assert list(tmp_path.iterdir()) == []
        assert disk.turn(kind, 2, 1 << 18) > 0
    finally:
        disk.close()


def test_a_bare_disk_takes_no_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError):
        RawDisk(str(tmp_path / "mine"), 2 << 20, 1 << 20)
    assert (tmp_path / "mine").read_text() == "mine"


def test_status_and_doctor_say_what_was_not_saved_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardStore(str(tmp_path / "s"), storage_bytes=8 << 20, ram_bytes=1 << 20) as store:
        shutil.rmtree(tmp_path / "s")
        assert not store.flush().complete
        store.metrics.inc("litecache_drops", 3, reason="queue_full")
        shard = {"pid": 1, "store": store.stats(), "metrics": store.metrics.snapshot()}
        stats = CacheStats.from_status({"shard": shard})
    assert stats.drops["queue_full"] == 3
    print_status("group g", {"shard": ActorView("up", shard)}, stats)
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 queue_full" in shown
    assert "the disk tier is out" in shown
    lost, dropped = group_findings("g", stats)
    assert (lost.status, lost.name) == ("bad", "shard")
    assert "removed" in lost.detail
    assert "3 queue_full" in dropped.detail


def test_up_prints_what_comes_of_file_and_options_and_starts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("group: a\nmodel: org/name\nreplicas: 3\ncache:\n  block_size: 32\n")
    options = ["--replicas", "all", "--set", "ram_bytes=2GB", "--placement", "pack"]
    status, out, err = run("up", "--config", str(file), *options, "--print-config")
    assert (status, err) == (0, "")
    printed = tmp_path / "printed.yaml"
    printed.write_text(out)
    (setup,) = read_cluster_file(printed)
    assert (setup.group, setup.model, setup.replicas) == ("a", "org/name", "all")
    assert (setup.config.block_size, setup.config.ram_bytes) == (32, 2 * 10**9)
    assert setup.placement == "PACK"
    file.write_text("model: m\ncache:\n  blocks: 5\n")
    status, _, err = run("up", "--config", str(file))
    assert status == 2
    assert err.startswith(f"error: {file}:3: cache.blocks=5 is invalid: no such field.")


@pytest.mark.slow
def test_a_file_starts_several_models_which_drivers_join_and_a_failure_leaves_none(
    ray_local: None, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.yaml"
    other = tmp_path / "other"
    changed = LlamaForCausalLM.from_pretrained(model)
    changed.lm_head.weight.data.mul_(-1)
    changed.save_pretrained(other)
    cache = "cache: {num_blocks: 32, ram_bytes: 8MB, dtype: float32}\nnum_threads: 1\n"
    models = f"models:\n  one: {{model: {model}}}\n  two: {{model: {other}}}\n"
    host = f"nodes:\n- {{node: {socket.gethostname()}, ram_bytes: 4MB}}\n"
    file.write_text(f"group: side\n{cache}{models}{host}")
    one, two = invoke("up", "--config", str(file))
    try:
        assert (one["group"], two["group"]) == ("side.one", "side.two")
        again = invoke("up", "--config", str(file))
        assert [each["actors"] for each in again] == [one["actors"], two["actors"]]
        outputs = []
        for name in ("one", "two"):
            with KVCacheAdapter.from_config(file, name=name) as llm:
                (shard,) = llm.group.shards
                assert shard in actor_names("side")
                outputs.append(llm.generate_batch([list(range(1, 20))], max_new_tokens=8)[0])
        assert outputs[0] != outputs[1]
        with pytest.raises(ConfigError, match=r"name=None is invalid: a model of .* one, two"):
            KVCacheAdapter.from_config(file)
        file.write_text(f"group: side\n{cache}{models}")
        status, _, err = run("up", "--config", str(file))
        assert status == 2
        assert "nodes is" in err
        grown = invoke("scale", "2", "--group", "side.two")
        assert (grown["replicas"], grown["added"]) == (2, ["litecache:side.two:gpu:1"])
        shrunk = invoke("scale", "1", "--group", "side.two")
        assert [gone["complete"] for gone in shrunk["departed"]] == [True]
    finally:
        for name in ("side.one", "side.two"):
            invoke("down", "--group", name)
    assert actor_names("side") == []
    # the second of these cannot be placed: the first does not stay
    greedy = f"  two: {{model: {other}, replicas: 99}}\n"
    file.write_text(f"group: side\n{cache}models:\n  one: {{model: {model}}}\n{greedy}")
    status, _, err = run("up", "--config", str(file))
    assert status == 2
    assert "99 GpuCache actor(s) do not fit" in err
    assert actor_names("side.one") == actor_names("side") == []


WORDS_OF_NOBODY = [text for text in TEXTS if "\0" not in text and len(text) < 10**5]
ANY_TEXT = st.sampled_from(WORDS_OF_NOBODY) | st.text(st.characters(exclude_characters="\0"))
COMMANDS: dict[str, tuple[str, ...]] = {
    "up": ("MODEL", "--config", "--group", "--set", "--replicas", "--num-threads", "--placement",
           "--print-config", "--address", "--json"),
    "scale": ("REPLICAS", "--group", "--timeout", "--address", "--json"),
    "drain": ("NODE", "--timeout", "--address", "--json"),
    "down": ("--group", "--all", "--timeout", "--address", "--json"),
    "status": ("--group", "--timeout", "--address", "--json"),
    "bench": ("--dir", "--seconds", "--disk-bytes", "--length", "--json"),
    "explain": ("MODEL", "PROMPT", "--group", "--salt", "--chat", "--address", "--json"),
    "top": ("--group", "--interval", "--once", "--address", "--json"),
    "generate": ("MODEL", "PROMPT", "--group", "--set", "--max-new-tokens", "--temperature",
                 "--seed", "--chat", "--address", "--json"),
    "export": ("PROMPT", "--output", "--model", "--group", "--salt", "--set", "--address"),
    "import": ("FILE", "--model", "--group", "--salt", "--set", "--address", "--json"),
    "warm": ("FILE", "--model", "--group", "--salt", "--set", "--address", "--json"),
    "delete": ("--salt", "--model", "--group", "--set", "--address", "--json"),
    "inspect": ("DIRECTORY", "--json"),
    "verify": ("DIRECTORY", "--json"),
    "tune": ("FILE", "--json"),
    "nonsense": ("--set",),
}  # fmt: skip


@given(st.data())
def test_any_arguments_of_a_command_give_a_result_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    # beyond connecting a command may start actors: no argument that can be told to be wrong gets
    # that far, and here none does
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("litecache.actors.cluster.open_ray", no_cluster)
        patch.setattr("litecache.adapter.KVCacheAdapter", no_cluster)
        command = data.draw(st.sampled_from(sorted(COMMANDS)))
        arguments = [command]
        for name in data.draw(st.lists(st.sampled_from(COMMANDS[command]), max_size=5)):
            if name.startswith("-"):
                arguments.append(name)
            if name not in ("--json", "--all", "--chat", "--once", "--print-config"):
                arguments.append(data.draw(ANY_TEXT))
        begun = time.perf_counter()
        status, out, err = run(*arguments)
        assert time.perf_counter() - begun < 30
    assert "Traceback" not in out + err
    assert status in (0, 2)
    if status == 2:
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert "unforeseen" not in line
    assert list(folder.iterdir()) == []


def no_cluster(*arguments: Any, **settings: Any) -> None:
    raise GroupUnavailableError("no cluster here")


@pytest.mark.parametrize(
    "arguments",
    [
        ["up"],
        ["up", "--config", "/no/such.yaml"],
        ["up", "m", "--config", ""],
        ["up", "m", "--placement", "even"],
        ["scale", "0"],
        ["scale", "some"],
        ["scale", "-1"],
        ["scale", "2", "--timeout", "nan"],
        ["scale", "2", "--group", "a b"],
        ["drain", "a", "--timeout", "-1"],
        ["drain", "a", "--address", "nowhere"],
        ["up", "m", "--replicas", "0"],
        ["up", "m", "--replicas", "1e3"],
        ["up", "m", "--replicas", str(10**30)],
        ["up", "m", "--num-threads", "-1"],
        ["up", "m", "--group", "a b"],
        ["up", "a/b/c"],
        ["up", "m", "--set", "ram_bytes=nan"],
        ["up", "m", "--set", "salt_quotas=a=inf"],
        ["down", "--timeout", "nan"],
        ["down", "--timeout", "-1"],
        ["status", "--group", "x" * 100],
        ["status", "--timeout", "-1"],
        ["top", "--interval", "0"],
        ["bench", "m", "--seconds", "0"],
        ["bench", "m", "--disk-bytes", "many"],
        ["bench", "m", "--length", "0"],
        ["bench", "m", "--dir", "/no/such/folder"],
        ["bench", "a/b/c"],
        ["explain", "a", "b", "c"],
        ["explain", ""],
        ["explain", "a/b/c", "text"],
        ["explain", "text", "--salt", "\udcff"],
        ["explain", "text", "--group", "a b"],
        ["top", "--interval", "nan"],
        ["top", "--group", "a b"],
        ["generate", "m", ""],
        ["generate", "m", "\udcff"],
        ["generate", "m", "text", "--temperature", "nan"],
        ["generate", "m", "text", "--temperature", "-1"],
        ["generate", "m", "text", "--max-new-tokens", "0"],
        ["generate", "m", "text", "--seed", "-1"],
        ["export", "", "-o", "f", "--model", "m"],
        ["export", "text", "--model", "m"],
        ["export", "text", "-o", "", "--model", "m"],
        ["export", "text", "-o", "f", "--model", "m", "--salt", "\udcff"],
        ["import", "/no/such/file", "--model", "m"],
        ["warm", "/no/such/file", "--model", "m"],
        ["delete", "--model", "m"],
        ["delete", "--salt", "s", "--group", "a b"],
        ["inspect", "x" * 300],
        ["verify", "\udcff"],
        ["tune", "/no/such/folder/file"],
        ["doctor", "--address", "ray://"],
    ],
)
def test_what_can_be_told_from_the_words_is_refused_before_anything_is_loaded(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unforeseen(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("unforeseen")

    monkeypatch.setattr("litecache.actors.cluster.open_ray", unforeseen)
    monkeypatch.setattr("litecache.adapter.KVCacheAdapter", unforeseen)
    monkeypatch.setattr("litecache.adapter.inspection.doctor.examine", unforeseen)
    assert "unforeseen" not in refused(*arguments)


def test_an_address_that_is_none_is_refused_before_ray_is_asked() -> None:
    for address in ("nowhere", "local", "", "ray://", "a b:1", "host:port"):
        assert "--address" in refused("status", "--address", address)


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
def test_what_is_wrong_with_a_server_is_said_before_anything_starts(
    model: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.setattr("litecache.actors.cluster.open_ray", no_cluster)
    assert told in refused("serve", str(model), *options)


def test_words_that_are_too_many_are_not_repeated() -> None:
    line = refused("generate", "m", "the", "patient", "said")
    assert "unexpected extra argument" in line
    assert "patient" not in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["up", "/no/such"], ["up", "m", "--set", "fsync=x"], ["generate", "a/b/c", "x"]]
)
def test_the_command_refuses_in_time_without_loading_torch(arguments: list[str]) -> None:
    code = "import sys; from litecache.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert not {"torch", "transformers", "ray"} & set(done.stdout.split())
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", sorted(get_command(app).commands))  # type: ignore[attr-defined]
def test_every_command_has_an_example_in_its_help_and_takes_json(name: str) -> None:
    text = " ".join(CliRunner().invoke(app, [name, "--help"]).stdout.split())
    assert f"Example: litecache {name}" in text
    assert "--json" in text
    # a flag is off unless it is given: its opposite would only fill the page
    assert set(re.findall(r"--no-[a-z]+", text)) <= {"--no-auth"}


def test_a_shell_completes_commands_and_is_shown_nothing_where_there_is_no_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("litecache.actors.cluster.open_ray", no_cluster)

    def completed(words: str) -> tuple[str, str]:
        place = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        env = {"_LITECACHE_COMPLETE": "complete_bash", **place}
        done = CliRunner().invoke(app, [], prog_name="litecache", env=env)
        return done.stdout, done.stderr

    assert completed("litecache stat") == ("status\n", "")
    assert completed("litecache status --gr") == ("--group\n", "")
    assert completed("litecache status --group c") == ("\n", "")


def test_the_version_is_told() -> None:
    assert run("--version") == (0, f"litecache {litecache.__version__}\n", "")


def test_without_arguments_there_is_help() -> None:
    status, out, _ = run()
    assert status == 2
    assert "doctor" in out
