"""The real daemon over real sockets: connections, time-outs, limits and signals."""

import json
import os
import re
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from helpers import SMALL, WHOLE, StartDaemon, in_background
from servers.audit import count_rows
from servers.daemon import Daemon, PolicyClient
from servers.disk import locked
from servers.ports import LOOPBACK, free_port, is_listening
from servers.process import ROOT, clean_environment, wait_for, wait_for_log

ONE_EACH = {"default": {"period": 3600, "msgquota": 1, "msg": "over quota"}}


def subprocess_of(daemon: Daemon) -> subprocess.Popen[bytes]:
    assert daemon._popen
    return daemon._popen


def run_once(directory: Path) -> subprocess.CompletedProcess[str]:
    """Start a daemon that cannot start."""
    return subprocess.run(
        [sys.executable, ROOT / "saslquota.py", "-c", directory / "saslquota.json"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=10,
    )


# --- A connection ---------------------------------------------------------------------------------


def test_a_connection_stays_open(daemon: StartDaemon) -> None:
    running = daemon()
    with running.policy() as policy:
        assert [policy.ask() for _ in range(20)] == ["OK"] * 20
        assert not policy.is_closed()


def test_nothing_follows_a_reply(daemon: StartDaemon) -> None:
    """Postfix takes stray bytes for a broken connection."""
    with daemon().policy() as policy:
        policy.ask()
        policy.send(b"\n")
        assert policy.at_end()


def test_testfile_is_answered_and_ended(daemon: StartDaemon) -> None:
    with daemon().policy() as policy:
        policy.send((ROOT / "Testfile").read_bytes())
        assert policy.reply() == "OK"
        assert policy.at_end()


def test_many_in_one_send(daemon: StartDaemon) -> None:
    running = daemon(rules={"default": {"period": 3600, "msgquota": 150, "msg": "over quota"}})
    with running.policy() as policy:
        policy.send(PolicyClient.block() * 200)
        assert [policy.reply() for _ in range(200)] == ["OK"] * 150 + ["REJECT over quota"] * 50
        assert policy.ask(sasl_username="bob") == "OK"


def test_in_small_pieces(daemon: StartDaemon) -> None:
    with daemon().policy() as policy:
        for byte in PolicyClient.block():
            policy.send(bytes([byte]))
        assert policy.reply() == "OK"


def test_a_client_that_sends_and_hangs_up_one_way(daemon: StartDaemon) -> None:
    """As `netcat -N` does with a file that lacks the closing empty request."""
    with daemon().policy() as policy:
        policy.send(PolicyClient.block())
        policy._socket.shutdown(socket.SHUT_WR)
        assert policy.reply() == "OK"
        assert policy.at_end()


def test_a_client_that_hangs_up_before_the_reply(daemon: StartDaemon) -> None:
    running = daemon()
    for _ in range(20):
        with running.policy() as policy:
            policy.send(PolicyClient.block() * 3)
    with running.policy() as policy:
        assert policy.ask(sasl_username="bob") == "OK"
    assert "Traceback" not in running.log()


def test_each_connection_is_served_at_once(daemon: StartDaemon) -> None:
    """Postfix keeps one for each smtpd process; none may wait for another."""
    running = daemon()
    with ExitStack() as stack:
        policies = [stack.enter_context(running.policy()) for _ in range(300)]
        for policy in policies:
            policy.send(PolicyClient.block())
        assert [policy.reply() for policy in policies] == ["OK"] * 300
        assert policies[0].ask() == "OK"


MALFORMED = [
    pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n\n", id="http"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\n\n", id="tls"),
    pytest.param(
        PolicyClient.block().replace(b"request=smtpd_access_policy\n", b""), id="no-request"
    ),
    pytest.param(PolicyClient.block(request="junk"), id="other-request"),
    pytest.param(PolicyClient.block(recipient_count="-1"), id="recipient-count"),
    pytest.param(PolicyClient.block(recipient_count="1000001"), id="too-many-recipients"),
    pytest.param(PolicyClient.block()[:-1] + b"no equals sign\n\n", id="no-equals-sign"),
    pytest.param(PolicyClient.block(sender="x" * 65536), id="oversize"),
    pytest.param(b"x" * 70000, id="oversize-without-a-newline"),
    pytest.param(PolicyClient.block()[:-1] + b"a=\n" * 256 + b"\n", id="too-many-attributes"),
]


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_input(daemon: StartDaemon, data: bytes) -> None:
    running = daemon(rules=ONE_EACH)
    with running.policy() as other, running.policy() as policy:
        assert other.ask(sasl_username="bob") == "OK"
        policy.send(data)
        with suppress(ConnectionResetError):  # it closed with some of our bytes unread
            assert policy.at_end()
        assert other.ask(sasl_username="bob") == "REJECT over quota"
        assert other.ask() == "OK"  # alice's first
    wait_for_log(running, "thread stopped", 2)
    (warning,) = wait_for_log(running, "malformed")
    assert re.search(r"postfix/saslquota\[\d+\]:\[2\] malformed input", warning)
    assert count_rows(running.ledger) == 2


