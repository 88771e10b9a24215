"""Measure saslquota beside its ceiling and its peers, and as things grow; print one table.

Every round measures every row once, one after the other, so that a slow minute of the machine falls
on all of them. Ratios are taken within each round; the table shows the medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import platform
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import plot
import scale
import table
from debian13 import debian13, install_debian13
from peers import install_peers, policyd_rate_limit, postfwd
from rounds import Round
from servers import (
    BASELINE,
    CHECKOUT,
    HERE,
    OTHER,
    PROGRAM,
    PYTHON,
    Bench,
    Daemon,
    Load,
    MariaDB,
    Result,
    accepts,
    busy_share,
    free_port,
    insert_alone,
    ledger,
    pip_install,
    prepare,
    run_load,
)

LOADS: dict[str, dict[str, int | bool]] = {
    "1": {"connections": 1},
    "16": {"connections": 16},
    "64": {"connections": 64},
    "256": {"connections": 256},
    "16 new": {"connections": 16, "fresh": True},
}


# --- the rows ------------------------------------------------------------------------------------


def start_ceiling(this: Round) -> Daemon:
    port = free_port()
    command: list[str | Path] = [PYTHON, HERE / "ceiling.py", str(port)]
    return Daemon(port, this.bench.start(command, lambda: accepts(port)).pid)


@dataclasses.dataclass(frozen=True)
class Ours:
    """A row of saslquota: where it counts, and whether Debian 13's Python runs it."""

    name: str
    mariadb: bool
    debian13: bool = False

    def ledger(self, this: Round) -> str:
        """MariaDB's is emptied for each round, of SQLite each round has a file of its own."""
        return self.name if self.mariadb else f"{self.name}{this.turn}"

    def start(self, this: Round) -> dict[str, Daemon]:
        name = self.ledger(this)
        if self.mariadb:
            this.create(name)
        options = {"python": debian13(this.bench)} if self.debian13 else {}
        return this.start(this.database if self.mariadb else None, name, **options)

    def count(self, this: Round, program: str) -> int:
        """How many sends its ledger holds."""
        name = ledger(self.ledger(this), program)
        if self.mariadb:
            return this.database.count(name)
        with contextlib.closing(sqlite3.connect(this.bench.data / f"{name}.db")) as file:
            return int(file.execute("SELECT COUNT(*) FROM sends").fetchone()[0])


OURS = {
    table.MARIADB: Ours("main", mariadb=True),
    table.SQLITE: Ours("main", mariadb=False),
    table.MARIADB_313: Ours("main313", mariadb=True, debian13=True),
    table.SQLITE_313: Ours("main313", mariadb=False, debian13=True),
}
# The daemons of a row: one for each saslquota.py, or the one that is not saslquota.
SUBJECTS: dict[str, Callable[[Round], dict[str, Daemon]]] = {
    table.CEILING: lambda this: {OTHER: start_ceiling(this)},
    **{row: ours.start for row, ours in OURS.items()},
    table.POSTFWD: lambda this: {OTHER: postfwd(this.bench, logged=True)},
    table.POSTFWD_SILENT: lambda this: {OTHER: postfwd(this.bench, logged=False)},
    table.PRL_MYSQL: lambda this: {OTHER: policyd_rate_limit(this.bench, this.database)},
    table.PRL_SQLITE: lambda this: {OTHER: policyd_rate_limit(this.bench, None)},
}
ROWS = {
    "ceiling": table.CEILING,
    "insert": table.INSERT,
    "mariadb": table.MARIADB,
    "sqlite": table.SQLITE,
    "mariadb-313": table.MARIADB_313,
    "sqlite-313": table.SQLITE_313,
    "postfwd": table.POSTFWD,
    "postfwd-silent": table.POSTFWD_SILENT,
    "prl-mysql": table.PRL_MYSQL,
    "prl-sqlite": table.PRL_SQLITE,
}

# --- a round -------------------------------------------------------------------------------------


