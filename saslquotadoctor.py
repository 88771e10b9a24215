"""saslquotactl.py doctor: are all who log in counted, and what is wrong if not?

A part of saslquotactl.py, which has its frame: Session, texts, exit statuses. Of each service that
runs smtpd, Service holds what `postconf` says, as the service sees it; each check_...() yields what
it finds, with the command that mends it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import difflib
import functools
import glob
import itertools
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import saslquota
from saslquota import SPOOL_ACCOUNT, Config, SaslQuotaError, SQLiteStore, StoreError
from saslquotactl import (
    FAILED,
    IS_LOGIN,
    OK,
    WARNING,
    ControlError,
    Session,
    ask_daemon,
    clean,
    counted,
    describe_spool,
    format_moment,
    progress,
    read_reply,
)

Says = Iterator[tuple[str, str, str]]  # state (OK, WARNING, PROBLEM), text, a command that mends it
STAGES = ("client", "helo", "sender", "relay", "recipient", "data", "end_of_data")
LISTS = [f"smtpd_{stage}_restrictions" for stage in STAGES]
ENDS = ("permit", "permit_sasl_authenticated", "reject", "defer")  # a list, for who has logged in
CHECK = re.compile(r"(reject|defer|check)_(?!unauth_destination)")  # of who has logged in, too
TABLE = re.compile(r"check_\w+_access |\w+:")
TAKES_ARGUMENT = re.compile(r"(?i)check_\w+|(reject|permit)_(rbl|rhsbl|dnswl|rhswl)_\w+|sleep")
WARN = "warn_if_reject "
UNSAFE = ("tmpfs", "ramfs", "nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs")  # for SQLite
PROCESSES = "/proc/[0-9]*/cmdline"
SASLAUTHD = ("/etc/default/saslauthd*", "/etc/sysconfig/saslauthd")  # OPTIONS="...", FLAGS="..."
LOG_LINE = re.compile(
    r"(\w{3} [ \d]\d [\d:]{8}|\d{4}-\d\d-\d\d[T ][\d:]{8}\S*)?.*?postfix\S*/smtpd\[\d+\]: (\w+): "
    r"(?:client=.*, sasl_username=(.+?)(?:, sasl_sender=.*)?$|reject: (?:DATA|END-OF))"
)


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
    argument = policy.removeprefix(WARN).partition(" ")[2]
    endpoint, *given = words(argument[1:-1] if argument.startswith("{") else argument) or [""]
    pairs = (word.strip("{} ").partition("=") for word in given)
    return {"": endpoint, **{name.strip(): value.strip() for name, _, value in pairs}}


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

    @property
    def skips(self) -> list[str]:
        """What could refuse a mail of who has logged in, did the daemon's OK not end the list."""
        until_end = itertools.takewhile(lambda r: r not in ENDS, self.after)
        return [r for r in until_end if CHECK.match(r) and r != self.policy]


def placed(listed: list[str], policy: str, ends: bool) -> list[str]:
    """The list with the policy service before all that permits; if its OK `ends` the list, all that
    refuses comes first."""
    end = next((i for i, r in enumerate(listed) if r in ENDS), len(listed))
    head = sorted(listed[:end], key=lambda r: ends and r.startswith("permit_"))
    at = next((i for i, r in enumerate(head) if r.startswith("permit_")), end)
    return [*head[:at], policy, *head[at:], *listed[end:]]


def addresses(host: str) -> set[str]:
    with contextlib.suppress(OSError, UnicodeError):
        return {str(found[4][0]) for found in socket.getaddrinfo(host.strip("[]"), None)}
    return set()


