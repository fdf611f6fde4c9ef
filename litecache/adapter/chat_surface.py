"""What `KVCacheAdapter` offers for conversations: `chat`, `achat` and `session`.

Every turn of a session finds the turns before it in the cache, answers included. A chat template
writes the conversation anew for each turn, and tokenising an answer's text need not give the tokens
that the model drew. So a session remembers what it sent and what came back (`Transcript`), and
where the new rendering begins with a text that it has tokens for, these are sent and not those of
the tokenizer. Where a template drops or rewrites an earlier turn, such as its
thinking, the rendering is what counts: the prompt is the template's, and as much of it is found as
is the same.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from litecache.adapter.chat_replies import (
    ChatReply,
    ChatStream,
    ChatTemplate,
    Message,
    ask,
    check_messages,
    check_settings,
    read,
)
from litecache.adapter.prompts import check_sequences
from litecache.adapter.surface.generating import GenerateSurface
from litecache.checks import check_flag, check_text
from litecache.errors import ConfigError, outline

if TYPE_CHECKING:
    from litecache.adapter.surface.generating import GenerateSurface

# So many tokens of the prompt are decoded with an answer: what a token's text is may depend on the
# one before it.
_CONTEXT_TOKENS = 16


class Transcript(NamedTuple):
    """A rendered conversation and the tokens that were sent and received for it.

    Attributes:
        text: the last prompt as the template wrote it, and what the answer added to it.
        tokens: the last prompt and answer.
        marks: (characters, tokens): so much of the text is so many of the tokens, in rising order.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    marks: tuple[tuple[int, int], ...] = ()

    def with_prompt(self, template: ChatTemplate, messages: Sequence[Message]) -> Transcript:
        """The next prompt: the template's, with the tokens that are known as far as they go.

        They go to a mark that the new text contains and that none of its tokens crosses.
        """
        text, tokens = template.text(messages), template.tokens(messages)
        for index in reversed(range(len(self.marks))):
            characters, count = self.marks[index]
            if not text.startswith(self.text[:characters]):
                continue
            before = template.encode(text[:characters])
            if tokens[: len(before)] == before:
                known = (*self.tokens[:count], *tokens[len(before) :])
                return Transcript(text, known, (*self.marks[: index + 1], (len(text), len(known))))
        return Transcript(text, tuple(tokens), ((len(text), len(tokens)),))

    def with_answer(self, template: ChatTemplate, answer: Sequence[int]) -> Transcript:
        """The same with the answer to the prompt behind it.

        A mark stands behind the answer, and one before its end token: templates write one of their
        own, which may be another.
        """
        context = self.tokens[-_CONTEXT_TOKENS:]
        given = template.decode(context, skip_special_tokens=False)
        text, marks = self.text, self.marks
        for count in (len(answer) - 1, len(answer)):
            told = template.decode((*context, *answer[:count]), skip_special_tokens=False)
            if count > 0 and told.startswith(given):
                text = self.text + told[len(given) :]
                marks = (*marks, (len(text), len(self.tokens) + count))
        return Transcript(text, (*self.tokens, *answer), marks)


class _State(NamedTuple):
    """A conversation between two turns; never changed, so that forks share it."""

    messages: tuple[Message, ...]
    turns: tuple[int, ...]  # messages before each turn
    transcript: Transcript


class ChatSession:
    """A conversation that goes on; `KVCacheAdapter.session` makes one.

    One turn at a time: a second `send` before the answer is whole is refused, from any thread.
    A turn that fails, is aborted or closed early leaves the conversation as it was.
    """

    def __init__(
        self,
        llm: GenerateSurface,
        template: ChatTemplate,
        messages: Sequence[Message],
        settings: Mapping[str, Any],
    ) -> None:
        self._llm, self._template, self._settings = llm, template, dict(settings)
        self._state = _State(tuple(messages), (), Transcript())
        self._turn = threading.Lock()

    @property
    def messages(self) -> list[Message]:
        """The conversation so far."""
        return [dict(message) for message in self._state.messages]

    def send(
        self, message: str | Message | Sequence[Message], *, stream: bool = False, **settings: Any
    ) -> Any:
        """Say something and get the answer; both are part of the conversation then.

        Args:
            message: the user's words; or a message, or several, such as the results of tools.
            stream: return the answer as it comes.
            **settings: of this turn alone, over those of the session.

        Returns:
            A `ChatReply`, or with `stream` a `ChatStream`.

        Raises:
            ConfigError: another turn is not over, or as in `KVCacheAdapter.chat`.
            LiteCacheError: the request failed.
        """
        new = [{"role": "user", "content": message}] if isinstance(message, str) else message
        said = check_messages([new] if isinstance(new, Mapping) else new)
        check_flag("stream", stream)
        settings = {**self._settings, **settings}
        _check_settings(settings)
        self._begin_turn()
        try:
            messages = [*self._state.messages, *said]
            asked = self._state.transcript.with_prompt(self._template, messages)
            ended = partial(self._end_turn, messages, asked)
            if stream:
                return ChatStream(self._llm, self._template, asked.tokens, settings, ended=ended)
            (reply,) = ask(self._llm, self._template, [asked.tokens], settings, [None])
        except BaseException:
            self._turn.release()
            raise
        ended(reply)
        return reply

    async def asend(
        self, message: str | Message | Sequence[Message], *, stream: bool = False, **settings: Any
    ) -> Any:
        """`send` on an event loop: no thread waits for the answer."""
        check_flag("stream", stream)
        opened = await asyncio.to_thread(self.send, message, stream=True, **settings)
        return opened if stream else await read(opened)

    def undo(self) -> list[Message]:
        """Take the last turn back; returns its messages.

        Raises:
            ConfigError: there is none, or it is not over.
        """
        self._begin_turn()
        try:
            messages, turns, transcript = self._state
            if not turns:
                raise ConfigError("session", "without a turn", "a turn that can be taken back")
            self._state = _State(messages[: turns[-1]], turns[:-1], transcript)
        finally:
            self._turn.release()
        return [dict(message) for message in messages[turns[-1] :]]

    def fork(self) -> ChatSession:
        """Another session that goes on from here; a turn that is not over is no part of it."""
        other = ChatSession(self._llm, self._template, (), self._settings)
        other._state = self._state
        return other

    def _begin_turn(self) -> None:
        if not self._turn.acquire(blocking=False):
            valid = "one turn at a time; fork() is another conversation"
            raise ConfigError("session", "in the midst of a turn", valid)

    def _end_turn(self, messages: Sequence[Message], asked: Transcript, reply: ChatReply) -> None:
        """Take the turn into the conversation, if its answer is whole."""
        try:
            if reply.finish_reason in ("stop", "length"):
                before, turns, _ = self._state
                transcript = asked.with_answer(self._template, reply.token_ids)
                turns = (*turns, len(before))
                self._state = _State((*messages, reply.message), turns, transcript)
        finally:
            self._turn.release()


def _check_settings(settings: Mapping[str, Any]) -> None:
    check_settings(settings)
    samples = settings.get("num_return_sequences")
    if samples is None:
        samples = getattr(settings.get("generation_config"), "num_return_sequences", None)
    if samples not in (None, 1):
        raise ConfigError("num_return_sequences", samples, "1 in a session; fork() it for others")


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
