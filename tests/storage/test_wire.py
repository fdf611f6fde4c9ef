"""Packed messages: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litecache.errors import ConfigError, StorageError
from litecache.storage import wire
from litecache.storage.protocol import (
    ALL_KEYS,
    PROTOCOL_VERSION,
    CommitItem,
    CommitStatus,
    Retention,
    SlotRef,
    StageResult,
    StageStatus,
)

KEYS = st.binary(min_size=16, max_size=16)
NUMBERS = st.integers(-1, 2**62)
REFS = st.builds(SlotRef, NUMBERS, NUMBERS)


def second(unpack: Callable[[bytes], tuple[int, list[Any]]]) -> Callable[[bytes], list[Any]]:
    """A request without its client."""
    return lambda message: unpack(message)[1]


MESSAGES: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any], Any]] = {
    "keys": (wire.pack_keys, second(wire.unpack_keys), KEYS),
    "slots": (wire.pack_slots, second(wire.unpack_slots), REFS),
    "staged": (
        wire.pack_staged,
        wire.unpack_staged,
        st.builds(StageResult, st.sampled_from(StageStatus), NUMBERS, NUMBERS),
    ),
    "commits": (
        wire.pack_commits,
        second(wire.unpack_commits),
        st.builds(
            CommitItem,
            NUMBERS,
            NUMBERS,
            KEYS,
            KEYS,
            st.text(max_size=9),
            NUMBERS,
            st.sampled_from(Retention),
        ),
    ),
    "statuses": (wire.pack_statuses, wire.unpack_statuses, st.sampled_from(CommitStatus)),
    "flags": (wire.pack_flags, wire.unpack_flags, st.booleans()),
}
SAMPLES: dict[str, Any] = {
    "keys": [b"a" * 16, b"b" * 16],
    "slots": [SlotRef(7, 8)],
    "staged": [StageResult(StageStatus.MISS), StageResult(StageStatus.READY, 3, 4)],
    "commits": [CommitItem(1, 2, b"a" * 16, b"b" * 16, "model", 9, Retention.HIGH)],
    "statuses": [CommitStatus.EXISTS],
    "flags": [True, False],
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_packed_comes_out_again(name: str) -> None:
    pack, unpack, items = MESSAGES[name]

    @given(st.lists(items, max_size=9))
    def round_trip(batch: list[Any]) -> None:
        found = unpack(pack(batch))
        assert found == batch
        assert list(map(type, found)) == list(map(type, batch))

    round_trip()


@pytest.mark.parametrize("name", MESSAGES)
def test_another_version_is_refused(name: str) -> None:
    pack, unpack, _ = MESSAGES[name]
    message = pack(SAMPLES[name])
    _, *rest = msgpack.unpackb(message, use_list=False)
    other = msgpack.packb((PROTOCOL_VERSION + 1, *rest))
    with pytest.raises(StorageError, match=f"slot protocol {PROTOCOL_VERSION + 1} cannot be read"):
        unpack(other)


@pytest.mark.parametrize("name", MESSAGES)
def test_another_kind_or_length_is_refused(name: str) -> None:
    pack, unpack, _ = MESSAGES[name]
    message = pack(SAMPLES[name])
    for other in (message[:-1], message + b"x", message[:3], b"", [b"a" * 16], None):
        with pytest.raises(StorageError):
            unpack(other)  # type: ignore[arg-type]
    for kind, (strange, _, _) in MESSAGES.items():
        if kind != name:
            with pytest.raises(StorageError, match="is no"):
                unpack(strange([]))


@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_a_damaged_message_is_refused_or_read_whole(name: str, data: st.DataObject) -> None:
    pack, unpack, _ = MESSAGES[name]
    message = bytearray(pack(SAMPLES[name]))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = unpack(bytes(message))
    except StorageError:
        return
    assert len(found) == len(SAMPLES[name])
    assert list(map(type, found)) == list(map(type, SAMPLES[name]))


@given(
    st.integers(0, 2**62),
    st.lists(KEYS, max_size=9),
    st.lists(REFS, max_size=9),
    st.integers(0, ALL_KEYS),
)
def test_a_stage_carries_its_client_its_keys_how_many_may_be_read_and_the_leases_that_end(
    client_id: int, keys: list[bytes], released: list[SlotRef], reads: int
) -> None:
    message = wire.pack_stage(client_id, keys, released, reads)
    assert wire.unpack_stage(message) == (client_id, keys, released, reads)
    for other in (message[:-1], message + b"x", message[:5], wire.pack_keys(keys, client_id)):
        with pytest.raises(StorageError):
            wire.unpack_stage(other)
    assert wire.unpack_keys(wire.pack_keys(keys, client_id)) == (client_id, keys)
    assert wire.unpack_slots(wire.pack_slots(released, client_id)) == (client_id, released)
    assert wire.unpack_reserve(wire.pack_reserve(client_id, 4096, 7)) == (client_id, 4096, 7)


def test_a_key_of_another_length_is_refused_before_the_call_leaves() -> None:
    with pytest.raises(ConfigError, match="16 bytes"):
        wire.pack_keys([b"a" * 16, b"short"])
    with pytest.raises(ConfigError, match="16 bytes"):
        wire.pack_commits([CommitItem(1, 2, b"a" * 16, b"short")])


@pytest.mark.parametrize(
    "pack",
    [
        lambda: wire.pack_slots([SlotRef(1, 2**63)]),
        lambda: wire.pack_slots([SlotRef(1, "2")]),  # type: ignore[arg-type]
        lambda: wire.pack_slots([SlotRef(1, 2.0)]),  # type: ignore[arg-type]
        lambda: wire.pack_reserve(1, 2**64, 1),
        lambda: wire.pack_reserve(1, np.int64(4096), 1),  # type: ignore[arg-type]
        lambda: wire.pack_commits([CommitItem(1, 2, b"a" * 16, b"b" * 16, "\udcff")]),
    ],
)
def test_what_cannot_be_carried_is_refused_before_the_call_leaves(
    pack: Callable[[], bytes],
) -> None:
    with pytest.raises(ConfigError, match="integers of 64 bits"):
        pack()
