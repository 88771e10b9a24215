#!/usr/bin/env python3
"""NAME
    saslquota - Postfix policy daemon that limits what each SASL sender may send in a sliding period

SYNOPSIS
    saslquota.py [-c FILE] [--check [--user NAME]] [--version]

DESCRIPTION
    saslquota answers Postfix's check_policy_service on submission and smtps. For each request it
    takes sasl_username, folds its spellings into one (fold()), picks a rule from quotarules.json
    (the full address, else a pattern for addresses, else its domain, else a pattern for domains,
    else "default"), counts that sender's sends within the rule's sliding periods in MySQL or in an
    embedded SQLite file, and answers action=OK, or action=REJECT or action=DEFER with the rule's
    message. Rules for "@domain" and "*" limit all senders of a domain, or of the service, together:
    a send is charged to its sender and to these pools, or to none.

    -c FILE    the configuration (default: saslquota.json beside this script; if there is none,
               /etc/saslquota/saslquota.json)
    --check    read configuration and rules, look at the store, print what was found and what each
               rule means in plain words; exit 0 or 1; create and change nothing
    --user NAME  root checks with the rights of this user, whom the daemon runs as; left out, with
               those of the owner of the directory that the daemon writes to
    --version  print the version

PROTOCOL
    Postfix's SMTPD_POLICY_README: name=value lines, closed by an empty line; any number of requests
    on one connection, which the server keeps open between them: Postfix would wait a second before
    the next one. An empty request ends the session. MAIL and RCPT cost 1, DATA and END-OF-MESSAGE
    max(1, recipient_count); the other states cost nothing. Where a rule says "count": "messages", a
    message costs 1 however often it is asked about: the connection remembers the last one by its
    sender and instance. Malformed input gets no reply: it is logged and the connection closed.
    request=status is answered with name=value lines about the daemon, and costs nothing.

CONFIGURATION
    saslquota.json holds the settings (class Config lists them), quotarules.json the rules. An
    environment variable of a setting's name overrides it; if there are some, and no -c, the file
    need not be there. The rules are read again when their file changes; a broken file keeps the
    previous ones in force. A rule is an object, or a list of objects, its windows; a mail must be
    within every window. They have these fields, which default to those of "default":

    period     seconds, or a time such as "90s", "10m", "1h", "1d" or "1w"
    msgquota   how much may be sent in any period of that length; "unlimited", or 0 for nothing
    msg        the text of a refusal; {sasl_username}, {rule}, {used}, {msgquota}, {period},
               {seconds} (the period as a number), {retry_after} and {recipients} are filled in,
               and {{ and }} stand for a brace
    count      "recipients", or "messages"
    action     "REJECT"; "DEFER": 450 in place of 554; or "HOLD": accept, count, and let Postfix put
               the mail into its hold queue
    enforce    false: count, log "action=REJECT (not enforced)", and accept
    notify     whether what is over it is an incident; by default if enforced, and not a quota of 0
    comment    any text, for whoever reads the file

SIGNALS
    SIGHUP            read the rules now
    SIGTERM, SIGINT   answer the requests under way, exit 0 within 5 seconds

DIAGNOSTICS
    Syslog, tag postfix/saslquota[pid]:, one INFO line for each accepted send and a WARNING for each
    refused one; with _loglevel DEBUG six lines for each. Exit status 1 means bad configuration, bad
    rules at start or an address in use; a database that cannot be reached is never fatal.

FILES
    saslquota.json, quotarules.json    settings and rules
    schema/                            JSON Schemas of both, for editors; not needed to run
    mysql.sql                          the tables, for MySQL and MariaDB (SQLite's make themselves)
    saslquotactl.py                    shows who sends, blocks, grants more: by way of the tables
    saslquota.db                       the embedded database
    saslquota.spool                    what is counted while MySQL is away (_onfailure LOCAL)

HOW IT WORKS
    A request goes down this road once, and its verdict comes back once:

        Postfix --> PolicyHandler         bytes to Request
                    1 policy.charge()     whose quota, and how much: a Charge, or an Answer at once
                    2 committer.submit()  the queue; what has gathered there is one batch
                        Orders            what administrators grant or block
                        Ledger            decides the batch upon what Accounts remembers
                        Store             one INSERT makes the accepted charges durable
                      decided(verdict)    called once, by the committer or the watchdog
                    3 policy.answer()     the verdict in words
        Postfix <-- 4 _reply()            one send, one log line

    A store that fails, or takes too long, is in an Outage: every charge gets the fallback at once
    until the store can be opened again. With _onfailure LOCAL there is none: a LocalLedger goes on
    deciding in a SpoolStore, a file of its own, and a Carrier carries over what was sent when the
    store is back. A refusal may be repeated from memory for a second.

    The threads, and what only they may use:

        main          signals, and reminders of what Postfix's set-up may lack
        rules         reads the rules again when their file has changed
        server        accepts connections, makes room for them
        a connection  reads its requests and submits them: one for each smtpd process
        committer     the ledger, accounts and store; answers what it has decided, and then notes
                      the incidents that any thread may count
        attempt       tries the store while it is down, with _onfailure LOCAL
        watchdog      every 0.1 s: answers what is overdue, whatever the committer is doing
        log           writes the log lines

    Sections use only those above them. Read first: Protocol, Policy, Server (PolicyHandler), then
    Committer, Ledger, Accounts and Stores downwards; Rules, Config and Spool as you need them.
"""

from __future__ import annotations

import argparse
import bisect
import codecs
import collections
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fnmatch
import functools
import importlib
import ipaddress
import itertools
import json
import logging
import math
import os
import pwd
import queue
import random
import re
import resource
import signal
import socket
import socketserver
import sqlite3
import stat
import struct
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging.handlers import SysLogHandler
from pathlib import Path
from typing import Any, NamedTuple

# All above this, and the syntax of all below, is that of Python 3.8, so that this comes first.
if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit("saslquota: needs Python 3.11 or newer")

__version__ = "2.1.0"

MAX_ACCOUNT = 320  # characters; the column's width: 64 of a local part, @, 255 of a domain
POOL_PREFIX = "POOL "  # begins the account of a pool; logins are folded, none begins with it
SPOOL_ACCOUNT = "SPOOL"  # its row names the database; "SPOOL id" has the marks of a spool
CACHED_ACCOUNTS = 20_000  # remembered at most, some 4 KiB each
WINDOW_CACHE_ROWS = 32  # the oldest entries of a window that are remembered, at most
SEARCH_FANOUT = 16  # entries looked at in one step of a search
REMINDER_INTERVAL = 60.0  # seconds between two log lines about what lasts
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

log = logging.getLogger("saslquota")


# --- Errors ---------------------------------------------------------------------------------------


class SaslQuotaError(Exception):
    """Whatever this program reports in one line."""


class ConfigError(SaslQuotaError):
    """A setting, a rule or an address that cannot be used."""


class ProtocolError(SaslQuotaError):
    """Input that is not a policy request."""


class StoreError(SaslQuotaError):
    """The store did not do what it was asked."""


class Conflict(StoreError):
    """Another daemon was faster or holds a lock. Nothing was written; the next try may work."""


class LockTimeout(Conflict):
    """Another session kept a lock for longer than a statement may wait."""


class Unavailable(StoreError):
    """The store cannot be used. Whether the last statement was carried out is not known."""


class TimedOut(Unavailable):
    """The store did not answer in time."""


# --- Logging --------------------------------------------------------------------------------------

MAX_LINE = 4000  # characters of a log line; rsyslog takes 8 KiB
LOG_PAUSE = 0.02  # seconds in which log lines gather
LOG_SLICE = 32  # lines that are written before the other threads have their turn
LOG_BACKLOG = 10_000  # lines that wait for a log that does not take them; more are dropped
SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # once: | of enums takes 2 us


class RateLimit:
    """Allows something once in `interval` seconds."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._last = -math.inf

    def allows(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._interval:
            return False
        self._last = now
        return True


@functools.cache
def libc_send() -> Callable[[int, bytes, int, int], int]:
    send = ctypes.PyDLL(None).send
    send.argtypes = ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
    send.restype = ctypes.c_ssize_t
    return send


def send_at_once(connection: socket.socket, data: bytes) -> int:
    """Send what the kernel takes without waiting; return the number of bytes it took.

    Unlike socket.send() it keeps the GIL: the call takes microseconds, getting the GIL back among
    many threads takes far longer (bench/README.md).
    """
    return max(0, libc_send()(connection.fileno(), data, len(data), SEND_FLAGS))


def printable(line: str) -> str:
    """Escape control characters and broken UTF-8, so that the line stays one line, and UTF-8."""
    if line.isprintable():
        return line
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else escaped(c) for c in line
    )


def escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def log_value(value: str) -> str:
    """The value so that it cannot look like more fields: addresses may hold commas and spaces."""
    return value.replace(", ", r",\x20")


class OneLine(logging.Formatter):
    """Makes one line that fits a datagram, whatever a client sent, and of a traceback too. It is
    for LogWriter's records, which have a text and no more."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self._form, self._is_dated = form, self.usesTime()

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.msg
        if self._is_dated:
            record.asctime = self.formatTime(record)
        return printable((self._form % vars(record))[:MAX_LINE])


class Syslog(SysLogHandler):
    """The standard library's handler, but a socket that takes a line at once is not waited for."""

    append_nul = False
    socket: Any

    def emit(self, record: logging.LogRecord) -> None:
        priority = self.encodePriority(self.facility, self.mapPriority(record.levelname))
        line = f"<{priority}>{self.format(record)}".encode()
        if send_at_once(self.socket, line) < len(line):  # the socket is full or gone, or it is UDP
            super().emit(record)


class LogWriter(logging.Handler):
    """Hands lines to a thread that writes them, those of a moment together, so that neither a stuck
    log nor the waking of another thread for each line delays a reply."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self.target = target
        self._lines: collections.deque[tuple[int, str]] = collections.deque()
        self.lost = 0  # lines, so far
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        self.write(record.levelno, self.format(record))

    def write(self, level: int, line: str) -> None:
        """Take a line that is ready. (A LogRecord for each verdict costs a tenth of the rate.)"""
        if len(self._lines) < LOG_BACKLOG:
            self._lines.append((level, line[:MAX_LINE]))
        else:
            self.lost += 1
        if not self._wake.is_set():
            self._wake.set()

    def _write(self) -> None:
        told = 0
        while not self._stopping:
            self._wake.wait()
            time.sleep(LOG_PAUSE)
            self._wake.clear()
            record = logging.makeLogRecord({})
            written = 0
            while self._lines:
                record.levelno, record.msg = self._lines.popleft()
                record.levelname = logging.getLevelName(record.levelno)
                self.target.emit(record)
                written += 1
                if written % LOG_SLICE == 0:
                    time.sleep(0)
            if lost := self.lost - told:
                told += lost
                log.error("%d log lines were lost", lost)

    def stop(self, timeout: float) -> None:
        """Write what is left, if the log takes it within `timeout` seconds."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)


def valid_utf8(value: str) -> str:
    """The value as UTF-8 that every database takes: bytes that were not UTF-8 are spelled out."""
    return value.encode("utf-8", "backslashreplace").decode()


# --- JSON files -----------------------------------------------------------------------------------


class JSONObject(dict[str, Any]):
    """An object as JSON has it; knows which of its keys are duplicates."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = collections.Counter(key for key, _ in pairs)
        self.duplicates = [key for key, count in counts.items() if count > 1]


class Location:
    """A place in a JSON file, for messages: str() names the file, the line and the keys that lead
    there. A number among the keys is an index in a list of objects: a rule's window."""

    def __init__(self, path: Path, content: str, *keys: str | int) -> None:
        self._path = path
        self._content = content
        self._keys = keys

    def of(self, *keys: str | int) -> Location:
        """The place of what is below this one."""
        return Location(self._path, self._content, *self._keys, *keys)

    def __str__(self) -> str:
        line = self._content.count("\n", 0, self._offset()) + 1
        names = [f"window {key + 1}" if isinstance(key, int) else quoted(key) for key in self._keys]
        return f"{self._path}, line {line}: " + ": ".join(names)

    def _offset(self) -> int:
        """The position in the content, in characters."""
        offset = 0
        for key in self._keys:
            if isinstance(key, int):
                tokens = re.compile(r'"(?:[^"\\]|\\.)*"|\{').finditer(self._content, offset)
                braces = (token.start() for token in tokens if token[0] == "{")
                offset = next(itertools.islice(braces, key, None), offset)
            else:
                spellings = {json.dumps(key, ensure_ascii=ascii_) for ascii_ in (True, False)}
                pattern = "|".join(map(re.escape, spellings))
                found = re.compile(rf"(?:{pattern})\s*:").search(self._content, offset)
                offset = found.start() if found else offset
        return offset


def quoted(name: str) -> str:
    """A name for messages, as the file may have it."""
    return json.dumps(name, ensure_ascii=False)


def unknown_name(name: str, known: Iterable[str]) -> str:
    """The complaint about a name that is not among the known ones, with the nearest of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown; did you mean {quoted(near[0])}?" if near else "unknown"


def load_json(path: Path) -> tuple[dict[str, Any], Location]:
    """Read the object that a JSON file holds. "$schema", by which editors find what the file may
    hold, is left out.

    Raises ConfigError for a file that cannot be read, is not UTF-8 or not JSON, holds something
    other than an object, or has a duplicate key.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        found = json.loads(content, object_pairs_hook=JSONObject, parse_int=parse_int)
        objects = list(json_objects(found))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8: save it in that encoding") from None
    except json.JSONDecodeError as error:
        position, complaint = json_complaint(content, error)
        line = content.count("\n", 0, position) + 1
        column = position - content.rfind("\n", 0, position)
        raise ConfigError(f"{path}, line {line}, column {column}: not JSON: {complaint}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep") from None
    if not isinstance(found, JSONObject):
        raise ConfigError(f'{path}: must hold one object, {{ "name": value, ... }}')
    location = Location(path, content)
    for keys, value in objects:
        if value.duplicates:
            here = location.of(*keys, value.duplicates[0])
            raise ConfigError(f"{here}: duplicate key, remove all but one")
    if not isinstance(found.pop("$schema", ""), str):
        raise ConfigError(f"{location.of('$schema')}: must be a string")
    return found, location


JSON_COMPLAINTS = {  # what json says, as far as that tells it, and what we say
    "control character": 'a tab, line break or the like in a text: is its second " missing?',
    "Unterminated string": 'the second " of this text is missing',
    "escape": "write \\\\ for a backslash",
    "',' delimiter": "a comma is missing before this",
    "':' delimiter": "a colon is missing before this",
    "Extra data": "remove this: nothing may follow the last }",
    "property name": 'a name in " must stand here',
    "value": 'a value must stand here: a text in ", a number, true or false, { or [',
}


def json_complaint(content: str, error: json.JSONDecodeError) -> tuple[int, str]:
    """Where a file is not JSON, and what to do about it: one answer for all versions of Python."""
    if "control character" in error.msg:  # which may be white space
        return error.pos, JSON_COMPLAINTS["control character"]
    before, rest = content[: error.pos].rstrip(), content[error.pos :].lstrip()
    if rest.startswith(","):  # Python 3.13 sees it here
        before, rest = before + ",", rest[1:].lstrip()
    position = len(content) - len(rest)
    if not content.strip():
        return 0, 'empty: it must hold one object, { "name": value, ... }'
    if before.endswith(",") and rest[:1] in ("}", "]"):
        return content.rindex(",", 0, position), f"remove the comma before the {rest[0]}"
    if rest.startswith(("#", "//", "/*")):
        return position, "remove the comment: JSON has none"
    if rest.startswith(("'", "\N{LEFT DOUBLE QUOTATION MARK}", "\N{RIGHT DOUBLE QUOTATION MARK}")):
        return position, 'write " around names and texts'
    if not rest:
        return position, "the file ends too soon: is a } or ] missing?"
    complaints = (text for part, text in JSON_COMPLAINTS.items() if part in error.msg)
    return position, next(complaints, error.msg)


def json_objects(
    value: Any, *keys: str | int
) -> Iterator[tuple[tuple[str | int, ...], JSONObject]]:
    """The object, and those in it and in its lists, each with the keys that lead to it."""
    if isinstance(value, JSONObject):
        yield keys, value
    if isinstance(value, JSONObject | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from json_objects(inner, *keys, key)


def parse_int(digits: str) -> float:
    """An integer; a huge one as a float, which no setting takes."""
    return int(digits) if len(digits) < 20 else float(digits)


# --- Logins ---------------------------------------------------------------------------------------

# The characters that have no width, a property that Python does not know:
# Default_Ignorable_Code_Point in Unicode's DerivedCoreProperties.txt (the same since version 14).
IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
NOT_IN_LABEL = re.compile("[@. ]|^xn--|^$")
decode_punycode = codecs.getdecoder("punycode")  # loaded now: later no descriptor may be left


def fold(login: str, domain: str = "") -> str:
    """The account of a login, or the key of a rule: one spelling for all that a SASL server may
    take as the same login. Folding twice is folding once.

    A login without a domain gets `domain`. What nothing would be left of stays as it is, and so
    does what is too long for an account: NFKC takes 6 s for 60,000 combining marks.
    """
    if len(login) > MAX_ACCOUNT:
        return login
    folded = login.lower() if login.isascii() else fold_characters(login)
    folded = " ".join(folded.split()).rstrip("@ ")
    if not folded:
        return login.strip()
    local, at, labels = folded.rpartition("@")
    if domain and not at:
        local, at, labels = labels, "@", domain
    labels = labels.lstrip()
    if "xn--" in labels:
        labels = ".".join(map(decode_label, labels.split(".")))
    return local.rstrip() + at + labels


def fold_characters(text: str) -> str:
    """Without the second NFKC, folding some texts again would give another one."""
    visible = IGNORABLE.sub("", unicodedata.normalize("NFKC", text))
    return unicodedata.normalize("NFKC", visible.casefold())


def decode_label(label: str) -> str:
    """A folded label of a domain as it is read: münchen for xn--mnchen-3ya. A label that is not
    the encoding of a name stays as it is.

    By the punycode codec: the idna codec raises on names that exist, such as xn--n3h.
    """
    if not label.startswith("xn--"):
        return label
    try:
        decoded, _ = decode_punycode(label[4:].encode("ascii"))
    except ValueError:  # a UnicodeError among them
        return label
    folded = fold_characters(decoded)
    is_name = folded.isprintable() and not NOT_IN_LABEL.search(folded)
    return folded if is_name and not decoded.isascii() else label


# --- Config ---------------------------------------------------------------------------------------

LOCAL_TIMEOUT = 3  # seconds, the least _dbtimeout with LOCAL: 1 for the spool, 2 for a statement


def read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


def read_int(low: int, high: int) -> Callable[[Any], int]:
    """A reader of integers. A string of digits will do: the environment has nothing else."""

    def read(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,10}\s*", value):
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return read


def read_choice(*choices: str) -> Callable[[Any], str]:
    """A reader of one of several words, in upper or lower case."""

    def read(value: Any) -> str:
        for choice in choices:
            if isinstance(value, str) and value.casefold() == choice.casefold():
                return choice
        raise ValueError("one of " + ", ".join(choices))

    return read


def read_list(value: Any) -> list[str]:
    """A list of strings, or one string with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError("a string or a list of strings")
    return [part.strip() for part in parts if part.strip()]


def read_hosts(value: Any) -> tuple[str, ...]:
    names = tuple(read_list(value))
    if not names or not all(name.startswith("unix:/") or split_host(name, 1) for name in names):
        raise ValueError("a host, host:port or unix:/path, or a list of them")
    return names


def split_host(name: str, port: int) -> tuple[str, int] | None:
    """Host and port of `host`, `host:port`, `[IPv6]:port` or a bare IPv6 address; else None."""
    ipv6 = r"(?:\[([0-9a-fA-F:.]+)\]|([0-9a-fA-F]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*))"
    found = re.fullmatch(rf"(?:{ipv6}|([^\s:\[\]/]+))(?::([0-9]{{1,5}}))?", name)
    if not found or not 0 < int(found[4] or port) < 65536:
        return None
    return found[1] or found[2] or found[3], int(found[4] or port)


def is_loopback(host: str) -> bool:
    """Whether what is sent to this host stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_domain(value: Any) -> str:
    """A domain, folded; or "" for none."""
    written = read_text(value).strip()
    label = r"[^\s@.*?\[\]]+"
    domain = fold(written)
    if not all(re.fullmatch(rf"(?:{label}(?:\.{label})*)?", name) for name in (written, domain)):
        raise ValueError("a domain such as example.com, or empty")
    return domain


def read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def read_switch(value: Any) -> bool:
    """True or false, as a string as well: the environment has nothing else."""
    words = {"true": True, "false": False}
    return read_flag(words.get(value.strip().casefold()) if isinstance(value, str) else value)


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def read_networks(value: Any) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(item) for item in read_list(value))
    except ValueError as error:
        raise ValueError(f"networks such as 127.0.0.0/8 or ::1 ({error})") from None


def read_notified(value: Any) -> tuple[str, ...]:
    """Whom to tell: mail addresses, and commands as in aliases(5)."""
    found = tuple(read_list(value))
    if not all(re.fullmatch(r"[|]\s*[^\s|].*|[!#-'*+.-9=?-{}~-]+", one) for one in found):
        raise ValueError("a mail address or |/command, or a list of them")
    return found


def read_address(port: int, *, optional: bool) -> Callable[[Any], str]:
    """A reader of host, host:port or [IPv6]:port; "" is for none."""

    def read(value: Any) -> str:
        name = read_text(value).strip()
        if not (split_host(name, port) if name else optional):
            raise ValueError(f"host:port{', or empty' if optional else ''}")
        return name

    return read


