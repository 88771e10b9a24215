"""Incidents: what is refused is noted in the table `events`, to be told to the administrator."""

import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import StartDaemon, mysql_config
from servers.daemon import Daemon
from servers.mariadb import Database, session
from servers.process import wait_for, wait_for_log

from saslquota import (
    Events,
    Incidents,
    MySQLStore,
    Refused,
    Request,
    SQLiteStore,
    Verdict,
    Window,
    lasting_incident,
)

BOB = "bob@example.com"
RULES = {
    "default": {"period": "1h", "msgquota": 2, "msg": "enough"},
    "none.example": {"msgquota": 0},
    "trial.example": {"enforce": False},
    "told.example": [{"period": "1h", "msgquota": 2, "enforce": False, "notify": True}],
    "quiet.example": {"period": "1h", "msgquota": 1, "notify": False},
    "held.example": {"action": "HOLD"},
}
SECOND, DAY = 1_000_000, 86_400_000_000
REFUSED = Verdict(False, 3, Window(3600, 2, rule="default"), True)
ASKED = Request("RCPT", BOB, "a@x, y", "b@y", 0, "192.0.2.7", "1.2", 100)


def events(running: Daemon) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(running.directory / "saslquota.db")) as connection:
        columns = "account, number, kind, amount, note"
        return connection.execute(f"SELECT {columns} FROM events ORDER BY account").fetchall()


def test_the_first_refusal_is_noted_and_logged_once(daemon: StartDaemon) -> None:
    running = daemon(rules=RULES)
    with running.policy() as policy:
        answers = [policy.ask(sasl_username=BOB, client_address="192.0.2.7") for _ in range(12)]
    assert answers.count("REJECT enough") == 10
    line = (
        "rule=default, quota 2/2 (100.00%), period=3600, client_address=192.0.2.7,"
        " sender=root@localhost"
    )
    (logged,) = wait_for_log(running, "incident: ")
    assert logged.endswith(f"incident: account={BOB}, {line}")
    assert events(running) == [(BOB, 1, "refused", 10, line)]


@pytest.mark.parametrize(
    ("domain", "is_told"),
    [
        ("x.example", True),
        ("none.example", False),
        ("trial.example", False),
        ("told.example", True),
        ("quiet.example", False),
        ("held.example", True),
    ],
)
def test_of_what_the_administrator_is_told(daemon: StartDaemon, domain: str, is_told: bool) -> None:
    running = daemon(rules=RULES)
    with running.policy() as policy:
        for login in (f"bob@{domain}", "last@z.example"):
            for _ in range(4):
                policy.ask(sasl_username=login)
    wait_for_log(running, "incident: account=last@z.example")
    assert (f"incident: account=bob@{domain}" in running.log()) is is_told


def test_what_a_pool_refuses_is_the_pools(daemon: StartDaemon) -> None:
    running = daemon(rules={"default": {"period": 60, "msgquota": 9}, "*": {"msgquota": 1}})
    with running.policy() as policy:
        for login in ("a@x", "b@x", "c@x"):
            policy.ask(sasl_username=login)
    wait_for_log(running, re.escape("incident: account=POOL *, rule=*, quota 1/1 (100.00%)"))
    assert [event[:4] for event in events(running)] == [("POOL *", 1, "refused", 2)]


def test_a_hostile_login_stays_in_its_field(daemon: StartDaemon) -> None:
    running = daemon(rules={"default": {"period": 60, "msgquota": 1}})
    with running.policy() as policy:
        for _ in range(2):
            policy.ask(sasl_username="x, rule=y@z", sender="\x1b[2J\udcff, quota 0")
    (logged,) = wait_for_log(running, "incident: ")
    assert r"account=x,\x20rule=y@z, rule=default" in logged
    assert r"sender=?[2J?,\x20quota 0" in logged


def test_without_the_table_refusing_goes_on(daemon: StartDaemon) -> None:
    running = daemon(rules=RULES)
    with running.policy() as policy:
        policy.ask(sasl_username=BOB)
        with closing(sqlite3.connect(running.directory / "saslquota.db")) as connection:
            connection.execute("ALTER TABLE events RENAME TO hidden")
        answers = [policy.ask(sasl_username=BOB) for _ in range(3)]
        assert answers == ["OK", "REJECT enough", "REJECT enough"]
        wait_for_log(running, r"incidents \(table events\) cannot be noted: no such table")
        assert policy.ask(sasl_username="c@x") == "OK"
        assert policy.status()["store"] == "up"
        with closing(sqlite3.connect(running.directory / "saslquota.db")) as connection:
            connection.execute("ALTER TABLE hidden RENAME TO events")
        wait_for_log(running, "incident: ")
    assert events(running)[0][:4] == (BOB, 1, "refused", 2)


