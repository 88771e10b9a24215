"""Decisions over several windows and pools, against a brute-force model: all or none, what is not
enforced, which window is named, and the moment at which a refused send would fit."""

import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from fleet import DAEMONS, NEVER, START, Fleet, StartFleet, fast_directory
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from servers.audit import SECOND

import saslquota
from saslquota import Charge, Debit, Entry, StoreError, Verdict, Window

pytestmark = pytest.mark.usefixtures("exact_retries")


def window(period: int, quota: float, *, enforce: bool = True, asks: bool = True) -> Window:
    """A window whose message tells when a send would fit, or not."""
    return Window(period, quota, "rule", "{retry_after}" if asks else "no", enforce=enforce)


TRIAL = window(5, 3, enforce=False)
OWN = st.sampled_from(
    [
        (window(5, 6),),
        (window(5, 4), window(60, 12)),
        (window(5, 4, asks=False), window(60, 12, asks=False), window(20, 7)),
        (window(20, math.inf),),
        (window(5, math.inf), window(60, 20)),
        (TRIAL,),
        (TRIAL, window(5, 6), window(20, 5, enforce=False)),
        (window(5, 0, enforce=False),),
        (window(60, 0),),
    ]
)
POOL_PREFIX = st.sampled_from(
    [
        (window(5, 9),),
        (window(5, 7), window(60, 40)),
        (window(20, math.inf),),
        (window(5, 5, enforce=False),),
    ]
)
COST = st.integers(1, 4)
LOGINS = ("a@x", "b@x", "c@y")


@st.composite
def charges(draw: st.DrawFn) -> Charge:
    """A send, also of what counts messages in one part and recipients in another."""
    login = draw(st.sampled_from(LOGINS))
    parts = [Debit(login, draw(COST), draw(OWN))]
    pools = [pool for pool in (f"POOL @{login[-1]}", "POOL *") if draw(st.booleans())]
    parts += [Debit(pool, draw(COST), draw(POOL_PREFIX)) for pool in pools]
    if len(parts) > 1 and draw(st.integers(0, 5)) == 0:
        del parts[0]  # a message that its sender has been charged for already
    return Charge("", tuple(parts))


class Full(NamedTuple):
    """A window without room, and when the send would fit into it."""

    window: Window
    used: int
    cost: int
    fits: float


class Model:
    """A list of all sends, summed up for each decision."""

    def __init__(self) -> None:
        self.sends: dict[str, list[tuple[int, int]]] = {}
        self.at: dict[str, int] = {}

    def used(self, account: str, start: float) -> int:
        return sum(cost for at, cost in self.sends.get(account, []) if at >= start)

    def fits(self, part: Debit, window: Window, now: int) -> float:
        """Try every moment at which a send has left."""
        length = window.period * SECOND
        moments = [at + length + 1 for at, _ in self.sends.get(part.account, [])]
        for moment in sorted(moment for moment in moments if moment > now):
            if self.used(part.account, moment - length) + part.recipients <= window.msgquota:
                return moment
        return math.inf

    def send(self, charge: Charge, now: int) -> tuple[bool, bool, list[Full]]:
        """Whether it is accepted, whether a window has no room, and what may be named."""
        every: list[Full] = []
        for part in charge.debits:
            at = max(now, self.at.get(part.account, 0))
            for one in part.windows:
                used = self.used(part.account, at - one.period * SECOND)
                fits = self.fits(part, one, now)
                every.append(Full(one, used, part.recipients, fits))
        full = [one for one in every if one.used + one.cost > one.window.msgquota]
        refusing = [one for one in full if one.window.enforce]
        if not refusing:
            for account, cost, _ in charge.debits:
                self.at[account] = max(now, self.at.get(account, 0))
                self.sends.setdefault(account, []).append((self.at[account], cost))
        return not refusing, bool(full), refusing or full or every

    def reset(self, account: str, now: int) -> None:
        if account in self.at:
            self.sends[account] = []
            self.at[account] = max(now, self.at[account])


