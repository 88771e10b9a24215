"""Real servers for the tests, all of them private.

Each has its own directory, listens on loopback ports of its own, is watched by polling with a
deadline, and is stopped by its process id. Nothing here reads or writes /etc/postfix,
/etc/sasldb2 or a system service. Most are context managers: start on entry, stop on exit.
"""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import termios
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self, TypeVar

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    "saslquota.py",
    "saslquota.json",
    "quotarules.json",
    "mysql.sql",
    "saslquota_supervisor.conf",
    "Testfile",
)
LOOPBACK = "127.0.0.1"
IS_ROOT = os.geteuid() == 0

T = TypeVar("T")
_ports_given: set[int] = set()


def wait_for(predicate: Callable[[], T], timeout: float, what: str) -> T:
    """Poll until predicate() is true and return its value; fail after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.01)
    return value


def free_port() -> int:
    """Return a loopback port that nothing else takes.

    Below the range that the kernel gives to outgoing connections (32768 and up), so that a server
    that is stopped for a while finds its port still free.
    """
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        if port not in _ports_given:
            _ports_given.add(port)
            return port


def is_listening(port: int) -> bool:
    """Tell whether something accepts connections at the loopback port."""
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


def run(
    command: Sequence[str | Path],
    *,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command that must succeed and return its standard output."""
    done = subprocess.run(
        command, input=stdin, env=env, cwd=cwd, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def clean_environment(settings: Mapping[str, object] | None = None) -> dict[str, str]:
    """Return our environment without any daemon setting but the given ones."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("_")}
    return kept | {name: str(value) for name, value in (settings or {}).items()}


def copy_shipped(directory: Path) -> Path:
    """Copy the files of a fresh clone into the directory."""
    directory.mkdir(exist_ok=True)
    for name in SHIPPED:
        shutil.copy(ROOT / name, directory)
    return directory


class Process:
    """A program of ours: its output is in a file, and its process id stops it.

    For subclasses: `command()`, `is_ready()`, and where they differ `environment()` and `cwd()`.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.output = directory / f"{name}.out"
        self._popen: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str | Path]:
        raise NotImplementedError

    def is_ready(self) -> bool:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return clean_environment()

    @property
    def pid(self) -> int:
        assert self._popen is not None, "never started"
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def log(self) -> str:
        """Return everything it has printed."""
        return self.output.read_text("utf-8", "replace") if self.output.exists() else ""

    def start(self) -> None:
        """Start it, in a session of its own so that Ctrl-C reaches only the tests, and wait."""
        with self.output.open("ab") as output:
            self._popen = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=self.environment(),
                start_new_session=True,
            )
        try:
            wait_for(lambda: not self.running or self.is_ready(), 60, f"{self.command()} is up")
            assert self.running, f"{self.command()} ended at once:\n{self.log()}"
        except BaseException:
            self.stop()
            raise

    def stop(self, signum: int = signal.SIGTERM, timeout: float = 15) -> int:
        """Signal it, wait for its end and return its exit status (SIGKILL's when it had to)."""
        if self._popen is None:
            return 0
        if self.running:
            self._popen.send_signal(signum)
            self._popen.send_signal(signal.SIGCONT)
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self._popen.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # its children, if any are left

    def kill(self) -> None:
        """End it as a power failure would."""
        self.stop(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop it from running without closing its connections."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen one go on."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


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

    def count(self, account: str) -> int:
        """Return how many rows the account has."""
        return int(self.sql(f"SELECT COUNT(*) FROM sends WHERE account = '{account}'"))


class MariaDB(Process):
    """A private MariaDB server, with every commit on disk.

    Its time zone is far from UTC, so that local time anywhere would show.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "mariadb")
        self.port = free_port()
        self.socket = directory / "mariadb.sock"
        self._databases = 0
        self._install()

    def _install(self) -> None:
        command = [
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={self.directory / 'data'}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ]
        if IS_ROOT:
            shutil.chown(self.directory, "mysql")
            command.append("--user=mysql")
        run(command)

    def command(self) -> Sequence[str | Path]:
        command = [
            "mariadbd",
            "--no-defaults",
            f"--datadir={self.directory / 'data'}",
            f"--socket={self.socket}",
            f"--pid-file={self.directory / 'mariadb.pid'}",
            f"--bind-address={LOOPBACK}",
            f"--port={self.port}",
            "--innodb-flush-log-at-trx-commit=1",
        ]
        return [*command, "--user=mysql"] if IS_ROOT else command

    def environment(self) -> dict[str, str]:
        return clean_environment() | {"TZ": "BRT3"}

    def is_ready(self) -> bool:
        return self._client("SELECT 1").returncode == 0

    def _client(self, text: str, database: str = "") -> subprocess.CompletedProcess[str]:
        command = ["mariadb", "--no-defaults", "-NB", "-uroot", f"-S{self.socket}"]
        return subprocess.run(
            [*command, database], input=text, capture_output=True, text=True, timeout=60
        )

    def sql(self, text: str, database: str = "") -> str:
        """Run SQL as root and return the rows, one a line, tabs between columns."""
        done = self._client(text, database)
        assert done.returncode == 0, f"{text}: {done.stderr}"
        return done.stdout.removesuffix("\n")

    def create_database(self, *, with_table: bool = True) -> Database:
        """Make a new database for user saslquota and import mysql.sql into it."""
        self._databases += 1
        name, user, password = f"saslquota{self._databases}", "saslquota", "secret"
        self.sql(f"CREATE DATABASE {name}")
        for host in ("localhost", LOOPBACK):
            account = f"{user}@'{host}'"
            self.sql(f"CREATE USER IF NOT EXISTS {account} IDENTIFIED BY '{password}'")
            self.sql(f"GRANT ALL ON {name}.* TO {account}")
        if with_table:
            self.sql((ROOT / "mysql.sql").read_text("utf-8"), name)
        return Database(self, name, LOOPBACK, self.port, user, password)


class Daemon(Process):
    """`python saslquota.py -c FILE` in a directory of its own; everything it logs is in log().

    config and rules are what an administrator would write into the two files; for config there
    are DEFAULTS (and a free port), and None leaves a key out. env holds settings too.
    """

    DEFAULTS: ClassVar[Mapping[str, object]] = {
        "_bind": LOOPBACK,
        "_store": "sqlite",
        "_loghandler": "stdout",
        "_loglevel": "DEBUG",
    }

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, object] | None = None,
        rules: Mapping[str, object] | None = None,
        env: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(directory, "daemon")
        self.env = env
        self.config = {**self.DEFAULTS, "_bindport": free_port(), **(config or {})}
        self.port = int(str(self.config["_bindport"]))
        self._read = 0
        self.config_file = directory / "saslquota.json"
        self.write_config()
        self.write_rules(
            rules or {"default": {"period": 3600, "msgquota": 1000, "msg": "over quota"}}
        )

    def write_config(self) -> None:
        """Write config into saslquota.json."""
        config = {key: value for key, value in self.config.items() if value is not None}
        self.config_file.write_text(json.dumps(config), "utf-8")

    def write_rules(self, rules: Mapping[str, object]) -> None:
        """Write quotarules.json, also while the daemon runs."""
        text = json.dumps(rules, ensure_ascii=False)
        (self.directory / "quotarules.json").write_text(text, "utf-8")

    def command(self) -> Sequence[str | Path]:
        return [sys.executable, ROOT / "saslquota.py", "-c", self.config_file]

    def environment(self) -> dict[str, str]:
        return clean_environment(self.env)

    def start(self) -> None:
        """Start it (again), and wait for this run's start-up line."""
        self._read = len(self.log())
        super().start()

    def is_ready(self) -> bool:
        return "listening on " in self.log()[self._read :]

    def terminate(self) -> int:
        """Stop it as supervisord does and return its exit status."""
        return self.stop(signal.SIGTERM)

    def kill9(self) -> None:
        """End it without a chance to finish anything."""
        self.kill()

    def policy(self) -> "Policy":
        """Open a connection as one smtpd process does."""
        return Policy(self.port)


class Policy:
    """Postfix's side of a policy connection: one connection, any number of requests."""

    def __init__(self, port: int, timeout: float = 20) -> None:
        self._socket = socket.create_connection((LOOPBACK, port), timeout=timeout)
        self._stream = self._socket.makefile("rb")

    @staticmethod
    def block(**attributes: object) -> bytes:
        """Return Testfile's request (a complete one of Postfix 3.7) with some values changed."""
        lines = (ROOT / "Testfile").read_text("utf-8").split("\n")
        values = dict(line.split("=", 1) for line in lines if line)
        values |= {"sasl_username": "alice@example.com"}
        values |= {name: str(value) for name, value in attributes.items()}
        text = "".join(f"{name}={value}\n" for name, value in values.items())
        return text.encode("utf-8", "surrogateescape") + b"\n"

    def ask(self, **attributes: object) -> str:
        """Send one request and return the action, without `action=`."""
        self.send(self.block(**attributes))
        return self.reply()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._socket.sendall(data)

    def reply(self) -> str:
        """Read one reply, which is exactly `action=TEXT` and an empty line."""
        line, end = self._stream.readline(), self._stream.readline()
        assert (line[:7], line[-1:], end) == (b"action=", b"\n", b"\n"), (line, end)
        return line[7:-1].decode("utf-8")

    def unread(self) -> int:
        """Tell how many bytes have come that nobody has read."""
        number = array("i", [0])
        fcntl.ioctl(self._socket, termios.FIONREAD, number)
        return number[0]

    def at_end(self) -> bool:
        """Wait until the daemon closes or sends; tell whether it closed."""
        return self._stream.read(1) == b""

    def close(self) -> None:
        """Hang up."""
        self._stream.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def uncomment_services(master: str) -> str:
    """Take the `#` from the stock submission and submissions entries of Debian's master.cf."""

    def uncomment(entry: re.Match[str]) -> str:
        return re.sub(r"^#(?=\S|  -o)", "", entry[0], flags=re.MULTILINE)

    stock = r"^#submissions?\s+inet .*\n(?:#  .*\n)+"
    master, found = re.subn(stock, uncomment, master, flags=re.MULTILINE)
    assert found == 2, "these are not Debian's stock entries"
    return master


def hook_policy(master: str) -> str:
    """Do README.md's step in master.cf: replace the empty smtpd_client_restrictions."""
    empty = r"(-o smtpd_client_restrictions=)$"
    master, found = re.subn(empty, r"\1$saslquota", master, flags=re.MULTILINE)
    assert found == 2, "the stock entries hold no empty smtpd_client_restrictions"
    return master


class Postfix(Process):
    """A private Postfix with Debian's stock submission and submissions entries, chrooted.

    saslquota is the right side of main.cf's `saslquota = ...`. main adds to main.cf or changes it,
    options adds `-o name=value` to both entries (a later -o overrides an earlier one). Users log
    in with Cyrus SASL against a sasldb in the chroot; TLS is on as the stock entries have it; all
    mail is delivered to the discard transport.
    """

    PASSWORD = "secret"

    def __init__(
        self,
        directory: Path,
        saslquota: str,
        main: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
        users: Sequence[str] = ("alice@example.com",),
    ) -> None:
        super().__init__(directory, "postfix")
        self.config = directory / "etc"
        self.queue = directory / "queue"
        self.port, self.tls_port = free_port(), free_port()
        for path in (self.config / "sasl", self.queue / "etc", directory / "data"):
            path.mkdir(parents=True)
        shutil.chown(directory / "data", "postfix")
        self._write_main({"saslquota": saslquota, **(main or {})})
        self._write_master(options or {})
        self._make_certificate()
        self._make_users(users)
        for name in ("services", "hosts", "nsswitch.conf", "resolv.conf", "host.conf"):
            if Path("/etc", name).exists():
                shutil.copy(Path("/etc", name), self.queue / "etc")

    def _write_main(self, changes: Mapping[str, str]) -> None:
        parameters = {
            "compatibility_level": "3.6",
            "queue_directory": str(self.queue),
            "data_directory": str(self.directory / "data"),
            "maillog_file": str(self.output),
            "maillog_file_prefixes": str(self.directory),
            "inet_interfaces": LOOPBACK,
            "inet_protocols": "ipv4",
            "myhostname": "mail.example.com",
            "mydestination": "",
            "alias_maps": "",
            "default_transport": "discard",
            "in_flow_delay": "0",
            # a client that tries again until its window has passed is not slowed down, nor cut off
            "smtpd_error_sleep_time": "0",
            "smtpd_hard_error_limit": "10000",
            "smtpd_junk_command_limit": "10000",
            "smtpd_peername_lookup": "no",
            "smtpd_tls_cert_file": str(self.config / "cert.pem"),
            "smtpd_tls_key_file": str(self.config / "key.pem"),
            **changes,
        }
        text = "".join(f"{name} = {value}\n" for name, value in parameters.items())
        (self.config / "main.cf").write_text(text)

    def _write_master(self, options: Mapping[str, str]) -> None:
        master = Path("/usr/share/postfix/master.cf.dist").read_text()
        master = re.sub(r"^smtp +inet .*\n", "", master, flags=re.MULTILINE)
        master = hook_policy(uncomment_services(master))
        extra = "".join(f"\n  -o {{ {name} = {value} }}" for name, value in options.items())
        for service, port in (("submission", self.port), ("submissions", self.tls_port)):
            master, found = re.subn(
                rf"^{service} +inet +n +- +[yn] (.*(?:\n  .*|\n#  .*)*)",
                rf"{LOOPBACK}:{port} inet n - y \1{extra}",
                master,
                flags=re.MULTILINE,
            )
            assert found == 1, f"no {service} entry"
        (self.config / "master.cf").write_text(master)

    def _make_certificate(self) -> None:
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test"]
        run([*make, "-keyout", self.config / "key.pem", "-out", self.config / "cert.pem"])

    def _make_users(self, users: Sequence[str]) -> None:
        (self.config / "sasl" / "smtpd.conf").write_text(
            "pwcheck_method: auxprop\nauxprop_plugin: sasldb\nmech_list: PLAIN LOGIN\n"
        )
        sasldb = self.queue / "etc" / "sasldb2"
        for user in users:
            name, domain = user.split("@")
            add = ["saslpasswd2", "-p", "-c", "-f", str(sasldb), "-u", domain, name]
            run(add, stdin=self.PASSWORD)
        shutil.chown(sasldb, group="postfix")

    def command(self) -> Sequence[str | Path]:
        # The master itself: `postfix start-fg` would put a shell between it and us.
        master = Path(self.postconf("-h", "daemon_directory").strip(), "master")
        return [master, "-c", self.config, "-s"]

    def start(self) -> None:
        """Let Postfix make its queue directories, and start it."""
        run(["postfix", "-c", self.config, "check"])
        super().start()

    def is_ready(self) -> bool:
        return "daemon started" in self.log()

    def postconf(self, *arguments: str) -> str:
        """Return what postconf says about this instance."""
        return run(["postconf", "-c", self.config, *arguments])

    def warnings(self) -> list[str]:
        """Return the log's lines of trouble, but for `postfix check` on the private sasldb2."""
        trouble = re.compile(r" (warning|error|fatal|panic): (?!.*/etc/sasldb2 differ$)")
        return [line for line in self.log().splitlines() if trouble.search(line)]

    def login(self, user: str | None = "alice@example.com") -> smtplib.SMTP:
        """Open a session at the submission entry, logged in unless user is None."""
        session = smtplib.SMTP(LOOPBACK, self.port, timeout=30)
        session.starttls(context=any_certificate())
        if user is not None:
            session.login(user, self.PASSWORD)
        return session


def any_certificate() -> ssl.SSLContext:
    """Return a client's TLS settings that take our self-signed certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Supervisor(Process):
    """A private supervisord that includes the shipped configuration, with its paths replaced.

    /opt/saslquota becomes a fresh copy of the shipped files, its Python the one that runs the
    tests, /var/log/supervisor a private directory, and the user root where the service's own does
    not exist. env reaches the daemon through supervisord's environment.
    """

    def __init__(self, directory: Path, env: Mapping[str, object] | None = None) -> None:
        super().__init__(directory, "supervisord")
        self.env = env
        self.config = directory / "supervisord.conf"
        (directory / "log").mkdir()
        copy_shipped(directory / "opt")
        (directory / "saslquota_supervisor.conf").write_text(self._program(), "utf-8")
        self.config.write_text(
            f"[unix_http_server]\nfile={directory}/control.sock\n"
            f"[supervisord]\nlogfile={directory}/supervisord.log\npidfile={directory}/pid\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
            f"[supervisorctl]\nserverurl=unix://{directory}/control.sock\n"
            f"[include]\nfiles={directory}/saslquota_supervisor.conf\n",
            "utf-8",
        )

    def _program(self) -> str:
        text = (ROOT / "saslquota_supervisor.conf").read_text("utf-8")
        for shipped, private in (
            ("/opt/saslquota/venv/bin/python", sys.executable),
            ("/opt/saslquota", str(self.directory / "opt")),
            ("/var/log/supervisor", str(self.directory / "log")),
        ):
            assert shipped in text, f"saslquota_supervisor.conf does not name {shipped}"
            text = text.replace(shipped, private)
        text, found = re.subn(r"^user=saslquota\n", "", text, flags=re.MULTILINE)
        assert found == 1, "saslquota_supervisor.conf does not run it as user saslquota"
        return text

    def command(self) -> Sequence[str | Path]:
        return ["supervisord", "--nodaemon", "--configuration", self.config]

    def environment(self) -> dict[str, str]:
        return clean_environment(self.env)

    def is_ready(self) -> bool:
        return (self.directory / "control.sock").exists()

    def ctl(self, *arguments: str) -> str:
        """Run supervisorctl and return what it says (its exit status tells states apart)."""
        control = ["supervisorctl", "--configuration", str(self.config), *arguments]
        return subprocess.run(control, capture_output=True, text=True, timeout=60).stdout

    def program_log(self) -> str:
        """Return what the daemon has printed."""
        path = self.directory / "log" / "saslquota.log"
        return path.read_text("utf-8") if path.exists() else ""

    def program_pid(self) -> int:
        """Return the daemon's process id while it is RUNNING, else 0."""
        match = re.search(r"RUNNING\s+pid (\d+)", self.ctl("status", "saslquota"))
        return int(match[1]) if match else 0
