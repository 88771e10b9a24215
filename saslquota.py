#!/usr/bin/env python3
"""NAME
    saslquota - Postfix policy daemon that limits what each SASL sender may send in a sliding period

SYNOPSIS
    saslquota.py [-c FILE] [--check] [--version]

DESCRIPTION
    saslquota answers Postfix's check_policy_service on submission and smtps. For each request it
    takes sasl_username, picks a rule from quotarules.json (the full address, else a pattern for
    addresses, else its domain, else a pattern for domains, else "default"), counts that sender's
    sends within the rule's sliding periods in MySQL or in an embedded SQLite file, and answers
    action=OK, or action=REJECT or action=DEFER with the rule's message. Rules for "@domain" and "*"
    limit all senders of a domain, or of the service, together: a send is charged to its sender and
    to these pools, or to none.

    -c FILE    the configuration (default: saslquota.json beside this script)
    --check    read configuration and rules, look at the store, say what was found and what each
               rule means; exit 0 or 1; create and change nothing
    --version  print the version

PROTOCOL
    Postfix's SMTPD_POLICY_README: name=value lines, closed by an empty line; any number of requests
    on one connection, which the server never closes first: Postfix would wait a second before the
    next request. An empty request ends the session. MAIL and RCPT cost 1, DATA and END-OF-MESSAGE
    max(1, recipient_count); the other states cost nothing. Where a rule says "count": "messages", a
    message costs 1 however often it is asked about: the connection remembers the last one by its
    sender and instance. Malformed input gets no reply: it is logged and the connection closed.

CONFIGURATION
    saslquota.json holds the settings (class Config lists them), quotarules.json the rules. An
    environment variable of a setting's name overrides it. The rules are read again when their file
    changes; a broken file keeps the rules that were in force. A rule is an object, or a list of
    objects that must all have room, with these fields, which default to those of "default":

    period     seconds, or a time such as "90s", "10m", "1h", "1d" or "1w"
    msgquota   how much may be sent in any period of that length; "unlimited", or 0 for nothing
    msg        the text of a refusal; {sasl_username}, {rule}, {used}, {msgquota}, {period} and
               {retry_after} are filled in, and {{ and }} stand for a brace
    count      "recipients", or "messages"
    action     "REJECT", or "DEFER": 450 in place of 554
    enforce    false: count, log "action=REJECT (not enforced)", and accept

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
    mysql.sql                          the table, for MySQL and MariaDB (SQLite's is made by itself)
    saslquota.db                       the embedded ledger
"""

from __future__ import annotations

import argparse
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

__version__ = "2.0.0"

MAX_REQUEST = 64 * 1024  # bytes; Postfix sends 1-20 KiB
RECEIVE = 4096  # bytes at a time; each waiting connection has so much at hand
MAX_ATTRIBUTES = 256  # Postfix 3.7 sends 31
MAX_RECIPIENTS = 1_000_000  # in one request; Postfix's own limit is 1,000 by default
MAX_ACCOUNT = 320  # characters; the column's width: 64 of a local part, @, 255 of a domain
MAX_INSTANCE = 64  # characters; the column's width
POOL = "POOL "  # begins the account of a pool; logins are in lower case, so none begins with it
MAX_REPLY = 400  # bytes; an SMTP reply line has 512 with its codes (RFC 5321, 4.5.3.1.5)
MAX_BATCH = 500  # charges in one INSERT; SQLite takes 32,766 variables, eight for each and its pool
SPAN_ROWS = 32  # the oldest sends of a window that are remembered, at the most
TAIL_ROWS = 8  # the newest sends of an account that come with its head: most windows hold no more
PROBES = 16  # sends looked at in one step of a search
CACHED_ACCOUNTS = 20_000  # at most some 4 KiB each
CLOCK_TRUST = 1.0  # seconds until the database's clock, or a refusal's reason, is read again
PATIENCE = 3  # collisions in a row before the next try takes locks
ATTEMPTS = 3  # connections that may break under one batch before it is given up
FUTURE = 60_000_000  # microseconds; a send dated further ahead is worth an error
LOCK_WAIT = 1  # seconds for a lock in MySQL: as short as it can be, for all others wait too
LOCK_PAUSE = 2.0  # seconds that an account is left alone whose rows somebody has locked
WATCH = 1.0  # seconds of silence until a connection looks what has become of its last request
OVERDUE = 0.1  # seconds between two looks whether the ledger takes too long
RETRY = 1.0  # seconds between two attempts to reach a store that is down
REMINDER = 60.0  # seconds between two log lines about a trouble that lasts
WAL_PAGES = 8000  # of 4 KiB that SQLite gathers in its log before it sorts them into the file
PURGE_ROWS = 50  # in one DELETE: a millisecond or two
PURGE_PAUSE = 0.025  # seconds between two of them
PURGE_PUT_OFF = 60.0  # seconds when it meets a lock: while it waits all others do, too
PURGE_INTERVAL = 3600.0  # seconds between two purges
MAX_LINE = 4000  # characters of a log line; rsyslog takes 8 KiB
LOG_PAUSE = 0.02  # seconds in which log lines gather
LOG_SLICE = 32  # lines that may be written before the other threads have their turn
LOG_BACKLOG = 10_000  # lines waiting for a log that does not take them; the next ones are dropped
SHUTDOWN = 2.0  # seconds for the store when the daemon is told to stop; then the fallback

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # no part of a line of text

log = logging.getLogger("saslquota")


# --- Errors ---------------------------------------------------------------------------------------


class SaslQuotaError(Exception):
    """Whatever this program reports in one line."""


class ConfigError(SaslQuotaError):
    """A setting, a rule or an address that cannot be used."""


class ProtocolError(SaslQuotaError):
    """Input that is no policy request."""


class StoreError(SaslQuotaError):
    """The store did not do what it was asked."""


class Conflict(StoreError):
    """Another daemon was faster or holds a lock: nothing was written, the next try may work."""


class Locked(Conflict):
    """Another session holds on to a lock: whoever tries again at once waits again."""


class Unavailable(StoreError):
    """The store cannot be used; whether the last statement was carried out is not known."""


# --- Config ---------------------------------------------------------------------------------------


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text in quotes")
    return value


def whole(low: int, high: int) -> Callable[[Any], int]:
    """A reader of whole numbers; digits in quotes will do, as the environment has nothing else."""

    def read(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,10}\s*", value):
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return read


