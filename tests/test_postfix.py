"""End to end: a real SMTP client, Debian's Postfix with its stock entries, and real MariaDB."""

import re
import smtplib
import subprocess
import time

import pytest
from helpers import TEXT, StartDaemon, StartPostfix, quota, require
from servers.audit import count_rows
from servers.mariadb import Database, MariaDB
from servers.ports import LOOPBACK
from servers.postfix import (
    ALICE,
    Postfix,
    any_certificate,
    is_accepted,
    recipients,
    refusal,
    send,
    service,
)
from servers.process import wait_for, wait_for_log

GENEROUS = {"default": {"period": 3600, "msgquota": 1000, "msg": TEXT}}


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
        assert count_rows(database, ALICE) == 3
        wait_for(lambda: is_accepted(session), 10, "the window passes")
        assert time.monotonic() - begin >= 4
        assert count_rows(database, ALICE) == 4
    line = f"sasl_username={ALICE}, rcpt=r0@example.net, rule=default, quota 3/3 (100.00%), "
    wait_for_log(started, re.escape(f"{line}period=4, action=ACCEPT"))
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
    assert (count_rows(database, ALICE), count_rows(database, bob)) == (1, 1)


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
        assert min(rcpt_seconds(session, recipients(20)) for _ in range(3)) < 0.5
    assert count_rows(database, ALICE) == 60


def test_unauthenticated_client_is_refused(
    daemon: StartDaemon, database: Database, no_warning: StartPostfix
) -> None:
    instance = no_warning(service(daemon(database.config(), GENEROUS)))
    with instance.login(None) as session:
        code, text = refusal(session)
    assert (code, text.endswith("Client host rejected: authentication required")) == (554, True)
    assert count_rows(database) == 0


def test_undelayed_reject_locks_nobody_out(
    daemon: StartDaemon, database: Database, no_warning: StartPostfix
) -> None:
    started = daemon(database.config(), quota(1))
    with no_warning(service(started), main={"smtpd_delay_reject": "no"}).login() as session:
        send(session)
        send(session)
    assert count_rows(database, ALICE) == 0
    wait_for_log(started, "nothing is counted")
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
    assert count_rows(database, ALICE) == 1


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
    assert count_rows(database, ALICE) == 2


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
    assert count_rows(database, ALICE) == 1


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
    assert count_rows(database, ALICE) == 2
