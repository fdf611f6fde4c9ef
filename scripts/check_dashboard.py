"""Every query of the Grafana dashboard, against a real Prometheus that scrapes a real Ray.

    python scripts/check_dashboard.py [--seconds 90] [--hold SECONDS] [--port 9090]

Starts a Ray with its dashboard in a folder of its own, a group of two replicas with a tiny random
model and a small pool over RAM and disk, clients that keep asking, and the Prometheus of this
machine with the configuration that Ray wrote. Installs the dashboard with `litecache dashboard
install`, and after `--seconds` runs each panel's queries. Exits 1 where one is refused, has no
series, or has no number. `--hold` keeps everything running so long, to be looked at. Where no
`prometheus` is installed (Debian: `apt-get install prometheus`) it says so and exits 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from chaos import MIB, tiny_model

GROUP = "default"
WINDOW = "1m"
CLIENTS = 4
PROMPTS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ray(folder: Path, prometheus: int) -> str:
    """A Ray with a dashboard that knows the Prometheus of this port; the dashboard's address."""
    import ray

    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    os.environ |= {"LITECACHE_HOME": str(folder / "home"), "RAY_worker_niceness": "0"}
    # loads of a tiny model are never sooner than computing: here they are to be seen
    os.environ |= {"LITECACHE_LOADS": "all", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_PROMETHEUS_HOST"] = f"http://127.0.0.1:{prometheus}"
    os.environ.pop("RAY_ADDRESS", None)
    context = ray.init(
        address="local", num_cpus=8, include_dashboard=True, dashboard_port=free_port(),
        log_to_driver=False, object_store_memory=128 * MIB, _temp_dir=str(folder / "r"),
        _metrics_export_port=free_port(), logging_level="error",
    )  # fmt: skip
    return str(context.dashboard_url)


def make_group(folder: Path) -> Any:
    from litecache import CacheConfig, KVCacheAdapter

    config = CacheConfig(
        num_blocks=160, dtype="float32", ram_bytes=4 * MIB, storage_dir=str(folder / "kv"),
        storage_bytes=64 * MIB, max_requests=8, device="cpu",
    )  # fmt: skip
    (folder / "kv").mkdir(mode=0o700)
    return KVCacheAdapter(
        tiny_model(), weights="random", cache_config=config, num_threads=1, replicas=2, group=GROUP
    )


def keep_asking(llm: Any, number: int, stop: threading.Event) -> None:
    rng = random.Random(number)
    heads = [random.Random(f"head {n}").choices(range(3, 200), k=220) for n in range(PROMPTS)]
    while not stop.is_set():
        head = rng.choice(heads)[: rng.randrange(40, 220)]
        prompt = head + rng.choices(range(3, 200), k=rng.randrange(1, 30))
        llm.generate_batch([prompt], max_new_tokens=rng.randrange(4, 40))
        stop.wait(rng.random() / 10)


def start_prometheus(program: str, folder: Path, port: int) -> subprocess.Popen[bytes]:
    import ray

    session = ray._private.worker._global_node.get_session_dir_path()
    with (folder / "prometheus.log").open("wb") as log:
        return subprocess.Popen(
            [
                program,
                f"--config.file={session}/metrics/prometheus/prometheus.yml",
                f"--web.console.templates={session}/metrics/prometheus/consoles",
                f"--storage.tsdb.path={folder}/tsdb",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def ask(port: int, expr: str) -> list[dict[str, Any]]:
    """The series of an instant query; ValueError with what Prometheus says against it."""
    expr = expr.replace("$__rate_interval", WINDOW).replace("$group", ".*")
    query = urllib.parse.urlencode({"query": expr})
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=20
        ) as r:
            answer = json.load(r)
    except urllib.error.HTTPError as error:
        raise ValueError(error.read().decode()[:300]) from error
    series: list[dict[str, Any]] = answer["data"]["result"]
    return series


def check(port: int) -> int:
    """Run every query and show what came; how many have failed."""
    from rich.console import Console
    from rich.table import Table

    from litecache.cli.grafana import panels

    table = Table(title="panels of the dashboard", title_justify="left")
    for column in ("panel", "legend", "series", "values now", ""):
        table.add_column(column)
    failed = 0
    for panel in panels():
        for query in panel.queries:
            said, values, count = "ok", "", 0
            try:
                series = ask(port, query.expr)
                numbers = [float(one["value"][1]) for one in series]
                numbers = [number for number in numbers if math.isfinite(number)]
                count, values = len(series), ", ".join(f"{n:.3g}" for n in numbers[:5])
                if not numbers:
                    said = "no number" if series else "empty"
            except ValueError as error:
                said = str(error)
            failed += said != "ok"
            table.add_row(panel.title, query.legend, str(count), values, said)
    Console(width=140).print(table)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="of load before the queries")
    parser.add_argument("--hold", type=float, default=0.0, help="keep all running so long after")
    parser.add_argument("--port", type=int, help="of Prometheus; default: a free one")
    args = parser.parse_args()
    program = shutil.which("prometheus")
    if program is None:
        print("skipped: no prometheus on this machine (Debian: apt-get install prometheus)")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="lc-dash-", dir="/tmp"))
    port, stop = args.port or free_port(), threading.Event()
    prometheus: subprocess.Popen[bytes] | None = None
    import ray

    try:
        dashboard = start_ray(folder, port)
        with make_group(folder) as llm:
            command = [sys.executable, "-m", "litecache.cli", "dashboard", "install"]
            address = ray.get_runtime_context().gcs_address
            installed = subprocess.run(
                [*command, "--address", address, "--json"], capture_output=True, text=True,
                check=True,
            )  # fmt: skip
            print(f"dashboard: {json.loads(installed.stdout)['file']}")
            prometheus = start_prometheus(program, folder, port)
            print(f"panels: http://127.0.0.1:{port}/consoles/litecache.html")
            print(f"Ray: http://{dashboard}, its token in {folder}/token", flush=True)
            clients = [
                threading.Thread(target=keep_asking, args=(llm, number, stop), daemon=True)
                for number in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            time.sleep(args.seconds)
            failed = check(port)
            print(f"{failed} queries failed" if failed else "every query has data", flush=True)
            time.sleep(args.hold)
            stop.set()
            for client in clients:
                client.join()
    finally:
        stop.set()
        if prometheus is not None:
            prometheus.terminate()
            prometheus.wait()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
