"""Two Ray jobs and a notebook share one detached group, from a fresh clone, as the README says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from own_ray import OwnRay, own_ray

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
QUESTIONS = ("The keeper of the mill", "The wheel of the mill")

NOTEBOOK = """
import ray, sys, os
from litecache import KVCacheAdapter
ray.init("auto", log_to_driver=False)
llm = KVCacheAdapter(sys.argv[1], group="jobs")
for again in range(2):
    for question in {questions!r}:
        ids = llm.tokenizer({introduction!r} + question, return_tensors="pt")
        out = llm.generate(**ids, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
        print(question + llm.tokenizer.decode(out.sequences[0, ids.input_ids.shape[1]:]))
        missing = ids.input_ids.shape[1] - sum(out.litecache.reused_tokens[0].values())
        print(missing, "were computed,", again)
    # Those who started it have ended: what they uploaded may be gone, and it must come back.
    (gpu,) = [name for name in llm.group.actors if ":gpu:" in name]
    if not again:
        os.kill(llm.group.status()[gpu]["pid"], 9)
"""


def introduction() -> str:
    text = (ROOT / "examples/job.py").read_text()
    (found,) = re.findall(r"INTRODUCTION = \((.*?)\n\)", text, re.DOTALL)
    return str(eval(f"({found})"))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with what a user has in it by then: a .venv and caches far over Ray's limit."""
    folder = tmp_path / "clone"
    clone = ["git", "clone", "-q", "--depth=1", f"file://{ROOT}", str(folder)]
    if subprocess.run(clone, check=False, capture_output=True).returncode:
        pytest.skip("the tests do not run in a clone")
    for name in ("examples/job.py", ".rayignore"):  # as they are, committed or not
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for big in (".venv/lib/weights.so", ".git/pack", ".mypy_cache/x", "litecache.egg-info/x"):
        file = folder / big
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            out.truncate(5 << 30)
    return folder


def finish(ray: OwnRay, job: subprocess.Popen[str]) -> str:
    out, _ = job.communicate(timeout=400)
    assert job.returncode == 0, out
    return out


def stock_answers(model: Path, texts: list[str]) -> list[str]:
    """What transformers itself says."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")
        out = llm.generate(**ids, max_new_tokens=16, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids.input_ids.shape[1] :]))
    return answers


def test_jobs_a_notebook_tasks_and_actors_share_detached_groups(
    smollm2_dir: Path, clone: Path
) -> None:
    intro = introduction()
    expected = [
        question + answer
        for question, answer in zip(
            QUESTIONS, stock_answers(smollm2_dir, [intro + q for q in QUESTIONS]), strict=True
        )
    ]
    home = {"LITECACHE_HOME": str(smollm2_dir.parents[1]), "OMP_NUM_THREADS": "1"}
    with own_ray(num_cpus=2, **home) as ray:
        command = ("python", "examples/job.py", "--model", str(smollm2_dir))
        # both come to an empty cluster: one of them starts the group
        jobs = [
            ray.start_job(*command, "--question", question, working_dir=clone)
            for question in QUESTIONS
        ]
        first = [finish(ray, job) for job in jobs]
        for out, answer in zip(first, expected, strict=True):
            assert answer in out
        notebook = NOTEBOOK.format(questions=QUESTIONS, introduction=intro)
        lines = ray.run(sys.executable, "-c", notebook, str(smollm2_dir), cwd=clone).splitlines()
        assert [line for line in lines if line in expected] == 2 * expected
        computed = [int(line.split()[0]) for line in lines if line.endswith("were computed, 0")]
        assert computed == [1, 1]  # all but the last token was found
        litecache = str(Path(sys.executable).parent / "litecache")
        assert "stopped" in ray.run(litecache, "down", "--group", "jobs", cwd=clone)
        deadline = time.monotonic() + 60
        while any("GpuCache" in title for title in map(title_of, ray.processes())):
            assert time.monotonic() < deadline, "an actor outlives its group"
            time.sleep(0.1)

        inside = [sys.executable, str(Path(__file__).with_name("inside_actors.py"))]
        text = ray.run(*inside, str(tiny_llama(clone.parent / "tiny")), cwd=clone.parent)
        found = json.loads(text.splitlines()[-1])
    answers = [*found["tasks"], found["placed"], *found["actors"], found["driver"]]
    assert len({tuple(tokens) for tokens, _ in answers}) == 1
    assert [reused for _, reused in found["tasks"]] == [0, 0]  # each has a group of its own
    assert [reused for _, reused in found["actors"]] == [96] * 2  # its whole blocks


def tiny_llama(folder: Path) -> Path:
    """A random model; seeded, so that all groups have the same."""
    import torch
    from tiny_config import small_llama
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(small_llama(eos_token_id=210)).save_pretrained(folder)
    return folder


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
