"""saslquotactl doctor: what it says, whether that is true, and whether its commands mend it."""

import dataclasses
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import StartDaemon, StartPostfix, mysql_config, require
from servers.daemon import SERVICE, Daemon, as_user
from servers.mariadb import Database, MariaDB, changed
from servers.ports import LOOPBACK, free_port
from servers.postfix import Postfix, recipients, refusal, send, service
from servers.process import IS_ROOT, ROOT, wait_for_log

import saslquota
import saslquotactl
import saslquotadoctor
from saslquota import Config, Entry, make_store
from saslquotactl import Session
from saslquotadoctor import Finding

require("postconf")

# --- Set-ups of Postfix ---------------------------------------------------------------------------

MAIN = """
compatibility_level = 3.6
mydestination =
mynetworks = 127.0.0.0/8
smtpd_sasl_type = dovecot
saslquota = check_policy_service { inet:127.0.0.1:10008, timeout=10s, default_action=DUNNO }
"""
NETWORK = "check_policy_service { inet:127.0.0.1:10008, timeout=10s, default_action=DUNNO }"
SMTP = "smtp inet n - y - - smtpd\n"
CLIENT = "smtpd_client_restrictions"
RECIPIENT = "smtpd_recipient_restrictions"
DATA = "smtpd_data_restrictions"


def entry(*options: str, name: str = "submission", kind: str = "inet", chroot: str = "y") -> str:
    """An entry of master.cf on which users log in."""
    lines = ["smtpd_sasl_auth_enable=yes", *options]
    return f"{name} {kind} n - {chroot} - - smtpd\n" + "".join(f"  -o {line}\n" for line in lines)


def no_login(*options: str, name: str) -> str:
    return entry(*options, name=name).replace("=yes", "=no", 1)


HOOKED = f"{CLIENT}=$saslquota"
SUBMISSION = "submission/inet"


class SetUp(NamedTuple):
    """What stands in master.cf and at main.cf's end, and what doctor must say: `STATE SERVICE text`
    for each finding that is not OK."""

    master: str
    main: str = ""
    config: dict[str, Any] = {}  # noqa: RUF012
    says: tuple[str, ...] = ()


def problem(text: str, service: str = SUBMISSION) -> tuple[str, ...]:
    return (f"PROBLEM {service} {text}",)


def warning(text: str, service: str = SUBMISSION) -> tuple[str, ...]:
    return (f"WARNING {service} {text}",)


NEVER = problem("the daemon is never asked")
NOBODY = ("PROBLEM  no service asks",)
REFUSED = "mail without a login, as of other servers, is refused"
UNCOUNTED = "users can log in here, too, and are not counted"
SASLQUOTA = "saslquota = check_policy_service"

