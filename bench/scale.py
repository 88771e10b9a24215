"""The scale part: how saslquota fares when something grows large.

Each case measures a row beside the row it is compared with, one after the other in the same round,
and in the other order in the next round. The tables of a case are filled once and kept for all
rounds. With --quick everything is a hundredth of its size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import table
from daemons import far, galera, handover, three_daemons
from outage import outage
from rounds import Round, loaded, measure_pair
from servers import (
    HERE,
    PYTHON,
    REFUSAL,
    BenchError,
    Daemon,
    Load,
    MariaDB,
    MySQL,
    Result,
    free_port,
    ledger,
    run_load,
    saslquota,
    saslquota_command,
    say,
)

DAY = 86400
BULK_ACCOUNTS = 500  # in one INSERT of a bulk load
REQUEST = (
    b"request=smtpd_access_policy\nprotocol_state=RCPT\nsasl_username=%s@example.org\n"
    b"sender=a@example.org\nrecipient=b@example.com\ninstance=1a2b.6553f100.a1b2c.0\n\n"
)

# --- filling tables ------------------------------------------------------------------------------


def fill(database: MariaDB, name: str, accounts: int, each: int, span: int, age: int = 0) -> None:
    """Give the load's senders `each` sends, spread evenly over `span` seconds until `age` ago.

    The chains are what saslquota itself would have written: seq and total without a gap.
    """
    say(f"filling {name}: {accounts * each:,} rows")
    for first in range(0, accounts, BULK_ACCOUNTS):
        last = min(first + BULK_ACCOUNTS, accounts) - 1
        database.sql(
            "INSERT INTO sends (account, seq, epoch, at, recipients, total, instance, token)"
            " SELECT STRAIGHT_JOIN CONCAT('user', LPAD(a.seq, 6, '0'), '@example.org'), b.seq, 1,"
            f" UTC_TIMESTAMP(6) - INTERVAL {age} + {span} * (1 - b.seq / {each}) SECOND,"
            f" 1, b.seq, '1a2b.6553f100.a1b2c.0', a.seq * 1000000 + b.seq"
            f" FROM seq_{first}_to_{last} AS a JOIN seq_1_to_{each} AS b",
            name,
        )
    database.settle()


def fill_once(this: Round, name: str, accounts: int, each: int, span: int, age: int = 0) -> None:
    """Fill the ledger of each saslquota.py unless an earlier round has."""
    for database in this.ledgers(name):
        if not this.database.has(database):
            this.database.create(database)
            fill(this.database, database, accounts, each, span, age)


def fill_sqlite(path: Path, accounts: int, each: int, span: int) -> None:
    """As fill(), into a file whose table saslquota has made."""
    say(f"filling {path.name}: {accounts * each:,} rows")
    now = time.time_ns() // 1000
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.execute("PRAGMA synchronous = OFF")
        file.execute("BEGIN")
        file.execute(
            "WITH RECURSIVE a (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM a WHERE n < ? - 1),"
            " b (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM b WHERE n < ?)"
            " INSERT INTO sends (account, seq, epoch, at, recipients, total, instance, token)"
            " SELECT printf('user%06d@example.org', a.n), b.n, 1,"
            " CAST(? - ? * 1000000 * (1 - b.n * 1.0 / ?) AS INTEGER), 1, b.n,"
            " '1a2b.6553f100.a1b2c.0', a.n * 1000000 + b.n FROM a CROSS JOIN b",
            (accounts, each, now, span, each),
        )
        file.execute("COMMIT")
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")


# --- the cases -----------------------------------------------------------------------------------


def millions(this: Round) -> None:
    """5,000,000 rows: a thousand senders with 5,000 sends each in the last 20 days."""
    fill_once(this, "millions", 1000, this.size(5000), 20 * DAY)
    this.create("few")
    load = this.load(warmup=this.seconds)
    few, many = (this.start(this.database, name) for name in ("few", "millions"))
    measure_pair(this, (table.EMPTY, loaded(few, load)), (table.MILLIONS, loaded(many, load)))


def millions_sqlite(this: Round) -> None:
    """The same on SQLite."""
    files = [this.bench.data / f"{name}.db" for name in this.ledgers("millions")]
    if not all(file.exists() for file in files):
        with this.bench.section():
            this.start(None, "millions")
        for file in files:
            fill_sqlite(file, 1000, this.size(5000), 20 * DAY)
    load = this.load(warmup=this.seconds)
    few, many = (this.start(None, name) for name in (f"few{this.turn}", "millions"))
    measure_pair(
        this,
        (table.EMPTY_SQLITE, loaded(few, load)),
        (table.MILLIONS_SQLITE, loaded(many, load)),
        table.ON_SQLITE,
    )


def hot_window(this: Round) -> None:
    """One sender with 100,000 sends in its window, some of which leave it during the run."""
    fill_once(this, "hot", 1, this.size(100_000), DAY + 600)
    this.create("mild")
    load = this.load(senders=1)
    mild, hot = (this.start(this.database, name, period=DAY) for name in ("mild", "hot"))
    measure_pair(
        this, (table.ONE_SENDER, loaded(mild, load)), (table.HOT_WINDOW, loaded(hot, load))
    )


def cold(this: Round) -> None:
    """100,000 senders with ten earlier sends each, none of them known to the daemon yet."""
    senders = this.size(100_000)
    fill_once(this, "cold", senders, 10, 7200)
    daemons = this.start(this.database, "cold")
    each_once = Load(senders=senders, requests=senders, in_turn=True)
    this.record(table.COLD, table.ON_MARIADB, loaded(daemons, each_once))
    this.record(table.WARM, table.ON_MARIADB, loaded(daemons, this.load()))


def idle(this: Round) -> None:
    """2,000 connections that have asked once and stay open, as idle smtpd processes keep theirs."""
    this.create("idle")
    daemons = this.start(this.database, "idle", _maxconnections=4000)
    this.record(table.FEW_IDLE, table.ON_MARIADB, loaded(daemons, this.load()))
    this.record(table.IDLE, table.ON_MARIADB, lambda program: among_idle(this, daemons[program]))


@contextlib.contextmanager
def idle_connections(port: int, count: int) -> Iterator[None]:
    """Open connections that have each had a reply."""
    with contextlib.ExitStack() as stack:
        for number in range(count):
            address = ("127.0.0.1", port)
            connection = stack.enter_context(socket.create_connection(address, timeout=30))
            ask(connection, b"idle%06d" % number)
        yield


def ask(connection: socket.socket, login: bytes) -> None:
    """Send one request and take its reply."""
    connection.sendall(REQUEST % login)
    reply = connection.recv(1024)
    if reply != b"action=OK\n\n":
        raise BenchError(f"reply {reply!r}")


def among_idle(this: Round, daemon: Daemon) -> Result:
    """A measurement beside idle connections, and the daemon's resident memory in megabytes."""
    with idle_connections(daemon.port, this.size(2000)):
        return dataclasses.replace(run_load([daemon], this.load()), extra=resident(daemon))


