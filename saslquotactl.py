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
    them; the commands come in the order of --help. The commands of saslquotabacktest.py and
    saslquotadoctor.py, beside this script, use its frame and are its own to whoever types them.
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
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import saslquota
from saslquota import (
    BLOCKED,
    POOL_PREFIX,
    SPOOL_ACCOUNT,
    Accounts,
    Config,
    Debit,
    Now,
    Orders,
    Rules,
    SaslQuotaError,
    SQLiteStore,
    Store,
    StoreError,
    Value,
)

STATEMENT_TIMEOUT = 60  # seconds; a table of a month is read in less
PATIENCE = 20.0  # seconds that others are waited for who write at the same moment
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
    """A time since 1970 for --json."""
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
            store.statement_timeout = PATIENCE
            user = saslquota.daemon_user(config, "")  # files that root makes it could not write
        with saslquota.rights_of(user) if user else contextlib.nullcontext():
            store.open()
        return store

    @functools.cached_property
    def now(self) -> int:
        """The database's time when it was first asked for, in microseconds since 1970, UTC."""
        return self.store.now()

    def account(self, name: str) -> str:
        """The account of a login, or of a pool: "@domain" or "*". Raises ControlError."""
        folded = saslquota.fold(name)
        if name == SPOOL_ACCOUNT or name.startswith(f"{SPOOL_ACCOUNT} "):
            of_spools = "belongs to the daemons' spools, not to a sender"
            raise ControlError(f"{name} {of_spools}; a login of that name is: {folded}")
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


def explained(error: SaslQuotaError, session: Session | None) -> str:
    """An error, and if it is one of MySQL's what to do about it."""
    is_mysql = session and isinstance(error, StoreError) and error.__cause__
    return saslquota.with_remedy(error, session.config) if session and is_mysql else str(error)


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


Command = Callable[[Session, argparse.Namespace], int]  # returns the exit status


# --- Look -----------------------------------------------------------------------------------------

NEAR = 80  # percent of a limit
HOUR = 3600 * 1_000_000  # microseconds
LOT = 200  # accounts that MySQL is asked about in one statement
TIMES = ("at", "until", "last", "told")  # of an event; as all of a row, microseconds since 1970
EVENT = ("account", "number", "kind", "author", "note", "amount", "epoch", *TIMES)
ORDERS = ("grant", "block", "unblock")
# Of accounts: logins are folded to lower case, so none begins as these do.
NO_SPOOL = f"SUBSTR(account, 1, {len(SPOOL_ACCOUNT)}) <> '{SPOOL_ACCOUNT}'"
IS_LOGIN = f"SUBSTR(account, 1, {len(POOL_PREFIX)}) <> '{POOL_PREFIX}' AND {NO_SPOOL}"
ADDRESS = "CASE WHEN LENGTH(client_address) > 0 THEN client_address END"  # NULL: not known
Row = dict[str, Any]
Debits = tuple[Debit, ...]


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


def plain(name: str, value: Any) -> Any:
    """A value of a row for --json."""
    if name == "account":
        return spelled(value)
    is_time = name in (*TIMES, "first") or name.endswith(("_at", "_since"))
    return json_time(value) if is_time and value else value


def present(session: Session, rows: Iterable[Row], lines: Iterable[str]) -> None:
    """Session.show() of rows as they are computed."""
    found = ({name: plain(name, value) for name, value in row.items()} for row in rows)
    session.show(found, map(clean, lines))


def complain(store: Store, account: str, reason: str) -> int:
    """Say why there is nothing to show or to do."""
    text = f"{spelled(account)}: {reason}{similar(store, account)}"
    print(f"saslquotactl: {clean(text)}", file=sys.stderr)
    return WARNING


