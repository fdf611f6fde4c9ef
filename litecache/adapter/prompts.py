"""Between HF's padded tensors and plain lists of token ids.

Padding is what the attention mask leaves out, on either side; the output keeps the input as given
and appends the new tokens, so a left-padded row comes back as HF returns it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from litecache.errors import CapacityError, ConfigError, LiteCacheError, outline
from litecache.token_ids import TokenIds

MOST_SEQUENCES = 1 << 16
_MOST_IDS = 1 << 28
_MATRIX = "an integer tensor [batch, tokens]"


@contextlib.contextmanager
def naming(name: str, value: object, valid: str) -> Iterator[None]:
    """Tell by its name what an argument raises: a tensor that is meta, sparse, nested, fake..."""
    try:
        yield
    except LiteCacheError:
        raise
    except Exception as error:
        raise ConfigError(name, outline(value), f"{valid} ({type(error).__name__})") from error


def check_input_ids(input_ids: object) -> torch.Tensor:
    """The input as int64 `[batch, tokens]` on the CPU.

    Raises:
        ConfigError: not a dense integer tensor of two dimensions with at least one row and column.
    """
    if not isinstance(input_ids, torch.Tensor):
        raise ConfigError("input_ids", outline(input_ids), _MATRIX)
    with naming("input_ids", input_ids, f"{_MATRIX}, dense"):
        kind, shape = input_ids.dtype, list(input_ids.shape)
        if len(shape) != 2 or kind.is_floating_point or kind.is_complex or kind is torch.bool:
            raise ConfigError("input_ids", outline(input_ids), _MATRIX)
        if not all(shape):
            raise ConfigError("input_ids", shape, "at least one row and one token")
        if shape[0] > MOST_SEQUENCES or shape[0] * shape[1] > _MOST_IDS:
            most = f"at most {MOST_SEQUENCES:,} rows and {_MOST_IDS:,} ids in one call"
            raise ConfigError("input_ids", shape, most)
        ids = input_ids.detach().to("cpu", torch.int64)
        ids.numpy()
    return ids


def one_input(first: Any, second: Any) -> Any:
    """The input that was given, as the first argument or by name.

    Raises:
        ConfigError: both were.
    """
    if first is not None and second is not None:
        raise ConfigError("inputs", "given twice", "either the first argument or input_ids")
    return first if first is not None else second


def one_row(prompt: Any) -> Any:
    """A tensor `[1, tokens]` as `[tokens]`; anything else as it is."""
    with naming("input_ids", prompt, "a dense tensor of token ids"):
        if isinstance(prompt, torch.Tensor) and (prompt.dim() == 0 or prompt.shape[:-1] == (1,)):
            return prompt.reshape(-1)
    return prompt


def check_prompt(prompt: Any, index: int, most: int) -> TokenIds:
    """Token ids of one prompt, a list or a tensor.

    Args:
        prompt: the ids.
        index: of the prompt in the call.
        most: tokens that the model takes.

    Raises:
        ConfigError: names the prompt by its index.
        CapacityError: it is longer than that.
    """
    name, valid = f"prompts[{index}]", "a list of token ids"
    values = as_list(name, prompt, most)
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ConfigError(name, outline(prompt), valid)
    if not len(values):
        raise ConfigError(name, [], "at least one token")
    if len(values) > most:
        raise CapacityError(f"{name} has {len(values):,} tokens: the model takes {most:,}")
    if set(map(type, values)) != {int}:
        wrong = next(token for token in values if type(token) is not int)
        raise ConfigError(name, outline(wrong), valid)
    try:
        return TokenIds(values)
    except OverflowError as error:
        raise ConfigError(name, max(values, key=abs), valid) from error


def check_prompts(prompts: Any, most: int) -> list[TokenIds]:
    """Token ids of all prompts of a call; see `check_prompt`.

    Raises:
        ConfigError: not a list of prompts, or too many.
    """
    valid = "a list of prompts, each a list of token ids"
    if isinstance(prompts, (str, bytes, Mapping)):
        raise ConfigError("prompts", outline(prompts), valid)
    with naming("prompts", prompts, valid):
        if isinstance(prompts, torch.Tensor):
            # to iterate over it makes a tensor of every row first
            check_sequences("prompts", len(prompts))
        given = list(itertools.islice(prompts, MOST_SEQUENCES + 1))
    check_sequences("prompts", len(given))
    return [check_prompt(prompt, index, most) for index, prompt in enumerate(given)]


def check_sequences(name: str, count: int) -> None:
    """Refuse more sequences than a driver could keep account of.

    Raises:
        ConfigError: with both numbers.
    """
    if count > MOST_SEQUENCES:
        raise ConfigError(name, count, f"at most {MOST_SEQUENCES:,} sequences in one call")


def real_columns(
    input_ids: torch.Tensor, attention_mask: Any, pad_token_id: int | None
) -> npt.NDArray[np.bool_]:
    """Which places of a batch hold tokens and not padding, bool `[batch, tokens]`.

    Args:
        input_ids: int64 `[batch, tokens]`.
        attention_mask: `[batch, tokens]`, nonzero = a token; None = all, except `pad_token_id`.
        pad_token_id: taken for padding where there is no mask; None = nothing is.

    Raises:
        ConfigError: the mask has another shape.
    """
    # By numpy: torch wakes all its threads for a few thousand tokens, which takes milliseconds.
    if attention_mask is None:
        ids = input_ids.numpy()
        return np.ones(ids.shape, np.bool_) if pad_token_id is None else ids != pad_token_id
    shape = getattr(attention_mask, "shape", None)
    if not isinstance(attention_mask, torch.Tensor) or shape != input_ids.shape:
        what = outline(attention_mask) if shape is None else list(shape)
        valid = f"a tensor of input_ids' shape {list(input_ids.shape)}"
        raise ConfigError("attention_mask", what, valid)
    with naming("attention_mask", attention_mask, "a dense tensor of numbers"):
        real: npt.NDArray[np.bool_] = attention_mask.numpy(force=True) != 0
    return real


def split_rows(
    input_ids: torch.Tensor, attention_mask: Any, pad_token_id: int | None
) -> list[TokenIds]:
    """The tokens of each row without its padding.

    Args:
        input_ids, attention_mask, pad_token_id: as in `real_columns`.

    Raises:
        ConfigError: the mask has another shape, or leaves a row empty.
    """
    real = real_columns(input_ids, attention_mask, pad_token_id)
    rows = [TokenIds(row[there]) for row, there in zip(input_ids.numpy(), real, strict=True)]
    for index, row in enumerate(rows):
        if not row:
            raise ConfigError("input_ids", f"row {index}", "at least one token that is no padding")
    return rows


def check_positions(
    position_ids: Any, places: npt.NDArray[np.int64], real: npt.NDArray[np.bool_]
) -> None:
    """Refuse positions other than those that a row's tokens have of themselves.

    Args:
        position_ids: `[batch, tokens]`, or what broadcasts to it; None = none are given.
        places: int64 `[batch, tokens]`, of each column's token in its row.
        real: bool `[batch, tokens]`, False = padding, whose positions may be anything.

    Raises:
        ConfigError: there are some.
    """
    if position_ids is None:
        return
    with naming("position_ids", position_ids, "a dense tensor [batch, tokens] of integers"):
        given = np.broadcast_to(position_ids.numpy(force=True), places.shape)
    if (given != places)[real].any():
        valid = "left out: positions count from the first token of each row"
        raise ConfigError("position_ids", outline(position_ids), valid)


def append_rows(
    input_ids: torch.Tensor, new_tokens: Sequence[Sequence[int]], pad_token_id: int | None
) -> torch.Tensor:
    """Append each row's new tokens, padded to the longest, or without padding cut to the shortest.

    Where nothing but `max_time` ends rows, transformers ends all in one step.

    Args:
        input_ids: `[batch, tokens]`, rows already repeated per sample.
        new_tokens: per row.
        pad_token_id: fills shorter rows; None = there is no such token.

    Returns:
        int64 on `input_ids`' device, `[batch, tokens + new]`: a narrow input's dtype could not hold
        every token.
    """
    lengths = [len(row) for row in new_tokens]
    width = min(lengths) if pad_token_id is None else max(lengths)
    added = np.full((len(new_tokens), width), pad_token_id or 0, dtype=np.int64)
    for index, row in enumerate(new_tokens):
        added[index, : len(row)] = row[:width]
    new = torch.from_numpy(added).to(input_ids.device)
    return torch.cat([input_ids.to(torch.int64), new], dim=1)


def as_list(name: str, value: Any, most: int = 1 << 20) -> Any:
    """A tensor's numbers, at most so many, as (nested) lists; what is no tensor stays as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    valid = f"a dense tensor of at most {most:,} numbers"
    with naming(name, value, valid):
        if value.numel() <= most:
            return value.tolist()
    raise ConfigError(name, outline(value), valid)
