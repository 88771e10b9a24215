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
import contextlib
import dataclasses
import difflib
import functools
import ipaddress
import json
import math
import os
import random
import re
import shlex
import socket
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import saslquota
from saslquota import (
    POOL_PREFIX,
    Accounts,
    Config,
    Debit,
    Now,
    Rules,
    SaslQuotaError,
    SQLiteStore,
    Store,
    Value,
    Window,
)

STATEMENT_TIMEOUT = 60  # seconds; a table of a month is read in less
OK, WARNING, FAILED = 0, 1, 2  # exit statuses, as Nagios has them


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
        all(isinstance(row[column], int) for row in found)
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
    """A time since 1970 for --json."""
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds")


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
        """The account of a login as the daemon finds it, or of a pool: "@domain" or "*"."""
        name, domain = saslquota.valid_utf8(name), self.config.defaultdomain
        pool = saslquota.fold(name)
        if pool == "*" or pool.startswith("@"):
            return POOL_PREFIX + pool
        if self.config.ignoredomain and (user := name.rsplit("@", 1)[0]).strip():
            name = user + (domain and "@" + domain)
        return saslquota.fold(name, domain)

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


# --- Look -----------------------------------------------------------------------------------------

NEAR = 80  # percent of a limit
HOUR = 3600 * 1_000_000  # microseconds
LOT = 200  # accounts that MySQL is asked about in one statement
TIMES = ("at", "until", "last", "told", "first", "fits_at")  # of a row, in microseconds since 1970
EVENT = ("account", "number", "kind", "author", "note", "amount", "epoch", *TIMES[:4])
USE = *("account", "rule", "period", "used", "limit", "percent"), "enforced", "blocked", "fits_at"
ADDRESS = "CASE WHEN LENGTH(client_address) > 0 THEN client_address END"  # NULL: not known
saslquota.RETRY_SEARCH_INTERVAL = 0.0  # nobody waits while it is searched when a mail fits
Row = dict[str, Any]
Windows = dict[str, tuple[Window, ...]]  # by account


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on a terminal what takes longer than 2 s."""
    timer = threading.Timer(2, print, [f"{what} ..."], {"file": sys.stderr})
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def spelled(account: str) -> str:
    """An account as commands take it."""
    return account.removeprefix(POOL_PREFIX)


def present(session: Session, rows: Iterable[Row], lines: Iterable[str]) -> None:
    """Session.show() of rows as they are computed."""

    def plain(name: str, value: Any) -> Any:
        if value is None or name not in (*TIMES, "account"):
            return value
        return spelled(value) if name == "account" else json_time(value)

    found = ({name: plain(name, value) for name, value in row.items()} for row in rows)
    session.show(found, map(clean, lines))


def complain_unknown(store: Store, account: str, reason: str) -> int:
    """Say on stderr what an account lacks, and which it may be a mistake for."""
    print(
        clean(f"saslquotactl: {spelled(account)}: {reason}{similar(store, account)}"),
        file=sys.stderr,
    )
    return WARNING


def similar(store: Store, account: str) -> str:
    """If an account has never sent: which others of its domain or local part have."""
    known = {name for (name,) in store.run("SELECT DISTINCT account FROM sends")}
    local, _, domain = account.rpartition("@")
    near = [n for n in known if n.startswith(f"{local}@") or (domain and n.endswith(f"@{domain}"))]
    names = [] if account in known else difflib.get_close_matches(account, near, 3)
    return f"; known: {', '.join(map(spelled, names))}" if names else ""


def read_events(store: Store, which: str, values: Sequence[Value] = ()) -> list[Row]:
    """The newest of an account first; TIME in `which` stands for a value."""
    columns = [store.SELECT_AT.replace("at", n) if n in TIMES else n for n in EVENT]
    which = which.replace("TIME", store.BIND_TIME)
    sql = f"SELECT {', '.join(columns)} FROM events WHERE {which} ORDER BY number DESC, account"
    return [dict(zip(EVENT, row, strict=True)) for row in store.run(sql, values)]


def read_orders(store: Store) -> dict[str, Row]:
    """The newest order of each account, in force or not."""
    events = read_events(store, "kind IN ('grant', 'block', 'unblock')")
    return {event["account"]: event for event in reversed(events)}


def is_in_force(order: Row | None, kind: str, now: int) -> bool:
    return order is not None and order["kind"] == kind and (order["until"] or math.inf) > now


def describe_event(event: Row, now: int) -> str:
    """As in "grant +2000 until 23:00:00, by root: summer sale"."""
    amount = {"grant": f" +{event['amount']}", "refused": f" {event['amount']}"}
    until = f" until {format_moment(event['until'], now)}" if event["until"] else ""
    by = f", by {event['author']}{': ' if event['note'] else ''}{event['note']}"
    return f"{event['kind']}{amount.get(event['kind'], '')}{until}{by}"


def windows_of(rules: Rules, account: str) -> Windows:
    """The windows that a mail must be within: an account's own, then those of its pools."""
    key = spelled(account)
    pools = {POOL_PREFIX + rule.key: rule.windows for rule in rules.pools(key)}
    if key != account:
        return {account: pools.get(account, ())}  # none, if it has no rule any more
    return {account: rules.select(account).windows, **pools}


