"""The daemon is killed under a real Postfix, which delivers on; what was counted stays counted."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from smtplib import SMTP
from typing import NamedTuple

import pytest
from helpers import StartDaemon, StartPostfix, in_background
from servers.audit import Entry, audit, entries
from servers.daemon import Daemon
from servers.mariadb import Database
from servers.postfix import ALICE, Postfix, is_accepted, send
from servers.process import ROOT, wait_for

pytestmark = pytest.mark.slow

BOB = "bob@example.com"
RULES = {
    "default": {"period": 3600, "msgquota": 1_000_000, "msg": "over quota"},
    BOB: {"period": 3600, "msgquota": 2, "msg": "over quota"},
}


def service(port: int) -> str:
    """What README.md writes into main.cf for when the daemon is down."""
    readme = (ROOT / "README.md").read_text("utf-8")
    found = re.search(r"postconf -e 'saslquota = (.*default_action=.*)'", readme)
    assert found
    return found[1].replace(":10008", f":{port}")


class Ledger(NamedTuple):
    """Where sends are counted, once in each store."""

    database: Database | None
    config: Mapping[str, object]

    def rows(self, counting: Daemon) -> list[Entry]:
        return entries(self.database or counting.directory / "saslquota.db")


@pytest.fixture(params=["sqlite", "mysql"])
def ledger(request: pytest.FixtureRequest) -> Ledger:
    if request.param == "sqlite":
        return Ledger(None, {})
    database: Database = request.getfixturevalue("database")
    return Ledger(database, database.config())


@contextmanager
def submitting(instance: Postfix, clients: int = 4) -> Iterator[list[str]]:
    """Mail programs that submit one message after another, each of which Postfix must take; the
    recipients, one for each message."""
    taken: list[str] = []

    def submit(session: SMTP, client: int) -> None:
        recipient = f"{time.monotonic_ns()}.{client}@example.net"
        send(session, [recipient])
        taken.append(recipient)

    with ExitStack() as stack:
        for client in range(clients):
            session = stack.enter_context(instance.login(ALICE))
            work = partial(submit, session, client)
            stack.enter_context(in_background(work))
        yield taken


def wait_for_more(things: Callable[[], int], number: int, what: str) -> None:
    before = things()
    wait_for(lambda: things() >= before + number, 20, what)


def test_the_daemon_is_killed(ledger: Ledger, daemon: StartDaemon, postfix: StartPostfix) -> None:
    counting = daemon({**ledger.config, "_loglevel": "INFO"}, RULES)
    instance = postfix(service(counting.port), users=(ALICE, BOB))
    with instance.login(BOB) as session:
        send(session)
    taken: set[str] = set()
    for _ in range(3):
        taken |= kill_and_restart(counting, ledger, instance)
    with instance.login(BOB) as session:
        assert is_accepted(session)
        assert not is_accepted(session)

    def undelivered() -> set[str]:
        return taken - set(re.findall(r" to=<(.+?)>,.* status=sent", instance.log()))

    wait_for(lambda: not undelivered(), 20, "all are delivered")
    rows = ledger.rows(counting)
    audit(rows, [], lambda account: (3600, 2 if account == BOB else 1_000_000))
    told = set(re.findall(r"action=ACCEPT.*, instance=(\S+)", counting.log()))
    assert told <= {row.instance for row in rows}


def kill_and_restart(counting: Daemon, ledger: Ledger, instance: Postfix) -> set[str]:
    """The daemon, while mail is submitted; returns the recipients of what Postfix took."""
    before = len(ledger.rows(counting))
    with submitting(instance) as taken:
        wait_for_more(lambda: len(taken), 50, "mail is taken")
        accepted = len(taken)
        counting.kill9()
        assert len(ledger.rows(counting)) >= before + accepted
        wait_for_more(lambda: len(taken), 8, "mail is taken without the daemon")
        counting.start()
        wait_for_more(lambda: len(ledger.rows(counting)), 50, "mail is counted again")
    return set(taken)
