"""What a test run does besides testing, without workers and with them: an interrupted one leaves
nothing running, and nobody takes skipped tests for passed ones."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import EXAMPLES
from servers.process import ROOT, clean_environment, wait_for

ENDLESS = """
import threading
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_endless(daemon, number):
    running = daemon()
    Path(f"{number}.new").write_text(f"{running.pid} {running.directory}")
    Path(f"{number}.new").rename(f"{number}.started")
    threading.Event().wait(100)
"""

SKIPPED = """
import pytest
from helpers import require

@pytest.mark.parametrize("commands", [["sh"], ["no-such-program"], ["no-such-program"]])
def test_skipped(commands):
    require(*commands)
"""


def started(directory: Path) -> list[tuple[int, Path]]:
    """Process ids of the daemons, and where they are."""
    lines = [path.read_text("utf-8").partition(" ") for path in directory.glob("*.started")]
    return [(int(pid), Path(where)) for pid, _, where in lines]


def end(pid: int) -> bool:
    """End a process; tell whether there was one."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def start(directory: Path, tests: str, workers: int, **environ: str) -> subprocess.Popen[bytes]:
    """Start a run of other tests, with our conftest.py; what it prints is in the file `out`."""
    (directory / "test_other.py").write_text(tests, "utf-8")
    (directory / "pytest.ini").write_text("[pytest]\nmarkers =\n  server\n  slow\n", "utf-8")
    with (directory / "out").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, EXAMPLES, "-p", "conftest", "-n", str(workers)],
            cwd=directory,
            env=clean_environment() | {"PYTHONPATH": f"{ROOT}:{EXAMPLES}"} | environ,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


@pytest.mark.server
@pytest.mark.parametrize(("workers", "signum"), [(0, signal.SIGHUP), (2, signal.SIGTERM)])
def test_a_signal_ends_the_servers_too(tmp_path: Path, workers: int, signum: int) -> None:
    run = start(tmp_path, ENDLESS, workers)
    try:
        wait_for(lambda: len(started(tmp_path)) >= max(workers, 1), 120, "the daemons run")
        run.send_signal(signum)
        assert run.wait(120) == pytest.ExitCode.INTERRUPTED, (tmp_path / "out").read_text()
    finally:
        run.kill()
        left = [pid for pid, _ in started(tmp_path) if end(pid)]
    assert not left
    assert not any(directory.exists() for _, directory in started(tmp_path))


@pytest.mark.server
@pytest.mark.parametrize(("workers", "ci"), [(0, "false"), (2, "true")])
def test_skipped_tests_are_named_and_fail_a_ci_run(tmp_path: Path, workers: int, ci: str) -> None:
    run = start(tmp_path, SKIPPED, workers, CI=ci)
    assert run.wait(120) == (1 if ci == "true" else 0)
    _, _, last = (tmp_path / "out").read_text().partition("1 passed, 2 skipped")
    assert "NOT TESTED: 2 tests were SKIPPED" in last
    assert "2 x not installed: no-such-program" in last
