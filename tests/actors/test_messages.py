"""Messages between driver and replica: what goes in comes out, what cannot is refused by name."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import pickle
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import litecache
from litecache.actors import messages
from litecache.actors.messages import (
    pack_call,
    pack_guidance,
    pack_load,
    pack_reply,
    pack_routing,
    pack_value,
    unpack_call,
    unpack_guidance,
    unpack_load,
    unpack_reply,
    unpack_routing,
    unpack_value,
)
from litecache.actors.router import ReplicaLoad, RoutedPrompt
from litecache.errors import ConfigError, GroupMismatchError, LiteCacheError
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

INT = st.integers(-(2**63), 2**63 - 1)
IDS = st.lists(st.integers(0, 2**40), max_size=6).map(tuple)
FLOAT = st.floats(allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SAMPLING = st.builds(
    SamplingParams,
    max_new_tokens=INT,
    temperature=FLOAT,
    seed=INT,
    eos_token_ids=IDS,
    logprobs=st.none() | INT,
    sequence_bias=st.lists(st.tuples(IDS, FLOAT), max_size=2).map(tuple),
    bad_words_ids=st.lists(IDS, max_size=2).map(tuple),
)
REQUEST = st.builds(
    Request,
    TEXT,
    TEXT,
    st.lists(INT, max_size=9),
    SAMPLING,
    INT,
    cache_salt=TEXT,
    cache=TEXT,
    expires_s=INT,
    retention=TEXT,
    priority=INT,
    max_time_s=st.none() | FLOAT,
    mask=st.none() | st.binary(max_size=9),
)
GUIDANCE = st.builds(Guidance, TEXT, INT, IDS, st.binary(max_size=9))
LOGPROBS = st.builds(TokenLogprobs, FLOAT, st.lists(st.tuples(INT, FLOAT), max_size=2).map(tuple))
DELTA = st.builds(
    TokenDelta,
    TEXT,
    IDS,
    st.none() | st.sampled_from(FinishReason),
    st.none() | TEXT,
    st.none() | TEXT,
    st.none() | st.dictionaries(TEXT, INT, max_size=3),
    st.none() | FLOAT,
    st.lists(LOGPROBS, max_size=2).map(tuple),
    found_tokens=st.none() | st.dictionaries(TEXT, INT, max_size=3),
    awaits_guidance=st.booleans(),
)
UNPACK = (unpack_call, unpack_guidance, unpack_reply, unpack_value, unpack_routing, unpack_load)
ARGUMENTS = st.lists(st.none() | INT | FLOAT | TEXT, max_size=4).map(tuple)


@given(ARGUMENTS, st.lists(REQUEST, max_size=4))
def test_a_call_comes_out_as_it_went_in(arguments: Any, requests: list[Request]) -> None:
    if requests:
        requests.append(Request("same", "c", [1], requests[0].sampling))
    got_arguments, got = unpack_call(pack_call(*arguments, requests=requests))
    assert (got_arguments, got) == (arguments, requests)
    assert [repr(each) for each in got] == [repr(each) for each in requests]


@given(st.lists(GUIDANCE, max_size=4))
def test_guidance_comes_out_as_it_went_in(guidance: list[Guidance]) -> None:
    got_arguments, got = unpack_guidance(pack_guidance(guidance))
    assert (got_arguments, got) == ((), guidance)
    assert all(type(each) is Guidance for each in got)


@given(st.builds(PollReply, INT, st.lists(DELTA, max_size=4).map(tuple), TEXT))
def test_a_reply_comes_out_as_it_went_in(reply: PollReply) -> None:
    got = unpack_reply(pack_reply(reply))
    assert got == reply
    assert repr(got) == repr(reply)
    assert all(type(delta) is TokenDelta for delta in got.deltas)


COUNT = st.integers(0, 2**40)
LOAD = st.builds(ReplicaLoad, COUNT, COUNT, COUNT, COUNT, TEXT)
ROUTED = st.builds(
    RoutedPrompt, st.lists(st.binary(min_size=16, max_size=16), max_size=4), COUNT, st.booleans()
)


@given(COUNT, TEXT, LOAD)
def test_a_replicas_report_comes_out_as_it_went_in(
    index: int, node: str, load: ReplicaLoad
) -> None:
    assert unpack_load(pack_load(index, node, load)) == (index, node, load)


@given(st.lists(ROUTED, max_size=4), st.dictionaries(COUNT, FLOAT, max_size=3))
def test_a_question_for_replicas_comes_out_as_it_went_in(
    prompts: list[RoutedPrompt], silent: dict[int, float]
) -> None:
    assert unpack_routing(pack_routing(prompts, silent)) == (prompts, silent)


def request(**changes: Any) -> Request:
    fields = {"request_id": "r", "client_id": "c", "prompt": [1, 2], **changes}
    return Request(**{"sampling": SamplingParams(max_new_tokens=1), **fields})


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("cache_salt", {"cache_salt": "secret\udcff"}),
        ("cache", {"cache": "\udcff"}),
        ("request_id", {"request_id": "\ud800"}),
        ("priority", {"priority": 2**64}),
        ("priority", {"priority": np.int64(3)}),
        ("max_time_s", {"max_time_s": 1j}),
        ("sampling", {"sampling": SamplingParams(max_new_tokens=1, seed=-(2**63) - 1)}),
        ("sampling", {"sampling": SamplingParams(max_new_tokens=np.int32(1))}),
        ("num_resumed_tokens", {"num_resumed_tokens": {1}}),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=f"^{field}=.* is invalid: integers of 64 bits"
    ) as refused:
        pack_call("c", requests=[request(), request(**changes)])
    assert "secret" not in str(refused.value)


def test_an_argument_that_cannot_be_carried_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^arguments=18446744073709551616 is invalid"):
        pack_call("c", 2**64)
    with pytest.raises(ConfigError, match=r"^deltas=<str> is invalid"):
        pack_reply(PollReply(1, (TokenDelta("r", (1,), None, "\udcff"),)))


def test_a_message_of_another_version_is_refused_with_both() -> None:
    message = msgpack.packb((MESSAGE_VERSION - 1, (), ()))
    for unpack in UNPACK:
        with pytest.raises(
            GroupMismatchError, match=f"={MESSAGE_VERSION - 1} .*{MESSAGE_VERSION}, "
        ):
            unpack(message)


@given(st.data())
def test_damage_is_refused_and_never_run(data: st.DataObject) -> None:
    good = [
        pack_call("c", "e", 1, 2.0, requests=[request(), request(prompt=[])]),
        pack_reply(PollReply(1, (TokenDelta("r", (1,), FinishReason.STOP, logprobs=()),), "e")),
        pack_value("epoch"),
        pack_routing([RoutedPrompt([bytes(16)], 20)], {0: 1.5}),
        pack_load(1, "node", ReplicaLoad(3, 2, 1, 4, "e")),
    ]
    message = bytearray(data.draw(st.sampled_from(good)))
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(message[: data.draw(st.integers(0, len(message)))])
    for unpack in UNPACK:
        with contextlib.suppress(LiteCacheError):
            unpack(cut)


def test_a_pickle_is_no_message() -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("its code was run",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(LiteCacheError):
            unpack_call(pickle.dumps(Hostile(), protocol))


def test_nothing_of_the_product_reads_a_pickle() -> None:
    for path in Path(litecache.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            names.append(getattr(node, "module", None) or "")
            assert not {"pickle", "cloudpickle", "marshal", "shelve"} & set(names), path


@pytest.mark.parametrize("arguments", [(), ("c", "more"), ("c", "", 0)])
def test_a_call_with_other_arguments_than_its_methods_is_refused(arguments: tuple) -> None:
    async def submit(client_id: str, requests: object) -> str:
        return client_id

    answer = messages.answering(messages.ReplicaMethod.SUBMIT, submit)
    with pytest.raises(ConfigError, match=rf"message=.*{len(arguments)} arguments.*of submit"):
        asyncio.run(answer(messages.pack_call(*arguments)))
    said = asyncio.run(answer(messages.pack_call("c")))
    assert messages.unpack_value(said) == "c"
