"""What administrators order: grants and blocks, which the ledgers read from the table `events`."""

import collections
import logging
import tempfile
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from fleet import NEVER, START, Fleet, StartFleet, fast_directory
from helpers import DAY, RETENTION, examples, lone_charge, mysql_config
from hypothesis import given
from hypothesis import strategies as st
from servers.audit import SECOND
from servers.mariadb import Database, session

import saslquota
from saslquota import (
    Charge,
    Debit,
    Entry,
    Ledger,
    MySQLStore,
    Order,
    SQLiteStore,
    TimedOut,
    Verdict,
    Window,
)

HOUR = (Window(3600, 5, rule="default", msg="no more"),)
BOTH = (Window(60, 3, rule="default"), Window(3600, 7, rule="default"))
LAST = 1.000001  # seconds that an order may take


def order(
    fleet: Fleet,
    account: str,
    kind: str,
    *,
    lasts: float | None = None,
    amount: int | None = None,
    epoch: int | None = None,
) -> None:
    """Write an order as saslquotactl.py does; it is obeyed a second later."""
    store = fleet.stores[0]
    now = store.now()
    ((number,),) = store.run(
        "SELECT COALESCE(MAX(number), 0) + 1 FROM events WHERE account = ?", [account]
    )
    until = None if lasts is None else now + round(lasts * SECOND)
    store.run(
        "INSERT INTO events (account, number, at, kind, until, amount, epoch, author, note)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, 'root', '')",
        [account, number, now, kind, until, amount, epoch],
    )
    fleet.world.now += round(LAST * SECOND)


def wait(fleet: Fleet, seconds: float) -> None:
    fleet.world.now += round(seconds * SECOND)


def how_many(fleet: Fleet, account: str, windows: tuple[Window, ...] = HOUR) -> int:
    """How many sends of one recipient are accepted before one is refused."""
    number = 0
    while fleet.send(account, windows):
        number += 1
    return number


def test_a_grant_lets_so_many_more_through(fleet: StartFleet) -> None:
    one = fleet()
    assert how_many(one, "a@x") == 5
    order(one, "a@x", "grant", lasts=600, amount=7, epoch=1)
    assert how_many(one, "a@x") == 7
    assert how_many(one, "b@x") == 5


def test_when_a_grant_has_ended_the_count_begins_anew_once(fleet: StartFleet) -> None:
    two = fleet(daemons=2)
    order(two, "a@x", "grant", lasts=600, amount=7, epoch=1)
    assert how_many(two, "a@x") == 12
    wait(two, 600)
    accepted = [two.send("a@x", HOUR, daemon=n % 2) for n in range(12)]
    assert accepted == [True] * 5 + [False] * 7
    rows = two.rows()
    assert [row.total for row in rows if row.epoch == 2] == [1, 2, 3, 4, 5]


def test_the_count_goes_on_if_nothing_stands_in_the_way_when_a_grant_ends(
    fleet: StartFleet,
) -> None:
    one = fleet()
    order(one, "a@x", "grant", lasts=600, amount=7, epoch=1)
    assert all(one.send("a@x", HOUR) for _ in range(3))
    wait(one, 600)
    assert one.send("a@x", HOUR)
    assert {row.epoch for row in one.rows()} == {1}


def test_what_a_pool_refuses_begins_no_count_anew(fleet: StartFleet) -> None:
    one = fleet()
    order(one, "a@x", "grant", lasts=600, amount=7, epoch=1)
    pool = Debit("POOL *", 1, (Window(3600, 12),))

    def charge(*debits: Debit) -> Verdict:
        (verdict,) = one.ledgers[0].charge([Charge("", debits)], NEVER)
        return verdict

    own = Debit("a@x", 1, HOUR)
    while charge(own, pool).accepted:
        pass
    wait(one, 600)
    assert charge(own, pool).window is pool.windows[0]
    assert {row.epoch for row in one.rows()} == {1}
    assert charge(own).accepted
    assert {row.epoch for row in one.rows()} == {1, 2}


def test_a_send_larger_than_the_quota_begins_no_count_anew(fleet: StartFleet) -> None:
    one = fleet()
    order(one, "a@x", "grant", lasts=600, amount=7, epoch=1)
    assert how_many(one, "a@x") == 12
    wait(one, 600)
    assert not one.send("a@x", HOUR, 6)
    assert {row.epoch for row in one.rows()} == {1}


