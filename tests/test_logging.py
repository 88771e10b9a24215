"""The log: its lines to the letter, and that it never holds up a reply."""

import re
import select
import signal
import socket
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from helpers import StartDaemon
from servers.daemon import Daemon, PolicyClient
from servers.ports import LOOPBACK
from servers.process import wait_for_log

import saslquota
from saslquota import Config, log_handler, printable

MAIL = 2 << 3  # syslog's facility
LOCAL3 = 19 << 3
DEBUG, INFO, WARNING = 7, 6, 4  # syslog's severities


class Syslog:
    """A syslog daemon's socket, that is read only when the test wants it to be."""

    def __init__(self, family: socket.AddressFamily, address: str | tuple[str, int]) -> None:
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)
        self.port = 0 if isinstance(address, str) else self._socket.getsockname()[1]
        self.lines: list[str] = []

    def read(self) -> list[str]:
        """Take what has come."""
        while select.select([self._socket], [], [], 0)[0]:
            self.lines.append(self._socket.recv(1 << 20).decode("utf-8"))
        return self.lines

    def log(self) -> str:
        """Return all that has come."""
        return "\n".join(self.read())

    def drain(self) -> None:
        """Read until nothing more comes."""
        while select.select([self._socket], [], [], 0.5)[0]:
            self.read()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def open_syslog() -> Iterator[Callable[..., Syslog]]:
    with ExitStack() as stack:

        def make(family: socket.AddressFamily, address: str | tuple[str, int]) -> Syslog:
            made = Syslog(family, address)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def path(new_directory: Callable[[], Path]) -> Path:
    return new_directory() / "log"


@pytest.fixture
def syslog(open_syslog: Callable[..., Syslog], path: Path) -> Syslog:
    return open_syslog(socket.AF_UNIX, str(path))


def to_socket(path: Path, **more: object) -> dict[str, object]:
    return {"_loghandler": "syslog", "_logaddress": str(path), **more}


def texts(
    syslog: Syslog, daemon: Daemon, until: str = "", times: int = 1, facility: int = MAIL
) -> list[tuple[int, str]]:
    """Severity and text of each line, once so many match; all must have our tag."""
    if until:
        wait_for_log(syslog, until, times)
    found = []
    for line in syslog.read():
        shape = re.fullmatch(rf"<(\d+)>postfix/saslquota\[{daemon.pid}\]:(.*)", line)
        assert shape, line
        found.append((int(shape[1]) - facility, shape[2]))
    return found


