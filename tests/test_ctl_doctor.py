"""saslquotactl doctor: what it says, whether that is true, and whether its commands mend it."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import require

import saslquotactl
from saslquota import Config
from saslquotactl import Finding

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
        says=problem("asks inet:127.0.0.1:10009, but saslquota listens on 127.0.0.1:10008"),
    ),
    "another port, written out": SetUp(
        SMTP
        + entry(
            f"{CLIENT}=check_policy_service,inet:127.0.0.1:1008",
            "smtpd_policy_service_default_action=DUNNO",
        ),
        says=problem("asks inet:127.0.0.1:1008, but saslquota listens on 127.0.0.1:10008"),
    ),
    "another host": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ inet:192.0.2.1:10008, default_action=DUNNO }}",
        says=problem("asks inet:192.0.2.1:10008, but saslquota listens on 127.0.0.1:10008"),
    ),
    "IPv6": SetUp(
        SMTP + entry(HOOKED),
        config={"bind": "::1"},
        says=problem("asks inet:127.0.0.1:10008, but saslquota listens on ::1:10008"),
    ),
    "a port for a socket": SetUp(
        SMTP + entry(HOOKED),
        config={"bind": "unix:/var/spool/postfix/saslquota/policy"},
        says=problem("asks inet:127.0.0.1:10008, but saslquota listens on unix:/var/spool/postfix"),
    ),
    "an absolute socket in a chroot": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ unix:/var/spool/postfix/saslquota/policy, default_action=DUNNO }}",
        {"bind": "unix:/var/spool/postfix/saslquota/policy"},
        problem("asks unix:/var/spool/postfix/saslquota/policy, but saslquota listens on"),
    ),
    "a socket outside of the chroot": SetUp(
        SMTP + entry(HOOKED),
        f"{SASLQUOTA} {{ unix:/run/saslquota/policy, default_action=DUNNO }}",
        {"bind": "unix:/run/saslquota/policy"},
        problem(
            "asks unix:/run/saslquota/policy, but saslquota listens on unix:/run/saslquota/policy,"
            " outside of the chroot /var/spool/postfix"
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
    return list(saslquotactl.examine_postfix(config, str(directory)))


def bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state != "OK"]


def run_remedy(finding: Finding) -> None:
    """A pause between its commands would take a second."""
    done = subprocess.run(finding.remedy, shell=True, capture_output=True, text=True)
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
