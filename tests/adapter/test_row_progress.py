"""`progress` draws to a terminal's stderr, elsewhere only when asked twice, and nothing without."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litecache.adapter import KVCacheAdapter
from litecache.adapter.pending import PendingRequest
from litecache.adapter.row_progress import check_progress, progress_of, show_progress
from litecache.errors import ConfigError
from litecache.types import FinishReason, Request, SamplingParams, TokenDelta


def pending(max_new_tokens: int = 8) -> PendingRequest:
    return PendingRequest(Request("r", "c", (1, 2), SamplingParams(max_new_tokens)))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def drawn_on_a_terminal(body: Callable[[], None]) -> str:
    """What is written to stderr while that is a terminal."""
    theirs, ours = os.openpty()
    drawn = b""
    with pytest.MonkeyPatch.context() as patch, os.fdopen(ours, "w") as stderr:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        patch.setattr(sys, "stderr", stderr)
        body()
    # a terminal hands out what was written piece by piece, and an error once nobody writes any more
    with contextlib.suppress(OSError):
        while part := os.read(theirs, 1 << 16):
            drawn += part
    os.close(theirs)
    return drawn.decode()


def test_a_rows_unneeded_tokens_count_as_done_once_it_has_ended() -> None:
    rows = [pending(10), pending(30)]
    progress = progress_of(rows)
    rows[0].feed(TokenDelta("r.0", (4, 5)))
    assert progress()[:2] == (2, 40)
    rows[0].feed(TokenDelta("r.0", (6,), FinishReason.STOP))
    rows[1].feed(TokenDelta("r.0", (7,)))
    assert progress()[:2] == (11, 40)
    assert progress().words.startswith("1/2 rows, 4 tokens, ")


def test_a_terminal_shows_the_bar_and_its_end_when_asked_to(
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = [pending()]

    def generate(shown: bool = True) -> None:
        with show_progress(shown, "Generating", progress_of(rows)):
            sys.stdout.write("a streamer's text")
            rows[0].feed(TokenDelta("r.0", (4, 5, 6), FinishReason.STOP))

    drawn = drawn_on_a_terminal(generate)
    assert "Generating" in drawn
    assert "0/1 rows, 0 tokens" in drawn
    assert "1/1 rows, 3 tokens" in drawn
    assert capfd.readouterr().out == "a streamer's text"
    assert drawn_on_a_terminal(lambda: generate(False)) == ""


def test_a_file_gets_nothing_or_when_asked_the_last_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for shown in (False, True, "always"):
        path, rows = tmp_path / str(shown), [pending()]
        with path.open("w") as file:
            monkeypatch.setattr(sys, "stderr", file)
            with show_progress(shown, "Generating", progress_of(rows)):
                rows[0].feed(TokenDelta("r.0", (4,), FinishReason.STOP))
        written = path.read_text()
        assert (written.count("1/1 rows"), written.count("0/1")) == (int(shown == "always"), 0)
        assert bool(written) == (shown == "always")


@pytest.mark.parametrize("value", [None, 1, "yes", "ALWAYS", ["always"]])
def test_another_value_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r'progress=.*True, False or "always"'):
        check_progress(value)


def test_calls_draw_a_bar_only_when_they_are_asked_to(
    llm: KVCacheAdapter, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    same_length = torch.tensor([[5, 6], [8, 9]])
    settings: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": 210}

    def drawn(progress: bool | str) -> str:
        told = []
        for call in (
            lambda: llm.generate_batch(prompts, progress=progress, **settings),
            lambda: llm.warm(prompts, progress=progress),
            lambda: llm.generate(same_length, pad_token_id=0, progress=progress, **settings),
        ):
            call()
            out, err = capfd.readouterr()
            assert out == ""
            told.append(err)
        return "".join(told)

    assert drawn(False) == ""
    assert drawn(True) == ""
    told = drawn("always")
    assert told.count("2/2 rows, 8 tokens") == 2
    assert told.count("2/2 prompts") == 1
    for call in (llm.generate_batch, llm.warm):
        with pytest.raises(ConfigError, match="progress='no'"):
            call(prompts, progress="no")
