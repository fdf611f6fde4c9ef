"""Errors as OpenAI's clients know them: a status, and `{"error": {message, type, param, code}}`.

Whatever goes wrong in a request becomes an `ApiError` here and nowhere else. Messages name fields
and numbers; they never hold a prompt, a key, or the text of an unexpected exception.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from litecache.errors import (
    CapacityError,
    ConfigError,
    GroupError,
    LiteCacheError,
    NothingStoredError,
    PrefixFileError,
    RequestAborted,
    RequestTimeout,
    shorten,
)

logger = logging.getLogger(__name__)

_PARAMS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "input_ids": "prompt",
    "prompts": "prompt",
    "sequence_bias": "logit_bias",
    "samples": "n",
}
"""Names of the library's fields, and of the interface's."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}
_UNION_TAGS = {"str", "int", "float", "bool", "dict", "constrained-str", "constrained-int"}


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP.
        message: for people.
        param: the field that is wrong, as in "messages[0].role"; None = none.
        code: for programs.
        headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


def api_error(error: BaseException) -> ApiError:
    """Any exception as what the client is told of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _of_schema(error)
    if isinstance(error, CapacityError):
        code = "context_length_exceeded"
        return ApiError(400, _in_words(str(error)), param="max_tokens", code=code)
    if isinstance(error, NothingStoredError):
        return ApiError(404, str(error), param="prompt", code="not_stored")
    if isinstance(error, PrefixFileError):
        return ApiError(400, str(error), code="invalid_prefix_file")
    if isinstance(error, ConfigError):
        param = _PARAMS.get(error.field, error.field) if error.valid is not None else None
        return ApiError(400, _in_words(str(error)), param=param, code="invalid_value")
    if isinstance(error, RequestAborted):
        return ApiError(503, "the request was aborted", code="aborted")
    if isinstance(error, RequestTimeout):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, GroupError):
        return ApiError(503, str(error), code="unavailable", headers={"retry-after": "5"})
    if isinstance(error, LiteCacheError):
        return ApiError(500, str(error), code="failed")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer this request; its log says why")


def _in_words(text: str) -> str:
    for ours, theirs in _PARAMS.items():
        text = text.replace(f"{ours}=", f"{theirs}=")
    return text


def _of_schema(error: ValidationError) -> ApiError:
    """The first error alone: of a union every way to read it would be named."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {shorten(first['msg'])}", code="invalid_json")
    param = place(first["loc"])
    code = _CODES.get(first["type"], "invalid_value")
    if code == "unknown_parameter":
        message = f"unrecognized request argument: {param}"
    elif code == "missing_required_parameter":
        message = f"missing required parameter: {param}"
    else:
        message = f"{param or 'the body'} is invalid: {shorten(first['msg'])}"
    return ApiError(400, message, param=param, code=code)


def place(path: Sequence[str | int]) -> str | None:
    """`("messages", 0, "role")` as "messages[0].role", without the names of a union's ways."""
    found = ""
    for part in path:
        if isinstance(part, int):
            found += f"[{part}]"
        elif part.isidentifier() and part not in _UNION_TAGS:
            found += f".{part}" if found else part
        elif not found:
            found = shorten(part, 100)
    return found or None
