"""The contract of a Store, over every real one, with one ledger and with several at once."""

import math
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import DAY, lone_charge, mysql_config, new_committer, submit
from servers.audit import SECOND, count_rows
from servers.mariadb import Database, MariaDB, changed, crowded
from servers.mysql import MySQL, require_mysql
from servers.process import ROOT, wait_for

import saslquota
from saslquota import (
    HEAD_ROWS,
    Clock,
    Config,
    Conflict,
    Entry,
    Ledger,
    MySQLStore,
    Purge,
    SQLiteStore,
    Store,
    Unavailable,
    Window,
)

OpenStore = Callable[[], Store]


@pytest.fixture
def server(each_server: MariaDB) -> MariaDB:
    return each_server


@pytest.fixture(
    params=[
        "sqlite",
        *(
            pytest.param(name, marks=pytest.mark.server)
            for name in ("mariadb", "mariadb-pure", "mysql", "mysql-pure")
        ),
    ]
)
def new_store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OpenStore]:
    """Make stores on one and the same ledger; each is another daemon's."""
    make: OpenStore
    if request.param == "sqlite":

        def make() -> Store:
            return SQLiteStore(tmp_path / "ledger.db", 5)
    else:
        connector = saslquota.load_connector()
        if not connector.HAVE_CEXT:
            pytest.fail("the C extension must be loaded before pytest, as tests/run does")
        name, _, pure = request.param.partition("-")
        if pure:
            monkeypatch.setattr(connector, "HAVE_CEXT", False)
        config = mysql_config(request.getfixturevalue(name).create_database())

        def make() -> Store:
            return MySQLStore(config)

    with ExitStack() as stack:

        def opened() -> Store:
            store = make()
            stack.callback(store.close)
            store.open()
            return store

        yield opened


def row(account: str, seq: int, at: int, **changes: object) -> Entry:
    return Entry(account, seq, 1, at, 1, seq, "1f.2", 77)._replace(**changes)  # type: ignore[arg-type]


# --- Each method ----------------------------------------------------------------------------------


def test_now_is_the_time(new_store: OpenStore) -> None:
    store = new_store()
    before = time.time_ns() // 1000
    assert before - SECOND < store.now() < before + 5 * SECOND


def test_what_is_appended_is_read_back(new_store: OpenStore) -> None:
    store, other = new_store(), new_store()
    now = store.now()
    rows = [row("a", 1, now), row("a", 2, now + 1), row("b@x", 1, now + 2, epoch=3, total=9)]
    store.append(rows)
    assert sorted(
        other.newest_entries(dict.fromkeys(["a", "b@x", "c"], HEAD_ROWS), take_locks=False)
    ) == [
        ("a", 1, 1, now, 0, 1),
        ("a", 2, 1, now + 1, 1, 2),
        ("b@x", 1, 3, now + 2, 8, 9),
    ]
    assert other.tokens(rows) == {77}
    assert other.tokens([row("c", 1, now)]) == set()


@pytest.mark.parametrize(
    "account",
    [
        "joão@exemplo.br",
        "😀@x",
        "o'neil\\@x",
        'a"b',
        "a%sb?",
        "a\x00b",
        "é",
        "x" * 320,
        "😀" * 320,
        "\\udcff",
    ],
)
def test_accounts_are_kept_to_the_letter(new_store: OpenStore, account: str) -> None:
    store = new_store()
    now = store.now()
    store.append([row(account, 1, now, instance=account[:64])])
    assert [
        sent.account
        for sent in store.newest_entries(dict.fromkeys([account], HEAD_ROWS), take_locks=False)
    ] == [account]
    assert (
        store.newest_entries(dict.fromkeys([account.upper()], HEAD_ROWS), take_locks=False) == []
        or account.upper() == account
    )


def test_accents_are_other_accounts(new_store: OpenStore) -> None:
    store = new_store()
    store.append([row("jose", 1, store.now())])
    assert store.newest_entries(dict.fromkeys(["josé"], HEAD_ROWS), take_locks=False) == []


