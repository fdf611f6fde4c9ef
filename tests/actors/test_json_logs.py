"""`LITECACHE_LOG_FORMAT`: what actors log is a JSON line each, and another value is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from litecache.actors.cluster import _log_options
from litecache.errors import ConfigError

LIFE = """
import sys, ray
from transformers import LlamaConfig
from litecache import CacheConfig, KVCacheAdapter
from litecache.actors.cluster import open_ray
open_ray("local", _temp_dir=sys.argv[1], num_cpus=2, include_dashboard=False,
         object_store_memory=100 << 20)
model = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=128)
config = CacheConfig(num_blocks=32, ram_bytes="16MB", device="cpu")
with KVCacheAdapter(model, weights="random", cache_config=config, num_threads=1) as llm:
    llm.generate_batch([[41, 42, 43, 44]], max_new_tokens=3)
"""


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITECACHE_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match=r'LITECACHE_LOG_FORMAT.*"json" or "text"'):
        _log_options()
    monkeypatch.setenv("LITECACHE_LOG_FORMAT", "text")
    assert _log_options() == {}


@pytest.mark.slow
def test_actors_log_json_lines_with_ids_of_request_and_actor() -> None:
    with tempfile.TemporaryDirectory(prefix="lc-logs-", dir="/tmp") as folder:
        env = {**os.environ, "LITECACHE_LOG_FORMAT": "json"}
        subprocess.run(
            [sys.executable, "-c", LIFE, f"{folder}/r"], env=env, check=True, timeout=120,
            capture_output=True,
        )  # fmt: skip
        logs = Path(folder, "r", "session_latest", "logs").glob("worker-*.err")
        lines = [line for log in logs for line in log.read_text().splitlines()]
    told = [json.loads(line) for line in lines if '"request_id"' in line]
    first = next(line for line in told if "ttft_s" in line)
    last = next(line for line in told if "outcome" in line)
    assert first["request_id"] == last["request_id"]
    assert last["outcome"] == "length"
    for line in (first, last):
        assert line["levelname"] == "INFO"
        assert line["name"] == "litecache.engine.engine"
        assert line["actor_name"].endswith(":gpu:0")
        assert "41, 42" not in json.dumps(line)
