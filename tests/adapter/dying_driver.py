"""A driver that joins a group, starts a long request, says so, and waits to be killed."""

from __future__ import annotations

import sys
import time

import ray
import torch
from tiny_config import endless_llama

from litecache.adapter import KVCacheAdapter


def main() -> None:
    ray.init(address=sys.argv[1], log_to_driver=False)
    llm = KVCacheAdapter(endless_llama(), weights="random", group=sys.argv[2])
    ids = torch.randint(3, 64, (1, 40))
    stream = llm.stream(input_ids=ids, as_tokens=True, max_new_tokens=16000)
    next(stream)
    print("streaming", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