def test_half_a_request(daemon: StartDaemon) -> None:
    running = daemon(rules=ONE_EACH)
    with running.policy() as policy:
        policy.send(PolicyClient.block()[:-1])
        policy._socket.shutdown(socket.SHUT_WR)
        assert policy.at_end()
    with running.policy() as policy:
        assert policy.ask() == "OK"
    assert len(wait_for_log(running, "malformed")) == 1


def test_what_came_before_malformed_input_is_answered(daemon: StartDaemon) -> None:
    with daemon().policy() as policy:
        policy.send(PolicyClient.block() * 2 + b"junk\n\n" + PolicyClient.block())
        assert [policy.reply() for _ in range(2)] == ["OK"] * 2
        assert policy.at_end()


# --- Where it listens -----------------------------------------------------------------------------


def has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.parametrize("host", [LOOPBACK, "localhost", *(["::1"] if has_ipv6() else [])])
def test_tcp(daemon: StartDaemon, host: str) -> None:
    running = daemon({"_bind": host})
    shown = re.search(r"listening on (\S+),", running.log())
    assert shown
    address = shown[1].rpartition(":")[0].strip("[]")
    with PolicyClient((address, running.port)) as policy:
        assert policy.ask() == "OK"
        assert policy.ask() == "OK"


def test_a_unix_socket(daemon: StartDaemon, new_directory: Callable[[], Path]) -> None:
    path = new_directory() / "policy"
    running = daemon({"_bind": f"unix:{path}", "_allow": "192.0.2.1"})  # _allow is for TCP
    assert f"listening on unix:{path}," in running.log()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with PolicyClient(str(path)) as policy:
        assert policy.ask() == "OK"
        assert policy.ask() == "OK"
    assert running.terminate() == 0
    assert not path.exists()


def test_a_unix_socket_beside_the_configuration(daemon: StartDaemon) -> None:
    running = daemon({"_bind": "unix:policy"})
    with PolicyClient(str(running.directory / "policy")) as policy:
        assert policy.ask() == "OK"


def test_a_relative_unix_socket_is_beside_the_configuration(
    new_directory: Callable[[], Path],
) -> None:
    """Not in the directory where the daemon was started, which is / under an init system."""
    running = Daemon(new_directory(), {"_bind": "unix:policy"})
    elsewhere = running.directory = new_directory()
    with running:
        assert (running.config_file.parent / "policy").is_socket()
        assert not (elsewhere / "policy").exists()


def test_the_socket_of_a_dead_daemon_is_replaced(
    daemon: StartDaemon, new_directory: Callable[[], Path]
) -> None:
    path = new_directory() / "policy"
    running = daemon({"_bind": f"unix:{path}"})
    running.kill9()
    assert path.is_socket()
    running.start()
    with PolicyClient(str(path)) as policy:
        assert policy.ask() == "OK"


def test_the_socket_of_a_live_daemon_is_not(
    daemon: StartDaemon, new_directory: Callable[[], Path]
) -> None:
    path = new_directory() / "policy"
    daemon({"_bind": f"unix:{path}"})
    second = Daemon(new_directory(), {"_bind": f"unix:{path}"})
    assert_no_start(second, f"cannot listen on unix:{path}: Address already in use")
    with PolicyClient(str(path)) as policy:
        assert policy.ask() == "OK"


