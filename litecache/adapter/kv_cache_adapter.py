"""`KVCacheAdapter`: Hugging Face's `generate` over a group of LiteCache actors.

The driver's side: it merges settings, splits padded batches, routes, and puts results together.
It starts or joins the actors; it never holds weights or KV. Requests of all threads of a driver
share one poll per replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import uuid
import weakref
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from litecache.actors.cluster import open_ray, refuse_inherited_ray
from litecache.actors.group import Group, exists
from litecache.actors.group_spec import GroupSpec, check_actor_options, choose_num_gpus
from litecache.actors.naming import DEFAULT_GROUP, check_group_name
from litecache.actors.operating.cluster_file import read_cluster_file
from litecache.actors.operating.scaling import DRAIN_TIMEOUT_S, ScaleReport, scale_group
from litecache.actors.placement import (
    NodeStorage,
    check_node_storage,
    check_placement,
    check_replicas,
)
from litecache.adapter.cache_use import CacheUse
from litecache.adapter.chat.surface import ChatSurface
from litecache.adapter.driver_loop import generate_in_driver
from litecache.adapter.forward import ReplicaForward, prompt_logprobs_of, row_logits
from litecache.adapter.generation import (
    LOOPS,
    GenerationSettings,
    draw_seed,
    needs_driver,
    prompts_to_score,
    refuse_arguments,
    translate,
)
from litecache.adapter.model_surface import ModelSurface
from litecache.adapter.pending import PendingRequest, ReuseReport, StopStrings, aborting
from litecache.adapter.prefix_files import PrefixReport, export_prefix, import_prefix
from litecache.adapter.prompts import (
    append_rows,
    check_input_ids,
    check_prompt,
    check_prompts,
    check_sequences,
    naming,
    one_input,
    one_row,
    real_columns,
    split_rows,
)
from litecache.adapter.proxy import ModelProxy, TokenRows
from litecache.adapter.replicas import ReplicaSet
from litecache.adapter.row_progress import Progress, check_progress, progress_of, show_progress
from litecache.adapter.sources import load_tokenizer, resolve_model
from litecache.adapter.stats import CacheStats
from litecache.adapter.streaming import TextDecoder, TokenStream, feed_streamer
from litecache.checks import (
    check_flag,
    check_integer,
    check_path,
    check_seconds,
    check_text,
)
from litecache.config import CacheConfig
from litecache.engine.engine_info import EngineInfo
from litecache.engine.loading.model_checks import check_config, check_limits
from litecache.errors import ConfigError, GroupError, LiteCacheError
from litecache.hashing import chain_keys
from litecache.paths import ModelHold
from litecache.token_ids import TokenIds
from litecache.types import Request, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from typing_extensions import Self

WARMED_AT_ONCE = 64
CACHE_ARGUMENTS = ("cache_salt", "cache", "cache_ttl_s", "retention")
TIERS = ("gpu", "ram", "disk", "all")


class KVCacheAdapter(ChatSurface, ModelSurface):
    """A model on Ray actors with a paged, tiered, persistent KV cache.

    Args:
        model: a hub name, a folder, a .gguf file, a transformers module, or a `PretrainedConfig`
            with `weights="random"`.
        cache_config: settings; None = defaults, or the group's own when joining one.
        tokenizer: for `stream`; None = the model's.
        group: joined when it runs, else started under this name. None = a private group, or with
            `detached` the group "default".
        detached: a group started here outlives this driver, until `litecache down`.
        actor_options: Ray options by kind of actor: "gpu", "shard", "coordinator".
        weights: "auto", or "random" for benchmarks.
        seed: of random weights.
        replicas: number of `GpuCache` actors of a group started here, or "all": one per GPU of the
            cluster, or per node where there is none.
        num_threads: torch's threads in each replica on a CPU; None = the machine's cores.
        trust_remote_code: let Python code that comes with the model run, here and in the actors.
        placement: how replicas are spread over nodes: "SPREAD", "PACK", "STRICT_SPREAD" or
            "STRICT_PACK", as Ray's placement groups have it.
        nodes: storage settings of single nodes, which go before those of `cache_config`.
        shards: a group whose shards (RAM and disks) the group started here shares with other
            models; for detached groups. None = shards of its own.

    Attributes:
        config: the model's configuration.
        generation_config: the model's defaults; changes apply to later calls, as in HF.
        group: the actors.

    Raises:
        LiteCacheError: something is refused; nothing that was started stays behind.
    """

    def __init__(
        self,
        model: Any,
        *,
        cache_config: CacheConfig | None = None,
        tokenizer: Any = None,
        group: str | None = None,
        detached: bool = False,
        actor_options: dict[str, dict[str, Any]] | None = None,
        weights: str = "auto",
        seed: int = 0,
        replicas: int | str = 1,
        num_threads: int | None = None,
        trust_remote_code: bool = False,
        placement: str = "SPREAD",
        nodes: Sequence[NodeStorage] | None = None,
        shards: str | None = None,
    ) -> None:
        refuse_inherited_ray()
        options = check_actor_options(actor_options)
        if cache_config is not None and not isinstance(cache_config, CacheConfig):
            raise ConfigError("cache_config", cache_config, "a litecache.CacheConfig or None")
        check_replicas("replicas", replicas)
        check_placement("placement", placement)
        nodes = None if nodes is None else check_node_storage(nodes)
        if num_threads is not None:
            check_integer("num_threads", num_threads, 1, 4096)
        check_flag("detached", detached)
        check_flag("trust_remote_code", trust_remote_code)
        ways = (("decode", "__call__"), ("decode", "encode"))
        if tokenizer is not None and not any(_has_methods(tokenizer, *way) for way in ways):
            raise ConfigError("tokenizer", tokenizer, "a tokenizer of transformers, or None")
        if group is not None:
            check_group_name(group)
        if shards is not None:
            check_group_name(shards)
            if group is None or not detached:
                valid = "None, or a group's name with group= and detached=True"
                raise ConfigError("shards", shards, valid)
        config = cache_config or CacheConfig()
        resolved = resolve_model(
            model,
            weights=weights,
            seed=seed,
            trust_remote_code=trust_remote_code,
            models_bytes=config.models_bytes,
        )
        self._source, self.config = resolved.source, resolved.config
        self.generation_config = resolved.generation_config
        # The actors check all of this, too; here it costs no process.
        check_config(self.config)
        check_limits(self.config, config)
        open_ray()
        joinable = group or (DEFAULT_GROUP if detached else None)
        spec = GroupSpec(
            joinable or f"private-{uuid.uuid4().hex[:8]}",
            self._source,
            config,
            replicas,
            num_threads,
            choose_num_gpus(config, options),
            placement,
            nodes or (),
            shards,
            detached,
            options,
        )
        expected = None if joinable is None else spec.describe()
        if expected is not None and cache_config is None:
            expected["config"] = None
        if expected is not None:
            expected |= {"nodes": nodes and expected["nodes"], "shard_group": shards}
        self.group, started = _join_or_start(spec, expected)
        # Each driver has its own, where it says so.
        says = cache_config is not None or "LITECACHE_CACHE_SALT" in os.environ
        self._own_salt = (config if says else self.group.spec.config).cache_salt
        self._tokenizer = tokenizer
        self._client_id = uuid.uuid4().hex[:12]
        self._numbers = itertools.count(1)
        self._last_stop: tuple[Any, tuple[str, ...], StopStrings] | None = None
        self._replicas = ReplicaSet(self.group, self._client_id)
        # Runs on close, on garbage collection and at exit, once, and before Ray's own exit hook.
        owned = started and not detached
        self._finalizer = weakref.finalize(
            self, _leave, self.group, self._replicas, owned, resolved.hold
        )

    @classmethod
    def from_config(
        cls, path: str | os.PathLike[str], *, name: str | None = None, **arguments: Any
    ) -> Self:
        """Join, or start, a group that a YAML file describes; see docs/cluster.md.

        Args:
            path: of the file, as for `litecache up --config`.
            name: of the model, where the file has several.
            **arguments: of `KVCacheAdapter`, which go before the file.

        Raises:
            ConfigError: the file has no such model, or a field of it is unknown or wrong; names
                file, line, field and value.
            LiteCacheError: as `KVCacheAdapter`.
        """
        setups = {setup.name: setup for setup in read_cluster_file(path)}
        if name not in setups:
            names = ", ".join(str(each) for each in setups)
            raise ConfigError("name", name, f"a model of {os.fspath(path)}, which has {names}")
        setup = setups[name]
        # where models share shards these outlive the driver
        lasting = {"detached": setup.shards is not None}
        return cls(**{**lasting, **setup.arguments(), **arguments})

    @property
    def info(self) -> EngineInfo:
        """The engine's `EngineInfo`: limits, block size, device."""
        info: EngineInfo = self.group.info
        return info

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given, or the model's.

        Raises:
            ConfigError: the model has none.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._source)
        return self._tokenizer

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
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
                "no-store": nowhere, so that samples of one prompt compute it each for itself.
            cache_ttl_s: what is saved because of this call leaves RAM and disk after so many
                seconds, if the group's own `ttl_s` does not come first; None = only that counts.
            retention: "low", "normal" or "high": where room is needed there, low leaves first.
            seed: of sampling; None = drawn from torch's default generator. In the driver loop it
                is torch's own: the tokens are those of a stock model on the CPU after
                `torch.manual_seed(seed)`, and torch's generator is put back afterwards.
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
        given = one_input(inputs, kwargs.pop("input_ids", None))
        if not isinstance(loop, str) or loop not in LOOPS:
            raise ConfigError("loop", loop, f"one of {', '.join(LOOPS)}")
        if streamer is not None and not _has_methods(streamer, "put", "end"):
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
            options = (use, seed, tokenizer, streamer, progress)
            result = self._generate(given, generation_config, asked, past, *options)
        if prompt_logprobs is not None:
            firsts = [1] * len(scored)
            told = prompt_logprobs_of(self._forward(use), scored, firsts, prompt_logprobs)
            whole = tuple((None, *row) for row in told)
            result.litecache = dataclasses.replace(result.litecache, prompt_logprobs=whole)
        return result

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
        settings = translate(generation_config, kwargs, self.generation_config)
        if settings.sampling.logprobs is not None and not settings.return_dict:
            raise ConfigError(
                "logprobs", settings.sampling.logprobs, "with return_dict_in_generate=True"
            )
        if given is None and settings.bos_token_id is not None:
            given = torch.tensor([[settings.bos_token_id]])
        input_ids = check_input_ids(given)
        prompts = split_rows(input_ids, mask, settings.mask_pad_token)
        samples, pad = settings.num_return_sequences, settings.pad_token_id
        settings.check_padding(samples * len(prompts))
        jobs = [(prompt, input_ids.shape[1], settings) for prompt in prompts]
        rows = self._start(
            jobs,
            use,
            seed,
            tokenizer,
            streaming=streamer is not None,
        )
        bar = show_progress(progress, "Generating", progress_of(rows))
        with aborting(rows, self._replicas.abort), bar:
            if streamer is not None:
                feed_streamer(streamer, input_ids.repeat_interleave(samples, dim=0), rows, pad)
            new_tokens = [row.wait() for row in rows]
        sequences = append_rows(given.repeat_interleave(samples, dim=0), new_tokens, pad)
        if past is None and settings.return_dict and settings.use_cache:
            past = TokenRows()
        if past is not None:
            real = real_columns(input_ids, mask, settings.mask_pad_token)
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
            settings = [translate(given, kwargs, self.generation_config)] * len(checked)
        elif isinstance(given, (list, tuple)) and len(given) == len(checked):
            settings = [translate(each, kwargs, self.generation_config) for each in given]
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

        Returns:
            The requests, `samples` in a row for each prompt.

        Raises:
            ConfigError: a setting or a prompt is invalid; nothing was sent.
            CapacityError: a prompt and its new tokens are more than the model or the pool takes.
        """
        self._check_open()
        checked = check_prompts(prompts, self.info.max_model_len)
        settings = translate(generation_config, kwargs, self.generation_config)
        check_integer("samples", samples, 1, 1 << 16)
        jobs = [(prompt, len(prompt), settings) for prompt in checked for _ in range(samples)]
        use = self._use(cache_salt, cache, cache_ttl_s, retention)
        return self._start(jobs, use, seed, tokenizer, streaming=streaming, priority=priority)

    def submit_forward(
        self,
        tokens: Sequence[int],
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        cache: str = "default",
        cache_ttl_s: float | None = None,
        retention: str = "normal",
    ) -> PendingRequest:
        """Start a forward pass whose last position's logits are wanted, and return at once.

        Args:
            tokens: of one row; what is cached of them is reused.
            priority: as in `submit`.
            cache_salt, cache, cache_ttl_s, retention: as in `generate`. Of a "no-store" pass
                nothing is found by the next one: for a row that goes on take "read-only" and a
                salt of its own.

        Returns:
            The request; `logits_tensor` reads its `.logits` when it has ended.

        Raises:
            ConfigError: an argument is invalid; nothing was sent.
        """
        self._check_open()
        use = self._use(cache_salt, cache, cache_ttl_s, retention)
        checked = check_prompt(tokens, 0, self.info.max_model_len)
        request = self._forward_request(checked, 1, use, priority=priority)
        self.info.check(request)
        row = PendingRequest(request, streaming=True)
        self._replicas.submit([row])
        return row

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
        settings = translate(generation_config, kwargs, self.generation_config)
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
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """A call of the model, as of transformers': `.logits`, and with `labels` the `.loss`.

        Args:
            input_ids, attention_mask, logits_to_keep: as in `forward`.
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
        refuse_arguments(given)
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
        firsts = [first] * len(checked) if isinstance(first, int) else list(first)
        if len(firsts) != len(checked):
            raise ConfigError("first", len(firsts), f"one index, or {len(checked)}")
        for each, tokens in zip(firsts, checked, strict=True):
            check_integer("first", each, 1, len(tokens))
        use = self._use(cache_salt, cache, cache_ttl_s, retention)
        return prompt_logprobs_of(self._forward(use), checked, firsts, top)

    def abort(self, request_id: str) -> None:
        """End a request; whoever waits for it gets `RequestAborted`. Unknown ids are passed over.

        Raises:
            ConfigError: not a text.
        """
        self.group.connection.check()
        if not isinstance(request_id, str):
            raise ConfigError("request_id", request_id, "a stream's request_id")
        self._replicas.abort(request_id)

    def flush(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Save everything that is cached; see `Group.flush`."""
        return self.group.flush(check_seconds("timeout_s", timeout_s))

    def clear(self, tier: str = "all") -> None:
        """Drop cached blocks of a tier: "gpu", "ram", "disk" or "all".

        Blocks in "gpu" and "ram" are saved to the tiers below first.
        """
        if not isinstance(tier, str) or tier not in TIERS:
            raise ConfigError("tier", tier, f"one of {', '.join(TIERS)}")
        self.group.clear(tier)

    def pin(self, prompt: Any, *, cache_salt: str | None = None) -> int:
        """Keep a prefix that was computed on disk until `unpin`, over restarts too.

        What is still only in the pool or in RAM is saved first.

        Args:
            prompt: token ids, a list or a tensor; a trailing part of a block is left out.
            cache_salt: whose blocks; None = the group's own.

        Returns:
            How many of its leading tokens are pinned now.

        Raises:
            ConfigError: no token ids.
        """
        self._check_open()
        return self._set_pinned(prompt, cache_salt, True)

    def unpin(self, prompt: Any, *, cache_salt: str | None = None) -> int:
        """Let a prefix be evicted again; arguments and result as in `pin`."""
        return self._set_pinned(prompt, cache_salt, False)

    def _set_pinned(self, prompt: Any, cache_salt: str | None, pinned: bool) -> int:
        """Tokens of the leading blocks that some shard holds in every KV group."""
        tokens, salt = check_prompt(prompt, 0, self.info.max_model_len), self._salt(cache_salt)
        if pinned:
            self.flush()
        size = self.info.block_size
        chains = [chain_keys(root, tokens.array, size) for root in self.info.roots(salt)]
        keys = [key for chain in chains for key in chain]
        held = dict(zip(keys, self.group.set_pinned(keys, pinned), strict=True))
        in_all = (all(held[key] for key in block) for block in zip(*chains, strict=True))
        return int(size) * sum(1 for _ in itertools.takewhile(bool, in_all))

    def warm(
        self,
        prompts: Sequence[Any],
        *,
        cache_salt: str | None = None,
        progress: bool | str = False,
    ) -> list[dict[str, int]]:
        """Compute and store prefixes without generating, so that later calls find them.

        They are stored as those of any call, by the group's `admission`.

        Args:
            prompts: texts, or token ids; of one as long as the model takes the last token is left
                out.
            cache_salt: share the blocks only with calls of the same salt.
            progress: as in `generate`; a bar of prompts.

        Returns:
            Per prompt its tokens by the tier where they were found, and under "computed" the rest.

        Raises:
            ConfigError: a prompt is invalid; nothing was sent.
            LiteCacheError: a request failed.
        """
        self._check_open()
        progress = check_progress(progress)
        most = self.info.max_model_len
        if isinstance(prompts, (list, tuple)):
            prompts = [self._encode(p) if isinstance(p, str) else p for p in prompts]
        # a request needs room for the token that it draws
        checked = [tokens[: most - 1] for tokens in check_prompts(prompts, most)]
        settings = translate(GenerationConfig(max_new_tokens=1), {}, GenerationConfig())
        found: list[dict[str, int]] = []

        def so_far() -> Progress:
            done, total = len(found), len(checked)
            return Progress(done, total, f"{done:,}/{total:,} prompts")

        with show_progress(progress, "Warming", so_far):
            for start in range(0, len(checked), WARMED_AT_ONCE):
                batch = checked[start : start + WARMED_AT_ONCE]
                jobs = [(tokens, len(tokens), settings) for tokens in batch]
                rows = self._start(jobs, self._use(cache_salt), None, None)
                with aborting(rows, self._replicas.abort):
                    for row in rows:
                        row.wait()
                        there = row.found_tokens
                        computed = len(row.request.prompt) - sum(there.values())
                        found.append({**there, "computed": computed})
        return found

    def export_prefix(
        self, prompt: Any, path: str | os.PathLike[str], *, cache_salt: str | None = None
    ) -> PrefixReport:
        """Write the stored KV of a prompt's beginning to one file, for `import_prefix`.

        What is only in the pool is saved first; nothing is computed. The file holds the prompt's
        token ids and its KV, readable by its owner alone; a file of that name is replaced.

        Args:
            prompt: text, or token ids.
            path: of the file.
            cache_salt: whose blocks; None = the group's own.

        Returns:
            How many tokens of how many are in the file: whole blocks from the start, as far as
            any tier holds them in every KV group.

        Raises:
            ConfigError: no token ids, or no path.
            StorageError: nothing of it is stored, or the file cannot be written: there is none.
        """
        self._check_open()
        path = check_path("path", path)
        return export_prefix(self.group, self._tokens(prompt), self._salt(cache_salt), path)

    def import_prefix(
        self, path: str | os.PathLike[str], *, cache_salt: str | None = None
    ) -> PrefixReport:
        """Store the KV of a file of `export_prefix` in the tiers, as if it had been computed here.

        The whole file is checked before the first block is stored. Checksums find damage and not
        forgery: import files of people whom you trust.

        Args:
            path: of the file.
            cache_salt: the one that it was exported under; None = the group's own.

        Returns:
            How many tokens of how many are stored now.

        Raises:
            PrefixFileError: the file is damaged, of another version, model, layout or salt, or
                cannot be read; nothing was stored.
            StorageError: the group has no tiers to store it in.
        """
        self._check_open()
        report = import_prefix(self.group, check_path("path", path), self._salt(cache_salt))
        self.flush()
        return report

    def delete(self, *, cache_salt: str) -> int:
        """Delete everything that is cached under a salt, in all tiers, of every model stored there.

        Requests of that salt that are open go on; what they compute from here on is neither shared
        nor stored. Calls that begin later store again.

        Args:
            cache_salt: the salt; "" = what was stored without one.

        Returns:
            How many blocks pools and shards held of it, each copy counted.

        Raises:
            ConfigError: no text.
            GroupUnavailableError: names the actors that did not answer; the others have done it.
        """
        self._check_open()
        return self.group.delete_salt(check_text("cache_salt", cache_salt))

    def _tokenizer_of(self, given: Any) -> Any:
        """The tokenizer of a call: given, or the adapter's."""
        if given is not None and not _has_methods(given, "decode", "__call__"):
            raise ConfigError("tokenizer", given, "a tokenizer of transformers, or None")
        return self.tokenizer if given is None else given

    def _encode(self, text: str, tokenizer: Any = None) -> Any:
        with naming("prompt", text, "a text that the tokenizer takes"):
            return self._tokenizer_of(tokenizer)(check_text("prompt", text))["input_ids"]

    def _tokens(self, prompt: Any, tokenizer: Any = None) -> TokenIds:
        """Token ids of a text, a list or a tensor."""
        given = self._encode(prompt, tokenizer) if isinstance(prompt, str) else prompt
        return check_prompt(one_row(given), 0, self.info.max_model_len)

    def _use(
        self,
        salt: str | None,
        cache: str = "default",
        ttl_s: float | None = None,
        retention: str = "normal",
    ) -> CacheUse:
        return CacheUse.of(salt, self._own_salt, cache, ttl_s, retention)

    def _forward(self, use: CacheUse) -> ReplicaForward:
        """Forward passes of one call, which find what each other has computed."""
        use = use.for_forwards()

        def request_of(tokens: TokenIds, count: int, logprobs: int | None) -> Request:
            return self._forward_request(tokens, count, use, logprobs)

        return ReplicaForward(self._replicas, self.info, request_of)

    def _forward_request(
        self,
        tokens: TokenIds,
        count: int,
        use: CacheUse,
        logprobs: int | None = None,
        priority: int = 0,
    ) -> Request:
        return Request(
            request_id=f"{self._client_id}-{next(self._numbers)}",
            client_id=self._client_id,
            prompt=tokens,
            sampling=SamplingParams(0, logprobs=logprobs),
            logits=count,
            priority=priority,
            **use.fields(),
        )

    def _salt(self, given: str | None) -> str:
        return self._own_salt if given is None else check_text("cache_salt", given)

    def scale(self, replicas: int | str, *, timeout_s: float = DRAIN_TIMEOUT_S) -> ScaleReport:
        """Give the group so many replicas; those that go are drained first.

        Args:
            replicas: how many, or "all": one per GPU of the cluster, or per node without.
            timeout_s: how long running requests may take to end before they go on elsewhere.

        Raises:
            GroupUnavailableError: there is no room; names what is missing.
            LiteCacheError: the group is another driver's own, or new replicas were refused.
        """
        self._check_open()
        return scale_group(self.group, replicas, timeout_s=timeout_s)

    def stats(self) -> CacheStats:
        """Counters and state, added up over the group's actors."""
        return CacheStats.from_status(self.group.status())

    def close(self) -> None:
        """Abort this adapter's requests; stop the actors if they were started here for it alone."""
        self._finalizer()

    def __enter__(self) -> KVCacheAdapter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise LiteCacheError(
            "an adapter cannot be pickled or copied: start its group by a name and join it where it"
            " is needed, by KVCacheAdapter(model, group=NAME) (this one's group is"
            f" {self.group.spec.group!r})"
        )

    def __repr__(self) -> str:
        return f"KVCacheAdapter({self._source.name!r}, group={self.group.spec.group!r})"

    def _check_open(self) -> None:
        """First of all: in a forked process torch's threads and every lock may hang."""
        self.group.connection.check()
        if not self._finalizer.alive:
            raise ConfigError("adapter", "closed", "an open adapter")

    def _start(
        self,
        jobs: Sequence[tuple[TokenIds, int, GenerationSettings]],
        use: CacheUse,
        seed: int | None,
        tokenizer: Any,
        *,
        streaming: bool = False,
        priority: int = 0,
    ) -> list[PendingRequest]:
        """Check all requests, then submit them, all or none; samples of a prompt in a row.

        Args:
            jobs: of each prompt its ids, its tokens as HF counts them (padding included), and its
                settings.
            use: of the cache.
            seed, tokenizer: as in `generate`.
            streaming: somebody looks at each token as it comes.
            priority: as in `submit`.
        """
        check_sequences("num_return_sequences", sum(job[2].num_return_sequences for job in jobs))
        drawn = draw_seed(seed, sampling=any(job[2].do_sample for job in jobs))
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        rows: list[PendingRequest] = []
        for prompt, width, each in jobs:
            stop = self._stop_strings(tokenizer, each.stop_strings) if each.stop_strings else None
            for _ in range(each.num_return_sequences):
                sampling = each.sampling_params(
                    width,
                    max_positions=limit if isinstance(limit, int) else None,
                    seed=drawn,
                    sample_index=len(rows),
                )
                request = Request(
                    request_id=f"{self._client_id}-{next(self._numbers)}",
                    client_id=self._client_id,
                    prompt=prompt,
                    sampling=sampling,
                    **use.fields(),
                    priority=priority,
                    max_time_s=each.max_time_s,
                )
                self.info.check(request)
                rows.append(PendingRequest(request, streaming=streaming, stop=stop))
        self._replicas.submit(rows)
        return rows

    def _stop_strings(self, given: Any, texts: tuple[str, ...]) -> StopStrings:
        """Kept from call to call: transformers looks at the whole vocabulary to prepare one."""
        tokenizer = self.tokenizer if given is None else given
        kept = self._last_stop
        if kept is None or kept[0] is not tokenizer or kept[1] != texts:
            kept = self._last_stop = (tokenizer, texts, StopStrings(tokenizer, texts))
        return kept[2]


def _join_or_start(
    spec: GroupSpec,
    expected: Any,
) -> tuple[Group, bool]:
    """The group, and whether it was started here; `expected` of one that runs, None = a new one."""
    if expected is None or not exists(spec.group):
        try:
            return Group.start(spec), True
        except GroupError:
            # Another driver may have started it in the meantime: then this one joins.
            if expected is None or not exists(spec.group):
                raise
    return Group.attach(spec.group, expected), False


def _leave(group: Group, replicas: ReplicaSet, owned: bool, model: ModelHold) -> None:
    """Abort what is open, stop the group where it was this adapter's own, let go of the model.

    Nothing happens in a process forked from the adapter's.
    """
    if os.getpid() != group.connection.pid:
        return
    for poller in replicas.pollers:
        poller.close()
    # The actors hold it themselves, as long as they live.
    model.release()
    if owned:
        try:
            group.connection.check()
        except GroupError:
            return  # without its Ray the group is gone
        group.stop()


def _has_methods(value: Any, *names: str) -> bool:
    """Whether an object can be called by all these names; one that raises when asked has none."""
    try:
        return all(callable(getattr(value, name, None)) for name in names)
    except Exception:
        return False