def hostile(this: Round) -> None:
    """16 connections among 700 that do what no Postfix does, beside none."""
    this.create("hostile")
    daemons = this.start(this.database, "hostile")
    measure_pair(
        this,
        (table.NO_HOSTILE, loaded(daemons, this.load())),
        (table.HOSTILE, lambda program: among_hostile(this, daemons[program])),
    )


def among_hostile(this: Round, daemon: Daemon) -> Result:
    """A measurement beside hostile connections."""
    ready = this.bench.path(".ready")
    command: list[str | Path] = [PYTHON, HERE / "hostile.py", str(daemon.port)]
    with this.bench.section():
        this.bench.start([*command, str(this.size(700)), ready], ready.exists)
        return run_load([daemon], this.load())


def resident(daemon: Daemon) -> float:
    """A daemon's resident memory in megabytes."""
    for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise BenchError("no resident memory in /proc")


def purge(this: Round) -> None:
    """1,000,000 rows that have outlived the retention, beside as many that have not."""
    each = this.size(1000)
    fill_once(this, "fresh", 1000, each, DAY)
    fill_once(this, "old", 1000, each, DAY, age=40 * DAY)
    measure_pair(
        this,
        (table.NO_PURGE, functools.partial(without_purge, this)),
        (table.PURGE, functools.partial(during_purge, this)),
    )


def without_purge(this: Round, program: str) -> Result:
    """The daemon alone on the young rows: the other one's purge would disturb it."""
    with this.bench.section():
        daemon = saslquota(this.bench, program, this.database, "fresh")
        return run_load([daemon], this.load())


def during_purge(this: Round, program: str) -> Result:
    """A measurement that counts only when rows are purged before and after it."""
    name = ledger("old", program)
    with this.bench.section():
        before = oldest(this.database, name)
        daemon = saslquota(this.bench, program, this.database, "old")
        await_purge(this.database, name, before, 30)
        result = run_load([daemon], this.load())
        await_purge(this.database, name, oldest(this.database, name), 5)
        return result


def await_purge(database: MariaDB, name: str, before: str, seconds: float) -> None:
    """Wait until more rows have gone."""
    deadline = time.monotonic() + seconds
    while oldest(database, name) == before:
        if time.monotonic() > deadline:
            raise BenchError(f"nothing was purged for {seconds:g} s")
        time.sleep(0.05)


def oldest(database: MariaDB, name: str) -> str:
    """The time of the oldest row that a purge has left."""
    return database.sql("SELECT MIN(at) FROM sends", name)


