"""What an engine counts and logs of its requests."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
from engine_harness import Harness, family_source

from litecache import spans
from litecache.metrics import Metrics
from litecache.spans import record_spans, recorded_spans
from litecache.types import Request, SamplingParams

PROMPT = [*range(1, 100)]


def _count(metrics: Metrics, name: str, **labels: str) -> int:
    found = 0
    for metric, its, value in metrics.snapshot()["histograms"]:
        if metric == name and labels.items() <= its.items():
            assert isinstance(value, dict)
            found += value["count"]
    return found


def test_every_token_gap_load_prediction_and_byte_is_counted(tmp_path: Path) -> None:
    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        metrics, store = harness.engine.metrics, harness.stores[0].metrics
        harness.run([PROMPT, PROMPT[:50]], 8)
        assert _count(metrics, "litecache_inter_token_seconds") == 2 * 7
        assert _count(metrics, "litecache_load_prediction_ratio") == 0
        for tier, emptied in (("disk", ("gpu", "ram")), ("ram", ("gpu",))):
            harness.empty(*emptied)
            harness.run([PROMPT], 8)
            assert harness.reused[0] == {tier: 96}
            nbytes = 6 * harness.engine.info.block_bytes[0]
            assert metrics.value("litecache_copied_bytes", direction="load", tier=tier) == nbytes
            assert _count(metrics, "litecache_io_seconds", direction="load", tier=tier) == 1
        assert _count(metrics, "litecache_load_prediction_ratio") == 2
        predicted, actual = (
            metrics.value(f"litecache_{kind}_first_token_seconds")
            for kind in ("predicted", "planned")
        )
        assert predicted > 0
        assert actual > 0
        assert _count(store, "litecache_block_use_gap_seconds") == 2 * 6


def test_gauges_are_brought_up_to_date_without_the_engines_thread(tmp_path: Path) -> None:
    with Harness(family_source("llama"), folders=[tmp_path / "s"], num_blocks=14) as harness:
        metrics = harness.engine.metrics
        for start in range(3):
            harness.run([[start + 1, *PROMPT]], 4)
        harness.engine.flush()
        # as from the exporter's thread, while the engine's does something else
        harness.engine.call(harness.engine.refresh_metrics)
        blocks = harness.engine.stats()["blocks"]
        assert {state: metrics.value("litecache_pool_blocks", state=state) for state in blocks} == (
            blocks
        )
        assert metrics.value("litecache_evictions", tier="gpu") > 0
        assert metrics.value("litecache_waiting_requests") == 0


def test_logs_tell_of_a_request_by_its_bounded_id_and_nothing_of_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "litecache.engine")
    with Harness(family_source("llama")) as harness:
        name = f"client-{'7' * 300}"
        request = Request(name, "c", tuple(PROMPT), SamplingParams(4), cache_salt="secret-salt")
        harness.engine.submit([request])
        while not any(d.finish_reason for _, d in harness.deltas.get(timeout=60)):
            pass
    first, last = [r for r in caplog.records if hasattr(r, "request_id")]
    assert first.ttft_s > 0
    assert first.reused_tokens == {}
    assert last.outcome == "length"
    for record in (first, last):
        assert record.request_id[:20] == name[:20]
        assert len(record.request_id) <= 80
        told = json.dumps({k: str(v) for k, v in vars(record).items()}) + record.getMessage()
        assert "secret-salt" not in told
        assert str(PROMPT)[1:20] not in told
        assert len(record.getMessage()) < 200


def test_loads_prefills_and_saves_leave_spans_only_where_they_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        harness.run([PROMPT], 4)
        assert recorded_spans() is None
        monkeypatch.setattr(spans, "_spans", None)
        record_spans()
        began = time.time()
        harness.run([[7, *PROMPT]], 4)
        harness.empty("gpu", "ram")
        harness.run([[7, *PROMPT]], 4)
        told = recorded_spans() or []
    assert {span.name for span in told} == {"load", "prefill", "save", "read", "write"}
    for span in told:
        assert began - 1 < span.begun_s < time.time()
        assert 0 <= span.seconds < 60
    assert sum(s.figures["tokens"] for s in told if s.name == "prefill") == 100 + 4  # type: ignore[misc]
    loads = [span.figures for span in told if span.name == "load"]
    assert loads == [{"blocks": 6, "tier": "disk"}]
