"""Forward passes: logits, loss and log-probabilities of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from litecache.adapter.driver import Driver
from litecache.adapter.forward import prompt_logprobs_of, row_logits
from litecache.adapter.generation import refuse_arguments
from litecache.adapter.prompts import (
    as_list,
    check_input_ids,
    check_positions,
    check_prompts,
    naming,
    real_columns,
)
from litecache.checks import check_integer
from litecache.errors import ConfigError
from litecache.types import TokenLogprobs

CACHE_ARGUMENTS = ("cache_salt", "cache", "cache_ttl_s", "retention")


class ForwardSurface(Driver):
    """Calls that draw no tokens."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        *,
        cache_salt: str | None = None,
        cache: str = "default",
        cache_ttl_s: float | None = None,
        retention: str = "normal",
    ) -> torch.Tensor:
        """Logits of a batch of prompts, as the model gives them.

        What is cached is reused, but for the positions whose logits are asked for.

        Args:
            input_ids: `[batch, tokens]`, padded on either side.
            attention_mask: `[batch, tokens]`; None = nothing is padding.
            logits_to_keep: of so many of the last columns; 0 = of all.
            cache_salt, cache, cache_ttl_s, retention: as in `generate`.

        Returns:
            `[batch, kept, vocab]` in the model's dtype, on the CPU; zeros where a row is padding.

        Raises:
            ConfigError: an argument is invalid; nothing was sent.
            LiteCacheError: a request failed.
        """
        self._check_open()
        ids = check_input_ids(input_ids)
        check_integer("logits_to_keep", logits_to_keep, 0, ids.shape[1])
        use = self._use(cache_salt, cache, cache_ttl_s, retention)
        return row_logits(self._forward(use), ids, attention_mask, logits_to_keep)

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """A call of the model, as of transformers': `.logits`, and with `labels` the `.loss`.

        Args:
            input_ids, attention_mask, logits_to_keep: as in `forward`.
            position_ids: `[batch, tokens]`: nothing but those that follow from the mask.
            labels: `[batch, tokens]`: the tokens to predict, -100 = none.
            **kwargs: those of `forward`, and of transformers' what changes nothing here.

        Raises:
            ConfigError: an argument is invalid or not supported; nothing was sent.
            LiteCacheError: a request failed.
        """
        own = {name: kwargs.pop(name) for name in CACHE_ARGUMENTS if name in kwargs}
        given = {name: value for name, value in kwargs.items() if name not in ("use_cache",)}
        if given.pop("return_dict", True) is not True:
            raise ConfigError("return_dict", False, "True")
        refuse_arguments(given, forward=True)
        if position_ids is not None:
            real = real_columns(check_input_ids(input_ids), attention_mask, None)
            check_positions(position_ids, np.cumsum(real, axis=1) - 1, real)
        if labels is not None and logits_to_keep:
            raise ConfigError("logits_to_keep", logits_to_keep, "0 with labels")
        logits = self.forward(input_ids, attention_mask, logits_to_keep, **own)
        loss = None
        if labels is not None:
            with naming("labels", labels, f"an int64 tensor {list(logits.shape[:2])}"):
                loss = ForCausalLMLoss(logits, labels.cpu(), logits.shape[-1])
        return CausalLMOutput(loss=loss, logits=logits)

    def prompt_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        top: int = 0,
        *,
        first: int | Sequence[int] = 1,
        cache_salt: str | None = None,
        cache: str = "default",
        cache_ttl_s: float | None = None,
        retention: str = "normal",
    ) -> list[tuple[TokenLogprobs, ...]]:
        """Log-probabilities of the tokens of prompts: what a model makes of a given text.

        What is cached is reused, but for the positions that give them.

        Args:
            prompts: token ids.
            top: also tell so many of the likeliest tokens at each place.
            first: index of the first token of interest, for all prompts or for each; at least 1,
                since nothing tells of a prompt's first token.
            cache_salt, cache, cache_ttl_s, retention: as in `generate`.

        Returns:
            Per prompt one for each token from `first` on.

        Raises:
            ConfigError: an argument is invalid; nothing was sent.
            LiteCacheError: a request failed.
        """
        self._check_open()
        checked = check_prompts(prompts, self.info.max_model_len)
        check_integer("top", top, 0, self.info.vocab_size)
        valid = f"one index, or a list of {len(checked)}"
        with naming("first", first, valid):
            firsts = (
                [first] * len(checked) if isinstance(first, int) else [*as_list("first", first)]
            )
        if len(firsts) != len(checked):
            raise ConfigError("first", len(firsts), valid)
        for each, tokens in zip(firsts, checked, strict=True):
            check_integer("first", each, 1, len(tokens))
        use = self._use(cache_salt, cache, cache_ttl_s, retention)
        return prompt_logprobs_of(self._forward(use), checked, firsts, top)
