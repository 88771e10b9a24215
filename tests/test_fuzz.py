"""Whatever comes over the wire: the daemon answers or hangs up, and goes on."""

import errno
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from servers.daemon import Daemon
from servers.ports import LOOPBACK
from servers.process import Footprint, wait_for, wait_for_log

from saslquota import (
    MAX_ACCOUNT,
    MAX_ATTRIBUTES,
    MAX_LINE,
    MAX_RECIPIENTS,
    MAX_REPLY,
    MAX_REQUEST,
    ProtocolError,
    RequestStream,
    fold,
)

LONG = "não " * 120  # bytes: 600, more than a reply takes
OVER = "over@example.com"
RULES = {
    "default": {"period": 3600, "msgquota": 10**9, "msg": "too many"},
    OVER: {"period": 3600, "msgquota": 0, "msg": LONG},
}
REFUSED = f"REJECT {LONG}".encode()[:MAX_REPLY].decode("utf-8", "ignore")
ACTIONS = {"OK", "DUNNO", "REJECT authentication required", "REJECT login name too long", REFUSED}
COUNTED = {b"MAIL", b"RCPT", b"DATA", b"END-OF-MESSAGE"}

NASTY = [
    *(b"", b" ", b"=", b"==", b"\r", b"\t", b"\0", b"\x1b[2J", b"\xff\xfe", b"\xed\xa0\x80"),
    *("\u2028 \u2029 \x85 \u202e \ufeff".encode(), "İ".encode() * 200, "🐁".encode() * 200),
    *(b"x" * 319, b"x" * 321, b"\xff" * 100, b"x" * 5000, b"%s%d%n", b"'; DROP TABLE sends; --"),
    *(b"@", b"@@", b"@example.com", b"default", b"a@default", b"OVER@Example.COM "),
]


def line(name: bytes, value: bytes) -> bytes:
    return name + b"=" + value + b"\n"


VALUES = st.one_of(
    st.sampled_from(NASTY),
    st.binary(max_size=40).map(lambda value: value.replace(b"\n", b" ")),
    st.text(st.characters(exclude_characters="\n"), max_size=40).map(
        lambda value: value.encode("utf-8", "surrogatepass")
    ),
)
LOGINS = st.one_of(st.just(OVER.encode()), VALUES)
STATES = st.one_of(st.sampled_from([*sorted(COUNTED), b"CONNECT", b"VRFY", b"rcpt"]), VALUES)
COUNTS = st.one_of(
    st.sampled_from([b"", b"0", b"1", b"0000007", b"-1", b"1e3", b"+5", b"1000001", b"9" * 30]),
    st.integers(0, MAX_RECIPIENTS + 1).map(lambda count: b"%d" % count),
    st.just("٣".encode()),  # a digit to str.isdigit()
)
OTHER = [b"sender", b"recipient", b"client_address", b"instance", b"size", b"helo_name", b""]
ATTRIBUTES = st.one_of(
    st.builds(line, st.just(b"sasl_username"), LOGINS),
    st.builds(line, st.just(b"protocol_state"), STATES),
    st.builds(line, st.just(b"recipient_count"), COUNTS),
    st.builds(line, st.sampled_from(OTHER), VALUES),
    st.builds(line, VALUES.filter(lambda name: name != b""), VALUES),
)
REQUESTS = st.one_of(
    st.builds(
        lambda login, state, more: (
            b"request=smtpd_access_policy\n"
            + line(b"sasl_username", login)
            + line(b"protocol_state", state)
            + b"".join(more)
            + b"\n"
        ),
        LOGINS,
        st.sampled_from(sorted(COUNTED)),
        st.lists(ATTRIBUTES, max_size=6),
    ),
    st.builds(
        lambda more: b"request=smtpd_access_policy\n" + b"".join(more) + b"\n",
        st.lists(ATTRIBUTES, max_size=8),
    ),
)
JUNK = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        [
            *(b"\n", b"\n\n", b"\0" * 100, b"=\n", b"request\n\n", b"request=smtpd_access_policy"),
            *(b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"QUIT\r\n"),
            b"request=smtpd_access_policy\n" + b"a=\n" * MAX_ATTRIBUTES + b"\n",
            b"request=smtpd_access_policy\na=" + b"x" * MAX_REQUEST + b"\n\n",
            b"x" * (MAX_REQUEST + 2),
        ]
    ),
)
STREAMS = st.lists(
    st.one_of(REQUESTS, REQUESTS, REQUESTS, ATTRIBUTES, JUNK), min_size=1, max_size=12
)


HUNG_UP = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN}


class Malformed(Exception):
    """What the model says where the daemon hangs up."""


