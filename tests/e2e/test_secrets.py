"""What a running group leaves where others may look: no prompt, no salt, no token; private files.

Everything runs under a umask of 0, as careless as a user may be.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_ray import OwnRay, own_ray
from small_tokenizers import small_tokenizer

HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]
PROMPT = "the quokka told the umbrella nothing, and nobody may ever hear of its zeppelin. " * 2
SALT = "xylophone-4711-salt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tiny_config import small_llama
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = small_tokenizer("byte-level")
    config = small_llama(vocab_size=len(tokenizer), eos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_no_prompt_salt_or_token_is_seen_and_all_files_are_private(
    model: Path, tmp_path: Path
) -> None:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    marks = tmp_path / "marks"
    marks.write_text(json.dumps([PROMPT, SALT]))
    runtime, home, storage = (tmp_path / name for name in ("run", "home", "kv"))
    runtime.mkdir(0o700)
    storage.mkdir(0o700)
    env = {
        "LITECACHE_HOME": str(home),
        "XDG_RUNTIME_DIR": str(runtime),
        "OMP_NUM_THREADS": "1",
    }
    ids = small_tokenizer("byte-level")(PROMPT).input_ids
    secrets = {
        "the prompt": PROMPT[4:20].encode(),
        "the end of the prompt": PROMPT[-20:].strip().encode(),
        "the prompt's ids": ", ".join(map(str, ids[2:8])).encode(),
        "the salt": SALT.encode(),
        "the token": token.encode(),
    }
    with own_ray(num_cpus=2, umask=0, **env) as ray:
        script = str(HERE / "marked_group.py")
        said = ray.run(
            *(sys.executable, script, str(model), str(storage), str(marks)),
            cwd=tmp_path,
        )
        assert said.count("Traceback") >= 19, said
        places = dict(everywhere(ray, storage, home, runtime))
        places["what the driver printed"] = said.encode()
        for place, content in places.items():
            for name, secret in secrets.items():
                assert secret not in content, f"{name} stands in {place}"
        assert_private(storage, home, runtime, tmp_path / "prefix.kv")
        assert_private_memory(ray)


def everywhere(ray: OwnRay, *folders: Path) -> Iterator[tuple[str, bytes]]:
    """What others may come across: where it stands, and what stands there."""
    logs = [path for path in ray.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("GpuCache" in path.name or "worker" in path.name for path in logs)
    for path in logs:
        with contextlib.suppress(OSError):
            yield f"the log {path.name}", path.read_bytes()
    deadline = time.monotonic() + 60
    page = b""
    while b"ray_litecache_prompt_tokens" not in page and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(ray.metrics, timeout=5) as answer:
            page = answer.read()
        time.sleep(0.5)
    assert b"ray_litecache_prompt_tokens" in page
    yield "the metrics page", page
    for pid in ray.processes():
        for name in ("cmdline", "comm"):
            with contextlib.suppress(OSError):
                yield f"the {name} of a process", Path(f"/proc/{pid}/{name}").read_bytes()
    names = [str(path) for folder in (*folders, Path("/dev/shm")) for path in folder.rglob("*")]
    yield "a file's name", "\n".join(names).encode()
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                yield f"{path}", path.read_bytes()


def assert_private(*places: Path) -> None:
    found = [path for place in places for path in (place, *place.rglob("*"))]
    kinds = {path.suffix or path.name for path in found}
    assert {".sock", "slab", "log", "superblock", ".kv"} <= kinds, kinds
    for path in found:
        mode = path.lstat().st_mode
        wanted = 0o700 if stat.S_ISDIR(mode) else 0o600
        assert stat.S_IMODE(mode) == wanted, f"{path} has mode {stat.S_IMODE(mode):o}"


def assert_private_memory(ray: OwnRay) -> None:
    arenas = 0
    for pid in ray.processes():
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if "memfd:litecache" in os.readlink(fd):
                    arenas += 1
                    assert stat.S_IMODE(fd.stat().st_mode) == 0o600
    assert arenas
