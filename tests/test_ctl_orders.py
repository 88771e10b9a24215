"""saslquotactl.py: reset, grant, block and unblock, on real stores and beside real daemons."""

import getpass
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

import pytest
from ctl import Ctl, Site
from helpers import StartDaemon, mysql_config
from servers.audit import SECOND
from servers.daemon import Daemon
from servers.mariadb import Database, session
from servers.process import ROOT, clean_environment, wait_for

import saslquota
import saslquotactl
from saslquota import Entry, MySQLStore, SQLiteStore, Store
from saslquotactl import ControlError, moment_of

BOB = "bob@example.com"
QUOTA: dict[str, object] = {"default": {"period": "1h", "msgquota": 5, "msg": "no more"}}
BUSY = "busy@example.com"
QUOTA[BUSY] = {"msgquota": 1_000_000}


def events(site: Site, columns: str = "kind") -> list[tuple[object, ...]]:
    rows = site.store.run(f"SELECT {columns} FROM events ORDER BY account, number")
    return [tuple(row) for row in rows]


def sends(site: Site, columns: str = "seq, epoch, recipients, total, instance") -> list[object]:
    return [tuple(row) for row in site.store.run(f"SELECT {columns} FROM sends ORDER BY 1, 2")]


# --- Times ----------------------------------------------------------------------------------------


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


def local_time(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * SECOND


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("now", "text", "until"),
    [
        ("2026-11-26 13:00", "18:00", "2026-11-26 18:00"),
        ("2026-11-26 13:00", "13:00", "2026-11-27 13:00"),
        ("2026-11-26 13:00", "7:05", "2026-11-27 07:05"),
        ("2026-11-30 13:00", "12:59", "2026-12-01 12:59"),
        ("2026-12-31 13:00", "00:00", "2027-01-01 00:00"),
        ("2026-10-24 23:30", "23:15", "2026-10-25 23:15"),
        ("2026-10-25 00:30", "00:15", "2026-10-26 00:15"),  # this day has 25 hours
        ("2026-03-28 23:30", "23:15", "2026-03-29 23:15"),  # and this one 23
        ("2026-11-26 13:00", "2026-12-24", "2026-12-24 00:00"),
        ("2026-11-26 13:00", "2026-12-24 18:30", "2026-12-24 18:30"),
        ("2026-11-26 13:00", "90s", "2026-11-26 13:01:30"),
        ("2026-11-26 13:00", "2h", "2026-11-26 15:00"),
        ("2026-10-24 13:00", "1d", "2026-10-25 12:00"),  # a length, whatever the clock says
        ("2026-11-26 13:00", "1w", "2026-12-03 13:00"),
    ],
)
def test_until(now: str, text: str, until: str) -> None:
    assert moment_of(text, local_time(now)) == local_time(until)


@pytest.mark.parametrize(
    "text",
    [
        *("", "5", "25:00", "18:60", "18", "1:2:3", "0s", "9999999999w", "-1h", "tomorrow"),
        *("2026-02-30", "2026-13-01", "12/24", "1970-01-01", "2026-11-25", "2h3m", "99999999999s"),
    ],
)
def test_no_time_or_one_in_the_past(text: str) -> None:
    with pytest.raises(ControlError, match=r"in the past|must be a time"):
        moment_of(text, local_time("2026-11-26 13:00"))


# --- What is written ------------------------------------------------------------------------------


def test_a_reset_begins_an_epoch(site: Site, ctl: Ctl) -> None:
    site.sends(BOB, 3)
    site.sends("ann@example.com", 1)
    status, said = ctl(site, "reset", " BOB@Example.com", "-m", "ticket 12")
    assert (status, said) == (0, f"{BOB}: the count begins anew\n")
    assert sends(site)[-1] == (4, 2, 0, 0, "reset")
    assert len(sends(site)) == 5
    assert events(site, "account, number, kind, note") == [(BOB, 1, "reset", "ticket 12")]
    at = site.store.TIME.format("at")
    ((reset_at,),) = site.store.run(f"SELECT {at} FROM sends WHERE recipients = 0")
    ((event_at,),) = site.store.run(f"SELECT {at} FROM events")
    assert abs(reset_at - event_at) < SECOND
    assert abs(site.store.now() - event_at) < 60 * SECOND