SETUPS = {
    # As it should be
    "README": SetUp(SMTP + entry(HOOKED) + entry(HOOKED, name="submissions")),
    "iRedMail": SetUp(
        SMTP + entry(f"{CLIENT}=$saslquota,permit_sasl_authenticated,reject", name="465")
    ),
    "mailcow": SetUp(
        SMTP
        + entry(
            f"{CLIENT}=$saslquota,permit_mynetworks,permit_sasl_authenticated,reject", name="588"
        )
    ),
    "a variable of the user's": SetUp(
        SMTP + entry(f"{CLIENT}=$mua"), "mua = $saslquota, permit_sasl_authenticated, reject"
    ),
    "a variable that the entry replaces": SetUp(
        SMTP + entry("mua=$saslquota"), f"mua =\n{CLIENT} = ${{mua}}\n"
    ),
    "DATA": SetUp(SMTP + entry(f"{DATA}=reject_unauth_pipelining,$saslquota")),
    "end of DATA": SetUp(SMTP + entry("smtpd_end_of_data_restrictions=$saslquota")),
    "sender": SetUp(SMTP + entry("smtpd_sender_restrictions=$saslquota")),
    "relay": SetUp(
        SMTP + entry("smtpd_relay_restrictions=$saslquota,permit_sasl_authenticated,reject")
    ),
    "the long form": SetUp(
        SMTP + entry(f"{{ {CLIENT} = {NETWORK}, permit_sasl_authenticated, reject }}")
    ),
    "a restriction class": SetUp(
        SMTP + entry(f"{CLIENT}=quota"),
        "quota = inner\nother = permit\ninner = $saslquota\n"
        "smtpd_restriction_classes = other, quota, inner\n",
    ),
    "localhost": SetUp(
        SMTP + entry(HOOKED), f"{SASLQUOTA} {{ inet:localhost:10008, default_action=DUNNO }}"
    ),
    "another address": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ inet:[::1]:10009, default_action=DUNNO }}",
        {"bind": "::1", "bindport": 10009},
    ),
    "every address": SetUp(SMTP + entry(HOOKED), config={"bind": "0.0.0.0"}),
    "a relative socket": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ unix:saslquota/policy, default_action=DUNNO }}",
        {"bind": "unix:/var/spool/postfix/saslquota/policy"},
    ),
    "an absolute socket without chroot": SetUp(
        SMTP + entry(HOOKED, chroot="n"),
        f"{SASLQUOTA} {{ unix:/run/saslquota/policy, default_action=DUNNO }}",
        {"bind": "unix:/run/saslquota/policy"},
    ),
    "commented out": SetUp(
        SMTP + entry(HOOKED) + "#" + entry(name="submissions").replace("\n ", "\n# ")
    ),
    "a content filter": SetUp(
        SMTP
        + entry(HOOKED)
        + no_login("content_filter=", f"{CLIENT}=permit_mynetworks,reject", name="127.0.0.1:10025")
    ),
    "after checks": SetUp(
        SMTP
        + entry(
            f"{CLIENT}=reject_unknown_client_hostname,$saslquota,permit_sasl_authenticated,reject"
        )
    ),
    "after greylisting": SetUp(
        SMTP + entry(f"{CLIENT}=check_policy_service,inet:127.0.0.1:10023,$saslquota")
    ),
    "before a check, with DUNNO": SetUp(
        SMTP + entry("smtpd_sender_restrictions=$saslquota,reject_sender_login_mismatch"),
        config={"okaction": "DUNNO"},
    ),
    "port 25, with DUNNO": SetUp(
        entry(f"{CLIENT}=$saslquota", name="smtp"), config={"nosasl": "DUNNO"}
    ),
    "before greylisting that users do not reach": SetUp(
        SMTP
        + entry(
            f"{CLIENT}=$saslquota,permit_sasl_authenticated,check_policy_service,inet:127.0.0.1:10023"
        )
    ),
    "a default action for all": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} inet:127.0.0.1:10008\nsmtpd_policy_service_default_action = DUNNO",
    ),
    "a nested default action": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ inet:127.0.0.1:10008, {{ default_action = 451 4.7.1 later }} }}",
    ),
    "before what users pass anyway": SetUp(
        SMTP + entry(f"{RECIPIENT}=$saslquota,reject_unauth_destination")
    ),
    "permit_mynetworks without networks": SetUp(
        SMTP + entry(f"{CLIENT}=permit_mynetworks,$saslquota"), "mynetworks =\n"
    ),
    # Never asked
    "never": SetUp(SMTP + entry(), says=(*NEVER, *NOBODY)),
    "one of two": SetUp(
        SMTP + entry(HOOKED) + entry(name="smtps"),
        says=problem("the daemon is never asked", "smtps/inet"),
    ),
    "one on loopback only": SetUp(
        SMTP + entry(HOOKED) + entry(name="127.0.0.1:587"),
        says=problem("the daemon is never asked", "127.0.0.1:587/inet"),
    ),
    "never, without a definition": SetUp(SMTP + entry(), "saslquota =\n", says=(*NEVER, *NOBODY)),
    "never, and a value with checks": SetUp(
        SMTP + entry(f"{CLIENT}=permit_mynetworks,reject_unknown_client_hostname,permit"),
        says=(*NEVER, *NOBODY),
    ),
    "an empty option in the way of main.cf": SetUp(
        no_login(f"{CLIENT}=", name="smtp") + entry(f"{CLIENT}="),
        f"{CLIENT} = $saslquota\n",
        says=(*NEVER, *NOBODY),
    ),
    "another policy service only": SetUp(
        SMTP + entry(f"{CLIENT}=check_policy_service,inet:127.0.0.1:10023"), says=(*NEVER, *NOBODY)
    ),
    "a class that only a table names": SetUp(
        SMTP + entry("smtpd_sender_restrictions=check_sender_access,hash:/etc/postfix/senders"),
        "smtpd_restriction_classes = quota\nquota = $saslquota",
        says=(*warning("the daemon is asked only where a table says quota"), *NOBODY),
    ),
    # Twice, or in the wrong place
    "the option twice": SetUp(
        SMTP + entry(HOOKED, f"{CLIENT}="),
        says=(
            *problem(f"-o {CLIENT} stands more than once, only the last counts: (empty)"),
            *NEVER,
            *NOBODY,
        ),
    ),
    "the option twice, rightly at last": SetUp(
        SMTP + entry(f"{CLIENT}=", HOOKED),
        says=warning(f"-o {CLIENT} stands more than once, only the last counts: $saslquota"),
    ),
    "in two lists": SetUp(
        SMTP + entry(HOOKED, f"{RECIPIENT}=$saslquota,permit_sasl_authenticated,reject"),
        says=problem(f"the daemon is asked in {CLIENT} and again in {RECIPIENT}"),
    ),
    "in main.cf, too": SetUp(
        no_login(f"{RECIPIENT}=", name="smtp") + entry(HOOKED),
        f"{RECIPIENT} = $saslquota, permit_sasl_authenticated, reject",
        says=problem(f"the daemon is asked in {CLIENT} and again in {RECIPIENT}"),
    ),
    "twice in a list, with DUNNO": SetUp(
        SMTP + entry(f"{CLIENT}=$saslquota,$saslquota"),
        config={"okaction": "DUNNO"},
        says=problem(f"the daemon is asked in {CLIENT} and again in {CLIENT}"),
    ),
    **{
        f"behind {before}": SetUp(
            SMTP + entry(f"{RECIPIENT}={before},$saslquota"),
            says=problem(f"{RECIPIENT}: behind {before} the daemon is never asked"),
        )
        for before in ("permit", "permit_sasl_authenticated", "reject", "defer")
    },
    "behind a permit in a class": SetUp(
        SMTP + entry(f"{CLIENT}=users,$saslquota"),
        "smtpd_restriction_classes = users\nusers = Permit_SASL_authenticated",
        says=problem(f"{CLIENT}: behind permit_sasl_authenticated the daemon is never asked"),
    ),
    "behind both": SetUp(
        SMTP + entry(f"{CLIENT}=permit_mynetworks,permit_sasl_authenticated,reject,$saslquota"),
        says=problem(f"{CLIENT}: behind permit_sasl_authenticated the daemon is never asked"),
    ),
    "behind permit_mynetworks": SetUp(
        SMTP + entry(f"{CLIENT}=permit_mynetworks,$saslquota,permit_sasl_authenticated,reject"),
        says=warning(f"{CLIENT}: what permit_mynetworks permits is not counted"),
    ),
    "behind certificates": SetUp(
        SMTP + entry(f"{CLIENT}=permit_tls_clientcerts,$saslquota"),
        says=warning(f"{CLIENT}: what permit_tls_clientcerts permits is not counted"),
    ),
    "behind a table": SetUp(
        SMTP + entry(f"{RECIPIENT}=check_recipient_access,hash:/etc/postfix/own,$saslquota,reject"),
        says=warning(f"{RECIPIENT}: what check_recipient_access hash:/etc/postfix/own permits"),
    ),
    "behind permit_mynetworks and a check": SetUp(
        SMTP
        + entry(
            f"{CLIENT}=permit_mynetworks,reject_unlisted_sender,$saslquota,permit_sasl_authenticated"
        ),
        says=warning(f"{CLIENT}: what permit_mynetworks permits is not counted"),
    ),
    "warn_if_reject": SetUp(
        SMTP + entry(f"{CLIENT}=warn_if_reject,reject_unlisted_sender,warn_if_reject,$saslquota"),
        says=problem(f"{CLIENT}: behind warn_if_reject the daemon refuses nothing"),
    ),
    "before a check": SetUp(
        SMTP + entry("smtpd_sender_restrictions=$saslquota,reject_sender_login_mismatch"),
        says=problem(
            "smtpd_sender_restrictions: the daemon's OK ends the list before"
            " reject_sender_login_mismatch"
        ),
    ),
    "before a table": SetUp(
        SMTP
        + entry(
            f"{CLIENT}=$saslquota,check_client_access,cidr:/x,permit_sasl_authenticated,reject"
        ),
        says=problem(f"{CLIENT}: the daemon's OK ends the list before check_client_access cidr:/x"),
    ),
    "before greylisting": SetUp(
        SMTP
        + entry(f"{CLIENT}=$saslquota,check_policy_service,{{inet:127.0.0.1:10023,timeout=9s}}"),
        says=warning(f"{CLIENT}: the daemon's OK ends the list before check_policy_service"),
    ),
    "before a login": SetUp(
        SMTP + entry(HOOKED, "smtpd_delay_reject=no"),
        says=problem(f"{CLIENT} asks before anybody can log in"),
    ),
    "before a login, in main.cf": SetUp(
        no_login("smtpd_helo_restrictions=", name="smtp") + entry(),
        "smtpd_delay_reject = no\nsmtpd_helo_restrictions = $saslquota",
        says=problem("smtpd_helo_restrictions asks before anybody can log in"),
    ),
    # Where nobody logs in
    "port 25": SetUp(entry(name="smtp") + entry(HOOKED), says=problem(UNCOUNTED, "smtp/inet")),
    "port 25 by main.cf": SetUp(
        SMTP + entry(HOOKED),
        "smtpd_sasl_auth_enable = yes",
        says=problem(UNCOUNTED, "smtp/inet"),
    ),
    "port 25 behind postscreen": SetUp(
        "smtp inet n - y - 1 postscreen\nsmtpd pass - - y - - smtpd\n" + entry(HOOKED),
        "smtpd_sasl_auth_enable = yes",
        says=problem(UNCOUNTED, "smtpd/pass"),
    ),
    "port 25 as a number": SetUp(
        entry(name="0.0.0.0:25") + entry(HOOKED), says=problem(UNCOUNTED, "0.0.0.0:25/inet")
    ),
    "port 25 asks": SetUp(
        entry(HOOKED, name="smtp") + entry(HOOKED), says=problem(REFUSED, "smtp/inet")
    ),
    "port 25 asks about others only": SetUp(
        SMTP + entry(HOOKED, "smtpd_recipient_restrictions="),
        f"{RECIPIENT} = permit_sasl_authenticated, reject_unauth_destination, $saslquota",
        says=problem(REFUSED, "smtp/inet"),
    ),
    "main.cf asks on every port": SetUp(
        SMTP + entry() + no_login(name="127.0.0.1:10025"),
        HOOKED.replace("=", " = "),
        says=(*problem(REFUSED, "smtp/inet"), *problem(REFUSED, "127.0.0.1:10025/inet")),
    ),
    "a content filter in mynetworks": SetUp(
        SMTP
        + entry(HOOKED)
        + no_login(f"{CLIENT}=permit_mynetworks,$saslquota", name="[::1]:10025")
    ),
    "a content filter with logins": SetUp(
        no_login(name="smtp")
        + entry(HOOKED)
        + "127.0.0.1:10025 inet n - n - - smtpd -o content_filter=\n",
        "smtpd_sasl_auth_enable = yes",
        says=warning(UNCOUNTED, "127.0.0.1:10025/inet"),
    ),
    "submission without logins": SetUp(no_login(HOOKED, name="submission"), says=problem(REFUSED)),
    "nobody logs in": SetUp(SMTP, says=NOBODY),
    # How it is asked
    "another port": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ inet:127.0.0.1:10009, default_action=DUNNO }}",
        says=problem("asks inet:127.0.0.1:10009, but saslquota is inet:127.0.0.1:10008"),
    ),
    "another port, written out": SetUp(
        SMTP
        + entry(
            f"{CLIENT}=check_policy_service,inet:127.0.0.1:1008",
            "smtpd_policy_service_default_action=DUNNO",
        ),
        says=problem("asks inet:127.0.0.1:1008, but saslquota is inet:127.0.0.1:10008"),
    ),
    "another host": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ inet:192.0.2.1:10008, default_action=DUNNO }}",
        says=problem("asks inet:192.0.2.1:10008, but saslquota is inet:127.0.0.1:10008"),
    ),
    "quite another port": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ inet:127.0.0.1:4444, default_action=DUNNO }}",
        says=problem("asks inet:127.0.0.1:4444, but saslquota is inet:127.0.0.1:10008"),
    ),
    "a port without its type": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ 127.0.0.1:10008, default_action=DUNNO }}",
        says=problem("asks 127.0.0.1:10008, but saslquota is inet:127.0.0.1:10008"),
    ),
    "IPv6": SetUp(
        SMTP + entry(HOOKED),
        config={"bind": "::1"},
        says=problem("asks inet:127.0.0.1:10008, but saslquota is inet:[::1]:10008"),
    ),
    "a port for a socket": SetUp(
        SMTP + entry(HOOKED),
        config={"bind": "unix:/var/spool/postfix/saslquota/policy"},
        says=problem("asks inet:127.0.0.1:10008, but saslquota is unix:saslquota/policy, and"),
    ),
    "an absolute socket in a chroot": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ unix:/var/spool/postfix/saslquota/policy, default_action=DUNNO }}",
        {"bind": "unix:/var/spool/postfix/saslquota/policy"},
        problem(
            "asks unix:/var/spool/postfix/saslquota/policy, but saslquota is"
            " unix:saslquota/policy, and"
        ),
    ),
    "a socket outside of the chroot": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ unix:/run/saslquota/policy, default_action=DUNNO }}",
        {"bind": "unix:/run/saslquota/policy"},
        problem(
            "asks unix:/run/saslquota/policy, but saslquota is unix:/run/saslquota/policy, and"
            " this service is in the chroot /var/spool/postfix"
        ),
    ),
    "a time-out": SetUp(
        SMTP + entry(HOOKED), config={"dbtimeout": 10}, says=problem("waits 10s for the daemon")
    ),
    "a time-out for all": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ inet:localhost:10008, default_action=DUNNO }}\n"
        "smtpd_policy_service_timeout = 5",
        says=problem("waits 5 for the daemon"),
    ),
    "no default action": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} inet:127.0.0.1:10008",
        says=warning("default_action is not set: while the daemon is down, mail gets 451 4.3.5"),
    ),
    "a connection for each request": SetUp(
        SMTP + entry(HOOKED),
        "smtpd_policy_service_request_limit = 1",
        says=warning("request_limit=1: each request needs a connection of its own"),
    ),
    # Cyrus SASL
    "Cyrus": SetUp(
        SMTP + entry(HOOKED),
        "smtpd_sasl_type = cyrus\nmyhostname = mail.example.com",
        says=("WARNING  smtpd_sasl_local_domain is empty: alice and alice@mail.example.com are",),
    ),
    "Cyrus, a default domain": SetUp(
        SMTP + entry(HOOKED), "smtpd_sasl_type = cyrus", {"defaultdomain": "mail.example.com"}
    ),
    "Cyrus, a local domain": SetUp(
        SMTP + entry(HOOKED), "smtpd_sasl_type = cyrus\nsmtpd_sasl_local_domain = $myhostname"
    ),
}


