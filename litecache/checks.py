"""Checks of single values that come from outside: a plain value, or a ConfigError.

Each names the field, the value and what is valid. They ask a value's class and never the value, so
that whatever is passed, nothing but a ConfigError is raised. Subclasses come out as plain values.
"""

from __future__ import annotations

import math
import numbers
import os
import re
from typing import Any

from litecache.errors import ConfigError, outline

INT64_MAX = 2**63 - 1
FLOAT32_MAX = 3.4028234e38
_LONGEST_PATH = 3800
_LONGEST_NAME = 255


def is_a(value: object, *types: type) -> bool:
    """`isinstance`, which would ask the value."""
    return issubclass(type(value), types)


def check_flag(name: str, value: Any) -> bool:
    """A bool and nothing that merely counts as one."""
    if not is_a(value, bool):
        raise ConfigError(name, value, "True or False")
    return bool(value)


def check_integer(
    name: str, value: Any, low: int, high: int = INT64_MAX, valid: str | None = None
) -> int:
    """A plain int from an integer of any kind, no bool, of at least `low` and at most `high`."""
    if type(value) is int and low <= value <= high:
        return value
    if not is_a(value, numbers.Integral) or is_a(value, bool) or not low <= int(value) <= high:
        limit = f"from {low} to {high}"
        if high == INT64_MAX:
            limit = f"of at least {low} and below 2**63"
        raise ConfigError(name, value, valid or f"an integer {limit}")
    return int(value)


def check_threads(name: str, value: Any) -> int | None:
    """A number of torch's threads, or None."""
    return None if value is None else check_integer(name, value, 1, 4096)


def check_real(
    name: str,
    value: Any,
    low: float,
    high: float = FLOAT32_MAX,
    valid: str | None = None,
    *,
    above: bool = False,
) -> float:
    """A plain float from a number of any kind, no bool, from `low` (or above it) to `high`."""
    number = math.nan
    if is_a(value, numbers.Real) and not is_a(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond all floats
            number = math.inf
    if not (low < number if above else low <= number) or not number <= high:
        limit = f"above {low:g}" if above else f"of at least {low:g}"
        raise ConfigError(name, value, valid or f"a finite number {limit}, at most {high:g}")
    return number


def check_seconds(name: str, value: Any) -> float:
    """How long to wait, at most 1e6 s whatever is asked for.

    Raises:
        ConfigError: no number, NaN or below zero.
    """
    if is_a(value, numbers.Real) and not is_a(value, bool) and value >= 0:
        return float(min(value, 1e6))
    raise ConfigError(name, value, "seconds, zero or more")


def check_list(name: str, value: Any) -> list[Any]:
    """The items of a list, a tuple, an array or a tensor, at most 2**24.

    Raises:
        ConfigError: something without a length, or a longer one.
    """
    try:
        items = list(value) if len(value) <= 1 << 24 else None
    except Exception as error:  # whatever was passed is no list
        raise ConfigError(name, outline(value), "a list") from error
    if items is None:
        raise ConfigError(name, outline(value), "at most 2**24 items")
    return items


def check_text(name: str, value: Any, valid: str = "a text") -> str:
    """A plain str that can be encoded.

    Raises:
        ConfigError: another type, or a lone surrogate in it.
    """
    if is_a(value, str):
        text = str.__str__(value)
        if not re.search("[\ud800-\udfff]", text):
            return text
        valid += " without lone surrogates"
    raise ConfigError(name, value, valid)


def check_path(name: str, value: Any, valid: str = "a path of a file system") -> str:
    """A path, as text; it need not exist.

    Raises:
        ConfigError: another type, or no file system would take it.
    """
    if is_a(value, os.PathLike):
        try:
            value = os.fspath(value)
        except Exception as error:
            raise ConfigError(name, value, valid) from error
    path = check_text(name, value, valid)
    names = path.encode().split(b"/")
    if not path or "\0" in path or len(path.encode()) > _LONGEST_PATH:
        raise ConfigError(name, path, f"{valid}: 1 to {_LONGEST_PATH} bytes, none of them zero")
    if max(map(len, names)) > _LONGEST_NAME:
        raise ConfigError(name, path, f"{valid}, no name in it longer than {_LONGEST_NAME} bytes")
    return path
