"""The committer: what its callers get, beside a real SQLite ledger."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fleet import RESET
from helpers import DAY, Reply, lone_charge, mysql_config, new_committer, submit
from servers.audit import count_rows, entries
from servers.mariadb import Database, session
from servers.process import pause, wait_for

import saslquota
from saslquota import (
    AccountsLocked,
    Charge,
    Committer,
    Debit,
    Entry,
    Ledger,
    MySQLStore,
    SQLiteStore,
    Unavailable,
    Verdict,
    Window,
)

HOUR = (Window(3600, 2),)


@contextmanager
def running(path: Path, timeout: float = 10) -> Iterator[Committer]:
    committer = new_committer(Ledger(SQLiteStore(path, 1), 30 * DAY), timeout)
    committer.start()
    try:
        yield committer
    finally:
        committer.stop(10)
        assert not committer.is_alive()


@pytest.fixture
def committer(tmp_path: Path) -> Iterator[Committer]:
    with running(tmp_path / "ledger.db") as started:
        yield started


def ask(committer: Committer, windows: tuple[Window, ...] = HOUR, n: int = 1) -> Verdict:
    verdict = submit(committer, lone_charge("a", n, "", windows))
    assert verdict
    return verdict


def test_a_refusal_is_repeated_without_the_ledger(
    committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [ask(committer).accepted for _ in range(3)] == [True, True, False]
    monkeypatch.setattr(committer._ledger, "charge", pytest.fail)
    until = ask(committer).repeatable_until
    assert ask(committer) == ask(committer)
    assert time.monotonic() < until <= time.monotonic() + 1


def test_a_smaller_charge_is_not_refused_for_a_larger_one(committer: Committer) -> None:
    assert not ask(committer, n=3).accepted
    assert ask(committer, n=2).accepted


def test_a_larger_charge_is_decided_by_itself(committer: Committer) -> None:
    windows = (Window(3600, 2, msg="{retry_after}"),)
    assert [ask(committer, windows).accepted for _ in range(3)] == [True, True, False]
    first = ask(committer, windows)
    assert first.retry_at is not None
    assert first == ask(committer, windows)
    assert ask(committer, windows, n=3).retry_at == float("inf")
    several = (Window(60, 3), Window(3600, 4))
    assert ask(committer, several, n=2).window == several[0]
    assert ask(committer, several, n=3).window == several[1]


def test_a_refusal_by_a_pool_is_none_without_it(committer: Committer) -> None:
    full = Debit("POOL *", 1, (Window(3600, 0),))
    own = Debit("a", 1, HOUR)
    refused = submit(committer, Charge("", (own, full)))
    assert refused
    assert not refused.accepted
    assert ask(committer).accepted


def test_another_rule_ends_the_refusals(committer: Committer) -> None:
    assert [ask(committer).accepted for _ in range(3)] == [True, True, False]
    assert ask(committer, (Window(3600, 3),)).accepted


def test_a_refusal_ends_when_the_oldest_send_leaves(committer: Committer) -> None:
    windows = (Window(1, 1),)
    start = time.monotonic()
    assert ask(committer, windows).accepted
    wait_for(lambda: ask(committer, windows).accepted, 10, "the window slides")
    assert time.monotonic() - start > 0.99


def test_another_daemons_reset_ends_the_refusals(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with running(path) as committer:
        assert [ask(committer).accepted for _ in range(3)] == [True, True, False]
        store = SQLiteStore(path, 1)
        store.open()
        store.run(RESET, (0, "a"))
        store.close()
        wait_for(lambda: ask(committer).accepted, 5, "the reset is noticed")


class Stuck:
    """Keeps a committer in its ledger, before it charges anything."""

    def __init__(self, committer: Committer) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self._charge = committer._ledger.charge
        committer._ledger.charge = self.charge  # type: ignore[method-assign, assignment]

    def charge(
        self, charges: list[Charge], deadline: float, is_wanted: Callable[[int], bool]
    ) -> list[Verdict]:
        self.batches.append(len(charges))
        self.entered.set()
        assert self.go_on.wait(20)
        return self._charge(charges, deadline, is_wanted)


def one_of(name: str) -> Charge:
    return lone_charge(name, 1, "", HOUR)


def test_everybody_who_waits_when_it_gives_up_gets_the_fallback(tmp_path: Path) -> None:
    with running(tmp_path / "ledger.db", timeout=30) as committer:
        ask(committer)
        stuck, replies = Stuck(committer), [Reply(), Reply(), Reply()]
        committer.submit(one_of("b"), replies[0])
        assert stuck.entered.wait(5)
        for reply in replies[1:]:
            committer.submit(one_of("c"), reply)
        committer.give_up()
        assert [reply.wait(5) for reply in replies] == [None] * 3
        stuck.go_on.set()


def test_nobody_waits_longer_than_the_timeout(tmp_path: Path) -> None:
    """For a ledger that is stuck; what comes next has its fallback at once, also when the verdicts
    come at last."""
    with running(tmp_path / "ledger.db", timeout=1) as committer:
        ask(committer)
        stuck, first, second, third = Stuck(committer), Reply(), Reply(), Reply()
        start = time.monotonic()
        committer.submit(one_of("b"), first)
        assert stuck.entered.wait(5)
        committer.submit(one_of("c"), second)
        assert [first.wait(), second.wait()] == [None, None]
        assert 0.9 < time.monotonic() - start < 5
        assert committer.submit(one_of("d"), third) is None
        assert third.verdicts == [None]
        stuck.go_on.set()
        wait_for(lambda: submit(committer, one_of("e")), 10, "it counts again")
        assert [first.verdicts, second.verdicts] == [[None], [None]]


def test_what_was_given_up_is_not_written(tmp_path: Path) -> None:
    """Neither at its deadline nor when its connection is lost."""
    path = tmp_path / "ledger.db"
    with running(path, timeout=1) as committer:
        ask(committer)
        stuck, lost, reply = Stuck(committer), Reply(), Reply()
        pending = committer.submit(one_of("lost"), lost)
        assert stuck.entered.wait(5)
        assert pending
        assert pending.give_up()
        assert not pending.give_up()
        committer.submit(one_of("late"), reply)
        assert reply.wait() is None
        stuck.go_on.set()
        wait_for(lambda: submit(committer, one_of("e")), 10, "it counts again")
        assert lost.verdicts == []
    assert {entry.account for entry in entries(path)} == {"a", "e"}


def test_a_batch_that_ends_late_begins_an_outage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though each of its charges was answered in time, by the watchdog."""
    monkeypatch.setattr(saslquota.log, "propagate", True)
    with running(tmp_path / "ledger.db", timeout=1) as committer:
        ask(committer)
        append = committer._ledger._store.append
        written = threading.Event()

        def slow(entries: Sequence[Entry]) -> None:
            append(entries)
            if not written.is_set():
                written.set()
                pause(1.5)

        monkeypatch.setattr(committer._ledger._store, "append", slow)
        assert submit(committer, one_of("b")) is None
        wait_for(lambda: submit(committer, one_of("c")), 10, "it counts again")
    begin, end = (
        "database unavailable, the test waits (_onfailure) until it is back: timed out",
        ("sends are counted again"),
    )
    assert 0 <= caplog.text.find(begin) < caplog.text.find(end)


