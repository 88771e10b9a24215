#!/usr/bin/env python3
"""NAME
    saslquotactl - see who sends through saslquota, stop a sender, let one go

SYNOPSIS
    saslquotactl.py [-c FILE] [--json] COMMAND ...

DESCRIPTION
    saslquotactl reads what the daemon saslquota.py has counted, and gives it orders, by way of
    their common database. `saslquotactl.py --help` lists the commands, `COMMAND --help` tells more.

    -c FILE    the daemon's configuration (default: as the daemon's)
    --json     print one JSON object a line

DIAGNOSTICS
    Exit status 0: well; 1: there is something to look at, or nothing that was asked for; 2: it
    could not be done, for a reason that is one line on stderr. So monitoring may call it.

HOW IT WORKS
    A command is a function that gets a Session: settings, rules and store, each opened when it is
    first used. It computes rows, and prints them by Session.show(). Sections use only those above
    them; the commands come in the order of --help.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import socket
import subprocess
import sys
import time
import unicodedata
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import saslquota
from saslquota import POOL_PREFIX, Config, Rule, Rules, SaslQuotaError, SQLiteStore, Store, Window

STATEMENT_TIMEOUT = 60  # seconds; a table of a month is read in less
OK, WARNING, FAILED = 0, 1, 2  # exit statuses, as Nagios has them
RAW = argparse.RawDescriptionHelpFormatter

Item = TypeVar("Item")


class ControlError(SaslQuotaError):
    """What was asked for cannot be done."""


# --- Texts ----------------------------------------------------------------------------------------


def clean(value: object) -> str:
    """A value for the terminal: what it would take for a command is spelled out."""
    text = "" if value is None else str(value)
    return saslquota.printable(text)


def width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    columns = 0
    for character in text:
        if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn"):
            continue
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return columns


def table(rows: Iterable[Sequence[object]], heading: Sequence[str] = ()) -> list[str]:
    """Lines whose columns line up; numbers are at the right of theirs."""
    found = [list(row) for row in rows]
    is_number = [
        all(isinstance(row[column], int | None) for row in found)
        for column in range(len(found[0]) if found else 0)
    ]
    texts = [[clean(value) for value in row] for row in found]
    if heading and texts:
        texts.insert(0, list(heading))
    widths = [max(map(width, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row in texts:
        cells = []
        for text, columns, right in zip(row, widths, is_number, strict=True):
            blank = " " * (columns - width(text))
            cells.append(blank + text if right else text + blank)
        lines.append("  ".join(cells).rstrip())
    return lines


def format_moment(at: int | None, now: int) -> str:
    """Local time of microseconds since 1970; with the date unless it is today, and with the year
    unless it is this one."""
    if at is None:
        return ""
    then, today = time.localtime(at // 1_000_000), time.localtime(now // 1_000_000)
    if then[:3] == today[:3]:
        return time.strftime("%H:%M:%S", then)
    if then[0] == today[0]:
        return time.strftime("%d %b %H:%M", then)
    return time.strftime("%d %b %Y %H:%M", then)


def json_time(microseconds: int) -> str:
    """UTC, from microseconds since 1970."""
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def progress(items: Iterable[Item], what: str, size: int = 1) -> Iterator[Item]:
    """Hand on the items, of which each is so many; from 2 s on show a terminal how far it is."""
    began, next_at = time.monotonic(), 2.0
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - began > next_at and sys.stderr.isatty():
            next_at += 0.5
            print(f"{number * size} {what}\x1b[K\r", end="", file=sys.stderr, flush=True)
    if next_at > 2:
        print("\x1b[K", end="", file=sys.stderr, flush=True)


# --- Session --------------------------------------------------------------------------------------


class Session:
    """What a command works with, opened when it is first used. Raises SaslQuotaError."""

    def __init__(self, config: Config, *, as_json: bool = False) -> None:
        self.config = config
        self.as_json = as_json

    @functools.cached_property
    def rules(self) -> Rules:
        path = self.config.beside(self.config.quotafile)
        return saslquota.load_rules(path, self.config.retentiondays * 86_400)

    @functools.cached_property
    def store(self) -> Store:
        """The daemon's, with time enough for long statements."""
        config = dataclasses.replace(self.config, dbtimeout=2 * STATEMENT_TIMEOUT)
        store = saslquota.make_store(config)
        user = None
        if isinstance(store, SQLiteStore):
            path = config.beside(config.sqlitefile)
            if not path.exists():
                raise ControlError(f"{path}: does not exist: the daemon makes it at its start")
            user = saslquota.daemon_user(config, "")  # files that root makes it could not write
        with saslquota.rights_of(user) if user else contextlib.nullcontext():
            store.open()
        return store

    @functools.cached_property
    def now(self) -> int:
        """The database's time when it was first asked for, in microseconds since 1970, UTC."""
        return self.store.now()

    def account(self, name: str) -> str:
        """The account of a login, or of a pool: "@domain" or "*"."""
        folded = saslquota.fold(name)
        is_pool = folded == "*" or folded.startswith("@")
        return POOL_PREFIX + folded if is_pool else self.config.account(name)

    def show(self, rows: Iterable[Mapping[str, Any]], lines: Iterable[str]) -> None:
        """Print a result: for --json its rows, else the lines for a person."""
        for line in map(as_json, rows) if self.as_json else lines:
            print(line)

    def close(self) -> None:
        if "store" in self.__dict__:
            self.store.close()