def similar(store: Store, account: str) -> str:
    """If an account has never sent: which others of its domain or local part have."""
    rows = store.run(f"SELECT DISTINCT account FROM sends WHERE {NO_SPOOL}")
    known = [name for (name,) in rows]
    local, _, domain = account.rpartition("@")
    parts = [(name.rpartition("@"), name) for name in known]
    by_local = {its: name for (its, _, its_domain), name in parts if its_domain == domain}
    by_domain = {its: name for (its_local, _, its), name in parts if its_local == local}
    names = [by_local[its] for its in difflib.get_close_matches(local, by_local, 3)]
    names += [by_domain[its] for its in difflib.get_close_matches(domain, by_domain, 3)]
    names = [] if account in names else names[:3]
    return f"; known: {', '.join(map(spelled, names))}" if names else ""


def read_events(store: Store, which: str, values: Sequence[Value] = ()) -> list[Row]:
    """The newest of an account first; TIME in `which` stands for a value."""
    columns = [store.TIME.format(name) if name in TIMES else name for name in EVENT]
    which = which.replace("TIME", store.BIND_TIME)
    sql = f"SELECT {', '.join(columns)} FROM events WHERE {which} ORDER BY number DESC, account"
    return [dict(zip(EVENT, row, strict=True)) for row in store.run(sql, values)]


def newest_orders(store: Store) -> Iterable[Row]:
    """The last order of each account, whether it is in force or not."""
    orders = read_events(store, f"kind IN {ORDERS}")
    return {order["account"]: order for order in reversed(orders)}.values()


def is_in_force(order: Row | None, kind: str, now: int) -> bool:
    return order is not None and order["kind"] == kind and (order["until"] or math.inf) > now


def describe_event(event: Row, now: int) -> str:
    """As in "grant +2000 until 23:00:00, by root: summer sale"."""
    amount = {"grant": f" +{event['amount']}", "refused": f" {event['amount']}"}
    until = f" until {format_moment(event['until'], now)}" if event["until"] else ""
    by = f", by {event['author']}{': ' if event['note'] else ''}{event['note']}"
    return f"{event['kind']}{amount.get(event['kind'], '')}{until}{by}"


def debits_of(rules: Rules, account: str) -> Debits:
    """What a mail of one recipient costs: the account itself first, then the pools above it."""
    key = spelled(account)
    pools = [Debit(POOL_PREFIX + rule.key, 1, rule.windows) for rule in rules.pools(key)]
    if key != account:
        return tuple(debit for debit in pools if debit.account == account)
    return Debit(account, 1, rules.select(account).windows), *pools


def measure(session: Session, charges: Sequence[Debits]) -> list[list[Row]]:
    """What is used of each window of each charge: as the ledger counts, and its orders are."""
    store, uses = session.store, []
    saslquota.Events(store).orders(0)  # fails where there is no such table
    orders = saslquota.Orders(store, session.config.retentiondays * 24 * HOUR, time.monotonic)
    for lot in (charges[begin : begin + LOT] for begin in range(0, len(charges), LOT)):
        accounts = Accounts(store, saslquota.Clock(store, time.monotonic), time.monotonic)
        accounts.retry_searches = saslquota.RateLimit(0.0)  # nobody waits meanwhile
        now = accounts.refresh([debit for debits in lot for debit in debits], take_locks=False)
        orders.refresh(now.clock)
        for debits in lot:
            charge = orders.applied_to(saslquota.Charge("", debits), now.clock)
            uses.append([u for d in charge.debits for u in uses_of(accounts, orders, d, now)])
    return uses


USE = *("account", "rule", "period", "used", "limit", "percent"), "action", "blocked", "fits_at"


def uses_of(accounts: Accounts, orders: Orders, debit: Debit, now: Now) -> Iterator[Row]:
    """`fits_at` is when a mail of one recipient is within the window, None: never."""
    account = accounts[debit.account]
    found = [(window, account.used(window.period, now) or 0) for window in debit.windows]
    is_over = any(used >= window.msgquota for window, used in found if window.enforce)
    if is_over and orders.begins_anew(account, now.clock):
        found = [(window, 0) for window, _ in found]
    for window, used in found:
        limit, action = window.msgquota, window.action if window.enforce else "none"
        percent, is_blocked = round(100 * used / (limit or 1)), window.msg == BLOCKED.msg
        fits_at = now.clock if used < limit else None
        if used >= limit > 0:
            total = account.total + 1 - int(limit)
            at = accounts.when_total_reached(account.name, window.period, total, now)
            fits_at = now.clock + at + window.period * 1_000_000 + 1 - account.time(now)
        row = account.name, window.rule, window.period, used, None if limit == math.inf else limit
        yield dict(zip(USE, (*row, percent, action, is_blocked, fits_at), strict=True))


