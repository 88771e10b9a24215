"""A database breaks under load: nothing lost, nothing twice, nobody over quota, all answered.

To each promised time SLACK (a second) is added: here load, daemon and database share a machine.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from helpers import StartDaemon, kept_running, mysql_config, require
from servers.audit import audit, audit_all, count_rows, entries
from servers.clock import (
    CLOCK_RULES,
    ClockedDaemon,
    ClockedMariaDB,
    audit_clocked,
    libfaketime,
    set_clock,
    set_clock_under_load,
)
from servers.daemon import Daemon, PolicyClient
from servers.disk import full
from servers.load import (
    CONFIG,
    DEFERRED,
    LATEST,
    NARROW,
    OK,
    REFUSED,
    RULES,
    SLACK,
    WIDE,
    Load,
    outlast,
)
from servers.mariadb import (
    Database,
    MariaDB,
    changed,
    crowded,
    frozen,
    kill_connections,
    rows_locked,
    session,
    tables_locked,
)
from servers.mysql import MySQL
from servers.ports import LOOPBACK
from servers.process import ROOT, pause, run, wait_for, wait_for_log
from servers.proxy import SlowProxy

from saslquota import HEAD_ROWS, MySQLStore

pytestmark = pytest.mark.slow


# What does not depend on the server, or is tested with each in test_stores.py.
ONLY_MARIADB = pytest.mark.parametrize("each_server", ["mariadb"], indirect=True)


@pytest.fixture
def server(each_server: MariaDB) -> MariaDB:
    return each_server


@pytest.fixture
def counting(database: Database, daemon: StartDaemon) -> Iterator[Daemon]:
    """A daemon on the database, in whose log no bug may show."""
    running = daemon({**database.config(), **CONFIG}, RULES)
    yield running
    assert "Traceback" not in running.log()


@pytest.mark.parametrize(
    ("each_server", "times"), [("mariadb", 5), ("mysql", 2)], indirect=["each_server"]
)
def test_killed_again_and_again(
    server: MariaDB, database: Database, counting: Daemon, times: int
) -> None:
    with Load(counting.port) as load:
        for _ in range(times):
            load.wait(OK, 10, 100)
            server.kill()
            load.wait(DEFERRED, LATEST + SLACK, 50)
            server.start()
            load.counts_within()
    audit_all(database, load)


def test_killed_and_back_before_anybody_notices(
    server: MariaDB, database: Database, counting: Daemon
) -> None:
    """Idle connections break, and the first request after that is counted."""
    with counting.policy() as policy:
        assert policy.ask(instance="before") == OK
        pause(0.5)  # the purge has had its look at the clock
        server.kill()
        server.start()
        assert policy.ask(instance="after") == OK
    assert [row.instance for row in entries(database)] == ["before", "after"]


@ONLY_MARIADB
def test_frozen(server: MariaDB, database: Database, counting: Daemon) -> None:
    with Load(counting.port) as load:
        outlast(counting, load, frozen(server), seconds=20)
    audit_all(database, load)


@ONLY_MARIADB
def test_inserts_that_wake_up_make_no_second_row(
    server: MariaDB, database: Database, counting: Daemon
) -> None:
    """Frozen in the middle of INSERTs time and again, shorter and longer than a statement may
    take: those that the daemon gave up wake, and race with their own repetition."""
    with Load(counting.port, pause=0.001) as load:
        for tenths in (3, 8, 12, 16, 12, 8, 3, 12):
            load.wait(OK, 10, 100)
            server.freeze()
            pause(tenths / 10)
            server.thaw()
            load.counts_within()
    audit_all(database, load)


def test_a_global_read_lock(server: MariaDB, database: Database, counting: Daemon) -> None:
    """What backups take."""
    with Load(counting.port) as load:
        outlast(counting, load, tables_locked(server), seconds=20)
    audit_all(database, load)


@pytest.mark.parametrize(
    ("each_server", "number", "lock", "dbtimeout"),
    [
        ("mariadb", 1, "read", 2),
        ("mariadb", 2, "beyond", 5),
        ("mariadb", 3, "read", 5),
        ("mysql", 1, "beyond", 2),
        ("mysql", 1, "read", 3),
        ("mysql", 2, "read", 5),
    ],
    indirect=["each_server"],
)
def test_some_senders_rows_are_locked(
    database: Database, daemon: StartDaemon, number: int, lock: str, dbtimeout: int
) -> None:
    """By somebody's transaction: all others are counted meanwhile, and nobody else is named.

    Each is found by a wait of a second, or two; in MySQL also when one is known already, so that
    with two of them _dbtimeout must be more than four."""
    found = 2 * number if isinstance(database.server, MySQL) else 2  # seconds until all are known
    victims = [f"{n}@example.com" for n in range(number)]  # before all others in the index, where
    config = {**database.config(), "_loglevel": "INFO", "_dbtimeout": dbtimeout}
    counting = daemon(config, RULES)  # InnoDB locks gaps, too
    with Load(counting.port, (*victims, *NARROW, *WIDE)) as load:
        load.wait(OK, 10, 300)
        with rows_locked(database, victims, lock):
            locked = time.monotonic()
            pause(8)
            unlocked = time.monotonic()
        load.counts_within()

        def counted_again() -> set[str]:
            return {s.account for s in load.accepted() if s.began > unlocked} & set(victims)

        wait_for(lambda: len(counted_again()) == number, 10, "all are counted again")
        assert time.monotonic() - unlocked < dbtimeout + SLACK
    load.assert_answered(dbtimeout + 0.5)
    audit(entries(database), load.accepted())
    during = [s for s in load.between(locked, unlocked) if s.ended < unlocked]
    assert {s.reply for s in during if s.account in victims} == {DEFERRED}
    assert max(s.took for s in during if s.began > locked + found) < SLACK
    assert {s.reply for s in load.samples if s.account not in victims} == {OK, REFUSED}
    assert sum(s.reply == OK for s in during) > 250
    named = wait_for_log(counting, "rows locked by another database session", number)
    assert sorted(re.sub(r".*account (\S+): .*", r"\1", line) for line in named) == victims
    assert "database unavailable" not in counting.log()


def test_a_pools_rows_are_locked(database: Database, daemon: StartDaemon) -> None:
    """Whoever needs the pool gets the fallback at once; the log names the pool, and no sender."""
    pool = {"@quota.example": {"period": 3600, "msgquota": 1_000_000}}
    counting = daemon({**database.config(), "_loglevel": "INFO"}, {**RULES, **pool})
    with Load(counting.port) as load:
        load.wait(OK, 10, 300)
        with rows_locked(database, ["POOL @quota.example"]):
            locked = time.monotonic()
            pause(8)
            unlocked = time.monotonic()
        load.counts_within()
    load.assert_answered(2)
    during = [s for s in load.between(locked, unlocked) if s.ended < unlocked]
    assert {s.reply for s in during if s.account in NARROW} - {REFUSED} == {DEFERRED}
    assert {s.reply for s in during if s.account in WIDE} == {OK}
    assert max(s.took for s in during if s.began > locked + 2) < 2 * SLACK
    (line,) = wait_for_log(counting, "rows locked by another database session")
    assert "account POOL @quota.example: " in line


@ONLY_MARIADB
@pytest.mark.parametrize(("delay", "dbtimeout"), [(1.8, 5), (0.8, 2)])
def test_a_slow_server_is_a_dead_one(
    server: MariaDB, database: Database, daemon: StartDaemon, delay: float, dbtimeout: int
) -> None:
    """Each statement takes long. The log says so, nobody waits twice, and who was deferred has not
    used up his quota: at most the one mail that was in the database's hands."""
    with SlowProxy(server.port) as proxy:
        config = {**database.config(), "_myport": proxy.port, "_dbtimeout": dbtimeout}
        quota = {"default": {"period": 3600, "msgquota": 3, "msg": "over quota"}}
        counting = daemon({**config, "_loglevel": "INFO"}, quota)
        with counting.policy() as policy, counting.policy() as other:
            assert policy.ask(sasl_username="alice@example.com") == OK
            with proxy.slow(delay):
                replies: list[str] = []
                waits: list[float] = []
                ends = time.monotonic() + 3 * dbtimeout
                while time.monotonic() < ends:  # what is to be read of a new sender takes longest
                    name = f"new{len(waits)}@example.com"
                    other.send(PolicyClient.block(sasl_username=name))
                    began = time.monotonic()
                    replies.append(policy.ask(sasl_username="bob@example.com"))
                    waits.append(time.monotonic() - began)
                    other.reply()
                    pause(0.2)
                assert max(waits) < dbtimeout + 0.5
                deferred = [w for w, reply in zip(waits, replies, strict=True) if reply == DEFERRED]
                assert sum(wait > 0.5 for wait in deferred) <= 2
                assert replies[-1] == DEFERRED
                wait_for_log(counting, "database unavailable, senders get .*: timed out")
            wait_for(lambda: policy.ask(sasl_username="dora@example.com") == OK, 15, "it is back")
            counted = replies.count(OK)
            more = [policy.ask(sasl_username="bob@example.com") for _ in range(4)]
            assert more.count(OK) >= 2 - counted
    assert count_rows(database, "bob@example.com") == 3


