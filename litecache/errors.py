"""Every error that reaches a user, and how a value is shown in one.

All derive from `LiteCacheError`. A message names the field, the value that was given and what
would be valid. Values are shortened here and nowhere else: a message stays short and printable
whatever it is given, an error keeps no reference to the value, and showing one runs no code of its
class. What holds a prompt or a salt is told by `outline` alone: its type and length, never its
contents.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

_MOST_SHOWN = 200
_LONGEST_MESSAGE = 2_000
_DEEPEST = 3
_SHOWN_BY_REPR = ("torch.dtype", "torch.device", "torch.Size", "pathlib.PosixPath")
_BRACKETS: tuple[tuple[Any, str], ...] = (
    (list, "[]"),
    (tuple, "()"),
    (set, "{}"),
    (frozenset, "{}"),
)


class Shown(str):
    """A text that is shown as it is, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def shorten(text: str, most: int = _MOST_SHOWN) -> str:
    """The head and the tail of a text, `most` characters together."""
    tail = most // 4
    return text if len(text) <= most else f"{text[: most - tail - 3]}...{text[-tail:]}"


def shown(value: object) -> Shown:
    """Like `repr`, but at most 200 characters, in bounded time, and it never raises."""
    try:
        return Shown(shorten(_text(value, _DEEPEST)))
    except Exception:  # a value can be broken in any way; its error must not hide ours
        return _class_of(value)


def outline(value: object) -> Shown:
    """Type and length of a text or a container, which must not be shown itself; numbers are."""
    kind = type(value)
    base: Any
    if value is None or issubclass(kind, (int, float)):
        return shown(value)
    for base, unit in ((str, "characters"), (bytes, "bytes"), (list, "items"), (tuple, "items")):
        if issubclass(kind, base):
            return Shown(f"<{base.__name__} of {base.__len__(value):,} {unit}>")
    try:
        return Shown(_shape(value) or _class_of(value))
    except Exception:
        return _class_of(value)


def _class_of(value: object) -> Shown:
    try:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
    except Exception:  # a metaclass may break these too
        name = "broken"
    return Shown(f"<{shorten(name.removeprefix('builtins.'), 100)} object>")


def _shape(value: object) -> str | None:
    """A tensor or an array, in words that need none of its numbers."""
    for module, name in (("torch", "Tensor"), ("numpy", "ndarray")):
        loaded = sys.modules.get(module)
        if loaded is not None and issubclass(type(value), getattr(loaded, name, ())):
            held: Any = value
            return f"<{name} {held.dtype} {list(held.shape)}>"
    return None


def _text(value: Any, depth: int) -> str:
    # by the base classes' own methods: a subclass may override any of them
    kind: Any = type(value)
    if value is None or kind in (Shown, bool, complex):
        return repr(value)
    if issubclass(kind, int):
        bits = int.bit_length(value)
        return int.__repr__(value) if bits < 256 else f"<int of {bits:,} bits>"
    if issubclass(kind, float):
        return float.__repr__(value)
    for base in (str, bytes, bytearray):
        if issubclass(kind, base):
            left = base.__len__(value) - _MOST_SHOWN
            seen = repr(base.__getitem__(value, slice(_MOST_SHOWN)))
            return seen + (f"... and {left:,} more" if left > 0 else "")
    if issubclass(kind, dict):
        pairs = dict.items(value)
        return _items((f"{_text(k, 1)}: {_text(v, depth - 1)}" for k, v in pairs), "{}", depth)
    for base, brackets in _BRACKETS:
        if issubclass(kind, base):
            items = base.__iter__(value)
            return _items((_text(item, depth - 1) for item in items), brackets, depth)
    if issubclass(kind, type):
        return f"<class {shorten(type.__repr__(value)[8:-2], 100)}>"
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.generic) and value.nbytes <= 32:
        return repr(value)
    if f"{kind.__module__}.{kind.__qualname__}" in _SHOWN_BY_REPR:
        return repr(value)
    return _shape(value) or _class_of(value)


def _items(texts: Iterator[str], brackets: str, depth: int) -> str:
    """As many as may be seen; further on, and deeper down, only dots."""
    parts: list[str] = []
    length = 0
    while depth > 0 and length <= _MOST_SHOWN // 2 and (text := next(texts, None)) is not None:
        parts.append(text)
        length += len(text) + 2
    if depth <= 0 or length > _MOST_SHOWN // 2:
        parts.append("...")
    return f"{brackets[0]}{', '.join(parts)}{brackets[1]}"


