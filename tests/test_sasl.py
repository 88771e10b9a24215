"""One account, many logins: what SASL servers let pass as the same user, and what closes it.

Each row of SECURITY.md's table that is about a server of Debian's is shown with that server.
"""

import smtplib
import sqlite3
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from helpers import TEXT, StartDaemon, StartPostfix, require
from servers.daemon import Daemon
from servers.postfix import Postfix, is_accepted, service
from servers.process import wait_for_log
from servers.saslauthd import Saslauthd

RULES = {
    "default": {"period": 3600, "msgquota": 2, "msg": TEXT},
    "vip.example": {"msgquota": 100},
}
HOST = "mail.example.com"  # Postfix's own name, with which libsasl completes a login

StartWithSaslauthd = Callable[..., Postfix]


@pytest.fixture
def with_saslauthd(
    postfix: StartPostfix, new_directory: Callable[[], Path]
) -> Iterator[StartWithSaslauthd]:
    """Start Postfix with a saslauthd: with_saslauthd(daemon, *its_options)."""
    require("saslauthd", "unshare", root=True)
    with ExitStack() as stack:

        def start(daemon: Daemon, *options: str) -> Postfix:
            instance = postfix(service(daemon))
            stack.enter_context(Saslauthd(new_directory(), instance, *options))
            return instance

        yield start


def log_in(session: smtplib.SMTP, login: str) -> bool:
    """smtplib knows ASCII only."""
    plain = b64encode(f"\0{login}\0{Postfix.PASSWORD}".encode()).decode()
    return session.docmd("AUTH", f"PLAIN {plain}")[0] == 235


def accepted(instance: Postfix, *logins: str) -> list[bool]:
    """Whether a mail of each login passes."""
    found = []
    for login in logins:
        with instance.login(None) as session:
            assert log_in(session, login), login
            found.append(is_accepted(session))
    return found


def accounts(daemon: Daemon) -> list[str]:
    with closing(sqlite3.connect(daemon.ledger)) as ledger:
        return [name for (name,) in ledger.execute("SELECT account FROM sends ORDER BY account")]


SPELLINGS = ("alice@1", "alice@2", "alice@vip.example", "alice")


def test_saslauthd_ignores_the_domain(
    daemon: StartDaemon, with_saslauthd: StartWithSaslauthd
) -> None:
    """As Debian starts it, without -r: what SECURITY.md warns of."""
    started = daemon(rules=RULES)
    instance = with_saslauthd(started)
    assert accepted(instance, *SPELLINGS) == [True] * 4
    assert accounts(started) == sorted(SPELLINGS)


@pytest.mark.parametrize(("domain", "account"), [("", "alice"), ("x.org", "alice@x.org")])
def test_ignoredomain(
    daemon: StartDaemon, with_saslauthd: StartWithSaslauthd, domain: str, account: str
) -> None:
    started = daemon({"_ignoredomain": True, "_defaultdomain": domain}, RULES)
    instance = with_saslauthd(started)
    logins = (*SPELLINGS, "alice@x＠vip.example", "alice@")
    assert accepted(instance, *logins) == [True, True, False, False, False, False]
    assert accounts(started) == [account] * 2
    wait_for_log(started, "sasl_username=alice@vip.example, rcpt=.*, action=REJECT")  # as it came


def test_saslauthd_with_the_domain(daemon: StartDaemon, with_saslauthd: StartWithSaslauthd) -> None:
    """-r: PAM is asked for the whole login, and knows no alice@1."""
    started = daemon(rules=RULES)
    instance = with_saslauthd(started, "-r")
    for login in ("alice@1", "alice@vip.example"):
        with instance.login(None) as session:
            assert not log_in(session, login)
    assert accepted(instance, "alice") == [True]
    assert accounts(started) == ["alice"]


@pytest.mark.parametrize("domain", ["", HOST])
def test_sasldb_completes_a_login(
    daemon: StartDaemon, no_warning: StartPostfix, domain: str
) -> None:
    """With an empty smtpd_sasl_local_domain, as by default: alice is also alice@HOST."""
    started = daemon({"_defaultdomain": domain}, RULES)
    instance = no_warning(service(started), users=[f"alice@{HOST}"])
    assert instance.postconf("-h", "smtpd_sasl_local_domain") == "\n"
    logins = ("alice", f"alice@{HOST}", "alice", f"alice@{HOST}")
    if domain:
        assert accepted(instance, *logins) == [True, True, False, False]
        assert accounts(started) == [f"alice@{HOST}"] * 2
    else:  # what SECURITY.md warns of
        assert accepted(instance, *logins) == [True] * 4
        assert accounts(started) == ["alice"] * 2 + [f"alice@{HOST}"] * 2
