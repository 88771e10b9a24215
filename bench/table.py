"""From the rounds' measurements to the table and the list of what is reached."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

from servers import Result

CEILING = "ceiling (threads, no log)"
INSERT = "one committed INSERT"
INSERT_EIGHT = "one committed INSERT of eight rows"
MARIADB = "saslquota, MariaDB"
SQLITE = "saslquota, SQLite"
MARIADB_313 = "saslquota, MariaDB, Debian 13's Python 3.13"
SQLITE_313 = "saslquota, SQLite, Debian 13's Python 3.13"
PRL_MYSQL = "policyd-rate-limit, MySQL"
PRL_SQLITE = "policyd-rate-limit, SQLite"
POSTFWD = "postfwd, logging"
POSTFWD_SILENT = "postfwd, not logging"
PEERS = (PRL_MYSQL, PRL_SQLITE, POSTFWD, POSTFWD_SILENT)

TOLERATED = 0.95  # of the baseline's rate

Key = tuple[str, str]  # row, load


def of_baseline(row: str) -> str:
    """The row that holds the baseline's figures."""
    return f"{row}, baseline"


def is_of_baseline(row: str) -> bool:
    """Whether a row holds the baseline's figures."""
    return row.endswith(of_baseline(""))


def ratios(
    rounds: list[dict[Key, Result]], top: Key, bottom: Key, figure: str = "rate"
) -> list[float]:
    """One row's figure over another's, in each round that has both."""
    pairs = [(done[top], done[bottom]) for done in rounds if top in done and bottom in done]
    return [getattr(a, figure) / getattr(b, figure) for a, b in pairs]


def median_ratio(
    rounds: list[dict[Key, Result]], top: Key, bottom: Key, figure: str = "rate"
) -> float | None:
    """The median over the rounds of a ratio taken within each round; None without any."""
    found = ratios(rounds, top, bottom, figure)
    return statistics.median(found) if found else None


def median(rounds: list[dict[Key, Result]], key: Key, figure: str) -> float | None:
    """The median of one figure of one row over the rounds."""
    found = [getattr(done[key], figure) for done in rounds if key in done]
    return statistics.median(found) if found else None


# --- the table -----------------------------------------------------------------------------------


def table(rounds: list[dict[Key, Result]]) -> str:
    """Every row that was measured, in the order of first measurement, loads together."""
    keys = list(dict.fromkeys(key for done in rounds for key in done))
    loads = list(dict.fromkeys(load for _, load in keys))
    head = ["connections", "row", "decisions/s", "rounds", "p50 ms", "p99 ms", "max ms"]
    head += ["of ceiling", "of best peer", "of baseline", "p99 of baseline", "cpu us", "load cpu"]
    return markdown(head, [line(rounds, key) for load in loads for key in keys if key[1] == load])


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table without its empty columns; words to the left, figures to the right."""
    columns = [column for column in zip(head, *lines, strict=True) if any(column[1:])]
    padded = [pad(column, left=i < 2) for i, column in enumerate(columns)]
    rows = ["| " + " | ".join(cells) + " |" for cells in zip(*padded, strict=True)]
    return "\n".join(rows)


def pad(column: tuple[str, ...], *, left: bool) -> list[str]:
    """The cells of a column in one width, with a rule below its head."""
    width = max(map(len, column))
    cells = [cell.ljust(width) if left else cell.rjust(width) for cell in column]
    return [cells[0], "-" * width, *cells[1:]]


def line(rounds: list[dict[Key, Result]], key: Key) -> list[str]:
    """The cells of one row: medians over the rounds, and the span of the rounds' rates."""
    row, load = key
    results = [done[key] for done in rounds if key in done]
    base = load if (CEILING, load) in rounds[0] else "16"
    baseline = of_baseline(row), load
    rates = [result.rate for result in results]
    return [
        load,
        row,
        f"{statistics.median(rates):,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        milliseconds([result.p50 for result in results]),
        milliseconds([result.p99 for result in results]),
        milliseconds([result.longest for result in results]),
        share(None if row.startswith(START) else median_ratio(rounds, key, (CEILING, base))),
        share(None if row.startswith(START) else best_peer_ratio(rounds, key, base)),
        share(median_ratio(rounds, key, baseline)),
        share(median_ratio(rounds, key, baseline, "p99")),
        microseconds([result.daemon_cpu for result in results]),
        f"{statistics.median(result.load_cpu for result in results):.0%}",
    ]


