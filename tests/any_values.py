"""Values that nobody should pass, for tests and scripts that pass them everywhere.

`ANYTHING` draws one. `good_or_refused` is the promise: a result or a `LiteCacheError` with a short,
printable message, in time.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from litecache.errors import LiteCacheError

NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 7, 8, 16, 255, 256, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400),
    *(-(10**400), 10**5000, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *(True, False, 1j, np.int64(3), np.int8(-1), np.uint64(2**64 - 1), np.float32(0.5)),
    *(np.float64("nan"), np.bool_(True), Decimal("1.5"), Decimal("NaN"), Fraction(1, 3)),
]


class Broken:
    """Every question to it raises."""

    def __repr__(self) -> str:
        raise RuntimeError("broken")

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("broken")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise RuntimeError("broken")

    def __len__(self) -> int:
        raise RuntimeError("broken")

    def __iter__(self) -> Any:
        raise RuntimeError("broken")

    def __fspath__(self) -> str:
        raise RuntimeError("broken")

    def __index__(self) -> int:
        raise RuntimeError("broken")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("broken")


class OddPath:
    def __fspath__(self) -> Any:
        return 5


def _looped() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def _nested() -> list[Any]:
    value: list[Any] = []
    for _ in range(3000):
        value = [value]
    return value


TEXTS: list[Any] = [
    *("", " ", "0", "1", "-1", "nan", "inf", "1e400", "null", "true", "[]", "{}", "[1]", '["a"]'),
    *("\0", "a\0b", "\udcff", "\ud800x", "/\udcff", "/a\0b", "\n", "é" * 300, "/" + "x" * 300),
    *("/" + "x/" * 5000, "x" * 10**6, "٣", "1" * 5000, "9" * 30 + "TB", "1GB", "1 PB", ".5GB"),
    *("cuda:99999999999", "torch.float32", "cpu", "cuda", "meta", "relative/path", "../..", "~"),
    *("=", "a=", "=1", "a=1", "{", '[{"a":', "[" * 5000, "%s%n{}", "--help", "-", "\x1b[31m"),
]

OTHERS: list[Any] = [
    None,
    b"",
    b"/tmp/x",
    bytearray(b"abc"),
    memoryview(b"abc"),
    [],
    [1],
    [None],
    [[]],
    ["/a", "/a"],
    (),
    ("/a", 5),
    {},
    {"a": 1},
    {1: 2},
    {"a": float("nan")},
    {"\udcff": 5},
    set(),
    {1},
    frozenset({"a"}),
    range(3),
    range(10**12),
    object(),
    object,
    int,
    len,
    lambda: 1,
    iter([1, 2]),
    Ellipsis,
    NotImplemented,
    pathlib.Path("relative"),
    pathlib.PurePosixPath("/a\0b"),
    OddPath(),
    Broken(),
    _looped(),
    _nested(),
    np.zeros(0),
    np.zeros(3),
    np.arange(3),
    np.array(5),
    np.array([{}], dtype=object),
    np.zeros((2, 2), dtype="U3"),
    np.datetime64("2026-01-01"),
    torch.zeros(0),
    torch.zeros(3),
    torch.arange(3),
    torch.tensor(1),
    torch.tensor(float("nan")),
    torch.zeros(2, device="meta"),
    torch.eye(2).to_sparse(),
    torch.zeros(2, requires_grad=True),
    torch.float32,
    torch.complex64,
    torch.device("cpu"),
    torch.device("meta"),
    ValueError("x"),
]

EVERY: list[Any] = [*NUMBERS, *TEXTS, *OTHERS]

ANYTHING = st.one_of(
    st.sampled_from(range(len(EVERY))).map(lambda index: EVERY[index]),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=())),
    st.binary(),
    st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=4)),
    st.dictionaries(st.text(), st.integers(), max_size=3),
)


def good_or_refused(call: Callable[[], Any], within_s: float = 1.0) -> Any:
    """The result, or the `LiteCacheError`; any other exception, or a late answer, is a failure.

    Late is what is late three times in a row: the machine may be busy.
    """
    outcome: Any = None
    for _ in range(3):
        begun = time.perf_counter()
        try:
            outcome = call()
        except LiteCacheError as error:
            outcome = error
            message = str(error)
            message.encode()
            assert message
            assert len(message) <= 2000
            assert "\0" not in message
        if time.perf_counter() - begun < within_s:
            return outcome
    raise AssertionError(f"not answered within {within_s} s")
