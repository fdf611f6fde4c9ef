"""CUDA graphs of whole steps, by bucket: the host launches one thing instead of hundreds.

A step is padded to the next bucket: decodes up to a batch size, a chunk's tokens up to a token
count. Padded decodes read and write the trash block, padded tokens belong to no sequence. Graphs
are captured by the runner's `warm_up` (or when a bucket is first needed), share one memory pool,
and read all inputs from the step buffers in place.
"""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from litecache.engine.loading.model_loader import LoadedModel

logger = logging.getLogger(__name__)

FUSED_GRAPH_TOKENS, MAX_GRAPH_TOKENS = 1024, 2048
_LAUNCH_S = 1e-3
"""What the host takes to launch a fused layer with the library's attention, and some more."""
_FLOPS = 6e14
"""What a Hopper GPU computes in bfloat16 per second: an order of magnitude is enough here."""
_MIXED_DECODES = (0, 16, 64, 256)
_CHUNK_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048)
_CHUNK_SEQS = (4, 32)


def longest_graph(loaded: LoadedModel) -> int:
    """Longest chunk in tokens that a model replays as a graph.

    Only outside a graph may attention choose its kernel by length, so where the GPU takes longer
    to run a fused layer over a long chunk than the host takes to launch it, such chunks go
    without. A small model, and one whose layers are not fused, would wait for the host.
    """
    if "fused" not in loaded.passes:
        return MAX_GRAPH_TOKENS
    model = loaded.model
    layers = len(loaded.specs)
    outside = model.get_input_embeddings().weight.numel() * 2
    weights = max(0, sum(p.numel() for p in model.parameters()) - outside)
    layer_s = 2 * weights / layers * MAX_GRAPH_TOKENS / _FLOPS
    return FUSED_GRAPH_TOKENS if layer_s > _LAUNCH_S else MAX_GRAPH_TOKENS


class GraphKey(NamedTuple):
    """What a graph was captured for.

    Attributes:
        decodes: sequences of one token, which come first.
        chunk_tokens: tokens of all longer sequences together.
        chunk_seqs: number of those.
    """

    decodes: int
    chunk_tokens: int = 0
    chunk_seqs: int = 0

    @property
    def query_lens(self) -> tuple[int, ...]:
        """What attention is told at capture: leading decodes, and one chunk that fills the rest."""
        chunk = (self.chunk_tokens,) + (0,) * (self.chunk_seqs - 1) if self.chunk_seqs else ()
        return (1,) * self.decodes + chunk

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, sequences and samples of its inputs."""
        seqs = self.decodes + self.chunk_seqs
        return self.decodes + self.chunk_tokens, seqs, seqs


class StepGraph(NamedTuple):
    """A captured step: replay it on the current stream, then read its outputs.

    Attributes:
        graph: to be replayed.
        logits: `[samples, vocab]`.
        tokens: int64 `[samples]`, drawn inside the graph.
    """

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    tokens: torch.Tensor


class GraphCache:
    """Graphs by key.

    Args:
        max_requests: rows of the engine.
        max_chunk_tokens: longer chunks run without a graph.

    Attributes:
        decode_buckets: batch sizes of pure decode steps.
        chunk_buckets: token counts of the longer sequences of a step.
        graphs: what has been captured.
    """

    def __init__(self, max_requests: int, max_chunk_tokens: int) -> None:
        sizes = [1, 2, 4, 8, *range(16, min(64, max_requests), 8), *range(64, max_requests, 16)]
        self.decode_buckets = [size for size in sizes if size < max_requests] + [max_requests]
        self._mixed = [size for size in _MIXED_DECODES if size < max_requests]
        if max_requests <= _MIXED_DECODES[-1]:
            self._mixed.append(max_requests)
        self.chunk_buckets = [size for size in _CHUNK_TOKENS if size <= max(16, max_chunk_tokens)]
        self.graphs: dict[GraphKey, StepGraph] = {}
        self._pool: Any = None

    @property
    def largest(self) -> GraphKey:
        """A bucket that none exceeds in tokens or sequences."""
        decodes = max(self.decode_buckets[-1], self._mixed[-1])
        return GraphKey(decodes, self.chunk_buckets[-1], _CHUNK_SEQS[-1])

    def all_keys(self) -> list[GraphKey]:
        """Every bucket, the largest of a kind first, because all share one memory pool."""
        mixed = itertools.product(_CHUNK_SEQS, self._mixed, self.chunk_buckets)
        keys = [GraphKey(decodes, tokens, seqs) for seqs, decodes, tokens in mixed]
        return [*(GraphKey(size) for size in reversed(self.decode_buckets)), *reversed(keys)]

    def key_for(self, decodes: int, chunk_tokens: int, chunk_seqs: int) -> GraphKey | None:
        """The bucket of a step, None when it is too large for any."""
        if not chunk_seqs:
            size = _next(self.decode_buckets, decodes)
            return None if size is None else GraphKey(size)
        slots = _next(self._mixed, decodes)
        tokens = _next(self.chunk_buckets, chunk_tokens)
        seqs = _next(_CHUNK_SEQS, chunk_seqs)
        if slots is None or tokens is None or seqs is None:
            return None
        return GraphKey(slots, tokens, seqs)

    def capture(
        self, key: GraphKey, step: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> StepGraph:
        """Capture `step`, whose inputs are in place, after running it once to warm it up.

        Args:
            key: under which it is kept.
            step: computes logits and tokens from the step buffers.
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles kernels and makes the libraries allocate what they need.
            step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads copy blocks meanwhile: their calls must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits, tokens = step()
        self._pool = graph.pool()
        captured = self.graphs[key] = StepGraph(graph, logits, tokens)
        logger.debug("captured %s", key)
        return captured


def _next(sizes: list[int] | tuple[int, ...], wanted: int) -> int | None:
    index = bisect.bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else None
