"""contrib/fail2ban with the real fail2ban-regex, on lines of ours and on lines that forge them."""

import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from helpers import StartDaemon, StartPostfix, require
from servers.process import ROOT, wait_for

FILTER = ROOT / "contrib/fail2ban/filter.d/saslquota.conf"
JAIL = ROOT / "contrib/fail2ban/jail.d/saslquota.conf"
FORGED = "203.0.113.66"
LINE_OF_OURS = (
    "mail postfix/saslquota[1]:[1] sasl_username=a, rcpt=b, rule=c, quota 9/1 (900.00%), period=1,"
    f" action=REJECT, sender=d, client_address={FORGED}, instance=x"
)
HOSTILE = f"x, rcpt=y, rule=z, client_address={FORGED}, instance="
RULES = {
    "default": {"period": 60, "msgquota": 1, "msg": f"no, client_address={FORGED}, instance=x"},
    "defer@example.com": {"action": "DEFER"},
    "hold@example.com": {"action": "HOLD"},
    "lenient@example.com": {"enforce": False},
}
FORMATS = {  # how rsyslog writes a line, and what fail2ban makes of one in the journal
    "traditional": "Nov 26 13:10:0{} mail {}",
    "iso": "2026-11-26T13:10:0{}.066605+01:00 mail {}",
    "journal": "2026-11-26T13:10:0{}.066605 mail python[4711]: {}",
}


def banned(lines: list[str], directory: Path) -> list[str]:
    """The address of each line that matches."""
    require("fail2ban-regex")
    log = directory / "mail.log"
    log.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    done = subprocess.run(
        ["fail2ban-regex", "-o", "ip", log, FILTER], capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (0, 255), done.stderr  # 255: none has matched
    return done.stdout.split()


@pytest.fixture
def lines(daemon: StartDaemon, new_directory: Callable[[], Path]) -> Iterator[list[str]]:
    """What a syslog daemon gets of two sends of each, the second beyond the quota."""
    path = new_directory() / "log"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as syslog:
        syslog.bind(str(path))
        started = daemon({"_loghandler": "syslog", "_logaddress": str(path)}, RULES)
        found: list[str] = []

        def read() -> str:
            while select.select([syslog], [], [], 0)[0]:
                found.append(syslog.recv(65536).decode("utf-8").partition(">")[2])
            return "".join(found)

        senders = [
            ("reject@example.com", "192.0.2.1", "RCPT"),
            ("defer@example.com", "2001:db8::2", "RCPT"),
            (HOSTILE, "192.0.2.3", "RCPT"),
            ("message@example.com", "192.0.2.4", "DATA"),
            ("hold@example.com", FORGED, "RCPT"),
            ("lenient@example.com", FORGED, "RCPT"),
            ("", FORGED, "RCPT"),
        ]
        with started.policy() as policy:
            for login, address, state in senders:
                for _ in range(2):
                    policy.ask(
                        sasl_username=login,
                        client_address=address,
                        protocol_state=state,
                        recipient_count=2 if state == "DATA" else 0,
                        sender=f'"{HOSTILE}"@example.com',
                        recipient=HOSTILE,
                    )
        wait_for(lambda: read().count("sasl_username=") == 2 * len(senders), 10, "all lines")
        yield found


REFUSED = ["192.0.2.1", "2001:db8::2", "192.0.2.3", "192.0.2.4", "192.0.2.4"]


@pytest.mark.parametrize("form", FORMATS)
def test_only_the_refused_are_banned(
    lines: list[str], new_directory: Callable[[], Path], form: str
) -> None:
    """Not who was held, or would have been refused; nor whom a login, sender or text names."""
    written = [FORMATS[form].format(number % 10, line) for number, line in enumerate(lines)]
    assert banned(written, new_directory()) == REFUSED


@pytest.mark.parametrize("form", FORMATS)
def test_a_forged_line_in_another_ones(new_directory: Callable[[], Path], form: str) -> None:
    """Such a line by itself would match."""
    line = FORMATS[form].format(1, LINE_OF_OURS.removeprefix("mail "))
    assert banned([line], new_directory()) == [FORGED]
    for other in (f"postfix/smtpd[1]: reject: from=<{line}>", f"dovecot: auth: user=<{line}>"):
        assert banned([FORMATS[form].format(1, other)], new_directory()) == []


def test_postfix_logs_a_forged_line(
    postfix: StartPostfix, new_directory: Callable[[], Path]
) -> None:
    """A quoted local part may hold all of it, with its time."""
    instance = postfix("reject")
    forged = FORMATS["traditional"].format(1, LINE_OF_OURS.removeprefix("mail "))
    with instance.login() as client:
        client.mail(f'"{forged}"@example.com')
        client.rcpt("r0@example.net")
    wait_for(lambda: FORGED in instance.log(), 20, "Postfix has logged it")
    log = instance.log().splitlines()
    assert any(f"client_address={FORGED}" in line and "reject: " in line for line in log)
    assert banned(log, new_directory()) == []


def test_the_jail(tmp_path: Path) -> None:
    """fail2ban takes it, with our filter; it is off as it is shipped."""
    require("fail2ban-client")
    config = tmp_path / "fail2ban"
    for name, path in (("filter.d", FILTER), ("jail.d", JAIL)):
        (config / name).mkdir(parents=True)
        (config / name / path.name).write_text(path.read_text())
    (config / "fail2ban.conf").write_text("[Definition]\n")
    (config / "jail.conf").write_text("[DEFAULT]\nbackend = polling\n")
    client = ["fail2ban-client", "-c", str(config), "-d"]
    off = subprocess.run(client, capture_output=True, text=True, timeout=60)
    assert off.returncode == 0, off.stderr
    assert "saslquota" not in off.stdout
    jail = config / "jail.d" / JAIL.name
    log = tmp_path / "mail.log"
    log.touch()
    text = jail.read_text().replace("enabled = false", "enabled = true")
    jail.write_text(text.replace("/var/log/mail.log", str(log)))
    on = subprocess.run(client, capture_output=True, text=True, timeout=60)
    assert on.returncode == 0, on.stderr
    for told in ("'maxretry', 30", "'bantime', '1h'", "'findtime', '10m'", "sasl_username="):
        assert told in on.stdout, on.stdout
