from __future__ import annotations

import pickle
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import litecache.errors
from litecache.errors import ConfigError, LiteCacheError, first_line, outline, shorten, shown, told

ERRORS = [
    each
    for each in vars(litecache.errors).values()
    if isinstance(each, type) and issubclass(each, LiteCacheError)
]


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Gigantic:
    def __repr__(self) -> str:
        return "x" * 10**9


class Hostile(str):
    def __getitem__(self, index: object) -> str:
        raise RuntimeError("no slices")

    __len__ = __iter__ = __repr__ = __str__ = __getitem__  # type: ignore[assignment]


class NoClass:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no class")


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        raise RuntimeError("no attributes")


class Nameless(metaclass=Meta):
    pass


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def looped() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


HARD = [
    "x" * 10**7,
    b"x" * 10**7,
    bytearray(10**7),
    list(range(10**6)),
    {"x" * 1000: "y" * 1000},
    dict.fromkeys(range(10**6)),
    10**10**6,
    -(10**5000),
    nested(100_000),
    looped(),
    {"a": looped(), "b": [nested(50)]},
    Unshowable(),
    [Unshowable()],
    Gigantic(),
    Hostile("abc"),
    NoClass(),
    Nameless(),
    Nameless,
    torch.zeros(10**6),
    torch.zeros(3, device="meta"),
    np.zeros(10**6),
    np.void(b"x" * 10**7),
    np.str_("x" * 10**6),
    memoryview(b"abc"),
    range(10**9),
    "\udcff\x00\n",
    object(),
]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("number", range(len(HARD)))
def test_an_error_of_any_value_is_short_printable_quick_and_picklable(
    kind: type[LiteCacheError], number: int
) -> None:
    begun = time.perf_counter()
    error = kind("field", HARD[number], "something else")
    text = str(error)
    assert time.perf_counter() - begun < 1
    assert text.startswith("field=")
    assert text.endswith(" is invalid: something else")
    assert len(text) <= 200 + len("field= is invalid: something else")
    text.encode()
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.field) == (kind, text, "field")


@given(st.recursive(st.integers() | st.text() | st.binary() | st.floats(), st.lists))
def test_a_small_value_is_shown_as_it_is_written(value: object) -> None:
    written = repr(value)
    if len(written) <= 100 and written.count("[") <= 2 and not isinstance(value, int):
        assert shown(value) == written
    assert len(shown(value)) <= 200


def test_a_message_has_a_longest_length_and_no_word_that_is_longer_than_a_value() -> None:
    path = "/" + "d" * 3000 + "/end"
    text = str(ConfigError(f"cannot write {path} there"))
    assert text == f"cannot write {shorten(path)} there"
    assert len(shorten(path)) == 200
    assert text.endswith("/end there")
    assert len(str(LiteCacheError("some words " * 10**6))) <= 2000
    str(LiteCacheError("a lone \udcff")).encode()


@pytest.mark.parametrize("value", ["secret words", ["secret"], ("secret",), b"secret", {"secret"}])
def test_an_outline_tells_the_type_and_none_of_the_contents(value: object) -> None:
    assert "secret" not in outline(value)
    assert type(value).__name__ in outline(value)


@pytest.mark.parametrize("number", range(len(HARD)))
def test_an_outline_of_any_value_is_short(number: int) -> None:
    assert len(outline(HARD[number])) <= 200


def test_a_tensor_is_told_by_its_shape() -> None:
    assert outline(torch.zeros(2, 3)) == shown(torch.zeros(2, 3)) == "<Tensor torch.float32 [2, 3]>"


def test_a_foreign_exception_is_told_on_one_short_line() -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert told(ValueError("a\nb")) == "ValueError: a"
    assert told(ValueError("\n\n b \n")) == "ValueError: b"
    assert told(KeyError()) == "KeyError: KeyError"
    assert first_line(BrokenError()) == "BrokenError"
    assert len(first_line(ValueError("x" * 10**6))) == 200
    assert told(ConfigError("a", 1, "2")) == "a=1 is invalid: 2"


@pytest.mark.parametrize("field", ["cache_salt", "salt_quotas", "LITECACHE_SALT_QUOTAS", "--salt"])
def test_an_error_about_a_salt_does_not_tell_it(field: str) -> None:
    for value in ("pssst", {"pssst": "much"}, ["pssst"], b"pssst"):
        error = ConfigError(field, value, "another one")
        assert "pssst" not in f"{error} {error.value} {pickle.dumps(error)!r}"
        names, *rest = litecache.errors.describe(error)
        assert "pssst" not in str(litecache.errors.restore(tuple(names), *rest))
