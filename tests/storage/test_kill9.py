"""kill -9 in the middle of writing loses nothing that was reported durable."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
from kill_writer import OPERATIONS
from storage_help import MIB, bytes_of, fast_folder, get, key_of

from litecache.storage import LocalShardClient, ShardStore

HERE = os.path.dirname(__file__)
SIZES = (4096, 64 << 10, 360 << 10)
# the last blocks that a 48 MiB store still holds, whatever was in it before
KEPT_BYTES = 24 * MIB


class Life(NamedTuple):
    """What a killed process said.

    Attributes:
        opened: it had read back what was there.
        durable: numbers of blocks.
        end: one past the last block that it may have written.
        where: file operation at which it killed itself; empty when it was killed from outside.
    """

    opened: bool
    durable: list[int]
    end: int
    where: str


def write_until_killed(
    folder: str, first: int, fsync: str, nbytes: int, after_s: float, operation: str, count: int
) -> Life:
    child = subprocess.Popen(
        [
            sys.executable, f"{HERE}/kill_writer.py", folder, str(first), fsync, str(nbytes),
            operation, str(count),
        ],
        stdout=subprocess.PIPE,
        cwd=HERE,
    )  # fmt: skip
    assert child.stdout is not None
    said = child.stdout.readline()
    if said == b"open\n":
        time.sleep(after_s)  # the random instant is the point of the test
    child.send_signal(signal.SIGKILL)
    lines = [said.decode().strip(), *child.stdout.read().decode().splitlines()]
    child.wait()

    def numbers(word: str) -> list[int]:
        return [int(line.split()[1]) for line in lines if line.startswith(word + " ")]

    assert child.returncode == -signal.SIGKILL, f"the writer ended by itself: {lines[-3:]}"
    where = next((line.split()[1] for line in lines if line.startswith("killed ")), "")
    end = max(numbers("committed"), default=first)
    return Life(said == b"open\n", numbers("durable"), end, where)


def kill_rounds(
    count: int, seed: int, tell: Callable[[Life], None] = lambda life: None
) -> tuple[int, int]:
    """Kill writers on one folder, from outside or at a file operation.

    Returns:
        (hits, number) of the blocks reported durable that the next process must find.
    """
    draw = random.Random(seed)
    hits = asked = 0
    folder = fast_folder()
    number = 0
    before: tuple[list[int], int, int, int] = ([], 0, 0, SIZES[0])
    try:
        for _ in range(count):
            nbytes, fsync = draw.choice(SIZES), draw.choice(["always", "interval"])
            operation = draw.choice(["", *OPERATIONS])
            nth = draw.randrange(1, OPERATIONS.get(operation, 1) + 1)
            life = write_until_killed(
                folder, number, fsync, nbytes, draw.uniform(0.02, 0.4), operation, nth
            )
            tell(life)
            if life.opened:
                before = (life.durable, number, life.end, nbytes)
            # killed while it read back: what the one before it had made durable is still there
            found, wanted = check_after_kill(folder, *before)
            hits, asked = hits + found, asked + wanted
            number = life.end + 100
    finally:
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
    lives: list[Life] = []
    hits, asked = kill_rounds(8, seed=1, tell=lives.append)
    assert any(life.where for life in lives), "one kill at least was at a file operation"
    with capsys.disabled():
        print(f"\n8 kills: {hits} of {asked} durable blocks hit")
    assert asked > 0
    assert hits == asked


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_durable_blocks_survive_50_kills(capsys: pytest.CaptureFixture[str]) -> None:
    lives: list[Life] = []
    hits, asked = kill_rounds(50, seed=2, tell=lives.append)
    assert not all(life.opened for life in lives), "one kill at least was during replay"
    assert {"write", "sync", "rename"} <= {life.where for life in lives}
    with capsys.disabled():
        print(f"\n50 kills: {hits} of {asked} durable blocks hit")
    assert hits == asked > 0


def test_contents_helper_can_tell_blocks_apart() -> None:
    assert bytes_of(key_of(1), 64) != bytes_of(key_of(2), 64)