def test_what_is_held_all_the_same_begins_no_count_anew(fleet: StartFleet) -> None:
    one = fleet()
    held = (Window(3600, 5, rule="default", action="HOLD"),)
    order(one, "a@x", "grant", lasts=600, amount=7, epoch=1)
    assert all(one.send("a@x", held) for _ in range(12))
    wait(one, 600)
    assert one.send("a@x", held, 6)
    assert {row.epoch for row in one.rows()} == {1}


def test_a_count_that_was_not_written_has_not_begun_anew(fleet: StartFleet) -> None:
    one = fleet()
    order(one, "a@x", "grant", lasts=600, amount=7, epoch=1)
    assert how_many(one, "a@x") == 12
    wait(one, 600)
    with pytest.raises(TimedOut):
        one.ledgers[0].charge([lone_charge("a@x", 1, "", HOUR)], one.world.monotonic() - 1)
    wait(one, 3600)
    assert one.send("a@x", HOUR)
    assert {row.epoch for row in one.rows()} == {1}


def test_a_pool_may_be_granted_more(fleet: StartFleet) -> None:
    one = fleet()
    pool = Debit("POOL @x", 1, HOUR)

    def send() -> bool:
        charge = Charge("", (Debit("a@x", 1, (Window(60, 100),)), pool))
        return one.ledgers[0].charge([charge], NEVER)[0].accepted

    assert [send() for _ in range(6)].count(True) == 5
    order(one, "POOL @x", "grant", lasts=600, amount=2, epoch=1)
    assert [send() for _ in range(4)].count(True) == 2
    wait(one, 600)
    assert [send() for _ in range(8)].count(True) == 5


def test_several_sends_of_a_pool_in_one_batch_begin_its_count_anew(fleet: StartFleet) -> None:
    one = fleet()
    pool = Debit("POOL *", 1, HOUR)
    order(one, "POOL *", "grant", lasts=600, amount=3, epoch=1)

    def batch(number: int) -> int:
        charges = [
            Charge("", (Debit(f"{n}@x", 1, (Window(60, 100),)), pool)) for n in range(number)
        ]
        return [v.accepted for v in one.ledgers[0].charge(charges, NEVER)].count(True)

    assert batch(10) == 8
    wait(one, 600)
    assert batch(10) == 5
    (last,) = [row for row in one.rows() if row.account == "POOL *" and row.epoch == 2]
    assert (last.recipients, last.total) == (5, 5)


@pytest.mark.parametrize("name", ["a@x", "POOL @x", "POOL *"])
def test_a_block_stops_an_account_and_everybody_of_a_pool(fleet: StartFleet, name: str) -> None:
    one = fleet()
    assert one.send("a@x", HOUR)
    order(one, name, "block")
    (verdict,) = one.ledgers[0].charge([lone_charge("a@x", 1, "", HOUR)], NEVER)
    assert (verdict.accepted, verdict.window.rule, verdict.window.msgquota) == (False, "blocked", 0)
    assert verdict.window.msg == "this account may not send, ask your postmaster"
    unlimited = (Window(3600, float("inf")),)
    assert one.send("b@x", unlimited) is not (name != "a@x")
    order(one, name, "unblock")
    assert how_many(one, "a@x") == 4


def test_a_block_ends_by_itself(fleet: StartFleet) -> None:
    one = fleet()
    order(one, "a@x", "block", lasts=100)
    assert not one.send("a@x", HOUR)
    wait(one, 100)
    assert one.send("a@x", HOUR)


def test_the_newest_order_counts(fleet: StartFleet) -> None:
    one = fleet()
    order(one, "a@x", "grant", lasts=1000, amount=100, epoch=1)
    order(one, "a@x", "grant", lasts=1000, amount=1, epoch=1)
    assert how_many(one, "a@x") == 6
    order(one, "a@x", "block", lasts=1)
    order(one, "a@x", "unblock")
    assert how_many(one, "a@x") == 0


class CountedStore(SQLiteStore):
    def __init__(self, path: Path) -> None:
        super().__init__(path, statement_timeout=1)
        self.reads = 0

    def run(self, sql: str, values: Sequence[saslquota.Value] = ()) -> list[Any]:
        self.reads += "FROM events" in sql
        return super().run(sql, values)