def write(setup: SetUp, directory: Path) -> Config:
    directory.mkdir(exist_ok=True)
    (directory / "main.cf").write_text(f"{MAIN}{setup.main}\n")
    (directory / "master.cf").write_text(setup.master)
    let_cool_down(directory)
    return Config(path=directory / "saslquota.json", **setup.config)


def let_cool_down(directory: Path) -> None:
    """Postfix waits a second before it reads a file that has just been changed."""
    for name in ("main.cf", "master.cf"):
        os.utime(directory / name, (time.time() - 60,) * 2)


def examine(config: Config, directory: Path) -> list[Finding]:
    let_cool_down(directory)
    return list(saslquotadoctor.examine_postfix(config, str(directory)))


def bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state != "OK"]


def run_remedy(finding: Finding) -> None:
    done = subprocess.run(finding.remedy, shell=True, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, (finding.remedy, done.stderr)
    assert "fatal" not in done.stderr, (finding.remedy, done.stderr)


each_setup = pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())


@each_setup
def test_what_it_says(setup: SetUp, tmp_path: Path) -> None:
    findings = examine(write(setup, tmp_path), tmp_path)
    told = [f"{f.state} {f.service} {f.text}" for f in bad(findings)]
    assert len(told) == len(setup.says), told
    for text, expected in zip(told, setup.says, strict=True):
        assert text.startswith(expected)
    told_of = {finding.service for finding in findings}
    assert {f"{line.split()[0]}/{line.split()[1]}" for line in setup.master.splitlines()
            if line[0] not in " #" and "postscreen" not in line} <= told_of  # fmt: skip


