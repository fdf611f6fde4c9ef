"""Headless Chromium, told what to do over its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any


def chromium() -> str | None:
    """The program, None = there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """One page; the browser ends with its `with` block.

    Attributes:
        problems: what the page's console reported: errors, and what its policy refused.
    """

    def __init__(self, url: str, width: int = 1000, height: int = 720) -> None:
        from websockets.sync.client import connect

        self._folder = tempfile.mkdtemp(prefix="lc-chromium-")
        program = chromium()
        assert program is not None
        self._process = subprocess.Popen(
            [
                program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-dev-shm-usage", "--remote-debugging-port=0",
                f"--user-data-dir={self._folder}", f"--window-size={width},{height}", "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._end)
        self.problems: list[str] = []
        self._numbers = itertools.count(1)
        try:
            target = self._target()
            self._socket = self._stack.enter_context(connect(target, max_size=1 << 26))
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.call("Emulation.setDeviceMetricsOverride", **size)
            self.call("Page.navigate", url=url)
        except BaseException:
            self._stack.close()
            raise

    def _target(self) -> str:
        until = time.monotonic() + 60
        file = Path(self._folder) / "DevToolsActivePort"
        while True:
            try:
                port = file.read_text().splitlines()[0]
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
                    pages = [each for each in json.load(answer) if each["type"] == "page"]
                return str(pages[0]["webSocketDebuggerUrl"])
            except (OSError, IndexError):
                assert time.monotonic() < until, "Chromium did not start"
                time.sleep(0.05)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(60))
            level = message.get("params", {}).get("entry", {}).get("level")
            if level == "error" or message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 60) -> None:
        """Until it is true."""
        until = time.monotonic() + timeout_s
        while not self.value(expression):
            shown = self.value("document.body.innerText")
            assert time.monotonic() < until, f"{expression}: {shown}; {self.problems}"
            time.sleep(0.05)

    def picture(self) -> bytes:
        """A PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