def first_line(error: BaseException) -> str:
    """What somebody else's exception says, on one line; its class where it says nothing."""
    try:
        lines = str(error).split("\n")
    except Exception:  # an exception can be broken like any value
        lines = []
    said = next((line.strip() for line in lines if line.strip()), None)
    return shorten(said) if said else type(error).__name__


def told(error: BaseException) -> str:
    """An exception on one line, with its class unless it is one of ours."""
    if isinstance(error, LiteCacheError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


class LiteCacheError(Exception):
    """Root of all errors raised by LiteCache.

    `ConfigError("block_size", 12, "a power of two from 8 to 256")` and
    `ConfigError("a sentence of its own")` are both accepted, and so for every class below.

    Attributes:
        field: what was wrong, or the whole sentence.
        value: the value as `shown`, or None.
        valid: what is valid, or None.
    """

    def __init__(self, field: str, value: object = None, valid: str | None = None) -> None:
        self.field, self.valid = _printable(field), None if valid is None else _printable(valid)
        self.value = None if valid is None else _shown_of(self.field, value)
        text = (
            self.field if valid is None else f"{self.field}={self.value} is invalid: {self.valid}"
        )
        super().__init__(shorten(text, _LONGEST_MESSAGE))

    def __reduce__(self) -> tuple[type[LiteCacheError], tuple[str, str | None, str | None]]:
        return type(self), (self.field, self.value, self.valid)


def _shown_of(field: str, value: object) -> Shown:
    """A value as its field's error tells it: whoever knows a salt could ask in its owner's name."""
    secret = "salt" in field.lower() and type(value) is not Shown
    return outline(value) if secret else shown(value)


def _printable(text: str) -> str:
    """A sentence in which no single word, a path for one, is longer than a value may be."""
    text = shorten(str(text), 10 * _LONGEST_MESSAGE).encode("utf-8", "backslashreplace").decode()
    text = re.sub(rf"\S{{{_MOST_SHOWN + 1},}}", lambda word: shorten(word[0]), text)
    return shorten(text, _LONGEST_MESSAGE)


class ConfigError(LiteCacheError, ValueError):
    """A field of a config or of a request is invalid."""


class ModelNotSupportedError(ConfigError):
    """A model that LiteCache refuses to run, with the reason.

    Attributes:
        reason: the message without the model's name.
        right_to: the `max_model_len` up to which it would run, None = none.
    """

    reason: str = ""
    right_to: int | None = None


class CapacityError(LiteCacheError, RuntimeError):
    """Something will never fit; the message carries the numbers."""


class StorageError(LiteCacheError, RuntimeError):
    """The storage tier failed or was used wrongly."""


class StorageLockedError(StorageError):
    """Another live process owns the storage folder."""


class StorageFormatError(StorageError):
    """A file of the storage folder is not of the format this version reads."""


class StorageFullError(StorageError):
    """The disk, the shared memory or the configured bound has no room."""


class NothingStoredError(StorageError):
    """Of a prompt that was to be exported not even the first block is stored."""


class PrefixFileError(StorageError):
    """A file of `export_prefix` is damaged, of another version, or of another model or salt."""


class GroupError(LiteCacheError, RuntimeError):
    """A group of actors could not be started, joined or reached."""


class GroupMismatchError(GroupError):
    """Joined a group of other settings, model or version."""


class GroupUnavailableError(GroupError):
    """No actor of the group answers."""


class RequestAborted(LiteCacheError, RuntimeError):  # noqa: N818 - the name is public API
    """The request was aborted before it finished."""


class RequestTimeout(LiteCacheError, TimeoutError):  # noqa: N818 - the name is public API
    """The request or a call on its behalf exceeded its deadline."""


class KernelError(LiteCacheError, ValueError):
    """An argument of a kernel has a wrong shape, stride, dtype or device."""


def describe(error: BaseException) -> tuple[list[str], str, str | None, str | None]:
    """An error as plain values, for another process; `restore` makes it again.

    Returns:
        Names of its class and of those above it, up to `LiteCacheError`; field, value, valid. What
        is no LiteCacheError has no names, and a field that says what it was.
    """
    if not isinstance(error, LiteCacheError):
        return [], _printable(told(error)), None, None
    names = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, LiteCacheError)]
    return names, error.field, error.value, error.valid


def restore(names: object, field: object, value: object, valid: object) -> LiteCacheError:
    """The error that `describe` told of: of the first class in `names` that there is here."""
    known = {kind.__name__: kind for kind in _classes(LiteCacheError)}
    found = [known[name] for name in names if name in known] if isinstance(names, tuple) else []
    kind = found[0] if found else GroupError
    return kind(str(field), Shown(str(value)), None if valid is None else str(valid))


def _classes(kind: type[LiteCacheError]) -> Iterator[type[LiteCacheError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _classes(below)
