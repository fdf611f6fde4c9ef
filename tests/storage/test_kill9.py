"""kill -9 in the middle of writing loses nothing that was reported durable."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from storage_help import MIB, bytes_of, fast_folder, get, key_of

from litecache.storage import LocalShardClient, ShardStore

HERE = os.path.dirname(__file__)
SIZES = (4096, 64 << 10, 360 << 10)
# the last blocks that a 48 MiB store still holds, whatever was in it before
KEPT_BYTES = 24 * MIB


def write_until_killed(folder: str, first: int, fsync: str, nbytes: int, after_s: float) -> tuple:
    child = subprocess.Popen(
        [sys.executable, f"{HERE}/kill_writer.py", folder, str(first), fsync, str(nbytes)],
        stdout=subprocess.PIPE,
        cwd=HERE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    time.sleep(after_s)  # the random instant is the point of the test
    child.send_signal(signal.SIGKILL)
    lines = child.stdout.read().decode().splitlines()
    child.wait()
    durable = [int(line.split()[1]) for line in lines if line.startswith("durable ")]
    committed = [int(line.split()[1]) for line in lines if line.startswith("committed ")]
    return durable, (max(committed) if committed else first)


def kill_rounds(count: int, seed: int) -> tuple[int, int]:
    draw = random.Random(seed)
    hits = asked = 0
    folder = fast_folder()
    number = 0
    for _ in range(count):
        nbytes, fsync = draw.choice(SIZES), draw.choice(["always", "interval"])
        first = number
        durable, number = write_until_killed(folder, first, fsync, nbytes, draw.uniform(0.02, 0.4))
        found, wanted = check_after_kill(folder, durable, first, number, nbytes)
        hits, asked = hits + found, asked + wanted
        number += 100
    shutil.rmtree(folder, ignore_errors=True)
    return hits, asked


def check_after_kill(
    folder: str, durable: list[int], first: int, number: int, nbytes: int
) -> tuple[int, int]:
    """Open what a killed process left; (hits, number) of the durable blocks that it must hold."""
    with ShardStore(folder, storage_bytes=48 * MIB, ram_bytes=8 * MIB) as store:
        store.check_integrity()
        client = LocalShardClient(store)
        recent = {n for n in durable if n >= number - KEPT_BYTES // nbytes}
        assert all(store.query([key_of(n) for n in recent])), "a durable block is gone"
        hits = 0
        for n in sorted(recent | set(range(max(first, number - 256), number + 8))):
            (hit,) = get(client, [key_of(n)], nbytes)
            assert hit or n not in recent, "a durable block cannot be read"
            hits += hit and n in recent
        client.close()
    return hits, len(recent)


def test_durable_blocks_survive_kill_9(capsys: pytest.CaptureFixture[str]) -> None:
    hits, asked = kill_rounds(8, seed=1)
    with capsys.disabled():
        print(f"\n8 kills: {hits} of {asked} durable blocks hit")
    assert asked > 0
    assert hits == asked


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_durable_blocks_survive_50_kills(capsys: pytest.CaptureFixture[str]) -> None:
    hits, asked = kill_rounds(50, seed=2)
    with capsys.disabled():
        print(f"\n50 kills: {hits} of {asked} durable blocks hit")
    assert hits == asked > 0


def test_contents_helper_can_tell_blocks_apart() -> None:
    assert bytes_of(key_of(1), 64) != bytes_of(key_of(2), 64)