def describe_use(use: Row) -> str:
    if use["blocked"]:
        return "blocked"
    limit = "unlimited" if use["limit"] is None else use["limit"]
    kind = "pool" if use["account"].startswith(POOL_PREFIX) else "rule"
    rule = f"{kind} {use['rule']}{', not enforced' if use['action'] == 'none' else ''}"
    return f"{use['used']}/{limit} in {saslquota.format_time(use['period'])}, {rule}"


def describe_fullness(use: Row, now: int) -> str:
    """As in "1490/400 in 1h, rule default (373%): refused until 13:52:01"."""
    at, text = use["fits_at"], describe_use(use)
    text += "" if use["blocked"] else f" ({use['percent']}%)"
    if use["blocked"] or use["action"] == "none" or (at is not None and at <= now):
        return text
    verdict = "held" if use["action"] == "HOLD" else "refused"
    return f"{text}: {verdict}{' until ' if at else ''}{format_moment(at, now)}"


def tally(store: Store, key: str, which: str, values: Sequence[Value]) -> list[Row]:
    """What was sent by each value of a column, the most first; TIME in `which` is a value."""
    first, last = (store.TIME.format(f"{name}(at)") for name in ("MIN", "MAX"))
    sql = (
        f"SELECT {key}, CAST(SUM(recipients) AS SIGNED), COUNT(DISTINCT {ADDRESS}), {first}, {last}"
        f" FROM sends WHERE {which.replace('TIME', store.BIND_TIME)} AND recipients > 0"
        f" GROUP BY {key}"
    )
    names = key, "sent", "addresses", "first", "last"
    with waiting("reading the sends"):
        rows = [dict(zip(names, row, strict=True)) for row in store.run(sql, values)]
    return sorted(rows, key=lambda row: (-row["sent"], -row["last"]))


def fullest(uses: Iterable[Row]) -> Row:
    """The window nearest its limit; empty if there is none."""
    return max(uses, key=lambda use: (use["blocked"], use["percent"]), default={})


def top(session: Session, arguments: argparse.Namespace) -> int:
    since, now = session.now - arguments.PERIOD * 1_000_000, session.now
    rows = tally(session.store, "account", f"at >= TIME AND {IS_LOGIN}", [since])
    if arguments.addresses:
        rows.sort(key=lambda row: -row["addresses"])
    rows = rows[: arguments.LINES]
    uses = measure(session, [debits_of(session.rules, row["account"]) for row in rows])
    cells = []
    for row, mine in zip(rows, uses, strict=True):
        use = fullest(mine)
        last = format_moment(row["last"], now)
        cells.append([row["sent"], row["addresses"], describe_use(use), last, row["account"]])
        row |= {"login": row["account"], **use}
    heading = "SENT", "ADDRESSES", "QUOTA", "LAST", "LOGIN"
    nobody = [f"nobody has sent anything in the last {saslquota.format_time(arguments.PERIOD)}"]
    present(session, rows, table(cells, heading) or nobody)
    return OK if rows else WARNING


