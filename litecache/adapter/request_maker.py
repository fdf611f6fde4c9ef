"""From checked prompts and settings to the requests of one call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from litecache.adapter.generation import GenerationSettings, draw_seed
from litecache.adapter.pending import PendingRequest
from litecache.adapter.stop_strings import StopStrings
from litecache.token_ids import TokenIds
from litecache.types import Request


class RequestMaker:
    """Makes the requests of one driver, each checked against the engine's limits.

    Args:
        client_id: names the driver.
        info: the engine's `EngineInfo`.
        max_positions: the model's `max_position_embeddings`, if it has any.
    """

    def __init__(self, client_id: str, info: Any, max_positions: int | None) -> None:
        self._client_id, self._info, self._max_positions = client_id, info, max_positions
        self._numbers = itertools.count(1)
        self._last_stop: tuple[Any, tuple[str, ...], StopStrings] | None = None

    def make(
        self,
        prompts: Sequence[TokenIds],
        widths: Sequence[int],
        settings: Sequence[GenerationSettings],
        *,
        cache_salt: str,
        seed: int | None,
        tokenizer: Callable[[], Any],
        streaming: bool = False,
    ) -> list[PendingRequest]:
        """Requests of one call, the samples of a prompt in a row; nothing is sent.

        Args:
            prompts: token ids.
            widths: tokens of each as HF counts them, padding included.
            settings: of each prompt.
            cache_salt: whose blocks.
            seed: of sampling; None = drawn.
            tokenizer: asked for where settings have stop strings.
            streaming: somebody looks at each token as it comes.

        Raises:
            ConfigError: a setting does not go with a prompt.
            CapacityError: a request can never fit.
        """
        drawn = draw_seed(seed, sampling=any(each.do_sample for each in settings))
        rows: list[PendingRequest] = []
        for prompt, width, each in zip(prompts, widths, settings, strict=True):
            stop = self._stop_strings(tokenizer(), each.stop_strings) if each.stop_strings else None
            for _ in range(each.num_return_sequences):
                sampling = each.sampling_params(
                    width, max_positions=self._max_positions, seed=drawn, sample_index=len(rows)
                )
                request = Request(
                    f"{self._client_id}-{next(self._numbers)}",
                    self._client_id,
                    prompt,
                    sampling,
                    cache_salt=cache_salt,
                    max_time_s=each.max_time_s,
                )
                self._info.check(request)
                rows.append(PendingRequest(request, streaming=streaming, stop=stop))
        return rows

    def _stop_strings(self, tokenizer: Any, texts: tuple[str, ...]) -> StopStrings:
        """Kept from call to call: transformers looks at the whole vocabulary to prepare one."""
        kept = self._last_stop
        if kept is None or kept[0] is not tokenizer or kept[1] != texts:
            kept = self._last_stop = (tokenizer, texts, StopStrings(tokenizer, texts))
        return kept[2]