NO_REMEDY = ("no service asks", "the daemon is asked only where", "what check_")


@pytest.mark.parametrize(
    "setup", [s for s in SETUPS.values() if s.says], ids=[n for n, s in SETUPS.items() if s.says]
)
def test_each_command_mends_what_it_stands_under(setup: SetUp, tmp_path: Path) -> None:
    """And one after the other they mend everything."""
    config = write(setup, tmp_path)
    before = bad(examine(config, tmp_path))
    for finding in before:
        assert bool(finding.remedy) != any(text in finding.text for text in NO_REMEDY), finding
    for finding in before:
        if finding.remedy:
            write(setup, tmp_path)
            run_remedy(finding)
            gone = {(f.service, f.text) for f in examine(config, tmp_path)}
            assert (finding.service, finding.text) not in gone
    for _ in range(6):
        left = [finding for finding in bad(examine(config, tmp_path)) if finding.remedy]
        if not left:
            break
        run_remedy(left[0])
    rest = bad(examine(config, tmp_path))
    assert all(any(text in finding.text for text in NO_REMEDY) for finding in rest), rest


# --- Is it true? ----------------------------------------------------------------------------------


def counted(daemon: Daemon) -> int:
    with closing(sqlite3.connect(daemon.ledger)) as ledger:
        ((number,),) = ledger.execute("SELECT COALESCE(SUM(recipients), 0) FROM sends")
    return int(number)


def send_two(instance: Postfix) -> None:
    with instance.login() as session:
        send(session, recipients(2))


BEFORE = {"smtpd_sender_restrictions": "$saslquota"}
MOVED = {"smtpd_client_restrictions": ""}


@pytest.mark.parametrize(
    ("options", "expected", "says"),
    [
        ({}, 2, ""),
        ({**MOVED, "smtpd_end_of_data_restrictions": "$saslquota"}, 2, ""),
        ({**MOVED, "smtpd_relay_restrictions": "class,reject"}, 2, ""),
        (MOVED, 0, "the daemon is never asked"),
        ({CLIENT: "permit_sasl_authenticated, $saslquota"}, 0, "behind permit_"),
        (BEFORE, 4, "and again in smtpd_sender_restrictions: everything counts twice"),
        ({"smtpd_delay_reject": "no"}, 0, "asks before anybody can log in"),
    ],
    ids=["README", "end of DATA", "class", "moved away", "behind", "twice", "no delay"],
)  # fmt: skip
def test_with_a_real_postfix(
    daemon: StartDaemon, postfix: StartPostfix, options: dict[str, str], expected: int, says: str
) -> None:
    """What doctor finds is so, and what it advises leads to what should be."""
    started = daemon()
    main = {"smtpd_restriction_classes": "class", "class": "$saslquota"}
    instance = postfix(service(started), main, options)
    send_two(instance)
    assert counted(started) == expected
    config = Config(path=started.config_file, bindport=started.port)
    problems = [f for f in examine(config, instance.config) if f.state == "PROBLEM"]
    assert any(says in finding.text for finding in problems) if says else not problems
    while problems:
        run_remedy(problems[0])
        problems = [f for f in examine(config, instance.config) if f.state == "PROBLEM"]
    instance.stop()
    instance.start()
    send_two(instance)
    assert counted(started) == expected + 2


def test_a_default_action_that_is_advised(daemon: StartDaemon, postfix: StartPostfix) -> None:
    started = daemon()
    instance = postfix(service(started))
    config = Config(path=started.config_file, bindport=started.port)
    (found, _) = [f for f in bad(examine(config, instance.config)) if "default_action" in f.text]
    run_remedy(found)
    assert "default_action" not in str(bad(examine(config, instance.config)))
    instance.stop()
    instance.start()
    started.terminate()
    with instance.login() as session:
        assert refusal(session)[1].endswith("quota service unavailable")


def test_a_local_domain_that_is_advised(daemon: StartDaemon, postfix: StartPostfix) -> None:
    host = "mail.example.com"
    started = daemon()
    instance = postfix(service(started), users=[f"alice@{host}"])
    config = Config(path=started.config_file, bindport=started.port)
    (found,) = [f for f in bad(examine(config, instance.config)) if "local_domain" in f.text]
    run_remedy(found)
    instance.stop()
    instance.start()
    for login in ("alice", f"alice@{host}"):
        with instance.login(login) as session:
            send(session)
    with closing(sqlite3.connect(started.ledger)) as ledger:
        assert ledger.execute("SELECT DISTINCT account FROM sends").fetchall() == [
            (f"alice@{host}",)
        ]