def sends_of(store: Store, account: str, start: int) -> tuple[list[Row], list[Row]]:
    """What an account has sent since then: by sender (in a pool by login), and by address. An
    address is "new" when it never sent before; None in a pool, or when none is known from then."""
    name, key, which = spelled(account), "sender", "account = ?"
    if name == "*":
        name, key, which = account, "account", f"account <> ? AND {IS_LOGIN}"
    elif name != account:
        key, which = "account", f"SUBSTR(account, {-len(name)}) = ? AND {IS_LOGIN}"
    senders = tally(store, key, f"{which} AND at >= TIME", [name, start])
    addresses = tally(store, "client_address", f"{which} AND at >= TIME", [name, start])
    known = set()
    if key == "sender":
        before = tally(store, "client_address", f"{which} AND at < TIME", [name, start])
        known = {row["client_address"] for row in before if row["client_address"]}
    for row in senders:
        row["sender"] = row.pop(key) or account
    for row in (addresses := [row for row in addresses if row["client_address"]]):
        packed = row["client_address"]
        row["new"] = packed not in known if known else None
        row["client_address"] = str(ipaddress.ip_address(bytes(packed)))
    return senders, addresses


def describe_origins(rows: Iterable[Row], name: str, now: int) -> list[str]:
    """Lines of senders or addresses, see sends_of(); `name` is their column."""
    cells = []
    for row in rows:
        times = [format_moment(row[time], now) for time in ("first", "last")]
        cells.append([row["sent"], *times, row[name], "new" if row.get("new") else ""])
    return [f"  {line}" for line in table(cells)]


def show(session: Session, arguments: argparse.Namespace) -> int:
    account, store, most = session.account(arguments.LOGIN), session.store, arguments.LINES
    events = read_events(store, "account = ?", [account])[:most]
    if not events and not store.newest_entries({account: 1}, take_locks=False):
        return complain(store, account, "has never sent anything")
    debits = debits_of(session.rules, account)
    uses, now = measure(session, [debits])[0] if debits else [], store.now()
    start = now - arguments.PERIOD * 1_000_000
    senders, addresses = sends_of(store, account, start)
    new, sent = [row["new"] for row in addresses], sum(row["sent"] for row in senders)
    seen = "none known from before" if None in new else f"{sum(new)} of them never seen before"
    is_shown = new and account == spelled(account)
    many = f"as {counted(len(senders), 'sender')}, from {len(addresses)} address"
    many += f"{'es' * (len(addresses) != 1)}{f', {seen}' if is_shown else ''}"
    lines = [f"{spelled(account)}:", *(f"  {describe_fullness(use, now)}" for use in uses)]
    lines.append(f"sent since {format_moment(start, now)}: {sent}{f', {many}' if sent else ''}")
    for rows, name in ((senders, "sender"), (addresses, "client_address")):
        found = describe_origins(rows[:most], name, now)
        lines += ["", *found] if found else []
    lines += [""] if events else []
    lines += [f"{format_moment(e['at'], now)}  {describe_event(e, now)}" for e in events]
    kinds = {"window": uses, "sender": senders[:most], "address": addresses[:most], "event": events}
    present(session, ({"what": w, **row} for w, rows in kinds.items() for row in rows), lines)
    return OK


Part = tuple[int, Sequence[str], Sequence[Row]]  # of `status`: an exit status, lines, rows


SPOOLS = "starting", "probing", "back"  # states in which no database is needed, see Changeover


def describe_spool(row: Row, *, is_local: bool) -> tuple[int, str]:
    """Exit status and text of what the daemon says of its spool; nothing if it has none. Unless
    `is_local`, by _onfailure, it has only been left."""
    if "spool" not in row:
        return OK, ""
    now, held, store = time.time_ns() // 1000, row.get("spooled_sends", 0), row.get("store", "")
    error = "" if store == "back" else row.get("last_error")  # it is over
    since, down_since = (
        f" since {format_moment(row[name], now)}" if row.get(name) else ""
        for name in ("spooled_since", "down_since")
    )
    sends = f"{counted(held, 'send')}{since if held else ''}"
    past = f"empty; since the start {counted(row.get('outages', 0), 'outage')}"
    past += f", {counted(row.get('sends_carried_over', 0), 'send')} carried over"
    unused = "cannot be used, without it _onfailure is DEFER_IF_PERMIT"
    unused = f"{unused if is_local else 'not used, _onfailure is not LOCAL'}; holds {sends}"
    texts = {
        "starting": "the daemon has just started and looks for its database, requests wait",
        "probing": f"database down{down_since}, the daemon counts here: {sends}",
        "back": f"database back, still to be carried over: {sends}",
        "up": unused if error else past if not held else f"still to be carried over: {sends}",
    }
    text = texts.get(store, unused)
    level = OK if text == past else WARNING
    return level, f"{row['spool']}: {text}{f': {error}' if error else ''}"