def measure(store: Store, windows: Windows) -> list[Row]:
    """What is used of each window, as the ledger counts it and the account's order has it."""
    orders = read_orders(store)
    uses: list[Row] = []
    debits = [Debit(account, 1, some) for account, some in windows.items()]
    for lot in (debits[begin : begin + LOT] for begin in range(0, len(debits), LOT)):
        ledger = Accounts(store, saslquota.Clock(store, time.monotonic), time.monotonic)
        now = ledger.refresh(lot, take_locks=False)
        for debit in lot:
            uses += measure_account(ledger, debit, now, orders.get(debit.account))
    return uses


def measure_account(ledger: Accounts, debit: Debit, now: Now, order: Row | None) -> Iterator[Row]:
    """`fits_at` is when a mail of one recipient fits, None: never."""
    account, clock = ledger[debit.account], now.clock
    is_blocked = is_in_force(order, "block", clock)
    more = order["amount"] if order and is_in_force(order, "grant", clock) else 0
    used = {window: account.used(window.period, now) or 0 for window in debit.windows}
    if order and order["kind"] == "grant" and not more and order["epoch"] == account.epoch:
        is_over = any(used[window] >= window.msgquota for window in used if window.enforce)
        used = dict.fromkeys(used, 0) if is_over else used  # the next mail begins the count anew
    for window, spent in used.items():
        limit = window.msgquota + more
        fits_at = clock if spent < limit else None
        if is_blocked and order:
            fits_at = order["until"]
        elif spent >= limit > 0:
            total = account.total + 1 - int(limit)
            at = ledger.when_total_reached(account.name, window.period, total, now)
            fits_at = clock + at + window.period * 1_000_000 + 1 - account.time(now)
        percent = round(100 * spent / limit) if limit else 100
        upper = None if limit == math.inf else limit
        row = account.name, window.rule, window.period, spent, upper, percent
        yield dict(zip(USE, (*row, window.enforce, is_blocked, fits_at), strict=True))


def describe_use(use: Row) -> str:
    limit = "unlimited" if use["limit"] is None else use["limit"]
    kind = "pool" if use["account"].startswith(POOL_PREFIX) else "rule"
    rule = f"{kind} {use['rule']}{'' if use['enforced'] else ' (not enforced)'}"
    return f"{use['used']}/{limit} in {saslquota.format_time(use['period'])}, {rule}"


def tally(store: Store, key: str, which: str, values: Sequence[Value]) -> list[Row]:
    """What was sent by each value of a column, the most first; TIME in `which` is a value."""
    first, last = (store.SELECT_AT.replace("at", f"{name}(at)") for name in ("MIN", "MAX"))
    sql = (
        f"SELECT {key}, CAST(SUM(recipients) AS SIGNED), COUNT(DISTINCT {ADDRESS}), {first}, {last}"
        f" FROM sends WHERE {which.replace('TIME', store.BIND_TIME)} AND recipients > 0"
        f" AND SUBSTR(account, 1, 5) <> '{POOL_PREFIX}' GROUP BY {key}"
    )
    names = "name", "sent", "addresses", "first", "last"
    rows = [dict(zip(names, row, strict=True)) for row in store.run(sql, values)]
    return sorted(rows, key=lambda row: (-row["sent"], -row["last"]))


