"""End to end: how the daemon starts: from a fresh clone, with the owner's file, without MySQL."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers import StartDaemon
from servers.audit import count_rows
from servers.daemon import Daemon, PolicyClient, copy_shipped
from servers.load import DEFERRED
from servers.mariadb import Database, MariaDB
from servers.ports import LOOPBACK, free_port
from servers.postfix import ALICE
from servers.process import Process, clean_environment, run, wait_for


class FreshClone(Process):
    """`python3 saslquota.py` in a copy of the shipped files, by a Python without any package."""

    def __init__(self, directory: Path) -> None:
        super().__init__(copy_shipped(directory), "terminal")
        self.port = free_port()

    def command(self) -> Sequence[str | Path]:
        return [Path(sys.base_prefix, "bin", "python3"), "-u", "saslquota.py"]

    def environment(self) -> dict[str, str]:
        return clean_environment({"_bindport": self.port})

    def is_ready(self) -> bool:
        return f"listening on {LOOPBACK}:{self.port}" in self.log()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_fresh_clone_runs_with_nothing_installed(
    new_directory: Callable[[], Path], signum: int
) -> None:
    directory = new_directory()
    with FreshClone(directory) as clone:
        with PolicyClient(clone.port) as policy:
            assert policy.ask() == "OK"
            assert clone.stop(signum, timeout=5) == 0
        for told in ("saslquota.db", "default", "localhost", "root@localhost"):
            assert told in clone.log()
    assert (directory / "saslquota.db").exists()


def test_counts_survive_a_restart(new_directory: Callable[[], Path]) -> None:
    directory = new_directory()

    def actions(number: int) -> list[str]:
        with FreshClone(directory) as clone, PolicyClient(clone.port) as policy:
            return [policy.ask(sasl_username="root@localhost") for _ in range(number)]

    assert set(actions(50)) == {"OK"}
    assert actions(1)[0].startswith("REJECT Ops!!! Você já mandou o limite de 50 emails")


def test_check_changes_nothing(tmp_path: Path) -> None:
    copy_shipped(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    run([sys.executable, "-B", "saslquota.py", "--check"], cwd=tmp_path, env=clean_environment())
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_owners_ten_keys_mean_mysql(daemon: StartDaemon, database: Database) -> None:
    owners = {
        **dict.fromkeys(Daemon.DEFAULTS),
        "_bind": LOOPBACK,
        "_bindport": free_port(),
        "_bindtimeout": 45,
        "_myhost": database.host,
        "_myuser": database.user,
        "_mypasswd": database.password,
        "_mydb": database.name,
        "_logfacility": "mail",
        "_loglevel": "DEBUG",
        "_quotafile": "quotarules.json",
    }
    started = daemon(owners, env={"_myport": database.port})
    with started.policy() as policy:
        assert policy.ask() == "OK"
    assert count_rows(database, ALICE) == 1


def test_mysql_started_after_the_daemon(
    daemon: StartDaemon, mariadb: MariaDB, database: Database
) -> None:
    mariadb.stop()
    started = daemon(database.config())
    with started.policy() as policy:
        assert [policy.ask() for _ in range(3)] == [DEFERRED] * 3
        mariadb.start()
        wait_for(lambda: policy.ask() == "OK", 20, "the daemon finds the database")
        assert policy.ask() == "OK"
    assert count_rows(database, ALICE) == 2
    assert started.running


def failed_start(directory: Path, **env: object) -> str:
    """Start a fresh clone that must end with exit status 1, and return what it says."""
    copy_shipped(directory)
    done = subprocess.run(
        [sys.executable, "saslquota.py"],
        cwd=directory,
        env=clean_environment(env),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_taken_port_ends_it_with_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, free_port())) as other:
        port = other.getsockname()[1]
        (line,) = failed_start(tmp_path, _bindport=port).splitlines()
    assert f"{LOOPBACK}:{port}" in line
    assert os.strerror(errno.EADDRINUSE) in line


def test_bad_rules_end_it_with_one_clear_line(tmp_path: Path) -> None:
    copy_shipped(tmp_path / "clone")
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"default": {"period": 60, "msgquota": -1, "msg": "no"}}))
    (line,) = failed_start(tmp_path / "clone", _quotafile=rules).splitlines()
    assert str(rules) in line
    assert "msgquota" in line