def matches(verdict: Verdict, expected: tuple[bool, bool, list[Full]], since: float) -> None:
    """`since` is the moment, in microseconds, from which retry is reckoned."""
    accepted, over, named = expected
    assert (verdict.accepted, verdict.over_quota) == (accepted, over)
    if over:
        last = max(one.fits for one in named)
        first = next(one for one in named if one.fits == last)
    else:
        first = max(named, key=lambda one: (one.used + one.cost) / (one.window.msgquota or 1))
    assert verdict.window == first.window
    assert verdict.used == first.used + first.cost * accepted
    if over and (len(named) > 1 or first.window.msg == "{retry_after}"):
        assert verdict.retry_at is not None
        assert verdict.retry_at * SECOND + since == pytest.approx(first.fits, abs=100)
    else:
        assert verdict.retry_at is None


ACCOUNTS = st.sampled_from([*LOGINS, "POOL @x", "POOL @y", "POOL *"])
WAITS = st.one_of(
    st.integers(0, 8 * SECOND), st.sampled_from([1, 5 * SECOND, 5 * SECOND + 1, 20 * SECOND])
)
STEPS = st.one_of(
    st.tuples(st.just("send"), st.lists(charges(), min_size=1, max_size=6)),
    st.tuples(st.just("send"), st.lists(charges(), min_size=1, max_size=2)),
    st.tuples(st.just("wait"), WAITS),
    st.tuples(st.just("reset"), ACCOUNTS),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("mishap"), st.sampled_from(["lost", "done"])),
)


