"""`litecache timeline`: loads, prefills and saves of a group as events of a trace viewer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from litecache.cli.timeline import _trace_events
from litecache.errors import GroupUnavailableError

LIFE = """
import sys, ray
from transformers import LlamaConfig
from typer.testing import CliRunner
from litecache import CacheConfig, KVCacheAdapter
from litecache.actors.cluster import open_ray
from litecache.cli import app
open_ray("local", _temp_dir=sys.argv[1], num_cpus=2, include_dashboard=False,
         object_store_memory=100 << 20, logging_level="error")
model = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=128)
config = CacheConfig(num_blocks=32, ram_bytes="16MB", device="cpu")
with KVCacheAdapter(model, weights="random", cache_config=config, num_threads=1, group="g") as llm:
    for _ in range(2):
        llm.generate_batch([list(range(3, 63))], max_new_tokens=3)
        llm.clear("gpu")
    words = ["timeline", sys.argv[2], "--group", "g"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    print(done.output)
"""


def test_a_group_that_is_not_there_is_named(ray_local: None) -> None:
    with pytest.raises(GroupUnavailableError, match="no group 'nobody'"):
        _trace_events("nobody")


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False])
def test_a_trace_holds_the_groups_spans_where_ray_profiles(recorded: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="lc-trace-", dir="/tmp") as folder:
        file = Path(folder, "trace.json")
        env = {**os.environ, "LITECACHE_LOADS": "all"}
        env |= {"RAY_PROFILING": "1"} if recorded else {}
        done = subprocess.run(
            [sys.executable, "-c", LIFE, f"{folder}/r", str(file)], env=env, timeout=120,
            capture_output=True, text=True,
        )  # fmt: skip
        if not recorded:
            assert "export RAY_PROFILING=1" in done.stderr
            assert not file.exists()
            return
        assert done.returncode == 0, done.stderr
        events = json.loads(file.read_text())
    own = [event for event in events if event["cat"] == "litecache"]
    assert len(own) < len(events)
    assert {event["name"] for event in own} >= {"load", "prefill", "save"}
    assert {event["pid"] for event in own} == {"litecache g"}
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in own)
    assert any(event["tid"].startswith("gpu:0 ") for event in own)
