"""What the fault tests need: a load of policy requests, an audit of the ledger after it, a Galera
cluster, and small things that break on demand."""

import itertools
import os
import re
import shutil
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from servers import (
    IS_ROOT,
    LOOPBACK,
    Daemon,
    Database,
    MariaDB,
    Policy,
    copy_shipped,
    free_port,
    run,
    wait_for,
)

from saslquota import MySQLStore

Start = Callable[..., Daemon]  # the fixture `daemon`

DBTIMEOUT = 2  # seconds: the least that may be configured
LATEST = DBTIMEOUT + 1  # when the fallback must have come
RETURN = 2  # seconds, within which sends are counted again
SLACK = 1.0  # seconds more than promised, for a machine that is busy with other things
CONFIG: Mapping[str, object] = {"_dbtimeout": DBTIMEOUT, "_loglevel": "INFO"}
SECOND = 1_000_000  # microseconds, as in the ledger


def ledger(daemon: Daemon) -> Path:
    return daemon.directory / "saslquota.db"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep everybody else from writing to an SQLite file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA busy_timeout = 10000")
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


OK = "OK"
REFUSED = "REJECT over quota"
DEFERRED = "DEFER_IF_PERMIT quota service unavailable, try again later"
LIBGALERA = Path("/usr/lib/galera/libgalera_smm.so")

# Two kinds of senders: four whose quota bites all the time, four who never reach it.
SHORT, QUOTA = 3, 60  # seconds, sends
NARROW = tuple(f"narrow{n}@quota.example" for n in range(4))
WIDE = tuple(f"wide{n}@example.com" for n in range(4))
RULES: Mapping[str, object] = {
    "quota.example": {"period": SHORT, "msgquota": QUOTA, "msg": "over quota"},
    "default": {"period": 3600, "msgquota": 1_000_000, "msg": "over quota"},
}


def limit(account: str) -> tuple[int, int]:
    """Period in seconds and quota of an account under RULES."""
    return (SHORT, QUOTA) if account in NARROW else (3600, 1_000_000)


# --- The load -------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A request that was sent, and what came back; reply is None when the connection broke."""

    account: str
    instance: str
    reply: str | None
    began: float  # monotonic seconds
    took: float  # seconds

    @property
    def ended(self) -> float:
        return self.began + self.took