def measure_rows(this: Round, rows: list[str], loads: list[str]) -> None:
    """Each row under each load. All servers are ready; every round begins with another row."""
    names = [ROWS[row] for row in rows if ROWS[row] in SUBJECTS]
    daemons: dict[str, dict[str, Daemon]] = {}
    for name in names:
        with this.attempt(name):
            daemons[name] = SUBJECTS[name](this)
    order = list(daemons.items())
    order = order[this.turn % len(order) :] + order[: this.turn % len(order)] if order else []
    for label in loads:
        for name, started in order:
            load = this.load(**LOADS[label], accepted=accepted_by(name))
            this.record(name, label, functools.partial(measure, this, name, started, load), started)
    if "insert" in rows:
        measure_insert(this)
    if not this.serious():
        verify(this)


def accepted_by(name: str) -> str:
    """The reply to a send within the limit: postfwd says DUNNO where no rule hits."""
    return "action=DUNNO" if name == table.POSTFWD_SILENT else "action=OK"


def measure(this: Round, name: str, daemons: dict[str, Daemon], load: Load, program: str) -> Result:
    """One measurement, with a profile of the daemon when asked for."""
    daemon = daemons[program]
    with contextlib.ExitStack() as stack:
        if this.profiles and name in OURS:
            file = f"{name}, {load.connections}{' new' * load.fresh}, {program}.txt"
            seconds = load.warmup + load.seconds
            stack.enter_context(profile(daemon.pid, this.profiles / file, seconds))
        return run_load([daemon], load)


@contextlib.contextmanager
def profile(pid: int, file: Path, seconds: float) -> Iterator[None]:
    """Sample who holds the GIL with py-spy while a daemon is loaded; one line for each stack."""
    command: list[str | Path] = [
        PYTHON.parent / "py-spy",
        "record",
        "--format",
        "raw",
        "--gil",
        "--rate",
    ]
    command += ["200", "--duration", str(max(1, int(seconds))), "--pid", str(pid), "-o", file]
    sampler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield
    sampler.wait()


def measure_insert(this: Round) -> None:
    """The bare INSERT, of one row and of several, into a table of its own."""
    for row, rows in ((table.INSERT, 1), (table.INSERT_EIGHT, 8)):
        this.database.create("bare")
        this.record(row, "1", functools.partial(insert_rows, this, rows), [OTHER])


def insert_rows(this: Round, rows: int, _: str) -> Result:
    """The measurement of an INSERT, of that many rows."""
    return insert_alone(this.database, "bare", rows, this.seconds)


def verify(this: Round) -> None:
    """Every accepted send must have its row: a fast answer that is not durable does not count."""
    for program in this.bench.sources:
        for name, ours in OURS.items():
            row = table.of_baseline(name) if program == BASELINE else name
            sends = [done.all_accepted for key, done in this.results.items() if key[0] == row]
            if sends and sum(sends) != (rows := ours.count(this, program)):
                this.failures.append(f"{row}: {sum(sends)} sends accepted, {rows} rows written")


# --- the run -------------------------------------------------------------------------------------


