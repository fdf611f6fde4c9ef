"""docs/architecture.md tells the way of a prompt and of a block by names that are in the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_NAME = re.compile(r"`([\w/]+\.py):([\w.]+)`")


@cache
def definitions(path: Path) -> frozenset[str]:
    """Classes, functions and methods of a file, by their qualified names."""
    found: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return frozenset(found)


def steps(title: str) -> list[str]:
    """The numbered steps of a section."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section is not None, f"there is no section {title!r}"
    return re.split(r"^\d+\. ", section[1], flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("title", ["The way of a prompt", "The way of a block"])
def test_each_of_at_most_twelve_steps_names_functions_that_exist(title: str) -> None:
    told = steps(title)
    assert 5 <= len(told) <= 12
    for number, step in enumerate(told, 1):
        names = _NAME.findall(step)
        assert names, f"step {number} names no function"
        for file, name in names:
            path = ROOT / "litecache" / file
            assert path.is_file(), f"step {number}: there is no litecache/{file}"
            assert name in definitions(path), f"step {number}: {file} has no {name}"
