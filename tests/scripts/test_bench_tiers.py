"""The benchmarks of the tiers: they run, and what they compare with is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from bench_tiers import never_slower
from bench_trace import sustained
from tier_world import SlowFiles
from trace_model import (
    SPEEDS,
    Lru,
    Prompts,
    Queue,
    Speeds,
    Turn,
    arrivals_at,
    lru_found,
    read_trace,
    sessions,
    simulate,
    split_sessions,
)

from litecache.engine.tier_engine import Tokens
from litecache.engine.worth import ColdCurve

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _quick(script: str, folder: Path, *args: str) -> dict[str, object]:
    file = folder / "out.json"
    command = [sys.executable, str(SCRIPTS / script), "--quick", "--json", str(file), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    document: dict[str, object] = json.loads(file.read_text())
    return document


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_bench_tiers_tells_first_tokens_by_source_beside_their_limits(tmp_path: Path) -> None:
    document = _quick("bench_tiers.py", tmp_path, "--only", "idle", "throttled")
    rows = {(row["case"], row["metric"]): row for row in document["rows"]}  # type: ignore[attr-defined]
    for metric in ("pool hit", "RAM hit", "disk hit", "disk hit, never slower"):
        row = rows["tiny idle 1024", metric]
        assert row["limit"] > 0
        assert row["ratio"] == pytest.approx(row["value"] / row["limit"])
        assert row["peer"].endswith("NOT held") == (row["ratio"] > 1)
    assert rows["tiny idle 1024", "RAM hit loaded"]["limit"] == pytest.approx(1024 * 1024 / 1e9)
    assert ("tiny disk 0.2 GB/s 1024", "disk hit, never slower") in rows
    assert rows["tiny", "D, O_DIRECT reads"]["value"] > 0


def test_the_cold_curve_goes_through_what_was_measured() -> None:
    curve = ColdCurve()
    for length in (500, 1000, 4000, 16_000, 64_000):
        for noise in (0.98, 1.0, 1.5):  # the median counts
            curve.add(length, (5 + 0.02 * length + 1e-6 * length**2) * noise)
    at = np.array([0, 2000, 30_000, 60_000])
    assert curve(at) == pytest.approx(5 + 0.02 * at + 1e-6 * at**2, rel=0.02)


def test_a_hit_may_be_slower_by_five_percent_or_three_milliseconds() -> None:
    assert never_slower(20.0) == 23.0
    assert never_slower(200.0) == pytest.approx(210.0)


def test_slow_files_read_at_their_rate_and_stall_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "file").chmod(0o600)
    files = SlowFiles(bytes_per_s=20e6)
    files.folder = os.open(tmp_path, os.O_RDONLY)
    fd = files.open("file")
    buffer = bytearray(1 << 20)
    started = time.monotonic()
    assert files.read(fd, [memoryview(buffer)], 0) == 1 << 20
    assert time.monotonic() - started >= 0.052
    assert bytes(buffer[:256]) == bytes(range(256))
    files.bytes_per_s, files.stall_after, files.stall_s = 0, 1 << 20, 0.2
    started = time.monotonic()
    files.read(fd, [memoryview(buffer)[: 1 << 19]], 0)
    files.read(fd, [memoryview(buffer)[: 1 << 19]], 0)
    assert time.monotonic() - started >= 0.2
    assert files.stall_after is None
    files.close(fd)
    os.close(files.folder)


# The replay of a trace


def _turn(time_s: float, length: int, *ids: int, answer: int = 1) -> Turn:
    return Turn(time_s, length, answer, ids)


def _conversations(count: int, rounds: int) -> list[Turn]:
    """Each round adds two blocks to its conversation's; all share block 0."""
    turns = []
    for time_s in range(rounds):
        for talk in range(count):
            ids = (0, *(1000 * (talk + 1) + i for i in range(2 * (time_s + 1))))
            turns.append(_turn(time_s * 60 + talk, len(ids) * 512, *ids))
    return turns


