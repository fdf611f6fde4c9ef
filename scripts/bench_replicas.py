"""Routing of a real trace over real replicas on the CPU, beside round robin and one large replica.

    python scripts/bench_replicas.py ../shared/traces/conversation.jsonl [--replicas 4]
        [--requests 400] [--divide 32] [--pool-tokens 1200000] [--load 0.7] [--json FILE] [--quick]

What bench_routing.py simulates, by actors: replicas of a small random model (one thread each) whose
pools hold `--pool-tokens` tokens of the trace; no other tier, so that what is found is found by
routing alone. All lengths are divided by `--divide`, answers have four tokens. First the requests
go one after the other to one replica with the summed bytes; then the first quarter, eight at a
time, tells what all replicas sustain together; then all arrive as in the trace, compressed to
`--load` of that, once routed and once in turn, each time with prefixes that nobody has.

Exit status 1 where a line does not hold: no replica computes more than 1.2 times the mean, hits are
at least 0.95 of the large replica's, p90 of the first token is below round robin's.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import Report, Row, own_ray, parser
from bench_trace import BLOCK_TOKENS, Turn, read_trace
from transformers import LlamaConfig

from litecache import CacheConfig, KVCacheAdapter

MODEL: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "initializer_range": 0.05,
}  # fmt: skip
BLOCK, NEW_TOKENS, AT_ONCE = 16, 4, 8
BALANCE, HITS = 1.2, 0.95


def prompt_of(turn: Turn, block: int) -> list[int]:
    """Tokens of a request: of each block of the trace its own."""
    tokens: list[int] = []
    for number in turn.ids:
        tokens += random.Random(number).choices(range(3, 1024), k=block)
    return tokens[: turn.length]


class Replay:
    """The requests of a trace, asked of one group.

    Args:
        llm: of the group.
        turns: of the trace.
        block: tokens of a block of the trace.

    Attributes:
        computed, reused: prompt tokens by replica.
        first_s: of each request, in seconds.
    """

    def __init__(self, llm: KVCacheAdapter, turns: Sequence[Turn], block: int) -> None:
        self._turns = turns
        self._prompts = [prompt_of(turn, block) for turn in turns]
        self._llm = llm
        self._replicas: Any = llm._replicas
        self._own_route, self._places = self._replicas.route, [0]
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        size = len(self._replicas.pollers)
        self.computed, self.reused = np.zeros(size, int), np.zeros(size, int)
        self.first_s: list[float] = []

    def sequentially(self, salt: str) -> None:
        """One request after the other."""
        for index in range(len(self._turns)):
            self._ended(self._ask(index, salt), index)

    def sustained(self, count: int, salt: str) -> float:
        """Requests per second of the first so many, `AT_ONCE` under way."""
        started = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda i: self._ask(i, salt).wait(), range(count)))
        return count / (time.perf_counter() - started)

    def arriving(self, rate: float, salt: str, route: Callable[[Any], list[int]] | None) -> None:
        """All at their times, so many a second in the mean; `route` = None: as the router says."""

        def noted(requests: Any) -> list[int]:
            self._places = (route or self._own_route)(requests)
            return self._places

        self._replicas.route = noted
        first, last = self._turns[0].time_s, self._turns[-1].time_s
        scale = len(self._turns) / rate / max(1e-9, last - first)
        began, rows, places = time.perf_counter(), [], []
        for index, turn in enumerate(self._turns):
            wait_s = began + (turn.time_s - first) * scale - time.perf_counter()
            time.sleep(max(0.0, wait_s))
            rows.append(self._ask(index, salt))
            places += self._places
        del self._replicas.route
        for index, (row, place) in enumerate(zip(rows, places, strict=True)):
            self._ended(row, index, place)

    def _ask(self, index: int, salt: str) -> Any:
        (row,) = self._llm.submit(
            [self._prompts[index]],
            streaming=True,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            cache_salt=salt,
        )
        return row

    def _ended(self, row: Any, index: int, place: int = 0) -> None:
        row.wait()
        reused = sum(row.reused_tokens.values())
        self.reused[place] += reused
        self.computed[place] += len(self._prompts[index]) - reused
        self.first_s.append(row.first_token_at - row.submitted_at)


def main() -> int:
    """Command line."""
    made = parser(__doc__ or "")
    made.add_argument("trace", type=Path, help="requests, one JSON object a line")
    made.add_argument("--replicas", type=int, default=4)
    made.add_argument("--requests", type=int, default=400, help="the first so many")
    made.add_argument("--divide", type=int, default=BLOCK_TOKENS // BLOCK, help="all lengths by it")
    made.add_argument("--pool-tokens", type=int, default=1_200_000, help="of each replica")
    made.add_argument("--load", type=float, default=0.7, help="of what all sustain")
    options = made.parse_args()
    if options.quick:
        options.requests = 40
    turns = read_trace(options.trace, options.divide)[: options.requests]
    if not turns:
        sys.exit(f"error: {options.trace} has no requests")
    own_ray()
    report = Report("Real replicas", options.json, {"requests": len(turns)})
    held = run(report, options, turns)
    report.show()
    return 0 if held or options.quick else 1


def opened(options: Any, replicas: int) -> KVCacheAdapter:
    """So many replicas that hold in all what all hold."""
    blocks = options.pool_tokens // options.divide // BLOCK * options.replicas // replicas
    config = CacheConfig(num_blocks=blocks, block_size=BLOCK, dtype="float32", device="cpu")
    return KVCacheAdapter(
        LlamaConfig(**MODEL),
        weights="random",
        cache_config=config,
        replicas=replicas,
        num_threads=1,
        actor_options={"gpu": {"num_cpus": 0}},  # fewer cores than replicas
    )


def run(report: Report, options: Any, turns: Sequence[Turn]) -> bool:
    """All ways; whether all promises held."""
    block, count = BLOCK_TOKENS // options.divide, options.replicas
    case = f"{count} replicas"
    with opened(options, 1) as llm:
        large = Replay(llm, turns, block)
        large.sequentially("large")
    report.add(Row("one large replica", "hits", int(large.reused.sum()), "tokens"))
    with opened(options, count) as llm:
        replay, turn = Replay(llm, turns, block), itertools.count()
        rate = replay.sustained(max(1, len(turns) // 4), "sustained")
        report.add(Row(case, "sustain", rate, "requests/s"))
        held, p90 = True, {}
        for name in ("in turn", "routed"):
            replay.clear()
            ours = name == "routed"
            way = None if ours else lambda asked: [next(turn) % count for _ in asked]
            replay.arriving(options.load * rate, name, way)
            p90[name] = 1e3 * float(np.percentile(replay.first_s, 90))
            busiest, mean = int(replay.computed.max()), float(replay.computed.mean())
            hits, most = int(replay.reused.sum()), int(large.reused.sum())
            balanced, found = busiest <= BALANCE * mean, hits >= HITS * most
            held = held and (not ours or (balanced and found))
            peers = ("the mean", "one large replica")
            if ours:
                peers = (
                    promised(peers[0], f"at most {BALANCE}", balanced),
                    promised(peers[1], f"at least {HITS}", found),
                )
            report.add(
                Row(case, f"computed by the busiest, {name}", busiest, "tokens", mean,
                    busiest / mean, peers[0]),
                Row(case, f"hits, {name}", hits, "tokens", most, hits / most, peers[1]),
                Row(case, f"first token, mean, {name}", 1e3 * float(np.mean(replay.first_s)), "ms"),
            )  # fmt: skip
    routed, base = p90["routed"], p90["in turn"]
    peer = promised("round robin", "below 1", routed < base)
    report.add(Row(case, "first token, p90, routed", routed, "ms", base, routed / base, peer))
    return held and routed < base


def promised(peer: str, promise: str, good: bool) -> str:
    """What a figure is held against, what was promised, and whether it held."""
    return f"{peer}, {promise}: {'held' if good else 'NOT held'}"


if __name__ == "__main__":
    sys.exit(main())
