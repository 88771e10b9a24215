"""The committer: what its callers get, beside a real SQLite ledger."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from fleet import RESET
from helpers import DAY, lone_charge, mysql_config, submit
from servers.audit import count_rows
from servers.disk import locked
from servers.mariadb import Database, session
from servers.process import wait_for

from saslquota import Charge, Committer, Ledger, MySQLStore, Part, SQLiteStore, Verdict, Window

HOUR = (Window(3600, 2),)


@contextmanager
def running(path: Path, timeout: float = 10) -> Iterator[Committer]:
    committer = Committer(Ledger(SQLiteStore(path, 1), 30 * DAY), timeout)
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
    until = ask(committer).until
    assert ask(committer) == ask(committer, n=5)
    assert time.monotonic() < until <= time.monotonic() + 1


def test_a_smaller_charge_is_not_refused_for_a_larger_one(committer: Committer) -> None:
    assert not ask(committer, n=3).accepted
    assert ask(committer, n=2).accepted


def test_a_larger_charge_is_told_its_own_moment(committer: Committer) -> None:
    """And one that may meet another window is looked at."""
    windows = (Window(3600, 2, msg="{retry_after}"),)
    assert [ask(committer, windows).accepted for _ in range(3)] == [True, True, False]
    first = ask(committer, windows)
    assert first.retry is not None
    assert first == ask(committer, windows)
    assert ask(committer, windows, n=3).retry == float("inf")
    several = (Window(60, 3), Window(3600, 4))
    assert ask(committer, several, n=2).window == several[0]
    assert ask(committer, several, n=3).window == several[1]


def test_a_refusal_by_a_pool_is_none_without_it(committer: Committer) -> None:
    full = Part("POOL *", 1, (Window(3600, 0),))
    own = Part("a", 1, HOUR)
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
        store._run(RESET, (0, "a"))
        store.close()
        wait_for(lambda: ask(committer).accepted, 5, "the reset is noticed")


def test_whoever_waits_when_it_gives_up_gets_the_fallback(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with running(path, timeout=30) as committer, ThreadPoolExecutor(3) as pool:
        ask(committer)
        with locked(path):
            waiting = [
                pool.submit(submit, committer, lone_charge(name, 1, "", HOUR))
                for name in ("b", "c", "d")
            ]
            wait_for(lambda: committer._at_work.locked(), 5, "the ledger is at work")
            committer.give_up()
            assert [future.result(10) for future in waiting] == [None] * 3


def test_the_first_answer_counts(tmp_path: Path) -> None:
    """That of a store that is stuck comes too late."""
    path = tmp_path / "ledger.db"
    verdicts: list[Verdict | None] = []
    with running(path, timeout=1) as committer, ThreadPoolExecutor(1) as pool:
        ask(committer)
        with locked(path):
            pool.submit(submit, committer, lone_charge("b", 1, "", HOUR))
            wait_for(lambda: committer._at_work.locked(), 5, "the ledger is at work")
            job = committer.submit(lone_charge("c", 1, "", HOUR), verdicts.append)
            assert job
            start = time.monotonic()
            job.wait()
            assert 0.5 < time.monotonic() - start < 5
            assert verdicts == [None]
        job.answer(Verdict(True, 1, HOUR[0]))
        wait_for(lambda: submit(committer, lone_charge("d", 1, "", HOUR)), 10, "it counts again")
    assert verdicts == [None]


def test_a_bug_in_a_reply_costs_only_that_reply(committer: Committer) -> None:
    """Whichever thread meets it: whoever waits for the reply is told."""

    def broken(_: Verdict | None) -> None:
        raise ZeroDivisionError

    with committer._at_work:  # so that it is the committer's thread
        job = committer.submit(lone_charge("b", 1, "", HOUR), broken)
    assert job
    with pytest.raises(ZeroDivisionError):
        job.wait()
    wait_for(lambda: not committer._wanted, 5, "the ledger is free")
    with pytest.raises(ZeroDivisionError):
        committer.submit(lone_charge("c", 1, "", HOUR), broken)
    assert ask(committer).used == 1


def test_one_that_is_stuck_in_the_ledger_gets_the_fallback_too(tmp_path: Path) -> None:
    with running(tmp_path / "ledger.db", timeout=1) as committer, ThreadPoolExecutor(1) as pool:
        ask(committer)
        charge, stuck, go_on = committer._ledger.charge, threading.Event(), threading.Event()

        def slow(charges: list[Charge], deadline: float) -> list[Verdict]:
            stuck.set()
            assert go_on.wait(20)
            return charge(charges, deadline)

        committer._ledger.charge = slow  # type: ignore[method-assign, assignment]
        verdicts: list[Verdict | None] = []
        future = pool.submit(committer.submit, lone_charge("b", 1, "", HOUR), verdicts.append)
        assert stuck.wait(5)
        wait_for(lambda: verdicts, 10, "the fallback")
        assert not future.done()
        go_on.set()
        assert future.result(10) is None
        assert verdicts == [None]


def test_what_the_committer_has_in_hand_gets_the_fallback_at_the_end(tmp_path: Path) -> None:
    with running(tmp_path / "ledger.db", timeout=30) as committer:
        verdicts: list[Verdict | None] = []
        with committer._at_work:
            committer.submit(lone_charge("b", 1, "", HOUR), verdicts.append)
            wait_for(lambda: committer._taken, 5, "the committer waits for the ledger")
            committer.give_up()
            assert verdicts == [None]


def test_a_bug_in_the_ledger_costs_only_fallbacks(
    committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(committer)

    def broken(*_: object) -> list[Verdict]:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(committer._ledger, "charge", broken)
        assert submit(committer, lone_charge("b", 1, "", HOUR)) is None
        assert submit(committer, lone_charge("b", 1, "", HOUR)) is None
    assert committer.is_alive()
    wait_for(lambda: submit(committer, lone_charge("b", 1, "", HOUR)), 10, "it counts again")


def test_a_batch_forms_while_another_is_under_way(
    committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    charge, batches, go_on = committer._ledger.charge, list[int](), threading.Event()

    def slow(charges: list[Charge], deadline: float) -> list[Verdict]:
        batches.append(len(charges))
        assert go_on.wait(10)
        return charge(charges, deadline)

    ask(committer)
    monkeypatch.setattr(committer._ledger, "charge", slow)
    with ThreadPoolExecutor(21) as pool:
        first = pool.submit(submit, committer, lone_charge("b", 1, "", HOUR))
        wait_for(lambda: batches, 5, "the first is under way")
        charges = [lone_charge(f"user{n}", 1, "", HOUR) for n in range(20)]
        others = [pool.submit(submit, committer, one) for one in charges]
        wait_for(lambda: committer._jobs.qsize() >= 19, 5, "the others wait")
        go_on.set()
        assert all(future.result(10) for future in [first, *others])
    assert batches == [1, 20]


def test_nobody_waits_for_a_store_that_is_known_to_be_down(tmp_path: Path) -> None:
    committer = Committer(Ledger(SQLiteStore(tmp_path / "none" / "x.db", 1), 30 * DAY), 30)
    committer.start()
    assert submit(committer, lone_charge("a", 1, "", HOUR)) is None
    start = time.monotonic()
    assert [submit(committer, lone_charge("a", 1, "", HOUR)) for _ in range(100)] == [None] * 100
    assert time.monotonic() - start < 5
    (tmp_path / "none").mkdir()
    wait_for(lambda: submit(committer, lone_charge("a", 1, "", HOUR)), 10, "the store is there")
    committer.stop(10)


def test_a_purge_goes_on_beside_the_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saslquota.PURGE_PAUSE", 0.01)
    path = tmp_path / "ledger.db"
    ledger = Ledger(SQLiteStore(path, 1), 1)
    windows = (Window(1, 10_000),)
    for _ in range(3):
        ledger.charge([lone_charge("a", 1, "", windows)] * 400, time.monotonic() + 10)
    ledger.close()
    committer = Committer(Ledger(SQLiteStore(path, 1), 1), 10)
    committer.start()

    def worked() -> bool:
        assert submit(committer, lone_charge("b", 1, "", windows))
        committer._due = 0.0  # the next purge is due
        return count_rows(path, "a") < 1000

    wait_for(worked, 20, "old sends are purged")
    committer.stop(10)


def test_a_purge_that_meets_a_lock_holds_nobody_up_again(database: Database) -> None:
    for key in ("'a', 1", "'a', 2", "'b', 1"):  # of b so that no lock on a gap is in its way
        database.sql(f"INSERT INTO sends VALUES ({key}, 1, '2000-01-01', 1, 1, '', 1)")
    ledger = Ledger(MySQLStore(mysql_config(database)), 30 * DAY)
    committer = Committer(ledger, 10)
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