def _write_trace(path: Path, turns: list[Turn]) -> Path:
    lines = [
        {"timestamp": turn.time_s * 1e3, "input_length": turn.length, "output_length": turn.answer,
         "hash_ids": turn.ids} for turn in turns
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_a_trace_is_read_and_divided_and_a_wrong_line_is_named(tmp_path: Path) -> None:
    path = _write_trace(tmp_path / "t.jsonl", [_turn(3, 1100, 0, 5, 6, answer=80)])
    assert read_trace(path, 8) == [_turn(3, 137, 0, 5, 6, answer=10)]
    path.write_text(path.read_text() + '{"timestamp": 1, "input_length": 513, "hash_ids": [1]}\n')
    with pytest.raises(SystemExit, match=r"t\.jsonl:2 "):
        read_trace(path, 1)


def test_equal_ids_are_equal_tokens_and_a_prompt_has_its_length() -> None:
    prompts = Prompts(1000, 8)
    one, two = prompts.of(_turn(0, 150, 0, 5, 6)), prompts.of(_turn(0, 137, 0, 5, 7))
    assert (len(one), len(two)) == (150, 137)
    assert (one[:128] == two[:128]).all()
    assert not (one[128:137] == two[128:137]).all()


def test_half_of_the_sessions_are_whole_conversations() -> None:
    turns = _conversations(20, 4)
    assert sorted(map(len, sessions(turns).values())) == [4] * 20
    chosen, others = split_sessions(turns, 0.5, 7)
    assert len(chosen) == len(others) == 40
    assert not set(sessions(chosen)) & set(sessions(others))
    assert chosen == sorted(chosen, key=lambda turn: turn.time_s)


def test_the_simulated_lru_forgets_whole_prompts_from_their_tails() -> None:
    cache = Lru(4 * 512, 512)
    first = _turn(0, 1536, 0, 1, 2, answer=0)
    cache.add(first)
    assert cache.found(first) == 1535  # one token is always computed
    cache.add(_turn(1, 1024, 0, 9, answer=0))
    assert cache.found(first) == 1535
    cache.add(_turn(2, 512, 7, answer=0))
    assert cache.found(first) == 1024
    assert lru_found(_conversations(3, 3), 1e9, 512) == 6 * 2 * 512 + 512 * (2 + 3 + 3 + 3 * 2)


def test_ideal_plans_gain_with_every_tier_and_never_lose() -> None:
    turns = _conversations(20, 6)
    arrivals = [turn.time_s / 20 for turn in turns]
    speeds = Speeds(*SPEEDS)

    def mean(ram: float, disk: float) -> float:
        taken = simulate(turns, arrivals, speeds, 131072, 1e9, ram, disk, 512)
        return float(np.mean(taken))

    off, disk, ram = mean(0, 0), mean(0, 40e9), mean(40e9, 0)
    assert ram < disk < off
    alone = simulate(turns[:1], [0.0], speeds, 131072, 1e9, 40e9, 0, 512)
    assert alone == [pytest.approx(float(speeds.prefill_s(0, turns[0].length)))]


class VirtualServer:
    """Answers one request after the other, each in as many seconds as its answer has tokens."""

    def __init__(self) -> None:
        self.now = self.free = 0.0

    def clock(self) -> float:
        self.now += 0.02
        return self.now

    def submit(self, prompt: Tokens, new_tokens: int) -> tuple[str, SimpleNamespace]:
        self.free = ends = max(self.now, self.free) + new_tokens
        done = SimpleNamespace(is_set=lambda: self.clock() >= ends, wait=lambda timeout: None)
        return "", SimpleNamespace(done=done, ends=ends)

    def ask(self, prompt: Tokens) -> None:
        self.submit(prompt, 1)

    def clear(self, tier: str) -> None:
        self.now = max(self.now, self.free)


@pytest.mark.parametrize(("load", "grows"), [(0.7, False), (0.95, False), (1.3, True)])
def test_a_load_below_what_is_sustained_with_answers_leaves_no_growing_queue(
    load: float, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    turns = [_turn(i, 512, i, answer=(i * 7) % 5 + 1) for i in range(60)]
    # an answer takes 3 seconds on the mean
    server = VirtualServer()
    rate = sustained(server, turns, Prompts(1000, 1), 8, 1e9, server.clock)
    assert rate == pytest.approx(1 / 3, rel=0.05)
    came = arrivals_at(turns, load * rate)
    assert (len(came) - 1) / came[-1] == pytest.approx(load * rate)
    server = VirtualServer()
    ended = []
    for turn, at in zip(turns, came, strict=True):
        server.now = at
        ended.append(server.submit(np.zeros(1), turn.answer)[1].ends)
    queue = Queue.of(came, ended)
    assert queue.rate == pytest.approx(load * rate)
    assert (queue.growth > 1) == grows
    assert (queue.open[-1] > 10) == grows


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_bench_trace_replays_a_trace_with_and_without_tiers(tmp_path: Path) -> None:
    path = _write_trace(tmp_path / "t.jsonl", _conversations(12, 3))
    document = _quick("bench_trace.py", tmp_path, str(path))
    rows = {(row["case"], row["metric"]): row for row in document["rows"]}  # type: ignore[attr-defined]
    mean = rows["tiny 24:16", "first token, mean"]
    assert mean["limit"] == rows["tiny tiers off", "first token, mean"]["value"]
    assert mean["ratio"] == pytest.approx(mean["value"] / mean["limit"])
    assert rows["tiny 24:16", "found"]["value"] > 0
    assert document["seed"] == 1
    assert rows["tiny tiers off", "load reached"]["value"] > 0
    assert ("tiny 24:16", "open requests, growth") in rows
