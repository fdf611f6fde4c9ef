"""Fields of `CacheConfig` that are about the disk tier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from litecache.config import CacheConfig
from litecache.errors import ConfigError
from litecache.storage import ShardStore


def test_quotas_and_ttl_are_normalised_and_survive_a_round_trip() -> None:
    config = CacheConfig(salt_quotas={"alice": "1GiB", "bob": 500}, ttl_s=3600)
    assert config.salt_quotas == {"alice": 1 << 30, "bob": 500}
    assert CacheConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert config.digest() != CacheConfig(salt_quotas={"alice": "2GiB", "bob": 500}).digest()
    assert CacheConfig().salt_quotas == {}
    assert CacheConfig().ttl_s is None


def test_the_environment_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITECACHE_SALT_QUOTAS", "alice=5GB, a=b=1MB")
    monkeypatch.setenv("LITECACHE_TTL_S", "1.5")
    config = CacheConfig()
    assert config.salt_quotas == {"alice": 5_000_000_000, "a=b": 1_000_000}
    assert config.ttl_s == 1.5
    monkeypatch.setenv("LITECACHE_STORAGE_WRITE_BYTES_PER_S", "200MB")
    assert CacheConfig().storage_write_bytes_per_s == 200_000_000
    monkeypatch.setenv("LITECACHE_STORAGE_WRITE_BYTES_PER_S", "null")
    assert CacheConfig().storage_write_bytes_per_s is None
    monkeypatch.setenv("LITECACHE_SALT_QUOTAS", "alice")
    with pytest.raises(ConfigError, match="LITECACHE_SALT_QUOTAS"):
        CacheConfig()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ttl_s", 0),
        ("ttl_s", float("inf")),
        ("ttl_s", "soon"),
        ("storage_write_bytes_per_s", 0),
        ("storage_write_bytes_per_s", "fast"),
        ("salt_quotas", ["alice"]),
        ("salt_quotas", {"alice": "much"}),
        ("salt_quotas", {1: 5}),
    ],
)
def test_invalid_values_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        CacheConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["link", "link/shard-0", "link/a/b", "file/a", "loop/a"])
def test_a_folder_behind_something_that_is_no_folder_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="storage_dir"):
        ShardStore(str(tmp_path / where), storage_bytes=8 << 20, ram_bytes=1 << 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "loop"]


@pytest.mark.parametrize("name", ["salt_quotas", "salt_ram_quotas", "salt_pool_quotas"])
def test_quotas_and_salts_stand_in_no_error_and_in_no_repr(name: str) -> None:
    config = CacheConfig(**{name: {"pssst": 5}}, cache_salt="pssst")  # type: ignore[arg-type]
    assert "pssst" not in repr(config)
    for bad in ({"pssst": "much"}, {"pssst": 0}, {"pssst": None}, ["pssst"], "pssst=1"):
        with pytest.raises(ConfigError, match=name) as raised:
            CacheConfig(**{name: bad})  # type: ignore[arg-type]
        assert "pssst" not in str(raised.value)
    with pytest.raises(ConfigError, match="much"):
        CacheConfig(**{name: {"pssst": "much"}})  # type: ignore[arg-type]


def test_pool_quotas_are_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITECACHE_SALT_POOL_QUOTAS", "alice=500, bob=1")
    monkeypatch.setenv("LITECACHE_SALT_RAM_QUOTAS", "alice=1GB")
    config = CacheConfig()
    assert config.salt_pool_quotas == {"alice": 500, "bob": 1}
    assert config.salt_ram_quotas == {"alice": 1_000_000_000}
    assert CacheConfig(**json.loads(json.dumps(config.to_dict()))) == config
    for bad in (0, -1, 1.5, True, "5GB", 1 << 31):
        with pytest.raises(ConfigError, match="salt_pool_quotas"):
            CacheConfig(salt_pool_quotas={"alice": bad})  # type: ignore[dict-item]
