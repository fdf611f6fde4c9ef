"""Log-probabilities of drawn tokens and of the likeliest ones, computed where the logits lie.

They are the model's own: taken before rules, temperature and filters touch the logits. The numbers
travel to the host beside the step's tokens, behind the same event.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from litecache.types import TokenLogprobs


class LogprobRows:
    """The wanted rows of one step.

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
