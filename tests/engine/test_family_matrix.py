"""Families answer through an engine as stock transformers does, or are refused; so says a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from litecache.cli import app
from litecache.engine.loading import model_loader
from litecache.engine.loading.families import Trial, notes, read_trials
from litecache.engine.running.gather_cache import GatherCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import family_matrix
from family_matrix import chosen_cases, render, trial
from sweep_families import families

torch.set_num_threads(1)
pytestmark = pytest.mark.no_cover
DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
QUICK = (
    ("gemma2", "known lengths", "paged"),
    pytest.param("gpt_oss", "known lengths", "paged", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", "plain", "paged", marks=pytest.mark.slow),
    ("gptj", "plain", "gathered"),
    pytest.param("llama4_text", "known lengths", "gathered", marks=pytest.mark.slow),
    ("llama", "longrope from 40", "refused"),
    pytest.param("qwen3_next", "plain", "refused", marks=pytest.mark.slow),
)
# Others than test_families.py sweeps; scripts/family_matrix.py tries all.
MANY = (
    "bloom", "codegen", "cohere2", "diffllama", "falcon", "gemma3n_text", "modernbert-decoder",
    "opt", "xglm",
)  # fmt: skip


@pytest.mark.parametrize(("family", "case", "verdict"), QUICK)
def test_a_family_answers_as_stock_however_the_answer_comes_about(family, case, verdict):
    outcome, fault = trial(family, case, chosen_cases(family)[case])
    assert not fault
    assert outcome.verdict == verdict, outcome.detail


@pytest.mark.slow
@pytest.mark.parametrize("family", MANY)
def test_many_families_answer_as_stock_in_all_their_cases(family):
    found = family_matrix.tried(family)
    assert found
    assert not [fault for _, fault, _ in found if fault]
    assert {row.verdict for row, _, _ in found if not row.right_to} <= {"paged", "gathered"}


def test_the_matrix_finds_wrong_logits(monkeypatch):
    """Where something breaks that the gate had found in order."""
    admit, extended = model_loader.admit, GatherCache.extended

    def stale(cache, layer, key, value):
        return extended(cache, layer, key.roll(1, dims=1), value)

    def and_break(*args):
        admitted = admit(*args)
        monkeypatch.setattr(GatherCache, "extended", stale)
        return admitted

    monkeypatch.setattr(model_loader, "admit", and_break)
    _, fault = trial("gptj", "plain", chosen_cases("gptj")["plain"])
    assert fault.startswith("WRONG")
    assert "cold" in fault


def test_the_docs_say_what_the_table_says():
    assert DOCS.read_text(encoding="utf-8") == render(read_trials())


def test_the_table_has_every_decoder_family_and_enough_that_run():
    trials = read_trials()
    if trials.transformers == transformers.__version__:
        assert {family for family, _ in trials.by_family()} == set(families())
    running = [row for row in trials.rows if row.verdict in ("paged", "gathered")]
    assert len(running) >= 75
    assert all(float(row.detail) < 2e-4 for row in running)
    assert not [row for row in trials.rows if row.verdict == "failed"]


def test_a_family_is_told_in_a_line():
    rows = [Trial("a", "plain", "paged", "1e-6"), Trial("a", "w 8", "paged", "1e-6")]
    assert notes([*rows, Trial("a", "long", "refused", "too", 40)]) == (
        "also w 8; long: up to that length"
    )
    assert notes([Trial("b", "plain", "refused", "recurrent")]) == "recurrent"


def test_models_families_prints_the_table():
    trials = read_trials()
    told = CliRunner().invoke(app, ["models", "--families"]).output
    assert told.splitlines()[0].split()[:2] == [trials.rows[0].family, trials.rows[0].verdict]
    assert len(told.splitlines()) == len({row.family for row in trials.rows})
    found = json.loads(CliRunner().invoke(app, ["models", "--families", "--json"]).output)
    assert found["transformers"] == trials.transformers
    assert [Trial(**row) for row in found["trials"]] == list(trials.rows)
