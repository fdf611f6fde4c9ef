"""One conversation and its answer: the chat template, the reply, the reply while it comes.

`ChatSurface` and `ChatSession` (chat_surface.py) are what users call. Both make their prompts by
`ChatTemplate`, which is `apply_chat_template` of transformers and nothing else, and ask by `ask` or
`ChatStream`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from litecache.errors import ConfigError, outline, told
from litecache.types import TokenLogprobs

if TYPE_CHECKING:
    from typing_extensions import Self

    from litecache.adapter.surface.generating import GenerateSurface

Message = dict[str, Any]
"""`{"role": ..., "content": ...}`, and whatever else a template reads."""

_MADE_HERE = (
    "inputs", "input_ids", "attention_mask", "prompt", "as_tokens", "skip_special_tokens",
    "return_dict_in_generate",
)  # fmt: skip
_CONVERSATION = "a list of messages, each a dict with a role"


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: of the prompt.
        completion_tokens: of the answer, the end token included.
        cached_tokens: of the prompt, by the tier where they were found; they were not computed.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: dict[str, int]

    @property
    def total_tokens(self) -> int:
        """Prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class ChatReply:
    """An answer.

    Attributes:
        text: without special tokens.
        message: the same as a message, to be appended to the conversation; of a message that was
            continued the whole.
        finish_reason: "stop" or "length"; None while a stream goes on, "abort" or "error" where it
            was cut off.
        usage: tokens in and out.
        token_ids: of the answer, special ones and the end token included.
        logprobs: per token, with `logprobs=k`; else empty.
    """

    text: str
    message: Message
    finish_reason: str | None
    usage: Usage
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


