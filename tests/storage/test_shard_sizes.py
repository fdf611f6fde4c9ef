"""Whether a bound can hold a block at all, told before anything starts, as the store has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litecache.config import CacheConfig
from litecache.errors import ConfigError
from litecache.storage import CommitItem, LocalShardClient, ShardStore
from litecache.storage.shard_options import (
    check_tiers,
    smallest_ram_bytes,
    smallest_storage_bytes,
)

MIB = 1 << 20


def holds(folder: Path, ram_bytes: int, storage_bytes: int, block_bytes: int) -> bool:
    """Whether a block can be written, reaches the disk, and is read from there."""
    key = bytes([1]) * 16
    with ShardStore(str(folder), storage_bytes=storage_bytes, ram_bytes=ram_bytes) as store:
        client = LocalShardClient(store)
        try:
            slots = client.reserve(block_bytes, 1)
        except ConfigError:  # larger than the whole arena
            slots = []
        if slots:
            client.commit([CommitItem(*slots[0], key, bytes(16), "n")])
            client.flush()
        found = store.awaits_disk([key])[0] or bool(store.durable([key])[0])
        client.close()
    return bool(slots) and found


@pytest.mark.parametrize("block_bytes", [4096, MIB, 3 * MIB + 4096, 9 * MIB])
def test_the_least_bounds_hold_a_block(block_bytes: int, tmp_path: Path) -> None:
    ram, storage = smallest_ram_bytes(block_bytes), smallest_storage_bytes(block_bytes)
    assert holds(tmp_path / "s", ram, storage, block_bytes)


@pytest.mark.parametrize("block_bytes", [MIB + 4096, 3 * MIB + 4096, 9 * MIB])
def test_less_than_the_least_bounds_holds_none(block_bytes: int, tmp_path: Path) -> None:
    ram, storage = smallest_ram_bytes(block_bytes), smallest_storage_bytes(block_bytes)
    assert not holds(tmp_path / "a", ram - MIB, storage, block_bytes)
    assert not holds(tmp_path / "b", ram, storage - MIB, block_bytes)


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_two_kinds_of_blocks_need_at_least_what_each_needs(one: int, other: int) -> None:
    for least in (smallest_ram_bytes, smallest_storage_bytes):
        both = least(one, other)
        assert both >= max(least(one), least(other))
        assert both >= one + other


@pytest.mark.parametrize(
    ("settings", "blocks", "field"),
    [
        ({"ram_bytes": 8 * MIB}, [9 * MIB], "ram_bytes"),
        ({"ram_bytes": 32 * MIB, "storage_shards": 4}, [9 * MIB], "ram_bytes"),
        ({"ram_bytes": 16 * MIB}, [9 * MIB, 9 * MIB], "ram_bytes"),
        ({"storage_bytes": 8 * MIB}, [9 * MIB], "storage_bytes"),
        ({"storage_bytes": 9 * MIB}, [9 * MIB], "storage_bytes"),
        ({"storage_bytes": 2**40, "ram_bytes": 2**40}, [2**41], "ram_bytes"),
    ],
)
def test_a_bound_too_small_for_a_block_is_refused_with_the_numbers(
    settings: dict[str, int], blocks: list[int], field: str
) -> None:
    config = CacheConfig(**({"storage_dir": "/a", "ram_bytes": 2**30} | settings))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"{field}=\d+ is invalid: at least") as refusal:
        check_tiers(config, blocks)
    for number in (blocks[0], getattr(config, field) // config.storage_shards):
        assert f"{number:,}" in str(refusal.value)
    check_tiers(config, [4096])
