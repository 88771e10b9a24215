"""The policy protocol: bytes into requests, and an action into a reply."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers.process import ROOT

from saslquota import (
    MAX_ATTRIBUTES,
    MAX_RECIPIENTS,
    MAX_REPLY,
    MAX_REQUEST,
    ProtocolError,
    Request,
    RequestStream,
    format_reply,
    parse_request,
)

ACCESS = b"request=smtpd_access_policy\n"


def request(**attributes: str | bytes | int) -> bytes:
    """A policy request, its closing empty line included."""
    lines = [ACCESS]
    for name, value in attributes.items():
        data = value if isinstance(value, bytes) else str(value).encode()
        lines.append(name.encode() + b"=" + data + b"\n")
    return b"".join(lines) + b"\n"


def parse(**attributes: str | bytes | int) -> Request:
    return parse_request(request(**attributes).removesuffix(b"\n\n"))


def stream_of(chunks: Iterable[bytes]) -> RequestStream:
    """A connection that gives these chunks, one for each recv()."""
    rest = iter(chunks)
    return RequestStream(lambda _begun: next(rest, b""))


def read_all(stream: RequestStream) -> list[Request | str]:
    """What comes out of a stream: its requests, and `end` or the error that ends it."""
    found: list[Request | str] = []
    try:
        while got := stream.read_request():
            found.append(got)
    except ProtocolError as error:
        return [*found, str(error)]
    return [*found, "end"]


def byte_by_byte(data: bytes) -> Iterator[bytes]:
    return (bytes([byte]) for byte in data)


# --- One request ----------------------------------------------------------------------------------


def test_a_complete_request_of_postfix() -> None:
    data = (ROOT / "Testfile").read_bytes().removesuffix(b"\n")
    assert read_all(stream_of([data])) == [
        Request(
            protocol_state="RCPT",
            sasl_username="root@localhost",
            sender="root@localhost",
            recipient="postmaster@localhost",
            recipient_count=0,
            client_address="127.0.0.1",
            instance="14b4.5f3a8c2e.a1b2c.0",
            size=len(data),
        ),
        "end",
    ]


def test_what_a_request_does_not_say_is_empty() -> None:
    assert parse() == Request("", "", "", "", 0, "", "", len(request()))


def test_the_order_is_free_and_unknown_attributes_are_ignored() -> None:
    block = b"sender=a@x\nnew_in_postfix_9=1\nprotocol_state=RCPT\nrequest=smtpd_access_policy"
    found = parse_request(block)
    assert (found.sender, found.protocol_state) == ("a@x", "RCPT")


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        pytest.param(b"a=b@x==", "a=b@x==", id="equals-signs"),
        pytest.param(b"a\rb@x\r", "a\rb@x\r", id="carriage-return"),
        pytest.param(b"a\tb", "a\tb", id="tab"),
        pytest.param(b"a\x00\x01\x0b\x0c\x1c\x1f\x7fb", "a\0\x01\v\f\x1c\x1f\x7fb", id="control"),
        pytest.param("a\u2028b\x85".encode(), "a\u2028b\x85", id="unicode-line-ends"),
        pytest.param("joão@x".encode(), "joão@x", id="utf-8"),
        pytest.param(b"jo\xe3o@x", "jo\udce3o@x", id="latin-1"),
        pytest.param(b" a ", " a ", id="spaces"),
        pytest.param(b"", "", id="empty"),
    ],
)
def test_a_value_may_hold_anything_but_a_newline(sent: bytes, read: str) -> None:
    assert read_all(stream_of([request(sender=sent)]))[0] == parse(sender=sent)
    assert parse(sender=sent).sender == read


def test_similar_names_are_other_names() -> None:
    found = parse(xsender="x", sender="a@x", sender_domain="y", sasl_sender="z")
    assert found.sender == "a@x"


@pytest.mark.parametrize(
    ("sent", "read"),
    [(b"", 0), (b"0", 0), (b"1", 1), (b"050", 50), (b"%d" % MAX_RECIPIENTS, MAX_RECIPIENTS)],
)
def test_recipient_count(sent: bytes, read: int) -> None:
    assert parse(recipient_count=sent).recipient_count == read


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"-1", id="negative"),
        pytest.param(b"+1", id="sign"),
        pytest.param(b"1.5", id="fraction"),
        pytest.param(b"1e3", id="exponent"),
        pytest.param(b"1_000", id="underscore"),
        pytest.param(b" 1", id="space"),
        pytest.param(b"one", id="word"),
        pytest.param("٣".encode(), id="other-digits"),
        pytest.param(b"%d" % (MAX_RECIPIENTS + 1), id="beyond-a-million"),
        pytest.param(b"9" * 5000, id="endless"),
    ],
)
def test_a_recipient_count_that_is_none(sent: bytes) -> None:
    with pytest.raises(ProtocolError, match="recipient_count"):
        parse(recipient_count=sent)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"sender=a@x", id="absent"),
        pytest.param(b"request=\nsender=a@x", id="empty"),
        pytest.param(b"request=junk", id="other"),
        pytest.param(b"request=smtpd_access_policy2", id="longer"),
        pytest.param(b"request=smtpd_access_policy\r", id="carriage-return"),
        pytest.param(b"REQUEST=smtpd_access_policy", id="upper-case"),
    ],
)
def test_the_kind_of_request_is_required(block: bytes) -> None:
    with pytest.raises(ProtocolError, match="request=smtpd_access_policy"):
        parse_request(block)


@pytest.mark.parametrize("line", [b"sender", b"GET / HTTP/1.1\r", b"\xff\xfe"])
def test_a_line_without_equals_sign(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="without ="):
        parse_request(ACCESS + line)


def test_as_many_attributes_as_are_allowed() -> None:
    block = ACCESS + b"\n".join(b"a%d=" % n for n in range(MAX_ATTRIBUTES - 1))
    assert parse_request(block).size == len(block) + 2
    with pytest.raises(ProtocolError, match=f"more than {MAX_ATTRIBUTES} attributes"):
        parse_request(block + b"\none=more")


# --- A stream of requests -------------------------------------------------------------------------


def test_byte_by_byte() -> None:
    data = request(sender="a@x") + request(sender="b@x")
    assert read_all(stream_of(byte_by_byte(data))) == [
        parse(sender="a@x"),
        parse(sender="b@x"),
        "end",
    ]


def test_many_at_once() -> None:
    data = b"".join(request(sender=n) for n in range(100))
    assert read_all(stream_of([data])) == [*(parse(sender=n) for n in range(100)), "end"]


def test_no_more_is_received_than_a_request_needs() -> None:
    """Else the daemon would wait for bytes that come only after its reply."""
    chunks = iter([request(sender="a@x") + request(sender="b@x")])
    stream = RequestStream(lambda _begun: next(chunks))
    assert stream.read_request() == parse(sender="a@x")
    assert stream.read_request() == parse(sender="b@x")


def test_receive_is_told_whether_a_request_has_begun() -> None:
    chunks = iter([request(), b"r", request()[1:] + b"sender=", b""])
    told = []

    def receive(begun: object) -> bytes:
        told.append(begun)
        return next(chunks)

    read_all(RequestStream(receive))
    assert told == [False, False, True, True]


@pytest.mark.parametrize("chunks", [[b"\n"], [b"\n", request()], [b"\n" + request()], [b"\n\n"]])
def test_an_empty_request_ends_the_session(chunks: list[bytes]) -> None:
    assert read_all(stream_of(chunks)) == ["end"]
    assert read_all(stream_of([request(), *chunks])) == [parse(), "end"]
    assert read_all(stream_of([request() + chunks[0]])) == [parse(), "end"]


@pytest.mark.parametrize("half", [b"r", ACCESS, ACCESS + b"sender=a@x", request()[:-1]])
def test_an_end_inside_a_request(half: bytes) -> None:
    expected = "the connection ended inside a request"
    assert read_all(stream_of([half])) == [expected]
    assert read_all(stream_of([request() + half])) == [parse(), expected]


def padded(size: int) -> bytes:
    """A request that is so long without its closing empty line."""
    return ACCESS + b"sender=" + b"a" * (size - len(ACCESS) - 7) + b"\n\n"


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1000, MAX_REQUEST - 1, MAX_REQUEST, MAX_REQUEST + 1, 1 << 20])
def test_the_longest_request(size: int) -> None:
    chunks = pieces(padded(MAX_REQUEST), size)
    assert read_all(stream_of(chunks)) == [parse_request(padded(MAX_REQUEST)[:-2]), "end"]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(padded(MAX_REQUEST + 1), id="with-its-end"),
        pytest.param(padded(MAX_REQUEST + 2)[:-2], id="without-its-end"),
        pytest.param(b"a=b\n" * (MAX_REQUEST // 4 + 1), id="many-lines"),
        pytest.param(b"\xff" * (MAX_REQUEST + 2), id="without-a-newline"),
    ],
)
@pytest.mark.parametrize("size", [1000, 65536, 1 << 20])
def test_a_request_that_is_too_long(data: bytes, size: int) -> None:
    expected = f"a request of more than {MAX_REQUEST} bytes"
    assert read_all(stream_of(pieces(data, size))) == [expected]
    assert read_all(stream_of([request(), *pieces(data, size)])) == [parse(), expected]


def test_endless_input_is_not_kept() -> None:
    received = 0

    def receive(_begun: object) -> bytes:
        nonlocal received
        received += 1000
        return b"a" * 1000

    with pytest.raises(ProtocolError):
        RequestStream(receive).read_request()
    assert received <= MAX_REQUEST + 2000


# What a stream may be made of: whole requests, and the parts of which errors are made.
PARTS = st.one_of(
    st.sampled_from([request(), request(sasl_username=b"jo\xe3o", recipient_count=3), ACCESS]),
    st.sampled_from([b"\n", b"\n\n", b"=", b"\r", b"\xff", b"recipient_count=x\n", b"a=b\n"]),
    st.binary(max_size=4),
)
STREAMS = st.lists(PARTS, max_size=12).map(b"".join)


@st.composite
def cut(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream of bytes, and the same in pieces."""
    data = draw(STREAMS)
    places = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)))))
    bounds = [0, *places, len(data)]
    parts = [data[a:b] for a, b in pairwise(bounds)]
    return data, [part for part in parts if part]