def test_the_newest_some_and_the_following_sends_of_several_accounts(
    new_store: OpenStore,
) -> None:
    store = new_store()
    now = store.now()
    store.append([row("a", seq, now + seq) for seq in range(1, 101)])
    store.append([row("b", seq, now + seq) for seq in range(50, 60)])
    tails = {("a", seq) for seq in range(93, 101)} | {("b", seq) for seq in range(52, 60)}
    assert {
        sent[:2]
        for sent in store.newest_entries(
            dict.fromkeys(["a", "b", "c"], HEAD_ROWS), take_locks=False
        )
    } == tails
    probes = list(range(44, 60))
    some = {(name, seq) for name in "ab" for seq in probes if name == "a" or seq >= 50}
    assert {sent[:2] for sent in store.entries_at([(name, probes) for name in "abc"])} == some
    after = {("a", seq) for seq in range(11, 75)} | {("b", seq) for seq in range(58, 60)}
    wanted = [("a", 10), ("b", 57), ("c", 0)]
    assert {sent[:2] for sent in store.entries_after(wanted)} == after
    assert store.entries_after([]) == store.entries_at([]) == []


def test_the_latest_time_of_all(new_store: OpenStore) -> None:
    store = new_store()
    now = store.now()
    assert store.newest_at() == 0
    store.append([row("a", 1, now + DAY * SECOND + 1), row("a", 2, now), row("b", 1, now + 7)])
    assert store.newest_at() == now + DAY * SECOND + 1


def test_a_taken_seq_is_a_conflict_and_writes_nothing(new_store: OpenStore) -> None:
    store, other = new_store(), new_store()
    now = store.now()
    store.append([row("b", 1, now)])
    other.tokens([row("b", 1, now)])
    with pytest.raises(Conflict):
        other.append([row("a", 1, now, token=5), row("b", 1, now, token=5)])
    assert store.newest_entries(dict.fromkeys(["a"], HEAD_ROWS), take_locks=False) == []
    assert store.tokens([row("b", 1, now)]) == {77}


def test_a_lock_keeps_others_out_until_the_append(new_store: OpenStore) -> None:
    store, other = new_store(), new_store()
    now = store.now()
    store.append([row("a", 1, now)])
    assert store.newest_entries(dict.fromkeys(["a"], HEAD_ROWS), take_locks=True)
    with ThreadPoolExecutor(1) as pool:
        other.close()  # SQLite's belong to their threads

        def compete() -> None:
            other.open()
            try:
                other.append([row("a", 2, now, token=5)])
            finally:
                other.close()

        race = pool.submit(compete)
        store.append([row("a", 2, now)])
        with pytest.raises((Conflict, Unavailable)):
            race.result(20)
    assert store.tokens([row("a", 2, now)]) == {77}


