"""The YAML file of `litecache up --config`: the groups that a cluster is to run.

`docs/cluster.md` describes the fields, `examples/cluster.yaml` shows all of them; how the file is
read, and what is wrong in it told, is `yaml_file.py`'s.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from litecache.actors.group_spec import check_actor_options
from litecache.actors.naming import DEFAULT_GROUP, check_group_name
from litecache.actors.operating.yaml_file import Place, YamlFile
from litecache.actors.placement import (
    NODE_SETTINGS,
    NodeStorage,
    check_placement,
    check_replicas,
)
from litecache.checks import check_flag, check_text, check_threads
from litecache.config import CacheConfig, Check, check_setting
from litecache.errors import ConfigError, Shown

_MOST_MODELS = 64
_CACHE_FIELDS = tuple(each.name for each in dataclasses.fields(CacheConfig))
_MODEL_FIELDS = (
    *("model", "replicas", "num_threads", "trust_remote_code", "placement", "actor_options"),
    "cache",
)
_TOP_FIELDS = ("group", *_MODEL_FIELDS, "nodes", "shards", "models")
_NODE_FIELDS = ("node", "labels", "resource", *NODE_SETTINGS)


@dataclass(frozen=True, kw_only=True)
class GroupSetup:
    """One group that a file asks for: the arguments of a `KVCacheAdapter`.

    Attributes:
        name: of the model within the file; None where it has one model.
        group: its name.
        model: a hub's name, a folder or a .gguf file.
        replicas: how many, or "all": one per GPU, or per node where the cluster has none.
        num_threads, trust_remote_code, actor_options: as in `KVCacheAdapter`.
        placement: how the replicas are spread over nodes; one of STRATEGIES.
        config: of the cache.
        nodes: settings of single nodes; the first that describes a node counts.
        shards: the group whose shards it uses; None = its own.
    """

    name: str | None
    group: str
    model: str
    replicas: int | str
    num_threads: int | None
    trust_remote_code: bool
    placement: str
    actor_options: dict[str, dict[str, Any]]
    config: CacheConfig
    nodes: tuple[NodeStorage, ...]
    shards: str | None

    def arguments(self) -> dict[str, Any]:
        """Of `KVCacheAdapter`, by name."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        del values["name"]
        values["cache_config"] = values.pop("config")
        return values


def read_cluster_file(
    path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
) -> list[GroupSetup]:
    """The groups that a file describes, in its order.

    Args:
        path: of a YAML file.
        overrides: what goes before the file, in every group: "group", "model", "replicas",
            "num_threads", "trust_remote_code", "placement", and "cache" with single fields.

    Raises:
        ConfigError: the file cannot be read, or a field of it is unknown or wrong; names file,
            line, field, value and what is valid.
    """
    return _Groups(path, "config", _TOP_FIELDS).groups(overrides or {})


def one_group(values: Mapping[str, Any]) -> GroupSetup:
    """A group without a file.

    Args:
        values: as the overrides of `read_cluster_file`, "model" among them.

    Raises:
        ConfigError: a value is wrong.
    """
    return _setup(
        lambda name, default, check: check(name, values.get(name, default)),
        name=None,
        group=check_group_name(values.get("group", DEFAULT_GROUP)),
        model=values["model"],
        config=CacheConfig(**values.get("cache", {})),
        nodes=(),
        shards=None,
    )


def _setup(value: Callable[[str, Any, Check], Any], **known: Any) -> GroupSetup:
    """A group whose fields, but for those that are known, `value` finds by name and checks."""
    return GroupSetup(
        replicas=value("replicas", 1, check_replicas),
        num_threads=value("num_threads", None, check_threads),
        trust_remote_code=value("trust_remote_code", False, check_flag),
        placement=value("placement", "SPREAD", check_placement),
        actor_options=value("actor_options", {}, lambda _, given: check_actor_options(given)),
        **known,
    )


def dump_cluster_file(setups: Sequence[GroupSetup]) -> str:
    """A file that describes these groups with every field; `read_cluster_file` reads it."""

    def model(setup: GroupSetup) -> dict[str, Any]:
        values = {name: getattr(setup, name) for name in _MODEL_FIELDS if name != "cache"}
        return {**values, "cache": setup.config.to_dict()}

    first = setups[0]
    nodes = {"nodes": [each.to_dict() for each in first.nodes]}
    if first.name is None:
        tree = {"group": first.group, **model(first), **nodes, "shards": first.shards}
    else:
        models = {setup.name: model(setup) for setup in setups}
        tree = {"group": first.shards, "models": models, **nodes}
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return text