def as_json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=True)


def ask_daemon(config: Config, timeout: float = 5.0) -> dict[str, str]:
    """What the daemon says of itself (request=status). Raises ControlError."""
    where = saslquota.address_of(config)
    try:
        if where.startswith("unix:"):
            connection = socket.socket(socket.AF_UNIX)
            address: Any = where.removeprefix("unix:")
        else:
            family, _, _, _, address = saslquota.listening_address(config)
            connection = socket.socket(family)
        with connection:
            connection.settimeout(timeout)
            connection.connect(address)
            connection.sendall(b"request=status\n\n")
            reply = b""
            while not reply.endswith(b"\n\n"):
                data = connection.recv(4096)
                if not data:
                    break
                reply += data
    except OSError as error:
        raise ControlError(f"the daemon at {where}: {error.strerror or error}") from None
    if not reply.endswith(b"\n\n"):
        raise ControlError(f"the daemon at {where} does not know request=status: it is too old")
    pairs = (line.partition("=") for line in reply.decode().splitlines() if line)
    return {name: value for name, _, value in pairs}


# --- Queue ----------------------------------------------------------------------------------------

# As mail goes through them; then the first again, into which "deferred" may have gone meanwhile.
QUEUES = "incoming", "active", "deferred", "hold", "incoming", "active"
QUEUE_HELP = """\
Print the queue ids of a login's mail that waits in Postfix's queues, one a
line. What was accepted before you blocked the login is still delivered. So, as
root on each mail server, hold it (-h), release it (-H) or delete it (-d):

    saslquotactl.py queue bob@example.com | postsuper -h -

The login is what Postfix keeps with the mail; a sender's address can be forged.
Mail that a content filter has given back to Postfix has no login any more."""


def read_queue_file(path: str) -> dict[bytes, str]:
    """Login, sender (S) and time (T) of a mail; nothing if it has been delivered meanwhile. A
    record is a type, a byte; a length, seven bits to a byte, the lowest first; and that many bytes.
    M begins the message (Postfix, rec_type.h)."""
    found: dict[bytes, str] = {}
    with contextlib.suppress(FileNotFoundError), open(path, "rb", 4096) as file:
        while len(found) < 3 and (kind := file.read(1)) not in (b"", b"M"):
            length, shift, byte = 0, 0, 0x80
            while byte & 0x80 and shift < 21:  # an envelope's records are far shorter
                byte = (file.read(1) or b"\0")[0]
                length |= (byte & 0x7F) << shift
                shift += 7
            data = file.read(length)
            if len(data) < length:  # it is still being written
                break
            name, _, value = data.partition(b"=") if kind == b"A" else (kind, b"", data)
            if name in (b"sasl_username", b"S", b"T"):
                text = value.decode("utf-8", "surrogateescape")  # as the daemon reads it
                found.setdefault(name, saslquota.valid_utf8(text))
    return found