def test_it_is_never_too_late_for_what_is_committed(
    new_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A COMMIT takes so long that no other statement may begin: the entries are written."""
    store = new_store()
    now, run = store.now(), store.run

    def take_long(sql: str, *values: Any) -> list[Any]:
        found = run(sql, *values)
        if sql == "COMMIT":
            store._begin_until = -math.inf
        return found

    monkeypatch.setattr(store, "run", take_long)
    store.newest_entries({"a": 1}, take_locks=True)
    store.append([row("a", 1, now)])
    store._begin_until = math.inf
    assert store.tokens([row("a", 1, now)]) == {77}


def test_a_rollback_lets_go(new_store: OpenStore) -> None:
    store, other = new_store(), new_store()
    now = store.now()
    store.append([row("a", 1, now)])
    store.newest_entries(dict.fromkeys(["a"], HEAD_ROWS), take_locks=True)
    store.rollback()
    other.append([row("a", 2, now)])
    store.newest_entries(dict.fromkeys(["a"], HEAD_ROWS), take_locks=True)
    store.append([])
    other.append([row("a", 3, now)])


def test_a_purge_takes_old_rows_but_never_the_newest(
    new_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saslquota, "PURGE_ROWS", 4)
    store = new_store()
    now = store.now()
    old = now - 40 * DAY * SECOND
    for account in ("a", "b", "c"):
        rows = [row(account, seq, old) for seq in range(1, 6)]
        store.append([*rows, row(account, 6, old + 1)])
    store.append([row("a", 7, now)])
    purge, rounds = Purge(store, Clock(store, time.monotonic), 0), 1
    while purge.delete(now - 30 * DAY * SECOND):
        rounds += 1
    assert rounds == 5
    left = [row(account, seq, 0) for account in "abc" for seq in range(1, 8)]
    found = [r for r in left if store.tokens([r])]
    assert [(r.account, r.seq) for r in found] == [("a", 7), ("b", 6), ("c", 6)]


def test_a_closed_store_is_unavailable_until_it_is_opened(new_store: OpenStore) -> None:
    store = new_store()
    store.close()
    with pytest.raises(Unavailable):
        store.newest_entries(dict.fromkeys(["a"], HEAD_ROWS), take_locks=False)
    store.open()
    assert store.newest_entries(dict.fromkeys(["a"], HEAD_ROWS), take_locks=False) == []


# --- Ledgers at once ------------------------------------------------------------------------------


def race(ledgers: Sequence[Callable[[], Ledger]], requests: int, quota: int) -> int:
    """Let each ledger, in a thread of its own, charge its share of one account; count accepted."""
    windows = (Window(3600, quota),)
    share = requests // len(ledgers)

    def work(make: Callable[[], Ledger]) -> int:
        ledger, accepted = make(), 0
        for first in range(0, share, 25):
            batch = [lone_charge("a", 1, f"{first}", windows)] * min(25, share - first)
            verdicts = ledger.charge(batch, time.monotonic() + 60)
            accepted += sum(verdict.accepted for verdict in verdicts)
        ledger.close()
        return accepted

    with ThreadPoolExecutor(len(ledgers)) as pool:
        return sum(pool.map(work, ledgers))


@pytest.mark.parametrize("daemons", [2, 3])
def test_ledgers_at_once_accept_exactly_the_quota(new_store: OpenStore, daemons: int) -> None:
    def make() -> Ledger:
        return Ledger(new_store(), 30 * DAY)

    new_store()  # makes the file
    assert race([make] * daemons, 5000, 1000) == 1000
    head = max(new_store().newest_entries(dict.fromkeys(["a"], HEAD_ROWS), take_locks=False))
    assert (head.seq, head.total) == (1000, 1000)


def test_threads_of_one_daemon_accept_exactly_the_quota(new_store: OpenStore) -> None:
    """The committer's batches: 5000 requests of 40 threads."""
    store = new_store()
    store.close()  # the committer's thread opens it
    committer = new_committer(Ledger(store, 30 * DAY), 30)
    committer.start()
    charge = lone_charge("a", 1, "", (Window(3600, 1000),))
    with ThreadPoolExecutor(40) as pool:
        verdicts = list(pool.map(partial(submit, committer), [charge] * 5000))
    committer.stop(10)
    assert not committer.is_alive()
    assert None not in verdicts
    assert sum(verdict.accepted for verdict in verdicts if verdict) == 1000


# --- MariaDB in trouble ---------------------------------------------------------------------------


class Counted:
    """Charges one account from a thread, and remembers what was accepted."""

    def __init__(self, config: Config, quota: int) -> None:
        self.store = MySQLStore(config)
        self.ledger = Ledger(self.store, 30 * DAY)
        self.windows = (Window(3600, quota),)
        self.accepted: list[str] = []
        self.outages = 0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        count = 0
        while not self.stopping.is_set():
            count += 1
            batch = [lone_charge("a", 1, f"{count}.{n}", self.windows) for n in range(3)]
            try:
                verdicts = self.ledger.charge(batch, time.monotonic() + 30)
            except Unavailable:
                self.outages += 1
            else:
                pairs = zip(batch, verdicts, strict=True)
                self.accepted += [charge.instance for charge, v in pairs if v.accepted]
        self.ledger.close()

    def __enter__(self) -> "Counted":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def rows_of_accepted(self, database: Database) -> list[int]:
        """How many rows each accepted charge has."""
        found = database.sql("SELECT instance FROM sends WHERE account = 'a'").split()
        return [found.count(instance) for instance in self.accepted]


def test_connections_killed_in_mid_insert_leave_one_row_each(database: Database) -> None:
    with Counted(mysql_config(database), 100_000) as counted:
        for _ in range(25):
            accepted = len(counted.accepted)
            wait_for(lambda n=accepted: len(counted.accepted) > n + 20, 20, "accepted charges")  # type: ignore[misc]
            ids = daemons_connections(database).split()
            database.server.sql("".join(f"KILL {number};" for number in ids))
    assert counted.outages == 0
    assert set(counted.rows_of_accepted(database)) == {1}


def test_a_server_frozen_in_mid_insert_leaves_one_row_each(
    database: Database, server: MariaDB
) -> None:
    with Counted(mysql_config(database, dbtimeout=2), 100_000) as counted:
        for _ in range(3):
            accepted, outages = len(counted.accepted), counted.outages
            wait_for(lambda n=accepted: len(counted.accepted) > n + 20, 20, "accepted charges")  # type: ignore[misc]
            server.freeze()
            wait_for(lambda n=outages: counted.outages > n, 20, "the time-out")  # type: ignore[misc]
            server.thaw()
    assert set(counted.rows_of_accepted(database)) == {1}
    total = database.sql("SELECT COUNT(*) - MAX(seq) FROM sends WHERE account = 'a'")
    assert total.strip() == "0"


class FarStore(MySQLStore):
    """A store two milliseconds farther away."""

    def run(self, sql: str, values: Sequence[saslquota.Value] = ()) -> list[object]:
        time.sleep(0.002)
        return super().run(sql, values)


def test_a_daemon_farther_away_does_not_starve(database: Database) -> None:
    config = mysql_config(database)
    store = FarStore(config)
    ledger = Ledger(store, 30 * DAY)
    ledger.open()
    in_a_row, most = 0, 0
    append = store.append

    def count(entries: Sequence[Entry]) -> None:
        nonlocal in_a_row, most
        in_a_row += 1
        most = max(most, in_a_row)
        append(entries)
        in_a_row = 0

    store.append = count  # type: ignore[method-assign]
    with Counted(config, 1_000_000) as near:
        wait_for(lambda: len(near.accepted) > 20, 20, "the near daemon")
        for n in range(40):
            charge = lone_charge("a", 1, f"far{n}", (Window(3600, 1_000_000),))
            assert ledger.charge([charge], time.monotonic() + 30)[0].accepted
    ledger.close()
    assert most <= 15, "collisions in a row"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mypasswd": "wrong"}, "Access denied.*check _myuser and _mypasswd in saslquota.json"),
        ({"mydb": "nowhere"}, "nowhere.*(create database nowhere|grant all on nowhere)"),
        ({"myport": 1}, "127.0.0.1: 2003.*is the server running"),
        (
            {"myhost": ("unix:/nonexistent/s",)},
            "unix:/nonexistent/s: 200[23].*is the server running",
        ),
    ],
)
def test_trouble_is_told_with_its_remedy(
    database: Database, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(Unavailable, match=message):
        MySQLStore(mysql_config(database, **changes)).open()


def test_a_missing_table_is_told_with_the_command(server: MariaDB) -> None:
    database = server.create_database(with_table=False)
    store = MySQLStore(mysql_config(database))
    with pytest.raises(Unavailable, match=f"run mysql {database.name} < mysql.sql"):
        store.check()


def test_the_first_host_that_takes_sends_is_used(database: Database) -> None:
    port = mysql_config(database).myport
    hosts = ("127.0.0.1:1", f"localhost:{port}", "127.0.0.1:2")
    store = MySQLStore(mysql_config(database, myhost=hosts))
    for _ in range(2):
        store.open()
        store.append(
            [
                row(
                    "a",
                    1
                    + len(store.newest_entries(dict.fromkeys(["a"], HEAD_ROWS), take_locks=False)),
                    store.now(),
                )
            ]
        )
        store.close()
    assert store._hosts[0] == f"localhost:{port}"


def test_the_table_where_rows_are_compact_by_default(server: MariaDB) -> None:
    """1709: index columns that long need ROW_FORMAT=DYNAMIC."""
    with changed(server, "innodb_default_row_format", "compact"):
        database = server.create_database()
    assert "dynamic" in database.sql("SHOW TABLE STATUS LIKE 'sends'").lower()


def test_a_deadlock_at_commit_is_a_conflict() -> None:
    """What Group Replication says of two nodes that have written the same row."""

    class Failure(Exception):
        errno = 1180

    text = "Got error {} during COMMIT"
    deadlock = Failure(text.format("149 - 'Lock deadlock; Retry transaction'"))
    assert type(saslquota.store_error(deadlock)) is Conflict
    assert type(saslquota.store_error(Failure(text.format("28 - 'No space'")))) is Unavailable


# --- The connector --------------------------------------------------------------------------------


@pytest.fixture(params=["C extension", "pure Python"])
def connector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use each of the connector's implementations."""
    implementation: str = request.param
    if implementation == "pure Python":
        monkeypatch.setattr(saslquota.load_connector(), "HAVE_CEXT", False)
    return implementation


def test_an_old_connector_is_told_in_one_line(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saslquota.load_connector().version, "VERSION", (9, 1, 0, "", 1))
    with pytest.raises(Unavailable, match=r"too old, 9\.2 or newer.*pip install -U") as caught:
        MySQLStore(mysql_config(database)).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["192.0.2.1", "192.0.2.1:3307", "db.invalid", "127.0.0.1.invalid"])
