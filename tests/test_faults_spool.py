"""The database goes away under load and the daemon counts on in its spool: each accepted reply has
one row in the end, and nobody is deferred."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from helpers import StartDaemon, kept_running
from servers.audit import audit, count_rows
from servers.daemon import Daemon
from servers.disk import full
from servers.load import DEFERRED, OK, QUOTA, REFUSED, RULES, SHORT, SLACK, WIDE, Load
from servers.mariadb import (
    Database,
    MariaDB,
    commits_stopped,
    frozen,
    killed,
    rows_locked,
    tables_locked,
)
from servers.outage import (
    AWAY,
    BACK,
    CONFIG,
    DBTIMEOUT,
    audit_spooled,
    outlive,
    reset_statement,
    sends,
    settle,
    status,
    twice,
)
from servers.process import ROOT, pause, wait_for, wait_for_log
from servers.proxy import SlowProxy

from saslquota import LOCKED_ACCOUNT_RETRY, Config

pytestmark = pytest.mark.slow


@pytest.fixture
def counting(database: Database, spooling: StartDaemon) -> Iterator[Daemon]:
    running = spooling(database.config(), RULES)
    yield running
    assert "Traceback" not in running.log()


def test_killed_again_and_again(server: MariaDB, database: Database, counting: Daemon) -> None:
    with Load(counting.port) as load:
        for n in range(10):
            load.wait(OK, 10, 100)
            server.kill()
            load.wait(OK, DBTIMEOUT + SLACK, 100)
            server.start()
            load.wait(OK, 10, 20)
            wait_for_log(counting, BACK, n + 1)
    audit_spooled(database, load, [counting])


def test_frozen(server: MariaDB, database: Database, counting: Daemon) -> None:
    with Load(counting.port) as load:
        outlive(counting, load, frozen(server), 20)
    audit_spooled(database, load, [counting])


def test_frozen_in_the_middle_of_everything(
    server: MariaDB, database: Database, counting: Daemon
) -> None:
    """Also while sends are carried over: what was given up wakes, and comes too late or in time."""
    with Load(counting.port, pause=0.001) as load:
        load.wait(OK, 10, 100)
        for tenths in (25, 10, 31, 22, 5, 28, 21, 26, 3, 35):
            server.freeze()
            pause(tenths / 10)
            server.thaw()
            pause(0.2 + tenths % 4 / 3)
        load.wait(OK, 10, 100)
    audit_spooled(database, load, [counting])


def test_a_global_read_lock(server: MariaDB, database: Database, counting: Daemon) -> None:
    with Load(counting.port) as load:
        outlive(counting, load, tables_locked(server), 5)
    audit_spooled(database, load, [counting])


@pytest.mark.parametrize("dbtimeout", [DBTIMEOUT, Config.dbtimeout])
def test_commits_stand_still_and_with_them_the_locks_of_others(
    server: MariaDB, database: Database, spooling: StartDaemon, dbtimeout: int
) -> None:
    """As in a Galera cluster while a node joins, when another daemon has locked an account."""
    counting = spooling({**database.config(), "_dbtimeout": dbtimeout}, RULES)
    with counting.policy() as policy:
        assert policy.ask(sasl_username=WIDE[0]) == OK
        with rows_locked(database, WIDE[:1]), commits_stopped(server):
            assert [policy.ask(sasl_username=name) for name in WIDE[:2]] == [OK, OK]
    wait_for_log(counting, BACK)
    settle(counting)
    assert [row.account for row in sends(database)] == [WIDE[0], *WIDE[:2]]


@pytest.mark.parametrize(("dbtimeout", "reply"), [(Config.dbtimeout, DEFERRED), (DBTIMEOUT, OK)])
def test_a_locked_account_is_no_outage(
    database: Database, spooling: StartDaemon, dbtimeout: int, reply: str
) -> None:
    """Unless there is no time to find out that it is none."""
    counting = spooling({**database.config(), "_dbtimeout": dbtimeout}, RULES)
    with counting.policy() as policy:
        assert [policy.ask(sasl_username=name) for name in WIDE[:2]] == [OK, OK]
        with rows_locked(database, WIDE[:1]):
            assert [policy.ask(sasl_username=name) for name in WIDE[:2]] == [reply, OK]
        wait_for(lambda: policy.ask(sasl_username=WIDE[0]) == OK, 5, "no longer locked")
    settle(counting)
    assert (AWAY in counting.log()) == (reply == OK)


@pytest.mark.parametrize("trouble", [killed, frozen])
def test_the_server_goes_away_while_an_account_is_locked(
    server: MariaDB,
    database: Database,
    spooling: StartDaemon,
    trouble: Callable[[MariaDB], AbstractContextManager[None]],
) -> None:
    """What the daemon then asks of the locked account defers nobody else."""
    counting = spooling({**database.config(), "_dbtimeout": Config.dbtimeout}, RULES)
    with counting.policy() as policy:
        assert [policy.ask(sasl_username=name) for name in WIDE[:2]] == [OK, OK]
        with rows_locked(database, WIDE[:1]):
            assert policy.ask(sasl_username=WIDE[0]) == DEFERRED
            with trouble(server):
                pause(LOCKED_ACCOUNT_RETRY)
                assert [policy.ask(sasl_username=name) for name in WIDE[:2]] == [OK, OK]
    settle(counting)
    assert [row.account for row in sends(database)] == sorted(2 * WIDE[:2])


def test_a_full_disk_of_the_database(
    small_server: MariaDB, disk: Path, spooling: StartDaemon
) -> None:
    """The server says that it is full, or ends, or hangs until there is room again."""
    database = small_server.create_database()
    counting = spooling(database.config(), RULES)
    with Load(counting.port, pause=0.001) as load:
        load.wait(OK, 10, 100)
        with full(disk):
            wait_for_log(counting, AWAY)
            load.wait(OK, DBTIMEOUT + SLACK, 50)
            pause(3)
            load.wait(OK, SLACK, 20)
        with kept_running(small_server):
            wait_for_log(counting, BACK)
            settle(counting)
    audit_spooled(database, load, [counting])


def test_a_full_disk_of_the_spool(
    server: MariaDB, database: Database, disk: Path, spooling: StartDaemon
) -> None:
    """Only then somebody is deferred; who was not is counted, once, though at a later time when the
    database has decided meanwhile: `at` never falls."""
    spool = {"_spoolfile": str(disk / "saslquota.spool")}
    counting = spooling({**database.config(), **spool}, RULES)
    with Load(counting.port) as load:
        load.wait(OK, 10, 100)
        server.kill()
        load.wait(OK, DBTIMEOUT + SLACK, 100)
        with full(disk):
            load.wait(DEFERRED, 10, 50)
            wait_for_log(counting, "spool cannot be used.*full")
        load.wait(OK, 10, 100)
        pause(SHORT)
        with full(disk):
            load.wait(DEFERRED, 10, 50)
            server.start()  # so the database decides: a spool in trouble is tried once a minute
            load.wait(OK, 10, 50)
        counting.stop()
        counting.start()
        load.wait(OK, 10, 50)
    settle(counting)
    audit(sends(database), load.accepted(), lambda _: (1, 1_000_000))
    load.assert_never_over_quota(2 * QUOTA)  # the database's, and the spool's
    assert {sample.reply for sample in load.samples} <= {OK, REFUSED, DEFERRED, None}


def test_a_missing_table(database: Database, counting: Daemon) -> None:
    """What was in it is lost; what is accepted from then on is not."""
    with Load(counting.port) as load:
        load.wait(OK, 10, 100)
        database.sql("DROP TABLE sends")
        wait_for_log(counting, f"{AWAY}.*1146.*mysql.sql")
        away = time.monotonic()
        load.wait(OK, 10, 100)
        database.sql((ROOT / "mysql.sql").read_text("utf-8"))
        load.wait(OK, 10, 100)
    settle(counting)
    audit(sends(database), [s for s in load.accepted() if s.began > away], twice)
    assert {sample.reply for sample in load.samples} <= {OK, REFUSED}


def test_another_database(server: MariaDB, counting: Daemon) -> None:
    """What belongs to one is not written to another."""
    with counting.policy() as policy:
        assert policy.ask() == OK
        server.kill()
        assert policy.ask() == OK
    counting.stop()
    server.start()
    other = server.create_database()
    other.sql("INSERT INTO sends VALUES ('SPOOL', 1, 1, UTC_TIMESTAMP(6), 0, 0, 'b', 0, '', '')")
    counting.config.update(other.config())
    counting.write_config()
    counting.start()
    wait_for(lambda: status(counting)["store"] == "up", 20, "the other database is in use")
    with counting.policy() as policy:
        assert policy.ask() == OK
        wait_for_log(counting, "spool cannot be used.*another database.*move the file away")
        assert count_rows(other, "alice@example.com") == 1
        server.kill()
        assert policy.ask() == DEFERRED


def test_a_blackholed_host(server: MariaDB, database: Database, spooling: StartDaemon) -> None:
    """Each statement takes longer than the daemon waits."""
    with SlowProxy(server.port) as proxy:
        counting = spooling({**database.config(), "_myport": proxy.port}, RULES)
        with Load(counting.port) as load:
            outlive(counting, load, proxy.slow(30), 5)
        audit_spooled(database, load, [counting])


def test_a_slow_server(server: MariaDB, database: Database, spooling: StartDaemon) -> None:
    with SlowProxy(server.port) as proxy:
        counting = spooling({**database.config(), "_myport": proxy.port}, RULES)
        with Load(counting.port) as load:
            outlive(counting, load, proxy.slow(0.9), 8)
        audit_spooled(database, load, [counting])


def test_the_daemon_is_killed_in_the_outage(
    server: MariaDB, database: Database, counting: Daemon
) -> None:
    with Load(counting.port) as load:
        load.wait(OK, 10, 100)
        server.kill()
        for _ in range(3):
            load.wait(OK, DBTIMEOUT + SLACK, 100)
            counting.kill9()
            counting.start()
        load.wait(OK, DBTIMEOUT + SLACK, 100)
        server.start()
        load.wait(OK, 10, 100)
    audit_spooled(database, load, [counting])


def test_the_daemon_is_killed_while_it_carries_over(
    server: MariaDB, database: Database, counting: Daemon
) -> None:
    with Load(counting.port, pause=0.0) as load:
        load.wait(OK, 10, 100)
        server.kill()
        load.wait(OK, 20, 3000)
        counting.kill9()
        server.start()
        for tenths in range(8):
            counting.start()
            pause(0.02 * tenths)
            counting.kill9()
        counting.start()
        load.wait(OK, 10, 100)
    audit_spooled(database, load, [counting])


def test_two_daemons_have_a_spool_each(
    server: MariaDB, database: Database, spooling: StartDaemon
) -> None:
    two = [spooling(database.config(), RULES) for _ in range(2)]
    with Load([running.port for running in two]) as load:
        for _ in range(3):
            load.wait(OK, 10, 200)
            server.kill()
            load.wait(OK, DBTIMEOUT + SLACK, 300)
            server.start()
            load.wait(OK, 10, 200)
    settle(*two)
    audit(sends(database), load.accepted(), lambda a: (twice(a)[0], 2 * twice(a)[1]))
    assert {sample.reply for sample in load.samples} <= {OK, REFUSED}


def test_a_block_holds_over_a_restart_in_the_outage(
    server: MariaDB, database: Database, counting: Daemon
) -> None:
    database.sql(
        "INSERT INTO events (account, number, at, kind, author, note)"
        f" VALUES ('{WIDE[0]}', 1, UTC_TIMESTAMP(6), 'block', 'root', '')"
    )

    def answer(name: str) -> str:
        with counting.policy() as policy:
            return policy.ask(sasl_username=name)

    wait_for(lambda: answer(WIDE[0]).startswith("REJECT"), 5, "the block")
    assert answer(WIDE[1]) == OK
    server.kill()
    assert answer(WIDE[1]) == OK
    assert answer(WIDE[0]).startswith("REJECT")
    counting.kill9()
    counting.start()
    assert answer(WIDE[1]) == OK
    assert answer(WIDE[0]).startswith("REJECT")
    server.start()
    settle(counting)
    assert count_rows(database, WIDE[1]) == 3


def test_a_reset_before_all_is_carried_over_wins(
    server: MariaDB, database: Database, spooling: StartDaemon
) -> None:
    rules = {"default": {"period": 3600, "msgquota": 5, "msg": "over quota"}}
    counting = spooling(database.config(), rules)
    with counting.policy() as policy:
        assert [policy.ask() for _ in range(2)] == [OK] * 2
        server.kill()
        assert [policy.ask() for _ in range(4)] == [OK] * 3 + [REFUSED]
        counting.stop()
        server.start()
        database.sql(reset_statement("alice@example.com"))
    counting.start()
    settle(counting)
    with counting.policy() as policy:
        assert [policy.ask() for _ in range(3)] == [OK] * 2 + [REFUSED]
    totals = database.sql("SELECT epoch, total FROM sends WHERE account = 'alice@example.com'")
    assert " ".join(totals.split()) == "1 1 1 2 2 0 2 1 2 2 2 3 2 4 2 5"


def test_another_onfailure_carries_over_what_is_left(
    server: MariaDB, database: Database, counting: Daemon
) -> None:
    with counting.policy() as policy:
        assert policy.ask() == OK
        server.kill()
        assert policy.ask() == OK
    counting.stop()
    assert "saslquota.spool holds 1 sends that the database lacks" in counting.log()
    # The least of _dbtimeout, which leaves a spool no time: nothing goes on in one.
    counting.config.update({"_onfailure": "DEFER_IF_PERMIT", "_dbtimeout": 2})
    counting.write_config()
    server.start()
    counting.start()
    settle(counting)
    assert count_rows(database, "alice@example.com") == 2
    server.kill()
    with counting.policy() as policy:
        assert policy.ask() == DEFERRED


def test_a_second_daemon_cannot_use_the_same_spool(
    server: MariaDB, database: Database, counting: Daemon, daemon: StartDaemon
) -> None:
    with counting.policy() as policy:
        assert policy.ask() == OK
    spool = {"_spoolfile": str(counting.directory / "saslquota.spool")}
    with SlowProxy(server.port) as proxy, proxy.slow(0.1):
        # To connect takes longer than is left when one can go on in a spool.
        other = daemon({**database.config(), **CONFIG, **spool, "_myport": proxy.port}, RULES)
        with other.policy() as policy:
            assert policy.ask() == OK
    with other.policy() as policy:
        wait_for_log(other, "spool cannot be used.*database is locked - another saslquota uses it")
        server.kill()
        assert policy.ask() == DEFERRED
    with counting.policy() as policy:
        assert policy.ask() == OK
