"""YAML files with settings, whose every fault is named by file, line, field and value.

A file is bounded: by its size, its depth, and what its aliases may grow to. Nothing in it is run:
tags of Python objects are refused.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import yaml

from litecache.checks import check_path
from litecache.errors import ConfigError, shorten

Place = tuple[str | int, ...]
"""The names of a value and of those that it lies in, from the top; numbers in a list."""

_MOST_BYTES = 256 << 10
_MOST_VALUES = 20_000
_DEEPEST = 16
_TAG = "tag:yaml.org,2002:"
_SCALARS = ("str", "null", "bool", "int", "float", "timestamp", "value", "merge")
_PLAIN_INTEGER = r"[-+]?(0|[1-9][0-9_]{0,40})"


class YamlFile:
    """One file: its values as plain ones, and the line of each.

    Args:
        path: of the file.
        label: what whoever gives the path calls it.
        known: the fields that may stand at its top.

    Attributes:
        path: of the file, as text.
        tree: those fields by name.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown; names file, line and field.
    """

    def __init__(self, path: str | os.PathLike[str], label: str, known: Sequence[str]) -> None:
        self.path, self._label = check_path(label, path), label
        self._lines: dict[Place, int] = {}
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
            self._refuse_text(1, f"an empty file, not a mapping of fields: {', '.join(known)}")
        tree = self._plain(node, ())
        if not isinstance(tree, dict):
            self._refuse_text(1, f"not a mapping of fields: {', '.join(known)}")
        self.tree = self.fields(tree, (), known)

    def _read(self) -> str:
        valid = f"a readable file of at most {_MOST_BYTES:,} bytes of UTF-8 text"
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise ConfigError(self._label, self.path, valid)
            with open(self.path, "rb") as file:
                data = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise ConfigError(self._label, self.path, f"{valid} ({error.strerror})") from error
        if len(data) > _MOST_BYTES:
            raise ConfigError(self._label, self.path, valid)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self._refuse_text(line, f"not UTF-8: byte 0x{data[error.start]:02x}")

    def _refuse_text(self, line: int, text: str) -> NoReturn:
        raise ConfigError(f"{self.path}:{line}: {shorten(text, 400)}")

    def _plain(self, node: yaml.Node, path: Place) -> Any:
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

    def _mapping(self, node: yaml.MappingNode, path: Place) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (
                f"{_TAG}str",
                f"{_TAG}merge",
            ):
                seen = key.value if isinstance(key, yaml.ScalarNode) else type(key).__name__
                self._refuse_text(line, f"{join(path, seen)} is no text: put it in quotes")
            name, place = key.value, (*path, key.value)
            if name in values:
                first = self._lines[place]
                self._refuse_text(line, f"{join(path, name)} a second time, as in line {first}")
            self._lines[place] = line
            values[name] = self._plain(value, place)
        return values

    def _scalar(self, node: yaml.ScalarNode, kind: str, path: Place) -> Any:
        text = node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("yes", "true", "on")
        if kind == "int":
            if re.fullmatch(_PLAIN_INTEGER, text):
                return int(text)
            self.refuse(path, text, "a decimal number without leading zeros, or a text in quotes")
        if kind == "float":
            digits = text.replace("_", "").lower()
            if ":" in digits:  # of base 60
                self.refuse(path, text, "a decimal number, or a text in quotes")
            return float(digits.replace(".inf", "inf").replace(".nan", "nan"))
        return text

    def refuse(self, path: Place, value: object, valid: str) -> NoReturn:
        """Raise the ConfigError of a value that is not valid."""
        raise ConfigError(f"{self._place(path)}{join(path)}", value, valid)

    def _place(self, path: Place) -> str:
        while path not in self._lines:
            path = path[:-1]
        return f"{self.path}:{self._lines[path]}: "

    @contextlib.contextmanager
    def at(self, path: Place) -> Iterator[None]:
        """Put file and line before what is raised, the line of the field that it names."""
        try:
            yield
        except ConfigError as error:
            name = error.field.partition("[")[0]
            inner = (*path, name) if (*path, name) in self._lines else path
            label = join(path, error.field) if error.valid else error.field
            raise ConfigError(f"{self._place(inner)}{label}", error.value, error.valid) from error

    def fields(self, values: Any, path: Place, known: Sequence[str]) -> dict[str, Any]:
        """A mapping of known fields; what is null counts as not given where a default stands."""
        if not isinstance(values, dict):
            self.refuse(path, values, f"a mapping with any of {', '.join(known)}")
        for name, value in values.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                meant = f"Did you mean {near[0]}? " if near else ""
                valid = f"no such field. {meant}There are {', '.join(known)}"
                self.refuse((*path, name), value, valid)
        return values


def join(path: Sequence[str | int], *more: str) -> str:
    """`models.chat.cache.ram_bytes`, `nodes[0].node`."""
    text = ""
    for part in (*path, *more):
        if "salt_" in text:  # the names below it are salts
            return f"{text}[...]"
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else shorten(part, 100)
    return text
