"""Draws the next tokens of a mixed batch, and hands out what else is asked of its logits.

Greedy rows and sampling rows are one pass. The filters have the meaning and the order of
transformers' warpers (temperature, top-k, top-p, min-p), written as one threshold per row. A token
is drawn by an exponential race: the kept token with the largest `p / e` wins, `e` being exponential
numbers of a counter-based generator: each number is a function of its key and counter alone. The
finaliser is that of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
OOPSLA 2014), applied to `key + (counter + 1) * golden`. So a draw depends on (seed, sample index,
position, purpose) and on nothing of the batch, the device or the history. Keys are made on the host
with numpy, numbers where the logits are, with the same integers.

What is handed out travels to the host behind the step's event, as its tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from litecache.engine.running.batch import Batch
from litecache.types import TokenLogprobs

INVALID_TOKEN = -1
PURPOSE_TOKEN = 1
"""The draw of a token; other purposes get other, independent numbers."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def sample(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Draw one token per row.

    Args:
        logits: `[S, vocab]`, any float dtype; may be overwritten.
        batch: how to draw.

    Returns:
        int64 `[S]`; `INVALID_TOKEN` where the logits are not finite.
    """
    strike(logits, batch)
    best, greedy = logits.max(dim=-1)
    # A NaN anywhere is the maximum; a row of -inf only has no token to offer.
    invalid = ~torch.isfinite(best)
    if batch.all_greedy:
        return greedy.masked_fill(invalid, INVALID_TOKEN)
    drawn = _draw(logits.float(), best.float(), batch)
    tokens = torch.where(batch.fields["temperature"] > 0, drawn, greedy)
    return tokens.masked_fill(invalid, INVALID_TOKEN)


def strike(logits: torch.Tensor, batch: Batch) -> None:
    """Take the tokens that a sample cannot draw out of its logits."""
    if batch.masked:
        pairs = torch.from_numpy(np.array(batch.masked, dtype=np.int64).T.copy())
        # A blocking copy would wait for the step before, which is still running.
        rows, tokens = pairs.to(logits.device, non_blocking=True)
        logits[rows, tokens] = float("-inf")
    if batch.allowed:
        _keep(logits, batch.allowed)


def _keep(logits: torch.Tensor, allowed: Sequence[tuple[int, bytes]]) -> None:
    """Strike all tokens out but those of the bitmaps; nothing waits for the device."""
    size, vocab = len(allowed), logits.shape[1]
    joined = np.frombuffer(b"".join(mask for _, mask in allowed), dtype=np.uint8)
    packed = torch.from_numpy(joined.reshape(size, -1).copy())
    rows = torch.tensor([row for row, _ in allowed]).to(logits.device, non_blocking=True)
    packed = packed.to(logits.device, non_blocking=True)
    # a bitmap's words are little-endian, so that byte by byte the order of its bits is the same
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1
    struck = torch.ones((size, vocab), dtype=torch.bool, device=logits.device)
    width = min(vocab, 8 * packed.shape[1])
    struck[:, :width] = bits.view(size, -1)[:, :width] == 0
    scores = logits.index_select(0, rows).masked_fill_(struck, float("-inf"))
    logits.index_copy_(0, rows, scores)


def _draw(logits: torch.Tensor, best: torch.Tensor, batch: Batch) -> torch.Tensor:
    wanted = batch.fields["temperature"]
    temperature = torch.where(wanted > 0, wanted, 1.0)[:, None]
    scaled = (logits - best[:, None]) / temperature
    threshold = _threshold(scaled, batch)
    race = scaled - torch.log(exponentials(batch.fields["keys"], logits.shape[1]))
    if threshold is not None:
        race = race.masked_fill(scaled < threshold[:, None], float("-inf"))
    return race.argmax(dim=-1)


def _threshold(scaled: torch.Tensor, batch: Batch) -> torch.Tensor | None:
    """The least scaled logit each row keeps, `[S]`; the largest of a row is 0."""
    top_k, top_p = batch.fields["top_k"], batch.fields["top_p"]
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
        kept = torch.where(top_k > 0, top_k.clamp(max=count), count)
        least = ordered.gather(1, (count - kept)[:, None])
        # Ascending sums as transformers takes them: a token goes when it and all below it hold
        # at most 1 - top_p together; the likeliest one always stays.
        below = ordered.masked_fill(ordered < least, float("-inf")).softmax(dim=-1).cumsum(dim=-1)
        removed = below <= (1 - top_p)[:, None]
        removed |= ordered < least
        first_kept = removed.sum(dim=-1, keepdim=True).clamp(max=count - 1)
        threshold = torch.where(top_k > 0, least[:, 0], float("-inf"))
        threshold = torch.where(top_p < 1, ordered.gather(1, first_kept)[:, 0], threshold)
    if batch.any_min_p:
        least_p = torch.log(batch.fields["min_p"])
        threshold = least_p if threshold is None else torch.maximum(threshold, least_p)
    return threshold


class LogprobRows:
    """Log-probabilities of the drawn tokens and of the likeliest ones, of a step's samples.

    They are the model's own: taken before rules, temperature and filters touch the logits. The
    numbers travel to the host beside the step's tokens, behind the same event.

    Args:
        logits: `[S, vocab]`, before anything changed them.
        wanted: (place among the samples, how many of the likeliest), at least one.
    """

    def __init__(self, logits: torch.Tensor, wanted: Sequence[tuple[int, int]]) -> None:
        self._wanted = tuple(wanted)
        places = torch.tensor([place for place, _ in wanted])
        self._places = places.to(logits.device, non_blocking=True)
        scores = logits.index_select(0, self._places).float()
        self._logprobs = torch.log_softmax(scores, dim=-1)
        count = min(max(count for _, count in wanted), logits.shape[1])
        self._top = self._logprobs.topk(count, dim=-1)
        self._host: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def send(self, tokens: torch.Tensor) -> None:
        """Start the copy to the host for the drawn tokens, int64 `[>= S]`."""
        drawn = tokens.index_select(0, self._places).clamp(min=0)
        chosen = self._logprobs.gather(1, drawn[:, None])[:, 0]
        values, indices = self._top
        self._host = (
            chosen.to("cpu", non_blocking=True),
            values.to("cpu", non_blocking=True),
            indices.to("cpu", non_blocking=True),
        )

    def read(self) -> dict[int, TokenLogprobs]:
        """By place among the samples; only after the step's event has passed."""
        assert self._host is not None
        found = {}
        rows = zip(self._wanted, *(part.tolist() for part in self._host), strict=True)
        for (place, count), chosen, values, indices in rows:
            top = tuple(zip(indices[:count], values[:count], strict=True))
            found[place] = TokenLogprobs(chosen, top)
        return found


