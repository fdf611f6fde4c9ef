"""Requests that nobody should send, made from a server's own OpenAPI document.

Most are a body that its schema describes, with a few values changed to ones that it does not; the
rest are bytes, methods, paths and headers that fit nothing. Request N of a seed is the same in
every run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TEXTS = ("", "x", "hello world", "é🙂に", "\x00", "\ud800", "1", "null", "<|im_start|>", "x" * 3000)
NUMBERS = (0, 1, -1, 2, 300, 2**31, 2**63, -(2**63) - 1, 2**70, 0.5, 1e308, float("nan"))
ANYTHING = (*TEXTS, *NUMBERS, None, True, False, float("inf"), [], {}, [[]], [None], {"": {}})
# what is drawn for long is no bad input
SHORT = {"max_tokens": 4, "max_completion_tokens": 4, "min_tokens": 4, "n": 2, "best_of": 2}
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "POST")
HEADERS = (
    {"content-type": "text/plain"},
    {"content-type": "application/json; charset=utf-16"},
    {"content-encoding": "gzip"},
    {"x-request-id": "a b" * 100},
    {"x-cache-salt": "é" * 50},
    {"authorization": "Bearer"},
    {"accept": "image/png"},
)


class FuzzedRequest(NamedTuple):
    """One request, as any HTTP client takes it."""

    method: str
    path: str
    headers: dict[str, bytes]
    body: bytes


class SchemaFuzz:
    """Requests to the endpoints of a document.

    Args:
        document: what `/openapi.json` answers.
        model: a model's name that the server knows.
        paths: endpoints with a body to ask; None = all of them.
    """

    def __init__(
        self, document: Mapping[str, Any], model: str, paths: Sequence[str] | None = None
    ) -> None:
        self._schemas: Mapping[str, Any] = document["components"]["schemas"]
        self._model = model
        self._rng = random.Random()
        posts = {path: each["post"] for path, each in document["paths"].items() if "post" in each}
        self.bodies = {
            path: next(iter(post["requestBody"]["content"].values())).get("schema", {})
            for path, post in posts.items()
            if paths is None or path in paths
        }
        self.gets = sorted(path for path, each in document["paths"].items() if "get" in each)

    def request(self, seed: int) -> FuzzedRequest:
        """Request number `seed`."""
        rng = self._rng = random.Random(seed)
        path = rng.choice(sorted(self.bodies))
        value = self.like(self.bodies[path])
        if rng.random() < 0.6:
            value = self.changed(value)
        # lone surrogates go as escapes
        body = json.dumps(value).encode()
        kind = rng.random()
        if kind < 0.75:
            return FuzzedRequest("POST", path, {}, body)
        if kind < 0.9:
            return FuzzedRequest("POST", path, {}, self.damaged(body))
        if kind < 0.95:
            odd_headers = rng.sample(HEADERS, rng.randint(1, 2))
            headers = {name: v.encode() for each in odd_headers for name, v in each.items()}
            return FuzzedRequest("POST", path, headers, body)
        odd = [*self.bodies, *self.gets, path + "/", "/" + path, path + "/../x", "/v1/%00", "/v2"]
        return FuzzedRequest(rng.choice(METHODS), rng.choice(odd), {}, body)

    def like(self, schema: Mapping[str, Any], name: str = "", depth: int = 0) -> Any:
        """A value that a schema describes, near the ends of its ranges."""
        rng = self._rng
        if "$ref" in schema:
            return self.like(self._schemas[schema["$ref"].rpartition("/")[2]], name, depth)
        if "anyOf" in schema:
            return self.like(rng.choice(schema["anyOf"]), name, depth)
        if name == "model":
            return self._model
        if "enum" in schema or "const" in schema:
            return rng.choice(schema.get("enum") or [schema["const"]])
        kind = schema.get("type")
        if kind in ("integer", "number"):
            least = schema.get("minimum", schema.get("exclusiveMinimum", -10))
            most = min(SHORT.get(name, 200), schema.get("maximum", 200))
            value = rng.choice([least, most, rng.uniform(max(least, -10), most)])
            return int(value) if kind == "integer" else value
        if kind == "string":
            return rng.choice([*TEXTS[:4], "7"])
        if kind == "boolean":
            return rng.random() < 0.5
        if kind == "array":
            count = max(schema.get("minItems", 0), rng.randrange(4) if depth < 4 else 0)
            return [self.like(schema.get("items", {}), name, depth + 1) for _ in range(count)]
        if kind == "object":
            return self._object(schema, depth)
        return rng.choice([None, "x", 1, {}, []])

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        rng = self._rng
        known = schema.get("properties", {})
        optional = [each for each in known if each not in schema.get("required", ())]
        few = rng.sample(optional, min(len(optional), rng.randrange(3)))
        chosen = [*schema.get("required", ()), *few]
        made = {each: self.like(known[each], each, depth + 1) for each in chosen}
        for key, inner in (("7", "patternProperties"), ("x", "additionalProperties")):
            values = schema.get(inner)
            if isinstance(values, dict) and depth < 4 and rng.random() < 0.5:
                made[key] = self.like(values if key == "x" else next(iter(values.values())))
        return made

    def changed(self, value: Any) -> Any:
        """The value with one to three of its parts put in the wrong."""
        for _ in range(self._rng.randint(1, 3)):
            value = self._change(value)
        return value

    def _change(self, value: Any) -> Any:
        rng = self._rng
        if isinstance(value, dict) and value and rng.random() < 0.85:
            key = rng.choice(sorted(value))
            how = rng.random()
            if how < 0.1:
                return {each: inner for each, inner in value.items() if each != key}
            if how < 0.2:
                return {**value, rng.choice(["x", "suffix", "", "role"]): rng.choice(ANYTHING)}
            # a good number there may be one that is drawn for long
            kept = key in SHORT and not isinstance(value[key], dict)
            new = rng.choice(TEXTS) if kept else self._change(value[key])
            return {**value, key: new}
        if isinstance(value, list) and value and rng.random() < 0.7:
            index = rng.randrange(len(value))
            return [*value[:index], self._change(value[index]), *value[index + 1 :]]
        return rng.choice(ANYTHING)

    def damaged(self, body: bytes) -> bytes:
        """The bytes, cut, doubled, or with some of them changed."""
        rng, data = self._rng, bytearray(body)
        how = rng.randrange(4)
        if how == 0:
            return bytes(data[: rng.randrange(len(data) + 1)])
        if how == 1:
            return bytes(data) * 2
        if how == 2:
            return rng.randbytes(rng.randrange(200))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)


def fault(status: int, text: str, method: str = "POST") -> str | None:
    """What is wrong with an answer to such a request; None = nothing."""
    if status == 200:  # a stream may end with an error
        return f"200 and then {text[-300:]}" if '"server_error"' in text else None
    if status not in (400, 401, 404, 405, 413, 429):
        return f"{status}: {text[:300]}"
    if method == "HEAD":
        return None
    try:
        told = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return f"{status} without OpenAI's shape: {text[:300]}"
    if set(told) != {"message", "type", "param", "code"}:
        return f"{status} with other fields: {told}"
    return None if isinstance(told["message"], str) and told["message"] else f"no message: {told}"