def test_orders_are_read_once_a_second(tmp_path: Path) -> None:
    store, clock = CountedStore(tmp_path / "ledger.db"), [0.0]
    ledger = Ledger(store, DAY, lambda: clock[0])
    ledger.open()
    for seconds in (0, 0.5, 0.999, 1.5, 1.9, 2.9):
        clock[0] = seconds
        ledger.charge([lone_charge("a@x", 1, "", HOUR)], NEVER)
    assert store.reads == 3
    store.close()


def test_a_refusal_is_repeated_no_longer_than_the_orders_are_known(fleet: StartFleet) -> None:
    """Else an order would take two seconds."""
    one = fleet()
    assert one.send("a@x", HOUR)
    wait(one, 0.9)
    (verdict,) = one.ledgers[0].charge([lone_charge("b@x", 9, "", HOUR)], NEVER)
    assert not verdict.accepted
    assert verdict.repeatable_until <= 1.0


def test_without_the_table_events_counting_goes_on(
    fleet: StartFleet, caplog: pytest.LogCaptureFixture
) -> None:
    one = fleet()
    order(one, "a@x", "block")
    assert not one.send("a@x", HOUR)
    one.stores[0].run("ALTER TABLE events RENAME TO hidden")
    with caplog.at_level(logging.ERROR):
        for _ in range(125):
            wait(one, 1.001)
            assert one.send("a@x", (Window(3600, 1000),))
    text = "orders (table events) cannot be read, counting without them: no such table: events"
    assert [record.message for record in caplog.records].count(text) in (1, 2, 3)
    one.stores[0].run("ALTER TABLE hidden RENAME TO events")
    wait(one, 1.001)
    assert not one.send("a@x", HOUR)


def test_orders_and_events_in_mariadb(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    store = MySQLStore(mysql_config(database))
    ledger = Ledger(store, RETENTION)
    ledger.open()

    def send() -> bool:
        ledger._orders._next_read = 0.0
        (verdict,) = ledger.charge([lone_charge("a@x", 1, "", HOUR)], NEVER)
        return verdict.accepted

    def insert(number: int, kind: str, until: str = "NULL", amount: int = 0) -> None:
        database.sql(
            "INSERT INTO events (account, number, at, kind, until, amount, epoch, author, note)"
            f" VALUES ('a@x', {number}, UTC_TIMESTAMP(6), '{kind}', {until}, {amount}, 1, 'me', '')"
        )

    with closing(store):
        assert [send() for _ in range(6)] == [True] * 5 + [False]
        insert(1, "grant", "UTC_TIMESTAMP(6) + INTERVAL 1 HOUR", 2)
        assert [send() for _ in range(3)] == [True, True, False]
        database.sql("UPDATE events SET until = UTC_TIMESTAMP(6) - INTERVAL 1 SECOND")
        assert [send() for _ in range(6)] == [True] * 5 + [False]
        insert(2, "block")
        database.sql("DELETE FROM sends")
        ledger.open()
        assert not send()
        database.sql("DROP TABLE events")
        with caplog.at_level(logging.ERROR):
            assert send()
        assert not store._host_failed
    assert "counting without them: 1146" in caplog.text


def test_a_locked_table_of_events_holds_up_nobody_twice_a_minute(database: Database) -> None:
    """What was read last goes on being obeyed."""
    store = MySQLStore(mysql_config(database))
    clock = [0.0]
    ledger = Ledger(store, RETENTION, lambda: clock[0])
    ledger.open()
    database.sql(
        "INSERT INTO events (account, number, at, kind, author, note)"
        " VALUES ('b@x', 1, UTC_TIMESTAMP(6), 'block', 'me', '')"
    )
    reads = []
    run = store.run

    def counted(sql: str, values: Sequence[saslquota.Value] = ()) -> list[Any]:
        if "FROM events" in sql:
            reads.append(sql)
        return run(sql, values)

    store.run = counted  # type: ignore[method-assign]
    with closing(store), session(database.server, database.name) as other:
        other.execute("LOCK TABLES events WRITE")
        for seconds in range(0, 30, 3):
            clock[0] = seconds
            (verdict,) = ledger.charge([lone_charge("a@x", 1, "", (Window(60, 99),))], NEVER)
            assert verdict.accepted
    assert len(reads) == 1


STEPS = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(["a", "b@x"]), st.integers(1, 3)),
    st.tuples(st.just("send"), st.just("a"), st.just(1)),
    st.tuples(st.just("wait"), st.just(""), st.sampled_from([1, 30, 61, 200, 1800, 3601])),
    st.tuples(st.just("grant"), st.sampled_from(["a", "b@x"]), st.sampled_from([5, 90, 2000])),
    st.tuples(st.just("block"), st.sampled_from(["a", "POOL *"]), st.sampled_from([5, 90, 0])),
    st.tuples(st.just("unblock"), st.sampled_from(["a", "POOL *"]), st.just(0)),
    st.tuples(st.just("reset"), st.just("a"), st.just(0)),
    st.tuples(st.just("restart"), st.just(""), st.just(0)),
)


