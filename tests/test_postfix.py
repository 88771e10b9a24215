"""End to end: a real SMTP client, Debian's Postfix with its stock entries, and real MariaDB."""

import smtplib
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import require
from servers import (
    LOOPBACK,
    Daemon,
    Database,
    MariaDB,
    Postfix,
    any_certificate,
    wait_for,
)

ALICE = "alice@example.com"
MESSAGE = "Subject: test\n\nA message.\n"
TEXT = "Ops!!! Você já mandou o limite"
GENEROUS = {"default": {"period": 3600, "msgquota": 1000, "msg": TEXT}}

StartDaemon = Callable[..., Daemon]
StartPostfix = Callable[..., Postfix]


def quota(msgquota: int, period: int = 3600) -> dict[str, object]:
    """Return quotarules.json with one rule."""
    return {"default": {"period": period, "msgquota": msgquota, "msg": f" {TEXT} "}}


def service(daemon: Daemon) -> str:
    """Return what README.md writes into main.cf."""
    return f"check_policy_service inet:{LOOPBACK}:{daemon.port}"


def recipients(number: int) -> list[str]:
    """Return so many addresses."""
    return [f"r{i}@example.net" for i in range(number)]


def send(session: smtplib.SMTP, to: list[str] | None = None) -> None:
    """Send one message; raises smtplib's errors."""
    session.sendmail(ALICE, to or recipients(1), MESSAGE)


def refusal(session: smtplib.SMTP) -> tuple[int, str]:
    """Send one message that the only recipient is refused for; return code and text."""
    with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
        send(session)
    ((code, text),) = refused.value.recipients.values()
    return code, text.decode("utf-8")


def is_accepted(session: smtplib.SMTP) -> bool:
    """Try to send one message."""
    try:
        send(session)
    except smtplib.SMTPRecipientsRefused:
        return False
    return True


@pytest.fixture
def no_warning(postfix: StartPostfix) -> Iterator[StartPostfix]:
    """Start Postfix instances whose logs may not show any trouble at the end."""
    started: list[Postfix] = []

    def start(*arguments: object, **options: object) -> Postfix:
        started.append(postfix(*arguments, **options))
        return started[-1]

    yield start
    for instance in started:
        assert not instance.warnings(), instance.log()


def test_readme_step_hooks_both_stock_entries(postfix: StartPostfix) -> None:
    instance = postfix("check_policy_service inet:127.0.0.1:1")
    assert instance.postconf("-P", "*/inet/smtpd_client_restrictions").splitlines() == [
        f"{LOOPBACK}:{port}/inet/smtpd_client_restrictions = $saslquota"
        for port in (instance.port, instance.tls_port)
    ]


def test_over_quota_is_refused_until_the_window_has_passed(
    daemon: StartDaemon, database: Database, no_warning: StartPostfix
) -> None:
    started = daemon(database.config(), quota(3, period=4))
    with no_warning(service(started)).login() as session:
        begin = time.monotonic()
        for _ in range(3):
            send(session)
        assert refusal(session) == (
            554,
            f"5.7.1 <unknown[{LOOPBACK}]>: Client host rejected: {TEXT}",
        )
        assert database.count(ALICE) == 3
        wait_for(lambda: is_accepted(session), 10, "the window passes")
        assert time.monotonic() - begin >= 4
        assert database.count(ALICE) == 4
    line = f"sasl_username={ALICE}, rcpt=r0@example.net, rule=default, quota 3/3 (100.00%), "
    wait_for(lambda: f"{line}period=4, action=ACCEPT" in started.log(), 5, "the log's line")
    assert f"{line}period=4, action=REJECT" in started.log()


def test_each_sender_has_a_quota_of_his_own(
    daemon: StartDaemon, database: Database, no_warning: StartPostfix
) -> None:
    bob = "bob@example.net"
    instance = no_warning(service(daemon(database.config(), quota(1))), users=(ALICE, bob))
    for user in (ALICE, bob):
        with instance.login(user) as session:
            assert is_accepted(session)
            assert not is_accepted(session)
    assert (database.count(ALICE), database.count(bob)) == (1, 1)


def test_submissions_entry_counts_too(
    daemon: StartDaemon, database: Database, no_warning: StartPostfix
) -> None:
    instance = no_warning(service(daemon(database.config(), quota(1))))
    with smtplib.SMTP_SSL(LOOPBACK, instance.tls_port, context=any_certificate()) as session:
        session.login(ALICE, Postfix.PASSWORD)
        send(session)
        assert refusal(session)[0] == 554