@given(cut())
def test_any_cut_gives_the_same_requests(example: tuple[bytes, list[bytes]]) -> None:
    data, chunks = example
    assert read_all(stream_of(chunks)) == read_all(stream_of([data] if data else []))


@pytest.mark.parametrize("over", [0, 1])
def test_any_cut_of_the_longest_request(monkeypatch: pytest.MonkeyPatch, over: int) -> None:
    data = request(sender="a@x") + request()
    monkeypatch.setattr("saslquota.MAX_REQUEST", len(data.partition(b"\n\n")[0]) - over)
    whole = read_all(stream_of([data]))
    assert len(whole) == 1 if over else whole[-1] == "end"
    for place in range(1, len(data)):
        assert read_all(stream_of([data[:place], data[place:]])) == whole, place


@given(STREAMS)
def test_any_bytes_are_a_request_an_end_or_an_error(data: bytes) -> None:
    try:
        found = stream_of([data] if data else []).read_request()
    except ProtocolError:
        return
    assert found is None or (isinstance(found, Request) and found.recipient_count >= 0)


# --- The reply ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "reply"),
    [
        pytest.param("OK", b"action=OK\n\n", id="ok"),
        pytest.param("REJECT Você já", "action=REJECT Você já\n\n".encode(), id="utf-8"),
        pytest.param("REJECT a\udcffb", b"action=REJECT a?b\n\n", id="surrogate"),
        pytest.param("x" * 400, b"action=" + b"x" * 400 + b"\n\n", id="longest"),
        pytest.param("x" * 401, b"action=" + b"x" * 400 + b"\n\n", id="too-long"),
        pytest.param("x" * 399 + "é", b"action=" + b"x" * 399 + b"\n\n", id="cut-in-a-character"),
        pytest.param("🐁" * 200, ("action=" + "🐁" * 100 + "\n\n").encode(), id="four-bytes-each"),
    ],
)
def test_format_reply(action: str, reply: bytes) -> None:
    assert format_reply(action) == reply


@given(st.text(st.characters(exclude_categories=["Cc"], include_characters="\udcff"), max_size=500))
def test_any_reply_is_one_line_of_utf_8(action: str) -> None:
    reply = format_reply(action)
    assert reply.startswith(b"action=")
    assert reply.endswith(b"\n\n")
    assert reply.count(b"\n") == 2
    assert len(reply) <= len("action=") + MAX_REPLY + 2
    sent = reply.decode("utf-8").removeprefix("action=").removesuffix("\n\n")
    assert action.encode("utf-8", "replace").decode().startswith(sent)