def one_of(*choices: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        for choice in choices:
            if isinstance(value, str) and value.casefold() == choice.casefold():
                return choice
        raise ValueError("one of " + ", ".join(choices))

    return read


def items(value: Any) -> list[str]:
    """A list of texts, or one text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError("a text, or a list of texts")
    return [part.strip() for part in parts if part.strip()]


def hosts(value: Any) -> tuple[str, ...]:
    names = tuple(items(value))
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


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(value: Any) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(item) for item in items(value))
    except ValueError as error:
        raise ValueError(f"networks such as 127.0.0.0/8 or ::1 ({error})") from None


def setting(default: Any, read: Callable[[Any], Any]) -> Any:
    return dataclasses.field(default=default, metadata={"read": read})


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings. In saslquota.json and in the environment each name begins with `_`."""

    path: Path  # the file they come from

    bind: str = setting("127.0.0.1", text)  # address to listen on, or unix:/path
    bindport: int = setting(10008, whole(1, 65535))
    bindtimeout: int = setting(45, whole(1, 3600))  # seconds for a request or reply under way
    store: str = setting("mysql", one_of("mysql", "sqlite"))
    sqlitefile: str = setting("saslquota.db", text)
    myhost: tuple[str, ...] = setting(("localhost",), hosts)  # tried in turn
    myport: int = setting(3306, whole(1, 65535))
    myuser: str = setting("saslquota", text)
    mypasswd: str = setting("", text)
    mydb: str = setting("saslquota", text)
    mysslca: str = setting("", text)  # a CA's file: TLS, and the server's certificate is verified
    logfacility: str = setting("mail", one_of(*sorted(SysLogHandler.facility_names)))
    loglevel: str = setting("INFO", one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    loghandler: str = setting("syslog", one_of("syslog", "stdout"))
    logaddress: str = setting("", text)  # a socket's path, or a host for UDP; "" is /dev/log
    logport: int = setting(514, whole(1, 65535))  # UDP
    quotafile: str = setting("quotarules.json", text)
    dbtimeout: int = setting(5, whole(2, 60))  # seconds until a decision falls back
    onfailure: str = setting("DEFER_IF_PERMIT", one_of("DEFER_IF_PERMIT", "OK"))
    nosasl: str = setting("REJECT", one_of("REJECT", "DUNNO"))  # without sasl_username
    okaction: str = setting("OK", one_of("OK", "DUNNO"))  # for an accepted send
    maxconnections: int = setting(2000, whole(1, 100_000))
    allow: tuple[Network, ...] = setting((), networks)  # who may connect; () is everybody
    retentiondays: int = setting(30, whole(1, 3650))

    def beside(self, name: str) -> Path:
        """A path as the configuration means it: relative to the configuration file."""
        return self.path.parent / name


class JSONObject(dict[str, Any]):
    """An object as JSON has it; knows the name of a key that stands in it twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = collections.Counter(name for name, _ in pairs)
        self.repeated = [name for name, times in names.items() if times > 1]


Where = Callable[..., str]  # says for messages where a key stands: see place()


def load_json(path: Path) -> tuple[dict[str, Any], Where]:
    """The object that a JSON file holds, and where its keys stand. Left out is "$schema", by which
    editors find what the file may hold.

    Raises ConfigError for a file that cannot be read, is not UTF-8 or not JSON, holds something
    other than an object, or a key twice.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        found = json.loads(content, object_pairs_hook=JSONObject, parse_int=parse_int)
        everywhere = list(objects(found))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        position = f"{path}, line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{position}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep") from None
    if not isinstance(found, JSONObject):
        raise ConfigError(f'{path}: must hold one object, {{ "name": value, ... }}')
    where = functools.partial(place, path, content)
    for keys, value in everywhere:
        if value.repeated:
            here = where(*keys, value.repeated[0])
            raise ConfigError(f"{here}: the key stands here more than once, remove all but one")
    if not isinstance(found.pop("$schema", ""), str):
        raise ConfigError(f"{where('$schema')}: must be a text in quotes")
    return found, where


def objects(value: Any, *keys: str | int) -> Iterator[tuple[tuple[str | int, ...], JSONObject]]:
    """The object, and those in it and in its lists, each after the keys that lead to it."""
    if isinstance(value, JSONObject):
        yield keys, value
    if isinstance(value, JSONObject | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from objects(inner, *keys, key)


def parse_int(digits: str) -> float:
    """An integer; one beyond all bounds as a float, which no setting takes."""
    return int(digits) if len(digits) < 20 else float(digits)


def place(path: Path, content: str, *keys: str | int) -> str:
    """Where a key stands, for messages: file, line and the keys that lead to it. A number is that
    of an object in a list: a rule's window."""
    at = 0
    for key in keys:
        if isinstance(key, int):
            tokens = re.compile(r'"(?:[^"\\]|\\.)*"|\{').finditer(content, at)
            braces = (token.start() for token in tokens if token[0] == "{")
            at = next(itertools.islice(braces, key, None), at)
            continue
        spelled = "|".join(re.escape(json.dumps(key, ensure_ascii=a)) for a in (True, False))
        found = re.compile(rf"(?:{spelled})\s*:").search(content, at)
        at = found.start() if found else at
    line = content.count("\n", 0, at) + 1
    names = [f"window {key + 1}" if isinstance(key, int) else quoted(key) for key in keys]
    return f"{path}, line {line}: " + ": ".join(names)


def quoted(name: str) -> str:
    """A name for messages, as it may stand in the file."""
    return json.dumps(name, ensure_ascii=False)


def unknown(name: str, known: Iterable[str]) -> str:
    """The complaint about a name that is not among the known ones, with the nearest of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown; did you mean {quoted(near[0])}?" if near else "unknown"


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Read saslquota.json; variables of the environment win. Raises ConfigError."""
    found, where = load_json(path)
    fields = {f"_{f.name}": f for f in dataclasses.fields(Config) if "read" in f.metadata}
    for name in found:
        if name not in fields:
            raise ConfigError(f"{where(name)}: {unknown(name, fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in found and name not in environ:
            continue
        try:
            values[field.name] = field.metadata["read"](environ.get(name, found.get(name)))
        except ValueError as error:
            here = f"environment: {name}" if name in environ else where(name)
            raise ConfigError(f"{here}: must be {error}") from None
    return Config(path=path, **values)


# --- Rules ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """So many recipients, or messages, in any period of so many seconds; and what happens beyond
    that."""

    period: int
    msgquota: float  # math.inf: no limit
    rule: str = ""  # the key of its rule
    msg: str = ""  # a template, see PLACEHOLDERS
    action: str = "REJECT"
    enforce: bool = True  # else it is only logged
    count: str = "recipients"

    @property
    def limit(self) -> str:
        return "unlimited" if self.msgquota == math.inf else str(self.msgquota)

    def __str__(self) -> str:
        return f"{self.limit} in {self.period} s"

    def words(self) -> str:
        """What the window means, for --check."""
        length = f"{self.period} seconds"
        if self.period >= 120:
            length += f" ({format_time(self.period)})"
        if self.msgquota == math.inf:
            return f"any number of {self.count}, counted over {length}"
        words = f"{self.limit} {self.count} in any {length}; beyond that"
        if not self.enforce:
            return f"{words} accepted (not enforced), logged as {self.action}: {self.msg}"
        return f"{words}{', for now (DEFER)' if self.action == 'DEFER' else ''}: {self.msg}"


class Rule(NamedTuple):
    """The windows that must all have room for a send."""

    key: str
    windows: tuple[Window, ...]

    @property
    def pool(self) -> bool:
        """Whether it limits all its senders taken together."""
        return self.key == "*" or self.key.startswith("@")

    @property
    def per_message(self) -> bool:
        return self.windows[0].count == "messages"

    def senders(self) -> str:
        """Whom the rule is about, for --check."""
        if self.key == "default":
            return "each sender without another rule"
        if self.key == "*":
            return "a pool, all senders together"
        if self.pool:
            together = f"a pool, all senders of {self.key[1:]} together"
            return f"{together} (not each by itself, as @ means elsewhere in Postfix)"
        address = "@" in self.key
        if WILDCARD.search(self.key):
            return f"each sender{'' if address else ' of a domain'} that matches"
        return "this sender" if address else f"each sender of {self.key}"


WILDCARD = re.compile(r"[*?[]")  # of fnmatch
WILDCARDS = re.compile(r"\*|\?|\[!?.[^]]*\]?")  # each with all that belongs to it
STRANGE = "\ue000"  # a character that no key holds


class Patterns:
    """Rules whose keys hold wildcards. Each is filed under the rarest text between them: few need a
    closer look, however many there are."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = list(rules)
        # The longest pattern is selected first; of two as long, the first.
        self._ranks = {rule.key: (-len(rule.key), n) for n, rule in enumerate(self._rules)}
        texts = [set(WILDCARDS.split(rule.key)) - {""} or {""} for rule in self._rules]
        common = collections.Counter(itertools.chain.from_iterable(texts))
        self._filed: dict[str, list[Rule]] = {}
        for some, rule in zip(texts, self._rules, strict=True):
            rarest = min(some, key=lambda text: (common[text], -len(text)))
            self._filed.setdefault(rarest, []).append(rule)
        self._lengths = {len(text) for text in self._filed}

    def matching(self, name: str) -> list[Rule]:
        """The rules that match a login or a domain in lower case."""
        texts = {
            name[start : start + length]
            for length in self._lengths
            for start in range(len(name) - length + 1)
        }
        near = [rule for text in texts for rule in self._filed.get(text, ())]
        return [rule for rule in near if fnmatch.fnmatchcase(name, rule.key)]

    def select(self, name: str) -> Rule | None:
        return min(self.matching(name), key=lambda rule: self._ranks[rule.key], default=None)

    def shadowed(self) -> Iterator[tuple[str, str]]:
        """The keys that can never be selected, each with one that comes before it and matches all
        that it matches: it matches also with no text at all, or a lot of strange text, for each *.

        Only a key with two wildcards can be longer and still match as much. (Sets as in [ab] are
        left out: it would take more to say what they match. So are thousands of such keys: too much
        time.)
        """
        plain = [rule for rule in self._rules if "[" not in rule.key]
        broad = [rule for rule in plain if len(WILDCARD.findall(rule.key)) > 1]
        if not 0 < len(broad) <= 1000:
            return
        others = Patterns(broad)
        much = STRANGE * (2 + max(rule.key.count("?") for rule in broad))
        for rule in plain:
            shortest, *longer = [
                rule.key.replace("*", text).replace("?", STRANGE) for text in ("", STRANGE, much)
            ]
            for other in others.matching(shortest):
                first = self._ranks[other.key] < self._ranks[rule.key]
                if first and all(fnmatch.fnmatchcase(name, other.key) for name in longer):
                    yield rule.key, other.key


class Rules:
    """The rules of one quotarules.json."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Their keys are in lower case; "default" must be among them."""
        self._rules = rules
        self._pools = {rule.key: rule for rule in rules if rule.pool}
        single = [rule for rule in rules if not rule.pool]
        self._exact = {rule.key: rule for rule in single if not WILDCARD.search(rule.key)}
        self._default = self._exact["default"]
        wild = [rule for rule in single if rule.key not in self._exact]
        self.addresses = Patterns(rule for rule in wild if "@" in rule.key)
        self.domains = Patterns(rule for rule in wild if "@" not in rule.key)
        self.every = functools.lru_cache(CACHED_ACCOUNTS)(self._every)

    def select(self, login: str) -> Rule:
        """The rule of a login in lower case: that of its full address, of a pattern for addresses,
        of its domain, of a pattern for domains, or the default."""
        domain = login.rpartition("@")[2]
        return (
            self._exact.get(login)
            or self.addresses.select(login)
            or self._exact.get(domain)
            or self.domains.select(domain)
            or self._default
        )

    def _every(self, login: str) -> tuple[Rule, ...]:
        """A login's own rule, and the pools above it; as `every` it remembers them."""
        return (self.select(login), *self.pools(login))

    def pools(self, login: str) -> tuple[Rule, ...]:
        """The pools that a login in lower case belongs to: its domain's, then the whole service."""
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


PLACEHOLDERS = ("{sasl_username}", "{rule}", "{used}", "{msgquota}", "{period}", "{retry_after}")
BRACES = re.compile("|".join(map(re.escape, ("{{", "}}", *PLACEHOLDERS))))  # as a msg may have them
UNITS = {"w": 604_800, "d": 86_400, "h": 3600, "m": 60, "s": 1}  # seconds
LONGEST = 3650 * 86_400  # seconds
MAX_WINDOWS = 10  # in one rule


def format_time(seconds: int) -> str:
    """Seconds as 2h5m or 1m30s."""
    written = ""
    for unit in "dhms":
        number, seconds = divmod(seconds, UNITS[unit])
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
        value = int(found[1]) * UNITS[found[2] or "s"]
    if type(value) is not int or not 1 <= value <= LONGEST:
        raise ValueError(
            f'seconds from 1 to {LONGEST}, or a time as "90s", "10m", "1h", "1d", "1w"'
        )
    return value


def read_msgquota(value: Any) -> float:
    if isinstance(value, str) and value.strip().casefold() == "unlimited":
        return math.inf
    try:
        return whole(0, 1_000_000_000)(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "unlimited"') from None


def read_msg(value: Any) -> str:
    msg = text(value).strip()
    if CONTROL.search(msg):
        raise ValueError("one line without control characters")
    if wrong := re.search(r"\{[^{}]*\}?|\}", BRACES.sub("", msg)):
        names = ", ".join(PLACEHOLDERS)
        rest = "write {{ or }} for a brace itself"
        raise ValueError(f"a text with no placeholders but {names}, not {wrong[0]} ({rest})")
    return msg


def read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


RULE_FIELDS: dict[str, Callable[[Any], Any]] = {
    "period": read_period,  # seconds
    "msgquota": read_msgquota,  # recipients or messages
    "msg": read_msg,
    "count": one_of("recipients", "messages"),
    "action": one_of("REJECT", "DEFER"),
    "enforce": read_flag,
}
BUILT_IN = Window(0, 0, msg="sending quota exceeded, try again later")


def load_rules(path: Path, retention: int) -> Rules:
    """Read quotarules.json; `retention` is how long sends are kept, in seconds.

    Raises ConfigError that names the file, the line, the rule, the field and what would be right.
    """
    found, where = load_json(path)
    names = read_keys(found, where)
    if "default" not in names:
        raise ConfigError(f'{path}: the rule "default" is missing')

    def read(key: str, base: Rule | None) -> Rule:
        name = names[key]
        return read_rule(key, found[name], base, retention, functools.partial(where, name))

    default = read("default", None)
    rules = Rules([default if key == "default" else read(key, default) for key in names])
    for patterns in (rules.addresses, rules.domains):
        for key, other in patterns.shadowed():
            complaint = f"never selected, {quoted(other)} comes first and matches as much"
            raise ConfigError(f"{where(names[key])}: {complaint}")
    return rules


def read_keys(found: Iterable[str], where: Where) -> dict[str, str]:
    """The keys of the rules as they are compared, each with its name in the file. Raises
    ConfigError."""
    names: dict[str, str] = {}
    for name in found:
        key = name.strip().lower()
        if key in names:
            same = f"the same key as {quoted(names[key])} but for case and spaces, remove one"
            raise ConfigError(f"{where(name)}: {same}")
        if trouble := key_trouble(key):
            raise ConfigError(f"{where(name)}: {trouble}")
        names[key] = name
    return names


def key_trouble(key: str) -> str:
    """Why no login can select a rule with this key, and what would be right; "" if one can."""
    local, _, domain = key.rpartition("@")
    if not key or len(key) > MAX_ACCOUNT or CONTROL.search(key):
        return "no login is like that; must be an address, a domain, a pattern or a pool"
    if "**" in key:
        return "one * is enough for any text"
    if key.startswith("@"):
        pool = 'a pool is "@" and one domain, or "*" for all senders'
        if WILDCARD.search(domain):
            return f'{pool}; for each sender there by itself write "{domain}"'
        if local or not domain or len(POOL + key) > MAX_ACCOUNT:
            return pool
    if "@" in key and re.search(r"\s", local[-1:] + domain):
        return "no login has a space beside its @ or in its domain: remove it"
    if ".." in domain or domain.startswith(".") or domain.endswith("."):
        subdomains = f'; for subdomains write "*{domain}"' if domain.startswith(".") else ""
        return f"no domain has a dot at its beginning or end, nor two in a row{subdomains}"
    return ""


def read_rule(key: str, value: Any, base: Rule | None, retention: int, where: Where) -> Rule:
    """One rule out of what JSON held for its key; `base` gives the fields that it leaves out, and
    `where` the places of what is in it. Raises ConfigError."""
    if not isinstance(value, list):
        return Rule(key, (read_window(key, value, base, retention, where),))
    if not 1 <= len(value) <= MAX_WINDOWS:
        raise ConfigError(f"{where()}: must have from 1 to {MAX_WINDOWS} windows")
    windows = tuple(
        read_window(key, fields, base, retention, functools.partial(where, number))
        for number, fields in enumerate(value)
    )
    for number, window in enumerate(windows):
        if window.count != windows[0].count:
            here = where(number, "count")
            raise ConfigError(f"{here}: must be the same in all windows of a rule")
    return Rule(key, windows)


def read_window(key: str, fields: Any, base: Rule | None, retention: int, where: Where) -> Window:
    """One window out of what JSON held for it. Raises ConfigError."""
    if not isinstance(fields, dict):
        raise ConfigError(f'{where()}: must be {{"period": ..., "msgquota": ..., "msg": ...}}')
    values: dict[str, Any] = {}
    for field, value in fields.items():
        if field not in RULE_FIELDS:
            raise ConfigError(f"{where(field)}: {unknown(field, RULE_FIELDS)}")
        try:
            values[field] = RULE_FIELDS[field](value)
        except ValueError as error:
            raise ConfigError(f"{where(field)}: must be {error}") from None
    if not base or len(base.windows) > 1:  # of which it cannot be said which is meant
        why = ', and "default" has several windows' if base else ""
        for field in ("period", "msgquota"):
            if field not in values:
                raise ConfigError(f'{where()}: "{field}" is missing{why}: write it')
    window = dataclasses.replace(base.windows[0] if base else BUILT_IN, rule=key, **values)
    if window.period > retention:
        days = f"_retentiondays keeps sends for {retention} seconds only"
        raise ConfigError(f"{where('period')}: too long, {days}")
    return window


class RulesFile:
    """The rules in force: those of the file when it was last read without an error."""

    def __init__(self, path: Path, retention: int) -> None:
        """Raises ConfigError: a daemon does not start with bad rules."""
        self.path = path
        self._retention = retention
        self._complaint = ""
        self._stamp = self._look()
        self.rules = load_rules(path, retention)

    def _look(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns

    def reload(self, *, force: bool = False) -> None:
        """Read the file if it has changed since the last time; a bad one changes nothing."""
        stamp = self._look()
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
                log.error("rules not read, the old ones stay in force: %s", error)
            self._complaint = str(error)
        else:
            self._complaint = ""
            log.info("rules read again: %s", self.rules)
        finally:
            sys.setswitchinterval(interval)


# --- Protocol -------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What a policy request says, as far as it matters here. Bytes that are no UTF-8 are kept as
    surrogates."""

    protocol_state: str
    sasl_username: str
    sender: str
    recipient: str
    recipient_count: int
    client_address: str
    instance: str
    size: int  # bytes that came over the wire


def parse_request(block: bytes) -> Request:
    """A request from its lines, without the empty one. Raises ProtocolError.

    Only \\n ends a line and only the first = ends a name: a value may hold anything else
    (SMTPD_POLICY_README, "Protocol description").
    """
    lines = block.decode("utf-8", "surrogateescape").split("\n")
    if len(lines) > MAX_ATTRIBUTES:
        raise ProtocolError(f"more than {MAX_ATTRIBUTES} attributes")
    try:
        attributes = {name: value for name, value in [line.split("=", 1) for line in lines]}  # noqa: C416 - a line without = must fail
    except ValueError:
        raise ProtocolError("a line without =") from None
    get = attributes.get
    if get("request") != "smtpd_access_policy":
        raise ProtocolError("no request=smtpd_access_policy")
    count = get("recipient_count") or "0"
    if not (
        count.isascii() and count.isdigit() and len(count) <= 7 and int(count) <= MAX_RECIPIENTS
    ):
        raise ProtocolError("recipient_count is no number of recipients")
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
    def more(self) -> bool:
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


def format_reply(action: str) -> bytes:
    """The reply to a request: valid UTF-8, and no longer than SMTP can carry."""
    cut = action.encode("utf-8", "replace")[:MAX_REPLY].decode("utf-8", "ignore")
    return f"action={cut}\n\n".encode()


# --- Ledger ---------------------------------------------------------------------------------------


class Part(NamedTuple):
    """So many recipients, or messages, of one account, and the windows that must have room."""

    account: str
    recipients: int
    windows: tuple[Window, ...]


class Charge(NamedTuple):
    """A send: the sender's own part, then those of the pools. All are charged or none."""

    instance: str
    parts: tuple[Part, ...]

    @property
    def account(self) -> str:
        return self.parts[0].account


class Verdict(NamedTuple):
    """Accepted or not, and what is used of a window, an accepted charge included: of the fullest
    one; or, when some have no room, of the one among them that lasts longest."""

    accepted: bool
    used: int
    window: Window
    over: bool = False  # the window has no room: refused, unless it is not enforced
    until: float = 0.0  # monotonic seconds; a refusal may be repeated so long without a look
    retry: float | None = None  # monotonic seconds; when the charge fits, as far as it was needed


class Row(NamedTuple):
    """A row of the ledger. `at` is in microseconds since 1970, UTC."""

    account: str
    seq: int
    epoch: int
    at: int
    recipients: int
    total: int
    instance: str
    token: int


class Clock:
    """The database's clock in microseconds, carried on by the monotonic one; it never goes back."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic
        self._offset = 0
        self._set = -math.inf
        self._last = 0

    def set(self, now: int) -> None:
        self._set = self.monotonic()
        self._offset = now - int(self._set * 1e6)

    def distrust(self) -> None:
        """The next reading comes from another connection."""
        self._set = -math.inf

    def trusted(self) -> bool:
        return self.monotonic() - self._set <= CLOCK_TRUST

    def now(self) -> int:
        self._last = max(self._last, int(self.monotonic() * 1e6) + self._offset)
        return self._last


class Sent(NamedTuple):
    """What is read of a row of the ledger."""

    account: str
    seq: int
    epoch: int
    at: int  # microseconds since 1970, UTC
    before: int  # the total before it
    total: int


class Span:
    """The oldest sends of an account within one period, each with the total before it.

    `gone` is the number of the last send before them. `complete` when there are none after them;
    else the store must be asked once these have left.
    """

    __slots__ = ("complete", "gone", "rows")

    def __init__(self, sends: Sequence[Sent], head: int) -> None:
        self.rows = collections.deque((sent.at, sent.before) for sent in sends)
        self.gone = sends[0].seq - 1 if sends else head
        self.complete = not sends or sends[-1].seq == head

    def base(self, start: int, total: int) -> int | None:
        """The total before the oldest send at or after `start`; None when the store must tell."""
        rows = self.rows
        while rows and rows[0][0] < start:
            rows.popleft()
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
        if self.complete and len(self.rows) < SPAN_ROWS:
            self.rows.append((at, before))
        else:
            self.complete = False


def chains(sends: Iterable[Sent]) -> Mapping[str, list[Sent]]:
    """The sends of each account, oldest first."""
    found: dict[str, list[Sent]] = collections.defaultdict(list)
    for sent in sorted(set(sends)):
        found[sent.account].append(sent)
    return found


class Account:
    """What the ledger remembers of one account. Exact until another daemon appends to it, which
    makes our own append collide."""

    __slots__ = ("at", "epoch", "name", "read", "seq", "spans", "total")

    def __init__(self, head: Sent) -> None:
        self.name, self.seq, self.epoch, self.at, _, self.total = head
        self.read = 0.0  # monotonic seconds; when the head was
        self.spans: dict[int, Span] = {}  # by period

    def used(self, period: int, now: int) -> int | None:
        """Recipients in the period that ends now; None when the store must be asked."""
        span = self.spans.get(period)
        base = span.base(now - period * 1_000_000, self.total) if span else None
        return None if base is None else self.total - base

    def append(self, cost: int, instance: str, at: int, token: int) -> Row:
        for span in self.spans.values():
            span.append(at, self.total)
        self.seq, self.at, self.total = self.seq + 1, at, self.total + cost
        return Row(self.name, self.seq, self.epoch, at, cost, self.total, instance, token)


class Found(NamedTuple):
    """What is used of one window of a part."""

    part: Part
    window: Window
    used: int
    total: int  # of the account, with what this batch has accepted

    def fullness(self) -> float:
        return (self.used + self.part.recipients) / (self.window.msgquota or 1)


class Search(NamedTuple):
    """For the oldest send within an account's period, with which its total comes to so much. It is
    after `low`, and at `high` at the latest."""

    account: Account
    period: int
    start: int  # microseconds since 1970, UTC
    low: int
    high: int
    total: int = 0

    def holds(self, sent: Sent) -> bool:
        """Whether it is this send or a later one. Along an account's chain that is no, no ... yes,
        yes: neither epoch nor time ever falls, and in an epoch neither does the total."""
        return (
            sent.epoch == self.account.epoch and sent.at >= self.start and sent.total >= self.total
        )

    def probes(self) -> list[int]:
        """The sends to look at before so few are left that they can be read one by one."""
        gap = self.high - self.low
        if gap <= 2 * SPAN_ROWS:
            return []
        return [self.low + gap * n // (PROBES + 1) for n in range(1, PROBES + 1)]

    def narrowed(self, found: Iterable[Sent]) -> Search:
        """What is left to search after a look at them. One that is missing has been purged."""
        high = min((sent.seq for sent in found if self.holds(sent)), default=self.high)
        low = max((seq for seq in self.probes() if seq < high), default=self.low)
        return self._replace(low=low, high=high)


class Ledger:
    """Decides charges and makes the accepted ones durable before it says so.

    An append-only chain of rows for each account; what is used of a window is the difference of two
    totals. Decisions come from remembered windows, and the primary key (account, seq) proves them:
    had another daemon appended meanwhile, our INSERT would collide and write nothing.
    """

    def __init__(
        self, store: Store, retention: int, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._retention = retention * 1_000_000
        self._clock = Clock(monotonic)
        self._monotonic = monotonic
        self._future = Seldom(REMINDER)
        self.stopping = False  # no more attempts: set by another thread
        self._accounts: collections.OrderedDict[str, Account] = collections.OrderedDict()
        self._purged: Mark = NOWHERE

    def open(self, deadline: float = math.inf) -> None:
        """Connect the store anew; nothing is known on a new connection. Raises Unavailable."""
        self._accounts.clear()
        self._clock.distrust()
        self._store.open(deadline)

    def close(self) -> None:
        self._store.close()

    def charge(self, charges: Sequence[Charge], deadline: float) -> list[Verdict]:
        """Decide the charges in their order. `deadline` is in monotonic seconds.

        Raises Unavailable when the store cannot be used; whether rows were written is then unknown.
        Raises Locked, and nothing was written, when rows of one of the accounts are locked.
        """
        rows: list[Row] = []  # under way: decided, and not known to be refused
        verdicts: list[Verdict] = []
        uncertain = False  # whether an INSERT of these rows may still arrive
        collisions = failures = 0
        while True:
            try:
                if uncertain:
                    owners = self._store.tokens(rows)
                    if rows[0].token in owners:
                        return verdicts
                    uncertain = not owners  # another's row: ours can never get in
                if not uncertain:
                    rows, verdicts = [], []
                    rows, verdicts = self._decide(charges, locked=collisions >= PATIENCE)
                self._store.append(rows)
                return verdicts
            except Conflict as error:
                trouble = str(error)
                collisions += 1
                self._store.rollback()
                self._forget(charges)
                if isinstance(error, Locked) and not uncertain:
                    self.open(deadline)  # Unavailable when it is the whole table that is locked
                    raise
            except Unavailable as error:
                trouble = str(error)
                failures += 1
                if failures == ATTEMPTS:
                    raise
                uncertain = bool(rows)
                self.open(deadline)
            if self.stopping or self._monotonic() + self._store.patience >= deadline:
                raise Unavailable(f"it did not do it in time: {trouble}")

    def _forget(self, charges: Iterable[Charge]) -> None:
        for part in every_part(charges):
            self._accounts.pop(part.account, None)

    def _decide(
        self, charges: Sequence[Charge], *, locked: bool
    ) -> tuple[list[Row], list[Verdict]]:
        """The verdicts, and the rows that must be written to make them true."""
        now = self._refresh(every_part(charges), locked=locked)
        token = random.getrandbits(63)
        rows: list[Row] = []
        verdicts = []
        pools: dict[str, tuple[int, str]] = {}  # what is accepted, and the first instance
        for charge in charges:
            verdict = self._judge(charge, pools, now)
            verdicts.append(verdict)
            if not verdict.accepted:
                continue
            for name, cost, _ in charge.parts:
                if name.startswith(POOL):
                    sum_, first = pools.get(name, (0, charge.instance))
                    pools[name] = (sum_ + cost, first)
                else:
                    rows.append(self._append(name, cost, charge.instance, now, token))
        rows += [self._append(name, *cost, now, token) for name, cost in pools.items()]
        rows.sort()  # by account: two daemons lock rows in the same order
        return rows, verdicts

    def _append(self, name: str, cost: int, instance: str, now: int, token: int) -> Row:
        account = self._accounts[name]
        return account.append(cost, instance, max(now, account.at), token)

    def _judge(self, charge: Charge, pools: Mapping[str, tuple[int, str]], now: int) -> Verdict:
        found, over = [], []
        for part in charge.parts:
            account = self._accounts[part.account]
            pending = pools[part.account][0] if part.account in pools else 0
            for window in part.windows:
                used = account.used(window.period, max(now, account.at))
                assert used is not None, "_refresh has read what was unknown"
                one = Found(part, window, used + pending, account.total + pending)
                found.append(one)
                if one.used + part.recipients > window.msgquota:
                    over.append(one)
        if not over:
            one = found[0] if len(found) == 1 else max(found, key=Found.fullness)
            return Verdict(True, one.used + one.part.recipients, one.window)
        enforced = [one for one in over if one.window.enforce]
        one, retry = self._longest(enforced or over, now)
        if enforced:
            return Verdict(False, one.used, one.window, True, self._until(one, now), retry)
        return Verdict(True, one.used + one.part.recipients, one.window, True, retry=retry)

    def _longest(self, over: Sequence[Found], now: int) -> tuple[Found, float | None]:
        """The window without room that lasts longest, and when the charge would fit into it, in
        monotonic seconds. Looked up only when somebody is to know."""
        if len(over) == 1 and "{retry_after}" not in over[0].window.msg:
            return over[0], None
        moments = [self._fits(one, now) for one in over]
        last = max(moments)
        return over[moments.index(last)], self._monotonic() + (last - now) / 1e6

    def _fits(self, one: Found, now: int) -> float:
        """When enough sends have left the window, in microseconds of the database's clock."""
        account, period = self._accounts[one.part.account], one.window.period
        if one.part.recipients > one.window.msgquota:
            return math.inf
        # All sends up to the first at which the total comes to this must leave.
        total = one.total + one.part.recipients - int(one.window.msgquota)
        at = account.spans[period].reached(total)
        if at is None:
            start = max(now, account.at) - period * 1_000_000
            search = Search(account, period, start, account.spans[period].gone, account.seq, total)
            ((_, found),) = self._search([search])
            at = found[0].at if found else None
        if at is None:  # a send of this very batch
            at = max(now, account.at)
        return at + period * 1_000_000 + 1

    def _until(self, one: Found, now: int) -> float:
        """A reset shall be noticed within a second, and the first send that leaves at once."""
        account = self._accounts[one.part.account]
        rows = account.spans[one.window.period].rows
        at = max(now, account.at)
        leaves = (rows[0][0] - at) / 1e6 + one.window.period if rows else CLOCK_TRUST
        return min(account.read + CLOCK_TRUST, self._monotonic() + leaves)

    def _refresh(self, parts: Sequence[Part], *, locked: bool) -> int:
        """Read what the decision lacks; return its now, in microseconds."""
        if locked or not self._clock.trusted():
            self._clock.set(self._store.now())
        now = self._clock.now()
        stale, spent = self._lacking(parts, now)
        if spent:
            self._fill([part for part in parts if part.account in spent], now, {})
            stale, _ = self._lacking(parts, now)
        if locked:
            stale = {part.account for part in parts}
        if stale:
            tails = self._read(sorted(stale), now, locked=locked)
            self._fill([part for part in parts if part.account in stale], now, tails)
        while len(self._accounts) > CACHED_ACCOUNTS:
            self._accounts.popitem(last=False)
        return now

    def _lacking(self, parts: Sequence[Part], now: int) -> tuple[set[str], set[str]]:
        """The accounts of which the head must be read, as they are not known or about to refuse for
        a reason that was read too long ago; and those whose remembered sends have all left."""
        stale: set[str] = set()
        spent: set[str] = set()
        demand: dict[str, int] = {}
        oldest = self._monotonic() - CLOCK_TRUST
        for part in parts:
            account = self._accounts.get(part.account)
            if account is None:
                stale.add(part.account)
                continue
            self._accounts.move_to_end(part.account)
            wanted = demand[part.account] = demand.get(part.account, 0) + part.recipients
            at = max(now, account.at)
            for window in part.windows:
                used = account.used(window.period, at)
                if used is None:
                    spent.add(part.account)
                elif used + wanted > window.msgquota and account.read < oldest:
                    stale.add(part.account)
        return stale, spent

    def _read(self, names: Sequence[str], now: int, *, locked: bool) -> Mapping[str, list[Sent]]:
        """Read the heads of accounts; return their newest sends. What is remembered of an account
        stays right as long as its head is the same: rows are only ever appended."""
        tails = chains(self._store.newest(names, lock=locked))
        for name in names:
            head = tails[name][-1] if tails[name] else Sent(name, 0, 1, 0, 0, 0)
            account = self._accounts.pop(name, None)  # the newest stand last
            if account is None or account.seq != head.seq:
                account = Account(head)
            account.read = self._monotonic()
            self._accounts[name] = account
            if account.at > now + FUTURE and self._future.due():
                ahead = (account.at - now) / 1e6
                log.error("account %s: a send is dated %.0f s ahead of the clock", name, ahead)
        return tails

    def _fill(self, parts: Sequence[Part], now: int, tails: Mapping[str, Sequence[Sent]]) -> None:
        """Find the oldest sends of the windows in which none is remembered any more, or yet."""
        searches = []
        for name, period in {(part.account, w.period) for part in parts for w in part.windows}:
            account, tail = self._accounts[name], tails.get(name, ())
            at = max(now, account.at)
            if account.used(period, at) is not None:
                continue
            low = account.spans[period].gone if period in account.spans else 0
            high = tail[0].seq if tail else account.seq
            search = Search(account, period, at - period * 1_000_000, low, high)
            account.spans[period] = Span(list(filter(search.holds, tail)), account.seq)
            # Of the tail all is in memory already, of no tail not even `high`.
            unread = high - low - bool(tail)
            if unread > 0 and account.at >= search.start and all(map(search.holds, tail)):
                searches.append(search)
        for search, oldest in self._search(searches):
            search.account.spans[search.period] = Span(oldest, search.account.seq)

    def _search(self, searches: list[Search]) -> list[tuple[Search, list[Sent]]]:
        """Find the sends that are searched for, each with those that follow it, SPAN_ROWS at the
        most; all of them together."""
        while wanted := [(s.account.name, probes) for s in searches if (probes := s.probes())]:
            found = chains(self._store.some(wanted))
            searches = [search.narrowed(found[search.account.name]) for search in searches]
        found = chains(self._store.following([(s.account.name, s.low) for s in searches]))
        return [(s, list(filter(s.holds, found[s.account.name]))[:SPAN_ROWS]) for s in searches]

    def purge(self) -> bool:
        """Delete some sends older than the retention; False when there are no more.

        Raises Conflict, and Unavailable when the store cannot be opened either.
        """
        try:
            cutoff = self._store.now() - self._retention
            self._purged = self._store.purge(cutoff, self._purged)
        except Unavailable:  # an idle connection may have been closed
            self.open()
            return True
        return self._purged != NOWHERE


def every_part(charges: Iterable[Charge]) -> list[Part]:
    return [part for charge in charges for part in charge.parts]


# --- Stores ---------------------------------------------------------------------------------------

COLUMNS = ", ".join(Row._fields)
Mark = tuple[int, str, int]  # at, account, seq: how far a purge has come
NOWHERE: Mark = (0, "", 0)


class Store:
    """The table `sends`, in SQL that SQLite, MariaDB and MySQL share.

    Used by one thread. Every method raises Conflict or Unavailable. A subclass says how to connect,
    how to run a statement, and how its database writes a time: AT reads the column as microseconds
    since 1970, TIME makes a time of them.
    """

    AT = "at"
    TIME = "?"
    BEGIN = "BEGIN"
    LOCK = ""

    def __init__(self, patience: float) -> None:
        self.patience = patience  # seconds that a statement may take
        self._connection: Any = None
        self._error: type[Exception] = StoreError  # what the connection raises
        self._locked = False

    def open(self, deadline: float = math.inf) -> None:
        """Connect anew and make sure that sends can be read and written. Begins nothing after the
        deadline, in monotonic seconds."""
        raise NotImplementedError

    def close(self) -> None:
        self._locked = False
        if self._connection:
            with contextlib.suppress(self._error, OSError):
                self._connection.close()
            self._connection = None

    def now(self) -> int:
        """The database's time in microseconds since 1970, UTC."""
        raise NotImplementedError

    def _run(self, sql: str, values: Sequence[int | str] = ()) -> list[Any]:
        """Run a statement with a value for each `?`; return its rows."""
        raise NotImplementedError

    def _each(self, sql: str, many: Sequence[Sequence[int | str]]) -> list[Any]:
        """The rows that a SELECT gives for each of several lists of values, all together."""
        return [row for values in many for row in self._run(sql, values)]

    def _sends(self, which: str, many: Sequence[Sequence[int | str]]) -> list[Sent]:
        """The sends of several accounts, in no order."""
        columns = f"account, seq, epoch, {self.AT}, total - recipients, total"
        return [Sent(*r) for r in self._each(f"SELECT {columns} FROM sends WHERE {which}", many)]

    def newest(self, accounts: Sequence[str], *, lock: bool) -> list[Sent]:
        """The TAIL_ROWS newest sends of each account. With `lock` nobody else can append to these
        accounts until append() or rollback()."""
        if lock:
            self._run(self.BEGIN)
            self._locked = True
        tail = f"account = ? ORDER BY seq DESC LIMIT {TAIL_ROWS}"
        return self._sends(tail + (self.LOCK if lock else ""), [(name,) for name in accounts])

    def some(self, wanted: Sequence[tuple[str, Sequence[int]]]) -> list[Sent]:
        """PROBES sends of each account, by their numbers; those that are still there."""
        numbers = ", ".join("?" * PROBES)
        return self._sends(
            f"account = ? AND seq IN ({numbers})", [(a, *seqs) for a, seqs in wanted]
        )

    def following(self, wanted: Sequence[tuple[str, int]]) -> list[Sent]:
        """The next sends of each account after a number, twice SPAN_ROWS: some are not within the
        window that is searched for."""
        return self._sends(f"account = ? AND seq > ? ORDER BY seq LIMIT {2 * SPAN_ROWS}", wanted)

    def append(self, rows: Sequence[Row]) -> None:
        """Write all the rows or none; they are durable when this returns."""
        if rows:
            marks = ", ".join([f"(?, ?, ?, {self.TIME}, ?, ?, ?, ?)"] * len(rows))
            values = [value for row in rows for value in row]
            self._run(f"INSERT INTO sends ({COLUMNS}) VALUES {marks}", values)
        if self._locked:
            self._run("COMMIT")
            self._locked = False

    def rollback(self) -> None:
        """Give up the locks of newest(), if any; a connection that breaks here shows at its next
        use."""
        if self._locked:
            self._locked = False
            with contextlib.suppress(StoreError):
                self._run("ROLLBACK")

    def tokens(self, rows: Sequence[Row]) -> set[int]:
        """The tokens of whatever stands at these rows' keys."""
        select = "SELECT token FROM sends WHERE account = ? AND seq = ?"
        return {token for (token,) in self._each(select, [(r.account, r.seq) for r in rows])}

    def purge(self, before: int, after: Mark) -> Mark:
        """Look at some rows older than `before`, on from `after`, and delete those that are not
        their account's newest. Returns how far it came, NOWHERE when it is through."""
        at, account, seq = after
        newer = "SELECT 1 FROM sends AS n WHERE n.account = s.account AND n.seq > s.seq"
        found = self._run(
            f"SELECT {self.AT}, account, seq, EXISTS ({newer}) FROM sends AS s"
            f" WHERE at < {self.TIME} AND at >= {self.TIME} AND (at > {self.TIME}"
            " OR account > ? OR (account = ? AND seq > ?))"
            f" ORDER BY at, account, seq LIMIT {PURGE_ROWS}",
            (before, at, at, account, account, seq),
        )
        old = [(account, seq) for _, account, seq, superseded in found if superseded]
        if old:
            keys = " OR ".join(["(account = ? AND seq = ?)"] * len(old))
            self._run(f"DELETE FROM sends WHERE {keys}", [value for key in old for value in key])
        return tuple(found[-1][:3]) if len(found) == PURGE_ROWS else NOWHERE


class SQLiteStore(Store):
    """The embedded ledger: a file in WAL mode, every commit synced to disk. Several daemons on one
    machine may share it."""

    _connection: sqlite3.Connection | None
    BEGIN = "BEGIN IMMEDIATE"
    SCHEMA = (
        "CREATE TABLE IF NOT EXISTS sends (account TEXT NOT NULL, seq INTEGER NOT NULL,"
        " epoch INTEGER NOT NULL, at INTEGER NOT NULL, recipients INTEGER NOT NULL,"
        " total INTEGER NOT NULL, instance TEXT NOT NULL, token INTEGER NOT NULL,"
        " PRIMARY KEY (account, seq)) WITHOUT ROWID",
        "CREATE INDEX IF NOT EXISTS sends_at ON sends (at)",
    )

    def __init__(self, path: Path, patience: float) -> None:
        super().__init__(patience)
        self._path = path
        self._error = sqlite3.Error
        self._inode = 0

    def __str__(self) -> str:
        return f"SQLite {self._path}"

    def open(self, deadline: float = math.inf) -> None:
        self.close()
        try:
            self._connection = sqlite3.connect(
                self._path, timeout=self.patience, isolation_level=None, check_same_thread=False
            )
            self._run("PRAGMA journal_mode = WAL")
            self._run("PRAGMA synchronous = FULL")
            self._run(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
            for statement in self.SCHEMA:
                self._run(statement)
            self._run("BEGIN IMMEDIATE")
            self._run("ROLLBACK")
            self._inode = self._path.stat().st_ino
            log.info("connected: %s", self)
        except (sqlite3.Error, StoreError, OSError) as error:
            self.close()
            raise Unavailable(f"{self._path}: {error}") from None

    def now(self) -> int:
        if not self._connection:
            raise Unavailable("not connected")
        try:
            same = self._path.stat().st_ino == self._inode
            trouble = "" if same else "replaced by another file"
        except OSError as error:
            trouble = str(error.strerror)
        if trouble:
            log.error("%s: %s: what was counted in it is lost", self._path, trouble)
            raise Unavailable(f"{self._path}: {trouble}")
        return time.time_ns() // 1000

    def _run(self, sql: str, values: Sequence[int | str] = ()) -> list[Any]:
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
            if os.access(self._path.parent, os.W_OK):
                return f"{self}: will be made at the first start"
            raise Unavailable(f"{self._path}: no such file, and its directory is not writable")
        # Without a -wal file nobody has it open; "immutable" keeps SQLite from making one.
        mode = "mode=ro" if Path(f"{self._path}-wal").exists() else "immutable=1"
        uri = f"{self._path.absolute().as_uri()}?{mode}"
        try:
            self._connection = sqlite3.connect(uri, uri=True, timeout=self.patience)
            self._run(f"SELECT {COLUMNS} FROM sends LIMIT 0")
        except (sqlite3.Error, StoreError) as error:
            raise Unavailable(f"{self._path}: {error}") from None
        finally:
            self.close()
        if not os.access(self._path, os.W_OK):
            raise Unavailable(f"{self._path}: not writable")
        return f"{self}: table sends found"


def load_connector() -> Any:
    """mysql-connector-python. Its C extension brings a libssl of its own, which on Debian 12 does
    not load any more when the interpreter's ssl has come first."""
    with contextlib.suppress(ImportError):
        importlib.import_module("_mysql_connector")
    try:
        return importlib.import_module("mysql.connector")
    except ImportError:
        raise Unavailable(
            "mysql-connector-python is missing: run /opt/saslquota/venv/bin/pip install"
            " mysql-connector-python (or pip install with the Python that runs saslquota)"
        ) from None


class MySQLStore(Store):
    """The ledger in MySQL or MariaDB; on the nodes of a Galera cluster, too."""

    AT = "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', at)"
    TIME = "TIMESTAMP '1970-01-01 00:00:00' + INTERVAL ? MICROSECOND"
    LOCK = " FOR UPDATE"
    # 1062 duplicate key, 1213 deadlock (Galera: certification), 3101 Group Replication, 1020 record
    # changed since the snapshot (MariaDB 11)
    CONFLICTS = frozenset({1062, 1213, 3101, 1020})
    LOCK_WAIT_TIMEOUT = 1205

    def __init__(self, config: Config) -> None:
        super().__init__(max(1, config.dbtimeout // 2))  # whole seconds; time for a second try
        self._config = config
        self._hosts = collections.deque(config.myhost)
        self._cursor: Any = None
        self._suspect = False  # the current host has failed
        self._cluster = False
        self._connector = ""  # which of its two implementations runs

    def __str__(self) -> str:
        where = self._hosts[0] if self._connection else ", ".join(self._config.myhost)
        return f"MySQL {self._config.mydb} on {where}"

    def open(self, deadline: float = math.inf) -> None:
        """Connect to the first host that takes sends, beginning with the last that did unless it
        has failed."""
        self.close()
        connector = load_connector()
        self._error = connector.Error
        self._connector = "C extension" if connector.HAVE_CEXT else "pure Python"
        if self._suspect:
            self._hosts.rotate(-1)
        failures: list[str] = []
        for _ in range(len(self._hosts)):
            if failures and time.monotonic() + self.patience > deadline:
                break
            try:
                self._connect(connector, self._hosts[0])
                self._suspect = False
                log.info("connected: %s, connector: %s", self, self._connector)
                return
            except (self._error, StoreError, OSError) as error:
                self.close()
                failures.append(f"{self._hosts[0]}: {self._explain(error)}")
                self._hosts.rotate(-1)
        raise Unavailable("; ".join(failures))

    def _connect(self, connector: Any, name: str) -> None:
        config = self._config
        where: dict[str, Any] = {"unix_socket": name.removeprefix("unix:")}
        if found := split_host(name, config.myport):
            where = {"host": found[0], "port": found[1]}
        tls: dict[str, Any] = {}
        if config.mysslca:
            ca = str(config.beside(config.mysslca))
            tls = {"ssl_ca": ca, "ssl_verify_cert": True, "ssl_verify_identity": True}
        self._connection = connector.connect(
            **where,
            **tls,
            user=config.myuser,
            password=config.mypasswd,
            database=config.mydb,
            charset="utf8mb4",
            collation="utf8mb4_bin",
            autocommit=True,
            use_pure=not connector.HAVE_CEXT,
            connection_timeout=self.patience,
            read_timeout=self.patience,
            write_timeout=self.patience,
        )
        self._cursor = self._connection.cursor()  # one for all: making one pings the server
        for lock in ("innodb_lock_wait_timeout", "lock_wait_timeout"):
            self._run(f"SET SESSION {lock} = {LOCK_WAIT}")
        self._run("SET SESSION sql_mode = 'STRICT_ALL_TABLES'")
        self._run("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        self._cluster = bool(self._run("SHOW VARIABLES LIKE 'wsrep_sync_wait'"))
        self._run(f"SELECT {COLUMNS} FROM sends LIMIT 0")
        # Writes nothing, but fails wherever a send would: read-only, a global lock, no right to.
        self._run(f"INSERT INTO sends ({COLUMNS}) SELECT {COLUMNS} FROM sends WHERE FALSE")

    def _explain(self, error: Exception) -> str:
        """The error with its remedy, where there is one."""
        config = self._config
        grant = f"grant all on {config.mydb}.* to the user of the error message"
        remedies = {
            1044: grant,
            1045: f"check _myuser and _mypasswd in {config.path}, and {grant}",
            1049: f"create database {config.mydb}",
            1054: f"the table sends is not that of mysql.sql; run mysql {config.mydb} < mysql.sql"
            " after renaming it",
            1142: grant,
            1146: f"run mysql {config.mydb} < mysql.sql",
            2002: "is the server running? check _myhost",
            2003: "is the server running? check _myhost and _myport",
        }
        cause = error.__cause__ if isinstance(error, StoreError) else error
        number = getattr(cause, "errno", None)
        message = " ".join(str(error).split())
        return f"{message} - {remedies[number]}" if number in remedies else message

    def now(self) -> int:
        (row,) = self._run("SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))")
        return int(row[0])

    @staticmethod
    def _write(sql: str, values: Sequence[int | str]) -> str:
        """The statement with its values as literals. Texts go as hexadecimal: there is nothing to
        escape, whatever the server's sql_mode."""
        literals = [
            f"_utf8mb4 x'{value.encode().hex()}'" if type(value) is str else value
            for value in values
        ]
        return sql.replace("?", "%s") % tuple(literals)

    def _run(self, sql: str, values: Sequence[int | str] = ()) -> list[Any]:
        if not self._connection:
            raise Unavailable("not connected")
        try:
            statement = self._write(sql, values) if values else sql
            if sql.startswith("INSERT"):  # no rows: spare what a cursor does around it
                self._connection.cmd_query(statement)
                return []
            self._cursor.execute(statement)
            return self._cursor.fetchall() if self._cursor.with_rows else []
        except (self._error, OSError) as error:
            number = getattr(error, "errno", None)
            if number == self.LOCK_WAIT_TIMEOUT:
                raise Locked(str(error)) from error
            if number in self.CONFLICTS:
                raise Conflict(str(error)) from error
            self._suspect = True
            raise Unavailable(str(error)) from error

    def _each(self, sql: str, many: Sequence[Sequence[int | str]]) -> list[Any]:
        """In one statement: a round trip may be long."""
        if not many:
            return []
        return self._run(" UNION ALL ".join(f"({self._write(sql, values)})" for values in many))

    def newest(self, accounts: Sequence[str], *, lock: bool) -> list[Sent]:
        if lock:  # should this machine vanish now, the server must not keep the locks for hours
            self._run(f"SET SESSION wait_timeout = {self.patience + 1}")
        return super().newest(accounts, lock=lock)

    def append(self, rows: Sequence[Row]) -> None:
        locked = self._locked
        super().append(rows)
        if locked:
            self._run("SET SESSION wait_timeout = DEFAULT")

    def tokens(self, rows: Sequence[Row]) -> set[int]:
        if self._cluster:  # on Galera another node's commit may be on its way still
            self._run("SET SESSION wsrep_sync_wait = 1")
        found = super().tokens(rows)
        if self._cluster:
            self._run("SET SESSION wsrep_sync_wait = 0")
        return found

    def check(self) -> str:
        """What --check says of the store. Raises Unavailable."""
        self.open()
        (row,) = self._run("SELECT VERSION()")
        found = f"{self}: {row[0]}, table sends found, connector: {self._connector}"
        self.close()
        return found


# --- Committer ------------------------------------------------------------------------------------


class Job:
    """A charge on its way to the ledger, and its verdict on the way back."""

    __slots__ = ("_claim", "_deliver", "_error", "_unanswered", "charge", "deadline")

    def __init__(
        self, charge: Charge, deadline: float, deliver: Callable[[Verdict | None], None]
    ) -> None:
        self.charge = charge
        self.deadline = deadline  # monotonic seconds
        self._deliver = deliver
        self._error: Exception | None = None
        self._claim = threading.Lock()  # held for good by the one who answers
        self._unanswered = threading.Lock()
        self._unanswered.acquire()

    def answer(self, verdict: Verdict | None) -> None:
        """Deliver the verdict, None for the fallback, in this thread; only the first one counts."""
        if self._claim.acquire(blocking=False):
            try:
                self._deliver(verdict)
            except Exception as error:  # noqa: BLE001 - no bug may end the thread all wait for
                self._error = error
            self._unanswered.release()

    @property
    def answered(self) -> bool:
        return not self._unanswered.locked()

    def wait(self) -> None:
        """Return when it has been answered; at its deadline the answer is the fallback. Raises what
        went wrong in the delivery."""
        if not self._unanswered.acquire(timeout=max(0.0, self.deadline - time.monotonic())):
            self.answer(None)
            self._unanswered.acquire()  # another thread may be about to deliver
        self._unanswered.release()
        if self._error:
            raise self._error


class Committer(threading.Thread):
    """Lets one thread at a time use the ledger. A request that finds it free is committed by its
    own thread. Whatever arrives meanwhile becomes the committer's next batch, which waits for
    nothing else: the busier it is, the larger the batches."""

    def __init__(self, ledger: Ledger, timeout: float) -> None:
        super().__init__(name="committer", daemon=True)
        self._ledger = ledger
        self._timeout = timeout  # seconds until a decision falls back
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._down = False  # known to be: nobody waits for it
        self._refused: dict[str, tuple[Charge, Verdict]] = {}  # by account
        self._locked: dict[str, float] = {}  # by account; left alone until then, monotonic seconds
        self._batch: Sequence[Job] = ()  # what the ledger is at work on
        self._taken: list[Job] = []  # from the queue, by the thread itself
        self._at_work = threading.Lock()  # whoever holds it uses the ledger
        self._wanted = False  # the committer has a batch and waits for the lock
        self._stopping = False
        self._due = 0.0  # monotonic seconds; when the next chore is
        self._complained: float | None = None  # when the log was told of a trouble that lasts

    # For the connections' threads.

    def submit(self, charge: Charge, deliver: Callable[[Verdict | None], None]) -> Job | None:
        """Let the ledger's verdict be delivered, by this thread or another; None when there is none
        in time, or the store is down. Returns what is not answered yet, if anything.
        """
        if self._down:
            deliver(None)
            return None
        if refusal := self._refused.get(charge.account):
            before, verdict = refusal
            if same_answer(charge, before, verdict) and time.monotonic() < verdict.until:
                deliver(verdict)
                return None
        job = Job(charge, time.monotonic() + self._timeout, deliver)
        if not self._wanted and self._at_work.acquire(blocking=False):
            try:  # nobody is at work: to wake another thread would take longer than the work
                self._serve([job])
            finally:
                self._at_work.release()
            job.wait()
            return None
        self._jobs.put(job)
        return job

    def stop(self, timeout: float) -> None:
        """Finish what has been submitted and end, within so many seconds."""
        self._jobs.put(None)
        self.join(timeout)

    def give_up(self) -> None:
        """Whoever still waits shall have the fallback, and soon."""
        self._ledger.stopping = True
        self._flush()

    def _flush(self) -> None:
        self._down = True
        for job in [*self._batch, *self._taken]:
            job.answer(None)
        with contextlib.suppress(queue.Empty):
            while (waiting := self._jobs.get_nowait()) is not None:
                waiting.answer(None)
            self._stopping = True  # that was stop()'s

    # The thread itself.

    def run(self) -> None:
        while not self._stopping:
            self._taken = []
            with contextlib.suppress(queue.Empty):
                self._take(timeout=max(0.0, min(RETRY, self._due - time.monotonic())))
            self._wanted = True
            while not self._at_work.acquire(timeout=OVERDUE):
                for job in self._batch:  # a thread at work cannot watch over its own request
                    if job.deadline <= time.monotonic():
                        job.answer(None)
            try:
                with contextlib.suppress(queue.Empty):
                    while len(self._taken) < MAX_BATCH:
                        self._take(timeout=0.0)
                self._serve(self._taken)
                if time.monotonic() >= self._due:
                    self._chore()
            finally:
                self._at_work.release()
            self._wanted = False
        self._ledger.close()

    def _take(self, timeout: float) -> None:
        """Take a job from the queue. Raises queue.Empty."""
        if job := self._jobs.get(block=timeout > 0, timeout=timeout):
            self._taken.append(job)
        else:
            self._stopping = True

    def _serve(self, jobs: Sequence[Job]) -> None:
        """Charge a batch. The lock is held. An account whose rows somebody else has locked is
        charged after the others and by itself, one in a batch: nobody else shall wait for long."""
        together = [job for job in jobs if job.charge.account not in self._locked]
        if not self._charge(together):  # whose rows they are is not known yet
            self._locked.update((job.charge.account, 0.0) for job in together)
        apart: dict[str, list[Job]] = {}
        for job in jobs if self._locked else ():
            if job.charge.account in self._locked:
                apart.setdefault(job.charge.account, []).append(job)
        waited = False
        for account, part in sorted(apart.items(), key=lambda item: self._locked[item[0]]):
            if waited:
                for job in part:
                    self._jobs.put(job)
            else:
                waited = not self._charge_apart(account, part)

    def _charge_apart(self, account: str, jobs: Sequence[Job]) -> bool:
        """Charge one account, unless its rows were found locked a moment ago; False when they are
        found locked now."""
        if self._locked[account] > time.monotonic():
            self._tell(jobs, [None] * len(jobs))
            return True
        if self._charge(jobs):
            del self._locked[account]
            return True
        self._locked[account] = time.monotonic() + LOCK_PAUSE
        log.warning("account %s: not counted, another session has locked its rows", account)
        self._tell(jobs, [None] * len(jobs))
        return False

    def _charge(self, jobs: Sequence[Job]) -> bool:
        """Charge jobs and tell each its verdict; False, and nothing is told, when rows of one of
        the accounts are locked."""
        now = time.monotonic()
        jobs = self._batch = [job for job in jobs if job.deadline > now]  # else given up already
        verdicts: Sequence[Verdict | None] = [None] * len(jobs)
        try:
            if jobs and not self._down:
                deadline = max(job.deadline for job in jobs)
                verdicts = self._ledger.charge([job.charge for job in jobs], deadline)
                self._succeed()
        except Locked:
            return False
        except Exception as error:  # noqa: BLE001 - no bug may end the thread all wait for
            self._fail(error)
        self._tell(jobs, verdicts)
        return True

    def _tell(self, jobs: Sequence[Job], verdicts: Sequence[Verdict | None]) -> None:
        for job, verdict in zip(jobs, verdicts, strict=True):
            if verdict and not verdict.accepted:
                self._remember(job.charge, verdict)
            job.answer(verdict)

    def _remember(self, charge: Charge, refusal: Verdict) -> None:
        """A stolen account asks thousands of times: spare the ledger its next refusals."""
        if len(self._refused) >= CACHED_ACCOUNTS:
            self._refused.clear()
        self._refused[charge.account] = (charge, refusal)

    def _chore(self) -> None:
        """Purge a little, or try to open a store that was down."""
        pause = PURGE_PAUSE
        try:
            if self._down:
                self._ledger.open()
                self._down = False
            elif not self._ledger.purge():
                pause = PURGE_INTERVAL
        except Conflict as error:
            log.debug("purge put off: %s", error)
            pause = PURGE_PUT_OFF
        except Exception as error:  # noqa: BLE001 - as in _serve
            self._fail(error)
            pause = RETRY
        self._due = time.monotonic() + pause

    def _succeed(self) -> None:
        if self._complained is not None:
            self._complained = None
            log.warning("sends are counted again")

    def _fail(self, error: Exception) -> None:
        """Give everybody the fallback at once until the store can be opened again."""
        self._down = True
        now = time.monotonic()
        self._due = now + RETRY
        if self._complained is None or now - self._complained >= REMINDER:
            self._complained = now
            bug = None if isinstance(error, StoreError) else error
            log.error("sends are not counted, the store cannot be used: %s", error, exc_info=bug)
        self._flush()


def same_answer(charge: Charge, before: Charge, refusal: Verdict) -> bool:
    """Whether the refusal of one charge is, to the letter, that of another one soon after it: of
    an equal one, or of a larger one that has no other window and need not be told when it fits."""
    if charge.parts == before.parts:
        return True
    (part, *others), old = charge.parts, before.parts[0]
    single = not others and len(before.parts) == len(part.windows) == 1
    larger = part.windows == old.windows and part.recipients >= old.recipients
    return single and larger and refusal.retry is None


# --- Policy ---------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """The action for Postfix, and why."""

    action: str
    rule: Rule | None = None
    verdict: Verdict | None = None
    reason: str = ""  # why nothing was counted
    msg: str = ""  # of the window that has no room


class Message:
    """What a connection remembers of the message that it asked about last: with "count":
    "messages" it is charged once, however often Postfix asks."""

    def __init__(self) -> None:
        self._key: object = None
        self.charged = False  # to the accounts that count messages
        self.answer: Answer | None = None  # which is repeated

    def begin(self, account: str, instance: str, rules: tuple[Rule, ...]) -> None:
        """Forget it if this is another one, or cannot be told from another one: an empty instance
        (SMTPD_POLICY_README: before MAIL FROM)."""
        if not instance or self._key != (account, instance, rules):
            self._key = (account, instance, rules)
            self.charged, self.answer = False, None

    def settle(self, answer: Answer, rules: tuple[Rule, ...]) -> None:
        """Remember what has been decided."""
        verdict = answer.verdict
        if verdict and verdict.accepted:
            self.charged = True
            final = all(rule.per_message for rule in rules)
        else:
            final = verdict is not None and verdict.window.count == "messages"
        if final:
            self.answer = answer


class Policy:
    """Decides what is answered to a request."""

    COUNTED = frozenset({"MAIL", "RCPT", "DATA", "END-OF-MESSAGE"})
    TOO_EARLY = frozenset({"CONNECT", "EHLO", "HELO"})  # nobody can have logged in
    PER_MESSAGE = frozenset({"DATA", "END-OF-MESSAGE"})  # once, with the number of recipients

    def __init__(self, config: Config, rules: RulesFile, committer: Committer) -> None:
        self._rules = rules
        self._committer = committer
        self._accept = config.okaction
        self._nosasl = "REJECT authentication required" if config.nosasl == "REJECT" else "DUNNO"
        fallback = "DEFER_IF_PERMIT quota service unavailable, try again later"
        self._fallback = "OK" if config.onfailure == "OK" else fallback

    def check(
        self, request: Request, message: Message, deliver: Callable[[Answer], None]
    ) -> Job | None:
        """Charge the sender, and let what Postfix shall do be delivered: see Committer.submit().
        `message` is what the connection remembers."""
        account = valid(request.sasl_username.strip().lower())  # Bob@x and `bob@x ` are one sender
        answer = self._uncounted(request, account)
        if not answer:
            instance = valid(request.instance)[:MAX_INSTANCE]
            rules = self._rules.rules.every(account)
            message.begin(account, instance, rules)
            answer = message.answer
        if answer:
            deliver(answer)
            return None
        parts = [
            Part(POOL + rule.key if rule.pool else account, cost(request, rule), rule.windows)
            for rule in rules
            if not (rule.per_message and message.charged)
        ]

        def settle(verdict: Verdict | None) -> None:
            answer = self._answer(account, rules[0], verdict)
            message.settle(answer, rules)
            deliver(answer)

        return self._committer.submit(Charge(instance, tuple(parts)), settle)

    def _uncounted(self, request: Request, account: str) -> Answer | None:
        """The answer to what no rule is asked about."""
        if request.protocol_state not in self.COUNTED:
            return Answer("DUNNO", reason=f"asked at {request.protocol_state}")
        if not account:
            return Answer(self._nosasl, reason="no sasl_username")
        if len(account) > MAX_ACCOUNT:
            return Answer("REJECT login name too long", reason="sasl_username is too long")
        return None

    def _answer(self, account: str, rule: Rule, verdict: Verdict | None) -> Answer:
        if verdict is None:
            return Answer(self._fallback, rule, reason="the store did not answer")
        if not verdict.over:
            return Answer(self._accept, rule, verdict)
        msg = fill_in(account, verdict)
        action = self._accept if verdict.accepted else f"{verdict.window.action} {msg}"
        return Answer(action, rule, verdict, msg=msg)


def fill_in(account: str, verdict: Verdict) -> str:
    """The text of a refusal."""
    window = verdict.window
    if "{" not in window.msg and "}" not in window.msg:
        return window.msg
    values = {
        "sasl_username": CONTROL.sub("?", account),
        "rule": window.rule,
        "used": verdict.used,
        "msgquota": window.limit,
        "period": format_time(window.period),
        "retry_after": format_wait((verdict.retry or 0.0) - time.monotonic()),
    }
    return window.msg.format_map(values)


def cost(request: Request, rule: Rule) -> int:
    """How much of what the rule counts a request stands for."""
    whole = request.protocol_state in Policy.PER_MESSAGE and not rule.per_message
    return max(1, request.recipient_count) if whole else 1


def valid(value: str) -> str:
    """The value as UTF-8 that every database takes: bytes that were none are spelled out."""
    return value.encode("utf-8", "backslashreplace").decode()


# --- Server ---------------------------------------------------------------------------------------


@functools.cache
def libc_send() -> Callable[[int, bytes, int, int], int]:
    send = ctypes.PyDLL(None).send
    send.argtypes = ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
    send.restype = ctypes.c_ssize_t
    return send


def send_at_once(connection: socket.socket, data: bytes) -> int:
    """Send what the kernel takes without waiting; return how many bytes that were.

    Unlike socket.send() it keeps the interpreter's lock: the call takes microseconds, to get the
    lock back among many threads takes far longer (bench/README.md).
    """
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    return max(0, libc_send()(connection.fileno(), data, len(data), flags))


class PolicyHandler(socketserver.BaseRequestHandler):
    """One connection, in a thread of its own, which reads requests and submits them. Whoever has
    the answer, the committer as a rule, sends it and then logs it: to wake this thread for that,
    which can wait for the next request already, would cost a lot (bench/README.md)."""

    request: socket.socket
    server: PolicyServer
    numbers = itertools.count(1)

    def setup(self) -> None:
        self.number = next(self.numbers)
        self._started = self._answered = time.monotonic()
        self.waiting = True  # for the client to begin a request
        self._deadline: float | None = self._started + self.server.patience
        self._message = Message()
        self._job: Job | None = None  # the last request, while it may be unanswered
        self._unsent = b""  # of its reply: what the client did not take at once
        self._limit = 0.0  # seconds that a recv() may wait, 0 for ever
        self.served = False  # whether it has ever asked; Postfix connects to ask at once
        self.server.handlers.add(self)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._bound(socket.SO_SNDTIMEO, self.server.patience)
        log.debug("[%d] thread started", self.number)

    def handle(self) -> None:
        try:
            self._serve()
        except ProtocolError as error:
            log.warning("[%d] malformed input, connection closed: %s", self.number, error)
        except (TimeoutError, BlockingIOError):
            log.info("[%d] connection closed, it took more than _bindtimeout", self.number)
        except OSError as error:
            log.info("[%d] connection lost: %s", self.number, error.strerror)

    def _serve(self) -> None:
        stream = RequestStream(self._receive)
        try:
            while request := stream.read_request():
                self._settle()
                self._deadline = None
                deliver = functools.partial(self._deliver, request)
                self._job = self.server.policy.check(request, self._message, deliver)
                if stream.more:  # a client in a hurry gives the others their turn
                    time.sleep(0)
        finally:
            self._settle()

    def finish(self) -> None:
        self.server.handlers.discard(self)
        log.debug("[%d] thread stopped : (%.4f)", self.number, time.monotonic() - self._started)

    def _settle(self) -> None:
        """Wait until the last request is answered, and the reply taken. Raises OSError."""
        try:
            if self._job:
                self._job.wait()
            if self._unsent:
                self.request.sendall(self._unsent)
        finally:
            self._job, self._unsent = None, b""

    def _receive(self, begun: bool) -> bytes:
        """The next bytes. Between requests it waits for ever: Postfix keeps its connections. The
        first request, and one that has begun, have a deadline. Raises TimeoutError."""
        if begun and self._deadline is None:
            self._settle()
            self._deadline = time.monotonic() + self.server.patience
        self.waiting = not begun
        try:
            while True:
                if self._deadline is not None:
                    limit = self._deadline - time.monotonic()
                    if limit <= 0:
                        raise TimeoutError
                else:  # the watchdog of its own last request
                    limit = WATCH if self._job or self._unsent else 0
                if limit != self._limit:
                    self._limit = limit
                    self._bound(socket.SO_RCVTIMEO, limit)
                with contextlib.suppress(BlockingIOError):
                    return self.request.recv(RECEIVE)
                self._settle()
        finally:
            self.waiting = False

    def _bound(self, option: int, seconds: float) -> None:
        """Let the kernel bound how long a call waits, 0 for ever: settimeout() would cost a poll()
        for each."""
        limit = divmod(math.ceil(seconds * 1e6), 1_000_000)
        self.request.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", *limit))

    def _deliver(self, request: Request, answer: Answer) -> None:
        """Answer a request, in any thread: nothing here may wait."""
        reply = format_reply(answer.action)
        self._unsent = reply[send_at_once(self.request, reply) :]
        self._log(request, answer)
        self.served = True
        self._answered = time.monotonic()

    @property
    def idle_since(self) -> float | None:
        """Monotonic seconds; None while a request or a reply is under way."""
        answered = self._job is None or self._job.answered
        return self._answered if self.waiting and answered and not self._unsent else None

    def _log(self, request: Request, answer: Answer) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("[%d] end of recv: (%d)", self.number, request.size)
            if answer.rule:
                log.debug("[%d] quota rule selected: (%s)", self.number, answer.rule.key)
            log.debug("thread count: %d", len(self.server.handlers) + 1)
        if answer.verdict:
            level = logging.WARNING if answer.verdict.over else logging.INFO
        elif answer.action != "DUNNO":
            level = logging.WARNING
        else:
            level = logging.DEBUG
            if self.server.uncounted.due():
                early = request.protocol_state in Policy.TOO_EARLY
                hint = "; see smtpd_delay_reject" if early else ""
                log.warning("nothing is counted: %s%s", answer.reason, hint)
        if log.isEnabledFor(level):
            self.server.tell(level, f"[{self.number}] {verdict_line(request, answer)}")


def verdict_line(request: Request, answer: Answer) -> str:
    """What the log tells of a decision."""
    verdict, msg = answer.verdict, ""
    counted = f"not counted ({answer.reason}), action={answer.action}"
    if verdict:
        used, window = verdict.used, verdict.window
        share = 100 * used / window.msgquota if window.msgquota else 100
        counted = f"rule={window.rule}, quota {used}/{window.limit} ({share:.2f}%),"
        counted += f" period={window.period}, action={window.action if verdict.over else 'ACCEPT'}"
        counted += " (not enforced)" if verdict.over and verdict.accepted else ""
        msg = f", msg={answer.msg}" if verdict.over else ""
    login, rcpt, sender = map(field, (request.sasl_username, request.recipient, request.sender))
    return (
        f"sasl_username={login}, rcpt={rcpt}, {counted}, sender={sender}, "
        f"client_address={field(request.client_address)}, instance={field(request.instance)}{msg}"
    )


def field(value: str) -> str:
    """The value so that it cannot look like more fields: addresses may hold commas and spaces."""
    return value.replace(", ", r",\x20")


class PolicyServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens, and starts a PolicyHandler for each connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, config: Config, policy: Policy) -> None:
        """Raises ConfigError when the address cannot be listened on."""
        self.policy = policy
        self.patience = config.bindtimeout
        self.handlers: set[PolicyHandler] = set()
        self.tell: Callable[[int, str], None] = log.log  # where the verdict lines go
        self.uncounted = Seldom(REMINDER)
        self._refused = Seldom(1.0)
        self._allow = config.allow
        local = config.bind.startswith("unix:")
        self._path = str(config.beside(config.bind.removeprefix("unix:"))) if local else ""
        self.capacity = min(config.maxconnections, raise_descriptor_limit() - 32)  # connections
        where = config.bind if self._path else f"{config.bind}:{config.bindport}"
        try:
            self._listen(config)
        except OSError as error:
            reason = f"cannot listen on {where}: {error.strerror or error}"
            raise ConfigError(f"{config.path}: {reason}; see _bind and _bindport") from None

    def _listen(self, config: Config) -> None:
        if self._path:
            remove_stale_socket(self._path)
            self.address_family = socket.AF_UNIX
            super().__init__(self._path, PolicyHandler)  # type: ignore[arg-type]
            os.chmod(self._path, 0o660)
            return
        found = socket.getaddrinfo(config.bind, config.bindport, type=socket.SOCK_STREAM)
        self.address_family, *_, address = found[0]
        super().__init__(address, PolicyHandler)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self._path:
            return f"unix:{self._path}"
        host, port = self.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

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
                if self._refused.due():
                    log.warning("connection from %s refused, see _allow", address)
                return False
        if len(self.handlers) >= self.capacity:
            self._make_room()
        return True

    def _make_room(self) -> None:
        """Close the connection that has been idle longest; first of those that have never asked."""
        handlers = list(self.handlers)
        idle = [(h.served, since, h.number, h) for h in handlers if (since := h.idle_since)]
        if idle:
            *_, number, handler = min(idle)
            log.warning("[%d] closed to make room for another, see _maxconnections", number)
            handler.waiting = False
            hang_up(handler.request, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection ended with an error")

    def stop(self) -> None:
        """Take no more connections, and no more requests than have arrived."""
        self.shutdown()
        self.server_close()
        for handler in list(self.handlers):
            hang_up(handler.request, socket.SHUT_RD)

    def drained(self, timeout: float) -> bool:
        """Wait so many seconds for the connections to end; whether they have."""
        deadline = time.monotonic() + timeout
        while self.handlers and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.handlers

    def server_close(self) -> None:
        super().server_close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def hang_up(connection: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(how)


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
                raise OSError(errno.EEXIST, "a file stands there that is no socket") from None
            os.unlink(path)
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


# --- Logging --------------------------------------------------------------------------------------


class Seldom:
    """Lets something be said once in so many seconds."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._last = -math.inf

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._interval:
            return False
        self._last = now
        return True


def printable(line: str) -> str:
    """The line with control characters and broken UTF-8 spelled out: it stays one line, and
    UTF-8."""
    if line.isprintable():
        return line
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else escaped(c) for c in line
    )


def escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class OneLine(logging.Formatter):
    """Whatever a client sent, or a traceback: one line, that fits a datagram."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)[:MAX_LINE])


class Syslog(SysLogHandler):
    """The standard library's, but a socket that takes a line at once is not waited for."""

    append_nul = False
    socket: Any

    def emit(self, record: logging.LogRecord) -> None:
        priority = self.encodePriority(self.facility, self.mapPriority(record.levelname))
        line = f"<{priority}>{self.format(record)}".encode()
        if send_at_once(self.socket, line) < len(line):  # it is full, gone, or UDP
            super().emit(record)


class LogWriter(logging.Handler):
    """Hands lines to a thread that writes them, those of a moment together: neither a log that is
    stuck nor the waking of another thread for each line holds up a reply."""

    def __init__(self, target: logging.Handler, *, on_stdout: bool) -> None:
        super().__init__()
        self.on_stdout = on_stdout
        self._target = target
        self._lines: collections.deque[tuple[int, str]] = collections.deque()
        self._lost = 0
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        self.write(record.levelno, self.format(record))

    def write(self, level: int, line: str) -> None:
        """Take a line that is ready. A record for each verdict would cost a tenth of all."""
        if len(self._lines) < LOG_BACKLOG:
            self._lines.append((level, line[:MAX_LINE]))
        else:
            self._lost += 1
        if not self._wake.is_set():
            self._wake.set()

    def _write(self) -> None:
        while not self._stopping:
            self._wake.wait()
            time.sleep(LOG_PAUSE)
            self._wake.clear()
            record = logging.makeLogRecord({})
            written = 0
            while self._lines:
                record.levelno, record.msg = self._lines.popleft()
                record.levelname = logging.getLevelName(record.levelno)
                self._target.emit(record)
                written += 1
                if written % LOG_SLICE == 0:
                    time.sleep(0)  # the others' turn
            if self._lost:
                lost, self._lost = self._lost, 0
                log.error("%d log lines were lost", lost)

    def stop(self, timeout: float) -> None:
        """Write what is left, if the log takes it within so many seconds."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)


def start_logging(config: Config) -> LogWriter:
    """Log as configured. Raises ConfigError."""
    target, address = log_handler(config)
    form = f"postfix/saslquota[{os.getpid()}]:%(message)s"
    target.setFormatter(OneLine(form if address else f"%(asctime)s {form}"))
    writer = LogWriter(target, on_stdout=not address)
    log.handlers = [writer]
    log.propagate = False
    log.setLevel(config.loglevel)
    # What is in no line of ours need not be found out (the logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.raiseExceptions = False
    return writer


def log_handler(config: Config) -> tuple[logging.Handler, str]:
    """The handler, and where it writes to if that is not stdout."""
    address = config.logaddress or "/dev/log"
    without = not config.logaddress and not os.path.exists(address)
    if config.loghandler == "stdout" or without:
        return logging.StreamHandler(sys.stdout), ""
    try:
        local = address.startswith("/")
        handler = Syslog(address if local else (address, config.logport), config.logfacility)
    except OSError as error:
        raise ConfigError(f"{config.path}: _logaddress: {address}: {error.strerror}") from None
    return handler, address


# --- main -----------------------------------------------------------------------------------------


def make_store(config: Config) -> SQLiteStore | MySQLStore:
    if config.store == "sqlite":
        return SQLiteStore(config.beside(config.sqlitefile), patience=1.0)
    return MySQLStore(config)


def check(config: Config) -> int:
    """Say what is found in configuration, rules and store; 0 when all is well."""
    status = 0
    print(f"{config.path}: read")
    try:
        path = config.beside(config.quotafile)
        for rule in load_rules(path, config.retentiondays * 86400):
            for window in rule.windows:
                print(f"{path}: {rule.key}: {rule.senders()}: {window.words()}")
    except ConfigError as error:
        print(error)
        status = 1
    try:
        print(make_store(config).check())
    except StoreError as error:
        print(error)
        status = 1
    return status


def risks(config: Config) -> list[str]:
    """What an administrator should know about this set-up."""
    found = []
    if os.geteuid() == 0:
        found.append("running as root: an unprivileged user suffices")
    mode = config.path.stat().st_mode
    if config.mypasswd and config.store == "mysql" and mode & stat.S_IROTH:
        found.append(f"{config.path} holds a password and is readable by everybody: chmod o-r")
    loopback = config.bind in ("localhost", "::1") or config.bind.startswith(("127.", "unix:"))
    if not loopback and not config.allow:
        found.append(f"_bind {config.bind} is open to other machines: set _allow")
    return found


def serve(config: Config) -> int:
    """Run the daemon until a signal ends it. Raises ConfigError for what cannot be started."""
    # A thread that has waited so long for the interpreter's lock asks again, behind all others:
    # with hundreds of connections 5 ms, the default, let some starve (bench/README.md).
    sys.setswitchinterval(0.1)
    caught = catch_signals()
    threading.stack_size(512 * 1024)
    rules = RulesFile(config.beside(config.quotafile), config.retentiondays * 86400)
    store = make_store(config)
    committer = Committer(Ledger(store, config.retentiondays * 86400), config.dbtimeout)
    server = PolicyServer(config, Policy(config, rules, committer))
    writer = start_logging(config)
    for line in (
        f"saslquota {__version__} listening on {server}, {server.capacity} connections at most",
        f"counting in {store}",
        f"rules in {rules.path}: {rules.rules}",
    ):
        print(line, flush=True)
        if not writer.on_stdout:
            log.info("%s", line)
    for risk in risks(config):
        log.warning("%s", risk)
    server.tell = writer.write
    committer.start()
    threading.Thread(target=server.serve_forever, args=[0.1], daemon=True).start()
    received = wait_for_stop(caught, rules)
    server.stop()
    if not server.drained(SHUTDOWN):
        committer.give_up()
        server.drained(SHUTDOWN)
    committer.stop(SHUTDOWN / 8)
    log.info("stopped by %s", received)
    writer.stop(SHUTDOWN / 8)
    return 0


def catch_signals() -> queue.SimpleQueue[int]:
    """The signals that come from now on. (A SimpleQueue's put() may interrupt its get().)"""
    caught: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: caught.put(number))
    return caught


def wait_for_stop(caught: queue.SimpleQueue[int], rules: RulesFile) -> str:
    """Keep the rules fresh until a signal says to stop; return its name."""
    while True:
        try:
            number = caught.get(timeout=1.0)
        except queue.Empty:
            number = 0
        if number not in (0, signal.SIGHUP):
            return signal.Signals(number).name
        rules.reload(force=number == signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(
        prog="saslquota.py", description="Postfix policy daemon: sending quotas for SASL senders"
    )
    default = Path(__file__).resolve().with_name("saslquota.json")
    parser.add_argument("-c", metavar="FILE", dest="config", type=Path, default=default)
    parser.add_argument("--check", action="store_true", help="look at everything, change nothing")
    parser.add_argument("--version", action="version", version=f"saslquota {__version__}")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, os.environ)
        return check(config) if arguments.check else serve(config)
    except SaslQuotaError as error:
        print(f"saslquota: {error}", flush=True)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