class Load:
    """Some smtpd processes: persistent connections, each request with an instance of its own.

    A connection that breaks (the daemon was killed) is opened again until the load is over.
    """

    _numbers = itertools.count(1)

    def __init__(
        self,
        ports: int | Sequence[int],
        accounts: Sequence[str] = NARROW + WIDE,
        *,
        connections: int = 12,
        pause: float = 0.005,
    ) -> None:
        self.samples: list[Sample] = []
        self._ports = [ports] if isinstance(ports, int) else list(ports)
        self._accounts = accounts
        self._pause = pause
        self._name = f"{next(self._numbers):x}"
        self._stopping = threading.Event()
        self._template = Policy.block(sasl_username="{account}", instance="{instance}")
        self._threads = [
            threading.Thread(target=self._run, args=[number]) for number in range(connections)
        ]

    def _run(self, number: int) -> None:
        port = self._ports[number % len(self._ports)]
        policy: Policy | None = None
        for count in itertools.count():
            if self._stopping.wait(self._pause):
                break
            account = self._accounts[(number // len(self._ports) + count) % len(self._accounts)]
            instance = f"{self._name}.{number:x}.{count:x}"
            block = self._template.replace(b"{account}", account.encode())
            block = block.replace(b"{instance}", instance.encode())
            began, reply = time.monotonic(), None
            try:
                policy = policy or Policy(port, timeout=60)
                policy.send(block)
                reply = policy.reply()
            except (OSError, AssertionError):
                if policy:
                    policy.close()
                policy = None
            took = time.monotonic() - began
            self.samples.append(Sample(account, instance, reply, began, took))
        if policy:
            policy.close()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(70)

    def wait(
        self, reply: str, timeout: float, number: int = 1, after: float | None = None
    ) -> float:
        """Wait for so many such replies to requests that begin after now, or after another moment;
        return the seconds that this took."""
        start = time.monotonic() if after is None else after
        seen, found = len(self.samples) if after is None else 0, 0

        def arrived() -> bool:
            nonlocal seen, found
            fresh = self.samples[seen:]
            seen += len(fresh)
            found += sum(s.reply == reply and s.began >= start for s in fresh)
            return found >= number

        try:
            wait_for(arrived, timeout, f"{number} x {reply}")
        except AssertionError as error:
            got = Counter(sample.reply for sample in self.samples if sample.ended >= start)
            raise AssertionError(f"{error}; got {got}") from None
        return time.monotonic() - start

    def counts_within(self, seconds: float = RETURN) -> None:
        """Make sure that it counts again so many seconds from now."""
        took = self.wait(OK, seconds + SLACK + 5)
        assert took <= seconds + SLACK, f"it took {took:.2f} s until sends were counted again"
        self.wait(OK, 5, 50)
        self.wait(REFUSED, 10, 20)  # and the quota holds

    def accepted(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.reply == OK]

    def between(self, start: float, end: float) -> list[Sample]:
        """The requests that began in that time."""
        return [sample for sample in self.samples if start <= sample.began < end]

    def longest_wait(self) -> float:
        """The longest time that any sender was not let through, in seconds."""
        accounts = {sample.account for sample in self.samples}
        times = [[s.ended for s in self.accepted() if s.account == a] for a in accounts]
        ends = max(sample.ended for sample in self.samples)
        return max(
            later - earlier
            for account in times
            for earlier, later in itertools.pairwise([*sorted(account), ends])
        )

    def assert_answered(self, seconds: float) -> None:
        """Every request got one of our replies, and none waited longer."""
        replies = Counter(sample.reply for sample in self.samples)
        assert set(replies) <= {OK, REFUSED, DEFERRED}, replies
        assert replies[OK] > 100, replies
        slowest = max(self.samples, key=lambda sample: sample.took)
        assert slowest.took <= seconds + SLACK, slowest

    def assert_at_once(self, start: float, end: float) -> None:
        """The requests of that time were answered with the fallback, and waited for nothing."""
        samples = self.between(start, end)
        assert len(samples) > 50
        assert {sample.reply for sample in samples} == {DEFERRED}
        assert max(sample.took for sample in samples) < SLACK


def outlast(
    counting: Daemon,
    load: Load,
    trouble: AbstractContextManager[object],
    complaint: str = "",
    seconds: float = 0,
) -> None:
    """Let trouble come under load, and last: the first requests wait for the deadline, later ones
    for nothing; the log tells; and when the trouble is over, sends are counted again."""
    load.wait(OK, 10, 100)
    ends = time.monotonic() + seconds
    with trouble:
        load.wait(DEFERRED, LATEST + SLACK, 50)
        noticed = time.monotonic()
        wait_for_log(counting, f"are not counted.*{complaint}")
        pause(ends - time.monotonic())
        over = time.monotonic()
    load.counts_within()
    if seconds:
        load.assert_at_once(noticed, over)


# --- The audit ------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A row of the ledger; at in microseconds since 1970."""

    account: str
    seq: int
    at: int
    recipients: int
    total: int
    instance: str


def entries(ledger: Database | Path) -> list[Entry]:
    """All rows of a ledger in MariaDB, or in an SQLite file, in their order."""
    at = "at" if isinstance(ledger, Path) else MySQLStore.AT
    select = f"SELECT account, seq, {at}, recipients, total, instance FROM sends ORDER BY 1, 2"
    if isinstance(ledger, Path):
        with closing(sqlite3.connect(ledger, timeout=10)) as connection:
            return [Entry(*row) for row in connection.execute(select)]
    found = (line.split("\t") for line in ledger.sql(select).splitlines())
    return [Entry(a, int(seq), int(at), int(n), int(total), i) for a, seq, at, n, total, i in found]


def audit(
    rows: Sequence[Entry],
    accepted: Sequence[Sample],
    limits: Callable[[str], tuple[int, int]] = limit,
) -> None:
    """Every accepted request has exactly one row, the chains are unbroken, nobody is over quota."""
    times = Counter(row.instance for row in rows)
    assert [i for i, n in times.items() if n > 1] == [], "two rows for one request"
    assert [s for s in accepted if s.instance not in times] == [], "accepted, and not in the ledger"
    for account, group in itertools.groupby(rows, lambda row: row.account):
        chain = list(group)
        assert [row.seq for row in chain] == list(range(1, len(chain) + 1)), account
        assert [row.total for row in chain] == list(
            itertools.accumulate(row.recipients for row in chain)
        ), account
        assert all(a.at <= b.at for a, b in itertools.pairwise(chain)), f"{account}: time fell"
        assert_never_over_quota(chain, *limits(account))


def assert_never_over_quota(chain: Sequence[Entry], period: int, quota: int) -> None:
    """Look at the window that ends with each row."""
    first = used = 0
    for row in chain:
        used += row.recipients
        while chain[first].at < row.at - period * SECOND:
            used -= chain[first].recipients
            first += 1
        assert used <= quota, f"{used} of {quota} in {period} s until {row}"


def audit_all(ledger: Database | Path, load: Load) -> None:
    """The ledger holds what was accepted, and nobody waited too long."""
    load.assert_answered(LATEST)
    audit(entries(ledger), load.accepted())


# --- MariaDB --------------------------------------------------------------------------------------


@contextmanager
def session(server: MariaDB, database: str = "") -> Iterator[Any]:
    """A session of the administrator's that stays open: execute() is a cursor's."""
    import mysql.connector

    connection = mysql.connector.connect(
        unix_socket=str(server.socket),
        user="root",
        database=database or None,
        autocommit=True,
        charset="utf8mb4",
        collation="utf8mb4_bin",
    )
    try:
        yield connection.cursor()
    finally:
        with suppress(mysql.connector.Error):
            connection.close()


@contextmanager
def frozen(server: MariaDB) -> Iterator[None]:
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


@contextmanager
def changed(server: MariaDB, variable: str, value: int) -> Iterator[None]:
    """Another value of a global variable."""
    before = server.sql(f"SELECT @@GLOBAL.{variable}")
    server.sql(f"SET GLOBAL {variable} = {value}")
    try:
        yield
    finally:
        server.sql(f"SET GLOBAL {variable} = {before}")


@contextmanager
def crowded(server: MariaDB, database: Database) -> Iterator[None]:
    """Others have all the connections; the daemons have lost theirs."""
    import mysql.connector

    with session(server) as admin, changed(server, "max_connections", 10), ExitStack() as others:
        with suppress(mysql.connector.Error):  # if still more are in use
            for _ in range(9):
                others.enter_context(session(server))
        kill_connections(admin, database)
        yield


def kill_connections(admin: Any, database: Database) -> None:
    """Break every connection of the daemons' to the database, also in the middle of a query."""
    import mysql.connector

    admin.execute(
        "SELECT id FROM information_schema.processlist"
        f" WHERE user = '{database.user}' AND db = '{database.name}'"
    )
    for (number,) in admin.fetchall():
        with suppress(mysql.connector.Error):  # it may have ended meanwhile
            admin.execute(f"KILL {number}")


@contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own and of that size."""
    run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "tmpfs", directory])
    try:
        yield directory
    finally:
        run(["umount", "-l", directory])


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leave no room on the disk."""
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(b"\0" * 4096)
        yield
    finally:
        filler.unlink()


class Unprivileged(Daemon):
    """A daemon that is not root, also when the tests are. It runs a copy of the script with the
    system's Python, both of which everybody can read."""

    def __init__(self, directory: Path, *arguments: Any, **options: Any) -> None:
        super().__init__(directory, *arguments, **options)
        config, rules = self.config_file.read_bytes(), (directory / "quotarules.json").read_bytes()
        copy_shipped(directory)
        self.config_file.write_bytes(config)
        (directory / "quotarules.json").write_bytes(rules)
        if IS_ROOT:
            for path in [directory, *directory.iterdir()]:
                os.chown(path, 65534, 65534)

    def command(self) -> Sequence[str | Path]:
        drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        python = os.path.realpath(sys.executable)  # outside the virtual environment
        command: list[str | Path] = [python, self.directory / "saslquota.py"]
        command += ["-c", self.config_file]
        return [*drop, *command] if IS_ROOT else command


# --- Galera ---------------------------------------------------------------------------------------


class GaleraNode(MariaDB):
    """A member of a cluster on loopback. Only the first one's data is installed; the others copy
    it when they join."""

    OPTIONS: ClassVar[Mapping[str, str]] = {
        "gcache.size": "32M",
        "evs.keepalive_period": "PT0.3S",
        "evs.inactive_check_period": "PT0.2S",
        "evs.suspect_timeout": "PT2S",  # shorter, and a busy machine loses a node that is well
        "evs.inactive_timeout": "PT4S",
        "evs.install_timeout": "PT4S",
    }

    def __init__(self, directory: Path, number: int) -> None:
        self.number = number
        super().__init__(directory)
        self.group, self.ist, self.sst = free_port(), free_port(), free_port()
        self.members: list[GaleraNode] = []
        self.clock = directory / "clock"
        set_clock(self.clock, 0)

    def _install(self) -> None:
        if self.number == 1:
            super()._install()
            return
        data = self.directory / "data"
        data.mkdir()
        if IS_ROOT:
            shutil.chown(self.directory, "mysql")
            shutil.chown(data, "mysql")

    def command(self) -> Sequence[str | Path]:
        others = [node for node in self.members if node is not self and node.running]
        options = {
            "gmcast.listen_addr": f"tcp://{LOOPBACK}:{self.group}",
            "ist.recv_addr": f"{LOOPBACK}:{self.ist}",
            "base_port": str(self.group),
            **self.OPTIONS,
        }
        return [
            *super().command(),
            "--wsrep-on=ON",
            f"--wsrep-provider={LIBGALERA}",
            "--wsrep-cluster-name=saslquota-tests",
            "--wsrep-cluster-address=gcomm://"
            + ",".join(f"{LOOPBACK}:{node.group}" for node in others),
            f"--wsrep-node-name=node{self.number}",
            f"--wsrep-node-address={LOOPBACK}:{self.group}",
            "--wsrep-sst-method=rsync",
            f"--wsrep-sst-receive-address={LOOPBACK}:{self.sst}",
            "--wsrep-provider-options=" + ";".join(f"{k}={v}" for k, v in options.items()),
            "--binlog-format=ROW",
            "--innodb-autoinc-lock-mode=2",
            "--innodb-log-file-size=16M",
        ]

    def environment(self) -> dict[str, str]:
        return super().environment() | (faked_clock(self.clock) if libfaketime() else {})

    def status(self, name: str) -> str:
        """A value of SHOW STATUS; empty when the node does not answer."""
        done = self._client(f"SHOW STATUS LIKE '{name}'")
        return done.stdout.rpartition("\t")[2].strip() if done.returncode == 0 else ""

    def is_ready(self) -> bool:
        return self.status("wsrep_local_state_comment") == "Synced"


class Galera:
    """Three nodes, all of them in sync on entry, and gone on exit."""

    def __init__(self, new_directory: Callable[[], Path]) -> None:
        self.nodes = [GaleraNode(new_directory(), number) for number in (1, 2, 3)]
        for node in self.nodes:
            node.members = self.nodes
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            self.wait_for_size(3)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        for node in self.nodes:  # they need not agree on each one's end
            if node.running:
                node.kill()
        self._stack.close()

    def wait_for_size(self, size: int, timeout: float = 30) -> None:
        """Wait until the running, thawed nodes agree that they are so many."""
        wait_for(
            lambda: all(
                node.status("wsrep_cluster_size") == str(size) and node.is_ready()
                for node in self.nodes
                if node.running
            ),
            timeout,
            f"a cluster of {size}",
        )

    def create_database(self) -> Database:
        """A database on all nodes, of user saslquota."""
        return self.nodes[0].create_database()

    def hosts(self, first: int) -> list[str]:
        """What a daemon beside that node lists as _myhost: each has an order of its own."""
        ports = [node.port for node in self.nodes]
        return [f"{LOOPBACK}:{port}" for port in ports[first:] + ports[:first]]


# --- Clocks ---------------------------------------------------------------------------------------


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


def set_clock(offset: Path, seconds: int) -> None:
    """Put a faked clock ahead, or back."""
    new = offset.with_suffix(".new")
    new.write_text(f"{seconds:+d}\n", "utf-8")
    new.chmod(0o644)
    new.replace(offset)


CLOCK_RULES: Mapping[str, object] = {
    "default": {"period": 2, "msgquota": 60, "msg": "over quota"},
}


def set_clock_under_load(offset: Path, load: Load) -> None:
    """Ahead by 4 s, back, back by 4 s more, and 5 minutes ahead: each time until it is at rest."""
    load.wait(REFUSED, 10, 20)
    for seconds in (4, 0, -4, 300):
        set_clock(offset, seconds)
        pause(2.5)  # until the file and then the clock are read
        load.wait(OK, 4 + 2 + SLACK, 20)
        load.wait(REFUSED, 10, 20)


def audit_clocked(rows: Sequence[Entry], load: Load) -> None:
    """Never over quota by the ledger's own times; nobody locked out for longer than the quota's
    period, the difference of the clocks, the second in which a clock may be
    trusted, and the one in which the fake is."""
    audit(rows, load.accepted(), lambda _: (2, 60))
    load.assert_answered(SLACK)
    assert load.longest_wait() <= 2 + 4 + 1 + 1 + SLACK
    assert rows[-1].at > time.time_ns() // 1000 + 250 * SECOND, "the clock was not faked"


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


def wait_for_log(daemon: Daemon, pattern: str) -> None:
    """Wait until the daemon has logged a line that matches."""
    told = [""]

    def is_told() -> bool:
        told[0] = daemon.log()
        return re.search(pattern, told[0]) is not None

    try:
        wait_for(is_told, 5, f"a log line with {pattern}")
    except AssertionError:
        plain = [line for line in told[0].splitlines() if "sasl_username=" not in line]
        raise AssertionError(f"no log line with {pattern}:\n" + "\n".join(plain)) from None


def pause(seconds: float) -> None:
    """Let a fault last."""
    end = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() > end, seconds + 10, "some time")