def milliseconds(microseconds: list[float]) -> str:
    """The median of latencies, or nothing where none was taken."""
    return f"{statistics.median(microseconds) / 1000:.2f}" if any(microseconds) else ""


def microseconds(values: list[float]) -> str:
    """The median of processor times, or nothing where none was taken."""
    return f"{statistics.median(values):.0f}" if any(values) else ""


def share(ratio: float | None) -> str:
    """A ratio, or nothing where there is none."""
    return "" if ratio is None else f"{ratio:.2f}"


def best_peer_ratio(rounds: list[dict[Key, Result]], key: Key, load: str) -> float | None:
    """The row's rate over the fastest peer's under the same load, in each round."""
    found = []
    for done in rounds:
        peers = [done[peer, load].rate for peer in PEERS if (peer, load) in done]
        if key in done and peers:
            found.append(done[key].rate / max(peers))
    return statistics.median(found) if found else None


def slower(rounds: list[dict[Key, Result]]) -> str:
    """The rows that are more than 5 % slower than the baseline, with the ratio of each round."""
    lines = []
    for row, load in dict.fromkeys(key for done in rounds for key in done):
        found = ratios(rounds, (row, load), (of_baseline(row), load))
        if found and statistics.median(found) < TOLERATED:
            lines.append(f"\n  {load}, {row}: " + ", ".join(f"{ratio:.2f}" for ratio in found))
    if not lines:
        return "No row is more than 5 % slower."
    return "More than 5 % slower (the ratio of each round):" + "".join(lines)


# --- what must be reached ------------------------------------------------------------------------

# Rows of the scale part; each is measured beside the row it is compared with, in the same round.
EMPTY = "empty table"
MILLIONS = "5,000,000 rows in the table"
ONE_SENDER = "one sender, empty window"
HOT_WINDOW = "one sender, 100,000 in its window"
WARM = "1,000 senders, warm cache"
COLD = "100,000 senders, each once, cold cache"
FEW_IDLE = "no idle connections"
IDLE = "2,000 idle connections"
NO_PURGE = "nothing to purge"
PURGE = "purging 1,000,000 rows"
MANY_SENDERS = "1,000 senders"
FEW_SENDERS = "50 senders"
POOLED_SENDERS = "1,000 senders, all in a pool"
OWN_SENDERS = "1,000 senders, none shared"
FAR_SENDERS = "1,000 senders, database 1 ms away"
NEAR = "database on this machine"
FAR = "database 1 ms away"
ON_MARIADB_TOO = "MariaDB"
ON_MYSQL = "MySQL"
FILLING = "windows filling"
SLIDING = "windows full and sliding"
NO_HOSTILE = "no hostile connections"
HOSTILE = "700 hostile connections"
HANDOVER = "the other daemon has written all 1,000 senders"
AT_QUOTA = "windows sliding at their quota"
REFUSED = "refusals of one hot sender"
MILLIONS_SQLITE = "5,000,000 rows in the table, SQLite"
EMPTY_SQLITE = "empty table, SQLite"
NO_POOLS = "no pools"
POOLS = "a pool for the domain, one for all"
START = "start to first reply, SQLite"
BEFORE_OUTAGE = "before the database is frozen"
SWITCH = "when it is"
IN_OUTAGE = "while it is, counted in the spool"
NO_SPOOL = "the same load on SQLite"
CARRYING = "while the spool is carried over"


# What is drawn, of a size that grows: its axis, and the sizes.
GROWTH: dict[str, tuple[str, tuple[int, ...]]] = {
    "rows": ("rows in the table", (1000, 50_000, 500_000, 5_000_000)),
    "senders": ("senders", (10, 100, 1000, 10_000)),
    "daemons": ("daemons that share 1,000 senders, 48 connections", (1, 2, 3)),
}


def growth(what: str, size: float) -> Key:
    """The row of one size."""
    return f"growth, {what}: {size:,.0f}", "48, MariaDB" if what == "daemons" else "16, MariaDB"


def on_galera(what: str) -> str:
    """The row of the same on a cluster."""
    return f"Galera, {what}"


def by_daemons(what: str, daemons: int) -> str:
    """The row of what is sent by way of one daemon or of three."""
    return f"{what}, {'one daemon' if daemons == 1 else 'three daemons'}"


