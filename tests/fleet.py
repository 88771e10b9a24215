"""Ledgers on one SQLite file, whose clocks and whose luck are the test's."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from helpers import DAY, lone_charge
from servers.audit import SECOND

import saslquota
from saslquota import Conflict, Entry, Ledger, SQLiteStore, Unavailable, Window

START = 1_700_000_000 * SECOND
NEVER = float("inf")
DAEMONS = 3

RESET = """
    INSERT INTO sends (account, seq, epoch, at, recipients, total, instance, token)
    SELECT account, seq + 1, epoch + 1, ?, 0, 0, 'reset', 0 FROM sends
    WHERE account = ? ORDER BY seq DESC LIMIT 1
"""


class World:
    """Real time, which all daemons' monotonic clocks follow but for when the machine sleeps."""

    def __init__(self) -> None:
        self.now = 0
        self.slept = 0

    def monotonic(self) -> float:
        return (self.now - self.slept) / SECOND

    def sleep(self, microseconds: int) -> None:
        """Suspend all machines."""
        self.now += microseconds
        self.slept += microseconds


class ClockedStore(SQLiteStore):
    """A real SQLite store whose database clock, and whose luck, are the test's."""

    def __init__(self, path: Path, world: World) -> None:
        super().__init__(path, statement_timeout=0)
        self._world = world
        self.skew = 0
        self.mishap = ""
        self.frozen: list[Sequence[Entry]] = []

    def run(self, sql: str, values: Sequence[saslquota.Value] = ()) -> list[Any]:
        return super().run(sql.replace("synchronous = FULL", "synchronous = OFF"), values)

    def now(self) -> int:
        super().now()
        return START + self._world.now + self.skew

    def append(self, rows: Sequence[Entry]) -> None:
        mishap = self.mishap if rows else ""
        self.mishap = "" if rows else self.mishap
        if mishap == "frozen":  # the statement is carried out later, or never
            self.frozen.append(rows)
        elif mishap != "lost":
            super().append(rows)
        if mishap:
            raise Unavailable(f"the test: {mishap}")

    def thaw(self) -> None:
        """What a frozen server had been told to write arrives now."""
        while self.frozen:
            with suppress(Conflict):
                super().append(self.frozen.pop())

    def reset(self, account: str) -> None:
        self.run(RESET, (self.now(), account))


class Fleet:
    """The ledgers of one daemon or several, on one file."""

    def __init__(self, directory: Path, daemons: int = 1) -> None:
        self.world = World()
        self.path = directory / "ledger.db"
        self.stores = [ClockedStore(self.path, self.world) for _ in range(daemons)]
        self.ledgers = [self.ledger(store) for store in self.stores]
        self.instances = itertools.count(1)

    def ledger(self, store: ClockedStore) -> Ledger:
        ledger = Ledger(store, DAY, self.world.monotonic)
        ledger.open()
        return ledger

    def send(self, account: str, windows: tuple[Window, ...], n: int = 1, daemon: int = 0) -> bool:
        charge = lone_charge(account, n, f"i{next(self.instances)}", windows)
        (verdict,) = self.ledgers[daemon].charge([charge], NEVER)
        return verdict.accepted

    def rows(self) -> list[Entry]:
        columns = saslquota.COLUMNS
        found = self.stores[0].run(f"SELECT {columns} FROM sends ORDER BY account, seq")
        return [Entry(*row) for row in found]

    def close(self) -> None:
        for store in self.stores:
            store.close()


def fast_directory() -> str | None:
    """Memory, where there is some: these tests make thousands of databases."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


StartFleet = Callable[..., Fleet]  # the fixture `fleet`