def top(session: Session, arguments: argparse.Namespace) -> int:
    now = session.now
    with waiting("reading the sends"):
        since = now - arguments.period * 1_000_000
        rows = tally(session.store, "account", "at >= TIME", [since])
    if arguments.addresses:
        rows.sort(key=lambda row: -row["addresses"])
    rows = [{"login": row.pop("name"), **row} for row in rows[: arguments.number]]
    windows = {row["login"]: windows_of(session.rules, row["login"]) for row in rows}
    wanted = {account: some for each in windows.values() for account, some in each.items()}
    uses = measure(session.store, wanted)
    for row in rows:
        mine = [use for use in uses if use["account"] in windows[row["login"]]]
        row |= max(mine, key=lambda use: (use["blocked"], use["percent"]))
    cells = []
    for row in rows:
        quota = "blocked" if row["blocked"] else describe_use(row)
        last = format_moment(row["last"], now)
        cells.append([row["sent"], row["addresses"], quota, last, row["login"]])
    heading = "SENT", "ADDRESSES", "QUOTA", "LAST", "LOGIN"
    nobody = [f"nobody has sent anything in the last {saslquota.format_time(arguments.period)}"]
    present(session, rows, table(cells, heading) or nobody)
    return OK if rows else WARNING


def sends_of(store: Store, account: str, start: int) -> tuple[list[Row], list[Row]]:
    """What an account has sent since then: by sender (in a pool by login), and by address. An
    address is "new" when it never sent before, None when none is known from before."""
    name, key, which = spelled(account), "sender", "account = ?"
    if name != account:
        key, which = "account", "? = '*'" if name == "*" else f"SUBSTR(account, {-len(name)}) = ?"
    found = [
        tally(store, column, f"{which} AND at {when} TIME", [name, start])
        for column, when in ((key, ">="), ("client_address", ">="), ("client_address", "<"))
    ]
    senders, addresses, before = found
    known = {row["name"] for row in before if row["name"]}
    for row in senders:
        row["name"] = row["name"] or account
    for row in (addresses := [row for row in addresses if row["name"]]):
        row["new"] = row["name"] not in known if known else None
        row["name"] = str(ipaddress.ip_address(bytes(row["name"])))
    return senders, addresses


def show(session: Session, arguments: argparse.Namespace) -> int:
    account, store = session.account(arguments.login), session.store
    events = read_events(store, "account = ?", [account])[: arguments.number]
    if not events and not store.newest_entries({account: 1}, take_locks=False):
        return complain_unknown(store, account, "has never sent anything")
    uses, now = measure(store, windows_of(session.rules, account)), store.now()
    start = now - arguments.period * 1_000_000
    with waiting("reading the sends"):
        senders, addresses = sends_of(store, account, start)
    new, sent = [row["new"] for row in addresses], sum(row["sent"] for row in senders)
    seen = "" if None in new else f", {sum(new)} of them never seen before"
    lines = [f"{spelled(account)}:"]
    for use in uses:
        at = use["fits_at"]
        when = "never" if at is None else "now" if at <= now else format_moment(at, now)
        lines.append(f"  {describe_use(use)} ({use['percent']}%), next mail: {when}")
    lines.append(
        f"sent since {format_moment(start, now)}: {sent}, as {len(senders)} senders,"
        f" from {len(addresses)} addresses{seen}"
    )
    for rows in (senders, addresses):
        del rows[arguments.number :]
        cells = []
        for row in rows:
            times = [format_moment(row[name], now) for name in ("first", "last")]
            cells.append([row["sent"], *times, row["name"], "new" if row.get("new") else ""])
        lines += [f"  {line}" for line in ["", *table(cells)]]
    lines += ["", *(f"{format_moment(e['at'], now)}  {describe_event(e, now)}" for e in events)]
    kinds = {"window": uses, "sender": senders, "address": addresses, "event": events}
    present(session, ({"what": w, **row} for w, rows in kinds.items() for row in rows), lines)
    return OK


class Part(NamedTuple):
    """What `status` has found of one thing."""

    level: int  # an exit status
    lines: Sequence[str]
    rows: Sequence[Row]


