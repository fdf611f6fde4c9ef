"""`CacheConfig`: every setting of a group of actors, in one frozen class.

Defaults can be overridden by `LITECACHE_<FIELD>` environment variables; an explicit argument
wins. Values are checked on construction, before anything is allocated. torch dtypes and devices
are stored by name, so that storage processes can read a config without importing torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from litecache.errors import ConfigError, shown

DTYPES = ("float32", "float16", "bfloat16")
FSYNC_POLICIES = ("always", "interval", "never")
ADMISSION_POLICIES = ("all", "reused", "none")

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[_prefix] = _UNITS[f"{_prefix}IB"] = 1024**_power
    _UNITS[f"{_prefix}B"] = 1000**_power


def parse_size(value: int | float | str, name: str) -> int:
    """Read a size in bytes: an integer, or a text such as "20GB" or "512 MiB".

    Raises:
        ConfigError: not a size, or not positive.
    """
    valid = 'a positive number of bytes, or a text such as "20GB" or "512MiB"'
    if isinstance(value, bool):
        raise ConfigError(name, value, valid)
    if isinstance(value, (int, float)):
        size = int(value)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if match is None or match[2].upper() not in _UNITS:
            raise ConfigError(name, value, valid)
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ConfigError(name, value, valid)
    return size


def _parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(text)


def _parse_quotas(text: str) -> dict[str, str]:
    """Read `alice=5GB,bob=500MB`."""
    pairs = [pair.rpartition("=") for pair in text.split(",") if pair.strip()]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(text)
    return {salt.strip(): size for salt, _, size in pairs}


def _check_quotas(quotas: object) -> dict[str, int]:
    if not isinstance(quotas, dict) or not all(isinstance(salt, str) for salt in quotas):
        raise ConfigError("salt_quotas", quotas, 'a dict of salts and sizes, as {"alice": "5GB"}')
    return {salt: parse_size(size, f"salt_quotas[{shown(salt)}]") for salt, size in quotas.items()}


def _setting(name: str, default: Any, parse: Callable[[str], Any] = str) -> Any:
    """A dataclass field whose default is `LITECACHE_<NAME>` where that variable is set."""

    def current() -> Any:
        text = os.environ.get(f"LITECACHE_{name.upper()}")
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise ConfigError(
                f"LITECACHE_{name.upper()}", text, f"as for CacheConfig.{name}"
            ) from error

    return field(default_factory=current)


def _name_of(value: Any) -> str | None:
    return None if value is None else str(value).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Settings of the cache, all keyword-only and all defaulted.

    Attributes:
        block_size: tokens per block; a power of two from 8 to 256.
        num_blocks: blocks of the GPU pool per KV group, the trash block not counted;
            None = as many as `gpu_memory_fraction` allows.
        gpu_memory_fraction: share of the device's memory for weights, activations and pool.
        dtype: of weights and activations; None = the model's own.
        kv_dtype: of the KV pool; None = `dtype`.
        device: "cuda", "cuda:1", "cpu"; None = cuda if there is one.
        num_layers, num_heads, num_kv_heads, head_dim: the model's shape. Optional with a model
            (a value that disagrees is an error), required by `PagedAttentionCache`.
            `num_kv_heads=None` means `num_heads`.
        ram_bytes: bound of the arenas of one node, together.
        storage_dir: absolute folder, or one per disk; None = no disk tier.
        storage_bytes: bound of the sum over all folders of a node, journals included.
        storage_shards: shards per folder.
        fsync: "always", "interval" or "never".
        eviction: name of the shards' eviction policy.
        admission: which blocks are saved: "all", "reused" (on second sight) or "none".
        ttl_s: seconds after which a stored block is a miss; None = never.
        salt_quotas: salt to the bytes that its blocks may take on the disks of a node, per model;
            sizes as above. As a variable: `LITECACHE_SALT_QUOTAS="alice=5GB,bob=500MB"`.
        max_model_len: longest sequence in tokens; None = the model's own limit.
        max_batch_tokens: token budget of one engine step.
        max_prefill_tokens: the same for a step in which nothing decodes, so that no stream waits
            for it; None = four times `max_batch_tokens` on a GPU, `max_batch_tokens` elsewhere and
            with `deterministic`.
        max_requests: requests that run at once.
        deterministic: fix the chunk grid, so that results do not depend on the load.
        cache_salt: requests share cached blocks only with requests of the same salt.
    """

    block_size: int = _setting("block_size", 16, int)
    num_blocks: int | None = _setting("num_blocks", None, int)
    gpu_memory_fraction: float = _setting("gpu_memory_fraction", 0.85, float)
    dtype: str | None = _setting("dtype", None)
    kv_dtype: str | None = _setting("kv_dtype", None)
    device: str | None = _setting("device", None)
    num_layers: int | None = _setting("num_layers", None, int)
    num_heads: int | None = _setting("num_heads", None, int)
    num_kv_heads: int | None = _setting("num_kv_heads", None, int)
    head_dim: int | None = _setting("head_dim", None, int)
    ram_bytes: int = _setting("ram_bytes", "1GB")
    storage_dir: tuple[str, ...] | None = _setting("storage_dir", None)
    storage_bytes: int = _setting("storage_bytes", "10GB")
    storage_shards: int = _setting("storage_shards", 1, int)
    fsync: str = _setting("fsync", "interval")
    eviction: str = _setting("eviction", "lru")
    admission: str = _setting("admission", "all")
    ttl_s: float | None = _setting("ttl_s", None, float)
    salt_quotas: Mapping[str, int] = _setting("salt_quotas", {}, _parse_quotas)
    max_model_len: int | None = _setting("max_model_len", None, int)
    max_batch_tokens: int = _setting("max_batch_tokens", 2048, int)
    max_prefill_tokens: int | None = _setting("max_prefill_tokens", None, int)
    max_requests: int = _setting("max_requests", 256, int)
    deterministic: bool = _setting("deterministic", False, _parse_bool)
    cache_salt: str = _setting("cache_salt", "")

    def __post_init__(self) -> None:
        """Normalise names, sizes and folders, then check every field."""
        normal: dict[str, Any] = {
            "dtype": _name_of(self.dtype),
            "kv_dtype": _name_of(self.kv_dtype),
            "device": _name_of(self.device),
            "ram_bytes": parse_size(self.ram_bytes, "ram_bytes"),
            "storage_bytes": parse_size(self.storage_bytes, "storage_bytes"),
            "storage_dir": self._folders(),
            "salt_quotas": _check_quotas(self.salt_quotas),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        self._check()

    def _folders(self) -> tuple[str, ...] | None:
        given: Any = self.storage_dir
        if not given:
            return None
        folders = (
            tuple(os.fspath(f) for f in given)
            if isinstance(given, (list, tuple))
            else tuple(os.fspath(given).split(os.pathsep))
        )
        for folder in folders:
            if not os.path.isabs(folder):
                raise ConfigError(
                    "storage_dir", folder, "absolute (a job's working directory is thrown away)"
                )
        if len({os.path.normpath(f) for f in folders}) != len(folders):
            raise ConfigError("storage_dir", list(folders), "different folders")
        return tuple(os.path.normpath(f) for f in folders)

    def _check(self) -> None:
        size = self.block_size
        if not isinstance(size, int) or size < 8 or size > 256 or size & (size - 1):
            raise ConfigError("block_size", size, "a power of two from 8 to 256")
        for name in ("num_blocks", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            _check_count(name, getattr(self, name), optional=True)
        _check_count("max_model_len", self.max_model_len, optional=True)
        for name in ("storage_shards", "max_batch_tokens", "max_requests"):
            _check_count(name, getattr(self, name))
        _check_count("max_prefill_tokens", self.max_prefill_tokens, optional=True)
        if self.max_prefill_tokens is not None and self.max_prefill_tokens < self.max_batch_tokens:
            valid = f"at least max_batch_tokens={self.max_batch_tokens}, or None"
            raise ConfigError("max_prefill_tokens", self.max_prefill_tokens, valid)
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads is not None and kv_heads is not None and heads % kv_heads:
            raise ConfigError("num_kv_heads", kv_heads, f"a divisor of num_heads={heads}")
        fraction = self.gpu_memory_fraction
        if not isinstance(fraction, (int, float)) or not math.isfinite(fraction):
            raise ConfigError("gpu_memory_fraction", fraction, "a number in (0, 1]")
        if not 0 < fraction <= 1:
            raise ConfigError("gpu_memory_fraction", fraction, "a number in (0, 1]")
        for name in ("dtype", "kv_dtype"):
            if getattr(self, name) not in (None, *DTYPES):
                raise ConfigError(name, getattr(self, name), f"one of {', '.join(DTYPES)}")
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError("device", self.device, '"cpu", "cuda" or "cuda:N"')
        if self.fsync not in FSYNC_POLICIES:
            raise ConfigError("fsync", self.fsync, f"one of {', '.join(FSYNC_POLICIES)}")
        if self.admission not in ADMISSION_POLICIES:
            raise ConfigError(
                "admission", self.admission, f"one of {', '.join(ADMISSION_POLICIES)}"
            )
        ttl = self.ttl_s
        if ttl is not None and (
            not isinstance(ttl, (int, float)) or not math.isfinite(ttl) or ttl <= 0
        ):
            raise ConfigError("ttl_s", ttl, "seconds, more than zero, or None")
        if not isinstance(self.cache_salt, str):
            raise ConfigError("cache_salt", self.cache_salt, "a text")
        if not isinstance(self.deterministic, bool):
            raise ConfigError("deterministic", self.deterministic, "True or False")

    @property
    def shard_folders(self) -> tuple[str | None, ...]:
        """One entry per shard of a node: its folder on disk, or None without a disk tier."""
        if self.storage_dir is None:
            return (None,) * self.storage_shards
        return tuple(
            os.path.join(folder, f"shard-{index}")
            for folder in self.storage_dir
            for index in range(self.storage_shards)
        )

    def prefill_tokens(self, device_type: str) -> int:
        """`max_prefill_tokens`, or its default on "cuda" or "cpu"."""
        if self.max_prefill_tokens is not None and not self.deterministic:
            return self.max_prefill_tokens
        lone = device_type == "cuda" and not self.deterministic
        return self.max_batch_tokens * (4 if lone else 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, accepted by `CacheConfig(**...)`."""
        values = dataclasses.asdict(self)
        if self.storage_dir is not None:
            values["storage_dir"] = list(self.storage_dir)
        return values

    def digest(self) -> str:
        """A hex digest of all settings, to compare groups."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_count(name: str, value: object, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(name, value, "a positive integer" + (" or None" if optional else ""))
