"""The daemon of a test, and Postfix's side of a connection to it."""

import fcntl
import grp
import json
import pwd
import select
import shutil
import signal
import socket
import sys
import termios
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from servers.ports import LOOPBACK, free_port
from servers.process import IS_ROOT, ROOT, Process, clean_environment, with_module

SHIPPED = (
    "saslquota.py",
    "saslquotactl.py",
    "saslquotapage.py",
    "saslquotawatch.py",
    "saslquota.json",
    "quotarules.json",
    "mysql.sql",
    "saslquota_supervisor.conf",
    "Testfile",
)


def copy_shipped(directory: Path) -> Path:
    """Copy the files of a fresh clone into the directory."""
    directory.mkdir(exist_ok=True)
    for name in SHIPPED:
        shutil.copy(ROOT / name, directory)
    return directory


class Daemon(Process):
    """`python -m saslquota -c FILE` in a directory of its own; everything it logs is in log().

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
        return [sys.executable, "-m", "saslquota", "-c", self.config_file]

    def environment(self) -> dict[str, str]:
        return with_module(clean_environment(self.env))

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

    @property
    def ledger(self) -> Path:
        """The SQLite file, when the configuration names no other."""
        return self.directory / "saslquota.db"

    def policy(self) -> "PolicyClient":
        """Open a connection as one smtpd process does."""
        return PolicyClient(self.port)


SERVICE = "nobody"  # in the place of user saslquota


def as_user(name: str) -> list[str | Path]:
    """Begin a command of Python's that runs as this user, in its own group only."""
    group = grp.getgrgid(pwd.getpwnam(name).pw_gid).gr_name
    # The interpreter itself: the tests' virtual environment may be out of the user's reach.
    python = Path(sys.executable).resolve()
    return ["setpriv", f"--reuid={name}", f"--regid={group}", "--clear-groups", python]


class Unprivileged(Daemon):
    """A daemon that is not root, also when the tests are, and that may write to nothing but its own
    directory."""

    def __init__(self, directory: Path, *arguments: Any, **options: Any) -> None:
        super().__init__(directory, *arguments, **options)
        shutil.copy(ROOT / "saslquota.py", directory)
        if IS_ROOT:
            for path in [directory, *directory.iterdir()]:
                shutil.chown(path, SERVICE)

    def command(self) -> Sequence[str | Path]:
        python = as_user(SERVICE) if IS_ROOT else [sys.executable]
        return [*python, self.directory / "saslquota.py", "-c", self.config_file]


class PolicyClient:
    """Postfix's side of a policy connection: one connection, any number of requests."""

    def __init__(self, address: int | str | tuple[str, int], timeout: float = 20) -> None:
        """Connect to a loopback port, a Unix socket's path, or a host and port."""
        if isinstance(address, str):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(timeout)
            self._socket.connect(address)
        else:
            host_and_port = (LOOPBACK, address) if isinstance(address, int) else address
            self._socket = socket.create_connection(host_and_port, timeout=timeout)
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

    def status(self) -> dict[str, str]:
        """Ask the daemon how it is."""
        self.send(b"request=status\n\n")
        lines = iter(self._stream.readline, b"\n")
        return dict(line.decode().rstrip("\n").split("=", 1) for line in lines)

    def unread(self) -> int:
        """Tell how many bytes have come that nobody has read."""
        number = array("i", [0])
        fcntl.ioctl(self._socket, termios.FIONREAD, number)
        return number[0]

    def at_end(self) -> bool:
        """Wait until the daemon closes or sends; tell whether it closed."""
        return self._stream.read(1) == b""

    def is_closed(self) -> bool:
        """Tell whether the daemon has closed the connection, without waiting."""
        readable, _, _ = select.select([self._socket], [], [], 0)
        if not readable:
            return False
        try:
            return self._socket.recv(1, socket.MSG_PEEK) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        """Hang up."""
        self._stream.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