@dataclasses.dataclass(frozen=True)
class Target:
    """A figure that is asked for, and how it is taken from the rounds.

    `limit` is what the machine allows, as far as a row of the table tells it.
    """

    text: str
    bound: float
    measure: Callable[[list[dict[Key, Result]]], float | None]
    at_most: bool = False
    form: str = "{:.2f}"
    limit: Callable[[list[dict[Key, Result]]], float | None] = lambda _: None

    def judge(self, rounds: list[dict[Key, Result]]) -> list[str] | None:
        """The cells of its line; None when the rows it needs were not measured."""
        value = self.measure(rounds)
        if value is None:
            return None
        reached = value <= self.bound if self.at_most else value >= self.bound
        asked = ("at most " if self.at_most else "at least ") + self.form.format(self.bound)
        swapped = [
            {key: done.get((of_baseline(key[0]), key[1]), done[key]) for key in done}
            for done in rounds
        ]
        before = self.form.format(self.measure(swapped)) if swapped != rounds else ""
        limit = self.limit(rounds)
        most = "" if limit is None else self.form.format(limit)
        measured = self.form.format(value)
        return [self.text, asked, measured, "yes" if reached else "NO", most, before]


def ratio_target(
    text: str, bound: float, top: Key, bottom: Key, figure: str = "rate", *, at_most: bool = False,
    form: str = "{:.2f}",
) -> Target:  # fmt: skip
    """A target that is a ratio of one figure of two rows."""
    return Target(text, bound, lambda r: median_ratio(r, top, bottom, figure), at_most, form)


def figure_target(
    text: str, bound: float, form: str, key: Key, figure: str, unit: float = 1
) -> Target:
    """A target that is a figure of one row, in another unit, and at most so much."""

    def measure(rounds: list[dict[Key, Result]]) -> float | None:
        found = median(rounds, key, figure)
        return None if found is None else found / unit

    return Target(text, bound, measure, at_most=True, form=form)


ON_MARIADB = "16, MariaDB"
ON_MARIADB_48 = "48, MariaDB"
ON_GALERA_48 = "48, Galera"
ON_SQLITE = "16, SQLite"
TIMES = "{:.1f} x"
MICROSECONDS = "{:.0f} us"
MEGABYTES = "{:.0f} MB"
SECONDS = "{:.2f} s"

