"""An adapter as a model of EleutherAI's lm-evaluation-harness, for `lm_eval.simple_evaluate`.

Texts become tokens, windows and stop strings as in the harness's own `hf` model, from which this
one inherits: the scores are the same. Likelihoods are log-probabilities that the engine computes,
so no logits travel, and what prompts share, instructions and examples, is computed once.

Needs `pip install "litecache[eval]"`; nothing of LiteCache imports this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from litecache.adapter.kv_cache_adapter import KVCacheAdapter

Scored = tuple[Any, list[int], list[int]]


class LiteCacheLM(HFLM):  # type: ignore[misc]  # lm_eval is untyped
    """A `lm_eval.api.model.LM` over an adapter.

    Args:
        adapter: stays the caller's to close.
        tokenizer: None = the adapter's.
        batch_size: requests that are sent at once.
        max_length: tokens of context that the model is given; None = as many as it takes.
        **options: of `lm_eval.models.huggingface.HFLM` that concern texts, as `add_bos_token`,
            `prefix_token_id` and `think_end_token`.
    """

    def __init__(
        self,
        adapter: KVCacheAdapter,
        *,
        tokenizer: Any = None,
        batch_size: int = 64,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            pretrained=adapter,
            backend="causal",
            tokenizer=adapter.tokenizer if tokenizer is None else tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            **options,
        )
        self._max_length = min(self.max_length, adapter.info.max_model_len)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Scored],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether greedy decoding would give them.

        Args:
            requests: (texts, the context's tokens, the continuation's tokens); texts that are
                None are those of a rolling window, whose caller keeps the books.
            disable_tqdm: draw no bar.
            override_bs: instead of `batch_size`.
        """
        # those with a beginning in common are neighbours: it is computed once, and not evicted
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        size = override_bs or self.batch_size
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(order), disable=disable_tqdm, desc="Scoring") as bar:
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                scored = self._score([requests[i] for i in batch])
                for index, answer in zip(batch, scored, strict=True):
                    answers[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                bar.update(len(batch))
        return [answers[index] for index in range(len(requests))]

    def _score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        # the last token is predicted, but no context of another
        rows = [(context + answer)[-(self.max_length + 1) :] for _, context, answer in requests]
        counts = [len(answer) for _, _, answer in requests]
        most = self.model.info.max_model_len
        told = self.model.prompt_logprobs(
            [row[:most] for row in rows],
            top=1,
            first=[len(row) - count for row, count in zip(rows, counts, strict=True)],
        )
        answers = []
        for row, count, each in zip(rows, counts, told, strict=True):
            total = sum(token.logprob for token in each)
            greedy = [token.top[0][0] for token in each]
            if len(row) > most:
                logits = self.model.forward(torch.tensor([row[:-1]]), logits_to_keep=1)[0, 0]
                total += float(logits.float().log_softmax(0)[row[-1]])
                greedy.append(int(logits.argmax()))
            answers.append((total, greedy == row[-count:]))
        return answers

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Continue a padded batch until one of `stop` is in the text; the caller cuts it off."""
        given = dict(generation_kwargs)
        if not given.get("temperature") and not given.get("do_sample"):
            given.pop("temperature", None)
            given["do_sample"] = False
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        tokens: torch.Tensor = self.model.generate(
            context,
            max_length=max_length,
            stop_strings=[text for text in stop if text and text != end] or None,
            tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id,
            **given,
        )
        return tokens
