"""`ServeSettings`: all that a server is told, from the command line, from YAML or from Python."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from litecache.actors.naming import DEFAULT_GROUP, check_group_name
from litecache.checks import check_flag, check_integer, check_path, check_real, check_text
from litecache.config import CacheConfig, parse_setting
from litecache.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a server, all keyword-only; all but the model have a default.

    Attributes:
        model: as in `KVCacheAdapter`: a hub name, a folder or a .gguf file.
        served_name: what clients call it; None = the model's name.
        group: of actors: joined when it runs, else started under this name.
        cache: fields of `CacheConfig` of a group that is started; empty = its defaults, and
            whatever a running one has.
        replicas: number of `GpuCache` actors of a group that is started.
        num_threads: torch's threads in each on a CPU; None = the machine's cores.
        servers: number of Ray Serve replicas, which take requests and make texts of tokens.
        trust_remote_code: let Python code that comes with the model run.
        api_keys: a file of keys (`ApiKeys`), on every machine with a server; None = none.
        no_auth: serve everybody who can connect, from other machines, too.
        max_running: sequences that a server has in the engines at once; None = twice their rows.
        max_waiting: requests that wait beyond these; more are told to come back (429).
        max_body_bytes: of a request; of a file to import `max_import_bytes`.
        max_bodies_bytes: of all requests under way in a server.
        max_import_bytes: of a file of `/v1/cache/import`.
        merge_ms: while many streams are open, tokens of so many milliseconds share an event.
        shutdown_s: seconds that open requests have to end in when a server is stopped.
        max_schema_bytes: of a JSON schema.
        max_constrained: answers of a form at once.
    """

    model: str
    served_name: str | None = None
    group: str = DEFAULT_GROUP
    cache: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1
    num_threads: int | None = None
    servers: int = 1
    trust_remote_code: bool = False
    api_keys: str | None = None
    no_auth: bool = False
    max_running: int | None = None
    max_waiting: int = 1024
    max_body_bytes: int = 16 << 20
    max_bodies_bytes: int = 512 << 20
    max_import_bytes: int = 16 << 30
    merge_ms: float = 50.0
    shutdown_s: float = 30.0
    max_schema_bytes: int = 64 << 10
    max_constrained: int = 8

    def __post_init__(self) -> None:
        check_path("model", self.model, "a hub name, a folder or a .gguf file")
        check_group_name(self.group)
        if self.served_name is not None and not check_text("served_name", self.served_name):
            raise ConfigError("served_name", self.served_name, "a text, not empty")
        for name in ("replicas", "servers"):
            check_integer(name, getattr(self, name), 1, 4096)
        for name in ("num_threads", "max_running"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1, 1 << 20)
        check_integer("max_waiting", self.max_waiting, 0, 1 << 20)
        check_integer("max_constrained", self.max_constrained, 1, 256)
        for name in ("max_body_bytes", "max_schema_bytes"):
            check_integer(name, getattr(self, name), 1024, 1 << 30)
        for name in ("max_bodies_bytes", "max_import_bytes"):
            check_integer(name, getattr(self, name), 1024, 1 << 50)
        check_real("merge_ms", self.merge_ms, 0, 1000)
        check_real("shutdown_s", self.shutdown_s, 0, 86_400)
        check_flag("trust_remote_code", self.trust_remote_code)
        check_flag("no_auth", self.no_auth)
        if self.api_keys is not None:
            check_path("api_keys", self.api_keys)
        if self.api_keys is not None and self.no_auth:
            raise ConfigError("no_auth", True, "False where api_keys are given")
        if not isinstance(self.cache, Mapping):
            raise ConfigError("cache", self.cache, "fields of CacheConfig by name")
        self.cache_config()

    def cache_config(self) -> CacheConfig | None:
        """Of a group that is started; None = whatever a running one has.

        Raises:
            ConfigError: no such field, or an invalid value.
        """
        known = [each.name for each in dataclasses.fields(CacheConfig)]
        for name in self.cache:
            if name not in known:
                raise ConfigError("cache", name, f"one of {', '.join(sorted(known))}")
        return CacheConfig(**self.cache) if self.cache else None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ServeSettings:
        """From plain values, such as the `args` of an application in YAML.

        Raises:
            ConfigError: an unknown field, a wrong value, or no model.
        """
        known = [each.name for each in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError("args", name, f"one of {', '.join(known)}")
        if not values.get("model"):
            raise ConfigError("model", None, "a hub name, a folder or a .gguf file")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `of`."""
        return {**dataclasses.asdict(self), "cache": dict(self.cache)}


def parse_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `ServeSettings`, some of them as texts: `serve run` gives nothing else.

    A field of `CacheConfig` goes by "cache.NAME". What is no text stays as it is.

    Raises:
        ConfigError: a text that its field does not take.
    """
    fields = {each.name: str(each.type) for each in dataclasses.fields(ServeSettings)}
    fields_of_cache = {each.name for each in dataclasses.fields(CacheConfig)}
    parsed: dict[str, Any] = {}
    cache: dict[str, Any] = {}
    for name, value in values.items():
        field_of_cache = str(name).removeprefix("cache.")
        if field_of_cache != name and field_of_cache in fields_of_cache:
            is_text = isinstance(value, str)
            cache[field_of_cache] = parse_setting(name, field_of_cache, value) if is_text else value
        elif isinstance(value, str) and "str" not in fields.get(name, "str"):
            try:
                parsed[name] = json.loads(value.lower() if name != "cache" else value)
            except ValueError as error:
                raise ConfigError(name, value, f"as JSON, {fields[name]}") from error
        else:
            parsed[name] = value
    if cache:
        given = parsed.get("cache") or {}
        if not isinstance(given, Mapping):
            raise ConfigError("cache", given, "fields of CacheConfig by name")
        parsed["cache"] = {**given, **cache}
    return parsed


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can connect to an address."""
    if host is None or host == "localhost":
        return host is not None
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, *, keys: bool, no_auth: bool) -> None:
    """Refuse to serve other machines by accident.

    Raises:
        ConfigError: the address is not this machine's alone, and anybody could ask.
    """
    if not (keys or no_auth or is_loopback(host)):
        valid = "127.0.0.1 (this machine alone), or any address with --api-keys FILE or --no-auth"
        raise ConfigError("--host", host, valid)