def setting(default: Any, read: Callable[[Any], Any]) -> Any:
    return dataclasses.field(default=default, metadata={"read": read})


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings. In saslquota.json and in the environment each name begins with `_`."""

    path: Path  # the file they come from

    bind: str = setting("127.0.0.1", read_text)  # address to listen on, or unix:/path
    bindport: int = setting(10008, read_int(1, 65535))
    bindtimeout: int = setting(45, read_int(1, 3600))  # seconds for a request or reply under way
    store: str = setting("mysql", read_choice("mysql", "sqlite"))
    sqlitefile: str = setting("saslquota.db", read_text)
    spoolfile: str = setting("saslquota.spool", read_text)  # of _onfailure LOCAL
    myhost: tuple[str, ...] = setting(("localhost",), read_hosts)  # tried in turn
    myport: int = setting(3306, read_int(1, 65535))
    myuser: str = setting("saslquota", read_text)
    mypasswd: str = setting("", read_text)
    mydb: str = setting("saslquota", read_text)
    mysslca: str = setting("", read_text)  # a CA's file: TLS with the server's certificate verified
    logfacility: str = setting("mail", read_choice(*sorted(SysLogHandler.facility_names)))
    loglevel: str = setting("INFO", read_choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    loghandler: str = setting("syslog", read_choice("syslog", "stdout"))
    logaddress: str = setting("", read_text)  # a socket's path, or a host for UDP; "" is /dev/log
    logport: int = setting(514, read_int(1, 65535))  # UDP
    quotafile: str = setting("quotarules.json", read_text)
    dbtimeout: int = setting(5, read_int(2, 60))  # seconds until a request gets _onfailure
    onfailure: str = setting("DEFER_IF_PERMIT", read_choice("DEFER_IF_PERMIT", "OK", "LOCAL"))
    nosasl: str = setting("REJECT", read_choice("REJECT", "DUNNO"))  # without sasl_username
    okaction: str = setting("OK", read_choice("OK", "DUNNO"))  # for an accepted send
    defaultdomain: str = setting("", read_domain)  # of logins without one
    ignoredomain: bool = setting(False, read_switch)  # whether all logins are without one
    maxconnections: int = setting(2000, read_int(1, 100_000))
    allow: tuple[Network, ...] = setting((), read_networks)  # who may connect; () is everybody
    retentiondays: int = setting(30, read_int(1, 3650))
    storeaddress: bool = setting(True, read_switch)  # whether a send keeps its client_address
    # For saslquotawatch.py:
    notify: tuple[str, ...] = setting((), read_notified)  # who is told of incidents
    notifyhost: str = setting("localhost:25", read_address(25, optional=False))  # the mail server
    notifyaddresses: int = setting(0, read_int(0, 100_000))  # new ones in a day; 0: not told
    notifyuser: bool = setting(False, read_switch)  # whether the user is told, too
    http: str = setting("", read_address(10009, optional=True))  # of metrics and page; "": nowhere

    def beside(self, name: str) -> Path:
        """A path that a setting holds: relative to the configuration file."""
        return self.path.parent / name

    def account(self, login: str) -> str:
        """The account of a login. It is longer than MAX_ACCOUNT if the login is too long."""
        if self.ignoredomain and len(login) <= MAX_ACCOUNT:
            user = login.rsplit("@", 1)[0]  # before folding: to libsasl only this is an @
            domain = self.defaultdomain and "@" + self.defaultdomain
            login = user + domain if user.strip() else login
        return fold(login, self.defaultdomain)


def load_config(path: Path, environ: Mapping[str, str], *, optional: bool = False) -> Config:
    """Read saslquota.json; variables of the environment override it. With some, an `optional` file
    need not be there. Raises ConfigError."""
    fields = {f"_{f.name}": f for f in dataclasses.fields(Config) if "read" in f.metadata}
    try:
        found, location = load_json(path)
    except ConfigError as error:
        is_missing = isinstance(error.__context__, FileNotFoundError)
        if not (optional and is_missing and fields.keys() & environ.keys()):
            raise
        found, location = {}, Location(path, "")
    for name in found:
        if name not in fields:
            raise ConfigError(f"{location.of(name)}: {unknown_name(name, fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in found and name not in environ:
            continue
        try:
            values[field.name] = field.metadata["read"](environ.get(name, found.get(name)))
        except ValueError as error:
            here = f"environment: {name}" if name in environ else location.of(name)
            raise ConfigError(f"{here}: must be {error}") from None
    config = Config(path=path, **values)
    local = "_onfailure LOCAL"
    if config.onfailure == "LOCAL" and config.store != "mysql":
        raise ConfigError(f"{path}: {local} is only for _store mysql")
    if config.onfailure == "LOCAL" and config.dbtimeout < LOCAL_TIMEOUT:
        raise ConfigError(f"{path}: _dbtimeout must be {LOCAL_TIMEOUT} or more with {local}")
    return config


# --- Rules ----------------------------------------------------------------------------------------

MAX_WINDOWS = 10  # in one rule
MAX_PERIOD = 3650 * 86_400  # seconds
WILDCARD = re.compile(r"[*?[]")  # of fnmatch
PLACEHOLDERS = (
    *("{sasl_username}", "{rule}", "{used}", "{msgquota}"),
    *("{period}", "{seconds}", "{retry_after}", "{recipients}"),
)
BRACES = re.compile("|".join(map(re.escape, ("{{", "}}", *PLACEHOLDERS))))  # as a msg may have them
TIME_UNITS = {"w": 604_800, "d": 86_400, "h": 3600, "m": 60, "s": 1}  # seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """At most `msgquota` recipients (or messages) in any `period` seconds, and the answer beyond
    that."""

    period: int
    msgquota: float  # math.inf: no limit
    rule: str = ""  # the key of its rule
    msg: str = ""  # a template, see PLACEHOLDERS
    action: str = "REJECT"
    enforce: bool = True  # false: a refusal is only logged
    count: str = "recipients"
    notify: bool | None = None  # None: if it is enforced, and not a quota of 0

    @property
    def notifies(self) -> bool:
        """Whether the administrator wants to know of what is over it."""
        return self.enforce and self.msgquota > 0 if self.notify is None else self.notify

    @property
    def refuses(self) -> bool:
        """Whether it refuses what is over it; else that is accepted, or held by Postfix."""
        return self.enforce and self.action != "HOLD"

    @property
    def limit_text(self) -> str:
        return "unlimited" if self.msgquota == math.inf else str(self.msgquota)

    def __str__(self) -> str:
        return f"{self.limit_text} in {self.period} s"

    def describe(self) -> str:
        """What the window means, for --check."""
        length = f"{self.period} seconds"
        if self.period >= 120:
            length += f" ({format_time(self.period)})"
        if self.msgquota == math.inf:
            return f"any number of {self.count}, counted over {length}"
        limit = f"{self.limit_text} {self.count} in any {length}; beyond that"
        if not self.enforce:
            return f"{limit} accepted (not enforced), logged as {self.action}: {self.msg}"
        if self.action == "HOLD":
            return f"{limit} accepted, and put into Postfix's hold queue: {self.msg}"
        return f"{limit}{' deferred (450)' if self.action == 'DEFER' else ''}: {self.msg}"


class Rule(NamedTuple):
    """The windows that a send must all be within."""

    key: str
    windows: tuple[Window, ...]

    @property
    def is_pool(self) -> bool:
        """Whether it limits all its senders taken together."""
        return self.key == "*" or self.key.startswith("@")

    @property
    def per_message(self) -> bool:
        return self.windows[0].count == "messages"

    def describe_senders(self) -> str:
        """Whom the rule is about, for --check."""
        if self.key == "default":
            return "each sender without another rule"
        if self.key == "*":
            return "a pool, all senders together"
        if self.is_pool:
            together = f"a pool, all senders of {self.key[1:]} together"
            return f"{together} (not each by itself, as @ means elsewhere in Postfix)"
        is_address = "@" in self.key
        if not is_address and "." not in self.key and not WILDCARD.search(self.key):
            return "this login, and each login of a domain of that name"
        if WILDCARD.search(self.key):
            return f"each sender{'' if is_address else ' of a domain'} that matches"
        return "this sender" if is_address else f"each sender of {self.key}"


class Patterns:
    """Rules whose keys hold wildcards. The longest pattern wins; if equal, the first.

    They are tried one by one: 107 us for a new login among 1,000 patterns, and Rules remembers
    what it found.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        longest_first = sorted(rules, key=lambda rule: -len(rule.key))  # sorted() is stable
        self._patterns = [
            (re.compile(fnmatch.translate(rule.key)).match, rule) for rule in longest_first
        ]

    def select(self, name: str) -> Rule | None:
        """The rule that matches a folded login or its domain."""
        return next((rule for match, rule in self._patterns if match(name)), None)

    def hidden(self) -> Iterator[tuple[str, str]]:
        """The keys that are never selected, each with one that wins and matches whatever it does.

        Whether a pattern matches all that another one does is seen by matching it with the other's
        text, in which only its * may take a *. That misses some (sets as in [ab] are left out), and
        is never wrong.
        """
        keys = [rule.key for _, rule in self._patterns if "[" not in rule.key]
        # Only a key with two wildcards can be as long as another and still match as much.
        broad = [key for key in keys if len(WILDCARD.findall(key)) > 1]
        if len(broad) > 1000:  # it would take minutes
            return
        matchers = [(re.compile(covering(key)).fullmatch, key) for key in broad]
        order = {key: position for position, key in enumerate(keys)}
        for key in keys:
            for matches, winner in matchers:
                if order[winner] < order[key] and matches(ordered(key)):
                    yield key, winner
                    break


def ordered(pattern: str) -> str:
    """The pattern with each * after the ? beside it: they mean the same."""
    return re.sub(r"[*?]{2,}", lambda found: "".join(sorted(found[0], reverse=True)), pattern)


def covering(pattern: str) -> str:
    """A regular expression for the patterns that match nothing but what this one matches."""
    wild = {"*": ".*", "?": "[^*]"}
    return "".join(wild.get(character) or re.escape(character) for character in ordered(pattern))


class Rules:
    """The rules of one quotarules.json."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Their keys are folded; "default" must be among them."""
        self._rules = rules
        self._pools = {rule.key: rule for rule in rules if rule.is_pool}
        single = [rule for rule in rules if not rule.is_pool]
        self._exact = {rule.key: rule for rule in single if not WILDCARD.search(rule.key)}
        self._default = self._exact["default"]
        wild = [rule for rule in single if rule.key not in self._exact]
        self.addresses = Patterns(rule for rule in wild if "@" in rule.key)
        self.domains = Patterns(rule for rule in wild if "@" not in rule.key)
        self.applying_to = functools.lru_cache(CACHED_ACCOUNTS)(self._applying_to)

    def _applying_to(self, login: str) -> tuple[Rule, ...]:
        """A login's own rule, then the pools it belongs to. applying_to() remembers them."""
        return (self.select(login), *self.pools(login))

    def select(self, login: str) -> Rule:
        """The rule of a folded login: that of its full address, of a pattern for addresses, of its
        domain, of a pattern for domains, or the default."""
        domain = login.rpartition("@")[2]
        return (
            self._exact.get(login)
            or self.addresses.select(login)
            or self._exact.get(domain)
            or self.domains.select(domain)
            or self._default
        )

    def pools(self, login: str) -> tuple[Rule, ...]:
        """The pools that a folded login belongs to: its domain's, then the whole service."""
        _, at, domain = login.rpartition("@")
        keys = ("@" + domain, "*") if at else ("*",)
        return tuple(self._pools[key] for key in keys if key in self._pools)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules)

    def __str__(self) -> str:
        """The first rules in a few words each."""
        named = [f"{rule.key} {', '.join(map(str, rule.windows))}" for rule in self]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        return "; ".join(named[:5]) + more


def format_time(seconds: int) -> str:
    """Seconds as 2h5m or 1m30s."""
    written = ""
    for unit in "dhms":
        number, seconds = divmod(seconds, TIME_UNITS[unit])
        written += f"{number}{unit}" if number else ""
    return written or "0s"


