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
import difflib
import functools
import glob
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import saslquota
from saslquota import POOL_PREFIX, Config, Rules, SaslQuotaError, SQLiteStore, Store, StoreError

STATEMENT_TIMEOUT = 60  # seconds; a table of a month is read in less
OK, WARNING, FAILED = 0, 1, 2  # exit statuses, as Nagios has them


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


def progress(items: Iterable[Item], noun: str) -> Iterator[Item]:
    """Hand on the items; when that takes longer, show a terminal how many it were so far."""
    is_shown, began = False, time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if number % 16_384 == 0 and time.monotonic() - began > 2 and sys.stderr.isatty():
            is_shown = True
            print(f"\r{number} {noun}", end="", file=sys.stderr, flush=True)
    if is_shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


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
        folded = saslquota.fold(name, self.config.defaultdomain)
        is_pool = folded == "*" or folded.startswith("@")
        return POOL_PREFIX + folded if is_pool else folded

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


# --- Doctor ---------------------------------------------------------------------------------------

Says = Iterator[tuple[str, str, str]]  # state (OK, WARNING, PROBLEM), text, a command that mends it
STAGES = ("client", "helo", "sender", "relay", "recipient", "data", "end_of_data")
LISTS = [f"smtpd_{stage}_restrictions" for stage in STAGES]
ENDS = ("permit", "permit_sasl_authenticated", "reject", "defer")  # a list, for who has logged in
CHECK = re.compile(r"(reject|defer|check)_(?!unauth_destination)")  # of who has logged in, too
TAKES_ARGUMENT = re.compile(r"(?i)check_\w+|(reject|permit)_(rbl|rhsbl|dnswl|rhswl)_\w+|sleep")
SETTINGS = re.compile(r"(?m)^(?:postconf: .*unused parameter: )?(\w+) ?= ?(.*)$")
UNSAFE = ("tmpfs", "ramfs", "nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs")  # for SQLite
PROC, SASLAUTHD = Path("/proc"), ("/etc/default/saslauthd*", "/etc/sysconfig/saslauthd")
LOG_LINE = re.compile(
    r"(\w{3} [ \d]\d [\d:]{8}|\d{4}-\d\d-\d\d[T ][\d:]{8}\S*)?.*?postfix\S*/smtpd\[\d+\]: (\w+): "
    r"(?:client=.*, sasl_username=(.+?)(?:, sasl_sender=.*)?$|reject: (?:DATA|END-OF))"
)
WARN = "warn_if_reject"


class Finding(NamedTuple):
    state: str  # OK, WARNING or PROBLEM
    part: str  # settings, store, daemon or postfix
    service: str  # as master.cf names it, or ""
    text: str
    remedy: str  # a command line, or ""


def words(text: str, separators: str = r"\s,") -> list[str]:
    """As Postfix takes a list apart: what is in braces belongs together."""
    return re.findall(rf"(?:\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[^{separators}{{])+", text)


def attributes(policy: str) -> dict[str, str]:
    """The endpoint, as "", and what `check_policy_service { inet:host:port, name=value }` gives."""
    argument = policy.removeprefix(f"{WARN} ").partition(" ")[2]
    endpoint, *given = words(argument[1:-1] if argument.startswith("{") else argument) or [""]
    pairs = (word.strip("{} ").partition("=") for word in given)
    return {"": endpoint, **{name.strip(): value.strip() for name, _, value in pairs}}


