"""`POST /v1/cache/...`: warm, pin, unpin, export, import, delete, each under the key's own salt."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litecache.serving.chat import plain_messages
from litecache.serving.errors import ApiError
from litecache.serving.keys import Tenant
from litecache.serving.schemas import (
    CacheDeleteRequest,
    CacheRequest,
    DetokenizeRequest,
    TokenizeRequest,
    refused,
)
from litecache.serving.service import ModelService


async def tokens_of(service: ModelService, body: CacheRequest | TokenizeRequest) -> list[int]:
    """Token ids of a prompt or of a conversation, as the endpoints that answer them make them.

    Raises:
        ApiError: 400, neither or both are given.
    """
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise refused("prompt", "given, or messages, and not both")
    if isinstance(body.prompt, list):
        return list(body.prompt)
    if body.prompt is not None:
        return await service.run(service.encode, body.prompt, body.add_special_tokens is not False)
    if not body.messages:
        raise refused("messages", "a list of messages, not empty")
    messages = plain_messages(service, body.messages)
    return await service.run(service.encode_chat, messages, body, body.tools)


async def tokenize(service: ModelService, body: TokenizeRequest, tenant: Tenant) -> dict[str, Any]:
    """`POST /tokenize`."""
    tokens = await tokens_of(service, body)
    found: dict[str, Any] = {"count": len(tokens), "tokens": tokens}
    found["max_model_len"] = service.llm.info.max_model_len
    if body.return_token_strs:
        found["token_strs"] = await service.run(lambda: [service.names.text(t) for t in tokens])
    return found


async def detokenize(
    service: ModelService, body: DetokenizeRequest, tenant: Tenant
) -> dict[str, Any]:
    """`POST /detokenize`."""
    service.check_model(body.model)
    size = service.llm.info.vocab_size
    if any(token >= size for token in body.tokens):
        raise refused("tokens", f"token ids from 0 to {size - 1}")
    return {"prompt": await service.run(service.llm.tokenizer.decode, body.tokens)}


async def warm(service: ModelService, body: CacheRequest, tenant: Tenant) -> dict[str, Any]:
    """Compute and store a prefix, without an answer."""
    tokens = await tokens_of(service, body)
    service.room_for(tokens, "prompt")
    leave = await service.admission.enter(tenant.name, 1)
    try:
        (found,) = await service.run_long(service.llm.warm, [tokens], **_salt(body, tenant))
    finally:
        leave()
    return {"object": "cache.warm", "prompt_tokens": len(tokens), "tokens": found}


async def pin(service: ModelService, body: CacheRequest, tenant: Tenant) -> dict[str, Any]:
    """Keep a stored prefix on disk."""
    return await _set_pinned(service, body, tenant, service.llm.pin, "cache.pin")


async def unpin(service: ModelService, body: CacheRequest, tenant: Tenant) -> dict[str, Any]:
    """Let it be evicted again."""
    return await _set_pinned(service, body, tenant, service.llm.unpin, "cache.unpin")


async def _set_pinned(
    service: ModelService,
    body: CacheRequest,
    tenant: Tenant,
    function: Callable[..., int],
    name: str,
) -> dict[str, Any]:
    tokens = await tokens_of(service, body)
    count = await service.run_long(function, tokens, **_salt(body, tenant))
    return {"object": name, "prompt_tokens": len(tokens), "tokens": count}


async def delete(service: ModelService, body: CacheDeleteRequest, tenant: Tenant) -> dict[str, Any]:
    """Drop everything under a salt: a key's own, or what it divides that into."""
    service.check_model(body.model)
    salt = tenant.salt_of(body.cache_salt)
    if salt is None:
        raise refused("cache_salt", 'given: "" is what was stored without one')
    count = await service.run_long(service.llm.delete, cache_salt=salt)
    return {"object": "cache.delete", "blocks": count}


async def export(service: ModelService, body: CacheRequest, tenant: Tenant) -> Path:
    """The file of a stored prefix, in a folder of its own that the caller removes."""
    tokens = await tokens_of(service, body)
    folder = Path(tempfile.mkdtemp(prefix="litecache-export-"))  # 0700
    path = folder / "prefix.kv"
    try:
        await service.run_long(service.llm.export_prefix, tokens, path, **_salt(body, tenant))
    except BaseException:
        remove_folder(path)
        raise
    return path


async def import_file(
    service: ModelService, path: Path, cache_salt: str | None, tenant: Tenant
) -> dict[str, Any]:
    """Store the blocks of such a file."""
    salt = tenant.salt_of(cache_salt)
    given = {} if salt is None else {"cache_salt": salt}
    report = await service.run_long(service.llm.import_prefix, path, **given)
    return {"object": "cache.import", "tokens": report.tokens, "of": report.asked}


def remove_folder(path: Path) -> None:
    """Remove an exported file and its folder."""
    path.unlink(missing_ok=True)
    os.rmdir(path.parent)


def _salt(body: CacheRequest, tenant: Tenant) -> dict[str, Any]:
    for name in ("cache", "cache_ttl_s", "retention"):
        if getattr(body, name) is not None:
            raise ApiError(400, f"{name} is not taken here", param=name, code="unsupported_value")
    salt = tenant.salt_of(body.cache_salt)
    return {} if salt is None else {"cache_salt": salt}