def read_reply(reply: Mapping[str, str]) -> Row:
    """What ask_daemon() got, with numbers as such and times in microseconds, None: never."""
    row: Row = {name: int(value) if value.isdecimal() else value for name, value in reply.items()}
    for name in row:
        if name.endswith(("_at", "_since")):
            row[name] = row[name] * 1_000_000 if row[name] else None
    return row


def daemon_part(session: Session) -> Part:
    """What the daemon says of itself; an older or a newer one may leave out some of it."""
    where, began = saslquota.address_of(session.config), time.monotonic()
    try:
        reply = ask_daemon(session.config)
    except ControlError as error:
        text = str(error).removeprefix("the daemon at ")
        return FAILED, [f"daemon   {text}"], [{"what": "daemon", "error": text}]
    took = round(1000 * (time.monotonic() - began), 1)
    row = read_reply(reply)
    up, last = row.get("uptime", 0), row.get("last_request_at", 0)
    texts = {"version": "saslquota {}", "store": "store {}", "connections": "{} connections"}
    said = [text.format(row[name]) for name, text in texts.items() if name in row]
    asked = {n[9:]: v for n, v in row.items() if n.startswith("requests_") and v}
    lines = [
        f"daemon   {where} answers in {took} ms: {', '.join(said)}",
        f"Postfix  asked last: {format_moment(last, time.time_ns() // 1000) if last else 'never'};"
        f" in {saslquota.format_time(up)}: {', '.join(f'{v} {n}' for n, v in asked.items())}",
    ]
    is_doubtful = row.get("rules_valid") == "no" or (last is None and up > 3600)
    level, spool = describe_spool(row, is_local=session.config.onfailure == "LOCAL")
    lines += [f"spool    {spool}"] if spool else []
    level = FAILED if row.get("store") == "down" else WARNING if is_doubtful else level
    return level, lines, [{"what": "daemon", "address": where, "milliseconds": took, **row}]


def is_filling(use: Row) -> bool:
    is_limit = use["action"] != "none" and use["limit"]
    return use["blocked"] or bool(is_limit and use["percent"] >= NEAR)


def filling(session: Session) -> list[Row]:
    """The fullest window of each account that has used NEAR percent of a limit, or is blocked."""
    store, rules = session.store, session.rules
    longest = max(window.period for rule in rules for window in rule.windows)
    sql = (
        f"SELECT account, SUM(recipients) FROM sends WHERE at >= {store.BIND_TIME} AND {NO_SPOOL}"
        " GROUP BY account"
    )
    charges = []
    for account, sent in store.run(sql, [session.now - longest * 1_000_000]):
        debits = debits_of(rules, account)[:1]
        if any(100 * sent >= NEAR * window.msgquota for d in debits for window in d.windows):
            charges.append(debits)
    uses = [[use for use in each if is_filling(use)] for each in measure(session, charges)]
    return [fullest(each) for each in uses if each]


def listed(title: str, rows: list[Row], lines: list[str], level: int) -> Part:
    """Accounts under a title, if there are any."""
    text = ["", f"{title}: {len(rows)}", *(f"  {line}" for line in lines)] if rows else []
    return level if rows else OK, text, [{"what": title, **row} for row in rows]