class Service:
    """An entry of master.cf with the settings as it sees them."""

    def __init__(self, entry: str, main: Mapping[str, str], expanded: Mapping[str, str]) -> None:
        fields = words(entry, r"\s")
        pairs = itertools.pairwise(fields[8:])
        given = [word[1:-1] if word[0] == "{" else word for flag, word in pairs if flag == "-o"]
        self.options = [(n.strip(), v.strip()) for n, _, v in (w.partition("=") for w in given)]
        self.settings = {**main, **dict(self.options)}
        self._expanded = {**expanded, **dict(self.options)}
        host, _, port = fields[0].rpartition(":")
        self.name, self.runs_smtpd = "/".join(fields[:2]), fields[7] == "smtpd"
        self.is_chrooted = fields[4] == "y"
        self.is_local = saslquota.is_loopback(host.strip("[]"))
        is_filtered = self.is_local and ("content_filter", "") in self.options
        self.takes_all_mail = is_filtered or fields[1] == "pass" or port in ("smtp", "25")
        self.is_for_users = port in ("submission", "submissions", "smtps", "587", "465")
        self.takes_logins = self.value("smtpd_sasl_auth_enable") == "yes"
        self.early = LISTS[:2] if self.value("smtpd_delay_reject") == "no" else []  # before a login

    def value(self, name: str, depth: int = 0) -> str:
        """A setting with those that it names put in; one with conditions is as main.cf has it."""
        raw = self.settings.get(name, "")
        if depth > 9 or re.search(r"\$[{(]\w*[^\w)}]", raw):
            return self._expanded.get(name, raw)
        named = r"\$(?:(\w+)|\{(\w+)\}|\((\w+)\))"
        return re.sub(named, lambda found: self.value(found[found.lastindex or 0], depth + 1), raw)

    def restrictions(self, setting: str, depth: int = 0) -> list[str]:
        """Those of a list, with classes expanded; an argument follows after one blank."""
        classes = words(self.value("smtpd_restriction_classes"))
        found, warn, result = iter(words(self.value(setting))), "", []
        for word in found:
            if word.lower() == WARN:
                warn = f"{WARN} "
                continue
            if word in classes and depth < 9:
                result += self.restrictions(word, depth + 1)
            elif TAKES_ARGUMENT.fullmatch(word):
                result.append(f"{warn}{word.lower()} {next(found, '')}")
            else:
                result.append(warn + (word if ":" in word else word.lower()))
            warn = ""
        return result


class Hook(NamedTuple):
    """Where a service asks the daemon."""

    setting: str  # smtpd_..._restrictions
    before: list[str]
    policy: str
    after: list[str]

    @property
    def behind(self) -> str:
        """What ends the list before the daemon is asked about who has logged in, or ""."""
        return next((restriction for restriction in self.before if restriction in ENDS), "")


def checks_in(listed: Iterable[str]) -> list[str]:
    """What may refuse a mail of somebody who has logged in, up to the end of the list."""
    return [r for r in itertools.takewhile(lambda r: r not in ENDS, listed) if CHECK.match(r)]


def placed(listed: list[str], policy: str, ends: bool) -> list[str]:
    """The list with the policy service before all that permits; if its OK `ends` the list, all that
    refuses comes first."""
    end = next((i for i, r in enumerate(listed) if r in ENDS), len(listed))
    head = sorted(listed[:end], key=lambda r: ends and r.startswith("permit_"))
    at = next((i for i, r in enumerate(head) if r.startswith("permit_")), end)
    return [*head[:at], policy, *head[at:], *listed[end:]]