def test_a_bug_in_the_ledger_costs_one_batch(
    committer: Committer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saslquota.log, "propagate", True)
    assert ask(committer).used == 1

    def broken(*_: object, **_options: object) -> int:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(committer._ledger._accounts, "refresh", broken)
        assert submit(committer, one_of("a")) is None
        assert submit(committer, one_of("a")) is None
    assert ask(committer).used == 2
    assert "Traceback" in caplog.text
    assert "in broken" in caplog.text


def test_a_bug_that_comes_again_when_the_store_is_closed(committer: Committer) -> None:
    """In the connector, say, that has come out of step."""
    assert ask(committer).used == 1
    store = committer._ledger._store

    class Broken:
        def __getattr__(self, _name: str) -> object:
            raise ZeroDivisionError

    with closing(store._connection):
        store._connection = Broken()
        assert submit(committer, one_of("a")) is None
        assert ask(committer).used == 2


def test_a_bug_in_reconnecting_is_no_busy_loop(tmp_path: Path) -> None:
    committer = new_committer(Ledger(SQLiteStore(tmp_path / "none" / "x.db", 1), 30 * DAY), 30)
    opened = 0

    def broken(_deadline: float) -> None:
        nonlocal opened
        opened += 1
        raise ZeroDivisionError

    committer._outage.begin(Unavailable("the test"))
    committer._ledger.open = broken  # type: ignore[method-assign, assignment]
    committer.start()
    wait_for(lambda: opened >= 2, 10, "a second attempt")
    assert opened == 2
    assert committer.is_alive()
    committer.stop(10)


def test_a_bug_in_a_chore_costs_nothing(
    committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(committer)
    purges = threading.Event()

    def broken() -> bool:
        purges.set()
        raise ZeroDivisionError

    monkeypatch.setattr(committer._ledger, "purge", broken)
    committer._next_purge_at = 0.0
    assert submit(committer, one_of("b"))
    assert purges.wait(10)
    assert submit(committer, one_of("b"))


def test_a_bug_in_the_watchdog_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path / "ledger.db", timeout=1) as committer:
        ask(committer)
        stuck, bugs = Stuck(committer), threading.Event()

        def broken() -> None:
            bugs.set()
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(committer._outage, "remind", broken)
            assert bugs.wait(5)
        reply = Reply()
        committer.submit(one_of("b"), reply)
        assert reply.wait() is None
        stuck.go_on.set()


def test_a_batch_forms_while_another_is_under_way(committer: Committer) -> None:
    ask(committer)
    stuck, first = Stuck(committer), Reply()
    committer.submit(one_of("b"), first)
    assert stuck.entered.wait(5)
    others = [Reply() for _ in range(20)]
    for number, reply in enumerate(others):
        committer.submit(one_of(f"user{number}"), reply)
    stuck.go_on.set()
    assert all(reply.wait() for reply in [first, *others])
    assert stuck.batches == [1, 20]


