"""bench/run, on a load that measures nothing: it must only work."""

import os
import subprocess

import pytest
from helpers import require
from servers.process import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_runs() -> None:
    require("apt-get", root=True)  # it installs what it needs
    done = subprocess.run(
        [ROOT / "bench" / "run", "--quick"],
        capture_output=True,
        text=True,
        timeout=580,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("ceiling", "one committed INSERT", "saslquota, MariaDB", "saslquota, SQLite"):
        assert row in done.stdout