def test_a_file_in_the_place_of_the_socket_is_kept(new_directory: Callable[[], Path]) -> None:
    path = new_directory() / "precious"
    path.write_text("not a socket", "utf-8")
    second = Daemon(new_directory(), {"_bind": f"unix:{path}"})
    assert_no_start(second, f"cannot listen on unix:{path}: ")
    assert path.read_text("utf-8") == "not a socket"


def assert_no_start(daemon: Daemon, reason: str) -> None:
    done = run_once(daemon.directory)
    (line,) = done.stdout.splitlines() + done.stderr.splitlines()
    assert line.startswith(f"saslquota: {daemon.config_file}: {reason}")
    assert "_bind" in line
    assert done.returncode == 1


def test_a_port_in_use(daemon: StartDaemon, new_directory: Callable[[], Path]) -> None:
    running = daemon()
    second = Daemon(new_directory(), {"_bindport": running.port})
    assert_no_start(second, f"cannot listen on 127.0.0.1:{running.port}: Address already in use")
    with running.policy() as policy:
        assert policy.ask() == "OK"


@pytest.mark.parametrize(
    "bind", ["192.0.2.1", "not an address", "", "unix:", "unix:/no/such/directory/policy"]
)
def test_an_address_that_is_not_ours(new_directory: Callable[[], Path], bind: str) -> None:
    assert_no_start(Daemon(new_directory(), {"_bind": bind}), "cannot listen on ")


def test_restarting_at_once(daemon: StartDaemon) -> None:
    """The port of connections that the daemon closed itself is free again at once."""
    running = daemon()
    with running.policy() as policy:
        policy.send(b"junk\n\n")
        assert policy.at_end()
        assert running.terminate() == 0
    running.start()
    with running.policy() as policy:
        assert policy.ask() == "OK"


# --- _bindtimeout ---------------------------------------------------------------------------------


def wait_until_closed(policy: PolicyClient) -> None:
    wait_for(lambda: policy.is_closed(), 5, "the daemon closes the connection")


@pytest.mark.parametrize("begun", [b"", b"r", PolicyClient.block()[:-1]])
def test_the_first_request_has_a_deadline(daemon: StartDaemon, begun: bytes) -> None:
    running = daemon({"_bindtimeout": 1})
    start = time.monotonic()
    with running.policy() as policy:
        policy.send(begun)
        wait_until_closed(policy)
        assert time.monotonic() - start > 0.9
        assert policy.at_end()
    wait_for_log(running, "_bindtimeout")
    assert "malformed" not in running.log()


def test_a_request_that_has_begun_has_a_deadline(daemon: StartDaemon) -> None:
    with daemon({"_bindtimeout": 1}).policy() as policy:
        assert policy.ask() == "OK"
        start = time.monotonic()
        policy.send(PolicyClient.block() + PolicyClient.block()[:100])
        assert policy.reply() == "OK"
        wait_until_closed(policy)
        assert time.monotonic() - start > 0.9


def test_the_deadline_is_one_for_the_whole_request(daemon: StartDaemon) -> None:
    """A byte now and then does not put it off."""
    start = time.monotonic()
    with daemon({"_bindtimeout": 1}).policy() as policy, suppress(ConnectionError):
        while not policy.is_closed():
            assert time.monotonic() - start < 10
            policy.send(b"x")
            select.select([policy._socket], [], [], 0.1)


def test_between_requests_there_is_no_deadline(daemon: StartDaemon) -> None:
    running = daemon({"_bindtimeout": 1})
    with running.policy() as idle:
        assert idle.ask() == "OK"
        for _ in range(3):  # each takes the daemon a second to close
            with running.policy() as clock:
                wait_until_closed(clock)
        assert not idle.is_closed()
        assert idle.ask() == "OK"


