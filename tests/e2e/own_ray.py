"""A Ray with a dashboard of a test's own, that meets no other Ray of the machine.

`ray start` gives each of its servers a fixed port unless told otherwise, and a second Ray then
talks to the first one's: here all of them are free ones. It ends by the mark that all of its
processes have in their environment, since `ray stop` would end every Ray of the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

_MARK = "LITECACHE_TEST_RAY"
_BIN = Path(sys.executable).parent
_PORTS = (
    *("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"),
    *("metrics-export-port", "runtime-env-agent-port", "ray-client-server-port"),
    *("node-manager-port", "object-manager-port"),
)


class OwnRay:
    """A head node.

    Attributes:
        address: for `ray.init`.
        dashboard: URL, where jobs are submitted.
        metrics: URL of the page that Prometheus reads.
        env: what a process needs to be its driver.
        folder: its temporary folder, with the logs of the session.
    """

    def __init__(self, num_cpus: int, env: Mapping[str, str], umask: int = 0o022) -> None:
        # short: the path of a socket ends at 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="lc-ray-", dir="/tmp"))
        self._mark = uuid.uuid4().hex
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self.address = f"127.0.0.1:{ports['port']}"
        self.dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.metrics = f"http://127.0.0.1:{ports['metrics-export-port']}/metrics"
        self._umask = umask
        self.env = {**os.environ, **env, "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}"}
        self.env.pop("RAY_ADDRESS", None)
        self.env["RAY_USAGE_STATS_ENABLED"] = "0"
        command = [str(_BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address", "127.0.0.1", "--temp-dir", str(self.folder / "r")]
        command += [f"--num-cpus={num_cpus}", f"--object-store-memory={128 << 20}"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        self._log = (self.folder / "start.log").open("w")
        subprocess.Popen(
            command,
            env={**self.env, _MARK: self._mark},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            umask=umask,
        )
        self.env["RAY_ADDRESS"] = self.address
        try:
            self._await_dashboard(time.monotonic() + 90)
        except BaseException:
            self.close()
            raise

    def _await_dashboard(self, deadline: float) -> None:
        """Jobs are taken once an agent has registered; `ray job submit` itself does not wait."""
        from ray.job_submission import JobSubmissionClient

        while True:
            try:
                with urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=2):
                    break
            except urllib.error.HTTPError:
                break  # it asks for the token
            except OSError:
                if time.monotonic() > deadline:
                    text = Path(self._log.name).read_text()
                    raise AssertionError(f"Ray did not start: {text}") from None
            time.sleep(0.2)
        client = JobSubmissionClient(self.dashboard)
        while True:
            try:
                client.submit_job(entrypoint="true")
            except RuntimeError as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"Ray takes no jobs: {error}") from None
            else:
                return
            time.sleep(0.5)

    def start_job(self, *command: str, working_dir: Path) -> subprocess.Popen[str]:
        """`ray job submit --working-dir DIR -- COMMAND`, as a user types it."""
        submit = [str(_BIN / "ray"), "job", "submit", "--address", self.dashboard]
        submit += ["--working-dir", str(working_dir), "--", *command]
        return subprocess.Popen(
            submit, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, *command: str, cwd: Path, timeout_s: float = 400) -> str:
        """Run a driver to its end; what it printed."""
        done = subprocess.run(
            command,
            env=self.env,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            umask=self._umask,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def processes(self) -> list[int]:
        """All processes that come from this Ray, its jobs and their actors."""
        mark = f"{_MARK}={self._mark}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def close(self) -> None:
        """End every process and remove the folder."""
        deadline = time.monotonic() + 60
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def own_ray(num_cpus: int = 4, umask: int = 0o022, **env: str) -> Iterator[OwnRay]:
    """A Ray of the caller's own for a while; all of its processes have that umask."""
    ray = OwnRay(num_cpus, env, umask)
    try:
        yield ray
    finally:
        ray.close()


def free_ports(count: int) -> list[int]:
    """Different ports that nobody uses now, below those that the system gives out by itself."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        first = 20_000 + os.getpid() * 37 % 8_000
        for port in range(first, 32_000):
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise AssertionError("no free ports")
