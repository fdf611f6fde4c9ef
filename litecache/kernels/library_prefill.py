"""The library path of prefill: torch's cuDNN attention around a gathered prefix.

cuDNN's causal mask is aligned at the top left, so a chunk over a prefix takes several calls: its
own keys causally, the prefix without a mask, merged by their log-sum-exps. cuDNN also builds a
plan for every new pair of lengths (52 ms on an H200), so lengths are kept few: chunks are multiples
of `CHUNK_UNIT`, and the prefix is cut into pieces of two sizes. What is left of it goes, with the
chunk's own keys, to the Triton kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from litecache.kernels.metadata import AttentionMetadata
from litecache.kernels.triton_gather import gather, merge_two
from litecache.kernels.triton_prefill import prefill
from litecache.kernels.tuning import prefill_config

MIN_QUERIES = 2048
"""Shortest chunk that is worth it: on an H200 530 against 335 TFLOP/s at 2,048 queries, but 313
against 366 at 1,024."""
CHUNK_UNIT = 1024
PIECES = (8192, 2048)
"""Sizes of the prefix pieces that cuDNN attends."""
QUERIES_A_PIECE = 1024
"""Each piece costs the host some ten launches: short chunks over many pieces wait for them (157
against 328 TFLOP/s at 2,048 queries over three pieces)."""


def usable(
    query: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    first_seq: int,
    *,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> bool:
    """Whether the sequences from `first_seq` on can and should take this path."""
    lens, contexts = metadata.query_lens, metadata.context_lens_host
    if lens is None or contexts is None or not query.is_cuda:
        return False
    if window is not None or softcap is not None or sinks is not None or alibi_slopes is not None:
        return False
    dim = query.shape[2]
    if query.dtype not in (torch.float16, torch.bfloat16) or v_cache.shape[3] != dim:
        return False
    if dim % 8 or dim > 128 or torch.cuda.get_device_capability(query.device) < (9, 0):
        return False
    regular = all(
        queries >= MIN_QUERIES
        and queries % CHUNK_UNIT == 0
        and context >= queries
        and len(list(_piece_ends(context - queries))) <= queries // QUERIES_A_PIECE
        for queries, context in zip(lens[first_seq:], contexts[first_seq:], strict=True)
    )
    # Building a plan is not possible inside a capture.
    return regular and not torch.cuda.is_current_stream_capturing()


def attend(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    first_seq: int,
    out: torch.Tensor | None,
    *,
    scale: float,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Attends the sequences from `first_seq` on; `usable` has said yes.

    Args:
        query: `[T, num_heads, dim]`.
        k_cache: `[num_blocks, kv_heads, block_size, dim]`.
        v_cache: likewise.
        metadata: the step, with its host copies.
        first_seq: the first sequence to attend.
        out: `[T, num_heads, dim]`, or None if these are all sequences of the step.
        scale: factor of the scores.
        key: the step's own keys `[T, kv_heads, dim]`, or None to read them back.
        value: likewise.
        k_scale: scales of a quantised pool.
        v_scale: likewise.

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
        prefix = contexts[seq] - lens[seq]
        paged = _Paged(k_cache, v_cache, k_scale, v_scale, metadata.block_tables[seq], query.dtype)
        ends = list(_piece_ends(prefix))
        covered = ends[-1] if ends else 0
        if covered < prefix:
            own, own_lse = _remainder(
                query[rows], k_cache, v_cache, metadata, seq, covered, scale, k_scale, v_scale
            )
        else:
            if key is not None and value is not None and k_scale is None:
                keys = tuple(x[rows].transpose(0, 1).unsqueeze(0) for x in (key, value))
            else:
                keys = paged.gather(prefix, contexts[seq])
            own, own_lse = _cudnn(query[rows], keys, scale, causal=True, lse=prefix > 0)
        if not ends and out is None and len(lens) == 1:
            return own
        if out is None:
            out = query.new_empty(query.shape)
        for begin, end in zip([0, *ends], ends, strict=False):
            piece, lse = _cudnn(
                query[rows], paged.gather(begin, end), scale, causal=False, lse=True
            )
            target = out[rows] if end == covered else own
            merge_two(own, own_lse, piece, lse, target)
            own_lse = torch.logaddexp(own_lse, lse)
        if not ends:
            out[rows] = own
    assert out is not None
    return out


class _Paged:
    """One sequence's tokens in the pool."""

    def __init__(
        self,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
        table: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._sides = ((k_cache, k_scale), (v_cache, v_scale))
        self._table, self._dtype = table, dtype

    def gather(self, begin: int, end: int) -> tuple[torch.Tensor, ...]:
        """Keys and values `begin .. end`, each `[1, kv_heads, end - begin, dim]`."""
        return tuple(
            gather(cache, scale, self._table, begin, end - begin, self._dtype).unsqueeze(0)
            for cache, scale in self._sides
        )


def _piece_ends(prefix: int) -> Iterator[int]:
    """Where the pieces of a prefix end: the larger size first, the smaller one for the rest."""
    end = 0
    for size in PIECES:
        while end + size <= prefix:
            end += size
            yield end


def _remainder(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    seq: int,
    floor: int,
    scale: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence over its keys from `floor` on, by the Triton kernel, with log-sum-exps."""
    queries, num_heads, dim = query.shape
    device = query.device
    single = AttentionMetadata(
        slot_mapping=metadata.slot_mapping,
        block_tables=metadata.block_tables[seq : seq + 1],
        context_lens=metadata.context_lens[seq : seq + 1],
        cu_seqlens_q=metadata.cu_seqlens_q[seq : seq + 2] - metadata.cu_seqlens_q[seq],
        block_size=metadata.block_size,
        max_query_len=queries,
        max_context_len=metadata.max_context_len,
    )
    out = query.new_empty(query.shape)
    lse = torch.empty(num_heads, queries, dtype=torch.float32, device=device)
    prefill(
        query, k_cache, v_cache, single, 0, out,
        prefill_config(device, dim, k_cache.dtype.itemsize),
        scale=scale, window=None, softcap=None, sinks=None, alibi_slopes=None,
        k_scale=k_scale, v_scale=v_scale, floor=floor, lse=lse,
    )  # fmt: skip
    return out, lse


def _cudnn(
    query: torch.Tensor,
    keys_and_values: tuple[torch.Tensor, ...],
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