def test_too_many_connections(server: MariaDB, database: Database, counting: Daemon) -> None:
    with Load(counting.port) as load:
        outlast(counting, load, crowded(server, database), "1040.*Too many connections")
    audit_all(database, load)


@ONLY_MARIADB
def test_connections_dropped_in_mid_query(
    server: MariaDB, database: Database, counting: Daemon
) -> None:
    """Nobody is told: the next connection answers."""
    with Load(counting.port) as load, session(server) as admin:
        for _ in range(30):
            load.wait(OK, 10, 20)
            kill_connections(admin, database)
        load.wait(REFUSED, 10, 20)
    audit_all(database, load)
    assert DEFERRED not in {sample.reply for sample in load.samples}


def test_a_read_only_server(server: MariaDB, database: Database, counting: Daemon) -> None:
    with Load(counting.port) as load:
        outlast(counting, load, changed(server, "read_only", 1), "1290.*read-only")
    audit_all(database, load)


def test_a_wrong_password(server: MariaDB, database: Database, counting: Daemon) -> None:
    def alter(password: str) -> None:
        for host in ("localhost", LOOPBACK):
            server.sql(f"ALTER USER {database.user}@'{host}' IDENTIFIED BY '{password}'")

    @contextmanager
    def another() -> Iterator[None]:
        with ExitStack() as stack, session(server) as admin:
            stack.callback(alter, database.password)
            alter("another")
            kill_connections(admin, database)
            yield

    with Load(counting.port) as load:
        outlast(counting, load, another(), "1045.*check _myuser and _mypasswd")
    audit_all(database, load)


