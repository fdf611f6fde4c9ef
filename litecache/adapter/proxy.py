"""A model without weights, for Hugging Face's own `generate` in the driver.

`ModelProxy` is transformers' `GenerationMixin` over a `Forward`: beams, assistants, guidance,
processors and scores are transformers' code, and only the forward passes are the replicas'. Its
"KV cache" are the tokens of each row (`TokenRows`): a forward pass names all of a row's tokens, and
the replica finds the KV of all but the last in its pool. So a reordered, cropped or copied cache
costs nothing, and one that is handed back later is as good as new.

Padding is no part of a row: positions count from its first token, as transformers counts them.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache, GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.generation import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from litecache.adapter.forward import Forward
from litecache.adapter.prompts import check_input_ids, check_positions, naming
from litecache.adapter.row_progress import Progress
from litecache.errors import CapacityError, ConfigError, outline
from litecache.token_ids import TokenIds

Tokens = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Arguments that transformers hands from its loops to `forward`, where they mean nothing.
_PASSED_OVER = frozenset(
    {"assistant_model", "assistant_tokenizer", "tokenizer", "trust_remote_code"}
)


class TokenRows(Cache):  # type: ignore[misc]  # transformers is untyped
    """What a proxy knows of its past: the tokens of every row that have been through a forward.

    Attributes:
        tokens: int64 `[batch, width]`, padding included.
        real: bool `[batch, width]`; False = padding, no part of the row.
        ended: bool `[batch]` of rows whose next logits nobody looks at; None = all are looked at.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.tokens: Tokens = np.zeros((0, 0), dtype=np.int64)
        self.real: Mask = np.zeros((0, 0), dtype=np.bool_)
        self.ended: Mask | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns, padding included; the same for every layer."""
        return int(self.tokens.shape[1])

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows as long as rows do."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward, as in transformers."""
        return len(self.tokens) or -1

    @property
    def is_compileable(self) -> bool:
        """Nothing of it is a tensor of a graph."""
        return False

    def extended(self, ids: Tokens, mask: Mask | None) -> tuple[Tokens, Mask]:
        """Tokens and mask with further columns; the cache itself stays as it is.

        Args:
            ids: `[batch, new]`.
            mask: `[batch, width + new]`; None = what was real stays so, and so is all that is new.

        Raises:
            ConfigError: another number of rows, or a mask of another width.
        """
        if not len(self.tokens):
            tokens, real = ids, np.ones(ids.shape, dtype=np.bool_)
        elif len(self.tokens) != len(ids):
            what = f"a cache of {len(self.tokens)} rows"
            raise ConfigError("past_key_values", what, f"of the {len(ids)} rows of input_ids")
        else:
            tokens = np.concatenate([self.tokens, ids], axis=1)
            real = np.concatenate([self.real, np.ones(ids.shape, dtype=np.bool_)], axis=1)
        if mask is None:
            return tokens, real
        if mask.shape != tokens.shape:
            valid = f"{list(tokens.shape)}, the cache's columns and those of input_ids"
            raise ConfigError("attention_mask", list(mask.shape), valid)
        return tokens, mask

    def assign(self, tokens: Tokens, real: Mask) -> None:
        """Hold these rows from now on."""
        self.tokens, self.real = tokens, real

    def begins(self, ids: torch.Tensor, mask: Any) -> bool:
        """Whether rows begin with these, so that they say all that the cache does.

        Args:
            ids: int64 `[batch, tokens]`.
            mask: `[batch, tokens]`; None = nothing is padding.
        """
        width = self.get_seq_length()
        if ids.shape[0] != len(self.tokens) or ids.shape[1] <= width:
            return False
        real = np.ones(ids.shape, dtype=np.bool_) if mask is None else _mask(mask)
        if real is None or real.shape != ids.shape or (real[:, :width] != self.real).any():
            return False
        return not (ids.numpy()[:, :width] != self.tokens)[self.real].any()

    def follow(self, sequences: torch.Tensor, real: Mask) -> None:
        """Hold what a loop elsewhere has been through: all but the last column.

        Args:
            sequences: `[batch, tokens + new]`.
            real: `[batch, tokens]` of the prompts, False = padding.
        """
        tokens = sequences.numpy(force=True).astype(np.int64)[:, :-1]
        grown = np.ones((len(tokens), tokens.shape[1] - real.shape[1]), dtype=np.bool_)
        self.assign(tokens, np.concatenate([real, grown], axis=1))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        index = torch.as_tensor(indices).numpy(force=True)
        self.assign(self.tokens[index], self.real[index])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times, one after the other."""
        self.assign(self.tokens.repeat(repeats, axis=0), self.real.repeat(repeats, axis=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop columns at the end.

        Args:
            tokens_to_remove: minus their number, as transformers has it now; a positive number is
                the length to keep, as it was before transformers 5.18.
        """
        width, given = self.get_seq_length(), int(tokens_to_remove)
        kept = given if given > 0 else max(0, width + given)
        self.assign(self.tokens[:, :kept], self.real[:, :kept])

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be a cache of keys and values.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "past_key_values", type(self).__name__, "used with the adapter that returned it"
        )

    def __repr__(self) -> str:
        rows, width = self.tokens.shape
        return f"TokenRows({rows} rows of {width} tokens)"


