"""The plan of a decode step: how its tiles are shared out, made on the device once for all layers.

Read `triton_decode` first: this is the line that its programs walk along.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from litecache.kernels.metadata import AttentionMetadata
from litecache.kernels.tuning import DecodeConfig

_LEAST_TILES = 2
"""What a pair counts for at least, because to begin one takes longer than a tile of a long one.

A step padded to its graph's bucket ends in rows of one token. Counted as one tile each, a hundred
of their pairs fell to one program, and every layer waited for it: 2.4 ms a step of 242 rows.
"""


@triton.jit(
    do_not_specialize=["num_seqs", "window", "num_programs"],
    do_not_specialize_on_alignment=["contexts_ptr", "starts_ptr"],
)
def _plan_kernel(
    contexts_ptr, starts_ptr, ends_ptr, owner_ptr, num_seqs, window, num_programs,
    TILE: tl.constexpr, SEQS_PAD: tl.constexpr, BLOCK_P: tl.constexpr, KV_HEADS: tl.constexpr,
    WINDOWED: tl.constexpr, CHUNK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Cumulative tiles per sequence, and the sequence in which each program's share begins."""
    seq = tl.arange(0, SEQS_PAD)
    real = seq < num_seqs
    context = tl.load(contexts_ptr + seq, mask=real, other=0)
    tiles = tl.cdiv(context, TILE)
    if WINDOWED:
        begin = tl.load(starts_ptr + seq, mask=real, other=0)
        end = tl.load(starts_ptr + seq + 1, mask=real, other=0)
        tiles -= tl.maximum(context - (end - begin) + 1 - window, 0) // TILE
    # An empty sequence has a place on the line, too, whose owner writes its zeros.
    tiles = tl.maximum(tiles, LEAST)
    if CHUNK > 0:
        tiles = tl.cdiv(tiles, CHUNK) * CHUNK
    tiles = tl.where(real, tiles, 0)
    ends = tl.cumsum(tiles, 0)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + 1 + seq, ends, mask=real)
        tl.store(ends_ptr, 0)
    share = CHUNK
    if CHUNK == 0:
        share = tl.cdiv(tl.sum(tiles, 0) * KV_HEADS, num_programs)
    program = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    before = (ends * KV_HEADS)[None, :] <= (program * share)[:, None]
    owner = tl.sum((before & real[None, :]).to(tl.int32), 1)
    tl.store(owner_ptr + program, owner, mask=program < num_programs)


@dataclass
class DecodePlan:
    """Device tensors of a step that all layers of the same shape share.

    Attributes:
        ends: int32 `[seqs + 1]`, tiles of one KV head up to each sequence.
        owner: int32 `[programs]`, the sequence in which each program's share begins.
        partial: float32 `[2 * programs, rows, v_pad]`, unnormalised sums of pieces.
        state: float32 `[2 * programs, rows, 2]`, their peaks and sums of weights.
        counter: int32 `[seqs * kv_heads]`, pieces of each pair that are done; 0 between layers.
    """

    ends: torch.Tensor
    owner: torch.Tensor
    partial: torch.Tensor
    state: torch.Tensor
    counter: torch.Tensor


def plan_decode(
    metadata: AttentionMetadata,
    seqs: slice,
    kv_heads: int,
    window: int | None,
    rows: int,
    v_pad: int,
    config: DecodeConfig,
    chunk: int,
) -> tuple[DecodePlan, bool]:
    """The step's shares, and whether this call made them: the first layer of a shape does."""
    name = ("decode", seqs.start, seqs.stop, kv_heads, window, rows, v_pad, config, chunk)
    plan: DecodePlan | None = metadata.scratch.get(name)
    fresh = plan is None
    if plan is None:
        device = metadata.context_lens.device
        programs = config.num_programs
        num_seqs = seqs.stop - seqs.start
        plan = metadata.scratch[name] = DecodePlan(
            ends=torch.empty(num_seqs + 1, dtype=torch.int32, device=device),
            owner=torch.empty(programs, dtype=torch.int32, device=device),
            partial=torch.empty(2 * programs * rows * v_pad, dtype=torch.float32, device=device),
            state=torch.empty(2 * programs * rows * 2, dtype=torch.float32, device=device),
            counter=torch.zeros(num_seqs * kv_heads, dtype=torch.int32, device=device),
        )
        seqs_pad = max(16, triton.next_power_of_2(num_seqs))
        block_p = max(1, min(64, 16384 // seqs_pad))
        _plan_kernel[(triton.cdiv(programs, block_p),)](
            metadata.context_lens[seqs], metadata.cu_seqlens_q[seqs.start :],
            plan.ends, plan.owner, num_seqs, window or 0, programs,
            TILE=config.block_n, SEQS_PAD=seqs_pad, BLOCK_P=block_p, KV_HEADS=kv_heads,
            WINDOWED=window is not None, CHUNK=chunk, LEAST=1 if chunk else _LEAST_TILES,
        )  # fmt: skip
    return plan, fresh
