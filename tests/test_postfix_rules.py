"""End to end through real Postfix: the rules that administrators ask for."""

import re
import smtplib
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers import StartDaemon, StartPostfix
from servers.daemon import Daemon
from servers.postfix import ALICE, Postfix, is_accepted, recipients, refusal, send, service
from servers.process import wait_for, wait_for_log

BOB, CAROL = "bob@example.com", "carol@example.net"
AT_END = {"smtpd_client_restrictions": "", "smtpd_end_of_data_restrictions": "$saslquota"}
Start = Callable[..., tuple[Daemon, Postfix]]


@pytest.fixture
def start(daemon: StartDaemon, no_warning: StartPostfix) -> Start:
    """Start a daemon with these rules, and Postfix before it."""

    def both(rules: dict[str, Any], **options: Any) -> tuple[Daemon, Postfix]:
        running = daemon(rules=rules)
        return running, no_warning(service(running), **options)

    return both


def rcpt(session: smtplib.SMTP, number: int) -> list[int]:
    """Codes of so many RCPT of one message, which is not sent."""
    session.mail(ALICE)
    codes = [session.rcpt(to)[0] for to in recipients(number)]
    session.rset()
    return codes


def test_two_windows(start: Start) -> None:
    """The shorter one passes, the longer one stays, and is named as soon as both refuse."""
    windows = [
        {"period": "3s", "msgquota": 2, "msg": "slower"},
        {"period": "1h", "msgquota": 3, "msg": "enough for today"},
    ]
    running, postfix = start({"default": windows})
    with postfix.login() as session:
        assert is_accepted(session)
        assert is_accepted(session)
        assert refusal(session)[1].endswith(": slower")
        wait_for(lambda: is_accepted(session), 10, "the shorter window has room")
        assert refusal(session)[1].endswith(": enough for today")
        wait_for_log(running, re.escape("quota 2/2 (100.00%), period=3, action=REJECT"))
        wait_for_log(running, re.escape("quota 3/3 (100.00%), period=3600, action=REJECT"))


def test_a_pool(start: Start) -> None:
    """Two logins share it, another domain does not; a refusal uses nothing up."""
    rules = {
        "default": {"period": "1h", "msgquota": 2, "msg": "yours"},
        "@example.com": {"msgquota": 3, "msg": "of your domain"},
    }
    running, postfix = start(rules, users=(ALICE, BOB, CAROL))
    with postfix.login(ALICE) as alice, postfix.login(BOB) as bob, postfix.login(CAROL) as carol:
        assert [is_accepted(session) for session in (alice, alice, bob)] == [True] * 3
        assert refusal(bob)[1].endswith(": of your domain")
        assert is_accepted(carol)
        assert is_accepted(carol)
        assert refusal(carol)[1].endswith(": yours")
    wait_for_log(
        running,
        re.escape(f"sasl_username={BOB}, rcpt=r0@example.net, rule=@example.com, quota 3/3"),
    )


@pytest.mark.parametrize("count", ["recipients", "messages"])
def test_counting_at_rcpt(start: Start, count: str) -> None:
    _, postfix = start({"default": {"period": "1h", "msgquota": 4, "count": count, "msg": "no"}})
    with postfix.login() as session:
        codes = [rcpt(session, 3) for _ in range(5)]
    if count == "messages":
        assert codes == [[250] * 3] * 4 + [[554] * 3]
    else:
        assert codes == [[250] * 3, [250, 554, 554], *[[554] * 3] * 3]


@pytest.mark.parametrize("count", ["recipients", "messages"])
def test_counting_at_end_of_message(start: Start, count: str) -> None:
    rules = {"default": {"period": "1h", "msgquota": 4, "count": count, "msg": "no"}}
    _, postfix = start(rules, options=AT_END)
    with postfix.login() as session:
        for _ in range(1 if count == "recipients" else 4):
            send(session, recipients(3))
        with pytest.raises(smtplib.SMTPDataError) as refused:
            send(session, recipients(3))
        assert refused.value.smtp_code == 554


