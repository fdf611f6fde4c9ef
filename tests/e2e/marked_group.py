"""A group that hears a marked prompt and a marked salt, in calls that go well and calls that fail.

Run by test_secrets.py as a driver; the marks stand in the file that it is told of. What it prints
(every error, with its traceback) must not have them either.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from litecache import CacheConfig, KVCacheAdapter
from litecache.errors import LiteCacheError

logging.basicConfig(level=logging.DEBUG)
for noisy in ("urllib3", "filelock", "ray", "asyncio"):
    logging.getLogger(noisy).setLevel(logging.WARNING)


def refused(call: Callable[[], Any]) -> None:
    """Print how a call fails."""
    try:
        call()
    except Exception:
        print(traceback.format_exc())
    else:
        raise AssertionError("a call was not refused")


def main() -> None:
    model, storage, marks = (Path(each) for each in sys.argv[1:])
    text, salt = json.loads(marks.read_text())
    ray.init("auto")  # with what the actors print
    config = CacheConfig(
        num_blocks=64,
        dtype="float32",
        device="cpu",
        ram_bytes="8MB",
        storage_dir=str(storage),
        storage_bytes="8MB",
        salt_quotas={salt: "4MB"},
        salt_ram_quotas={salt: "4MB"},
        salt_pool_quotas={salt: 32},
        cache_salt=salt,
    )
    print(config)
    llm = KVCacheAdapter(str(model), cache_config=config, group="marked", detached=True)
    ids = llm.tokenizer(text, return_tensors="pt").input_ids
    first = llm.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(llm.generate(ids, max_new_tokens=8, do_sample=False), first)
    print(len("".join(llm.stream(text, max_new_tokens=8))))
    llm.generate_batch(ids.tolist(), max_new_tokens=4)
    llm.generate(ids, max_new_tokens=4, num_beams=2)
    llm.warm([text + text])
    llm.pin(ids[0].tolist())
    file = storage.parent / "prefix.kv"
    llm.export_prefix(text, file)
    llm.import_prefix(file)

    far = {salt: "1MB"}
    refused(lambda: llm.generate(ids.repeat(1, 100)))
    refused(lambda: llm.generate(ids, max_new_tokens=100_000))
    refused(lambda: llm.generate(text))
    refused(lambda: llm.generate_batch([text]))
    refused(lambda: llm.generate(ids, cache_salt=[salt]))
    refused(lambda: llm.generate(ids, cache_salt=salt * 1000))
    refused(lambda: llm.generate(ids, cache_salt=salt + "\ud800"))
    refused(lambda: llm.delete(cache_salt=salt.encode()))
    refused(lambda: llm.pin({text: salt}))
    refused(lambda: llm.warm({text}))
    refused(lambda: next(iter(llm.stream([text], max_new_tokens=4))))
    refused(lambda: llm.chat(text))
    refused(lambda: llm.import_prefix(file, cache_salt=salt + "x"))
    refused(lambda: CacheConfig(salt_quotas={salt: "much"}))
    refused(lambda: CacheConfig(salt_pool_quotas={salt: "much"}))
    refused(lambda: CacheConfig(cache_salt=[salt]))
    for name in ("salt_quotas", "salt_ram_quotas"):
        other = CacheConfig(**{**config.to_dict(), name: far})
        refused(lambda other=other: KVCacheAdapter(str(model), cache_config=other, group="marked"))
    file.write_bytes(file.read_bytes()[:-9] + b"scrambled")
    refused(lambda: llm.import_prefix(file))

    # a replica that dies under a request, and a shard that does
    answers: list[Any] = []
    busy = threading.Thread(
        target=lambda: answers.append(llm.generate(ids, max_new_tokens=300, do_sample=False))
    )
    busy.start()
    time.sleep(0.3)
    for name, actor in llm.group.status().items():
        if "coordinator" not in name:
            os.kill(actor["pid"], 9)
    busy.join()
    assert torch.equal(answers[0][:, : first.shape[1]], first)
    llm.group.coordinator.call("stats")
    deadline = time.monotonic() + 60
    while any("error" in each for each in llm.group.status().values()):
        assert time.monotonic() < deadline, "an actor does not come back"
        time.sleep(0.2)
    llm.generate(ids, max_new_tokens=8, cache_salt="")
    try:
        print(llm.delete(cache_salt=salt), "blocks deleted")
    except LiteCacheError:
        print(traceback.format_exc())
    llm.generate(ids, max_new_tokens=8)
    llm.flush()
    print(llm, llm.group.spec.config, llm.stats())
    llm.close()


if __name__ == "__main__":
    main()
