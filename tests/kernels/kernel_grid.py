"""The grids that the interpreter (tiny) and the GPU walk; one oracle answers for both."""

from __future__ import annotations

import torch
from kernel_cases import Case

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def tolerance(case: Case) -> float:
    """Error a head may show; quantised pools are computed in float16 on the GPU."""
    return _TOLERANCE[case.dtype] if case.pool_dtype is None else max(2e-3, _TOLERANCE[case.dtype])


TINY = [
    Case((1, 1, 1), (1, 17, 40)),
    Case((1, 1, 1), (0, 5, 33)),
    Case((1, 4, 3), (20, 4, 33)),
    Case((1,) * 8, (70, 1, 1, 1, 0, 1, 1, 0)),  # as a step padded to its graph's bucket
    Case((1,) * 5, (40, 1, 0, 1, 1), pool_dtype=torch.int8, sinks=True),
    Case((1, 20), (9, 37)),
    Case((1, 20), (9, 20), own_kv=True),
    Case((1, 1, 20), (9, 30, 37), window=6),
    Case((1, 1), (30, 37), window=16),
    Case((1, 20), (9, 37), softcap=2.0, sinks=True, alibi=True),
    Case((1, 1), (9, 37), heads=(9, 3), dims=(24, 8), softcap=2.0, sinks=True, alibi=True),
    Case((1, 20), (9, 37), block_size=32, dtype=torch.bfloat16),
    Case((1, 20), (9, 37), dtype=torch.float16, pool_dtype=torch.int8),
    Case((3, 3), (5, 18), heads=(2, 1), pool_dtype=torch.int8, window=9),
    Case((1, 5, 30), (9, 21, 37)),  # cut into pieces, and too long for that
    Case((30, 5), (30, 12), softcap=2.0, sinks=True, alibi=True),
]

PIECES = [  # few row tiles over keys enough to cut them
    Case((1, 20, 7), (9, 70, 50)),
    Case((5, 30, 1, 9), (60, 37, 40, 50), heads=(2, 1)),
    Case((17, 9), (17, 0)),  # no prefix, and no context
    Case((1, 18, 9), (9, 60, 9), window=30),
    Case((19, 3), (90, 77), heads=(2, 1), softcap=2.0, sinks=True, alibi=True, window=60),
    Case((17,), (70,), heads=(6, 2), dims=(24, 8), block_size=32, dtype=torch.bfloat16),
    Case((20, 18), (40, 60), heads=(2, 2), dtype=torch.float16, pool_dtype=torch.int8),
    Case((17,), (60,), heads=(2, 1), pool_dtype=torch.float8_e4m3fn, sinks=True),
]

_RAGGED = (1, 15, 16, 17, 129, 1000, 4097)
_CHUNKS = (1, 1, 17, 64, 130, 300)
_BEHIND = (40, 1000, 17, 100, 2000, 300)
_QUESTIONS = (1, 64, 17, 300, 1), (900, 9000, 5000, 6000, 40)
LARGE = [
    *(Case(*_QUESTIONS, heads=heads, dims=(dim, dim), block_size=16, dtype=dtype, **extra)
      for heads in ((8, 2), (9, 3), (4, 4), (16, 1))
      for dim, dtype in ((128, torch.bfloat16), (64, torch.float16), (80, torch.float32))
      for extra in ({}, {"window": 3000, "softcap": 3.0, "sinks": True})),
    *(Case(*_QUESTIONS, heads=(8, 2), dims=(dim, dim), block_size=16, dtype=torch.bfloat16,
           pool_dtype=pool) for dim in (64, 128) for pool in (torch.int8, torch.float8_e4m3fn)),
    Case((64,), (131072,), heads=(8, 2), dims=(128, 128), block_size=16, dtype=torch.bfloat16),
    Case((600, 5000, 64), (600, 6000, 9000), heads=(8, 2), dims=(128, 128), block_size=16,
         dtype=torch.bfloat16),
    *(Case((1,) * 7, _RAGGED, heads=heads, dims=(128, 128), block_size=16, dtype=torch.bfloat16)
      for heads in ((32, 8), (8, 8), (12, 1), (9, 3), (128, 1), (5, 5))),
    *(Case((1,) * 7, _RAGGED, dims=(dim, dim), block_size=16, dtype=dtype)
      for dim in (64, 80, 96, 112, 192, 256)
      for dtype in (torch.bfloat16, torch.float32)),
    *(Case(_CHUNKS, _BEHIND, dims=(dim, dim), block_size=16, dtype=dtype, own_kv=True)
      for dim in (64, 80, 128, 192, 256)
      for dtype in (torch.bfloat16, torch.float32)),
    *(Case(_CHUNKS, _BEHIND, heads=(8, 2), dims=(64, 64), block_size=size, dtype=torch.float16)
      for size in (8, 32, 64, 128, 256)),
    *(Case((1,) * 7, _RAGGED, heads=(8, 2), dims=(64, 64), block_size=size, dtype=torch.float16)
      for size in (8, 32, 64, 128, 256)),
    *(Case((count,) * 4, (16, 17, 300, 4097), heads=(32, 8), dims=(128, 128), block_size=16,
           dtype=torch.bfloat16) for count in (2, 4, 8, 16)),
    Case((1, 1, 0, 1), (0, 40, 0, 7), dims=(128, 128), dtype=torch.bfloat16),
    Case((1,), (131073,), heads=(8, 2), dims=(128, 128), block_size=16, dtype=torch.bfloat16),
    Case((1, 1), (131073, 5), heads=(3, 3), dims=(64, 64), block_size=16),
    Case((1, 40), (16, 5000), heads=(8, 2), dims=(192, 128), block_size=16, dtype=torch.bfloat16),
    *(Case(queries, contexts, heads=(8, 4), dims=(64, 64), block_size=16, dtype=dtype, **extra)
      for queries, contexts in (((1,) * 7, _RAGGED), ((8, 8), (30, 2000)), (_CHUNKS, _BEHIND))
      for dtype in (torch.bfloat16, torch.float32)
      for extra in ({"window": 100}, {"softcap": 3.0}, {"sinks": True}, {"alibi": True},
                    {"window": 1}, {"window": 500, "softcap": 3.0, "sinks": True})),
    *(Case(queries, contexts, heads=(8, 2), dims=(dim, dim), block_size=16, dtype=torch.bfloat16,
           pool_dtype=pool, window=window)
      for queries, contexts in (((1,) * 7, _RAGGED), ((8, 8), (30, 2000)), (_CHUNKS, _BEHIND))
      for pool in (torch.int8, torch.float8_e4m3fn)
      for dim, window in ((128, None), (64, 100))),
]  # fmt: skip
