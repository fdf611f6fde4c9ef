"""Ray nodes that share nothing but a network, on one machine, as root.

The head is this machine's; every other node has namespaces of its own for network, processes,
mounts and shared memory: other hosts, as far as LiteCache and Ray can tell. A node's link can be
cut and mended, and the node can die, at any instant. chaos.py and tests/actors/failure_world.py use
it; `available` says whether this machine lets them.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OBJECT_STORE_BYTES = 128 << 20


def available() -> bool:
    """Whether this process may make namespaces and links."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return False
    name = f"lcp{os.getpid() % 100_000}"
    made = subprocess.run(
        ["ip", "link", "add", name, "type", "bridge"], capture_output=True, check=False
    )
    if made.returncode == 0:
        subprocess.run(["ip", "link", "del", name], check=False)
    entered = ["unshare", "--net", "--mount", "--pid", "--ipc", "--fork", "true"]
    return made.returncode == 0 and not subprocess.run(entered, capture_output=True).returncode


class ThisMachine:
    """Where actors run that are on no node of their own; the same questions as a `SeparateNode`.

    Attributes:
        name: for reports.
        root: its file system.
    """

    name, root = "head", Path("/")

    def signal(self, pid: int, number: signal.Signals) -> bool:
        """Send a signal to a process; False where there is none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def host_pid(self, pid: int) -> int:
        """This machine's id of the process that has this id there."""
        return pid


class SeparateNode:
    """A node in namespaces of its own.

    Attributes:
        name: also the name of a custom resource that it alone has.
        address: of its network interface.
        root: its file system, as seen from here.
    """

    def __init__(self, nodes: SeparateNodes, number: int) -> None:
        self._nodes, self.name = nodes, f"node{number}"
        self.address = f"{nodes.network}.{number + 1}"
        self._link = f"{nodes.bridge}n{number}"
        self._log = nodes.folder / f"{self.name}.log"
        folder = nodes.folder
        sizes = {folder / "r": "", folder / "run": "", nodes.store: f",size={nodes.store_bytes}"}
        private = " && ".join(
            f"mkdir -p {path} && mount -t tmpfs -o mode=700{size} none {path}"
            for path, size in ((shlex.quote(str(path)), size) for path, size in sizes.items())
        )
        ray = shlex.join(
            [
                *_ray("start"), f"--address={nodes.address}", "--block",
                f"--node-ip-address={self.address}", *_resources(self.name, nodes.cpus),
            ]
        )  # fmt: skip
        script = (
            f"mount -t tmpfs none /dev/shm && {private} && ip link set lo up && read go && "
            f"ip addr add {self.address}/24 dev inside && ip link set inside up && {ray}; exit 1"
        )
        command = ["unshare", "--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--mount-proc", "sh", "-c", script],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            inside = self._wait_for_child()
            ends = "add", self._link, "type", "veth", "peer", "name", "inside", "netns", inside
            _ip("link", *ends)
            _ip("link", "set", self._link, "master", nodes.bridge, "up")
        except BaseException:
            self.die()
            raise
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    def _wait_for_child(self) -> str:
        """Process id of what runs in the namespaces, once it does."""
        pid, deadline = self._process.pid, time.monotonic() + 20
        children, ours = Path(f"/proc/{pid}/task/{pid}/children"), os.readlink("/proc/self/ns/net")
        while time.monotonic() < deadline:
            found = children.read_text().split()
            if found and os.readlink(f"/proc/{found[0]}/ns/net") != ours:
                self._inside, self.root = found[0], Path(f"/proc/{found[0]}/root")
                return self._inside
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} did not start: {self._log.read_text()}")

    def signal(self, pid: int, number: signal.Signals) -> bool:
        """Send a signal to a process that has this id on the node; False where there is none."""
        enter = ["nsenter", "--target", self._inside, "--pid", "--mount"]
        kill = ["sh", "-c", f"kill -{number.value} {pid}"]
        return not subprocess.run([*enter, *kill], capture_output=True, check=False).returncode

    def host_pid(self, pid: int) -> int:
        """This machine's id of the process that has this id there; 0 = there is none."""
        space = os.readlink(f"/proc/{self._inside}/ns/pid")
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                line = next(x for x in status.read_text().splitlines() if x.startswith("NSpid:"))
                if line.split()[-1] == str(pid) and os.readlink(status.parent / "ns/pid") == space:
                    return int(status.parent.name)
        return 0

    def cut(self) -> None:
        """From now on nothing that is sent arrives, and nobody is told."""
        _ip("link", "set", self._link, "nomaster")

    def mend(self) -> None:
        """The inverse of `cut`."""
        _ip("link", "set", self._link, "master", self._nodes.bridge)

    @contextlib.contextmanager
    def is_cut(self) -> Iterator[None]:
        """Cut for as long as this is open."""
        self.cut()
        try:
            yield
        finally:
            self.mend()

    def die(self) -> None:
        """All processes of the node end at once, as by a power cut."""
        self._process.kill()
        self._process.wait()


