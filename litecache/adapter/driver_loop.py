"""One call of `generate` whose tokens are drawn here, by transformers' own loops.

The loops are those of `ModelProxy`; what this file adds are LiteCache's own arguments, checks that
must come before transformers sees a value, and the report. A user's Python (processors, criteria,
streamers, a `custom_generate`) runs in the driver alone, and what it raises goes to the caller as
it is; what transformers refuses comes with its own words, as a `ConfigError`.
"""

from __future__ import annotations

import contextlib
import numbers
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput

from litecache.adapter.generation import (
    DEFAULT_MAX_NEW_TOKENS,
    OWN_ARGUMENTS,
    end_ids,
    logit_biases,
    merge_settings,
    refuse_everywhere,
    sequence_biases,
    token_ids,
)
from litecache.adapter.pending import PendingRequest, ReuseReport
from litecache.adapter.prompts import check_input_ids, check_sequences, naming
from litecache.adapter.proxy import ModelProxy, TokenRows
from litecache.checks import FLOAT32_MAX, INT64_MAX, check_integer, check_real
from litecache.errors import ConfigError, LiteCacheError, outline, told

# Frames of these in a traceback are no code of the caller's.
_LIBRARIES = frozenset(
    {"httpx", "huggingface_hub", "litecache", "numpy", "torch", "transformers"}
    | sys.stdlib_module_names
)
_DEEPEST = 6
# All threads draw from one generator: calls with a seed take turns, or each got the other's tokens.
# A processor of the caller's may call `generate` again.
_ONE_SEED = threading.RLock()


def generate_in_driver(
    proxy: ModelProxy,
    inputs: Any,
    given: GenerationConfig | None,
    arguments: Mapping[str, Any],
    *,
    streamer: Any = None,
    seed: int | None = None,
    tokenizer: Any = None,
    own_tokenizer: Callable[[], Any] = lambda: None,
    first_pass: Callable[[], Sequence[PendingRequest]] = list,
    most_threads: int | None = None,
) -> Any:
    """Transformers' `generate` over a proxy.

    Args:
        proxy: the model.
        inputs: `[batch, tokens]`; None = the model's first token.
        given: the caller's `generation_config`.
        arguments: the caller's other keyword arguments, LiteCache's own among them.
        streamer: as in transformers.
        seed: of torch's CPU generator for this call, which is put back afterwards; calls with one
            take turns. None = it goes on from where it is, as in transformers.
        tokenizer: the caller's.
        own_tokenizer: called where one is needed and the caller gave none.
        first_pass: gives the requests of the first forward pass, for the report.
        most_threads: of torch, where the caller has not set fewer; None = as many as the caller's.

    Returns:
        What transformers returns, `sequences` on the device of `inputs`; with
        `return_dict_in_generate` a `ReuseReport` as `.litecache`.

    Raises:
        ConfigError: an argument is invalid, in LiteCache's words or in those of transformers.
        LiteCacheError: a forward pass failed.
    """
    settings, others = merge_settings(given, dict(arguments), proxy.generation_config)
    refuse_everywhere(settings, others)
    _check_values(settings, others, given, arguments)
    end_ids(settings)
    ids = None if inputs is None else check_input_ids(inputs)
    call = {name: value for name, value in arguments.items() if name not in OWN_ARGUMENTS}
    call = {name: _on_cpu(name, value) for name, value in call.items()}
    _check_rows(ids, call)
    if ids is not None and call.get("attention_mask") is not None:
        # numbers that are neither 0 nor 1 would count as so many tokens in transformers' positions
        call["attention_mask"] = (call["attention_mask"] != 0).long()
    if "use_cache" in call and call["use_cache"] is None:
        del call["use_cache"]  # its loops would take it for False, and its caches for True
    count = 1 if ids is None else len(ids)
    for name in ("num_beams", "num_return_sequences"):
        if isinstance(settings.get(name), int):
            check_sequences(name, count * settings[name])
    call |= _own_arguments(settings, call, count, proxy.vocab_size)
    moved = None if ids is None else _padding_moved_left(ids, settings, call)
    given_ids = ids if moved is None else moved.left(moved.ids)
    if call.get("cache_implementation") == "paged":
        del call["cache_implementation"]  # transformers would leave for a loop of another kind
    wants_texts = settings.get("stop_strings") is not None or settings.get("token_healing")
    if tokenizer is None and wants_texts:
        tokenizer = own_tokenizer()
    if seed is not None:
        check_integer("seed", seed, 0, valid="an integer from 0 to 2**63 - 1")
    begun = time.perf_counter()
    with (
        _seeded(seed),
        _at_most_threads(most_threads),
        _on_cpu_by_default(),
        _in_words_of_transformers(),
    ):
        result = proxy.generate(given_ids, given, streamer=streamer, tokenizer=tokenizer, **call)
    device = torch.device("cpu") if ids is None else inputs.device
    if moved is not None:
        result = moved.put_back(result)
    if isinstance(result, torch.Tensor):
        return result.to(device)
    if isinstance(result, ModelOutput) and isinstance(result.get("sequences"), torch.Tensor):
        settings = {**settings, **call}
        result.litecache = _report(proxy, result.sequences, ids, settings, begun, first_pass())
        result.sequences = result.sequences.to(device)
    return result


