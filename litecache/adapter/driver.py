"""This process's end of a group: how calls use its cache, and the requests that they become.

`Driver` owns what all calls of an adapter share: the pollers of the replicas, the numbers of its
requests, its salt, its tokenizer. The surfaces, which are what users call, are built on it. All
requests of a call are checked before the first is sent, and one that is closed, or forked from the
process that made it, sends none.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from litecache.actors.group import Group
from litecache.adapter.forward import ReplicaForward
from litecache.adapter.generation import GenerationSettings, draw_seed
from litecache.adapter.pending import Guide, PendingRequest, StopStrings
from litecache.adapter.prompts import check_prompt, check_sequences, naming, one_row
from litecache.adapter.replicas import ReplicaSet
from litecache.adapter.sources import ResolvedModel, load_tokenizer
from litecache.checks import check_real, check_text
from litecache.engine.engine_info import EngineInfo
from litecache.errors import ConfigError, GroupError
from litecache.paths import ModelHold
from litecache.threads import run_outside
from litecache.token_ids import TokenIds
from litecache.types import Request, SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_TTL_S = 10 * 366 * 86_400


@dataclass(frozen=True)
class CacheUse:
    """How a call uses the cache: what it shares, and what it leaves behind.

    The fields of `Request` of the same names; `cache` and `retention` are checked with it.
    """

    cache_salt: str
    cache: Any = "default"
    expires_s: int = 0
    retention: Any = "normal"

    def for_forwards(self) -> CacheUse:
        """For the forward passes of one call, each of which finds what those before have computed:
        where nobody else may find it, under a salt that nobody else knows."""
        if self.cache != "no-store":
            return self
        return dataclasses.replace(
            self, cache="read-only", cache_salt=f"{self.cache_salt}#{uuid.uuid4().hex}"
        )


class Driver:
    """What the calls of one adapter have in common.

    Args:
        group: the actors.
        model: what they have loaded.
        tokenizer: for texts; None = the model's.
        salt: of calls that give none.
        owned: the group ends with this driver.
    """

    def __init__(
        self, group: Group, model: ResolvedModel, *, tokenizer: Any, salt: str, owned: bool
    ) -> None:
        self.group = group
        self.config = model.config
        self.generation_config = model.generation_config
        self._source = model.source
        self._tokenizer = tokenizer
        self._own_salt = salt
        self._client_id = uuid.uuid4().hex[:12]
        self._numbers = itertools.count(1)
        self._last_stop: tuple[Any, tuple[str, ...], StopStrings] | None = None
        self._replicas = ReplicaSet(group, self._client_id)
        # Runs on close, on garbage collection and at exit, once, and before Ray's own exit hook.
        leave = partial(_leave, group, self._replicas, owned, model.hold)
        self._finalizer = weakref.finalize(self, run_outside, leave)

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

    def abort(self, request_id: str) -> None:
        """End a request; whoever waits for it gets `RequestAborted`. Unknown ids are passed over.

        Raises:
            ConfigError: not a text.
        """
        self.group.connection.check()
        if not isinstance(request_id, str):
            raise ConfigError("request_id", request_id, "a stream's request_id")
        self._replicas.abort(request_id)

    def close(self) -> None:
        """Abort this adapter's requests; stop the actors if they were started here for it alone."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        """First of all: in a forked process torch's threads and every lock may hang."""
        self.group.connection.check()
        if not self._finalizer.alive:
            raise ConfigError("adapter", "closed", "an open adapter")

    def _tokenizer_of(self, given: Any) -> Any:
        """The tokenizer of a call: given, or the adapter's."""
        if given is not None and not has_methods(given, "decode", "__call__"):
            raise ConfigError("tokenizer", given, "a tokenizer of transformers, or None")
        return self.tokenizer if given is None else given

    def _encode(self, text: str, tokenizer: Any = None) -> Any:
        with naming("prompt", text, "a text that the tokenizer takes"):
            return self._tokenizer_of(tokenizer)(check_text("prompt", text))["input_ids"]

    def _tokens(self, prompt: Any, tokenizer: Any = None) -> TokenIds:
        """Token ids of a text, a list or a tensor."""
        given = self._encode(prompt, tokenizer) if isinstance(prompt, str) else prompt
        return check_prompt(one_row(given), 0, self.info.max_model_len)

    def _salt(self, given: str | None) -> str:
        return self._own_salt if given is None else check_text("cache_salt", given)

    def _use(
        self,
        salt: str | None,
        cache: str = "default",
        ttl_s: float | None = None,
        retention: str = "normal",
    ) -> CacheUse:
        """Of a call, by its arguments.

        Raises:
            ConfigError: `cache_salt` or `cache_ttl_s` is no such thing.
        """
        salt, expires_s = self._salt(salt), 0
        if ttl_s is not None:
            ttl_s = check_real("cache_ttl_s", ttl_s, 0, MAX_TTL_S, above=True)
            expires_s = math.ceil(time.time() + ttl_s)
        return CacheUse(salt, cache, expires_s, retention)

    def _forward(self, use: CacheUse) -> ReplicaForward:
        """Forward passes of one call, which find what each other has computed."""
        use = use.for_forwards()

        def request_of(tokens: TokenIds, count: int, logprobs: int | None) -> Request:
            return Request(
                request_id=f"{self._client_id}-{next(self._numbers)}",
                client_id=self._client_id,
                prompt=tokens,
                sampling=SamplingParams(0, logprobs=logprobs),
                logits=count,
                **vars(use),
            )

        return ReplicaForward(self._replicas, self.info, request_of)

    def _start(self, *args: Any, **kwargs: Any) -> list[PendingRequest]:
        """Check all requests of a call, then submit them, all or none; arguments of `_rows`."""
        rows = self._rows(*args, **kwargs)
        self._replicas.submit(rows)
        return rows

    def _rows(
        self,
        jobs: Sequence[tuple[TokenIds, int, GenerationSettings]],
        use: CacheUse,
        seed: int | None,
        tokenizer: Any,
        *,
        streaming: bool = False,
        priority: int = 0,
        guides: Sequence[Guide] | None = None,
    ) -> list[PendingRequest]:
        """Requests that have been checked and not yet sent; samples of a prompt in a row.

        Args:
            jobs: of each prompt its ids, its tokens as HF counts them (padding included), and its
                settings.
            use: of the cache.
            seed, tokenizer: as in `generate`.
            streaming: somebody looks at each token as it comes.
            priority, guides: as in `submit`.
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
                guide = None if guides is None else guides[len(rows)]
                request = Request(
                    request_id=f"{self._client_id}-{next(self._numbers)}",
                    client_id=self._client_id,
                    prompt=prompt,
                    sampling=sampling,
                    mask=None if guide is None else guide.mask,
                    **vars(use),
                    priority=priority,
                    max_time_s=each.max_time_s,
                )
                self.info.check(request)
                rows.append(PendingRequest(request, streaming=streaming, stop=stop, guide=guide))
        return rows

    def _stop_strings(self, given: Any, texts: tuple[str, ...]) -> StopStrings:
        """Kept from call to call: transformers looks at the whole vocabulary to prepare one."""
        tokenizer = self.tokenizer if given is None else given
        kept = self._last_stop
        if kept is None or kept[0] is not tokenizer or kept[1] != texts:
            kept = self._last_stop = (tokenizer, texts, StopStrings(tokenizer, texts))
        return kept[2]


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


def has_methods(value: Any, *names: str) -> bool:
    """Whether an object can be called by all these names; one that raises when asked has none."""
    try:
        return all(callable(getattr(value, name, None)) for name in names)
    except Exception:
        return False