@pytest.mark.parametrize("data", [WHOLE * 100, SMALL * 100], ids=["whole", "begun"])
def test_a_reply_that_is_not_taken_has_a_deadline(
    daemon: StartDaemon, new_directory: Callable[[], Path], data: bytes
) -> None:
    """Not taken: the buffers on the way are full. Whether a part of the next request has come,
    too, makes no difference."""
    path = str(new_directory() / "policy")
    running = daemon({"_bind": f"unix:{path}", "_bindtimeout": 1, "_loglevel": "INFO"})
    with PolicyClient(path) as policy, suppress(ConnectionError, TimeoutError):
        policy.send(WHOLE)
        assert policy.reply() == "DUNNO"
        policy._socket.settimeout(5)
        while True:
            policy.send(data)
    wait_for_log(running, "_bindtimeout")
    with PolicyClient(path) as policy:
        assert policy.ask() == "OK"


def taken(policy: PolicyClient) -> bool:
    """Whether there is room on the way for one more reply that is not read."""
    before = policy.unread()
    policy.send(WHOLE)
    try:
        return wait_for(lambda: policy.unread() > before, 0.5, "a reply")
    except AssertionError:
        return False


def fill(policy: PolicyClient) -> int:
    """Ask until a reply finds no room on the way; return how many did."""
    return sum(1 for _ in iter(lambda: taken(policy), False))


def test_a_reply_that_finds_no_room_comes_when_there_is(
    daemon: StartDaemon, new_directory: Callable[[], Path]
) -> None:
    """Whichever thread had the answer: nothing is lost, and the connection is served on."""
    path = str(new_directory() / "policy")
    running = daemon({"_bind": f"unix:{path}", "_loglevel": "INFO"})

    with PolicyClient(path) as policy, PolicyClient(path) as second, PolicyClient(path) as other:
        room = fill(policy)
        assert [policy.reply() for _ in range(room + 1)] == ["DUNNO"] * (room + 1)
        assert policy.ask() == "OK"
        assert all(taken(second) for _ in range(room))
        with locked(running.ledger):
            other.send(PolicyClient.block())
            second.send(PolicyClient.block())
        assert other.reply() == "OK"
        assert [second.reply() for _ in range(room)] == ["DUNNO"] * room
        assert [second.reply(), second.ask()] == ["OK"] * 2


# --- Limits ---------------------------------------------------------------------------------------


def test_the_connection_idle_longest_makes_room(daemon: StartDaemon) -> None:
    running = daemon({"_maxconnections": 3})
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(running.policy()) for _ in range(3))
        for policy in (first, second, third, first):
            assert policy.ask() == "OK"
        fourth = stack.enter_context(running.policy())
        assert fourth.ask() == "OK"
        assert second.at_end()
        assert [policy.ask() for policy in (first, third, fourth)] == ["OK"] * 3
    (warning,) = wait_for_log(running, "_maxconnections")
    assert ":[2] " in warning


def test_a_request_under_way_does_not_make_room(daemon: StartDaemon) -> None:
    running = daemon({"_maxconnections": 3})
    with running.policy() as idle, running.policy() as busy, running.policy() as third:
        # Once the second is decided, nothing of the first is under way.
        assert [idle.ask(), busy.ask()] == ["OK"] * 2
        with locked(running.ledger):
            busy.send(PolicyClient.block())
            for _ in range(50):  # by then the request before is under way, too
                third.send(SMALL)
                assert third.reply() == "DUNNO"
            with running.policy() as other:
                assert idle.at_end()
                other.send(SMALL)
                assert other.reply() == "DUNNO"
        assert busy.reply() == "OK"


def test_a_reply_under_way_does_not_make_room(
    daemon: StartDaemon, new_directory: Callable[[], Path]
) -> None:
    path = str(new_directory() / "policy")
    daemon({"_bind": f"unix:{path}", "_maxconnections": 2, "_loglevel": "INFO"})
    with PolicyClient(path) as full, PolicyClient(path) as idle:
        room = fill(full)
        assert idle.ask() == "OK"
        with PolicyClient(path) as other:
            assert other.ask() == "OK"
        assert idle.at_end()
        assert [full.reply() for _ in range(room + 1)] == ["DUNNO"] * (room + 1)


