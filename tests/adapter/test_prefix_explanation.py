from __future__ import annotations

from types import SimpleNamespace

from litecache.adapter.inspection.prefix_explanation import (
    _below,
    _elsewhere,
    _Keys,
    _runs,
)
from litecache.engine.engine_info import EngineInfo
from litecache.storage.namespaces import namespace_of
from litecache.storage.protocol import Place

HERE, THERE = "litecache:g:shard:aaaaaaaa:0", "litecache:g:shard:bbbbbbbb:0"
INFO = EngineInfo(
    "/models/mine", "0123456789abcdef", "float32", "float32", "cpu", 16, 8, ("g",), (4096,), 128, 4,
    64, 100, 1,
)  # fmt: skip


def keys(blocks: int, groups: int = 1) -> _Keys:
    return _Keys([[bytes([g, i]) for i in range(blocks)] for g in range(groups)], [])


def test_a_replica_takes_a_block_from_the_nearest_tier_that_holds_it() -> None:
    ram, disk, both = Place.RAM, Place.DISK, Place.RAM | Place.DISK
    places = {HERE: bytes([ram, disk, 0, 0, both]), THERE: bytes([ram, ram, disk, 0, ram])}
    assert _below(places, keys(5), "aaaaaaaa" + "0" * 20) == [
        ["ram:aaaaaaaa:0", "disk:aaaaaaaa:0", "remote:bbbbbbbb:0", "", "ram:aaaaaaaa:0"]
    ]
    other = _below(places, keys(5), "cccccccc")
    assert {source.partition(":")[0] for source in other[0]} == {"remote", ""}


def test_runs_are_of_blocks_that_all_kv_groups_have_in_the_same_places() -> None:
    places = {HERE: bytes([3, 3, 1, 3, 1, 1])}  # two groups of three blocks
    views = {"litecache:g:gpu:0": SimpleNamespace(sources=("gpu", "", ""))}
    runs = list(_runs(3, views, places, keys(3, 2)))
    assert [(run.first, run.end, run.pools, run.ram, run.disks) for run in runs] == [
        (0, 1, ("gpu:0",), ("shard:aaaaaaaa:0",), ("shard:aaaaaaaa:0",)),
        (1, 3, (), ("shard:aaaaaaaa:0",), ()),
    ]


def told(namespaces: dict[str, int], salt: str = "") -> str:
    return "\n".join(_elsewhere(INFO, salt, namespaces))


def test_what_the_shards_hold_of_other_salts_forms_and_models_is_told_by_what_differs() -> None:
    mine = INFO.label
    assert told({mine: 3}) == ""
    assert told({namespace_of(mine, "s", ()): 3}, "s") == ""
    text = told(
        {
            mine: 1,
            namespace_of(mine, "my-secret", ()): 2,
            mine.replace("/float32/", "/int8/"): 3,
            mine.replace("/float32/", "/float32:fp8/"): 4,
            mine.replace("/16", "/32"): 5,
            "/models/other@fedcba987654/float32/16": 6,
            "whatever": 7,
        },
        "s",
    )
    for part in (
        "1 block(s) of this model, without a salt",
        "2 block(s) of this model, of another salt",
        "3 block(s) of this model as int8 (kv_dtype, tier_codec), not float32",
        "4 block(s) of this model as float32, fp8 below (kv_dtype, tier_codec), not float32",
        "5 block(s) of this model with block_size 32, not 16",
        "6 block(s) of another model (other, or its other weights)",
        "7 block(s) of an unknown model",
    ):
        assert part in text
    assert "secret" not in text
    assert "/models" not in text
