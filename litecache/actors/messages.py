"""What driver, replica and coordinator say to each other, as msgpack: no byte of it is ever run.

A message is a tuple that begins with its version; requests travel as columns, those that draw
alike share their sampling. What cannot be carried (an integer of more than 64 bits, half a
surrogate pair, a number that is not Python's own) is refused where it would leave, by name; what
does not read as a message is refused where it arrives, and changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import IntEnum
from operator import attrgetter
from typing import Any, TypeVar

import msgpack

from litecache.actors.router import ReplicaLoad, RoutedPrompt
from litecache.errors import ConfigError, GroupMismatchError, LiteCacheError, Shown
from litecache.storage.key_dict import check_keys, split_keys
from litecache.token_ids import TokenIds
from litecache.types import (
    MESSAGE_VERSION,
    FinishReason,
    Guidance,
    PollReply,
    Request,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
)

T = TypeVar("T")
_SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))
_REQUEST_FIELDS = tuple(each.name for each in dataclasses.fields(Request) if each.name != "version")
_COLUMNS = (*("input_ids" if name == "prompt" else name for name in _REQUEST_FIELDS), "sampling")
_MOST_ITEMS = 1 << 24
_FINISH_REASONS = {reason.value: reason for reason in FinishReason}


class ReplicaMethod(IntEnum):
    """Numbers of a replica's methods."""

    SUBMIT = 1
    POLL = 2
    GUIDE = 3


def answering(
    method: ReplicaMethod, actor: Callable[..., Awaitable[Any]]
) -> Callable[[bytes], Awaitable[bytes]]:
    """A coroutine method of a replica as a handler of messages."""
    pack: Callable[[Any], bytes] = pack_reply if method is ReplicaMethod.POLL else pack_value
    unpack: Callable[[bytes], tuple[tuple[Any, ...], list[Any]]] = unpack_call
    if method is ReplicaMethod.GUIDE:
        unpack = unpack_guidance

    async def answer(message: bytes) -> bytes:
        arguments, rows = unpack(message)
        try:
            call = actor(*arguments, rows)
        except TypeError:  # of binding the arguments: a coroutine method has run nothing yet
            what = f"{len(arguments)} arguments"
            raise ConfigError("message", what, f"those of {method.name.lower()}") from None
        return pack(await call)

    return answer


def pack_call(*arguments: Any, requests: Sequence[Request] = ()) -> bytes:
    """The arguments of a call, and requests; ConfigError names what cannot be carried."""
    samplings = {id(request.sampling): request.sampling for request in requests}
    numbers = {each: number for number, each in enumerate(samplings)}
    carried: dict[str, Callable[[Request], Any]] = {
        "prompt": lambda request: request.prompt.pack(),
        "sampling": lambda request: numbers[id(request.sampling)],
    }
    columns = [
        [carried.get(name, attrgetter(name))(request) for request in requests]
        for name in _REQUEST_FIELDS
    ]
    columns.append([[getattr(s, name) for name in _SAMPLING_FIELDS] for s in samplings.values()])
    return _pack(arguments, columns, ("arguments", _COLUMNS))


def unpack_call(message: bytes) -> tuple[tuple[Any, ...], list[Request]]:
    """Inverse of `pack_call`.

    Raises:
        GroupMismatchError: it is of another version.
        ConfigError: it is no such message.
    """

    def read(arguments: Any, columns: Any) -> tuple[tuple[Any, ...], list[Request]]:
        *fields, samplings = columns
        drawn = [
            SamplingParams(**dict(zip(_SAMPLING_FIELDS, each, strict=True))) for each in samplings
        ]
        requests = [
            Request(name, client, TokenIds.unpack(*prompt), drawn[number], *rest)
            for name, client, prompt, number, *rest in zip(*fields, strict=True)
        ]
        return tuple(arguments), requests

    return _unpack(message, read)


def pack_guidance(guidance: Sequence[Guidance]) -> bytes:
    """What a driver says of its guided requests."""
    return _pack((), [tuple(each) for each in guidance], ("arguments", "guidance"))


def unpack_guidance(message: bytes) -> tuple[tuple[Any, ...], list[Guidance]]:
    """Inverse of `pack_guidance`; raises as `unpack_call`."""
    return _unpack(message, lambda _, rows: ((), [Guidance(*each) for each in rows]))


def pack_reply(reply: PollReply) -> bytes:
    """What a poll answers."""
    return _pack((reply.first_seq, reply.epoch), reply.deltas, ("reply", "deltas"))