def test_one_that_has_just_connected_does_not_make_room(daemon: StartDaemon) -> None:
    """While idle ones exist: it is going to ask."""
    running = daemon({"_maxconnections": 50, "_loglevel": "INFO"})
    with ExitStack() as stack:
        idle = [stack.enter_context(running.policy()) for _ in range(45)]
        assert [policy.ask() for policy in idle] == ["OK"] * 45
        fresh = [stack.enter_context(running.policy()) for _ in range(30)]
        for policy in fresh:
            policy.send(PolicyClient.block())
        assert [policy.reply() for policy in fresh] == ["OK"] * 30
        assert all(policy.at_end() for policy in idle[:20])
        assert [policy.ask() for policy in idle[-15:]] == ["OK"] * 15


def test_a_request_that_comes_while_room_is_made(daemon: StartDaemon) -> None:
    """It is answered or never read: what is charged has its reply."""
    running = daemon({"_maxconnections": 8, "_loglevel": "INFO"})
    accepted = 0

    def ask_on() -> None:
        nonlocal accepted
        with running.policy() as policy, suppress(OSError, AssertionError):
            for _ in range(5):
                assert policy.ask(sasl_username="a@b.example") == "OK"
                accepted += 1

    with ThreadPoolExecutor(1) as asker, in_background(lambda: running.policy().close()):
        for _ in range(40):
            asker.submit(ask_on).result()
    assert running.terminate() == 0
    assert count_rows(running.ledger, "a@b.example") == accepted
    assert "connection ended inside a request" not in running.log()


def test_a_burst_of_connections(daemon: StartDaemon) -> None:
    running = daemon({"_maxconnections": 5, "_loglevel": "INFO"})
    with ExitStack() as stack:
        policies = [stack.enter_context(running.policy()) for _ in range(60)]
        assert stack.enter_context(running.policy()).ask() == "OK"
        wait_for(lambda: sum(not p.is_closed() for p in policies) <= 4, 5, "four others are left")


def test_allow(daemon: StartDaemon) -> None:
    running = daemon({"_allow": "192.0.2.0/24, ::1"})
    with running.policy() as policy:
        with suppress(ConnectionError):
            policy.send(PolicyClient.block())
        with suppress(ConnectionError):
            assert policy.at_end()
    (warning,) = wait_for_log(running, "refused")
    assert "connection from 127.0.0.1 refused, see _allow" in warning


@pytest.mark.parametrize("bind", [LOOPBACK, *(["::"] if has_ipv6() else [])])
def test_allow_lets_in(daemon: StartDaemon, bind: str) -> None:
    """At `::` Linux shows an IPv4 client as ::ffff:127.0.0.1."""
    running = daemon({"_bind": bind, "_allow": ["192.0.2.0/24", "127.0.0.0/8"]})
    with running.policy() as policy:
        assert policy.ask() == "OK"


def test_it_recovers_when_descriptors_run_out(daemon: StartDaemon) -> None:
    running = daemon({"_loglevel": "INFO"})
    with ExitStack() as stack:
        first = stack.enter_context(running.policy())
        assert first.ask() == "OK"
        used = len(list(Path(f"/proc/{running.pid}/fd").iterdir()))
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (used + 5, used + 5))
        for _ in range(30):
            assert stack.enter_context(running.policy()).ask(sasl_username="bob") == "OK"
        assert first.is_closed()
    wait_for(lambda: len(os.listdir(f"/proc/{running.pid}/fd")) < used, 5, "all are closed")
    with running.policy() as policy:
        assert policy.ask() == "OK"
    assert "Traceback" not in running.log()


def test_the_descriptor_limit_is_raised_and_told(new_directory: Callable[[], Path]) -> None:
    running = Daemon(new_directory(), {"_maxconnections": 100_000})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        with running:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert resource.prlimit(running.pid, resource.RLIMIT_NOFILE) == (hard, hard)
            capacity = re.search(r"(\d+) connections at most", running.log())
            assert capacity
            assert 0 < hard - int(capacity[1]) < 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- Signals --------------------------------------------------------------------------------------

TERM = pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])


