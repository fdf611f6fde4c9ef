"""What the server answers without its model: a page for people, the schemas of bodies, metrics.

The page is a small chat that shows what each answer reused: static, without outside resources. Its
policy lets it run its own script alone, by the script's digest, and talk to its own server alone;
what a model or a user writes is set as text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

import litecache
from litecache.serving.service import ModelService


@cache
def page() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The page, and the headers that it is sent with."""
    text = resources.files("litecache.serving").joinpath("page.html").read_text(encoding="utf-8")
    rules = {
        "default-src": "'none'",
        "script-src": _digests("script", text),
        "style-src": _digests("style", text),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in rules.items())
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), [(name.encode(), value.encode()) for name, value in headers.items()]


def _digests(tag: str, text: str) -> str:
    found = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (hashlib.sha256(each.encode()).digest() for each in found)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi(posts: Mapping[str, tuple[type[Any], Any]], gets: Iterable[str]) -> dict[str, Any]:
    """The description of a server.

    Args:
        posts: endpoints with a JSON body, by path: its model, and who answers it.
        gets: paths without a body.
    """
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, (body, handler) in posts.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        content = {"application/json": {"schema": _ref(body.__name__)}}
        paths[path] = {
            "post": {
                "summary": (handler.__doc__ or "").partition("\n")[0],
                "requestBody": {"required": True, "content": content},
                "responses": _responses(),
            }
        }
    file = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    paths["/v1/cache/import"] = {
        "post": {
            "summary": "Store the blocks of an exported file.",
            "requestBody": {"required": True, "content": file},
            "responses": _responses(),
        }
    }
    for path in gets:
        paths[path] = {"get": {"responses": _responses()}}
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{model}"] = {"get": {"parameters": [model], "responses": _responses()}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "LiteCache", "version": litecache.__version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _responses() -> dict[str, Any]:
    error = {"application/json": {"schema": _ref("Error")}}
    return {
        "200": {"description": "the answer"},
        "4XX": {"description": "the request is wrong", "content": error},
        "5XX": {"description": "the server cannot answer", "content": error},
    }


_LABELS = {"requests": ("path", "status"), "request_seconds": ("path",)}


def metrics_text(service: ModelService) -> str:
    """All of it; asks the actors of the group, where there is one yet."""
    lines = list(_server_lines(service))
    if service.state == "ready":
        stats = service.llm.stats()
        lines += _lines("prompt_tokens_total", "counter", {(): stats.prompt_tokens})
        lines += _lines("generated_tokens_total", "counter", {(): stats.generated_tokens})
        for name in ("found_tokens", "reused_tokens"):
            lines += _by(f"{name}_total", "counter", "tier", getattr(stats, name))
        lines += _by("engine_requests_total", "counter", "outcome", stats.requests)
        lines += _by("pool_blocks", "gauge", "state", stats.blocks)
        lines += _lines("engine_requests_running", "gauge", {(): stats.running})
        lines += _lines("engine_requests_waiting", "gauge", {(): stats.waiting})
    return "\n".join(lines) + "\n"


def _server_lines(service: ModelService) -> Iterator[str]:
    admission = service.admission
    yield from _lines("ready", "gauge", {(): int(service.state == "ready")})
    yield from _lines("sequences_running", "gauge", {(): admission.running})
    yield from _lines("requests_waiting", "gauge", {(): admission.waiting})
    yield from _lines("requests_rejected_total", "counter", {(): admission.rejected})
    yield from _lines("open_streams", "gauge", {(): service.open_streams})
    for name, labels in _LABELS.items():
        found = {
            tuple(zip(labels, values, strict=True)): count
            for (kind, *values), count in sorted(service.counts.items())
            if kind == name
        }
        yield from _lines(f"{name}_total", "counter", found)


def _by(name: str, kind: str, label: str, values: Mapping[str, float]) -> Iterator[str]:
    yield from _lines(name, kind, {((label, key),): value for key, value in values.items()})


def _lines(name: str, kind: str, values: Mapping[Any, float]) -> Iterator[str]:
    yield f"# TYPE litecache_server_{name} {kind}"
    for labels, value in values.items():
        text = ",".join(f'{label}="{told}"' for label, told in labels)
        yield f"litecache_server_{name}{'{' + text + '}' if text else ''} {value:.10g}"
