"""Fuzzed messages to an engine and its actor: none may harm anything but its own request.

After each message a good request must be answered with the same tokens as by the fresh engine.
Message N of a seed is the same in every run.

    python scripts/fuzz_engine.py --count 20000 --json fuzz.json
"""

from __future__ import annotations

import logging
import random
import sys
import time
from pathlib import Path

from bench_common import Report, Row, parser
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engine"))

from message_fuzz import FIELDS, MessageFuzz

LEAST_ACCEPTED = 0.3
LEAST_CHANGES = 100


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--count", type=int, default=20_000, help="messages")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    count = 500 if options.quick else options.count
    logging.disable(logging.CRITICAL)
    report = Report("Fuzzed messages to the engine", options.json)
    fuzz = MessageFuzz()
    begun = time.monotonic()
    try:
        for number in track(range(count), description="messages", disable=not sys.stderr.isatty()):
            fuzz.round(random.Random(options.seed * 1_000_003 + number))
        fuzz.check()
    finally:
        fuzz.close()
    tally = fuzz.tally
    report.add(Row("all", "messages", count, "messages"))
    report.add(Row("all", "time", time.monotonic() - begun, "s"))
    report.add(Row("all", "accepted", tally.share_accepted, "share", limit=LEAST_ACCEPTED))
    report.add(Row("all", "raw errors", len(tally.raw), "messages", limit=0))
    report.add(Row("all", "unanswered", len(tally.unanswered), "messages", limit=0))
    for kind, sent in sorted(tally.kinds.items()):
        report.add(Row(kind, "sent", sent, "messages"))
        report.add(Row(kind, "accepted", tally.accepted[kind], "messages"))
    for name in FIELDS:
        report.add(Row(f"field {name}", "changed", tally.changed[name], "times"))
    failures = [*tally.raw, *tally.unanswered]
    if tally.share_accepted < LEAST_ACCEPTED:
        failures.append(f"only {tally.share_accepted:.1%} of the messages were accepted")
    rare = [name for name in FIELDS if tally.changed[name] < LEAST_CHANGES]
    if rare and count >= 20_000:
        failures.append(f"changed less than {LEAST_CHANGES} times: {', '.join(rare)}")
    for failure in failures[:50]:
        sys.stderr.write(f"{failure}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
