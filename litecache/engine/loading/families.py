"""What was tried of each decoder family of transformers: the table behind `litecache models`.

The data beside this file is written by scripts/family_matrix.py. It informs people; the gate does
not read it but probes each model that it is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("families.json")


class Trial(NamedTuple):
    """What became of a small random model of a family.

    Attributes:
        family: model type.
        case: what its configuration has beyond a family's defaults; "plain" = nothing.
        verdict: "paged", "gathered", "refused" or "not made".
        detail: why it was refused or could not be made; else the largest relative error of its
            logits against stock transformers.
        right_to: of a refusal, the `max_model_len` up to which the model is accepted.
    """

    family: str
    case: str
    verdict: str
    detail: str
    right_to: int | None = None


class Trials(NamedTuple):
    """All of them.

    Attributes:
        transformers: the version they were made with.
        rows: by family, "plain" first.
    """

    transformers: str
    rows: tuple[Trial, ...]

    def by_family(self) -> Iterator[tuple[str, list[Trial]]]:
        """Each family with its trials."""
        for family, rows in groupby(self.rows, key=lambda row: row.family):
            yield family, list(rows)


def read_trials() -> Trials:
    """The table that comes with the package."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    return Trials(data["transformers"], tuple(Trial(**row) for row in data["rows"]))


def write_trials(trials: Trials) -> None:
    """Write a table, a line for each trial."""
    rows = ",\n".join(json.dumps(row._asdict()) for row in trials.rows)
    version = json.dumps(trials.transformers)
    FILE.write_text(f'{{"transformers": {version}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")


def notes(trials: list[Trial]) -> str:
    """What is to say of a family beside the verdict of its first trial, in a line."""
    first, *variants = trials
    found = [first.detail] if first.verdict in ("refused", "not made") else []
    right = [row.case for row in variants if row.verdict == first.verdict]
    if right and first.verdict in ("paged", "gathered"):
        found.append(f"also {', '.join(right)}")
    for row in variants:
        if row.verdict == first.verdict or row.verdict == "not made":
            continue
        if row.verdict == "refused" and row.right_to:
            found.append(f"{row.case}: up to that length")
        else:
            why = f", {row.detail}" if row.verdict == "refused" else ""
            found.append(f"{row.case}: {row.verdict}{why}")
    return "; ".join(found)
