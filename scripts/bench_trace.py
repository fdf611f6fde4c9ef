"""A real trace of conversations replayed: the first token with tiers against without.

    python scripts/bench_trace.py ../shared/traces/conversation.jsonl [--configs 48:40 12:40]
        [--requests N] [--divide 8] [--limit-s 200] [--geometry NAME] [--pool-bytes 10GB]
        [--load 0.7] [--seed 0] [--json FILE] [--simulate] [--quick] [--device cpu]
    python scripts/bench_trace.py --chat [--users 32] [--rounds 10] [--configs 40:0]

Any file of that format does: a JSON object a line with `timestamp` (ms), `input_length`,
`output_length` (tokens) and `hash_ids`, one for each 512 tokens of the prompt. Half of the sessions
are taken (`--share`, by `--seed`), in the order of their times, all lengths divided by `--divide`.
Before the replay the run measures how many of these very requests the engine answers a second
without tiers, with their decodes: `--clients` ask one after the other, for `--warm-s` seconds at
most. Then arrivals are compressed until they come at `--load` of that rate, and the same requests
run without tiers and with each of `--configs`, RAM:disk in GB, shards new and empty each time and
the folder of the one before removed; answers have the lengths of the trace. Each replay tells the
load that was reached and how the number of open requests grew: where it grows the engine was
overloaded, and first tokens are waiting. Ratios are of the requests that both have answered.

`--simulate` also prints what ideal plans would reach on a GPU and a disk of this run's speeds, one
request after the other; with `--simulate` and no GPU asked for (`--device none`) nothing else runs.
`--chat`: `--users` conversations at once, a document each and `--rounds` turns, the pool a quarter
of what they need; tokens per second and first tokens against the engine without tiers.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import Report, Row, geometry, parser
from tier_world import GB, BenchEngine, model_limits, scratch
from trace_model import (
    BLOCK_TOKENS,
    SPEEDS,
    Prompts,
    Queue,
    Speeds,
    Turn,
    arrivals_at,
    lru_found,
    read_trace,
    simulate,
    split_sessions,
    uncached,
)

from litecache import CacheConfig
from litecache.config import parse_size
from litecache.engine.tier_engine import Answer, copy_rate

PROMISES = {"48:40": (0.65, 0.9), "12:40": (0.85, 1.0)}
"""Mean and p90 of the first token against tiers off."""
CHAT_PROMISES = (2.5, 0.45)
FOUND_PROMISE = 0.9


# Measured


def sustained(
    world: Any, turns: Sequence[Turn], prompts: Prompts, clients: int, most_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:  # fmt: skip
    """Requests answered per second without tiers by clients that ask one after the other.

    Counted from when as many have been answered as there are clients, while all of them ask; also
    warms the engine up.
    """
    longest = max(turns, key=lambda turn: turn.length)
    for _ in range(2):
        world.ask(prompts.of(longest)[::-1].copy())
        world.clear("gpu")
    clients = max(1, min(clients, len(turns) // 3))
    left = deque(turns)
    open_: list[Answer] = []
    ended: list[float] = []
    began = clock()
    while len(ended) < len(turns) and (left or len(open_) == clients):
        while left and len(open_) < clients and clock() < began + most_s:
            turn = left.popleft()
            open_.append(world.submit(prompts.of(turn), turn.answer)[1])
        if len(open_) < clients:
            break
        waiting = [answer for answer in open_ if not answer.done.is_set()]
        ended += [clock()] * (len(open_) - len(waiting))
        open_ = waiting
        time.sleep(0.0005)
    for answer in open_:
        answer.done.wait(300)
    world.clear("gpu")
    counted = ended[clients - 1 :]
    if len(counted) < 2:
        raise SystemExit("error: too few requests were answered: raise --warm-s or --requests")
    return (len(counted) - 1) / (counted[-1] - counted[0])


def replay(
    world: BenchEngine, turns: Sequence[Turn], arrivals: Sequence[float], prompts: Prompts,
    limit_s: float,
) -> list[Answer]:  # fmt: skip
    """Ask at the times of the trace; the answers of what was asked within the limit."""
    ready = [prompts.of(turn) for turn in turns]
    answers = []
    started = time.perf_counter()
    for turn, at, prompt in zip(turns, arrivals, ready, strict=True):
        if at > limit_s:
            break
        time.sleep(max(0.0, started + at - time.perf_counter()))
        answers.append(world.submit(prompt, turn.answer)[1])
    for answer in answers:
        if not answer.done.wait(300):
            raise TimeoutError("a request was not answered within 300 s")
        if answer.error:
            raise RuntimeError(answer.error)
    return answers


def tell(
    report: Report, case: str, answers: Sequence[Answer], off: Sequence[Answer] | None,
    promise: tuple[float, float] | None, capacity: float,
) -> None:  # fmt: skip
    """Rows of one configuration; `capacity` is what `sustained` has told."""
    queue = Queue.of([one.submitted for one in answers], [one.last for one in answers])
    report.add(
        Row(
            case,
            "load reached",
            queue.rate / capacity,
            "of what is sustained",
            samples=len(answers),
        ),
        Row(case, "open requests, mean", float(np.mean(queue.open)), ""),
        Row(case, "open requests, at the end", queue.open[-1], ""),
        Row(case, "open requests, growth", queue.growth, "a minute"),
    )
    count = len(answers) if off is None else min(len(answers), len(off))
    answers = answers[:count]
    first = np.array([answer.first_ms for answer in answers])
    base = None if off is None else np.array([answer.first_ms for answer in off[:count]])
    for metric, of, bound in (
        ("mean", np.mean, promise and promise[0]),
        ("p50", np.median, None),
        ("p90", lambda ms: np.percentile(ms, 90), promise and promise[1]),
    ):
        value = float(of(first))
        limit = ratio = says = None
        if base is not None:
            limit, ratio = float(of(base)), value / float(of(base))
            says = "tiers off"
            if bound:
                says += f", promised {bound}: {'held' if ratio <= bound else 'NOT held'}"
        report.add(
            Row(case, f"first token, {metric}", value, "ms", limit, ratio, says, samples=count)
        )
    prompt = sum(answer.length for answer in answers)
    reused: Counter[str] = Counter()
    for answer in answers:
        reused.update(answer.reused)
    for tier, tokens in sorted(reused.items()):
        report.add(Row(case, f"reused from {tier}", tokens, "tokens", prompt, tokens / prompt,
                       "all prompt tokens"))  # fmt: skip


def found_tokens(answers: Iterable[Answer]) -> int:
    """Tokens that some tier held, loaded or not."""
    total = 0
    for answer in answers:
        found = getattr(answer.details, "found_tokens", None)
        total += sum((answer.reused if found is None else found).values())
    return total


def kv_token_bytes(config: dict[str, Any], device: str) -> int:
    """KV bytes of a token in the pool."""
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    wide = 4 if device == "cpu" and config.get("dtype", "float32") == "float32" else 2
    return int(config["num_hidden_layers"] * 2 * heads * width * wide)


def tier_config(
    options: Any, folder: Path, pair: str, max_len: int, num_blocks: int
) -> CacheConfig:
    """Of one `RAM:disk` in GB."""
    ram, _, disk = pair.partition(":")
    sizes = [max(1 << 20, int(float(size or 0) * options.unit)) for size in (ram, disk)]
    return CacheConfig(
        device=options.device,
        max_model_len=max_len,
        num_blocks=num_blocks,
        ram_bytes=sizes[0],
        storage_dir=str(folder / pair.replace(":", "-")) if float(disk or 0) else None,
        storage_bytes=sizes[1],
        fsync="never",
    )


def trace(options: Any, report: Report) -> None:
    """Replay without tiers and with each configuration."""
    turns = read_trace(options.trace, options.divide)
    chosen, _ = split_sessions(turns, options.share, options.seed)
    chosen = chosen[: options.requests]
    name, config = geometry(options.geometry)
    block = BLOCK_TOKENS // options.divide
    limit = model_limits(config)
    chosen = [turn for turn in chosen if turn.length + turn.answer <= limit]
    token_bytes = kv_token_bytes(config, options.device)
    pool_tokens = options.pool_bytes / token_bytes
    computed = sum(uncached(chosen, pool_tokens, block))
    report.extra |= {"seed": options.seed, "requests": len(chosen), "divide": options.divide}
    report.console.print(
        f"{len(chosen)} requests of half the sessions (seed {options.seed}),"
        f" {sum(turn.length for turn in chosen):,} prompt tokens, {computed:,} of them to compute"
        f" with a pool of {options.pool_bytes / GB:g} GB alone"
    )

    def ideal(speeds: Speeds, times: Sequence[float]) -> None:
        base = simulate(chosen, times, speeds, token_bytes, options.pool_bytes, 0, 0, block)
        for pair in options.configs:
            ram, _, disk = pair.partition(":")
            sizes = (float(ram) * options.unit, float(disk or 0) * options.unit)
            best = simulate(chosen, times, speeds, token_bytes, options.pool_bytes, *sizes, block)
            for metric, of in (("mean", np.mean), ("p90", lambda s: np.percentile(s, 90))):
                value, off = float(of(best)) * 1e3, float(of(base)) * 1e3
                report.add(Row(f"{name} {pair}", f"ideal plans, {metric}", value, "ms", off,
                               value / off, "tiers off, simulated"))  # fmt: skip

    if options.device == "none":
        speeds = Speeds(*SPEEDS)
        rate = len(chosen) / sum(
            float(speeds.prefill_s(turn.length - left, turn.length))
            for turn, left in zip(chosen, uncached(chosen, pool_tokens, block), strict=True)
        )
        ideal(speeds, arrivals_at(chosen, options.load * rate))
        return
    max_len = max(turn.length + turn.answer for turn in chosen) + 16
    num_blocks = max(int(pool_tokens / 16), math.ceil(max_len / 16) + 1)
    prompts = Prompts(int(config["vocab_size"]), options.divide)
    with scratch(options.dir) as folder:
        small = tier_config(options, folder, f"{64e6 / options.unit}:0", max_len, num_blocks)
        world = BenchEngine(config, small)
        try:
            world.tiers(False)
            rate = sustained(world, chosen, prompts, options.clients, options.warm_s)
            times = arrivals_at(chosen, options.load * rate)
            report.add(
                Row(name, "sustained with decodes", rate, "requests/s"),
                Row(name, "arrivals last", times[-1], "s", peer=f"load {options.load}"),
            )
            if options.simulate:
                speeds = _speeds(world, chosen, prompts, options, folder)
                ideal(speeds, times)
            off = replay(world, chosen, times, prompts, options.limit_s)
            tell(report, f"{name} tiers off", off, None, None, rate)
            for pair in options.configs:
                before = world.engine.metrics.by_label("litecache_drops", "reason")
                made = tier_config(options, folder, pair, max_len, num_blocks)
                world.restart_shards(made)
                world.tiers(True)
                answers = replay(world, chosen, times, prompts, options.limit_s)
                tell(report, f"{name} {pair}", answers, off, PROMISES.get(pair), rate)
                bytes_held = max(made.ram_bytes, made.storage_bytes if made.storage_dir else 0)
                bound = lru_found(chosen[: len(answers)], bytes_held / token_bytes, block)
                ratio = found_tokens(answers) / max(1, bound)
                says = f"an LRU of {bytes_held / GB:.3g} GB, promised {FOUND_PROMISE}: "
                says += "held" if ratio >= FOUND_PROMISE else "NOT held"
                report.add(Row(f"{name} {pair}", "found", found_tokens(answers), "tokens", bound,
                               ratio, says))  # fmt: skip
                after = world.engine.metrics.by_label("litecache_drops", "reason")
                for reason, blocks in after.items():
                    if blocks > before.get(reason, 0):
                        report.add(Row(f"{name} {pair}", f"saves dropped, {reason}",
                                       blocks - before.get(reason, 0), "blocks"))  # fmt: skip
                _predictions(world, report, f"{name} {pair}")
                world.tiers(False)
                _remove(world, small, made)
        finally:
            world.close()


def _remove(world: BenchEngine, small: CacheConfig, made: CacheConfig) -> None:
    """Go back to small shards and remove a configuration's files: two do not fit on every disk."""
    world.restart_shards(small)
    for folder in filter(None, made.shard_folders):
        shutil.rmtree(folder)


