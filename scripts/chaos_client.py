"""A client of chaos.py: greedy requests until its input closes, each told of as a line of JSON.

    python scripts/chaos_client.py --client 3 --plan FILE --address HOST:PORT

The plan holds prompts and the tokens that stock `generate` gives. Calls are `generate`,
`generate_batch` and `stream`, of which some are closed early; a call ends with the right tokens
("right"), others ("WRONG"), a `LiteCacheError` ("refused"), something else ("raw"), or not within
`HUNG_S` ("hung").
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

HUNG_S = 120.0


class Client:
    """Sends requests, one after the other."""

    def __init__(self, number: int, plan: dict[str, Any], address: str) -> None:
        import ray

        from litecache.adapter import KVCacheAdapter

        self.rng = random.Random(number)
        self.prompts, self.wanted = plan["prompts"], plan["wanted"]
        self.length: int = plan["length"]
        # only a driver on another address than the machine's own has to say so
        ip = {"_node_ip_address": plan["node_ip"]} if plan.get("node_ip") else {}
        ray.init(address=address, log_to_driver=False, logging_level="error", **ip)
        self.llm = KVCacheAdapter(plan["model"], group=plan["group"])
        self.begun = 0.0
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            if self.begun and time.monotonic() - self.begun > HUNG_S:
                tell("hung", f"for {HUNG_S:g} s")
                faulthandler.dump_traceback()
                os._exit(3)

    def run(self) -> None:
        from litecache.errors import LiteCacheError

        tell("joined")
        over = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
        while not over.is_set():
            self.begun = time.monotonic()
            kind, detail = "right", ""
            try:
                detail = self.one()
                kind = "WRONG" if detail else "right"
            except LiteCacheError as error:
                kind, detail = "refused", f"{type(error).__name__}: {error}"
            except Exception as error:
                kind, detail = "raw", f"{type(error).__name__}: {error}"
            tell(kind, detail, time.monotonic() - self.begun)
            self.begun = 0.0
            if kind == "refused":
                time.sleep(0.05)
        self.begun = time.monotonic()
        self.llm.close()
        tell("closed")

    def one(self) -> str:
        """One call; what is wrong with its tokens, or nothing."""
        import torch

        rng = self.rng
        number = rng.randrange(len(self.prompts))
        prompt, wanted, length = self.prompts[number], self.wanted[number], self.length
        kind = rng.randrange(4)
        if kind == 0:
            out = self.llm.generate(torch.tensor([prompt]), max_new_tokens=length)
            got, expected = out[0, len(prompt) :].tolist(), wanted
        elif kind == 1:
            numbers = rng.sample(range(len(self.prompts)), 4)
            got = self.llm.generate_batch([self.prompts[n] for n in numbers], max_new_tokens=length)
            expected = [self.wanted[n] for n in numbers]
        else:
            stop = rng.randrange(1, length + 1) if kind == 3 else length
            stream = self.llm.stream(prompt, as_tokens=True, max_new_tokens=length)
            got = []
            for token in stream:
                got.append(token)
                if len(got) >= stop:
                    break
            stream.close()
            expected = wanted[:stop]
        return "" if got == expected else f"prompt {number}: {got} instead of {expected}"


def tell(kind: str, detail: str = "", seconds: float = 0.0) -> None:
    """A line for chaos.py."""
    said = {"kind": kind, "detail": detail[:400], "seconds": round(seconds, 3)}
    print(json.dumps(said), flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description="A client of chaos.py.")
    arguments.add_argument("--client", type=int, required=True)
    arguments.add_argument("--plan", type=Path, required=True)
    arguments.add_argument("--address", required=True)
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    Client(options.client, json.loads(options.plan.read_text()), options.address).run()


if __name__ == "__main__":
    main()
