"""Programs that the tests start: each in a directory of its own, stopped by its process id."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, Self, TypeVar

ROOT = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
T = TypeVar("T")


def wait_for(predicate: Callable[[], T], timeout: float, what: str) -> T:
    """Poll until predicate() is true and return its value; fail after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.01)
    return value


def pause(seconds: float) -> None:
    """Let a fault last."""
    end = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() > end, seconds + 10, "some time")


class Logging(Protocol):
    """Whatever has a log."""

    def log(self) -> str:
        """Return all that it has logged."""


def wait_for_log(source: Logging, pattern: str, times: int = 1) -> list[str]:
    """Wait until so many lines of the log match the regular expression; return those that do."""
    log, found = "", [""]

    def has_come() -> bool:
        nonlocal log, found
        log = source.log()
        found = [line for line in log.splitlines() if re.search(pattern, line)]
        return len(found) >= times

    try:
        wait_for(has_come, 20, f"{times} log lines with {pattern}")
    except AssertionError as error:
        others = [line for line in log.splitlines() if "sasl_username=" not in line]
        raise AssertionError(f"{error}\n" + "\n".join(others)) from None
    return found


def run(
    command: Sequence[str | Path],
    *,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command that must succeed and return its standard output."""
    done = subprocess.run(
        command, input=stdin, env=env, cwd=cwd, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def clean_environment(settings: Mapping[str, object] | None = None) -> dict[str, str]:
    """Return our environment without any daemon setting but the given ones."""
    ours = ("_", "PYTHONPATH")  # pytest-xdist sets that for its workers
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {name: str(value) for name, value in (settings or {}).items()}


def with_module(environment: dict[str, str]) -> dict[str, str]:
    """Let `python -m saslquota` find ours. It is compiled once, saslquota.py by each start."""
    before = environment.get("PYTHONPATH")
    return environment | {"PYTHONPATH": f"{before}{os.pathsep}{ROOT}" if before else str(ROOT)}


class Process:
    """A program of ours: its output is in a file, and its process id stops it.

    For subclasses: `command()`, `is_ready()`, and where they differ `environment()` and `cwd()`.
    """

    interrupted: ClassVar[bool] = False  # by a signal: nothing needs to end in good order any more

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.output = directory / f"{name}.out"
        self._popen: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str | Path]:
        raise NotImplementedError

    def is_ready(self) -> bool:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return clean_environment()

    @property
    def pid(self) -> int:
        assert self._popen is not None, "never started"
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def log(self) -> str:
        """Return everything it has printed."""
        return self.output.read_text("utf-8", "replace") if self.output.exists() else ""

    def start(self) -> None:
        """Start it, in a session of its own so that Ctrl-C reaches only the tests, and wait."""
        with self.output.open("ab") as output:
            self._popen = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=self.environment(),
                start_new_session=True,
            )
        try:
            wait_for(lambda: not self.running or self.is_ready(), 60, f"{self.command()} is up")
            assert self.running, f"{self.command()} ended at once:\n{self.log()}"
        except BaseException:
            self.stop()
            raise

    def stop(self, signum: int = signal.SIGTERM, timeout: float = 15) -> int:
        """Signal it, wait for its end and return its exit status (SIGKILL's when it had to)."""
        if self._popen is None:
            return 0
        if self.running:
            self._popen.send_signal(signal.SIGKILL if Process.interrupted else signum)
            self._popen.send_signal(signal.SIGCONT)
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self._popen.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # its children, if any are left

    def kill(self) -> None:
        """End it as a power failure would."""
        self.stop(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop it from running without closing its connections."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen one go on."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


class Footprint(NamedTuple):
    """What a process takes of the machine."""

    threads: int
    descriptors: int
    memory: int  # KiB

    @classmethod
    def of(cls, process: Process) -> "Footprint":
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = dict(re.findall(r"(Threads|VmRSS):\s+(\d+)", status))
        descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
        return cls(int(found["Threads"]), descriptors, int(found["VmRSS"]))