def _speeds(
    world: BenchEngine, chosen: Sequence[Turn], prompts: Prompts, options: Any, folder: Path
) -> Speeds:
    """This machine's, for the simulation."""
    from litecache.storage.disk.raw_disk import MIB, RawDisk

    longest = prompts.of(max(chosen, key=lambda turn: turn.length))
    lengths = [len(longest) // part for part in (8, 4, 2, 1)]
    rows, spent = [], []
    for length in lengths:
        for _ in range(2):
            ms = world.ask(longest[-length:][::-1].copy()).first_ms
            world.clear("gpu")
        rows.append([math.ceil(length / 8192), length, length**2 / 2])
        spent.append(ms / 1e3)
    weight = 1 / np.array(spent)
    table = np.array(rows) * weight[:, None]
    law, *_ = np.linalg.lstsq(table, np.ones(len(rows)), rcond=None)
    folder.mkdir(exist_ok=True)
    raw = RawDisk(str(folder / "raw"), 512 * MIB, 256 * MIB)
    disk = max(raw.turn("read", 2, 16 * MIB) for _ in range(4)) * GB
    raw.close()
    step_s, token_s, pair_s = np.maximum(law, 0.0).tolist()
    return Speeds(step_s, token_s, pair_s, disk, copy_rate(options.device))


def _predictions(world: BenchEngine, report: Report, case: str) -> None:
    costs = world.engine.stats().get("costs") or {}
    error = costs.get("first_token_error")
    if error is not None:
        says = "median; " + ("held" if error <= 0.15 else "NOT held")
        report.add(Row(case, "predicted against actual", error * 100, "%", 15.0, error / 0.15, says,
                       samples=costs["first_tokens"]))  # fmt: skip
        report.extra.setdefault("costs", {})[case] = costs


# Chat


def converse(
    world: BenchEngine, users: int, rounds: int, lengths: tuple[int, int, int], seed: int
) -> tuple[float, list[float]]:
    """All users at once, each asking again when answered; output tokens per second, first ms."""
    document, given, new = lengths
    rng = np.random.default_rng(seed)
    talks = [world.prompt(document, rng) for _ in range(users)]
    turns = [[world.prompt(given, rng) for _ in range(rounds)] for _ in range(users)]
    first: list[float] = []
    done = [0] * users
    started = time.perf_counter()
    open_: dict[int, Answer] = {}

    def ask(user: int) -> None:
        talks[user] = np.concatenate([talks[user], turns[user][done[user]]])
        open_[user] = world.submit(talks[user], new)[1]

    for user in range(users):
        ask(user)
    while open_:
        for user, answer in list(open_.items()):
            if not answer.done.is_set():
                continue
            if answer.error:
                raise RuntimeError(answer.error)
            first.append(answer.first_ms)
            talks[user] = np.concatenate([talks[user], np.array(answer.ids, dtype=np.int64)])
            done[user] += 1
            del open_[user]
            if done[user] < rounds:
                ask(user)
        time.sleep(0.0005)
    return users * rounds * new / (time.perf_counter() - started), first


def chat(options: Any, report: Report) -> None:
    """Conversations without tiers and with each configuration."""
    name, config = geometry(options.geometry)
    lengths = tuple(size // options.divide for size in (4096, 256, 64))
    longest = lengths[0] + options.rounds * (lengths[1] + lengths[2])
    token_bytes = kv_token_bytes(config, options.device)
    need = options.users * longest
    num_blocks = max(need // 4 // 16, longest // 16 + 2)
    case = f"{name} chat of {options.users}"
    with scratch(options.dir) as folder:
        small = tier_config(options, folder, f"{64e6 / options.unit}:0", longest + 16, num_blocks)
        world = BenchEngine(config, small)
        try:
            world.tiers(False)
            converse(world, min(4, options.users), 1, lengths, 1)  # type: ignore[arg-type]
            world.clear("gpu")
            rate, first = converse(world, options.users, options.rounds, lengths, 0)  # type: ignore[arg-type]
            off_ms = float(np.mean(first))
            report.add(
                Row(f"{case} tiers off", "out", rate, "tokens/s"),
                Row(f"{case} tiers off", "first token, mean", off_ms, "ms", samples=len(first)),
                Row(case, "KV of all", need * token_bytes / GB, "GB"),
            )
            for pair in options.configs:
                made = tier_config(options, folder, pair, longest + 16, num_blocks)
                world.restart_shards(made)
                world.tiers(True)
                fast, first = converse(world, options.users, options.rounds, lengths, 0)  # type: ignore[arg-type]
                ms = float(np.mean(first))
                gain, share = fast / rate, ms / off_ms
                kept = (gain >= CHAT_PROMISES[0], share <= CHAT_PROMISES[1])
                held = ["held" if good else "NOT held" for good in kept]
                report.add(
                    Row(f"{case} {pair}", "out", fast, "tokens/s", rate, gain,
                        f"tiers off, promised {CHAT_PROMISES[0]}: {held[0]}"),
                    Row(f"{case} {pair}", "first token, mean", ms, "ms", off_ms, share,
                        f"tiers off, promised {CHAT_PROMISES[1]}: {held[1]}", samples=len(first)),
                )  # fmt: skip
                _predictions(world, report, f"{case} {pair}")
                world.tiers(False)
                _remove(world, small, made)
        finally:
            world.close()


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("trace", type=Path, nargs="?", help="a file of requests")
    made.add_argument("--chat", action="store_true")
    made.add_argument("--geometry", default="llama-3.1-8b")
    made.add_argument("--configs", nargs="+", default=None, help="RAM:disk in GB")
    made.add_argument("--requests", type=int, default=None, help="at most so many")
    made.add_argument("--share", type=float, default=0.5, help="of the sessions")
    made.add_argument("--divide", type=int, default=1, choices=(1, 2, 4, 8, 16, 32))
    made.add_argument("--limit-s", type=float, default=math.inf, help="of arrivals, each time")
    made.add_argument("--load", type=float, default=0.7)
    made.add_argument("--warm-s", type=float, default=120.0, help="of measuring what is sustained")
    made.add_argument("--clients", type=int, default=32, help="of measuring what is sustained")
    made.add_argument("--pool-bytes", default="10GB")
    made.add_argument("--seed", type=int, default=1, help="which sessions")
    made.add_argument("--simulate", action="store_true")
    made.add_argument("--users", type=int, default=32)
    made.add_argument("--rounds", type=int, default=10)
    made.add_argument("--device", default="cuda", help='"none" with --simulate: that alone')
    made.add_argument("--dir", type=Path, default=None, help="where the shards' folders are made")
    options = made.parse_args()
    options.pool_bytes = parse_size(options.pool_bytes, "--pool-bytes")
    options.unit = GB
    options.configs = options.configs or (["40:0"] if options.chat else ["48:40", "12:40"])
    if options.quick:
        options.geometry, options.device, options.unit = "tiny", "cpu", GB // 1000
        options.configs = ["40:0"] if options.chat else ["24:16"]
        options.divide, options.requests, options.warm_s, options.clients = 32, 24, 10.0, 4
        options.pool_bytes, options.users, options.rounds = 2 << 20, 4, 3
    if not options.chat and options.trace is None:
        made.error("name a trace, or --chat")
    report = Report("Conversations", options.json)
    (chat if options.chat else trace)(options, report)
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