@pytest.mark.parametrize(("ahead", "dated"), [(5, 5), (7200, 0)])
def test_a_reset_is_dated_now_or_a_little_later(
    local: Site, ctl: Ctl, ahead: int, dated: int
) -> None:
    """Not before a newest send that is a little ahead; away from a clock that was wrong."""
    local.sends(BOB, 1, ago=-ahead)
    now = local.store.now()
    assert ctl(local, "reset", BOB)[0] == 0
    ((at,),) = local.store.run("SELECT at FROM sends WHERE recipients = 0")
    assert now + (dated - 1) * SECOND < at < now + (dated + 3) * SECOND


def test_a_reset_while_a_grant_lasts_goes_with_it(site: Site, ctl: Ctl) -> None:
    site.sends(BOB, 3, epoch=4)
    assert ctl(site, "grant", BOB, "20", "--until", "2h")[0] == 0
    status, said = ctl(site, "reset", BOB)
    assert status == 0
    assert said.endswith(": goes on\n")
    assert events(site, "kind, amount, epoch") == [("grant", 20, 5), ("reset", None, None)]


def test_a_reset_after_a_grant_leaves_it(local: Site, ctl: Ctl) -> None:
    local.sends(BOB, 3)
    local.event(BOB, "grant", amount=20, epoch=1, until=-1)
    assert ctl(local, "reset", BOB) == (0, f"{BOB}: the count begins anew\n")
    assert events(local, "kind, epoch") == [("grant", 1), ("reset", None)]


def test_a_grant_lasts_24_hours_unless_told_otherwise(site: Site, ctl: Ctl) -> None:
    site.sends(BOB, 3, epoch=4)
    status, said = ctl(site, "grant", BOB, "2000")
    assert status == 0
    assert "24 hours" in said
    lasts = site.store.TIME.format("until"), site.store.TIME.format("at")
    ((until, at, amount, epoch),) = events(site, f"{', '.join(lasts)}, amount, epoch")
    assert 0 <= int(str(at)) + 86_400 * SECOND - int(str(until)) < 30 * SECOND
    assert (amount, epoch) == (2000, 4)
    assert len(sends(site)) == 3


def test_a_block_is_for_good_unless_told_otherwise(site: Site, ctl: Ctl) -> None:
    site.sends(BOB, 3)
    status, said = ctl(site, "block", BOB, "-m", "phished")
    assert (status, said) == (
        0,
        f"{BOB}: may not send; mail that waits: saslquotactl.py queue {BOB}\n",
    )
    assert "until" in ctl(site, "block", BOB, "--until", "2h")[1]
    assert events(site, "kind, until IS NULL, note") == [("block", 1, "phished"), ("block", 0, "")]
    assert ctl(site, "unblock", BOB)[0] == 0


def test_the_newest_order_ends_the_one_before_and_says_so(local: Site, ctl: Ctl) -> None:
    local.sends(BOB, 1)
    ctl(local, "block", BOB, "-m", "phished")
    assert "phished: has ended" in ctl(local, "grant", BOB, "5")[1]
    assert "grant +5 until" in ctl(local, "block", BOB)[1]
    assert ": has ended" in ctl(local, "unblock", BOB)[1]
    assert "has ended" not in ctl(local, "grant", BOB, "5")[1]


def test_what_is_not_blocked_cannot_be_unblocked(site: Site, ctl: Ctl) -> None:
    site.sends(BOB, 1)
    site.sends("ann@example.com", 1)
    nothing = f"saslquotactl: {BOB}: is not blocked\n"
    assert ctl(site, "unblock", BOB) == (1, nothing)
    site.event(BOB, "block", until=-1)
    assert ctl(site, "unblock", BOB) == (1, nothing)
    site.event(BOB, "grant", amount=5, epoch=1, until=60, number=2)
    assert ctl(site, "unblock", BOB) == (1, nothing)
    assert "known: ann@example.com" in ctl(site, "unblock", "anne@example.com")[1]
    assert len(events(site)) == 2