def queued_mail(root: str, is_wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    """The mail of certain logins. Raises OSError."""
    rows = {}
    for queue in QUEUES:
        os.scandir(f"{root}/{queue}").close()  # os.walk() would not raise
        tree = os.walk(f"{root}/{queue}")  # postconf(5), hash_queue_names
        paths = (f"{directory}/{name}" for directory, _, names in tree for name in names)
        for path in progress(paths, f"files in {queue}"):
            found = read_queue_file(path)
            if b"sasl_username" in found and is_wanted(found[b"sasl_username"]):
                seconds = found.get(b"T", "")[:10]
                arrival = json_time(int(seconds) * 1_000_000) if seconds.isdecimal() else None
                row = {"queue_id": os.path.basename(path), "queue": queue, "arrival": arrival}
                rows[row["queue_id"]] = row | {"sender": found.get(b"S", "")}
    return list(rows.values())


def run_queue(session: Session, arguments: argparse.Namespace) -> int:
    account = session.account(arguments.login)
    if not account or account.startswith(POOL_PREFIX):
        raise ControlError(f"{saslquota.quoted(arguments.login)} is not a login: name one")
    where = ["-c", arguments.config_dir] if arguments.config_dir else []
    is_wanted = functools.cache(lambda login: session.config.account(login) == account)
    try:
        done = subprocess.run(["postconf", *where, "-xh", "queue_directory"], capture_output=True)
        if done.returncode:
            raise ControlError(" ".join(done.stderr.decode().split()))
        rows = queued_mail(os.fsdecode(done.stdout.strip()), is_wanted)
    except OSError as error:
        hint = ": run this as root" if isinstance(error, PermissionError) else ""
        raise ControlError(f"{error.filename}: {error.strerror}{hint}") from None
    session.show(rows, (row["queue_id"] for row in rows))
    if not rows:
        print(f"{clean(account)}: no mail waits", file=sys.stderr)
    return OK if rows else WARNING


def add_queue_commands(commands: Any) -> None:
    about = "ids of a login's mail that waits in Postfix's queues"
    parser = commands.add_parser("queue", help=about, description=QUEUE_HELP, formatter_class=RAW)
    parser.add_argument("login", metavar="LOGIN")
    parser.add_argument("--config-dir", metavar="DIR", help="of Postfix, as for postfix -c")
    parser.set_defaults(command=run_queue)


# --- Replay ---------------------------------------------------------------------------------------

SLICE = 20_000  # rows of one SELECT: none takes long
Row = tuple[str, int, int, int, int, str]  # account, seq, epoch, at, recipients, instance


class Replayed:
    """An account whose sends are decided anew. As in the ledger, what a window holds is the
    difference of two totals. To `measure`, it accepts all, and makes its windows that large."""

    def __init__(self, rule: Rule, pools: Iterable[Replayed], *, measure: bool) -> None:
        self.by_message, self.measure = rule.per_message, measure
        refusing = (w for w in rule.windows if w.enforce and w.action != "HOLD")
        self.windows = rule.windows if measure else tuple(refusing)
        self.quotas = [0 if measure else window.msgquota for window in self.windows]
        self.due = [(account, 1) for account in (self, *pools)]  # charged for one recipient
        self.accepted: dict[str, bool] = {}  # messages by their instance
        self.sends = self.sent = self.refused = self.first = 0  # `sent`, `refused`: recipients
        self.limit = Window(0, 0)  # what refused first
        self.begin(1)

    def begin(self, epoch: int) -> None:
        self.epoch, self.total = epoch, 0
        self.ats, self.befores = array("q"), array("q")  # of each send; the totals before them
        self.starts = [0] * len(self.windows)  # the first send that is in each window
        self.room = -1.0  # what certainly fits into all; for more full() must look

    def full(self, cost: int, at: int) -> list[Window]:
        """The windows that have no room for the cost."""
        found, self.room = [], math.inf
        for number, window in enumerate(self.windows):
            oldest = at - window.period * 1_000_000  # it still counts
            start = self.starts[number] = bisect_left(self.ats, oldest, self.starts[number])
            used = self.total - self.befores[start] if start < len(self.ats) else 0
            if self.measure:
                self.quotas[number] = max(self.quotas[number], used + cost)
            elif used + cost > self.quotas[number]:
                found.append(window)
            self.room = min(self.room, self.quotas[number] - used)
        return found

    def send(self, recipients: int, at: int, instance: str) -> None:
        """Charge it and its pools, or none. Where messages count, each is charged once, or stays
        refused."""
        self.sends += 1
        self.sent += recipients
        accepted = self.accepted.get(instance)
        due = self.due
        if accepted or recipients > 1:
            due = [
                (account, 1 if account.by_message else recipients)
                for account, _ in due
                if not (accepted and account.by_message)
            ]
        full: list[Window] = []
        for account, cost in due:
            if account.room < cost:
                full += account.full(cost, at)
        if full or accepted is False:
            longest = max(full, key=lambda window: window.period, default=self.limit)
            if longest.count == "messages" and instance:
                self.accepted[instance] = False
            if not self.refused:
                self.first, self.limit = at, longest
            self.refused += recipients
            return
        for account, cost in due:
            account.ats.append(at)
            account.befores.append(account.total)
            account.total += cost
            account.room -= cost
        if instance:
            self.accepted[instance] = True


def replay(rules: Rules, rows: Iterable[Row], *, measure: bool = False) -> dict[str, Replayed]:
    """The accounts, once their sends are decided anew as the ledger would by these rules."""
    new = functools.partial(Replayed, measure=measure)
    found = {POOL_PREFIX + rule.key: new(rule, ()) for rule in rules if rule.is_pool}
    for name, _, epoch, at, recipients, instance in rows:
        account = found.get(name)
        if account is None:
            pools = [found[POOL_PREFIX + pool.key] for pool in rules.pools(name)]
            account = found[name] = new(rules.select(name), pools)
        if epoch != account.epoch:  # it was reset
            account.begin(epoch)
        if recipients:
            account.send(recipients, at, instance)
    return found


def read_sends(store: Store, rules: Rules, since: int, login: str) -> Iterator[list[Row]]:
    """The sends of all logins, or of one, by the primary key: the daemon goes on meanwhile."""
    instance = "instance" if any(rule.per_message for rule in rules) else "''"
    select = (
        f"SELECT account, seq, epoch, {store.SELECT_AT}, recipients, {instance} FROM sends"
        f" WHERE SUBSTR(account, 1, 5) <> 'POOL ' AND {store.SELECT_AT} + 0 >= ?"  # by no index
    )
    one = f"{select} AND account = ? AND seq > ? ORDER BY seq LIMIT {SLICE}"
    others = f"{select} AND account > ? ORDER BY account, seq LIMIT {SLICE}"
    rows: list[Any] = [(login, 0)]
    while rows:
        account, seq = rows[-1][:2]
        rows = store.run(one, (since, account, seq))
        if len(rows) < SLICE and not login:
            rows += store.run(others, (since, account))
        yield rows


def recorded(store: Store, rules: Rules, since: int, login: str) -> Iterable[Row]:
    """The sends since a time; where there are pools, in the order of time and with their resets."""
    pools = [POOL_PREFIX + rule.key for rule in rules if rule.is_pool]
    slices = read_sends(store, rules, since, "" if pools else login)
    rows = itertools.chain.from_iterable(progress(slices, "sends read", SLICE))
    if not pools:
        return rows
    epochs = f"SELECT account, 0, epoch, MIN({store.SELECT_AT}), 0, '' FROM sends"
    by_epoch = "WHERE account = ? GROUP BY account, epoch"
    begun = [row for pool in pools for row in store.run(f"{epochs} {by_epoch}", (pool,))]
    names: dict[str, str] = {}  # one text for each account, not for each row
    compact = ((names.setdefault(row[0], row[0]), *row[1:]) for row in rows)
    return sorted([*begun, *compact], key=operator.itemgetter(3))


# --- Backtest and recommend -----------------------------------------------------------------------

BACKTEST_HELP = """\
Tell whom rules would have refused: those of --rules, or one --limit for each
login, or those in force.

    saslquotactl.py backtest --limit 200/1h
    saslquotactl.py backtest --rules /root/quotarules.new.json -p 7d

REFUSED and SENT are recipients; LIMIT is what refused first, and FIRST when.
Windows begin empty: let -p be several times their periods. "enforce": false and
HOLD refuse nobody; blocks and grants are left out. What a login sent under one
instance is one message."""
UNKNOWN = (
    "Not recorded: what was refused; how many recipients it was where a rule counted messages."
)
RECOMMEND_HELP = """\
Tell how much each window of the rules has held at most. Half of its logins
never had more in it than 50%, all but one in a hundred not more than 99%. The
limit REFUSE 3 would have refused three of them. A pool (@domain, *) is one.

To choose a first limit, count for some weeks with "enforce": false, then take
somewhat more than REFUSE 0. Where REFUSE 1 or 3 is far less, a few stand out:
backtest --limit names them. Give them rules of their own, if they are no
thieves. A limit for 1h stops a thief sooner than one for 1d; have both."""
MAY_REFUSE = 0, 1, 3, 10  # logins


def read_option(option: str, value: str, read: Callable[[str], Item]) -> Item:
    try:
        return read(value)
    except ValueError as error:
        raise ControlError(f"{option}: must be {error}") from None


def rules_to_test(session: Session, arguments: argparse.Namespace) -> Rules:
    if arguments.rules:
        return saslquota.load_rules(arguments.rules, session.config.retentiondays * 86_400)
    if not arguments.limit:
        return session.rules
    msgquota, _, period = arguments.limit.partition("/")
    number = read_option(f"--limit {arguments.limit}", msgquota, saslquota.read_msgquota)
    length = read_option(f"--limit {arguments.limit}", period, saslquota.read_period)
    return Rules([Rule("default", (Window(length, number, "default"),))])


def replay_period(
    session: Session, arguments: argparse.Namespace, rules: Rules, *, measure: bool = False
) -> tuple[dict[str, Replayed], str]:
    """The accounts of the last -p, and how much they sent, in words."""
    seconds = read_option(f"-p {arguments.period}", arguments.period, saslquota.read_period)
    login = session.account(arguments.login) if arguments.login else ""
    rows = recorded(session.store, rules, session.now - seconds * 1_000_000, login)
    found = replay(rules, rows, measure=measure)
    accounts = {name: account for name, account in found.items() if login in ("", name)}
    sends = [account.sends for account in accounts.values() if account.sends]
    period = saslquota.format_time(seconds)
    what = f"{counted(sum(sends), 'send')} of {counted(len(sends), 'sender')}"
    return accounts, f"{what} in the last {period}"


def backtest(accounts: Mapping[str, Replayed]) -> list[dict[str, Any]]:
    """Who would have been refused, most first."""
    rows = []
    for login, account in accounts.items():
        if account.refused:
            period = saslquota.format_time(account.limit.period)
            messages = " messages" if account.limit.count == "messages" else ""
            rule = f", rule {account.limit.rule}" if account.limit.rule != "default" else ""
            limit = f"{account.limit.limit_text}{messages} in {period}{rule}"
            row = {"refused": account.refused, "sent": account.sent, "limit": limit}
            rows.append(row | {"first": account.first, "login": login})
    return sorted(rows, key=lambda row: (-row["refused"], row["login"]))


def run_backtest(session: Session, arguments: argparse.Namespace) -> int:
    accounts, what = replay_period(session, arguments, rules_to_test(session, arguments))
    rows = backtest(accounts)
    cells = [[*(r | {"first": format_moment(r["first"], session.now)}).values()] for r in rows]
    lines = table(cells, ("REFUSED", "SENT", "LIMIT", "FIRST", "LOGIN"))
    in_json = [row | {"first": json_time(row["first"])} for row in rows]
    who = f"{counted(len(rows), 'sender')} would have been refused"
    session.show(in_json, [f"{what}: {who}", *lines, UNKNOWN])
    return WARNING if what.startswith("0 ") else OK


def recommend(rules: Rules, accounts: Iterable[Replayed]) -> list[dict[str, Any]]:
    """For each window what it held at most, of the login that has a certain rank by that."""
    held = collections.defaultdict(list)
    for account in accounts:
        for number, window in enumerate(account.windows):
            held[window.rule, number].append(account.quotas[number])
    rows = []
    for rule in rules:
        for number, window in enumerate(rule.windows):
            found = sorted(held[rule.key, number], reverse=True)
            limit = None if window.msgquota == math.inf else window.msgquota
            row = {"rule": rule.key, "period": window.period, "limit": limit, "logins": len(found)}
            ranks = {"p50": len(found) // 2, "p99": len(found) // 100, "highest": 0}
            ranks |= {f"refuse_{n}": n for n in MAY_REFUSE}
            rows.append(row | {name: (*found, *[None] * 11)[n] for name, n in ranks.items()})
    return rows


def run_recommend(session: Session, arguments: argparse.Namespace) -> int:
    accounts, what = replay_period(session, arguments, session.rules, measure=True)
    rows = recommend(session.rules, accounts.values())
    cells = [[*(r | {"period": saslquota.format_time(r["period"])}).values()] for r in rows]
    heading = "RULE", "PERIOD", "LIMIT", "LOGINS", "50%", "99%", "HIGHEST"
    lines = table(cells, (*heading, *(f"REFUSE {n}" for n in MAY_REFUSE)))
    session.show(rows, [what, *lines])
    return WARNING if what.startswith("0 ") else OK


def add_records_commands(commands: Any) -> None:
    for name, run, about, text in (
        ("recommend", run_recommend, "how to choose the first limit", RECOMMEND_HELP),
        ("backtest", run_backtest, "whom other rules would have refused", BACKTEST_HELP),
    ):
        parser = commands.add_parser(name, help=about, description=text, formatter_class=RAW)
        parser.add_argument(
            "-p", dest="period", metavar="TIME", default="30d", help="how far back (30d)"
        )
        parser.set_defaults(command=run, login="")
    parser.add_argument("--login", metavar="LOGIN", help="only this one")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rules", metavar="FILE", type=Path, help="as quotarules.json")
    which.add_argument("--limit", metavar="N/TIME", help="for each login, such as 200/1h")


# --- main -----------------------------------------------------------------------------------------

Command = Callable[[Session, argparse.Namespace], int]  # returns the exit status


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saslquotactl.py",
        description="See who sends through saslquota, stop a sender, let one go.",
    )
    parser.add_argument("-c", metavar="FILE", dest="config", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--version", action="version", version=f"saslquota {saslquota.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    adders: list[Callable[[Any], None]] = [  # add_..._commands() of each section
        add_queue_commands,
        add_records_commands,
    ]
    for add in adders:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments = make_parser().parse_args(argv)
    session = None
    try:
        config = saslquota.find_config(arguments.config)
        session = Session(config, as_json=arguments.json)
        command: Command = arguments.command
        status = command(session, arguments)
        sys.stdout.flush()
        return status
    except SaslQuotaError as error:
        print(f"saslquotactl: {clean(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in saslquota.main()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        if session:
            session.close()
    return FAILED


if __name__ == "__main__":
    raise SystemExit(main())