def postconf(*arguments: str) -> str:
    """What postconf prints, and those settings that it warns of: nothing uses them."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
    if not (program := shutil.which("postconf", path=path)):
        raise ControlError("postfix not found on this machine")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise ControlError(f"postconf: {done.stderr.strip().rpartition('fatal: ')[2]}")
    return done.stdout + re.sub("(?m)^.*? warning: .*?(unused parameter: |$)", "", done.stderr)


class Service:
    """An entry of master.cf that runs smtpd: its settings, where it asks the daemon, what changes
    that. `where` are the options of postconf that tell which Postfix it is."""

    def __init__(self, fields: Sequence[str], config: Config, where: Sequence[str]) -> None:
        pairs = itertools.pairwise(fields[8:])
        given = [word[1:-1] if word[0] == "{" else word for flag, word in pairs if flag == "-o"]
        self.options = [(n.strip(), v.strip()) for n, _, v in (w.partition("=") for w in given)]
        changed = [word for option in self.options for word in ("-o", "=".join(option))]
        found = re.findall(r"(?m)^(\w+) ?= ?(.*)$", postconf(*where, "-x", *changed))
        self.settings = {name: value.strip() for name, value in found}
        self.name, self.config, self._where = "/".join(fields[:2]), config, where
        host, _, port = fields[0].rpartition(":")
        self.is_chrooted = fields[4] == "y"
        self.is_local = saslquota.is_loopback(host.strip("[]"))
        is_filtered = self.is_local and ("content_filter", "") in self.options
        self.takes_all_mail = is_filtered or fields[1] == "pass" or port in ("smtp", "25")
        self.is_for_users = port in ("submission", "submissions", "smtps", "587", "465")
        self.takes_logins = self.settings["smtpd_sasl_auth_enable"].lower() == "yes"
        self.ok_ends = config.okaction == "OK"
        self.early = LISTS[:2] if self.settings["smtpd_delay_reject"].lower() == "no" else []
        self.hooks = self.hooks_in(LISTS)
        self.in_time = [hook for hook in self.hooks if hook.setting not in self.early]
        self.asked = [hook for hook in self.in_time if not hook.behind]

    def restrictions(self, setting: str, depth: int = 0) -> list[str]:
        """Those of a list, with classes expanded; an argument follows after one blank."""
        found, result = iter(words(self.settings.get(setting, ""))), []
        classes = words(self.settings["smtpd_restriction_classes"])
        for word in found:
            if word in classes and depth < 9:
                result += self.restrictions(word, depth + 1)
                continue
            warn = WARN if word.lower() == WARN.strip() else ""
            name = next(found, "") if warn else word
            argument = f" {next(found, '')}" if TAKES_ARGUMENT.fullmatch(name) else ""
            result.append(f"{warn}{name if ':' in name else name.lower()}{argument}")
        return result

    def hooks_in(self, settings: Iterable[str]) -> list[Hook]:
        """Where the daemon is asked, be it at a wrong address."""
        own, found = self.restrictions("saslquota"), []
        for setting, listed in ((setting, self.restrictions(setting)) for setting in settings):
            for i, r in enumerate(listed):
                where = attributes(r)[""] if "check_policy_service " in r else ""
                port, right = where.rpartition(":")[2], str(self.config.bindport)
                is_near = difflib.SequenceMatcher(None, port, right).ratio() >= 0.8
                is_own = is_near or [r] == own or "saslquota" in where
                if where and (is_own or self.reaches(where)):
                    found.append(Hook(setting, listed[:i], r, listed[i + 1 :]))
        return found

    def reaches(self, endpoint: str) -> bool:
        """Whether the daemon listens there."""
        (kind, _, where), bind = endpoint.partition(":"), self.config.bind
        if bind.startswith("unix:"):
            inside = where.lstrip("/") if self.is_chrooted else where
            path = os.path.join(self.settings["queue_directory"], inside)
            own = self.config.beside(bind.removeprefix("unix:"))
            return kind == "unix" and os.path.realpath(path) == os.path.realpath(own)
        host, _, port = where.rpartition(":")
        is_same = bind in ("0.0.0.0", "::") or addresses(host or "localhost") & addresses(bind)
        return kind == "inet" and port == str(self.config.bindport) and bool(is_same)

    def endpoint(self) -> str:
        """Where the daemon listens, as this service has to write it."""
        bind = self.config.bind
        if bind.startswith("unix:"):
            path = os.path.realpath(self.config.beside(bind.removeprefix("unix:")))
            queue = os.path.realpath(self.settings["queue_directory"])
            return f"unix:{path.removeprefix(f'{queue}/')}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)
        return f"inet:{f'[{host}]' if ':' in host else host}:{self.config.bindport}"

    def command(self, *arguments: str) -> str:
        return shlex.join(["postconf", *self._where, *arguments])

    def change(self, settings: Mapping[str, Iterable[str]]) -> str:
        """The command that changes settings of this entry. It takes no blanks."""
        texts = {name: re.sub(r"[\s,]+", ",", ",".join(s)) for name, s in settings.items()}
        changes = [f"{self.name}/{name}={text}" for name, text in texts.items()]
        is_possible = not any(re.search(r"\{[^}]*\{", change) for change in changes)
        return self.command("-P", *changes) if is_possible else ""

    def unhooked(self) -> dict[str, list[str]]:
        """The lists in which the daemon is asked, without it."""
        policies = [hook.policy for hook in self.hooks]
        settings = dict.fromkeys(hook.setting for hook in self.hooks)
        return {s: [r for r in self.restrictions(s) if r not in policies] for s in settings}

    def cure(self, **changed: str) -> str:
        """The commands that let it ask at one place, the right one, with these attributes."""
        own, lists = self.restrictions("saslquota"), self.unhooked()
        known = [hook.policy for hook in self.hooks] or own or [""]
        given = {**attributes(known[0]), **changed}
        if not self.reaches(given[""]):
            given[""] = self.endpoint()
        pairs = [f"{name}={value}".lstrip("=") for name, value in given.items()]
        pairs = [f"{{ {pair} }}" if " " in pair else pair for pair in pairs]
        policy = f"{{ {', '.join(pairs)} }}" if len(pairs) > 1 else pairs[0]
        define = self.command("-e", f"saslquota = check_policy_service {policy}")
        usual = LISTS[4] if self.early else LISTS[0]
        here = next((setting for setting in lists if setting not in self.early), usual)
        lists[here] = placed(lists.get(here, self.restrictions(here)), "$saslquota", self.ok_ends)
        for setting, listed in list(lists.items()):
            if listed == ["$saslquota" if [r] == own else r for r in self.restrictions(setting)]:
                del lists[setting]
        is_defined = own == [f"check_policy_service {policy}"]
        return " && ".join([define] * (not is_defined) + [self.change(lists)] * bool(lists))


def check_service(service: Service) -> Says:
    """Whether the daemon is asked about all who log in, and about nobody else."""
    yield from check_repeated(service)
    for_all = [
        hook
        for hook in service.in_time
        if hook.behind in ("", "permit_sasl_authenticated")
        and not (service.is_local and "permit_mynetworks" in hook.before)
    ]
    is_public = service.takes_all_mail or not service.takes_logins
    close = {"smtpd_sasl_auth_enable": ["no"]}
    if for_all and is_public and service.config.nosasl == "REJECT":
        changes = {**service.unhooked(), **(close if service.takes_logins else {})}
        changes = {"smtpd_sasl_auth_enable": ["yes"]} if service.is_for_users else changes
        text = "mail without a login, as of other servers, is refused (_nosasl)"
        yield "PROBLEM", text, service.change(changes)
    elif not service.takes_logins:
        yield "OK", "nobody can log in: the daemon is not needed", ""
    elif service.takes_all_mail and not service.asked:
        state = "WARNING" if service.is_local else "PROBLEM"
        yield state, "users can log in here, too, and are not counted", service.change(close)
    else:
        yield from check_hooks(service)


def check_repeated(service: Service) -> Says:
    for name in dict.fromkeys(name for name, _ in service.options):
        *lost, last = [value for option, value in service.options if option == name]
        if any(value != last for value in lost) and name in (*LISTS, "smtpd_sasl_auth_enable"):
            asks = [re.search("saslquota|check_policy_service", value) for value in (*lost, last)]
            text = f"-o {name} stands more than once, only the last counts: {last or '(empty)'}"
            is_lost = any(asks) and not (asks[-1] or service.asked)
            mend = service.cure() if is_lost else service.change({name: [last]})
            yield "PROBLEM" if is_lost else "WARNING", text, mend


def check_hooks(service: Service) -> Says:
    """Whether a service asks once about each mail, where all come by, and in the right way."""
    hooks, asked, cure = service.hooks, service.asked, service.cure()
    again = [h for h in asked[1:] if not service.ok_ends or h.setting != asked[0].setting]
    named = service.hooks_in(words(service.settings["smtpd_restriction_classes"]))
    has_table = any(
        map(TABLE.match, (r for setting in LISTS for r in service.restrictions(setting)))
    )
    if named and has_table and not hooks:
        yield "WARNING", f"the daemon is asked only where a table says {named[0].setting}", ""
    elif not hooks:
        yield "PROBLEM", "the daemon is never asked", cure
    elif not service.in_time:
        text = f"{hooks[0].setting} asks before anybody can log in (smtpd_delay_reject=no)"
        yield "PROBLEM", f"{text}: nothing is counted", cure
    elif not asked:
        text = f"{service.in_time[0].setting}: behind {service.in_time[0].behind}"
        yield "PROBLEM", f"{text} the daemon is never asked", cure
    elif again:
        text = f"the daemon is asked in {asked[0].setting} and again in {again[0].setting}"
        yield "PROBLEM", f"{text}: everything counts twice", cure
    for hook in asked:
        yield from check_place(service, hook)
    for policy in dict.fromkeys(hook.policy for hook in hooks):
        yield from check_policy(service, policy)
    if asked:
        yield "OK", f"the daemon is asked in {asked[0].setting}", ""


def check_place(service: Service, hook: Hook) -> Says:
    """Whether others in the list keep the daemon from being asked, or it them."""
    cure = service.cure()
    if hook.policy.startswith(WARN):
        yield "PROBLEM", f"{hook.setting}: behind {WARN}the daemon refuses nothing", cure
    if service.ok_ends and hook.skips:
        state = "PROBLEM" if any("check_policy_" not in r for r in hook.skips) else "WARNING"
        text = f"{hook.setting}: the daemon's OK ends the list before {', '.join(hook.skips)}"
        yield state, text, cure
    nobody = "" if service.settings["mynetworks"] else "permit_mynetworks"
    for r in hook.before:
        if r != nobody and (r.startswith("permit_") or TABLE.match(r)):
            mend = cure if r.startswith("permit_") else ""
            yield "WARNING", f"{hook.setting}: what {r} permits is not counted", mend


def check_policy(service: Service, policy: str) -> Says:
    """Whether Postfix reaches the daemon, and waits long enough."""
    given, dbtimeout = attributes(policy), service.config.dbtimeout
    if not service.reaches(given[""]):
        text, remedy = f"asks {given['']}, but saslquota is {service.endpoint()}", service.cure()
        if service.is_chrooted and service.endpoint().startswith("unix:"):
            text += f", and this service is in the chroot {service.settings['queue_directory']}"
            if service.endpoint().startswith("unix:/"):  # out of its reach
                remedy = service.command("-F", f"{service.name}/chroot=n")
        yield "PROBLEM", text, remedy
    timeout, action, limit = (
        given.get(name) or service.settings[f"smtpd_policy_service_{name}"]
        for name in ("timeout", "default_action", "request_limit")
    )
    if int(timeout.rstrip("smhdw")) * saslquota.TIME_UNITS.get(timeout[-1], 1) <= dbtimeout:
        text = f"waits {timeout} for the daemon, which may take {dbtimeout} s (_dbtimeout)"
        yield "PROBLEM", text, service.cure(timeout=f"{dbtimeout + 5}s")
    if action == "451 4.3.5 Server configuration problem":  # Postfix's default
        text = f"default_action is not set: while the daemon is down, mail gets {action}"
        yield "WARNING", text, service.cure(default_action="451 4.7.1 quota service unavailable")
    if limit == "1":
        text = "request_limit=1: each request needs a connection of its own"
        yield "WARNING", text, service.cure(request_limit="0")


def check_sasl(service: Service) -> Says:
    """Whether Cyrus SASL lets several logins pass as one account, see SECURITY.md."""
    settings, config = service.settings, service.config
    places = [
        *settings["cyrus_sasl_config_path"].split(":"),
        f"{settings['config_directory']}/sasl",
    ]
    places = [place for place in [*places, "/etc/postfix/sasl", "/etc/sasl2"] if place]
    files = [Path(place, f"{settings['smtpd_sasl_path']}.conf") for place in places]
    text = next((file.read_text(errors="replace") for file in files if file.exists()), "")
    if re.search(r"(?m)^pwcheck_method:.*\bsaslauthd\b", text):
        for options, remedy in () if config.ignoredomain else saslauthd_options():
            if not re.search(r"(^|\s)-[cdlTvV]*r", options):
                text = "alice, alice@1, alice@2 ... are one account with a quota each"
                yield "PROBLEM", f"saslauthd without -r: {text}; or set _ignoredomain", remedy
    elif not (settings["smtpd_sasl_local_domain"] or config.defaultdomain):
        text = f"alice and alice@{settings['myhostname']} are one account with two quotas"
        remedy = service.command("-e", "smtpd_sasl_local_domain = $myhostname")
        yield "WARNING", f"smtpd_sasl_local_domain is empty: {text}", remedy


def saslauthd_options() -> Iterator[tuple[str, str]]:
    """The options of those that run, or else that the system would start; what adds -r to them."""
    running, remedy, files = [], "", [name for pattern in SASLAUTHD for name in glob.glob(pattern)]
    for path in glob.glob(PROCESSES):
        with contextlib.suppress(OSError):
            name, *options = Path(path).read_bytes().decode(errors="replace").split("\0")
            running += [" ".join(options)] if name.endswith("saslauthd") else []
    for file in files:
        remedy = f"sed -i -E 's/^(OPTIONS|FLAGS)=\"?/&-r /' {file} && service saslauthd restart"
        for options in re.findall("(?m)^(?:OPTIONS|FLAGS)=[\"']?(.*)", Path(file).read_text()):
            yield from [] if running else [(options, remedy)]
    yield from ((options, remedy) for options in running)


def check_settings(session: Session) -> Says:
    config, user = session.config, saslquota.daemon_user(session.config, "")
    with saslquota.rights_of(user) if user else contextlib.nullcontext():
        saslquota.check_files(config)
    yield "OK", f"{config.path}, {counted(len(list(session.rules)), 'rule')}", ""
    for risk in saslquota.risks(config):
        if not risk.startswith("running as root"):  # we are, the daemon need not be
            said, _, mode = risk.partition(": chmod ")
            yield "WARNING", said, f"chmod {mode} {config.path}" if mode else ""


def check_store(session: Session) -> Says:
    config, user = session.config, saslquota.daemon_user(session.config, "")
    file = config.beside(config.sqlitefile).resolve()
    if config.store == "sqlite" and os.geteuid() and file.exists() and not os.access(file, os.W_OK):
        yield "WARNING", f"{file}: only root and the daemon's user can look into it", ""
        return
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
        yield from check_mount(file)
        return
    ((flush,),) = store.run("SELECT @@innodb_flush_log_at_trx_commit")
    if flush != 1:
        text = f"innodb_flush_log_at_trx_commit={flush}: a crash forgets sends; see my.cnf, too"
        yield "WARNING", text, "mysql -e 'SET GLOBAL innodb_flush_log_at_trx_commit = 1'"
    try:
        store.run("SELECT 1 FROM events LIMIT 1")
    except StoreError as error:
        yield "WARNING", *apart(saslquota.with_remedy(error, config))


def check_mount(file: Path) -> Says:
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    kind = max((len(m[1]), m[2]) for m in mounts if file.is_relative_to(m[1]))[1]
    if kind in UNSAFE:
        yield "WARNING", f"the file is on {kind}, which does not keep what is counted", ""


def read_spool(file: Path, sql: str, values: Sequence[int] = ()) -> list[Any]:
    """From a spool that no daemon has open. (Without a -wal file, "immutable" keeps SQLite from
    making one.) Raises ControlError."""
    mode = "mode=ro" if Path(f"{file}-wal").exists() else "immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?{mode}", uri=True)) as connection:
            return connection.execute(sql, values).fetchall()
    except sqlite3.Error as error:
        raise ControlError(f"{file}: {error}") from None


def home_of(session: Session, spool: str) -> tuple[str, int]:
    """The database's id, "" as long as it has none, and the number of the last send that it has
    of a spool. Raises SaslQuotaError."""
    store = session.store
    if isinstance(store, SQLiteStore):
        return str(store), 0
    homes = store.run("SELECT instance FROM sends WHERE account = ? AND seq = 1", [SPOOL_ACCOUNT])
    mark = f"{SPOOL_ACCOUNT} {spool}"
    done = store.run("SELECT COALESCE(MAX(total), 0) FROM sends WHERE account = ?", [mark])[0][0]
    return homes[0][0] if homes else "", done


def check_left(session: Session, file: Path) -> Says:
    """What is left in a spool that no daemon has open."""
    home, done = "", 0
    ((spool, database),) = read_spool(file, "SELECT id, database FROM spool")
    with contextlib.suppress(SaslQuotaError):  # check_store() says so
        home, done = home_of(session, spool)
    sql = f"SELECT COUNT(*), MIN(at) FROM sends WHERE n > ? AND token <> 0 AND {IS_LOGIN}"
    ((number, oldest),) = read_spool(file, sql, [done])
    if not number:
        if session.config.onfailure != "LOCAL":
            yield "OK", f"{file} is empty, left of _onfailure LOCAL: it may be removed", ""
        return
    sends = f"{counted(number, 'send')} since {format_moment(oldest, time.time_ns() // 1000)}"
    if home and database not in ("", home):
        remedy = "move the file away, or set _store, _myhost and _mydb to that one"
        other = f"of another database, {database}, this is {home}"
        yield "PROBLEM", f"{file} holds {sends} {other}: {remedy}", ""
    else:
        lacks = "that the database lacks: the daemon carries them over when both run"
        yield "WARNING", f"{file} holds {sends} {lacks}", ""


def check_spool(session: Session) -> Says:
    """Whether the daemon can write its spool. One that runs says itself what it holds."""
    config, user = session.config, saslquota.daemon_user(session.config, "")
    file, is_local = config.beside(config.spoolfile).resolve(), config.onfailure == "LOCAL"
    if not is_local and not file.exists():
        return
    if os.geteuid() and file.exists() and not os.access(file, os.W_OK):
        yield "WARNING", f"{file}: only root and the daemon's user can look into it", ""
        return
    with saslquota.rights_of(user) if user else contextlib.nullcontext():
        found = saslquota.make_spool(config).check()
    if is_local:
        yield "OK", found, ""
        yield from check_mount(file)
    if file.exists() and ": in use" not in found:
        yield from check_left(session, file)


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
    is_local = session.config.onfailure == "LOCAL"
    level, text = describe_spool(read_reply(said), is_local=is_local)
    if text:
        yield "WARNING" if level else "OK", text, ""
    elif is_local:
        yield "WARNING", "it runs without the _onfailure LOCAL of saslquota.json", restart
    if said.get("rules_valid") == "no":
        yield (
            "PROBLEM",
            "the rules are not valid, those before are in force: saslquota.py --check",
            "",
        )
    if said.get("log_lines_lost", "0") != "0":
        yield "WARNING", f"{said['log_lines_lost']} log lines are lost: is syslog stuck?", ""
    if not said.get("first_request_at", "?"):
        is_long = int(said.get("uptime", 0)) >= saslquota.FIRST_REQUEST
        text = f"Postfix has not asked it since it started, {said.get('uptime')} s ago"
        yield "WARNING" if is_long else "OK", text, ""


def check_log(session: Session, path: str) -> Says:
    """Whether the logins that Postfix says have sent in the last day are counted."""
    try:
        store = session.store
    except SaslQuotaError:
        yield "WARNING", f"{path}: not compared, as the store cannot be read", ""
        return
    sent: dict[str, str] = {}  # by queue id
    with open(0 if path == "-" else path, errors="replace") as lines:
        for line in progress(lines, "lines"):
            is_send = "/smtpd[" in line and ("sasl_username=" in line or ": reject: " in line)
            found = LOG_LINE.match(line) if is_send else None
            if found and log_age(found[1]) < 86_400:
                sent[found[2]] = found[3] or ""  # not if it is refused at the end
    logins = sorted({login for login in sent.values() if login and "?" not in login})
    cutoff = session.now - session.config.retentiondays * 86_400_000_000
    newest = f"recipients > 0 AND at > {store.BIND_TIME} ORDER BY seq DESC LIMIT 1"
    missing = []
    for login in logins:
        user = login.rsplit("@", 1)[0] if session.config.ignoredomain else login
        values: list[saslquota.Value] = [session.account(user), cutoff]
        if not store.run(f"SELECT 1 FROM sends WHERE account = ? AND {newest}", values):
            missing.append(login)
    names = ", ".join(missing[:5]) + " ..." * (len(missing) > 5)
    if missing:
        text = f"{len(missing)} of {len(logins)} logins that sent are not counted: {names}"
        yield "PROBLEM", text, ""
    elif logins:
        yield (
            "OK",
            f"{path}: of {counted(len(logins), 'login')} that sent in the last day all are counted",
            "",
        )
    else:
        yield "WARNING", f"{path}: no login has sent in the last day", ""


@functools.lru_cache
def log_age(text: str | None) -> float:
    """Seconds since ISO 8601, or since local time without a year; 0 if nothing is said."""
    now, year = time.time(), time.localtime().tm_year
    if not text or text[0].isdigit():
        return now - datetime.fromisoformat(text).timestamp() if text else 0.0
    times = (time.strptime(f"{y} {text}", "%Y %b %d %H:%M:%S") for y in (year, year - 1))
    return next(age for age in (now - time.mktime(at) for at in times) if age > -86_400)


def attempt(part: str, service: str, says: Says) -> Iterator[Finding]:
    try:
        for state, text, remedy in says:
            yield Finding(state, part, service, text, remedy)
    except (SaslQuotaError, OSError, LookupError, ValueError) as error:
        reason = getattr(error, "strerror", None)
        text = (
            f"{error.filename}: {reason}" if isinstance(error, OSError) and reason else str(error)
        )
        yield Finding("PROBLEM", part, service, *apart(text))


def examine_postfix(config: Config, directory: str) -> Iterator[Finding]:
    where = ["-c", directory] if directory else []
    try:
        entries = [words(entry, r"\s") for entry in postconf(*where, "-M").splitlines() if entry]
        services = [Service(entry, config, where) for entry in entries if entry[7] == "smtpd"]
    except ControlError as error:
        is_ours = re.search("not found|ermission", str(error))  # to see to, not Postfix's
        yield Finding("WARNING" if is_ours else "PROBLEM", "postfix", "", str(error), "")
        return
    for service in services:
        found = dict.fromkeys(attempt("postfix", service.name, check_service(service)))
        is_well = all(finding.state == "OK" for finding in found)
        yield from (finding for finding in found if is_well or finding.state != "OK")
    with_cyrus = [
        s for s in services if s.takes_logins and s.settings["smtpd_sasl_type"] == "cyrus"
    ]
    for service in with_cyrus[:1]:
        yield from attempt("postfix", "", check_sasl(service))
    if not any(service.hooks for service in services):
        yield Finding("PROBLEM", "postfix", "", "no service asks: nothing is counted", "")


def examine(session: Session, config_dir: str, log: str) -> Iterator[Finding]:
    yield from attempt("settings", "", check_settings(session))
    yield from attempt("store", "", check_store(session))
    yield from attempt("store", "", check_spool(session))
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
        whose = f"{', '.join(services)}: ".removeprefix(": ")
        lines.append(clean(f"{state:7}  {part:8}  {whose}{text}"))
        lines += [" " * 19 + clean(remedy)] if remedy else []
    count = collections.Counter(finding.state for finding in findings)
    then = "; then: postfix reload" if any("postconf" in f.remedy for f in findings) else ""
    lines.append(
        f"{counted(count['PROBLEM'], 'problem')}, {counted(count['WARNING'], 'warning')}{then}"
    )
    session.show((finding._asdict() for finding in findings), lines)
    return FAILED if count["PROBLEM"] else WARNING if count["WARNING"] else OK


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="look whether all who log in are counted, and what is wrong if not",
        description="Look at the settings, the store, the daemon and every service of Postfix that"
        " runs smtpd. Under what is wrong stands the command that mends it. Exit status: 0 all is"
        " well, 1 warnings, 2 problems. Example: saslquotactl.py doctor --log /var/log/mail.log",
    )
    parser.add_argument("--config-dir", metavar="DIR", default="", help="of Postfix, as postfix -c")
    parser.add_argument(
        "--log",
        metavar="FILE",
        default="",
        help="of Postfix: are those who sent in the last day counted?",
    )
    parser.set_defaults(command=run_doctor)