def test_nobody_waits_for_a_store_that_is_known_to_be_down(tmp_path: Path) -> None:
    committer = new_committer(Ledger(SQLiteStore(tmp_path / "none" / "x.db", 1), 30 * DAY), 30)
    committer.start()
    assert submit(committer, one_of("a")) is None
    start = time.monotonic()
    assert [submit(committer, one_of("a")) for _ in range(100)] == [None] * 100
    assert time.monotonic() - start < 5
    (tmp_path / "none").mkdir()
    wait_for(lambda: submit(committer, one_of("a")), 10, "the store is there")
    committer.stop(10)


def test_an_outage_is_logged_at_once_and_every_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the store fails meanwhile; its end once. What the watchdog could not know, the
    cause, is logged when it is known."""
    now = 1000.0
    monkeypatch.setattr(saslquota.log, "propagate", True)
    monkeypatch.setattr("saslquota.time.monotonic", lambda: now)
    outage = saslquota.Outage("mail passes uncounted")
    for now in (1000.0, 1001.0, 1002.0, 1060.0, 1061.0, 1062.0):
        outage.begin(Unavailable(f"reason {now}"), is_cause=now != 1000.0)
        outage.try_again()
        outage.remind()  # of nothing: it may be up
    outage.end()
    outage.end()
    assert [record.getMessage() for record in caplog.records] == [
        "database unavailable, mail passes uncounted (_onfailure) until it is back: reason 1000.0",
        "database unavailable, mail passes uncounted (_onfailure) until it is back: reason 1001.0",
        "database unavailable, mail passes uncounted (_onfailure) until it is back: reason 1061.0",
        "sends are counted again",
    ]


def test_what_a_charge_needs_of_a_locked_account_falls_back_at_once(
    committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are counted; when the lock has gone the account is, too."""
    ask(committer)
    held = {"locked"}
    charge = committer._ledger.charge

    def meets_locks(charges: list[Charge], *rest: Any) -> list[Verdict]:
        names = {debit.account for one in charges for debit in one.debits} & held
        if names:
            raise AccountsLocked([Entry(name, 1, 1, 1, 1, 1, "", 1) for name in names])
        return charge(charges, *rest)

    monkeypatch.setattr(committer._ledger, "charge", meets_locks)
    monkeypatch.setattr(
        committer._ledger, "still_locked", lambda found: [e for e in found if e.account in held]
    )
    stuck = Stuck(committer)
    replies = {name: Reply() for name in ("first", "locked", "free", "pooled")}
    for name, reply in replies.items():
        if name == "pooled":
            debits = (Debit("x", 1, HOUR), Debit("locked", 1, HOUR))
            committer.submit(Charge("", debits), reply)
        else:
            committer.submit(one_of(name), reply)
        assert stuck.entered.wait(5)
    stuck.go_on.set()
    got = {name: reply.wait() is not None for name, reply in replies.items()}
    assert got == {"first": True, "locked": False, "free": True, "pooled": False}
    assert submit(committer, one_of("locked")) is None
    held.clear()
    wait_for(lambda: submit(committer, one_of("locked")), 10, "it is counted again")


def test_a_purge_goes_on_beside_the_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saslquota.PURGE_PAUSE", 0.01)
    monkeypatch.setattr("saslquota.CLOCK_PROBATION", 0)
    path = tmp_path / "ledger.db"
    ledger = Ledger(SQLiteStore(path, 1), 1)
    windows = (Window(1, 10_000),)
    for _ in range(3):
        ledger.charge([lone_charge("a", 1, "", windows)] * 400, time.monotonic() + 10)
    ledger.close()
    committer = new_committer(Ledger(SQLiteStore(path, 1), 1), 10)
    committer.start()

    def worked() -> bool:
        assert submit(committer, lone_charge("b", 1, "", windows))
        committer._next_purge_at = 0.0
        return count_rows(path, "a") < 1000

    wait_for(worked, 20, "old sends are purged")
    committer.stop(10)


def test_a_purge_that_meets_a_lock_holds_nobody_up_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saslquota.CLOCK_PROBATION", 0)
    for key in ("'a', 1", "'a', 2", "'b', 1"):  # of b so that no lock on a gap is in its way
        database.sql(f"INSERT INTO sends VALUES ({key}, 1, '2000-01-01', 1, 1, '', 1, '', '')")
    ledger = Ledger(MySQLStore(mysql_config(database)), 30 * DAY)
    committer = new_committer(ledger, 10)
    with session(database.server, database.name) as admin:
        admin.execute("BEGIN")
        admin.execute("SELECT * FROM sends FORCE INDEX (PRIMARY) WHERE account = 'a' FOR UPDATE")
        admin.fetchall()
        committer.start()
        waits = []
        ends = time.monotonic() + 4
        while time.monotonic() < ends:
            began = time.monotonic()
            assert submit(committer, lone_charge("b", 1, "", (Window(3600, 10**6),)))
            waits.append(time.monotonic() - began)
    committer.stop(10)
    assert sum(wait > 0.5 for wait in waits) <= 2  # the first one opens the store, too