class ChatTemplate:
    """A tokenizer's chat template and what it is given beside the messages.

    Args:
        tokenizer: of transformers.
        tools: functions, or their JSON schemas.
        documents: dicts with a title and a text.
        chat_template: a template, or the name of one of the tokenizer's; None = its own.
        options: further arguments of `apply_chat_template`, those that its template reads included.

    Raises:
        ConfigError: the tokenizer has no such template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError("chat_template_kwargs", options, "a dict by argument, or None")
        try:
            tokenizer.get_chat_template(chat_template, tools)
        except Exception as error:  # whatever a tokenizer makes of it
            valid = f"given, for a tokenizer without one ({told(error)})"
            raise ConfigError("chat_template", chat_template, valid) from error
        self.tokenizer, self._options = tokenizer, dict(options or {})
        self._given = {"tools": tools, "documents": documents, "chat_template": chat_template}

    def tokens(
        self,
        messages: Sequence[Message],
        continue_final_message: bool | str = False,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt for the next answer, or for the rest of the last message.

        Args:
            messages: of the conversation.
            continue_final_message: go on with the last one.
            add_generation_prompt: else end with the beginning of an answer.

        Raises:
            ConfigError: the template does not take the conversation, or its arguments.
        """
        encoded = self._apply(
            messages,
            self._options,
            tokenize=True,
            return_dict=True,
            return_tensors=None,
            padding=False,
            truncation=False,
            return_assistant_tokens_mask=False,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
        )
        return list(encoded["input_ids"])

    def text(self, messages: Sequence[Message]) -> str:
        """The same prompt as a text."""
        options = {k: v for k, v in self._options.items() if k != "sanitize_control_tokens"}
        rendered = self._apply(messages, options, tokenize=False, add_generation_prompt=True)
        return str(rendered)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of such a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids as text, as it is."""
        text: str = self.tokenizer.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def _apply(self, messages: Sequence[Message], options: dict[str, Any], **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), **self._given, **how, **options
            )
        except Exception as error:  # of the template, too, which may raise what it likes
            # At the end of a long reason transformers quotes the message.
            reason = told(error).partition("...")[0]
            valid = f"a conversation that the chat template takes ({reason})"
            raise ConfigError("messages", outline(messages), valid) from error


def check_messages(messages: Any) -> list[Message]:
    """The messages of one conversation.

    Raises:
        ConfigError: not a list of dicts, or an empty one.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConfigError("messages", outline(messages), _CONVERSATION)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ConfigError(f"messages[{index}]", outline(message), "a dict with a role")
    return [dict(message) for message in messages]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse arguments of `generate` that a chat makes itself.

    Raises:
        ConfigError: names the first one.
    """
    for name in _MADE_HERE:
        if name in settings:
            valid = "left out: it is made from the messages"
            raise ConfigError(name, outline(settings[name]), valid)


def ask(
    llm: GenerateSurface,
    template: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    starts: Sequence[Message | None],
) -> list[ChatReply]:
    """The answers to all prompts, as one batch; samples of a prompt in a row.

    Args:
        llm: who answers.
        template: decodes them.
        prompts: token ids.
        settings: arguments of `generate`.
        starts: per prompt, the message that it continues.
    """
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device="cpu")
        mask[row, width - len(prompt) :] = 1
    # What fills a row that has ended is cut off again.
    settings = {"pad_token_id": 0, "tokenizer": template.tokenizer, **settings}
    out = llm.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    report, samples = out.litecache, len(out.sequences) // len(prompts)
    replies = []
    for row, sequence in enumerate(out.sequences):
        tokens = sequence[width : width + report.completion_tokens[row]].tolist()
        usage = Usage(report.prompt_tokens[row], len(tokens), report.reused_tokens[row])
        reason, logprobs = report.finish_reasons[row], report.logprobs[row]
        replies.append(_reply(template, tokens, reason, usage, logprobs, starts[row // samples]))
    return replies


class ChatStream:
    """An answer as it comes: an iterator over pieces of text, for `for` or `async for`.

    Closing it, leaving its `with` block or dropping it ends the request.
    """

    def __init__(
        self,
        llm: GenerateSurface,
        template: ChatTemplate,
        prompt: Sequence[int],
        settings: Mapping[str, Any],
        *,
        start: Message | None = None,
        ended: Callable[[ChatReply], None] | None = None,
    ) -> None:
        """Send the prompt; `ended` is called once, when the answer is whole or was cut off."""
        self._template, self._prompt_tokens, self._start = template, len(prompt), start
        self._ended = ended
        settings = {"tokenizer": template.tokenizer, **settings}
        self._stream = llm.stream(list(prompt), **settings)

    @property
    def request_id(self) -> str:
        """For `KVCacheAdapter.abort`."""
        return self._stream.request_id

    @property
    def reply(self) -> ChatReply:
        """The answer so far."""
        stream = self._stream
        reason, tokens = stream.finish_reason, stream.token_ids
        usage = Usage(self._prompt_tokens, len(tokens), stream.reused_tokens)
        logprobs = stream.logprobs[: len(tokens)]
        return _reply(self._template, tokens, reason, usage, logprobs, self._start)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            piece: str = next(self._stream)
        except BaseException:  # the end, an error, ctrl-C
            self.close()
            raise
        return piece

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        try:
            piece: str = await anext(aiter(self._stream))
        except BaseException:  # a cancelled task, too
            self.close()
            raise
        return piece

    def close(self) -> None:
        """Stop early: the request is aborted unless it has ended."""
        ended, self._ended = self._ended, None
        try:
            self._stream.close()
        finally:  # whatever becomes of the request
            if ended is not None:
                ended(self.reply)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self.close()


async def read(stream: ChatStream) -> ChatReply:
    """The whole answer; no thread waits for it."""
    with stream:
        async for _ in stream:
            pass
    return stream.reply


def _reply(
    template: ChatTemplate,
    tokens: Sequence[int],
    reason: str | None,
    usage: Usage,
    logprobs: Sequence[TokenLogprobs],
    start: Message | None,
) -> ChatReply:
    text = template.decode(tokens, skip_special_tokens=True)
    message = {"role": "assistant", "content": text}
    if start is not None:
        message = {**start, "content": f"{start['content']}{text}"}
    return ChatReply(text, message, reason, usage, tuple(tokens), tuple(logprobs))
