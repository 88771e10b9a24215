"""Wall clocks that a test sets, and a load under them."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from servers.audit import SECOND, Entry, audit, entries
from servers.daemon import Daemon
from servers.load import OK, REFUSED, SLACK, Load
from servers.mariadb import Database, MariaDB
from servers.process import pause, wait_for


def libfaketime() -> Path | None:
    """The library that gives a process another wall clock; None when it is not installed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return found[0] if found else None


def faked_clock(offset: Path) -> dict[str, str]:
    """An environment with a wall clock that the file sets: `+120`, in seconds, at any time. The
    monotonic clock stays the real one."""
    return {
        "LD_PRELOAD": str(libfaketime()),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_CACHE_DURATION": "1",  # seconds until the file is read again
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",  # the older name
    }


def forget_clocks_of_the_dead() -> None:
    """Delete what libfaketime keeps in shared memory for processes that were killed: whoever gets
    the same number would find it."""
    for path in Path("/dev/shm").glob("*faketime_s*_*"):
        if not Path("/proc", path.name.rpartition("_")[2]).exists():
            path.unlink(missing_ok=True)


def set_clock(offset: Path, seconds: int) -> None:
    """Put a faked clock ahead, or back."""
    new = offset.with_suffix(".new")
    new.write_text(f"{seconds:+d}\n", "utf-8")
    new.chmod(0o644)
    new.replace(offset)


CLOCK_RULES: Mapping[str, object] = {
    "default": {"period": 2, "msgquota": 30, "msg": "over quota"},
}


def set_clock_under_load(offset: Path, load: Load, ledger: Database | Path) -> None:
    """Ahead by 4 s, back, back by 4 s more, and 5 minutes ahead: each time until it is at rest."""

    def is_ahead() -> bool:
        return max(row.at for row in entries(ledger)) > time.time_ns() // 1000 + 250 * SECOND

    load.wait(REFUSED, 10, 20)
    for seconds in (4, 0, -4, 300):
        set_clock(offset, seconds)
        pause(2.5)  # until the file and then the clock are read
        load.wait(OK, 2 + SLACK, 20)
        load.wait(REFUSED, 10, 20)
    wait_for(is_ahead, 10, "the clock is faked")


def audit_clocked(rows: Sequence[Entry], load: Load) -> None:
    """Never over quota by the ledger's own times; nobody locked out for longer than the quota's
    period."""
    audit(rows, load.accepted(), lambda _: (2, 30))
    load.assert_answered(SLACK)
    assert load.longest_wait() <= 2 + SLACK


class ClockedDaemon(Daemon):
    """A daemon whose wall clock the file `clock` sets."""

    def __init__(self, directory: Path, *arguments: Any, **options: Any) -> None:
        super().__init__(directory, *arguments, **options)
        self.clock = directory / "clock"
        set_clock(self.clock, 0)

    def environment(self) -> dict[str, str]:
        return super().environment() | faked_clock(self.clock)


class ClockedMariaDB(MariaDB):
    """A server whose wall clock the file `clock` sets."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.clock = directory / "clock"
        set_clock(self.clock, 0)

    def environment(self) -> dict[str, str]:
        return super().environment() | faked_clock(self.clock)
