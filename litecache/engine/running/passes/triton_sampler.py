"""Greedy and sampling rows drawn in one pass over the logits, without a visit to the host.

The same race as in `sampler.py`, with the same integers. Each program takes a slice
of a row's vocabulary, a second kernel picks the winners. Rows with filters that need a sorted
vocabulary take the torch path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHUNK = 4096
"""Tokens of the vocabulary a program looks at."""


@triton.jit
def _random_bits(key, counter):
    """SplitMix64's number `counter` after `key`, upper half, as float32 in (0, 1)."""
    word = key.to(tl.uint64) + (counter + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    word = word ^ (word >> 31)
    bits = (word >> 32).to(tl.int64).to(tl.float32)
    return tl.minimum((bits + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-08)


@triton.jit
def _slice_kernel(
    logits_ptr, row_stride, temperature_ptr, keys_ptr, struck_ptr, value_ptr, index_ptr, vocab,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STRUCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    temperature = tl.load(temperature_ptr + row)
    key = tl.load(keys_ptr + row)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_at = tl.full((BLOCK,), 0, tl.int32)
    race = tl.full((BLOCK,), float("-inf"), tl.float32)
    race_at = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, CHUNK, BLOCK):
        token = part * CHUNK + start + tl.arange(0, BLOCK)
        x = tl.load(
            logits_ptr + row * row_stride + token, mask=token < vocab, other=float("-inf")
        ).to(tl.float32)
        for place in tl.static_range(STRUCK):
            x = tl.where(token == tl.load(struck_ptr + row * STRUCK + place), float("-inf"), x)
        # NaN loses every comparison: as +inf it is found, and the row reported.
        x = tl.where(x == x, x, float("inf"))
        better = x > best
        best_at = tl.where(better, token, best_at)
        best = tl.where(better, x, best)
        if temperature > 0:
            u = _random_bits(key, token.to(tl.int64))
            # 1 - u rounds for small u, where the series is exact.
            wait = tl.where(u < 0.001, u * (1.0 + u * (0.5 + u * 0.333333343)), -tl.log(1.0 - u))
            score = x / temperature - tl.log(wait)
            faster = score > race
            race_at = tl.where(faster, token, race_at)
            race = tl.where(faster, score, race)
    place = row * parts + part
    pieces = tl.num_programs(0).to(tl.int64) * parts
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, best_at, 2147483647), 0)
    tl.store(value_ptr + place, top)
    tl.store(index_ptr + place, first)
    top_race = tl.max(race, 0)
    first_race = tl.min(tl.where(race == top_race, race_at, 2147483647), 0)
    tl.store(value_ptr + pieces + place, top_race)
    tl.store(index_ptr + pieces + place, first_race)


@triton.jit
def _winner_kernel(
    value_ptr, index_ptr, temperature_ptr, rows_ptr, last_ptr, tokens_ptr, parts,
    PARTS_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pieces = tl.num_programs(0).to(tl.int64) * parts
    part = tl.arange(0, PARTS_PAD)
    there = part < parts
    best = tl.load(value_ptr + row * parts + part, mask=there, other=float("-inf"))
    top = tl.max(best, 0)
    ours = tl.where(tl.load(temperature_ptr + row) > 0, pieces, 0)
    value = tl.load(value_ptr + ours + row * parts + part, mask=there, other=float("-inf"))
    index = tl.load(index_ptr + ours + row * parts + part, mask=there, other=2147483647)
    token = tl.min(tl.where(value == tl.max(value, 0), index, 2147483647), 0).to(tl.int64)
    finite = (top < float("inf")) & (top > float("-inf"))
    tl.store(tokens_ptr + row, tl.where(finite, token, -1))
    tl.store(last_ptr + tl.load(rows_ptr + row), tl.where(finite, token, 0))


def sample_and_remember(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    rows: torch.Tensor,
    struck: torch.Tensor,
    last_tokens: torch.Tensor,
) -> torch.Tensor:
    """Draw one token per row and write it where the next step reads it.

    Args:
        logits: `[S, vocab]`, last dimension contiguous.
        temperature: float32 `[S]`; 0 = greedy.
        keys: int64 `[S]`, of the generator.
        rows: int64 `[S]`, indices into `last_tokens`.
        struck: int32 `[S, n]`, contiguous, tokens that a row cannot draw; -1 = none.
        last_tokens: int64, receives the tokens (0 for an invalid row).

    Returns:
        int64 `[S]`; -1 where the logits are not finite.
    """
    samples, vocab = logits.shape
    parts = triton.cdiv(vocab, _CHUNK)
    value = torch.empty((2, samples, parts), dtype=torch.float32, device=logits.device)
    index = torch.empty((2, samples, parts), dtype=torch.int32, device=logits.device)
    tokens = torch.empty(samples, dtype=torch.int64, device=logits.device)
    if not samples:
        return tokens
    _slice_kernel[(samples, parts)](
        logits, logits.stride(0), temperature, keys, struck, value, index, vocab,
        CHUNK=_CHUNK, BLOCK=1024, STRUCK=struck.shape[1], num_warps=4,
    )  # fmt: skip
    _winner_kernel[(samples,)](
        value, index, temperature, rows, last_tokens, tokens, parts,
        PARTS_PAD=triton.next_power_of_2(parts), num_warps=1,
    )  # fmt: skip
    return tokens
