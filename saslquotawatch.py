#!/usr/bin/env python3
"""NAME
    saslquotawatch - tell of senders who are refused, and serve metrics and a page

SYNOPSIS
    saslquotawatch.py [-c FILE] [--once] [--version]

DESCRIPTION
    When the daemon saslquota.py begins to refuse a sender, it notes that in the table `events` of
    their common database. saslquotawatch mails it to _notify, at most once in five minutes: since
    when, from where, and what to do. With _http it serves a page, and /metrics for Prometheus.

    -c FILE    the daemon's configuration (default: as the daemon's)
    --once     tell what is new, and end; exit status 1 if it could not be told

DIAGNOSTICS
    What does not work is one line a minute on stderr, and is tried again. Exit status 1 means bad
    configuration. SIGTERM ends it at once: what it was about to tell is told after the next start.

HOW IT WORKS
    The main thread is the Teller. Every two seconds it looks for incidents that nobody has told,
    claims them (`claimed`), has them delivered and marks them (`told`). A claim lasts two minutes
    by the database's clock, a delivery must end before. So several watches share the work, what one
    leaves undone another does, and a mail comes twice only if a watch dies between the mail
    server's 250 and the mark. saslquotapage.py serves what is asked for over HTTP, in threads of
    its own: neither waits for the other.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import email.header
import email.utils
import math
import os
import random
import re
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import saslquota
import saslquotactl as ctl
from saslquota import (
    MAX_AUTHOR,
    POOL_PREFIX,
    Config,
    Conflict,
    Events,
    Refused,
    SaslQuotaError,
    Store,
)
from saslquotactl import HOUR, Row, Session, clean, format_moment, spelled
from saslquotapage import Database, command, complain, is_enforced, origins, run, serve, why

SECOND, DAY = 1_000_000, 24 * HOUR  # microseconds

# --- Incidents ------------------------------------------------------------------------------------

GATHERING = 5 * SECOND  # what begins together is told together
PAUSE = 300 * SECOND  # between two mails, of all watches on a database
CLAIM = 120 * SECOND  # until somebody else may tell it
EXPIRY = DAY  # what is older is no news
AHEAD = 5 * SECOND  # a time further ahead is that of a wrong clock
UNTOLD = "kind = 'refused' AND told IS NULL AND at >= TIME"
UNCLAIMED = "(claimed IS NULL OR claimed < TIME OR claimed > TIME)"
BUSY = (  # somebody has told, or is about to
    "kind = 'refused' AND at >= TIME AND (told > TIME AND told <= TIME"
    " OR told IS NULL AND claimed >= TIME AND claimed <= TIME)"
)


def claim(store: Store) -> tuple[int, list[Row]]:
    """Claim all incidents that are due, in one statement, so that one of several watches gets them.
    Returns the claim's time, which no other has, and them; none while a mail would be too soon."""
    now = store.now()
    due = [now - EXPIRY, now - CLAIM, now + AHEAD]
    busy = [now - 2 * EXPIRY, now - PAUSE, now + AHEAD, now - CLAIM, now + AHEAD]
    others = f"SELECT COUNT(*) AS number FROM events WHERE {BUSY}"
    first = store.TIME.format("MIN(at)")
    sql = f"SELECT ({others}), {first} FROM events WHERE {UNTOLD} AND {UNCLAIMED}"
    ((number, at),) = run(store, sql, [*busy, *due])
    if number or at is None or at > now - GATHERING:
        return 0, []
    stamp = now - random.randrange(SECOND)
    free = f"0 = (SELECT number FROM ({others}) AS busy)"  # MySQL wants it that deep
    sql = f"UPDATE events SET claimed = TIME WHERE {UNTOLD} AND {UNCLAIMED} AND {free}"
    run(store, sql, [stamp, *due, *busy])
    mine = ctl.read_events(store, f"{UNTOLD} AND claimed = TIME", [now - 2 * EXPIRY, stamp])
    return stamp, sorted(mine, key=lambda event: -event["amount"])


def mark(store: Store, stamp: int, *, told: bool) -> None:
    """Mark what was claimed as told, or give the claim back."""
    now = store.now()
    what, values = ("told = TIME", [now]) if told else ("claimed = NULL", [])
    sql = f"UPDATE events SET {what} WHERE {UNTOLD} AND claimed = TIME"
    run(store, sql, [*values, now - 2 * EXPIRY, stamp])


ADDRESSES_INTERVAL = 60.0  # seconds between two looks for logins with many new addresses