def daemon_part(session: Session) -> Part:
    """What the daemon says of itself; an older or a newer one may leave out some of it."""
    where, began = saslquota.address_of(session.config), time.monotonic()
    try:
        reply = ask_daemon(session.config)
    except ControlError as error:
        return Part(FAILED, [f"daemon   {error}"], [{"what": "daemon", "error": str(error)}])
    took = 1000 * (time.monotonic() - began)
    row: Row = {n: int(v) if v.isdecimal() else v for n, v in reply.items()}
    up, last = row.get("uptime") or 0, row.get("last_request_at")
    texts = {"version": "saslquota {}", "store": "store {}", "connections": "{} connections"}
    said = [text.format(row[name]) for name, text in texts.items() if name in row]
    lines = [f"daemon   {where} answers in {took:.1f} ms: {', '.join(said)}"]
    counts = {n[9:].replace("_", " "): v for n, v in row.items() if n.startswith("requests_")}
    told = [f"{number} {name}" for name, number in counts.items() if number]
    lines.append(f"requests {', '.join(told) or 'none'} in {saslquota.format_time(up)}")
    asked = format_moment(last * 1_000_000, session.now) if last else "never"
    lines.append(f"Postfix  asked last: {asked}")
    level = WARNING if row.get("rules_valid") == "no" or (last == "" and up > 3600) else OK
    for name in row:
        if name.endswith(("_at", "_since")):
            row[name] = json_time(row[name] * 1_000_000) if row[name] else None
    row = {"what": "daemon", "address": where, "milliseconds": round(took, 1), **row}
    return Part(FAILED if row.get("store") == "down" else level, lines, [row])


def recent_uses(session: Session) -> list[Row]:
    """What is used of the own windows of each account that has sent within the longest period."""
    store, rules = session.store, session.rules
    longest = max(window.period for rule in rules for window in rule.windows)
    sql = f"SELECT DISTINCT account FROM sends WHERE at >= {store.BIND_TIME}"
    names = [name for (name,) in store.run(sql, [session.now - longest * 1_000_000])]
    return measure(store, {name: windows_of(rules, name)[name] for name in names})


def listed(title: str, rows: list[Row], lines: list[str], level: int) -> Part:
    """Accounts under a title, if there are any."""
    text = ["", f"{title}: {len(rows)}", *(f"  {line}" for line in lines)] if rows else []
    return Part(level if rows else OK, text, [{"what": title, **row} for row in rows])


def store_parts(session: Session) -> Iterator[Part]:
    store, now, path, uses = session.store, session.now, session.config.quotafile, []
    senders = tally(store, "account", "at >= TIME", [now - HOUR])
    row = {"what": "store", "sent": sum(s["sent"] for s in senders), "senders": len(senders)}
    text = f"{row['sent']} sent by {row['senders']} senders in the last hour"
    yield Part(OK, [f"store    {store}: {text}"], [row])
    try:
        uses = recent_uses(session)
        row = {"what": "rules", "number": len(list(session.rules))}
        yield Part(OK, [f"rules    {path}: {row['number']} rules"], [row])
    except saslquota.ConfigError as error:
        yield Part(WARNING, [f"rules    {error}"], [{"what": "rules", "error": str(error)}])
    events = read_events(store, "kind = 'refused' AND at >= TIME", [now - 25 * HOUR])
    events = [event for event in events if (event["last"] or event["at"]) >= now - HOUR]
    cells = []
    for event in events:
        mine = [use for use in uses if use["account"] == event["account"] and use["percent"] >= 100]
        times = [format_moment(event[name], now) for name in ("at", "last")]
        why = event["note"] or ", ".join(map(describe_use, mine))
        told = "yes" if event["told"] else "no"
        cells.append([*times, event["amount"], told, spelled(event["account"]), why])
    heading = "SINCE", "LAST", "REFUSED", "TOLD", "ACCOUNT", "WHY"
    yield listed("refused in the last hour", events, table(cells, heading), WARNING)
    near = [use for use in uses if use["enforced"] and use["limit"] and not use["blocked"]]
    near = sorted((use for use in near if use["percent"] >= NEAR), key=lambda use: -use["percent"])
    cells = [[f"{use['percent']}%", spelled(use["account"]), describe_use(use)] for use in near]
    yield listed("near the limit", near, table(cells), WARNING)
    orders = read_orders(store).values()
    for kind, title, level in (("block", "blocked", WARNING), ("grant", "granted more", OK)):
        rows = [order for order in orders if is_in_force(order, kind, now)]
        lines = [f"{spelled(row['account'])}: {describe_event(row, now)}" for row in rows]
        yield listed(title, rows, lines, level)


