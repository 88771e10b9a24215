"""The daemon is killed at each statement with which it carries its spool over, and a server comes
back in ways that are worse than being away: each accepted reply has one row in the end."""

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import mysql.connector
import pytest
from helpers import StartDaemon, quota
from servers.audit import audit, audit_epochs
from servers.daemon import Daemon
from servers.load import OK, SLACK, WIDE, Load
from servers.mariadb import Database, MariaDB, session
from servers.outage import (
    AWAY,
    BACK,
    DBTIMEOUT,
    audit_spooled,
    is_up,
    reset_statement,
    sends,
    settle,
)
from servers.ports import LOOPBACK
from servers.process import ROOT, clean_environment, pause, wait_for, wait_for_log
from servers.proxy import SlowProxy

pytestmark = pytest.mark.slow

RULES = quota(100_000)
SENDS = 600  # more than two INSERTs carry over

# Ends the process with SIGKILL before its statement of that number to either database.
KILL_AT = """
import os, signal, sqlite3
from mysql.connector.connection import MySQLConnection as Connector
try:
    from mysql.connector.connection_cext import CMySQLConnection as Connector
except ImportError:
    pass

left = int(os.environ["KILL_AT"])

def step():
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

class Connection(sqlite3.Connection):
    def execute(self, *arguments):
        step()
        return super().execute(*arguments)

def cmd_query(self, *arguments, query=Connector.cmd_query, **options):
    step()
    return query(self, *arguments, **options)

connect = sqlite3.connect
sqlite3.connect = lambda *arguments, **options: connect(*arguments, factory=Connection, **options)
Connector.cmd_query = cmd_query
"""


def limits(_account: str) -> tuple[int, int]:
    return 3600, 100_000


class Doomed(Daemon):
    """A daemon that ends by itself, soon or later."""

    def is_over(self) -> bool:
        return is_up(self) or not self.running

    def start(self) -> None:
        try:
            super().start()
        except AssertionError:
            assert "Traceback" not in self.log()


@pytest.fixture
def counting(database: Database, spooling: StartDaemon) -> Iterator[Daemon]:
    running = spooling(database.config(), RULES)
    yield running
    assert "Traceback" not in running.log()


def test_the_daemon_is_killed_at_each_statement_of_carrying_over(
    server: MariaDB, database: Database, counting: Daemon, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILL_AT)
    asked = [f"{n:x}" for n in range(SENDS)]
    with counting.policy() as policy:
        server.kill()
        for n, instance in enumerate(asked):
            assert policy.ask(sasl_username=f"{n % 7}@example.com", instance=instance) == OK
    counting.kill9()
    server.start()
    with Doomed(counting.directory, counting.config, RULES) as doomed:
        kills = 0
        while True:
            doomed.stop()
            kills += 1
            doomed.env = {"PYTHONPATH": tmp_path, "KILL_AT": kills}
            doomed.start()
            wait_for(doomed.is_over, 20, "its end")
            if doomed.running:
                break
            assert {row.instance for row in sends(database)} <= set(asked)
        assert kills > 20, "it was killed only so often"
        assert sorted(row.instance for row in sends(database)) == sorted(asked)
        audit(sends(database), [], limits)


def test_the_daemon_is_killed_as_soon_as_all_is_carried_over(
    server: MariaDB, database: Database, counting: Daemon
) -> None:
    with Load(counting.port) as load:
        for n in range(3):
            load.wait(OK, 10, 50)
            server.kill()
            load.wait(OK, DBTIMEOUT + SLACK, 100)
            server.start()
            wait_for_log(counting, BACK, n + 1)
            counting.kill9()
            counting.start()
    audit_spooled(database, load, [counting], limits)


# --- An INSERT is stuck, and wakes when the next connection has done its work ---------------------

# Otherwise nobody in between could tell what is an INSERT.
WITHOUT_TLS = """
from contextlib import suppress
with suppress(ImportError):
    import _mysql_connector
import mysql.connector

connect = mysql.connector.connect
mysql.connector.connect = lambda **options: connect(**options, ssl_disabled=True)
"""


