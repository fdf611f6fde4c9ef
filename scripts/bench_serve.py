"""What the HTTP interface costs: the server against the adapter that it is made of, in one run.

    python scripts/bench_serve.py [--rounds 5] [--clients 32] [--requests 2] [--tokens 64]
        [--only hop throughput structured] [--model NAME] [--threads N] [--json FILE] [--quick]

Without --model SmolLM2-135M in float32, from the packaged file. One group of actors answers both:
an adapter in this process, and an application of Ray Serve that has joined the group.

hop         first token of a prompt at one client, new each time: through the adapter, through the
            server as a stream, and the first byte of an application of Ray Serve that does nothing;
            in turns. Promised: the adapter's + the bare application's + 2 ms.
throughput  tokens/s of `--clients` clients, each with `--requests` requests one after the other:
            through the adapter, through the server in one piece (promised 0.9 of the adapter's) and
            as streams (0.8); in turns.
structured  tokens/s of one client and of eight: plain greedy answers, and answers of a form (a list
            of numbers, where nothing is forced, and one of records, where their keys are) of the
            same length, all through the server; in turns.

Clients, server and engine share the machine's cores: on few cores the clients are part of the cost.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import aiohttp
from bench_common import Report, Row, alternate, own_ray, parser, summarise
from ray import serve

from litecache import CacheConfig, KVCacheAdapter
from litecache.adapter.gguf import convert_gguf, packaged_gguf
from litecache.serving import build_app

CASES = ("hop", "throughput", "structured")
GROUP = "bench-serve"
HOP_SLACK_MS = 2.0
HOP_TOKENS = 4  # after the first nothing of an answer is measured
SHARES = {"in one piece": 0.9, "as a stream": 0.8}
RECORD = {
    "type": "object",
    "properties": {"first_name": {"enum": ["Ada", "Grace", "Alan"]}, "age": {"type": "integer"}},
    "required": ["first_name", "age"],
    "additionalProperties": False,
}
FORMS = {
    "numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 1000},
    "records": {"type": "array", "items": RECORD, "minItems": 1000},
}


@serve.deployment(name="Bare", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1 << 16)
@serve.ingress()
class Bare:
    """An application that answers at once: what Ray Serve itself costs."""

    def __serve_build_asgi_app__(self) -> Callable[..., Awaitable[None]]:
        """Reads a body and sends an event."""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return
            while (await receive()).get("more_body"):
                pass
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

        return app


class Bench:
    """The adapter, the server over the same group, and a bare application.

    Args:
        llm: opened; its group is the server's.
        url: of Ray Serve.
        tokens: new ones a request.
    """

    def __init__(self, llm: KVCacheAdapter, url: str, tokens: int) -> None:
        self.llm, self.url, self.tokens = llm, url, tokens
        self._dice = random.Random(time.time())
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None

    def prompt(self, length: int = 64) -> list[int]:
        """Tokens that nobody has seen."""
        return self._dice.choices(range(100, self.llm.info.vocab_size - 100), k=length)

    def run(self, work: Coroutine[Any, Any, float]) -> float:
        """On the loop of the clients."""
        return self._loop.run_until_complete(work)

    async def session(self) -> aiohttp.ClientSession:
        """Of all clients, with a connection for each."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=600),
            )
        return self._session

    async def through_adapter(self, prompt: list[int], tokens: int = 0) -> float:
        """Seconds to the first token; reads to the end."""
        started, first, tokens = time.perf_counter(), 0.0, tokens or self.tokens
        (row,) = self.llm.submit(
            [prompt], streaming=True, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        async for _ in row.astream():
            first = first or time.perf_counter() - started
        return first

    async def through_server(
        self, prompt: list[int], tokens: int = 0, *, stream: bool = True, schema: Any = None
    ) -> float:
        """The same over HTTP; in one piece the first token is the last.

        `schema` is of a form that so many tokens do not complete.
        """
        body = {
            "model": "bench", "prompt": prompt, "max_tokens": tokens or self.tokens,
            "ignore_eos": True, "temperature": 0, "stream": stream,
        }  # fmt: skip
        if schema is not None:
            form = {"type": "json_schema", "json_schema": {"name": "bench", "schema": schema}}
            body["response_format"] = form
        session = await self.session()
        started, first = time.perf_counter(), 0.0
        async with session.post(f"{self.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(await answer.text())
            async for _ in answer.content.iter_any():
                first = first or time.perf_counter() - started
        return first

    async def through_bare(self) -> float:
        """Seconds to the first byte of the bare application."""
        session = await self.session()
        started = time.perf_counter()
        async with session.post(f"{self.url}/bare", json={"prompt": self.prompt()}) as answer:
            await answer.content.readany()
            first = time.perf_counter() - started
            await answer.read()
        return first

    async def many(
        self, clients: int, requests: int, ask: Callable[[list[int]], Awaitable[float]]
    ) -> float:
        """Tokens per second of so many clients, each asking one request after the other."""

        async def client() -> None:
            for _ in range(requests):
                await ask(self.prompt())

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return clients * requests * self.tokens / (time.perf_counter() - started)

    def close(self) -> None:
        """End the clients."""

        async def end() -> float:
            if self._session is not None:
                await self._session.close()
            return 0.0

        self.run(end())
        self._loop.close()


def hop(bench: Bench, report: Report, rounds: int) -> bool:
    """First tokens at one client; whether the promise holds."""

    def median(ask: Callable[[], Coroutine[Any, Any, float]]) -> Callable[[], float]:
        return lambda: 1e3 * statistics.median(bench.run(ask()) for _ in range(10))

    samples = alternate(
        rounds,
        {
            "adapter": median(lambda: bench.through_adapter(bench.prompt(), HOP_TOKENS)),
            "server": median(lambda: bench.through_server(bench.prompt(), HOP_TOKENS)),
            "bare": median(bench.through_bare),
        },
    )
    figures = {name: summarise(values) for name, values in samples.items()}
    more = [a - b for a, b in zip(samples["server"], samples["adapter"], strict=True)]
    allowed = [value + HOP_SLACK_MS for value in samples["bare"]]
    over, limit = statistics.median(more), statistics.median(allowed)
    for name, says in (("adapter", ""), ("server", ""), ("bare", "first byte of an empty answer")):
        figure = figures[name]
        report.add(Row("one client", f"first token, {name}", figure.median, "ms", peer=says or None,
                       spread=figure.spread, samples=figure.samples))  # fmt: skip
    held = over <= limit
    says = f"bare + {HOP_SLACK_MS:g} ms: {'held' if held else 'NOT held'}"
    report.add(Row("one client", "server over adapter", over, "ms", limit, over / limit, says,
                   summarise(more).spread, len(more)))  # fmt: skip
    return held


def throughput(bench: Bench, report: Report, rounds: int, clients: int, requests: int) -> bool:
    """Tokens per second of many clients; whether the promises hold."""

    def measured(ask: Callable[[list[int]], Awaitable[float]]) -> Callable[[], float]:
        return lambda: bench.run(bench.many(clients, requests, ask))

    samples = alternate(
        rounds,
        {
            "adapter": measured(bench.through_adapter),
            "in one piece": measured(lambda prompt: bench.through_server(prompt, stream=False)),
            "as a stream": measured(bench.through_server),
        },
    )
    own = summarise(samples["adapter"])
    case, good = f"{clients} clients", True
    report.add(Row(case, "adapter", own.median, "tokens/s", spread=own.spread, samples=own.samples))
    for name, share in SHARES.items():
        ratios = [a / b for a, b in zip(samples[name], samples["adapter"], strict=True)]
        figure, ratio = summarise(samples[name]), statistics.median(ratios)
        good = good and ratio >= share
        says = f"the adapter's, promised {share}: {'held' if ratio >= share else 'NOT held'}"
        report.add(Row(case, f"server, {name}", figure.median, "tokens/s", own.median, ratio, says,
                       figure.spread, figure.samples))  # fmt: skip
    return good


def structured(bench: Bench, report: Report, rounds: int, requests: int) -> None:
    """Tokens per second of answers of a form, and of plain ones of the same length."""

    def measured(clients: int, schema: Any) -> Callable[[], float]:
        def ask(prompt: list[int]) -> Awaitable[float]:
            return bench.through_server(prompt, stream=False, schema=schema)

        return lambda: bench.run(bench.many(clients, requests, ask))

    for clients in (1, 8):
        kinds = {"plain": None, **FORMS}
        samples = alternate(rounds, {k: measured(clients, kinds[k]) for k in kinds})
        plain = summarise(samples["plain"])
        case = f"{clients} forms"
        report.add(Row(case, "plain", plain.median, "tokens/s", spread=plain.spread,
                       samples=plain.samples))  # fmt: skip
        for name in FORMS:
            figure = summarise(samples[name])
            ratio = statistics.median(
                a / b for a, b in zip(samples[name], samples["plain"], strict=True)
            )
            report.add(Row(case, name, figure.median, "tokens/s", plain.median, ratio,
                           "of plain ones", figure.spread, figure.samples))  # fmt: skip


def free_port() -> int:
    """Of this machine alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--clients", type=int, default=32)
    made.add_argument("--requests", type=int, default=2, help="of each client and round")
    made.add_argument("--tokens", type=int, default=64, help="new ones a request")
    made.add_argument("--model", default=None)
    made.add_argument("--threads", type=int, default=None, help="of the engine; none = all cores")
    options = made.parse_args()
    if options.quick:
        options.rounds, options.clients, options.requests, options.tokens = 1, 4, 1, 8
    model = options.model or str(convert_gguf(packaged_gguf()))
    report = Report("Serving", options.json)
    own_ray()
    port = free_port()
    good = []
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        config = CacheConfig(storage_dir=folder, storage_bytes="1GB", ram_bytes="256MB")
        with KVCacheAdapter(
            model, cache_config=config, group=GROUP, num_threads=options.threads
        ) as llm:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            served = {"model": model, "served_name": "bench", "group": GROUP}
            serve.run(build_app(served), name="litecache", route_prefix="/")
            serve.run(Bare.bind(), name="bare", route_prefix="/bare")
            bench = Bench(llm, f"http://127.0.0.1:{port}", options.tokens)
            try:
                wait_until_ready(bench)
                if "hop" in options.only:
                    good.append(hop(bench, report, options.rounds))
                if "throughput" in options.only:
                    good.append(throughput(
                        bench, report, options.rounds, options.clients, options.requests
                    ))  # fmt: skip
                if "structured" in options.only:
                    structured(bench, report, options.rounds, options.requests)
            finally:
                bench.close()
                serve.shutdown()
    report.show()
    return 0 if all(good) or options.quick else 1


def wait_until_ready(bench: Bench) -> None:
    """Until the server has joined the group."""

    async def ready() -> float:
        session = await bench.session()
        for _ in itertools.count():
            async with session.get(f"{bench.url}/ready") as answer:
                if answer.status == 200:
                    return 0.0
                told = json.dumps(await answer.text())
            if "failed" in told:
                raise RuntimeError(told)
            await asyncio.sleep(0.2)
        return 0.0

    bench.run(ready())


if __name__ == "__main__":
    sys.exit(main())
