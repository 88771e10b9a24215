"""What the benchmark needs around it: tools, private servers and the load generator.

Everything started here belongs to one Bench and is stopped by its process id when the Bench is
closed, also after a failure. Data lives beside the checkout and not in /tmp, which may be a memory
file system where a commit costs nothing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parent / "saslquota.py"
DDL = HERE.parent / "mysql.sql"
VENV = HERE / ".venv"
WORK = HERE / ".work"
PYTHON = VENV / "bin" / "python"

# What is measured: this checkout's saslquota.py, the one that it is compared with, or what is not
# saslquota.
CHECKOUT, BASELINE, OTHER = "checkout", "baseline", "other"

# A command that is needed → Debian's package that brings it. Packages that set up a service are not
# installed: of MariaDB the programs alone suffice.
REQUIRED = {"mariadbd": "mariadb-server-core", "mariadb": "mariadb-client-core", "cc": "gcc"}
START_SECONDS = 30.0
STOP_SECONDS = 20.0


def say(text: str) -> None:
    """Progress goes to standard error: standard output holds the table only."""
    print(text, file=sys.stderr, flush=True)


# --- tools ---------------------------------------------------------------------------------------


def prepare() -> None:
    """Install what is missing and compile the load generator."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    WORK.mkdir(exist_ok=True)
    install_packages(REQUIRED)
    for name in REQUIRED:
        if not shutil.which(name):
            raise SystemExit(f"bench: {name} is missing: apt-get install {REQUIRED[name]}")
    make_venv()
    for name in ("load", "logsink"):
        source, program = HERE / f"{name}.c", WORK / name
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["cc", "-O2", "-Wall", "-o", program, source], check=True)


def install_packages(commands: dict[str, str]) -> None:
    """As root, install the packages of commands that are missing, but remove none for them."""
    packages = [package for command, package in commands.items() if not shutil.which(command)]
    if not importlib.util.find_spec("ensurepip"):
        packages.append("python3-venv")
    if packages and os.geteuid() == 0:
        apt_get("update")
        apt_get("install", "-y", "--no-install-recommends", "--no-remove", "libc6-dev", *packages)


def apt_get(*arguments: str, directory: Path | None = None) -> bool:
    """Run apt-get, if there is one; return whether it succeeded."""
    if not shutil.which("apt-get"):
        return False
    say(f"apt-get {' '.join(arguments)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-qq", *arguments]
    done = subprocess.run(command, cwd=directory, env=quiet, stdout=sys.stderr, check=False)
    return done.returncode == 0


def make_venv() -> None:
    """One environment for the daemon, its ceiling and the peer that is written in Python."""
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    if not has_module("mysql.connector"):
        pip_install("mysql-connector-python")


def pip_install(package: str, *options: str, required: bool = True) -> None:
    """Install into the benchmark's environment; a peer that cannot be had only loses its row."""
    say(f"installing {package}")
    command: list[str | Path] = [PYTHON, "-m", "pip", "install", "-q", *options, package]
    subprocess.run(command, stdout=sys.stderr, check=required)


def has_module(name: str) -> bool:
    """Whether the environment can import a module."""
    done = subprocess.run([PYTHON, "-c", f"import {name}"], capture_output=True, check=False)
    return done.returncode == 0


# --- processes -----------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port that is free on the loopback address now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    """Whether somebody listens on a port of the loopback address."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def busy_share(seconds: float = 0.5) -> float:
    """How much of all processors is in use now; before a round, by others than us."""
    used, total = processor_ticks()
    time.sleep(seconds)
    used_then, total_then = processor_ticks()
    return (used_then - used) / max(1, total_then - total)