def test_a_missing_table(database: Database, counting: Daemon) -> None:
    with Load(counting.port) as load:
        load.wait(OK, 10, 100)
        database.sql("DROP TABLE sends")
        load.wait(DEFERRED, LATEST + SLACK, 50)
        wait_for_log(counting, f"database unavailable.*1146.*run mysql {database.name} < mysql.sql")
        imported = time.monotonic()
        database.sql((ROOT / "mysql.sql").read_text("utf-8"))
        load.counts_within()
    load.assert_answered(LATEST)
    audit(entries(database), [s for s in load.accepted() if s.began > imported])


def test_a_full_disk(small_server: MariaDB, disk: Path, daemon: StartDaemon) -> None:
    database = small_server.create_database()
    counting = daemon({**database.config(), **CONFIG}, RULES)
    with Load(counting.port, pause=0.001) as load:
        load.wait(OK, 10, 100)
        with full(disk):
            load.wait(DEFERRED, 60, 50)
            # The server says that it is full, or hangs until there is room again (2013).
            wait_for_log(counting, "database unavailable.*(1114|1030|1026|2013)")
        with kept_running(small_server):
            load.wait(OK, 60, 50)
            load.counts_within()
    audit_all(database, load)


@ONLY_MARIADB
def test_the_daemon_is_killed(database: Database, counting: Daemon) -> None:
    """Whoever was told OK is in the ledger; Postfix's connections come back."""
    with Load(counting.port) as load:
        for _ in range(5):
            load.wait(OK, 10, 200)
            counting.kill9()
            counting.start()
            load.counts_within()
    audit(entries(database), load.accepted())
    assert None in {sample.reply for sample in load.samples}


def test_the_servers_clock_is_set(new_directory: Callable[[], Path], daemon: StartDaemon) -> None:
    require("mariadbd", "mariadb-install-db", "mariadb")
    if not libfaketime():
        pytest.skip("not installed: libfaketime")
    with ClockedMariaDB(new_directory()) as server:
        database = server.create_database()
        counting = daemon({**database.config(), "_loglevel": "INFO"}, CLOCK_RULES)
        with Load(counting.port, NARROW) as load:
            set_clock_under_load(server.clock, load, database)
        audit_clocked(entries(database), load)


@ONLY_MARIADB
def test_the_daemons_clock_does_not_matter(
    database: Database, new_directory: Callable[[], Path]
) -> None:
    """Minutes ahead and minutes back: sends are counted by the server's."""
    if not libfaketime():
        pytest.skip("not installed: libfaketime")
    config = {**database.config(), "_loglevel": "INFO"}
    with (
        ClockedDaemon(new_directory(), config, CLOCK_RULES) as counting,
        Load(counting.port, NARROW) as load,
    ):
        for seconds in (300, -300, 0):
            set_clock(counting.clock, seconds)
            pause(1.5)  # until the file is read
            faked = int(run(["date", "+%s"], env=counting.environment()))
            assert abs(faked - time.time() - seconds) < 10, "the clock is not faked"
            load.wait(OK, 2 + SLACK, 20)
            load.wait(REFUSED, 10, 20)
    rows = entries(database)
    audit(rows, load.accepted(), lambda _: (2, 30))
    assert load.longest_wait() <= 2 + SLACK
    assert rows[-1].at <= time.time_ns() // 1000


def test_a_daemon_that_dies_with_locks_held_locks_nobody_out(
    database: Database, counting: Daemon
) -> None:
    """A machine that loses its power or its network closes no connection: the server keeps the
    locks of a transaction under way until it takes notice."""
    gone = MySQLStore(mysql_config(database))
    gone.open()
    with Load(counting.port) as load:
        load.wait(OK, 10, 100)
        gone.newest_entries(dict.fromkeys(sorted(NARROW + WIDE), HEAD_ROWS), take_locks=True)
        load.wait(DEFERRED, LATEST + SLACK, 50)
        load.wait(OK, 15, 50)
        load.counts_within()
    gone.close()
    audit_all(database, load)
