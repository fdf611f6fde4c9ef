"""`ModelService`: one model as a server has it, from loading to the last answer.

It owns the adapter, the queue in front of it and the threads for what must not hold up the event
loop: tokenising, submitting, forms, long calls. Endpoints ask it and know no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from litecache.adapter.chat_replies import ChatTemplate
from litecache.adapter.pending import PendingRequest
from litecache.adapter.streaming import TextDecoder
from litecache.errors import ConfigError, told
from litecache.paths import short_model_name
from litecache.serving.admission import Admission
from litecache.serving.errors import ApiError
from litecache.serving.forms import Form, FormSpec, grammar_of
from litecache.serving.keys import ApiKeys, Tenant
from litecache.serving.schemas import CacheFields, TemplateFields
from litecache.serving.settings import ServeSettings
from litecache.serving.tokens import TokenBytes
from litecache.serving.tool_calls import ToolFormat, tool_format
from litecache.threads import start_job

if TYPE_CHECKING:
    from litecache.adapter import KVCacheAdapter

T = TypeVar("T")
# With fewer open streams than this every token is an event of its own.
_QUIET_STREAMS = 3
_MS_PER_STREAM = 2.0
# Characters that are tokenised in less time than it takes to wake a thread and come back.
_SHORT_TEXT = 2048


class ModelService:
    """A model and everything that is asked of it.

    Args:
        settings: of the server.
        open_adapter: makes the adapter; called once, in a thread, and may take minutes.
        keys: who may ask; None = everybody.

    Attributes:
        state: "loading", "ready", "failed" or "closed".
        failure: why it failed.
        admission: who runs and who waits.
        open_streams: answers that are read as they come.
        forms: answers of a form that are being drawn.
        body_bytes: of the requests under way.
        counts: what was done so far, for `/metrics`.
    """

    def __init__(
        self,
        settings: ServeSettings,
        open_adapter: Callable[[], KVCacheAdapter],
        keys: ApiKeys | None = None,
    ) -> None:
        self.settings, self.keys = settings, keys
        self.state, self.failure = "loading", ""
        self.open_streams = self.body_bytes = 0
        self.counts: dict[tuple[str, ...], float] = {}
        self.admission = Admission(settings.max_running or 1, settings.max_waiting)
        self.started_at = int(time.time())
        self._open = open_adapter
        self._adapter: KVCacheAdapter | None = None
        self._pool = ThreadPoolExecutor(8, "serve")
        self._long_pool = ThreadPoolExecutor(4, "serve-long")
        self._form_pool = ThreadPoolExecutor(2, "serve-forms")
        self.forms = 0
        self._settled = threading.Event()

    def start(self) -> None:
        """Begin to load the model, in a thread; what goes wrong is kept in `failure`."""
        start_job(self._load, "serve-load", self._not_loaded)

    def _load(self) -> None:
        self._adapter = adapter = self._open()
        info = adapter.info
        rows = info.max_requests * max(1, self.settings.replicas)
        if self.settings.max_running is None:
            self.admission.max_running = 2 * rows
        self.names = TokenBytes(adapter.tokenizer, info.vocab_size)
        self.model_name = self.settings.served_name or short_model_name(info.model)
        if self.state == "loading":
            self.state = "ready"
        else:  # closed in the meantime
            adapter.close()
        self._settled.set()

    def _not_loaded(self, error: BaseException) -> None:
        self.state, self.failure = "failed", told(error)
        if self._adapter is not None:
            self._adapter.close()
        self._settled.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether loading has ended, well or not."""
        return self._settled.wait(timeout_s)

    def close(self) -> None:
        """Leave the group; what is open is aborted."""
        self.state = "closed"
        if self._adapter is not None:
            self._adapter.close()
        self.stop_threads()

    def stop_threads(self) -> None:
        """Take nothing more to do off the event loop."""
        for pool in (self._pool, self._long_pool, self._form_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def llm(self) -> KVCacheAdapter:
        """The adapter.

        Raises:
            ApiError: 503, it is not there yet, or not any more.
        """
        if self._adapter is None or self.state != "ready":
            failed = f"the model could not be loaded: {self.failure}"
            raise ApiError(
                503,
                failed if self.state == "failed" else f"the model is {self.state}",
                code="load_failed" if self.state == "failed" else "not_ready",
                headers={"retry-after": "5"},
            )
        return self._adapter

    def check_model(self, model: str | None) -> None:
        """Refuse a model that is not this one.

        Raises:
            ApiError: 404.
        """
        self.llm  # noqa: B018 - not ready comes first
        if model is not None and model not in (self.model_name, self.settings.model):
            raise ApiError(
                404,
                f"the model {model[:200]!r} does not exist; there is {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def cache_use(self, asked: CacheFields, tenant: Tenant) -> dict[str, Any]:
        """Arguments of the adapter about the cache, for a request of a key."""
        given = {
            "cache_salt": tenant.salt_of(asked.cache_salt),
            "cache": asked.cache,
            "cache_ttl_s": asked.cache_ttl_s,
            "retention": asked.retention,
        }
        return {name: value for name, value in given.items() if value is not None}

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        key = (name, *labels)
        self.counts[key] = self.counts.get(key, 0) + by

    async def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call what takes a moment, off the event loop."""
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def run_unless_short(
        self, characters: int, function: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        """Call what takes longer the longer a text is; for a short one a thread takes longer."""
        if characters <= _SHORT_TEXT:
            return function(*args, **kwargs)
        return await self.run(function, *args, **kwargs)

    async def run_long(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call what may take seconds, in other threads than `run`."""
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._long_pool, call)

    # -- texts and tokens

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            ApiError: 400, it is so long that no tokens of it would fit.
        """
        self._check_length(len(text), "prompt")
        encoded = self.llm.tokenizer(text, add_special_tokens=add_special_tokens)
        return list(encoded["input_ids"])

    def _check_length(self, characters: int, param: str) -> None:
        """Before it is tokenised, which of megabytes takes seconds."""
        least = characters // self._longest_token
        if least > self.max_tokens:
            raise self._too_long(f"the prompt has {least} at least", param)

    @functools.cached_property
    def _longest_token(self) -> int:
        """Characters."""
        return max(map(len, self.llm.tokenizer.get_vocab()), default=1)

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        asked: TemplateFields,
        tools: Sequence[Any] | None,
    ) -> list[int]:
        """Token ids of a conversation, by the chat template.

        Args:
            messages: plain values.
            asked: the request, with what else the template reads.
            tools: those of the request that the model is told of.

        Raises:
            ApiError: 400, as in `encode`.
            ConfigError: the template does not take them.
        """
        tokenizer, options = self.llm.tokenizer, asked.chat_template_kwargs
        self._check_length(sum(len(each["content"]) for each in messages), "messages")
        reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        if options is not None and (wrong := sorted(reserved & set(options))):
            raise ConfigError("chat_template_kwargs", wrong, "names that the template reads")
        template = ChatTemplate(
            tokenizer, tools=tools or None, documents=asked.documents, options=options
        )
        return template.tokens(
            messages,
            asked.continue_final_message is True,
            add_generation_prompt=asked.add_generation_prompt is not False,
        )

    def decoder(self, skip_special_tokens: bool) -> TextDecoder:
        """Of a new answer."""
        return TextDecoder.of(self.llm.tokenizer, skip_special_tokens)

    @functools.cached_property
    def tools(self) -> ToolFormat | None:
        """How this model writes calls of tools, None = unknown."""
        template = getattr(self.llm.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = "".join(template.values())
        return tool_format(template or "")

    def special_token(self, text: str) -> int | None:
        """The id of a special token, None for a text that is none."""
        added = getattr(self.llm.tokenizer, "added_tokens_decoder", {})
        ids = (token for token, each in added.items() if each.special and each.content == text)
        return next(ids, None)

    @property
    def max_tokens(self) -> int:
        """Of prompt and answer together."""
        info = self.llm.info
        return min(info.max_model_len, info.capacity_tokens)

    def room_for(self, prompt: Sequence[int], param: str) -> int:
        """How many tokens an answer to a prompt may have.

        Raises:
            ApiError: 400, none.
        """
        left = self.max_tokens - len(prompt)
        if left < 1:
            raise self._too_long(f"the prompt has {len(prompt)}", param)
        return left

    def _too_long(self, told: str, param: str) -> ApiError:
        return ApiError(
            400,
            f"this model's maximum context length is {self.max_tokens} tokens, prompt and answer "
            f"together; {told}",
            param=param,
            code="context_length_exceeded",
        )

    # -- answers

    def answer_head(self, prefix: str, kind: str) -> dict[str, Any]:
        """What an answer, or each chunk of a stream, begins with: an id of its own, and the model.

        Args:
            prefix: of the id.
            kind: of OpenAI's objects.
        """
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model_name,
            "system_fingerprint": f"fp_{self.llm.info.fingerprint[:12]}",
        }

    async def draw(
        self, prompts: Sequence[Sequence[int]], settings: Mapping[str, Any]
    ) -> Sequence[PendingRequest]:
        """Start to draw answers; `settings` are arguments of `KVCacheAdapter.submit`.

        Whoever is cancelled while this waits leaves nothing behind.
        """
        llm = self.llm
        call = functools.partial(llm.submit, prompts, **settings)
        future = asyncio.get_running_loop().run_in_executor(self._pool, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._drop)
            raise

    def _drop(self, future: asyncio.Future[list[PendingRequest]]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.abandon(future.result())

    async def make_forms(
        self, form: FormSpec, count: int, ends: Collection[int]
    ) -> tuple[list[Form], Callable[[], None]]:
        """A form for each of some answers, and what to call when they have ended.

        Args:
            form: of the answers.
            count: how many answers.
            ends: tokens that end them.

        Raises:
            ApiError: 400, a form that is none, or too much of one; 429, too many at once.
        """
        info, most = self.llm.info, self.settings.max_constrained
        if count > most:
            raise ApiError(400, f"n must be at most {most} for answers of a form", param="n")
        if self.forms + count > most:
            raise ApiError(
                429,
                f"{self.forms} answers of a form are being drawn already, at most {most} at once",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        left = [count]

        def end() -> None:
            self.forms -= sum(left)
            left.clear()

        def make() -> list[Form]:
            grammar = grammar_of(form, self.settings.max_schema_bytes)
            made = Form(
                self.names,
                grammar,
                param=form.param,
                vocab_size=info.vocab_size,
                ends=ends,
            )
            return [made, *(made.again() for _ in range(1, count))]

        self.forms += count
        try:
            return await asyncio.get_running_loop().run_in_executor(self._form_pool, make), end
        except BaseException:
            end()
            raise

    def abandon(self, rows: Sequence[PendingRequest]) -> None:
        """End those that have not ended; nobody waits for it."""
        adapter = self._adapter
        for row in rows:
            if row.finish_reason is None and adapter is not None:
                with contextlib.suppress(RuntimeError):  # the pool is closed: so is the adapter
                    self._pool.submit(adapter.abort, row.request_id)

    def merge_s(self) -> float:
        """How long tokens are gathered for an event, by how many streams are open."""
        if self.open_streams < _QUIET_STREAMS:
            return 0.0
        return min(self.settings.merge_ms, _MS_PER_STREAM * self.open_streams) / 1000