@pytest.fixture
def proxy(server: MariaDB) -> Iterator[SlowProxy]:
    with SlowProxy(server.port) as found:
        yield found


@pytest.fixture
def behind(
    proxy: SlowProxy, database: Database, spooling: StartDaemon, tmp_path: Path
) -> Iterator[Daemon]:
    """A daemon with the proxy before its database."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TLS)
    config = {**database.config(), "_myport": proxy.port}
    running = spooling(config, RULES, {"PYTHONPATH": tmp_path})
    yield running
    assert "Traceback" not in running.log()


@pytest.mark.parametrize("way", ["request", "answer"])
def test_the_insert_of_a_batch_is_stuck(
    proxy: SlowProxy, database: Database, behind: Daemon, way: str
) -> None:
    """If there is time for it the next connection tells whether it got in."""
    behind.stop()
    behind.config["_dbtimeout"] = 7
    behind.write_config()
    behind.start()
    settle(behind)
    with Load(behind.port) as load:
        load.wait(OK, 10, 100)
        with proxy.insert_stuck(way, 3) as stuck:
            wait_for(stuck.is_there.is_set, 10, "a stuck INSERT")
            load.wait(OK, 7, 100)
        wait_for(lambda: stuck.answer, 10, "the server's answer")
        load.wait(OK, 10, 50)
    assert (b"Duplicate entry" in stuck.answer) == (way == "request")
    assert AWAY not in behind.log()
    audit_spooled(database, load, [behind], limits)


@pytest.mark.parametrize("way", ["request", "answer"])
def test_the_insert_of_a_batch_is_stuck_when_the_database_goes_away(
    proxy: SlowProxy, database: Database, behind: Daemon, way: str
) -> None:
    """Nobody can tell whether it got in until the database is back, and then it may still do so."""
    with Load(behind.port) as load:
        load.wait(OK, 10, 100)
        with proxy.insert_stuck(way, 3) as stuck:
            wait_for(stuck.is_there.is_set, 10, "a stuck INSERT")
            with proxy.refusing():
                wait_for_log(behind, AWAY)
                load.wait(OK, DBTIMEOUT + SLACK, 100)
            wait_for_log(behind, BACK)
            load.wait(OK, 10, 50)
        wait_for(lambda: stuck.answer, 10, "the server's answer")
        load.wait(OK, 10, 50)
    assert (b"Duplicate entry" in stuck.answer) == (way == "request")
    audit_spooled(database, load, [behind], limits)


@pytest.mark.parametrize("way", ["request", "answer"])
@pytest.mark.parametrize("number", [1, 3])
def test_an_insert_that_carries_over_is_stuck(
    proxy: SlowProxy, database: Database, behind: Daemon, number: int, way: str
) -> None:
    """The first one is that of an attempt, the others are the committer's."""
    with Load(behind.port, pause=0.005) as load:
        load.wait(OK, 10, 100)
        with proxy.down():
            load.wait(OK, 20, 1000)
        with proxy.insert_stuck(way, number) as stuck:
            wait_for(stuck.is_there.is_set, 10, "a stuck INSERT")
            settle(behind)
            load.wait(OK, 10, 50)
        wait_for(lambda: stuck.answer, 10, "the server's answer")
        load.wait(OK, 10, 50)
    assert (b"Duplicate entry" in stuck.answer) == (way == "request")
    stopped = f"carrying over stopped, {behind.directory}/saslquota.spool holds"
    assert (stopped in behind.log()) == (number > 1)
    audit_spooled(database, load, [behind], limits)


