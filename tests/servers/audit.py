"""What must be true of the ledger after a load."""

import itertools
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from saslquota import MySQLStore
from servers.load import LATEST, Load, Sample, limit
from servers.mariadb import Database

SECOND = 1_000_000  # microseconds, as in the ledger


class Entry(NamedTuple):
    """A row of the ledger; at in microseconds since 1970."""

    account: str
    seq: int
    at: int
    recipients: int
    total: int
    instance: str


def entries(ledger: Database | Path) -> list[Entry]:
    """All rows of a ledger in MariaDB, or in an SQLite file, in their order."""
    at = "at" if isinstance(ledger, Path) else MySQLStore.SELECT_AT
    select = f"SELECT account, seq, {at}, recipients, total, instance FROM sends ORDER BY 1, 2"
    if isinstance(ledger, Path):
        with closing(sqlite3.connect(ledger, timeout=10)) as connection:
            return [Entry(*row) for row in connection.execute(select)]
    found = (line.split("\t") for line in ledger.sql(select).splitlines())
    return [Entry(a, int(seq), int(at), int(n), int(total), i) for a, seq, at, n, total, i in found]


def count_rows(ledger: Database | Path, account: str = "") -> int:
    """How many sends are in a ledger, of all accounts or of one."""
    return sum(account in ("", row.account) for row in entries(ledger))


def audit(
    rows: Sequence[Entry],
    accepted: Sequence[Sample],
    limits: Callable[[str], tuple[int, int]] = limit,
) -> None:
    """Every accepted request has exactly one row, the chains are unbroken, nobody is over quota."""
    assert_one_row_each(rows, accepted)
    for account, group in itertools.groupby(rows, lambda row: row.account):
        chain = list(group)
        assert [row.seq for row in chain] == list(range(1, len(chain) + 1)), account
        assert [row.total for row in chain] == list(
            itertools.accumulate(row.recipients for row in chain)
        ), account
        assert all(a.at <= b.at for a, b in itertools.pairwise(chain)), f"{account}: time fell"
        assert_never_over_quota(chain, *limits(account))


def assert_one_row_each(rows: Sequence[Entry], accepted: Sequence[Sample]) -> None:
    times = Counter(row.instance for row in rows)
    twice = [i for i, n in times.items() if n > 1]
    assert twice == [], f"two rows for one request: {twice}"
    lost = [s for s in accepted if s.instance not in times]
    assert lost == [], f"accepted, and not in the ledger: {lost}"


def audit_epochs(database: Database) -> None:
    """The chains are unbroken, and each epoch's totals are the sums of its sends."""
    broken = database.sql(
        "SELECT a.account, a.seq FROM sends AS a LEFT JOIN sends AS b"
        " ON b.account = a.account AND b.seq = a.seq - 1 WHERE a.account NOT LIKE 'SPOOL%'"
        " AND NOT (a.seq = 1 AND a.total = a.recipients) AND (b.seq IS NULL OR a.at < b.at"
        " OR IF(a.recipients = 0, a.epoch != b.epoch + 1 OR a.total,"
        " a.epoch != b.epoch OR a.total != b.total + a.recipients))"
    )
    assert broken == "", broken


def assert_never_over_quota(chain: Sequence[Entry], period: int, quota: int) -> None:
    """Look at the window that ends with each row."""
    first = used = 0
    for row in chain:
        used += row.recipients
        while chain[first].at < row.at - period * SECOND:
            used -= chain[first].recipients
            first += 1
        assert used <= quota, f"{used} of {quota} in {period} s until {row}"


def audit_all(ledger: Database | Path, load: Load) -> None:
    """The ledger holds what was accepted, and nobody waited too long."""
    load.assert_answered(LATEST)
    audit(entries(ledger), load.accepted())
