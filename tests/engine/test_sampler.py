"""The sampler keeps what transformers keeps and draws with the right, independent frequencies."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from litecache.engine.running.batch import EVERY_TOKEN, Batch
from litecache.engine.running.row_tables import num_sorted
from litecache.engine.running.sampler import (
    INVALID_TOKEN,
    exponentials,
    position_keys,
    random_bits,
    sample,
    stream_keys,
)


def batch_of(rows, *, keys=None, masked=()):
    """Rows of (temperature, top_k, top_p, min_p)."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return Batch(
        {
            "temperature": torch.tensor(temperature, dtype=torch.float32),
            "top_k": torch.tensor(top_k),
            "top_p": torch.tensor(top_p, dtype=torch.float32),
            "min_p": torch.tensor(min_p, dtype=torch.float32),
            "keys": torch.arange(len(rows)) if keys is None else keys,
        },
        all_greedy=all(t == 0 for t in temperature),
        num_sorted=num_sorted(np.array(top_k), np.array(top_p)),
        any_min_p=any(p > 0 for p in min_p),
        masked=masked,
    )


def draw_keys(seed, sample_index, position, **purpose):
    return position_keys(stream_keys(seed, sample_index, **purpose), position)


def warped(logits, temperature, top_k, top_p, min_p):
    """Probabilities of transformers' warpers, in its order."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores[0].softmax(dim=-1)


def keys_for(count, seed=3):
    ones = np.ones(count, dtype=np.int64)
    return torch.from_numpy(draw_keys(ones * seed, ones * 0, np.arange(count)))


CASES = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.2),
    (0.9, 12, 0.9, 0.05),
    (1.0, 0, 0.01, 0.0),
]


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_the_warpers(case):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 2
    draws = 20_000
    tokens = sample(logits.repeat(draws, 1), batch_of([case] * draws, keys=keys_for(draws)))
    expected = warped(logits, *case) * draws
    counts = tokens.bincount(minlength=20).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # Chi-square: mean = degrees of freedom, so five times the spread above it is never chance.
    chi = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert chi <= freedom + 5 * max(2 * freedom, 1) ** 0.5


@given(
    st.integers(0, 10_000),
    st.floats(0.1, 3),
    st.integers(0, 40),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
)
def test_only_tokens_that_transformers_keeps_are_drawn(seed, temperature, top_k, top_p, min_p):
    logits = torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 3
    case = (temperature, top_k, top_p, min_p)
    tokens = sample(logits.repeat(64, 1), batch_of([case] * 64, keys=keys_for(64, seed)))
    assert (warped(logits, *case)[tokens] > 0).all()


def test_a_mixed_batch_gives_each_row_what_it_gets_alone():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    rows = [(0.0, 0, 1.0, 0.0), *CASES[:5]]
    keys = keys_for(6)
    together = sample(logits.clone(), batch_of(rows, keys=keys))
    assert together[0] == logits[0].argmax()
    for index, row in enumerate(rows):
        alone = sample(logits[index : index + 1].clone(), batch_of([row], keys=keys[[index]]))
        assert alone == together[index]


def test_ordering_only_the_likeliest_tokens_gives_the_same_draws():
    logits = torch.randn(300, 90, generator=torch.Generator().manual_seed(5)) * 2
    rows = [(1.0, k, p, 0.0) for k, p in ((7, 1.0), (30, 0.8), (0, 1.0), (1, 0.5))] * 75
    batch = batch_of(rows, keys=keys_for(300))
    assert batch.num_sorted == 30
    every = dataclasses.replace(batch, num_sorted=EVERY_TOKEN)
    assert torch.equal(sample(logits.clone(), batch), sample(logits.clone(), every))


def test_masked_tokens_and_non_finite_rows():
    logits = torch.tensor([[1.0, 5.0, 2.0], [1.0, float("nan"), 0.0], [float("inf"), 0.0, 0.0]])
    masked = ((0, 1),)
    for temperature in (0.0, 1e-4):
        rows = [(temperature, 0, 1.0, 0.0)] * 3
        tokens = sample(logits.clone(), batch_of(rows, masked=masked))
        assert tokens.tolist() == [2, INVALID_TOKEN, INVALID_TOKEN]


def test_the_generator_is_splitmix64():
    # First outputs for the seed 1234567 as published with the reference implementation.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    bits = random_bits(torch.tensor([1234567]), 3)[0]
    assert bits.tolist() == [word >> 32 for word in published]


def test_every_part_of_a_key_changes_it():
    base = [np.array([v]) for v in (7, 0, 3)]
    keys = {int(draw_keys(*base)[0]), int(draw_keys(*base, purpose=2)[0])}
    for part in range(3):
        for change in (1, -8, 1 << 40):
            changed = [v + change if i == part else v for i, v in enumerate(base)]
            keys.add(int(draw_keys(*changed)[0]))
    assert len(keys) == 11


def test_exponentials_are_positive_finite_and_of_mean_one():
    numbers = exponentials(keys_for(100), 5000)
    assert (numbers > 0).all()
    assert torch.isfinite(numbers).all()
    assert abs(float(numbers.mean()) - 1) < 0.01
    assert abs(float((numbers > 3).float().mean()) - float(np.exp(-3))) < 0.002
