"""A hot prefix on two replicas of this machine: moved to the second one, not computed again.

    python scripts/bench_moves.py [--prefix 768] [--requests 60] [--load 2.0] [--json FILE]
        [--quick]

Real replicas (on the CPU, one thread each) with a small random model. All requests begin with one
prefix, which the first of them computes and does not save (`cache="read-only"`), so that only that
replica's pool has it. Then they arrive at random, at `--load` times what one replica sustains. Once
all go to the replica that has the prefix ("one replica"), once to where the router sends them.

Exit status 1 where a line does not hold: tokens differ from those of a replica that answers one
request after the other; over both replicas more is computed than the prefix once and what follows
it in each request; the 90th percentile of the time to the first token is not below that of one.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from bench_common import Report, Row, own_ray, parser

MODEL: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "initializer_range": 0.05,
}  # fmt: skip
SUFFIX_TOKENS, NEW_TOKENS, BLOCK = 48, 8, 16


class Clock:
    """A streamer that notes when the first token came."""

    def __init__(self) -> None:
        self.started, self.first_s = time.perf_counter(), float("nan")
        self._calls = 0

    def put(self, value: object) -> None:
        self._calls += 1  # the first is the prompt
        if self._calls == 2:
            self.first_s = time.perf_counter() - self.started

    def end(self) -> None:
        pass


class Asked:
    """What one request gave."""

    def __init__(self, llm: Any, prompt: list[int], cache: str = "default") -> None:
        import torch

        clock = Clock()
        out = llm.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            cache=cache,
            streamer=clock,
            return_dict_in_generate=True,
        )
        self.tokens = out.sequences[0, len(prompt) :].tolist()
        self.first_s = clock.first_s
        self.reused = out.litecache.reused_tokens[0]
        self.computed = len(prompt) - sum(self.reused.values())


def prompts(rng: random.Random, prefix_tokens: int, count: int) -> list[list[int]]:
    """Prompts with one common beginning."""
    prefix = rng.choices(range(3, 1024), k=prefix_tokens)
    return [[*prefix, *rng.choices(range(3, 1024), k=SUFFIX_TOKENS)] for _ in range(count)]


def sent_to(llm: Any, index: int) -> Callable[[], None]:
    """All go to one replica, until what this returns is called."""
    llm._replicas.route = lambda requests: [index] * len(requests)

    def undo() -> None:
        del llm._replicas.route

    return undo


def sustained_s(llm: Any, rng: random.Random, prefix_tokens: int) -> float:
    """Seconds that a replica takes for a request whose prefix it has, eight at a time."""
    asked = prompts(rng, prefix_tokens, 17)
    Asked(llm, asked[0])
    started = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda prompt: Asked(llm, prompt), asked[1:]))
    return (time.perf_counter() - started) / (len(asked) - 1)


def arrive(llm: Any, asked: list[list[int]], gaps_s: list[float]) -> list[Asked]:
    """Each request at its time, however long the others take."""
    results: list[Asked | None] = [None] * len(asked)

    def ask(i: int) -> None:
        results[i] = Asked(llm, asked[i])

    threads = []
    for i, gap_s in enumerate(gaps_s):
        time.sleep(gap_s)
        threads.append(threading.Thread(target=ask, args=(i,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return [each for each in results if each is not None]


def run(options: Any, report: Report) -> bool:
    """Both ways; whether all promises held."""
    from transformers import LlamaConfig

    from litecache import CacheConfig, KVCacheAdapter

    config = CacheConfig(num_blocks=4096, dtype="float32", device="cpu", ram_bytes="256MB")
    held = True
    with KVCacheAdapter(
        LlamaConfig(**MODEL), weights="random", cache_config=config, replicas=2, num_threads=1
    ) as llm:
        undo = sent_to(llm, 0)
        each_s = sustained_s(llm, random.Random(1), options.prefix)
        undo()
        undo = sent_to(llm, 1)  # it warms up, too
        sustained_s(llm, random.Random(2), options.prefix)
        undo()
        report.add(Row("one replica", "sustains", 1 / each_s, "requests/s"))
        p90: dict[str, float] = {}
        for number, case in enumerate(("one replica", "two, routed")):
            rng = random.Random(10 + number)
            asked = prompts(rng, options.prefix, options.requests)
            times = random.Random(7)
            gaps_s = [times.expovariate(options.load / each_s) for _ in asked]
            undo = sent_to(llm, 0) if number == 0 else None
            first = Asked(llm, asked[0], cache="read-only")
            time.sleep(2.5)  # until the replicas have reported that they have nothing to do
            results = arrive(llm, asked, gaps_s)
            if undo is not None:
                undo()
            computed = first.computed + sum(each.computed for each in results)
            # the last block of a prefix may be cut off
            least = options.prefix + options.requests * (SUFFIX_TOKENS + options.prefix % BLOCK)
            p90[case] = float(np.percentile([each.first_s for each in results], 90))
            from_ram = sum(each.reused.get("ram", 0) for each in results)
            again = sent_to(llm, 0)
            same = [Asked(llm, prompt).tokens for prompt in asked] == [r.tokens for r in results]
            again()
            good = same and computed <= 1.02 * least
            held = held and good
            said = "the prefix once and the rest" + ("" if good else ": NOT held")
            report.add(Row(case, "computed", computed, "tokens", least, computed / least, said,
                           samples=len(results)))  # fmt: skip
            report.add(Row(case, "loaded from RAM", from_ram, "tokens"))
            report.add(Row(case, "same tokens as one after the other", float(same), "1 = yes"))
            report.add(Row(case, "first token, p90", p90[case] * 1e3, "ms",
                           samples=len(results)))  # fmt: skip
        ratio = p90["two, routed"] / p90["one replica"]
        held = held and ratio < 1
        report.add(Row("two, routed", "first token, p90, against one replica", ratio, "times",
                       1.0, ratio, "held" if ratio < 1 else "NOT held"))  # fmt: skip
    return held


def main() -> None:
    """Command line."""
    made = parser(__doc__ or "")
    made.add_argument("--prefix", type=int, default=768, help="tokens that all begin with")
    made.add_argument("--requests", type=int, default=60)
    made.add_argument("--load", type=float, default=2.0, help="of what one replica sustains")
    options = made.parse_args()
    if options.quick:
        options.requests = 30
    own_ray()
    report = Report("Moving a hot prefix", options.json)
    held = run(options, report)
    report.show()
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
