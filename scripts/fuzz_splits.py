"""Every tier on against tiers off, loads split at every possible place: token for token equal.

Prompts of random shared prefixes over tiny random models in float32. For each prompt and each block
from which its prefix can be loaded, the load is forced to begin there: from RAM, from disk, from
another node, or from a mixture, four prompts at a time and in chunks of two blocks. The tokens must
be those of an engine without tiers, and those be stock transformers' own. Exits 1 otherwise.

    python scripts/fuzz_splits.py [--prompts 200] [--families llama gemma2 mistral] [--seed 0]
        [--json FILE]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_common import Report, Row, parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engine"))

from plan_driver import FAMILIES
from split_world import Splits


def fuzz(family: str, count: int, seed: int, report: Report) -> list[str]:
    """One family; what was wrong."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-splits-") as folder:
        shards = [Path(folder) / name for name in "ab"]
        with Splits(family, count, shards, seed) as splits:
            splits.compare_with_transformers()
            splits.run_all()
    report.add(
        Row(family, "prompts", count, ""),
        *(Row(family, f"runs from {source}", n, "") for source, n in sorted(splits.runs.items())),
        *(Row(family, f"reused from {tier}", n, "tokens") for tier, n in splits.reused.items()),
        Row(family, "partly loaded, partly computed", splits.split, "runs"),
        Row(family, "other tokens", len(splits.wrong), "runs", limit=0),
        Row(family, "time", time.monotonic() - begun, "s"),
    )
    return [f"{family}: {wrong}" for wrong in splits.wrong]


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--prompts", type=int, default=200)
    arguments.add_argument(
        "--families", nargs="+", choices=sorted(FAMILIES), default=["llama", "gemma2", "mistral"]
    )
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    if options.quick:
        options.prompts, options.families = 8, options.families[:1]
    torch.set_num_threads(1)
    report = Report("Loads split at every place", options.json)
    wrong = [
        line
        for family in options.families
        for line in fuzz(family, options.prompts, options.seed, report)
    ]
    report.show()
    for line in wrong[:40]:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
