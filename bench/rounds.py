"""One round of the benchmark: what it runs on, and what it has measured so far."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from servers import (
    BASELINE,
    Bench,
    BenchError,
    Daemon,
    Load,
    MariaDB,
    Result,
    ledger,
    run_load,
    saslquota,
    say,
)
from table import CEILING, ON_MARIADB, PEERS, Key, is_of_baseline, of_baseline

QUICK_REQUESTS = 100

Measure = tuple[str, Callable[[str], Result]]  # a row, and how a saslquota.py is measured for it


@dataclasses.dataclass
class Round:
    """Where measurements are taken and kept."""

    bench: Bench
    database: MariaDB
    turn: int  # 0, 1 … which round this is
    seconds: float  # measured at a time
    scale: float = 1.0  # share of the full sizes
    profiles: Path | None = None
    others: float = 0.0  # share of the processors that was in use before it began
    results: dict[Key, Result] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)

    def size(self, full: int) -> int:
        """A number of rows, senders or connections, reduced for a quick run."""
        return max(10, int(full * self.scale))

    def load(self, **changes: object) -> Load:
        """The usual load for this round's time, with changes; a few requests in a quick run."""
        usual: dict[str, object] = {"seconds": self.seconds, "warmup": self.seconds / 3}
        usual |= {"requests": QUICK_REQUESTS} if self.scale < 1 else {}
        return Load(**(usual | changes))  # type: ignore[arg-type]

    def ledgers(self, name: str) -> list[str]:
        """The databases that the saslquota.py have under a name."""
        return [ledger(name, program) for program in self.bench.sources]

    def create(self, name: str) -> None:
        """An empty ledger for each saslquota.py."""
        for database in self.ledgers(name):
            self.database.create(database)

    def start(self, database: MariaDB | None, name: str, **options: Any) -> dict[str, Daemon]:
        """Start each saslquota.py on its ledger."""
        return {
            program: saslquota(self.bench, program, database, name, **options)
            for program in self.bench.sources
        }

    def decisions(self, program: str) -> int:
        """How many decisions a saslquota.py has made."""
        return sum(
            done.all_accepted + done.all_refused
            for (row, _), done in self.results.items()
            if row not in (CEILING, *PEERS) and is_of_baseline(row) == (program == BASELINE)
        )

    def serious(self) -> list[str]:
        """The failures that are not a peer's: those cost its row, and say nothing about us."""
        return [failure for failure in self.failures if not failure.startswith(PEERS)]

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A failure costs what failed, and not the rest of the run."""
        try:
            yield
        except (BenchError, OSError) as error:
            self.failures.append(f"{what}: {error}")
            say(f"FAILED {self.failures[-1]}")

    def record(
        self,
        row: str,
        label: str,
        measure: Callable[[str], Result],
        programs: Iterable[str] | None = None,
    ) -> None:
        """Measure programs, usually each saslquota.py; every round begins with the other one."""
        order = list(programs or self.bench.sources)
        for program in order if self.turn % 2 == 0 else reversed(order):
            name = of_baseline(row) if program == BASELINE else row
            with self.attempt(f"{name}, {label}"):
                result = measure(program)
                self.results[name, label] = result
                say(
                    f"round {self.turn + 1}: {label:>11}  {name:48} {result.rate:9,.0f}/s"
                    f"  p50 {result.p50 / 1000:.2f}  p99 {result.p99 / 1000:.2f} ms"
                )


def measure_pair(this: Round, one: Measure, other: Measure, label: str = ON_MARIADB) -> None:
    """Measure two rows that will be compared; every round begins with the other one."""
    for row, measure in (one, other) if this.turn % 2 == 0 else (other, one):
        this.record(row, label, measure)


def loaded(daemons: dict[str, Daemon], load: Load) -> Callable[[str], Result]:
    """The measurement of one of the daemons under a load."""
    return lambda program: run_load([daemons[program]], load)
