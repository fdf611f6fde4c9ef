"""What a call gives back beside its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from litecache.adapter.pending import PendingRequest
from litecache.types import TokenLogprobs


@dataclass(frozen=True)
class ReuseReport:
    """What each row of a result reused: `.litecache` of a returned dict.

    Attributes:
        reused_tokens: per row, prompt tokens by tier that were not computed.
        ttft_s: per row, seconds from submission to the first token's arrival here.
        total_s: per row, seconds from submission to the last token's arrival.
        logprobs: per row and new token, with `logprobs=k`; else empty rows.
    """

    reused_tokens: tuple[dict[str, int], ...]
    ttft_s: tuple[float | None, ...]
    total_s: tuple[float | None, ...]
    logprobs: tuple[tuple[TokenLogprobs, ...], ...]

    @classmethod
    def of(cls, rows: Sequence[PendingRequest]) -> ReuseReport:
        """The report of finished requests."""

        def since_submission(row: PendingRequest, moment: float | None) -> float | None:
            return None if moment is None else moment - row.submitted_at

        return cls(
            tuple(row.reused_tokens for row in rows),
            tuple(since_submission(row, row.first_token_at) for row in rows),
            tuple(since_submission(row, row.finished_at) for row in rows),
            tuple(tuple(row.logprobs) for row in rows),
        )
