"""What a step hands out beside the tokens it draws: logits of a row's positions, or the
log-probabilities of the tokens that follow them. The numbers travel to the host behind the step's
event, as its tokens do."""

from __future__ import annotations

import torch

from litecache.engine.running.batch import Batch
from litecache.types import TokenLogprobs


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