def test_what_was_pointless_leaves_no_lock(site: Site) -> None:
    site.sends(BOB, 1)
    row = {"account": BOB, "kind": "unblock", "author": "root", "note": ""}
    for _ in range(2):
        with pytest.raises(saslquotactl.Pointless):
            saslquotactl.place(site.store, row)
    saslquotactl.place(site.store, {**row, "kind": "block"})
    assert events(site) == [("block",)]


def test_a_login_that_has_never_sent(site: Site, ctl: Ctl) -> None:
    site.sends("bobby@example.com", 1)
    status, said = ctl(site, "reset", BOB)
    assert (status, said) == (
        1,
        f"saslquotactl: {BOB}: has never sent anything; known: bobby@example.com\n",
    )
    assert events(site) == []
    for command in (["grant", BOB, "5"], ["block", BOB]):
        status, said = ctl(site, *command)
        assert status == 0
        assert "note: it has never sent anything; known: bobby@example.com\n" in said
    assert events(site, "kind, number, epoch") == [("grant", 1, 1), ("block", 2, None)]


def test_a_pool(site: Site, ctl: Ctl) -> None:
    site.sends("POOL @example.com", 2)
    site.sends("POOL *", 2)
    for pool in ("@Example.com", "*"):
        assert ctl(site, "reset", pool) == (0, f"{pool.lower()}: the count begins anew\n")
        assert ctl(site, "block", pool) == (0, f"{pool.lower()}: may not send\n")
    accounts = [row[0] for row in events(site, "account")]
    assert accounts == ["POOL *", "POOL *", "POOL @example.com", "POOL @example.com"]


def test_who_did_it(local: Site, ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "kim")
    ctl(local, "block", BOB)
    monkeypatch.delenv("SUDO_USER")
    ctl(local, "block", BOB)
    assert [row[0] for row in events(local, "author")] == ["kim", getpass.getuser()]


def test_as_json(local: Site, ctl: Ctl) -> None:
    row = json.loads(ctl(local, "--json", "block", BOB, "--until", "2030-01-01", "-m", "x")[1])
    assert (row["account"], row["kind"], row["note"], row["has_sent"]) == (BOB, "block", "x", False)
    assert row["until"].startswith(("2029-12-31T", "2030-01-01T"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["block", ""],
        ["block", "x" * 321],
        ["block", BOB, "-m", "x" * 401],
        ["block", BOB, "--until", "yesterday"],
    ],
    ids=["nobody", "long-login", "long-note", "time"],
)
def test_what_cannot_be_written_is_one_line(site: Site, ctl: Ctl, arguments: list[str]) -> None:
    status, said = ctl(site, *arguments)
    assert (status, said.count("\n")) == (2, 1)
    assert events(site) == []


def test_any_bytes_in_a_login_or_a_note(site: Site, ctl: Ctl) -> None:
    login, note = "b\udcff'o\\b?%@x.example", "\udcfe it's \\ 100% ? \x1b[2J"
    assert ctl(site, "block", login, "-m", note)[0] == 0
    assert ctl(site, "unblock", login, "-m", note)[0] == 0
    ((found,),) = set(events(site, "note"))
    assert found == note.replace("\udcfe", "\\udcfe")


def test_without_the_table_of_events(tmp_path: Path, database: Database, ctl: Ctl) -> None:
    with closing(MySQLStore(mysql_config(database))) as store:
        site = Site(tmp_path, store, database.config())
        site.sends(BOB, 1)
        database.sql("DROP TABLE events")
        for command in ("reset", "block", "unblock"):
            status, said = ctl(site, command, BOB)
            assert (status, said.count("\n")) == (2, 1)
            assert f"run mysql {database.name} < mysql.sql" in said
        assert len(sends(site)) == 1


# --- Beside daemons -------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "mariadb"])
def beside(
    request: pytest.FixtureRequest, daemon: StartDaemon
) -> Iterator[tuple[Site, list[Daemon]]]:
    """Two daemons, and the site where they count."""
    made: list[Daemon] = []
    if request.param == "sqlite":
        made.append(daemon(rules=QUOTA))
        made.append(daemon({"_sqlitefile": str(made[0].ledger)}, QUOTA))
        store: Store = SQLiteStore(made[0].ledger, 5)
    else:
        database: Database = request.getfixturevalue("database")
        made += [daemon(database.config(), QUOTA) for _ in range(2)]
        store = MySQLStore(mysql_config(database))
    site = Site.__new__(Site)
    site.config, site.store = made[0].config_file, store
    with closing(store):
        store.open()
        yield site, made


