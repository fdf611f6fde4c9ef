"""Checks of single values of a call's settings; each error names the field and what is valid."""

from __future__ import annotations

import math
from typing import Any

import torch

from litecache.errors import ConfigError


def check_flag(name: str, value: Any) -> bool:
    """A bool and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise ConfigError(name, value, "True or False")
    return value


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
    if not fits or not (low < value if open_low else low <= value) or not value <= high:
        text = f"above {low:g}" if open_low else f"at least {low:g}"
        if math.isfinite(high):
            text += f" and at most {high:g}"
        raise ConfigError(name, value, "a finite number" if math.isinf(low) else f"a number {text}")
    if not math.isfinite(value):
        raise ConfigError(name, value, "a finite number")
    return float(value)


def check_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id, or several in a list, a tuple or a tensor; None = none."""
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(check_count(name, token, 0) for token in values)
