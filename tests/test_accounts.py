"""What is remembered of the accounts: enough to decide, and no more than that."""

import tracemalloc
from collections.abc import Sequence

import pytest
from fleet import NEVER, StartFleet
from helpers import lone_charge
from servers.audit import SECOND

import saslquota
from saslquota import StoredEntry, Window, WindowCache

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


def test_searches_for_when_a_charge_fits_are_few(
    fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others wait for each. Between two the latest possible time is told."""
    one = fleet()
    windows = (Window(3600, 300, msg="{retry_after}"),)
    for _ in range(300):
        assert one.send("a", windows)
        one.world.now += SECOND
    searches: list[object] = []
    read = one.stores[0].entries_after

    def counted(wanted: Sequence[tuple[str, int]]) -> list[StoredEntry]:
        searches.append(wanted)
        return read(wanted)

    monkeypatch.setattr(one.stores[0], "entries_after", counted)
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
    assert len(searches) < 50