class Model:
    """What should be accepted, by addition of all that is in the tables."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.orders: dict[str, Order] = {}

    def accepts(self, account: str, recipients: int, windows: Sequence[Window]) -> bool:
        now = START + self._fleet.world.now
        rows = [row for row in self._fleet.rows() if row.account == account]
        epoch = rows[-1].epoch if rows else 1
        blocks = [self.orders.get(name) for name in (account, "POOL *")]
        if any(o and o.kind == "block" and (o.until is None or o.until > now) for o in blocks):
            return False
        order = self.orders.get(account)
        grant = order if order and order.kind == "grant" else None
        more = (grant.amount or 0) if grant and (grant.until or 0) > now else 0

        def fits(rows: Sequence[Entry]) -> bool:
            return all(
                sum(row.recipients for row in rows if row.at >= now - window.period * SECOND)
                + recipients
                <= window.msgquota + more
                for window in windows
            )

        if fits([row for row in rows if row.epoch == epoch]):
            return True
        is_over = grant is not None and (grant.until or 0) <= now and grant.epoch == epoch
        return is_over and fits([])


@examples(120)
@given(st.lists(st.tuples(st.integers(0, 2), STEPS), min_size=10, max_size=70))
def test_several_daemons_obey_orders_exactly(
    steps: list[tuple[int, tuple[str, str, int]]],
) -> None:
    """Each send is decided as the tables and the clock say, whichever daemon is asked."""
    with tempfile.TemporaryDirectory(dir=fast_directory()) as directory:
        fleet = Fleet(Path(directory), 3)
        model = Model(fleet)
        for daemon, (what, account, value) in steps:
            now = START + fleet.world.now
            if what == "send":
                expected = model.accepts(account, value, BOTH)
                assert fleet.send(account, BOTH, value, daemon) is expected
            elif what == "wait":
                wait(fleet, value)
            elif what == "restart":
                fleet.ledgers[daemon] = fleet.ledger(fleet.stores[daemon])
            elif what == "reset":
                fleet.stores[0].reset(account)
                wait(fleet, LAST)
            else:
                rows = [row for row in fleet.rows() if row.account == account]
                epoch = rows[-1].epoch if rows else 1
                until = now + value * SECOND if value else None
                model.orders[account] = Order(account, what, until, 4, epoch)
                order(fleet, account, what, lasts=value or None, amount=4, epoch=epoch)
        rows = fleet.rows()
        fleet.close()
    chains: dict[str, list[Entry]] = collections.defaultdict(list)
    for row in rows:
        chains[row.account].append(row)
    for chain in chains.values():
        assert [row.seq for row in chain] == list(range(1, len(chain) + 1))
        for row in chain:
            before = [r.recipients for r in chain if r.epoch == row.epoch and r.seq <= row.seq]
            assert row.total == sum(before)


@examples(40)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["send", "mishap", "thaw"]))))
def test_a_lost_insert_leaves_no_account_half_anew(steps: list[tuple[int, str]]) -> None:
    with tempfile.TemporaryDirectory(dir=fast_directory()) as directory:
        fleet = Fleet(Path(directory), 3)
        order(fleet, "a", "grant", lasts=100, amount=7, epoch=1)
        assert how_many(fleet, "a") == 12
        wait(fleet, 100)
        for number, (daemon, what) in enumerate(steps):
            if what == "mishap":
                fleet.stores[daemon].mishap = ("frozen", "lost", "unanswered")[number % 3]
            elif what == "thaw":
                fleet.stores[daemon].thaw()
            else:
                with suppress(saslquota.StoreError):
                    fleet.send("a", HOUR, 1, daemon)
        for store in fleet.stores:
            store.thaw()
        rows = fleet.rows()
        fleet.close()
    second = [row for row in rows if row.epoch == 2]
    assert len(second) <= 5
    assert [row.total for row in second] == list(range(1, len(second) + 1))
    assert {row.epoch for row in rows} <= {1, 2}
