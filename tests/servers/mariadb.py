"""A private MariaDB server, and what goes wrong with one."""

import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers.ports import LOOPBACK, free_port
from servers.process import IS_ROOT, ROOT, Process, clean_environment, run


@dataclass(frozen=True)
class Database:
    """One database on a private server, made as README.md says."""

    server: "MariaDB"
    name: str
    host: str
    port: int
    user: str
    password: str

    def config(self) -> dict[str, object]:
        """Return the daemon's settings for this database."""
        return {
            "_store": "mysql",
            "_myhost": self.host,
            "_myport": self.port,
            "_myuser": self.user,
            "_mypasswd": self.password,
            "_mydb": self.name,
        }

    def sql(self, text: str) -> str:
        """Run SQL in this database as the administrator."""
        return self.server.sql(text, self.name)


class MariaDB(Process):
    """A private MariaDB server, with every commit on disk.

    Its time zone is far from UTC, so that local time anywhere would show.
    """

    USER = "mysql"  # whose it is, when root starts it
    CLIENT: str | Path = "mariadb"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "mariadb")
        self.port = free_port()
        self.socket = directory / "mariadb.sock"
        self._databases = 0
        self._make_directories("tmp")
        self._install()

    def _install(self) -> None:
        run(
            [
                "mariadb-install-db",
                *self._options(),
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            ]
        )

    def _make_directories(self, *names: str) -> None:
        """Make these, of the server's own user, who gets ours, too."""
        for path in (self.directory, *(self.directory / name for name in names)):
            path.mkdir(exist_ok=True)
            if IS_ROOT:
                shutil.chown(path, self.USER)

    def _options(self) -> list[str]:
        """Options for the server and for its installation.

        Each has a tmpdir of its own: a server that starts deletes what looks like a forgotten
        temporary table there, and another one may be using it.
        """
        options = [
            "--no-defaults",
            f"--datadir={self.directory / 'data'}",
            f"--tmpdir={self.directory / 'tmp'}",
        ]
        return [*options, f"--user={self.USER}"] if IS_ROOT else options

    def command(self) -> Sequence[str | Path]:
        return [
            "mariadbd",
            *self._options(),
            f"--socket={self.socket}",
            f"--pid-file={self.directory / 'mariadb.pid'}",
            f"--bind-address={LOOPBACK}",
            f"--port={self.port}",
            "--innodb-flush-log-at-trx-commit=1",
        ]

    def environment(self) -> dict[str, str]:
        return clean_environment() | {"TZ": "BRT3"}

    def is_ready(self) -> bool:
        return self._listens() and self._client("SELECT 1").returncode == 0

    def _listens(self) -> bool:
        """Tell whether it is worth the start of a client, which takes 20 times as long to see."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def _client(self, text: str, database: str = "") -> subprocess.CompletedProcess[str]:
        command = [self.CLIENT, "--no-defaults", "-NB", "-uroot", f"-S{self.socket}"]
        return subprocess.run(
            [*command, database], input=text, capture_output=True, text=True, timeout=60
        )

    def sql(self, text: str, database: str = "") -> str:
        """Run SQL as root and return the rows, one a line, tabs between columns."""
        done = self._client(text, database)
        assert done.returncode == 0, f"{text}: {done.stderr}"
        return done.stdout.removesuffix("\n")

    def create_database(self, name: str = "", *, with_table: bool = True) -> Database:
        """Make a new database for user saslquota and import mysql.sql into it."""
        self._databases += 1
        name = name or f"saslquota{self._databases}"
        user, password = "saslquota", "secret"
        text = f"CREATE DATABASE {name};"
        for host in ("localhost", LOOPBACK):
            account = f"{user}@'{host}'"
            text += f"CREATE USER IF NOT EXISTS {account} IDENTIFIED BY '{password}';"
            text += f"GRANT ALL ON {name}.* TO {account};"
        if with_table:
            text += f"USE {name};\n" + (ROOT / "mysql.sql").read_text("utf-8")
        self.sql(text)
        return Database(self, name, LOOPBACK, self.port, user, password)


class SmallMariaDB(MariaDB):
    """A server whose log leaves most of a small disk to the tables."""

    def command(self) -> Sequence[str | Path]:
        return [*super().command(), "--innodb-log-file-size=8M"]


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
def killed(server: MariaDB) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextmanager
def changed(server: MariaDB, variable: str, value: int | str) -> Iterator[None]:
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
    before = server.sql("SELECT @@GLOBAL.max_connections")
    with ExitStack() as stack:
        admin = stack.enter_context(session(server))
        stack.callback(admin.execute, f"SET GLOBAL max_connections = {before}")
        for _ in range(9):
            stack.enter_context(session(server))
        admin.execute("SET GLOBAL max_connections = 10")  # the least that there is
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


LOCKS = {
    "read": "SELECT COUNT(*) FROM sends WHERE account = '{}' FOR UPDATE",
    "appended": "INSERT INTO sends VALUES ('{}', 1000000, 1, '2030-01-01', 0, 0, '', 1, '', '')",
    "beyond": "SELECT COUNT(*) FROM sends WHERE account = '{}' AND seq > 1000000 FOR UPDATE",
}


@contextmanager
def rows_locked(database: Database, accounts: Sequence[str], lock: str = "read") -> Iterator[None]:
    """Keep another session's transaction open."""
    reads = [LOCKS[lock].format(account) for account in accounts]
    with _held(database.server, "BEGIN", *reads, database=database.name):
        yield


def tables_locked(server: MariaDB) -> AbstractContextManager[None]:
    """For reading, as backups do: nothing can be written."""
    return _held(server, "FLUSH TABLES WITH READ LOCK")


def commits_stopped(server: MariaDB) -> AbstractContextManager[None]:
    """What is written waits in its COMMIT. (MySQL cannot.)"""
    return _held(server, "BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT")


@contextmanager
def _held(server: MariaDB, *statements: str, database: str = "") -> Iterator[None]:
    """Keep a session open that has run these: so long its locks last."""
    with session(server, database) as admin:
        for statement in statements:
            admin.execute(statement)
            if admin.with_rows:
                admin.fetchall()
        yield