@pytest.mark.parametrize("remembered", [2, saslquota.WINDOW_CACHE_ROWS])
@pytest.mark.slow
@pytest.mark.no_cover  # which takes as long again
@examples(300)
@given(steps=st.lists(STEPS, min_size=5, max_size=40))
def test_one_daemon_equals_the_model(remembered: int, steps: list[tuple[str, object]]) -> None:
    """With little remembered, the store must say when enough sends have left."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(dir=fast_directory()) as directory,
    ):
        patch.setattr(saslquota, "WINDOW_CACHE_ROWS", remembered)
        patch.setattr(saslquota, "LEAST_ROWS", min(remembered, saslquota.LEAST_ROWS))
        one, model = Fleet(Path(directory)), Model()
        for what, value in steps:
            store, ledger = one.stores[0], one.ledgers[0]
            ledger._accounts._clock.distrust()
            now = store.now()
            if what == "send":
                assert isinstance(value, list)
                verdicts = ledger.charge(value, NEVER)
                for charge, verdict in zip(value, verdicts, strict=True):
                    matches(verdict, model.send(charge, now), START)
            elif what == "wait":
                assert isinstance(value, int)
                one.world.now += value
            elif what == "reset":
                model.reset(str(value), now)
                store.reset(str(value))
                one.world.now += SECOND + 1  # until a refusal is read again
            elif what == "restart":
                one.ledgers[0] = one.ledger(store)
            else:
                store.mishap = str(value)
        one.close()


def test_a_pool_has_one_row_for_each_batch(fleet: StartFleet) -> None:
    one = fleet()
    parts = (Debit("POOL @x", 2, (window(60, 5),)), Debit("POOL *", 1, (window(60, 9),)))
    batch = [
        Charge(f"i{n}", (Debit(name, 1, (window(60, 9),)), *parts)) for n, name in enumerate("abc")
    ]
    verdicts = one.ledgers[0].charge(batch, NEVER)
    assert [verdict.accepted for verdict in verdicts] == [True, True, False]
    assert [(r.account, r.seq, r.recipients, r.total, r.instance) for r in one.rows()] == [
        ("POOL *", 1, 2, 2, "i0"),
        ("POOL @x", 1, 4, 4, "i0"),
        ("a", 1, 1, 1, "i0"),
        ("b", 1, 1, 1, "i1"),
    ]
    assert len({row.token for row in one.rows()}) == 1


def test_another_daemons_pool_is_noticed_by_collision(fleet: StartFleet) -> None:
    """Also by senders of which the other daemon knows nothing; and nothing is half written."""
    two = fleet(2)
    pool = Debit("POOL *", 1, (window(60, 3),))
    accepted = []
    for n in range(6):
        charge = Charge(f"i{n}", (Debit(f"user{n}", 1, (window(60, 9),)), pool))
        accepted += [v.accepted for v in two.ledgers[n % 2].charge([charge], NEVER)]
    assert accepted == [True] * 3 + [False] * 3
    assert [row.account for row in two.rows()] == ["POOL *"] * 3 + ["user0", "user1", "user2"]


# --- Several daemons ------------------------------------------------------------------------------

SENDER = (window(10, 7), window(20, 4, enforce=False), window(60, 15))
DOMAIN, SERVICE = (window(10, 9),), (window(60, 25), window(5, math.inf))
SHARED_STEPS = st.one_of(
    st.tuples(
        st.just("send"),
        st.integers(0, DAEMONS - 1),
        st.lists(st.tuples(st.sampled_from(LOGINS), COST), min_size=1, max_size=6),
    ),
    st.tuples(st.just("wait"), st.just(0), st.integers(0, 8 * SECOND)),
    st.tuples(st.just("skew"), st.integers(0, DAEMONS - 1), st.integers(-300, 300)),
    st.tuples(st.just("restart"), st.integers(0, DAEMONS - 1), st.none()),
    st.tuples(
        st.just("mishap"), st.integers(0, DAEMONS - 1), st.sampled_from(["lost", "done", "frozen"])
    ),
    st.tuples(st.just("thaw"), st.integers(0, DAEMONS - 1), st.none()),
)


def send(login: str, cost: int, instance: str) -> Charge:
    parts = (Debit(login, cost, SENDER), Debit(f"POOL @{login[-1]}", cost, DOMAIN))
    return Charge(instance, (*parts, Debit("POOL *", cost, SERVICE)))


@pytest.mark.slow
@pytest.mark.no_cover  # which takes as long again
@examples(300)
@given(st.lists(SHARED_STEPS, min_size=10, max_size=50))
def test_several_daemons_keep_every_window_and_charge_all_or_none(
    steps: list[tuple[str, int, object]],
) -> None:
    with tempfile.TemporaryDirectory(dir=fast_directory()) as directory:
        some = Fleet(Path(directory), DAEMONS)
        accepted: list[str] = []
        for what, daemon, value in steps:
            store = some.stores[daemon]
            if what == "send":
                assert isinstance(value, list)
                batch = [send(login, n, f"i{next(some.instances)}") for login, n in value]
                with suppress(StoreError):
                    pairs = zip(batch, some.ledgers[daemon].charge(batch, NEVER), strict=True)
                    accepted += [charge.instance for charge, v in pairs if v.accepted]
            elif what == "wait":
                assert isinstance(value, int)
                some.world.now += value
            elif what == "skew":
                assert isinstance(value, int)
                store.skew = value * SECOND
            elif what == "restart":
                some.ledgers[daemon] = some.ledger(store)
            elif what == "mishap":
                store.mishap = str(value)
            else:
                store.thaw()
        for store in some.stores:
            store.thaw()
        rows = some.rows()
        some.close()
    own = [row for row in rows if row.account in LOGINS]
    instances = [row.instance for row in own]
    assert all(instances.count(instance) == 1 for instance in accepted)
    for login in LOGINS:
        keeps(rows, [login], login, SENDER)
    keeps(rows, ["a@x", "b@x"], "POOL @x", DOMAIN)
    keeps(rows, ["c@y"], "POOL @y", DOMAIN)
    keeps(rows, LOGINS, "POOL *", SERVICE)


def keeps(
    rows: list[Entry],
    senders: list[str] | tuple[str, ...],
    account: str,
    windows: tuple[Window, ...],
) -> None:
    """No enforced window of the account holds too much, and it was charged with its senders."""
    mine = [row for row in rows if row.account == account]
    assert [row.seq for row in mine] == list(range(1, len(mine) + 1))
    for last in mine:
        for one in windows:
            start = last.at - one.period * SECOND
            within = sum(r.recipients for r in mine if r.at >= start and r.seq <= last.seq)
            assert within <= one.msgquota or not one.enforce
    by_batch = {row.token: 0 for row in mine}
    for row in rows:
        if row.account in senders:
            by_batch[row.token] += row.recipients
    charged = dict.fromkeys(by_batch, 0)
    for row in mine:
        charged[row.token] += row.recipients
    assert charged == by_batch