@TERM
def test_a_request_under_way_is_answered(daemon: StartDaemon, signum: int) -> None:
    running = daemon()
    with running.policy() as idle, running.policy() as policy:
        assert [idle.ask(), policy.ask()] == ["OK"] * 2
        with locked(running.ledger):
            policy.send(PolicyClient.block())
            os.kill(running.pid, signum)
            wait_for(lambda: not is_listening(running.port), 5, "it listens no more")
            with pytest.raises(subprocess.TimeoutExpired):
                subprocess_of(running).wait(1)  # it waits for its request, too
        start = time.monotonic()
        assert policy.reply() == "OK"
        assert policy.at_end()
        assert idle.at_end()
        assert running.stop(signum) == 0
        assert time.monotonic() - start < 5
    assert count_rows(running.ledger) == 3


@TERM
def test_a_request_that_cannot_be_counted_is_answered(daemon: StartDaemon, signum: int) -> None:
    """Also when the store is stuck for longer than the daemon may take."""
    running = daemon()
    with running.policy() as policy:
        assert policy.ask() == "OK"
        with locked(running.ledger):
            policy.send(PolicyClient.block())
            start = time.monotonic()
            assert running.stop(signum) == 0
            assert time.monotonic() - start < 5
        assert policy.reply() == "DEFER_IF_PERMIT quota service unavailable, try again later"


@TERM
def test_idle_connections_hold_up_no_end(daemon: StartDaemon, signum: int) -> None:
    running = daemon()
    with ExitStack() as stack:
        policies = [stack.enter_context(running.policy()) for _ in range(50)]
        assert [policy.ask() for policy in policies] == ["OK"] * 50
        policies[0].send(b"request=")
        start = time.monotonic()
        assert running.stop(signum) == 0
        assert time.monotonic() - start < 3
        assert all(policy.at_end() for policy in policies)
    assert "Traceback" not in running.log()


def test_a_client_that_takes_no_reply_holds_up_no_end(daemon: StartDaemon) -> None:
    running = daemon({"_loglevel": "INFO"})
    with running.policy() as policy:
        policy._socket.settimeout(0.5)
        with suppress(TimeoutError):
            while True:
                policy.send(SMALL * 10_000)
        start = time.monotonic()
        assert running.stop(signal.SIGTERM) == 0
        assert time.monotonic() - start < 5


def test_requests_in_a_row_are_all_counted_or_not_answered(daemon: StartDaemon) -> None:
    """What was answered before the end is in the ledger."""
    running = daemon(rules={"default": {"period": 3600, "msgquota": 10**6, "msg": "no"}})
    answered = 0
    with running.policy() as policy, suppress(OSError, AssertionError):
        while True:
            assert policy.ask() == "OK"
            answered += 1
            if answered == 100:
                os.kill(running.pid, signal.SIGTERM)
    assert running.stop() == 0
    assert answered >= 100
    assert count_rows(running.ledger) - answered in (0, 1)


MANY = {f"user{n}@example.com": {"msgquota": n} for n in range(100_000)}


@TERM
def test_rules_that_are_being_read_hold_up_no_end(daemon: StartDaemon, signum: int) -> None:
    running = daemon(rules=quota(1))
    running.write_rules(quota(1) | MANY)
    with running.policy() as policy:
        assert policy.ask() == "OK"
        os.kill(running.pid, signal.SIGHUP)
        wait_for_log(running, "SIGHUP: reading the rules")
        start = time.monotonic()
        assert running.stop(signum) == 0
        assert time.monotonic() - start < 5
    assert "Traceback" not in running.log()


