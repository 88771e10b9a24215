"""What SECURITY.md says and no other test shows."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import StartDaemon
from servers.audit import count_rows
from servers.daemon import Daemon
from servers.mariadb import Database
from servers.process import clean_environment, wait_for_log

from saslquota import HEAD_ROWS, Clock, Config, Entry, MySQLStore, Purge

PASSWORD = "correct-horse-battery-staple"
DAY = 86400 * 1_000_000  # microseconds


def test_a_sender_forges_no_part_of_a_line(daemon: StartDaemon) -> None:
    """fail2ban would ban whom a sender likes: Postfix hands on `RCPT TO:<"a, client_address=...`
    without the quotes."""
    forged = "a, client_address=198.51.100.1, instance=1, action=ACCEPT"
    running = daemon({"_loglevel": "INFO"}, {"default": {"period": 60, "msgquota": 1}})
    with running.policy() as policy:
        for _ in range(2):
            policy.ask(recipient=forged, sender=forged, client_address="192.0.2.1", instance="2")
        policy.ask(recipient=forged, sender=forged, sasl_username="")
    wait_for_log(running, "rcpt=", 3)
    for line in running.log().splitlines():
        if "rcpt=" in line:
            names = [part.partition("=")[0] for part in line.split(", ")]
            assert len(names) == len(set(names)), line


def test_the_rights_that_suffice(database: Database) -> None:
    """SELECT, INSERT and DELETE on the one table."""
    server = database.server
    server.sql(f"CREATE USER least@'%' IDENTIFIED BY '{PASSWORD}'")
    server.sql(f"GRANT SELECT, INSERT, DELETE ON {database.name}.sends TO least@'%'")
    store = MySQLStore(
        Config(
            path=Path("saslquota.json"),
            myhost=(database.host,),
            myport=database.port,
            myuser="least",
            mypasswd=PASSWORD,
            mydb=database.name,
        )
    )
    store.open()
    old = store.now() - 3 * DAY
    rows = [Entry("alice", seq, 1, old + seq, 1, seq, "", 7) for seq in (1, 2)]
    store.newest_entries(dict.fromkeys(["alice"], HEAD_ROWS), take_locks=True)
    store.append(rows)
    assert store.tokens(rows) == {7}
    assert max(store.newest_entries(dict.fromkeys(["alice"], HEAD_ROWS), take_locks=False)).seq == 2
    assert not Purge(store, Clock(store, time.monotonic), 0).delete(old + DAY)
    store.close()
    assert count_rows(database, "alice") == 1
    server.sql("DROP USER least@'%'")


def test_a_refused_password_is_not_logged(daemon: StartDaemon, database: Database) -> None:
    running = daemon({**database.config(), "_mypasswd": PASSWORD})
    wait_for_log(running, "Access denied")
    assert running.terminate() == 0
    assert PASSWORD not in running.log()


@pytest.mark.parametrize("password", [PASSWORD, [PASSWORD]], ids=["refused", "no-text"])
def test_a_bad_password_is_not_printed(
    new_directory: Callable[[], Path], database: Database, password: object
) -> None:
    daemon = Daemon(new_directory(), {**database.config(), "_mypasswd": password})
    done = subprocess.run(
        [*daemon.command(), "--check"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "_mypasswd" in done.stdout
    assert PASSWORD not in done.stdout + done.stderr
