"""Bad arguments raise KernelError with the argument's name, before anything is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Case, make_batch

from litecache.errors import KernelError
from litecache.kernels import copy_blocks, dispatch, store_kv, tuning

CASE = Case((1, 1, 5), (9, 20, 14))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (r"query\.shape", lambda b: {"query": b.query[0]}),
        (r"query\.shape", lambda b: {"query": b.query[..., :8]}),
        (r"query\.shape", lambda b: {"query": b.query[:-1]}),
        (r"query\.dtype", lambda b: {"query": b.query.int()}),
        (r"query\.stride", lambda b: {"query": b.query.transpose(1, 2).contiguous().mT}),
        ("num_heads", lambda b: {"query": b.query[:, :3]}),
        (r"k_cache\.shape", lambda b: {"k_cache": b.k_cache[0]}),
        (r"k_cache\.dtype", lambda b: {"k_cache": b.k_cache.double()}),
        (r"k_cache\.stride", lambda b: {"k_cache": b.k_cache.transpose(1, 2)}),
        (r"v_cache\.shape", lambda b: {"v_cache": b.v_cache[1:]}),
        (r"v_cache\.dtype", lambda b: {"v_cache": b.v_cache.half()}),
        ("k_scale", lambda b: {"k_scale": torch.ones(b.k_cache.shape[:3])}),
        ("window", lambda b: {"window": 0}),
        ("softcap", lambda b: {"softcap": 0.0}),
        (r"sinks\.shape", lambda b: {"sinks": torch.zeros(3)}),
        (r"alibi_slopes\.shape", lambda b: {"alibi_slopes": torch.zeros(5)}),
        ("value", lambda b: {"key": b.key}),
        (r"key\.shape", lambda b: {"key": b.key[1:], "value": b.value}),
        (r"out\.shape", lambda b: {"out": torch.zeros(7, 4, 8)}),
    ],
)
def test_attention_names_the_bad_argument(name: str, change: Any) -> None:
    batch = make_batch(CASE)
    with pytest.raises(KernelError, match=f"^{name}"):
        batch.attend(**change(batch))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 16),
        ("block_tables", torch.zeros(3, 4, dtype=torch.int64)),
        ("block_tables", torch.zeros(4, 3, dtype=torch.int32).t()),
        ("context_lens", torch.ones(2, dtype=torch.int32)),
        ("cu_seqlens_q", torch.zeros(3, dtype=torch.int32)),
        ("context_lens", torch.ones(3)),
        ("context_lens", torch.ones(6, dtype=torch.int32)[::2]),
        ("cu_seqlens_q", torch.ones(8, dtype=torch.int32)[::2]),
    ],
)
def test_attention_names_the_bad_field_of_the_metadata(field: str, value: Any) -> None:
    batch = make_batch(CASE)
    metadata = dataclasses.replace(batch.metadata, **{field: value})
    with pytest.raises(KernelError, match=f"^metadata.{field}"):
        batch.attend(metadata)


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        (r"key\.shape", 0, lambda t: t[1:]),
        (r"value\.shape", 1, lambda t: t[..., :8]),
        (r"key\.dtype", 0, lambda t: t.long()),
        (r"slot_mapping\.dtype", 4, lambda t: t.int()),
        (r"slot_mapping\.shape", 4, lambda t: t[None]),
    ],
)
def test_store_names_the_bad_argument(name: str, index: int, change: Any) -> None:
    batch = make_batch(CASE)
    arguments = [batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping]
    arguments[index] = change(arguments[index])
    with pytest.raises(KernelError, match=f"^{name}"):
        store_kv(*arguments)


def test_quantised_pools_need_scales() -> None:
    batch = make_batch(dataclasses.replace(CASE, pool_dtype=torch.int8))
    with pytest.raises(KernelError, match=r"^k_scale"):
        batch.attend(k_scale=None)
    with pytest.raises(KernelError, match=r"^v_scale\.dtype"):
        batch.attend(v_scale=torch.ones(batch.k_cache.shape[:3]).half())


def test_copy_names_the_bad_argument() -> None:
    pool = torch.zeros(4, 64, dtype=torch.uint8)
    one = torch.tensor([1])
    with pytest.raises(KernelError, match=r"^pool"):
        copy_blocks(pool.float(), one, one)
    with pytest.raises(KernelError, match=r"^pool"):
        copy_blocks(pool[:, :32], one, one)
    with pytest.raises(KernelError, match=r"^dst\.shape"):
        copy_blocks(pool, one, torch.tensor([1, 2]))
    with pytest.raises(KernelError, match=r"^src\.dtype"):
        copy_blocks(pool, one.int(), one)


def test_contents_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(CASE)
    monkeypatch.setenv("LITECACHE_CHECK", "1")
    batch.attend()
    slots = batch.metadata.slot_mapping.clone()
    slots[0] = batch.k_cache.shape[0] * 8
    with pytest.raises(KernelError, match=r"^slot_mapping"):
        store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, slots)
    batch.metadata.block_tables[1, 1] = batch.k_cache.shape[0]
    with pytest.raises(KernelError, match=r"^metadata\.block_tables\[1\]"):
        batch.attend()
    batch.metadata.block_tables[1, 1] = 1
    batch.metadata.context_lens[2] = 1000
    with pytest.raises(KernelError, match=r"^metadata\.context_lens\[2\]"):
        batch.attend()
    with pytest.raises(KernelError, match=r"^dst"):
        copy_blocks(torch.zeros(4, 64, dtype=torch.uint8), torch.tensor([1]), torch.tensor([4]))


def test_an_unknown_backend_is_refused_with_the_valid_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LITECACHE_KERNELS", "cutlass")
    with pytest.raises(KernelError, match=r"reference.*triton"):
        dispatch.backend(torch.device("cpu"))


def test_an_empty_batch_is_empty() -> None:
    batch = make_batch(Case((1,), (4,)))
    empty = dispatch.AttentionMetadata.build([], [], [], 8)
    assert batch.attend(empty, query=batch.query[:0]).shape == (0, 4, 16)


def test_a_tuning_file_overrides_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tuning.Shape(2, 128, True, 16)
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"decode": {shape.name: [64, 2, 2, 5]}}))
    assert tuning.own_entries(str(path))[shape.name] == [64, 2, 2, 5]
    path = tmp_path / "broken.json"
    path.write_text('{"decode": {"x": [1, 2]}}')
    with pytest.raises(KernelError, match="LITECACHE_TUNING"):
        tuning.own_entries(str(path))
