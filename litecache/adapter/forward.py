"""Forward passes on the replicas: logits of rows of tokens, each computed from what is cached.

A forward pass is a request whose logits are asked for (`Request.logits`). It carries all tokens of
its row, so that nothing about a row has to live in a replica: what was forwarded before is found in
the pool, to the token, and a replica that was lost only computes again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from litecache.adapter.pending import PendingRequest, aborting
from litecache.adapter.prompts import split_rows
from litecache.adapter.replicas import ReplicaSet
from litecache.engine.engine_info import EngineInfo
from litecache.token_ids import TokenIds
from litecache.types import Request, TokenLogprobs


class Forward(Protocol):
    """Forward passes over rows of tokens.

    Attributes:
        vocab_size: width of the logits.
        dtype: of the logits.
    """

    vocab_size: int
    dtype: torch.dtype

    def __call__(self, rows: Sequence[TokenIds], wanted: Sequence[int]) -> list[torch.Tensor]:
        """The logits of the last positions of each row.

        Args:
            rows: all tokens of each row, without padding.
            wanted: of how many of its last positions, at least one.

        Returns:
            Per row `[wanted, vocab_size]` on the CPU.
        """
        ...


class ReplicaForward:
    """Forward passes of one call of the user's, all on the replica that suits its first row.

    Args:
        replicas: of the group.
        info: the engine's.
        request_of: makes the request for a row and the number of its last positions, with the
            number of likeliest tokens whose log-probabilities are wanted instead of logits; None =
            logits are.

    Attributes:
        vocab_size: width of the logits.
        dtype: of the logits.
        requests: how many were sent.
        first_pass: the requests of the first forward pass, one for each row.
    """

    def __init__(
        self,
        replicas: ReplicaSet,
        info: EngineInfo,
        request_of: Callable[[TokenIds, int, int | None], Request],
    ) -> None:
        self.vocab_size = info.vocab_size
        self.dtype: torch.dtype = getattr(torch, info.dtype)
        self.requests = 0
        self.first_pass: list[PendingRequest] = []
        self._replicas = replicas
        self._info = info
        self._request_of = request_of
        self._index: int | None = None

    def __call__(self, rows: Sequence[TokenIds], wanted: Sequence[int]) -> list[torch.Tensor]:
        """See `Forward`; what is more than a message holds is asked for in several rounds.

        Raises:
            LiteCacheError: a request is refused or failed; none is left open.
        """
        most = self._info.max_logits
        if max(wanted, default=0) > most:  # else a row is whole in the first round
            for row in rows:
                self._info.check(self._request_of(row, 1, None))
        starts = [len(row) - count for row, count in zip(rows, wanted, strict=True)]
        parts: list[list[torch.Tensor]] = [[] for _ in rows]
        open_rows = list(range(len(rows)))
        while open_rows:
            ends = [min(len(rows[i]), starts[i] + most) for i in open_rows]
            requests = [
                self._request_of(rows[i][:end], end - starts[i], None)
                for i, end in zip(open_rows, ends, strict=True)
            ]
            for i, end, done in zip(open_rows, ends, self._run(requests), strict=True):
                parts[i].append(self._tensor(done, end - starts[i]))
                starts[i] = end
            open_rows = [i for i in open_rows if starts[i] < len(rows[i])]
        return [part[0] if len(part) == 1 else torch.cat(part) for part in parts]

    def logprobs(
        self, rows: Sequence[TokenIds], wanted: Sequence[int], top: int
    ) -> list[tuple[TokenLogprobs, ...]]:
        """Log-probabilities of the tokens behind the last positions of each row.

        Args:
            rows, wanted: as in a call.
            top: also of so many of the likeliest.

        Returns:
            Per row one for each position; at the last one that of the likeliest token.
        """
        requests = [
            self._request_of(row, count, top) for row, count in zip(rows, wanted, strict=True)
        ]
        return [tuple(done.logprobs) for done in self._run(requests)]

    def _run(self, requests: Sequence[Request]) -> list[PendingRequest]:
        for request in requests:
            self._info.check(request)
        pollers = self._replicas.by_index
        if self._index not in pollers or pollers[self._index].silent_since is not None:
            (self._index,) = self._replicas.route(requests[:1])
        pending = [PendingRequest(request) for request in requests]
        self.requests += len(pending)
        with aborting(pending, self._replicas.abort):
            self._replicas.submit(pending, self._index)
            for row in pending:
                row.wait()
        self.first_pass = self.first_pass or pending
        return pending

    def _tensor(self, done: PendingRequest, count: int) -> torch.Tensor:
        assert done.logits is not None
        return logits_tensor(done.logits, count, self.vocab_size, self.dtype)


def logits_tensor(data: bytes, count: int, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """`TokenDelta.logits` as `[count, vocab_size]`: of the model's dtype, or of float32 where the
    model gives logits in that."""
    if len(data) != count * vocab_size * dtype.itemsize:
        dtype = torch.float32
    # frombuffer wants memory that may be written to
    return torch.frombuffer(bytearray(data), dtype=dtype).view(count, vocab_size)


def row_logits(
    forward: Forward, input_ids: torch.Tensor, mask: torch.Tensor | None, keep: int
) -> torch.Tensor:
    """Logits of the last `keep` columns of padded rows, or of all with 0.

    Args:
        forward: computes them.
        input_ids: int64 `[batch, tokens]`.
        mask: `[batch, tokens]`, nonzero = a token; None = all are.
        keep: columns.

    Returns:
        `[batch, kept, vocab_size]`; zeros where there is padding.

    Raises:
        ConfigError: the mask has another shape, or leaves a row empty.
    """
    batch, width = input_ids.shape
    rows = split_rows(input_ids, mask, None)
    there = torch.ones_like(input_ids) if mask is None else mask.cpu()
    there = (there != 0)[:, width - (keep or width) :]
    # behind the kept columns there are none: those of a row that are kept are its last ones
    counts = there.sum(dim=1).tolist()
    wanted = [index for index, count in enumerate(counts) if count]
    found = forward([rows[index] for index in wanted], [counts[index] for index in wanted])
    dtype = found[0].dtype if found else forward.dtype
    shape = (batch, there.shape[1], forward.vocab_size)
    logits = torch.zeros(shape, dtype=dtype, device="cpu")
    for index, own in zip(wanted, found, strict=True):
        logits[index, there[index]] = own
    return logits


def prompt_logprobs_of(
    forward: ReplicaForward, prompts: Sequence[TokenIds], firsts: Sequence[int], top: int
) -> list[tuple[TokenLogprobs, ...]]:
    """Log-probabilities of each prompt's tokens from index `firsts` on, and of the `top` likeliest
    in their places."""
    wanted = [len(prompt) - first for prompt, first in zip(prompts, firsts, strict=True)]
    asked = [index for index, count in enumerate(wanted) if count]
    rows = [prompts[index] for index in asked]
    # the position in front of the first token is the one that predicts it
    told = forward.logprobs(rows, [wanted[index] + 1 for index in asked], top) if asked else []
    found: list[tuple[TokenLogprobs, ...]] = [()] * len(prompts)
    for index, each in zip(asked, told, strict=True):
        found[index] = each[:-1]
    return found
