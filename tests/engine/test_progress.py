from __future__ import annotations

import pytest
from transformers.utils import logging

from litecache.engine.progress import progress_bar


def test_a_bar_is_drawn_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_bar("Preparing steps")
    for done in (1, 2, 3):
        show(done, 3)
    drawn = capsys.readouterr().err
    assert "Preparing steps: 100%" in drawn
    assert "3/3" in drawn


def test_who_silences_transformers_bars_silences_this_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logging.disable_progress_bar()
    try:
        progress_bar("Preparing steps")(1, 1)
    finally:
        logging.enable_progress_bar()
    assert capsys.readouterr().err == ""