def test_no_password_leaves_the_machine_in_clear_text(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pure connector sends it to whoever says that there is no TLS."""
    connector = saslquota.load_connector()
    monkeypatch.setattr(connector, "HAVE_CEXT", False)
    monkeypatch.setattr(connector, "connect", lambda **_: pytest.fail("it connects"))
    config = Config(Path("saslquota.json"), myhost=(host,), mypasswd="secret")
    with pytest.raises(Unavailable, match="clear text: set _mysslca"):
        MySQLStore(config).open()


@pytest.mark.parametrize(
    ("host", "changes"),
    [
        ("127.0.0.1", {}),
        ("[::1]:3306", {}),
        ("localhost", {}),
        ("unix:/run/mysqld/mysqld.sock", {}),
        ("192.0.2.1", {"mysslca": "ca.pem"}),
    ],
)
def test_where_the_pure_connector_may_connect(
    host: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = saslquota.load_connector()
    monkeypatch.setattr(connector, "HAVE_CEXT", False)
    told: list[dict[str, object]] = []
    monkeypatch.setattr(connector, "connect", lambda **options: told.append(options))
    saslquota.connect(Config(Path("saslquota.json"), **changes), host, 2)
    assert [options["use_pure"] for options in told] == [True]


class PlainMySQL(MySQL):
    """A server without TLS."""

    def command(self) -> Sequence[str | Path]:
        return [*super().command(), "--tls-version="]


def test_a_server_without_tls(new_directory: Callable[[], Path], connector: str) -> None:
    """It takes a caching_sha2_password from its Unix socket only; the error says so."""
    require_mysql()
    with PlainMySQL(new_directory()) as server:
        database = server.create_database()
        number = 2061 if connector == "C extension" else 1045
        remedy = "turn on TLS in the server, or use its Unix socket: _myhost unix:/path"
        with pytest.raises(Unavailable, match=f"{number}.*{remedy}"):
            MySQLStore(mysql_config(database)).open()
        store = MySQLStore(mysql_config(database, myhost=(f"unix:{server.socket}",)))
        store.open()
        store.close()


@pytest.mark.usefixtures("connector")
@pytest.mark.parametrize("tls", [True, False], ids=["tls", "stripped"])
def test_with_mysslca_there_is_no_connection_without_tls(
    new_directory: Callable[[], Path], tls: bool
) -> None:
    require_mysql()
    kind = MySQL if tls else PlainMySQL
    with kind(new_directory()) as server:
        database = server.create_database()
        ca = ROOT / "mysql.sql" if tls else server.directory / "data" / "ca.pem"
        with pytest.raises(Unavailable, match=r"(?i)certificate|SSL|TLS"):
            MySQLStore(mysql_config(database, mysslca=str(ca))).open()


# --- SQLite in trouble ----------------------------------------------------------------------------


def test_a_ledger_file_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(SQLiteStore(path, 1), 30 * DAY)
    charge = lone_charge("a", 1, "", (Window(60, 1),))
    assert ledger.charge([charge], time.monotonic() + 5)[0].accepted
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    ledger._accounts._clock.distrust()
    assert ledger.charge([charge], time.monotonic() + 5)[0].accepted
    ledger.close()
    assert path.exists()


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"\0" * 5000])
def test_a_file_that_is_no_database_is_told_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(content)
    with pytest.raises(Unavailable, match=r"ledger\.db: file is not a database"):
        SQLiteStore(path, 1).open()
    assert path.read_bytes() == content


def test_the_log_of_sqlite_shrinks_after_a_long_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a reader keeps its snapshot, the write-ahead log grows; then it is cut."""
    monkeypatch.setattr(saslquota, "WAL_PAGES", 100)
    path, wal = tmp_path / "ledger.db", tmp_path / "ledger.db-wal"
    store = SQLiteStore(path, 5)
    store.open()

    def write(account: str) -> None:
        for seq in range(1, 501):
            store.append([row(account, seq, seq)])

    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM sends").fetchall()
        write("a")
        assert wal.stat().st_size > 10 * 100 * 4096
    write("b")
    assert wal.stat().st_size < 2 * 100 * 4096
    store.close()


# --- Hosts and TLS --------------------------------------------------------------------------------


def read_only(server: MariaDB, _database: Database) -> AbstractContextManager[None]:
    """Error 1290."""
    return changed(server, "read_only", 1)


@contextmanager
def shut_down(server: MariaDB, _database: Database) -> Iterator[None]:
    """Error 1053, or the connection is just gone."""
    server.stop()
    try:
        yield
    finally:
        server.start()


@contextmanager
def two_servers(
    database: Database, new_directory: Callable[[], Path]
) -> Iterator[tuple[Ledger, Database]]:
    """A ledger whose hosts are the database's server and a second one; the latter's database."""
    with type(database.server)(new_directory()) as server:
        server.create_database()  # for its user
        server.sql(f"CREATE DATABASE IF NOT EXISTS {database.name}")
        server.sql(f"GRANT ALL ON {database.name}.* TO saslquota@'127.0.0.1'")
        second = replace(database, server=server, port=server.port)
        second.sql("DROP TABLE IF EXISTS sends;" + (ROOT / "mysql.sql").read_text("utf-8"))
        hosts = (f"127.0.0.1:{database.port}", f"127.0.0.1:{second.port}")
        ledger = Ledger(MySQLStore(mysql_config(database, myhost=hosts)), 30 * DAY)
        ledger.open()
        yield ledger, second
        ledger.close()


def test_an_idle_connection_that_the_server_closed_is_no_failed_host(
    database: Database, new_directory: Callable[[], Path], connector: str
) -> None:
    """Else a daemon would count on another host although the first one is well."""
    server = database.server
    charge = lone_charge("a", 1, "", (Window(60, 9),))
    with (
        changed(server, "wait_timeout", 1),
        two_servers(database, new_directory) as (ledger, second),
    ):
        for _ in range(3):
            assert ledger.charge([charge], time.monotonic() + 10)[0].accepted
            wait_for(lambda: not daemons_connections(database), 20, "the end of the connection")
        assert (count_rows(database), count_rows(second)) == (3, 0), connector


def daemons_connections(database: Database) -> str:
    return database.sql(
        "SELECT id FROM information_schema.processlist"
        f" WHERE db = '{database.name}' AND user != 'root'"
    )


@pytest.mark.parametrize("trouble", [read_only, crowded, shut_down])
def test_the_next_host_is_taken(
    database: Database,
    new_directory: Callable[[], Path],
    trouble: Callable[[MariaDB, Database], AbstractContextManager[None]],
) -> None:
    """And kept when the first one is well again."""
    charge = lone_charge("a", 1, "", (Window(60, 9),))
    with two_servers(database, new_directory) as (ledger, second):
        assert ledger.charge([charge], time.monotonic() + 10)[0].accepted
        with trouble(database.server, database):
            assert ledger.charge([charge], time.monotonic() + 10)[0].accepted
        assert ledger.charge([charge], time.monotonic() + 10)[0].accepted
        assert (count_rows(database, "a"), count_rows(second, "a")) == (1, 2)


class TLSMariaDB(MariaDB):
    """A server whose certificate, for localhost, a CA of the test's own has signed."""

    def command(self) -> Sequence[str | Path]:
        files = {"ca": "ca.pem", "cert": "server.pem", "key": "server.key"}
        options = [f"--ssl-{name}={self.directory / file}" for name, file in files.items()]
        return [*super().command(), *options]


def make_certificates(directory: Path, name: str) -> None:
    """A CA, and a server's certificate for `name` that it has signed."""
    script = f"""
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.pem
        openssl req -newkey rsa:2048 -nodes -subj /CN={name} -keyout server.key -out server.csr
        printf 'subjectAltName=DNS:{name}' > names
        openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \\
            -extfile names -out server.pem
        chmod 644 server.key
    """
    subprocess.run(["sh", "-ec", script], cwd=directory, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("name", "ca", "works"),
    [
        ("localhost", "ca.pem", True),
        ("localhost", "other.pem", False),
        ("db.example.com", "ca.pem", False),
    ],
    ids=["verified", "another-authority", "another-name"],
)
def test_the_servers_certificate_is_verified(
    new_directory: Callable[[], Path], name: str, ca: str, works: bool
) -> None:
    directory = new_directory()
    make_certificates(directory, "other.example.com")
    (directory / "ca.pem").rename(directory / "other.pem")
    make_certificates(directory, name)
    with TLSMariaDB(directory) as server:
        database = server.create_database()
        changes = {"myhost": ("localhost",), "mysslca": str(directory / ca)}
        store = MySQLStore(mysql_config(database, **changes))
        if works:
            store.open()
            assert store.run("SHOW STATUS LIKE 'Ssl_cipher'")[0][1]
            store.close()
        else:
            with pytest.raises(Unavailable, match=r"(?i)certificate|SSL"):
                store.open()