def format_wait(seconds: float) -> str:
    """A time to wait, rounded up: to a second under a minute, else to a minute."""
    if seconds == math.inf:
        return "never"
    rounded = max(1, math.ceil(seconds))
    return format_time(rounded if rounded < 60 else -(-rounded // 60) * 60)


def read_period(value: Any) -> int:
    """Seconds, or a time as Postfix writes it (postconf(5), "time units")."""
    if isinstance(value, str) and (found := re.fullmatch(r"\s*([0-9]{1,10})([smhdw]?)\s*", value)):
        value = int(found[1]) * TIME_UNITS[found[2] or "s"]
    if type(value) is not int or not 1 <= value <= MAX_PERIOD:
        raise ValueError(
            f'seconds from 1 to {MAX_PERIOD}, or a time as "90s", "10m", "1h", "1d", "1w"'
        )
    return value


def read_msgquota(value: Any) -> float:
    if isinstance(value, str) and value.strip().casefold() == "unlimited":
        return math.inf
    try:
        return read_int(0, 1_000_000_000)(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "unlimited"') from None


def read_msg(value: Any) -> str:
    msg = read_text(value).strip()
    if UNPRINTABLE.search(msg):
        raise ValueError("one line without control characters")
    if wrong := re.search(r"\{[^{}]*\}?|\}", BRACES.sub("", msg)):
        names = ", ".join(PLACEHOLDERS)
        rest = "write {{ or }} for a brace itself"
        raise ValueError(f"a string with no placeholders but {names}, not {wrong[0]} ({rest})")
    return msg


RULE_FIELDS: dict[str, Callable[[Any], Any]] = {
    "period": read_period,  # seconds
    "msgquota": read_msgquota,  # recipients or messages
    "msg": read_msg,
    "count": read_choice("recipients", "messages"),
    "action": read_choice("REJECT", "DEFER", "HOLD"),
    "enforce": read_flag,
    "notify": read_flag,
    "comment": read_text,
}
BUILT_IN = Window(0, 0, msg="sending quota exceeded, try again later")


def load_rules(path: Path, retention: int) -> Rules:
    """Read quotarules.json; `retention` is how long sends are kept, in seconds.

    Raises ConfigError that names the file, the line, the rule, the field and what would be right.
    """
    found, location = load_json(path)
    names = read_keys(found, location)
    if "default" not in names:
        raise ConfigError(f'{path}: the rule "default" is missing')

    def read(key: str, base: Rule | None) -> Rule:
        name = names[key]
        return read_rule(key, found[name], base, retention, location.of(name))

    default = read("default", None)
    return Rules([default if key == "default" else read(key, default) for key in names])


def read_keys(found: Iterable[str], location: Location) -> dict[str, str]:
    """The keys of the rules as they are compared, each with its name in the file. Raises
    ConfigError."""
    names: dict[str, str] = {}
    for name in found:
        key = fold(name)
        if key in names:
            bare, other = ("".join(text.lower().split()) for text in (name, names[key]))
            how = "case or spaces" if bare == other else "spelling"
            same = f"differs from {quoted(names[key])} only in {how}, remove one"
            raise ConfigError(f"{location.of(name)}: {same}")
        if error := key_error(name, key):
            raise ConfigError(f"{location.of(name)}: {error}")
        names[key] = name
    return names


def key_error(name: str, key: str) -> str:
    """Why no login can select a rule of this name, and what would be right; "" if one can. `key` is
    the name, folded."""
    local, _, domain = key.rpartition("@")
    if not key or len(key) > MAX_ACCOUNT or UNPRINTABLE.search(name.strip()):
        return "not a usable key; must be an address, a domain, a pattern or a pool"
    if "**" in key:
        return "write one *, it matches any text"
    if key.startswith("@"):
        pool = 'a pool is "@" and one domain, or "*" for all senders'
        if WILDCARD.search(domain):
            return f'{pool}; for each sender there by itself write "{domain}"'
        if local or not domain or len(POOL_PREFIX + key) > MAX_ACCOUNT:
            return pool
    if "@" in key and " " in domain:
        return "no login has a space in its domain: remove it"
    if ".." in domain or domain.startswith(".") or domain.endswith("."):
        subdomains = f'; for subdomains write "*{domain}"' if domain.startswith(".") else ""
        return f"no domain has a dot at its beginning or end, nor two in a row{subdomains}"
    return ""


def read_rule(key: str, value: Any, base: Rule | None, retention: int, location: Location) -> Rule:
    """Make a rule of what JSON held for its key; `base` gives the fields that are left out. Raises
    ConfigError."""
    if not isinstance(value, list):
        return Rule(key, (read_window(key, value, base, retention, location),))
    if not 1 <= len(value) <= MAX_WINDOWS:
        raise ConfigError(f"{location}: must have from 1 to {MAX_WINDOWS} windows")
    windows = tuple(
        read_window(key, fields, base, retention, location.of(number))
        for number, fields in enumerate(value)
    )
    for number, window in enumerate(windows):
        if window.count != windows[0].count:
            here = location.of(number, "count")
            raise ConfigError(f"{here}: must be the same in all windows of a rule")
    return Rule(key, windows)


def read_window(
    key: str, fields: Any, base: Rule | None, retention: int, location: Location
) -> Window:
    """Make a window of what JSON held for it. Raises ConfigError."""
    if not isinstance(fields, dict):
        raise ConfigError(f'{location}: must be {{"period": ..., "msgquota": ..., "msg": ...}}')
    values: dict[str, Any] = {}
    for field, value in fields.items():
        if field not in RULE_FIELDS:
            raise ConfigError(f"{location.of(field)}: {unknown_name(field, RULE_FIELDS)}")
        try:
            values[field] = RULE_FIELDS[field](value)
        except ValueError as error:
            raise ConfigError(f"{location.of(field)}: must be {error}") from None
    if not base or len(base.windows) > 1:  # of which it cannot be said which is meant
        why = ', and "default" has several windows' if base else ""
        for field in ("period", "msgquota"):
            if field not in values:
                raise ConfigError(f'{location}: "{field}" is missing{why}')
    values.pop("comment", None)
    window = dataclasses.replace(base.windows[0] if base else BUILT_IN, rule=key, **values)
    if window.period > retention:
        kept = f"longer than _retentiondays keeps sends ({retention // 86_400} days)"
        raise ConfigError(f"{location.of('period')}: {kept}: shorten it or raise _retentiondays")
    return window


class RulesFile:
    """The rules in force: those of the file when it was last read without an error."""

    def __init__(self, path: Path, retention: int) -> None:
        """Raises ConfigError: a daemon does not start with bad rules."""
        self.path = path
        self._retention = retention
        self._complaint = ""
        self._wanted = threading.Event()
        self._stamp = self._read_stamp()
        self.rules = load_rules(path, retention)
        self.read_at = time.time()

    @property
    def is_valid(self) -> bool:
        """Whether they are those of the file as it is now."""
        return not self._complaint

    def _read_stamp(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns

    def read_now(self) -> None:
        """Have the file read, by the thread that watches it, whether it has changed or not."""
        self._wanted.set()

    def watch(self) -> None:
        """Read the file again whenever it has changed. It takes seconds for 100,000 rules, and so
        has a thread of its own."""
        while True:
            force = self._wanted.wait(timeout=1.0)
            self._wanted.clear()
            self.reload(force=force)

    def reload(self, *, force: bool = False) -> None:
        """Read the file if it has changed since the last time; a bad one changes nothing."""
        stamp = self._read_stamp()
        if stamp == self._stamp and not force:
            return
        self._stamp = stamp
        interval = sys.getswitchinterval()
        sys.setswitchinterval(0.001)  # 100,000 rules take seconds: the connections go first
        try:
            self.rules = load_rules(self.path, self._retention)
        except ConfigError as error:
            if isinstance(error.__context__, OSError):  # perhaps no descriptor was left: look again
                self._stamp = ()
            if force or str(error) != self._complaint:
                consequence = "the previous ones stay in force, but saslquota would not start again"
                log.error("rules not reloaded, %s: %s", consequence, error)
            self._complaint = str(error)
        else:
            self._complaint = ""
            self.read_at = time.time()
            log.info("rules reloaded: %s", self.rules)
        finally:
            sys.setswitchinterval(interval)


# --- Protocol -------------------------------------------------------------------------------------

MAX_REQUEST = 64 * 1024  # bytes; Postfix sends 1-20 KiB
MAX_ATTRIBUTES = 256  # Postfix 3.7 sends 31
MAX_RECIPIENTS = 1_000_000  # in one request; Postfix's own limit is 1,000 by default
WHOLE_MESSAGE = "DATA", "END-OF-MESSAGE"  # where Postfix asks once, with the number of recipients
MAX_REPLY = 400  # bytes; an SMTP reply line has 512 with its codes (RFC 5321, 4.5.3.1.5)


class Request(NamedTuple):
    """The attributes of a policy request that matter here. Bytes that are not UTF-8 are kept as
    surrogates."""

    protocol_state: str
    sasl_username: str
    sender: str
    recipient: str
    recipient_count: int
    client_address: str
    instance: str
    size: int  # bytes that came over the wire
    is_status: bool = False  # somebody asks how the daemon is, and all else is empty

    @property
    def recipients(self) -> int:
        """How many recipients it is about."""
        return max(1, self.recipient_count) if self.protocol_state in WHOLE_MESSAGE else 1


STATUS_REQUEST = Request("", "", "", "", 0, "", "", 0, is_status=True)


def parse_request(block: bytes) -> Request:
    """Make a request of its lines, without the empty one. Raises ProtocolError.

    Only \\n ends a line and only the first = ends a name: a value may hold anything else
    (SMTPD_POLICY_README, "Protocol description").
    """
    lines = block.decode("utf-8", "surrogateescape").split("\n")
    if len(lines) > MAX_ATTRIBUTES:
        raise ProtocolError(f"more than {MAX_ATTRIBUTES} attributes")
    try:
        attributes = dict([line.split("=", 1) for line in lines])
    except ValueError:
        raise ProtocolError("a line without =") from None
    get = attributes.get
    if get("request") == "status":
        return STATUS_REQUEST
    if get("request") != "smtpd_access_policy":
        raise ProtocolError("no request=smtpd_access_policy")
    count = get("recipient_count") or "0"
    if not (
        count.isascii() and count.isdigit() and len(count) <= 7 and int(count) <= MAX_RECIPIENTS
    ):
        raise ProtocolError(f"recipient_count is not a number up to {MAX_RECIPIENTS}")
    return Request(
        get("protocol_state", ""),
        get("sasl_username", ""),
        get("sender", ""),
        get("recipient", ""),
        int(count),
        get("client_address", ""),
        get("instance", ""),
        len(block) + 2,
    )


class RequestStream:
    """Cuts a stream of bytes into requests.

    `receive(begun)` gives the next bytes, b"" at the end; `begun` tells whether a part of a request
    has come already.
    """

    def __init__(self, receive: Callable[[bool], bytes]) -> None:
        self._receive = receive
        self._buffer = b""

    @property
    def has_more(self) -> bool:
        """Whether a part of the next request has come already."""
        return bool(self._buffer)

    def read_request(self) -> Request | None:
        """The next request; None at the end of the stream or at an empty request.

        Raises ProtocolError for malformed input and whatever `receive` raises.
        """
        while True:
            if self._buffer.startswith(b"\n"):
                return None
            block, end, rest = self._buffer.partition(b"\n\n")
            if len(block) > MAX_REQUEST + (not end):
                raise ProtocolError(f"a request of more than {MAX_REQUEST} bytes")
            if end:
                self._buffer = rest
                return parse_request(block)
            data = self._receive(bool(self._buffer))
            if not data:
                if self._buffer:
                    raise ProtocolError("the connection ended inside a request")
                return None
            self._buffer += data


@functools.lru_cache(100)  # most are the same
def format_reply(action: str) -> bytes:
    """The reply to a request: valid UTF-8, and no longer than SMTP can carry."""
    cut = action.encode("utf-8", "replace")[:MAX_REPLY].decode("utf-8", "ignore")
    return f"action={cut}\n\n".encode()


# --- Stores ---------------------------------------------------------------------------------------

HEAD_ROWS = 8  # the newest entries that come with an account's head: most windows hold no more
LOCK_WAIT = 1  # seconds for a lock in MySQL: as short as it can be, for all others wait too
OLDEST_CONNECTOR = 9, 2  # of mysql-connector-python: read_timeout came with it
LOCK_PROBE = 0.1  # seconds for a lock in MySQL, when it is tried which account is locked
CARRY_ROWS = 52  # of a spool in one INSERT, at least: 250 keep the others waiting for 50 ms
OPENING_ROWS = 24  # at most for what is not known between two entries of an opening balance
INSERT_ROWS = 1000  # in one INSERT of SQLite, which takes 32,766 variables
VACUUM_ROWS = 100_000  # after which a spool gives its room back
WAL_PAGES = 8000  # of 4 KiB that SQLite gathers in its log before it sorts them into the file


class Entry(NamedTuple):
    """A row of the table `sends`. `at` is in microseconds since 1970, UTC."""

    account: str
    seq: int
    epoch: int
    at: int
    recipients: int
    total: int
    instance: str
    token: int
    client_address: bytes = b""  # 4 or 16 bytes in network order; b"": not known, or several
    sender: str = ""  # of the envelope; "" when it is the login, or several


class StoredEntry(NamedTuple):
    """What is read of a row to decide upon it."""

    account: str
    seq: int
    epoch: int
    at: int  # microseconds since 1970, UTC
    before: int  # the total before it
    total: int


COLUMNS = ", ".join(Entry._fields)
Value = int | str | bytes | None  # in a statement


class Store:
    """The table `sends`, in SQL that SQLite, MariaDB and MySQL share.

    Used by one thread. Every method raises Conflict or Unavailable. A subclass says how to connect,
    how to run a statement, and how its database writes a time: TIME reads a column as microseconds
    since 1970, and SELECT_AT that of the sends; BIND_TIME makes a time of them.
    """

    TIME = "{}"
    SELECT_AT = "at"
    BIND_TIME = "?"
    BEGIN_LOCKING = "BEGIN"
    FOR_UPDATE = ""

    def __init__(self, statement_timeout: float) -> None:
        self.statement_timeout = statement_timeout  # seconds
        self.statement_took = 0.0  # seconds; the last one
        self.insert_took = 0.0  # seconds; the last one on this connection
        self._begin_until = math.inf  # monotonic seconds; see hurry()
        self._connection: Any = None
        self._error: type[Exception] = StoreError  # what the connection raises
        self._in_locking_transaction = False
        self._connected_line = ""  # the last one in the log
        self._same_line = RateLimit(REMINDER_INTERVAL)

    def open(self, deadline: float = math.inf) -> None:
        """Connect anew and make sure that sends can be read and written. Begins nothing after the
        deadline, in monotonic seconds."""
        raise NotImplementedError

    def close(self) -> None:
        connection, self._connection = self._connection, None
        self._in_locking_transaction = False
        self.insert_took = 0.0
        if connection:
            with contextlib.suppress(self._error, OSError):
                connection.close()

    def _log_connected(self, line: str) -> None:
        """Once a minute: with a full disk one can connect time and again."""
        if self._same_line.allows() or line != self._connected_line:
            self._connected_line = line
            log.info("connected: %s", line)

    @contextlib.contextmanager
    def hurry(self, deadline: float) -> Iterator[None]:
        """Begin no statement meanwhile that may end after the deadline, in monotonic seconds."""
        limit, self._begin_until = self._begin_until, deadline - self.statement_timeout
        try:
            yield
        finally:
            self._begin_until = limit

    def _check_time(self) -> None:
        """Raise TimedOut if no statement may begin any more."""
        if time.monotonic() > self._begin_until:
            raise TimedOut(f"timed out: the last statement took {self.statement_took:.1f} s")

    def now(self) -> int:
        """The database's time in microseconds since 1970, UTC."""
        raise NotImplementedError

    def newest_at(self) -> int:
        """The latest time of all entries, in microseconds since 1970, UTC; 0 if there are none."""
        rows = self.run(f"SELECT {self.SELECT_AT} FROM sends ORDER BY at DESC LIMIT 1")
        return int(rows[0][0]) if rows else 0

    def run(self, sql: str, values: Sequence[Value] = ()) -> list[Any]:
        """Run a statement with a value for each `?`; return its rows."""
        began = time.monotonic()
        if sql not in ("COMMIT", "ROLLBACK"):
            self._check_time()
        try:
            return self._execute(sql, values)
        finally:
            self.statement_took = time.monotonic() - began

    def _execute(self, sql: str, values: Sequence[Value]) -> list[Any]:
        """As run()."""
        raise NotImplementedError

    def run_each(self, sql: str, many: Sequence[Sequence[Value]]) -> list[Any]:
        """The rows that a SELECT gives for each of several lists of values, all together."""
        return [row for values in many for row in self.run(sql, values)]

    def _select(self, which: str, many: Sequence[Sequence[Value]]) -> list[StoredEntry]:
        """Entries of several accounts, in no order."""
        columns = f"account, seq, epoch, {self.SELECT_AT}, total - recipients, total"
        rows = self.run_each(f"SELECT {columns} FROM sends WHERE {which}", many)
        return [StoredEntry(*row) for row in rows]

    def newest_entries(self, wanted: Mapping[str, int], *, take_locks: bool) -> list[StoredEntry]:
        """Of each account a number of its newest entries. With `take_locks` nobody else can append
        to these accounts until append() or rollback()."""
        if take_locks:
            self.run(self.BEGIN_LOCKING)
            self._in_locking_transaction = True
        lock = self.FOR_UPDATE if take_locks else ""
        return self._select(f"account = ? ORDER BY seq DESC LIMIT ?{lock}", list(wanted.items()))

    def entries_at(self, wanted: Sequence[tuple[str, Sequence[int]]]) -> list[StoredEntry]:
        """The entries of each account at SEARCH_FANOUT numbers, as far as they are still there."""
        numbers = ", ".join("?" * SEARCH_FANOUT)
        many: list[list[Value]] = [[account, *seqs] for account, seqs in wanted]
        return self._select(f"account = ? AND seq IN ({numbers})", many)

    def entries_after(self, wanted: Sequence[tuple[str, int]]) -> list[StoredEntry]:
        """The next entries of each account after a number: 2 * WINDOW_CACHE_ROWS, as some may be
        older than the window that is searched for."""
        limit = 2 * WINDOW_CACHE_ROWS
        return self._select(f"account = ? AND seq > ? ORDER BY seq LIMIT {limit}", wanted)

    def append(self, entries: Sequence[Entry]) -> None:
        """Write all the entries or none; they are durable when this returns."""
        if entries:
            self._insert(entries)
            self.insert_took = self.statement_took
        if self._in_locking_transaction:
            self.run("COMMIT")
            self._in_locking_transaction = False

    def _insert(self, entries: Sequence[Entry]) -> None:
        row = f"(?, ?, ?, {self.BIND_TIME}, ?, ?, ?, ?, ?, ?)"
        rows = ", ".join([row] * len(entries))
        values: list[Any] = list(itertools.chain.from_iterable(entries))
        self.run(f"INSERT INTO sends ({COLUMNS}) VALUES {rows}", values)

    def rollback(self) -> None:
        """Give up the locks of newest_entries(), if any; a connection that breaks here shows at its
        next use."""
        if self._in_locking_transaction:
            self._in_locking_transaction = False
            with contextlib.suppress(StoreError):
                self.run("ROLLBACK")

    def probe(self) -> None:
        """Commit a write that leaves nothing behind. Raises Conflict if the write meets a lock, but
        Unavailable if the COMMIT does: that is nobody's rows."""
        seq = -random.getrandbits(62)  # in no chain, and not another daemon's
        self.run(self.BEGIN_LOCKING)
        try:
            self.append([Entry("", seq, 0, self.now(), 0, 0, "", 0)])
            self.run("DELETE FROM sends WHERE account = '' AND seq = ?", [seq])
        except Conflict:
            self.run("ROLLBACK")
            raise
        try:
            self.run("COMMIT")
        except LockTimeout as error:
            raise Unavailable(f"a COMMIT waits for a lock: {error}") from None

    def wait_for_locks(self, wait: bool) -> None:
        """Whether a statement waits LOCK_WAIT for another session's locks, as it does at first, or
        not at all. (In MySQL it always does: that is the least that there is.)"""

    def locked(self, entries: Sequence[Entry]) -> list[Entry]:
        """Which of these entries, one of an account, cannot be appended because another session has
        locked the account. Writes nothing. Raises Unavailable when the whole table is locked."""
        return []

    def tokens(self, entries: Sequence[Entry]) -> set[int]:
        """The tokens of what is stored at these entries' keys."""
        select = "SELECT token FROM sends WHERE account = ? AND seq = ?"
        return {token for (token,) in self.run_each(select, [(e.account, e.seq) for e in entries])}


class SQLiteStore(Store):
    """The embedded database: a file in WAL mode, every commit synced to disk. Several daemons on
    one machine may share it."""

    _connection: sqlite3.Connection | None
    BEGIN_LOCKING = "BEGIN IMMEDIATE"
    SETTING = "_sqlitefile"
    LOCKING_MODE = "NORMAL"
    SENDS = (
        "account TEXT NOT NULL, seq INTEGER NOT NULL,"
        " epoch INTEGER NOT NULL, at INTEGER NOT NULL, recipients INTEGER NOT NULL,"
        " total INTEGER NOT NULL, instance TEXT NOT NULL, token INTEGER NOT NULL,"
        " client_address BLOB NOT NULL DEFAULT '', sender TEXT NOT NULL DEFAULT ''"
    )
    EVENTS = (
        "CREATE TABLE IF NOT EXISTS events (account TEXT NOT NULL, number INTEGER NOT NULL,"
        " at INTEGER NOT NULL, kind TEXT NOT NULL, until INTEGER, amount INTEGER, epoch INTEGER,"
        " author TEXT NOT NULL, note TEXT NOT NULL, last INTEGER, claimed INTEGER, told INTEGER,"
        " PRIMARY KEY (account, number)) WITHOUT ROWID"
    )
    SCHEMA: tuple[str, ...] = (
        f"CREATE TABLE IF NOT EXISTS sends ({SENDS}, PRIMARY KEY (account, seq)) WITHOUT ROWID",
        "CREATE INDEX IF NOT EXISTS sends_at ON sends (at)",
        EVENTS,
        "CREATE INDEX IF NOT EXISTS events_kind ON events (kind, at)",
    )
    ADDED = (  # to the table since 2.0
        ("client_address", "BLOB NOT NULL DEFAULT ''"),
        ("sender", "TEXT NOT NULL DEFAULT ''"),
    )

    def __init__(self, path: Path, statement_timeout: float) -> None:
        super().__init__(statement_timeout)
        self._path = path
        self._error = sqlite3.Error
        self._inode = 0

    def __str__(self) -> str:
        return f"SQLite {self._path}"

    def open(self, deadline: float = math.inf) -> None:
        self.close()
        try:
            self._connection = sqlite3.connect(
                self._path,
                timeout=self.statement_timeout,
                isolation_level=None,
                check_same_thread=False,
            )
            self.run(f"PRAGMA locking_mode = {self.LOCKING_MODE}")
            self.run("PRAGMA journal_mode = WAL")
            self.run("PRAGMA synchronous = FULL")
            self.run(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
            self.run(f"PRAGMA journal_size_limit = {WAL_PAGES * 4096}")  # after a long reader
            self._make_tables()
            self.run("PRAGMA user_version = 1")  # a full disk takes no more
            self._inode = self._path.stat().st_ino
            self._log_connected(str(self))
        except (sqlite3.Error, StoreError, OSError) as error:
            self.close()
            raise Unavailable(f"{self._path}: {error}{self._remedy()}") from None

    def _make_tables(self) -> None:
        """Make what is missing of them. Another daemon may be at it, too."""
        for statement in self.SCHEMA:
            self.run(statement)
        self.run(self.BEGIN_LOCKING)
        there = {name for (name,) in self.run("SELECT name FROM pragma_table_info('sends')")}
        for column, kind in self.ADDED:
            if column not in there:
                self.run(f"ALTER TABLE sends ADD COLUMN {column} {kind}")
        self.run("COMMIT")

    def _remedy(self) -> str:
        """What to do about files that the daemon may not write, if there are any. For root it is
        the owner of their directory that the daemon runs as."""
        directory = self._path.parent
        if not directory.is_dir():
            return ""
        user = os.geteuid() or directory.stat().st_uid
        name = user_name(user)
        if not is_writable(directory, user):
            return f" - {name} may not write to {directory}: let {self.SETTING} be where it may"
        paths = [Path(f"{self._path}{suffix}") for suffix in ("", "-wal", "-shm")]
        closed = [path for path in paths if path.exists() and not is_writable(path, user)]
        if not closed:
            return ""
        owner = user_name(closed[0].stat().st_uid)
        remedy = f"run chown {name} {' '.join(map(str, closed))}"
        return f" - {closed[0]} belongs to {owner}, {name} may not write to it: {remedy}"

    def now(self) -> int:
        if not self._connection:
            raise Unavailable("not connected")
        try:
            is_same = self._path.stat().st_ino == self._inode
            reason = "" if is_same else "replaced by another file"
        except OSError as error:
            reason = str(error.strerror)
        if reason:
            log.error("%s: %s: what was counted in it is lost", self._path, reason)
            raise Unavailable(f"{self._path}: {reason}")
        return time.time_ns() // 1000

    def _execute(self, sql: str, values: Sequence[Value]) -> list[Any]:
        if not self._connection:
            raise Unavailable("not connected")
        try:
            return self._connection.execute(sql, values).fetchall()
        except sqlite3.IntegrityError as error:
            raise Conflict(str(error)) from None
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise Conflict(str(error)) from None
            raise Unavailable(str(error)) from None

    def check(self) -> str:
        """What --check says of the store. Opens the file without touching it."""
        if not self._path.exists():
            directory = self._path.parent
            if os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
                return f"{self}: will be made at the first start"
            reason = "is not writable" if directory.is_dir() else "does not exist"
            raise Unavailable(f"{self._path}: cannot be made, its directory {reason}")
        # Without a -wal file nobody has it open; "immutable" keeps SQLite from making one.
        mode = "mode=ro" if Path(f"{self._path}-wal").exists() else "immutable=1"
        uri = f"{self._path.absolute().as_uri()}?{mode}"
        try:
            self._connection = sqlite3.connect(uri, uri=True, timeout=self.statement_timeout)
            self.run(f"SELECT {COLUMNS} FROM sends LIMIT 0")
        except (sqlite3.Error, StoreError) as error:
            raise Unavailable(f"{self._path}: {error}{self._remedy()}") from None
        finally:
            self.close()
        if remedy := self._remedy():
            raise Unavailable(f"{self._path}: not writable{remedy}")
        return f"{self}: table sends found"


class SpoolStore(SQLiteStore):
    """What one daemon counts while its database is away. `n` is the order of the sends; no number
    is ever used twice.

    A row with token 0 is no send but part of an opening balance: what its account had used before.
    `opening` gives it when an account is first met, and it is committed with the first append. The
    table `spool` has one row: the spool's id, the database's, the token of an INSERT whose outcome
    is in doubt, and how far the database's clock is ahead of this machine's, in microseconds.
    """

    SETTING = "_spoolfile"
    LOCKING_MODE = "EXCLUSIVE"
    SCHEMA = (
        "CREATE TABLE IF NOT EXISTS sends (n INTEGER PRIMARY KEY AUTOINCREMENT,"
        f" {SQLiteStore.SENDS}, UNIQUE (account, seq))",
        SQLiteStore.EVENTS,
        "CREATE TABLE IF NOT EXISTS spool (id TEXT NOT NULL, database TEXT NOT NULL,"
        " doubt INTEGER NOT NULL, skew INTEGER NOT NULL)",
    )

    def __init__(self, path: Path, statement_timeout: float) -> None:
        super().__init__(path, statement_timeout)
        self.opening: Callable[[str], list[Entry]] = lambda _account: []
        self.id = self.database = ""
        self.doubt = self.skew = 0
        self.done = 0  # the number of the last send that is known to be carried over
        self.held = 0  # sends that are not, those of pools not counted
        self.oldest_at = 0  # when the first of them was

    def __str__(self) -> str:
        return str(self._path)

    def open(self, deadline: float = math.inf) -> None:
        try:
            super().open(deadline)
        except Unavailable as error:
            in_use = " - another saslquota uses it: let each have a _spoolfile of its own"
            raise Unavailable(f"{error}{in_use if 'locked' in str(error) else ''}") from None

    def _log_connected(self, line: str) -> None:
        pass

    def _make_tables(self) -> None:
        super()._make_tables()
        found = self.run("SELECT id, database, doubt, skew FROM spool")
        is_empty = not self.run("SELECT 1 FROM sends LIMIT 1")
        if not found or (is_empty and not self.id):  # machines may be made from one image
            found = [(random_id(), "", 0, self.skew)]
            sql = "INSERT OR REPLACE INTO spool (rowid, id, database, doubt, skew)"
            self.run(f"{sql} VALUES (1, ?, ?, ?, ?)", found[0])
        if found[0][0] != self.id:
            self.done = 0
        ((self.id, self.database, self.doubt, self.skew),) = found
        ((self.held, self.oldest_at),) = self.run(
            "SELECT COUNT(*), COALESCE(MIN(at), 0) FROM sends"
            f" WHERE n > ? AND token <> 0 AND SUBSTR(account, 1, 5) <> '{POOL_PREFIX}'",
            [self.done],
        )

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        self.run(self.BEGIN_LOCKING)
        try:
            yield
            self.run("COMMIT")
        except BaseException:
            with contextlib.suppress(StoreError):
                self.run("ROLLBACK")
            raise

    def machine_now(self) -> int:
        return super().now()

    def now(self) -> int:
        return self.machine_now() + self.skew

    def join(self, database: str) -> None:
        """What is counted from now on belongs to this database."""
        if database != self.database:
            self.run("UPDATE spool SET database = ?", [database])
            self.database = database

    def begin(self, now: int | None, entries: Sequence[Entry]) -> None:
        """An outage begins, at this time of the database's if it is known; all that the file still
        has was carried over. The entries are kept as they are: their INSERT is in doubt."""
        skew = self.skew if now is None else now - self.machine_now()
        doubt = entries[0].token if entries else 0
        with self.transaction():
            self.run("DELETE FROM sends")
            self.run("UPDATE spool SET doubt = ?, skew = ?", [doubt, skew])
            self._open_accounts({entry.account for entry in entries})
            if entries:
                self._insert(entries)
        self.doubt, self.skew, self.held = doubt, skew, 0
        self._hold(entries)

    def newest_entries(self, wanted: Mapping[str, int], *, take_locks: bool) -> list[StoredEntry]:
        found = super().newest_entries(wanted, take_locks=take_locks)
        missing = wanted.keys() - {entry.account for entry in found}
        if self._open_accounts(missing):
            new = {name: wanted[name] for name in missing}
            found += super().newest_entries(new, take_locks=False)
        return found

    def _open_accounts(self, names: Iterable[str]) -> bool:
        """Write the opening balances of accounts, in a transaction that append() ends; whether
        there were any."""
        openings = [entry for name in sorted(names) for entry in self.opening(name)]
        if openings and not self._connection.in_transaction:  # type: ignore[union-attr]
            self.run(self.BEGIN_LOCKING)
            self._in_locking_transaction = True
        for first in range(0, len(openings), INSERT_ROWS):
            self._insert(openings[first : first + INSERT_ROWS])
        return bool(openings)

    def append(self, entries: Sequence[Entry]) -> None:
        super().append(entries)
        self._hold(entries)

    def _hold(self, entries: Sequence[Entry]) -> None:
        if not self.held and entries:
            self.oldest_at = entries[0].at
        self.held += count_sends(entries)

    def rollback(self) -> None:
        """Opening balances stay, whatever has become of the sends: the accounts are remembered."""
        if self._in_locking_transaction:
            self._in_locking_transaction = False
            try:
                self.run("COMMIT")
            except StoreError:
                self.close()

    def rest(self, least: int = 0) -> list[tuple[int, Entry]]:
        """The next sends to carry over, with their numbers; so many at least, if there are."""
        rows = self.run(
            f"SELECT n, {COLUMNS} FROM sends WHERE n > ? AND token <> 0"
            f" ORDER BY n LIMIT {max(CARRY_ROWS, least)}",
            [self.done],
        )
        return [(n, Entry(*row)) for n, *row in rows]

    def carried(self, rows: Sequence[tuple[int, Entry]]) -> int:
        """These sends are in the store; returns how many they are, those of pools not counted."""
        number = count_sends(entry for _, entry in rows)
        if rows:
            self.done, self.oldest_at = rows[-1][0], rows[-1][1].at
        self.held -= number
        return number

    def cut(self) -> None:
        """All is carried over."""
        ((size,),) = self.run("SELECT COUNT(*) FROM sends")
        with self.transaction():
            self.run("DELETE FROM sends")
            self.run("UPDATE spool SET doubt = 0")
        self.doubt = self.held = 0
        if size > VACUUM_ROWS:
            self.run("VACUUM")

    def check(self) -> str:
        try:
            return super().check()
        except Unavailable as error:
            if "locked" not in str(error):
                raise
            return f"{self}: in use; that is right if it is by saslquota itself"


def count_sends(entries: Iterable[Entry]) -> int:
    """How many sends entries are: those of pools are no others."""
    return sum(not entry.account.startswith(POOL_PREFIX) for entry in entries)


def random_id() -> str:
    return f"{random.getrandbits(64):016x}"


def is_writable(path: Path, user: int) -> bool:
    """Whether a user may write a file: ourselves, or for root another one, at a guess."""
    if user == os.geteuid():
        return os.access(path, os.W_OK, effective_ids=True)
    found = path.stat()
    return found.st_uid == user or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def load_connector() -> Any:
    """mysql-connector-python. Its C extension brings a libssl of its own, which on Debian 12 does
    not load any more when the interpreter's ssl has come first."""
    with contextlib.suppress(ImportError):
        importlib.import_module("_mysql_connector")
    remedy = (
        "run /opt/saslquota/venv/bin/pip install -U mysql-connector-python"
        " (or pip install -U with the Python that runs saslquota)"
    )
    try:
        connector = importlib.import_module("mysql.connector")
    except ImportError:
        raise Unavailable(f"mysql-connector-python is missing: {remedy}") from None
    if connector.version.VERSION[:2] < OLDEST_CONNECTOR:
        needed = ".".join(map(str, OLDEST_CONNECTOR))
        found = f"mysql-connector-python {connector.__version__} is too old"
        raise Unavailable(f"{found}, {needed} or newer is needed: {remedy}, and restart saslquota")
    return connector


def connection_options(config: Config, host: str) -> dict[str, Any]:
    """What mysql.connector.connect() is told of a host in _myhost, and of who we are."""
    where: dict[str, Any] = {"unix_socket": host.removeprefix("unix:")}
    if found := split_host(host, config.myport):
        where = {"host": found[0], "port": found[1]}
    tls: dict[str, Any] = {}
    if config.mysslca:
        ca = str(config.beside(config.mysslca))
        tls = {"ssl_ca": ca, "ssl_verify_cert": True, "ssl_verify_identity": True}
    user = {"user": config.myuser, "password": config.mypasswd, "database": config.mydb}
    return {**where, **tls, **user}


def connect(config: Config, host: str, timeout: float) -> Any:
    """Connect to a host in _myhost; `timeout` is that of each statement, too, in seconds. Raises
    Unavailable, and what the connector raises.

    The pure Python connector answers a server without TLS, or somebody in between who says that
    there is none, with the password in clear text.
    """
    connector = load_connector()
    options = connection_options(config, host)
    if not (connector.HAVE_CEXT or config.mysslca or is_loopback(options.get("host", "localhost"))):
        raise Unavailable(
            "mysql-connector-python has no C extension here, and without it the password may go"
            " over the network in clear text: set _mysslca, see SECURITY.md"
        )
    return connector.connect(
        **options,
        charset="utf8mb4",
        collation="utf8mb4_bin",
        autocommit=True,
        use_pure=not connector.HAVE_CEXT,
        connection_timeout=timeout,
        read_timeout=timeout,
        write_timeout=timeout,
    )


# Makes the table of 2.0 that of mysql.sql; old daemons on it go on counting.
ADD_COLUMNS = (
    "ALTER TABLE sends ADD COLUMN client_address VARBINARY(16) NOT NULL DEFAULT '',"
    " ADD COLUMN sender VARCHAR(320) NOT NULL DEFAULT ''"
)


def with_remedy(error: Exception, config: Config) -> str:
    """An error of MySQL's with its remedy, where there is one."""
    grant = f"grant all on {config.mydb}.* to the user of the error message"
    no_tls = "turn on TLS in the server, or use its Unix socket: _myhost unix:/path"
    is_pure = not load_connector().HAVE_CEXT  # it reports a lack of TLS as a wrong password
    remedies = {
        1044: f"the database {config.mydb} does not exist, or {grant}",
        1045: f"check _myuser and _mypasswd in {config.path}, and {grant}"
        + (f"; if caching_sha2_password lacks TLS, {no_tls}" if is_pure else ""),
        1049: f"create database {config.mydb}",
        1054: f'run mysql {config.mydb} -e "{ADD_COLUMNS}"',
        1142: grant,
        1146: f"run mysql {config.mydb} < mysql.sql",
        2002: "is the server running? check _myhost",
        2003: "is the server running? check _myhost and _myport",
        2061: f"the server has no TLS: {no_tls}",
    }
    cause = error.__cause__ if isinstance(error, StoreError) else error
    number = getattr(cause, "errno", None)
    message = " ".join(str(error).split())
    return f"{message} - {remedies[number]}" if number in remedies else message


LOCK_TIMEOUTS = frozenset({1205, 1317})  # 1317: see MySQLStore._interrupted_soon()
# 1062 duplicate key, 1213 deadlock (Galera: certification), 3101 Group Replication, 1020 record
# changed since the snapshot (MariaDB 11)
CONFLICTS = frozenset({1062, 1213, 3101, 1020})
# What the server says of a table: only open() tells whether it is `sends`.
OTHER_TABLE = frozenset({1054, 1142, 1143, 1146})
CONNECTION_LOST = frozenset({2006, 2013, 2055, 4031, errno.EPIPE, errno.ECONNRESET})


def store_error(error: Exception) -> StoreError:
    """What an error of MySQL's means."""
    number = getattr(error, "errno", None)
    if number in LOCK_TIMEOUTS:
        return LockTimeout(str(error))
    # 1180 with error 149 is a deadlock at commit (Group Replication).
    if number in CONFLICTS or (number == 1180 and "error 149" in str(error)):
        return Conflict(str(error))
    return Unavailable(str(error))


def literal(value: Value) -> str:
    """A value other than a number, as MySQL reads it."""
    if type(value) is str:
        return f"_utf8mb4 x'{value.encode().hex()}'"
    return f"x'{value.hex()}'" if type(value) is bytes else "NULL"


def with_literals(sql: str, values: Sequence[Value]) -> str:
    """The statement with its values as literals. Texts go as hexadecimal: there is nothing to
    escape, whatever the server's sql_mode."""
    literals = [value if type(value) is int else literal(value) for value in values]
    return sql.replace("?", "%s") % tuple(literals)


class MySQLStore(Store):
    """The table in MySQL or MariaDB; on the nodes of a Galera cluster, too."""

    TIME = "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', {})"
    SELECT_AT = TIME.format("at")
    BIND_TIME = "TIMESTAMP '1970-01-01 00:00:00' + INTERVAL ? MICROSECOND"
    FOR_UPDATE = " FOR UPDATE"
    # Writes nothing, but fails wherever a send would: read-only, a global lock, no right to.
    TRY_INSERT = f"INSERT INTO sends ({COLUMNS}) SELECT {COLUMNS} FROM sends WHERE FALSE"

    def __init__(self, config: Config) -> None:
        # Whole seconds; longer than a lock is waited for; time for a second try, and for a spool.
        seconds = config.dbtimeout - (config.onfailure == "LOCAL")
        super().__init__(max(LOCK_WAIT + 1, seconds // 2))
        self._config = config
        self._hosts = collections.deque(config.myhost)
        self._cursor: Any = None
        self._host_failed = False  # the current one has: another goes first
        self._is_galera = self._is_mariadb = self._waits_for_locks = False
        self._version = self._connector = ""  # the server's; the connector's, with its kind

    def __str__(self) -> str:
        hosts = self._hosts[0] if self._connection else ", ".join(self._config.myhost)
        return f"MySQL {self._config.mydb} on {hosts}"

    def open(self, deadline: float = math.inf) -> None:
        """Connect to the first host that takes sends, beginning with the last that did unless it
        has failed."""
        self.close()
        connector = load_connector()
        self._error = connector.Error
        which = "C extension" if connector.HAVE_CEXT else "pure Python"
        self._connector = f"mysql-connector-python {connector.__version__} ({which})"
        self._hosts.rotate(-self._host_failed)
        failures: list[str] = []
        for _ in range(len(self._hosts)):
            if failures and time.monotonic() + self.statement_timeout > deadline:
                break
            try:
                self._check_time()
                self._connection = connect(self._config, self._hosts[0], self.statement_timeout)
                self._prepare()
                self._host_failed = False
                self._log_connected(f"{self}, {self._connector}")
                return
            except (self._error, StoreError, OSError) as error:
                self.close()
                failures.append(f"{self._hosts[0]}: {with_remedy(error, self._config)}")
                self._hosts.rotate(-1)
        raise Unavailable("; ".join(failures))

    def _prepare(self) -> None:
        """Make the session what the daemon needs, and sure that it takes sends."""
        self._cursor = self._connection.cursor()  # one for all: making one pings the server
        for lock in ("innodb_lock_wait_timeout", "lock_wait_timeout"):
            self.run(f"SET SESSION {lock} = {LOCK_WAIT}")
        self.run("SET SESSION sql_mode = 'STRICT_ALL_TABLES'")
        self.run("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        self._is_galera = bool(self.run("SHOW VARIABLES LIKE 'wsrep_sync_wait'"))
        ((self._version,),) = self.run("SELECT VERSION()")
        self._is_mariadb = "MariaDB" in self._version
        self._waits_for_locks = True
        self.run(self.TRY_INSERT)

    def now(self) -> int:
        return int(self.run(f"SELECT {self.TIME.format('UTC_TIMESTAMP(6)')}")[0][0])

    def _execute(self, sql: str, values: Sequence[Value]) -> list[Any]:
        if not self._connection:
            raise Unavailable("not connected")
        began = time.monotonic()
        try:
            statement = with_literals(sql, values) if values else sql
            if sql.startswith("INSERT"):  # no rows: spare what a cursor does around it
                self._connection.cmd_query(statement)
                return []
            self._cursor.execute(statement)
            return self._cursor.fetchall() if self._cursor.with_rows else []
        except (self._error, OSError) as error:
            found = store_error(error)
            if isinstance(found, Unavailable):  # or the connection was just idle for too long
                number = getattr(error, "errno", None)
                is_idle = number in CONNECTION_LOST and time.monotonic() - began <= 1
                self._host_failed = not is_idle and number not in OTHER_TABLE
            raise found from error

    def run_each(self, sql: str, many: Sequence[Sequence[Value]]) -> list[Any]:
        """In one statement: a round trip may be long."""
        if not many:
            return []
        return self.run(" UNION ALL ".join(f"({with_literals(sql, values)})" for values in many))

    def newest_entries(self, wanted: Mapping[str, int], *, take_locks: bool) -> list[StoredEntry]:
        if take_locks:  # should this machine vanish now, the server must not keep them for hours
            self.run(f"SET SESSION wait_timeout = {self.statement_timeout + 1}")
        return super().newest_entries(wanted, take_locks=take_locks)

    def append(self, entries: Sequence[Entry]) -> None:
        had_locks = self._in_locking_transaction
        super().append(entries)
        if had_locks:  # not by run(), which may say that it is too late: the entries are written
            self._execute("SET SESSION wait_timeout = DEFAULT", ())

    def wait_for_locks(self, wait: bool) -> None:
        self._waits_for_locks = wait
        if self._is_mariadb:
            self.run(f"SET SESSION innodb_lock_wait_timeout = {LOCK_WAIT if wait else 0}")

    def locked(self, entries: Sequence[Entry]) -> list[Entry]:
        try:
            self.run(self.TRY_INSERT)
        except LockTimeout as error:
            raise Unavailable(f"the table is locked by another session: {error}") from None
        waits = self._waits_for_locks
        self.wait_for_locks(False)
        # In MySQL what is locked takes LOCK_PROBE each time: once is best.
        groups = [entries] if self._is_mariadb else [[entry] for entry in entries]
        found = [entry for group in groups for entry in self._locked_among(group)]
        self.wait_for_locks(waits)
        return found

    def _locked_among(self, entries: Sequence[Entry]) -> list[Entry]:
        """Find by bisection what cannot be appended, though nothing has its key."""
        self.run("BEGIN")
        try:
            with self._interrupted_soon():
                self.append(entries)
            return []
        except Conflict as error:
            if len(entries) == 1:
                return list(entries) if isinstance(error, LockTimeout) else []
        finally:
            self.run("ROLLBACK")
        half = len(entries) // 2
        return self._locked_among(entries[:half]) + self._locked_among(entries[half:])

    @contextlib.contextmanager
    def _interrupted_soon(self) -> Iterator[None]:
        """Let a statement wait LOCK_PROBE at most for a lock. Only for what is rolled back."""
        if self._is_mariadb:  # see wait_for_locks()
            yield
            return
        timer = threading.Timer(LOCK_PROBE, self._interrupt, [self._connection.connection_id])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _interrupt(self, connection_id: int) -> None:
        """End a statement by another connection; without one it ends by itself, after LOCK_WAIT."""
        with contextlib.suppress(self._error, OSError):
            other = connect(self._config, self._hosts[0], self.statement_timeout)
            with contextlib.closing(other):
                other.cmd_query(f"KILL QUERY {connection_id}")

    def tokens(self, entries: Sequence[Entry]) -> set[int]:
        if self._is_galera:  # another node's commit may still be on its way
            self.run("SET SESSION wsrep_sync_wait = 1")
        found = super().tokens(entries)
        if self._is_galera:
            self.run("SET SESSION wsrep_sync_wait = 0")
        return found

    def check(self) -> str:
        """What --check says of the store. Raises Unavailable."""
        self.open()
        with contextlib.closing(self):
            return f"{self}: {self._version}, table sends found, {self._connector}"


# --- Events ---------------------------------------------------------------------------------------

INCIDENT_SPAN = 86_400_000_000  # microseconds; what is refused later than that begins another one
RECENT_EVENTS = 10  # of an account that are looked at for its incident


class Order(NamedTuple):
    """What an administrator has ordered for an account, as a row of the table `events`."""

    account: str
    kind: str  # "grant" or "block"
    until: int | None  # microseconds since 1970, UTC; None: for good
    amount: int | None  # of a grant: how many more
    epoch: int | None  # of a grant: the account's when it was given

    def is_over(self, now: int) -> bool:
        return self.until is not None and self.until <= now


class Refused(NamedTuple):
    """How many charges of an account were refused."""

    account: str
    number: int
    line: str  # the first of them, in words


def lasting_incident(events: Iterable[tuple[int, str, int]], now: int) -> int:
    """The number of the incident that goes on, of an account's newest events, each as its number,
    kind and time; 0 if there is none. After a day, a reset or an order the next refusal is news."""
    for number, kind, at in sorted(events, reverse=True):
        if kind == "refused":
            return number if at > now - INCIDENT_SPAN else 0
        if kind != "block":
            return 0
    return 0


class Events:
    """The table `events`: what administrators order, and whom the daemons have refused. Not needed
    to count: it may be missing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def orders(self, since: int) -> list[Order]:
        """The newest order of each account, unless it is a grant or block that ended before
        `since`, or there is none in force any more."""
        of_each = "SELECT 1 FROM events AS n WHERE n.account = e.account"
        newer = f"{of_each} AND n.number > e.number AND n.kind IN ('grant', 'block', 'unblock')"
        until, bound = self._store.TIME.format("until"), self._store.BIND_TIME
        rows = self._store.run(
            f"SELECT account, kind, {until}, amount, epoch FROM events AS e WHERE kind IN"
            f" ('grant', 'block') AND (until IS NULL OR until > {bound}) AND NOT EXISTS ({newer})",
            [since],
        )
        return [Order(*row) for row in rows]

    def _lasting_incidents(
        self, accounts: Sequence[str], now: int
    ) -> tuple[dict[str, int], dict[str, int]]:
        """The number of each account's incident that goes on, if one does, and of its newest
        event."""
        events: dict[str, list[tuple[int, str, int]]] = {account: [] for account in accounts}
        of_each = (
            f"SELECT account, number, kind, {self._store.TIME.format('at')} FROM events"
            f" WHERE account = ? ORDER BY number DESC LIMIT {RECENT_EVENTS}"
        )
        for account, *event in self._store.run_each(of_each, [[account] for account in accounts]):
            events[account].append(tuple(event))
        newest = {account: max(found, default=(0,))[0] for account, found in events.items()}
        lasting = {account: lasting_incident(found, now) for account, found in events.items()}
        return {account: number for account, number in lasting.items() if number}, newest

    def note_refusals(self, refused: Sequence[Refused], now: int, author: str) -> set[str]:
        """Count up the incidents of these accounts; return those of which one begins. Nothing is
        counted if another daemon begins one meanwhile: a Conflict."""
        lasting, newest = self._lasting_incidents([one.account for one in refused], now)
        begun = [one for one in refused if one.account not in lasting]
        if begun:
            row = f"(?, ?, {self._store.BIND_TIME}, 'refused', ?, ?, ?, {self._store.BIND_TIME})"
            values: list[Value] = []
            for account, number, line in begun:
                values += [account, newest[account] + 1, now, number, author, line, now]
            columns = "account, number, at, kind, amount, author, note, last"
            rows = ", ".join([row] * len(begun))
            self._store.run(f"INSERT INTO events ({columns}) VALUES {rows}", values)
        if lasting:
            more = [value for one in refused for value in (one.account, one.number)]
            keys = [value for key in lasting.items() for value in key]
            self._store.run(
                f"UPDATE events SET last = {self._store.BIND_TIME}, amount = amount + CASE account"
                f"{' WHEN ? THEN ?' * len(refused)} END"
                f" WHERE {' OR '.join(['(account = ? AND number = ?)'] * len(lasting))}",
                [now, *more, *keys],
            )
        return {one.account for one in begun}


# --- Accounts -------------------------------------------------------------------------------------

FRESHNESS = 1.0  # seconds until the database's clock, or the reason of a refusal, is read again
CLOCK_TOLERANCE = 1_000_000  # microseconds that the clock may be behind and is waited for
MAX_CLOCK_SKEW = 60_000_000  # microseconds; a step, or an entry dated ahead, of more is an error
CLOCK_PROBATION = 3600.0  # seconds without a step after which a purge believes the clock
SKEW_INTERVAL = 3600.0  # seconds between two log lines about entries dated ahead
RETRY_SEARCH_INTERVAL = 0.1  # seconds between two searches for when a charge fits
LEAST_ROWS = 4  # remembered of each window, however many windows an account has


class Debit(NamedTuple):
    """A number of recipients, or messages, for one account, and the windows it must be within."""

    account: str
    recipients: int
    windows: tuple[Window, ...]


class Charge(NamedTuple):
    """A send: a debit of the sender's own account, then those of the pools. All are charged, or
    none. The rest is kept with it, as Entry holds it."""

    instance: str
    debits: tuple[Debit, ...]
    client_address: bytes = b""
    sender: str = ""

    @property
    def account(self) -> str:
        return self.debits[0].account


def lock_order(account: str) -> tuple[bool, str]:
    """Accounts are locked in this order, by all daemons alike: pools last, for all others wait for
    whoever holds a pool and waits for a sender."""
    return account.startswith(POOL_PREFIX), account


class Now(NamedTuple):
    """A moment, in microseconds since 1970, UTC."""

    clock: int  # the database's
    fastest: int  # of the fastest clock that is known to have dated an entry, at least `clock`


class Clock:
    """The database's clock, carried on by the monotonic one.

    A reading that is a little behind is waited for: the clock runs a tenth slower until then. One
    that is further behind is taken, as a reading ahead is.

    Beside it is the fastest clock that is known to have dated an entry. It is carried on in the
    same way, and never goes back. CachedAccount.time() tells what it is for.
    """

    def __init__(self, store: Store, monotonic: Callable[[], float]) -> None:
        self._store = store
        self._monotonic = monotonic
        # All in microseconds; the first two are what the monotonic clock lacks.
        self._offset = 0
        self._fastest_offset = 0
        self._last = 0  # the time that was given last, until the clock goes back
        self._lag = 0  # how far the last reading was behind it
        self._read_at = 0  # monotonic, as in the next
        self._stepped_at = 0
        self._is_trusted = False  # whether the last reading is this connection's
        self._skew_warnings = RateLimit(SKEW_INTERVAL)

    def distrust(self) -> None:
        """The next reading comes from another connection."""
        self._is_trusted = False

    def is_fresh(self) -> bool:
        return self._is_trusted and self._ticks() - self._read_at <= FRESHNESS * 1e6

    @property
    def is_known(self) -> bool:
        """Whether it was ever read."""
        return self._offset != 0

    def is_steady(self) -> bool:
        """Whether it is long since the first reading, and since one that was far off."""
        return self._ticks() - self._stepped_at >= CLOCK_PROBATION * 1e6

    def read(self) -> bool:
        """Read the database's clock. True when it has gone back."""
        if not self._is_trusted:
            self.note(self._store.newest_at())
        began = self._ticks()
        reading = self._store.now()
        ended = self._ticks()
        is_first = not self._last
        carried = reading if is_first else self.now().clock
        behind = carried - reading
        has_gone_back = behind > CLOCK_TOLERANCE + ended - began
        if has_gone_back:
            self.note(carried)
            if behind > MAX_CLOCK_SKEW:
                log.error("clock went back by %.0f s", behind / 1e6)
        if is_first or abs(behind) > MAX_CLOCK_SKEW:
            self._stepped_at = ended
        self._last = reading if has_gone_back else max(carried, reading)
        self._lag = self._last - reading
        self._offset = reading - ended
        self._read_at = ended
        self._is_trusted = True
        return has_gone_back

    def note(self, at: int) -> None:
        """An entry has this time."""
        self._fastest_offset = max(self._fastest_offset, at - self._ticks())

    def note_ahead(self, entry: StoredEntry) -> None:
        """An entry is dated ahead; if by much, it is an error in the log."""
        self.note(entry.at)
        ahead = entry.at - self._last
        if ahead > MAX_CLOCK_SKEW and self._skew_warnings.allows():
            text = "account %s: a send is dated %.0f s ahead of the clock"
            log.error(text, entry.account, ahead / 1e6)

    def now(self) -> Now:
        ticks = self._ticks()
        clock = ticks + self._offset
        if self._lag:
            clock += max(0, self._lag - (ticks - self._read_at) // 10)
        clock = self._last = max(self._last, clock)
        return Now(clock, max(clock, ticks + self._fastest_offset))

    def _ticks(self) -> int:
        return round(self._monotonic() * 1e6)


class WindowCache:
    """The oldest entries of an account within one period, each as its time and the total before it.

    `gone` is the number of the last entry before them. It is complete when there are none after
    them; else the store must be asked once these have left, of which the last one stays: an opening
    balance begins with it.
    """

    __slots__ = ("capacity", "complete", "gone", "rows")

    def __init__(self, entries: Sequence[StoredEntry], head: int, capacity: int) -> None:
        kept = entries[:capacity]
        self.rows = [(entry.at, entry.before) for entry in kept]
        self.gone = kept[0].seq - 1 if kept else head
        self.complete = not kept or kept[-1].seq == head
        self.capacity = capacity

    def forget(self) -> None:
        """The store must tell."""
        self.rows.clear()
        self.gone = 0
        self.complete = False

    def base(self, start: int, total: int) -> int | None:
        """The total before the oldest entry at or after `start`; None when the store must tell."""
        rows = self.rows
        while rows and rows[0][0] < start:
            if len(rows) == 1 and not self.complete:
                return None
            del rows[0]
            self.gone += 1
        if rows:
            return rows[0][1]
        return total if self.complete else None

    def reached(self, total: int) -> int | None:
        """When the total came to this much; None when it is not known here."""
        for (at, _), (_, after) in itertools.pairwise(self.rows):
            if after >= total:
                return at
        return None

    def append(self, at: int, before: int) -> None:
        if self.complete and len(self.rows) < self.capacity:
            self.rows.append((at, before))
        else:
            self.complete = False

    def take_back(self, before: int) -> None:
        """Undo an append(); what it has made incomplete stays so."""
        if self.rows and self.rows[-1][1] == before:
            del self.rows[-1]


class CachedAccount:
    """What is remembered of one account. Exact until another daemon appends to it, which makes our
    own INSERT collide."""

    __slots__ = (
        *("ahead_until", "at", "epoch", "is_late", "name", "read_at", "seq", "total", "windows"),
    )

    def __init__(self, head: StoredEntry) -> None:
        self.name, self.seq, self.epoch, self.at, _, self.total = head
        self.ahead_until = self.at  # of the database's clock, in microseconds; see time()
        self.is_late = False  # `at` is that of an entry that was taken back
        self.read_at = 0.0  # monotonic seconds; when the head was
        self.windows: dict[int, WindowCache] = {}  # by period

    def time(self, now: Now) -> int:
        """The account's time: along its chain it never falls.

        It is the database's. But when that is before the account's newest entry, it is the fastest
        clock's, on which entries leave their windows as they should; and so it stays until on the
        database's, too, all have left.
        """
        if now.clock >= self.ahead_until:
            return now.clock
        self._stay_ahead()
        return max(self.at, now.fastest)

    def _stay_ahead(self) -> None:
        longest = max(self.windows, default=0)
        self.ahead_until = max(self.ahead_until, self.at + longest * 1_000_000 + 1)

    def clock_went_back(self, now: Now) -> None:
        """What had left a window may be in it again."""
        self.time(now)
        for window in self.windows.values():
            window.forget()

    def keep_windows_of(self, debits: Iterable[Debit]) -> None:
        """Forget those of periods that its rule has no longer."""
        mine = [debit for debit in debits if debit.account == self.name]
        periods = {window.period for debit in mine for window in debit.windows}
        self.windows = {p: window for p, window in self.windows.items() if p in periods}

    def used(self, period: int, now: Now) -> int | None:
        """Recipients in the period that ends now; None when the store must be asked."""
        window = self.windows.get(period)
        if window is None:
            return None
        base = window.base(self.time(now) - period * 1_000_000, self.total)
        return None if base is None else self.total - base

    def append(self, charge: Charge, recipients: int, now: Now, token: int) -> Entry:
        """The entry of a debit of this charge."""
        self.at = self.ahead_until = self.time(now)
        if self.at > now.clock:
            self._stay_ahead()
        for window in self.windows.values():
            window.append(self.at, self.total)
        self.seq, self.total = self.seq + 1, self.total + recipients
        return Entry(
            self.name,
            self.seq,
            self.epoch,
            self.at,
            recipients,
            self.total,
            charge.instance,
            token,
            charge.client_address,
            charge.sender,
        )

    def begin_anew(self) -> None:
        """The next entry begins an epoch."""
        self.epoch, self.total = self.epoch + 1, 0
        for period, window in self.windows.items():
            self.windows[period] = WindowCache([], self.seq, window.capacity)

    def opening(self) -> list[Entry]:
        """Entries with the head's number at last, of which each window holds what is used of it.

        They are those that the windows know. What is not known lies between two of them: it is
        spread evenly, over times at which it had left the windows that know it to be gone.
        """
        known: dict[int, tuple[int, int]] = {}  # by number: time, and total before it
        for window in self.windows.values():
            known.update(enumerate(window.rows, window.gone + 1))
        points = [(seq, *known[seq]) for seq in sorted(known) if seq <= self.seq]
        if not points and self.seq:
            points = [(self.seq, self.at, self.total)]
        rows: list[tuple[int, int]] = []  # time, and total with it
        ends = (self.seq + 1, self.at, self.total)
        for (seq, at, before), (after, until, total) in itertools.pairwise([*points, ends]):
            number = min(OPENING_ROWS, after - seq)
            span = max(0, min([until, *self._left_before(after - 1)]) - at)
            for n in range(number):
                when = at + span * n // max(1, number - 1)
                rows.append((when, before + (total - before) * (n + 1) // number))
        first, before = self.seq + 1 - len(rows), points[0][2] if points else 0
        entries = []
        for seq, (at, total) in enumerate(rows, first):
            counted = self.name, seq, self.epoch, at, total - before, total
            entries.append(Entry(*counted, instance="", token=0))
            before = total
        return entries

    def _left_before(self, seq: int) -> list[int]:
        """The times at which the entry of this number has left a window, the head still not."""
        head = self.seq + self.is_late
        periods = [p for p, window in self.windows.items() if seq <= window.gone < head]
        return [self.at - period * 1_000_000 - 1 for period in periods]

    def take_back(self, entry: Entry) -> None:
        """Undo an append(), but for the time: the head tells."""
        if entry.seq == self.seq:
            self.is_late = True
            self.seq, self.total = entry.seq - 1, entry.total - entry.recipients
            for window in self.windows.values():
                window.take_back(self.total)

    def follow(self, head: StoredEntry) -> bool:
        """Take over what other daemons have appended: what was before it in a window stays so.
        False if the head is no later one of this chain: the account was reset."""
        if head.epoch != self.epoch or (head.seq, head.total) < (self.seq, self.total):
            return False
        if head.seq > self.seq:
            for window in self.windows.values():
                window.complete = False
        self.seq, self.at, self.total = head.seq, head.at, head.total
        self.ahead_until = max(self.ahead_until, self.at)
        return True


class Search(NamedTuple):
    """For the oldest entry within an account's period at which its total comes to `total`. It is
    after the number `low`, and at `high` at the latest."""

    account: CachedAccount
    period: int
    start: int  # microseconds since 1970, UTC
    low: int
    high: int
    total: int = 0

    def is_at_or_after(self, entry: StoredEntry) -> bool:
        """Whether it is this entry or a later one. Along an account's chain that is no, no ... yes,
        yes: the epoch never falls, and in an epoch neither time nor total does."""
        return (
            entry.epoch == self.account.epoch
            and entry.at >= self.start
            and entry.total >= self.total
        )

    def probes(self) -> list[int]:
        """The numbers to look at before so few are left that they can be read one by one."""
        gap = self.high - self.low
        if gap <= 2 * WINDOW_CACHE_ROWS:
            return []
        return [self.low + gap * n // (SEARCH_FANOUT + 1) for n in range(1, SEARCH_FANOUT + 1)]

    def narrowed(self, found: Iterable[StoredEntry]) -> Search:
        """What is left to search after a look at them. One that is missing has been purged."""
        high = min((entry.seq for entry in found if self.is_at_or_after(entry)), default=self.high)
        low = max((seq for seq in self.probes() if seq < high), default=self.low)
        return self._replace(low=low, high=high)


def chains(entries: Iterable[StoredEntry]) -> Mapping[str, list[StoredEntry]]:
    """The entries of each account, oldest first."""
    found: dict[str, list[StoredEntry]] = collections.defaultdict(list)
    for entry in sorted(set(entries)):
        found[entry.account].append(entry)
    return found


class Accounts:
    """Remembers accounts, and reads from the store what is not remembered.

    The entries of an account are a chain: each has the next number and the total so far. What was
    used in a period is the difference of two totals, however many entries lie between:

        seq            1      2      3      4      5
        at          9:00   9:20   9:40   9:50  10:05          now 10:15, period 1 h
        recipients     1      3      1      2      1
        total          1      4      5      7      8 <-- head
                       ^      [------ window ------]
                       total before the window's oldest entry: 8 - 1 = 7 are used

    So of an account the head is remembered, and of each window the oldest entries: as one leaves,
    the next is the oldest. When they are used up, the window's oldest entry is searched for by
    number, SEARCH_FANOUT at a time.
    """

    def __init__(self, store: Store, clock: Clock, monotonic: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._monotonic = monotonic
        self._cache: collections.OrderedDict[str, CachedAccount] = collections.OrderedDict()
        # seq and ahead_until of accounts that are ahead, for when the rest has been forgotten
        self._ahead: collections.OrderedDict[str, tuple[int, int]] = collections.OrderedDict()
        self.retry_searches = RateLimit(RETRY_SEARCH_INTERVAL)
        self.are_shared = False  # with other daemons: their heads move, and are read each time

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, name: str) -> CachedAccount:  # that refresh() was asked for
        return self._cache[name]

    def take_back(self, entries: Sequence[Entry]) -> None:
        """Forget what was appended, in this order, and not written."""
        for entry in reversed(entries):
            if entry.total == entry.recipients:  # it may have begun an epoch
                self._cache.pop(entry.account, None)
            elif account := self._cache.get(entry.account):
                account.take_back(entry)

    def forget_all(self) -> None:  # nothing is known on a new connection
        self._cache.clear()
        self._clock.distrust()

    def read_clock(self) -> Now:
        has_gone_back = self._clock.read()
        now = self._clock.now()
        if has_gone_back:
            for account in self._cache.values():
                account.clock_went_back(now)
        return now

    def refresh(self, debits: Sequence[Debit], *, take_locks: bool) -> Now:
        """Read what a decision upon these debits lacks; return its now."""
        is_fresh = self._clock.is_fresh() and not take_locks
        now = self._clock.now() if is_fresh else self.read_clock()
        stale, spent = self._lacking(debits, now)
        if take_locks or self.are_shared:
            stale = {debit.account for debit in debits}
        elif spent:
            self._fill([debit for debit in debits if debit.account in spent], now, {})
            stale, _ = self._lacking(debits, now)
        if stale:
            heads = self._read_heads(sorted(stale, key=lock_order), now, take_locks=take_locks)
            self._fill([debit for debit in debits if debit.account in stale], now, heads)
        for found in (self._cache, self._ahead):
            while len(found) > CACHED_ACCOUNTS:
                found.popitem(last=False)
        return now

    def _lacking(self, debits: Sequence[Debit], now: Now) -> tuple[set[str], set[str]]:
        """The accounts of which the head must be read: those unknown, or about to refuse on a head
        read longer than FRESHNESS ago; and those of which a window is not known."""
        stale: set[str] = set()
        spent: set[str] = set()
        wanted: dict[str, int] = {}
        oldest = self._monotonic() - FRESHNESS
        for debit in debits:
            account = self._cache.get(debit.account)
            if account is None:
                stale.add(debit.account)
                continue
            self._cache.move_to_end(debit.account)
            if account.ahead_until > now.clock:
                self._ahead[account.name] = account.seq, account.ahead_until
            if len(account.windows) > len(debit.windows):
                account.keep_windows_of(debits)
            more = wanted[debit.account] = wanted.get(debit.account, 0) + debit.recipients
            for window in debit.windows:
                used = account.used(window.period, now)
                if used is None:
                    spent.add(debit.account)
                elif used + more > window.msgquota and account.read_at < oldest:
                    stale.add(debit.account)
        return stale, spent

    def _read_heads(
        self, names: Sequence[str], now: Now, *, take_locks: bool
    ) -> Mapping[str, list[StoredEntry]]:
        """Read the heads of accounts; return their newest entries. What is remembered of an account
        stays right: rows are only ever appended."""
        wanted = {name: 1 if name in self._cache else HEAD_ROWS for name in names}
        heads = chains(self._store.newest_entries(wanted, take_locks=take_locks))
        have_moved = False
        for name in names:
            head = heads[name][-1] if heads[name] else StoredEntry(name, 0, 1, 0, 0, 0)
            account = self._cache.pop(name, None)  # the newest are at the end
            have_moved |= account is not None and account.seq != head.seq
            if account is None or not account.follow(head):
                account = CachedAccount(head)
                seq, ahead_until = self._ahead.get(name, (0, 0))
                if seq == head.seq:
                    account.ahead_until = max(account.ahead_until, ahead_until)
            account.read_at = self._monotonic()
            self._cache[name] = account
            if account.at > now.clock:
                self._clock.note_ahead(head)
        self.are_shared = self.are_shared and have_moved
        return heads

    def _fill(
        self, debits: Sequence[Debit], now: Now, heads: Mapping[str, Sequence[StoredEntry]]
    ) -> None:
        """Find the oldest entries of the windows of which none is remembered any more, or yet."""
        searches: list[Search] = []
        found: list[tuple[Search, list[StoredEntry]]] = []
        periods: dict[str, set[int]] = collections.defaultdict(set)
        for debit in debits:
            periods[debit.account].update(window.period for window in debit.windows)
        for name, period in ((name, period) for name, some in periods.items() for period in some):
            account, newest = self._cache[name], heads.get(name, ())
            if account.used(period, now) is not None:
                continue
            low = account.windows[period].gone if period in account.windows else 0
            high = newest[0].seq if newest else account.seq
            search = Search(account, period, account.time(now) - period * 1_000_000, low, high)
            within = list(filter(search.is_at_or_after, newest))
            # If the newest entries were read, `high` is among them; if not, it must still be read.
            unread = high - low - bool(newest)
            if unread > 0 and account.at >= search.start and len(within) == len(newest):
                searches.append(search)
            else:
                found.append((search, within))
        for (account, period, *_), oldest in found + self._search(searches):
            capacity = max(LEAST_ROWS, WINDOW_CACHE_ROWS // len(periods[account.name]))
            account.windows[period] = WindowCache(oldest, account.seq, capacity)

    def _search(self, searches: list[Search]) -> list[tuple[Search, list[StoredEntry]]]:
        """Find the entries that are searched for, each with some that follow it; all together."""
        while wanted := [(s.account.name, probes) for s in searches if (probes := s.probes())]:
            found = chains(self._store.entries_at(wanted))
            searches = [search.narrowed(found[search.account.name]) for search in searches]
        found = chains(self._store.entries_after([(s.account.name, s.low) for s in searches]))
        return [(s, list(filter(s.is_at_or_after, found[s.account.name]))) for s in searches]

    def when_total_reached(self, name: str, period: int, total: int, now: Now) -> int:
        """When the account's total came to this much within the period, in microseconds of the
        account's time. What is not remembered is searched for, but not often, as all others wait
        meanwhile: between two searches it is the time of the newest entry, the latest possible."""
        account, window = self._cache[name], self._cache[name].windows[period]
        at = window.reached(total)
        if at is None and total <= account.total:
            at = account.at
            if self.retry_searches.allows():
                start = account.time(now) - period * 1_000_000
                search = Search(account, period, start, window.gone, account.seq, total)
                at = next((e.at for _, found in self._search([search]) for e in found), at)
        return account.time(now) if at is None else at  # None: an entry of this very batch


# --- Orders ---------------------------------------------------------------------------------------

BLOCKED = Window(0, 0, rule="blocked", msg="this account may not send, ask your postmaster")
ORDERS_PAUSE = 60.0  # seconds until locked orders are tried again: meanwhile all others wait


class Orders:
    """The grants and blocks that administrators give by saslquotactl.py, read once a second. They
    change the windows that a charge must be within.

    grant      while it lasts each window of the account has so much more; then the count begins
               anew, once, when what was sent on it stands in the way
    block      the account, or each of a pool, may send nothing
    """

    def __init__(self, store: Store, retention: int, monotonic: Callable[[], float]) -> None:
        self._store = store
        self._events = Events(store)
        self._retention = retention  # microseconds: for so long a send on a grant may count
        self._monotonic = monotonic
        self._orders: dict[str, Order] = {}  # by account
        self._next_read = -math.inf  # monotonic seconds
        self._complaints = RateLimit(REMINDER_INTERVAL)
        self.keep: Callable[[Sequence[Order]], None] = lambda _orders: None  # what was read

    @property
    def fresh_until(self) -> float:
        """In monotonic seconds."""
        return self._next_read

    def refresh(self, now: int) -> None:
        """Read them if it is time. Raises StoreError when nothing else can be read, either."""
        if self._monotonic() < self._next_read:
            return
        self._next_read = self._monotonic() + FRESHNESS
        try:
            found = self._events.orders(max(0, now - self._retention))
            self._orders = {order.account: order for order in found}
            self.keep(found)
        except StoreError as error:
            self._store.run("SELECT 1")
            if isinstance(error, Conflict):
                self._next_read += ORDERS_PAUSE
            else:
                self._orders = {}
            if self._complaints.allows():
                log.error("orders (table events) cannot be read, counting without them: %s", error)

    def applied_to(self, charge: Charge, now: int) -> Charge:
        """The charge, its windows changed as is ordered."""
        if not self._orders:
            return charge
        debits = [self._changed(debit, now) for debit in charge.debits]
        if self._is_blocked(charge.account, now):
            first = debits[0].windows[0]
            window = dataclasses.replace(BLOCKED, period=first.period, count=first.count)
            debits[0] = debits[0]._replace(windows=(window,))
        return charge._replace(debits=tuple(debits))

    def _changed(self, debit: Debit, now: int) -> Debit:
        order = self._orders.get(debit.account)
        if not order or order.kind != "grant" or order.is_over(now):
            return debit
        return debit._replace(windows=raised(debit.windows, order.amount or 0))

    def _is_blocked(self, account: str, now: int) -> bool:
        domain = account.rpartition("@")[2]
        names = account, f"{POOL_PREFIX}@{domain}", POOL_PREFIX + "*"
        orders = [self._orders[name] for name in names if name in self._orders]
        return any(order.kind == "block" and not order.is_over(now) for order in orders)

    def begins_anew(self, account: CachedAccount, now: int) -> bool:
        """Whether what was sent on a grant that is over may be in the account's windows."""
        order = self._orders.get(account.name)
        if not order or order.kind != "grant":
            return False
        return order.is_over(now) and order.epoch == account.epoch


@functools.lru_cache(CACHED_ACCOUNTS)
def raised(windows: tuple[Window, ...], amount: int) -> tuple[Window, ...]:
    return tuple(dataclasses.replace(w, msgquota=w.msgquota + amount) for w in windows)


# --- Ledger ---------------------------------------------------------------------------------------

COLLISIONS_BEFORE_LOCKING = 3  # in a row; the next try takes locks
MAX_CONNECTION_FAILURES = 3  # under one batch, then it is given up
PURGE_ROWS = 50  # in one DELETE: a millisecond or two
PURGE_START = (0, "", 0)
LOCK_CONFIRMATION = 0.1  # seconds after which a locked account is looked at again


class Verdict(NamedTuple):
    """Accepted or not, and what is used of a window, an accepted charge included. Of several it is
    the window nearest to its limit; or, of those the charge is over, the one that lasts longest."""

    accepted: bool
    used: int
    window: Window
    over_quota: bool = False  # refused, unless the window is not enforced
    repeatable_until: float = 0.0  # monotonic seconds; until then a refusal needs no look
    retry_at: float | None = None  # monotonic seconds; when the charge fits, as far as needed

    @property
    def usage(self) -> str:
        """In words, for the log."""
        window = self.window
        share = 100 * self.used / window.msgquota if window.msgquota else 100
        quota = f"{self.used}/{window.limit_text} ({share:.2f}%)"
        return f"rule={window.rule}, quota {quota}, period={window.period}"


class Usage(NamedTuple):
    """What is used of one window of a debit."""

    debit: Debit
    window: Window
    used: int
    total: int  # of the account, with what this batch has accepted

    @property
    def is_over(self) -> bool:
        return self.used + self.debit.recipients > self.window.msgquota

    @property
    def fullness(self) -> float:
        return (self.used + self.debit.recipients) / (self.window.msgquota or 1)


class Purge:
    """Deletes the sends older than the retention, some at a time."""

    def __init__(self, store: Store, clock: Clock, retention: int) -> None:
        self._store = store
        self._clock = clock
        self._retention = retention  # microseconds
        self._mark: tuple[int, str, int] = PURGE_START  # at, account, seq: how far it has come

    def go_on(self, now: int) -> bool:
        """False when there are no more, or while the clock may be wrong: it would empty the
        table."""
        return self._clock.is_steady() and self.delete(now - self._retention)

    def delete(self, before: int) -> bool:
        """Look at the next PURGE_ROWS rows older than `before`, and delete those that are not their
        account's newest; whether there are more."""
        (at, account, seq), store = self._mark, self._store
        newer = "SELECT 1 FROM sends AS n WHERE n.account = s.account AND n.seq > s.seq"
        found = store.run(
            f"SELECT {store.SELECT_AT}, account, seq, EXISTS ({newer}) FROM sends AS s"
            f" WHERE at < {store.BIND_TIME} AND at >= {store.BIND_TIME} AND (at > {store.BIND_TIME}"
            " OR account > ? OR (account = ? AND seq > ?))"
            f" ORDER BY at, account, seq LIMIT {PURGE_ROWS}",
            (before, at, at, account, account, seq),
        )
        old = [(account, seq) for _, account, seq, has_newer in found if has_newer]
        if old:
            keys = " OR ".join(["(account = ? AND seq = ?)"] * len(old))
            store.run(f"DELETE FROM sends WHERE {keys}", [value for key in old for value in key])
        self._mark = tuple(found[-1][:3]) if len(found) == PURGE_ROWS else PURGE_START
        return self._mark != PURGE_START


class AccountsLocked(StoreError):
    """Another session has locked accounts of a batch. `entries` holds one of each, which cannot be
    appended. Nothing was written."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(", ".join(entry.account for entry in entries))
        self.entries = entries


@dataclasses.dataclass(slots=True)
class Batch:
    """Charges that are decided together, and their progress."""

    charges: Sequence[Charge]
    deadline: float  # monotonic seconds
    is_wanted: Callable[[int], bool]  # whether somebody still waits for the charge of this index
    verdicts: list[Verdict] = dataclasses.field(default_factory=list)
    entries: list[Entry] = dataclasses.field(default_factory=list)  # that make the verdicts true
    is_uncertain: bool = False  # an INSERT of these entries may have arrived, or arrive still
    collisions: int = 0  # in a row

    @property
    def debits(self) -> list[Debit]:
        return [debit for charge in self.charges for debit in charge.debits]

    @property
    def first_entries(self) -> dict[str, Entry]:
        """By account."""
        return {entry.account: entry for entry in reversed(self.entries)}

    @property
    def needs_locks(self) -> bool:
        return self.collisions >= COLLISIONS_BEFORE_LOCKING

    def check_time(self, now: float, takes: float) -> None:
        """Raise TimedOut if an INSERT that takes so many seconds would end after the deadline."""
        if self.entries and now + takes > self.deadline:
            raise TimedOut(f"timed out: a statement takes {takes:.1f} s")


class Decision:
    """Decides charges one after the other, upon accounts that are as they were at one moment, and
    gathers the entries of those that are accepted. A pool gets one entry for all of them."""

    def __init__(
        self, accounts: Accounts, orders: Orders, now: Now, monotonic: Callable[[], float]
    ) -> None:
        self._accounts = accounts
        self._orders = orders
        self._now = now
        self._monotonic = monotonic
        self._token = random.getrandbits(63)
        self.appended: list[Entry] = []
        self._anew: list[str] = []  # accounts that begin an epoch with the charge judged last
        self._pools: dict[str, tuple[int, Charge]] = {}  # recipients, and the first of them

    def judge(self, charge: Charge) -> Verdict:
        """Decide a charge; accept() is about the last one that was."""
        charge = self._orders.applied_to(charge, self._now.clock)
        self._anew = []
        usages = self._usages(charge)
        over = [usage for usage in usages if usage.is_over]
        if over:
            usages, over = self._renewed(charge, usages, over)
        if over:
            return self._judge_excess(over)
        usage = usages[0] if len(usages) == 1 else max(usages, key=lambda usage: usage.fullness)
        return Verdict(True, usage.used + usage.debit.recipients, usage.window)

    def _usages(self, charge: Charge) -> list[Usage]:
        """What is used of each window; of accounts that begin anew what this batch has accepted."""
        usages = []
        for debit in charge.debits:
            account = self._accounts[debit.account]
            pending = self._pools[debit.account][0] if debit.account in self._pools else 0
            is_new = debit.account in self._anew
            for window in debit.windows:
                used = account.used(window.period, self._now)
                assert used is not None, "refresh() has read what was unknown"
                before = (0, 0) if is_new else (used, account.total)
                usages.append(Usage(debit, window, before[0] + pending, before[1] + pending))
        return usages

    def _renewed(
        self, charge: Charge, usages: list[Usage], over: list[Usage]
    ) -> tuple[list[Usage], list[Usage]]:
        """What is used, and what the charge is over, once the accounts have begun anew that may."""
        self._anew = [u.debit.account for u in over if u.window.enforce and self._begins_anew(u)]
        if self._anew:
            renewed = self._usages(charge)
            over = [usage for usage, new in zip(usages, renewed, strict=True) if new.is_over]
            if any(usage.window.enforce for usage in over):
                self._anew = []  # for a send that is not accepted nothing begins
            else:
                usages, over = renewed, [usage for usage in renewed if usage.is_over]
        return usages, over

    def _begins_anew(self, usage: Usage) -> bool:
        return self._orders.begins_anew(self._accounts[usage.debit.account], self._now.clock)

    def _judge_excess(self, over: Sequence[Usage]) -> Verdict:
        """The verdict upon a charge that is over these."""
        refusing = [usage for usage in over if usage.window.refuses]
        held = [usage for usage in over if usage.window.enforce]
        usage, retry_at = self._last_to_free(refusing or held or over)
        if refusing:
            until = self._refusal_holds_until(usage)
            return Verdict(False, usage.used, usage.window, True, until, retry_at)
        used = usage.used + usage.debit.recipients
        return Verdict(True, used, usage.window, True, retry_at=retry_at)

    def accept(self, charge: Charge) -> None:
        for name in self._anew:
            self._accounts[name].begin_anew()
        for name, recipients, _ in charge.debits:
            if name.startswith(POOL_PREFIX):
                so_far, first = self._pools.get(name, (0, charge))
                self._pools[name] = so_far + recipients, first
            else:
                self._append(name, recipients, charge)

    def _append(self, name: str, recipients: int, charge: Charge) -> None:
        account = self._accounts[name]
        self.appended.append(account.append(charge, recipients, self._now, self._token))

    def entries(self) -> list[Entry]:
        """What makes the verdicts true, in the order in which accounts are locked: lock_order()."""
        senders = sorted(self.appended)
        for name, (recipients, first) in sorted(self._pools.items()):
            self._append(name, recipients, Charge(first.instance, ()))
        return senders + self.appended[len(senders) :]

    def _last_to_free(self, over: Sequence[Usage]) -> tuple[Usage, float | None]:
        """The window that the charge is over for longest, and when the charge would fit into it, in
        monotonic seconds. Looked up only when somebody is to be told."""
        if len(over) == 1 and "{retry_after}" not in over[0].window.msg:
            return over[0], None
        waits = [self._wait_until_it_fits(usage) for usage in over]
        longest = max(waits)
        return over[waits.index(longest)], self._monotonic() + longest / 1e6

    def _wait_until_it_fits(self, usage: Usage) -> float:
        """How long it takes until enough entries have left the window, in microseconds."""
        account, recipients, _ = usage.debit
        period, msgquota = usage.window.period, usage.window.msgquota
        if recipients > msgquota:
            return math.inf
        # All entries up to the first at which the total comes to this must leave.
        total = usage.total + recipients - int(msgquota)
        at = self._accounts.when_total_reached(account, period, total, self._now)
        return at + period * 1_000_000 + 1 - self._accounts[account].time(self._now)

    def _refusal_holds_until(self, usage: Usage) -> float:
        """In monotonic seconds. A reset is to be noticed within a second, and the first entry that
        leaves at once."""
        account = self._accounts[usage.debit.account]
        rows = account.windows[usage.window.period].rows
        leaves = FRESHNESS
        if rows:
            leaves = (rows[0][0] - account.time(self._now)) / 1e6 + usage.window.period
        known_until = min(account.read_at + FRESHNESS, self._orders.fresh_until)
        return min(known_until, self._monotonic() + leaves)


class Ledger:
    """Decides charges and makes the accepted ones durable before it says so.

    A decision rests on what Accounts remembers; the primary key (account, seq) proves it: had
    another daemon appended meanwhile, our INSERT would collide and write nothing.
    """

    chore_at = math.inf  # monotonic seconds

    def __init__(
        self, store: Store, retention: int, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._monotonic = monotonic
        self._clock = Clock(store, monotonic)
        self._accounts = Accounts(store, self._clock, monotonic)
        self._orders = Orders(store, retention * 1_000_000, monotonic)
        self._purge = Purge(store, self._clock, retention * 1_000_000)
        self.stopping = False  # no more attempts: set by another thread

    def open(self, deadline: float = math.inf) -> None:
        """Connect the store anew. Raises Unavailable."""
        self._accounts.forget_all()
        self._store.open(deadline)

    def close(self) -> None:
        """Forget everything; what is charged next opens the store again."""
        self._accounts.forget_all()
        self._store.close()

    def recover(self, deadline: float) -> float:
        """Make charge() possible again; return how long a write takes, in seconds."""
        self.open(deadline)
        return self.probe()

    def chore(self) -> None:
        """What is due at `chore_at`."""

    def status(self) -> dict[str, object]:
        return {"store": "up", "down_since": "", "accounts_remembered": len(self._accounts)}

    def probe(self) -> float:
        """Commit a write that leaves nothing behind; return how long it took, in seconds."""
        began = self._monotonic()
        self._store.probe()
        return self._monotonic() - began

    def charge(
        self,
        charges: Sequence[Charge],
        deadline: float,
        is_wanted: Callable[[int], bool] = lambda _: True,
    ) -> list[Verdict]:
        """Decide the charges in their order; one that nobody waits for any more is not accepted.

        Raises AccountsLocked. Raises Unavailable when the store cannot be used: entries may have
        been written, or may still be.
        """
        batch = Batch(charges, deadline, is_wanted)
        self._charge(batch)
        return batch.verdicts

    def _charge(self, batch: Batch) -> None:
        """As charge(). After Unavailable it `is_uncertain` whether the entries were written."""
        failures = 0
        while True:
            try:
                self._try(batch)
                return
            except Conflict as error:
                reason = str(error)
                self._take_back(batch)
                batch.collisions += 1
                self._accounts.are_shared = True
                if isinstance(error, LockTimeout) and not batch.is_uncertain:
                    self._find_locked(batch)
            except TimedOut:
                self._take_back(batch)
                raise
            except Unavailable as error:
                reason = str(error)
                failures += 1
                batch.is_uncertain = bool(batch.entries)
                if failures == MAX_CONNECTION_FAILURES:
                    raise
                self.open(batch.deadline)
            if self.stopping or self._monotonic() >= batch.deadline:
                raise TimedOut(f"timed out: {reason}")

    def _try(self, batch: Batch) -> None:
        """Decide the batch, and write what makes it true."""
        if batch.is_uncertain:
            tokens = self._store.tokens(batch.entries)
            if batch.entries[0].token in tokens:
                return
            batch.is_uncertain = not tokens  # another's row: ours can never get in
        if not batch.is_uncertain:
            batch.entries = []  # nothing is under way, should the decision fail
            self._decide(batch)
        # As long as the last one, or the last statement.
        batch.check_time(
            self._monotonic(), max(self._store.insert_took, self._store.statement_took)
        )
        self._store.append(batch.entries)

    def _take_back(self, batch: Batch) -> None:
        """Forget what was decided and not written."""
        self._store.rollback()
        self._accounts.take_back(batch.entries)

    def _find_locked(self, batch: Batch) -> None:
        """Raise AccountsLocked if another session has locked accounts of the batch, and keeps them:
        other daemons do so for milliseconds."""
        one_each = batch.first_entries
        locked = self._store.locked(list(one_each.values()))
        if locked:
            time.sleep(LOCK_CONFIRMATION)
            locked = self._store.locked(locked)
        if locked:
            raise AccountsLocked(locked)
        if not one_each:  # the lock was met while reading with locks: INSERT without them
            batch.collisions = 0

    def still_locked(self, entries: Sequence[Entry]) -> list[Entry]:
        """Which of these entries, one of an account, could not be appended now."""
        return self._store.locked(entries)

    def wait_for_locks(self, wait: bool) -> None:
        self._store.wait_for_locks(wait)

    def _decide(self, batch: Batch) -> None:
        """Find the verdicts, and the entries that make them true."""
        self._orders.refresh(self._clock.now().clock)
        now = self._accounts.refresh(batch.debits, take_locks=batch.needs_locks)
        decision = Decision(self._accounts, self._orders, now, self._monotonic)
        verdicts = []
        try:
            for index, charge in enumerate(batch.charges):
                verdict = decision.judge(charge)
                if verdict.accepted:
                    if batch.is_wanted(index):
                        decision.accept(charge)
                    else:
                        verdict = verdict._replace(accepted=False)
                verdicts.append(verdict)
        except StoreError:
            self._accounts.take_back(decision.appended)
            raise
        batch.entries, batch.verdicts = decision.entries(), verdicts

    def note_refusals(self, refused: Sequence[Refused], author: str) -> set[str]:
        """As Events.note_refusals()."""
        now = self._accounts.read_clock().clock
        return Events(self._store).note_refusals(refused, now, author)

    def open_if_lost(self) -> None:
        """Open the store anew if it does not answer. Raises Unavailable."""
        try:
            self._store.run("SELECT 1")
        except StoreError:
            self.open()

    def purge(self) -> bool:
        """As Purge.go_on(). Raises Conflict, and Unavailable when the store cannot be opened
        either."""
        try:
            return self._purge.go_on(self._accounts.read_clock().clock)
        except Unavailable:  # an idle connection may have been closed
            self.open()
            return True


# --- Spool ----------------------------------------------------------------------------------------

SPOOL_TIME = 1.0  # seconds of _dbtimeout in which the database is not tried again
SWITCH_TIME = 0.5  # seconds that are left for the spool when a statement was stuck until its end
CARRY_COLLISIONS = 10  # in a row, then the database is left alone for a moment
ATTEMPT_INTERVAL = 1.0  # seconds between two attempts to carry sends over
ATTEMPT_WATCH = 0.05  # seconds between two looks whether one has ended


class OtherDatabase(Unavailable):
    """A spool holds sends that do not belong to this database."""


class LocalAccounts(Accounts):
    """Accounts that are remembered when the connection is lost: what has not been read on a new one
    serves for opening balances only. Nothing is decided upon it."""

    def __init__(self, store: Store, clock: Clock, monotonic: Callable[[], float]) -> None:
        super().__init__(store, clock, monotonic)
        self._earlier: collections.OrderedDict[str, CachedAccount] = collections.OrderedDict()

    def take_back(self, entries: Sequence[Entry]) -> None:
        super().take_back(entries)
        self._cache, self._earlier = self._earlier, self._cache
        super().take_back(entries)
        self._cache, self._earlier = self._earlier, self._cache

    def forget_all(self) -> None:
        self._cache.update(self._earlier)  # what is in both was about to be read
        self._earlier = self._cache.copy()
        super().forget_all()

    def refresh(self, debits: Sequence[Debit], *, take_locks: bool) -> Now:
        now = super().refresh(debits, take_locks=take_locks)
        for debit in debits if self._earlier else ():
            self._earlier.pop(debit.account, None)
        while len(self._earlier) > CACHED_ACCOUNTS:
            self._earlier.popitem(last=False)
        return now

    def opening(self, name: str) -> list[Entry]:
        """The opening balance of an account, as far as it is known; see CachedAccount."""
        account = self._earlier.get(name) or self._cache.get(name)
        return account.opening() if account else []

    def begin_as(self, other: Accounts) -> None:
        """Know which accounts are ahead."""
        self._ahead = other._ahead.copy()

    def take_over(self, other: LocalAccounts) -> None:
        """Forget all, but for what another one remembers of the same accounts."""
        self.forget_all()
        other.forget_all()
        self._earlier.update(other._earlier)


class RememberingLedger(Ledger):
    """A ledger with LocalAccounts."""

    def __init__(self, store: Store, retention: int, monotonic: Callable[[], float]) -> None:
        super().__init__(store, retention, monotonic)
        self._accounts = self.accounts = LocalAccounts(store, self._clock, monotonic)


class Carrier:
    """Carries what a spool holds over into the store, each send exactly once.

    The account "SPOOL id" has the marks: the total of the newest is the number of the last send
    that was carried over. Each INSERT has the next mark among its rows. So of two INSERTs of the
    same sends only one can get in, also if the other was given up and wakes later in a frozen
    server, and the mark tells which sends are in. What the ledger remembers is not touched.
    """

    def __init__(self, store: Store, spool: SpoolStore) -> None:
        self._store = store
        self._spool = spool
        self._heads: dict[str, StoredEntry] = {}  # as the last INSERT left them

    def home(self) -> str:
        """The id of the database, made by the daemon that comes first; in a table that was made
        anew it is what it was. Raises Unavailable."""
        select = "SELECT instance FROM sends WHERE account = ? AND seq = 1"
        self._heads.clear()  # it may be another server
        for _ in range(COLLISIONS_BEFORE_LOCKING):
            if rows := self._store.run(select, [SPOOL_ACCOUNT]):
                return str(rows[0][0])
            home = self._spool.database or random_id()
            new = Entry(SPOOL_ACCOUNT, 1, 1, self._store.now(), 0, 0, home, 0)
            with contextlib.suppress(Conflict):
                self._store.append([new])
        raise Unavailable(f"account {SPOOL_ACCOUNT}: rows locked by another database session")

    def check_home(self, rows: Sequence[tuple[int, Entry]], home: str) -> None:
        """Raise OtherDatabase if these sends do not belong to the database of this id."""
        if rows and self._spool.database not in ("", home):
            remedy = "move the file away, or set _myhost and _mydb to that database"
            found = f"its sends belong to another database, {self._spool.database}, this is {home}"
            raise OtherDatabase(f"{self._spool}: {found}: {remedy}")

    def reopen(self, rows: Sequence[tuple[int, Entry]], timeout: float) -> str:
        """Open the store and carry these sends over: that it can be opened proves too little.
        Returns the database's id. Raises Unavailable, also when it takes longer than `timeout`."""
        self._store.open()
        home = self.home()
        self.check_home(rows, home)
        began = time.monotonic()
        if not self.carry(rows):
            self._store.probe()
        took = time.monotonic() - began
        if took > timeout:
            raise TimedOut(f"timed out: a write takes {took:.1f} s")
        return home

    def carry(self, rows: Sequence[tuple[int, Entry]]) -> bool:
        """Carry these sends over, but for those that are in; whether anything was written. Raises
        Unavailable: the next attempt finds out what has become of this one."""
        if not rows:
            return False
        for collisions in range(CARRY_COLLISIONS):
            try:
                return self._try(rows, take_locks=collisions >= COLLISIONS_BEFORE_LOCKING)
            except LockTimeout as error:
                raise Unavailable(f"rows locked by another database session: {error}") from None
            except Conflict as error:
                reason = error
            finally:
                self._store.rollback()
        raise Unavailable(f"other daemons are always faster: {reason}")

    def _try(self, rows: Sequence[tuple[int, Entry]], *, take_locks: bool) -> bool:
        heads, self._heads = self._heads, {}  # the key of each row proves them
        now, mark = self._store.now(), f"{SPOOL_ACCOUNT} {self._spool.id}"
        names = {mark, *(entry.account for _, entry in rows)} - heads.keys()
        wanted = dict.fromkeys(sorted(names, key=lock_order), 1)
        heads.update((name, StoredEntry(name, 0, 1, 0, 0, 0)) for name in names)
        newest = self._store.newest_entries(wanted, take_locks=take_locks) if wanted else []
        heads.update((entry.account, entry) for entry in newest)
        last = heads[mark].total
        if rows[-1][0] <= last:
            return False
        left = self._without_doubt([entry for n, entry in rows if n > last])
        step = Entry(mark, 0, 1, now, rows[-1][0] - last, 0, socket.gethostname()[:64], 0)
        token = random.getrandbits(63)  # one of its own: that of the doubt is looked for
        entries = [self._chained(entry, heads, now, token) for entry in [*left, step]]
        self._store.append(
            sorted(entries, key=lambda entry: (lock_order(entry.account), entry.seq))
        )
        if len(heads) <= CACHED_ACCOUNTS:
            self._heads = heads
        return True

    def _without_doubt(self, entries: list[Entry]) -> list[Entry]:
        """Leave out what the INSERT in doubt has written: all its rows are in, or none. This look
        comes after that at the heads: if it gets in later, it takes a key that ours needs."""
        doubtful = [entry for entry in entries if entry.token == self._spool.doubt]
        if not doubtful or self._spool.doubt not in self._store.tokens(doubtful):
            return entries
        return [entry for entry in entries if entry.token != self._spool.doubt]

    @staticmethod
    def _chained(entry: Entry, heads: dict[str, StoredEntry], now: int, token: int) -> Entry:
        """The entry as the next one of its account, whose head it becomes. A reset in the store
        wins: it counts in the new epoch."""
        head = heads[entry.account]
        epoch = max(head.epoch, entry.epoch)
        if not entry.recipients and not entry.total:
            epoch = head.epoch + 1
        before = head.total if epoch == head.epoch else 0
        at, total = max(head.at, min(entry.at, now)), before + entry.recipients
        heads[entry.account] = StoredEntry(head.account, head.seq + 1, epoch, at, before, total)
        return entry._replace(seq=head.seq + 1, epoch=epoch, at=at, total=total, token=token)


class Attempt(threading.Thread):
    """Tries in the background whether the store can be used again: a frozen server would keep the
    committer waiting, and all senders with it."""

    def __init__(self, carrier: Carrier, rows: Sequence[tuple[int, Entry]], timeout: float) -> None:
        super().__init__(name="attempt", daemon=True)
        self._carrier = carrier
        self._timeout = timeout
        self.rows = rows
        self.home = ""
        self.error: StoreError | None = None
        self.is_over = False

    def run(self) -> None:
        try:
            self.home = self._carrier.reopen(self.rows, self._timeout)
        except StoreError as error:
            self.error = error
        except Exception as error:  # a bug must not end the attempts
            log.exception("an error in saslquota itself, the attempt is repeated")
            self.error = Unavailable(repr(error))
        self.is_over = True


class OutageLog:
    """What is logged of a spool, and counted for the status."""

    def __init__(self, file: SpoolStore) -> None:
        self._file = file
        self.began_at = 0.0  # Unix time; 0 if the store is up
        self._carrying_since = 0.0  # monotonic seconds
        self._sends = 0  # carried over since the outage began
        self._next_reminder = 0.0  # monotonic seconds
        self._spool_complaints = RateLimit(REMINDER_INTERVAL)
        self.reason = ""
        self.outages = self.carried = self.spool_errors = 0

    def begin(self, error: StoreError | None) -> None:
        """The spool decides; without an error because it still holds sends."""
        self.began_at, self._sends = time.time(), 0
        self._next_reminder = time.monotonic() + REMINDER_INTERVAL
        if error:
            self.outages += 1
            self.reason = str(error)
            text = "database unavailable, sends are counted in %s until it is back: %s"
            log.error(text, self._file, self.reason)

    def failed(self, error: StoreError, *, has_stopped: bool = False) -> None:
        """An attempt to carry over has."""
        self.reason = str(error)
        if has_stopped:
            text = "carrying over stopped, %s holds %d sends: %s"
            log.warning(text, self._file, self._file.held, self.reason)

    def remind(self) -> None:
        """Say every minute that it lasts."""
        now = time.monotonic()
        if now >= self._next_reminder:
            self._next_reminder = now + REMINDER_INTERVAL
            lasts = time.time() - self.began_at
            text = "database unavailable for %.0f s, %s holds %d sends: %s"
            log.error(text, lasts, self._file, self._file.held, self.reason)

    def carry(self, number: int) -> None:
        """So many sends have been carried over."""
        if not self._sends:
            self._carrying_since = time.monotonic()
        self._sends += number
        self.carried += number

    def end(self, *, is_all: bool) -> None:
        """The store decides, and has all sends, unless the spool cannot be used."""
        if self.began_at and is_all:
            took = time.monotonic() - self._carrying_since if self._sends else 0.0
            log.warning("database back: %d sends carried over in %.1f s", self._sends, took)
        self.began_at, self.reason = 0.0, ""

    def spool_failed(self, error: StoreError) -> None:
        self.spool_errors += 1
        if self._spool_complaints.allows():
            log.error("spool cannot be used, without it _onfailure is DEFER_IF_PERMIT: %s", error)


class Spool:
    """A spool's file with the ledger over it, and whether they can be used."""

    def __init__(self, file: SpoolStore, retention: int, monotonic: Callable[[], float]) -> None:
        self.file = file
        self.log = OutageLog(file)
        self.trouble = ""  # why it cannot be used
        self._retention, self._monotonic = retention, monotonic
        self._has_begun = True  # whether the file knows of this outage
        self._began_at: int | None = None  # microseconds since 1970, UTC, by the store's clock
        self._kept_orders: Sequence[Order] | None = None  # in the file
        self.forget()

    def forget(self) -> None:
        self.ledger = RememberingLedger(self.file, self._retention, self._monotonic)

    def open(self, deadline: float = math.inf) -> None:
        """Open the file anew; see `trouble`."""
        self._kept_orders = None
        try:
            self.ledger.open(deadline)
            self.trouble = ""
        except StoreError as error:
            self.lose(error)

    def lose(self, error: StoreError) -> None:
        """It cannot be used."""
        self.trouble = str(error)
        self.log.spool_failed(error)
        self.ledger.close()

    def rest(self, least: int = 0) -> list[tuple[int, Entry]]:
        """The next sends to carry over; none if it cannot be used."""
        try:
            return self.file.rest(least)
        except StoreError as error:
            self.lose(error)
            return []

    def join(self, home: str) -> None:
        """What is counted from now on belongs to this database."""
        try:
            self.file.join(home)
        except StoreError as error:
            self.lose(error)

    def begin(self, clock: Clock, accounts: Accounts, doubtful: Sequence[Entry]) -> None:
        """An outage begins. Raises Unavailable, and then the next charge begins it."""
        self.forget()
        self.ledger.accounts.begin_as(accounts)
        self._began_at = None
        if clock.is_known:
            self._began_at, fastest = clock.now()
            self.ledger._clock.note(fastest)
        self._has_begun = False
        self._begin(doubtful)

    def _begin(self, doubtful: Sequence[Entry]) -> None:
        try:
            try:
                self.file.begin(self._began_at, doubtful)
            except StoreError:  # it may have been closed
                self.ledger.open()
                self.file.begin(self._began_at, doubtful)
            self._has_begun = True
        except StoreError as error:
            self.lose(error)
            raise Unavailable(str(error)) from None

    def charge(
        self, charges: Sequence[Charge], deadline: float, is_wanted: Callable[[int], bool]
    ) -> list[Verdict]:
        try:
            self._reopen(deadline)
            return self.ledger.charge(charges, deadline, is_wanted)
        except Unavailable as error:
            self.lose(error)
            raise

    def recover(self, deadline: float) -> float:
        """As Ledger.recover()."""
        try:
            self._reopen(deadline)
            return self.ledger.probe()
        except Unavailable as error:
            self.lose(error)
            raise

    def _reopen(self, deadline: float) -> None:
        if self.trouble:
            self.ledger.open(deadline)
            self.trouble = ""
        if not self._has_begun:
            self._began_at = None
            self._begin([])

    def keep_orders(self, orders: Sequence[Order]) -> None:
        """So they hold in an outage, also after a restart in it. If it fails the next call tries
        again."""
        if self.trouble or orders == self._kept_orders:
            return
        columns = "account, kind, until, amount, epoch, number, at, author, note"
        sql = f"INSERT INTO events ({columns}) VALUES (?, ?, ?, ?, ?, 1, 0, '', '')"
        with contextlib.suppress(StoreError):
            with self.file.transaction():
                self.file.run("DELETE FROM events")
                for order in orders:
                    self.file.run(sql, order)
            self._kept_orders = orders

    def cut(self) -> None:
        """All is carried over."""
        self.forget()
        try:
            self.file.cut()
        except StoreError as error:  # the mark makes what is left harmless
            self.log.spool_failed(error)

    def status(self) -> dict[str, object]:
        spool, held = self.log, self.file.held
        return {
            **({"down_since": round(spool.began_at)} if spool.began_at else {}),
            "spool": self.file,
            "spooled_sends": held,
            "spooled_since": self.file.oldest_at // 1_000_000 if held else "",
            "outages": spool.outages,
            "sends_carried_over": spool.carried,
            "spool_errors": spool.spool_errors,
            "last_error": " ".join((self.trouble or spool.reason).split()),
        }


class Changeover(RememberingLedger):
    """Who decides, a store or a spool, and when that changes.

    state     decides    the store is used by  ends when
    starting  nobody     the committer         the first attempt has succeeded, or failed
    up        the store  the committer         a batch cannot be decided there: probing
    probing   the spool  an Attempt            one has carried a batch over: back
    back      the spool  the committer         nothing is left: up; the store fails: probing

    If the spool cannot be used the store decides, and _onfailure is as DEFER_IF_PERMIT.
    """

    def __init__(
        self,
        store: Store,
        file: SpoolStore,
        retention: int,
        timeout: float,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        spools: bool = True,
    ) -> None:
        super().__init__(store, retention, monotonic)
        self.state, self.chore_at = "starting", 0.0
        self._timeout = timeout  # seconds, as the committer's
        self._spools = spools  # else it only carries over what an earlier daemon has left
        self._spool = Spool(file, retention, monotonic)
        self._carrier = Carrier(store, file)
        self._attempt: Attempt | None = None
        self._home = ""  # the id of the database
        self._charged = 0  # how many charges the spool had to decide last
        self._orders.keep = self._spool.keep_orders
        file.opening = self.accounts.opening

    def open(self, deadline: float = math.inf) -> None:
        super().open(deadline)
        self._home = self._carrier.home()
        if self.state == "up" and not self._spool.trouble:
            self._spool.join(self._home)
            self._plan_chore()

    def _in_time(self, deadline: float) -> contextlib.AbstractContextManager[None]:
        """Leave time to go on in the spool, if one can, before the deadline: that of a request, or
        of those who may come at once."""
        can_go_on = self._spools and not self._spool.trouble
        return self._store.hurry(deadline - SWITCH_TIME if can_go_on else math.inf)

    def _plan_chore(self) -> None:
        """While the store decides: a spool in trouble is tried again."""
        self.chore_at = math.inf
        if self._spool.trouble:
            self.chore_at = self._monotonic() + REMINDER_INTERVAL

    def chore(self) -> None:
        if self.state == "starting":
            self._start(time.monotonic() + self._timeout)
        elif self.state == "probing":
            self._probe()
        elif self.state == "back":
            self._carry()
        else:
            self.chore_at = self._monotonic() + REMINDER_INTERVAL
            self._spool.open()  # it was in trouble
            if not self._spool.trouble:
                self._settle()

    def _start(self, deadline: float) -> None:
        """Find out who decides. Until then nobody does: in an empty spool the first requests after
        each restart would have a quota of their own."""
        self._spool.open()
        try:
            with self._in_time(deadline):
                self.open(deadline - SPOOL_TIME)
        except Unavailable as error:
            if self._spool.trouble or not self._spools:
                raise
            self._spool.log.begin(error)
            self._probe_soon()
        else:
            self._settle()

    def _settle(self) -> None:
        """The store can be used; so can the spool, unless it is in trouble."""
        rows = [] if self._spool.trouble else self._spool.rest()
        try:
            self._carrier.check_home(rows, self._home)
        except OtherDatabase as error:
            self._spool.lose(error)
        if rows and not self._spool.trouble:
            self._accounts.forget_all()
            self._spool.log.begin(None)
            self.state, self.chore_at = "back", 0.0
        else:
            self._count_in_store()

    def _go_on_in_spool(self, error: StoreError, batch: Batch | None = None) -> None:
        """The store has failed. Raises Unavailable when the spool does, too."""
        doubtful: Sequence[Entry] = ()
        if batch:
            self._accounts.take_back(batch.entries)
            doubtful = batch.entries if batch.is_uncertain else ()
        self._accounts.forget_all()
        self._spool.log.begin(error)
        self._probe_soon()
        self._spool.begin(self._clock, self._accounts, doubtful)

    def _probe_soon(self) -> None:
        self.state = "probing"
        self.chore_at = self._monotonic() + ATTEMPT_INTERVAL

    def _probe(self) -> None:
        self._spool.log.remind()
        attempt = self._attempt
        if attempt is None:
            attempt = self._attempt = Attempt(self._carrier, self._spool.rest(), self._timeout)
            attempt.start()
        self.chore_at = self._monotonic() + ATTEMPT_WATCH
        if not attempt.is_over:
            return
        self._attempt = None
        if isinstance(attempt.error, OtherDatabase):
            self._spool.lose(attempt.error)
            self._count_in_store()
        elif attempt.error:
            self._spool.log.failed(attempt.error)
            self._probe_soon()
        else:
            self._home, self._spool.log.reason = attempt.home, ""
            self._spool.log.carry(self._spool.file.carried(attempt.rows))
            self.state, self.chore_at = "back", 0.0

    def _carry(self) -> None:
        """Carry a batch over, after each batch of charges, and of more sends: so the spool gets
        empty however busy it is, and nobody waits for long."""
        rows = self._spool.rest(2 * self._charged)
        if not rows:
            self._count_in_store()
            return
        try:
            with self._in_time(time.monotonic() + self._timeout):
                self._carrier.carry(rows)
        except StoreError as error:
            self._spool.log.failed(error, has_stopped=True)
            self._probe_soon()
        else:
            self._spool.log.carry(self._spool.file.carried(rows))

    def _count_in_store(self) -> None:
        """Nothing is left in the spool, or it cannot be used. What it remembers of its accounts is
        remembered for the next outage."""
        self.accounts.take_over(self._spool.ledger.accounts)
        self.state = "up"
        if self._spool.trouble:
            self._spool.forget()
        else:
            self._spool.cut()
            self._spool.join(self._home)
        self._spool.log.end(is_all=not self._spool.trouble)
        self._plan_chore()


class LocalLedger(Changeover):
    """A ledger that goes on in a spool of its own while its store cannot be used."""

    def charge(
        self,
        charges: Sequence[Charge],
        deadline: float,
        is_wanted: Callable[[int], bool] = lambda _: True,
    ) -> list[Verdict]:
        if self.state == "starting":
            self._start(deadline)
        if self.state == "up":
            if not self._spools or self._spool.trouble:
                return super().charge(charges, deadline, is_wanted)
            batch = Batch(charges, deadline - SPOOL_TIME, is_wanted)
            try:
                with self._in_time(deadline):
                    self._charge(batch)
                return batch.verdicts
            except Unavailable as error:
                self._go_on_in_spool(error, batch)
            if batch.is_uncertain:
                return batch.verdicts
        self._charged = len(charges)
        return self._spool.charge(charges, deadline, is_wanted)

    def close(self) -> None:
        self._accounts.forget_all()
        if self.state != "probing":
            self._store.close()
        if held := self._spool.file.held:
            log.warning("%s holds %d sends that the database lacks", self._spool.file, held)
        self._spool.ledger.close()

    def recover(self, deadline: float) -> float:
        if self.state != "up":
            self.chore()
        elif self._spools and not self._spool.trouble:
            self._go_on_in_spool(TimedOut("timed out: no decision within _dbtimeout"))
        if self.state == "up":
            return super().recover(deadline)
        return self._spool.recover(deadline)

    def _try(self, batch: Batch) -> None:
        if batch.is_uncertain:
            self._check_heads(batch)
        super()._try(batch)

    def _check_heads(self, batch: Batch) -> None:
        """Raise Unavailable if the store lacks what the entries of a batch in doubt follow: another
        server has taken over. The spool carries them over, to what is there."""
        first = batch.first_entries
        newest = self._store.newest_entries(dict.fromkeys(first, 1), take_locks=False)
        heads = {entry.account: entry.seq for entry in newest}
        for account, entry in first.items():
            if heads.get(account, 0) < entry.seq - 1:
                raise Unavailable(f"{self._store} lacks the last sends of {account}")

    def _find_locked(self, batch: Batch) -> None:
        """As Ledger's. But while commits stand still, as in a Galera cluster that a node joins, so
        do the locks of other daemons: then it is the store that has failed."""
        with self._store.hurry(math.inf), contextlib.suppress(AccountsLocked):  # it takes little
            super()._find_locked(batch)
            return
        with contextlib.suppress(Conflict):
            self._store.probe()
        with self._store.hurry(math.inf):
            super()._find_locked(batch)

    def still_locked(self, entries: Sequence[Entry]) -> list[Entry]:
        with contextlib.suppress(Conflict), self._as_chore():
            return super().still_locked(entries)
        return []

    def wait_for_locks(self, wait: bool) -> None:
        with contextlib.suppress(Conflict), self._as_chore():
            super().wait_for_locks(wait)

    def purge(self) -> bool:
        with self._as_chore():
            return super().purge()

    def note_refusals(self, refused: Sequence[Refused], author: str) -> set[str]:
        with self._while_up():
            return super().note_refusals(refused, author)

    def open_if_lost(self) -> None:
        with contextlib.suppress(Conflict), self._as_chore():
            super().open_if_lost()

    @contextlib.contextmanager
    def _while_up(self) -> Iterator[None]:
        """For what may be put off, by a Conflict, until the store is there."""
        if self.state != "up":
            raise Conflict("the database is unavailable")
        with self._in_time(time.monotonic() + self._timeout):
            yield

    @contextlib.contextmanager
    def _as_chore(self) -> Iterator[None]:
        """The same; a store that fails is an outage, as for a charge."""
        try:
            with self._while_up():
                yield
        except Unavailable as error:
            if not self._spools or self._spool.trouble:
                raise
            self._go_on_in_spool(error)
            raise Conflict(str(error)) from None

    def status(self) -> dict[str, object]:
        decides = super().status() if self.state == "up" else self._spool.ledger.status()
        return {**decides, "store": self.state, **self._spool.status()}


# --- Incidents ------------------------------------------------------------------------------------

NOTE_INTERVAL = 1.0  # seconds between two notes of what was refused
COUNT_INTERVAL = 60.0  # seconds after which an incident is counted up
NOTED_AT_ONCE = 50  # accounts: some milliseconds in which all others wait
MAX_AUTHOR = 64  # characters; the column's width
MAX_NOTE = 400  # characters; the column's width
NOTE_PAUSE = 60.0  # seconds when a lock was met: while it waits, all others do


class Tally:
    """What was refused to one account, or was over a quota that is not enforced."""

    __slots__ = ("_counter", "_noted", "_reads", "last", "next_note_at")

    def __init__(self) -> None:
        self.last: tuple[Request, Verdict] | None = None
        self.next_note_at = 0.0  # monotonic seconds
        self._counter = itertools.count()  # next() is one step: many threads count, without a lock
        self._reads = 0  # which are counted, too
        self._noted = 0

    def count(self, request: Request, verdict: Verdict) -> None:
        self.last = request, verdict
        next(self._counter)

    def unnoted(self) -> int:
        self._reads += 1
        return next(self._counter) - self._reads + 1 - self._noted

    def note(self, number: int, next_note_at: float) -> None:
        self._noted += number
        self.next_note_at = next_note_at


class Incidents:
    """Counts what is refused, in any thread, and notes it in the table `events`, in the
    committer's."""

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}  # by account
        self.next_note_at = 0.0  # monotonic seconds
        self.begun = 0
        self._host = socket.gethostname()[:MAX_AUTHOR]
        self._complaints = RateLimit(REMINDER_INTERVAL)

    def count(self, login: str, request: Request, verdict: Verdict) -> None:
        window = verdict.window
        is_pool = window.rule == "*" or window.rule.startswith("@")
        account = POOL_PREFIX + window.rule if is_pool else login
        tally = self._tallies.get(account)
        if tally is None:
            if len(self._tallies) >= CACHED_ACCOUNTS:
                return
            tally = self._tallies.setdefault(account, Tally())
        tally.count(request, verdict)

    def due(self, now: float) -> list[Refused]:
        """What is to be noted at this time, in monotonic seconds; forgets who has stopped."""
        found: list[Refused] = []
        for account, tally in list(self._tallies.items()):
            if tally.next_note_at > now:
                continue
            number = tally.unnoted()
            if number and tally.last and len(found) < NOTED_AT_ONCE:
                found.append(Refused(account, number, incident_text(*tally.last)))
            elif not number:
                del self._tallies[account]
        return found

    def note(self, ledger: Ledger) -> None:
        """Note what is due; what cannot be noted is tried again. Raises Unavailable."""
        now = time.monotonic()
        self.next_note_at = now + NOTE_INTERVAL
        refused = self.due(now)
        if not refused:
            return
        try:
            begun = ledger.note_refusals(refused, self._host)
        except StoreError as error:
            is_locked = isinstance(error, LockTimeout)
            self.next_note_at += NOTE_PAUSE if is_locked else 0
            was_other_first = isinstance(error, Conflict) and not is_locked
            if not was_other_first and self._complaints.allows():
                log.error("incidents (table events) cannot be noted: %s", error)
            ledger.open_if_lost()
            return
        self.have_noted(refused, now)
        self.begun += len(begun)
        for one in refused:
            if one.account in begun:
                log.warning("incident: account=%s, %s", log_value(one.account), one.line)

    def have_noted(self, refused: Iterable[Refused], now: float) -> None:
        for account, number, _ in refused:
            self._tallies[account].note(number, now + COUNT_INTERVAL)


def incident_text(request: Request, verdict: Verdict) -> str:
    address, sender = map(log_value, (request.client_address, request.sender))
    text = f"{verdict.usage}, client_address={address}, sender={sender}"
    return valid_utf8(UNPRINTABLE.sub("?", text))[:MAX_NOTE]


# --- Committer ------------------------------------------------------------------------------------

MAX_BATCH = 500  # charges in one INSERT; SQLite takes 32,766 variables, eight for each and its pool
WATCH_INTERVAL = 0.1  # seconds between two looks whether somebody waits for too long
RECONNECT_INTERVAL = 1.0  # seconds between two attempts to reach a store that is down
LOCKED_ACCOUNT_RETRY = 1.0  # seconds that an account is left alone which another session has locked
PURGE_PAUSE = 0.025  # seconds between two bites of a purge
PURGE_PUT_OFF = 60.0  # seconds when it meets a lock: while it waits, all others do
PURGE_INTERVAL = 3600.0  # seconds between two purges


class PendingCharge:
    """A charge that somebody waits for. The first answer counts, whichever thread gives it."""

    __slots__ = ("_claim", "_decided", "charge", "deadline", "is_answered")

    def __init__(
        self, charge: Charge, deadline: float, decided: Callable[[Verdict | None], None]
    ) -> None:
        self.charge = charge
        self.deadline = deadline  # monotonic seconds
        self._decided = decided
        self._claim = threading.Lock()  # taken for good by the one who answers
        self.is_answered: Callable[[], bool] = self._claim.locked

    def answer(self, verdict: Verdict | None) -> bool:
        """Call `decided`, with None for the fallback; false if it has been answered already."""
        if not self._claim.acquire(blocking=False):
            return False
        self._decided(verdict)
        return True

    def give_up(self) -> bool:
        """Nobody waits for it any more; false if it has been answered, or just is."""
        return self._claim.acquire(blocking=False)


class Refusals:
    """The refusals that may be repeated from memory: a stolen account asks thousands of times, and
    for a second its refusals are all the same."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Charge, Verdict]] = {}  # by account

    def remember(self, charge: Charge, refusal: Verdict) -> None:
        if len(self._found) >= CACHED_ACCOUNTS:
            self._found.clear()
        self._found[charge.account] = charge, refusal

    def find(self, charge: Charge) -> Verdict | None:
        """The refusal of an equal charge, while it holds."""
        if found := self._found.get(charge.account):
            refused, refusal = found
            if charge.debits == refused.debits and time.monotonic() < refusal.repeatable_until:
                return refusal
        return None


class Outage:
    """Whether the store can be used, as far as is known, and what the log says of it.

    state    charges                   ends when
    up       are decided               the store fails, or a charge is not decided in time: down
    down     get the fallback at once  the store can be opened, tried every RECONNECT_INTERVAL: up;
                                       the log says so when the first charge has been accepted

    begin() is called by the committer and the watchdog, close() by the main thread, the others by
    the committer alone. The watchdog sees only that the time is up: the committer may know why.
    """

    def __init__(self, consequence: str) -> None:
        self.lasts = False
        self.began_at = 0.0  # Unix time, while it lasts
        self.retry_at = 0.0  # monotonic seconds
        self._is_final = False
        self.consequence = consequence  # for the log: what senders get
        self._reason = ""
        self._is_logged = self._is_cause_logged = False
        self._next_reminder = 0.0  # monotonic seconds
        self._lock = threading.Lock()

    def begin(self, error: StoreError, *, is_cause: bool = True) -> None:
        """The store has failed; what is known to be the cause is logged once more."""
        with self._lock:
            if not self.lasts:
                self.began_at = time.time()
            self.lasts = True
            self.retry_at = time.monotonic() + RECONNECT_INTERVAL
            self._reason = str(error)
            if is_cause and not self._is_cause_logged:
                self._next_reminder = 0.0
                self._is_cause_logged = True
        self.remind()

    def remind(self) -> None:
        """Say in the log that it lasts: at once, and then every minute."""
        now = time.monotonic()
        with self._lock:
            if not self._reason or now < self._next_reminder:
                return
            self._next_reminder = now + REMINDER_INTERVAL
            self._is_logged = True
            text = "database unavailable, %s (_onfailure) until it is back: %s"
            log.error(text, self.consequence, self._reason)

    def try_again(self) -> None:
        """The store can be used."""
        with self._lock:
            self._reason = ""
            self.lasts = self._is_final

    def close(self) -> None:
        """The daemon ends: from now on there is the fallback only, and nothing to log."""
        with self._lock:
            self.lasts = self._is_final = True

    def status(self) -> dict[str, object]:
        """While it lasts."""
        return {"store": "down", "down_since": round(self.began_at)} if self.lasts else {}

    def end(self) -> None:
        """A charge has been accepted, and written."""
        if self._is_logged and not self.lasts:
            self._is_logged = self._is_cause_logged = False
            self._next_reminder = 0.0
            log.warning("sends are counted again")


class LockedAccounts:
    """The accounts that another session of the database has locked. Charges that need them get the
    fallback at once; all others are still counted. Meanwhile no statement waits for a lock."""

    def __init__(self, ledger: Ledger, consequence: str) -> None:
        self._ledger = ledger
        self._consequence = consequence  # as in Outage
        self._entries: dict[str, Entry] = {}  # by account; one that cannot be appended
        self._next_recheck = 0.0  # monotonic seconds

    def add(self, entries: Iterable[Entry]) -> None:
        text = "account %s: rows locked by another database session, %s (_onfailure)"
        for entry in entries:
            self._entries[entry.account] = entry
            log.warning(text, entry.account, self._consequence)
        self._next_recheck = time.monotonic() + LOCKED_ACCOUNT_RETRY
        self._ledger.wait_for_locks(False)

    def recheck(self) -> None:
        """Find out whether they still are, if it is time."""
        began = time.monotonic()
        if not self._entries or began < self._next_recheck:
            return
        locked = self._ledger.still_locked(list(self._entries.values()))
        for account in self._entries.keys() - {entry.account for entry in locked}:
            log.warning("account %s: no longer locked, sends are counted again", account)
        self._entries = {entry.account: entry for entry in locked}
        self._ledger.wait_for_locks(not locked)
        now = time.monotonic()  # in MySQL it takes tenths of a second, in which all others wait
        self._next_recheck = now + max(LOCKED_ACCOUNT_RETRY, 5 * (now - began))

    def __len__(self) -> int:
        return len(self._entries)

    def are_needed_for(self, charge: Charge) -> bool:
        return any(debit.account in self._entries for debit in charge.debits)


class Watchdog(threading.Thread):
    """Gives the fallback to each charge that is not answered by its deadline, or when the store is
    down, whatever the committer is doing. So nobody waits longer than _dbtimeout."""

    def __init__(self, outage: Outage) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._outage = outage
        self._charges: set[PendingCharge] = set()
        self._stopped = threading.Event()
        self._bugs = RateLimit(1.0)

    def watch(self, pending: PendingCharge) -> None:
        self._charges.add(pending)

    def forget(self, answered: Iterable[PendingCharge]) -> None:
        """Let go of them now: memory that is used again at once is fast."""
        self._charges.difference_update(answered)

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.wait(WATCH_INTERVAL):
            try:
                self._answer_overdue()
                self._outage.remind()
            except Exception:  # as in Committer.run()
                if self._bugs.allows():
                    log.exception("the watchdog met an error")

    def _answer_overdue(self) -> None:
        now = time.monotonic()
        for pending in list(self._charges):
            is_overdue = pending.deadline <= now
            if pending.is_answered() or is_overdue or self._outage.lasts:
                self._charges.discard(pending)
                if pending.answer(None) and is_overdue:
                    timed_out = TimedOut("timed out: no decision within _dbtimeout")
                    self._outage.begin(timed_out, is_cause=False)


class Committer(threading.Thread):
    """The only thread that uses the ledger. What arrives while it charges a batch is the next one,
    which waits for nothing else: the busier it is, the larger the batches.

    state      it is                                      then
    idle       waiting for a charge, a second at most     gathering, or a chore
    gathering  taking what is in the queue                charging; the fallback in an outage
    charging   in the ledger, the only state that may     idle; a StoreError begins an outage
               take long
    chore      noting incidents, carrying over what a     idle
               spool holds, purging, or reconnecting

    Other threads only submit(), which uses the queue, the watchdog, and what Outage and Refusals
    say; and the main thread ends it.
    """

    def __init__(self, ledger: Ledger, timeout: float, outage: Outage) -> None:
        super().__init__(name="committer", daemon=True)
        self._ledger = ledger
        self._timeout = timeout  # seconds until a charge gets the fallback
        self._outage = outage
        self._watchdog = Watchdog(outage)
        self._refusals = Refusals()
        self._queue: queue.SimpleQueue[PendingCharge | None] = queue.SimpleQueue()
        self._locked_accounts = LockedAccounts(ledger, outage.consequence)
        self._next_purge_at = 0.0  # monotonic seconds
        self.incidents = Incidents()
        self._bugs = RateLimit(1.0)
        self._stopping = False

    # For other threads.

    def start(self) -> None:
        self._watchdog.start()
        super().start()

    def submit(
        self, charge: Charge, decided: Callable[[Verdict | None], None]
    ) -> PendingCharge | None:
        """Have a charge decided. `decided` is called once, within the time-out, by this thread or
        another: with the verdict, or with None for the fallback. It must not wait or raise. Returns
        None if it has been called already."""
        if self._outage.lasts:
            decided(None)
            return None
        if refusal := self._refusals.find(charge):
            decided(refusal)
            return None
        pending = PendingCharge(charge, time.monotonic() + self._timeout, decided)
        self._watchdog.watch(pending)
        self._queue.put(pending)
        return pending

    def status(self) -> dict[str, object]:
        is_down = self._outage.status()
        return {**self._ledger.status(), **is_down, "incidents": self.incidents.begun}

    def give_up(self) -> None:
        """Let everybody who still waits have the fallback, within WATCH_INTERVAL."""
        self._ledger.stopping = True
        self._outage.close()

    def stop(self, timeout: float) -> None:
        """Decide what has been submitted and end, within `timeout` seconds."""
        self._queue.put(None)
        self.join(timeout)
        self._watchdog.stop()

    # The thread itself.

    def run(self) -> None:
        while not self._stopping:
            batch = self._gather()
            try:
                self._charge_batch(batch)
                self._do_chore()
            except StoreError as error:
                self._outage.begin(error)
                self._fall_back(batch)  # what has no answer yet
            except Exception:  # no bug may end the thread that all wait for
                if self._bugs.allows():
                    log.exception("an error in saslquota itself, charges get _onfailure")
                with contextlib.suppress(Exception):  # it may have left something half done
                    self._ledger.close()
                self._fall_back(batch)
            self._watchdog.forget(batch)
        self._ledger.close()

    def _gather(self) -> list[PendingCharge]:
        """Wait for a charge, until the next chore at most; take what else is there."""
        batch: list[PendingCharge] = []
        due = self._next_purge_at, self._ledger.chore_at
        chore_at = self._outage.retry_at if self._outage.lasts else min(due)
        wait = max(0.0, min(RECONNECT_INTERVAL, chore_at - time.monotonic()))
        with contextlib.suppress(queue.Empty):
            while len(batch) < MAX_BATCH:
                pending = self._queue.get(timeout=wait) if not batch else self._queue.get_nowait()
                if pending is None:
                    self._stopping = True
                    break
                batch.append(pending)
        return batch

    @staticmethod
    def _fall_back(batch: Iterable[PendingCharge]) -> None:
        for pending in batch:
            pending.answer(None)

    def _charge_batch(self, batch: Sequence[PendingCharge]) -> None:
        """Charge a batch but for what needs a locked account. Raises whatever the ledger does."""
        if self._outage.lasts:
            self._fall_back(batch)
            return
        self._locked_accounts.recheck()
        while batch := self._without_locked(batch):
            try:
                self._charge(batch)
                return
            except AccountsLocked as error:
                self._locked_accounts.add(error.entries)

    def _charge(self, batch: Sequence[PendingCharge]) -> None:
        deadline = batch[0].deadline  # all share one INSERT, and this one has waited longest
        charges = [pending.charge for pending in batch]
        verdicts = self._ledger.charge(charges, deadline, lambda n: not batch[n].is_answered())
        for pending, verdict in zip(batch, verdicts, strict=True):
            if verdict.repeatable_until:
                self._refusals.remember(pending.charge, verdict)
            pending.answer(verdict)
        if time.monotonic() > deadline:
            raise TimedOut("timed out: a batch took longer than _dbtimeout")
        if any(verdict.accepted for verdict in verdicts):  # it could be written
            self._outage.end()

    def _without_locked(self, batch: Sequence[PendingCharge]) -> Sequence[PendingCharge]:
        """What somebody still waits for; the fallback for what needs a locked account."""
        waiting = [pending for pending in batch if not pending.is_answered()]
        if not self._locked_accounts:
            return waiting
        self._fall_back(p for p in waiting if self._locked_accounts.are_needed_for(p.charge))
        return [pending for pending in waiting if not pending.is_answered()]

    def _do_chore(self) -> None:
        """Do the one that is due, if any. Raises Unavailable."""
        now = time.monotonic()
        if self._outage.lasts:
            if now >= self._outage.retry_at and not self._ledger.stopping:
                self._reconnect()
        elif now >= self.incidents.next_note_at:
            self.incidents.note(self._ledger)
        elif now >= self._ledger.chore_at:
            self._ledger.chore()
        elif now >= self._next_purge_at:
            self._next_purge_at = now + PURGE_PUT_OFF
            try:
                pause = PURGE_PAUSE if self._ledger.purge() else PURGE_INTERVAL
            except Conflict as error:
                log.debug("purge put off: %s", error)
                pause = PURGE_PUT_OFF
            self._next_purge_at = time.monotonic() + pause

    def _reconnect(self) -> None:
        """Open the store. One that takes too long for a write is still down."""
        self._outage.retry_at = time.monotonic() + RECONNECT_INTERVAL
        took = self._ledger.recover(time.monotonic() + self._timeout)
        if took > self._timeout:
            raise TimedOut(f"timed out: a write takes {took:.1f} s")
        self._outage.try_again()


# --- Policy ---------------------------------------------------------------------------------------

MAX_INSTANCE = 64  # characters; the column's width
OUTCOMES = "accepted", "refused", "held", "not_enforced", "fallback", "no_login", "uncounted"


class Answer(NamedTuple):
    """The action for Postfix, and why."""

    action: str
    outcome: str  # of OUTCOMES
    rule: Rule | None = None
    verdict: Verdict | None = None
    reason: str = ""  # why nothing was counted
    msg: str = ""  # of the window that the charge is over
    login: str = ""  # the account that is over it, unless that is a pool's


class Message:
    """What a connection remembers of the message that it asks about: with "count": "messages" it is
    charged once, however often Postfix asks."""

    def __init__(self) -> None:
        self.login = ""
        self.rules: tuple[Rule, ...] = ()
        self._instance = ""
        self.is_charged = False  # to the accounts that count messages
        self.is_refused = False  # by one of them
        self.answer: Answer | None = None  # the last one

    def begin(self, login: str, instance: str, rules: tuple[Rule, ...]) -> None:
        """Forget the last message if this is another one, or cannot be told from another one: an
        empty instance (SMTPD_POLICY_README: before MAIL FROM)."""
        last = self.login, self._instance, self.rules
        if not instance or last != (login, instance, rules):
            self.login, self._instance, self.rules = login, instance, rules
            self.is_charged, self.is_refused, self.answer = False, False, None

    def remember(self, answer: Answer) -> None:
        """Keep what has been decided."""
        self.answer, verdict = answer, answer.verdict
        if verdict and verdict.accepted:
            self.is_charged = True
        elif verdict:
            self.is_refused = verdict.window.count == "messages"


class Policy:
    """Decides what is charged for a request, and what is answered. It knows no threads and no
    store: what lies between charge() and answer() is the server's."""

    COUNTED = frozenset({"MAIL", "RCPT", "DATA", "END-OF-MESSAGE"})
    TOO_EARLY = frozenset({"CONNECT", "EHLO", "HELO"})  # nobody can have logged in
    EXPECTED = COUNTED | {"VRFY", "ETRN"}  # where Postfix asks that is set up well
    UNAVAILABLE = "quota service unavailable, try again later"

    def __init__(self, config: Config, rules: RulesFile) -> None:
        self._rules = rules
        self._accept = config.okaction
        # The same logins come again and again.
        self._account = functools.lru_cache(CACHED_ACCOUNTS)(
            lambda login: config.account(valid_utf8(login))
        )
        self._stores_address = config.storeaddress
        self._nosasl = "REJECT authentication required" if config.nosasl == "REJECT" else "DUNNO"
        passes = config.onfailure == "OK"
        self._fallback = "OK" if passes else f"DEFER_IF_PERMIT {self.UNAVAILABLE}"
        # For the log: what the fallback does.
        self.consequence = (
            "mail passes uncounted" if passes else f'senders get "450 {self.UNAVAILABLE}"'
        )

    def status(self) -> dict[str, object]:
        rules = self._rules
        return {
            "rules_read_at": round(rules.read_at),
            "rules_valid": "yes" if rules.is_valid else "no",
        }

    def charge(self, request: Request, message: Message) -> Charge | Answer:
        """What is to be charged for a request; or the answer, if nothing is. `message` is what the
        connection remembers."""
        # One character more than fits tells that it is too long.
        login = self._account(request.sasl_username[: MAX_ACCOUNT + 1])
        if answer := self._uncounted(request, login):
            return answer
        instance = valid_utf8(request.instance)[:MAX_INSTANCE]
        rules = self._rules.rules.applying_to(login)
        message.begin(login, instance, rules)
        debits = [
            Debit(
                POOL_PREFIX + rule.key if rule.is_pool else login,
                1 if rule.per_message else request.recipients,
                rule.windows,
            )
            for rule in rules
            if not (message.is_charged and rule.per_message)
        ]
        if message.answer and (message.is_refused or not debits):
            return message.answer
        sender = request.sender
        if sender in (request.sasl_username, login):
            sender = ""
        elif sender:
            sender = valid_utf8(sender)[:MAX_ACCOUNT]
        address = packed_address(request.client_address) if self._stores_address else b""
        return Charge(instance, tuple(debits), address, sender)

    def _uncounted(self, request: Request, login: str) -> Answer | None:
        """The answer to a request that no rule applies to."""
        if request.protocol_state not in self.COUNTED:
            reason = f"asked at {request.protocol_state}"
            return Answer("DUNNO", "uncounted", reason=reason)
        if not login:
            return Answer(self._nosasl, "no_login", reason="no sasl_username")
        if len(login) > MAX_ACCOUNT:
            reason = "sasl_username is too long"
            return Answer("REJECT login name too long", "uncounted", reason=reason)
        return None

    def answer(self, request: Request, verdict: Verdict | None, message: Message) -> Answer:
        """The answer to a verdict upon what charge() returned; None is the fallback."""
        rule = message.rules[0]
        if verdict is None:
            return Answer(self._fallback, "fallback", rule, reason="the store did not answer")
        if not verdict.over_quota:
            return Answer(self._accept, "accepted", rule, verdict)
        msg = refusal_text(message.login, verdict, request.recipients)
        outcome, action = "not_enforced", self._accept
        if verdict.window.enforce:
            outcome = "held" if verdict.accepted else "refused"
            action = f"{verdict.window.action} {msg}"
        return Answer(action, outcome, rule, verdict, msg=msg, login=message.login)


@functools.lru_cache(1000)  # Postfix asks for each recipient
def packed_address(text: str) -> bytes:
    """An IP address in network order; b"" if the text is none."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        return b""


def refusal_text(login: str, verdict: Verdict, recipients: int) -> str:
    """The window's msg with its placeholders filled in. It is in the log, too, as its last field,
    to which a login adds none."""
    window = verdict.window
    if "{" not in window.msg and "}" not in window.msg:
        return window.msg
    values = {
        "sasl_username": log_value(UNPRINTABLE.sub("?", login)),
        "rule": window.rule,
        "used": verdict.used,
        "msgquota": window.limit_text,
        "period": format_time(window.period),
        "seconds": window.period,
        "retry_after": format_wait((verdict.retry_at or 0.0) - time.monotonic()),
        "recipients": recipients,
    }
    return window.msg.format_map(values)


# --- Server ---------------------------------------------------------------------------------------

RECV_BYTES = 4096  # at a time; each waiting connection has that much at hand
FIRST_REQUEST = 3600.0  # seconds after the start in which Postfix should have asked
SETTLING = 3.0  # seconds in which Postfix gets from HELO to where a request is counted
MOMENT = 1.0  # seconds in which Postfix asks twice, if it does
REPLY_CHECK = 1.0  # seconds of silence until a connection looks whether its reply was taken
DECISION_SECONDS = (0.001, 0.005, 0.025, 0.1, 1.0)  # a histogram's bounds
SILENCE = 0.25  # seconds; Postfix connects to ask, and does so within milliseconds


class SetupHints:
    """Tells in the log what Postfix's requests, or their absence, say of its set-up."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        # Monotonic seconds.
        self._started = monotonic()
        self._asked_at = self._counted_at = self._misplaced_at = -math.inf
        self._asked: tuple[str, str, str] | None = None  # the last that was accepted
        self._misplaced = ""  # what was asked where nothing can be counted, until it is judged
        self._was_asked_twice = self._is_late_told = False
        self.first_request_at = self.last_request_at = 0.0  # Unix time; 0 if there was none
        self._warnings = RateLimit(REMINDER_INTERVAL)

    def note(self, request: Request, answer: Answer, last: Request | None) -> None:
        """A request has been answered; `last` is the one that was accepted before it on its
        connection."""
        self.last_request_at = time.time()
        if not self.first_request_at:
            self.first_request_at = self.last_request_at
            text = "first request from Postfix: %s, submission login %s"
            log.info(text, request.protocol_state, request.sasl_username or "(none)")
        if answer.verdict:
            self._counted_at = self._monotonic()
            if not self._was_asked_twice and answer.verdict.accepted:
                self._look_for_duplicate(request, last)
        elif request.protocol_state not in Policy.EXPECTED and not self._misplaced:
            is_early = request.protocol_state in Policy.TOO_EARLY
            self._misplaced = answer.reason + ("; see smtpd_delay_reject" if is_early else "")
            self._misplaced_at = self._monotonic()

    def _look_for_duplicate(self, request: Request, last: Request | None) -> None:
        asked = identity(request)
        is_again = asked == self._asked and self._counted_at - self._asked_at < MOMENT
        self._asked, self._asked_at = asked, self._counted_at
        if last and last.instance == request.instance:
            is_again = is_again or identity(last) == asked
        if is_again and request.instance:
            self._was_asked_twice = True
            text = "asked twice for each recipient, see docs/install.md: %s, rcpt=%s, instance=%s"
            log.warning(text, request.protocol_state, request.recipient, request.instance)

    def remind(self) -> None:
        """Say what has not come. To be called every second or so."""
        now = self._monotonic()
        was_asked = self.first_request_at or self._is_late_told
        if not was_asked and now - self._started >= FIRST_REQUEST:
            self._is_late_told = True
            log.warning("no request yet: does Postfix ask? see docs/install.md")
        if self._misplaced and now - self._misplaced_at >= SETTLING:
            is_counted = now - self._counted_at <= REMINDER_INTERVAL
            if not is_counted and self._warnings.allows():
                log.warning("nothing is counted: %s", self._misplaced)
            self._misplaced = ""


def identity(request: Request) -> tuple[str, str, str]:
    """What only one request of a message has."""
    return request.instance, request.recipient, request.protocol_state


class Counters:
    """What a connection has been answered: one reply at a time, so this needs no lock."""

    __slots__ = ("outcomes", "recipients", "seconds", "took")

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.recipients = 0  # accepted
        self.seconds = 0.0  # from request to reply, in all
        self.took = [0] * (len(DECISION_SECONDS) + 1)  # how many up to each, and longer

    def count(self, request: Request, answer: Answer, seconds: float) -> None:
        self.outcomes[answer.outcome] += 1
        if answer.verdict and answer.verdict.accepted:
            self.recipients += request.recipients
        self.seconds += seconds
        self.took[bisect.bisect_left(DECISION_SECONDS, seconds)] += 1

    def add(self, other: Counters) -> None:
        for outcome, number in other.outcomes.items():
            self.outcomes[outcome] += number
        self.recipients += other.recipients
        self.seconds += other.seconds
        self.took = [mine + more for mine, more in zip(self.took, other.took, strict=True)]

    def status(self) -> dict[str, object]:
        bounds = [*map("{:g}".format, DECISION_SECONDS), "inf"]
        sums = itertools.accumulate(self.took)
        return {
            **{f"requests_{outcome}": number for outcome, number in self.outcomes.items()},
            "recipients": self.recipients,
            **{f"decision_seconds_le_{b}": n for b, n in zip(bounds, sums, strict=True)},
            "decision_seconds_sum": f"{self.seconds:.6f}",
        }


class PolicyHandler(socketserver.BaseRequestHandler):
    """One connection, in a thread of its own, and the order of the steps: policy.charge(),
    committer.submit(), policy.answer(), reply. The thread that has the verdict, as a rule the
    committer, sends the reply: this one can wait for the next request already, and waking it would
    cost a lot (bench/README.md).

    state                           bounded by                         closed to make room
    connected, has not asked yet    _bindtimeout from the connect      first, after SILENCE
    between requests                nothing: Postfix keeps it          the one unused longest
    receiving a request             _bindtimeout from its first byte   no
    deciding                        _dbtimeout, by the watchdog        no
    reply not taken                 _bindtimeout                       no

    `_replying` is locked while it is deciding or the reply is being sent; then `_unsent` holds what
    the client did not take at once, and is this thread's to send.
    """

    request: socket.socket
    server: PolicyServer
    numbers = itertools.count(1)

    # In the connection's thread.

    def setup(self) -> None:
        self.number = next(self.numbers)
        self._started = self._last_used = self._asked_at = time.monotonic()
        self._deadline: float | None = self._started + self.server.client_timeout
        self._message = Message()
        self._last_accepted: Request | None = None
        self._pending: PendingCharge | None = None  # the last request's, until its reply was seen
        self._replying = threading.Lock()
        self._unsent = b""
        self._bug: Exception | None = None  # met in another thread
        self._recv_timeout = 0.0  # seconds, 0 for ever
        self.between_requests, self.has_asked = True, False
        self.counters = Counters()
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._set_timeout(socket.SO_SNDTIMEO, self.server.client_timeout)
        self.server.handlers.add(self)
        log.debug("[%d] thread started", self.number)

    def handle(self) -> None:
        try:
            try:
                self._read_requests()
            except ProtocolError as error:
                log.warning("[%d] malformed input, connection closed: %s", self.number, error)
            self._await_reply()
        except (TimeoutError, BlockingIOError):
            text = (
                "[%d] connection closed: no complete request, or reply not taken,"
                " within _bindtimeout (%d s)"
            )
            log.info(text, self.number, self.server.client_timeout)
        except OSError as error:
            log.info("[%d] connection lost: %s", self.number, error.strerror)

    def finish(self) -> None:
        if self._pending and not self._pending.give_up():
            self._replying.acquire()  # or the reply goes to whatever gets this descriptor next
        self.server.forget(self)
        log.debug("[%d] thread stopped : (%.4f)", self.number, time.monotonic() - self._started)

    def _read_requests(self) -> None:
        stream = RequestStream(self._receive)
        while request := stream.read_request():
            self._await_reply()
            self._deadline = None
            self._submit(request)
            if stream.has_more:  # a client in a hurry gives the others their turn
                time.sleep(0)

    def _submit(self, request: Request) -> None:
        self._replying.acquire()
        self._asked_at, self._pending = time.monotonic(), None
        if request.is_status:
            self._send(self.server.status())
            self._replying.release()
            return
        charge = self.server.policy.charge(request, self._message)
        if isinstance(charge, Answer):
            self._reply(request, charge)
        else:
            decided = functools.partial(self._decided, request)
            self._pending = self.server.committer.submit(charge, decided)

    def _await_reply(self) -> None:
        """Wait until the last reply was taken. Raises OSError, or what another thread has met."""
        with self._replying:
            self._pending = None
        if self._bug:
            raise self._bug
        if self._unsent:
            self.request.sendall(self._unsent)
            self._unsent = b""

    def _receive(self, begun: bool) -> bytes:
        """The next bytes. Between requests it waits for ever: Postfix keeps its connections. The
        first request, and one that has begun, have a deadline. Raises TimeoutError."""
        if begun and self._deadline is None:
            self._await_reply()
            self._deadline = time.monotonic() + self.server.client_timeout
        self.between_requests = not begun
        try:
            while True:
                if self._deadline is not None:
                    timeout = self._deadline - time.monotonic()
                    if timeout <= 0:
                        raise TimeoutError
                else:
                    timeout = REPLY_CHECK if self._pending or self._unsent else 0.0
                if timeout != self._recv_timeout:
                    self._recv_timeout = timeout
                    self._set_timeout(socket.SO_RCVTIMEO, timeout)
                try:
                    return self.request.recv(RECV_BYTES)
                except BlockingIOError:
                    self._await_reply()
        finally:
            self.between_requests = False

    def _set_timeout(self, option: int, seconds: float) -> None:
        """Let the kernel bound how long a call waits, 0 for ever: settimeout() would cost a poll()
        for each."""
        limit = divmod(math.ceil(seconds * 1e6), 1_000_000)
        self.request.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", *limit))

    # In any thread.

    def _decided(self, request: Request, verdict: Verdict | None) -> None:
        """Answer a request whose charge has been decided. Never waits nor raises."""
        try:
            answer = self.server.policy.answer(request, verdict, self._message)
            self._message.remember(answer)
            self._reply(request, answer)
        except Exception as error:  # noqa: BLE001 - no bug may end the thread that all wait for
            self._bug = error  # which is raised in the connection's thread
            self.hang_up(socket.SHUT_RDWR)
            self._replying.release()

    def _reply(self, request: Request, answer: Answer) -> None:
        """Send the reply, as far as the client takes it at once; then log it."""
        self._send(format_reply(answer.action))
        self.counters.count(request, answer, self._last_used - self._asked_at)
        self.server.log_decision(self.number, request, answer, self._last_accepted)
        self._last_accepted = request if answer.verdict and answer.verdict.accepted else None
        self._replying.release()

    def _send(self, reply: bytes) -> None:
        self._unsent = reply[send_at_once(self.request, reply) :]
        self.has_asked = True
        self._last_used = time.monotonic()

    def hang_up(self, how: int) -> None:
        with contextlib.suppress(OSError):
            self.request.shutdown(how)

    def closing_order(self) -> tuple[bool, float, int] | None:
        """Of several connections the least is closed to make room; None: not this one."""
        if not self.between_requests or self._replying.locked() or self._unsent:
            return None
        is_silent = not self.has_asked and time.monotonic() - self._started > SILENCE
        return not is_silent, self._last_used, self.number

    def close_to_make_room(self) -> None:
        """End the connection, but not before a request that has arrived is answered: the thread
        reads what is there, and then the end."""
        log.warning("[%d] closed to make room for another, see _maxconnections", self.number)
        self.between_requests = False
        self.hang_up(socket.SHUT_RD)


def verdict_line(request: Request, answer: Answer) -> str:
    """What the log says of a decision."""
    verdict, msg = answer.verdict, ""
    counted = f"not counted ({answer.reason}), action={answer.action}"
    if verdict:
        counted = (
            f"{verdict.usage}, action={verdict.window.action if verdict.over_quota else 'ACCEPT'}"
        )
        is_trial = verdict.over_quota and not verdict.window.enforce
        counted += " (not enforced)" if is_trial else ""
        msg = f", msg={answer.msg}" if verdict.over_quota else ""
    is_whole = request.protocol_state in WHOLE_MESSAGE
    recipients = f", recipients={request.recipients}" if is_whole else ""
    values = (
        *(request.sasl_username, request.recipient, request.sender),
        *(request.client_address, request.instance),
    )
    # All at once: no value holds the \n that ends an attribute.
    login, rcpt, sender, address, instance = log_value("\n".join(values)).split("\n")
    return (
        f"sasl_username={login}, rcpt={rcpt}, {counted}, sender={sender}, "
        f"client_address={address}, instance={instance}{recipients}{msg}"
    )


class PolicyServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens, and starts a PolicyHandler for each connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, config: Config, policy: Policy, committer: Committer) -> None:
        """Raises ConfigError when the address cannot be listened on."""
        self.policy = policy
        self.committer = committer
        self.client_timeout = config.bindtimeout  # seconds
        self.handlers: set[PolicyHandler] = set()
        self._ended = Counters()  # of connections that have ended
        self._ending = threading.Lock()
        self._started = time.monotonic()
        self.log_verdict: Callable[[int, str], None] = log.log
        self.log_lines_lost: Callable[[], int] = int
        self.hints = SetupHints()
        self._refused_warning = RateLimit(1.0)
        self._allow = config.allow
        where = address_of(config)
        self._path = where.removeprefix("unix:") if where.startswith("unix:") else ""
        self.capacity = min(config.maxconnections, raise_descriptor_limit() - 32)  # connections
        try:
            self._listen(config)
        except OSError as error:
            raise cannot_listen(config, error) from None

    def _listen(self, config: Config) -> None:
        if self._path:
            remove_stale_socket(self._path)
            self.address_family = socket.AF_UNIX
            super().__init__(self._path, PolicyHandler)  # type: ignore[arg-type]
            os.chmod(self._path, 0o660)
            return
        self.address_family, *_, address = listening_address(config)
        super().__init__(address, PolicyHandler)

    def __str__(self) -> str:
        if self._path:
            return f"unix:{self._path}"
        host, port = self.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def log_decision(
        self, number: int, request: Request, answer: Answer, last: Request | None
    ) -> None:
        """Write the owner's lines about a request, in any thread. `last` is what was accepted
        before it on its connection."""
        if log.isEnabledFor(logging.DEBUG):
            log.debug("[%d] end of recv: (%d)", number, request.size)
            if answer.rule:
                log.debug("[%d] quota rule selected: (%s)", number, answer.rule.key)
            log.debug("thread count: %d", len(self.handlers) + 1)
        if verdict := answer.verdict:
            level = logging.WARNING if verdict.over_quota else logging.INFO
            if verdict.over_quota and verdict.window.notifies:
                self.committer.incidents.count(answer.login, request, verdict)
        elif answer.action != "DUNNO":
            level = logging.WARNING
        else:
            level = logging.DEBUG
        self.hints.note(request, answer, last)
        if log.isEnabledFor(level):
            self.log_verdict(level, f"[{number}] {verdict_line(request, answer)}")

    def forget(self, handler: PolicyHandler) -> None:
        """A connection has ended."""
        with self._ending:
            self.handlers.discard(handler)
            self._ended.add(handler.counters)

    def status(self) -> bytes:
        """The reply to request=status: name=value lines, closed by an empty one. Times are Unix
        times, or empty; requests are counted since the start."""
        with self._ending:
            counters = Counters()
            counters.add(self._ended)
            for handler in list(self.handlers):
                counters.add(handler.counters)
        first, last = self.hints.first_request_at, self.hints.last_request_at
        values: dict[str, object] = {
            "version": __version__,
            "uptime": int(time.monotonic() - self._started),
            **self.committer.status(),
            "connections": len(self.handlers),
            **counters.status(),
            "first_request_at": round(first) or "",
            "last_request_at": round(last) or "",
            **self.policy.status(),
            "log_lines_lost": self.log_lines_lost(),
        }
        return "".join(f"{name}={value}\n" for name, value in values.items()).encode() + b"\n"

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._make_room()
                time.sleep(0.01)  # the thread of that connection needs a moment to end
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a client may connect; makes room for it."""
        if self._allow and not self._path:
            address = ipaddress.ip_address(client_address[0].partition("%")[0])
            address = getattr(address, "ipv4_mapped", None) or address
            if not any(address in network for network in self._allow):
                if self._refused_warning.allows():
                    log.warning("connection from %s refused, see _allow", address)
                return False
        if len(self.handlers) >= self.capacity:
            self._make_room()
        return True

    def _make_room(self) -> None:
        """Close the connection that is least needed, see PolicyHandler. If all are needed, there is
        one too many."""
        handlers = list(self.handlers)
        orders = [(order, handler) for handler in handlers if (order := handler.closing_order())]
        if orders:
            _, handler = min(orders, key=lambda found: found[0])
            handler.close_to_make_room()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection ended with an error")

    def stop(self) -> None:
        """Take no more connections, and no more requests than have arrived."""
        self.shutdown()
        self.server_close()
        for handler in list(self.handlers):
            handler.hang_up(socket.SHUT_RD)

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait `timeout` seconds at most for the connections to end; whether they have."""
        deadline = time.monotonic() + timeout
        while self.handlers and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.handlers

    def server_close(self) -> None:
        super().server_close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def address_of(config: Config) -> str:
    """Where the daemon listens, in words: unix:/path, or host:port."""
    if config.bind.startswith("unix:"):
        return f"unix:{config.beside(config.bind.removeprefix('unix:'))}"
    return f"{config.bind}:{config.bindport}"


def cannot_listen(config: Config, error: OSError) -> ConfigError:
    reason = f"cannot listen on {address_of(config)}: {error.strerror or error}"
    return ConfigError(f"{config.path}: {reason}; see _bind and _bindport")


def listening_address(config: Config) -> tuple[Any, ...]:
    """What getaddrinfo() says of _bind, first of all. Raises OSError."""
    return socket.getaddrinfo(config.bind, config.bindport, type=socket.SOCK_STREAM)[0]


def raise_descriptor_limit() -> int:
    """Raise the soft limit, 1,024 under supervisord, to the hard one; return what holds now."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def remove_stale_socket(path: str) -> None:
    """Remove a socket that a dead daemon left. Raises OSError when a live one answers there."""
    if not os.path.lexists(path):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)  # a frozen daemon is a live one
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise OSError(errno.EEXIST, "exists and is not a socket") from None
            os.unlink(path)
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


# --- --check --------------------------------------------------------------------------------------

SMTP_CODE = re.compile(r"[245][0-9][0-9](?![0-9])")
ADDRESSES = re.compile(r"(?=.*[0-9])[0-9.*?\[\]-]+\.[0-9.*?\[\]-]+(?:/[0-9]+)?")  # with wildcards
NUMBERS = re.compile(r"\[[^]]*(?:[0-9]-[0-9]{2}|[0-9]{2}-[0-9])[^]]*\]")  # as in user[1-20]


def make_store(config: Config) -> SQLiteStore | MySQLStore:
    if config.store == "sqlite":
        return SQLiteStore(config.beside(config.sqlitefile), statement_timeout=1.0)
    return MySQLStore(config)


def make_spool(config: Config) -> SpoolStore:
    return SpoolStore(config.beside(config.spoolfile), statement_timeout=0.2)


def make_ledger(config: Config, store: Store) -> Ledger:
    """With a spool, if there shall be one or there is one: it may hold sends."""
    retention = config.retentiondays * 86400
    is_local = config.onfailure == "LOCAL"
    if is_local or (config.store == "mysql" and config.beside(config.spoolfile).exists()):
        return LocalLedger(store, make_spool(config), retention, config.dbtimeout, spools=is_local)
    return Ledger(store, retention)


def check_setup(config: Config, user: str = "") -> int:
    """Print what is found of files, rules, address and store; 0 when all is well. For root it is
    what the daemon's user would find: `user`, or else the owner of the directory that the daemon
    writes to. Raises ConfigError when there is no such user."""
    account = daemon_user(config, user)
    if account:
        print(f"checked with the rights of the user {account.pw_name}, see --user")
    there = "read" if config.path.exists() else "not there, the environment has the settings"
    print(f"{config.path}: {there}")
    status = 0
    with rights_of(account) if account else contextlib.nullcontext():
        for check in (check_files, check_rules, check_risks, check_address, check_store):
            try:
                for line in check(config):
                    print(line)
            except SaslQuotaError as error:
                print(error)
                status = 1
                if check is check_files:  # nor can the others then look
                    break
    return status


def daemon_user(config: Config, name: str) -> pwd.struct_passwd | None:
    """The user whom the daemon will run as; None if it is this one."""
    if os.geteuid() != 0:
        if name:
            raise ConfigError("--user: only root can check as another user")
        return None
    try:
        if name:
            return pwd.getpwnam(name)
        file = config.beside(config.sqlitefile) if config.store == "sqlite" else config.path
        owner = file.parent.stat().st_uid
        return pwd.getpwuid(owner) if owner else None
    except KeyError:
        if name:
            raise ConfigError(f"--user {name}: no such user") from None
    except OSError:  # check_store() tells what is wrong with the directory
        pass
    return None


@contextlib.contextmanager
def rights_of(user: pwd.struct_passwd) -> Iterator[None]:
    """Let root have the rights of another user only."""
    groups, group = os.getgroups(), os.getegid()
    os.initgroups(user.pw_name, user.pw_gid)
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def check_files(config: Config) -> Iterable[str]:
    """Nothing to say if the daemon can read all that it needs; else raises ConfigError."""
    python = Path(os.__file__)
    files = [python, Path(__file__).resolve(), config.path, config.beside(config.quotafile)]
    if config.store == "mysql" and config.mysslca:
        files.append(config.beside(config.mysslca))
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # what it is for is checked below
            try:
                path.open("rb").close()
            except PermissionError:
                raise ConfigError(unreadable(path)) from None
    return ()


def unreadable(path: Path) -> str:
    closed = [p for p in path.parents if not os.access(p, os.X_OK, effective_ids=True)]
    remedy = f"chgrp {os.getegid()} {path}; chmod g+r {path}"
    if closed:
        remedy = f"chmod a+x {closed[-1]}"
    return f"the user {user_name(os.geteuid())} cannot read {path}: run {remedy}"


def check_rules(config: Config) -> Iterator[str]:
    """Each rule in words, then what may not be what was meant."""
    path = config.beside(config.quotafile)
    rules = load_rules(path, config.retentiondays * 86400)
    for rule in rules:
        for window in rule.windows:
            yield f"{path}: {rule.key}: {rule.describe_senders()}: {window.describe()}"
    for patterns in (rules.addresses, rules.domains):
        for key, winner in patterns.hidden():
            reason = f"{quoted(winner)} comes first and matches as much"
            yield f"{path}: warning: {quoted(key)} is never selected, {reason}"
    for rule in rules:
        if doubt := key_doubt(rule.key, config.defaultdomain):
            yield f"{path}: warning: {quoted(rule.key)} {doubt}"
    endless = [rule.key for rule in rules if holds_without_end(rule)]
    if endless:
        why = "HOLD, and no other window refuses: the hold queue grows without end"
        yield f"{path}: warning: {some(endless)}: {why}"
    coded = [rule.key for rule in rules if any(SMTP_CODE.match(w.msg) for w in rule.windows)]
    if coded:
        yield f"{path}: warning: msg of {some(coded)}: leave out the SMTP code, Postfix adds it"
    foreign = [rule.key for rule in rules if not all(w.msg.isascii() for w in rule.windows)]
    if foreign:
        why = "is not ASCII, which mail programs without SMTPUTF8 may show wrongly"
        yield f"{path}: note: msg of {some(foreign)} {why}"


def key_doubt(key: str, defaultdomain: str) -> str:
    """Why a key may select other logins than was meant, or none; "" if it is not in doubt."""
    address = key.rpartition("@")[2]
    with contextlib.suppress(ValueError):
        ipaddress.ip_network(address.strip("[]").removeprefix("ipv6:"), strict=False)
        return "selects no client address: keys are logins and their domains"
    if ADDRESSES.fullmatch(address):
        return "selects no client addresses: keys are logins and their domains"
    if NUMBERS.search(key):
        return "selects no numbers: [...] stands for one character out of it"
    is_name = not ("." in key or "@" in key or WILDCARD.search(key))
    if defaultdomain and is_name and key != "default":
        whole = quoted(f"{key}@{defaultdomain}")
        return f"selects no login without a domain: with _defaultdomain that is {whole}"
    return ""


def holds_without_end(rule: Rule) -> bool:
    """Whether nothing bounds what it puts into the hold queue."""
    holding = [window for window in rule.windows if window.enforce and window.action == "HOLD"]
    bounded = any(window.refuses and window.msgquota < math.inf for window in rule.windows)
    return any(window.msgquota < math.inf for window in holding) and not bounded


def some(keys: Sequence[str]) -> str:
    """The first keys, and how many more."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(map(quoted, keys[:3])) + more


def risks(config: Config) -> list[str]:
    """What an administrator should know about this set-up."""
    found = []
    if os.geteuid() == 0:
        found.append("running as root is not needed; use the user saslquota")
    is_open = config.path.exists() and config.path.stat().st_mode & stat.S_IROTH
    if config.mypasswd and config.store == "mysql" and is_open:
        found.append(f"{config.path} holds a password and is readable by everybody: chmod o-r")
    is_loopback = config.bind in ("localhost", "::1") or config.bind.startswith(("127.", "unix:"))
    if not is_loopback and not config.allow:
        found.append(f"_bind {config.bind} is open to other machines: set _allow")
    return found


def check_risks(config: Config) -> Iterator[str]:
    for risk in risks(config):
        yield f"warning: {risk}"


def check_address(config: Config) -> Iterator[str]:
    """Whether the address can be listened on. Listens nowhere."""
    where = address_of(config)
    in_use = f"{where}: in use; that is right if it is by saslquota itself"
    if config.bind.startswith("unix:"):
        path = Path(where.removeprefix("unix:"))
        if not path.parent.is_dir():
            raise ConfigError(f"{where}: the directory {path.parent} does not exist, see _bind")
        if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
            raise ConfigError(f"{where}: {path.parent} is not writable, see _bind")
        if len(os.fsencode(path)) > 107:  # unix(7)
            raise ConfigError(f"{where}: too long for a socket, see _bind")
        yield in_use if path.exists() else f"{where}: can be listened on"
        return
    try:
        family, kind, _, _, address = listening_address(config)
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise cannot_listen(config, error) from None
        yield in_use
    else:
        yield f"{where}: can be listened on"


def check_store(config: Config) -> Iterator[str]:
    if config.onfailure == "LOCAL":
        yield make_spool(config).check()
    yield make_store(config).check()


# --- main -----------------------------------------------------------------------------------------

SYSTEM_CONFIG = Path("/etc/saslquota/saslquota.json")  # after `pip install`
SHUTDOWN_GRACE = 2.0  # seconds for the store when the daemon is told to stop; then the fallback


def start_logging(config: Config) -> tuple[LogWriter, str]:
    """Log as configured; also return where to. Raises ConfigError."""
    target, place = log_handler(config)
    to_stdout = not isinstance(target, Syslog)
    form = f"postfix/saslquota[{os.getpid()}]:%(message)s"
    target.setFormatter(OneLine(f"%(asctime)s {form}" if to_stdout else form))
    writer = LogWriter(target)
    log.handlers = [writer]
    log.propagate = False
    log.setLevel(config.loglevel)
    # What is in no line of ours need not be found out (the logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.raiseExceptions = False
    return writer, place


def log_handler(config: Config) -> tuple[logging.Handler, str]:
    """The handler, and where an administrator finds what it writes. Raises ConfigError."""
    address, facility = config.logaddress or "/dev/log", config.logfacility
    is_missing = not config.logaddress and not os.path.exists(address)
    if config.loghandler == "stdout" or is_missing:
        return logging.StreamHandler(sys.stdout), f"stdout{', no /dev/log' if is_missing else ''}"
    is_local = address.startswith("/")
    try:
        handler = Syslog(address if is_local else (address, config.logport), facility)
    except OSError as error:
        raise ConfigError(f"{config.path}: _logaddress: {address}: {error.strerror}") from None
    file = "/var/log/mail.log or " if facility == "mail" else ""
    found = f"{file}journalctl --facility={facility}" if address == "/dev/log" else address
    return handler, f"syslog, facility {facility}: {found}"


def run_daemon(config: Config) -> int:
    """Run the daemon until a signal ends it. Raises ConfigError for what cannot be started."""
    # A thread that has waited this long for the GIL asks again, behind all others: with hundreds of
    # connections 5 ms, the default, let some starve (bench/README.md).
    sys.setswitchinterval(0.1)
    threading.stack_size(512 * 1024)
    end_at_signals()
    rules = RulesFile(config.beside(config.quotafile), config.retentiondays * 86400)
    signals = catch_signals()
    store = make_store(config)
    policy = Policy(config, rules)
    ledger = make_ledger(config, store)
    committer = Committer(ledger, config.dbtimeout, Outage(policy.consequence))
    server = PolicyServer(config, policy, committer)
    writer, place = start_logging(config)
    for line in (
        f"saslquota {__version__} listening on {server}, {server.capacity} connections at most",
        f"counting in {store}",
        f"rules in {rules.path}: {rules.rules}",
        f"logging to {place}",
    ):
        print(line, flush=True)
        if isinstance(writer.target, Syslog):
            log.info("%s", line)
    for risk in risks(config):
        log.warning("%s", risk)
    server.log_verdict = writer.write
    server.log_lines_lost = lambda: writer.lost
    committer.start()
    threading.Thread(target=server.serve_forever, args=[0.1], daemon=True).start()
    threading.Thread(target=rules.watch, name="rules", daemon=True).start()
    received = wait_for_stop(signals, rules, server.hints)
    server.stop()
    if not server.wait_until_idle(SHUTDOWN_GRACE):
        committer.give_up()
        server.wait_until_idle(SHUTDOWN_GRACE)
    committer.stop(SHUTDOWN_GRACE / 8)
    log.info("stopped by %s", received.name)
    writer.stop(SHUTDOWN_GRACE / 8)
    return 0


def end_at_signals() -> None:
    """Let signals end the daemon before it serves: to read 100,000 rules takes seconds."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: sys.exit(0))


def catch_signals() -> queue.SimpleQueue[int]:
    """The signals that come from now on. (A SimpleQueue's put() may interrupt its get().)"""
    caught: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: caught.put(number))
    return caught


def wait_for_stop(
    signals: queue.SimpleQueue[int], rules: RulesFile, hints: SetupHints
) -> signal.Signals:
    """Wait for a signal that says to stop, and return it."""
    while True:
        try:
            number = signals.get(timeout=1.0)
        except queue.Empty:
            hints.remind()
            continue
        if number != signal.SIGHUP:
            return signal.Signals(number)
        log.info("SIGHUP: reading the rules; saslquota.json is read at the start only")
        rules.read_now()


def find_config(path: Path | None) -> Config:
    """The settings of a file, or of the default one, see the manual page above. Raises
    ConfigError."""
    beside = Path(__file__).resolve().with_name("saslquota.json")
    default = SYSTEM_CONFIG if SYSTEM_CONFIG.exists() and not beside.exists() else beside
    return load_config(path or default, os.environ, optional=path is None)


def main(argv: Sequence[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(
        prog="saslquota.py", description="Postfix policy daemon: sending quotas for SASL senders"
    )
    parser.add_argument("-c", metavar="FILE", dest="config", type=Path)
    parser.add_argument("--check", action="store_true", help="look at everything, change nothing")
    parser.add_argument("--user", default="", help="with --check by root: whom the daemon runs as")
    parser.add_argument("--version", action="version", version=f"saslquota {__version__}")
    arguments = parser.parse_args(argv)
    try:
        config = find_config(arguments.config)
        if not arguments.check:
            return run_daemon(config)
        status = check_setup(config, arguments.user)
        sys.stdout.flush()
        return status
    except SaslQuotaError as error:
        print(f"saslquota: {error}", flush=True)
    except BrokenPipeError:  # --check | head; what is left must not be written at the exit, either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