def rcpt_seconds(session: smtplib.SMTP, to: list[str]) -> float:
    """Return what all RCPT commands of one message take."""
    session.mail(ALICE)
    begin = time.monotonic()
    codes = [session.rcpt(recipient)[0] for recipient in to]
    seconds = time.monotonic() - begin
    assert set(codes) == {250}
    session.rset()
    return seconds


def test_twenty_recipients_do_not_wait(
    daemon: StartDaemon, database: Database, no_warning: StartPostfix
) -> None:
    with no_warning(service(daemon(database.config(), GENEROUS))).login() as session:
        assert min(rcpt_seconds(session, recipients(20)) for _ in range(3)) < 0.2
    assert database.count(ALICE) == 60


def test_unauthenticated_client_is_refused(
    daemon: StartDaemon, database: Database, no_warning: StartPostfix
) -> None:
    instance = no_warning(service(daemon(database.config(), GENEROUS)))
    with instance.login(None) as session:
        code, text = refusal(session)
    assert (code, text.endswith("Client host rejected: authentication required")) == (554, True)
    assert database.sql("SELECT COUNT(*) FROM sends") == "0"


def test_undelayed_reject_locks_nobody_out(
    daemon: StartDaemon, database: Database, no_warning: StartPostfix
) -> None:
    started = daemon(database.config(), quota(1))
    with no_warning(service(started), main={"smtpd_delay_reject": "no"}).login() as session:
        send(session)
        send(session)
    assert database.count(ALICE) == 0
    wait_for(lambda: "nothing is counted" in started.log(), 5, "the warning")
    assert started.log().count("nothing is counted") == 1


def test_counting_per_message_at_data(
    daemon: StartDaemon, database: Database, no_warning: StartPostfix
) -> None:
    instance = no_warning(
        service(daemon(database.config(), quota(6))),
        options={"smtpd_client_restrictions": "", "smtpd_data_restrictions": "$saslquota"},
    )
    with instance.login() as session:
        send(session, recipients(5))
        with pytest.raises(smtplib.SMTPDataError) as refused:
            send(session, recipients(2))
        assert refused.value.smtp_code == 554
        session.rset()
        send(session, recipients(1))
    assert database.sql("SELECT seq, recipients, total FROM sends").splitlines() == [
        "1\t5\t5",
        "2\t1\t6",
    ]


def test_swaks(daemon: StartDaemon, database: Database, no_warning: StartPostfix) -> None:
    require("swaks")
    instance = no_warning(service(daemon(database.config(), quota(1))))
    command = [
        *("swaks", "--server", f"{LOOPBACK}:{instance.port}", "--tls"),
        *("--auth", "PLAIN", "--auth-user", ALICE, "--auth-password", Postfix.PASSWORD),
        *("--from", ALICE, "--to", "bob@example.net"),
    ]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, timeout=60) for _ in range(2)
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert second.returncode == 24, "swaks: no recipient accepted"
    assert f"Client host rejected: {TEXT}" in second.stdout
    assert database.count(ALICE) == 1


def test_database_outage_defers_mail(
    daemon: StartDaemon, mariadb: MariaDB, database: Database, no_warning: StartPostfix
) -> None:
    instance = no_warning(service(daemon(database.config(), GENEROUS)))
    with instance.login() as session:
        send(session)
        mariadb.kill()
        code, text = refusal(session)
        assert code == 450
        assert text.endswith("quota service unavailable, try again later")
        mariadb.start()
        wait_for(lambda: is_accepted(session), 20, "the daemon finds the database again")
    assert database.count(ALICE) == 2


def test_default_action_decides_when_the_daemon_is_down(
    daemon: StartDaemon, database: Database, postfix: StartPostfix
) -> None:
    started = daemon(database.config(), quota(1))
    instance = postfix(
        "check_policy_service "
        f"{{ inet:{LOOPBACK}:{started.port}, timeout=10s, default_action=DUNNO }}"
    )
    with instance.login() as session:
        send(session)
        assert not is_accepted(session)
        started.kill9()
        send(session)
    assert database.count(ALICE) == 1


def test_postfix_outlives_a_restart_of_the_daemon(
    daemon: StartDaemon, database: Database, no_warning: StartPostfix
) -> None:
    started = daemon(database.config(), quota(2))
    with no_warning(service(started)).login() as session:
        send(session)
        assert started.terminate() == 0
        started.start()
        send(session)
        assert not is_accepted(session)
    assert database.count(ALICE) == 2
