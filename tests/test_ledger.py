"""The ledger over a real SQLite file, with its clocks in the test's hand."""

import itertools
import random
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fleet import DAEMONS, NEVER, START, Fleet, StartFleet, fast_directory
from helpers import DAY, examples, lone_charge
from hypothesis import given
from hypothesis import strategies as st
from servers.audit import SECOND

import saslquota
from saslquota import (
    Charge,
    Conflict,
    Debit,
    Entry,
    StoreError,
    TimedOut,
    Unavailable,
    Window,
)

pytestmark = pytest.mark.usefixtures("exact_retries")


def test_the_quota_lets_exactly_the_quota_through(fleet: StartFleet) -> None:
    one = fleet()
    windows = (Window(300, 50),)
    assert [one.send("a", windows) for _ in range(52)] == [True] * 50 + [False] * 2


def test_a_send_leaves_its_window_a_microsecond_after_the_period(
    fleet: StartFleet,
) -> None:
    one = fleet()
    windows = (Window(10, 1),)
    assert one.send("a", windows)
    one.world.now += 10 * SECOND
    assert not one.send("a", windows)
    one.world.now += 1
    assert one.send("a", windows)


def test_the_boundary_is_exact_after_a_restart_too(fleet: StartFleet) -> None:
    one = fleet()
    windows = (Window(10, 1),)
    assert one.send("a", windows)
    for later, accepted in ((10 * SECOND, False), (1, True)):
        one.world.now += later
        one.ledgers[0].open()
        assert one.send("a", windows) is accepted


def test_several_recipients_are_charged_or_refused_as_one(fleet: StartFleet) -> None:
    one = fleet()
    windows = (Window(60, 10),)
    assert one.send("a", windows, 7)
    assert not one.send("a", windows, 4)
    assert one.send("a", windows, 3)
    assert not one.send("a", windows)
    assert not one.send("b", windows, 11)


def test_all_windows_must_have_room_and_a_refusal_uses_nothing_up(
    fleet: StartFleet,
) -> None:
    one = fleet()
    windows = (Window(10, 2), Window(100, 3))
    assert [one.send("a", windows) for _ in range(3)] == [True, True, False]
    one.world.now += 11 * SECOND
    assert [one.send("a", windows) for _ in range(2)] == [True, False]


def test_a_batch_is_decided_in_its_order(fleet: StartFleet) -> None:
    one = fleet()
    windows = (Window(60, 2),)
    batch = [lone_charge(name, 1, f"{n}", windows) for n, name in enumerate("abaabb")]
    verdicts = one.ledgers[0].charge(batch, NEVER)
    assert [v.accepted for v in verdicts] == [True, True, True, False, True, False]
    assert [v.used for v in verdicts] == [1, 1, 2, 2, 2, 2]
    assert len({row.token for row in one.rows()}) == 1


