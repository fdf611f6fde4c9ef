"""Tuning picks the fastest configuration that runs; what it writes, the table reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from litecache.errors import KernelError
from litecache.kernels.tuning import SHAPES, Numbers, Shape, candidates, own_entries, tune


def test_the_fastest_candidate_that_runs_is_kept(tmp_path: Path) -> None:
    def measure(shape: Shape, numbers: Numbers) -> float:
        if numbers[0] == 16:
            raise RuntimeError("out of resources")
        block_n, warps, stages, programs, tail = numbers
        bonus = 0.5 if tail and shape.grouped else 0.0
        distance = abs(block_n - 32) + abs(warps - 2) + abs(stages - 2)
        return distance + programs / 100 + tail / 99 - bonus

    entries = tune(SHAPES, measure)
    assert entries[Shape(2, 128, True, 16).name] == [32, 2, 2, 4, 8]
    assert entries[Shape(2, 128, False, 16).name] == [32, 2, 2, 4, 0]
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"gpu": "any", "decode": entries}))
    assert own_entries(str(path)) == entries


def test_a_gpu_that_runs_nothing_is_an_error() -> None:
    def measure(shape: Shape, numbers: Numbers) -> float:
        raise RuntimeError("no kernel image")

    with pytest.raises(KernelError, match="2B-d64-grouped-r16"):
        tune(SHAPES[:1], measure)


def test_every_shape_has_candidates() -> None:
    assert all(len(candidates(shape)) >= 8 for shape in SHAPES)
