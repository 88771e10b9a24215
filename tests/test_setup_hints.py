"""What the log says of Postfix's set-up: is the daemon asked, where, and how often?"""

import itertools
import os
import signal

import pytest
from helpers import StartDaemon
from servers.process import wait_for_log

from saslquota import (
    FIRST_REQUEST,
    MOMENT,
    REMINDER_INTERVAL,
    SETTLING,
    Answer,
    Request,
    SetupHints,
    Verdict,
    Window,
)

COUNTED = Answer("OK", "accepted", verdict=Verdict(True, 1, Window(60, 9)))
REFUSED = Answer("DEFER no", "refused", verdict=Verdict(False, 9, Window(60, 9), over_quota=True))
LOST = Answer("DEFER_IF_PERMIT", "fallback", reason="the store did not answer")


class Clock:
    """Monotonic seconds, set by the test."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hints(clock: Clock) -> SetupHints:
    return SetupHints(clock)


INSTANCES = map(str, itertools.count(1))


def request(state: str = "RCPT", login: str = "alice", instance: str = "") -> Request:
    """A request of its own message, unless the instance says which."""
    instance = instance or next(INSTANCES)
    return Request(state, login, "alice@a.example", "bob@b.example", 0, "192.0.2.1", instance, 100)


def uncounted(asked: Request) -> Answer:
    return Answer("DUNNO", "uncounted", reason=f"asked at {asked.protocol_state}")


def note(hints: SetupHints, *requests: Request) -> None:
    """One connection each."""
    for asked in requests:
        is_counted = asked.protocol_state in ("RCPT", "DATA")
        hints.note(asked, COUNTED if is_counted else uncounted(asked), None)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def pass_time(hints: SetupHints, clock: Clock, seconds: float) -> None:
    """As the main thread does, a second at a time."""
    for _ in range(int(seconds) + 1):
        clock.now += 1
        hints.remind()


@pytest.mark.parametrize(
    ("login", "shown"), [("alice@a.example", "alice@a.example"), ("", "(none)")]
)
def test_the_first_request(
    hints: SetupHints, caplog: pytest.LogCaptureFixture, login: str, shown: str
) -> None:
    caplog.set_level("INFO", "saslquota")
    note(hints, request("RCPT", login), request("DATA", "bob"))
    assert caplog.messages == [f"first request from Postfix: RCPT, submission login {shown}"]


def test_nobody_asks(hints: SetupHints, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, after an hour."""
    pass_time(hints, clock, FIRST_REQUEST - 5)
    assert warnings(caplog) == []
    pass_time(hints, clock, 2 * FIRST_REQUEST)
    assert warnings(caplog) == ["no request yet: does Postfix ask? see docs/install.md"]


def test_somebody_has_asked(
    hints: SetupHints, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    note(hints, request())
    pass_time(hints, clock, 2 * FIRST_REQUEST)
    assert warnings(caplog) == []


@pytest.mark.parametrize("state", ["CONNECT", "HELO", "EHLO", "BDAT"])
def test_nothing_is_counted(
    hints: SetupHints, clock: Clock, caplog: pytest.LogCaptureFixture, state: str
) -> None:
    """Postfix asks where nothing can be counted, and nowhere else."""
    note(hints, request(state), request(state))
    pass_time(hints, clock, SETTLING)
    hint = "" if state == "BDAT" else "; see smtpd_delay_reject"
    assert warnings(caplog) == [f"nothing is counted: asked at {state}{hint}"]


@pytest.mark.parametrize("state", ["VRFY", "ETRN"])
def test_where_postfix_asks_as_well(
    hints: SetupHints, clock: Clock, caplog: pytest.LogCaptureFixture, state: str
) -> None:
    note(hints, request(state))
    pass_time(hints, clock, 2 * REMINDER_INTERVAL)
    assert warnings(caplog) == []


@pytest.mark.parametrize("seconds", [0, 1, REMINDER_INTERVAL - 10])
def test_a_mail_was_counted_in_that_minute(
    hints: SetupHints, clock: Clock, caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    """Before a client's HELO, or after it."""
    note(hints, request())
    clock.now += seconds
    note(hints, request("HELO"))
    pass_time(hints, clock, SETTLING)
    pass_time(hints, clock, 2 * REMINDER_INTERVAL)
    note(hints, request("HELO"), request())
    pass_time(hints, clock, SETTLING)
    assert warnings(caplog) == []


def test_neither_without_login_nor_without_the_store(
    hints: SetupHints, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    hints.note(request(login=""), Answer("DUNNO", "no_login", reason="no sasl_username"), None)
    hints.note(request(), LOST, None)
    pass_time(hints, clock, 2 * REMINDER_INTERVAL)
    assert warnings(caplog) == []


def test_asked_twice_on_one_connection(
    hints: SetupHints, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """However much later."""
    twice = request(instance="i1")
    hints.note(twice, COUNTED, None)
    clock.now += 20
    hints.note(request(instance="i2"), COUNTED, None)
    hints.note(twice, COUNTED, twice)
    hints.note(twice, COUNTED, twice)
    text = "asked twice for each recipient, see docs/install.md: RCPT, rcpt=bob@b.example"
    assert warnings(caplog) == [f"{text}, instance=i1"]


@pytest.mark.parametrize(("seconds", "expected"), [(MOMENT / 2, 1), (MOMENT * 2, 0)])
def test_asked_twice_on_two_connections(
    hints: SetupHints,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    seconds: float,
    expected: int,
) -> None:
    note(hints, request(instance="i1"))
    clock.now += seconds
    note(hints, request(instance="i1"))
    assert len(warnings(caplog)) == expected


def test_what_is_no_duplicate(hints: SetupHints, caplog: pytest.LogCaptureFixture) -> None:
    """Another state, recipient or message; a message that is not told apart; a client that tries
    once more after a refusal, or a failure of the store."""
    one = request(instance="i1")
    others = [
        one._replace(protocol_state="DATA"),
        one._replace(recipient="carol@b.example"),
        one._replace(instance="i2"),
    ]
    last = one
    for asked in (*others, one):
        hints.note(asked, COUNTED, last)
        last = asked
    empty = one._replace(instance="")
    hints.note(empty, COUNTED, empty)
    lost = request(instance="i3")
    hints.note(lost, LOST, None)
    hints.note(lost, COUNTED, None)
    refused = request(instance="i4")
    hints.note(refused, REFUSED, None)
    hints.note(refused, COUNTED, None)
    assert warnings(caplog) == []


def test_in_a_daemons_log(daemon: StartDaemon) -> None:
    started = daemon({"_loglevel": "INFO"})
    with started.policy() as policy:
        for _ in range(3):
            assert policy.ask(protocol_state="RCPT", sasl_username="bob", instance="i1") == "OK"
    wait_for_log(started, "asked twice for each recipient")
    log = started.log()
    assert log.count("first request from Postfix: RCPT, submission login bob\n") == 1
    assert log.count("asked twice") == 1


def test_sighup_does_not_read_the_settings(daemon: StartDaemon) -> None:
    started = daemon({"_loglevel": "INFO"})
    os.kill(started.pid, signal.SIGHUP)
    wait_for_log(started, "SIGHUP: reading the rules; saslquota.json is read at the start only")
    wait_for_log(started, "rules reloaded: ")
