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

import scale
import table
from peers import policyd_rate_limit, postfwd
from rounds import Round
from servers import (
    HERE,
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
    pip_install,
    prepare,
    run_load,
    saslquota,
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


def start_on_mariadb(this: Round) -> Daemon:
    this.database.create("main")
    return saslquota(this.bench, this.database, "main")


def start_on_sqlite(this: Round) -> Daemon:
    return saslquota(this.bench, None, f"main{this.turn}")


SUBJECTS: dict[str, Callable[[Round], Daemon]] = {
    table.CEILING: start_ceiling,
    table.MARIADB: start_on_mariadb,
    table.SQLITE: start_on_sqlite,
    table.POSTFWD: lambda this: postfwd(this.bench, logged=True),
    table.POSTFWD_SILENT: lambda this: postfwd(this.bench, logged=False),
    table.PRL_MYSQL: lambda this: policyd_rate_limit(this.bench, this.database),
    table.PRL_SQLITE: lambda this: policyd_rate_limit(this.bench, None),
}
ROWS = {
    "ceiling": table.CEILING,
    "insert": table.INSERT,
    "mariadb": table.MARIADB,
    "sqlite": table.SQLITE,
    "postfwd": table.POSTFWD,
    "postfwd-silent": table.POSTFWD_SILENT,
    "prl-mysql": table.PRL_MYSQL,
    "prl-sqlite": table.PRL_SQLITE,
}
OURS = (table.MARIADB, table.SQLITE)


# --- a round -------------------------------------------------------------------------------------


def measure_rows(this: Round, rows: list[str], loads: list[str]) -> None:
    """Each row under each load. All servers stand ready; who comes first changes every round."""
    names = [ROWS[row] for row in rows if ROWS[row] in SUBJECTS]
    daemons: dict[str, Daemon] = {}
    for name in names:
        with this.attempt(name):
            daemons[name] = SUBJECTS[name](this)
    order = list(daemons.items())
    order = order[this.turn % len(order) :] + order[: this.turn % len(order)] if order else []
    for label in loads:
        for name, daemon in order:
            load = this.load(**LOADS[label], accepted=accepted_by(name))
            this.record(name, label, functools.partial(measure, this, name, daemon, load))
    if "insert" in rows:
        measure_insert(this)
    if not this.serious():
        verify(this)


def accepted_by(name: str) -> str:
    """The reply to a send within the limit: postfwd says DUNNO where no rule hits."""
    return "action=DUNNO" if name == table.POSTFWD_SILENT else "action=OK"


def measure(this: Round, name: str, daemon: Daemon, load: Load) -> Result:
    """One measurement, with a profile of the daemon when asked for."""
    with contextlib.ExitStack() as stack:
        if this.profiles and name in OURS:
            file = this.profiles / f"{name}, {load.connections}{' new' * load.fresh}.txt"
            stack.enter_context(profile(daemon.pid, file, load.warmup + load.seconds))
        return run_load([daemon.port], load)


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
    """The bare INSERT, into a table of its own."""
    this.database.create("bare")
    this.record(
        table.INSERT,
        "1",
        lambda: insert_alone(this.database, "bare", this.seconds, this.seconds / 3),
    )


def verify(this: Round) -> None:
    """Every accepted send must have its row: a fast answer that is not durable does not count."""
    for name in OURS:
        sends = [done.all_accepted for (row, _), done in this.results.items() if row == name]
        if sends and sum(sends) != (rows := count_rows(this, name)):
            this.failures.append(f"{name}: {sum(sends)} sends accepted, {rows} rows written")


def count_rows(this: Round, name: str) -> int:
    """The rows in the ledger of the main part."""
    if name == table.MARIADB:
        return this.database.count("main")
    path = this.bench.data / f"main{this.turn}.db"
    with contextlib.closing(sqlite3.connect(path)) as file:
        return int(file.execute("SELECT COUNT(*) FROM sends").fetchone()[0])


# --- the run -------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace) -> tuple[list[Round], int]:
    """All rounds, and the number of lines that saslquota has logged."""
    rounds = []
    with Bench() as bench:
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
        return rounds, bench.lines_logged()


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


def report(rounds: list[Round], lines: int, options: argparse.Namespace) -> None:
    """Print the table, the targets and what qualifies them."""
    results = [this.results for this in rounds]
    decisions = sum(
        done.all_accepted + done.all_refused
        for result in results
        for (row, _), done in result.items()
        if row not in (table.CEILING, *table.PEERS)
    )
    print(f"{machine()}; medians of {options.rounds} rounds of {options.seconds:g} s\n")
    print(table.table(results))
    print(f"\n{table.reached(results)}")
    others = ", ".join(f"{this.others:.0%}" for this in rounds)
    print(f"\nOther programs used {others} of the processors before each round.")
    print(f"saslquota sent {lines:,} log lines for {decisions:,} decisions.")
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
    rows, loads, cases = list(ROWS), list(LOADS), list(scale.CASES)
    parser.add_argument("--rounds", type=int, help="rounds to take medians of (3)")
    parser.add_argument("--seconds", type=float, help="seconds measured at a time (3)")
    parser.add_argument(
        "--rows", type=some_of(rows), default=rows, help=f"all, none or some of: {', '.join(rows)}"
    )
    parser.add_argument(
        "--loads",
        type=some_of(loads),
        help=f"connections; all or some of: {', '.join(loads)}",
    )
    parser.add_argument(
        "--scale",
        type=some_of(cases),
        default=cases,
        help=f"all, none or some of: {', '.join(cases)}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny load, to see that everything works"
    )
    parser.add_argument(
        "--mariadbd",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option for mariadbd, such as --mariadbd=--innodb-buffer-pool-size=512M",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every measurement to a file"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="sample saslquota with py-spy during the main rows",
    )
    options = parser.parse_args(argv)
    if options.loads is None:
        options.loads = ["1", "16", "16 new"] if options.quick else loads
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.seconds = options.seconds or (0.3 if options.quick else 3.0)
    return options


def raise_descriptor_limit() -> None:
    """The idle connections need more descriptors than a login has."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: list[str] | None = None) -> int:
    """Returns 1 when a measurement failed, other than a peer's, or a send has no row."""
    options = parse_arguments(argv)
    prepare()
    if options.profile:
        pip_install("py-spy")
        options.profile.mkdir(parents=True, exist_ok=True)
    raise_descriptor_limit()
    rounds, lines = measure_all(options)
    report(rounds, lines, options)
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
