"""One round of the benchmark: what it runs on, and what it has measured so far."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from servers import Bench, BenchError, Load, MariaDB, Result, say
from table import PEERS, Key


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
        """The usual load for this round's time, with changes."""
        usual: dict[str, object] = {"seconds": self.seconds, "warmup": self.seconds / 3}
        return Load(**(usual | changes))  # type: ignore[arg-type]

    def serious(self) -> list[str]:
        """The failures that are not a peer's: those cost its row, and say nothing about us."""
        return [failure for failure in self.failures if not failure.startswith(PEERS)]

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A failure costs what failed, and not the rest of the run."""
        try:
            yield
        except BenchError as error:
            self.failures.append(f"{what}: {error}")
            say(f"FAILED {self.failures[-1]}")

    def record(self, row: str, label: str, measure: Callable[[], Result]) -> None:
        """Take one measurement."""
        with self.attempt(f"{row}, {label}"):
            result = measure()
            self.results[row, label] = result
            say(
                f"round {self.turn + 1}: {label:>11}  {row:38} {result.rate:9,.0f}/s"
                f"  p50 {result.p50 / 1000:.2f}  p99 {result.p99 / 1000:.2f} ms"
            )
