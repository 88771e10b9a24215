"""What is remembered of the accounts: enough to decide, and no more than that."""

import tracemalloc
from collections.abc import Sequence

import pytest
from fleet import NEVER, StartFleet
from helpers import lone_charge
from servers.audit import SECOND

import saslquota
from saslquota import Conflict, Entry, StoredEntry, TimedOut, Window, WindowCache

TEN = tuple(Window(60 * 2**n, 10**9) for n in range(10))


def remembered(fleet_ledger: saslquota.Ledger, name: str) -> dict[int, int]:
    """The number of entries of each window, by period."""
    account = fleet_ledger._accounts[name]
    return {period: len(window.rows) for period, window in account.windows.items()}


def test_few_entries_of_each_of_many_windows(fleet: StartFleet) -> None:
    """32 of each of ten windows would be 27 KiB for one account."""
    one = fleet()
    for _ in range(300):
        assert one.send("a", TEN)
        assert one.send("b", TEN[:1])
        one.world.now += 5 * SECOND
    for _ in range(2):
        assert len(remembered(one.ledgers[0], "a")) == 10
        assert sum(remembered(one.ledgers[0], "a").values()) <= 40
        assert sum(remembered(one.ledgers[0], "b").values()) <= 32
        one.ledgers[0] = one.ledger(one.stores[0])  # what comes from the store is not more
        assert one.send("a", TEN)
        assert one.send("b", TEN[:1])


def test_an_account_is_some_kilobytes(fleet: StartFleet) -> None:
    one = fleet()
    names = [f"user{n}" for n in range(50)]
    for _ in range(40):
        one.ledgers[0].charge([lone_charge(name, 1, "", TEN) for name in names], NEVER)
        one.world.now += SECOND
    tracemalloc.start()
    try:
        one.ledgers[0] = one.ledger(one.stores[0])
        one.ledgers[0].charge([lone_charge(name, 1, "", TEN) for name in names], NEVER)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size / len(names) < 12 * 1024


def test_a_period_that_no_rule_has_any_more_is_forgotten(fleet: StartFleet) -> None:
    one = fleet()
    for windows in (TEN[:3], TEN[2:5], TEN[4:5], TEN[:2], TEN[:1]):
        assert one.send("a", windows)
        assert set(remembered(one.ledgers[0], "a")) >= {window.period for window in windows}
        assert len(remembered(one.ledgers[0], "a")) <= 6
    assert set(remembered(one.ledgers[0], "a")) == {TEN[0].period}


def test_rules_that_change_within_a_batch(fleet: StartFleet) -> None:
    """A charge under the old rule and one under the new one are both decided."""
    one = fleet()
    assert one.send("a", TEN[:3])
    old, new = (Window(60, 2), Window(3600, 5)), (Window(3600, 5),)
    batch = [lone_charge("a", 1, "", windows) for windows in (old, new, old, new)]
    verdicts = one.ledgers[0].charge(batch, NEVER)
    assert [verdict.accepted for verdict in verdicts] == [True, True, False, True]


@pytest.mark.parametrize("capacity", [1, 4, 32])
def test_the_base_of_a_window_is_exact_or_unknown(capacity: int) -> None:
    """As entries are appended and leave, whatever is remembered."""
    sent: list[int] = []
    window = WindowCache([], 0, capacity)
    for now in range(1, 60):
        window.append(now, len(sent))
        sent.append(now)
        start = now - 20
        base = window.base(start, len(sent))
        if base is None:  # read again, as Accounts does
            left = [n for n, at in enumerate(sent) if at >= start]
            found = [StoredEntry("a", n + 1, 1, sent[n], n, n + 1) for n in left]
            window = WindowCache(found, len(sent), capacity)
            base = window.base(start, len(sent))
        assert base == sum(at < start for at in sent)
        assert len(window.rows) <= capacity


class Statements:
    """Counts what a store is asked for."""

    def __init__(self, store: saslquota.Store, patch: pytest.MonkeyPatch) -> None:
        self.heads: list[dict[str, int]] = []
        self.searches = 0
        self.inserts = 0
        newest, after, append = store.newest_entries, store.entries_after, store.append

        def newest_entries(wanted: dict[str, int], *, take_locks: bool) -> list[StoredEntry]:
            self.heads.append(dict(wanted))
            return newest(wanted, take_locks=take_locks)

        def entries_after(wanted: Sequence[tuple[str, int]]) -> list[StoredEntry]:
            self.searches += len(wanted)
            return after(wanted)

        def insert(entries: Sequence[Entry]) -> None:
            self.inserts += 1
            append(entries)

        patch.setattr(store, "newest_entries", newest_entries)
        patch.setattr(store, "entries_after", entries_after)
        patch.setattr(store, "append", insert)


