"""A test run that is interrupted leaves nothing running."""

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


@pytest.mark.server
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_the_servers_too(tmp_path: Path, workers: int, signum: int) -> None:
    (tmp_path / "test_endless.py").write_text(ENDLESS, "utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  server\n  slow\n", "utf-8")
    with (tmp_path / "out").open("wb") as output:
        run = subprocess.Popen(
            [sys.executable, EXAMPLES, "-p", "conftest", "-n", str(workers)],
            cwd=tmp_path,
            env=clean_environment({"PYTHONPATH": f"{ROOT}:{EXAMPLES}"}),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(lambda: len(started(tmp_path)) >= max(workers, 1), 60, "the daemons run")
        run.send_signal(signum)
        assert run.wait(60) == pytest.ExitCode.INTERRUPTED, (tmp_path / "out").read_text()
    finally:
        run.kill()
        left = [pid for pid, _ in started(tmp_path) if end(pid)]
    assert not left
    assert not any(directory.exists() for _, directory in started(tmp_path))