def source_of(revision: str) -> str:
    """saslquota.py as it is in a file or in a revision of this repository."""
    if Path(revision).is_file():
        return Path(revision).read_text()
    command = ["git", "-C", str(HERE), "show", f"{revision}:saslquota.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"bench: {done.stderr.strip()}")
    return done.stdout


def measure_all(
    sources: dict[str, str], options: argparse.Namespace
) -> tuple[list[Round], dict[str, int]]:
    """All rounds, and the number of lines that each saslquota.py has logged."""
    rounds = []
    with Bench(sources) as bench:
        database = MariaDB(bench, options.mariadbd)
        for turn in range(options.rounds):
            this = Round(
                bench, database, turn, options.seconds, 0.01 if options.quick else 1.0,
                options.profile, busy_share(),
            )  # fmt: skip
            rounds.append(this)
            with bench.section():
                measure_rows(this, options.rows, options.loads)
            for case in options.scale:
                with bench.section(), this.attempt(case):
                    scale.CASES[case](this)
        return rounds, {program: bench.lines_logged(program) for program in sources}


def machine() -> str:
    """What the figures were taken on."""
    model = "unknown processor"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    server = subprocess.run(["mariadbd", "--version"], capture_output=True, text=True, check=False)
    version = server.stdout.partition("Ver ")[2].split(" ")[0]
    python = subprocess.run(
        [PYTHON, "-c", "import platform; print(platform.python_version())"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    return (
        f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {python},"
        f" MariaDB {version}, SQLite {sqlite3.sqlite_version}"
    )


def report(rounds: list[Round], lines: dict[str, int], options: argparse.Namespace) -> None:
    """Print the table, the targets and what qualifies them."""
    results = [this.results for this in rounds]
    print(f"{machine()}; medians of {options.rounds} rounds of {options.seconds:g} s\n")
    print(table.table(results))
    if options.baseline:
        print(f"\nThe baseline is {options.baseline}. {table.slower(results)}")
    print(f"\n{table.reached(results)}")
    others = ", ".join(f"{this.others:.0%}" for this in rounds)
    print(f"\nOther programs used {others} of the processors before each round.")
    for program, count in lines.items():
        made = sum(this.decisions(program) for this in rounds)
        print(f"saslquota ({program}) sent {count:,} log lines for {made:,} decisions.")
    if options.quick:
        print("This was a quick run: sizes are a hundredth of those named, figures mean nothing.")
    for this in rounds:
        for failure in this.failures:
            print(f"FAILED in round {this.turn + 1}: {failure}")


def some_of(names: list[str]) -> Callable[[str], list[str]]:
    """Parse a list of names separated by commas, `all` or `none`."""

    def parse(text: str) -> list[str]:
        if text in ("all", "none"):
            return names if text == "all" else []
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of: {', '.join(names)}")
        return chosen

    return parse


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, help="rounds to take medians of (3)")
    add("--seconds", type=float, help="seconds measured at a time (3)")
    for option, names, left_out in (
        ("--rows", ROWS, " (with --quick, or not as root: those without 313)"),
        ("--loads", LOADS, ""),
        ("--scale", scale.CASES, " (but growth, unless --plot, and galera with --quick)"),
    ):
        choice = list(names)
        text = f"all{left_out}, none or some of: {', '.join(choice)}"
        add(option, type=some_of(choice), help=text)
    add("--quick", action="store_true", help="a tiny load, to see that everything works")
    add(
        "--mariadbd",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option for mariadbd, such as --mariadbd=--innodb-buffer-pool-size=512M",
    )
    add(
        "--baseline",
        metavar="REVISION",
        help="measure another saslquota.py beside the checkout's: a revision for git, or a file",
    )
    add("--json", type=Path, metavar="FILE", help="also write every measurement to a file")
    add("--plot", type=Path, metavar="DIR", help="draw curves of what grows, as SVG files")
    add(
        "--profile",
        type=Path,
        metavar="DIR",
        help="sample saslquota with py-spy during the main rows",
    )
    return with_defaults(parser.parse_args(argv))


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what was not said."""
    quick = options.quick
    if options.rows is None:
        debian13 = os.geteuid() == 0 and not quick
        options.rows = [row for row in ROWS if debian13 or not row.endswith("-313")]
    if options.loads is None:
        options.loads = ["1", "16", "16 new"] if quick else list(LOADS)
    if options.scale is None:
        left_out = {"growth": not options.plot, "galera": quick}
        options.scale = [case for case in scale.CASES if not left_out.get(case)]
    options.rounds = options.rounds or (1 if quick else 3)
    options.seconds = options.seconds or (0.3 if quick else 3.0)
    return options


def raise_descriptor_limit() -> None:
    """The idle connections need more descriptors than a login has."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: list[str] | None = None) -> int:
    """Returns 1 when a measurement failed, other than a peer's, or a send has no row."""
    options = parse_arguments(argv)
    sources = {CHECKOUT: PROGRAM.read_text()}
    if options.baseline:
        sources[BASELINE] = source_of(options.baseline)
    prepare()
    install_peers(options.rows)
    install_debian13(options.rows)
    if options.profile:
        pip_install("py-spy")
        options.profile.mkdir(parents=True, exist_ok=True)
    raise_descriptor_limit()
    rounds, lines = measure_all(sources, options)
    report(rounds, lines, options)
    if options.plot:
        for path in plot.write([this.results for this in rounds], options.plot):
            print(f"drawn: {path}")
    if options.json:
        content = [
            [
                {"row": row, "load": load} | dataclasses.asdict(done)
                for (row, load), done in this.results.items()
            ]
            for this in rounds
        ]
        options.json.write_text(json.dumps(content, indent=1))
    return 1 if any(this.serious() for this in rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