# --- Cyrus SASL -----------------------------------------------------------------------------------

CYRUS = "smtpd_sasl_type = cyrus\nsmtpd_sasl_local_domain =\n"


@pytest.fixture
def sasl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set-up with saslauthd: `default` is its file in /etc/default, `proc` has its processes."""
    (tmp_path / "smtpd.conf").write_text("mech_list: PLAIN\npwcheck_method: auxprop saslauthd\n")
    (tmp_path / "default").write_text('START=yes\nOPTIONS="-c -m /var/run/saslauthd"\n')
    main = f"{CYRUS}cyrus_sasl_config_path = {tmp_path}\n"
    write(SetUp(SMTP + entry(HOOKED), main), tmp_path)
    monkeypatch.setattr(saslquotadoctor, "SASLAUTHD", (str(tmp_path / "default*"),))
    monkeypatch.setattr(saslquotadoctor, "PROCESSES", str(tmp_path / "proc/*/cmdline"))
    return tmp_path


def run_saslauthd(directory: Path, *options: str) -> None:
    (directory / "proc" / "1").mkdir(parents=True)
    command = b"\0".join(map(str.encode, ("/usr/sbin/saslauthd", *options, "")))
    (directory / "proc" / "1" / "cmdline").write_bytes(command)


def told(directory: Path, **settings: Any) -> list[Finding]:
    return bad(examine(Config(path=directory / "saslquota.json", **settings), directory))


def test_saslauthd_without_r(sasl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sasl / "service").write_text("#!/bin/sh\n")
    (sasl / "service").chmod(0o755)
    monkeypatch.setenv("PATH", str(sasl), prepend=os.pathsep)
    (found,) = told(sasl)
    assert found[:2] == ("PROBLEM", "postfix")
    assert found.text.startswith("saslauthd without -r: alice, alice@1")
    run_remedy(found)
    assert told(sasl) == []
    assert 'OPTIONS="-r -c -m /var/run/saslauthd"' in (sasl / "default").read_text()


def test_a_saslauthd_that_runs_counts_more_than_its_file(sasl: Path) -> None:
    run_saslauthd(sasl, "-a", "pam", "-cr", "-m", "/run/saslauthd")
    assert told(sasl) == []
    (sasl / "default").write_text('OPTIONS="-r"\n')
    (sasl / "proc" / "1" / "cmdline").write_bytes(b"saslauthd\0-m\0/var/run-r\0")
    assert len(told(sasl)) == 1


def test_saslauthd_whose_realm_is_cut_off(sasl: Path) -> None:
    assert told(sasl, ignoredomain=True) == []


def test_a_saslauthd_that_something_else_starts(sasl: Path) -> None:
    (sasl / "default").unlink()
    assert told(sasl) == []
    run_saslauthd(sasl, "-a", "pam")
    assert [finding.remedy for finding in told(sasl)] == [""]


# --- Settings, store, daemon ----------------------------------------------------------------------

HOUR = 3_600_000_000  # microseconds
RULES = '{"default": {"period": 3600, "msgquota": 100}}'


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Session]:
    """With an SQLite store in which alice has sent one mail just now."""
    (tmp_path / "quotarules.json").write_text(RULES)
    config = Config(path=tmp_path / "saslquota.json", store="sqlite")
    store = make_store(config)
    store.open()
    store.append([Entry("alice", 1, 1, store.now(), 1, 1, "", 1)])
    store.close()
    session = Session(config)
    yield session
    session.close()


@pytest.fixture
def shared(database: Database, tmp_path: Path) -> Iterator[Session]:
    """With a store in MariaDB."""
    config = dataclasses.replace(mysql_config(database), path=tmp_path / "saslquota.json")
    session = Session(config)
    yield session
    session.close()


@pytest.fixture
def as_root_of_it(server: MariaDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mysql` is this server's."""
    client = tmp_path / "mysql"
    client.write_text(f'#!/bin/sh\nexec mariadb --no-defaults -uroot -S {server.socket} "$@"\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.fixture(params=["local", "shared"])
def each(request: pytest.FixtureRequest) -> Session:
    found: Session = request.getfixturevalue(request.param)
    return found


def store_says(session: Session) -> list[tuple[str, str, str]]:
    return [said for said in saslquotadoctor.check_store(session) if said[0] != "OK"]


def store_finds(session: Session) -> list[Finding]:
    return bad(list(saslquotadoctor.attempt("store", "", saslquotadoctor.check_store(session))))


def append(session: Session, *rows: tuple[str, int, int]) -> None:
    session.store.append([Entry(name, seq, 1, at, 1, seq, "", 1) for name, seq, at in rows])


def test_a_store_that_is_well(each: Session) -> None:
    append(each, ("bob", 1, each.now))
    assert store_says(each) == []


def test_no_store_yet(tmp_path: Path) -> None:
    session = Session(Config(path=tmp_path / "saslquota.json", store="sqlite"))
    ((state, text, _),) = saslquotadoctor.check_store(session)
    assert (state, text.endswith("will be made at the first start")) == ("OK", True)


def test_a_send_dated_ahead(each: Session) -> None:
    append(each, ("bob", 1, each.now + HOUR))
    ((state, text, _),) = store_says(each)
    assert state == "WARNING"
    assert re.match(r"the newest send is dated 3(599|600) s ahead of the clock", text)


def test_the_clocks_differ(each: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(each.store, "now", lambda: time.time_ns() // 1000 + 5_000_000)
    ((state, text, _),) = store_says(each)
    assert (state, text) == ("WARNING", "its clock differs from this machine's by +5.0 s")


def test_the_purge_is_behind(each: Session) -> None:
    """An account's newest send is kept for ever."""
    old = each.now - 32 * 24 * HOUR
    append(each, *((f"old{i}", 1, old + i) for i in range(20)))
    assert store_says(each) == []
    append(each, ("old7", 2, old))
    ((state, text, _),) = store_says(each)
    assert (state, text[:38]) == ("WARNING", "sends older than _retentiondays are th")


def test_a_file_that_a_restart_loses(local: Session) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        for path in local.config.path.parent.iterdir():
            shutil.copy(path, directory)
        session = Session(dataclasses.replace(local.config, path=Path(directory, "saslquota.json")))
        (said,) = store_says(session)
        session.close()
    assert said[:2] == ("WARNING", "the file is on tmpfs, which does not keep what is counted")


@pytest.mark.usefixtures("as_root_of_it")
def test_commits_that_a_crash_loses(shared: Session, server: MariaDB) -> None:
    with changed(server, "innodb_flush_log_at_trx_commit", 2):
        (found,) = store_finds(shared)
        assert found.text.startswith("innodb_flush_log_at_trx_commit=2: ")
        run_remedy(found)
        assert store_says(shared) == []


@pytest.mark.parametrize(
    ("break_it", "state", "says"),
    [
        ("DROP TABLE events", "WARNING", "1146 "),
        ("DROP TABLE sends", "PROBLEM", "127.0.0.1: 1146 "),
        ("ALTER TABLE sends DROP client_address, DROP sender", "PROBLEM", "127.0.0.1: 1054 "),
    ],
)
@pytest.mark.usefixtures("as_root_of_it")
def test_tables_of_an_older_version(
    shared: Session, database: Database, break_it: str, state: str, says: str
) -> None:
    database.sql(break_it)
    (found,) = store_finds(shared)
    assert (found.state, found.text[: len(says)]) == (state, says)
    run_remedy(found)
    assert store_finds(shared) == []


def test_an_old_connector(shared: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saslquota, "OLDEST_CONNECTOR", (99, 0))
    (found,) = store_finds(shared)
    assert found.remedy == "/opt/saslquota/venv/bin/pip install -U mysql-connector-python"


def test_a_password_that_everybody_can_read(local: Session) -> None:
    path = local.config.path
    path.write_text("{}")
    path.chmod(0o644)
    session = Session(dataclasses.replace(local.config, store="mysql", mypasswd="secret"))
    said = saslquotadoctor.check_settings(session)
    found = bad(list(saslquotadoctor.attempt("settings", "", said)))
    assert [finding.state for finding in found] == ["WARNING"]
    run_remedy(found[0])
    assert not [said for said in saslquotadoctor.check_settings(session) if said[0] != "OK"]


def test_rules_that_are_not_valid(local: Session) -> None:
    local.config.beside("quotarules.json").write_text("{}}")
    (found,) = saslquotadoctor.attempt("settings", "", saslquotadoctor.check_settings(local))
    assert (found.state, "quotarules.json" in found.text) == ("PROBLEM", True)


# --- The spool ------------------------------------------------------------------------------------


LOCAL = {"_onfailure": "LOCAL", "_dbtimeout": 3}


def spool_finds(running: Daemon, **changes: object) -> list[str]:
    """State and text of what is found, with these settings, but for the file's name."""
    running.config.update(changes)
    running.write_config()
    session = Session(saslquota.load_config(running.config_file, {}))
    found = list(saslquotadoctor.attempt("store", "", saslquotadoctor.check_spool(session)))
    session.close()
    file = f"{running.directory / 'saslquota.spool'}"
    return [f"{one.state} {one.text}".replace(file, "FILE") for one in found]


@pytest.fixture
def left(server: MariaDB, database: Database, daemon: StartDaemon) -> Daemon:
    """A daemon that was killed when three sends were in its spool. The database is back."""
    running = daemon({**database.config(), **LOCAL})
    with running.policy() as policy:
        assert policy.ask() == "OK"
        server.kill()
        assert [policy.ask() for _ in range(3)] == ["OK"] * 3
        running.kill9()
    server.start()
    return running


def test_no_spool(daemon: StartDaemon) -> None:
    assert spool_finds(daemon()) == []


def test_a_spool_that_is_still_to_be_made(local: Session) -> None:
    session = Session(dataclasses.replace(local.config, store="mysql", onfailure="LOCAL"))
    ((state, text, _),) = saslquotadoctor.check_spool(session)
    assert (state, text.endswith("saslquota.spool: will be made at the first start")) == (
        "OK",
        True,
    )
    session.config.path.parent.joinpath("saslquota.spool").mkdir()
    (found,) = saslquotadoctor.attempt("store", "", saslquotadoctor.check_spool(session))
    assert (found.state, "unable to open database file" in found.text) == ("PROBLEM", True)


def test_a_spool_that_the_daemon_may_not_write(left: Daemon) -> None:
    if not IS_ROOT:
        pytest.skip("needs root")
    shutil.chown(left.directory, SERVICE)
    session = Session(saslquota.load_config(left.config_file, {}))
    says = saslquotadoctor.check_spool(session)
    (found,) = saslquotadoctor.attempt("store", "", says)
    assert f"belongs to root, {SERVICE} may not write to it" in found.text
    run_remedy(found)
    assert spool_finds(left)[0] == "OK FILE: table sends found"


def test_sends_that_a_killed_daemon_has_left(left: Daemon, database: Database) -> None:
    if IS_ROOT:
        for path in [left.directory, *left.directory.iterdir()]:
            shutil.chown(path, SERVICE)
    ok, found = spool_finds(left)
    assert ok == "OK FILE: table sends found"
    assert re.match(r"WARNING FILE holds 3 sends since [\d:]{8} that the database lacks: ", found)
    owners = {path.owner() for path in left.directory.glob("saslquota.spool*")}
    assert owners == {left.directory.owner()}, "the daemon can open them"
    database.sql(
        "INSERT INTO sends (account, seq, epoch, at, recipients, total, instance, token)"
        f" VALUES ('SPOOL {spool_id(left)}', 1, 1, UTC_TIMESTAMP(6), 3, 3, '', 1)"
    )  # of 4 rows, as the first is what was used before
    assert spool_finds(left)[1].startswith("WARNING FILE holds 1 send since ")


def spool_id(running: Daemon) -> str:
    path = running.directory / "saslquota.spool"
    with closing(sqlite3.connect(path)) as connection:
        ((found,),) = connection.execute("SELECT id FROM spool")
        return str(found)


def test_sends_that_another_onfailure_has_left(left: Daemon) -> None:
    (found,) = spool_finds(left, _onfailure="OK")
    assert found.startswith("WARNING FILE holds 3 sends since ")
    left.start()
    wait_for_log(left, "database back: 3 sends carried over")
    assert spool_finds(left) == []
    left.stop()
    assert spool_finds(left) == ["OK FILE is empty, left of _onfailure LOCAL: it may be removed"]
    assert spool_finds(left, _onfailure="LOCAL") == ["OK FILE: table sends found"]


def test_sends_of_another_database(left: Daemon, server: MariaDB) -> None:
    other = server.create_database()
    other.sql("INSERT INTO sends VALUES ('SPOOL', 1, 1, UTC_TIMESTAMP(6), 0, 0, 'b', 0, '', '')")
    found = spool_finds(left, **other.config())[1]
    assert re.match(
        r"PROBLEM FILE holds 3 sends since .* of another database, \w{16}, this is b: ", found
    )
    left.ledger.unlink(missing_ok=True)
    (found,) = spool_finds(left, _store="sqlite", _onfailure="OK")
    assert found.startswith("WARNING FILE holds 3 sends"), "it does not exist yet"
    make_store(saslquota.load_config(left.config_file, {})).open()
    (found,) = spool_finds(left)
    assert re.match(r"PROBLEM FILE holds 3 sends since .*, this is SQLite ", found)


def test_a_spool_that_is_in_use(server: MariaDB, database: Database, daemon: StartDaemon) -> None:
    """The daemon itself says what it holds."""
    running = daemon({**database.config(), **LOCAL})
    session = Session(saslquota.load_config(running.config_file, {}))

    def said() -> list[str]:
        return [f"{state} {text}" for state, text, _ in saslquotadoctor.check_daemon(session)]

    with running.policy() as policy:
        assert policy.ask() == "OK"
        assert re.match("OK .*spool: empty; since the start 0 outages", said()[1])
        assert spool_finds(running) == [
            "OK FILE: in use; that is right if it is by saslquota itself"
        ]
        server.kill()
        assert policy.ask() == "OK"
        assert re.match(
            "WARNING .*spool: database down since .* counts here: 1 send since", said()[1]
        )


def test_a_daemon_that_was_not_restarted_for_local(daemon: StartDaemon) -> None:
    running = daemon()
    config = saslquota.load_config(running.config_file, {})
    session = Session(dataclasses.replace(config, onfailure="LOCAL", store="mysql"))
    found = [said for said in saslquotadoctor.check_daemon(session) if said[0] == "WARNING"]
    assert found[0][1] == "it runs without the _onfailure LOCAL of saslquota.json"
    assert found[0][2].endswith("restart saslquota")


ANSWER = {
    "version": saslquota.__version__,
    "uptime": "4000",
    "store": "up",
    "down_since": "",
    "first_request_at": "1750000000",
    "rules_valid": "yes",
    "log_lines_lost": "0",
}


@pytest.fixture
def stand_in() -> Iterator[Callable[..., Config]]:
    """A daemon that gives one answer: the settings that lead to it."""
    with ExitStack() as stack:

        def start(**changes: str) -> Config:
            answer = "".join(f"{name}={value}\n" for name, value in {**ANSWER, **changes}.items())
            listener = stack.enter_context(socket.create_server((LOOPBACK, 0)))

            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(f"{answer}\n".encode())

            threading.Thread(target=serve, daemon=True).start()
            return Config(path=Path("saslquota.json"), bindport=listener.getsockname()[1])

        yield start


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"version": "1.9"}, [f"WARNING version 1.9 runs, {saslquota.__version__} is installed"]),
        (
            {"store": "down", "down_since": "1750000000"},
            ["PROBLEM it cannot use the database since"],
        ),
        ({"rules_valid": "no"}, ["PROBLEM the rules are not valid"]),
        ({"log_lines_lost": "7"}, ["WARNING 7 log lines are lost"]),
        (
            {"first_request_at": ""},
            ["WARNING Postfix has not asked it since it started, 4000 s ago"],
        ),
        ({"first_request_at": "", "uptime": "40"}, []),
    ],
)
def test_what_the_daemon_says_of_itself(
    stand_in: Callable[..., Config], changes: dict[str, str], expected: list[str]
) -> None:
    said = list(saslquotadoctor.check_daemon(Session(stand_in(**changes))))
    found = [f"{state} {text}" for state, text, _ in said if state != "OK"]
    assert len(found) == len(expected)
    for text, start in zip(found, expected, strict=True):
        assert text.startswith(start)


