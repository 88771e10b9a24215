"""The database's clock is wrong, or another daemon's is: nobody gets more for it than a quota, and
nobody is refused for longer than a period."""

import itertools
import tempfile
import time
from collections.abc import Callable
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
from saslquota import Charge, Debit, Entry, StoreError, Verdict, Window

pytestmark = pytest.mark.usefixtures("exact_retries")

HOUR = 3600  # seconds
FIVE = (Window(HOUR, 5),)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What has been logged, and is forgotten now."""
    monkeypatch.setattr(saslquota.log, "propagate", True)

    def text() -> str:
        found = caplog.text
        caplog.clear()
        return found

    return text


# --- The clock itself -----------------------------------------------------------------------------


class Clocked:
    """A clock over a file's database, some seconds after it was read for the first time."""

    def __init__(self, one: Fleet) -> None:
        self.world, self.store = one.world, one.stores[0]
        self.clock = saslquota.Clock(self.store, one.world.monotonic)
        assert not self.clock.read()
        self.world.now += 10 * SECOND

    def now(self) -> int:
        """Since the world began, in microseconds."""
        return self.clock.now().clock - START

    def fastest(self) -> int:
        return self.clock.now().fastest - START


def test_the_clock_is_carried_on_between_readings(fleet: StartFleet) -> None:
    one = Clocked(fleet())
    assert not one.clock.is_fresh()
    assert one.now() == one.fastest() == 10 * SECOND
    one.clock.read()
    assert one.clock.is_fresh()
    one.clock.distrust()
    assert not one.clock.is_fresh()


@pytest.mark.parametrize("ahead", [1, SECOND, 400 * DAY * SECOND])
def test_a_reading_ahead_is_taken(fleet: StartFleet, log: Callable[[], str], ahead: int) -> None:
    one = Clocked(fleet())
    one.store.skew = ahead
    assert not one.clock.read()
    assert one.now() == 10 * SECOND + ahead
    assert log() == ""


@pytest.mark.parametrize("behind", [1, 1000, SECOND])
def test_a_reading_a_little_behind_is_waited_for(
    fleet: StartFleet, log: Callable[[], str], behind: int
) -> None:
    """The clock runs a tenth slower, and never falls, however often it is read."""
    for reads in (False, True):
        one = Clocked(fleet())
        one.store.skew = -behind
        assert not one.clock.read()
        assert one.now() == 10 * SECOND
        for tenth in range(1, 10):
            one.world.now += behind
            assert one.now() == pytest.approx(10 * SECOND + behind * tenth * 0.9, abs=10)
            assert not (reads and one.clock.read())
        one.world.now += 2 * behind + 10
        assert one.now() == one.world.now - behind
        assert one.fastest() == one.now()
        assert log() == ""


@pytest.mark.parametrize(
    ("behind", "complaint"),
    [
        (SECOND + 1, ""),
        (60 * SECOND, ""),
        (61 * SECOND, "ERROR .*clock went back by 61 s"),
        (DAY * SECOND, "ERROR .*clock went back by 86400 s"),
    ],
)
def test_a_reading_far_behind_is_taken(
    fleet: StartFleet, log: Callable[[], str], behind: int, complaint: str
) -> None:
    """The old clock goes on beside it."""
    one = Clocked(fleet())
    one.store.skew = -behind
    assert one.clock.read()
    assert one.now() == 10 * SECOND - behind
    assert one.fastest() == 10 * SECOND
    one.world.now += 5 * SECOND
    assert one.now() == 15 * SECOND - behind
    assert one.fastest() == 15 * SECOND
    found = log()
    assert ("ERROR" in found) is bool(complaint)
    assert complaint.removeprefix("ERROR .*") in found


def test_what_the_reading_took_is_not_behind(fleet: StartFleet, log: Callable[[], str]) -> None:
    """The server has looked at its clock at once, and the network kept the answer for 5 s."""
    one = Clocked(fleet())
    look = one.store.now

    def slow() -> int:
        found = look()
        one.world.now += 5 * SECOND
        return found

    one.store.now = slow  # type: ignore[method-assign]
    assert not one.clock.read()
    assert one.now() == 15 * SECOND
    one.store.now = look  # type: ignore[method-assign]
    one.world.now += SECOND
    assert not one.clock.read()
    assert one.now() == one.fastest() == 16 * SECOND
    assert log() == ""


