"""The database is frozen, and the daemon counts on in its spool: how fast, how long anybody waits
at the switch, and how fast all is carried over when the database is back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import table
from rounds import Round
from servers import BenchError, Daemon, Load, MariaDB, Result, ledger, run_load, saslquota, say

NAME = "outage"
SENDS = 100_000  # in the spool, before they are carried over
DBTIMEOUT = 3  # seconds, the least with a spool
CHUNK = 1.0  # seconds of load at a time while all is carried over
LIMIT = 180.0  # seconds in which it must be


def outage(this: Round) -> None:
    """One of each saslquota.py that has a spool, the other one not running."""
    this.create(NAME)
    programs = [name for name, source in this.bench.sources.items() if "_spoolfile" in source]
    for program in programs if this.turn % 2 == 0 else reversed(programs):
        with this.bench.section():
            outage_of(this, program)


def outage_of(this: Round, program: str) -> None:
    """A row before it, one at the switch, one in it beside SQLite, and one while all is carried
    over."""
    run = Outage(this, program)
    beside = saslquota(this.bench, program, None, f"{NAME}{this.turn}")
    record = functools.partial(this.record, programs=[program])
    record(table.BEFORE_OUTAGE, table.ON_MARIADB, lambda _: run.load(this.load()))
    with frozen(this.database):
        record(table.SWITCH, table.ON_MARIADB, lambda _: run.switch())
        rows = [
            (table.IN_OUTAGE, run.load),
            (table.NO_SPOOL, functools.partial(run_load, [beside])),
        ]
        for _, measure in rows:  # nobody is met for the first time while it is measured
            measure(Load(requests=this.size(1000), in_turn=True))
        for row, measure in rows if this.turn % 2 == 0 else reversed(rows):
            record(row, table.ON_SQLITE, lambda _, measure=measure: measure(this.load()))
        run.fill_up()
    run.await_state("back")
    record(table.CARRYING, table.ON_MARIADB, lambda _: run.carry())
    run.verify()


@contextlib.contextmanager
def frozen(database: MariaDB) -> Iterator[None]:
    """A server that answers nothing: the worst kind of outage."""
    pid = int(Path(database.sql("SELECT @@pid_file")).read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def status(daemon: Daemon) -> dict[str, str]:
    """What the daemon says of itself."""
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=30) as connection:
        connection.sendall(b"request=status\n\n")
        lines = iter(connection.makefile("rb").readline, b"\n")
        return dict(line.decode().rstrip("\n").split("=", 1) for line in lines)


class Outage:
    """A daemon with a spool."""

    def __init__(self, this: Round, program: str) -> None:
        self._this = this
        self._name = ledger(NAME, program)
        self._spool = this.bench.path(".spool")
        settings = {"_onfailure": "LOCAL", "_dbtimeout": DBTIMEOUT, "_spoolfile": str(self._spool)}
        self._daemon = saslquota(this.bench, program, this.database, NAME, **settings)
        self._accepted = 0

    def load(self, load: Load) -> Result:
        result = run_load([self._daemon], load)
        self._accepted += result.all_accepted
        return result

    def switch(self) -> Result:
        """The longest that anybody waits when the database has gone, in seconds."""
        result = self.load(Load(requests=100))
        return dataclasses.replace(result, extra=result.longest / 1e6)

    def fill_up(self) -> None:
        """Until there are enough in the spool."""
        held = int(status(self._daemon)["spooled_sends"])
        self.load(Load(requests=max(100, self._this.size(SENDS) - held)))
        size = sum(path.stat().st_size for path in self._spool.parent.glob(f"{self._spool.name}*"))
        held = int(status(self._daemon)["spooled_sends"])
        say(f"the spool has {size / 1e6:.1f} MB for {held:,} sends: {size / held:.0f} bytes each")

    def await_state(self, state: str) -> None:
        deadline = time.monotonic() + LIMIT
        while status(self._daemon)["store"] not in (state, "up"):
            if time.monotonic() > deadline:
                raise BenchError(f"not {state} within {LIMIT:g} s")
            time.sleep(0.01)

    def carry(self) -> Result:
        """The load while all is carried over, and how many a second are of what was in the spool:
        those that come meanwhile are not counted."""
        begun = time.monotonic()
        held = int(status(self._daemon)["spooled_sends"])
        results = []
        watch = Watch(self._daemon)
        watch.start()
        while not watch.ended:
            results.append(self.load(Load(seconds=CHUNK)))
            if time.monotonic() - begun > LIMIT:
                raise BenchError(f"not carried over within {LIMIT:g} s")
        watch.join()
        whole = results[: max(1, len(results) - 1)]  # without that in which it ended
        middle = {
            figure: statistics.median(getattr(result, figure) for result in whole)
            for figure in ("rate", "p50", "p99", "load_cpu", "daemon_cpu")
        }
        longest = max(result.longest for result in whole)
        seconds = max(0.01, watch.ended - begun)
        return dataclasses.replace(whole[0], **middle, longest=longest, extra=held / seconds)

    def verify(self) -> None:
        """Each accepted send has its row."""
        self.await_state("up")
        self._this.database.check_count(self._name, self._accepted)


class Watch(threading.Thread):
    """Notices when all is carried over."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon=True)
        self._daemon = daemon
        self.ended = 0.0  # monotonic seconds

    def run(self) -> None:
        while status(self._daemon)["store"] != "up":
            time.sleep(0.05)
        self.ended = time.monotonic()
