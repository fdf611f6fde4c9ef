"""The repository keeps its promises: pins, scripts, layers, example, geometries."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
KV_BYTES_PER_TOKEN_BF16 = {"llama-3.1-8b": 131_072, "qwen3-0.6b": 114_688, "smollm2-135m": 23_040}


def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows() -> None:
    pins = pinned()
    wanted = [Requirement(text) for text in requires("litecache") or []]
    assert len(wanted) > 10
    for requirement in wanted:
        (specifier,) = pins[canonicalize_name(requirement.name)].specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version), requirement


@pytest.mark.parametrize("script", sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]))
def test_scripts_are_valid_bash_and_executable(script: Path) -> None:
    assert run("bash", "-n", str(script)).returncode == 0
    assert os.access(script, os.X_OK) or script.name == "env.sh"  # env.sh is sourced


def test_setup_refuses_an_old_python_by_its_version(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.20" && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = run("bash", "scripts/setup.sh", "cpu", PYTHON=str(old))
    assert result.returncode == 1
    assert "3.10 or newer" in result.stderr
    assert "Python 3.8.20" in result.stderr


def test_setup_refuses_an_unknown_mode() -> None:
    result = run("bash", "scripts/setup.sh", "tpu")
    assert result.returncode == 2
    assert "cpu|gpu" in result.stderr


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("litecache", ("torch", "ray", "transformers", "triton")),
        ("litecache.storage", ("torch", "ray", "transformers", "triton")),
        ("litecache.config", ("torch", "ray", "transformers", "triton")),
        ("litecache.engine.scheduling.scheduler, litecache.kernels", ("ray",)),
    ],
)
def test_importing_a_layer_does_not_load_what_it_must_not_need(
    modules: str, absent: tuple[str, ...]
) -> None:
    code = f"import sys, {modules}; print([m for m in {absent!r} if m in sys.modules])"
    result = run(sys.executable, "-c", code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_every_submodule_of_storage_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, pkgutil, importlib, litecache.storage as s\n"
        "for m in pkgutil.walk_packages(s.__path__, 'litecache.storage.'):\n"
        "    importlib.import_module(m.name)\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'triton') if m in sys.modules])"
    )
    result = run(sys.executable, "-c", code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_library_prints_nothing() -> None:
    for path in (ROOT / "litecache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), path


@pytest.mark.parametrize("name", sorted(KV_BYTES_PER_TOKEN_BF16))
def test_geometries_have_the_kv_size_of_their_namesakes(name: str) -> None:
    config = json.loads((ROOT / "scripts" / "geometries" / f"{name}.json").read_text())
    heads, dim = config["num_key_value_heads"], config["head_dim"]
    assert 2 * 2 * config["num_hidden_layers"] * heads * dim == KV_BYTES_PER_TOKEN_BF16[name]


def test_links_in_the_documentation_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    links = [
        (page, target.split("#")[0])
        for page in pages
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert links
    for page, target in links:
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_scripts_named_in_the_documentation_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\b((?:scripts|examples)/[\w./-]+\.(?:sh|py|txt))", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.slow
def test_the_demo_document_and_questions_have_the_promised_size(smollm2_dir: Path) -> None:
    from transformers import AutoTokenizer

    from examples.shared_prefix import MIN_NEW_TOKENS, QUESTIONS, prompts

    ids, begin, end = prompts(AutoTokenizer.from_pretrained(smollm2_dir))
    assert 1500 <= end - begin <= 1900
    assert len(QUESTIONS) >= 5
    assert MIN_NEW_TOKENS >= 48
    assert len({tuple(i) for i in ids.values()}) == len(QUESTIONS)
    assert len({tuple(i[:end]) for i in ids.values()}) == 1