def test_down_and_up_every_second(
    proxy: SlowProxy, database: Database, spooling: StartDaemon
) -> None:
    """What was remembered gives nobody a further quota."""
    counting = spooling({**database.config(), "_myport": proxy.port}, quota(300))
    with Load(counting.port, WIDE, connections=8, pause=0.05) as load:
        load.wait(OK, 10, 20)
        for _ in range(15):
            with proxy.down():
                pause(1)
            pause(1)
    wait_for_log(counting, BACK, 10)
    settle(counting)
    with counting.policy() as policy:
        for name in WIDE:
            assert policy.ask(sasl_username=name).startswith("REJECT")
    assert Counter(row.account for row in sends(database)) == dict.fromkeys(WIDE, 300)
    audit(sends(database), load.accepted(), lambda _: (3600, 300))
    assert not any("DEFER" in str(sample.reply) for sample in load.samples)


# --- Orders ---------------------------------------------------------------------------------------


class Admin:
    """One who asks a daemon, and gives orders."""

    def __init__(self, counting: Daemon) -> None:
        self._counting = counting

    def ctl(self, *arguments: str) -> int:
        """saslquotactl's exit status."""
        command: list[str | Path] = [sys.executable, ROOT / "saslquotactl.py"]
        command += ["-c", self._counting.config_file, *arguments]
        done = subprocess.run(command, env=clean_environment(), capture_output=True, timeout=30)
        return done.returncode

    def lets_in(self, name: str) -> bool:
        with self._counting.policy() as policy:
            return policy.ask(sasl_username=f"{name}@example.com") == OK

    def count(self, name: str) -> int:
        """How many more sends of somebody are let in."""
        return next(n for n in range(100) if not self.lets_in(name))

    def await_one(self, name: str) -> None:
        """Until somebody is let in, once: a refusal is remembered for a second."""
        wait_for(lambda: self.lets_in(name), 5, f"{name} is let in")


def test_orders_before_and_after_an_outage(
    server: MariaDB, database: Database, spooling: StartDaemon
) -> None:
    """In it they cannot be given."""
    counting = spooling(database.config(), quota(5))
    admin = Admin(counting)
    assert [admin.count(name) for name in ("reset", "more")] == [5, 5]
    assert admin.ctl("reset", "reset@example.com") == 0
    assert admin.ctl("grant", "more@example.com", "3") == 0
    assert admin.ctl("block", "blocked@example.com") == 0
    admin.await_one("reset")
    admin.await_one("more")
    server.kill()
    assert [admin.count(name) for name in ("reset", "more", "blocked")] == [4, 2, 0]
    assert admin.ctl("reset", "reset@example.com") != 0
    assert admin.ctl("unblock", "blocked@example.com") != 0
    assert [admin.count(name) for name in ("reset", "more", "blocked")] == [0, 0, 0]
    server.start()
    settle(counting)
    assert [admin.count(name) for name in ("reset", "more", "blocked")] == [0, 0, 0]
    assert admin.ctl("reset", "reset@example.com") == 0
    assert admin.ctl("unblock", "blocked@example.com") == 0
    assert admin.ctl("block", "more@example.com") == 0
    admin.await_one("reset")
    admin.await_one("blocked")
    assert [admin.count(name) for name in ("reset", "more", "blocked")] == [4, 0, 4]
    found = Counter(row.account for row in sends(database) if row.recipients)
    assert found == {"reset@example.com": 15, "more@example.com": 8, "blocked@example.com": 5}


def reset_until_back(server: MariaDB, database: Database, counting: Daemon) -> int:
    """How many resets have got in while all was carried over."""
    done = 0
    with session(server, database.name) as admin:
        while not re.search(BACK, counting.log()):
            for name in WIDE:
                with suppress(mysql.connector.Error):  # another row was faster
                    admin.execute(reset_statement(name))
                    done += admin.rowcount
            pause(0.01)
    return done


