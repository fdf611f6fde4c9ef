"""The steps that a runner executes before the first request, so that none compiles anything.

What is compiled for a step follows from its sizes: Triton's kernels from powers of two (tiles of
tokens, sequences and rows, and the limits between kernels are such), the library's plans from a
chunk's exact length and its prefix. These steps have one of each. All rows' block tables hold the
trash block, so they read and write it alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from litecache.engine.scheduling.step_plan import BlockCopy, NewRow, RowStep, StepPlan
from litecache.kernels import TRASH_BLOCK
from litecache.token_ids import TokenIds
from litecache.types import SamplingParams

Segments = list[tuple[int, int]]
"""Start and number of tokens, a row each."""

_DRAWN = (
    SamplingParams(1, temperature=1.0, top_k=8, logprobs=1),
    SamplingParams(1, temperature=1.0, top_p=0.9, min_p=0.1),
)
"""What the drawing kernels leave to torch."""


def warm_steps(
    max_requests: int, max_tokens: int, max_model_len: int, num_groups: int
) -> Iterator[StepPlan]:
    """Plans whose results are to be dropped.

    Args:
        max_requests: rows of the engine.
        max_tokens: most tokens of a step.
        max_model_len: longest sequence in tokens.
        num_groups: KV groups; each has a block copied.
    """
    # Triton is imported where a GPU is known to be there.
    from litecache.kernels.library_prefill import plan_cases

    requests, longest = sizes(max_requests), min(max_tokens, max_model_len)
    chunks = [size for size in sizes(longest) if size > 1]
    cases: list[Segments] = [[(0, 1)] * count for count in requests]
    cases += [[(0, chunk)] for chunk in chunks]
    # Short questions: rows of a tile are their tokens times heads.
    cases += [[(0, queries)] * count for queries in (2, 4, 8, 16) for count in requests]
    # Several chunks, short ones and such as fill a step: they are cut by the number of all.
    cases += [
        [(0, size)] * count for count in requests[2:] for size in (17, 65, max_tokens // count)
    ]
    # Beside a chunk that no graph holds, decodes take kernels by their own number.
    cases += [[(0, 1)] * count + [(0, chunk)] for count in requests for chunk in chunks[-1:]]
    # Many chunks in a step: of many short prompts, and of a few long ones.
    cases += [[(0, size)] * min(max_requests, max(1, max_tokens // size)) for size in (17, 1024)]
    cases += [[case] for case in plan_cases(longest, max_model_len)]
    copies = tuple(BlockCopy(group, TRASH_BLOCK, TRASH_BLOCK) for group in range(num_groups))
    for case in cases:
        start, count = max(case)
        if 0 < start + count <= max_model_len and sum(n for _, n in case) <= max_tokens:
            yield _plan(case, SamplingParams(1), copies)
            copies = ()
    for sampling, count in itertools.product(_DRAWN, (1, max_requests)):
        yield _plan([(0, 1)] * min(count, max_tokens), sampling)


def sizes(most: int) -> list[int]:
    """1, 2 and one more than each power of two from 16 on: one of all sizes padded alike."""
    powers = (1 << power for power in range(4, most.bit_length()))
    return [size for size in (1, 2, *(power + 1 for power in powers)) if size <= most]


def _plan(case: Segments, sampling: SamplingParams, copies: tuple[BlockCopy, ...] = ()) -> StepPlan:
    rows, news = [], []
    for row, (start, count) in enumerate(case):
        tokens = TokenIds(np.zeros(start + count, dtype=np.int64))
        news.append(NewRow(row, tokens, start + count, sampling))
        rows.append(RowStep(row, start, count, 1))
    return StepPlan(0, tuple(news), copies=copies, rows=tuple(rows))
