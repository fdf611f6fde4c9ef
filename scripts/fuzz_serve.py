"""Requests that nobody should send to a running server: none may fail it, and the next is answered.

    python scripts/fuzz_serve.py [--count 10000] [--seed 0] [--json FILE]
    python scripts/fuzz_serve.py --url http://127.0.0.1:8000 [--key KEY]

Without `--url` it starts `litecache serve` over a tiny model, with a Ray, a token and folders of
its own; with it, what is cached under the key may be gone afterwards. Requests are made from the
server's OpenAPI document (`tests/serving/schema_fuzz.py`), for all of its endpoints; request N of a
seed is the same in every run. Between them a good request must give the same answer each time.
Exits 1 when an answer was a 5xx or no error of OpenAI's shape, none came, the good answer changed,
or a block stayed in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
from bench_common import Report, Row, parser
from rich.progress import Progress

for _folder in ("engine", "adapter", "serving"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / _folder))

CLIENTS = 8
GOOD_EACH = 100
TIMEOUT_S = 60.0


@contextlib.contextmanager
def own_server() -> Iterator[tuple[str, str]]:
    """A server of this script's own: its URL, and a key."""
    from served import ALICE, save_tiny_model, start, write_keys

    folder = Path(tempfile.mkdtemp(prefix="lc-fs-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.update(
        LITECACHE_HOME=str(folder / "home"),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_worker_niceness="0",  # Ray gives workers 15: beside other work answers took a minute
    )
    (folder / "store").mkdir()
    keys = write_keys(folder / "keys")
    try:
        cache = {"storage_dir": folder / "store", "num_blocks": 256, "ram_bytes": "16MB"}
        server = start(save_tiny_model(folder / "tiny"), folder, "--api-keys", str(keys), **cache)
        try:
            yield server.url, ALICE
            server.await_idle()
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Run:
    """All requests of a run, and what came of them."""

    def __init__(self, url: str, key: str, count: int, seed: int) -> None:
        self._url, self._headers = url, {"authorization": f"Bearer {key}"} if key else {}
        self._seeds = iter(range(seed * 1_000_003, seed * 1_000_003 + count))
        self.count = count
        self.statuses: Counter[int] = Counter()
        self.endpoints: Counter[str] = Counter()
        self.faults: list[str] = []
        self.slowest_s = 0.0
        self._wanted: Any = None

    async def run(self, done: Any) -> None:
        """Send all of them; `done` is called after each."""
        from schema_fuzz import SchemaFuzz

        async with httpx2.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=TIMEOUT_S
        ) as client:
            document = (await client.get("/openapi.json")).json()
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            self._good = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0}
            await self._check_good(client)
            fuzzes = [SchemaFuzz(document, model) for _ in range(CLIENTS)]
            await asyncio.gather(*(self._client(client, fuzz, done) for fuzz in fuzzes))
            await self._check_good(client)

    async def _client(self, client: httpx2.AsyncClient, fuzz: Any, done: Any) -> None:
        from schema_fuzz import fault

        for seed in self._seeds:
            method, path, headers, body = fuzz.request(seed)
            begun = time.perf_counter()
            try:
                answer = await client.request(method, path, headers=headers, content=body)
            except httpx2.HTTPError as error:
                self.faults.append(f"request {seed}, {method} {path}: {error!r}")
                continue
            self.slowest_s = max(self.slowest_s, time.perf_counter() - begun)
            self.statuses[answer.status_code] += 1
            self.endpoints[path if path in fuzz.bodies or path in fuzz.gets else "other"] += 1
            wrong = fault(answer.status_code, answer.text, method)
            if wrong is not None:
                self.faults.append(f"request {seed}, {method} {path} {body[:300]!r}: {wrong}")
            if seed % GOOD_EACH == 0:
                await self._check_good(client)
            done()

    async def _check_good(self, client: httpx2.AsyncClient) -> None:
        answer = await client.post("/v1/completions", json=self._good)
        if answer.status_code == 429:
            return
        told = answer.json().get("choices")
        self._wanted = self._wanted or told
        if told is None or told != self._wanted:
            self.faults.append(f"a good request got {answer.text[:300]}")


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--count", type=int, default=10_000, help="requests")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--url", help="of a server that runs")
    arguments.add_argument("--key", default="", help="of that server")
    options = arguments.parse_args()
    count = 300 if options.quick else options.count
    report = Report("Malformed requests to a server", options.json)
    given = contextlib.nullcontext((options.url, options.key)) if options.url else own_server()
    with given as (url, key), Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("requests", total=count)
        run = Run(url, key, count, options.seed)
        begun = time.monotonic()
        asyncio.run(run.run(lambda: progress.advance(task)))
        took_s = time.monotonic() - begun
    report.add(Row("all", "requests", run.count, "requests"))
    report.add(Row("all", "time", took_s, "s"))
    report.add(Row("all", "slowest answer", run.slowest_s, "s", limit=TIMEOUT_S))
    report.add(Row("all", "faults", len(run.faults), "requests", limit=0))
    for status, number in sorted(run.statuses.items()):
        report.add(Row(f"status {status}", "answers", number, "requests"))
    for path, number in sorted(run.endpoints.items()):
        report.add(Row(path, "requests", number, "requests"))
    for each in run.faults[:50]:
        sys.stderr.write(f"{each}\n")
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