def test_all_daemons_obey_within_a_second(beside: tuple[Site, list[Daemon]], ctl: Ctl) -> None:
    site, daemons = beside
    one, two = (started.policy() for started in daemons)
    with one, two:

        def become(answer: str) -> None:
            began = time.monotonic()
            for policy in (one, two):
                wait_for(lambda: policy.ask(sasl_username=BOB).startswith(answer), 5, answer)  # noqa: B023
            assert time.monotonic() - began < 1.5

        assert [one.ask(sasl_username=BOB) for _ in range(6)][4:] == ["OK", "REJECT no more"]
        assert ctl(site, "grant", BOB, "1000", "--until", "1h")[0] == 0
        become("OK")
        assert ctl(site, "block", BOB)[0] == 0
        become("REJECT this account may not send")
        assert ctl(site, "unblock", BOB)[0] == 0
        become("REJECT no more")
        assert ctl(site, "reset", BOB)[0] == 0
        wait_for(lambda: two.ask(sasl_username=BOB) == "OK", 1.2, "the count has begun anew")
        answers = [two.ask(sasl_username=BOB) for _ in range(5)]
        assert answers == ["OK"] * 4 + ["REJECT no more"]


def assert_unbroken(rows: list[Entry]) -> None:
    """Numbers without a gap, in each epoch totals that add up, every reset in its place."""
    total = epoch = 0
    for number, row in enumerate(rows, 1):
        assert row.seq == number
        assert row.epoch in (epoch, epoch + 1)
        total = row.recipients + (total if row.epoch == epoch else 0)
        epoch = row.epoch
        assert row.total == total