class ModelProxy(GenerationMixin):  # type: ignore[misc]
    """A causal language model whose forward passes are computed elsewhere.

    Args:
        config: the model's configuration.
        generation_config: the model's defaults.
        forward: computes logits.
        max_model_len: tokens that a row may have; None = no limit.

    It serves one call of `generate`, and never touches torch's random numbers.

    Attributes:
        vocab_size: of the logits; token ids are below it.
        first_rows: of each row of the first forward pass, which of the distinct rows it was; -1 =
            padding alone. None before.
        first_at: `time.perf_counter()` of the first forward pass's return.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    device = torch.device("cpu")
    _is_stateful = False

    def __init__(
        self,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        forward: Forward,
        *,
        max_model_len: int | None = None,
    ) -> None:
        self.config, self.generation_config = config, generation_config
        self.dtype, self.vocab_size = forward.dtype, forward.vocab_size
        self._forward, self._max_model_len = forward, max_model_len
        self.first_rows: list[int] | None = None
        self.first_at: float | None = None
        self._passes, self._columns, self._first_columns, self._most_columns = 0, 0, 0, 0

    def progress(self) -> Progress:
        """How far the call has come, in columns of its longest row."""
        most = max(1, self._most_columns - self._first_columns)
        done = self._columns - self._first_columns
        return Progress(min(done, most), most, f"{self._passes:,} forward passes")

    @classmethod
    def can_generate(cls) -> bool:
        """Transformers asks before it generates."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """Its code is this file."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """There are no experts in this process to switch."""
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `forward`."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: TokenRows | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits of the tokens that follow.

        Args:
            input_ids: integers `[batch, new]`, those after the cache's.
            attention_mask: `[batch, past + new]`, 0 = padding, no part of the row.
            position_ids: nothing but the positions that follow from the mask.
            past_key_values: what came before; the new tokens are added to it.
            inputs_embeds, output_attentions, output_hidden_states: refused.
            use_cache: return a cache where none was given; None = yes.
            logits_to_keep: of so many last columns, 0 = of all, or the indices of columns.
            return_dict: False = a tuple.

        Returns:
            `CausalLMOutputWithPast` with `logits` `[batch, columns, vocab]` in the model's dtype.
            A padded column has the logits of the token before it, and zeros before the first.

        Raises:
            ConfigError: names the argument.
            LiteCacheError: the forward pass failed; the cache is as it was.
        """
        refused = {
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            **{name: value for name, value in others.items() if name not in _PASSED_OVER},
        }
        for name, value in refused.items():
            if value is not None and value is not False:
                raise ConfigError(name, outline(value), "left out: logits are all that there is")
        past = past_key_values
        if past is None:
            past = TokenRows()
        elif not isinstance(past, TokenRows):
            valid = "None, or what a `generate` of this adapter returned"
            raise ConfigError("past_key_values", type(past).__name__, valid)
        ids: Tokens = check_input_ids(input_ids).numpy()
        tokens, real = past.extended(ids, _mask(attention_mask))
        # Of each new column, the row's last token there: by its place in the row, -1 = none yet.
        places = np.cumsum(real, axis=1)[:, -ids.shape[1] :] - 1
        check_positions(position_ids, places, real[:, -ids.shape[1] :])
        logits = self._logits(tokens, real, places[:, _columns(logits_to_keep)], past.ended)
        past.assign(tokens, real)
        self._columns = max(self._columns, tokens.shape[1])
        kept = past if past_key_values is not None or use_cache is not False else None
        output = CausalLMOutputWithPast(logits=logits, past_key_values=kept)
        return output if return_dict is not False else output.to_tuple()

    def _logits(
        self, tokens: Tokens, real: Mask, places: Tokens, ended: Mask | None
    ) -> torch.Tensor:
        """Logits at places in rows, `[batch, columns, vocab]`; equal rows are asked for once."""
        lengths = real.sum(axis=1)
        first = np.where(places < 0, lengths[:, None], places).min(axis=1)
        wanted = lengths - first
        if ended is not None:
            wanted[ended] = 0
        asked: dict[bytes, int] = {}
        rows: list[TokenIds] = []
        counts: list[int] = []
        source: list[int] = []
        for index, count in enumerate(wanted.tolist()):
            if count <= 0:
                source.append(-1)
                continue
            row = tokens[index, real[index]]
            found = asked.setdefault(row.tobytes(), len(rows))
            if found == len(rows):
                rows.append(TokenIds(row))
                counts.append(count)
            counts[found] = max(counts[found], count)
            source.append(found)
        answers = self._forward(rows, counts) if rows else []
        self._passes += 1
        if self.first_rows is None:
            self.first_rows, self.first_at = source, time.perf_counter()
            self._first_columns = tokens.shape[1]
        shape = (len(tokens), places.shape[1], self.vocab_size)
        # a model may give logits of another dtype than its own
        dtype = answers[0].dtype if answers else self.dtype
        logits = torch.empty(shape, dtype=dtype, device="cpu")
        for index, found in enumerate(source):
            if found < 0:
                logits[index] = 0
                continue
            own = places[index] - (lengths[index] - counts[found])
            if places[index, 0] >= 0 and (np.diff(own) == 1).all():
                logits[index] = answers[found][own[0] : own[-1] + 1]
            else:  # padding inside, before or behind
                logits[index] = answers[found][torch.from_numpy(own.clip(min=0))]
                logits[index, torch.from_numpy(places[index] < 0)] = 0
        return logits

    def _sample(
        self,
        input_ids: torch.Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **others: Any,
    ) -> Any:
        """Transformers' loop of one token a step, without forward passes of rows that have ended.

        It goes on with the pad token in those rows, and looks at their logits no more; the caller
        may, by way of scores or a processor.
        """
        rows, asked = others.get("past_key_values"), generation_config
        shown = asked.return_dict_in_generate and (asked.output_scores or asked.output_logits)
        padded = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        own = all(map(_is_rule_of_transformers, logits_processor))
        if isinstance(rows, TokenRows) and padded and own and not shown:
            stopping_criteria = _EndedRows(stopping_criteria, rows)
        try:
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **others,
            )
        finally:
            if isinstance(rows, TokenRows):
                rows.ended = None

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Transformers' loop of drafts, whose first pass carries all tokens of its input: a cache
        that has some of them goes on from none."""
        rows = kwargs.get("past_key_values")
        if isinstance(rows, TokenRows) and rows.begins(input_ids, kwargs.get("attention_mask")):
            rows.reset()
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give transformers' loops a cache of the right kind, unless the caller brought one.

        Raises:
            CapacityError: a row may become longer than the model takes; nothing was computed.
        """
        self._most_columns = max(self._most_columns, max_cache_length)
        mask = model_kwargs.get("attention_mask")
        padding = 0 if mask is None else int((mask == 0).sum(dim=1).min())
        longest = max_cache_length + 1 - padding
        if self._max_model_len is not None and longest > self._max_model_len:
            raise CapacityError(
                f"the longest row may become {longest:,} tokens long: the model takes"
                f" {self._max_model_len:,}; lower max_new_tokens"
            )
        if model_kwargs.get("past_key_values") is not None:
            # refuses what contradicts it
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = TokenRows()

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Those of transformers; guidance asks for the logits of its last token alone."""
        processors = super()._get_logits_processor(*args, **kwargs)
        for processor in processors:
            guides = isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
            if guides and processor.model is self:
                processor.model = functools.partial(self, logits_to_keep=1)
        return processors


class _EndedRows(StoppingCriteriaList):  # type: ignore[misc]
    """Stopping criteria that tell a cache which rows they have ended."""

    def __init__(self, criteria: StoppingCriteriaList, rows: TokenRows) -> None:
        super().__init__(criteria)
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        over: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
        ended, before = over.numpy(force=True), self._rows.ended
        self._rows.ended = ended if before is None else ended | before
        return over


def _is_rule_of_transformers(processor: Any) -> bool:
    """Whether no code of the caller's looks at the logits that it gets."""
    calls_back = (PrefixConstrainedLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
    own = type(processor).__module__.split(".")[0] == "transformers"
    return own and not isinstance(processor, calls_back)


def _mask(given: Any) -> Mask | None:
    if given is None:
        return None
    with naming("attention_mask", given, "a dense tensor [batch, tokens] of numbers"):
        mask: Mask = given.numpy(force=True) != 0
    if mask.ndim != 2:
        raise ConfigError("attention_mask", outline(given), "of two dimensions")
    return mask


def _columns(logits_to_keep: Any) -> slice | Tokens:
    if isinstance(logits_to_keep, torch.Tensor):
        index: Tokens = logits_to_keep.numpy(force=True)
        return index
    return slice(-int(logits_to_keep) if logits_to_keep else None, None)