class _Groups(YamlFile):
    """What the fields of such a file mean."""

    def groups(self, overrides: Mapping[str, Any]) -> list[GroupSetup]:
        """See `read_cluster_file`."""
        top = self.tree
        with self.at(()):
            group = check_group_name(overrides.get("group", top.get("group", DEFAULT_GROUP)))
        nodes = self._nodes([] if top.get("nodes") is None else top["nodes"])
        if "models" not in top:
            shards = top.get("shards")
            if shards is not None:
                try:
                    check_group_name(shards)
                except ConfigError as error:
                    self.refuse(("shards",), shards, f"a group whose shards to use: {error.valid}")
            return [self._group(top, (), None, group, nodes, shards, overrides)]
        models, path = top["models"], ("models",)
        if not isinstance(models, dict) or not 1 <= len(models) <= _MOST_MODELS:
            self.refuse(path, models, f"a mapping of 1 to {_MOST_MODELS} names to models")
        for name in ("model", "shards"):
            if name in top:
                self.refuse((name,), top[name], "absent beside models, which share their shards")
        if "model" in overrides:
            raise ConfigError("model", overrides["model"], f"none: {self.path} names its models")
        setups = []
        for name, values in models.items():
            own = self.fields(values, (*path, name), _MODEL_FIELDS)
            try:
                check_group_name(f"{group}.{name}")
            except ConfigError as error:
                self.refuse((*path, name), Shown("..."), f"a name of {error.valid}")
            # what stands above the models is the default of each
            shared = {k: v for k, v in top.items() if k in _MODEL_FIELDS}
            where = (*path, name)
            args = name, f"{group}.{name}", nodes, group, overrides
            setups.append(self._group(own, where, *args, above=shared))
        return setups

    def _nodes(self, entries: Any) -> tuple[NodeStorage, ...]:
        if not isinstance(entries, list):
            self.refuse(("nodes",), entries, "a list of nodes and their settings")
        nodes = []
        for index, entry in enumerate(entries):
            path = ("nodes", index)
            values = dict(self.fields(entry, path, _NODE_FIELDS))
            which = {n: values.pop(n) for n in ("node", "labels", "resource") if n in values}
            for name in ("node", "labels", "resource"):
                if name in which and not which[name]:
                    self.refuse((*path, name), which[name], "not empty")
            labels = which.get("labels")
            if labels is not None and not isinstance(labels, dict):
                self.refuse((*path, "labels"), labels, "a mapping of labels to values")
            with self.at(path):
                nodes.append(NodeStorage(**which, settings=values))
        return tuple(nodes)

    def _group(
        self,
        own: Mapping[str, Any],
        path: Place,
        name: str | None,
        group: str,
        nodes: tuple[NodeStorage, ...],
        shards: str | None,
        overrides: Mapping[str, Any],
        above: Mapping[str, Any] | None = None,
    ) -> GroupSetup:
        found = {**(above or {}), **own}

        def value(field: str, default: Any, check: Check) -> Any:
            if field in overrides:
                return check(field, overrides[field])
            if field not in found:
                return default
            with self.at(path if field in own else ()):
                return check(field, found[field])

        model = value("model", None, check_text)
        if model is None:
            self.refuse((*path, "model"), None, "a hub's name, a folder or a .gguf file")
        config = self._config(path, own, above or {}, overrides.get("cache", {}))
        known = {"name": name, "group": group, "model": model, "nodes": nodes, "shards": shards}
        return _setup(value, config=config, **known)

    def _config(
        self,
        path: Place,
        own: Mapping[str, Any],
        above: Mapping[str, Any],
        overrides: Mapping[str, Any],
    ) -> CacheConfig:
        """A model's cache settings: the file's, the model's over those, the command's over all."""
        values: dict[str, Any] = {}
        for where, found in (((), above), (path, own)):
            if found.get("cache") is None:
                continue
            for name, value in self.fields(
                found["cache"], (*where, "cache"), _CACHE_FIELDS
            ).items():
                with self.at((*where, "cache")):
                    values[name] = check_setting(name, name, value)
        with self.at((*path, "cache")):
            return CacheConfig(**{**values, **overrides})