def unpack_reply(message: bytes) -> PollReply:
    """Inverse of `pack_reply`; raises as `unpack_call`."""

    def read(head: Any, deltas: Any) -> PollReply:
        first_seq, epoch = head
        return PollReply(first_seq, tuple(map(_delta, deltas)), epoch)

    return _unpack(message, read)


def _delta(fields: Any) -> TokenDelta:
    name, token_ids, finish, error, kind, reused, ttft_s, logprobs, *rest = fields
    finish = None if finish is None else _FINISH_REASONS[finish]
    logprobs = tuple(TokenLogprobs(*each) for each in logprobs) if logprobs else ()
    return TokenDelta(name, token_ids, finish, error, kind, reused, ttft_s, logprobs, *rest)


def pack_routing(prompts: Sequence[RoutedPrompt], silent: Mapping[int, float]) -> bytes:
    """Prompts whose replicas are asked for, and the replicas that have been silent, in seconds."""
    rows = [(b"".join(each.keys), each.num_tokens, each.leaves_blocks) for each in prompts]
    return _pack(tuple(silent.items()), rows, ("silent", "prompts"))


def unpack_routing(message: bytes) -> tuple[list[RoutedPrompt], dict[int, float]]:
    """Inverse of `pack_routing`; raises as `unpack_call`."""

    def read(silent: Any, rows: Any) -> tuple[list[RoutedPrompt], dict[int, float]]:
        prompts = []
        for joined, num_tokens, leaves_blocks in rows:
            keys = split_keys(joined)
            check_keys(keys)
            prompts.append(RoutedPrompt(keys, int(num_tokens), bool(leaves_blocks)))
        return prompts, {int(index): float(seconds) for index, seconds in silent}

    return _unpack(message, read)


def pack_load(index: int, node_id: str, load: ReplicaLoad) -> bytes:
    """What a replica reports of itself."""
    return _pack((index, node_id), tuple(load), ("replica", "load"))


def unpack_load(message: bytes) -> tuple[int, str, ReplicaLoad]:
    """Inverse of `pack_load`; raises as `unpack_call`."""

    def read(replica: Any, fields: Any) -> tuple[int, str, ReplicaLoad]:
        index, node_id = replica
        queued_tokens, requests, rows, pool_blocks, epoch = fields
        numbers = int(queued_tokens), int(requests), int(rows), int(pool_blocks)
        return int(index), str(node_id), ReplicaLoad(*numbers, str(epoch))

    return _unpack(message, read)


def pack_value(value: Any) -> bytes:
    """A plain answer."""
    return _pack((), value, ("answer", "answer"))


def unpack_value(message: bytes) -> Any:
    """Inverse of `pack_value`; raises as `unpack_call`."""
    return _unpack(message, lambda _, value: value)


def _pack(head: Any, body: Any, names: tuple[str, Any]) -> bytes:
    try:
        packed: bytes = msgpack.packb((MESSAGE_VERSION, head, body))
        return packed
    except (TypeError, ValueError, OverflowError, UnicodeError, RecursionError) as error:
        raise _refused(head, body, names) from error


def _refused(head: Any, body: Any, names: tuple[str, Any]) -> ConfigError:
    """The error for the first value in a message that msgpack cannot carry."""
    parts = [(names[0], head)]
    parts += zip(names[1], body, strict=True) if isinstance(names[1], tuple) else [(names[1], body)]
    for name, part in parts:
        for value in _leaves(part):
            try:
                msgpack.packb(value)
            except Exception:
                valid = "integers of 64 bits, floats, whole Unicode text or bytes, Python's own"
                # a text may be a prompt's or a salt's: its type tells enough
                shown = value if isinstance(value, int) else Shown(f"<{type(value).__name__}>")
                return ConfigError(name, shown, valid)
    return ConfigError(names[0], None, "values that msgpack can carry")


def _leaves(value: Any) -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _unpack(message: bytes, read: Callable[[Any, Any], T]) -> T:
    try:
        version, *rest = msgpack.unpackb(
            message,
            use_list=False,
            max_array_len=_MOST_ITEMS,
            max_map_len=_MOST_ITEMS,
            max_ext_len=0,
        )
        if version == MESSAGE_VERSION:
            head, body = rest
            return read(head, body)
    except LiteCacheError:
        raise
    except Exception as error:
        # msgpack and the constructors of what is read raise many classes; none passes this door
        kind = type(error).__name__
        raise ConfigError("message", f"{len(message)} bytes", f"a whole message ({kind})") from None
    raise GroupMismatchError(
        "message version",
        version,
        f"{MESSAGE_VERSION}, this side's: use one version of LiteCache on both sides, or run "
        "`litecache down` with the group's and start the group anew with this one",
    )
