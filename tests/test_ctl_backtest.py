"""backtest and recommend: what rules would have done with the sends that are recorded."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from ctl import spool_entries
from fleet import NEVER, START, Fleet, fast_directory
from helpers import DAY, examples, mysql_config
from hypothesis import given
from hypothesis import strategies as st
from servers.audit import SECOND

import saslquota
import saslquotabacktest
import saslquotactl
from saslquota import (
    Charge,
    Config,
    Debit,
    Entry,
    Message,
    MySQLStore,
    Policy,
    Request,
    Rule,
    Rules,
    SQLiteStore,
    Store,
    Window,
)

HOUR = 3600 * SECOND  # microseconds
NO_LIMIT = (Window(DAY, math.inf),)


# --- Against the ledger ---------------------------------------------------------------------------


class Step(NamedTuple):
    """Requests of one message, each about so many recipients; or a reset, with none."""

    account: str
    recipients: int
    waits: list[int]  # before each request, in microseconds


WAIT = st.one_of(
    st.integers(1, 8 * SECOND),
    st.sampled_from([1, 1, SECOND, 5 * SECOND, 5 * SECOND + 1, 20 * SECOND, 20 * SECOND + 1]),
)
MESSAGES = st.builds(
    Step,
    st.sampled_from(["a@x", "b@x", "c@y"]),
    st.integers(1, 4),
    st.lists(WAIT, min_size=1, max_size=3),
)
RESETS = st.builds(
    Step, st.sampled_from(["a@x", "c@y", "POOL @x", "POOL *"]), st.just(0), WAIT.map(lambda n: [n])
)
HISTORIES = st.lists(st.one_of(*[MESSAGES] * 6, RESETS), min_size=5, max_size=60)


@st.composite
def some_rules(draw: st.DrawFn) -> Rules:
    """Perhaps with pools; all count recipients, or all count messages."""
    count = draw(st.sampled_from(["recipients", "messages"]))
    rules = []
    for key in ["default", *draw(st.lists(st.sampled_from(["b@x", "y", "@x", "*"]), unique=True))]:
        shapes = st.tuples(
            st.sampled_from([5, 5, 20, 60]),
            st.sampled_from([0, 1, 2, 3, 5, 8, 13, math.inf]),
            st.sampled_from([True, True, True, False]),
        )
        rules.append(
            Rule(
                key,
                tuple(
                    Window(period, quota, key, enforce=enforce, count=count)
                    for period, quota, enforce in draw(st.lists(shapes, min_size=1, max_size=3))
                ),
            )
        )
    return Rules(rules)


def record(fleet: Fleet, steps: Sequence[Step]) -> list[tuple[int, str, int, str]]:
    """Let the ledger accept all; return when it was, the account, the recipients, the instance."""
    history = []
    for number, step in enumerate(steps):
        for wait in step.waits:
            fleet.world.now += wait
            at, instance = fleet.world.now, f"i{number}"
            if step.recipients:
                accounts = step.account, f"POOL @{step.account[-1]}", "POOL *"
                debits = tuple(Debit(name, step.recipients, NO_LIMIT) for name in accounts)
                charge(fleet, Charge(instance, debits))
            else:
                reset(fleet, step.account)
            history.append((at, step.account, step.recipients, instance))
    return history


def charge(fleet: Fleet, wanted: Charge) -> saslquota.Verdict:
    fleet.ledgers[0]._accounts._clock.distrust()  # each send at its very time
    (verdict,) = fleet.ledgers[0].charge([wanted], NEVER)
    return verdict


def reset(fleet: Fleet, account: str) -> None:
    fleet.stores[0].reset(account)
    fleet.ledgers[0] = fleet.ledger(fleet.stores[0])  # which knows of it at once


Outcome = dict[str, tuple[int, int]]  # of each refused login the recipients, and when it began


def decide(fleet: Fleet, rules: Rules, history: Sequence[tuple[int, str, int, str]]) -> Outcome:
    """What the daemon would have done: each message comes over its own connection."""
    rules_file: Any = SimpleNamespace(rules=rules)
    policy = Policy(Config(Path("x")), rules_file)
    messages: dict[str, Message] = {}
    refused: Counter[str] = Counter()
    first: dict[str, int] = {}
    for at, login, recipients, instance in history:
        fleet.world.now = at
        if not recipients:
            reset(fleet, login)
            continue
        message = messages.setdefault(instance, Message())
        request = Request("DATA", login, login, "", recipients, "", instance, 0)
        wanted = policy.charge(request, message)
        if isinstance(wanted, Charge):
            wanted = policy.answer(request, charge(fleet, wanted), message)
        message.remember(wanted)
        if wanted.action != "OK":
            refused[login] += recipients
            first.setdefault(login, START + at)
    return {login: (number, first[login]) for login, number in refused.items()}


def replayed(store: Store, rules: Rules) -> Outcome:
    rows = saslquotabacktest.recorded(store, rules, 0, "")
    accounts = saslquotabacktest.replay(rules, rows)
    return {name: (a.refused, a.first) for name, a in accounts.items() if a.refused}


@pytest.mark.slow
@pytest.mark.no_cover
@examples(80)
@given(steps=HISTORIES, rules=some_rules())
def test_backtest_refuses_what_the_ledger_would_have_refused(
    steps: list[Step], rules: Rules
) -> None:
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(tempfile.TemporaryDirectory(dir=fast_directory())) for _ in range(2)
        )
        recorded, tested = Fleet(Path(first)), Fleet(Path(second))
        stack.callback(recorded.close)
        stack.callback(tested.close)
        history = record(recorded, steps)
        assert replayed(recorded.stores[0], rules) == decide(tested, rules, history)


@pytest.mark.slow
@pytest.mark.no_cover
@examples(40)
@given(steps=HISTORIES, period=st.sampled_from([5, 20]), n=st.sampled_from([0, 1, 3]))
def test_the_recommended_limit_refuses_as_many_logins_as_it_says(
    steps: list[Step], period: int, n: int
) -> None:
    def refuses(limit: float) -> int:
        rules = Rules([Rule("default", (Window(period, limit, "default"),))])
        return len(replayed(fleet.stores[0], rules))

    with tempfile.TemporaryDirectory(dir=fast_directory()) as directory:
        fleet = Fleet(Path(directory))
        record(fleet, steps)
        rules = Rules([Rule("default", (Window(period, 1, "default"),))])
        rows = saslquotabacktest.recorded(fleet.stores[0], rules, 0, "")
        accounts = saslquotabacktest.replay(rules, rows, measure=True)
        (found,) = saslquotabacktest.recommend(rules, accounts.values())
        limit = found[f"refuse_{n}"]
        if limit is None:
            assert found["logins"] <= n
        else:
            assert refuses(limit) <= n < refuses(limit - 1)
        fleet.close()


# --- On both stores -------------------------------------------------------------------------------


class Site(NamedTuple):
    """A store, and the directory of the daemon's configuration."""

    store: Store
    directory: Path

    def add(
        self, account: str, *sends: tuple[float, int], instance: str = "", epoch: int = 1
    ) -> None:
        """Record sends: how many hours ago, and how many recipients."""
        now, total = self.store.now(), 0
        rows = self.store.run("SELECT MAX(seq) FROM sends WHERE account = ?", (account,))
        seq = rows[0][0] or 0
        for hours, recipients in sends:
            seq, total = seq + 1, total + recipients
            at = now - round(hours * HOUR)
            self.store.append([Entry(account, seq, epoch, at, recipients, total, instance, 7)])

    def rules(self, rules: dict[str, Any], name: str = "quotarules.json") -> Path:
        path = self.directory / name
        path.write_text(json.dumps(rules), "utf-8")
        return path


