"""Folders of written models appear whole, and go oldest unused first, never while in use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from litecache import paths
from litecache.cli import app
from litecache.engine.loading.fingerprint import write_kept
from litecache.errors import LiteCacheError
from litecache.paths import (
    find_or_make_model,
    hold_model,
    list_models,
    models_folder,
    prune_models,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LITECACHE_HOME", str(tmp_path))
    return tmp_path


def make(name: str, size: int = 100, *, age_s: int = 0, most_bytes: int | None = None) -> Path:
    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes(size))

    folder, hold = find_or_make_model(name, write, label=f"the {name}", most_bytes=most_bytes)
    hold.release()
    used = os.stat(folder).st_mtime - age_s
    os.utime(folder, (used, used))
    return folder


def names() -> list[str]:
    return [folder.name for folder in models_folder().iterdir()]


def test_the_oldest_unused_go_when_one_is_added_beyond_the_bound() -> None:
    for age_s, name in enumerate("abc"):
        make(name, age_s=100 * (3 - age_s))
    hold = hold_model(models_folder() / "a")  # used now, and still
    make("d", most_bytes=400)
    assert sorted(names()) == ["a", "d"] or sorted(names()) == ["a", "c", "d"]
    assert "b" not in names()
    assert hold is not None
    hold.release()
    assert [model.name for model in prune_models(0)][-1] == "the d"
    assert names() == []


def test_using_one_makes_it_the_newest() -> None:
    first, second = make("first", age_s=500), make("second", age_s=100)
    for _ in (hold_model(first),):
        pass
    assert [model.path for model in list_models()] == [second, first]


def test_a_folder_that_another_process_uses_stays() -> None:
    folder = make("used", age_s=1000)
    code = (
        "import sys; from litecache.paths import hold_model\n"
        "hold = hold_model(sys.argv[1]); print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert prune_models(0) == []
        assert [model.in_use for model in list_models()] == [True]
    finally:
        holder.kill()
        holder.communicate()
    assert [model.path for model in prune_models(0)] == [folder]


def test_a_folder_removed_just_before_it_is_used_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make("m")
    real = paths.fcntl.flock

    def removed_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(paths.fcntl, "flock", real)
        assert prune_models(0)
        real(descriptor, operation)

    monkeypatch.setattr(paths.fcntl, "flock", removed_first)
    assert make("m") == folder
    assert (folder / "weights").exists()


@pytest.mark.parametrize("name", ["open", "flock"])
def test_a_folder_that_cannot_be_held_is_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = make("m")

    def refused(*_: object) -> int:
        raise PermissionError(13, "refused")

    with monkeypatch.context() as context:
        context.setattr(paths.os if name == "open" else paths.fcntl, name, refused)
        found, hold = find_or_make_model("m", lambda _: pytest.fail("made again"), label="m")
        assert found == folder
        assert prune_models(0) == []
    hold.release()


def test_what_a_process_left_unfinished_goes_and_what_is_being_written_stays() -> None:
    left = models_folder() / ".making-left"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    writing, go_on = threading.Event(), threading.Event()

    def write(folder: Path) -> None:
        os.utime(folder, (0, 0))
        writing.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=find_or_make_model, args=("m", write), kwargs={"label": "m"})
    thread.start()
    assert writing.wait(60)
    assert [model.path for model in prune_models(10**9)] == [left]
    go_on.set()
    thread.join(60)
    assert names() == ["m"]


def test_a_folder_that_cannot_be_written_is_told(home: Path) -> None:
    (home / "models").write_text("a file where the folder should be")
    with pytest.raises(LiteCacheError, match="cannot write"):
        make("m")


def test_the_command_lists_models_by_their_names_and_prunes_the_unused() -> None:
    make("aa")
    hold = hold_model(make("bb"))
    listed = CliRunner().invoke(app, ["models"]).output
    assert "the aa: 0.0 MB, last used" in listed
    assert "the bb: 0.0 MB, in use" in listed
    pruned = CliRunner().invoke(app, ["models", "--prune"]).output
    assert "removed 1 of 2 models" in pruned
    assert names() == ["bb"]
    assert hold is not None
    hold.release()


@pytest.mark.parametrize("umask", [0, 0o077])
def test_models_are_their_users_alone_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    home = tmp_path / "above" / "home"
    monkeypatch.setenv("LITECACHE_HOME", str(home))
    before = os.umask(umask)
    try:
        folder = make("a")
        write_kept(home / "fingerprints" / "kept.json", {})
    finally:
        os.umask(before)
    assert folder.parent == home / "models"
    for path in (home.parent, home, *home.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