class Postfix:
    """What postconf says of an instance; what of it is about the daemon, and what mends it."""

    def __init__(self, config: Config, directory: str) -> None:
        self.config, self.socket = config, ""
        if config.bind.startswith("unix:"):
            self.socket = os.path.realpath(config.beside(config.bind.removeprefix("unix:")))
        self.postconf = ["postconf", *(["-c", directory] if directory else [])]
        main, expanded = (dict(SETTINGS.findall(self._ask(*option))) for option in ((), ("-x",)))
        entries = [Service(entry, main, expanded) for entry in self._ask("-M").splitlines()]
        self.services = [service for service in entries if service.runs_smtpd]

    def _ask(self, *options: str) -> str:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
        if not (program := shutil.which("postconf", path=path)):
            raise ControlError("postfix not found on this machine")
        command = [program, *self.postconf[1:], *options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise ControlError(done.stderr.strip().rpartition("\n")[2])
        return done.stdout if "-M" in options else done.stderr + done.stdout

    def reaches(self, service: Service, endpoint: str) -> bool:
        """Whether the daemon listens there."""
        (kind, _, where), bind = endpoint.partition(":"), self.config.bind
        if self.socket:
            inside = where.lstrip("/") if service.is_chrooted else where
            path = os.path.join(service.value("queue_directory"), inside)
            return kind == "unix" and os.path.realpath(path) == self.socket
        host, _, port = where.rpartition(":")
        is_same = bind in ("0.0.0.0", "::") or addresses(host or "localhost") & addresses(bind)
        return kind == "inet" and port == str(self.config.bindport) and bool(is_same)

    def endpoint(self, service: Service) -> str:
        """Where the daemon listens, as a service has to write it."""
        if self.socket:
            queue = os.path.realpath(service.value("queue_directory"))
            return f"unix:{self.socket.removeprefix(queue + '/')}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.bind, self.config.bind)
        return f"inet:{f'[{host}]' if ':' in host else host}:{self.config.bindport}"

    def hooks(self, service: Service, settings: Iterable[str] = LISTS) -> list[Hook]:
        """Where a service asks the daemon, be it at a wrong address."""
        own, found = service.restrictions("saslquota"), []
        for setting, listed in ((setting, service.restrictions(setting)) for setting in settings):
            for i, r in enumerate(listed):
                where = attributes(r)[""] if "check_policy_service " in r else ""
                port, right = where.rpartition(":")[2], str(self.config.bindport)
                is_near = difflib.SequenceMatcher(None, port, right).ratio() >= 0.8
                is_own = is_near or [r] == own or "saslquota" in where
                if where and (is_own or self.reaches(service, where)):
                    found.append(Hook(setting, listed[:i], r, listed[i + 1 :]))
        return found

    def entry(self, service: Service, settings: Mapping[str, Iterable[str]]) -> str:
        """The command that changes settings of an entry. It takes no blanks."""
        texts = {name: re.sub(r"[\s,]+", ",", ",".join(s)) for name, s in settings.items()}
        changes = [f"{service.name}/{name}={text}" for name, text in texts.items()]
        return shlex.join([*self.postconf, "-P", *changes]) if changes else ""

    def cure(self, service: Service, *, keep: bool = True, **changed: str) -> str:
        """The commands that let a service ask at one place, the right one, with these attributes of
        the policy service; or nowhere, unless `keep`."""
        hooks, define = self.hooks(service), ""
        policies = [hook.policy for hook in hooks]
        lists = {
            setting: [r for r in service.restrictions(setting) if r not in policies]
            for setting in dict.fromkeys(hook.setting for hook in hooks)
        }
        if keep:
            given = {**attributes("".join(policies[:1])), **changed}
            if not self.reaches(service, given[""]):
                given[""] = self.endpoint(service)
            pairs = [f"{name}={value}".lstrip("=") for name, value in given.items()]
            pairs = [f"{{ {pair} }}" if " " in pair else pair for pair in pairs]
            right = pairs[0] if len(pairs) == 1 else f"{{ {', '.join(pairs)} }}"
            if [f"check_policy_service {right}"] != service.restrictions("saslquota"):
                name = f"saslquota = check_policy_service {right}"
                define = shlex.join([*self.postconf, "-e", name])
            usual = LISTS[4] if service.early else LISTS[0]
            here = next((setting for setting in lists if setting not in service.early), usual)
            listed = lists.get(here, service.restrictions(here))
            lists[here] = placed(listed, "$saslquota", self.config.okaction == "OK")
        now = {setting: words(service.settings.get(setting, "")) for setting in lists}
        new = {setting: s for setting, s in lists.items() if words(",".join(s)) != now[setting]}
        return " && ".join(filter(None, (define, self.entry(service, new))))


def addresses(host: str) -> set[str]:
    with contextlib.suppress(OSError, UnicodeError):
        return {str(found[4][0]) for found in socket.getaddrinfo(host.strip("[]"), None)}
    return set()


def check_service(postfix: Postfix, service: Service) -> Says:
    """Whether the daemon is asked about all who log in, and about nobody else."""
    hooks = [hook for hook in postfix.hooks(service) if hook.setting not in service.early]
    for_all = [
        hook
        for hook in hooks
        if hook.behind in ("", "permit_sasl_authenticated")
        and not (service.is_local and "permit_mynetworks" in hook.before)
    ]
    is_public = service.takes_all_mail or not service.takes_logins
    close = postfix.entry(service, {"smtpd_sasl_auth_enable": ["no"]})
    yield from check_repeated(postfix, service)
    if for_all and is_public and postfix.config.nosasl == "REJECT":
        remedy = postfix.cure(service, keep=False) + f" && {close}" * service.takes_logins
        remedy = close.replace("=no", "=yes") if service.is_for_users else remedy
        yield "PROBLEM", "mail without a login, as of other servers, is refused (_nosasl)", remedy
    elif not service.takes_logins:
        yield "OK", "nobody can log in: the daemon is not needed", ""
    elif service.takes_all_mail and all(hook.behind for hook in hooks):
        state = "WARNING" if service.is_local else "PROBLEM"
        yield state, "users can log in here, too, and are not counted", close
    else:
        yield from check_hooks(postfix, service)


def check_repeated(postfix: Postfix, service: Service) -> Says:
    for name in dict.fromkeys(name for name, _ in service.options):
        *lost, last = [value for option, value in service.options if option == name]
        if any(value != last for value in lost) and name in (*LISTS, "smtpd_sasl_auth_enable"):
            asks = [re.search("saslquota|check_policy_service", value) for value in (*lost, last)]
            text = f"-o {name} stands more than once, only the last counts: {last or '(empty)'}"
            if any(asks) and not asks[-1]:
                yield "PROBLEM", text, postfix.cure(service)
            else:
                yield "WARNING", text, postfix.entry(service, {name: [last]})


def check_hooks(postfix: Postfix, service: Service) -> Says:
    """Whether a service asks once about each mail, where all come by."""
    ends, hooks, cure = (
        postfix.config.okaction == "OK",
        postfix.hooks(service),
        postfix.cure(service),
    )
    in_time = [hook for hook in hooks if hook.setting not in service.early]
    asked = [hook for hook in in_time if not hook.behind]
    again = [hook for hook in asked[1:] if not ends or hook.setting != asked[0].setting]
    classes = words(service.value("smtpd_restriction_classes"))
    if not hooks and (named := postfix.hooks(service, classes)):
        yield "WARNING", f"the daemon is asked only where a table says {named[0].setting}", ""
    elif not hooks:
        yield "PROBLEM", "the daemon is never asked", cure
    elif not in_time:
        text = f"{hooks[0].setting} asks before anybody can log in (smtpd_delay_reject=no)"
        yield "PROBLEM", f"{text}: nothing is counted", cure
    elif not asked:
        what = f"{in_time[0].setting}: behind {in_time[0].behind}"
        yield "PROBLEM", f"{what} the daemon is never asked", cure
    elif again:
        where = f"in {asked[0].setting} and again in {again[0].setting}"
        yield "PROBLEM", f"the daemon is asked {where}: everything counts twice", cure
    for hook in asked:
        yield from check_place(service, hook, cure, ends)
    for hook in hooks:
        yield from check_policy(postfix, service, hook.policy)
    if asked:
        yield "OK", f"the daemon is asked in {asked[0].setting}", ""


def check_place(service: Service, hook: Hook, cure: str, ends: bool) -> Says:
    """Whether others in the list keep the daemon from being asked, or it them."""
    if hook.policy.startswith(WARN):
        yield "PROBLEM", f"{hook.setting}: behind {WARN} the daemon refuses nothing", cure
    if ends and (skipped := [r for r in checks_in(hook.after) if r != hook.policy]):
        is_mild = all(r.startswith("check_policy_service ") for r in skipped)
        text = f"{hook.setting}: the daemon's OK ends the list before {', '.join(skipped)}"
        yield "WARNING" if is_mild else "PROBLEM", text, cure
    for r in hook.before:
        is_permit = r.startswith("permit_") and (
            r != "permit_mynetworks" or service.value("mynetworks")
        )
        if is_permit or re.match(r"check_\w+_access |\w+:", r):
            text = f"{hook.setting}: what {r} permits is not counted"
            yield "WARNING", text, cure if is_permit else ""


def check_policy(postfix: Postfix, service: Service, policy: str) -> Says:
    """Whether Postfix reaches the daemon, and waits long enough."""
    given, dbtimeout = attributes(policy), postfix.config.dbtimeout
    if not postfix.reaches(service, given[""]):
        where, remedy = saslquota.address_of(postfix.config), postfix.cure(service)
        if service.is_chrooted and postfix.endpoint(service).startswith("unix:/"):
            where += f", outside of the chroot {service.value('queue_directory')}"
            remedy = shlex.join([*postfix.postconf, "-F", f"{service.name}/chroot=n"])
        yield "PROBLEM", f"asks {given['']}, but saslquota listens on {where}", remedy
    timeout, action, limit = (
        given.get(name) or service.value(f"smtpd_policy_service_{name}")
        for name in ("timeout", "default_action", "request_limit")
    )
    seconds = int(re.sub(r"\D", "", timeout)) * saslquota.TIME_UNITS.get(timeout[-1], 1)
    if seconds <= dbtimeout:
        text = f"waits {timeout} for the daemon, which may take {dbtimeout} s (_dbtimeout)"
        yield "PROBLEM", text, postfix.cure(service, timeout=f"{dbtimeout + 5}s")
    if action == "451 4.3.5 Server configuration problem":  # Postfix's default
        text = f"default_action is not set: while the daemon is down, mail gets {action}"
        mend = postfix.cure(service, default_action="451 4.7.1 quota service unavailable")
        yield "WARNING", text, mend
    if limit == "1":
        text = "request_limit=1: each request needs a connection of its own"
        yield "WARNING", text, postfix.cure(service, request_limit="0")


def check_sasl(postfix: Postfix) -> Says:
    """Whether Cyrus SASL lets several logins pass as one account, see SECURITY.md."""
    with_logins = (service for service in postfix.services if service.takes_logins)
    service = next((s for s in with_logins if s.value("smtpd_sasl_type") == "cyrus"), None)
    if not service:
        return
    own = service.value("cyrus_sasl_config_path").split(":")
    places = [*filter(None, own), "/etc/postfix/sasl", "/etc/sasl2", "/usr/lib/sasl2"]
    files = [Path(place, service.value("smtpd_sasl_path") + ".conf") for place in places]
    text = next((file.read_text(errors="replace") for file in files if file.exists()), "")
    if not re.search(r"(?m)^pwcheck_method:.*\bsaslauthd\b", text):
        if not (service.value("smtpd_sasl_local_domain") or postfix.config.defaultdomain):
            host = service.value("myhostname")
            remedy = shlex.join([*postfix.postconf, "-e", "smtpd_sasl_local_domain = $myhostname"])
            text = f"alice and alice@{host} are one account with two quotas"
            yield "WARNING", f"smtpd_sasl_local_domain is empty: {text}", remedy
    elif not postfix.config.ignoredomain:
        for options, remedy in saslauthd_options():
            if not re.search(r"(^|\s)-[cdlTvV]*r", options):
                text = "alice, alice@1, alice@2 ... are one account with a quota each"
                yield "PROBLEM", f"saslauthd without -r: {text}; or set _ignoredomain", remedy


def saslauthd_options() -> Iterator[tuple[str, str]]:
    """The options of each that runs, or else that the system would start; what adds -r to them."""
    commands = []
    for path in PROC.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(path.read_bytes().decode(errors="replace").split("\0"))
    running = [" ".join(rest) for name, *rest in commands if Path(name).name == "saslauthd"]
    for path in (Path(name) for pattern in SASLAUTHD for name in glob.glob(pattern)):
        given = re.search("(?m)^(?:OPTIONS|FLAGS)=(.*)", path.read_text(errors="replace"))
        change = f"sed -i -E 's/^(OPTIONS|FLAGS)=[\"]?/&-r /' {path} && service saslauthd restart"
        for options in running or [given[1].strip("\"'") if given else ""]:
            yield options, change


def check_settings(session: Session) -> Says:
    config, user = session.config, saslquota.daemon_user(session.config, "")
    with saslquota.rights_of(user) if user else contextlib.nullcontext():
        saslquota.check_files(config)
    yield "OK", f"{config.path}, {len(list(session.rules))} rules", ""
    for risk in saslquota.risks(config):
        if not risk.startswith("running as root"):  # we are, the daemon need not be
            yield "WARNING", risk, f"chmod o-r {config.path}" if "chmod" in risk else ""


def check_store(session: Session) -> Says:
    config, user = session.config, saslquota.daemon_user(session.config, "")
    with saslquota.rights_of(user) if user else contextlib.nullcontext():
        found = saslquota.make_store(config).check()
    yield "OK", found, ""
    if "will be made" in found:
        return
    store, here = session.store, time.time()
    now = store.now()
    if abs(now / 1e6 - here) > 1:
        yield "WARNING", f"its clock differs from this machine's by {now / 1e6 - here:+.1f} s", ""
    if (ahead := store.newest_at() - now) > saslquota.CLOCK_TOLERANCE:
        text = f"the newest send is dated {ahead // 1_000_000} s ahead of the clock"
        yield "WARNING", f"{text}: docs/operation.md, A clock that is wrong", ""
    newer = "SELECT 1 FROM sends AS n WHERE n.account = s.account AND n.seq > s.seq"
    old = f"SELECT account, seq FROM sends WHERE at < {store.BIND_TIME} ORDER BY at DESC LIMIT 1000"
    cutoff = now - (config.retentiondays + 1) * 86_400_000_000
    if store.run(f"SELECT 1 FROM ({old}) AS s WHERE EXISTS ({newer}) LIMIT 1", [cutoff]):
        text = "sends older than _retentiondays are there: does the daemon run, is its clock right?"
        yield "WARNING", text, ""
    if isinstance(store, SQLiteStore):
        mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
        file = config.beside(config.sqlitefile).resolve()
        kind = max((len(m[1]), m[2]) for m in mounts if file.is_relative_to(m[1]))[1]
        if kind in UNSAFE:
            yield "WARNING", f"the file is on {kind}, which does not keep what is counted", ""
        return
    ((flush,),) = store.run("SELECT @@innodb_flush_log_at_trx_commit")
    if flush != 1:
        text = f"innodb_flush_log_at_trx_commit={flush}: a crash forgets the last sends"
        yield "WARNING", text, "mysql -e 'SET GLOBAL innodb_flush_log_at_trx_commit = 1'"
    try:
        store.run("SELECT 1 FROM events LIMIT 1")
    except StoreError as error:
        yield "WARNING", *apart(saslquota.with_remedy(error, config))


def apart(text: str) -> tuple[str, str]:
    """A message of saslquota's without the command that it advises, and that command."""
    said, _, remedy = re.sub("(?: - |: )run ", "\0", text, count=1).partition("\0")
    script = Path(saslquota.__file__).with_name("mysql.sql")
    return said, remedy.partition(" (or ")[0].replace("< mysql.sql", f"< {script}")


def check_daemon(session: Session) -> Says:
    began, restart = time.monotonic(), "supervisorctl restart saslquota"
    if Path("/etc/systemd/system/saslquota.service").exists():
        restart = "systemctl restart saslquota"
    try:
        said = ask_daemon(session.config)
    except ControlError as error:
        yield "PROBLEM", str(error), restart
        return
    took, version = 1000 * (time.monotonic() - began), said.get("version", "")
    yield "OK", f"{saslquota.address_of(session.config)} answers in {took:.1f} ms", ""
    if version != saslquota.__version__:
        yield "WARNING", f"version {version} runs, {saslquota.__version__} is installed", restart
    if said.get("store") == "down":
        since = format_moment(int(said.get("down_since") or 0) * 1_000_000, time.time_ns() // 1000)
        yield "PROBLEM", f"it cannot use the database since {since}", ""
    if said.get("rules_valid") == "no":
        yield "PROBLEM", "the rules are not valid, it goes on with those before: --check", ""
    if said.get("log_lines_lost", "0") != "0":
        yield "WARNING", f"{said['log_lines_lost']} log lines are lost: is syslog stuck?", ""
    if not said.get("first_request_at", "?"):
        hours = int(said.get("uptime", 0)) // 3600
        text = "Postfix has not asked it since its start"
        yield "WARNING" if hours else "OK", f"{text}, {hours} hours ago", ""


def check_log(session: Session, path: str) -> Says:
    """Whether the logins that Postfix says have sent in the last day are counted."""
    sent: dict[str, str] = {}  # by queue id
    with open(0 if path == "-" else path, errors="replace") as lines:
        for line in progress(lines, "lines"):
            found = LOG_LINE.match(line) if "/smtpd[" in line else None
            if found and (not found[1] or time.time() - log_time(found[1]) < 86_400):
                sent[found[2]] = found[3] or ""  # not if it is refused at the end
    logins = {login for login in sent.values() if login and "?" not in login}
    cutoff = session.now - session.config.retentiondays * 86_400_000_000
    since = f"recipients > 0 AND at > {session.store.BIND_TIME} ORDER BY seq DESC LIMIT 1"
    missing = []
    for login in sorted(logins):
        user = login.rsplit("@", 1)[0] if session.config.ignoredomain else login
        select = f"SELECT 1 FROM sends WHERE account = ? AND {since}"
        if not session.store.run(select, [session.account(user), cutoff]):
            missing.append(login)
    if missing:
        names = ", ".join(missing[:5]) + " ..." * (len(missing) > 5)
        text = f"{len(missing)} of {len(logins)} logins that sent are not counted: {names}"
        yield "PROBLEM", text, ""
    elif logins:
        yield "OK", f"{path}: {len(logins)} logins sent in the last day, all are counted", ""
    else:
        yield "WARNING", f"{path}: no login has sent in the last day", ""


def log_time(text: str) -> float:
    """Unix time of ISO 8601, or of local time without a year as syslog writes it."""
    if text[0].isdigit():
        return datetime.fromisoformat(text).timestamp()
    year = time.localtime().tm_year
    times = (
        time.mktime(time.strptime(f"{y} {text}", "%Y %b %d %H:%M:%S")) for y in (year, year - 1)
    )
    return next(at for at in times if at < time.time() + 86_400)


def attempt(part: str, service: str, says: Says) -> Iterator[Finding]:
    try:
        for state, text, remedy in says:
            yield Finding(state, part, service, text, remedy)
    except (SaslQuotaError, OSError) as error:
        yield Finding("PROBLEM", part, service, *apart(str(error)))


def examine_postfix(config: Config, directory: str) -> Iterator[Finding]:
    try:
        postfix = Postfix(config, directory)
    except ControlError as error:
        yield Finding("WARNING", "postfix", "", str(error), "")
        return
    for service in postfix.services:
        found = dict.fromkeys(attempt("postfix", service.name, check_service(postfix, service)))
        is_well = all(finding.state == "OK" for finding in found)
        yield from (finding for finding in found if is_well or finding.state != "OK")
    yield from attempt("postfix", "", check_sasl(postfix))
    if not any(postfix.hooks(service) for service in postfix.services):
        yield Finding("PROBLEM", "postfix", "", "no service asks: nothing is counted", "")


def examine(session: Session, config_dir: str, log: str) -> Iterator[Finding]:
    yield from attempt("settings", "", check_settings(session))
    yield from attempt("store", "", check_store(session))
    yield from attempt("daemon", "", check_daemon(session))
    yield from examine_postfix(session.config, config_dir)
    if log:
        yield from attempt("postfix", "", check_log(session, log))


def run_doctor(session: Session, arguments: argparse.Namespace) -> int:
    findings = list(examine(session, arguments.config_dir, arguments.log))
    alike: dict[Finding, list[str]] = {}
    for finding in findings:
        alike.setdefault(finding._replace(service=""), []).append(finding.service)
    lines = []
    for (state, part, _, text, remedy), services in alike.items():
        names = ", ".join(filter(None, services))
        lines.append(clean(f"{state:7}  {part:8}  {names}{': ' if names else ''}{text}"))
        lines += [" " * 19 + clean(remedy)] if remedy else []
    count = collections.Counter(finding.state for finding in findings)
    then = "; then: postfix reload" if any("postconf" in f.remedy for f in findings) else ""
    lines.append(f"{count['PROBLEM']} problems, {count['WARNING']} warnings{then}")
    session.show((finding._asdict() for finding in findings), lines)
    return FAILED if count["PROBLEM"] else WARNING if count["WARNING"] else OK


DOCTOR_HELP = """\
Look at the settings, the store, the daemon and every service of Postfix that runs smtpd. Each line
says OK, WARNING or PROBLEM; under it is the command that mends it, as far as one does. It changes
nothing itself. Exit status: 0 all is well, 1 warnings, 2 problems.

    saslquotactl.py doctor --log /var/log/mail.log

With --log, also whether the logins that Postfix says have sent in the last day are counted.
Afterwards, `postfix reload` lets Postfix read what was changed.
"""


def add_doctor_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="look whether all who log in are counted, and what is wrong if not",
        description=DOCTOR_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-dir", metavar="DIR", default="", help="of Postfix, as postfix -c")
    parser.add_argument("--log", metavar="FILE", default="", help="Postfix's; - is standard input")
    parser.set_defaults(command=run_doctor)


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
    adders: list[Callable[[Any], None]] = [add_doctor_commands]
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
