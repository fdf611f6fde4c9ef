"""Bodies of requests: OpenAI's fields, vLLM's extra ones, and those of the cache.

Unknown fields are errors, since one that is ignored would give an answer that nobody asked for.
What OpenAI's clients send and what changes no answer here (`user`, `metadata`, ...) is taken and
not used; what would change it and is not to be had is refused by its name, in `refused`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from litecache.serving.errors import ApiError
from litecache.serving.forms import FormSpec

MAX_PROMPTS = 2048
MAX_STOPS = 16
MAX_SAMPLES = 128
_INT64 = 2**63 - 1

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Text = Annotated[str, Field(max_length=1 << 24)]
Ids = Annotated[list[TokenId], Field(max_length=1 << 22)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Salt = Annotated[str, Field(max_length=1024)]
Choice = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=4096)]


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """As it came: templates show its fields in the order that they have."""
    function = tool.get("function")
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    if tool.get("type", "function") != "function" or not named:
        raise ValueError('tools have the type "function", and a function with a name')
    return tool


Tools = Annotated[
    list[Annotated[dict[str, Any], AfterValidator(_function)]], Field(max_length=1024)
]


class Body(BaseModel):
    """Strict: a number is no text, and a field that nobody knows is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Of `stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    """Of `response_format`."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """The form of an answer, as vLLM has it: one of these."""

    json_: dict[str, Any] | bool | Text | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Choice | None = None
    json_object: bool | None = None


class CacheFields(Body):
    """What becomes of the KV of a request; not of OpenAI."""

    cache_salt: Salt | None = None
    cache: Literal["default", "read-only", "no-store"] | None = None
    cache_ttl_s: Annotated[float, Field(gt=0)] | None = None
    retention: Literal["low", "normal", "high"] | None = None


class Drawing(CacheFields):
    """How tokens are drawn, for both ways to ask."""

    model: Annotated[str, Field(max_length=4096)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    seed: Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern="^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=4096),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # changes nothing here
    user: Text | None = None
    metadata: dict[str, Any] | None = None
    # of vLLM
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31)] | None = None
    guided_json: dict[str, Any] | bool | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choice | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def form(self) -> FormSpec | None:
        """Of the answers, by whichever field asks for one.

        Raises:
            ApiError: 400, two of them do, or a schema is a text that is no JSON.
        """
        found = []
        asked, outputs = self.response_format, self.structured_outputs or StructuredOutputs()
        if asked is not None and asked.type != "text":
            schema: Any = {"type": "object"}
            if asked.json_schema is not None:
                schema = {} if asked.json_schema.schema_ is None else asked.json_schema.schema_
            found.append(FormSpec("json", schema, "response_format.json_schema.schema"))
        if outputs.json_object:
            found.append(FormSpec("json", {"type": "object"}, "structured_outputs.json_object"))
        given = (
            ("json", self.guided_json, "guided_json"),
            ("regex", self.guided_regex, "guided_regex"),
            ("choice", self.guided_choice, "guided_choice"),
            ("json", outputs.json_, "structured_outputs.json"),
            ("regex", outputs.regex, "structured_outputs.regex"),
            ("choice", outputs.choice, "structured_outputs.choice"),
        )
        for kind, asked_for, param in given:
            value: Any = asked_for
            if kind == "json" and isinstance(value, str):
                try:
                    value = json.loads(value)
                except (ValueError, RecursionError):
                    value = ()
                if not isinstance(value, (dict, bool)):
                    raise refused(param, "a JSON schema")
            if value is not None:
                found.append(FormSpec(kind, value, param))
        if len(found) > 1:
            raise refused(found[1].param, f"left out beside {found[0].param}")
        return found[0] if found else None

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have; None = as many as there is room for."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def samples(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def usage_at_end(self) -> bool:
        """A stream ends with a count of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_in_chunks(self) -> bool:
        """Every chunk with text has one, too."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def check(self) -> None:
        """Refuse what no single field shows.

        Raises:
            ApiError: 400, names the field.
        """
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "left out, unless stream is true")
        form = self.response_format
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            raise refused("response_format.json_schema", 'given with type "json_schema" alone')
        if self.limit is not None and (self.min_tokens or 0) > self.limit:
            raise refused("min_tokens", f"at most max_tokens, which is {self.limit}")
        self.form  # noqa: B018 - it raises


class CompletionRequest(Drawing):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(max_length=MAX_PROMPTS)]
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Text | None = None

    def check(self) -> None:
        """As in `Drawing`."""
        super().check()
        if self.suffix:
            raise refused("suffix", "left out: the model continues texts, it fills no gaps")
        if self.best_of is not None and self.best_of != self.samples:
            raise refused("best_of", f"left out, or n, which is {self.samples}")
        if self.echo and self.stream and self.logprobs is not None:
            raise refused("echo", "false in a stream with logprobs")
        if not self.prompt:
            raise refused("prompt", "not empty")


class FunctionCall(Body):
    """What an assistant called."""

    name: Text
    arguments: Text


class ToolCall(BaseModel):
    """One call of an assistant's message."""

    model_config = ConfigDict(extra="allow", strict=True)
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ContentPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Annotated[str, Field(max_length=64)]
    text: Text | None = None


class ChatMessage(BaseModel):
    """A message; further fields are the template's."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=1024)] | None = None
    tool_call_id: str | None = None


class TemplateFields(Body):
    """What a chat template is given beside messages."""

    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None


class PromptFields(CacheFields, TemplateFields):
    """A prompt or a conversation, of which one is given."""

    model: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None


class ChatRequest(Drawing, TemplateFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1 << 16)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    # changes nothing here, or says what is so anyway
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[str] | None = None

    @property
    def limit(self) -> int | None:
        """As in `Drawing`."""
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given

    @property
    def forces_call(self) -> bool:
        """The answer has to be a call of a tool."""
        return self.tool_choice not in (None, "none", "auto")

    def check(self) -> None:
        """As in `Drawing`."""
        super().check()
        if self.store:
            raise refused("store", "false: answers are not kept")
        if self.modalities not in (None, ["text"]):
            raise refused("modalities", '["text"]')
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "left out, unless logprobs is true")
        if self.tool_choice is not None and not self.tools:
            raise refused("tool_choice", "left out without tools")
        if self.forces_call and self.form is not None:
            raise refused("tool_choice", '"none" or "auto" beside a form of the answer')
        if self.continue_final_message and self.add_generation_prompt:
            raise refused("add_generation_prompt", "false or left out in a message's continuation")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise refused("max_tokens", "left out beside max_completion_tokens")
        for index, message in enumerate(self.messages):
            for number, part in enumerate(
                message.content if isinstance(message.content, list) else ()
            ):
                if part.type != "text" or part.text is None:
                    param = f"messages[{index}].content[{number}].type"
                    raise refused(param, '"text", with a text: the model reads nothing else')


class TokenizeRequest(PromptFields):
    """`POST /tokenize`: of a prompt, or of a conversation."""

    prompt: Text | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Ids


class CacheRequest(PromptFields):
    """`POST /v1/cache/...`: of a prompt, or of a conversation."""

    prompt: Text | Ids | None = None


class CacheDeleteRequest(Body):
    """`POST /v1/cache/delete`."""

    model: str | None = None
    cache_salt: Salt | None = None


def refused(param: str, valid: str) -> ApiError:
    """400, for a field whose value is understood and not taken."""
    return ApiError(400, f"{param} must be {valid}", param=param, code="unsupported_value")