def test_the_newest_entry_is_read_at_each_connect(fleet: StartFleet) -> None:
    one = Clocked(fleet())
    ahead = START + DAY * SECOND
    one.store.append([Entry("a", 1, 1, ahead, 1, 1, "", 1), Entry("b", 1, 1, START, 1, 1, "", 1)])
    one.clock.read()
    assert one.fastest() == one.now()
    one.clock.distrust()
    one.clock.read()
    assert one.fastest() == DAY * SECOND
    one.world.now += 7
    assert one.fastest() == DAY * SECOND + 7


def test_the_real_clocks() -> None:
    store = saslquota.SQLiteStore(Path(":memory:"), 1)
    store.newest_at = lambda: 0  # type: ignore[method-assign]
    store.now = lambda: time.time_ns() // 1000  # type: ignore[method-assign]
    clock = saslquota.Clock(store, time.monotonic)
    assert not clock.read()
    times = []
    for _ in range(20):
        clock.read()
        times += [clock.now().clock for _ in range(20)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(time.time_ns() // 1000, abs=SECOND)


# --- What became of it in the field ---------------------------------------------------------------


def test_a_clock_that_was_a_day_ahead_for_a_moment(fleet: StartFleet) -> None:
    """One send by anybody, and the clock is put right: everybody is counted as before."""
    one = fleet()
    one.stores[0].skew = DAY * SECOND
    assert one.send("somebody", FIVE)
    one.world.now += 2_500_000
    one.stores[0].skew = 0
    one.world.now += SECOND
    for _ in range(3):
        for sender in ("bob", "somebody"):
            used = sender == "somebody" and one.world.now < HOUR * SECOND
            accepted = 5 - used
            assert [one.send(sender, FIVE) for _ in range(6)] == [n < accepted for n in range(6)], (
                sender
            )
        one.world.now += HOUR * SECOND
        assert not one.send("bob", FIVE)
        one.world.now += 1


def test_retry_after_counts_on_the_accounts_clock(fleet: StartFleet) -> None:
    one = fleet()
    windows = (Window(HOUR, 5, msg="{retry_after}"),)
    one.stores[0].skew = DAY * SECOND
    assert all(one.send("a", windows) for _ in range(5))
    one.stores[0].skew = 0
    one.world.now += 2 * SECOND
    for _ in range(2):
        (verdict,) = one.ledgers[0].charge([lone_charge("a", 1, "", windows)], NEVER)
        assert not verdict.accepted
        assert verdict.retry_at == pytest.approx(HOUR, abs=0.001)
        one.world.now += 600 * SECOND
    one.ledgers[0] = one.ledger(one.stores[0])  # which knows the newest entry, of 20 min ago
    (verdict,) = one.ledgers[0].charge([lone_charge("a", 1, "", windows)], NEVER)
    assert verdict.retry_at == pytest.approx(one.world.monotonic() + HOUR, abs=0.001)


def test_an_account_stays_on_the_fast_clock_until_its_windows_are_empty(fleet: StartFleet) -> None:
    """Also when the clock has come to its newest send meanwhile; and after a collision."""
    two, plenty = fleet(2), (Window(HOUR, 99),)
    two.stores[0].skew = 1800 * SECOND
    assert all(two.send("a", FIVE) for _ in range(5))
    two.stores[0].skew = 0
    for minutes in (1, 20, 20, 18):
        two.world.now += minutes * 60 * SECOND
        assert two.send("b", plenty, daemon=1)  # so that the next one collides
        batch = [lone_charge("a", 1, "", FIVE), lone_charge("b", 1, "", plenty)]
        verdicts = two.ledgers[0].charge(batch, NEVER)
        assert not verdicts[0].accepted, f"after {minutes} minutes"
    two.world.now += 60 * SECOND + 1
    assert [two.send("a", FIVE) for _ in range(6)] == [True] * 5 + [False]


def test_an_account_that_does_not_try_while_it_is_ahead(fleet: StartFleet) -> None:
    """A step back is noticed for all that are remembered."""
    one = fleet()
    one.stores[0].skew = 1800 * SECOND
    assert all(one.send("a", FIVE) for _ in range(5))
    one.stores[0].skew = 0
    one.world.now += 2 * SECOND
    assert one.send("b", FIVE)
    one.world.now += HOUR * SECOND
    assert [one.send("a", FIVE) for _ in range(6)] == [True] * 5 + [False]


def test_an_idle_account_comes_back(fleet: StartFleet) -> None:
    one = fleet()
    one.stores[0].skew = DAY * SECOND
    assert one.send("a", FIVE)
    one.stores[0].skew = 0
    one.world.now += 2 * SECOND
    assert one.send("a", FIVE)
    assert one.rows()[-1].at == START + (DAY + 2) * SECOND
    one.world.now += (DAY + HOUR) * SECOND
    assert one.send("a", FIVE)
    assert one.rows()[-1].at > START + one.world.now
    one.world.now += (DAY + HOUR) * SECOND + 1
    assert one.send("a", FIVE)
    assert one.rows()[-1].at == START + one.world.now


def test_what_had_left_a_window_is_in_it_again(fleet: StartFleet) -> None:
    """A step back gives nobody a further quota, whatever a daemon remembers."""
    one, ten = fleet(), (Window(HOUR, 10),)
    assert one.send("a", ten, 9)
    one.world.now += HOUR // 2 * SECOND
    assert one.send("a", ten)
    one.world.now += (HOUR // 2 + 60) * SECOND
    assert not one.send("a", ten, 10)  # for the one that is half an hour old
    one.stores[0].skew = -HOUR // 4 * SECOND
    one.world.now += 2 * SECOND
    for _ in range(2):
        assert not one.send("a", ten)
        one.ledgers[0] = one.ledger(one.stores[0])
    one.world.now += HOUR // 4 * SECOND
    assert [one.send("a", ten, n) for n in (9, 1)] == [True, False]


def test_the_next_database_is_behind(fleet: StartFleet) -> None:
    """The first of two hosts, 40 s ahead, dies."""
    one = fleet()
    one.stores[0].skew = 40 * SECOND
    quick = (Window(10, 5),)
    assert [one.send("a", quick) for _ in range(6)] == [True] * 5 + [False]
    one.stores[0].skew = 0
    one.ledgers[0].open()
    for _ in range(4):
        one.world.now += 10 * SECOND
        assert not one.send("a", quick)
        one.world.now += 1
        for sender in "ab":
            assert [one.send(sender, quick) for _ in range(6)] == [True] * 5 + [False]


def test_a_reset_takes_the_account_back_to_now(fleet: StartFleet) -> None:
    one = fleet()
    one.stores[0].skew = DAY * SECOND
    assert all(one.send("a", FIVE) for _ in range(5))
    one.stores[0].skew = 0
    one.world.now += 2 * SECOND
    assert not one.send("a", FIVE)
    one.stores[0].reset("a")
    one.world.now += 2 * SECOND
    assert [one.send("a", FIVE) for _ in range(6)] == [True] * 5 + [False]
    assert one.rows()[-1].at == START + one.world.now
    for _ in range(2):  # also for a daemon that comes later
        assert not one.send("a", FIVE)
        one.ledgers[0] = one.ledger(one.stores[0])
    one.world.now += HOUR * SECOND + 1
    assert one.send("a", FIVE)


def test_a_send_that_is_dated_ahead_is_an_error_once_an_hour(
    fleet: StartFleet, log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = fleet(2)
    monkeypatch.setattr(time, "monotonic", two.world.monotonic)
    two.world.now += HOUR * SECOND
    two.stores[1].skew = 90 * SECOND
    complaint = "ERROR    saslquota:saslquota.py"
    for accounts, complaints in (("a", 1), ("bcd", 0), ("e", 1), ("f", 0)):
        for account in accounts:
            assert two.send(account, FIVE, daemon=1)
            assert two.send(account, FIVE, daemon=0)
        found = log()
        assert found.count("a send is dated 90 s ahead of the clock") == complaints, accounts
        assert found.count(complaint) == complaints
        two.world.now += 1800 * SECOND if accounts != "bcd" else 1801 * SECOND


# --- The purge ------------------------------------------------------------------------------------


def purge(one: Fleet) -> int:
    """Purge as far as it goes; the number of rows that have gone."""
    before = len(one.rows())
    while one.ledgers[0].purge():
        pass
    return before - len(one.rows())


def test_the_purge_waits_for_an_hour_after_the_start(fleet: StartFleet) -> None:
    one = fleet()
    assert one.send("a", FIVE)
    assert one.send("a", FIVE)
    one.world.now += 2 * DAY * SECOND
    one.ledgers[0] = one.ledger(one.stores[0])
    assert purge(one) == 0
    one.world.now += HOUR * SECOND - 1
    assert purge(one) == 0
    one.world.now += 1
    assert purge(one) == 1


@pytest.mark.parametrize("step", [61 * SECOND, 40 * DAY * SECOND, -61 * SECOND, -DAY * SECOND])
def test_the_purge_waits_for_an_hour_after_a_step(fleet: StartFleet, step: int) -> None:
    """Also when nothing but the purge has read the clock since."""
    one = fleet()
    assert one.send("a", FIVE)
    assert one.send("a", FIVE)
    one.world.now += 4 * DAY * SECOND
    one.stores[0].skew = step
    assert purge(one) == 0
    one.world.now += HOUR * SECOND - 1
    assert purge(one) == 0
    one.stores[0].skew = 0
    one.world.now += 1
    assert purge(one) == 0, "that was a step, too"
    one.world.now += HOUR * SECOND
    assert purge(one) == 1


def test_a_clock_that_is_wrong_for_a_while_empties_no_table(fleet: StartFleet) -> None:
    one = fleet()
    one.world.now += 2 * HOUR * SECOND
    assert all(one.send("a", FIVE) for _ in range(5))
    one.stores[0].skew = 400 * DAY * SECOND
    for _ in range(3):
        one.world.now += 19 * 60 * SECOND
        assert purge(one) == 0
    one.stores[0].skew = 0
    one.world.now += 60 * SECOND
    assert purge(one) == 0
    assert not one.send("a", FIVE)


# --- One daemon, against a model in real time -----------------------------------------------------

WINDOWS = {
    "a": (Window(5, 6, msg="{retry_after}"),),
    "b": (Window(20, 9, msg="{retry_after}"),),
    "c": (Window(5, 4, msg="{retry_after}"), Window(60, 12, msg="{retry_after}")),
    "POOL @x": (Window(10, 9, msg="{retry_after}"),),
    "POOL *": (Window(5, float("inf")), Window(60, 25, msg="{retry_after}")),
}
COSTS = st.integers(1, 4)
SIZES = st.one_of(
    st.integers(-15 * SECOND, 15 * SECOND),
    st.integers(-100 * DAY, 100 * DAY).map(lambda seconds: seconds * SECOND),
    st.sampled_from([SECOND, SECOND + 1, -SECOND, -SECOND - 1, 5 * SECOND, -5 * SECOND, -1, 1]),
)
WAITS = st.one_of(
    st.integers(0, 8 * SECOND),
    st.sampled_from([1, 5 * SECOND, 5 * SECOND + 1, 20 * SECOND, 2 * HOUR * SECOND]),
)
SENDS = st.tuples(
    st.just("send"),
    st.lists(st.tuples(st.sampled_from("abc"), COSTS), min_size=1, max_size=6),
)
STEPS = st.one_of(
    SENDS,
    SENDS,
    st.tuples(st.just("wait"), WAITS),
    st.tuples(st.just("sleep"), WAITS),
    st.tuples(st.just("jump"), SIZES),
    st.tuples(st.just("jump"), SIZES),
    st.tuples(st.just("put_right"), st.none()),
    st.tuples(st.just("reset"), st.sampled_from("abc")),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("purge"), st.none()),
)


class Model:
    """The rules for a clock that is wrong, said again by brute force: lists of all sends."""

    def __init__(self) -> None:
        self.sends: dict[str, list[tuple[int, int]]] = {name: [] for name in WINDOWS}
        self.at = dict.fromkeys(WINDOWS, 0)
        self.newest = 0
        self.restart()

    def restart(self) -> None:
        self.known: set[str] = set()
        self.ahead: set[str] = set()  # that stay on the fast clock until their windows are empty
        self.clock: int | None = None
        self.fastest = 0
        self.moment = self.lag = self.lag_since = 0

    def carry_on(self, moment: int) -> None:
        """Both clocks follow the monotonic one, and the first one waits."""
        passed, self.moment = moment - self.moment, moment
        self.fastest += passed
        if self.clock is not None:
            lag = max(0, self.lag_since - (moment - self.read_at) // 10)
            self.clock += passed - (self.lag - lag)
            self.lag = lag

    def read(self, reading: int, moment: int) -> None:
        self.carry_on(moment)
        self.fastest = max(self.fastest, self.newest)
        carried = reading if self.clock is None else self.clock
        self.read_at, self.clock = moment, max(carried, reading)
        self.lag = self.lag_since = max(0, carried - reading)
        if carried - reading > SECOND:
            self.fastest = max(self.fastest, carried)
            self.clock, self.lag, self.lag_since = reading, 0, 0
            self.ahead |= {name for name in self.known if self.at[name] > reading}

    def time(self, account: str) -> int:
        assert self.clock is not None
        at, longest = self.at[account], max(window.period for window in WINDOWS[account])
        if at > self.clock:
            self.ahead.add(account)
            self.fastest = max(self.fastest, at)
        elif at + longest * SECOND < self.clock:
            self.ahead.discard(account)
        return max(self.clock, self.fastest) if account in self.ahead else self.clock

    def send(self, account: str, n: int) -> bool:
        assert self.clock is not None
        now = self.time(account)
        self.known.add(account)
        for window in WINDOWS[account]:
            start = now - window.period * SECOND
            used = sum(cost for at, cost in self.sends[account] if at >= start)
            if used + n > window.msgquota:
                return False
        self.sends[account].append((now, n))
        self.at[account] = now
        self.newest = max(self.newest, now)
        if now <= self.clock:
            self.ahead.discard(account)
        return True

    def reset(self, account: str, reading: int) -> None:
        if self.at[account]:
            self.at[account], self.sends[account] = reading, []
            self.newest = max(self.newest, reading)
            self.known.discard(account)
            self.ahead.discard(account)


class Reality:
    """What senders got, by the only clock that is right."""

    def __init__(self, clocks: int = 1) -> None:
        self.sends: list[tuple[int, str, int]] = []
        self.has_gone_back = False
        self.favours: dict[str, int] = dict.fromkeys(WINDOWS, clocks)  # quotas it may have had

    def favour(self, account: str = "") -> None:
        """All accounts, or one, may have had one more."""
        for name in [account] if account else WINDOWS:
            self.favours[name] += 1

    def jump(self, microseconds: int) -> None:
        """A step back gives nobody anything, but for those that it puts on a still older clock."""
        if microseconds > 0 or self.has_gone_back:
            self.favour()
        self.has_gone_back |= microseconds < 0

    def accept(self, now: int, account: str, n: int) -> None:
        self.sends.append((now, account, n))
        for window in WINDOWS[account]:
            start = now - window.period * SECOND
            used = sum(n for at, who, n in self.sends if who == account and at >= start)
            assert used <= window.msgquota * self.favours[account], "over quota, in real time"


def charge(one: Fleet, sends: list[tuple[str, int]], daemon: int = 0) -> list[Verdict]:
    batch = [lone_charge(a, n, f"i{next(one.instances)}", WINDOWS[a]) for a, n in sends]
    return one.ledgers[daemon].charge(batch, NEVER)


class Run:
    """One daemon, the model and reality."""

    def __init__(self, directory: Path) -> None:
        self.one, self.model, self.reality = Fleet(directory), Model(), Reality()
        self.world, self.store = self.one.world, self.one.stores[0]

    def step(self, what: str, value: Any) -> None:
        self.one.ledgers[0]._clock.distrust()  # let each step begin with a reading
        getattr(self, what)(value)

    def read(self) -> None:
        self.model.read(self.store.now(), round(self.world.monotonic() * SECOND))

    def send(self, sends: list[tuple[str, int]]) -> None:
        self.read()
        for (account, n), verdict in zip(sends, charge(self.one, sends), strict=True):
            assert verdict.accepted is self.model.send(account, n)
            if verdict.accepted:
                self.reality.accept(self.world.now, account, n)

    def purge(self, _: None) -> None:
        self.read()
        self.one.ledgers[0].purge()

    def wait(self, microseconds: int) -> None:
        self.world.now += microseconds

    def sleep(self, microseconds: int) -> None:
        self.world.sleep(microseconds)
        self.reality.favour()

    def jump(self, microseconds: int) -> None:
        self.store.skew += microseconds
        self.reality.jump(microseconds)

    def put_right(self, _: None) -> None:
        self.jump(-self.store.skew)

    def reset(self, account: str) -> None:
        self.model.reset(account, self.store.now())
        self.store.reset(account)
        self.reality.favour(account)
        self.world.now += SECOND + 1  # until a refusal is read again

    def restart(self, _: None) -> None:
        self.one.ledgers[0] = self.one.ledger(self.store)
        self.model.restart()
        self.model.carry_on(round(self.world.monotonic() * SECOND))


@pytest.mark.slow
@pytest.mark.no_cover  # which takes as long again
@examples(300)
@given(st.lists(STEPS, min_size=5, max_size=50))
def test_one_daemon_equals_the_model(steps: list[tuple[str, Any]]) -> None:
    with tempfile.TemporaryDirectory(dir=fast_directory()) as directory:
        run = Run(Path(directory))
        for what, value in steps:
            run.step(what, value)
        for account in "abc":
            is_let_in_again(run.one, account, 0)
        run.one.close()


def is_let_in_again(one: Fleet, account: str, daemon: int) -> None:
    """Whatever has been, within a period; and neither sooner nor later than it is told."""
    world, windows = one.world, WINDOWS[account]
    world.now += 15 * SECOND  # until a clock that runs slower has been caught up
    (verdict,) = charge(one, [(account, 4)], daemon)
    if verdict.accepted:
        return
    assert verdict.retry_at is not None
    wait = round((verdict.retry_at - world.monotonic()) * SECOND)
    assert wait <= max(window.period for window in windows) * SECOND + 1
    if wait > 2 * SECOND:
        world.now += wait - 10
        assert not charge(one, [(account, 4)], daemon)[0].accepted
        world.now += 20
    else:
        world.now += wait + 10
    assert charge(one, [(account, 4)], daemon)[0].accepted


# --- Several daemons with clocks apart ------------------------------------------------------------

SKEWS = st.sampled_from([0, 0, 1000, 400_000, 2 * SECOND, 40 * SECOND, DAY * SECOND, -DAY * SECOND])
DAEMON = st.integers(0, DAEMONS - 1)
SHARED = st.tuples(
    st.just("send"),
    DAEMON,
    st.lists(st.tuples(st.sampled_from("abc"), COSTS, st.booleans()), min_size=1, max_size=6),
)
SHARED_STEPS = st.one_of(
    SHARED,
    SHARED,
    SHARED,
    st.tuples(st.just("wait"), st.just(0), WAITS),
    st.tuples(st.just("sleep"), st.just(0), WAITS),
    st.tuples(st.just("jump"), DAEMON, SIZES),
    st.tuples(st.just("put_right"), DAEMON, st.none()),
    st.tuples(st.just("reset"), DAEMON, st.sampled_from(list(WINDOWS))),
    st.tuples(st.just("restart"), DAEMON, st.none()),
    st.tuples(st.just("purge"), DAEMON, st.none()),
    st.tuples(st.just("mishap"), DAEMON, st.sampled_from(["lost", "done", "frozen"])),
    st.tuples(st.just("thaw"), DAEMON, st.none()),
)


class SharedRun:
    """Several daemons on one table, and reality."""

    def __init__(self, directory: Path, skews: list[int]) -> None:
        self.fleet, self.reality = Fleet(directory, DAEMONS), Reality(len(set(skews)))
        self.world = self.fleet.world
        for store, skew in zip(self.fleet.stores, skews, strict=True):
            store.skew = skew

    def send(self, daemon: int, sends: list[tuple[str, int, bool]]) -> None:
        batch = []
        for account, n, pools in sends:
            names = [account, "POOL @x", "POOL *"] if pools else [account]
            debits = tuple(Debit(name, n, WINDOWS[name]) for name in names)
            batch.append(Charge(f"i{next(self.fleet.instances)}", debits))
        with suppress(StoreError):
            verdicts = self.fleet.ledgers[daemon].charge(batch, NEVER)
            for one, verdict in zip(batch, verdicts, strict=True):
                for account, n, _ in one.debits if verdict.accepted else ():
                    self.reality.accept(self.world.now, account, n)

    def purge(self, daemon: int, _: None) -> None:
        self.fleet.ledgers[daemon].purge()

    def wait(self, _: int, microseconds: int) -> None:
        self.world.now += microseconds

    def sleep(self, _: int, microseconds: int) -> None:
        self.world.sleep(microseconds)
        self.reality.favour()

    def jump(self, daemon: int, microseconds: int) -> None:
        self.fleet.stores[daemon].skew += microseconds
        self.reality.jump(microseconds)

    def put_right(self, daemon: int, _: None) -> None:
        self.jump(daemon, -self.fleet.stores[daemon].skew)

    def reset(self, daemon: int, account: str) -> None:
        self.fleet.stores[daemon].reset(account)
        self.reality.favour(account)

    def restart(self, daemon: int, _: None) -> None:
        self.fleet.ledgers[daemon] = self.fleet.ledger(self.fleet.stores[daemon])

    def mishap(self, daemon: int, what: str) -> None:
        self.fleet.stores[daemon].mishap = what

    def thaw(self, daemon: int, _: None) -> None:
        self.fleet.stores[daemon].thaw()

    def agree(self) -> None:
        for store in self.fleet.stores:
            store.skew, store.mishap = 0, ""
            store.thaw()


@pytest.mark.slow
@pytest.mark.no_cover  # which takes as long again
@examples(300)
@given(
    st.lists(SKEWS, min_size=DAEMONS, max_size=DAEMONS),
    st.lists(SHARED_STEPS, min_size=10, max_size=60),
    st.lists(DAEMON, min_size=len(WINDOWS), max_size=len(WINDOWS)),
)
def test_several_daemons_with_clocks_apart(
    skews: list[int], steps: list[tuple[str, int, Any]], last: list[int]
) -> None:
    with tempfile.TemporaryDirectory(dir=fast_directory()) as directory:
        run = SharedRun(Path(directory), skews)
        for what, daemon, value in steps:
            getattr(run, what)(daemon, value)
        run.agree()
        for account, daemon in zip(WINDOWS, last, strict=True):
            is_let_in_again(run.fleet, account, daemon)
        rows = run.fleet.rows()
        run.fleet.close()
    for a, b in itertools.pairwise(rows):
        assert a.account != b.account or (a.epoch, a.at) <= (b.epoch, b.at)


def test_nodes_a_minute_apart_for_good(fleet: StartFleet) -> None:
    """A sender who sends as much as possible gets the quota in each period."""
    two, quick = fleet(2), (Window(10, 5),)
    two.stores[1].skew = 60 * SECOND
    sent = []
    for n in range(4000):
        two.world.now += SECOND // 10
        if two.send("a", quick, daemon=n % 7 % 2):
            sent.append(two.world.now)
    assert len(sent) >= 5 * 38
    starts = [t for t in sent if t > 11 * SECOND]
    assert all(sum(t - 10 * SECOND <= other <= t for other in sent) <= 5 for t in starts)
