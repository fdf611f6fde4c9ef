"""docs/generate.md says what the tests hold, and names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from features import FEATURES
from generate_doc import DOC, OTHERS, rendered
from hf_tests import APART, FEATURE, HF_TESTS

HERE = Path(__file__).parent
SOURCES = "\n".join(path.read_text() for path in sorted(HERE.glob("*.py")))
TESTS = set(re.findall(r"^def (test_\w+)\(", SOURCES, re.MULTILINE))


def test_the_document_is_what_the_tests_say() -> None:
    assert DOC.read_text() == rendered(), "run python tests/driver_loop/generate_doc.py"


def test_at_least_sixty_features_change_what_stock_gives() -> None:
    assert sum(bool(feature.changes) for feature in FEATURES.values()) >= 60


@pytest.mark.parametrize("group", HF_TESTS)
def test_every_test_of_transformers_is_held_refused_or_apart_for_a_reason(group: str) -> None:
    for name, (verdict, by, why) in HF_TESTS[group].items():
        test, _, case = by.removesuffix("]").partition("[")
        assert why or verdict == "passes", name
        assert (test in TESTS) == (verdict != APART), name
        assert case in FEATURES if test == FEATURE else f'"{case}"' in SOURCES or not case, name


def test_tests_of_their_own_exist() -> None:
    assert {test for _, test in OTHERS.values()} <= TESTS
