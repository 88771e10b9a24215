"""A real browser without a window, told what to do over its debugging pipe."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from servers.process import wait_for

OPTIONS = (
    "--headless",
    "--no-sandbox",  # root may not have one
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Chromium:
    """One page. Commands and events are those of the Chrome DevTools Protocol: JSON, each ended by
    a zero byte, in descriptor 3 and out of descriptor 4."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._data = b""
        self._last_id = 0
        self._session: dict[str, str] = {}
        self.events: list[tuple[str, Any]] = []

    def __enter__(self) -> Self:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        fds = f"3<&{to_read} 4>&{to_write} {to_read}<&- {to_write}>&-"
        command = f'exec chromium {" ".join(OPTIONS)} "$1" {fds}'
        with (self._directory / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", command, "bash", f"--user-data-dir={self._directory}/profile"],
                pass_fds=(to_read, to_write),
                stdout=log,
                stderr=log,
                env={**os.environ, "HOME": str(self._directory)},
                start_new_session=True,
            )
        os.close(to_read)
        os.close(to_write)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        for domain in ("Network", "Page", "Runtime", "Log", "Security"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)  # which ends it, but not all of its children at once
        os.close(self._from)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        wait_for(self._is_killed, 20, "the end of chromium's processes")

    def _is_killed(self) -> bool:
        self._process.poll()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return True
        return False

    def call(self, method: str, **parameters: object) -> Any:
        """Carry out a command and return its result; events that come meanwhile are kept."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._last_id:
            if "method" in answer:
                self.events.append((answer["method"], answer["params"]))
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self, timeout: float = 30) -> Any:
        deadline = time.monotonic() + timeout
        while b"\0" not in self._data:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._from], [], [], left)[0], "chromium does not answer"
            data = os.read(self._from, 1 << 16)
            assert data, (self._directory / "chromium.log").read_text("utf-8", "replace")
            self._data += data
        message, _, self._data = self._data.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Show a page, and wait until it and all that it needs has come."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for(lambda: "Page.loadEventFired" in dict(self.events))
        self.run("new Promise(done => setTimeout(done, 100))")  # what comes after the load

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        while not predicate():
            answer = self._read()
            self.events.append((answer["method"], answer["params"]))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression. (The page's own policy does not bind us.)"""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """What a reader sees of each element."""
        query = f"document.querySelectorAll({json.dumps(selector)})"
        found: list[str] = self.run(f"[...{query}].map(one => one.innerText)")
        return found

    def requested(self) -> list[str]:
        return [
            event["request"]["url"]
            for name, event in self.events
            if name == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[Any]:
        """What is in its console, and scripts that it has stopped."""
        names = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event for name, event in self.events if name in names]