def note_addresses(session: Session) -> None:
    """Begin an incident for each login that has sent from more than _notifyaddresses addresses in a
    day that it never had before, unless it has an incident of that day."""
    store, most = session.store, session.config.notifyaddresses
    now = store.now()
    noted = ctl.read_events(store, "kind = 'refused' AND at >= TIME", [now - DAY])
    known = {event["account"] for event in noted}
    for row in ctl.tally(store, "account", f"at >= TIME AND {ctl.IS_LOGIN}", [now - DAY]):
        account = row["account"]
        if row["addresses"] > most and account not in known:
            *_, number, _ = origins(store, account, now - DAY)
            if number > most:
                many = Refused(account, 0, f"{number} addresses in a day, never seen before")
                Events(store).note_refusals([many], now, socket.gethostname()[:MAX_AUTHOR])
                print(f"incident: account={clean(account)}, {many.line}", flush=True)


# --- Mail -----------------------------------------------------------------------------------------

IN_FULL = 10  # incidents in a mail; the others have a line each
MAX_BYTES = 990  # of a line (RFC 5321: 998)
TIME_FOR_DETAILS = 30.0  # seconds; then the rest has a line each
ctl.STATEMENT_TIMEOUT = 15  # seconds; a mail that takes longer than its claim is sent twice
USER = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+@[A-Za-z0-9.-]+")  # who may get a mail


def write_mail(config: Config, to: Sequence[str], subject: str, lines: Iterable[str]) -> bytes:
    """A mail whose lines end in LF. (EmailMessage decodes what looks encoded in a login.)"""
    host, subject = clean(socket.gethostname()), clean(subject)
    sender, *_ = *(one for one in config.notify if one[0] != "|"), f"saslquota@{host}"
    if not subject.isascii() or "=?" in subject:
        subject = email.header.Header(subject, "utf-8").encode()
    head = [
        f"From: saslquota <{sender}>\nTo: " + ",\n ".join(to or ["undisclosed-recipients:;"]),
        f"Subject: {subject}\nDate: {email.utils.formatdate(localtime=True)}",
        f"Message-ID: {email.utils.make_msgid(domain=host)}\nAuto-Submitted: auto-generated",
        "MIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8",
        "Content-Transfer-Encoding: 8bit\n",
    ]
    body = [clean(line).encode()[:MAX_BYTES].decode(errors="ignore") for line in lines]
    return "\n".join([*head, *body, ""]).encode()


def tell_briefly(event: Row, now: int, what: str = "refused") -> str:
    if not event["amount"]:  # see note_addresses()
        return f"{spelled(event['account'])} sends from {event['note']}."
    since = f"since {format_moment(event['at'], now)}, {event['amount']} times so far"
    return f"{spelled(event['account'])} is {what} {since}: {''.join(why(event))}."


def tell_in_full(session: Session, event: Row, now: int) -> list[str]:
    account, start = event["account"], event["at"] - DAY
    what = "refused" if is_enforced(session, event) else "over a quota that is not enforced"
    lines = [tell_briefly(event, now, what)]
    if account.startswith(POOL_PREFIX):
        return [*lines, "Who sends so much:", f"  {command('show', account)}"]
    senders, addresses, _, text = origins(session.store, account, start)
    sent = f"{sum(row['sent'] for row in senders)}, as {len(senders)} senders{text}"
    lines.append(f"Sent since {format_moment(start, now)}: {sent}{':' * bool(senders)}")
    for rows, name in ((senders[:5], "sender"), (addresses[:10], "client_address")):
        found = ctl.describe_origins(rows, name, now)
        lines += [*found, ""] if found else []
    return [*lines, *advice(account)]


def advice(account: str) -> list[str]:
    return [
        *("If the password is stolen:", f"  {command('block', account)}"),
        f"  {command('queue', account)} | postsuper -h -    on each mail server; -d deletes",
        "  change the password; end its sessions (doveadm kick); look for forwardings and filters",
        *(f"  {command('unblock', account)}", "If all is well:", f"  {command('reset', account)}"),
    ]


def admin_mail(session: Session, events: Sequence[Row]) -> tuple[str, list[str]]:
    """Subject and lines. What the database does not tell in time is left out."""
    now, deadline, number = session.now, time.monotonic() + TIME_FOR_DETAILS, len(events)
    lines = [f"{number} accounts have reached their quota.", ""] if number > 1 else []
    lines += ["Is a rule too low?", ""] if number > IN_FULL else []
    for place, event in enumerate(events):
        if place < IN_FULL and time.monotonic() < deadline:
            try:
                lines += [*tell_in_full(session, event, now), ""]
                continue
            except SaslQuotaError as error:
                complain("database", error)
                deadline = -math.inf
        lines.append(tell_briefly(event, now))
    name = spelled(events[0]["account"])[:100] if number == 1 else f"{number} accounts"
    reason = "quota reached" if any(event["amount"] for event in events) else "many addresses"
    return f"{name}: {reason}", lines