def status(session: Session, arguments: argparse.Namespace) -> int:
    parts = [daemon_part(session)]
    try:
        parts.extend(store_parts(session))
    except SaslQuotaError as error:
        text = saslquota.with_remedy(error, session.config)
        parts.append(Part(FAILED, [f"store    {text}"], [{"what": "store", "error": text}]))
    if not arguments.quiet:
        rows = (row for part in parts for row in part.rows)
        present(session, rows, (line for part in parts for line in part.lines))
    return max(part.level for part in parts)


def period(text: str) -> int:
    return saslquota.read_period(text)


def number(text: str) -> int:
    return saslquota.read_int(1, 1_000_000_000)(int(text))


def add_command(commands: Any, name: str, command: Command, summary: str, more: str) -> Any:
    parser = commands.add_parser(name, help=summary, description=f"{summary}. {more}")
    parser.set_defaults(command=command, kind=name)
    return parser


def add_extent(parser: Any, default: str) -> None:
    text = f"how far back, as 90m, 1h, 7d (default: {default})"
    parser.add_argument(
        "-p", metavar="PERIOD", dest="period", type=period, default=default, help=text
    )
    text = "lines of each list at most (default: 20)"
    parser.add_argument("-n", metavar="N", dest="number", type=number, default=20, help=text)


def add_look_commands(commands: Any) -> None:
    more = (
        "Exit status 0: well; 1: somebody is refused, blocked, or has used 80 %% of a limit;"
        " 2: the daemon or its database is down."
    )
    parser = add_command(commands, "status", status, "does it work, and who is stuck", more)
    parser.add_argument("-q", dest="quiet", action="store_true", help="exit status only")
    more = (
        "QUOTA is the window nearest its limit. A stolen password is used from many addresses:"
        " top --addresses -p 1d, then show LOGIN."
    )
    parser = add_command(commands, "top", top, "who sends most, and from how many addresses", more)
    parser.add_argument("--addresses", action="store_true", help="most addresses first")
    add_extent(parser, "1h")
    more = (
        "Its windows, senders, addresses and history. Many new addresses, and senders that are not"
        " the login's own, are a thief's: block LOGIN. Example: show bob@example.com -p 7d"
    )
    parser = add_command(commands, "show", show, "all about a login, or a pool", more)
    parser.add_argument("login", metavar="LOGIN", help=LOGIN)
    add_extent(parser, "1d")


# --- Orders ---------------------------------------------------------------------------------------

PATIENCE = 20.0  # seconds that an order is tried for while others write to the same account
ORDERS = ("grant", "block", "unblock")


class Pointless(ControlError):
    """It would change nothing."""


def moment_of(text: str, now: int) -> int:
    """When "18:00", "2026-12-24", "2026-12-24 18:00" (local time) or "2h" from now is, in
    microseconds since 1970. Raises ControlError, also when it is in the past."""
    seconds = now // 1_000_000
    try:
        if re.fullmatch("[0-9]+[smhdw]", text):
            until: float = seconds + saslquota.read_period(text)
        elif re.fullmatch("[0-9]{1,2}:[0-9]{2}", text):  # of today; of tomorrow, if it is 25 h long
            later = (time.localtime(seconds + more) for more in (0, 86_400, 90_000))
            times = (datetime.fromisoformat(f"{time.strftime('%F', d)} {text:0>5}") for d in later)
            until = next(at for at in map(datetime.timestamp, times) if at > seconds)
        else:
            until = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        example = '18:00, 2026-12-24, "2026-12-24 18:00", 2h, 3d'
        raise ControlError(f"--until {text}: must be a time, as {example}") from None
    if until <= seconds:
        raise ControlError(f"--until {text}: is in the past")
    return int(until) * 1_000_000


