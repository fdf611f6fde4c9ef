"""Bounds under churn: disk use by `du` and shared memory, looked at each second.

A store is churned at four times its capacity by two writers and a reader; its files must never
exceed `storage_bytes` plus 1 %, its arena never `ram_bytes` plus one segment.

    python scripts/soak_storage.py --minutes 10
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench_common import Report, Row, parser
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "storage"))

from storage_help import KIB, MIB, get, key_of, put

from litecache.storage import LocalShardClient, ShardStore

SIZES = (64 * KIB, 360 * KIB, 2 * MIB)


class Churn:
    """Threads that write and read."""

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self.stop = threading.Event()
        self.written_bytes = 0
        self.hits = self.asked = 0
        self.recent: list[tuple[bytes, int]] = []
        self.errors: list[BaseException] = []
        self.threads = [
            threading.Thread(target=self._guard, args=(body, i))
            for i, body in enumerate((self.write, self.write, self.read))
        ]
        for thread in self.threads:
            thread.start()

    def _guard(self, body, number: int) -> None:
        try:
            body(number)
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def write(self, number: int) -> None:
        draw, client = random.Random(number), LocalShardClient(self.store)
        at = number << 40
        while not self.stop.is_set():
            nbytes = draw.choice(SIZES)
            keys = [key_of(at + i) for i in range(draw.randrange(1, 17))]
            stored = len(put(client, keys, nbytes))
            if not stored:
                self.store.wait_for_change(0.1)
                continue
            at += len(keys)
            self.written_bytes += stored * nbytes
            self.recent += [(key, nbytes) for key in keys[:stored]]
            del self.recent[:-400]
        client.close()

    def read(self, number: int) -> None:
        draw, client = random.Random(number), LocalShardClient(self.store)
        while not self.stop.is_set():
            if not self.recent:
                time.sleep(0.01)
                continue
            key, nbytes = draw.choice(self.recent)
            self.hits += sum(get(client, [key], nbytes))
            self.asked += 1
        client.close()


def du_bytes(folder: str) -> int:
    """What the folder takes on the disk."""
    output = subprocess.run(["du", "-s", "-B1", folder], capture_output=True, text=True)
    return int(output.stdout.split()[0])


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--minutes", type=float, default=10)
    made.add_argument("--dir", default=None, help="where; a temporary folder by default")
    made.add_argument("--storage-bytes", type=int, default=512 * MIB)
    made.add_argument("--ram-bytes", type=int, default=128 * MIB)
    args = made.parse_args()
    minutes = 0.2 if args.quick else args.minutes
    report = Report("Bounds under churn", args.json)
    folder = tempfile.mkdtemp(prefix="soak-", dir=args.dir)
    shard = os.path.join(folder, "shard")
    store = ShardStore(shard, storage_bytes=args.storage_bytes, ram_bytes=args.ram_bytes)
    segment = store._arena.segment_bytes
    churn = Churn(store)
    disk: list[int] = []
    memory: list[int] = []
    seconds = track(range(max(1, round(60 * minutes))), "seconds", console=report.console)
    begun = time.monotonic()
    try:
        for second in seconds:
            disk.append(du_bytes(shard))
            memory.append(store._arena.resident_bytes())
            if churn.stop.wait(max(0.0, begun + second + 1 - time.monotonic())):
                break
    finally:
        churn.stop.set()
        for thread in churn.threads:
            thread.join()
        store.check_integrity()
        store.close()
        disk.append(du_bytes(shard))
        shutil.rmtree(folder)
    turnover = churn.written_bytes / args.storage_bytes
    report.add(
        Row("soak", "looks", len(disk), ""),
        Row("soak", "written, times the capacity", turnover, "", 4),
        Row("soak", "most disk", max(disk), "B", args.storage_bytes * 1.01),
        Row("soak", "most shared memory", max(memory), "B", args.ram_bytes + segment),
        Row("soak", "reads that hit", churn.hits / max(1, churn.asked), "", samples=churn.asked),
        Row("soak", "errors", len(churn.errors), "", 0),
    )
    report.show()
    good = max(disk) <= args.storage_bytes * 1.01 and max(memory) <= args.ram_bytes + segment
    good = good and not churn.errors and (args.quick or turnover >= 4)
    report.console.print("the bounds held" if good else f"[red]broken: {churn.errors}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
