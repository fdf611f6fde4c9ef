"""What a group records of its work where that is asked for: a trace viewer's events, JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from litecache.actors.cluster import _log_options
from litecache.cli.watch import _trace_events
from litecache.errors import ConfigError, GroupUnavailableError

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
        llm.generate_batch([[41, 42, 43, 44, *range(3, 59)]], max_new_tokens=3)
        llm.clear("gpu")
    words = ["timeline", sys.argv[2], "--group", "g"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    print(done.output)
"""


def test_a_group_that_is_not_there_is_named(ray_local: None) -> None:
    with pytest.raises(GroupUnavailableError, match="no group 'nobody'"):
        _trace_events("nobody")


def test_another_log_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITECACHE_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match=r'LITECACHE_LOG_FORMAT.*"json" or "text"'):
        _log_options()
    monkeypatch.setenv("LITECACHE_LOG_FORMAT", "text")
    assert _log_options() == {}


@pytest.fixture(scope="module")
def recorded() -> tuple[list[dict[str, Any]], list[str]]:
    """The events of a trace, and the lines that workers logged."""
    with tempfile.TemporaryDirectory(prefix="lc-trace-", dir="/tmp") as folder:
        file = Path(folder, "trace.json")
        asked = {"RAY_PROFILING": "1", "LITECACHE_LOG_FORMAT": "json", "LITECACHE_LOADS": "all"}
        done = subprocess.run(
            [sys.executable, "-c", LIFE, f"{folder}/r", str(file)], env={**os.environ, **asked},
            timeout=120, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        logs = Path(folder, "r", "session_latest", "logs").glob("worker-*.err")
        lines = [line for log in logs for line in log.read_text().splitlines()]
        return json.loads(file.read_text()), lines


@pytest.mark.slow
def test_a_trace_holds_the_groups_spans_where_ray_profiles(
    recorded: tuple[list[dict[str, Any]], list[str]],
) -> None:
    events, _ = recorded
    own = [event for event in events if event["cat"] == "litecache"]
    assert len(own) < len(events)
    assert {event["name"] for event in own} >= {"load", "prefill", "save"}
    assert {event["pid"] for event in own} == {"litecache g"}
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in own)
    assert any(event["tid"].startswith("gpu:0 ") for event in own)


@pytest.mark.slow
def test_actors_log_json_lines_with_ids_of_request_and_actor(
    recorded: tuple[list[dict[str, Any]], list[str]],
) -> None:
    told = [json.loads(line) for line in recorded[1] if '"request_id"' in line]
    first = next(line for line in told if "ttft_s" in line)
    last = next(line for line in told if "outcome" in line)
    assert first["request_id"] == last["request_id"]
    assert last["outcome"] == "length"
    for line in (first, last):
        assert line["levelname"] == "INFO"
        assert line["name"] == "litecache.engine.engine"
        assert line["actor_name"].endswith(":gpu:0")
        assert "41, 42" not in json.dumps(line)
