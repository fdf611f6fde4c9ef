"""The examples run, as their docstrings say, and print what they promise.

They run in this process as `python examples/NAME.py` would run them, and join one group
of actors with SmolLM2; the ported program starts its own, as such a program does.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from litecache import CacheConfig, KVCacheAdapter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GROUP = "examples"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def group(ray_local: None, smollm2_dir: Path) -> Iterator[KVCacheAdapter]:
    config = CacheConfig(num_blocks=320, device="cpu", dtype="float32", ram_bytes="64MB")
    with KVCacheAdapter(
        str(smollm2_dir), cache_config=config, group=GROUP, num_threads=1
    ) as started:
        yield started


@pytest.fixture
def run(
    group: KVCacheAdapter,
    smollm2_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs an example, joined to the group unless told otherwise; gives what it prints."""

    def run_example(name: str, *args: str, join: bool = True) -> str:
        joined = ["--group", GROUP] if join else []
        monkeypatch.setattr(sys, "argv", [name, "--model", str(smollm2_dir), *joined, *args])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_basic(run: Run) -> None:
    lines = run("basic.py").splitlines()
    reused = [int(found[1]) for found in map(re.compile(r"  (\d+) of").match, lines) if found]
    assert len(reused) == 2
    assert reused[1] >= 40  # the introduction
    batch, lists = (eval(line) for line in lines if line.startswith("["))
    for prompt, text, answer in zip(
        ["Water is", "The colours of the rainbow are"], batch, lists, strict=True
    ):
        assert text == prompt + answer
    assert lines[-1].startswith("hit rate")


def test_shared_document(run: Run) -> None:
    out = run("shared_document.py", "--chars", "1200")
    computed = int(re.search(r"(\d+) tokens computed", out)[1])  # type: ignore[index]
    reused = int(re.search(r"(\d+) tokens reused", out)[1])  # type: ignore[index]
    assert computed > 200
    assert reused >= 0.9 * computed
    assert "2 more questions at once" in out
    assert len(re.findall(r"^[A-Z].*\? .+", out, re.MULTILINE)) == 3


def test_chat(run: Run) -> None:
    out = run("chat.py")
    assert re.search(r"answer: ['\"].+['\"] \((stop|length)\)", out)
    assert len(re.findall(r"^of a batch: ['\"].+", out, re.MULTILINE)) == 3
    turns = [tuple(map(int, turn)) for turn in re.findall(r"(\d+) of (\d+) prompt tokens", out)]
    assert len(turns) == 3
    for (_, before), (reused, _) in itertools.pairwise(turns):
        assert reused > before  # the last prompt, and most of its answer
    assert "7 messages in the session" in out


def test_beams(run: Run) -> None:
    lines = run("beams.py").splitlines()
    loops = [found for line in lines for found in re.findall(r", (engine|driver) loop", line)]
    assert loops == ["engine", "driver", "driver", "driver", "engine"]
    scores = [float(score) for score in re.findall(r"score (-\d+\.\d+)", "\n".join(lines))]
    assert len(scores) == 3
    assert scores[0] >= scores[1]  # of one call, best first
    # sequences_scores is the sum over the length: the model's own log-probabilities agree
    assert float(lines[-1].split()[-1]) == pytest.approx(scores[0], abs=2e-3)


def test_constrained_json(run: Run) -> None:
    out = run("constrained_json.py")
    record = json.loads(re.search(r"record: (.*)", out)[1])  # type: ignore[index]
    assert record.keys() == {"name", "age", "likes"}
    assert isinstance(record["age"], int)
    assert re.search(r"fruit: (apple|pear|plum|cherry)$", out, re.MULTILINE)


def test_streaming(run: Run, group: KVCacheAdapter) -> None:
    out = run("streaming.py")
    ids = group.tokenizer("Once upon a time", return_tensors="pt")
    whole = group.generate(**ids, max_new_tokens=24, do_sample=False)[0]
    assert f"iterator: {group.tokenizer.decode(whole, skip_special_tokens=True)}\n" in out
    assert "streamer: The ship sailed" in out
    assert len(re.findall(r"^at once: ", out, re.MULTILINE)) == 3


def test_a_program_for_transformers_prints_the_same_with_one_line_changed(run: Run) -> None:
    before, after = (
        (EXAMPLES / name).read_text().splitlines() for name in ("program.py", "program_ported.py")
    )
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert [line[0] for line in changed] == ["-", "+"]
    stock = run("program.py", join=False)
    assert len(stock.splitlines()) == 6
    assert run("program_ported.py", join=False) == stock


def test_text_pipeline(run: Run) -> None:
    out = run("text_pipeline.py")
    assert "text: The harbour was" in out
    assert re.search(r"chat: \w+", out)
    assert len(re.findall(r"^batch: ", out, re.MULTILINE)) == 3


def test_evaluate(run: Run) -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "litecache[eval]"')
    scores = dict(line.rsplit(" ", 1) for line in run("evaluate.py").splitlines() if line)
    assert {"facts acc", "sentences word_perplexity", "answers exact_match"} <= scores.keys()
    assert float(scores["facts acc"]) >= 0.5  # of three choices
    assert 1 < float(scores["sentences word_perplexity"]) < 1e5


def test_against_hf(run: Run) -> None:
    out = run("against_hf.py", "--questions", "2", "--new-tokens", "4", "--chars", "600")
    assert out.splitlines()[-1] == "same tokens"
    rates = [float(rate) for rate in re.findall(r"([\d.]+) new tokens/s", out)]
    assert len(rates) == 3
    assert min(rates) > 0