class HandedOut:
    """A step's logits on their way to the host.

    Args:
        logits: `[S, vocab]`, of the samples and, behind them, of the positions that
            `Batch.handed_out` names.
        batch: the step.
        vocab_size: what lies behind is padding of the model's.
    """

    def __init__(self, logits: torch.Tensor, batch: Batch, vocab_size: int) -> None:
        self._logits: dict[int, torch.Tensor] = {}
        self._logprobs: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._top: dict[int, int] = {}
        for place, first, count in batch.handed_out:
            own = logits[first : first + count, :vocab_size]
            if place not in batch.following:
                self._logits[place] = own.contiguous().to("cpu", non_blocking=True)
                continue
            tokens, self._top[place] = batch.following[place]
            scores = torch.log_softmax(own.float(), dim=-1)
            top = scores.topk(min(max(1, self._top[place]), scores.shape[1]), dim=-1)
            known = torch.from_numpy(tokens).to(logits.device, non_blocking=True)
            known = torch.where(known < 0, top.indices[:, 0], known)
            self._logprobs[place] = (
                scores.gather(1, known[:, None])[:, 0].to("cpu", non_blocking=True),
                top.values.to("cpu", non_blocking=True),
                top.indices.to("cpu", non_blocking=True),
            )

    def logits(self) -> dict[int, bytes]:
        """`[count, vocab]` as bytes, by place in the plan; only after the step's event."""
        return {
            place: own.view(torch.uint8).numpy().tobytes() for place, own in self._logits.items()
        }

    def logprobs(self) -> dict[int, tuple[TokenLogprobs, ...]]:
        """One for each position, by place in the plan; only after the step's event."""
        return {
            place: tuple(
                TokenLogprobs(
                    chosen,
                    tuple(zip(indices, values, strict=True))[: self._top[place]],
                )
                for chosen, values, indices in zip(*(part.tolist() for part in parts), strict=True)
            )
            for place, parts in self._logprobs.items()
        }


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mix(word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(_MIX_1)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(_MIX_2)
    mixed: npt.NDArray[np.uint64] = word ^ (word >> np.uint64(31))
    return mixed


def stream_keys(
    seed: npt.NDArray[np.int64],
    sample_index: npt.NDArray[np.int64],
    purpose: int = PURPOSE_TOKEN,
) -> npt.NDArray[np.int64]:
    """The part of a draw's key that all positions of a sequence share."""
    word = _mix(np.full(len(seed), purpose, dtype=np.uint64) * np.uint64(_GOLDEN))
    for part in (seed, sample_index):
        word = _absorb(word, part)
    return word.view(np.int64)


def position_keys(
    stream: npt.NDArray[np.int64], position: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The keys of one position in each of several sequences."""
    return _absorb(stream.view(np.uint64), position).view(np.int64)


def _absorb(word: npt.NDArray[np.uint64], part: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    golden = np.uint64(_GOLDEN)
    return _mix((word + part.astype(np.uint64)) * golden + golden)


def random_bits(keys: torch.Tensor, count: int) -> torch.Tensor:
    """32 random bits per key and counter.

    Args:
        keys: int64 `[n]`.
        count: numbers per key.

    Returns:
        int64 `[n, count]` in `[0, 2**32)`, equal on every device.
    """
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device)
    word = keys[:, None] + counter * _signed(_GOLDEN)
    # int64 shifts drag the sign along: the masks make them logical.
    word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1)
    word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2)
    word = word ^ ((word >> 31) & ((1 << 33) - 1))
    return (word >> 32) & 0xFFFFFFFF


def exponentials(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Exponentially distributed numbers, float32 `[n, count]`, for keys int64 `[n]`."""
    bits = random_bits(keys, count)
    # Small numbers decide an exponential race, so the fine end of float32 lies there.
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp_(max=1 - 2.0**-24))