def test_orders_while_the_login_is_at_it(beside: tuple[Site, list[Daemon]], ctl: Ctl) -> None:
    site, daemons = beside
    accepted = [0] * 6

    def ask(number: int) -> None:
        with daemons[number % 2].policy() as policy:
            while not stop.is_set():
                accepted[number] += policy.ask(sasl_username=BUSY) == "OK"

    stop = threading.Event()
    threads = [threading.Thread(target=ask, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: sum(accepted) > 50, 10, "he sends")
        slowest = 0.0
        for number in range(8):
            began = time.monotonic()
            command = ["reset", BUSY] if number % 2 else ["grant", BUSY, "5"]
            assert ctl(site, *command)[0] == 0
            slowest = max(slowest, time.monotonic() - began)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert slowest < 5
    rows = [Entry(*row) for row in sends(site, "account, " + ", ".join(Entry._fields[1:]))]  # type: ignore[misc]
    assert_unbroken(rows)
    assert sum(row.recipients for row in rows) == sum(accepted)
    assert sum(row.instance == "reset" for row in rows) == 4
    assert [row[0] for row in events(site)] == ["grant", "reset"] * 4
    assert not any("unavailable" in started.log() for started in daemons)


def test_two_administrators_at_once(site: Site) -> None:
    """Each event has its number, and each reset its row."""
    site.sends(BOB, 1)

    def work() -> None:
        config = saslquota.find_config(site.config)
        session = saslquotactl.Session(config)
        try:
            for kind in itertools.islice(itertools.cycle(["block", "reset", "unblock"]), 15):
                row = {"account": BOB, "kind": kind, "author": "root", "note": ""}
                try:
                    saslquotactl.place_at_last(session.store, row)
                    done.append(kind)
                except saslquotactl.Pointless:
                    assert kind == "unblock"
        finally:
            session.close()

    done: list[str] = []
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(str(row[0]) for row in events(site)) == sorted(done)
    assert [row[0] for row in events(site, "number")] == list(range(1, len(done) + 1))
    assert done.count("block") == done.count("reset") == 15
    assert [row[1] for row in sends(site, "seq, epoch")] == list(range(1, 17))  # type: ignore[index]


# --- When it is killed, or must wait --------------------------------------------------------------

# Runs the script, and kills it with the statement of a number, before or after that is done.
KILLED = """
import os, signal, sys
import saslquota, saslquotactl
number, name = int(sys.argv[1]), sys.argv[2]
store = getattr(saslquota, name)
run, begun = store._execute, 0
def execute(self, sql, values):
    global begun
    begun += bool(begun) or sql.startswith("BEGIN") and self._execute_is_ours
    if begun == number and begun: os.kill(os.getpid(), signal.SIGKILL)
    return run(self, sql, values)
store._execute_is_ours = False
place = saslquotactl.place
def ours(*arguments):
    store._execute_is_ours = True
    return place(*arguments)
saslquotactl.place = ours
store._execute = execute
raise SystemExit(saslquotactl.main(sys.argv[3:]))
"""


def test_killed_at_any_statement_nothing_is_half_done(site: Site) -> None:
    site.sends(BOB, 1)
    site.event(BOB, "grant", amount=5, epoch=1, until=3600)
    name = type(site.store).__name__
    for number in itertools.count(1):
        arguments = [str(number), name, "-c", str(site.config), "reset", BOB]
        done = subprocess.run(
            [sys.executable, "-c", KILLED, *arguments],
            cwd=ROOT,
            env=clean_environment(),
            capture_output=True,
            timeout=60,
        )
        resets = [row for row in sends(site) if row[-1] == "reset"]  # type: ignore[index]
        kinds = [row[0] for row in events(site)]
        epochs = [row[0] for row in events(site, "epoch") if row[0] is not None]
        assert len(resets) == kinds.count("reset")
        assert epochs == [1 + len(resets)], "that of the grant"
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert number > 5
    assert 1 <= len(resets) <= 2  # once, or again where it was killed after its COMMIT


@contextmanager
def locked(site: Site, database: Database | None) -> Iterator[None]:
    """Another session has the rows of Bob."""
    if database is None:
        site.store.run("BEGIN IMMEDIATE")
        yield
        site.store.run("ROLLBACK")
    else:
        with session(database.server, database.name) as other:
            other.execute("BEGIN")
            other.execute(f"SELECT seq FROM sends WHERE account = '{BOB}' FOR UPDATE")
            other.fetchall()
            yield


@pytest.fixture
def holder(request: pytest.FixtureRequest, site: Site) -> Database | None:
    is_sqlite = isinstance(site.store, SQLiteStore)
    return None if is_sqlite else request.getfixturevalue("database")


def test_killed_while_it_waits_nothing_is_done(site: Site, holder: Database | None) -> None:
    site.sends(BOB, 1)
    command: list[str | Path] = [
        sys.executable,
        ROOT / "saslquotactl.py",
        "-c",
        site.config,
        "reset",
        BOB,
    ]
    with locked(site, holder):
        process = subprocess.Popen(command, env=clean_environment())
        if holder:
            waiting = "info LIKE '%FOR UPDATE%' AND info NOT LIKE '%processlist%'"
            select = f"SELECT COUNT(*) FROM information_schema.processlist WHERE {waiting}"
            wait_for(lambda: holder.sql(select) == "1", 10, "it waits")
        else:
            began = time.monotonic()
            wait_for(lambda: time.monotonic() > began + 0.7, 5, "it waits")
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert events(site) == []
    assert len(sends(site)) == 1


def test_it_waits_for_a_lock_that_goes_away(site: Site, holder: Database | None, ctl: Ctl) -> None:
    site.sends(BOB, 1)
    with locked(site, holder):
        thread = threading.Thread(target=lambda: done.append(ctl(site, "reset", BOB)))
        done: list[tuple[int, str]] = []
        thread.start()
        thread.join(1.5)
        assert not done
    thread.join(20)
    assert done[0][0] == 0
    assert len(sends(site)) == 2


def test_it_gives_up_on_a_lock_that_stays(
    site: Site, holder: Database | None, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.sends(BOB, 1)
    monkeypatch.setattr(saslquotactl, "PATIENCE", 0.5)
    with locked(site, holder):
        status, said = ctl(site, "block", BOB)
    assert (status, said.count("\n")) == (2, 1)
    assert ("nothing was done" if holder else "database is locked") in said
    assert events(site) == []
    assert ctl(site, "block", BOB)[0] == 0
