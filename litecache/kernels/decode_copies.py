"""The torch path's contiguous copies of the KV of running decodes, appended to step by step.

SDPA wants a sequence's keys in a row, the pool has them in blocks. Gathering them anew costs a pass
over the whole context for every token; a batch of decodes that stays together keeps the gathered
keys instead and adds one token a step. A copy belongs to sequence *lives*, so a row that another
request took over, or a request that was preempted, never meets an old one. Memory is bounded; what
does not fit is gathered as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_BYTES = 512 << 20
HEADROOM_TOKENS = 256
"""Tokens a copy can grow by before it is made anew; pages that are not reached cost nothing."""

Lives = tuple[int, ...]


@dataclass
class KVCopy:
    """One layer's KV of a batch of decodes, `[.., .., capacity, dim]` each, up to `contexts`."""

    keys: torch.Tensor
    values: torch.Tensor
    contexts: tuple[int, ...]
    step: int

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes


class DecodeCopies:
    """Copies by layer and batch, `[kv_heads, n, capacity, dim]`.

    Args:
        max_bytes: bound on all copies together.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._copies: dict[tuple[int, Lives], KVCopy] = {}
        self._step = 0
        self._last_seen: dict[Lives, int] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.num_bytes for copy in self._copies.values())

    def begin_step(self) -> None:
        """Another step: copies that the last one did not use are given up."""
        self._step += 1
        fresh = self._step - 1
        self._copies = {key: copy for key, copy in self._copies.items() if copy.step >= fresh}
        self._last_seen = {lives: step for lives, step in self._last_seen.items() if step >= fresh}

    def extend(
        self,
        layer: int,
        lives: Lives,
        contexts: Sequence[int],
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Append a step's tokens to a copy.

        Args:
            layer: tells layers apart.
            lives: of the batch's sequences.
            contexts: tokens of each, the new one included.
            key, value: the new tokens, `[n, kv_heads, dim]`.

        Returns:
            Keys and values `[kv_heads, n, longest, dim]`, zero behind shorter sequences; None when
            there is no copy of the step before, or no room in it.
        """
        copy = self._copies.get((layer, lives))
        longest = max(contexts)
        if copy is None or longest > copy.keys.shape[2]:
            return None
        if copy.contexts != tuple(context - 1 for context in contexts):
            return None
        equal = min(contexts) == longest
        for space, new in ((copy.keys, key), (copy.values, value)):
            tokens = new.transpose(0, 1)
            if equal:
                space[:, :, longest - 1] = tokens
            else:
                space[:, :, longest - 1] = 0
                rows = torch.arange(len(lives))
                space[:, rows, torch.tensor(contexts) - 1] = tokens
        copy.contexts, copy.step = tuple(contexts), self._step
        return copy.keys[:, :, :longest], copy.values[:, :, :longest]

    def offer(
        self,
        layer: int,
        lives: Lives,
        contexts: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Keep what was gathered, `[kv_heads, n, tokens, dim]`, if the batch has come to stay."""
        # Not at first sight: a batch that changes in every step would only pay for the copies.
        stays = self._last_seen.get(lives, self._step) < self._step
        if not stays and (layer, lives) not in self._copies:
            self._last_seen.setdefault(lives, self._step)
            return
        longest = max(contexts)
        kv_heads, count, _, dim = keys.shape
        shape = (kv_heads, count, longest + HEADROOM_TOKENS, dim)
        self._copies.pop((layer, lives), None)
        needed = 2 * kv_heads * count * shape[2] * dim * keys.itemsize
        if self.num_bytes + needed > self._max_bytes:
            return
        copy = KVCopy(keys.new_empty(shape), values.new_empty(shape), tuple(contexts), self._step)
        copy.keys[:, :, :longest] = keys[:, :, :longest]
        copy.values[:, :, :longest] = values[:, :, :longest]
        self._copies[layer, lives] = copy
