"""Packed messages: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litecache.errors import ConfigError, StorageError
from litecache.storage import wire
from litecache.storage.protocol import (
    PROTOCOL_VERSION,
    CommitItem,
    CommitStatus,
    SlotRef,
    StageResult,
    StageStatus,
)

KEYS = st.binary(min_size=16, max_size=16)
NUMBERS = st.integers(-1, 2**62)
REFS = st.builds(SlotRef, NUMBERS, NUMBERS)
MESSAGES: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any], Any]] = {
    "keys": (wire.pack_keys, wire.unpack_keys, KEYS),
    "slots": (wire.pack_slots, wire.unpack_slots, REFS),
    "staged": (
        wire.pack_staged,
        wire.unpack_staged,
        st.builds(StageResult, st.sampled_from(StageStatus), NUMBERS, NUMBERS),
    ),
    "commits": (
        wire.pack_commits,
        wire.unpack_commits,
        st.builds(CommitItem, NUMBERS, NUMBERS, KEYS, KEYS, st.text(max_size=9)),
    ),
    "statuses": (wire.pack_statuses, wire.unpack_statuses, st.sampled_from(CommitStatus)),
    "flags": (wire.pack_flags, wire.unpack_flags, st.booleans()),
}
SAMPLES: dict[str, Any] = {
    "keys": [b"a" * 16, b"b" * 16],
    "slots": [SlotRef(7, 8)],
    "staged": [StageResult(StageStatus.MISS), StageResult(StageStatus.READY, 3, 4)],
    "commits": [CommitItem(1, 2, b"a" * 16, b"b" * 16, "model")],
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
    other = struct.pack("<H", PROTOCOL_VERSION + 1) + message[2:]
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


@given(st.integers(0, 2**62), st.lists(KEYS, max_size=9), st.lists(REFS, max_size=9))
def test_a_stage_carries_its_client_its_keys_and_the_leases_that_end(
    client_id: int, keys: list[bytes], released: list[SlotRef]
) -> None:
    message = wire.pack_stage(client_id, keys, released)
    assert wire.unpack_stage(message) == (keys, released)
    assert wire.client_of(message) == client_id
    for other in (message[:-1], message + b"x", message[:5], wire.pack_keys(keys, client_id)):
        with pytest.raises(StorageError):
            wire.unpack_stage(other)
    for request in (wire.pack_keys(keys, client_id), wire.pack_slots(released, client_id)):
        assert wire.client_of(request) == client_id


def test_a_key_of_another_length_is_refused_before_the_call_leaves() -> None:
    with pytest.raises(ConfigError, match="16 bytes"):
        wire.pack_keys([b"a" * 16, b"short"])
    with pytest.raises(ConfigError, match="16 bytes"):
        wire.pack_commits([CommitItem(1, 2, b"a" * 16, b"short")])
