"""Draws the next tokens of a mixed batch: greedy rows and sampling rows in one pass.

The filters have the meaning and the order of transformers' warpers (temperature, top-k, top-p,
min-p), written as one threshold per row. A token is drawn by an exponential race: the kept token
with the largest `p / e` wins, `e` being exponential numbers of the counter-based generator, which
makes each draw independent of the batch around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from litecache.engine.running.random_numbers import exponentials

INVALID_TOKEN = -1
EVERY_TOKEN = 1 << 62


@dataclass(frozen=True)
class SamplingBatch:
    """How each sampled row of a step draws, on the logits' device.

    Attributes:
        temperature: float32 `[S]`; 0 = greedy.
        top_k: int64 `[S]`; 0 = off.
        top_p: float32 `[S]`; 1 = off.
        min_p: float32 `[S]`; 0 = off.
        keys: int64 `[S]`, of the generator.
        all_greedy: no row draws; the tensors above are not read.
        num_sorted: how many of the likeliest tokens must be put in order for top-k and top-p:
            the largest top-k, or `EVERY_TOKEN` when a row has top-p alone; 0 = no row has either.
        any_min_p: some row has min-p.
        masked: rows and tokens `([n], [n])` whose logits are struck out, None = none.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    keys: torch.Tensor
    all_greedy: bool
    num_sorted: int
    any_min_p: bool
    masked: tuple[torch.Tensor, torch.Tensor] | None = None


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Draw one token per row.

    Args:
        logits: `[S, vocab]`, any float dtype; may be overwritten.
        batch: how to draw.

    Returns:
        int64 `[S]`; `INVALID_TOKEN` where the logits are not finite.
    """
    if batch.masked is not None:
        logits[batch.masked] = float("-inf")
    best, greedy = logits.max(dim=-1)
    # A NaN anywhere is the maximum; a row of -inf only has no token to offer.
    invalid = ~torch.isfinite(best)
    if batch.all_greedy:
        return greedy.masked_fill(invalid, INVALID_TOKEN)
    drawn = _draw(logits.float(), best.float(), batch)
    tokens = torch.where(batch.temperature > 0, drawn, greedy)
    return tokens.masked_fill(invalid, INVALID_TOKEN)


def _draw(logits: torch.Tensor, best: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    temperature = torch.where(batch.temperature > 0, batch.temperature, 1.0)[:, None]
    scaled = (logits - best[:, None]) / temperature
    threshold = _threshold(scaled, batch)
    race = scaled - torch.log(exponentials(batch.keys, logits.shape[1]))
    if threshold is not None:
        race = race.masked_fill(scaled < threshold[:, None], float("-inf"))
    return race.argmax(dim=-1)


def _threshold(scaled: torch.Tensor, batch: SamplingBatch) -> torch.Tensor | None:
    """The least scaled logit each row keeps, `[S]`; the largest of a row is 0."""
    threshold = None
    if batch.num_sorted:
        vocab = scaled.shape[1]
        if batch.num_sorted < vocab:
            # Behind top-k nothing else is left for top-p to look at.
            count = batch.num_sorted
            ordered = scaled.topk(count, dim=-1).values.flip(-1)
        else:
            count = vocab
            ordered = scaled.sort(dim=-1).values
        top_k = torch.where(batch.top_k > 0, batch.top_k.clamp(max=count), count)
        least = ordered.gather(1, (count - top_k)[:, None])
        # Ascending sums as transformers takes them: a token goes when it and all below it hold
        # at most 1 - top_p together; the likeliest one always stays.
        below = ordered.masked_fill(ordered < least, float("-inf")).softmax(dim=-1).cumsum(dim=-1)
        removed = below <= (1 - batch.top_p)[:, None]
        removed |= ordered < least
        first_kept = removed.sum(dim=-1, keepdim=True).clamp(max=count - 1)
        threshold = torch.where(batch.top_k > 0, least[:, 0], float("-inf"))
        threshold = torch.where(batch.top_p < 1, ordered.gather(1, first_kept)[:, 0], threshold)
    if batch.any_min_p:
        least_p = torch.log(batch.min_p)
        threshold = least_p if threshold is None else torch.maximum(threshold, least_p)
    return threshold
