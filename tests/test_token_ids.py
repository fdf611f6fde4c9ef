"""TokenIds: as good as a tuple of ints, and small on the wire."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litecache.token_ids import TokenIds

ids = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40)


@given(ids, ids)
def test_it_behaves_like_a_tuple(left, right):
    mine, other = TokenIds(left), TokenIds(right)
    assert list(mine) == left
    assert len(mine) == len(left)
    assert (mine == tuple(right)) == (left == right)
    assert (mine == other) == (left == right)
    assert mine + right == tuple(left + right)
    assert mine[1:3] == tuple(left[1:3])
    assert all(type(token) is int for token in mine)
    if left == right:
        assert hash(mine) == hash(other)


@given(ids)
def test_it_survives_pickling_and_stays_immutable(values):
    back = pickle.loads(pickle.dumps(TokenIds(values)))
    assert list(back) == values
    for tokens in (back, TokenIds(values)):
        with pytest.raises(ValueError, match="read-only"):
            tokens.array[:] = 0
        with pytest.raises(AttributeError):
            tokens.array = np.zeros(1, np.int64)


def test_a_source_array_may_change_afterwards():
    source = np.arange(5)
    tokens = TokenIds(source)
    source[0] = 9
    assert tokens == (0, 1, 2, 3, 4)


def test_as_few_bytes_a_token_as_the_largest_one_needs():
    for largest, width in ((255, 1), (50_000, 2), (128_255, 3), (2**30, 4), (2**40, 8), (-1, 8)):
        tokens = TokenIds([largest] * 10_000)
        assert len(pickle.dumps(tokens)) < width * 10_000 + 200
        assert pickle.loads(pickle.dumps(tokens)) == tokens