@pytest.fixture(params=["sqlite", "mariadb"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    settings: dict[str, object] = {"_store": "sqlite", "_defaultdomain": "example.com"}
    store: Store = SQLiteStore(tmp_path / "saslquota.db", 5)
    if request.param == "mariadb":
        database = request.getfixturevalue("database")
        settings |= database.config()
        store = MySQLStore(mysql_config(database))
    (tmp_path / "saslquota.json").write_text(json.dumps(settings))
    store.open()
    found = Site(store, tmp_path)
    found.rules({"default": {"period": "1h", "msgquota": 100}})
    yield found
    store.close()


@pytest.fixture
def ctl(site: Site, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command: ctl(*arguments) gives the exit status and the lines of stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
        config = str(site.directory / "saslquota.json")
        status = saslquotactl.main(["-c", config, *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


def refused(found: tuple[int, list[str], list[str]]) -> list[tuple[str, int, str]]:
    """Of backtest's JSON who was refused, how many recipients, and by what."""
    rows = map(json.loads, found[1])
    return [(row["login"], row["refused"], row["limit"]) for row in rows]


def test_backtest_names_who_would_have_been_refused(site: Site, ctl: Any) -> None:
    site.add("bob@example.com", (30, 3), (29.5, 4), (2, 5))
    site.add("news@example.net", (5, 20), (4.9, 5), (3, 9))
    site.add("quiet@example.net", (5, 1))
    status, (summary, heading, *rows, last), errors = ctl("backtest", "--limit", "6/1h")
    assert (status, errors) == (0, [])
    assert summary == "7 sends of 3 senders in the last 30d: 2 senders would have been refused"
    assert heading.split() == ["REFUSED", "SENT", "LIMIT", "FIRST", "LOGIN"]
    assert [(row.split()[:5], row.split()[-1]) for row in rows] == [
        (["29", "34", "6", "in", "1h"], "news@example.net"),
        (["4", "12", "6", "in", "1h"], "bob@example.com"),
    ]
    assert last.startswith("Not recorded: what was refused")


def test_backtest_in_json_says_when_it_began(site: Site, ctl: Any) -> None:
    site.add("bob@example.com", (30, 3), (29.5, 4), (2, 5))
    at = site.store.run(f"SELECT {site.store.SELECT_AT} FROM sends WHERE seq = 2")[0][0]
    _, lines, _ = ctl("--json", "backtest", "--limit", "6/1h")
    assert [json.loads(line) for line in lines] == [
        {
            "refused": 4,
            "sent": 12,
            "limit": "6 in 1h",
            "first": saslquotactl.json_time(at),
            "login": "bob@example.com",
        }
    ]


def test_backtest_knows_the_rules_in_force_and_those_of_a_file(site: Site, ctl: Any) -> None:
    site.add("bob@example.com", (2, 60), (2, 60))
    site.add("ann@example.com", (2, 30))
    site.add("eve@example.net", (2, 30))
    other = site.rules(
        {
            "default": [{"period": "1h", "msgquota": 100}, {"period": "1d", "msgquota": 20}],
            "bob@example.com": {"period": "1h", "msgquota": "unlimited"},
            "example.net": {"period": "2h", "msgquota": 29, "count": "messages"},
            "ann@example.com": {"period": "1m", "msgquota": 0, "enforce": False},
            "eve@example.net": {"period": "5m", "msgquota": 9},
        },
        "other.json",
    )
    assert refused(ctl("--json", "backtest")) == [("bob@example.com", 60, "100 in 1h")]
    assert refused(ctl("--json", "backtest", "--rules", other)) == [
        ("eve@example.net", 30, "9 in 5m, rule eve@example.net")
    ]


def test_pools_count_all_their_senders_and_their_resets(site: Site, ctl: Any) -> None:
    rules = {
        "default": {"period": "1d", "msgquota": 1000},
        "@example.com": {"period": "1d", "msgquota": 10},
        "*": {"period": "1d", "msgquota": 14},
    }
    site.rules(rules)
    site.add("a@example.com", (5, 6), (3, 6))
    site.add("b@example.com", (4, 6))
    site.add("c@example.net", (4.5, 5), (2, 5))
    assert refused(ctl("--json", "backtest")) == [
        ("a@example.com", 6, "10 in 1d, rule @example.com"),
        ("b@example.com", 6, "10 in 1d, rule @example.com"),
        ("c@example.net", 5, "14 in 1d, rule *"),
    ]
    alone = ctl("--json", "backtest", "--login", "b@example.com")
    assert refused(alone) == [("b@example.com", 6, "10 in 1d, rule @example.com")]
    site.add("POOL @example.com", (20, 1))
    site.add("POOL @example.com", (3.5, 0), epoch=2)
    site.add("POOL *", (3.5, 4), epoch=2)  # as after a grant
    assert refused(ctl("--json", "backtest")) == [
        ("b@example.com", 6, "10 in 1d, rule @example.com")
    ]


def test_a_message_is_charged_once_to_whom_counts_messages(site: Site, ctl: Any) -> None:
    site.rules(
        {
            "default": {"period": "1h", "msgquota": 2, "count": "messages"},
            "*": {"period": "1h", "msgquota": 7, "count": "recipients"},
        }
    )
    for number, login in enumerate(["a@example.com", "b@example.com"]):
        for message in ("m1", "m2", "m3"):
            hours = 20 - 5 * number - int(message[1]) / 10
            site.add(login, (hours, 1), (hours - 0.01, 1), instance=message)
    site.add("c@example.com", (2, 1), (2, 1), (2, 1))  # of which it is not known
    assert refused(ctl("--json", "backtest")) == [
        ("a@example.com", 2, "2 messages in 1h"),
        ("b@example.com", 2, "2 messages in 1h"),
        ("c@example.com", 1, "2 messages in 1h"),
    ]


def test_a_spool_is_no_sender(site: Site, ctl: Any) -> None:
    site.add("a@x", (0.2, 3))
    site.store.append(spool_entries(site.store.now()))
    assert refused(ctl("--json", "backtest", "--limit", "2/1h")) == [("a@x", 3, "2 in 1h")]
    assert ctl("backtest")[1][0].startswith("1 send of 1 sender ")
    _, (line,), _ = ctl("--json", "recommend")
    assert (json.loads(line)["logins"], json.loads(line)["highest"]) == (1, 3)


def test_a_reset_begins_anew(site: Site, ctl: Any) -> None:
    site.add("bob@example.com", (2, 60), (1.9, 40))
    site.add("bob@example.com", (1.8, 0), epoch=2)
    site.add("bob@example.com", (1.7, 60), epoch=2)
    site.add("ann@example.com", (1.8, 100))
    site.add("ann@example.com", (1.7, 100), epoch=2)  # the end of a grant
    assert ctl("backtest")[1][0].endswith(": 0 senders would have been refused")


def test_what_is_held_and_not_refused_is_no_refusal() -> None:
    window = Window(3600, 1, "default", action="HOLD")
    accounts = saslquotabacktest.replay(
        Rules([Rule("default", (window,))]), [("a", 1, 1, 9, 5, ""), ("a", 2, 1, 9, 5, "")]
    )
    assert (accounts["a"].refused, accounts["a"].sent) == (0, 10)


def test_only_the_period_and_the_login_that_are_asked_for(site: Site, ctl: Any) -> None:
    site.add("bob@example.com", (30, 9), (2, 9))
    site.add("ann@example.com", (2, 9))
    assert ctl("backtest", "--limit", "1/1m", "-p", "1d")[1][0].startswith("2 sends of 2 senders")
    summary, _, row, _ = ctl("backtest", "--limit", "1/1m", "--login", "BOB")[1]
    assert summary.startswith("2 sends of 1 sender in the last 30d: 1 sender would")
    assert row.split()[:2] == ["18", "18"]
    assert ctl("backtest", "-p", "1m")[0] == 1, "there is nothing"


@pytest.mark.parametrize("login", ["", "c@x"])
def test_a_table_is_read_in_slices(site: Site, monkeypatch: pytest.MonkeyPatch, login: str) -> None:
    monkeypatch.setattr(saslquotabacktest, "SLICE", 3)
    expected = []
    for name, number in {"a@x": 3, "b@x": 1, "c@x": 7, "POOL *": 4, "d@x": 2, "e@x": 3}.items():
        site.add(name, *[(2, 1)] * number)
        expected += [(name, seq) for seq in range(1, number + 1)]
    rules = Rules([Rule("default", (Window(3600, 1, "default"),))])
    slices = list(saslquotabacktest.read_sends(site.store, rules, 0, login))
    assert [row[:2] for rows in slices for row in rows] == sorted(
        row for row in expected if row[0] != "POOL *" and login in ("", row[0])
    )
    assert max(map(len, slices)) <= 5


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--limit", "many/1h"], "--limit many/1h: must be a whole number from 0 to"),
        (["--limit", "200"], "--limit 200: must be seconds from 1 to"),
        (["-p", "soon"], "-p soon: must be seconds from 1 to"),
        (["--rules", "/nowhere.json"], "/nowhere.json: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_one_line(ctl: Any, arguments: list[str], complaint: str) -> None:
    status, lines, (error,) = ctl("backtest", *arguments)
    assert (status, lines) == (2, [])
    assert error.startswith(f"saslquotactl: {complaint}")


def test_recommend_ranks_what_logins_used_at_most(site: Site, ctl: Any) -> None:
    site.rules(
        {
            "default": [{"period": "1h", "msgquota": 9}, {"period": "1d", "msgquota": "unlimited"}],
            "b.example": {"period": "1h", "msgquota": 5},
            "@a.example": {"period": "1h", "msgquota": 5, "enforce": False},
        }
    )
    for number in range(1, 6):
        site.add(f"u{number}@a.example", (9 + 2 * number, 10 * number), (2, 5), (1.5, number))
    status, (summary, heading, *rows), _ = ctl("recommend")
    assert status == 0
    assert summary == "15 sends of 5 senders in the last 30d"
    names = "RULE PERIOD LIMIT LOGINS 50% 99% HIGHEST REFUSE 0 REFUSE 1 REFUSE 3 REFUSE 10"
    assert heading.split() == names.split()
    assert [" ".join(row.split()) for row in rows] == [
        "default 1h 9 5 30 50 50 50 40 20",
        "default 1d 5 38 60 60 60 49 27",
        "b.example 1h 5 0",
        "@a.example 1h 5 1 50 50 50 50",
    ]
    in_json = [json.loads(line) for line in ctl("--json", "recommend")[1]]
    known = {"rule": "default", "period": DAY, "limit": None, "logins": 5, "p50": 38, "p99": 60}
    limits = {"refuse_0": 60, "refuse_1": 49, "refuse_3": 27, "refuse_10": None}
    assert in_json[1] == {**known, "highest": 60, **limits}
