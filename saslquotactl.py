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
import functools
import json
import os
import socket
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import saslquota
from saslquota import POOL_PREFIX, Config, Rules, SaslQuotaError, SQLiteStore, Store

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
    adders: list[Callable[[Any], None]] = []  # add_..._commands() of each section
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