@TERM
def test_rules_that_are_read_at_the_start_hold_up_no_end(shipped: Path, signum: int) -> None:
    """Before anything is served there is nothing to end."""
    (shipped / "quotarules.json").write_text(json.dumps(quota(1) | MANY), "utf-8")
    started = subprocess.Popen(
        [sys.executable, "saslquota.py"],
        cwd=shipped,
        env=clean_environment({"_bindport": free_port()}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(lambda: catches(started.pid, signal.SIGTERM), 10, "it is about to read")
        started.send_signal(signum)
        output, _ = started.communicate(timeout=5)
    finally:
        started.kill()
    assert (started.returncode, output) == (0, b"")


def catches(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal (proc(5), SigCgt)."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    found = re.search("^SigCgt:\\s*([0-9a-f]+)$", status, re.MULTILINE)
    assert found
    return bool(int(found[1], 16) >> (signum - 1) & 1)


def quota(amount: int) -> dict[str, object]:
    return {"default": {"period": 3600, "msgquota": amount, "msg": f"{amount} are enough"}}


def test_changed_rules_are_picked_up(daemon: StartDaemon) -> None:
    running = daemon(rules=quota(1))
    with running.policy() as policy:
        assert [policy.ask(), policy.ask()] == ["OK", "REJECT 1 are enough"]
        running.write_rules(quota(2))
        wait_for_log(running, "rules reloaded: default 2 in 3600 s")
        assert [policy.ask(), policy.ask()] == ["OK", "REJECT 2 are enough"]


def test_hangup_reads_the_rules_at_once(daemon: StartDaemon) -> None:
    running = daemon(rules=quota(1))
    with running.policy() as policy:
        assert policy.ask() == "OK"
        os.kill(running.pid, signal.SIGHUP)
        wait_for_log(running, "rules reloaded: default 1 in 3600 s")
        assert policy.ask() == "REJECT 1 are enough"
    assert running.running


def test_a_broken_rules_file_changes_nothing(daemon: StartDaemon) -> None:
    running = daemon(rules=quota(1))
    path = running.directory / "quotarules.json"
    with running.policy() as policy:
        path.write_text('{\n  "default": {"period": 60,\n}', "utf-8")
        os.kill(running.pid, signal.SIGHUP)
        wait_for_log(running, f"{path}, line 2, column 27: not JSON")
        assert [policy.ask(), policy.ask()] == ["OK", "REJECT 1 are enough"]
        running.write_rules(quota(3))
        wait_for_log(running, "rules reloaded: default 3 in 3600 s")
        assert policy.ask() == "OK"


# --- request=status -------------------------------------------------------------------------------


def test_status(daemon: StartDaemon) -> None:
    began = int(time.time())
    running = daemon(rules=ONE_EACH)
    with running.policy() as policy:
        first = policy.status()
        assert (first["first_request_at"], first["last_request_at"]) == ("", "")
        assert [policy.ask(), policy.ask()] == ["OK", "REJECT over quota"]
    with running.policy() as policy, running.policy() as other:
        other.ask(sasl_username="b@x")
        other.ask(sasl_username="")
        other.ask(protocol_state="CONNECT")
        found = policy.status()
    counted = {name: value for name, value in found.items() if name.startswith("requests_")}
    assert counted == {
        "requests_accepted": "2",
        "requests_refused": "1",
        "requests_held": "0",
        "requests_not_enforced": "0",
        "requests_fallback": "0",
        "requests_no_login": "1",
        "requests_uncounted": "1",
    }
    assert (found["version"], found["store"], found["down_since"]) == ("2.1.0", "up", "")
    assert (found["rules_valid"], found["log_lines_lost"]) == ("yes", "0")
    assert (found["accounts_remembered"], found["connections"]) == ("2", "2")
    assert began <= int(found["first_request_at"]) <= int(found["last_request_at"])
    assert began - 1 <= int(found["rules_read_at"]) <= time.time() + 1
    assert 0 <= int(found["uptime"]) < 60


def test_status_costs_no_log_line(daemon: StartDaemon) -> None:
    running = daemon()
    before = running.output.read_text("utf-8")
    with running.policy() as policy:
        policy.status()
        policy.ask()
    wait_for_log(running, "action=ACCEPT")
    after = running.output.read_text("utf-8").removeprefix(before)
    assert "status" not in after


def test_status_of_broken_rules_and_of_a_store_that_is_down(daemon: StartDaemon) -> None:
    running = daemon(rules=ONE_EACH)
    with running.policy() as policy:
        policy.ask()
        (running.directory / "quotarules.json").write_text("{", "utf-8")
        wait_for(lambda: policy.status()["rules_valid"] == "no", 10, "the rules are read")
        file = running.directory / "saslquota.db"
        file.rename(running.directory / "gone.db")
        file.mkdir()
        began = int(time.time())
        wait_for(lambda: policy.ask(sasl_username="c@x").startswith("DEFER"), 10, "it is down")
        found = policy.status()
        assert found["store"] == "down"
        assert began - 1 <= int(found["down_since"]) <= time.time() + 1
        assert int(found["requests_fallback"]) >= 1
