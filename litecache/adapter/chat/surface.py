"""What `KVCacheAdapter` offers for conversations: `chat`, `achat` and `session`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from litecache.adapter.chat.replies import (
    ChatStream,
    ChatTemplate,
    Message,
    ask,
    check_messages,
    check_settings,
    read,
)
from litecache.adapter.chat.session import ChatSession
from litecache.adapter.prompts import check_sequences
from litecache.adapter.surface.generating import GenerateSurface
from litecache.checks import check_flag, check_text
from litecache.errors import ConfigError, outline


class ChatSurface(GenerateSurface):
    """Conversations by the tokenizer's chat template."""

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        tools: Sequence[Any] | None = None,
        *,
        documents: Sequence[Mapping[str, str]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        stream: bool = False,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Any:
        """Answer a conversation, or several of them as one batch.

        Args:
            messages: dicts with "role" and "content"; or a list of such lists.
            tools: functions with type hints and docstrings, or JSON schemas, for templates that
                offer them to the model. What it calls is part of the text.
            documents: dicts with "title" and "text", for templates that read them.
            chat_template: a Jinja template or the name of one of the tokenizer's; None = its own.
            chat_template_kwargs: further arguments of `apply_chat_template`, those that the
                template reads included (`enable_thinking=False`).
            continue_final_message: go on with the last message instead of answering it.
            stream: return the answer as it comes; of one conversation.
            tokenizer: whose template; None = the adapter's.
            **settings: arguments of `generate`; with `stream` those of `stream`.

        Returns:
            A `ChatReply`; a list of them for several conversations, or several samples of one,
            `num_return_sequences` in a row for each. With `stream` a `ChatStream`.

        Raises:
            ConfigError: the template does not take the conversation, or as in `generate`.
            LiteCacheError: a request failed.
        """
        check_settings(settings)
        check_flag("stream", stream)
        check_flag("continue_final_message", continue_final_message)
        template = ChatTemplate(
            self.tokenizer if tokenizer is None else tokenizer,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            options=chat_template_kwargs,
        )
        several = isinstance(messages, (list, tuple)) and all(
            isinstance(each, (list, tuple)) for each in messages
        )
        given: Any = messages if several and messages else [messages]
        check_sequences("messages", len(given))
        conversations = [check_messages(each) for each in given]
        prompts = [template.tokens(each, continue_final_message) for each in conversations]
        starts = [
            each[-1]
            if continue_final_message and isinstance(each[-1].get("content"), str)
            else None
            for each in conversations
        ]
        if stream:
            if len(prompts) > 1:
                raise ConfigError("messages", outline(messages), "one conversation with stream")
            return ChatStream(self, template, prompts[0], settings, start=starts[0])
        replies = ask(self, template, prompts, settings, starts)
        return replies if several or len(replies) > 1 else replies[0]

    async def achat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        stream: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`chat` on an event loop, of one conversation: no thread waits for the answer.

        `asyncio.gather` over several calls is a batch, too. Cancelling the task ends the request.

        Args:
            messages, tools, **kwargs: as in `chat`.
            stream: `async for text in await llm.achat(..., stream=True)`.

        Returns:
            A `ChatReply`, or with `stream` a `ChatStream`.

        Raises:
            ConfigError: as in `chat`.
            LiteCacheError: the request failed.
        """
        check_flag("stream", stream)
        # routing and submitting may wait for an actor
        opened = await asyncio.to_thread(self.chat, messages, tools, stream=True, **kwargs)
        return opened if stream else await read(opened)

    def session(
        self,
        system: str | None = None,
        *,
        messages: Sequence[Message] = (),
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> ChatSession:
        """A conversation that goes on by `send`; each turn finds the turns before it in the cache.

        Args:
            system: the words of a first message of role "system".
            messages: what has been said before.
            tools, documents, chat_template, chat_template_kwargs, tokenizer: as in `chat`.
            **settings: arguments of `generate`, for every turn that does not give its own.

        Raises:
            ConfigError: an argument is invalid.
        """
        check_settings(settings)
        first = []
        if system is not None:
            first.append({"role": "system", "content": check_text("system", system)})
        first += check_messages(messages) if messages else []
        template = ChatTemplate(
            self.tokenizer if tokenizer is None else tokenizer,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            options=chat_template_kwargs,
        )
        return ChatSession(self, template, first, settings)
