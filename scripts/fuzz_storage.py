"""Mutated stores: no crash, no hang, no wrong block, and untouched blocks still hit.

A sound store is made once; each round mutates one of its files (bit flips, cuts, splices, zeroed
runs, gigantic lengths, old or foreign pieces, forged record fields), opens it and reads every
block. A store may refuse a file of another format with a LiteCacheError, nothing else.

    python scripts/fuzz_storage.py --count 100000
"""

from __future__ import annotations

import logging
import random
import sys
import time
from pathlib import Path

from bench_common import Report, Row, parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "storage"))

from fuzz_world import FuzzStore, Outcome


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--count", type=int, default=100_000)
    args = made.parse_args()
    count = 500 if args.quick else args.count
    logging.disable(logging.CRITICAL)
    report = Report("Mutated files", args.json)
    total = Outcome()
    begun = time.monotonic()
    slowest = 0.0
    fuzz = FuzzStore()
    try:
        for number in range(count):
            started = time.monotonic()
            total += fuzz.round(random.Random(args.seed * 1_000_003 + number))
            slowest = max(slowest, time.monotonic() - started)
            if number % 5000 == 4999:
                report.console.print(f"  {number + 1} mutations, {total}")
    finally:
        fuzz.close()
    report.add(
        Row("fuzz", "mutations", count, ""),
        Row("fuzz", "refused with a clear error", total.refused, ""),
        Row("fuzz", "untouched blocks asked", total.untouched, ""),
        Row("fuzz", "untouched blocks hit", total.hits / max(1, total.untouched), "", 1.0),
        Row("fuzz", "touched blocks that still hit, right", total.touched_hits, ""),
        Row("fuzz", "wrong blocks", total.wrong, "", 0),
        Row("fuzz", "slowest round", slowest, "s"),
        Row("fuzz", "time", time.monotonic() - begun, "s"),
    )
    report.show()
    good = not total.wrong and total.hits == total.untouched
    report.console.print("every promise held" if good else "[red]a promise was broken")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
