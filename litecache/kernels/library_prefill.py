"""The library path of prefill: torch's cuDNN attention around a gathered prefix.

cuDNN's causal mask is aligned at the top left, so a chunk over a prefix takes several calls: its
own keys causally, the prefix without a mask, merged by their log-sum-exps. cuDNN also builds a
plan for every new pair of lengths (52 ms on an H200), so lengths are kept few: chunks are multiples
of `CHUNK_UNIT`, and the prefix is cut into pieces of two sizes. What is left of it goes, with the
chunk's own keys, to the Triton kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from litecache.kernels.metadata import Attention, AttentionMetadata, Geometry
from litecache.kernels.triton_prefill import merge_two, prefill
from litecache.kernels.triton_store import gather

MIN_QUERIES = 2048
"""Shortest chunk that is worth it: on an H200 530 against 335 TFLOP/s at 2,048 queries, but 313
against 366 at 1,024."""
CHUNK_UNIT = 1024
PIECES = (8192, 2048)
"""Sizes of the prefix pieces that cuDNN attends."""
QUERIES_A_PIECE = 1024
"""Each piece costs the host some ten launches: short chunks over many pieces wait for them (157
against 328 TFLOP/s at 2,048 queries over three pieces)."""


def suits(metadata: AttentionMetadata, first_seq: int, geometry: Geometry) -> bool:
    """Whether a step's sequences from `first_seq` on can and should take this path."""
    lens, contexts = metadata.query_lens, metadata.context_lens_host
    device, dim = metadata.context_lens.device, geometry.k_dim
    if first_seq == metadata.num_seqs or lens is None or contexts is None:
        return False
    if geometry.window is not None or dim % 8 or dim > 128 or geometry.v_dim != dim:
        return False
    return _has_library(device) and all(
        queries >= MIN_QUERIES
        and queries % CHUNK_UNIT == 0
        and context >= queries
        and len(_piece_ends(context - queries)) <= queries // QUERIES_A_PIECE
        for queries, context in zip(lens[first_seq:], contexts[first_seq:], strict=True)
    )


def _has_library(device: torch.device) -> bool:
    # Building a plan is not possible inside a capture.
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def plan_cases(most_queries: int, most_context: int) -> Iterator[tuple[int, int]]:
    """(prefix, queries) of chunks that make cuDNN build every plan that any chunk can ask for.

    Args:
        most_queries: tokens of the longest chunk.
        most_context: tokens of the longest sequence.
    """
    for queries in range(MIN_QUERIES, most_queries + 1, CHUNK_UNIT):
        room = most_context - queries
        prefixes = [sum(PIECES)]
        if sum(PIECES) > room or len(PIECES) > queries // QUERIES_A_PIECE:
            prefixes = list(PIECES)
        if queries <= MIN_QUERIES + CHUNK_UNIT:
            # With a remainder for the Triton kernel, alone and behind a piece. The shortest chunk
            # alone would not do: a graph may hold it, and takes another way.
            prefixes += [1, PIECES[-1] + 1]
        yield from ((prefix, queries) for prefix in (0, *prefixes) if prefix <= room)


def usable(layer: Attention) -> bool:
    """Whether the library does what a layer asks for."""
    return layer.bare and layer.query.dtype in (torch.float16, torch.bfloat16)


def attend(
    layer: Attention, metadata: AttentionMetadata, first_seq: int, out: torch.Tensor | None
) -> torch.Tensor:
    """Attends the sequences from `first_seq` on; `suits` and `usable` have said yes.

    Args:
        layer: see `litecache.kernels.paged_attention`.
        metadata: the step, with its host copies.
        first_seq: the first sequence to attend.
        out: `[T, num_heads, dim]`, or None if these are all sequences of the step.

    Returns:
        `out`, or what stands in for it when that saves a copy.
    """
    lens, contexts = metadata.query_lens, metadata.context_lens_host
    assert lens is not None
    assert contexts is not None
    start = sum(lens[:first_seq])
    for seq in range(first_seq, len(lens)):
        rows = slice(start, start + lens[seq])
        start += lens[seq]
        query, prefix = layer.query[rows], contexts[seq] - lens[seq]
        table = metadata.block_tables[seq]
        ends = _piece_ends(prefix)
        covered = ends[-1] if ends else 0
        if covered < prefix:
            own, own_lse = _remainder(layer._replace(query=query), metadata, seq, covered)
        else:
            if layer.key is not None and layer.value is not None and layer.k_scale is None:
                keys = [x[rows].transpose(0, 1).unsqueeze(0) for x in (layer.key, layer.value)]
            else:
                keys = _gathered(layer, table, prefix, contexts[seq])
            own, own_lse = _cudnn(query, keys, layer.scale, causal=True, lse=prefix > 0)
        if not ends and out is None and len(lens) == 1:
            return own
        if out is None:
            out = layer.output()
        for begin, end in zip([0, *ends], ends, strict=False):
            keys = _gathered(layer, table, begin, end)
            piece, lse = _cudnn(query, keys, layer.scale, causal=False, lse=True)
            merge_two(own, own_lse, piece, lse, out[rows] if end == covered else own)
            own_lse = torch.logaddexp(own_lse, lse)
        if not ends:
            out[rows] = own
    assert out is not None
    return out


def _gathered(layer: Attention, table: torch.Tensor, begin: int, end: int) -> list[torch.Tensor]:
    """Keys and values `begin .. end` of one sequence, each `[1, kv_heads, end - begin, dim]`."""
    sides = ((layer.k_cache, layer.k_scale), (layer.v_cache, layer.v_scale))
    return [
        gather(cache, scale, table, begin, end - begin, layer.query.dtype).unsqueeze(0)
        for cache, scale in sides
    ]


def _piece_ends(prefix: int) -> list[int]:
    """Where the pieces of a prefix end: the larger size first, the smaller one for the rest."""
    ends = [0]
    for size in PIECES:
        while ends[-1] + size <= prefix:
            ends.append(ends[-1] + size)
    return ends[1:]


def _remainder(
    layer: Attention, metadata: AttentionMetadata, seq: int, floor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence over its keys from `floor` on, by the Triton kernel, with log-sum-exps."""
    queries, num_heads, _ = layer.query.shape
    single = replace(
        metadata,
        block_tables=metadata.block_tables[seq : seq + 1],
        context_lens=metadata.context_lens[seq : seq + 1],
        cu_seqlens_q=metadata.cu_seqlens_q[seq : seq + 2] - metadata.cu_seqlens_q[seq],
        max_query_len=queries,
    )
    out = layer.query.new_empty(layer.query.shape)
    lse = torch.empty(num_heads, queries, dtype=torch.float32, device=out.device)
    prefill(layer, single, 0, out, floor=floor, lse=lse)
    return out, lse


def _cudnn(
    query: torch.Tensor,
    keys_and_values: Sequence[torch.Tensor],
    scale: float,
    *,
    causal: bool,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `[T, heads, dim]` and its log-sum-exps `[heads, T]` (unusable unless asked for)."""
    key, value = keys_and_values
    out, sums = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query.transpose(0, 1).unsqueeze(0), key, value, None, lse, 0.0, causal, False, scale=scale
    )[:2]
    return out[0].transpose(0, 1), sums.view(sums.shape[1], -1) if lse else sums