TARGETS = (
    # At most the rate of the rows that MariaDB takes in batches of eight, one after the other.
    Target("MariaDB, 16: share of the ceiling", 0.55,
           lambda r: median_ratio(r, (MARIADB, "16"), (CEILING, "16")),
           limit=lambda r: median_ratio(r, (INSERT_EIGHT, "1"), (CEILING, "16"))),
    figure_target("MariaDB, 16: processor for a send", 42, MICROSECONDS,
                  (MARIADB, "16"), "daemon_cpu"),
    figure_target("SQLite, 16: processor for a send", 42, MICROSECONDS,
                  (SQLITE, "16"), "daemon_cpu"),
    ratio_target("MariaDB, 1: beside postfwd, each logging its decisions", 1.2,
                 (MARIADB, "1"), (POSTFWD, "1"), form=TIMES),
    ratio_target("MariaDB, 16: beside policyd-rate-limit on MySQL", 12,
                 (MARIADB, "16"), (PRL_MYSQL, "16"), form=TIMES),
    ratio_target("MariaDB, 16: beside postfwd, each logging its decisions", 3.5,
                 (MARIADB, "16"), (POSTFWD, "16"), form=TIMES),
    ratio_target("MariaDB, 16: beside postfwd not logging", 3.5,
                 (MARIADB, "16"), (POSTFWD_SILENT, "16"), form=TIMES),
    ratio_target("MariaDB, 1: p50 beside one committed INSERT", 1.5,
                 (MARIADB, "1"), (INSERT, "1"), "p50", at_most=True, form=TIMES),
    ratio_target("SQLite, 16: share of the ceiling", 0.40, (SQLITE, "16"), (CEILING, "16")),
    ratio_target("5,000,000 rows beside an empty table", 0.90,
                 (MILLIONS, ON_MARIADB), (EMPTY, ON_MARIADB)),
    ratio_target("5,000,000 rows beside an empty table, SQLite", 0.90,
                 (MILLIONS_SQLITE, ON_SQLITE), (EMPTY_SQLITE, ON_SQLITE)),
    ratio_target("100,000 sends in a window beside an empty one", 0.90,
                 (HOT_WINDOW, ON_MARIADB), (ONE_SENDER, ON_MARIADB)),
    ratio_target("cold cache: share of warm", 0.40, (COLD, ON_MARIADB), (WARM, ON_MARIADB)),
    *(
        ratio_target(f"three daemons beside one, {what}: {figure}", bound,
                     (by_daemons(what, 3), label), (by_daemons(what, 1), label),
                     figure, at_most=figure == "p99", form=form)
        for what, bound, label, figure, form in (
            (MANY_SENDERS, 0.65, ON_MARIADB_48, "rate", "{:.2f}"),
            (MANY_SENDERS, 2, ON_MARIADB_48, "p99", TIMES),
            (FEW_SENDERS, 0.50, ON_MARIADB_48, "rate", "{:.2f}"),
            (POOLED_SENDERS, 0.45, ON_MARIADB_48, "rate", "{:.2f}"),
            (OWN_SENDERS, 0.95, ON_MARIADB_48, "rate", "{:.2f}"),
            (on_galera(MANY_SENDERS), 0.325, ON_GALERA_48, "rate", "{:.3f}"),
            (on_galera(FEW_SENDERS), 0.25, ON_GALERA_48, "rate", "{:.3f}"),
            (on_galera(POOLED_SENDERS), 0.225, ON_GALERA_48, "rate", "{:.3f}"),
        )
    ),
    figure_target("one daemon after another: seconds below 0.9 of its rate", 1, SECONDS,
                  (HANDOVER, ON_MARIADB), "extra"),
    ratio_target("windows sliding beside windows filling", 0.85,
                 (SLIDING, ON_MARIADB), (FILLING, ON_MARIADB)),
    ratio_target("windows sliding at their quota beside windows filling", 0.85,
                 (AT_QUOTA, ON_MARIADB), (FILLING, ON_MARIADB)),
    ratio_target("during a purge: p99 beside without", 3,
                 (PURGE, ON_MARIADB), (NO_PURGE, ON_MARIADB), "p99", at_most=True, form=TIMES),
    ratio_target("MariaDB, 256: share of the rate at 64", 0.75, (MARIADB, "256"), (MARIADB, "64")),
    ratio_target("MariaDB, 256: p99 beside the ceiling's", 2,
                 (MARIADB, "256"), (CEILING, "256"), "p99", at_most=True, form=TIMES),
    figure_target("MariaDB, 256: the longest wait", 0.25, SECONDS,
                  (MARIADB, "256"), "longest", 1e6),
    ratio_target("among 700 hostile connections: p99 beside without", 3,
                 (HOSTILE, ON_MARIADB), (NO_HOSTILE, ON_MARIADB), "p99", at_most=True, form=TIMES),
    figure_target("2,000 idle connections: resident memory", 120, MEGABYTES,
                  (IDLE, ON_MARIADB), "extra"),
    ratio_target("refusals of one hot sender: share of the ceiling", 0.75,
                 (REFUSED, ON_MARIADB), (CEILING, "16")),
    ratio_target("in an outage beside SQLite", 0.90,
                 (IN_OUTAGE, ON_SQLITE), (NO_SPOOL, ON_SQLITE)),
    figure_target("in an outage: the longest wait at the switch", 3, SECONDS,
                  (SWITCH, ON_MARIADB), "extra"),
    Target("a spool is carried over under load, sends/s", 100_000 / 30,
           lambda r: median(r, (CARRYING, ON_MARIADB), "extra"), form="{:,.0f}"),
    ratio_target("meanwhile: p99 beside before", 2,
                 (CARRYING, ON_MARIADB), (BEFORE_OUTAGE, ON_MARIADB),
                 "p99", at_most=True, form=TIMES),
    figure_target("start to first reply (SQLite)", 0.3, SECONDS, (START, "1"), "extra"),
)  # fmt: skip


def reached(rounds: list[dict[Key, Result]]) -> str:
    """The targets whose rows were measured: asked, measured, reached, the baseline's figure."""
    lines = [cells for target in TARGETS if (cells := target.judge(rounds))]
    if not lines:
        return ""
    return markdown(["target", "asked", "measured", "reached", "limit", "baseline"], lines)
