"""A server over an engine in this process: the product's adapter and application, without Ray.

`LocalAdapter` is `KVCacheAdapter` but for its replicas, which are one engine here; so requests,
settings, limits and results are the product's own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx2
from engine_harness import Harness
from small_tokenizers import small_tokenizer
from transformers import GenerationConfig, LlamaConfig

from litecache.adapter.kv_cache_adapter import KVCacheAdapter
from litecache.adapter.pending import PendingRequest
from litecache.engine.loading.model_source import ModelSource
from litecache.serving.http_app import HttpApp
from litecache.serving.keys import ApiKeys
from litecache.serving.service import ModelService
from litecache.serving.settings import ServeSettings
from litecache.types import TokenDelta

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}</tool_call>\n{% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def model_config() -> LlamaConfig:
    """As many tokens as the tokenizer has."""
    return LlamaConfig(
        vocab_size=266,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def tokenizer() -> Any:
    """Byte-level: any text, and tokens that are parts of characters."""
    made = small_tokenizer("byte-level")
    made.chat_template = CHAT_TEMPLATE
    return made


class LocalReplicas:
    """`ReplicaSet` over one engine in this process."""

    pollers = ()

    def __init__(self, source: ModelSource, **config: Any) -> None:
        self.by_index: dict[int, Any] = {}  # nothing polls: `route` is asked for each pass
        self.rows: dict[str, PendingRequest] = {}
        self.harness = Harness(source, **config)
        self.engine = self.harness.engine
        self.engine._sink = self._take
        self.guides = ThreadPoolExecutor(2)

    def submit(self, rows: list[PendingRequest], index: int | None = None) -> None:
        self.rows |= {row.wire_id: row for row in rows}
        self.engine.submit([row.wire_request() for row in rows])

    def route(self, requests: Sequence[Any]) -> list[int]:
        return [0] * len(requests)

    def abort(self, request_id: str) -> None:
        names = [name for name, row in list(self.rows.items()) if row.request_id == request_id]
        self.engine.abort(names)

    def _take(self, deltas: list[tuple[str, TokenDelta]]) -> None:
        for _, delta in deltas:
            row = self.rows.get(delta.request_id)
            if row is not None:
                row.feed(delta)
                if row.done:
                    self.rows.pop(delta.request_id, None)
                elif delta.awaits_guidance:
                    self.guides.submit(self._guide, delta.request_id, row)

    def _guide(self, name: str, row: PendingRequest) -> None:
        guidance = row.guidance(name)
        if row.done:
            self.rows.pop(name, None)
        if guidance is not None:
            self.engine.guide([guidance])


class LocalAdapter(KVCacheAdapter):
    """An adapter whose group is one engine in this process."""

    def __init__(self, **config: Any) -> None:
        fields = model_config()
        source = ModelSource(
            config={**fields.to_dict(), "model_type": "llama"}, weights="random", seed=1
        )
        self.config, self._source = fields, source
        self.generation_config = GenerationConfig(eos_token_id=2, bos_token_id=1, pad_token_id=0)
        self._replicas: Any = LocalReplicas(source, **config)
        self.engine = self._replicas.engine
        connection = SimpleNamespace(check=lambda: None, pid=os.getpid())
        spec = SimpleNamespace(group="local")
        self.group: Any = SimpleNamespace(
            info=self.engine.info, connection=connection, spec=spec, status=lambda: {}
        )
        self._tokenizer = tokenizer()
        self._client_id, self._numbers = "local", itertools.count(1)
        self._last_stop, self._own_salt = None, ""
        self._finalizer: Any = SimpleNamespace(alive=True)

    def close(self) -> None:
        if self._finalizer.alive:
            self._finalizer.alive = False
            self._replicas.guides.shutdown()
            self._replicas.harness.close()

    def check(self) -> None:
        """Nothing is open any more within a few seconds, and every block is free or idle."""
        until = time.monotonic() + 60
        while self._replicas.rows and time.monotonic() < until:
            time.sleep(0.002)  # an abort is told to the engine, which ends the row at its next step
        self._replicas.harness.check()


def make_service(
    adapter: LocalAdapter, keys: ApiKeys | None = None, **settings: Any
) -> ModelService:
    """A service that is ready."""
    service = ModelService(
        ServeSettings(model="tiny", served_name="tiny", **settings), lambda: adapter, keys
    )
    service.start()
    assert service.wait(60)
    assert service.state == "ready", service.failure
    return service


@contextlib.asynccontextmanager
async def client_of(
    service: ModelService, client: tuple[str, int] = ("127.0.0.1", 1), **headers: str
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the application, without a network."""
    transport = httpx2.ASGITransport(HttpApp(service), client=client)
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://server", headers=headers, timeout=60, verify=False
    ) as made:
        yield made