def growth(this: Round) -> None:
    """Rows, senders and daemons in several sizes, for the pictures of --plot."""
    for what, (_, sizes) in table.GROWTH.items():
        for size in sizes if this.turn % 2 == 0 else sizes[::-1]:
            with this.bench.section():
                grow(this, what, size)


def grow(this: Round, what: str, size: int) -> None:
    """Measure one size."""
    row, label = table.growth(what, size)
    name = f"{what}{size}"
    load = this.load()
    daemons = size if what == "daemons" else 1
    if what == "rows":
        fill_once(this, name, 1000, this.size(size) // 1000 or 1, 20 * DAY)
    else:
        this.create(name)
    if what == "senders":
        load = dataclasses.replace(load, senders=size)
    if what == "daemons":
        load = dataclasses.replace(load, connections=48)
    started = [this.start(this.database, name) for _ in range(daemons)]
    this.record(row, label, lambda program: warm([d[program] for d in started], load))


def warm(daemons: list[Daemon], load: Load) -> Result:
    """A measurement once each sender has been asked for: without that, a short one on a slow disk
    measures how the pages of a large table are read."""
    run_load(daemons, Load(senders=load.senders, requests=load.senders, in_turn=True))
    return run_load(daemons, load)


def mysql(this: Round) -> None:
    """MySQL beside MariaDB."""
    if not MySQL.SERVER.exists():
        say("no MySQL: run tests/get-mysql")
        return
    other = MySQL(this.bench)
    this.create("mariadb")
    for name in this.ledgers("mysql"):
        other.create(name)
    load = this.load()
    measure_pair(
        this,
        (table.ON_MARIADB_TOO, loaded(this.start(this.database, "mariadb"), load)),
        (table.ON_MYSQL, loaded(this.start(other, "mysql"), load)),
        "16",
    )


def steady(this: Round) -> None:
    """A period shorter than the run: sends leave the windows as fast as they come."""
    period = max(1, round(this.seconds))
    load = this.load(warmup=period + 1.0)
    for name in ("filling", "sliding", "quota"):
        this.create(name)
    filling = this.start(this.database, "filling")
    sliding = this.start(this.database, "sliding", period=period)
    measure_pair(
        this, (table.FILLING, loaded(filling, load)), (table.SLIDING, loaded(sliding, load))
    )
    if done := this.results.get((table.SLIDING, table.ON_MARIADB)):
        half = max(1, int(done.rate * period / load.senders / 2))
        daemons = this.start(this.database, "quota", period=period, quota=half)
        refusing = dataclasses.replace(load, refused=REFUSAL)
        this.record(table.AT_QUOTA, table.ON_MARIADB, loaded(daemons, refusing))


def pools(this: Round) -> None:
    """Every sender in the pool of its domain and in that of the service, beside none."""
    for name in ("apart", "pooled"):
        this.create(name)
    apart = this.start(this.database, "apart")
    pooled = this.start(this.database, "pooled", pools=("@example.org", "*"))
    load = this.load()
    measure_pair(this, (table.NO_POOLS, loaded(apart, load)), (table.POOLS, loaded(pooled, load)))


def refusals(this: Round) -> None:
    """One hot sender far over its quota."""
    this.create("refused")
    daemons = this.start(this.database, "refused", quota=50)
    load = this.load(senders=1, refused=REFUSAL)
    this.record(table.REFUSED, table.ON_MARIADB, loaded(daemons, load))


def start(this: Round) -> None:
    """From the start of the process to its first reply, on an SQLite file that exists."""
    this.record(table.START, "1", functools.partial(start_five_times, this))


def start_five_times(this: Round, program: str) -> Result:
    """The median and the longest of five starts."""
    times = [start_seconds(this, program) for _ in range(5)]
    middle = statistics.median(times)
    return Result(1 / middle, middle * 1e6, max(times) * 1e6, extra=middle)


def start_seconds(this: Round, program: str) -> float:
    """Start a daemon, ask it as soon as it listens, stop it."""
    port = free_port()
    command = saslquota_command(this.bench, program, None, "start", port)
    begun = time.monotonic()
    with this.bench.section():
        this.bench.start(command, lambda: answers(port), pause=0.002)
        return time.monotonic() - begun


def answers(port: int) -> bool:
    """Whether a request is answered with OK."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            ask(connection, b"start")
    except OSError:
        return False
    return True


CASES: dict[str, Callable[[Round], None]] = {
    "millions": millions,
    "millions-sqlite": millions_sqlite,
    "hot-window": hot_window,
    "cold": cold,
    "idle": idle,
    "hostile": hostile,
    "purge": purge,
    "three-daemons": three_daemons,
    "galera": galera,
    "far": far,
    "handover": handover,
    "mysql": mysql,
    "growth": growth,
    "steady": steady,
    "pools": pools,
    "refusals": refusals,
    "outage": outage,
    "start": start,
}
