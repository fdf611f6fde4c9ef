"""The disk tier against the bare disk and memcpy, in the same run.

`--dir D` (required): where the store and the raw file lie. Blocks go through the API of a real
`StorageShard` actor in batches of 64 (`--in-process` measures a store of this process instead).
Shard and limit alternate in turns of 256 MiB; the figure is the median of the paired ratios.
`--index` measures the key index instead, `--against DIR` beside that of another checkout.

    python scripts/bench_storage.py --dir /var/tmp/bench --json out.json --plot out.png
"""

from __future__ import annotations

import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_common import Report, parser
from storage_bench.cases import SIZES, Settings, SizeBench
from storage_bench.key_index import bench_index
from storage_bench.peer import bench_light_mem
from storage_bench.plots import plot

from litecache.storage.disk.raw_disk import RawDisk


def arguments() -> Namespace:
    """The command line."""
    made = parser(__doc__ or "")
    made.add_argument("--dir", help="folder on the disk to measure")
    made.add_argument("--index", action="store_true", help="measure the key index instead")
    made.add_argument("--against", type=Path, metavar="DIR", help="another checkout to compare")
    made.add_argument(
        "--in-process", action="store_true", help="measure without the actor and without Ray"
    )
    made.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    made.add_argument("--rounds", type=int, default=20, help="pairs of turns")
    made.add_argument("--turn-mib", type=int, default=256)
    made.add_argument("--disk-bytes", type=int, default=3 << 30, help="size of the store")
    made.add_argument("--ram-bytes", type=int, default=1 << 30)
    made.add_argument("--threads", type=int, default=4, help="I/O threads of the shard")
    made.add_argument("--plot", type=Path, metavar="PNG", help="draw the figures (matplotlib)")
    args = made.parse_args()
    if not args.dir and not args.index:
        made.error("--dir is required")
    if args.quick:
        args.sizes, args.rounds, args.turn_mib = ["2 MiB"], 3, 64
        args.disk_bytes, args.ram_bytes = 512 << 20, 256 << 20
    return args


@contextmanager
def scratch(path: str) -> Iterator[str]:
    """An own folder below `path`, removed afterwards."""
    os.makedirs(path, exist_ok=True)
    folder = os.path.join(path, f"bench-storage-{os.getpid()}")
    os.mkdir(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> None:
    args = arguments()
    report = Report("Disk tier", args.json, {"through": "the client of this process"})
    if args.index:
        bench_index(report, args.quick, args.against)
        report.show()
        return
    if not args.in_process:
        report.extra["through"] = "a StorageShard actor"
    settings = Settings(
        args.rounds, args.disk_bytes, args.ram_bytes, args.threads, args.in_process, args.quick
    )
    with scratch(os.path.abspath(args.dir)) as folder:
        turn = args.turn_mib << 20
        raw = RawDisk(f"{folder}/raw", args.disk_bytes // turn * turn, turn)
        for name in args.sizes:
            bench = SizeBench(report, folder, raw, name, settings)
            try:
                bench.run()
            finally:
                bench.close()
        raw.close()
        bench_light_mem(report, folder, args.quick)
    report.show()
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    sys.exit(main())
