from __future__ import annotations

from pathlib import Path

import pytest
from engine_harness import family_source

from litecache.config import CacheConfig
from litecache.engine.worth import ColdCurve, LengthTimes, break_even, measure_worth
from litecache.errors import CapacityError, ConfigError

DISK_BYTES = 600_000_000


def times(pool_ms: float, *lengths: int) -> list[LengthTimes]:
    return [LengthTimes(n, 0.1 * n, pool_ms, 0.0, 0.0, 0, 0) for n in lengths]


def test_loading_is_sooner_from_the_block_on_where_it_meets_computing() -> None:
    curve = ColdCurve()
    for length in (100, 1000, 4000):
        curve.add(length, 0.1 * length)  # ms
    # 1 KB a token at 0.02 GB/s is 0.05 ms a token, half of computing it: even at 20.4 / 0.05 = 408
    assert break_even(times(20.4, 100, 4000), curve, 16, 1000, 0.02) == 416
    assert break_even(times(0.0, 100, 4000), curve, 16, 1000, 0.02) == 16
    assert break_even(times(20.0, 100, 4000), curve, 16, 1000, 0.005) is None
    assert break_even(times(20.0, 100, 384), curve, 16, 1000, 0.02) is None


@pytest.mark.slow
def test_a_models_tiers_are_measured_at_the_lengths_asked_for(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    config = CacheConfig(num_blocks=64, dtype="float32", ram_bytes="32MB", device="cpu")
    worth = measure_worth(
        family_source("llama"),
        config,
        str(tmp_path),
        disk_bytes=DISK_BYTES,
        seconds=60,
        lengths=[128, 64],
        progress=lambda *args: said.append(args),
    )
    assert [row.tokens for row in worth.times] == [64, 128]
    for row in worth.times:
        assert min(row.cold_ms, row.pool_ms, row.ram_ms, row.disk_ms) > 0
        assert max(row.ram_loaded, row.disk_loaded) <= row.tokens
    assert worth.disk_read_gbps is None or worth.disk_read_gbps > 0
    assert (worth.stopped, worth.device, worth.form) == ("", "cpu", "float32")
    assert said[-1][1] < said[-1][2]
    assert [file.name for file in tmp_path.iterdir()] == ["shard-0"]  # the raw file has no name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"lengths": [64, 100_000]}, ConfigError, "lengths=100000 is invalid: from 16 to"),
        ({"seconds": 0.0}, CapacityError, "not even 64 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], field: str
) -> None:
    config = CacheConfig(num_blocks=64, dtype="float32", ram_bytes="32MB", device="cpu")
    asked: dict[str, object] = {"disk_bytes": DISK_BYTES, "seconds": 60, "lengths": [64], **changes}
    with pytest.raises(error, match=field):
        measure_worth(family_source("llama"), config, str(tmp_path), **asked)  # type: ignore[arg-type]


def test_too_little_of_a_disk_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = CacheConfig(num_blocks=64)
    with pytest.raises(ConfigError, match="disk_bytes"):
        measure_worth(family_source("llama"), config, str(tmp_path), disk_bytes=1000, seconds=60)
    assert list(tmp_path.iterdir()) == []