def store_parts(session: Session) -> Iterator[Part]:
    store, now, uses = session.store, session.now, {}
    senders = tally(store, "account", f"at >= TIME AND {IS_LOGIN}", [now - HOUR])
    row = {"what": "store", "sent": sum(s["sent"] for s in senders), "senders": len(senders)}
    text = f"{row['sent']} sent by {counted(row['senders'], 'sender')} in the last hour"
    yield OK, [f"store    {store}: {text}"], [row]
    try:
        uses = {use["account"]: use for use in filling(session)}
        row = {"what": "rules", "number": len(list(session.rules))}
        yield OK, [f"rules    {session.config.quotafile}: {counted(row['number'], 'rule')}"], [row]
    except saslquota.ConfigError as error:
        yield WARNING, [f"rules    {error}"], [{"what": "rules", "error": str(error)}]
    events = read_events(store, "kind = 'refused' AND at >= TIME", [now - 25 * HOUR])
    events = [event for event in events if (event["last"] or event["at"]) >= now - HOUR]
    cells = []
    for event in events:
        times = [format_moment(event[name], now) for name in ("at", "last")]
        use = uses.get(event["account"])
        why = describe_use(use) if use else event["note"]
        told = "yes" if event["told"] else "no"
        cells.append([*times, event["amount"], told, spelled(event["account"]), why])
    heading = "SINCE", "LAST", "REFUSED", "TOLD", "ACCOUNT", "WHY"
    yield listed("refused in the last hour", events, table(cells, heading), WARNING)
    near = [use for use in uses.values() if not use["blocked"]]
    near.sort(key=lambda use: -use["percent"])
    cells = [[f"{use['percent']}%", spelled(use["account"]), describe_use(use)] for use in near]
    yield listed("near the limit", near, table(cells), WARNING)
    orders = newest_orders(store)
    for kind, title, level in (("block", "blocked", WARNING), ("grant", "granted more", OK)):
        rows = [order for order in orders if is_in_force(order, kind, now)]
        lines = [f"{spelled(row['account'])}: {describe_event(row, now)}" for row in rows]
        yield listed(title, rows, lines, level)


def status(session: Session, arguments: argparse.Namespace) -> int:
    parts = [daemon_part(session)]
    try:
        parts.extend(store_parts(session))
    except SaslQuotaError as error:
        text = explained(error, session)
        goes_on = any(row.get("store") in SPOOLS for row in parts[0][2])
        level = WARNING if goes_on else FAILED
        parts.append((level, [f"store    {text}"], [{"what": "store", "error": text}]))
    if not arguments.quiet:
        rows = (row for _, _, rows in parts for row in rows)
        present(session, rows, (line for _, lines, _ in parts for line in lines))
    return max(level for level, _, _ in parts)


# --- Orders ---------------------------------------------------------------------------------------


class Pointless(ControlError):
    """It would change nothing."""


def moment_of(text: str, now: int) -> int:
    """When "18:00", "2026-12-24", "2026-12-24 18:00" (local time) or "2h" from now is, in
    microseconds since 1970. Raises ControlError, also when it is in the past."""
    seconds = now // 1_000_000
    try:
        if re.fullmatch("[0-9]+[smhdw]", text):
            until: float = seconds + saslquota.read_period(text)
        elif re.fullmatch("[0-9]{1,2}:[0-9]{2}", text):  # today or tomorrow: days have 23 to 25 h
            later = (time.localtime(seconds + more) for more in (0, 82_800, 90_000))
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
    account, store, now = session.account(arguments.LOGIN), session.store, session.now
    kind, name, note = arguments.kind, spelled(account), arguments.NOTE
    if not 0 < len(account) <= saslquota.MAX_ACCOUNT or len(note) > 400:
        raise ControlError("a login has 1 to 320 characters, a note 400 at most")
    author = os.environ.get("SUDO_USER") or saslquota.user_name(os.getuid())
    wanted = {"account": account, "kind": kind, "author": author[:64], "note": note}
    if kind == "grant":
        wanted |= {"amount": arguments.N, "until": now + 24 * HOUR}
    if given := getattr(arguments, "TIME", ""):
        wanted["until"] = moment_of(given, now)
    try:
        with waiting(f"{name} is locked by another session"):
            event, before, has_sent = place_at_last(store, wanted)
    except Pointless as error:
        return complain(store, account, str(error))
    until = f" until {format_moment(event['until'], now)}" if "until" in event else ""
    queue = f"; mail that waits: saslquotactl.py queue {shlex.quote(name)}"
    outcome = {
        "reset": "the count begins anew",
        "grant": f"{wanted.get('amount')} more{until}, then the count begins anew",
        "block": f"may not send{until}{queue if name == account else ''}",
        "unblock": "may send again",
    }
    lines = [f"{name}: {outcome[kind]}"]
    if kind == "grant" and not given:
        lines.append("  that is 24 hours from now: --until was not given")
    if is_in_force(before, "block", now) or is_in_force(before, "grant", now):
        fate = "goes on" if kind == "reset" else "has ended"
        lines.append(f"  {describe_event(before or {}, now)}: {fate}")
    if not has_sent:
        lines.append(f"  note: it has never sent anything{similar(store, account)}")
    present(session, [event | {"account": name, "has_sent": has_sent}], lines)
    return OK


