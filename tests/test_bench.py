"""bench/run, on a load that measures nothing: it must only work."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers import require
from servers.process import ROOT


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Without the other programs, whose packages would leave services on this machine."""
    require("mariadbd", "cc")
    (tmp_path / "apt-get").symlink_to("/bin/false")
    done = subprocess.run(
        [ROOT / "bench" / "run", "--quick", "--rows", "ceiling,insert,mariadb,sqlite"],
        capture_output=True,
        text=True,
        timeout=580,
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("ceiling", "one committed INSERT", "saslquota, MariaDB", "saslquota, SQLite"):
        assert row in done.stdout
