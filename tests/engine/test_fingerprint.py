"""A fingerprint changes with every weight bit and with nothing else, and is cached safely."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from litecache.engine.loading import fingerprint
from litecache.engine.loading.fingerprint import (
    file_digest,
    model_fingerprint,
    module_fingerprint,
    random_fingerprint,
)
from litecache.errors import ConfigError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "_name_or_path": "a",
    "transformers_version": "5",
}
LONG_AGO_S = 1_600_000_000


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LITECACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes were read, in order."""
    real: Callable[[Path, int], str] = fingerprint._hash_file
    calls: list[Path] = []

    def spy(path: Path, size: int) -> str:
        calls.append(path)
        return real(path, size)

    monkeypatch.setattr(fingerprint, "_hash_file", spy)
    return calls


def make_model(folder: Path, weights: bytes = b"w" * 100, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "model-1.safetensors").write_bytes(weights)
    (folder / "model-2.safetensors").write_bytes(b"second shard")
    for path in folder.iterdir():
        os.utime(path, (LONG_AGO_S, LONG_AGO_S))
    return folder


def test_equal_models_in_different_folders_share_a_fingerprint(tmp_path: Path) -> None:
    one = make_model(tmp_path / "one")
    two = make_model(tmp_path / "two", _name_or_path="elsewhere", transformers_version="6")
    assert model_fingerprint(one) == model_fingerprint(two)
    assert len(model_fingerprint(one)) == 32


@pytest.mark.parametrize("position", [0, 50, 99])
def test_one_flipped_weight_bit_changes_the_fingerprint(tmp_path: Path, position: int) -> None:
    flipped = bytearray(b"w" * 100)
    flipped[position] ^= 1
    one = make_model(tmp_path / "one")
    two = make_model(tmp_path / "two", weights=bytes(flipped))
    assert model_fingerprint(one) != model_fingerprint(two)


def test_config_and_model_code_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    plain = model_fingerprint(make_model(tmp_path / "plain"))
    wider = model_fingerprint(make_model(tmp_path / "wider", hidden_size=16))
    coded = make_model(tmp_path / "coded")
    (coded / "modeling_own.py").write_text("x = 1\n")
    assert len({plain, wider, model_fingerprint(coded)}) == 3


def test_unchanged_files_are_read_once(tmp_path: Path, hashed: list[Path]) -> None:
    model = make_model(tmp_path / "m")
    first = model_fingerprint(model)
    assert len(hashed) == 2
    assert model_fingerprint(model) == first
    assert len(hashed) == 2


def test_a_rewrite_of_equal_size_and_mtime_is_noticed(tmp_path: Path, hashed: list[Path]) -> None:
    model = make_model(tmp_path / "m")
    first = model_fingerprint(model)
    make_model(model, weights=b"v" * 100)
    assert model_fingerprint(model) != first


def test_a_file_that_just_changed_is_not_cached(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "fresh.safetensors"
    path.write_bytes(b"x")
    file_digest(path)
    file_digest(path)
    assert len(hashed) == 2


def test_a_damaged_or_unwritable_cache_only_costs_time(tmp_path: Path, home: Path) -> None:
    model = make_model(tmp_path / "m")
    first = model_fingerprint(model)
    for entry in (home / "fingerprints").iterdir():
        entry.write_text("{ not json")
    assert model_fingerprint(model) == first
    for entry in (home / "fingerprints").iterdir():
        entry.unlink()
    (home / "fingerprints").rmdir()
    (home / "fingerprints").write_text("a file where the folder should be")
    assert model_fingerprint(model) == first


def test_a_big_file_is_hashed_in_chunks_to_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "big.safetensors"
    path.write_bytes(os.urandom(10_000))
    whole = file_digest(path)
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 999)
    assert fingerprint._hash_file(path, 10_000) == whole


def test_bad_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        model_fingerprint(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="safetensors"):
        model_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="readable JSON"):
        model_fingerprint(tmp_path)
    with pytest.raises(ConfigError, match="gone"):
        file_digest(tmp_path / "gone")


def test_a_relative_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "m")
    monkeypatch.setenv("LITECACHE_HOME", "relative/home")
    with pytest.raises(ConfigError, match="absolute"):
        model_fingerprint(model)


def test_module_and_random_fingerprints_follow_their_inputs() -> None:
    import torch

    module = torch.nn.Linear(4, 4).to(torch.bfloat16)
    before = module_fingerprint(module, CONFIG)
    assert module_fingerprint(module, {**CONFIG, "_name_or_path": "b"}) == before
    with torch.no_grad():
        module.weight[3, 3] += 1
    assert module_fingerprint(module, CONFIG) != before
    assert random_fingerprint(CONFIG, 0) == random_fingerprint(dict(CONFIG), 0)
    assert random_fingerprint(CONFIG, 0) != random_fingerprint(CONFIG, 1)
