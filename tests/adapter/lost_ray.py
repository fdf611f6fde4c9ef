"""Run by test_lost_ray.py in a process of its own: a driver whose Ray is shut down under it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from tiny_config import endless_llama

from litecache.adapter import KVCacheAdapter
from litecache.config import CacheConfig
from litecache.errors import LiteCacheError


def start_ray(folder: Path) -> None:
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=100 << 20,
        log_to_driver=False, _temp_dir=str(folder),
    )  # fmt: skip


def make_adapter() -> KVCacheAdapter:
    config = CacheConfig(num_blocks=256, ram_bytes="4MB", max_model_len=4000)
    return KVCacheAdapter(endless_llama(), weights="random", cache_config=config, num_threads=1)


def told(call: Any) -> str:
    """How a call ends, within ten seconds."""
    ended: list[str] = []

    def run() -> None:
        try:
            ended.append(repr(call()))
        except BaseException as error:
            kind = "LiteCacheError" if isinstance(error, LiteCacheError) else type(error).__name__
            ended.append(f"{kind}: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    return ended[0] if ended else "it hung"


def calls_of(llm: KVCacheAdapter) -> dict[str, str]:
    return {
        "generate": told(lambda: llm.generate_batch([[5, 6]], max_new_tokens=2)),
        "stream": told(lambda: list(llm.stream([5, 6], as_tokens=True))),
        "stats": told(llm.stats),
        "abort": told(lambda: llm.abort("some-id")),
        "flush": told(llm.flush),
        "clear": told(llm.clear),
        "pin": told(lambda: llm.pin([5] * 16)),
    }


def main(folder: Path) -> None:
    start_ray(folder / "a")
    llm, other = make_adapter(), make_adapter()
    stream = llm.stream([5, 6, 7], as_tokens=True, max_new_tokens=3900)
    next(stream)
    ray.shutdown()
    report: dict[str, Any] = {"the stream": told(lambda: list(stream))}
    report |= calls_of(llm)
    report["close"] = told(llm.close)
    time.sleep(1)  # a poll that starts a Ray would have begun to
    report["a hidden Ray"] = ray.is_initialized()
    start_ray(folder / "b")
    report |= {f"{name} under another Ray": said for name, said in calls_of(other).items()}
    report["close under another Ray"] = told(other.close)
    with make_adapter() as new:
        report["a new adapter"] = told(lambda: len(new.generate_batch([[5]], max_new_tokens=3)[0]))
    print(json.dumps(report))
    sys.stdout.flush()
    ray.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