def test_resets_while_all_is_carried_over(
    server: MariaDB, database: Database, counting: Daemon
) -> None:
    """Each send has one row, and is in the epoch that it meets."""
    with Load(counting.port, WIDE, pause=0.001) as load:
        load.wait(OK, 10, 100)
        server.kill()
        load.wait(OK, 20, 2000)
        server.start()
        resets = reset_until_back(server, database, counting)
        load.wait(OK, 10, 50)
    settle(counting)
    assert resets == sum(row.instance == "reset" for row in sends(database)) >= 4
    rows = [row for row in sends(database) if row.instance != "reset"]
    assert len(rows) == len(load.accepted())
    audit_epochs(database)
    assert {row.instance for row in rows} == {sample.instance for sample in load.accepted()}
    assert {sample.reply for sample in load.samples} == {OK}


# --- A failover -----------------------------------------------------------------------------------


@pytest.fixture
def other(new_directory: Callable[[], Path]) -> Iterator[MariaDB]:
    """A second server."""
    with MariaDB(new_directory()) as found:
        yield found


def copy_rows(source: Database, target: Database) -> None:
    columns = "account, seq, epoch, at, recipients, total, instance, token"
    texts = "QUOTE(account), seq, epoch, QUOTE(at), recipients, total, QUOTE(instance), token"
    rows = source.sql(f"SELECT CONCAT('(', CONCAT_WS(',', {texts}), ')') FROM sends").split("\n")
    target.sql(f"INSERT INTO sends ({columns}) VALUES {','.join(rows)}")


def test_a_failover_to_a_server_that_lacks_rows(
    server: MariaDB, other: MariaDB, database: Database, spooling: StartDaemon
) -> None:
    """An asynchronous replica, or a copy that was taken earlier: what it lacks is lost, and what is
    accepted from then on is not."""
    replica = other.create_database(database.name)
    hosts = [f"{LOOPBACK}:{each.port}" for each in (server, other)]
    counting = spooling({**database.config(), "_myhost": hosts}, RULES)
    with Load(counting.port) as load:
        load.wait(OK, 10, 100)
        copy_rows(database, replica)
        server.kill()  # also the marks of this outage are what the replica lacks
        other.kill()
        load.wait(OK, DBTIMEOUT + SLACK, 100)
        server.start()
        wait_for_log(counting, BACK)
        load.wait(OK, 10, 100)
        other.start()
        gone = time.monotonic()
        server.kill()
        load.wait(OK, DBTIMEOUT + SLACK, 100)
        other.kill()
        load.wait(OK, DBTIMEOUT + SLACK, 100)
        other.start()
        wait_for_log(counting, BACK, 2)
        load.wait(OK, 10, 100)
    settle(counting)
    audit(sends(replica), [s for s in load.accepted() if s.began > gone], limits)
    lost = {s.instance for s in load.accepted()} - {row.instance for row in sends(replica)}
    server.start()
    assert lost <= {row.instance for row in sends(database)}
    assert {sample.reply for sample in load.samples} == {OK}


def test_a_batch_in_doubt_and_a_server_that_lacks_rows(
    proxy: SlowProxy, other: MariaDB, database: Database, behind: Daemon
) -> None:
    """Its numbers would leave a hole there."""
    replica = other.create_database(database.name)
    behind.stop()
    behind.config["_myhost"] = [f"{LOOPBACK}:{each.port}" for each in (proxy, other)]
    behind.config["_dbtimeout"] = 7  # time to try the other one
    behind.write_config()
    behind.start()
    settle(behind)
    with behind.policy() as policy:
        assert policy.ask(sasl_username=WIDE[0], instance="first") == OK
        copy_rows(database, replica)
        assert policy.ask(sasl_username=WIDE[0], instance="lost") == OK
        with proxy.insert_stuck("request", 1) as stuck:
            policy.send(policy.block(sasl_username=WIDE[0], instance="in doubt"))
            wait_for(stuck.is_there.is_set, 10, "a stuck INSERT")
            with proxy.down():
                assert policy.reply() == OK
                assert policy.ask(sasl_username=WIDE[0], instance="next") == OK
                settle(behind)
    rows = [(row.seq, row.total, row.instance) for row in sends(replica)]
    assert rows == [(1, 1, "first"), (2, 2, "in doubt"), (3, 3, "next")]
