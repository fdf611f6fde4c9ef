from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from tiny_config import endless_llama

from litecache.adapter import KVCacheAdapter
from litecache.config import CacheConfig


@pytest.mark.slow
def test_a_driver_that_dies_frees_its_blocks_and_the_group_lives_on(ray_local: None) -> None:
    config = CacheConfig(num_blocks=1024, dtype="float32", ram_bytes="16MB")
    settings = {"weights": "random", "group": "outlives", "cache_config": config}
    with KVCacheAdapter(endless_llama(), num_threads=1, **settings) as llm:
        address = ray.get_runtime_context().gcs_address
        script = Path(__file__).with_name("dying_driver.py")
        driver = subprocess.Popen(
            [sys.executable, str(script), address, "outlives"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "streaming\n"
            assert llm.stats().blocks["private"] > 0
        finally:
            driver.kill()
            driver.wait(10)
        died = time.monotonic()
        while llm.stats().running:
            assert time.monotonic() - died < 11, "the dead driver's request still runs"
            time.sleep(0.1)
        stats = llm.stats()
        assert stats.blocks["private"] == 0
        assert stats.requests == {"abort": 1}
        assert len(llm.generate_batch([[5, 6, 7]], max_new_tokens=3)[0]) == 3
