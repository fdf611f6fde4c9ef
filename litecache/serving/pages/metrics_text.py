"""`GET /metrics`: what the server and its group did, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from litecache.serving.service import ModelService

_LABELS = {"requests": ("path", "status"), "request_seconds": ("path",)}


def metrics_text(service: ModelService) -> str:
    """All of it; asks the actors of the group, where there is one yet."""
    lines = list(_server_lines(service))
    if service.state == "ready":
        stats = service.llm.stats()
        lines += _lines("prompt_tokens_total", "counter", {(): stats.prompt_tokens})
        lines += _lines("generated_tokens_total", "counter", {(): stats.generated_tokens})
        for name in ("found_tokens", "reused_tokens"):
            lines += _by(f"{name}_total", "counter", "tier", getattr(stats, name))
        lines += _by("engine_requests_total", "counter", "outcome", stats.requests)
        lines += _by("pool_blocks", "gauge", "state", stats.blocks)
        lines += _lines("engine_requests_running", "gauge", {(): stats.running})
        lines += _lines("engine_requests_waiting", "gauge", {(): stats.waiting})
    return "\n".join(lines) + "\n"


def _server_lines(service: ModelService) -> Iterator[str]:
    admission = service.admission
    yield from _lines("ready", "gauge", {(): int(service.state == "ready")})
    yield from _lines("sequences_running", "gauge", {(): admission.running})
    yield from _lines("requests_waiting", "gauge", {(): admission.waiting})
    yield from _lines("requests_rejected_total", "counter", {(): admission.rejected})
    yield from _lines("open_streams", "gauge", {(): service.open_streams})
    for name, labels in _LABELS.items():
        found = {
            tuple(zip(labels, values, strict=True)): count
            for (kind, *values), count in sorted(service.counts.items())
            if kind == name
        }
        yield from _lines(f"{name}_total", "counter", found)


def _by(name: str, kind: str, label: str, values: Mapping[str, float]) -> Iterator[str]:
    yield from _lines(name, kind, {((label, key),): value for key, value in values.items()})


def _lines(name: str, kind: str, values: Mapping[Any, float]) -> Iterator[str]:
    yield f"# TYPE litecache_server_{name} {kind}"
    for labels, value in values.items():
        text = ",".join(f'{label}="{told}"' for label, told in labels)
        yield f"litecache_server_{name}{'{' + text + '}' if text else ''} {value:.10g}"
