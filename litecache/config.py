"""`CacheConfig`: every setting of a group of actors, in one frozen class.

Defaults can be overridden by `LITECACHE_<FIELD>` environment variables; an explicit argument
wins. Values are checked on construction, before anything is allocated. torch dtypes and devices
are stored by name, so that storage processes can read a config without importing torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from litecache.checks import check_flag, check_integer, check_path, check_real, check_text, is_a
from litecache.errors import ConfigError, Shown, shown

DTYPES = ("float32", "float16", "bfloat16")
NARROW_DTYPES = ("int8", "fp8")
KV_DTYPES = (*DTYPES, *NARROW_DTYPES)
FSYNC_POLICIES = ("always", "interval", "never")
EVICTION_POLICIES = ("lfu", "lru", "s3fifo")
ADMISSION_POLICIES = ("all", "frequent", "reused", "none")

_MOST_BYTES = 2**60
_MOST_SHARDS = 1024

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[_prefix] = _UNITS[f"{_prefix}IB"] = 1024**_power
    _UNITS[f"{_prefix}B"] = 1000**_power


def parse_size(value: int | float | str, name: str) -> int:
    """Read a size in bytes: an integer, or a text such as "20GB" or "512 MiB".

    Raises:
        ConfigError: not a size, or not positive.
    """
    valid = 'a positive number of bytes, at most 1 EiB, or a text such as "20GB" or "512MiB"'
    number: float = 0.0
    if is_a(value, str):
        text = check_text(name, value, valid)
        match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]{0,3})\s*", text)
        if match is not None and match[2].upper() in _UNITS:
            unit = _UNITS[match[2].upper()]
            number = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    elif is_a(value, numbers.Integral) and not is_a(value, bool):
        return check_integer(name, value, 1, _MOST_BYTES, valid)
    elif is_a(value, numbers.Real) and not is_a(value, bool):
        number = check_real(name, value, 0, _MOST_BYTES, valid, above=True)
    if not 1 <= number <= _MOST_BYTES:
        raise ConfigError(name, value, valid)
    return int(number)


# What `_setting` checks with: (name, value) -> the value as it is stored.
Check = Callable[[str, Any], Any]


def _integer(high: int, valid: str) -> Check:
    return lambda name, value: check_integer(name, value, 1, high, valid)


def _positive(high: float, valid: str) -> Check:
    return lambda name, value: check_real(name, value, 0, high, valid, above=True)


def _block_size(name: str, value: Any) -> int:
    valid = "a power of two from 8 to 256"
    size = check_integer(name, value, 8, 256, valid)
    if size & (size - 1):
        raise ConfigError(name, size, valid)
    return size


def _size(name: str, value: Any) -> int:
    return parse_size(value, name)


def _block_quotas(name: str, value: Any) -> dict[str, int]:
    if not is_a(value, dict):
        raise ConfigError(name, value, 'a dict of salts and numbers of blocks, as {"alice": 500}')
    checked = {}
    for salt, count in dict.items(value):
        if is_a(count, str) and re.fullmatch("[0-9]{1,10}", count):
            count = int(count)
        salt, valid = check_text(name, salt), "from 1 to 2**31 - 1 blocks"
        if not is_a(count, numbers.Integral) or is_a(count, bool) or not 1 <= count < 1 << 31:
            raise ConfigError(name, Shown(f"{{...: {shown(count)}}}"), valid)
        checked[salt] = int(count)
    return checked


_count = _integer(2**31 - 1, "a positive integer below 2**31")
_shape = _integer(1 << 14, "a positive integer, at most 16,384")
_fraction = _positive(1, "a number in (0, 1]")
_seconds = _positive(1e10, "seconds, more than zero, at most 1e10, or None")


def _one_of(choices: tuple[str, ...]) -> Check:
    valid = f"one of {', '.join(choices)}"

    def check(name: str, value: Any) -> str:
        # a torch dtype by its name, without importing torch
        is_dtype = {*choices} & {*KV_DTYPES} and shown(value).startswith("torch.")
        text = check_text(name, shown(value) if is_dtype else value, valid).removeprefix("torch.")
        if text == "float8_e4m3fn" and "fp8" in choices:
            text = "fp8"
        if text not in choices:
            raise ConfigError(name, value, valid)
        return text

    return check


def _device(name: str, value: Any) -> str:
    valid = '"cpu", "cuda" or "cuda:N"'
    if f"{type(value).__module__}.{type(value).__qualname__}" == "torch.device":
        value = str(value)
    text = check_text(name, value, valid)
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        raise ConfigError(name, value, valid)
    return text


def _folders(name: str, value: Any) -> tuple[str, ...] | None:
    """One folder as a text or a path, or several; none of them = no disk tier."""
    several = is_a(value, list, tuple)
    given = tuple(value) if several else () if is_a(value, str) and value == "" else (value,)
    folders = []
    for each in given[:_MOST_SHARDS]:
        folder = check_path(name, each, "an absolute folder, or a list of such")
        if not os.path.isabs(folder):
            valid = "absolute (a job's working directory is thrown away)"
            raise ConfigError(name, folder, valid)
        folders.append(os.path.normpath(folder))
    if len(given) > _MOST_SHARDS or len(set(folders)) != len(folders):
        raise ConfigError(name, folders, f"different folders, at most {_MOST_SHARDS}")
    return tuple(folders) or None


def _quotas(name: str, value: Any) -> dict[str, int]:
    if not is_a(value, dict):
        raise ConfigError(name, value, 'a dict of salts and sizes, as {"alice": "5GB"}')
    quotas = {}
    for salt, size in dict.items(value):
        salt = check_text(name, salt)
        try:
            quotas[salt] = parse_size(size, name)
        except ConfigError as error:
            # a size may be shown, a salt may not
            raise ConfigError(name, Shown(f"{{...: {shown(size)}}}"), error.valid) from None
    return quotas


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


def _parse_folders(text: str) -> Any:
    """One folder, or a JSON list of folders."""
    return json.loads(text) if text.startswith("[") else text


def _variable(name: str) -> str:
    return f"LITECACHE_{name.upper()}"


def _parse(label: str, name: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(label, text, f"as for CacheConfig.{name}") from error


def _setting(
    name: str,
    default: Any,
    check: Check,
    parse: Callable[[str], Any] = str,
    *,
    null: bool = False,
    show: bool = True,
) -> Any:
    """A dataclass field whose default is `LITECACHE_<NAME>` where that variable is set.

    Args:
        name: of the field.
        default: where neither is given.
        check: makes the stored value of a given one, or raises ConfigError.
        parse: reads a text, of the variable or of the command line.
        null: None is a value, in a text "null".
        show: it stands in the config's repr; a salt does not.
    """

    def read(text: str) -> Any:
        return None if null and text == "null" else parse(text)

    def current() -> Any:
        text = os.environ.get(_variable(name))
        if text is None:
            return default
        if name == "storage_dir" and not text.startswith("["):
            # a list like PATH; a folder with a colon in its name is given as a JSON list
            return tuple(folder for folder in text.split(os.pathsep) if folder)
        return _parse(_variable(name), name, read, text)

    def checked(label: str, value: Any) -> Any:
        return None if null and value is None else check(label, value)

    return field(
        default_factory=current,
        metadata={"check": checked, "read": read},
        hash=default != {},
        repr=show,
    )


def parse_setting(label: str, name: str, text: str) -> Any:
    """The value of a field from a text, as from its variable; a folder's name is not split.

    Raises:
        ConfigError: it cannot be read; tells `label`.
    """
    (found,) = (each for each in dataclasses.fields(CacheConfig) if each.name == name)
    return _parse(label, name, found.metadata["read"], text)


def check_setting(label: str, name: str, value: Any) -> Any:
    """The value of a field as `CacheConfig` stores it.

    Raises:
        ConfigError: it is invalid; tells `label`.
    """
    (found,) = (each for each in dataclasses.fields(CacheConfig) if each.name == name)
    return found.metadata["check"](label, value)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Settings of the cache, all keyword-only and all defaulted.

    Attributes:
        block_size: tokens per block; a power of two from 8 to 256.
        num_blocks: blocks of the GPU pool per KV group, the trash block not counted;
            None = as many as `gpu_memory_fraction` allows.
        gpu_memory_fraction: share of the device's memory for weights, activations and pool.
        dtype: of weights and activations; None = the model's own.
        kv_dtype: of the KV pool; None = `dtype`. "int8" and "fp8" (e4m3) hold half of bfloat16's
            bytes, with a scale for each token and head; int8 is the more exact of the two.
        device: "cuda", "cuda:1", "cpu"; None = cuda if there is one.
        num_layers, num_heads, num_kv_heads, head_dim: the model's shape. Optional with a model
            (a value that disagrees is an error), required by `PagedAttentionCache`.
            `num_kv_heads=None` means `num_heads`.
        ram_bytes: bound of the arenas of one node, together.
        storage_dir: absolute folder, or one per disk; None = no disk tier.
        storage_bytes: bound of the sum over all folders of a node, journals included.
        storage_write_bytes_per_s: blocks are written to all folders of a node together at this
            rate at most; None = no bound. Flushes and clean stops write the rest at once.
        storage_shards: shards per folder.
        fsync: "always", "interval" or "never".
        eviction: name of the shards' eviction policy.
        admission: which blocks are saved: "all", "frequent" (to RAM all, to disk what was used at
            least twice lately), "reused" (on second sight) or "none".
        ttl_s: seconds after which a stored block is a miss; None = never.
        tier_codec: "int8" or "fp8" (e4m3): RAM and disks hold the blocks of a wide pool in eight
            bits with a scale for each token and head, at half the bytes of bfloat16 and some loss;
            not with `deterministic`. None = as the pool holds them.
        salt_quotas: salt to the bytes that its blocks may take on the disks of a node, per model;
            sizes as above. As a variable: `LITECACHE_SALT_QUOTAS="alice=5GB,bob=500MB"`.
        salt_ram_quotas: the same for the arenas of a node.
        salt_pool_quotas: salt to the blocks per KV group that it may hold in a replica's pool;
            what its requests are using is never taken from them.
        max_model_len: longest sequence in tokens; None = the model's own limit.
        max_batch_tokens: token budget of one engine step.
        max_prefill_tokens: the same for a step in which nothing decodes, so that no stream waits
            for it; None = four times `max_batch_tokens` on a GPU, `max_batch_tokens` elsewhere and
            with `deterministic`.
        max_requests: requests that run at once.
        deterministic: fix the chunk grid, so that results do not depend on the load.
        cache_salt: requests share cached blocks only with requests of the same salt.
        models_bytes: bound of `$LITECACHE_HOME/models`, where this driver writes modules and
            converted GGUF files: the oldest unused go first, one in use never.
    """

    block_size: int = _setting("block_size", 16, _block_size, int)
    num_blocks: int | None = _setting("num_blocks", None, _count, int, null=True)
    gpu_memory_fraction: float = _setting("gpu_memory_fraction", 0.85, _fraction, float)
    dtype: str | None = _setting("dtype", None, _one_of(DTYPES), null=True)
    kv_dtype: str | None = _setting("kv_dtype", None, _one_of(KV_DTYPES), null=True)
    device: str | None = _setting("device", None, _device, null=True)
    num_layers: int | None = _setting("num_layers", None, _shape, int, null=True)
    num_heads: int | None = _setting("num_heads", None, _shape, int, null=True)
    num_kv_heads: int | None = _setting("num_kv_heads", None, _shape, int, null=True)
    head_dim: int | None = _setting("head_dim", None, _shape, int, null=True)
    ram_bytes: int = _setting("ram_bytes", "1GB", _size)
    storage_dir: tuple[str, ...] | None = _setting(
        "storage_dir", None, _folders, _parse_folders, null=True
    )
    storage_bytes: int = _setting("storage_bytes", "10GB", _size)
    storage_write_bytes_per_s: int | None = _setting(
        "storage_write_bytes_per_s", None, _size, null=True
    )
    storage_shards: int = _setting("storage_shards", 1, _count, int)
    fsync: str = _setting("fsync", "interval", _one_of(FSYNC_POLICIES))
    eviction: str = _setting("eviction", "lru", _one_of(EVICTION_POLICIES))
    admission: str = _setting("admission", "all", _one_of(ADMISSION_POLICIES))
    ttl_s: float | None = _setting("ttl_s", None, _seconds, float, null=True)
    tier_codec: str | None = _setting("tier_codec", None, _one_of(NARROW_DTYPES), null=True)
    salt_quotas: Mapping[str, int] = _setting("salt_quotas", {}, _quotas, _parse_quotas, show=False)
    salt_ram_quotas: Mapping[str, int] = _setting(
        "salt_ram_quotas", {}, _quotas, _parse_quotas, show=False
    )
    salt_pool_quotas: Mapping[str, int] = _setting(
        "salt_pool_quotas", {}, _block_quotas, _parse_quotas, show=False
    )
    max_model_len: int | None = _setting("max_model_len", None, _count, int, null=True)
    max_batch_tokens: int = _setting("max_batch_tokens", 2048, _count, int)
    max_prefill_tokens: int | None = _setting("max_prefill_tokens", None, _count, int, null=True)
    max_requests: int = _setting("max_requests", 256, _count, int)
    deterministic: bool = _setting("deterministic", False, check_flag, _parse_bool)
    cache_salt: str = _setting("cache_salt", "", check_text, show=False)
    models_bytes: int = _setting("models_bytes", "100GB", _size)

    def __post_init__(self) -> None:
        """Check every field and make its value a plain one, then what fields ask of each other."""
        for each in dataclasses.fields(self):
            value = each.metadata["check"](each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)
        if self.max_prefill_tokens is not None and self.max_prefill_tokens < self.max_batch_tokens:
            valid = f"at least max_batch_tokens={self.max_batch_tokens}, or None"
            raise ConfigError("max_prefill_tokens", self.max_prefill_tokens, valid)
        if self.tier_codec is not None:
            why = ""
            if self.deterministic:
                why = "deterministic=True: what was loaded would differ from what was computed"
            elif self.kv_dtype in NARROW_DTYPES:
                why = f"kv_dtype={self.kv_dtype}: its blocks have eight bits already"
            if why:
                raise ConfigError("tier_codec", self.tier_codec, f"None with {why}")
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads is not None and kv_heads is not None and heads % kv_heads:
            raise ConfigError("num_kv_heads", kv_heads, f"a divisor of num_heads={heads}")
        if self.storage_shards * len(self.storage_dir or "1") > _MOST_SHARDS:
            valid = f"at most {_MOST_SHARDS} over all folders"
            raise ConfigError("storage_shards", self.storage_shards, valid)

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