def test_memory_suffices_while_nobody_else_appends(
    fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fleet()
    windows = (Window(3600, 1000),)
    one.send("a", windows)
    monkeypatch.setattr(one.stores[0], "newest_entries", pytest.fail)
    monkeypatch.setattr(one.stores[0], "entries_after", pytest.fail)
    for _ in range(200):
        one.world.now += 1000
        assert one.send("a", windows)


def test_a_refusal_is_read_again_after_a_second_at_the_latest(fleet: StartFleet) -> None:
    one = fleet()
    windows = (Window(3600, 1),)
    assert one.send("a", windows)
    assert not one.send("a", windows)
    one.stores[0].reset("a")
    one.world.now += int(saslquota.FRESHNESS * SECOND) + 1
    assert one.send("b", windows)  # reads the clock, and nothing of a
    assert one.send("a", windows)


def test_a_reset_is_noticed_by_collision(fleet: StartFleet) -> None:
    one = fleet()
    windows = (Window(3600, 2),)
    assert one.send("a", windows)
    one.stores[0].reset("a")
    assert [one.send("a", windows) for _ in range(3)] == [True, True, False]
    assert [row.epoch for row in one.rows()] == [1, 2, 2, 2]


def test_sends_before_a_reset_count_no_more_also_when_some_have_left(
    fleet: StartFleet,
) -> None:
    one = fleet()
    windows = (Window(10, 5),)
    for wait in (0, 5 * SECOND):
        one.world.now += wait
        assert all(one.send("a", windows) for _ in range(2))
    one.world.now += SECOND
    one.stores[0].reset("a")
    one.world.now += 5 * SECOND  # two sends of the old epoch are still within the period
    one.ledgers[0].open()
    assert [one.send("a", windows) for _ in range(6)] == [True] * 5 + [False]


def test_a_chain_goes_on_after_a_batch_was_given_up(fleet: StartFleet) -> None:
    one = fleet()
    windows = (Window(10, 2),)
    assert one.send("a", windows)
    append = one.stores[0].append
    one.stores[0].append = fail  # type: ignore[assignment,method-assign]
    with pytest.raises(Unavailable):
        one.send("a", windows)
    one.stores[0].append = append  # type: ignore[method-assign]
    one.ledgers[0].open()
    assert one.send("b", windows)
    assert [one.send("a", windows) for _ in range(2)] == [True, False]
    assert [(row.account, row.seq) for row in one.rows()] == [("a", 1), ("a", 2), ("b", 1)]


def fail(_rows: Sequence[Entry]) -> None:
    raise Unavailable("the test")


def test_another_daemons_sends_are_noticed_by_collision(fleet: StartFleet) -> None:
    two = fleet(2)
    windows = (Window(3600, 5),)
    got = [two.send("a", windows, daemon=n % 2) for n in range(8)]
    assert got == [True] * 5 + [False] * 3


def test_a_changed_period_is_read_from_the_store(fleet: StartFleet) -> None:
    one = fleet()
    assert all(one.send("a", (Window(10, 100),)) for _ in range(40))
    one.world.now += 11 * SECOND
    assert not one.send("a", (Window(60, 40),))
    assert one.send("a", (Window(60, 41),))


def test_the_memory_is_bounded(fleet: StartFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saslquota, "CACHED_ACCOUNTS", 10)
    one = fleet()
    windows = (Window(3600, 2),)
    for _ in range(2):
        assert all(one.send(f"user{n}", windows) for n in range(30))
    assert not any(one.send(f"user{n}", windows) for n in range(30))
    assert len(one.ledgers[0]._accounts._cache) == 10
    one.stores[0].skew = -DAY * SECOND
    one.world.now += 2 * SECOND
    for _ in range(2):
        assert not any(one.send(f"user{n}", windows) for n in range(30))
        assert len(one.ledgers[0]._accounts._ahead) <= 10


def test_the_deadline_ends_the_attempts(fleet: StartFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    one = fleet()

    def collide(_rows: Sequence[Entry]) -> None:
        one.world.now += SECOND
        raise Conflict("the test")

    monkeypatch.setattr(one.stores[0], "append", collide)
    with pytest.raises(Unavailable, match="timed out: the test"):
        one.ledgers[0].charge([lone_charge("a", 1, "", (Window(10, 5),))], 5.0)
    assert one.world.now == 5 * SECOND


@pytest.mark.parametrize("mishap", ["lost", "done", "frozen"])
def test_an_unknown_outcome_leaves_exactly_one_row(fleet: StartFleet, mishap: str) -> None:
    one = fleet()
    windows = (Window(10, 5),)
    assert one.send("a", windows)
    one.stores[0].mishap = mishap
    assert one.send("a", windows)
    one.stores[0].thaw()
    assert one.send("a", windows)
    assert [row.instance for row in one.rows()] == ["i1", "i2", "i3"]


def test_an_insert_that_wakes_after_the_look_is_not_repeated(fleet: StartFleet) -> None:
    one = fleet()
    store = one.stores[0]
    look = store.tokens

    def look_too_early(entries: Sequence[Entry]) -> set[int]:
        found = look(entries)
        store.thaw()
        return found

    store.tokens = look_too_early  # type: ignore[method-assign]
    store.mishap = "frozen"
    assert one.send("a", (Window(10, 5),))
    assert [row.instance for row in one.rows()] == ["i1"]


def test_rows_that_another_daemon_kept_out_are_decided_again(fleet: StartFleet) -> None:
    two = fleet(2)
    windows = (Window(10, 3),)
    assert two.send("a", windows)
    first = two.stores[0]
    reopen = first.open

    def open_later(deadline: float) -> None:
        reopen(deadline)
        two.send("a", windows, daemon=1)  # takes the very seq that the lost INSERT wanted

    first.mishap = "frozen"
    first.open = open_later  # type: ignore[assignment,method-assign]
    assert two.send("a", windows)
    first.thaw()
    assert not two.send("a", windows)
    assert [row.instance for row in two.rows()] == ["i1", "i3", "i2"]


# --- Against a brute-force model ------------------------------------------------------------------

ACCOUNTS = st.sampled_from(["a", "b", "c"])
COSTS = st.integers(1, 4)
PERIODS = st.sampled_from([(Window(5, 6),), (Window(20, 9),), (Window(5, 4), Window(60, 12))])
STEPS = st.one_of(
    st.tuples(
        st.just("send"), st.lists(st.tuples(ACCOUNTS, COSTS, PERIODS), min_size=1, max_size=6)
    ),
    st.tuples(st.just("wait"), st.integers(0, 8 * SECOND)),
    st.tuples(st.just("wait"), st.sampled_from([1, 5 * SECOND, 5 * SECOND + 1, 20 * SECOND])),
    st.tuples(st.just("reset"), ACCOUNTS),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("purge"), st.none()),
    st.tuples(st.just("mishap"), st.sampled_from(["lost", "done"])),
)


class Model:
    """What must be answered, by brute force: a list of all sends, summed up for each decision."""

    def __init__(self) -> None:
        self.sends: dict[str, list[tuple[int, int]]] = {"a": [], "b": [], "c": []}

    def send(self, account: str, n: int, windows: tuple[Window, ...], now: int) -> bool:
        for window in windows:
            start = now - window.period * SECOND
            used = sum(cost for when, cost in self.sends[account] if when >= start)
            if used + n > window.msgquota:
                return False
        self.sends[account].append((now, n))
        return True

    def reset(self, account: str) -> None:
        self.sends[account] = []


@pytest.mark.slow
@pytest.mark.no_cover  # which takes as long again
@examples(300)
@given(st.lists(STEPS, min_size=5, max_size=50))
def test_one_daemon_equals_the_model_at_every_step(steps: list[tuple[str, object]]) -> None:
    with tempfile.TemporaryDirectory(dir=fast_directory()) as directory:
        one, model = Fleet(Path(directory)), Model()
        for what, value in steps:
            store = one.stores[0]
            # A clock that was read a moment ago is carried on; let each step begin with a reading.
            one.ledgers[0]._accounts._clock.distrust()
            if what == "send":
                assert isinstance(value, list)
                now = store.now()
                batch = [lone_charge(a, n, f"i{next(one.instances)}", w) for a, n, w in value]
                got = [verdict.accepted for verdict in one.ledgers[0].charge(batch, NEVER)]
                assert got == [model.send(a, n, w, now) for a, n, w in value]
            elif what == "wait":
                assert isinstance(value, int)
                one.world.now += value
            elif what == "reset":
                model.reset(str(value))
                store.reset(str(value))
                one.world.now += SECOND + 1  # until a refusal is read again
            elif what == "restart":
                one.ledgers[0] = one.ledger(store)
            elif what == "purge":
                one.ledgers[0].purge()
            else:
                store.mishap = str(value)
        one.close()


SKEWED_STEPS = st.one_of(
    st.tuples(
        st.just("send"),
        st.integers(0, DAEMONS - 1),
        st.lists(st.tuples(ACCOUNTS, COSTS), min_size=1, max_size=6),
    ),
    st.tuples(st.just("wait"), st.just(0), st.integers(0, 8 * SECOND)),
    st.tuples(st.just("skew"), st.integers(0, DAEMONS - 1), st.integers(-300, 300)),
    st.tuples(st.just("reset"), st.integers(0, DAEMONS - 1), ACCOUNTS),
    st.tuples(st.just("restart"), st.integers(0, DAEMONS - 1), st.none()),
    st.tuples(
        st.just("mishap"), st.integers(0, DAEMONS - 1), st.sampled_from(["lost", "done", "frozen"])
    ),
    st.tuples(st.just("thaw"), st.integers(0, DAEMONS - 1), st.none()),
)
QUOTA = (Window(10, 7), Window(60, 15))


@pytest.mark.slow
@pytest.mark.no_cover  # which takes as long again
@examples(300)
@given(st.lists(SKEWED_STEPS, min_size=10, max_size=60))
def test_several_daemons_never_let_more_through_than_the_quota(
    steps: list[tuple[str, int, object]],
) -> None:
    with tempfile.TemporaryDirectory(dir=fast_directory()) as directory:
        fleet = Fleet(Path(directory), DAEMONS)
        accepted: list[str] = []
        for what, daemon, value in steps:
            store = fleet.stores[daemon]
            if what == "send":
                assert isinstance(value, list)
                batch = [lone_charge(a, n, f"i{next(fleet.instances)}", QUOTA) for a, n in value]
                with suppress(StoreError):
                    verdicts = fleet.ledgers[daemon].charge(batch, NEVER)
                    pairs = zip(batch, verdicts, strict=True)
                    accepted += [charge.instance for charge, v in pairs if v.accepted]
            elif what == "wait":
                assert isinstance(value, int)
                fleet.world.now += value
            elif what == "skew":
                assert isinstance(value, int)
                store.skew = value * SECOND
            elif what == "reset":
                store.reset(str(value))
            elif what == "restart":
                fleet.ledgers[daemon] = fleet.ledger(store)
            elif what == "mishap":
                store.mishap = str(value)
            else:
                store.thaw()
        for store in fleet.stores:
            store.thaw()
        rows = fleet.rows()
        fleet.close()
    instances = [row.instance for row in rows]
    assert all(instances.count(instance) == 1 for instance in accepted)
    assert len({(row.account, row.seq) for row in rows}) == len(rows)
    for account in "abc":
        never_over_quota([row for row in rows if row.account == account])


def never_over_quota(rows: list[Entry]) -> None:
    """In the ledger's own times no period of any length in QUOTA holds more than it may."""
    assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
    for a, b in itertools.pairwise(rows):
        assert (a.epoch, a.at) <= (b.epoch, b.at)
    for last in rows:
        for window in QUOTA:
            start = last.at - window.period * SECOND
            within = [r for r in rows if r.at >= start and r.seq <= last.seq]
            assert sum(r.recipients for r in within if r.epoch == last.epoch) <= window.msgquota
    for row in rows:
        before = [r.recipients for r in rows if r.epoch == row.epoch and r.seq <= row.seq]
        assert row.total == sum(before)


@pytest.mark.parametrize("restart", [0.0, 0.005, 0.05])
@pytest.mark.parametrize("quota", [100, 1000])
def test_windows_of_many_sends_slide_exactly(fleet: StartFleet, restart: float, quota: int) -> None:
    one = fleet()
    luck = random.Random(7)
    windows = (Window(1, quota),)
    sends: list[tuple[int, int]] = []
    for _ in range(3000):
        one.world.now += luck.randrange(SECOND // 50)
        if luck.random() < restart:
            one.ledgers[0].open()
        cost, now = luck.randrange(1, 4), START + one.world.now
        used = sum(n for at, n in sends if at >= now - SECOND)
        (verdict,) = one.ledgers[0].charge([lone_charge("a", cost, "", windows)], NEVER)
        assert verdict.accepted is (used + cost <= quota)
        assert verdict.used == used + cost * verdict.accepted
        if verdict.accepted:
            sends.append((now, cost))


@pytest.mark.parametrize("purged", [0, 1234, 9_990])
@pytest.mark.parametrize("reset", [0, 1, 4321])
def test_a_window_that_begins_deep_in_a_chain(fleet: StartFleet, purged: int, reset: int) -> None:
    """Wherever it begins, a new ledger finds the same as an addition of all sends."""
    one, luck = fleet(), random.Random(purged + reset)
    rows, at, total = list[Entry](), START, 0
    for seq in range(1, 10_001):
        at += luck.choice((0, 0, 1, 50)) * 1000
        cost = 0 if seq == reset else luck.randrange(1, 4)
        total = total + cost if cost else 0
        rows.append(Entry("a", seq, 1 + (0 < reset <= seq), at, cost, total, "", 1))
    for first in range(0, len(rows), 500):
        one.stores[0].append(rows[first : first + 500])
    one.stores[0].run("DELETE FROM sends WHERE seq <= ?", (purged,))
    one.world.now = at + SECOND - START
    now = START + one.world.now
    for depth in (1, 5, 7, 8, 9, 33, 40, 41, 300, 5000, 9_999):
        period = max(1, (now - rows[-depth].at) // SECOND)
        start, epoch = now - period * SECOND, rows[-1].epoch
        inside = [r for r in rows[purged:] if r.epoch == epoch and r.at >= start]
        used = sum(r.recipients for r in inside)
        one.ledgers[0].open()
        window = Window(period, used, msg="{retry_after}")
        charge = lone_charge("a", min(used, depth), "", (window,))
        (verdict,) = one.ledgers[0].charge([charge], NEVER)
        assert (verdict.accepted, verdict.used) == (False, used), f"depth {depth}"
        totals = itertools.accumulate(r.recipients for r in inside)
        last = inside[sum(total < min(used, depth) for total in totals)]
        assert verdict.retry_at == pytest.approx(
            (last.at - now) / SECOND + period + one.world.now / SECOND, abs=1e-5
        )


@pytest.mark.parametrize("inside", [7, 8, 9, 40, 64])
def test_chains_of_any_length_behind_a_window(fleet: StartFleet, inside: int) -> None:
    one = fleet()
    old, young = START, START + DAY * SECOND
    one.world.now = DAY * SECOND + SECOND
    for length in range(inside, inside + 150):
        ats = [old] * (length - inside) + [young] * inside
        name = f"a{length}"
        rows = [Entry(name, n, 1, at, 1, n, "", 1) for n, at in enumerate(ats, 1)]
        one.stores[0].append(rows)
        charge = lone_charge(name, 1, "", (Window(60, inside),))
        (verdict,) = one.ledgers[0].charge([charge], NEVER)
        assert (verdict.accepted, verdict.used) == (False, inside), f"of {length}"


def test_heads_in_the_future_with_many_sends_behind_them(fleet: StartFleet) -> None:
    one = fleet()
    windows = (Window(1000, 200),)
    for _ in range(200):
        one.world.now += 10 * SECOND
        assert one.send("a", windows)
    one.stores[0].skew = -900 * SECOND
    one.ledgers[0] = one.ledger(one.stores[0])
    assert [one.send("a", windows) for _ in range(101)] == [True] * 99 + [False] * 2
    one.world.now += 10 * SECOND
    assert [one.send("a", windows) for _ in range(2)] == [True, False]


def test_a_purge_changes_no_decision(fleet: StartFleet) -> None:
    one, model = fleet(), Model()
    luck = random.Random(7)
    windows = (Window(3600, 12),)
    for _ in range(1500):
        one.world.now += luck.randrange(400) * SECOND
        account = luck.choice("aaaabc")
        if luck.random() < 0.3:
            one.ledgers[0].purge()
        expected = model.send(account, 1, windows, START + one.world.now)
        one.ledgers[0]._accounts._clock.distrust()
        assert one.send(account, windows) is expected
    while one.ledgers[0].purge():
        pass
    assert min(row.at for row in one.rows()) >= START + one.world.now - DAY * SECOND


def test_a_purge_keeps_the_newest_row_of_each_account(
    fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saslquota, "PURGE_ROWS", 3)
    one = fleet()
    windows = (Window(3600, 100),)
    for name in "abcdefgh":
        assert all(one.send(name, windows) for _ in range(4))
    one.world.now += (DAY + 1) * SECOND
    while one.ledgers[0].purge():
        pass
    assert [(row.account, row.seq) for row in one.rows()] == [(name, 4) for name in "abcdefgh"]
    assert one.send("a", windows)
    assert one.rows()[1].seq == 5


def test_a_connection_that_breaks_in_the_middle_of_a_decision(
    fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was accepted before it in the batch is decided again, and written once."""
    one = fleet()
    windows = (Window(3600, 40, msg="{retry_after}"),)
    for _ in range(40):
        assert one.send("b", windows)
        one.world.now += 1
    search, broken = one.stores[0].entries_after, [Unavailable("the test")]

    def break_once(*wanted: Any) -> list[saslquota.StoredEntry]:
        if broken:
            raise broken.pop()
        return search(*wanted)

    monkeypatch.setattr(one.stores[0], "entries_after", break_once)
    batch = [lone_charge("a", 1, "a", windows), lone_charge("b", 35, "b", windows)]
    verdicts = one.ledgers[0].charge(batch, NEVER)
    assert not broken
    assert [verdict.accepted for verdict in verdicts] == [True, False]
    assert [row.instance for row in one.rows() if row.account == "a"] == ["a"]


def test_what_nobody_waits_for_is_not_charged(fleet: StartFleet) -> None:
    """Nor does it count against those behind it."""
    one = fleet()
    pool = Debit("POOL *", 1, (Window(60, 3),))
    batch = [Charge(name, (Debit(name, 1, (Window(60, 9),)), pool)) for name in "abcde"]
    verdicts = one.ledgers[0].charge(batch, NEVER, lambda index: index not in (0, 2))
    assert [verdict.accepted for verdict in verdicts] == [False, True, False, True, True]
    assert [row.account for row in one.rows()] == ["POOL *", "b", "d", "e"]


def test_nothing_is_written_when_reading_has_taken_too_long(
    fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An INSERT that takes as long as the last statement would end after the deadline."""
    one = fleet()
    store, seconds = one.stores[0], [3, 2]
    newest = store.newest_entries

    def slow(*names: Any, **options: Any) -> list[saslquota.StoredEntry]:
        found = newest(*names, **options)
        store.statement_took = seconds.pop(0)
        one.world.now += int(store.statement_took) * SECOND
        return found

    monkeypatch.setattr(store, "newest_entries", slow)
    charge = [lone_charge("a", 1, "", (Window(60, 1),))]
    with pytest.raises(TimedOut):
        one.ledgers[0].charge(charge, one.world.monotonic() + 5)
    assert one.rows() == []
    assert one.ledgers[0].charge(charge, one.world.monotonic() + 5)[0].accepted


def test_nothing_is_written_if_the_last_insert_was_too_slow(fleet: StartFleet) -> None:
    """Though there is nothing to read. On a new connection it is not known how long one takes."""
    one = fleet()
    windows = (Window(60, 9),)
    assert one.send("a", windows)
    one.stores[0].insert_took = 3.0
    charge = [lone_charge("a", 1, "", windows)]
    with pytest.raises(TimedOut):
        one.ledgers[0].charge(charge, one.world.monotonic() + 2)
    assert len(one.rows()) == 1
    one.ledgers[0].open()
    assert one.ledgers[0].charge(charge, one.world.monotonic() + 2)[0].used == 2


@pytest.mark.parametrize("mishap", ["lost", "done"])
def test_a_late_insert_is_not_repeated(fleet: StartFleet, mishap: str) -> None:
    """Somebody else has the fallback already."""
    one = fleet()
    store, tokens = one.stores[0], one.stores[0].tokens

    def late(entries: Sequence[Entry]) -> set[int]:
        one.world.now += 6 * SECOND
        return tokens(entries)

    store.tokens = late  # type: ignore[method-assign]
    store.mishap = mishap
    charge = [lone_charge("a", 1, "", (Window(60, 9),))]
    if mishap == "lost":
        with pytest.raises(TimedOut):
            one.ledgers[0].charge(charge, one.world.monotonic() + 5)
        assert one.rows() == []
    else:
        assert one.ledgers[0].charge(charge, one.world.monotonic() + 5)[0].accepted
        assert len(one.rows()) == 1


def test_pools_are_locked_last(fleet: StartFleet) -> None:
    """Whoever waits for a sender's row must not hold a pool's, for which all others wait."""
    one = fleet()
    written: list[str] = []
    append = one.stores[0].append

    def note(rows: Sequence[Entry]) -> None:
        written.extend(row.account for row in rows)
        append(rows)

    one.stores[0].append = note  # type: ignore[method-assign]
    pools = (Debit("POOL @x", 1, (Window(60, 9),)), Debit("POOL *", 1, (Window(60, 9),)))
    batch = [Charge("", (Debit(name, 1, (Window(60, 9),)), *pools)) for name in ("b@x", "a@x")]
    one.ledgers[0].charge(batch, NEVER)
    assert written == ["a@x", "b@x", "POOL *", "POOL @x"]
