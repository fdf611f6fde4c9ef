"""`POST /v1/chat/completions`: a conversation, answered."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from litecache.serving.forms import FormSpec
from litecache.serving.keys import Tenant
from litecache.serving.reader import Reader, open_reader
from litecache.serving.schemas import ChatMessage, ChatRequest, refused
from litecache.serving.service import ModelService
from litecache.serving.tokens import chat_logprobs
from litecache.serving.tool_calls import CallFinder, ToolFormat, asked_functions


async def chat(
    service: ModelService, body: ChatRequest, tenant: Tenant
) -> dict[str, Any] | AsyncIterator[dict[str, Any]]:
    """Answer a conversation: a body, or with `stream` the chunks of one.

    Raises:
        ApiError: the request is wrong, or too much.
        LiteCacheError: as in `KVCacheAdapter.submit`.
    """
    service.check_model(body.model)
    body.check()
    tools = body.tools if body.tools and body.tool_choice != "none" else None
    messages = plain_messages(service, body.messages)
    prompt = await service.run_unless_short(
        sum(len(message["content"]) for message in messages) + 100 * len(tools or ()),
        service.encode_chat,
        messages,
        body,
        tools,
    )
    format = service.tools if tools else None
    form = _forced_call(service, body, format) if body.forces_call else None
    room = service.room_for(prompt, "messages")
    if body.limit == 0:
        raise refused("max_tokens", "at least 1")
    reader = await open_reader(
        service,
        tenant,
        body,
        [prompt],
        max_tokens=room if body.limit is None else body.limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        # markers of calls may be special tokens
        skip_special_tokens=body.skip_special_tokens is not False and format is None,
        form=form,
    )
    if body.stream:
        return _stream(service, body, reader, format)
    with reader:
        pieces = await reader.read()
    choices = []
    for index, piece in enumerate(pieces):
        finder = CallFinder(format)
        text = finder.add(piece.text)
        rest, calls = finder.end()
        message: dict[str, Any] = {"role": "assistant", "content": text + rest, "refusal": None}
        reason = reader.reasons[index]
        if calls:
            message |= {"content": text.rstrip() or None, "tool_calls": calls}
            reason = "tool_calls"
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(service, body, piece.tokens, piece.logprobs),
                "finish_reason": reason,
            }
        )
    head = service.answer_head("chatcmpl", "chat.completion")
    return {**head, "choices": choices, "usage": reader.usage()}


def _forced_call(service: ModelService, body: ChatRequest, format: ToolFormat | None) -> FormSpec:
    """The form of an answer that has to call a tool."""
    functions = asked_functions(body.tools or (), body.tool_choice)
    if format is None:
        valid = '"none" or "auto": how this model writes calls is not known, so none can be forced'
        raise refused("tool_choice", valid)
    several = body.tool_choice == "required" and body.parallel_tool_calls is not False
    return format.form(functions, several=several, special=service.special_token)


def plain_messages(service: ModelService, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates read them: texts, and arguments of calls as values."""
    template = str(getattr(service.llm.tokenizer, "chat_template", None) or "")
    found = []
    for index, message in enumerate(messages):
        plain = message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            plain["content"] = "\n".join(part.text or "" for part in message.content)
        plain.setdefault("content", "")
        if message.role == "developer" and "developer" not in template:
            plain["role"] = "system"
        for number, call in enumerate(plain.get("tool_calls", ())):
            try:
                arguments = json.loads(call["function"]["arguments"] or "{}")
            except ValueError:
                arguments = None
            if not isinstance(arguments, dict):
                param = f"messages[{index}].tool_calls[{number}].function.arguments"
                raise refused(param, "a JSON object, as a text")
            call["function"] = {**call["function"], "arguments": arguments}
        found.append(plain)
    return found


def _logprobs(
    service: ModelService, body: ChatRequest, tokens: Sequence[int], logprobs: Sequence[Any]
) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    return {
        "content": chat_logprobs(service.names, tokens, logprobs, body.top_logprobs or 0),
        "refusal": None,
    }


async def _stream(
    service: ModelService, body: ChatRequest, reader: Reader, format: ToolFormat | None
) -> AsyncIterator[dict[str, Any]]:
    head = service.answer_head("chatcmpl", "chat.completion.chunk")
    finders = [CallFinder(format) for _ in reader.rows]

    def choice(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    with reader:
        begin = {"role": "assistant", "content": ""}
        yield {**head, "choices": [choice(index, begin) for index in range(len(reader.rows))]}
        async for found in reader.pieces():
            choices = []
            for index, piece in found:
                reason = reader.reasons[index]
                calls: list[dict[str, Any]] = []
                text = finders[index].add(piece.text)
                if reason is not None:
                    rest, calls = finders[index].end()
                    text += rest
                delta: dict[str, Any] = {"content": text} if text else {}
                if calls:
                    numbered = [{"index": number, **call} for number, call in enumerate(calls)]
                    delta["tool_calls"], reason = numbered, "tool_calls"
                if delta or reason or (body.logprobs and piece.tokens):
                    made = choice(index, delta, reason)
                    made["logprobs"] = _logprobs(service, body, piece.tokens, piece.logprobs)
                    choices.append(made)
            if choices:
                chunk = {**head, "choices": choices}
                yield {**chunk, "usage": reader.usage()} if body.usage_in_chunks else chunk
        if body.usage_at_end:
            yield {**head, "choices": [], "usage": reader.usage()}