def test_a_daemon_that_says_little(
    stand_in: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ANSWER, "version", saslquota.__version__)
    for name in ANSWER.keys() - {"version"}:
        monkeypatch.delitem(ANSWER, name)
    assert [said[0] for said in saslquotadoctor.check_daemon(Session(stand_in()))] == ["OK"]


def test_a_daemon_that_is_away() -> None:
    config = Config(path=Path("saslquota.json"), bindport=free_port())
    ((state, text, remedy),) = saslquotadoctor.check_daemon(Session(config))
    assert (state, text.endswith("Connection refused")) == ("PROBLEM", True)
    assert remedy.endswith("restart saslquota")


# --- --log ----------------------------------------------------------------------------------------


def log_line(
    login: str, process: str = "postfix/submission/smtpd", queue_id: str = "4D2F1A0B"
) -> str:
    client = "client=unknown[192.0.2.1], sasl_method=PLAIN"
    return f"mail {process}[123]: {queue_id}: {client}, sasl_username={login}\n"


def now_as(form: str, ago: float = 60) -> str:
    return time.strftime(form, time.localtime(time.time() - ago))


SYSLOG, ISO = "%b %e %H:%M:%S ", "%Y-%m-%dT%H:%M:%S.123456%z "


def log_says(session: Session, text: str) -> tuple[str, str]:
    path = session.config.beside("mail.log")
    path.write_text(text)
    ((state, said, _),) = saslquotadoctor.check_log(session, str(path))
    return state, said.removeprefix(f"{path}: ")