def test_searches_for_when_a_charge_fits_are_few(
    fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others wait for each. Between two the latest possible time is told."""
    one = fleet()
    windows = (Window(3600, 300, msg="{retry_after}"),)
    for _ in range(300):
        assert one.send("a", windows)
        one.world.now += SECOND
    statements = Statements(one.stores[0], monkeypatch)
    now = one.world.monotonic()
    latest = now + 3600 - 1  # a second after the last send; all of them must leave for 300
    waits = []
    for n in range(100, 300):
        charge = lone_charge("a", n, "", windows)
        (verdict,) = one.ledgers[0].charge([charge], NEVER)
        assert not verdict.accepted
        assert verdict.retry_at is not None
        waits.append((verdict.retry_at, now + 3300 + n - 1))
    assert all(exact - 0.01 <= told <= latest + 0.01 for told, exact in waits)
    assert waits[0][0] == pytest.approx(waits[0][1], abs=0.01)
    assert statements.searches < 50


def test_what_is_remembered_outlives_a_collision(
    fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an account that others append to, one row is read: the head. Its windows stay known."""
    two = fleet(2)
    windows = (Window(3600, 10**6), Window(60, 10**6))
    for _ in range(100):
        assert two.send("a", windows)
        two.world.now += SECOND
    statements = Statements(two.stores[0], monkeypatch)
    for _ in range(10):
        assert two.send("a", windows, daemon=1)
        assert two.send("a", windows)
    assert statements.heads == [{"a": 1}] * 10
    assert statements.searches == 0
    assert two.rows()[-1].total == 120


def test_heads_are_read_first_while_others_append(
    fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = fleet(2)
    assert two.send("a", TEN[:1])
    assert two.send("a", TEN[:1], daemon=1)
    seen = Statements(two.stores[0], monkeypatch)
    assert two.send("a", TEN[:1])  # collides
    assert (seen.inserts, len(seen.heads)) == (2, 1)
    assert two.send("a", TEN[:1], daemon=1)
    assert two.send("a", TEN[:1])  # does not
    assert (seen.inserts, len(seen.heads)) == (3, 2)
    assert two.send("a", TEN[:1])  # nobody else has appended
    assert (seen.inserts, len(seen.heads)) == (4, 3)
    for _ in range(5):
        assert two.send("a", TEN[:1])
    assert (seen.inserts, len(seen.heads)) == (9, 3)


def test_what_a_decision_has_appended_is_taken_back(
    fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the store fails in the middle of it."""
    one = fleet()
    windows = (Window(3600, 40, msg="{retry_after}"),)
    for n in range(40):
        assert one.send("a", windows)
        assert n < 30 or one.send("b", (Window(3600, 100),))
    before = remembered(one.ledgers[0], "b")
    with monkeypatch.context() as patch:

        def fail(*_arguments: object) -> float:
            raise Conflict("for a test")

        patch.setattr(one.ledgers[0]._accounts, "when_total_reached", fail)
        charges = [
            lone_charge("b", 3, "", (Window(3600, 100),)),
            lone_charge("a", 2, "", windows),
        ]
        with pytest.raises(TimedOut):
            one.ledgers[0].charge(charges, one.world.monotonic())
    assert remembered(one.ledgers[0], "b") == before
    assert one.send("b", (Window(3600, 100),))
    chain = [(row.seq, row.total) for row in one.rows() if row.account == "b"]
    assert chain == [(n, n) for n in range(1, 12)]


def test_a_search_that_fails_leaves_nothing_behind(
    fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadlock in the middle of it: what is not known yet must not look as if it were."""
    two = fleet(2)
    windows = (Window(3600, 100),)
    for _ in range(100):
        assert two.send("a", windows)
        two.world.now += SECOND
    read = two.stores[1].entries_after
    failures = [Conflict("for a test")]

    def failing(wanted: Sequence[tuple[str, int]]) -> list[StoredEntry]:
        if failures:
            raise failures.pop()
        return read(wanted)

    monkeypatch.setattr(two.stores[1], "entries_after", failing)
    assert not two.send("a", windows, daemon=1)
    assert failures == []