def expected_action(block: bytes) -> str:
    """What a request is answered, said again in other words."""
    if block.count(b"\n") >= MAX_ATTRIBUTES or len(block) > MAX_REQUEST:
        raise Malformed
    found = {}
    for pair in block.split(b"\n"):
        name, equals, value = pair.partition(b"=")
        if not equals:
            raise Malformed
        found[name] = value
    count = found.get(b"recipient_count", b"")
    if found.get(b"request") != b"smtpd_access_policy" or not re.fullmatch(rb"[0-9]{0,7}", count):
        raise Malformed
    if int(count or b"0") > MAX_RECIPIENTS:
        raise Malformed
    if found.get(b"protocol_state") not in COUNTED:
        return "DUNNO"
    came = found.get(b"sasl_username", b"").decode("utf-8", "surrogateescape")
    login = fold(came.encode("utf-8", "backslashreplace").decode())
    if not login:
        return "REJECT authentication required"
    if len(login) > MAX_ACCOUNT:
        return "REJECT login name too long"
    return REFUSED if login == OVER else "OK"


def expected(data: bytes) -> tuple[list[str], bool]:
    """The actions for a stream of bytes, and whether the whole of it is well-formed."""
    actions: list[str] = []
    while data and not data.startswith(b"\n"):
        block, end, data = data.partition(b"\n\n")
        if not end:
            return actions, False
        try:
            actions.append(expected_action(block))
        except Malformed:
            return actions, False
    return actions, True


@examples(250)
@given(st.lists(st.one_of(REQUESTS, ATTRIBUTES, JUNK), max_size=6), st.integers(1, 70_000))
def test_read_request(stream: list[bytes], size: int) -> None:
    """Any bytes, in pieces of any size: as many requests as there are, and nothing unexpected."""
    data = b"".join(stream)
    step = max(size, len(data) // 500)
    pieces = iter([data[at : at + step] for at in range(0, len(data), step)])
    requests = RequestStream(lambda _begun: next(pieces, b""))
    number, well_formed = 0, True
    try:
        while request := requests.read_request():
            number += 1
            assert 0 <= request.recipient_count <= MAX_RECIPIENTS
            assert request.size <= MAX_REQUEST + 2
    except ProtocolError:
        well_formed = False
    actions, model = expected(data)
    assert (number, well_formed) == (len(actions), model)


@pytest.fixture(scope="module")
def running(new_directory: Callable[[], Path]) -> Iterator[Daemon]:
    """One for all examples; at the end it must be as it was, and its log in order."""
    with Daemon(new_directory(), {"_bindtimeout": 5}, RULES) as daemon:
        with daemon.policy() as policy:
            assert policy.ask() == "OK"
        wait_for_log(daemon, "thread stopped")
        before = Footprint.of(daemon).threads
        yield daemon
        with daemon.policy() as policy:
            assert policy.ask() == "OK"
        wait_for(lambda: Footprint.of(daemon).threads == before, 10, "no thread hangs")
        assert daemon.terminate() == 0
        assert_log(daemon)


def assert_log(daemon: Daemon) -> None:
    """Each line is whole, and none of them is about a bug."""
    log = daemon.output.read_bytes().decode("utf-8")
    assert "Traceback" not in log
    tag = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} postfix/saslquota\[\d+\]:"
    started = r"(saslquota \d|counting in |rules in |logging to )"
    shape = re.compile(rf"{tag}.+|{started}")
    for logged in log.removesuffix("\n").split("\n"):
        assert shape.match(logged), logged
        assert len(logged) <= 10 * MAX_LINE
        assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202e]", logged), logged


def talk(daemon: Daemon, pieces: list[bytes]) -> tuple[bytes, bool]:
    """Send the pieces, then nothing more; return what came until the daemon hung up, and whether
    it took everything."""
    received, whole = b"", True
    with socket.create_connection((LOOPBACK, daemon.port), timeout=10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
            while data := client.recv(65536):
                received += data
        except OSError as error:
            if error.errno not in HUNG_UP:
                raise
            whole = False  # it hung up with some of our bytes unread
    return received, whole


@pytest.mark.slow
@examples(250)
@given(stream=STREAMS)
def test_the_daemon(running: Daemon, stream: list[bytes]) -> None:
    received, whole = talk(running, stream)
    *replies, rest = received.split(b"\n\n")
    assert not (whole and rest)
    actions, _ = expected(b"".join(stream))
    for reply, action in zip(replies, actions, strict=whole):
        assert reply.decode("utf-8") == f"action={action}"
        assert action in ACTIONS
        assert len(reply) <= len("action=") + MAX_REPLY


@pytest.mark.slow
@examples(100)
@given(stream=STREAMS, cut=st.integers(0, 3000))
def test_clients_that_vanish(running: Daemon, stream: list[bytes], cut: int) -> None:
    """In the middle of anything, with a reset."""
    data = b"".join(stream)[:cut]
    with socket.create_connection((LOOPBACK, running.port), timeout=10) as client:
        with suppress(ConnectionError):
            client.sendall(data)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
