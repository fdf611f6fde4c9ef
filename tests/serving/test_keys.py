"""API keys: found in constant time, never told, and each with a salt of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from litecache.cli.serve import _read_config
from litecache.errors import ConfigError
from litecache.serving.keys import ApiKeys
from litecache.serving.settings import (
    ServeSettings,
    check_exposure,
    is_loopback,
    parse_texts,
)

ALICE, BOB = "alice-secret-0123456789", "bob-secret-0123456789"


def keys_of(folder: Path, text: str) -> ApiKeys:
    path = folder / "keys"
    path.touch(mode=0o600)
    path.write_text(text)
    return ApiKeys.read(str(path))


def test_a_key_is_found_by_its_header_alone(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, f"# of the team\n{ALICE} alice\n\n{BOB}\n")
    alice, bob = keys.find(f"Bearer {ALICE}"), keys.find(f"bearer {BOB}")
    assert alice is not None
    assert bob is not None
    assert alice.name == "alice"
    assert BOB not in bob.name
    for wrong in (None, "", "Bearer", "Bearer ", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x"):
        assert keys.find(wrong) is None


def test_salts_of_two_keys_never_meet_whatever_clients_send(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, f"{ALICE} alice\n{BOB} bob\n")
    alice, bob = keys.find(f"Bearer {ALICE}"), keys.find(f"Bearer {BOB}")
    assert alice is not None
    assert bob is not None
    sent = [None, "", "x", alice.salt, bob.salt, f"{alice.salt}:x", f"{bob.salt}:", ":"]
    salts = [{tenant.salt_of(salt) for salt in sent} for tenant in (alice, bob)]
    assert not salts[0] & salts[1]
    assert len(salts[0]) == len(sent) - 1  # None and "" are the same
    assert ALICE not in str(salts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "short\n",
        f"{ALICE}\n{ALICE} again\n",
        f"{ALICE} a\n{BOB} a\n",
        "käse-secret-0123456789\n",
    ],
)
def test_a_file_that_is_wrong_is_refused_without_telling_a_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as told:
        keys_of(tmp_path, text)
    for word in text.split():
        assert len(word) < 10 or word not in str(told.value)


def test_a_file_that_others_may_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys_of(tmp_path, f"{ALICE}\n")
    assert not caplog.records
    (tmp_path / "keys").chmod(0o644)
    ApiKeys.read(str(tmp_path / "keys"))
    assert "chmod 600" in caplog.text


def test_other_machines_are_served_with_keys_or_when_it_is_said_aloud() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost", "[::1]"):
        check_exposure(host, keys=False, no_auth=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="--no-auth"):
            check_exposure(host, keys=False, no_auth=False)
        check_exposure(host, keys=True, no_auth=False)
        check_exposure(host, keys=False, no_auth=True)


def test_settings_are_read_from_texts_and_named_when_wrong() -> None:
    texts = {"model": "m", "servers": "2", "no_auth": "True", "cache.block_size": "32"}
    settings = ServeSettings.of(parse_texts(texts))
    assert (settings.servers, settings.no_auth, settings.cache) == (2, True, {"block_size": 32})
    assert ServeSettings.of(settings.to_dict()) == settings
    for wrong, name in (
        ({"servers": "two"}, "servers"),
        ({"servers": 0}, "servers"),
        ({"modell": "m"}, "modell"),
        ({"cache": {"block": 1}}, "block"),
        ({"cache": {"block_size": 7}}, "block_size"),
        ({"cache": 3}, "cache"),
        ({"group": "a b"}, "group"),
        ({"api_keys": "f", "no_auth": True}, "no_auth"),
    ):
        with pytest.raises(ConfigError, match=name):
            ServeSettings.of(parse_texts({"model": "m", **wrong}))
    with pytest.raises(ConfigError, match="model"):
        ServeSettings.of({})


def test_a_field_of_a_config_file_that_is_unknown_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("model: m\nport: 9000\ncache: {block_size: 32}\n")
    assert _read_config(str(path)) == {"model": "m", "port": 9000, "cache": {"block_size": 32}}
    for text, told in (
        ("model: m\n\nmodell: x\n", "yaml:3: modell='x' .*Did you mean model"),
        ("model: [", "yaml:1: not YAML"),
        ("- model", "yaml:1: not a mapping of fields: host"),
        ("3: 4", "yaml:1: 3 is no text"),
        ("", "yaml:1: an empty file"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=told):
            _read_config(str(path))