def number(text: str) -> int:
    return saslquota.read_int(1, 1_000_000_000)(int(text))


def period(text: str) -> int:
    return saslquota.read_period(text)


TIME = '18:00, 2026-12-24, "2026-12-24 18:00", 2h, 3d; else a grant lasts 24h, a block for good'
ARGUMENTS: dict[str, dict[str, Any]] = {
    "LOGIN": {
        "type": saslquota.valid_utf8,
        "help": "in any spelling; a pool: @example.com, or '*'",
    },
    "N": {"type": number, "help": "recipients"},
    "-q": {"dest": "quiet", "action": "store_true", "help": "exit status only"},
    "-p": {"dest": "PERIOD", "type": period, "help": "how far back: 1h, 7d"},
    "-n": {"dest": "LINES", "type": number, "default": 20, "help": "of a list (default: 20)"},
    "--addresses": {"action": "store_true", "help": "who sends from most addresses comes first"},
    "--until": {"dest": "TIME", "default": "", "help": TIME},
    "-m": {"dest": "NOTE", "type": saslquota.valid_utf8, "default": "", "help": "why"},
}
COMMANDS = """\
status -q: does it work, and who is stuck
    Exit status 0: well; 1: somebody is refused, blocked, or has used 80 % of a limit, or the
    daemon counts on without its database (_onfailure LOCAL); 2: the daemon or its database is down.
top --addresses -p -n: who sends most, and from how many addresses
    QUOTA is the window nearest its limit. A stolen password is used from many addresses, at
    times slowly: top --addresses -p 1d, then show LOGIN. (PERIOD is 1h by default.)
show LOGIN -p -n: a login's windows, senders, addresses and history
    A thief shows by many new addresses, and by senders that are not the login's:
    show bob@example.com -p 7d (PERIOD is 1d by default.)
reset LOGIN -m: begin a sender's count anew
    Who is over quota may send again, within a second: reset bob@example.com -m 'ticket 12'
grant LOGIN N --until -m: let a sender send N more for some time
    In each window; then the count begins anew: grant news@example.com 2000 --until 18:00
block LOGIN --until -m: forbid a login to send
    All daemons obey within a second; the mailbox and its password stay as they are:
    block bob@example.com -m phished. Mail that waits already: queue LOGIN
unblock LOGIN -m: end a block
    The count stays as it is, see reset: unblock bob@example.com -m 'new password'
"""


def add_look_and_orders_commands(commands: Any) -> None:
    for name, options, summary, more in re.findall(
        r"(?m)^(\w+) (.*?): (.*)\n((?: .*\n)+)", COMMANDS
    ):
        text = f"{summary}. {' '.join(more.split())}"
        parser = commands.add_parser(name, help=summary, description=text)
        for option in options.split():
            parser.add_argument(option, **ARGUMENTS[option])
        command: Command = {"status": status, "top": top, "show": show}.get(name, order)
        parser.set_defaults(command=command, kind=name, PERIOD=3600 if name == "top" else 86_400)


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


