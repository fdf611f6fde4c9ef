from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_values import ANYTHING, EVERY, TEXTS, good_or_refused
from hypothesis import example, given
from hypothesis import strategies as st

from litecache.cli.options import parse_settings
from litecache.config import ADMISSION_POLICIES, EVICTION_POLICIES, CacheConfig
from litecache.errors import ConfigError
from litecache.storage.admission import Admission
from litecache.storage.eviction import get_policy

FIELDS = [field.name for field in dataclasses.fields(CacheConfig)]


def check_config(config: CacheConfig) -> None:
    plain = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert CacheConfig(**plain) == config
    assert pickle.loads(pickle.dumps(config)).digest() == config.digest()
    assert hash(config) == hash(CacheConfig(**plain))
    for folder in config.shard_folders:
        assert folder is None or os.path.isabs(folder)


@pytest.mark.parametrize("name", FIELDS)
def test_every_hard_value_of_a_field_is_taken_or_refused_by_name(name: str) -> None:
    for value in EVERY:
        outcome = good_or_refused(lambda value=value: CacheConfig(**{name: value}))
        if isinstance(outcome, CacheConfig):
            check_config(outcome)
        else:
            assert isinstance(outcome, ConfigError)
            assert name in str(outcome)


@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=4))
def test_any_values_of_the_fields_give_a_config_or_an_error(fields: dict[str, Any]) -> None:
    outcome = good_or_refused(lambda: CacheConfig(**fields))
    if isinstance(outcome, CacheConfig):
        check_config(outcome)


ENVIRONMENT_TEXTS = st.one_of(
    st.sampled_from([text for text in TEXTS if "\0" not in text and len(text) < 10**5]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))),
)


@given(st.sampled_from(FIELDS), ENVIRONMENT_TEXTS)
@example("salt_quotas", "a=nan")
@example("storage_dir", "[" * 100_000)
@example("num_blocks", "9" * 5000)
def test_any_text_in_a_variable_or_a_setting_gives_a_config_or_an_error(
    name: str, text: str
) -> None:
    variable = f"LITECACHE_{name.upper()}"
    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv(variable, text)
        except (UnicodeEncodeError, ValueError):
            return  # no environment can hold it
        outcome = good_or_refused(CacheConfig)
    if isinstance(outcome, CacheConfig):
        check_config(outcome)
    outcome = good_or_refused(lambda: parse_settings([f"{name}={text}"]))
    if isinstance(outcome, CacheConfig):
        check_config(outcome)


@given(st.lists(ANYTHING, max_size=3))
def test_any_settings_of_the_command_line_give_a_config_or_an_error(settings: list[Any]) -> None:
    good_or_refused(lambda: parse_settings([text for text in settings if isinstance(text, str)]))


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    config = CacheConfig(
        num_blocks=np.int64(7), ttl_s=np.float32(0.5), ram_bytes=np.uint32(1 << 20)
    )  # type: ignore[arg-type]
    assert [type(value) for value in (config.num_blocks, config.ttl_s, config.ram_bytes)] == [
        int,
        float,
        int,
    ]
    assert CacheConfig(dtype=torch.bfloat16, device=torch.device("cpu")).to_dict()["dtype"] == (  # type: ignore[arg-type]
        "bfloat16"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "9" * 400 + "TB", 2**70, True, b"1"])
def test_a_size_that_is_no_size_is_refused_wherever_one_is_taken(value: Any) -> None:
    for fields in ({"ram_bytes": value}, {"storage_bytes": value}, {"salt_quotas": {"a": value}}):
        with pytest.raises(ConfigError, match="a positive number of bytes"):
            CacheConfig(**fields)


def test_a_folder_with_a_colon_in_its_name_is_one_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = f"{tmp_path}/a:b"
    assert CacheConfig(storage_dir=folder).storage_dir == (folder,)
    assert CacheConfig(storage_dir=Path(folder)).storage_dir == (folder,)
    assert CacheConfig(storage_dir=[folder, "/c"]).storage_dir == (folder, "/c")
    assert parse_settings([f"storage_dir={folder}"]).storage_dir == (folder,)
    assert parse_settings([f'storage_dir=["{folder}", "/c"]']).storage_dir == (folder, "/c")
    monkeypatch.setenv("LITECACHE_STORAGE_DIR", "/a:/b")
    assert CacheConfig().storage_dir == ("/a", "/b")
    monkeypatch.setenv("LITECACHE_STORAGE_DIR", json.dumps([folder]))
    assert CacheConfig().storage_dir == (folder,)
    monkeypatch.setenv("LITECACHE_STORAGE_DIR", "")
    assert CacheConfig().storage_dir is None


def test_the_policies_that_a_config_takes_are_those_that_shards_know() -> None:
    for name in EVICTION_POLICIES:
        get_policy(name)
    for name in ADMISSION_POLICIES:
        Admission(name)
    for unknown in ("clock", "", "LRU"):
        with pytest.raises(ConfigError, match="eviction"):
            CacheConfig(eviction=unknown)


def test_a_text_setting_may_look_like_a_number() -> None:
    assert parse_settings(["cache_salt=5", "num_blocks=null"]).cache_salt == "5"
