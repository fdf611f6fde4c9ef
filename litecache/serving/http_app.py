"""The ASGI application: routes, bodies, keys, events, errors, request ids, one log line a request.

A bare ASGI callable, since all that a request needs is here: every way out of it is an answer in
OpenAI's shape, a body is bounded before it is read, and a client that goes away cancels what is
done for it. It runs in Ray Serve's replicas (deployment.py) and under any ASGI server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from litecache.errors import shorten
from litecache.serving import cache_control, chat, completions
from litecache.serving.errors import ApiError, api_error
from litecache.serving.keys import ANYBODY
from litecache.serving.pages import metrics_text, openapi, page
from litecache.serving.schemas import (
    CacheDeleteRequest,
    CacheRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from litecache.serving.service import ModelService
from litecache.serving.settings import is_loopback

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_BODY_TIMEOUT_S = 120.0
_JSON = (b"content-type", b"application/json")
_FILE_PART_BYTES = 1 << 20

POSTS: dict[str, tuple[type[Any], Any]] = {
    "/v1/completions": (CompletionRequest, completions.complete),
    "/v1/chat/completions": (ChatRequest, chat.chat),
    "/tokenize": (TokenizeRequest, cache_control.tokenize),
    "/detokenize": (DetokenizeRequest, cache_control.detokenize),
    "/v1/cache/warm": (CacheRequest, cache_control.warm),
    "/v1/cache/pin": (CacheRequest, cache_control.pin),
    "/v1/cache/unpin": (CacheRequest, cache_control.unpin),
    "/v1/cache/delete": (CacheDeleteRequest, cache_control.delete),
    "/v1/cache/export": (CacheRequest, cache_control.export),
}
"""Endpoints with a JSON body, what it is, and who answers it."""

GETS = ("/", "/health", "/ready", "/metrics", "/openapi.json", "/v1/models")
"""Endpoints without a body."""

OPEN_PATHS = ("/", "/health", "/ready")
"""They need no key."""


class HttpApp:
    """The application of a model.

    Args:
        service: of the model.
        tells_request_id: answers carry `x-request-id`; False where the server in front adds it.
    """

    def __init__(self, service: ModelService, *, tells_request_id: bool = True) -> None:
        self.service = service
        self._tells_request_id = tells_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await _Exchange(self.service, scope, receive, send, self._tells_request_id).run()
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


class _Exchange:
    """One request and its answer."""

    def __init__(
        self, service: ModelService, scope: Scope, receive: Receive, send: Send, tells_id: bool
    ) -> None:
        self._service, self._scope = service, scope
        self._receive, self._send = receive, send
        self._headers = {bytes(k).lower(): bytes(v) for k, v in scope.get("headers", ())}
        given = self._header("x-request-id")
        usable = re.fullmatch(r"[\w.:/+=-]{1,128}", given, re.ASCII)
        self._id = given if usable else uuid.uuid4().hex
        self._extra = [(b"x-request-id", self._id.encode())] if tells_id else []
        path, root = scope["path"], scope.get("root_path") or ""
        self._path = path[len(root) :] if root and path.startswith(root) else path
        self._method = scope["method"]
        self._tenant = ANYBODY
        self._status = 0
        self._note = ""
        self._held = 0

    def _header(self, name: str) -> str:
        return self._headers.get(name.encode(), b"").decode("latin-1")

    async def run(self) -> None:
        """Answer, and log one line."""
        begun = time.perf_counter()
        try:
            await self._answer()
        except asyncio.CancelledError:
            self._status = self._status or 499
            raise
        except BaseException as error:
            told = api_error(error)
            # one that loads is asked again and again: that is no fault
            if told.status >= 500 and told.code != "not_ready":
                logger.warning("%s: %s", self._id, told.message)
            if not self._status:
                if told.status == 500 and told.code is None:
                    told.message += f" (request {self._id})"
                await self._send_json(told.body(), told.status, told.headers)
            if not isinstance(error, Exception):
                raise
        finally:
            took_ms = 1000 * (time.perf_counter() - begun)
            path = self._path if self._path in ROUTES else "other"
            self._service.count("requests", path, str(self._status))
            self._service.count("request_seconds", path, by=took_ms / 1000)
            logger.info(
                "%s %s %s %s %d %.1f ms%s",
                self._id, self._tenant.name, self._method, path, self._status, took_ms, self._note,
            )  # fmt: skip

    async def _answer(self) -> None:
        route = ROUTES.get(self._path)
        model = self._path.removeprefix("/v1/models/") if route is None else ""
        if route is None and model in ("", self._path):
            raise ApiError(404, f"there is no {shorten(self._path, 100)}", code="not_found")
        method = "GET" if route is None else route
        if self._method != method and not (method == "GET" and self._method == "HEAD"):
            message = f"{self._path} takes {method}"
            raise ApiError(405, message, code="method_not_allowed", headers={"allow": method})
        self._authorise()
        if method == "GET":
            await self._get(model)
            return
        if self._path == "/v1/cache/import":
            await self._import()
            return
        try:
            data = await self._body(self._service.settings.max_body_bytes)
            await self._while_connected(self._post(data))
        finally:
            self._service.body_bytes -= self._held

    def _authorise(self) -> None:
        if self._path in OPEN_PATHS:
            return
        service = self._service
        if service.keys is not None:
            tenant = service.keys.find(self._header("authorization"))
            if tenant is None:
                raise ApiError(
                    401,
                    "a key of this server is needed, as in Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            self._tenant = tenant
        elif not service.settings.no_auth:
            client = self._scope.get("client")
            if client and not is_loopback(client[0]):
                raise ApiError(
                    403,
                    "this server answers its own machine alone: it was started with neither "
                    "--api-keys FILE nor --no-auth",
                    code="forbidden",
                )

    # -- what comes in

    async def _body(self, most: int) -> bytes:
        parts: list[bytes] = []
        service = self._service
        async for part in self._parts(most):
            self._held += len(part)
            service.body_bytes += len(part)
            if service.body_bytes > service.settings.max_bodies_bytes:
                raise ApiError(
                    429,
                    "the requests under way are larger together than this server takes",
                    code="rate_limit_exceeded",
                    headers={"retry-after": "1"},
                )
            parts.append(part)
        return b"".join(parts)

    async def _parts(self, most: int) -> AsyncIterator[bytes]:
        too_large = ApiError(
            413, f"the body is larger than {most:,} bytes", code="request_too_large"
        )
        told = self._header("content-length")
        if told.isascii() and told.isdigit() and int(told) > most:
            raise too_large
        size, more = 0, True
        until = time.monotonic() + _BODY_TIMEOUT_S
        while more:
            try:
                wait_s = max(0.0, until - time.monotonic())
                message = await asyncio.wait_for(self._receive(), wait_s)
            except asyncio.TimeoutError:
                raise ApiError(408, "the body did not come in time", code="timeout") from None
            if message["type"] == "http.disconnect":
                raise asyncio.CancelledError
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                raise too_large
            if part:
                until = max(until, time.monotonic() + _BODY_TIMEOUT_S)
                yield part
            more = message.get("more_body", False)

    async def _while_connected(self, answer: Any) -> None:
        """Answer until the client goes away."""
        answering = asyncio.ensure_future(answer)
        gone = asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self._status = self._status or 499
                return
            answering.result()
        finally:
            gone.cancel()
            if not answering.done():
                answering.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await answering

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # -- what goes out

    async def _get(self, model: str) -> None:
        service = self._service
        if self._path == "/":
            await self._send_whole(*page())
        elif self._path == "/health":
            await self._send_json({"status": "ok"})
        elif self._path == "/ready":
            service.check_model(None)
            await self._send_json({"status": "ready", "model": service.model_name})
        elif self._path == "/v1/models":
            service.check_model(None)
            await self._send_json({"object": "list", "data": [_model(service)]})
        elif self._path == "/metrics":
            text = await service.run_long(metrics_text, service)
            kind = b"text/plain; version=0.0.4; charset=utf-8"
            await self._send_whole(text.encode(), [(b"content-type", kind)])
        elif self._path == "/openapi.json":
            await self._send_json(openapi(POSTS, GETS))
        else:
            service.check_model(model)
            await self._send_json(_model(service))

    async def _post(self, data: bytes) -> None:
        schema, handler = POSTS[self._path]
        body = schema.model_validate_json(data)
        answer = await handler(self._service, body, self._tenant)
        if isinstance(answer, dict):
            usage = answer.get("usage")
            if usage is not None:
                self._note_usage(usage)
            await self._send_json(answer)
        elif isinstance(answer, Path):
            await self._send_file(answer)
        else:
            await self._stream(answer)

    def _note_usage(self, usage: dict[str, Any]) -> None:
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        self._note = f" {prompt} in, {cached} cached, {completion} out"

    async def _send_json(
        self, value: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        extra = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
        await self._send_whole(to_json(value), [_JSON, *extra], status)

    async def _send_whole(
        self, body: bytes, headers: list[tuple[bytes, bytes]], status: int = 200
    ) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, [*headers, length])
        await self._send({"type": "http.response.body", "body": body})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status
        headers = [*headers, *self._extra]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _stream(self, chunks: AsyncIterator[dict[str, Any]]) -> None:
        """Server-sent events; an error before the first one is an answer of its own."""
        service = self._service
        service.open_streams += 1
        try:
            chunk: dict[str, Any] | None = await anext(chunks)
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
            await self._start(200, headers)
            while chunk is not None:
                if chunk.get("usage"):
                    self._note_usage(chunk["usage"])
                await self._event(to_json(chunk))
                try:
                    chunk = await anext(chunks, None)
                except Exception as error:
                    await self._event(to_json(api_error(error).body()))
                    break
            await self._event(b"[DONE]")
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            service.open_streams -= 1
            await chunks.aclose()  # type: ignore[attr-defined]

    async def _event(self, data: bytes) -> None:
        body = b"data: " + data + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _send_file(self, path: Path) -> None:
        service = self._service
        try:
            file = await service.run_long(path.open, "rb")
            with file:
                size = os.fstat(file.fileno()).st_size
                kind = (b"content-type", b"application/octet-stream")
                length = (b"content-length", str(size).encode())
                await self._start(200, [kind, length])
                while part := await service.run_long(file.read, _FILE_PART_BYTES):
                    message = {"type": "http.response.body", "body": part, "more_body": True}
                    await self._send(message)
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            cache_control.remove_folder(path)

    async def _import(self) -> None:
        service = self._service
        service.check_model(None)
        salt = self._header("x-cache-salt") or None
        with tempfile.TemporaryDirectory(prefix="litecache-import-") as folder:  # 0700
            path = Path(folder) / "prefix.kv"
            file = await service.run_long(path.open, "wb")
            with file:
                async for part in self._parts(service.settings.max_import_bytes):
                    await service.run_long(file.write, part)
            answer = await cache_control.import_file(service, path, salt, self._tenant)
        await self._send_json(answer)


def _model(service: ModelService) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "litecache",
        "root": service.model_name,
        "parent": None,
        "max_model_len": service.max_tokens,
    }


ROUTES = {
    **dict.fromkeys(GETS, "GET"),
    **dict.fromkeys(("/v1/cache/import", *POSTS), "POST"),
}
"""The method of each path."""