def test_two_daemons_note_one_incident(daemon: StartDaemon, database: Database) -> None:
    rules = {"default": {"period": "1h", "msgquota": 5, "msg": "enough"}}
    pair = [daemon(database.config(), rules) for _ in range(2)]

    def storm(running: Daemon) -> int:
        with running.policy() as policy:
            asked = [policy.ask(sasl_username=f"{n % 3}@x") for n in range(60)]
        return asked.count("REJECT enough")

    with ThreadPoolExecutor(2) as pool:
        refused = sum(pool.map(storm, pair))
    assert refused == 120 - 15
    query = "SELECT account, number, kind FROM events ORDER BY account, number"

    def noted() -> bool:
        return all(f"account={n}@x" in pair[0].log() + pair[1].log() for n in range(3))

    wait_for(noted, 10, "three incidents")
    rows = [tuple(row.split("\t")) for row in database.sql(query).splitlines()]
    assert rows == [(f"{n}@x", "1", "refused") for n in range(3)]
    both = pair[0].log() + pair[1].log()
    assert both.count("incident: ") == 3


def test_a_locked_table_of_events_holds_up_nobody(daemon: StartDaemon, database: Database) -> None:
    rules = {"default": {"period": "1h", "msgquota": 1, "msg": "enough"}}
    running = daemon(database.config(), rules)
    with running.policy() as policy:
        assert policy.ask(sasl_username=BOB) == "OK"
        with session(database.server, database.name) as other:
            other.execute("LOCK TABLES events WRITE")
            assert policy.ask(sasl_username=BOB) == "REJECT enough"
            wait_for_log(running, "cannot be (noted|read)")
            began = time.monotonic()
            assert [policy.ask(sasl_username=f"{n}@x") for n in range(20)] == ["OK"] * 20
            assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("events", "number"),
    [
        ([], 0),
        ([(1, "refused", DAY)], 1),
        ([(1, "refused", 1)], 0),
        ([(1, "refused", DAY), (2, "reset", DAY)], 0),
        ([(1, "refused", DAY), (2, "grant", DAY)], 0),
        ([(1, "refused", DAY), (2, "block", DAY), (3, "unblock", DAY)], 0),
        ([(1, "refused", DAY), (2, "block", DAY)], 1),
        ([(3, "refused", DAY), (2, "reset", DAY), (1, "refused", DAY)], 3),
    ],
)
def test_which_incident_goes_on(events: list[tuple[int, str, int]], number: int) -> None:
    assert lasting_incident(events, DAY + SECOND) == number


@pytest.fixture(params=["sqlite", "mysql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "sqlite":
        found: Any = SQLiteStore(tmp_path / "ledger.db", 1)
    else:
        found = MySQLStore(mysql_config(request.getfixturevalue("database")))
    found.open()
    yield found
    found.close()


def test_it_is_counted_up_until_a_day_has_passed(store: Any) -> None:
    began = 1_700_000_000 * SECOND

    def note(now: int, **refused: int) -> set[str]:
        found = [Refused(account, number, "why") for account, number in refused.items()]
        return Events(store).note_refusals(found, now, "mail1")

    assert note(began, a=1, b=2) == {"a", "b"}
    assert note(began + 60 * SECOND, a=5, c=7) == {"c"}
    assert note(began + 120 * SECOND, a=10, b=20, c=30) == set()
    assert note(began + DAY, a=100) == {"a"}
    rows = store.run(
        f"SELECT account, number, amount, {store.TIME.format('last')}, author, note FROM events"
        " ORDER BY account, number"
    )
    assert [tuple(row) for row in rows] == [
        ("a", 1, 16, began + 120 * SECOND, "mail1", "why"),
        ("a", 2, 100, began + DAY, "mail1", "why"),
        ("b", 1, 22, began + 120 * SECOND, "mail1", "why"),
        ("c", 1, 37, began + 120 * SECOND, "mail1", "why"),
    ]


def test_many_threads_count_without_losing_any() -> None:
    incidents = Incidents()

    def count(_: int) -> None:
        for _ in range(2000):
            incidents.count(BOB, ASKED, REFUSED)

    with ThreadPoolExecutor(8) as pool:
        done = pool.map(count, range(8))
        noted = 0
        for _ in range(20):
            found = incidents.due(100.0)
            noted += sum(one.number for one in found)
            incidents.have_noted(found, 0.0)
        list(done)
    last = incidents.due(1e9)
    assert noted + sum(one.number for one in last) == 16_000


def test_an_account_is_noted_once_a_minute_and_then_forgotten() -> None:
    incidents = Incidents()
    incidents.count(BOB, ASKED, REFUSED)
    (first,) = incidents.due(0.0)
    assert first == Refused(
        BOB,
        1,
        "rule=default, quota 3/2 (150.00%), period=3600, client_address=192.0.2.7,"
        " sender=a@x,\\x20y",
    )
    incidents.have_noted([first], 0.0)
    incidents.count(BOB, ASKED, REFUSED)
    assert incidents.due(59.9) == []
    assert [one.number for one in incidents.due(60.0)] == [1]
    incidents.have_noted(incidents.due(60.0), 60.0)
    assert incidents.due(121.0) == []
    assert incidents._tallies == {}


def test_what_could_not_be_noted_is_noted_later() -> None:
    incidents = Incidents()
    for _ in range(3):
        incidents.count(BOB, ASKED, REFUSED)
        found = incidents.due(0.0)
    assert [one.number for one in found] == [3]