class SeparateNodes:
    """A Ray cluster: a head in this machine's own namespaces, and others.

    Args:
        folder: of the run, empty, with a short path; tokens, logs and stores are in it.
        count: nodes beside the head.
        cpus: of each node, as actors count them.
        store_bytes: that the folder `store` holds on each other node.

    Attributes:
        address: of the cluster, for `ray.init`.
        store: an empty folder, another one on each node.
    """

    def __init__(
        self, folder: Path, count: int = 1, cpus: int = 4, store_bytes: int = 64 << 20
    ) -> None:
        self.folder, self.store, self.cpus = folder, folder / "store", cpus
        self.store_bytes = store_bytes
        number = random.SystemRandom().randrange(1, 255)
        self.network, self.bridge = f"10.213.{number}", f"lcb{number}"
        (folder / "run").mkdir(mode=0o700)
        self.store.mkdir(mode=0o700, exist_ok=True)
        os.environ["XDG_RUNTIME_DIR"] = str(folder / "run")
        self.nodes: list[SeparateNode] = []
        self._head: subprocess.Popen[bytes] | None = None
        _ip("link", "add", self.bridge, "type", "bridge")
        try:
            _ip("addr", "add", f"{self.network}.1/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
            self._start_head()
            self.nodes = [SeparateNode(self, number) for number in range(1, count + 1)]
        except BaseException:
            self.close()
            raise

    def _start_head(self) -> None:
        with socket.socket() as probe:
            probe.bind((f"{self.network}.1", 0))
            port = probe.getsockname()[1]
        self.address = f"{self.network}.1:{port}"
        command = [
            *_ray("start"), "--head", "--block", f"--port={port}", "--include-dashboard=false",
            f"--node-ip-address={self.network}.1", f"--temp-dir={self.folder / 'r'}",
            *_resources("head", self.cpus),
        ]  # fmt: skip
        with (self.folder / "head.log").open("wb") as log:
            self._head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._head.poll() is None:
            with (
                contextlib.suppress(OSError),
                socket.create_connection((f"{self.network}.1", port)),
            ):
                return
            time.sleep(0.1)
        raise RuntimeError(f"no head: {(self.folder / 'head.log').read_text()[-2000:]}")

    def connect(self, timeout_s: float = 90) -> None:
        """`ray.init`, and wait until all nodes are there."""
        import ray

        deadline = time.monotonic() + timeout_s
        ray.init(
            self.address, log_to_driver=False, logging_level="error",
            _node_ip_address=f"{self.network}.1",
        )  # fmt: skip
        while sum(node["Alive"] for node in ray.nodes()) < 1 + len(self.nodes):
            if time.monotonic() > deadline:
                logs = [(self.folder / f"{n.name}.log").read_text()[-1500:] for n in self.nodes]
                raise RuntimeError(f"nodes are missing: {logs}")
            time.sleep(0.1)

    def node_of(self, node_id: str) -> SeparateNode | None:
        """The node that Ray knows by this id; None: the head."""
        import ray

        addresses = {each["NodeID"]: each["NodeManagerAddress"] for each in ray.nodes()}
        return next((n for n in self.nodes if n.address == addresses.get(node_id)), None)

    def close(self) -> None:
        """End all processes of all nodes."""
        for node in self.nodes:
            node.die()
        if self._head is not None:
            self._head.terminate()
            try:
                self._head.wait(20)
            except subprocess.TimeoutExpired:
                self._head.kill()
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)


def _ip(*arguments: Any) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True)


def _ray(command: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", command]


def _resources(name: str, cpus: int) -> list[str]:
    return [
        f"--num-cpus={cpus}", "--num-gpus=0", f'--resources={{"{name}": 1}}',
        f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats",
    ]  # fmt: skip
