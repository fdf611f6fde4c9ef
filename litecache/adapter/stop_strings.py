"""Texts that end a sequence: transformers' own criterion, asked only when it could say yes.

The driver has the tokenizer, so the driver looks. A token can only complete a text that it overlaps
with; that is one look-up, and most tokens go no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StopStringCriteria

from litecache.errors import ConfigError


class StopStrings:
    """Looks for the end of a sequence.

    Args:
        tokenizer: the model's.
        texts: any of these ends a sequence; the token that completes it is the last one.

    Raises:
        ConfigError: no token of the tokenizer can ever complete one of them.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        try:
            self._criterion = StopStringCriteria(tokenizer, list(texts))
        except Exception as error:  # whatever it makes of the tokenizer or the texts
            valid = f"texts that the tokenizer can spell ({type(error).__name__}: {error})"
            raise ConfigError("stop_strings", list(texts), valid) from error
        first = self._criterion.max_valid_positions * len(texts)
        ends = self._criterion.embedding_vec[:, first:-1] > 0
        self._can_end: list[bool] = ends.any(dim=1).tolist()

    def last_of(self, tokens: Sequence[int]) -> list[int]:
        """The end of a sequence, as far as `first_end` looks back."""
        return list(tokens[-self._criterion.maximum_token_len :])

    def first_end(self, before: Sequence[int], tokens: Sequence[int]) -> int | None:
        """How many of `tokens` belong to the sequence, None when none of them ends it.

        Args:
            before: the tokens in front of them, prompt included; `last_of` them is enough.
            tokens: the new ones.
        """
        width = self._criterion.maximum_token_len
        seen = self.last_of(before)
        for count, token in enumerate(tokens, 1):
            seen.append(token)
            if token < len(self._can_end) and self._can_end[token]:
                window = torch.tensor([seen[-width:]])
                if bool(self._criterion(window, None)[0]):
                    return count
        return None