@pytest.mark.parametrize("form", [SYSLOG, ISO, "%Y-%m-%dT%H:%M:%S%z ", "%Y-%m-%d %H:%M:%S ", ""])
@pytest.mark.parametrize("process", ["postfix/smtpd", "postfix/submission/smtpd"])
def test_logins_that_are_not_counted(local: Session, form: str, process: str) -> None:
    logins = ("ALICE", "bob@x", "carol@x", "bob@x")
    lines = [log_line(name, process, f"4D2F{i}") for i, name in enumerate(logins)]
    text = "".join(now_as(form) + line for line in lines)
    expected = "2 of 3 logins that sent are not counted: bob@x, carol@x"
    assert log_says(local, text) == ("PROBLEM", expected)


def test_logins_that_are_counted(local: Session) -> None:
    expected = ("OK", "of 1 login that sent in the last day all are counted")
    assert log_says(local, now_as(SYSLOG) + log_line("alice")) == expected


@pytest.mark.parametrize("form", [SYSLOG, ISO])
def test_what_is_older_than_a_day_is_not_looked_at(local: Session, form: str) -> None:
    text = now_as(form, 90_000) + log_line("bob")
    assert log_says(local, text) == ("WARNING", "no login has sent in the last day")


@pytest.mark.parametrize(
    "line",
    [
        "mail postfix/saslquota[1]:[1] sasl_username=bob, rcpt=a@x, rule=default\n",
        log_line("bob")
        + "mail postfix/submission/smtpd[123]: 4D2F1A0B: reject: DATA from x: 554\n",
        "mail postfix/smtpd[1]: NOQUEUE: reject: RCPT from x: 554 <a>: sasl_username=bob\n",
        "mail postfix/smtpd[1]: warning: x: SASL PLAIN authentication failed, sasl_username=bob\n",
        log_line("b?b"),
        "\n",
    ],
    ids=["ours", "refused at the end", "refused", "failed", "not readable", "empty"],
)
def test_lines_that_are_no_send(local: Session, line: str) -> None:
    assert log_says(local, line)[0] == "WARNING"


