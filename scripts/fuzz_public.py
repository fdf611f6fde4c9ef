"""Fuzzed calls of every public entry: a result or a `LiteCacheError`, and the next good call works.

    python scripts/fuzz_public.py [--count 5000] [--seed 0] [--entries config,paged] [--json FILE]

Entries: `CacheConfig`, its variables, the command line, `PagedAttentionCache`, `LocalCacheService`
and `PyLocalCacheService`, and the calls of a `KVCacheAdapter` over a tiny model on a Ray of the
script's own. Each call takes good arguments and changes some of them to values that nobody should
pass (`tests/any_values.py`). After each, a good call of the same entry must give what it gave
before. Call N of a seed is the same in every run. Exits 1 when an exception of another kind was
seen, a call hung, a good call answered wrongly, or something was left behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import random
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import torch
from any_values import EVERY, TEXTS
from bench_common import Report, Row, parser
from rich.console import Console
from rich.progress import Progress

from litecache.config import CacheConfig
from litecache.engine.paged_cache import PagedAttentionCache
from litecache.errors import GroupUnavailableError, LiteCacheError
from litecache.storage import LocalCacheService, PyLocalCacheService

HUNG_S = 120.0
LATE_S = {"cli": 3.0}
MIB = 1 << 20
VOCAB = 64


class Entry:
    """One public entry: how it is called well, and what its arguments may be."""

    name = ""
    weight = 1

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.rng, self.folder = rng, folder
        self.wanted: Any = None

    def any_value(self) -> Any:
        rng = self.rng
        kind = rng.randrange(10)
        if kind < 7:
            return rng.choice(EVERY)
        if kind == 7:
            return rng.randrange(-(2**40), 2**40)
        if kind == 8:
            return "".join(chr(rng.randrange(rng.choice((128, 0x3000)))) for _ in range(9))
        return [rng.choice(EVERY) for _ in range(rng.randrange(4))]

    def call(self) -> Any:
        """One fuzzed call."""
        raise NotImplementedError

    def good(self) -> Any:
        """A good call; what it gives is compared."""
        raise NotImplementedError

    def close(self) -> None:
        """Give everything back."""


class Config(Entry):
    name = "config"
    fields = tuple(CacheConfig.__dataclass_fields__)

    def call(self) -> Any:
        names = self.rng.sample(self.fields, self.rng.randrange(1, 4))
        some = [8, 16, 1.0, "1GB", "512 MiB", "/a", ["/a", "/b"], "lru", "float16", "all", {}, True]
        values = (
            self.rng.choice(some) if self.rng.random() < 0.5 else self.any_value() for _ in names
        )
        return CacheConfig(**dict(zip(names, values, strict=True))).digest()

    def good(self) -> Any:
        return CacheConfig(block_size=32, storage_dir="/a").digest()


class Environment(Config):
    name = "environment"

    def call(self) -> Any:
        text = self.any_value()
        text = text if isinstance(text, str) else self.rng.choice(TEXTS)
        name = f"LITECACHE_{self.rng.choice(self.fields).upper()}"
        try:
            os.environ[name] = text
        except ValueError:
            return None  # no environment can hold it
        try:
            return CacheConfig().digest()
        finally:
            del os.environ[name]


class Paged(Entry):
    name = "paged"
    weight = 3

    def __init__(self, rng: random.Random, folder: Path) -> None:
        super().__init__(rng, folder)
        self.cache = PagedAttentionCache(
            CacheConfig(block_size=8, num_blocks=64, num_heads=4, num_kv_heads=2, head_dim=8,
                        num_layers=2, dtype="float32", device="cpu")
        )  # fmt: skip
        self.seq = self.cache.allocate_sequence()
        generator = torch.Generator().manual_seed(0)
        for layer in range(2):
            tokens = (torch.randn(12, 2, 8, generator=generator) for _ in range(2))
            self.cache.append(self.seq, *tokens, layer)
        self.query = torch.randn(1, 4, 8, generator=generator)

    def call(self) -> Any:
        rng, cache = self.rng, self.cache
        others = [seq for seq in cache._sequences if seq != self.seq]
        seq = rng.choice(others) if others else cache.allocate_sequence(rng.randrange(20))
        tables, lens = cache.block_tables([self.seq]), cache.context_lens([self.seq])
        layer = rng.randrange(2)
        key = torch.zeros(rng.randrange(4), 2, 8)
        calls: dict[str, list[Any]] = {
            "allocate_sequence": [rng.randrange(40)],
            "append": [seq, key, key, layer],
            "fork": [seq],
            "block_tables": [[seq]],
            "context_lens": [[seq]],
            "paged_attention": [self.query, tables, lens, layer],
            "free_sequence": [seq],
        }
        method = rng.choice(sorted(calls))
        values = calls[method]
        for at in range(len(values)):
            if rng.random() < 0.4:
                value = values[at]
                if isinstance(value, torch.Tensor) and rng.random() < 0.6:
                    values[at] = self.change(value)
                else:
                    values[at] = self.any_value()
        if method == "free_sequence" and values[0] is self.seq:
            return None
        try:
            return getattr(cache, method)(*values)
        finally:
            if len(cache._sequences) > 12:
                for each in [s for s in cache._sequences if s != self.seq]:
                    cache.free_sequence(each)

    def change(self, value: torch.Tensor) -> torch.Tensor:
        rng = self.rng
        change: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda t: t.to(rng.choice([torch.int64, torch.float32, torch.int16, torch.bool])),
            lambda t: t + rng.choice([1, -1, 2**31 - 1, 100]),
            lambda t: t.long() + 2**32,
            lambda t: t.to("meta"),
            lambda t: t[..., :0],
            lambda t: t.unsqueeze(0),
            lambda t: t.repeat_interleave(2, -1)[..., ::2],
            lambda t: t.flatten(),
            lambda t: t.to_sparse(),
        ]
        return rng.choice(change)(value)

    def good(self) -> Any:
        self.cache.check_integrity()
        tables, lens = self.cache.block_tables([self.seq]), self.cache.context_lens([self.seq])
        return self.cache.paged_attention(self.query, tables, lens).tolist()


class Service(Entry):
    name = "service"
    weight = 2

    def __init__(self, rng: random.Random, folder: Path) -> None:
        super().__init__(rng, folder)
        kv = torch.arange(128 * 1024, dtype=torch.int32).view(128, 1024).view(torch.uint8)
        self.py = PyLocalCacheService(kv, str(folder / "good"), 16 * MIB, 1, 2)
        self.tokens = list(range(70))

    def construct(self) -> None:
        rng = self.rng
        values: dict[str, Any] = {
            "file": str(self.folder / "new" / "c"),
            "storage_size": 8 * MIB,
            "num_of_shard": 1,
            "kvcache": np.zeros((128, 4096), np.uint8),
            "num_workers": 1,
            "ram_bytes": 4 * MIB,
            "engine": rng.choice(["local", "memory"]),
        }
        for name in rng.sample(sorted(values), rng.randrange(1, 3)):
            values[name] = self.any_value()
        here = os.getcwd()
        work = Path(tempfile.mkdtemp(dir=self.folder))
        deep = work / "a" / "b"  # some values are relative paths, one is ../..
        deep.mkdir(parents=True)
        os.chdir(deep)
        try:
            LocalCacheService(**values).close()
        except LiteCacheError:
            left = [path for path in (work, self.folder / "new") if path.exists()]
            found = [str(path) for each in left for path in each.rglob("*")]
            found = [path for path in found if path not in (str(deep), str(deep.parent))]
            if found or len(left) > 1:
                raise AssertionError(f"left behind: {found or left}") from None
            raise
        finally:
            os.chdir(here)
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(self.folder / "new", ignore_errors=True)

    def call(self) -> Any:
        rng = self.rng
        if rng.random() < 0.3:
            return self.construct()
        core = rng.random() < 0.4
        target: Any = super(PyLocalCacheService, self.py) if core else self.py
        keys: list[Any] = [rng.randrange(2**60) for _ in range(2)]
        pages = rng.choices(range(128), k=70)
        calls: dict[str, list[Any]] = {
            "query": [keys[0] if core else self.tokens],
            "create": ["read", keys, pages] if core else [self.tokens, pages, "r", 0],
            "abort": [None],
            "active_threads": ["read"],
            "flush": [1.0],
            **({"query_many": [keys]} if core else {"hash": [self.tokens]}),
        }
        method = rng.choice(sorted(calls))
        values = calls[method]
        for at in range(len(values)):
            if rng.random() < 0.5:
                held = values[at]
                if isinstance(held, list) and rng.random() < 0.5:
                    values[at] = [*held[:-1], self.any_value()]
                else:
                    values[at] = self.any_value()
        task = getattr(target, method)(*values)
        if hasattr(task, "wait"):
            task.wait(self.any_value())
            if not task.wait(HUNG_S):
                raise AssertionError("a task does not end")
        return None

    def good(self) -> Any:
        task = self.py.create(self.tokens, list(range(70)), "w")
        if not task.wait(HUNG_S):
            raise AssertionError("a task does not end")
        return [state.name for state in task.state()], self.py.query(self.tokens)

    def close(self) -> None:
        self.py.close()


class CommandLine(Entry):
    """In this process; where a command would join a cluster, it is told that there is none."""

    name = "cli"
    commands: ClassVar[dict[str, list[str]]] = {
        "up": ["MODEL", "--group", "--set", "--replicas", "--num-threads", "--address", "--json"],
        "down": ["--group", "--all", "--timeout", "--address", "--json"],
        "status": ["--group", "--address", "--json"],
        "generate": ["MODEL", "PROMPT", "--group", "--set", "--max-new-tokens", "--temperature",
                     "--seed", "--chat", "--address", "--json"],
        "inspect": ["DIRECTORY", "--json"],
        "verify": ["DIRECTORY", "--json"],
        "tune": ["FILE", "--json"],
    }  # fmt: skip

    def run(self, arguments: list[str]) -> tuple[int, str]:
        import litecache.actors.cluster
        import litecache.cli

        out, err = io.StringIO(), io.StringIO()
        connect, argv = litecache.actors.cluster.open_ray, sys.argv

        def refuse(address: str, **options: object) -> None:
            raise GroupUnavailableError("no cluster")

        try:
            litecache.actors.cluster.open_ray = refuse
            sys.argv = ["litecache", *arguments]
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                litecache.cli.main()
        except SystemExit as exit_:
            return int(exit_.code or 0), out.getvalue() + err.getvalue()
        finally:
            litecache.actors.cluster.open_ray, sys.argv = connect, argv
        raise AssertionError("the command did not exit")

    def call(self) -> Any:
        rng = self.rng
        command = rng.choice(sorted(self.commands))
        arguments = [command]
        names = list(self.commands[command])
        if command == "generate":
            names.append("--address")
        for name in rng.sample(names, rng.randrange(len(names))):
            if name.startswith("-"):
                arguments.append(name)
            if name not in ("--json", "--all", "--chat"):
                text = rng.choice(TEXTS)
                arguments.append(text if "\0" not in text and len(text) < 10**5 else "x")
        if command == "generate":
            arguments += ["--address", "nowhere"]  # else a good one would start a model
        status, shown = self.run(arguments)
        if status not in (0, 1, 2) or "Traceback" in shown or "Error: " in shown:
            raise AssertionError(f"{arguments}: status {status}: {shown[-300:]}")
        if status == 2:
            raise LiteCacheError(shown)
        return None

    def good(self) -> Any:
        status, shown = self.run(["inspect", str(self.folder / "no-store")])
        return status, "storage folder" in shown


class Adapter(Entry):
    name = "adapter"
    weight = 3
    settings = (
        "max_new_tokens", "min_new_tokens", "max_length", "do_sample", "temperature", "top_k",
        "top_p", "min_p", "eos_token_id", "pad_token_id", "num_return_sequences", "seed",
        "cache_salt", "stop_token_ids", "stop_strings", "max_time", "repetition_penalty",
        "presence_penalty", "logit_bias", "sequence_bias", "bad_words_ids", "suppress_tokens",
        "no_repeat_ngram_size", "logprobs", "return_dict_in_generate", "streamer", "tokenizer",
        "generation_config", "attention_mask", "num_beams", "use_cache", "promt", "priority",
    )  # fmt: skip

    def __init__(self, rng: random.Random, folder: Path) -> None:
        super().__init__(rng, folder)
        import ray
        from transformers import LlamaConfig

        from litecache.adapter import KVCacheAdapter

        token = folder / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
            object_store_memory=128 * MIB, _temp_dir=str(folder / "r"),
        )  # fmt: skip
        model = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=128, initializer_range=0.2,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        config = CacheConfig(num_blocks=64, dtype="float32", ram_bytes=8 * MIB)
        self.llm = KVCacheAdapter(model, weights="random", cache_config=config, num_threads=1)
        self.ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))

    def call(self) -> Any:
        rng = self.rng
        method = rng.choice(["generate", "generate_batch", "stream", "stats", "abort", "clear"])
        fields = {name: self.any_value() for name in rng.sample(self.settings, rng.randrange(3))}
        fields.setdefault("max_new_tokens", 4)
        first: Any = {"generate": self.ids, "generate_batch": [[3, 4, 5], [6]], "stream": [5, 6],
                      "abort": "r1", "clear": "gpu"}.get(method)  # fmt: skip
        if rng.random() < 0.4:
            first = self.any_value()
        if method == "stats":
            return self.llm.stats()
        if method in ("abort", "clear"):
            return getattr(self.llm, method)(first)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(self.llm, method)(first, **fields)
            return list(made) if method == "stream" else made

    def good(self) -> Any:
        return self.llm.generate(self.ids, max_new_tokens=4).tolist()

    def close(self) -> None:
        import ray

        self.llm.close()
        ray.shutdown()


ENTRIES: list[type[Entry]] = [Config, Environment, Paged, Service, CommandLine, Adapter]


class Fuzz:
    """The calls and their books."""

    def __init__(self, seed: int, folder: Path, names: list[str]) -> None:
        self.seed = seed
        self.entries: list[Entry] = []
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.late: Counter[str] = Counter()
        self.problems: list[str] = []
        self.begun: tuple[float, str] | None = None
        for index, made in enumerate(ENTRIES):
            if made.name in names:
                home = folder / made.name
                home.mkdir()
                self.entries.append(made(random.Random(f"{seed} {index}"), home))
                self.entries[-1].wanted = self.entries[-1].good()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        """A call that hangs cannot be interrupted: tell where it stands, and end."""
        while True:
            time.sleep(1)
            begun = self.begun
            if begun is not None and time.monotonic() - begun[0] > HUNG_S:
                print(f"{begun[1]} hangs", file=sys.stderr)
                faulthandler.dump_traceback()
                os._exit(1)

    def run(self, count: int) -> Iterator[int]:
        chooser = random.Random(self.seed)
        weights = [entry.weight for entry in self.entries]
        for number in range(count):
            (entry,) = chooser.choices(self.entries, weights)
            # each call has a source of its own: call N does not depend on how the others went
            entry.rng.seed(f"{self.seed} {number}")
            self._one(entry, f"call {number} ({entry.name})")
            yield number

    def _one(self, entry: Entry, label: str) -> None:
        begun = time.monotonic()
        self.begun = (begun, label)
        try:
            entry.call()
            outcome = "answered"
        except LiteCacheError as error:
            outcome = "refused"
            if len(str(error)) > 2000:
                self.problems.append(f"{label}: a message of {len(str(error))} characters")
        except Exception as error:
            outcome = "raw"
            self.problems.append(f"{label}: {type(error).__name__}: {error}"[:500])
            self.problems.append("".join(traceback.format_exception(error)[-3:]))
        self.outcomes[entry.name, outcome] += 1
        if time.monotonic() - begun > LATE_S.get(entry.name, 1.0):
            self.late[entry.name] += 1
        self.begun = (time.monotonic(), f"the good call after {label}")
        try:
            if entry.good() != entry.wanted:
                self.problems.append(f"{label}: the next good call gave something else")
        except Exception as error:
            self.problems.append(f"{label}: the next good call: {type(error).__name__}: {error}")
        self.begun = None

    def close(self) -> None:
        for entry in self.entries:
            entry.close()


def orphans() -> set[str]:
    """Shared memory files of shards that are no more."""
    names = (re.fullmatch(r"litecache-(\d+)-.*", name) for name in os.listdir("/dev/shm"))
    return {m[0] for m in names if m is not None and not os.path.exists(f"/proc/{m[1]}")}


def main() -> int:
    arguments = parser("Fuzzed calls of every public entry.")
    arguments.add_argument("--count", type=int, default=5000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--entries", default=",".join(entry.name for entry in ENTRIES))
    options = arguments.parse_args()
    count = min(options.count, 300) if options.quick else options.count
    report = Report("fuzzed public calls", options.json)
    torch.set_num_threads(1)
    # short, because Ray makes sockets under it
    folder = Path(tempfile.mkdtemp(prefix="lc-fz-", dir="/tmp"))
    os.environ["LITECACHE_HOME"] = str(folder / "home")
    left = orphans()
    try:
        fuzz = Fuzz(options.seed, folder, options.entries.split(","))
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("fuzzed calls", total=count)
            for _ in fuzz.run(count):
                progress.advance(task)
        fuzz.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if new := orphans() - left:
        fuzz.problems.append(f"left in /dev/shm: {sorted(new)}")
    for entry in fuzz.entries:
        kinds = {kind: fuzz.outcomes[entry.name, kind] for kind in ("answered", "refused", "raw")}
        kinds["over its time"] = fuzz.late[entry.name]
        report.add(*(Row(entry.name, kind, count, "calls") for kind, count in kinds.items()))
    report.add(Row("all", "problems", len(fuzz.problems), ""))
    report.show()
    for problem in fuzz.problems[:60]:
        print(problem, file=sys.stderr)
    return 1 if fuzz.problems else 0


if __name__ == "__main__":
    sys.exit(main())