# --- Metrics --------------------------------------------------------------------------------------

SAID = {  # by the daemon: its line, the metric, and what that is
    "uptime": ("uptime_seconds", "since the daemon's start"),
    "store": ("store_up", "0 while the daemon cannot use its database"),
    "rules_valid": ("rules_valid", "0: quotarules.json has a mistake, older rules are in force"),
    "connections": ("connections", "open connections of Postfix"),
    "recipients": ("recipients_total", "recipients accepted"),
    "incidents": ("incidents_total", "accounts that came over their quota"),
    "log_lines_lost": ("log_lines_lost_total", "lines that the log did not take"),
    "spooling": ("spooling", "1 while the daemon counts in its spool (_onfailure LOCAL)"),
    "spooled_sends": ("spooled_sends", "sends in the spool that the database lacks"),
    "sends_carried_over": ("carried_total", "sends carried over from the spool"),
    "outages": ("outages_total", "times that the spool has taken the database's place"),
    "spool_errors": ("spool_errors_total", "times that the spool could not be used"),
}
STORE_IS_UP = {"up": "1", "back": "1", "down": "0", "starting": "0", "probing": "0"}


def metrics_text(said: Mapping[str, str], counted: Mapping[str, int]) -> str:
    """Prometheus' text of what the daemon says, nothing if it is down, and of what the tables hold.
    What is not known is left out. No label is a login: it is personal data."""
    lines: list[str] = []

    def add(name: str, explanation: str, samples: Mapping[str, object], kind: str = "") -> None:
        kind = kind or ("counter" if name.endswith("_total") else "gauge")
        lines.extend((f"# HELP saslquota_{name} {explanation}", f"# TYPE saslquota_{name} {kind}"))
        lines.extend(f"saslquota_{name}{suffix} {value}" for suffix, value in samples.items())

    add("up", "whether the daemon answers", {"": int(bool(said))})
    if re.fullmatch(r"[0-9A-Za-z.+-]+", said.get("version", "")):
        add("info", "about the daemon", {f'{{version="{said["version"]}"}}': 1})
    words = {**STORE_IS_UP, "yes": "1", "no": "0"}
    found = {name: words.get(value, value) for name, value in said.items()}
    if "spool" in said and "store" in said:
        found["spooling"] = str(int(said["store"] in ("probing", "back")))
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
    untold = sum(not event["told"] and event["at"] >= now - 24 * HOUR for event in events)
    blocked = sum(is_in_force(order, "block", now) for order in newest_orders(store))
    found = len(refused), blocked, untold
    return dict(zip(("refused_senders", "blocked_senders", "incidents_untold"), found, strict=True))


def metrics(session: Session, _: argparse.Namespace) -> int:
    said, counted = dict[str, str](), dict[str, int]()
    with contextlib.suppress(ControlError):
        said = ask_daemon(session.config)
    with contextlib.suppress(SaslQuotaError):  # the daemon says whether it is up
        counted = count_for_metrics(session.store)
    print(metrics_text(said, counted), end="")
    return OK


# --- main -----------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saslquotactl.py",
        description="See who sends through saslquota, stop a sender, let one go.",
    )
    parser.add_argument("-c", metavar="FILE", dest="config", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--version", action="version", version=f"saslquota {saslquota.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_look_and_orders_commands(commands)
    add_queue_commands(commands)
    text = "print figures for Prometheus, as node_exporter's textfile"
    commands.add_parser("metrics", help=text, description=text).set_defaults(command=metrics)
    sys.modules.setdefault("saslquotactl", sys.modules[__name__])  # as a script it is __main__
    import saslquotabacktest
    import saslquotadoctor

    saslquotabacktest.add_commands(commands)
    saslquotadoctor.add_commands(commands)
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
        print(f"saslquotactl: {clean(explained(error, session))}", file=sys.stderr)
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