def processor_ticks() -> tuple[int, int]:
    """Ticks of all processors since boot: those in use, and all."""
    line = Path("/proc/stat").read_text().partition("\n")[0]
    ticks = [int(field) for field in line.split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def stop(process: subprocess.Popen[str]) -> None:
    """End one process of ours: politely, then by force."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Bench:
    """Owns the processes and directories of one run; leaving it stops and removes them.

    It copies the saslquota.py that are measured: an edit during the run does not change them.
    """

    def __init__(self, sources: dict[str, str]) -> None:
        self.stack = contextlib.ExitStack()
        self.sources = sources  # CHECKOUT, and BASELINE when there is one
        self.sinks: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: sys.exit(1))
        self.data = self.temporary(dir=WORK)
        # Apart, because the path of a socket may have no more than 107 bytes.
        self.sockets = self.temporary(prefix="bench-")
        self.log = self.stack.enter_context((self.data / "log").open("a"))
        for program, source in self.sources.items():
            # A purge waits for an hour after the start, lest a wrong clock empties the table.
            at_once = source.replace("CLOCK_PROBATION = 3600.0", "CLOCK_PROBATION = 0.0")
            self.file(program).write_text(at_once)
        for program in (*self.sources, OTHER):
            sink = self.log_socket(program)
            self.sinks[program] = self.start([WORK / "logsink", sink], sink.exists)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def temporary(self, dir: Path | None = None, prefix: str = "") -> Path:  # noqa: A002
        """A directory that is removed at the end; in /tmp where nothing else is said."""
        made = tempfile.TemporaryDirectory(dir=dir, prefix=prefix)
        return Path(self.stack.enter_context(made))

    @contextlib.contextmanager
    def section(self) -> Iterator[None]:
        """What is started inside is stopped when it is left."""
        outer, self.stack = self.stack, contextlib.ExitStack()
        try:
            yield
        finally:
            self.stack.close()
            self.stack = outer

    def path(self, suffix: str) -> Path:
        """A new name in the data directory."""
        return self.data / f"{secrets.token_hex(4)}{suffix}"

    def start(
        self, command: Sequence[str | Path], ready: Callable[[], bool], pause: float = 0.02
    ) -> subprocess.Popen[str]:
        """Start a process, wait until it is ready, and stop it at the end."""
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, text=True
        )
        self.stack.callback(stop, process)
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{Path(command[0]).name} did not start: {self.last_words()}")
            time.sleep(pause)
        return process

    def file(self, program: str) -> Path:
        """The copy of a saslquota.py."""
        return self.data / f"saslquota-{program}.py"

    def log_socket(self, program: str) -> Path:
        """Where a program sends its log lines."""
        return self.sockets / f"log-{program}"

    def last_words(self) -> str:
        """The end of what the processes have printed."""
        return (self.data / "log").read_text(errors="replace")[-600:]

    def lines_logged(self, program: str) -> int:
        """Stop the reader of a program's log; return how many lines it has received."""
        if self.sinks[program].poll() is not None:
            return 0
        stop(self.sinks[program])
        text = (self.data / "log").read_text(errors="replace")
        return int(text.rpartition("sank ")[2].split()[0])


class BenchError(Exception):
    """One measurement could not be taken."""


# --- MariaDB -------------------------------------------------------------------------------------


class MariaDB:
    """A private server with Debian's defaults, which make every commit durable, and the options
    of --mariadbd."""

    NAME = "mariadb"
    INSTALL: tuple[str | Path, ...] = ("mariadb-install-db",)
    INSTALL_OPTIONS: tuple[str, ...] = (
        "--skip-test-db",
        "--auth-root-authentication-method=normal",
    )
    SERVER: str | Path = "mariadbd"
    CLIENT: str | Path = "mariadb"
    COUNT = (
        "SELECT COUNT(*) FROM sends WHERE account NOT LIKE 'POOL %' AND account NOT LIKE 'SPOOL%'"
    )

    def __init__(self, bench: Bench, options: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.socket = bench.sockets / f"{self.NAME}{self.port}"
        self.directory = bench.path(f".{self.NAME}")
        owner = pwd.getpwuid(os.geteuid()).pw_name
        common: list[str | Path] = [
            "--no-defaults",
            f"--datadir={self.directory}",
            f"--user={owner}",
        ]
        self.install(bench, common)
        serve = [self.SERVER, *common, f"--port={self.port}", f"--socket={self.socket}"]
        serve += ["--bind-address=127.0.0.1", f"--pid-file={self.socket}.pid"]
        serve += ["--innodb-flush-log-at-trx-commit=1", "--skip-name-resolve", *options]
        bench.start(serve, self.is_ready)
        self.user, self.password = self.make_user()

    def install(self, bench: Bench, options: Sequence[str | Path]) -> None:
        """Make its data directory."""
        command = [*self.INSTALL, *options, *self.INSTALL_OPTIONS]
        subprocess.run(command, stdout=bench.log, stderr=bench.log, check=True)

    def make_user(self) -> tuple[str, str]:
        """An account that may do everything; return its name and its password."""
        user, password = "saslquota", secrets.token_hex(8)
        self.sql(
            f"CREATE USER {user}@'127.0.0.1' IDENTIFIED BY '{password}';"
            f"GRANT ALL ON *.* TO {user}@'127.0.0.1'"
        )
        return user, password

    def is_ready(self) -> bool:
        """Whether the server answers a query."""
        return self.socket.exists() and self.client("SELECT 1").returncode == 0

    def client(self, statements: str, database: str = "") -> subprocess.CompletedProcess[str]:
        """Run statements with the command-line client, as root over the socket."""
        return subprocess.run(
            [self.CLIENT, "--no-defaults", "-N", "-B", "-u", "root", "-S", self.socket, database],
            input=statements,
            capture_output=True,
            text=True,
            check=False,
        )

    def sql(self, statements: str, database: str = "") -> str:
        """Run statements and return what they print."""
        done = self.client(statements, database)
        if done.returncode != 0:
            raise BenchError(f"MariaDB: {done.stderr.strip()}")
        return done.stdout.strip()

    def create(self, database: str) -> None:
        """A database with an empty ledger."""
        self.sql(f"DROP DATABASE IF EXISTS {database}; CREATE DATABASE {database}")
        self.sql(DDL.read_text(), database)

    def has(self, database: str) -> bool:
        """Whether a database exists."""
        return bool(self.sql(f"SHOW DATABASES LIKE '{database}'"))

    def count(self, database: str) -> int:
        """How many sends its ledger holds, without the rows of pools and spools."""
        return int(self.sql(self.COUNT, database))

    def check_count(self, database: str, accepted: int) -> None:
        """Raise BenchError unless each accepted send has its row."""
        if (rows := self.count(database)) != accepted:
            raise BenchError(f"{accepted} sends accepted, {rows} rows written")

    def settle(self) -> None:
        """Write a bulk load's dirty pages out now, not under the measurement that follows."""
        self.sql("SET GLOBAL innodb_max_dirty_pages_pct = 0")
        deadline = time.monotonic() + 120
        dirty = "SHOW GLOBAL STATUS LIKE 'Innodb_buffer_pool_pages_dirty'"
        while int(self.sql(dirty).split()[-1]) > 50 and time.monotonic() < deadline:
            time.sleep(0.2)
        self.sql("SET GLOBAL innodb_max_dirty_pages_pct = 90")


# --- saslquota -----------------------------------------------------------------------------------

PLENTY = 1_000_000_000
REFUSAL = "action=REJECT over quota"


@dataclasses.dataclass(frozen=True)
class Daemon:
    """A policy server that listens."""

    port: int
    pid: int


def ledger(name: str, program: str) -> str:
    """The database, or the SQLite file, that a saslquota.py has under a name: none is shared."""
    return f"{name}_{program}"


def saslquota(
    bench: Bench, program: str, database: MariaDB | None, name: str, **options: Any
) -> Daemon:
    """Start a saslquota.py on a database of the server, or on an SQLite file."""
    port = free_port()
    command = saslquota_command(bench, program, database, name, port, **options)
    return Daemon(port, bench.start(command, lambda: accepts(port)).pid)


def saslquota_command(
    bench: Bench, program: str, database: MariaDB | None, name: str, port: int,
    period: int = 3600, quota: int = PLENTY, pools: Sequence[str] = (),
    python: Sequence[str | Path] = (PYTHON,), **settings: object,
) -> list[str | Path]:  # fmt: skip
    """Write the two files that saslquota needs; return the command that starts it with them."""
    name = ledger(name, program)
    rule = {"period": period, "msgquota": quota, "msg": "over quota"}
    rules = dict.fromkeys(("default", *pools), rule)
    config: dict[str, object] = {
        "_bind": "127.0.0.1",
        "_bindport": port,
        "_loglevel": "INFO",
        "_loghandler": "syslog",
        "_logaddress": str(bench.log_socket(program)),
        "_quotafile": str(write_json(bench, rules)),
    }
    if database:
        config |= {"_store": "mysql", "_myhost": "127.0.0.1", "_myport": database.port}
        config |= {"_myuser": database.user, "_mypasswd": database.password, "_mydb": name}
    else:
        config |= {"_store": "sqlite", "_sqlitefile": str(bench.data / f"{name}.db")}
    return [*python, bench.file(program), "-c", write_json(bench, config | settings)]


def write_json(bench: Bench, content: dict[str, Any]) -> Path:
    """Write a JSON file and return its path."""
    path = bench.path(".json")
    path.write_text(json.dumps(content))
    return path


class MySQL(MariaDB):
    """The same with MySQL, which tests/get-mysql unpacks."""

    TOP = HERE.parent / ".mysql-tests"
    NAME = "mysql"
    OPTIONS = (f"--basedir={TOP / 'usr'}", f"--plugin-dir={TOP / 'usr/lib/mysql/plugin'}")
    INSTALL = (TOP / "bin" / "mysqld",)
    INSTALL_OPTIONS = ("--initialize-insecure", *OPTIONS)
    SERVER = TOP / "bin" / "mysqld"
    CLIENT = TOP / "bin" / "mysql"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, [*self.OPTIONS, "--secure-file-priv=NULL", "--mysqlx=OFF"])


def far_away(bench: Bench, database: MariaDB, seconds: float) -> MariaDB:
    """The same server behind a round trip of so many seconds."""
    there = copy.copy(database)
    there.port = free_port()
    delay: list[str | Path] = [
        PYTHON,
        HERE / "delay.py",
        str(there.port),
        str(database.port),
        str(seconds),
    ]
    bench.start(delay, lambda: accepts(there.port))
    return there


# --- the load ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Load:
    """What the load generator is asked to do; see the head of load.c."""

    connections: int = 16
    fresh: bool = False
    seconds: float = 3.0
    warmup: float = 1.0
    senders: int = 1000
    requests: int = 0
    slice: float = 0  # seconds
    in_turn: bool = False
    own_senders: bool = False
    accepted: str = "action=OK"
    refused: str = ""

    def arguments(self) -> list[str]:
        """The options of load.c."""
        options = ["-c", str(self.connections), "-s", str(self.senders), "-a", self.accepted]
        options += ["-r", self.refused] if self.refused else []
        options += ["-N"] if self.fresh else []
        options += ["-i", str(self.slice)] if self.slice else []
        options += ["-o"] if self.in_turn else []
        options += ["-O"] if self.own_senders else []
        if self.requests:
            return [*options, "-n", str(self.requests)]
        return [*options, "-t", str(self.seconds), "-w", str(self.warmup)]


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement; latencies in microseconds."""

    rate: float
    p50: float
    p99: float
    longest: float = 0
    accepted: int = 0
    refused: int = 0
    all_accepted: int = 0
    all_refused: int = 0
    load_cpu: float = 0
    daemon_cpu: float = 0  # microseconds of processor for each decision
    extra: float = 0
    slices: Sequence[float] = ()  # the rate in each slice, where it was asked for


def run_load(daemons: Sequence[Daemon], load: Load) -> Result:
    """Load servers; any wrong reply is a BenchError."""
    command = [str(WORK / "load"), *load.arguments(), *(str(daemon.port) for daemon in daemons)]
    before = processor_time(daemons)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(done.stderr.strip())
    result = Result(**json.loads(done.stdout))
    used = processor_time(daemons) - before
    decisions = result.all_accepted + result.all_refused
    return dataclasses.replace(result, daemon_cpu=used / decisions)


def processor_time(daemons: Sequence[Daemon]) -> float:
    """What processes have used of the processors so far, user and system, in microseconds."""
    ticks = 0
    for daemon in daemons:
        fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks * 1e6 / os.sysconf("SC_CLK_TCK")


def insert_alone(database: MariaDB, name: str, rows: int, seconds: float) -> Result:
    """One committed INSERT after the other, of that many rows, through the daemon's connector."""
    login = [str(database.port), database.user, database.password, name]
    size = [str(seconds), str(seconds / 3), str(rows)]
    command: list[str | Path] = [PYTHON, HERE / "insert.py", *login, *size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(done.stderr.strip())
    return Result(**json.loads(done.stdout))
