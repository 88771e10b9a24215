"""bench/run, on a load that measures nothing: it must only work, and leave nothing behind."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import require
from servers.process import ROOT

PEERS = ("postfw", "policyd")  # what the names of their files, users and services begin with
OURS = ("saslquota, MariaDB", "saslquota, SQLite", "start to first reply, SQLite")
PLACES = ("/etc", "/usr/bin", "/usr/sbin", "/usr/lib/systemd", "/usr/local", "/var/lib")


def files_of_peers() -> dict[Path, int]:
    """What their packages would set up on this machine, and when it was last changed."""
    found = {}
    for place in PLACES:
        for directory, directories, files in os.walk(place):
            for name in directories + files:
                if name.startswith(PEERS):
                    path = Path(directory, name)
                    found[path] = path.lstat().st_ctime_ns
    return found


def processes_of_bench() -> list[str]:
    """The commands that bench/run has started and that are still running."""
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(file.read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has just ended
            continue
    return [command for command in commands if str(ROOT / "bench") in command]


def users_of_peers() -> list[str]:
    """The accounts of this machine that are theirs."""
    return [line for line in Path("/etc/passwd").read_text().splitlines() if line.startswith(PEERS)]


def bench(*options: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it on the tiny load; it must find nothing wrong."""
    done = subprocess.run(
        [ROOT / "bench" / "run", "--quick", *options],
        capture_output=True,
        text=True,
        timeout=580,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """It unpacks the other programs where it is, and ends all that it starts."""
    require("mariadbd", "cc", "perl", "apt-get")
    shutil.copy(ROOT / "saslquota.py", tmp_path / "before.py")
    before = files_of_peers(), users_of_peers()
    rows = ["--rows", "ceiling,insert,mariadb,sqlite,postfwd,prl-sqlite", "--loads", "1,16"]
    done = bench(*rows, "--scale", "hot-window,start", "--baseline", tmp_path / "before.py")
    for row in ("ceiling", "one committed INSERT", *OURS):
        assert f"| {row}" in done.stdout, done.stdout + done.stderr
    # A peer that this system cannot run, as Debian 13 cannot postfwd 1, loses its row, and says so.
    peer = "postfwd, logging"
    assert re.search(
        rf"^(\| [^|]*\| {peer}|FAILED in round 1: {peer}: )", done.stdout, re.MULTILINE
    )
    for row in OURS:
        assert f"| {row}, baseline " in done.stdout, done.stdout + done.stderr
    assert "of baseline" in done.stdout
    assert (ROOT / "bench" / ".venv" / "bin" / "policyd-rate-limit").exists()
    bench("--rows", "none")  # all cases, without a baseline, which starts and fills all twice
    assert (files_of_peers(), users_of_peers()) == before
    assert processes_of_bench() == []