def place(store: Store, wanted: Row) -> tuple[Row, Row | None, bool]:
    """Write an event, with what it does to the count, or nothing of it. Returns the event, the
    newest order before it, and whether the account has ever sent. Raises Pointless, StoreError."""
    account, kind = wanted["account"], wanted["kind"]
    try:
        heads = store.newest_entries({account: 1}, take_locks=True)
        events, now = read_events(store, "account = ?", [account]), store.now()
        order = next((event for event in events if event["kind"] in ORDERS), None)
        if kind == "reset" and not heads:
            raise Pointless("has never sent anything")
        if kind == "unblock" and not is_in_force(order, "block", now):
            raise Pointless("is not blocked")
        epoch, entries = heads[0].epoch if heads else 1, []
        if kind == "reset":
            seq, at = heads[0].seq + 1, heads[0].at
            if not now < at < now + saslquota.MAX_CLOCK_SKEW:  # else back to the present clock
                at = now
            entries = [saslquota.Entry(account, seq, epoch + 1, at, 0, 0, "reset", 0)]
        if kind == "reset" and order and is_in_force(order, "grant", now):
            sql = "UPDATE events SET epoch = ? WHERE account = ? AND number = ?"
            store.run(sql, [epoch + 1, account, order["number"]])
        event = wanted | {"number": events[0]["number"] + 1 if events else 1, "at": now}
        given = event | ({"epoch": epoch} if kind == "grant" else {})
        marks = ", ".join(store.BIND_TIME if name in TIMES else "?" for name in given)
        sql = f"INSERT INTO events ({', '.join(given)}) VALUES ({marks})"
        store.run(sql, list(given.values()))
        store.append(entries)  # and commit
    except BaseException:
        store.rollback()
        raise
    return event, order, bool(heads)