def test_many_logins_that_are_not_counted(local: Session) -> None:
    text = "".join(log_line(f"u{i}", queue_id=f"{i}") for i in range(9))
    expected = "9 of 9 logins that sent are not counted: u0, u1, u2, u3, u4 ..."
    assert log_says(local, text) == ("PROBLEM", expected)


def test_no_store_to_compare_with(tmp_path: Path) -> None:
    session = Session(Config(path=tmp_path / "saslquota.json", store="sqlite"))
    expected = ("WARNING", "not compared, as the store cannot be read")
    assert log_says(session, log_line("bob")) == expected


def test_new_years_day(monkeypatch: pytest.MonkeyPatch) -> None:
    midnight = time.mktime((2026, 1, 1, 0, 0, 10, 0, 0, -1))
    monkeypatch.setattr(time, "time", lambda: midnight)
    monkeypatch.setattr(time, "localtime", lambda: time.struct_time((2026,) + (1,) * 8))
    saslquotadoctor.log_age.cache_clear()
    assert saslquotadoctor.log_age("Dec 31 23:59:50") == 20


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def well(daemon: StartDaemon, tmp_path: Path) -> list[str]:
    """Arguments for a doctor who finds nothing."""
    started = daemon()
    wait_for_log(started, "connected: ")
    asked = f"inet:127.0.0.1:{started.port}"
    main = f"saslquota = check_policy_service {{ {asked}, default_action=DUNNO }}"
    write(SetUp(SMTP + entry(HOOKED), main), tmp_path)
    return ["-c", str(started.config_file), "doctor", "--config-dir", str(tmp_path)]


def test_all_is_well(well: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert saslquotactl.main(well) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith("OK  ") for line in lines)
    assert {line.split()[1] for line in lines} == {"settings", "store", "daemon", "postfix"}
    assert last == "0 problems, 0 warnings"


def test_the_documented_output(well: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(well[-1])
    behind = "smtpd_client_restrictions=permit_sasl_authenticated,$saslquota,reject"
    mynetworks = "smtpd_client_restrictions=permit_mynetworks,$saslquota"
    master = SMTP + entry(behind) + entry(mynetworks, name="smtps")
    (directory / "master.cf").write_text(master)
    let_cool_down(directory)
    assert saslquotactl.main(well) == 2
    output = capsys.readouterr().out.replace(f"postconf -c {directory} ", "postconf ")
    said = [line for line in output.splitlines() if not line.startswith("OK ")]
    document = (ROOT / "docs" / "saslquotactl.md").read_text("utf-8")
    (block,) = re.findall(r"```\n(PROBLEM .*?)```", document, re.DOTALL)
    assert said == block.splitlines()


@pytest.mark.parametrize(
    ("options", "status", "last"),
    [
        ((), 2, "2 problems, 0 warnings"),
        (("smtpd_client_restrictions=permit_mynetworks,$saslquota",), 1, "0 problems, 1 warning"),
    ],
)  # fmt: skip
def test_what_it_prints(
    well: list[str],
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    status: int,
    last: str,
) -> None:
    directory = Path(well[-1])
    (directory / "master.cf").write_text(SMTP + entry(*options))
    assert saslquotactl.main(well) == status
    lines = capsys.readouterr().out.splitlines()
    (number,) = [i for i, line in enumerate(lines) if SUBMISSION in line and "postconf" not in line]
    assert lines[number].startswith(("PROBLEM  postfix   submission/inet: ", "WARNING  postfix   "))
    command = f"postconf -c {directory} -P 'submission/inet/{CLIENT}=$saslquota"
    assert lines[number + 1].startswith(f"{'':19}{command}")
    assert lines[-1] == f"{last}; then: postfix reload"


def test_as_json(well: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    saslquotactl.main(["--json", *well])
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert len(rows) >= 4
    assert {tuple(row) for row in rows} == {("state", "part", "service", "text", "remedy")}


def test_without_postfix(
    well: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert saslquotactl.main(well) == 1
    out = capsys.readouterr().out
    assert "WARNING  postfix   postfix not found on this machine\n" in out
    assert "OK       daemon " in out


def test_a_broken_main_cf(well: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(well[-1], "master.cf").write_text("smtp inet\n")
    assert saslquotactl.main(well) == 2
    assert "bad field count\n1 problem," in capsys.readouterr().out


def test_without_being_root(well: list[str], new_directory: Callable[[], Path]) -> None:
    """What only root can look into is not called broken."""
    if not IS_ROOT:
        pytest.skip("needs root")
    directory = new_directory()
    for path in ROOT.glob("saslquota*.py"):
        shutil.copy(path, directory)
    Path(well[1]).with_name("saslquota.db").chmod(0o644)
    config = shutil.copytree(well[-1], directory / "etc")
    for path in (config, *config.iterdir()):
        path.chmod(0o755)
    command = [*as_user(SERVICE), directory / "saslquotactl.py", *well[:-1], config]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "WARNING  store     " in done.stdout
    assert "only root and the daemon's user can look into it" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 problems, 1 warning"
