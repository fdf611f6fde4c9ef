"""The YAML file of `litecache up --config`: the groups that a cluster is to run.

The file is read with the line of every field, so that whatever is wrong in it is named by file,
line, field and value. It is bounded: by its size, its depth, and what its aliases may grow to.
Nothing in it is run: tags of Python objects are refused. `docs/cluster.md` describes the fields,
`examples/cluster.yaml` shows all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from litecache.actors.group_spec import check_actor_options
from litecache.actors.naming import DEFAULT_GROUP, check_group_name
from litecache.actors.placement import (
    NODE_SETTINGS,
    NodeStorage,
    check_placement,
    check_replicas,
)
from litecache.checks import check_flag, check_path, check_text, check_threads
from litecache.config import CacheConfig, Check, check_setting
from litecache.errors import ConfigError, Shown, shorten

_MOST_BYTES = 256 << 10
_MOST_VALUES = 20_000
_DEEPEST = 16
_MOST_MODELS = 64
_CACHE_FIELDS = tuple(each.name for each in dataclasses.fields(CacheConfig))
_MODEL_FIELDS = (
    *("model", "replicas", "num_threads", "trust_remote_code", "placement", "actor_options"),
    "cache",
)
_TOP_FIELDS = ("group", *_MODEL_FIELDS, "nodes", "shards", "models")
_NODE_FIELDS = ("node", "labels", "resource", *NODE_SETTINGS)
_TAG = "tag:yaml.org,2002:"
_SCALARS = ("str", "null", "bool", "int", "float", "timestamp", "value", "merge")
_PLAIN_INTEGER = r"[-+]?(0|[1-9][0-9_]{0,40})"


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
    return _Reader(path).groups(overrides or {})


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


class _Reader:
    """One file: its values as plain ones, and the line of each."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = check_path("config", path)
        self._lines: dict[tuple[str | int, ...], int] = {}
        self._values = 0
        text = self._read()
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            said = ": ".join(part for part in (error.context, error.problem) if part)
            hint = "; YAML is indented with spaces" if "\\t" in said else ""
            self._refuse_text(mark.line + 1 if mark else 1, f"not YAML: {said}{hint}")
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._refuse_text(line, f"a character that YAML does not allow: {error.character!r}")
        except RecursionError:
            self._refuse_text(1, f"nested more than {_DEEPEST} deep")
        if node is None:
            self._refuse_text(1, "an empty file; it needs at least the field model, or models")
        self._tree = self._plain(node, ())
        if not isinstance(self._tree, dict):
            self._refuse_text(1, f"not a mapping of fields: {', '.join(_TOP_FIELDS)}")

    def _read(self) -> str:
        valid = f"a readable file of at most {_MOST_BYTES:,} bytes of UTF-8 text"
        try:
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                raise ConfigError("config", self._path, valid)
            with open(self._path, "rb") as file:
                data = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise ConfigError("config", self._path, f"{valid} ({error.strerror})") from error
        if len(data) > _MOST_BYTES:
            raise ConfigError("config", self._path, valid)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self._refuse_text(line, f"not UTF-8: byte 0x{data[error.start]:02x}")

    def _refuse_text(self, line: int, text: str) -> NoReturn:
        raise ConfigError(f"{self._path}:{line}: {shorten(text, 400)}")

    def _plain(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        """The value of a node, whose line it notes."""
        line: int = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        self._values += 1
        if self._values > _MOST_VALUES:
            self._refuse_text(line, f"more than {_MOST_VALUES:,} values, aliases counted out")
        if len(path) > _DEEPEST:
            self._refuse_text(line, f"nested more than {_DEEPEST} deep")
        kind: str = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self._plain(each, (*path, i)) for i, each in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            return self._scalar(node, kind, path)
        self._refuse_text(line, f"a value tagged {shorten(node.tag, 100)!r}: plain values only")

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (
                f"{_TAG}str",
                f"{_TAG}merge",
            ):
                seen = key.value if isinstance(key, yaml.ScalarNode) else type(key).__name__
                self._refuse_text(line, f"{_join(path, seen)} is no text: put it in quotes")
            name, place = key.value, (*path, key.value)
            if name in values:
                first = self._lines[place]
                self._refuse_text(line, f"{_join(path, name)} a second time, as in line {first}")
            self._lines[place] = line
            values[name] = self._plain(value, place)
        return values

    def _scalar(self, node: yaml.ScalarNode, kind: str, path: tuple[str | int, ...]) -> Any:
        text = node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("yes", "true", "on")
        if kind == "int":
            if re.fullmatch(_PLAIN_INTEGER, text):
                return int(text)
            self._refuse(path, text, "a decimal number without leading zeros, or a text in quotes")
        if kind == "float":
            digits = text.replace("_", "").lower()
            if ":" in digits:  # of base 60
                self._refuse(path, text, "a decimal number, or a text in quotes")
            return float(digits.replace(".inf", "inf").replace(".nan", "nan"))
        return text

    def _refuse(self, path: tuple[str | int, ...], value: object, valid: str) -> NoReturn:
        raise ConfigError(f"{self._place(path)}{_join(path)}", value, valid)

    def _place(self, path: tuple[str | int, ...]) -> str:
        while path not in self._lines:
            path = path[:-1]
        return f"{self._path}:{self._lines[path]}: "

    @contextlib.contextmanager
    def _at(self, path: tuple[str | int, ...]) -> Iterator[None]:
        """Put file and line before what is raised, the line of the field that it names."""
        try:
            yield
        except ConfigError as error:
            name = error.field.partition("[")[0]
            inner = (*path, name) if (*path, name) in self._lines else path
            label = _join(path, error.field) if error.valid else error.field
            raise ConfigError(f"{self._place(inner)}{label}", error.value, error.valid) from error

    def _fields(
        self, values: Any, path: tuple[str | int, ...], known: Sequence[str]
    ) -> dict[str, Any]:
        """A mapping of known fields; what is null counts as not given where a default stands."""
        if not isinstance(values, dict):
            self._refuse(path, values, f"a mapping with any of {', '.join(known)}")
        for name, value in values.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                meant = f"Did you mean {near[0]}? " if near else ""
                valid = f"no such field. {meant}There are {', '.join(known)}"
                self._refuse((*path, name), value, valid)
        return values

    def groups(self, overrides: Mapping[str, Any]) -> list[GroupSetup]:
        """See `read_cluster_file`."""
        top = self._fields(self._tree, (), _TOP_FIELDS)
        with self._at(()):
            group = check_group_name(overrides.get("group", top.get("group", DEFAULT_GROUP)))
        nodes = self._nodes([] if top.get("nodes") is None else top["nodes"])
        if "models" not in top:
            shards = top.get("shards")
            if shards is not None:
                try:
                    check_group_name(shards)
                except ConfigError as error:
                    self._refuse(("shards",), shards, f"a group whose shards to use: {error.valid}")
            return [self._group(top, (), None, group, nodes, shards, overrides)]
        models, path = top["models"], ("models",)
        if not isinstance(models, dict) or not 1 <= len(models) <= _MOST_MODELS:
            self._refuse(path, models, f"a mapping of 1 to {_MOST_MODELS} names to models")
        for name in ("model", "shards"):
            if name in top:
                self._refuse((name,), top[name], "absent beside models, which share their shards")
        if "model" in overrides:
            raise ConfigError("model", overrides["model"], f"none: {self._path} names its models")
        setups = []
        for name, values in models.items():
            own = self._fields(values, (*path, name), _MODEL_FIELDS)
            try:
                check_group_name(f"{group}.{name}")
            except ConfigError as error:
                self._refuse((*path, name), Shown("..."), f"a name of {error.valid}")
            # what stands above the models is the default of each
            shared = {k: v for k, v in top.items() if k in _MODEL_FIELDS}
            where = (*path, name)
            args = name, f"{group}.{name}", nodes, group, overrides
            setups.append(self._group(own, where, *args, above=shared))
        return setups

    def _nodes(self, entries: Any) -> tuple[NodeStorage, ...]:
        if not isinstance(entries, list):
            self._refuse(("nodes",), entries, "a list of nodes and their settings")
        nodes = []
        for index, entry in enumerate(entries):
            path = ("nodes", index)
            values = dict(self._fields(entry, path, _NODE_FIELDS))
            which = {n: values.pop(n) for n in ("node", "labels", "resource") if n in values}
            for name in ("node", "labels", "resource"):
                if name in which and not which[name]:
                    self._refuse((*path, name), which[name], "not empty")
            labels = which.get("labels")
            if labels is not None and not isinstance(labels, dict):
                self._refuse((*path, "labels"), labels, "a mapping of labels to values")
            with self._at(path):
                nodes.append(NodeStorage(**which, settings=values))
        return tuple(nodes)

    def _group(
        self,
        own: Mapping[str, Any],
        path: tuple[str | int, ...],
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
            with self._at(path if field in own else ()):
                return check(field, found[field])

        model = value("model", None, check_text)
        if model is None:
            self._refuse((*path, "model"), None, "a hub's name, a folder or a .gguf file")
        config = self._config(path, own, above or {}, overrides.get("cache", {}))
        known = {"name": name, "group": group, "model": model, "nodes": nodes, "shards": shards}
        return _setup(value, config=config, **known)

    def _config(
        self,
        path: tuple[str | int, ...],
        own: Mapping[str, Any],
        above: Mapping[str, Any],
        overrides: Mapping[str, Any],
    ) -> CacheConfig:
        """A model's cache settings: the file's, the model's over those, the command's over all."""
        values: dict[str, Any] = {}
        for where, found in (((), above), (path, own)):
            if found.get("cache") is None:
                continue
            for name, value in self._fields(
                found["cache"], (*where, "cache"), _CACHE_FIELDS
            ).items():
                with self._at((*where, "cache")):
                    values[name] = check_setting(name, name, value)
        with self._at((*path, "cache")):
            return CacheConfig(**{**values, **overrides})


def _join(path: Sequence[str | int], *more: str) -> str:
    """`models.chat.cache.ram_bytes`, `nodes[0].node`."""
    text = ""
    for part in (*path, *more):
        if "salt_" in text:  # the names below it are salts
            return f"{text}[...]"
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else shorten(part, 100)
    return text