def _report(
    proxy: ModelProxy,
    sequences: torch.Tensor,
    ids: torch.Tensor | None,
    settings: Mapping[str, Any],
    begun: float,
    first_pass: Sequence[PendingRequest],
) -> ReuseReport:
    """What each row reused, in the first forward pass, and how it ended."""
    width = 1 if ids is None else ids.shape[1]
    # several rows may be asked for as one, and be one row of the result or several
    asked, results = proxy.first_rows or [], len(sequences)
    each = [asked[index * len(asked) // results] if asked else -1 for index in range(results)]
    first = [first_pass[i] if 0 <= i < len(first_pass) else None for i in each]
    ends, pad = end_ids(settings), settings.get("pad_token_id")
    most = settings.get("max_new_tokens")
    if most is None:
        most = (settings.get("max_length") or width + DEFAULT_MAX_NEW_TOKENS) - width
    reasons, lengths = [], []
    for row in sequences[:, width:].tolist():
        end = next((index for index, token in enumerate(row) if token in ends), None)
        length = len(row) if end is None else end + 1
        # a row that a stop string or a criterion ended before others is filled up
        while end is None and results > 1 and length and row[length - 1] == pad:
            length -= 1
        reasons.append("stop" if end is not None or length < most else "length")
        lengths.append(length)
    return ReuseReport(
        reused_tokens=tuple({} if row is None else row.reused_tokens for row in first),
        found_tokens=tuple({} if row is None else row.found_tokens for row in first),
        ttft_s=(None if proxy.first_at is None else proxy.first_at - begun,) * results,
        total_s=(time.perf_counter() - begun,) * results,
        logprobs=((),) * results,
        finish_reasons=tuple(reasons),
        prompt_tokens=tuple(width if row is None else len(row.request.prompt) for row in first),
        completion_tokens=tuple(lengths),
        loop="driver",
    )


class OutputPenalties(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Presence and frequency penalties of the tokens drawn so far, as the engine loop has them.

    Args:
        presence: is taken from the score of every token of the output.
        frequency: the same, times its occurrences.
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency
        self._prompt_width: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[batch, vocab]` after `input_ids` `[batch, tokens]`; the first are the prompt."""
        if self._prompt_width is None:
            self._prompt_width = input_ids.shape[1]
        new = input_ids[:, self._prompt_width :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new).to(scores))
        return scores - self._presence * (counts > 0).to(scores) - self._frequency * counts


def _own_arguments(
    settings: Mapping[str, Any], call: Mapping[str, Any], count: int, vocab_size: int
) -> dict[str, Any]:
    """LiteCache's own arguments, in transformers' terms."""
    terms: dict[str, Any] = {}
    if settings.get("logprobs") is not None:
        valid = "None in the driver loop; output_logits=True gives the logits of every step"
        raise ConfigError("logprobs", settings["logprobs"], valid)
    stops = token_ids("stop_token_ids", settings, vocab_size)
    if stops:
        ends = end_ids(settings)
        if count > 1 and not ends and settings.get("pad_token_id") is None:
            valid = "a token id to fill the rows with that end before others, as in transformers"
            raise ConfigError("pad_token_id", None, valid)
        terms["eos_token_id"] = [*ends, *stops]
    biases: dict[tuple[int, ...], float] = {}
    if settings.get("logit_bias"):
        for ids, bias in (*sequence_biases(settings), *logit_biases(settings, vocab_size)):
            biases[ids] = biases.get(ids, 0.0) + bias
        terms["sequence_bias"] = biases
    presence, frequency = (
        check_real(name, settings[name], -FLOAT32_MAX)
        for name in ("presence_penalty", "frequency_penalty")
    )
    if presence or frequency:
        own = OutputPenalties(presence, frequency)
        terms["logits_processor"] = LogitsProcessorList(
            [own, *(call.get("logits_processor") or ())]
        )
    return terms


def _check_values(
    settings: Mapping[str, Any],
    others: Mapping[str, Any],
    given: GenerationConfig | None,
    arguments: Mapping[str, Any],
) -> None:
    """Refuse values that would run code of unknown objects in the midst of transformers.

    Raises:
        ConfigError: names the field or argument.
    """
    from_caller = {*arguments, *(() if given is None else vars(given))}
    for name in from_caller & settings.keys():
        if not _is_plain(settings[name], _DEEPEST):
            raise ConfigError(name, outline(settings[name]), "numbers, texts, or lists of them")
    for name, what in (("logits_processor", "processors"), ("stopping_criteria", "criteria")):
        listed = isinstance(others.get(name, []), (list, tuple, type(None)))
        if not listed or not all(map(callable, others.get(name) or ())):
            raise ConfigError(name, outline(others[name]), f"a list of {what}")
    function = others.get("prefix_allowed_tokens_fn")
    if function is not None and not callable(function):
        raise ConfigError("prefix_allowed_tokens_fn", outline(function), "a function")
    custom = others.get("custom_generate")
    if custom is not None and not isinstance(custom, str) and not callable(custom):
        raise ConfigError("custom_generate", outline(custom), "a function, or where one lies")
    assistant = others.get("assistant_model")
    if assistant is not None and not isinstance(assistant, torch.nn.Module):
        valid = "a transformers model in this process"
        raise ConfigError("assistant_model", outline(assistant), valid)
    past = others.get("past_key_values")
    if past is not None and not isinstance(past, TokenRows):
        valid = "None, or the past_key_values that this adapter returned"
        raise ConfigError("past_key_values", type(past).__name__, valid)
    for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
        if others.get(name) is not None:
            try:
                check_input_ids(others[name])
            except ConfigError as error:
                valid = "an integer tensor [batch, tokens]"
                raise ConfigError(name, outline(others[name]), valid) from error


def _is_plain(value: Any, depth: int) -> bool:
    if value is None or isinstance(value, (numbers.Number, str, torch.Tensor, np.ndarray)):
        return True
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return type(value).__module__.split(".")[0] == "transformers"


def _on_cpu(name: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with naming(name, value, "a dense tensor"):
        return value.detach().to("cpu")


def _check_rows(ids: torch.Tensor | None, call: Mapping[str, Any]) -> None:
    """Refuse a mask that does not fit, or leaves a row without any token.

    Raises:
        ConfigError: names the argument.
    """
    mask = call.get("attention_mask")
    if mask is None or ids is None:
        return
    past = call.get("past_key_values")
    widths = {ids.shape[1], ids.shape[1] + (0 if past is None else past.get_seq_length())}
    valid = f"a tensor of input_ids' shape {list(ids.shape)}"
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or len(mask) != len(ids):
        raise ConfigError("attention_mask", outline(mask), valid)
    if mask.shape[1] not in widths:
        raise ConfigError("attention_mask", list(mask.shape), valid)
    with naming("attention_mask", mask, "a dense tensor of numbers"):
        empty = np.flatnonzero(~(mask.numpy() != 0).any(axis=1)).tolist()
    if empty:
        valid = "at least one token that is no padding"
        raise ConfigError("input_ids", f"row {empty[0]}", valid)


@dataclass(frozen=True)
class _MovedPadding:
    """Rows whose padding stands behind them, and the same with it before them.

    Attributes:
        ids: int64 `[batch, tokens]`, as the caller gave them.
        real: bool `[batch, tokens]`, False = padding.
        order: int64 `[batch, tokens]`, the columns of the rows moved.
    """

    ids: torch.Tensor
    real: torch.Tensor
    order: torch.Tensor

    def left(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns `[batch, tokens]` as the rows moved have them."""
        return columns.gather(1, self.order)

    def put_back(self, result: Any) -> Any:
        """A result of the rows moved as one of the caller's, in sequences and cache."""
        if isinstance(result, torch.Tensor):
            return self._begun(result, self.ids)
        if isinstance(result, ModelOutput):
            if isinstance(result.get("sequences"), torch.Tensor):
                result.sequences = self._begun(result.sequences, self.ids)
            rows = result.get("past_key_values")
            if isinstance(rows, TokenRows):
                tokens, real = map(torch.from_numpy, (rows.tokens, rows.real))
                tokens, real = self._begun(tokens, self.ids), self._begun(real, self.real)
                rows.assign(tokens.numpy(), real.numpy())
        return result

    def _begun(self, rows: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Rows `[batch * n, tokens + new]` that begin as the caller's; others stay as they are."""
        # a `custom_generate` may return what it likes
        if rows.dim() != 2 or (rows.dtype, rows.device) != (prompts.dtype, prompts.device):
            return rows
        width, times = prompts.shape[1], len(rows) // len(prompts)
        if not torch.equal(rows[:, :width], self.left(prompts).repeat_interleave(times, dim=0)):
            return rows
        return torch.cat([prompts.repeat_interleave(times, dim=0), rows[:, width:]], dim=1)


def _padding_moved_left(
    ids: torch.Tensor, settings: Mapping[str, Any], call: dict[str, Any]
) -> _MovedPadding | None:
    """Move padding to where transformers' loops, which append columns, expect it.

    Args:
        ids: int64 `[batch, tokens]`.
        settings: of `merge_settings`.
        call: arguments of transformers' `generate`; the mask and positions in it are moved, too.

    Returns:
        None = no row ends with padding.

    Raises:
        ConfigError: with arguments that say otherwise what stands in which column.
    """
    mask, pad = call.get("attention_mask"), settings.get("pad_token_id")
    if mask is not None:
        real = torch.from_numpy(mask.numpy() != 0)
    elif isinstance(pad, numbers.Integral) and 0 <= int(pad) <= INT64_MAX:
        real = ids != int(pad)
    else:
        return None
    behind = (~real[:, -1]).nonzero()
    said = {**settings, **call}
    # without a mask transformers does not take an end token for padding either
    if not len(behind) or (mask is None and pad in end_ids(said)):
        return None
    for name in ("past_key_values", "token_healing"):
        if said.get(name) is not None and said[name] is not False:
            field = "input_ids" if mask is None else "attention_mask"
            what, valid = f"padding behind row {int(behind[0])}", f"padding before it, with {name}"
            raise ConfigError(field, what, valid)
    after = real.flip(1).to(torch.int8).argmax(dim=1, keepdim=True)
    order = (torch.arange(ids.shape[1], device="cpu") - after) % ids.shape[1]
    moved = _MovedPadding(ids, real, order)
    if mask is not None:
        call["attention_mask"] = moved.left(real).long()
    positions = call.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.shape == ids.shape:
        with naming("position_ids", positions, "a dense tensor [batch, tokens] of integers"):
            columns = np.take_along_axis(positions.numpy(), order.numpy(), axis=1)
            call["position_ids"] = torch.from_numpy(columns)
    return moved


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Torch's CPU generator with a seed, and as it was afterwards; None = as it is."""
    if seed is None:
        yield
        return
    with _ONE_SEED:
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before)


@contextlib.contextmanager
def _at_most_threads(most: int | None) -> Iterator[None]:
    """Fewer threads of torch than the caller has set, and afterwards as many as before."""
    before = torch.get_num_threads()
    if most is None or before <= most:
        yield
        return
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_cpu_by_default() -> contextlib.AbstractContextManager[object]:
    """A default device of the caller's is none of the logits', which lie on the CPU."""
    cpu = torch.device("cpu")
    return contextlib.nullcontext() if torch.get_default_device() == cpu else cpu


@contextlib.contextmanager
def _in_words_of_transformers() -> Iterator[None]:
    """Errors of transformers and torch about the call as `ConfigError`; the caller's as they are.

    Raises:
        ConfigError: no code of the caller's was running.
    """
    try:
        yield
    except LiteCacheError:
        raise
    except Exception as error:
        frame = error.__traceback__
        while frame is not None:
            name = frame.tb_frame.f_globals.get("__name__") or ""
            if name.split(".")[0] not in _LIBRARIES:
                raise
            frame = frame.tb_next
        words = str(error) if isinstance(error, ValueError) else told(error)
        raise ConfigError(words) from error