def place_at_last(store: Store, wanted: Row) -> tuple[Row, Row | None, bool]:
    """As place(), again when others write to the same account at that moment."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return place(store, wanted)
        except saslquota.Conflict as error:
            if time.monotonic() > deadline:
                raise ControlError(f"nothing was done, it is locked: {error}") from None
            time.sleep(random.uniform(0, 0.02))


def order(session: Session, arguments: argparse.Namespace) -> int:
    account, store, now = session.account(arguments.login), session.store, session.now
    kind, name, note = arguments.kind, spelled(account), saslquota.valid_utf8(arguments.note)
    if not 0 < len(account) <= saslquota.MAX_ACCOUNT or len(note) > 400:
        raise ControlError("a login has 1 to 320 characters, a note 400 at most")
    author = os.environ.get("SUDO_USER") or saslquota.user_name(os.getuid())
    wanted = {"account": account, "kind": kind, "author": author[:64], "note": note}
    if arguments.until:
        wanted["until"] = moment_of(arguments.until, now)
    if kind == "grant":
        wanted = {"until": now + 24 * HOUR, **wanted, "amount": arguments.amount}
    try:
        with waiting(f"{name} is locked by another session"):
            event, before, has_sent = place_at_last(store, wanted)
    except Pointless as error:
        return complain_unknown(store, account, str(error))
    until = f" until {format_moment(event['until'], now)}" if "until" in event else ""
    queue = f"; mail that waits: saslquotactl.py queue {shlex.quote(name)}"
    outcome = {
        "reset": "the count begins anew",
        "grant": f"{arguments.amount} more{until}, then the count begins anew",
        "block": f"may not send{until}{queue if name == account else ''}",
        "unblock": "may send again",
    }
    lines = [f"{name}: {outcome[kind]}"]
    if kind == "grant" and not arguments.until:
        lines.append("  that is 24 hours from now: --until was not given")
    if is_in_force(before, "block", now) or is_in_force(before, "grant", now):
        fate = "goes on" if kind == "reset" else "has ended"
        lines.append(f"  {describe_event(before or {}, now)}: {fate}")
    if not has_sent:
        lines.append(f"  note: it has never sent anything{similar(store, account)}")
    present(session, [event | {"account": name, "has_sent": has_sent}], lines)
    return OK


LOGIN = "as the user logs in, in any spelling; a pool: @example.com, or '*'"


def add_orders_commands(commands: Any) -> None:
    within = "All daemons obey within a second."
    for name, summary, more in (
        ("reset", "begin a sender's count anew", "Who is over quota may send again."),
        ("grant", "let a sender send N more", "In every window; then the count begins anew."),
        ("block", "forbid a login to send", "The mailbox goes on; the password is not changed."),
        ("unblock", "end a block", "The count stays as it is: see reset."),
    ):
        parser = add_command(commands, name, order, summary, f"{more} {within}")
        parser.add_argument("login", metavar="LOGIN", help=LOGIN)
        parser.set_defaults(until="", amount=None)
        if name == "grant":
            parser.add_argument("amount", metavar="N", type=number, help="recipients")
        if name in ("grant", "block"):
            text = 'as 18:00, 2026-12-24, "2026-12-24 18:00", 2h, 3d (local time); default: '
            text += "24h" if name == "grant" else "for good"
            parser.add_argument("--until", metavar="TIME", default="", help=text)
        text = "who asked, why: show LOGIN has it"
        parser.add_argument("-m", dest="note", metavar="NOTE", default="", help=text)


# --- Metrics --------------------------------------------------------------------------------------

SAID = {  # by the daemon: its line, the metric, and what that is
    "uptime": ("uptime_seconds", "since the daemon's start"),
    "store": ("store_up", "0 while the daemon cannot use its database"),
    "rules_valid": ("rules_valid", "0: quotarules.json has a mistake, older rules are in force"),
    "connections": ("connections", "open connections of Postfix"),
    "recipients": ("recipients_total", "recipients accepted"),
    "incidents": ("incidents_total", "accounts that came over their quota"),
    "log_lines_lost": ("log_lines_lost_total", "lines that the log did not take"),
}


def metrics_text(said: Mapping[str, str], counted: Mapping[str, int]) -> str:
    """Prometheus' text of what the daemon says of itself, nothing if it is down, and of what is in
    the tables. What is not known is left out. No label is a login: it is personal data."""
    lines: list[str] = []

    def add(name: str, explanation: str, samples: Mapping[str, object], kind: str = "") -> None:
        kind = kind or ("counter" if name.endswith("_total") else "gauge")
        lines.extend((f"# HELP saslquota_{name} {explanation}", f"# TYPE saslquota_{name} {kind}"))
        lines.extend(f"saslquota_{name}{suffix} {value}" for suffix, value in samples.items())

    add("up", "whether the daemon answers", {"": int(bool(said))})
    if re.fullmatch(r"[0-9A-Za-z.+-]+", said.get("version", "")):
        add("info", "about the daemon", {f'{{version="{said["version"]}"}}': 1})
    words = {"up": "1", "down": "0", "yes": "1", "no": "0"}
    found = {name: words.get(value, value) for name, value in said.items()}
    found = {name: n for name, n in found.items() if re.fullmatch(r"[0-9]+(\.[0-9]+)?", n)}
    for name in (name for name in SAID if name in found):
        add(*SAID[name], {"": found[name]})
    verdicts = {f'{{verdict="{n[9:]}"}}': found[n] for n in found if n.startswith("requests_")}
    add("requests_total", "requests by what came of them", verdicts)
    sums = {n.partition("_le_")[2]: found[n] for n in found if n.startswith("decision_seconds_le_")}
    if "inf" in sums and "decision_seconds_sum" in found:
        took = {f'_bucket{{le="{n.replace("inf", "+Inf")}"}}': sums[n] for n in sums}
        took |= {"_sum": found["decision_seconds_sum"], "_count": sums["inf"]}
        add("decision_seconds", "from a request to its reply", took, "histogram")
    for name, number in counted.items():
        add(name, "in the tables, which several daemons may share", {"": number})
    return "\n".join(lines) + "\n"


def count_for_metrics(store: Store) -> dict[str, int]:
    now = store.now()
    events = read_events(store, "kind = 'refused' AND at >= TIME", [now - 25 * HOUR])
    refused = {event["account"] for event in events if (event["last"] or 0) >= now - HOUR}
    untold = [event for event in events if not event["told"] and event["at"] >= now - 24 * HOUR]
    blocked = [order for order in read_orders(store).values() if is_in_force(order, "block", now)]
    names = "refused_senders", "blocked_senders", "incidents_untold"
    return dict(zip(names, map(len, (refused, blocked, untold)), strict=True))


def metrics(session: Session, _: argparse.Namespace) -> int:
    said: dict[str, str] = {}
    counted: dict[str, int] = {}
    with contextlib.suppress(ControlError):
        said = ask_daemon(session.config)
    with contextlib.suppress(SaslQuotaError):  # the daemon says whether it is up
        counted = count_for_metrics(session.store)
    print(metrics_text(said, counted), end="")
    return OK


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
    for add in (add_look_commands, add_orders_commands):
        add(commands)
    more = "For node_exporter's textfile; saslquotawatch.py serves the same at /metrics."
    add_command(commands, "metrics", metrics, "print figures for Prometheus", more)
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
        reason = saslquota.with_remedy(error, session.config) if session else error
        print(f"saslquotactl: {clean(reason)}", file=sys.stderr)
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
