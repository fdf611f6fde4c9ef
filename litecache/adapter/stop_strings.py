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
        except ValueError as error:
            raise ConfigError("stop_strings", list(texts), str(error)) from error
        first = self._criterion.max_valid_positions * len(texts)
        ends = self._criterion.embedding_vec[:, first:-1] > 0
        self._can_end: list[bool] = ends.any(dim=1).tolist()

    def first_end(self, before: Sequence[int], tokens: Sequence[int]) -> int | None:
        """How many of `tokens` belong to the sequence, None when none of them ends it.

        Args:
            before: the tokens in front of them, prompt included.
            tokens: the new ones.
        """
        width = self._criterion.maximum_token_len
        seen = list(before[-width:])
        for count, token in enumerate(tokens, 1):
            seen.append(token)
            if token < len(self._can_end) and self._can_end[token]:
                window = torch.tensor([seen[-width:]])
                if bool(self._criterion(window, None)[0]):
                    return count
        return None
