"""Checks of single values of a call's settings; each error names the field and what is valid."""

from __future__ import annotations

import math
from typing import Any

import torch

from litecache.errors import ConfigError, outline


def check_flag(name: str, value: Any) -> bool:
    """A bool and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise ConfigError(name, value, "True or False")
    return value


def has_methods(value: Any, *names: str) -> bool:
    """Whether an object can be called by all these names; one that raises when asked has none."""
    try:
        return all(callable(getattr(value, name, None)) for name in names)
    except Exception:
        return False


def check_count(name: str, value: Any, low: int) -> int:
    """An integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(name, value, f"an integer of at least {low}")
    return value


def check_number(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False
) -> float:
    """A finite number from `low` (or above it) to `high`."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        number = float(value) if fits else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.nan
    if not (low < number if open_low else low <= number) or not number <= high:
        text = f"above {low:g}" if open_low else f"at least {low:g}"
        if math.isfinite(high):
            text += f" and at most {high:g}"
        raise ConfigError(name, value, "a finite number" if math.isinf(low) else f"a number {text}")
    if not math.isfinite(number):
        raise ConfigError(name, value, "a finite number")
    return number


def check_text(name: str, value: Any) -> str:
    """A text that can be encoded: half of a surrogate pair cannot."""
    try:
        if isinstance(value, str) and value.encode() is not None:
            return value
    except UnicodeEncodeError:
        value = outline(value)
    raise ConfigError(name, value, "a text of whole characters")


def check_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id, or several in a list, a tuple or a tensor; None = none."""
    if value is None:
        return ()
    value = as_list(name, value)
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(check_count(name, token, 0) for token in values)


def as_list(name: str, value: Any, most: int = 1 << 20) -> Any:
    """A tensor's numbers, at most so many, as (nested) lists; what is no tensor stays as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    valid = f"a dense tensor of at most {most:,} numbers"
    try:
        if value.numel() <= most:
            return value.tolist()
    except Exception as error:  # meta, sparse, nested, fake...
        raise ConfigError(name, outline(value), valid) from error
    raise ConfigError(name, outline(value), valid)
