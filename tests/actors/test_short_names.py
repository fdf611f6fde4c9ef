"""What the Ray dashboard and labels call actors and models: short, and what people call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from litecache.actors.naming import replica_name, role_of, shard_name
from litecache.engine.loading.model_source import ModelSource
from litecache.paths import find_or_make_model


def test_a_model_is_called_by_its_hub_name_its_file_or_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITECACHE_HOME", str(tmp_path / "home"))
    made, hold = find_or_make_model("ab" * 16, lambda folder: None, label="SmolLM2-Q8_0.gguf")
    hold.release()
    names = [
        (ModelSource("HuggingFaceTB/SmolLM2-135M"), "HuggingFaceTB/SmolLM2-135M"),
        (ModelSource(str(tmp_path / "my-model")), "my-model"),
        (ModelSource(str(made)), "SmolLM2-Q8_0.gguf"),
        (ModelSource(str(made), label="other.gguf"), "other.gguf"),
        (ModelSource(str(tmp_path), label=f"{tmp_path}/trained"), "trained"),
    ]
    for source, name in names:
        assert source.short_name == name
    assert len(ModelSource(f"/models/{'long' * 50}").short_name) <= 64


def test_an_actor_is_labelled_by_what_it_is_in_its_group() -> None:
    assert role_of(replica_name("default", 3)) == "gpu:3"
    assert role_of(shard_name("default", "0123456789abcdef", 1)) == "shard:01234567:1"
