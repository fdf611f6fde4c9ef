"""`GET /openapi.json`: the endpoints with the schemas of their bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import litecache

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


def openapi(posts: Mapping[str, tuple[type[Any], Any]]) -> dict[str, Any]:
    """The description of a server.

    Args:
        posts: endpoints with a JSON body, by path: its model, and who answers it.
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
    for path in ("/", "/health", "/ready", "/metrics", "/openapi.json", "/v1/models"):
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
