"""A daemon that counts on in its spool, and what must be true after its outage."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress

from servers.audit import Entry, audit, entries
from servers.daemon import Daemon
from servers.load import NARROW, OK, QUOTA, REFUSED, SHORT, SLACK, Load
from servers.mariadb import Database
from servers.process import pause, wait_for, wait_for_log

DBTIMEOUT = 3  # seconds, the least with LOCAL
CONFIG: Mapping[str, object] = {
    "_onfailure": "LOCAL",
    "_dbtimeout": DBTIMEOUT,
    "_loglevel": "INFO",
}
AWAY = "database unavailable, sends are counted in "
BACK = r"database back: \d+ sends carried over"


def status(running: Daemon) -> dict[str, str]:
    with running.policy() as policy:
        return policy.status()


def is_up(running: Daemon) -> bool:
    """Whether it counts in the database, which has all that the spool had."""
    with suppress(OSError, AssertionError, ValueError):  # it may be ending
        found = status(running)
        return found["store"] == "up" and found["spooled_sends"] == "0"
    return False


def settle(*daemons: Daemon) -> None:
    for running in daemons:
        wait_for(lambda r=running: is_up(r), 30, "all is carried over")  # type: ignore[misc]


def sends(database: Database) -> list[Entry]:
    """All rows but those that a spool leaves in the table for itself."""
    return [row for row in entries(database) if not row.account.startswith("SPOOL")]


def reset_statement(account: str) -> str:
    """What begins an epoch of the account, as the manual says."""
    return (
        "INSERT INTO sends (account, seq, epoch, at, recipients, total, instance, token)"
        " SELECT account, seq + 1, epoch + 1, GREATEST(at, UTC_TIMESTAMP(6)), 0, 0, 'reset', 0"
        f" FROM sends WHERE account = '{account}' ORDER BY seq DESC LIMIT 1"
    )


def twice(account: str) -> tuple[int, int]:
    """What may be in a window: a quota, and a further one of the daemon's in the outage."""
    period, quota = (SHORT, QUOTA) if account in NARROW else (3600, 1_000_000)
    return period, 2 * quota


def audit_spooled(
    database: Database,
    load: Load,
    daemons: Sequence[Daemon],
    limits: Callable[[str], tuple[int, int]] = twice,
) -> None:
    """One row for each accepted reply; nobody was deferred, or waited longer than _dbtimeout."""
    settle(*daemons)
    audit(sends(database), load.accepted(), limits)
    assert {sample.reply for sample in load.samples} <= {OK, REFUSED, None}
    slowest = max(load.samples, key=lambda sample: sample.took)
    assert slowest.took <= DBTIMEOUT + SLACK, slowest


def outlive(
    counting: Daemon, load: Load, trouble: AbstractContextManager[object], seconds: float
) -> None:
    load.wait(OK, 10, 100)
    with trouble:
        wait_for_log(counting, AWAY)
        load.wait(OK, DBTIMEOUT + SLACK, 50)
        pause(seconds)
        load.wait(OK, SLACK, 20)
    wait_for_log(counting, BACK)
