#!/usr/bin/env python3
"""What it costs that a send keeps where it came from: one committed INSERT with and without
client_address and sender, in turn, into MariaDB and SQLite.

    python3 bench/columns.py
"""

from __future__ import annotations

import dataclasses
import ipaddress
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from servers import PROGRAM, PYTHON, Bench, MariaDB, prepare

sys.path.insert(0, str(PROGRAM.parent))

import saslquota
from saslquota import Entry, MySQLStore, SQLiteStore, Store

ROUNDS = 300
BATCHES = (1, 16, 64)
OLD_COLUMNS = Entry._fields[:-2]


def entries(first: int, number: int) -> list[Entry]:
    at = time.time_ns() // 1000
    address = ipaddress.ip_address("192.0.2.1").packed
    return [
        Entry(f"user{n}", first + n, 1, at, 1, 1, "1a2b.6553f100.a1b2c.0", 7, address, "")
        for n in range(number)
    ]


def append_without(store: Store, rows: list[Entry]) -> None:
    """As Store.append() before there were the two columns."""
    places = ", ".join(["(?, ?, ?, " + store.BIND_TIME + ", ?, ?, ?, ?)"] * len(rows))
    values = [value for row in rows for value in row[: len(OLD_COLUMNS)]]
    store.run(f"INSERT INTO sends ({', '.join(OLD_COLUMNS)}) VALUES {places}", values)


def measure(name: str, store: Store) -> None:
    """Print the medians of both, in microseconds."""
    store.open()
    seq = 0
    for batch in BATCHES:
        took: dict[str, list[float]] = {"without": [], "with": []}
        for number in range(2 * ROUNDS):
            kind = ("without", "with")[number % 2]
            rows, seq = entries(seq, batch), seq + batch
            append: Callable[[list[Entry]], None] = (
                store.append if kind == "with" else lambda rows: append_without(store, rows)
            )
            began = time.perf_counter()
            append(rows)
            took[kind].append((time.perf_counter() - began) * 1e6)
        without, with_ = (statistics.median(took[kind]) for kind in ("without", "with"))
        ratio = with_ / without
        print(f"{name}  batch {batch:3}  {without:6.0f} us  {with_:6.0f} us  {ratio:.3f}")
    store.close()


def main() -> None:
    prepare()
    if Path(sys.prefix) != PYTHON.parent.parent:
        raise SystemExit(f"run it with {PYTHON}: it has the connector")
    with Bench({}) as bench:
        database = MariaDB(bench)
        database.sql("CREATE DATABASE columns_")
        database.sql((PROGRAM.parent / "mysql.sql").read_text("utf-8"), "columns_")
        config = saslquota.Config(path=bench.data / "saslquota.json")
        config = dataclasses.replace(
            config,
            myhost=("127.0.0.1",),
            myport=database.port,
            myuser=database.user,
            mypasswd=database.password,
            mydb="columns_",
        )
        measure("MariaDB", MySQLStore(config))
        measure("SQLite ", SQLiteStore(bench.data / "columns.db", 1.0))


if __name__ == "__main__":
    main()