def user_mail(event: Row, now: int) -> tuple[str, list[str]]:
    quota, since = why(event)[0].partition(", rule ")[0], format_moment(event["at"], now)
    return "Your account has reached its sending limit", [
        f"{event['account']} has sent as much mail as it may: {quota}.",
        f"Since {since} more is refused. You can send again when some time has passed.",
        "",
        "If it was not you, somebody knows your password: change it now, and tell your postmaster.",
    ]


# --- Delivery -------------------------------------------------------------------------------------

DELIVERY_TIME = 100.0  # seconds from the claim to the end of a delivery; less than CLAIM
CONNECT_TIMEOUT = 10.0  # seconds, for each address of the mail server


class Letter(NamedTuple):
    """A mail, and who has not got it yet: addresses, or one |command."""

    targets: tuple[str, ...]
    data: bytes
    give_up_at: float  # monotonic seconds

    def deliver(self, host: str, deadline: float) -> dict[str, tuple[int, Any]]:
        """Returns who has not got it, with a code, above 499 for good, and a reason. Ends at the
        deadline, in monotonic seconds."""
        if self.targets[0].startswith("|"):
            return self._run_command(deadline)
        try:
            return self._send(host, deadline)
        except (OSError, smtplib.SMTPException, ValueError) as error:
            if isinstance(error, smtplib.SMTPRecipientsRefused):
                return error.recipients
            reason: tuple[int, Any] = 0, f"{host}: {error}"
            if isinstance(error, smtplib.SMTPResponseException):
                reason = error.smtp_code, error.smtp_error
            if time.monotonic() >= deadline:
                reason = 0, f"{host}: took too long"
            return dict.fromkeys(self.targets, reason)

    def _send(self, host: str, deadline: float) -> dict[str, tuple[int, bytes]]:
        """As smtplib.sendmail(). Without a sender: what comes back would be told nobody."""
        left = max(1.0, deadline - time.monotonic())
        smtp = smtplib.SMTP(local_hostname=socket.gethostname(), timeout=min(left, CONNECT_TIMEOUT))
        timer = threading.Timer(left, shut_down, [smtp])
        timer.daemon = True
        timer.start()
        try:
            code, reply = smtp.connect(*saslquota.split_host(host, 25) or ())
            if code != 220:
                raise smtplib.SMTPConnectError(code, reply)
            smtp.sock.settimeout(max(0.1, deadline - time.monotonic()))  # type: ignore[union-attr]
            smtp.ehlo_or_helo_if_needed()
            options = ["BODY=8BITMIME"] if smtp.has_extn("8bitmime") else []
            refused = smtp.sendmail("", self.targets, self.data.replace(b"\n", b"\r\n"), options)
            with contextlib.suppress(OSError, smtplib.SMTPException):
                smtp.putcmd("quit")
            return refused
        finally:
            timer.cancel()
            smtp.close()

    def _run_command(self, deadline: float) -> dict[str, tuple[int, Any]]:
        process = subprocess.Popen(
            ["/bin/sh", "-c", self.targets[0].removeprefix("|")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={name: v for name, v in os.environ.items() if name[:1] != "_"},  # no _mypasswd
        )
        reason = "took too long"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(self.data, timeout=max(1.0, deadline - time.monotonic()))
            reason = f"exit status {process.returncode}" if process.returncode else ""
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {self.targets[0]: (0, reason)} if reason else {}


def shut_down(smtp: smtplib.SMTP) -> None:
    with contextlib.suppress(OSError):
        if smtp.sock:
            smtp.sock.shutdown(socket.SHUT_RDWR)


# --- Teller ---------------------------------------------------------------------------------------

LOOK_INTERVAL = 2.0  # seconds
RETRY = 60.0  # seconds after a delivery that failed
MAX_OWED = 1000  # letters
CONFLICTS = 10  # in a row that are nothing unusual: somebody else is at it


class Teller:
    """Tells _notify what is new. Once one of them has it, it is told; then, as long as this runs,
    the others get it, and the users."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._database = Database(config)
        self._failures = 0  # of the database in a row
        self._unmarked = 0  # a claim that was told, while the database is away
        self._retry_at = self._retry_owed_at = self._addresses_at = -math.inf  # monotonic seconds
        self._owed: collections.deque[Letter] = collections.deque(maxlen=MAX_OWED)

    def look(self) -> bool:
        """Tell what is due; False if it could not be told."""
        try:
            with self._database.session() as session:
                is_well = self._look(session)
        except SaslQuotaError as error:
            self._failures += 1
            if self._failures > CONFLICTS or not isinstance(error, Conflict):
                complain("database", error)
            return False
        self._failures = 0
        return is_well

    def _look(self, session: Session) -> bool:
        if self._unmarked:
            mark(session.store, self._unmarked, told=True)
            self._unmarked = 0
        if self._config.notifyaddresses and time.monotonic() >= self._addresses_at:
            self._addresses_at = time.monotonic() + ADDRESSES_INTERVAL
            note_addresses(session)
        if not self._config.notify:
            sql = f"SELECT COUNT(*) FROM events WHERE {UNTOLD}"
            if number := run(session.store, sql, [session.now - EXPIRY])[0][0]:
                complain("_notify is empty", f"{number} incidents are not told")
            return not number
        if time.monotonic() >= self._retry_at:
            stamp, events = claim(session.store)
            if events:
                return self._tell(session, stamp, events)
        while self._owed and time.monotonic() >= self._retry_owed_at:
            _, owed = self._deliver([self._owed.popleft()], time.monotonic() + DELIVERY_TIME)
            self._owed += owed
            self._retry_owed_at = time.monotonic() + RETRY if owed else -math.inf
        return time.monotonic() >= self._retry_at

    def _tell(self, session: Session, stamp: int, events: Sequence[Row]) -> bool:
        began, config, now = time.monotonic(), self._config, session.now
        addresses = tuple(one for one in config.notify if one[0] != "|")
        targets = [addresses, *((one,) for one in config.notify if one[0] == "|")]
        data = write_mail(config, addresses, *admin_mail(session, events))
        letters = [Letter(some, data, began + EXPIRY / SECOND) for some in targets if some]
        is_told, owed = self._deliver(letters, began + DELIVERY_TIME)
        self._unmarked = stamp if is_told else 0
        self._retry_at = -math.inf if is_told else time.monotonic() + RETRY
        for event in events if is_told and config.notifyuser else ():
            is_refused = event["amount"] and is_enforced(session, event)
            if USER.fullmatch(event["account"]) and is_refused:
                data = write_mail(config, [event["account"]], *user_mail(event, now))
                owed.append(Letter((event["account"],), data, began + EXPIRY / SECOND))
        self._owed += owed if is_told else ()
        mark(session.store, stamp, told=is_told)
        self._unmarked = 0
        return is_told

    def _deliver(self, letters: Iterable[Letter], deadline: float) -> tuple[bool, list[Letter]]:
        """Whether anybody has got one, and what is to be tried again."""
        is_taken, owed = False, []
        for letter in letters:
            refused = letter.deliver(self._config.notifyhost, deadline)
            for target, (code, reason) in refused.items():
                text = reason.decode(errors="replace") if isinstance(reason, bytes) else reason
                complain("not delivered", f"{target}: {f'{code} ' if code else ''}{text}")
            is_taken = is_taken or len(refused) < len(letter.targets)
            again = tuple(target for target, (code, _) in refused.items() if code < 500)
            if again and time.monotonic() < letter.give_up_at:
                owed.append(letter._replace(targets=again))
        return is_taken, owed


# --- main -----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="saslquotawatch.py", description="Tell of senders who are refused; serve metrics."
    )
    parser.add_argument("-c", metavar="FILE", dest="config", type=Path)
    parser.add_argument("--once", action="store_true", help="tell what is new, and end")
    parser.add_argument("--version", action="version", version=f"saslquota {saslquota.__version__}")
    arguments = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: sys.exit(0))
    try:
        config = saslquota.find_config(arguments.config)
    except SaslQuotaError as error:
        print(f"saslquotawatch: {clean(error)}", file=sys.stderr)
        return 1
    if arguments.once:
        return 0 if Teller(config).look() else 1
    told, where = ", ".join(config.notify) or "nobody, _notify is empty", config.http or "nowhere"
    print(f"saslquotawatch {saslquota.__version__} tells {told}; serves {where}", flush=True)
    if config.http:
        threading.Thread(target=serve, args=[config], daemon=True).start()
    teller = Teller(config)
    while True:
        teller.look()
        time.sleep(LOOK_INTERVAL)


if __name__ == "__main__":
    raise SystemExit(main())
