"""A shard in a process of its own, driven by lines: one `(method, args)` in, one result out.

Run as a script it is the shard; `ShardProcess` starts, stops, kills and calls it.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from typing import Any

from litecache.errors import StorageError
from litecache.storage import (
    Attachment,
    CommitItem,
    CommitStatus,
    FlushReport,
    ShardStore,
    SlotRef,
    StageResult,
    StageStatus,
)

NAMES = {
    kind.__name__: kind for kind in (Attachment, CommitItem, FlushReport, SlotRef, StageResult)
}
MIB = 1 << 20


class ShardProcess:
    """The test's end of the pipe."""

    def __init__(self, folder: str, ram_bytes: int = 1 * MIB) -> None:
        self.child = subprocess.Popen(
            [sys.executable, __file__, folder, str(ram_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=os.path.dirname(__file__),
        )
        self._hear(30)

    def send(self, method: str, *args: Any) -> None:
        """Ask without waiting for the answer."""
        plain = tuple(_plain(arg) for arg in args)
        assert self.child.stdin is not None
        self.child.stdin.write(f"{(method, plain)!r}\n")
        self.child.stdin.flush()

    def call(self, method: str, *args: Any) -> Any:
        """A method of the store; StorageError when it raised one."""
        self.send(method, *args)
        return self.answer()

    def answer(self, timeout_s: float = 60) -> Any:
        """The result of the oldest call that has none yet."""
        said = self._hear(timeout_s)
        if isinstance(said, str) and said.startswith("error: "):
            raise StorageError(said)
        return said

    def _hear(self, timeout_s: float) -> Any:
        assert self.child.stdout is not None
        ready, _, _ = select.select([self.child.stdout], [], [], timeout_s)
        assert ready, "the shard does not answer"
        return eval(self.child.stdout.readline(), NAMES)

    def silent(self, for_s: float) -> bool:
        """Whether it says nothing for a while."""
        return not select.select([self.child.stdout], [], [], for_s)[0]

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        os.kill(self.child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.child.pid, os.WSTOPPED)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.child.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout):
            stream.close()


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, tuple):
        # enums are read back as the integers that they are
        return tuple(int(each) if isinstance(each, int) else each for each in value)
    return value


def serve(folder: str, ram_bytes: int) -> None:
    store = ShardStore(folder, storage_bytes=16 * MIB, ram_bytes=ram_bytes, fsync_interval_s=0.01)
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        method, args = eval(line)
        if method == "commit":
            client_id, items = args
            args = client_id, [CommitItem(*item) for item in items]
        try:
            answer = getattr(store, method)(*args)
        except StorageError as error:
            answer = f"error: {error}"
        print(_say(answer), flush=True)


def _say(answer: Any) -> str:
    if isinstance(answer, list):
        return "[" + ", ".join(_say(each) for each in answer) + "]"
    if isinstance(answer, StageResult):
        return f"StageResult({int(answer.status)}, {answer.slot}, {answer.generation})"
    if isinstance(answer, (CommitStatus, StageStatus)):
        return str(int(answer))
    return repr(answer)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
