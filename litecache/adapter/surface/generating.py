"""Hugging Face's `generate`, batches of token ids, streams, and requests for servers.

Calls are requests of the engine loop, or transformers' own loop over forward passes; which of the
two is chosen here, once a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from litecache.adapter.driver import CacheUse, Driver, has_methods
from litecache.adapter.driver_loop import generate_in_driver
from litecache.adapter.forward import prompt_logprobs_of
from litecache.adapter.generation import (
    LOOPS,
    GenerationSettings,
    by_name,
    needs_driver,
    prompts_to_score,
    translate,
)
from litecache.adapter.pending import Guide, PendingRequest, ReuseReport, aborting
from litecache.adapter.prompts import (
    append_rows,
    check_input_ids,
    check_prompts,
    check_sequences,
    one_input,
    real_columns,
    split_rows,
)
from litecache.adapter.proxy import ModelProxy, TokenRows
from litecache.adapter.row_progress import check_progress, progress_of, show_progress
from litecache.adapter.streaming import TextDecoder, TokenStream, feed_streamer
from litecache.checks import check_flag, check_integer
from litecache.errors import ConfigError, outline
from litecache.token_ids import TokenIds


class GenerateSurface(Driver):
    """Calls that give new tokens."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *others: Any,
        loop: str = "auto",
        streamer: Any = None,
        progress: bool | str = False,
        cache_salt: str | None = None,
        cache: str = "default",
        cache_ttl_s: float | None = None,
        retention: str = "normal",
        seed: int | None = None,
        tokenizer: Any = None,
        prompt_logprobs: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue every row of a batch, as `transformers`' `generate` does.

        Args:
            inputs: `[batch, tokens]`, also by the name `input_ids`, padded on either side. None =
                one row of the model's `bos_token_id`.
            generation_config: settings; keyword arguments override it.
            *others: `logits_processor`, `stopping_criteria`, `prefix_allowed_tokens_fn`,
                `synced_gpus` and `assistant_model`, which transformers takes in this order.
            loop: "engine": the replicas draw the tokens, by rules of their own. "driver":
                transformers' own `generate` draws them here, with every argument and object that
                it takes, over the replicas' logits. "auto": the engine loop, unless the call asks
                for what it does not have; `.litecache.loop` says which it was.
            streamer: gets the prompt and then each step's tokens.
            progress: True draws a bar of rows and tokens to stderr where that is a terminal or a
                notebook; "always" writes its last state to a file or a pipe, too.
            cache_salt: share cached blocks only with calls of the same salt.
            cache: what becomes of the KV that this call computes; what others left is found in any
                case. "default": later calls find it in the pool and in the tiers below.
                "read-only": in the pool only, and nothing is saved because of this call.
                "no-store": nowhere, so that samples of one prompt compute it each for itself; in
                the driver loop such a call finds what its own passes have computed alone.
            cache_ttl_s: what is saved because of this call leaves RAM and disk after so many
                seconds, if the group's own `ttl_s` does not come first; None = only that counts.
            retention: "low", "normal" or "high": where room is needed there, low leaves first.
            seed: of sampling; None = drawn from torch's default generator. In the driver loop it
                is torch's own: the tokens are those of a stock model on the CPU after
                `torch.manual_seed(seed)`, and torch's generator is put back afterwards; such calls
                of several threads take turns.
            tokenizer: for `stop_strings`; None = the adapter's.
            prompt_logprobs: also tell each prompt token's log-probability and those of so many of
                the likeliest in its place; needs `return_dict_in_generate`, see
                `ReuseReport.prompt_logprobs`. The prompt is computed, not reused, for it.
            **kwargs: `attention_mask`, any field of `GenerationConfig`, in the driver loop any
                other argument of transformers' `generate`, and `logit_bias`, `presence_penalty`,
                `frequency_penalty`, `stop_token_ids`, `logprobs` (of the engine loop alone; needs
                `return_dict_in_generate`: see `ReuseReport.logprobs`).

        Returns:
            `[batch * num_return_sequences, tokens + new]`, or with `return_dict_in_generate` what
            transformers returns, with a `ReuseReport` as `.litecache`.

        Raises:
            ConfigError: a setting is invalid or not supported; nothing was sent.
            LiteCacheError: a request failed.
        """
        self._check_open()
        progress = check_progress(progress)
        kwargs |= by_name(others, kwargs)
        given = one_input(inputs, kwargs.pop("input_ids", None))
        if not isinstance(loop, str) or loop not in LOOPS:
            raise ConfigError("loop", loop, f"one of {', '.join(LOOPS)}")
        if streamer is not None and not has_methods(streamer, "put", "end"):
            raise ConfigError("streamer", streamer, "an object with put() and end()")
        use = self._use(cache_salt, cache, cache_ttl_s, retention)
        past, asked = kwargs.get("past_key_values"), dict(kwargs)
        if (
            isinstance(past, TokenRows)
            and given is not None
            and past.begins(check_input_ids(given), kwargs.get("attention_mask"))
        ):
            del asked["past_key_values"]  # the engine finds the KV of these tokens, too
        asks = (generation_config, asked, self.generation_config)
        scored: list[TokenIds] = []
        if prompt_logprobs is not None:
            check_integer("prompt_logprobs", prompt_logprobs, 0, self.info.vocab_size)
            scored = prompts_to_score(given, kwargs.get("attention_mask"), *asks)
        if loop == "driver" or (loop == "auto" and needs_driver(*asks)):
            forward = self._forward(use)
            most = min(self.info.max_model_len, self.info.capacity_tokens)
            proxy = ModelProxy(self.config, self.generation_config, forward, max_model_len=most)
            with show_progress(progress, "Generating", proxy.progress):
                result = generate_in_driver(
                    proxy,
                    given,
                    generation_config,
                    kwargs,
                    streamer=streamer,
                    seed=seed,
                    tokenizer=tokenizer,
                    own_tokenizer=lambda: self.tokenizer,
                    first_pass=lambda: forward.first_pass,
                    # threads of torch spin for a while after each operation, on cores that a
                    # replica on the CPU computes with
                    most_threads=1 if self.info.device == "cpu" else None,
                )
        else:
            rows = past if isinstance(past, TokenRows) else None  # an empty list is no cache
            options = (use, seed, tokenizer, streamer, progress)
            result = self._generate(given, generation_config, asked, rows, *options)
        if prompt_logprobs is not None:
            firsts = [1] * len(scored)
            told = prompt_logprobs_of(self._forward(use), scored, firsts, prompt_logprobs)
            whole = tuple((None, *row) for row in told)
            result.litecache = dataclasses.replace(result.litecache, prompt_logprobs=whole)
        return result

    def _settings(
        self, given: GenerationConfig | None, arguments: dict[str, Any]
    ) -> GenerationSettings:
        """Of one call, see `translate`."""
        return translate(given, arguments, self.generation_config, self.info.vocab_size)

    def _generate(
        self,
        given: Any,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
        past: TokenRows | None,
        use: CacheUse,
        seed: int | None,
        tokenizer: Any,
        streamer: Any,
        progress: bool | str,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """`generate` in the engine loop; `past` is brought up to date, as transformers does."""
        mask = kwargs.pop("attention_mask", None)
        settings = self._settings(generation_config, kwargs)
        if settings.sampling.logprobs is not None and not settings.return_dict:
            raise ConfigError(
                "logprobs", settings.sampling.logprobs, "with return_dict_in_generate=True"
            )
        if given is None and settings.bos_token_id is not None:
            given = torch.tensor([[settings.bos_token_id]], device="cpu")
        input_ids = check_input_ids(given)
        prompts = split_rows(input_ids, mask, settings.mask_pad_token)
        samples, pad = settings.num_return_sequences, settings.pad_token_id
        settings.check_padding(samples * len(prompts))
        real = real_columns(input_ids, mask, settings.mask_pad_token)
        seen = map(settings.seeing, input_ids.numpy(), real)
        width = input_ids.shape[1]
        jobs = [(prompt, width, each) for prompt, each in zip(prompts, seen, strict=True)]
        rows = self._start(jobs, use, seed, tokenizer, streaming=streamer is not None)
        bar = show_progress(progress, "Generating", progress_of(rows))
        with aborting(rows, self._replicas.abort), bar:
            if streamer is not None:
                feed_streamer(streamer, input_ids.repeat_interleave(samples, dim=0), rows, pad)
            new_tokens = [row.wait() for row in rows]
        sequences = append_rows(given.repeat_interleave(samples, dim=0), new_tokens, pad)
        if past is None and settings.return_dict and settings.use_cache:
            past = TokenRows()
        if past is not None:
            past.follow(sequences, real.repeat(samples, axis=0))
        if not settings.return_dict:
            return sequences
        output = GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=past)
        output.litecache = ReuseReport.of(rows)
        return output

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        progress: bool | str = False,
        cache_salt: str | None = None,
        cache: str = "default",
        cache_ttl_s: float | None = None,
        retention: str = "normal",
        seed: int | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> list[list[int]]:
        """Continue lists of token ids of any lengths, all at once.

        Args:
            prompts: token ids.
            generation_config: settings of all prompts, or a list with those of each.
            progress, cache_salt, cache, cache_ttl_s, retention, seed, tokenizer, **kwargs: as in
                `generate`, for all prompts.

        Returns:
            The new tokens of each prompt, `num_return_sequences` lists in a row for each.

        Raises:
            ConfigError: a setting or a prompt is invalid; nothing was sent.
            LiteCacheError: a request failed.
        """
        self._check_open()
        progress = check_progress(progress)
        checked, given = check_prompts(prompts, self.info.max_model_len), generation_config
        if given is None or isinstance(given, GenerationConfig):
            settings = [self._settings(given, kwargs)] * len(checked)
        elif isinstance(given, (list, tuple)) and len(given) == len(checked):
            settings = [self._settings(each, kwargs) for each in given]
        else:
            what = len(given) if isinstance(given, (list, tuple)) else given
            valid = f"one GenerationConfig, or a list of {len(checked)}"
            raise ConfigError("generation_config", what, valid)
        for each in settings:
            if each.sampling.logprobs is not None:
                raise ConfigError("logprobs", each.sampling.logprobs, "None in generate_batch")
        jobs = [(prompt, len(prompt), each) for prompt, each in zip(checked, settings, strict=True)]
        use = self._use(cache_salt, cache, cache_ttl_s, retention)
        rows = self._start(jobs, use, seed, tokenizer)
        bar = show_progress(progress, "Generating", progress_of(rows))
        with aborting(rows, self._replicas.abort), bar:
            return [list(row.wait()) for row in rows]

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        *,
        samples: int = 1,
        streaming: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
        cache: str = "default",
        cache_ttl_s: float | None = None,
        retention: str = "normal",
        seed: int | None = None,
        tokenizer: Any = None,
        guides: Sequence[Guide] | None = None,
        **kwargs: Any,
    ) -> list[PendingRequest]:
        """Start requests and return at once, for servers, which read many of them at a time.

        Whoever calls this reads them, by `wait`, `stream` or `astream`, and ends those that nobody
        waits for any more by `abort(row.request_id)`.

        Args:
            prompts: token ids.
            generation_config: settings of all prompts.
            samples: of each prompt, which differ where tokens are drawn at random.
            streaming: somebody looks at each token as it comes.
            priority: lower runs first; one level is worth ten seconds of waiting.
            cache_salt, cache, cache_ttl_s, retention, seed, tokenizer, **kwargs: as in `generate`,
                `logprobs` included.
            guides: of each answer one, which says token by token what may follow; called in
                threads of the adapter's. None = anything may.

        Returns:
            The requests, `samples` in a row for each prompt.

        Raises:
            ConfigError: a setting or a prompt is invalid; nothing was sent.
            CapacityError: a prompt and its new tokens are more than the model or the pool takes.
        """
        self._check_open()
        checked = check_prompts(prompts, self.info.max_model_len)
        settings = self._settings(generation_config, kwargs)
        if settings.num_return_sequences != 1:
            valid = "1 in submit, which takes samples"
            raise ConfigError("num_return_sequences", settings.num_return_sequences, valid)
        check_sequences("samples", len(checked) * check_integer("samples", samples, 1))
        jobs = [(prompt, len(prompt), settings) for prompt in checked for _ in range(samples)]
        use = self._use(cache_salt, cache, cache_ttl_s, retention)
        if guides is not None:
            listed = isinstance(guides, (list, tuple))
            if not listed or not all(has_methods(guide, "take") for guide in guides):
                raise ConfigError("guides", outline(guides), "a list of guides")
            if len(guides) != len(jobs):
                raise ConfigError("guides", len(guides), f"{len(jobs)}, one for each answer")
        return self._start(
            jobs, use, seed, tokenizer, streaming=streaming, priority=priority, guides=guides
        )

    def stream(
        self,
        prompt: str | Sequence[int] | torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Sequence[int] | torch.Tensor | None = None,
        as_tokens: bool = False,
        skip_special_tokens: bool = True,
        cache_salt: str | None = None,
        cache: str = "default",
        cache_ttl_s: float | None = None,
        retention: str = "normal",
        seed: int | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> TokenStream:
        """Continue one prompt and iterate over the output as it comes.

        Args:
            prompt: text, or token ids; also by the name `input_ids`.
            generation_config: settings; keyword arguments override it.
            input_ids: token ids, instead of `prompt`.
            as_tokens: iterate over token ids instead of text.
            skip_special_tokens: leave them out of the text.
            tokenizer: for the texts; None = the adapter's.
            cache_salt, cache, cache_ttl_s, retention, seed, **kwargs: as in `generate`.

        Returns:
            An iterator with `.request_id`, `.found_tokens`, `.reused_tokens`, `.ttft_s`,
            `.logprobs`, `.finish_reason` and `.close()`.

        Raises:
            ConfigError: a setting is invalid or not supported; nothing was sent.
        """
        self._check_open()
        settings = self._settings(generation_config, kwargs)
        if settings.num_return_sequences != 1:
            raise ConfigError("num_return_sequences", settings.num_return_sequences, "1 in stream")
        tokens = self._tokens(one_input(prompt, input_ids), tokenizer)
        check_flag("skip_special_tokens", skip_special_tokens)
        decoder = None
        if not check_flag("as_tokens", as_tokens):
            decoder = TextDecoder.of(self._tokenizer_of(tokenizer), skip_special_tokens)
        jobs = [(tokens, len(tokens), settings)]
        (row,) = self._start(
            jobs,
            self._use(cache_salt, cache, cache_ttl_s, retention),
            seed,
            tokenizer,
            streaming=True,
        )
        return TokenStream(row, decoder, self._replicas.abort)

    async def astream(
        self,
        prompt: str | Sequence[int] | torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        """`stream` on an event loop: `async for text in llm.astream(...)`.

        Leaving the loop early, or cancelling its task, ends the request. For what was reused and
        the like, iterate over `stream(...)` itself with `async for`.

        Args:
            prompt, generation_config, **kwargs: as in `stream`.

        Yields:
            Pieces of text, or token ids with `as_tokens`.

        Raises:
            ConfigError: a setting is invalid or not supported; nothing was sent.
            LiteCacheError: the request failed.
        """
        # routing and submitting may wait for an actor
        opened = await asyncio.to_thread(self.stream, prompt, generation_config, **kwargs)
        with contextlib.closing(opened):
            async for piece in opened:
                yield piece