def of_connections(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Without what the daemon says of itself."""
    return [(n, text) for n, text in lines if text.startswith("[") or "thread count" in text]


def ask(daemon: Daemon, *requests: dict[str, Any]) -> list[str]:
    """One connection with these requests."""
    with daemon.policy() as policy:
        return [policy.ask(**request) for request in requests]


OWNERS: dict[str, Any] = {
    "sasl_username": "contabilidade2@x.br",
    "sender": "contabilidade2@x.br",
    "recipient": "gabine@y.br",
    "client_address": "192.0.2.1",
    "instance": "1a2b.5f3a8c2e.a1b2c.0",
}
CLIENT = ", sender=contabilidade2@x.br, client_address=192.0.2.1, instance=1a2b.5f3a8c2e.a1b2c.0"
RULES = {
    "default": {"period": 86400, "msgquota": 1500, "msg": " too much "},
    "one.br": {"period": 60, "msgquota": 1, "msg": "Você já mandou 1"},
}


# --- The lines ------------------------------------------------------------------------------------


def assert_six_lines(lines: list[tuple[int, str]]) -> None:
    """As in the README of the owner, whose example is the fourth send."""
    size = len(PolicyClient.block(**OWNERS))
    assert lines[:-1] == [
        (DEBUG, "[1] thread started"),
        (DEBUG, f"[1] end of recv: ({size})"),
        (DEBUG, "[1] quota rule selected: (default)"),
        (DEBUG, "thread count: 2"),
        (
            INFO,
            "[1] sasl_username=contabilidade2@x.br, rcpt=gabine@y.br, rule=default,"
            f" quota 1/1500 (0.07%), period=86400, action=ACCEPT{CLIENT}",
        ),
    ]
    assert lines[-1][0] == DEBUG
    assert re.fullmatch(r"\[1\] thread stopped : \(\d+\.\d{4}\)", lines[-1][1])


def test_six_lines_to_a_socket(daemon: StartDaemon, syslog: Syslog, path: Path) -> None:
    running = daemon(to_socket(path), RULES)
    assert ask(running, OWNERS) == ["OK"]
    lines = texts(syslog, running, "thread stopped")
    assert_six_lines(of_connections(lines))


@pytest.mark.parametrize(("facility", "number"), [("mail", MAIL), ("local3", LOCAL3)])
def test_six_lines_over_udp(
    daemon: StartDaemon, open_syslog: Callable[..., Syslog], facility: str, number: int
) -> None:
    syslog = open_syslog(socket.AF_INET, (LOOPBACK, 0))
    config = {"_loghandler": "syslog", "_logaddress": LOOPBACK, "_logport": syslog.port}
    running = daemon({**config, "_logfacility": facility}, RULES)
    assert ask(running, OWNERS) == ["OK"]
    lines = texts(syslog, running, "thread stopped", facility=number)
    assert_six_lines(of_connections(lines))


def test_six_lines_to_stdout(daemon: StartDaemon) -> None:
    running = daemon(rules=RULES)
    assert ask(running, OWNERS) == ["OK"]
    wait_for_log(running, "thread stopped")
    tag = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} postfix/saslquota\[{running.pid}\]:(.*)"
    lines = re.findall(f"^{tag}$", running.log(), re.MULTILINE)
    found = of_connections([(DEBUG, line) for line in lines])
    found[4] = (INFO, found[4][1])
    assert_six_lines(found)


def test_the_quota_counts_up(daemon: StartDaemon, syslog: Syslog, path: Path) -> None:
    running = daemon(to_socket(path, _loglevel="INFO"), RULES)
    assert ask(running, *[OWNERS] * 4) == ["OK"] * 4
    lines = of_connections(texts(syslog, running, "action=", 4))
    assert [re.findall(r"quota .*?%\)", text) for _, text in lines] == [
        ["quota 1/1500 (0.07%)"],
        ["quota 2/1500 (0.13%)"],
        ["quota 3/1500 (0.20%)"],
        ["quota 4/1500 (0.27%)"],
    ]


def test_the_lines_of_a_refusal(daemon: StartDaemon, syslog: Syslog, path: Path) -> None:
    running = daemon(to_socket(path), RULES)
    request = {**OWNERS, "sasl_username": "A@One.br"}
    assert ask(running, request, request) == ["OK", "REJECT Você já mandou 1"]
    lines = of_connections(texts(syslog, running, "thread stopped"))
    assert [severity for severity, _ in lines] == [DEBUG] * 4 + [INFO] + [DEBUG] * 3 + [
        WARNING,
        DEBUG,
    ]
    assert lines[6][1] == "[1] quota rule selected: (one.br)"
    assert lines[8][1] == (
        "[1] sasl_username=A@One.br, rcpt=gabine@y.br, rule=one.br, quota 1/1 (100.00%),"
        f" period=60, action=REJECT{CLIENT}, msg=Você já mandou 1"
    )


def test_what_is_not_enforced_is_a_warning(daemon: StartDaemon, syslog: Syslog, path: Path) -> None:
    """And a refusal for now is one, too."""
    trial = {"period": 60, "msgquota": 0, "msg": "no", "enforce": False}
    rules = {"default": trial, "one.br": {"action": "DEFER", "enforce": True}}
    running = daemon(to_socket(path, _loglevel="INFO"), rules)
    deferred = {**OWNERS, "sasl_username": "a@one.br"}
    assert ask(running, OWNERS, deferred) == ["OK", "DEFER no"]
    (first, second) = of_connections(texts(syslog, running, "action=", 2))
    counted = "rcpt=gabine@y.br, rule={}, quota {}/0 (100.00%), period=60, action={}{}, msg=no"
    assert first == (
        WARNING,
        "[1] sasl_username=contabilidade2@x.br, "
        + counted.format("default", 1, "REJECT (not enforced)", CLIENT),
    )
    assert second == (
        WARNING,
        "[1] sasl_username=a@one.br, " + counted.format("one.br", 0, "DEFER", CLIENT),
    )


def test_the_thread_count_is_that_of_open_connections(
    daemon: StartDaemon, syslog: Syslog, path: Path
) -> None:
    running = daemon(to_socket(path), RULES)
    with running.policy() as policy:
        assert policy.ask() == "OK"
        wait_for_log(syslog, "thread count")  # which is told after the reply
        ask(running, OWNERS)
        wait_for_log(syslog, r"\[2\] thread stopped")
        assert policy.ask() == "OK"
        lines = texts(syslog, running, "thread count", 3)
    counts = [text for _, text in lines if "thread count" in text]
    assert counts == ["thread count: 2", "thread count: 3", "thread count: 2"]


@pytest.mark.parametrize(
    ("level", "severities"),
    [("INFO", [INFO, WARNING, WARNING]), ("WARNING", [WARNING, WARNING]), ("ERROR", [])],
)
def test_the_threshold(
    daemon: StartDaemon, syslog: Syslog, path: Path, level: str, severities: list[int]
) -> None:
    """Accepted, refused, and then malformed."""
    running = daemon(to_socket(path, _loglevel=level), RULES)
    with running.policy() as policy:
        assert policy.ask(sasl_username="a@one.br") == "OK"
        assert policy.ask(sasl_username="a@one.br") == "REJECT Você já mandou 1"
        policy.send(b"junk\n\n")
        assert policy.at_end()
    assert running.terminate() == 0
    assert [n for n, _ in of_connections(texts(syslog, running))] == severities


def test_without_a_login(daemon: StartDaemon, syslog: Syslog, path: Path) -> None:
    """fail2ban needs the address."""
    running = daemon(to_socket(path, _loglevel="INFO"), RULES)
    assert ask(running, {**OWNERS, "sasl_username": ""}) == ["REJECT authentication required"]
    ((severity, text),) = of_connections(texts(syslog, running, "action="))
    assert severity == WARNING
    assert "sasl_username=, rcpt=gabine@y.br, " in text
    assert "action=REJECT" in text
    assert ", client_address=192.0.2.1" in text


def test_nothing_counted_is_told_once(daemon: StartDaemon, syslog: Syslog, path: Path) -> None:
    running = daemon(to_socket(path, _loglevel="INFO"), RULES)
    request = {**OWNERS, "protocol_state": "CONNECT", "sasl_username": ""}
    assert ask(running, *[request] * 3) == ["DUNNO"] * 3
    wait_for_log(syslog, "nothing is counted")
    assert running.terminate() == 0
    lines = [line for line in texts(syslog, running) if "nothing is counted" in line[1]]
    assert lines == [(WARNING, "nothing is counted: asked at CONNECT; see smtpd_delay_reject")]


def test_the_terminal_gets_the_start_up_lines_only(
    daemon: StartDaemon, syslog: Syslog, path: Path
) -> None:
    running = daemon(to_socket(path), RULES)
    assert ask(running, OWNERS) == ["OK"]
    wait_for_log(syslog, "thread stopped")
    listening, counting, rules, logging = running.log().splitlines()
    assert f"listening on 127.0.0.1:{running.port}" in listening
    assert f"counting in SQLite {running.directory}/saslquota.db" in counting
    assert f"{running.directory}/quotarules.json: default 1500 in 86400 s; one.br 1" in rules
    assert logging == f"logging to syslog, facility mail: {path}"


# --- Values from the network ----------------------------------------------------------------------

NASTY = [
    pytest.param("a\rb", r"a\rb", id="carriage-return"),
    pytest.param("a\tb\0c\x1b[2Jd\x7f", r"a\tb\x00c\x1b[2Jd\x7f", id="control"),
    pytest.param("a\v\f\x1c\x1d\x1eb", r"a\x0b\x0c\x1c\x1d\x1eb", id="python-line-ends"),
    pytest.param("a\x85\u2028\u2029b", r"a\x85\u2028\u2029b", id="unicode-line-ends"),
    pytest.param("jo\udce3o", r"jo\udce3o", id="not-utf-8"),
    pytest.param("joão 🐁", "joão 🐁", id="printable"),
]


def is_one_line(line: str) -> bool:
    """Whether nothing in it ends a line or controls a terminal."""
    return all(unicodedata.category(c) not in {"Cc", "Cs", "Zl", "Zp"} for c in line)


@pytest.mark.parametrize(("value", "shown"), NASTY)
def test_printable(value: str, shown: str) -> None:
    assert printable(value) == shown


def nasty_request(value: str) -> dict[str, Any]:
    """All that is logged is nasty."""
    return dict.fromkeys(OWNERS, f"<{value}>")


@pytest.mark.parametrize(("value", "shown"), NASTY)
def test_a_value_never_breaks_a_line(
    daemon: StartDaemon, syslog: Syslog, path: Path, value: str, shown: str
) -> None:
    running = daemon(to_socket(path), RULES)
    request = nasty_request(value)
    asked = [request, {**request, "sasl_username": ""}, {**OWNERS, "protocol_state": value}]
    assert ask(running, *asked) == ["OK", "REJECT authentication required", "DUNNO"]
    lines = [text for _, text in texts(syslog, running, "thread stopped")]
    assert all(is_one_line(line) for line in lines)
    (accepted,) = [line for line in lines if "ACCEPT" in line]
    for name in ("sasl_username", "rcpt", "sender", "client_address", "instance"):
        assert f"{name}=<{shown}>" in accepted
    assert f"not counted (asked at {shown})" in "\n".join(lines)


def test_an_account_never_breaks_a_line(daemon: StartDaemon, syslog: Syslog, path: Path) -> None:
    """It was a value from the network once, and comes back from the store."""
    running = daemon(to_socket(path), RULES)
    ahead = (int(time.time()) + 3600) * 1_000_000
    assert ask(running, OWNERS) == ["OK"]  # now there is a table
    with closing(sqlite3.connect(running.directory / "saslquota.db")) as connection:
        row = ("a\x1bb\x7f@x.br", 1, 1, ahead, 1, 1, "", 1, b"", "")
        connection.execute("INSERT INTO sends VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.commit()
    assert ask(running, {**OWNERS, "sasl_username": "a\x1bb\x7f@x.br"}) == ["OK"]
    lines = [text for _, text in texts(syslog, running, "thread stopped", 2)]
    assert all(is_one_line(line) for line in lines)
    (error,) = [line for line in lines if "ahead of the clock" in line]
    assert r"a\x1bb\x7f@x.br" in error


def test_a_long_value_is_logged(daemon: StartDaemon, syslog: Syslog, path: Path) -> None:
    """It may be the only trace of what was refused."""
    running = daemon(to_socket(path, _loglevel="INFO"), RULES)
    request = {**OWNERS, "sasl_username": "", "recipient": "\x01" * 60_000}
    assert ask(running, request, OWNERS) == ["REJECT authentication required", "OK"]
    lines = of_connections(texts(syslog, running, "action=ACCEPT"))
    assert [severity for severity, _ in lines] == [WARNING, INFO]


def test_a_long_value_is_logged_over_udp(
    daemon: StartDaemon, open_syslog: Callable[..., Syslog]
) -> None:
    """A datagram takes 64 KiB at the most."""
    syslog = open_syslog(socket.AF_INET, (LOOPBACK, 0))
    config = {"_loghandler": "syslog", "_logaddress": LOOPBACK, "_logport": syslog.port}
    running = daemon({**config, "_loglevel": "INFO"}, RULES)
    request = {**OWNERS, "sasl_username": "", "recipient": "\x01" * 60_000}
    assert ask(running, request, OWNERS) == ["REJECT authentication required", "OK"]
    lines = of_connections(texts(syslog, running, "action=ACCEPT"))
    assert [severity for severity, _ in lines] == [WARNING, INFO]


# --- A log that does not take its lines -----------------------------------------------------------


def flood(daemon: Daemon, number: int) -> float:
    """Ask so many requests on one connection; return the slowest reply's seconds."""
    slowest = 0.0
    block = PolicyClient.block(protocol_state="VRFY")  # costs nothing, and four lines
    with daemon.policy() as policy:
        for _ in range(number // 100):
            start = time.monotonic()
            policy.send(block * 100)
            assert {policy.reply() for _ in range(100)} == {"DUNNO"}
            slowest = max(slowest, time.monotonic() - start)
    return slowest


def lost(lines: list[tuple[int, str]]) -> int:
    counts = [re.fullmatch(r"(\d+) log lines were lost", text) for _, text in lines]
    return sum(int(count[1]) for count in counts if count)


def test_a_log_that_nobody_reads(daemon: StartDaemon, syslog: Syslog, path: Path) -> None:
    running = daemon(to_socket(path), RULES)
    asked = 6000
    assert flood(running, asked) < 5
    syslog.drain()
    ask(running, OWNERS)
    lines = texts(syslog, running, "action=ACCEPT")
    assert lost(lines) > 0
    # Three lines for each request; a few for the connections and the start.
    assert asked * 3 <= len(lines) + lost(lines) <= asked * 3 + 20


def test_a_log_that_nobody_reads_holds_up_no_end(
    daemon: StartDaemon, syslog: Syslog, path: Path
) -> None:
    running = daemon(to_socket(path), RULES)
    flood(running, 1000)
    start = time.monotonic()
    assert running.stop(signal.SIGTERM) == 0
    assert time.monotonic() - start < 5
    assert len(syslog.read()) < 1000


def test_a_log_that_comes_back(
    daemon: StartDaemon, open_syslog: Callable[..., Syslog], path: Path
) -> None:
    """As a syslog daemon does that is restarted, or that starts after us."""
    running = daemon(to_socket(path), RULES)
    assert ask(running, OWNERS) == ["OK"]
    for _ in range(2):
        syslog = open_syslog(socket.AF_UNIX, str(path))
        assert ask(running, OWNERS) == ["OK"]
        wait_for_log(syslog, "thread stopped")
        syslog.close()
        path.unlink()
        assert ask(running, OWNERS) == ["OK"]


def test_nobody_listens_over_udp(daemon: StartDaemon, open_syslog: Callable[..., Syslog]) -> None:
    gone = open_syslog(socket.AF_INET, (LOOPBACK, 0))
    gone.close()
    config = {"_loghandler": "syslog", "_logaddress": LOOPBACK, "_logport": gone.port}
    assert ask(daemon(config, RULES), *[OWNERS] * 20) == ["OK"] * 20


# --- Which log ------------------------------------------------------------------------------------


TO_SYSLOG = "syslog, facility mail: "


@pytest.mark.parametrize(
    ("exists", "settings", "where"),
    [
        (True, {}, TO_SYSLOG + "/var/log/mail.log or journalctl --facility=mail"),
        (True, {"logfacility": "local3"}, "syslog, facility local3: journalctl --facility=local3"),
        (False, {}, "stdout, no /dev/log"),
        (True, {"loghandler": "stdout"}, "stdout"),
        (True, {"loghandler": "stdout", "logaddress": "192.0.2.1"}, "stdout"),
        (False, {"logaddress": "/run/log"}, TO_SYSLOG + "/run/log"),
        (False, {"logaddress": "127.0.0.1"}, TO_SYSLOG + "127.0.0.1"),
    ],
)
def test_which_log(
    monkeypatch: pytest.MonkeyPatch, exists: bool, settings: dict[str, Any], where: str
) -> None:
    """The start-up line says where an administrator finds it."""
    monkeypatch.setattr("os.path.exists", lambda path: exists if path == "/dev/log" else None)
    handler, place = log_handler(Config(path=Path("saslquota.json"), **settings))
    assert place == where
    assert isinstance(handler, saslquota.Syslog) is where.startswith("syslog")
    handler.close()


def test_a_log_host_that_does_not_exist(new_directory: Callable[[], Path]) -> None:
    """Is no reason not to serve, or one to say in one line."""
    running = Daemon(
        new_directory(), {"_loghandler": "syslog", "_logaddress": "no such host.invalid"}
    )
    try:
        running.start()
        assert ask(running, OWNERS) == ["OK"]
    except AssertionError:
        (line,) = running.log().splitlines()
        assert "_logaddress" in line
    finally:
        running.stop()
