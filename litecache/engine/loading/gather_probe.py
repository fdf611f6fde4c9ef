"""The probe of the second way: a model with its own attention code, over gathered KV.

Asked for are the calls that the model makes to a transformers `Cache`: one `update` per layer tells
that layer's KV shape. Then sequences run in chunks and as ragged batches of decodes, as the runner
does it, and must give the logits of the model alone.
"""

from __future__ import annotations

from typing import Any

import torch

from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.engine.loading.model_checks import refusal
from litecache.engine.loading.probe import ProbePlan, Way, number_of_layers
from litecache.engine.running.batch import Batch


def record_updates(model: Any, kv_dtype: str, max_model_len: int) -> tuple[KVSpec, ...]:
    """Each layer's KV shape, by what the model gives to its cache in a forward of two tokens.

    A window stays the model's own affair: it is given all keys, and masks what it does not see.

    Args:
        model: a causal language model with its own attention.
        kv_dtype: of the pool, by name.
        max_model_len: longest sequence in tokens; it changes nothing here.

    Raises:
        ModelNotSupportedError: it does not update a cache exactly once per layer.
    """
    from transformers import DynamicCache

    calls: dict[int, list[tuple[int, int, int]]] = {}

    class Recording(DynamicCache):  # type: ignore[misc]
        def update(
            self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any
        ) -> Any:
            calls.setdefault(layer, []).append((key.shape[1], key.shape[3], value.shape[3]))
            return super().update(key, value, layer, *args, **kwargs)

    ids, _ = ProbePlan((0,), 2).inputs(model)
    try:
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=Recording(), use_cache=True)
    except Exception as error:
        raise refusal(model.config, f"its forward with a cache fails: {error}") from error
    num_layers = number_of_layers(model.config)
    if not calls:
        raise refusal(model.config, "it keeps no keys and values in a transformers cache")
    if sorted(calls) != list(range(num_layers)) or any(len(made) > 1 for made in calls.values()):
        made = {layer: len(found) for layer, found in sorted(calls.items())}
        raise refusal(
            model.config,
            f"its {num_layers} layers do not update a cache once each (calls by layer: {made})",
        )
    return tuple(KVSpec(*found, kv_dtype) for _, (found,) in sorted(calls.items()))


def gathered_logits(
    model: Any, specs: tuple[KVSpec, ...], block_size: int, plan: ProbePlan
) -> torch.Tensor:
    """Logits of a plan's sequences, each in two chunks and then together in ragged decodes.

    Arguments as of `verify`; float32 `[rows, tokens, vocab]`.
    """
    from litecache.engine.running.gather_cache import GatheredForward

    tokens, positions = plan.inputs(model)
    rows, device = len(plan.starts), tokens.device
    layout = KVLayout.from_specs(specs, block_size)
    width = -(-plan.tokens // block_size)
    pools = [KVPool(group, rows * width + 1, device) for group in layout.groups]
    # Scattered and interleaved, as in a pool that has been in use.
    table = torch.arange(rows * width, 0, -1, device=device).view(width, rows).T
    tables = table.expand(len(pools), rows, width)
    run = GatheredForward(model, layout, pools, tokens.reshape(-1), tables)
    # Different ends, so that the decodes are ragged and rows leave the batch one by one.
    ends = [max(1, plan.tokens - 3 - row % 3) for row in range(rows)]
    cuts = [min(plan.cut(row), end) for row, end in enumerate(ends)]
    steps = [
        [(row, 0, cut) for row, cut in enumerate(cuts)],
        [(row, cut, end) for row, (cut, end) in enumerate(zip(cuts, ends, strict=True))],
    ]
    longest = plan.tokens - min(ends)
    steps += [[(r, end + n, end + n + 1) for r, end in enumerate(ends)] for n in range(longest)]
    parts: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    for step in steps:
        chunks = [(row, a, min(b, plan.tokens)) for row, a, b in step if a < min(b, plan.tokens)]
        batch = _batch(chunks, plan.tokens, positions, tables, block_size)
        with torch.inference_mode():
            found = torch.split(run(batch).float(), list(batch.query_lens))
        for (row, _, _), part in zip(chunks, found, strict=True):
            parts[row].append(part)
    return torch.stack([torch.cat(row) for row in parts])


def _batch(
    chunks: list[tuple[int, int, int]],
    tokens: int,
    positions: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
) -> Batch:
    """Chunks (row, first token, end) as the runner packs them, logits wanted everywhere."""
    device = positions.device
    rows = torch.cat([torch.full((b - a,), row) for row, a, b in chunks]).to(device)
    places = torch.cat([torch.arange(a, b) for _, a, b in chunks]).to(device)
    slots = tables[:, rows, places // block_size] * block_size + places % block_size
    fields = {
        "id_index": rows * tokens + places,
        "positions": positions[rows, places],
        "slots": slots.reshape(-1),
        "rows": torch.tensor([row for row, _, _ in chunks], device=device),
    }
    return Batch(
        fields,
        query_lens=tuple(b - a for _, a, b in chunks),
        context_lens=tuple(b for _, _, b in chunks),
        lives=tuple(row for row, _, _ in chunks),
        places=torch.arange(len(places)).numpy(),
    )


GATHERED = Way("gathered", lambda model: None, record_updates, gathered_logits)
"""The model keeps its attention code and is given the keys and values of whole contexts."""
