"""Between HF's padded tensors and plain lists of token ids.

Padding is what the attention mask leaves out, on either side; the output keeps the input as given
and appends the new tokens, so a left-padded row comes back as HF returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from litecache.errors import ConfigError, outline
from litecache.token_ids import TokenIds


def check_input_ids(input_ids: object) -> torch.Tensor:
    """The input as int64 `[batch, tokens]` on the CPU.

    Raises:
        ConfigError: not an integer tensor of two dimensions with at least one row and column.
    """
    if not isinstance(input_ids, torch.Tensor):
        raise ConfigError("input_ids", outline(input_ids), "an integer tensor [batch, tokens]")
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.is_complex():
        raise ConfigError("input_ids", outline(input_ids), "an integer tensor [batch, tokens]")
    if input_ids.numel() == 0:
        raise ConfigError("input_ids", list(input_ids.shape), "at least one row and one token")
    return input_ids.detach().to("cpu", torch.int64)


def one_input(first: Any, second: Any) -> Any:
    """The input that was given, as the first argument or by name.

    Raises:
        ConfigError: both were.
    """
    if first is not None and second is not None:
        raise ConfigError("inputs", "given twice", "either the first argument or input_ids")
    return first if first is not None else second


def check_prompt(prompt: Any, index: int) -> TokenIds:
    """Token ids of one prompt, a list or a tensor.

    Raises:
        ConfigError: names the prompt by its index.
    """
    values = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
    valid = "a list of token ids"
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ConfigError(f"prompts[{index}]", outline(prompt), valid)
    if not values:
        raise ConfigError(f"prompts[{index}]", [], "at least one token")
    if set(map(type, values)) != {int}:
        wrong = next(token for token in values if type(token) is not int)
        raise ConfigError(f"prompts[{index}]", outline(wrong), valid)
    try:
        return TokenIds(values)
    except OverflowError as error:
        raise ConfigError(f"prompts[{index}]", max(values, key=abs), valid) from error


def split_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token_id: int | None
) -> list[TokenIds]:
    """The tokens of each row without its padding.

    Args:
        input_ids: int64 `[batch, tokens]`.
        attention_mask: `[batch, tokens]`, nonzero = a token; None = all, except `pad_token_id`.
        pad_token_id: taken for padding where there is no mask; None = nothing is.

    Raises:
        ConfigError: the mask has another shape, or leaves a row empty.
    """
    # By numpy: torch wakes all its threads for a few thousand tokens, which takes milliseconds.
    ids = input_ids.numpy()
    keep = None
    if attention_mask is None:
        if pad_token_id is not None:
            keep = ids != pad_token_id
    else:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
            shape = getattr(attention_mask, "shape", None)
            raise ConfigError(
                "attention_mask",
                outline(attention_mask) if shape is None else list(shape),
                f"a tensor of input_ids' shape {list(input_ids.shape)}",
            )
        keep = attention_mask.numpy(force=True) != 0
    rows = [TokenIds(row if keep is None else row[keep[i]]) for i, row in enumerate(ids)]
    for index, row in enumerate(rows):
        if not row:
            raise ConfigError("input_ids", f"row {index}", "at least one token that is no padding")
    return rows


def append_rows(
    input_ids: torch.Tensor, new_tokens: Sequence[Sequence[int]], pad_token_id: int | None
) -> torch.Tensor:
    """Append each row's new tokens, padded to the longest.

    Args:
        input_ids: `[batch, tokens]`, rows already repeated per sample.
        new_tokens: per row.
        pad_token_id: fills shorter rows; only None where all rows are equally long.

    Returns:
        Of `input_ids`' dtype and device, `[batch, tokens + longest]`.
    """
    width = max(len(row) for row in new_tokens)
    fill = 0 if pad_token_id is None else pad_token_id
    added = torch.full((len(new_tokens), width), fill, dtype=torch.int64)
    for index, row in enumerate(new_tokens):
        added[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return torch.cat([input_ids, added.to(input_ids.device, input_ids.dtype)], dim=1)