def test_defer(start: Start) -> None:
    """access(5): DEFER is a temporary error, 450 as access_map_defer_code says."""
    rules = {"default": {"period": "1h", "msgquota": 1, "action": "DEFER", "msg": "later"}}
    running, postfix = start(rules)
    with postfix.login() as session:
        assert is_accepted(session)
        code, text = refusal(session)
    assert (code, text.startswith("4.7.1 "), text.endswith(": later")) == (450, True, True)
    wait_for_log(running, re.escape("quota 1/1 (100.00%), period=3600, action=DEFER, "))


def test_hold(start: Start) -> None:
    """access(5): what is held waits until postsuper -H, and may be deleted."""
    windows = [
        {"period": "1h", "msgquota": 1, "action": "HOLD", "msg": "look"},
        {"period": "1h", "msgquota": 3, "msg": "enough"},
    ]
    running, postfix = start({"default": windows})
    with postfix.login() as session:
        for _ in range(3):
            send(session, recipients(1))
        assert refusal(session)[1].endswith(": enough")
    wait_for_log(running, re.escape("quota 2/1 (200.00%), period=3600, action=HOLD, "))

    def held() -> list[str]:
        return [path.name for path in (postfix.queue / "hold").rglob("*") if path.is_file()]

    first, second = held()
    postfix.postsuper("-H", first)
    postfix.postsuper("-d", second)
    assert held() == []


def test_retry_after(start: Start) -> None:
    """After the time that is told, and not before, the send is accepted."""
    msg = "{sasl_username} {rule} {used}/{msgquota} in {period}: again in {retry_after}"
    _, postfix = start({"default": {"period": 6, "msgquota": 2, "msg": msg}})
    with postfix.login() as session:
        began = time.monotonic()
        assert is_accepted(session)
        wait_for(lambda: time.monotonic() - began > 2, 10, "two seconds have passed")
        assert is_accepted(session)
        told = time.monotonic()
        shape = rf".*: {ALICE} default 2/2 in 6s: again in (\d)s"
        found = re.fullmatch(shape, refusal(session)[1])
        assert found
        wait_for(lambda: is_accepted(session), 10, "the first send has left")
        took = time.monotonic() - told
        assert took <= int(found[1]) + 0.2
        assert took > int(found[1]) - 1
        assert time.monotonic() - began >= 6


def test_a_message_that_never_fits(start: Start) -> None:
    rules = {"default": {"period": "2h", "msgquota": 2, "msg": "again: {retry_after}"}}
    _, postfix = start(rules, options=AT_END)
    with postfix.login() as session, pytest.raises(smtplib.SMTPDataError) as refused:
        send(session, recipients(3))
    assert str(refused.value.smtp_error).endswith("again: never'")


def test_a_rule_that_is_tried_out(start: Start) -> None:
    rules = {"default": {"period": "1h", "msgquota": 1, "enforce": False, "msg": "no"}}
    running, postfix = start(rules)
    with postfix.login() as session:
        assert [is_accepted(session) for _ in range(3)] == [True] * 3
    wait_for_log(running, re.escape("quota 1/1 (100.00%), period=3600, action=ACCEPT, "))
    wait_for_log(
        running, re.escape("quota 3/1 (300.00%), period=3600, action=REJECT (not enforced), ")
    )
    assert "action=REJECT, " not in running.log()


def test_no_limit_and_no_sending(start: Start) -> None:
    rules = {
        "default": {"period": "1h", "msgquota": 0, "msg": "not you"},
        "example.*": {"msgquota": "unlimited"},
    }
    running, postfix = start(rules, users=(ALICE, "bob@other.example"))
    with postfix.login() as alice, postfix.login("bob@other.example") as bob:
        assert [is_accepted(alice) for _ in range(3)] == [True] * 3
        assert refusal(bob)[1].endswith(": not you")
    wait_for_log(
        running,
        re.escape("rule=example.*, quota 3/unlimited (0.00%), period=3600, action=ACCEPT, "),
    )
