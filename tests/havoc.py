"""Havoc, by hand: `PYTHONPATH=. .venv-tests/bin/python tests/havoc.py`.

Two daemons that count on without their database (_onfailure LOCAL) share their senders, while the
server is killed, frozen and locked, and the daemons are killed and cut off, at random. After half a
minute of that all is carried over, and each accepted reply must have one row, in chains without a
hole. A line for each round says what was done; with the same seed the same is done again, though
not at the same statement. The logs of a round with a mistake stay. Exit status 1 if there was one.
"""

import argparse
import itertools
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import mysql.connector
from servers import outage
from servers.audit import Entry, assert_one_row_each, audit_epochs
from servers.daemon import Daemon
from servers.load import NARROW, OK, REFUSED, RULES, WIDE, Load, Sample
from servers.mariadb import (
    Database,
    MariaDB,
    commits_stopped,
    frozen,
    kill_connections,
    killed,
    rows_locked,
    session,
    tables_locked,
)
from servers.mysql import MySQL
from servers.proxy import SlowProxy

from saslquota import Config

TIMEOUT = Config.dbtimeout  # seconds
ROUND = 15, 30  # seconds that it lasts
SLACK = 0.7  # seconds that a reply may take longer


class Round:
    """What is done to a server and the daemons in half a minute, and what it comes to."""

    def __init__(self, server: MariaDB, directory: Path, luck: random.Random) -> None:
        self.server, self.luck = server, luck
        self.database: Database = server.create_database()
        self.proxies = [SlowProxy(server.port) for _ in range(2)]
        config = {**self.database.config(), **outage.CONFIG, "_dbtimeout": TIMEOUT}
        self.daemons = []
        for number, proxy in enumerate(self.proxies):
            own = directory / f"daemon{number}"
            own.mkdir()
            self.daemons.append(Daemon(own, {**config, "_myport": proxy.port}, RULES))
        self.done: list[str] = []
        self.locked: list[tuple[float, float]] = []  # when senders may be deferred, monotonic
        self.stopped: list[tuple[float, float]] = []  # when a daemon could not answer

    def pause(self, least: float, most: float) -> None:
        time.sleep(self.luck.uniform(least, most))

    def kill_server(self) -> None:
        with killed(self.server):
            self.pause(0, self.luck.choice([0.3, 8]))

    def freeze_server(self) -> None:
        with frozen(self.server):
            self.pause(0.05, self.luck.choice([1, 4, 12]))

    def lock_rows(self) -> None:
        """Only this may defer: the senders, and others for a moment whose rows another daemon holds
        while it waits for these."""
        began = time.monotonic()
        accounts = self.luck.sample(NARROW + WIDE, self.luck.choice([1, 2]))
        how = self.luck.choice(["read", "beyond"])
        with suppress(mysql.connector.Error), rows_locked(self.database, accounts, how):
            self.pause(0.3, 5)
        self.locked.append((began, time.monotonic() + TIMEOUT))

    def lock_tables(self) -> None:
        with tables_locked(self.server):
            self.pause(0.3, 5)

    def stop_commits(self) -> None:
        if not isinstance(self.server, MySQL):
            with commits_stopped(self.server):
                self.pause(0.3, 5)

    def kill_connections(self) -> None:
        with session(self.server) as admin:
            for _ in range(self.luck.choice([1, 5])):
                kill_connections(admin, self.database)
                self.pause(0, 0.3)

    def slow_down(self) -> None:
        with self.luck.choice(self.proxies).slow(self.luck.choice([0.02, 0.3, 1.2])):
            self.pause(0.5, 6)

    def cut_off(self) -> None:
        with self.luck.choice(self.proxies).down():
            self.pause(0.1, 3)

    def kill_daemon(self) -> None:
        daemon = self.luck.choice(self.daemons)
        daemon.kill9()
        self.pause(0, 0.5)
        daemon.start()

    def freeze_daemon(self) -> None:
        began, daemon = time.monotonic(), self.luck.choice(self.daemons)
        daemon.freeze()
        self.pause(0.05, self.luck.choice([0.5, 2]))
        daemon.thaw()
        self.stopped.append((began, time.monotonic() + 1))
        self.locked.append(self.stopped[-1])  # it may have held locks

    def reset_sender(self) -> None:
        with suppress(AssertionError):  # it has sent nothing
            self.database.sql(outage.reset_statement(self.luck.choice(WIDE)))

    DEEDS: tuple[Callable[["Round"], None], ...] = (
        *[kill_server] * 2,
        *[freeze_server] * 3,
        *[lock_rows, lock_tables, stop_commits, kill_connections, slow_down, cut_off],
        *[kill_daemon, freeze_daemon, reset_sender],
    )

    def run(self) -> list[str]:
        """Do it; returns the mistakes."""
        with ExitStack() as stack:
            for proxy in self.proxies:
                stack.enter_context(proxy)
            for daemon in self.daemons:
                stack.enter_context(daemon)
            outage.settle(*self.daemons)
            connections, pause = self.luck.choice([4, 12, 30]), self.luck.choice([0.005, 0.03, 0.2])
            ports = [daemon.port for daemon in self.daemons]
            with Load(ports, connections=connections, pause=pause) as load:
                ends = time.monotonic() + self.luck.uniform(*ROUND)
                while time.monotonic() < ends:
                    self.pause(0, 3)
                    deed = self.luck.choice(self.DEEDS)
                    began = time.monotonic()
                    deed(self)
                    self.done.append(f"{deed.__name__} {time.monotonic() - began:.1f}")
            replies = Counter(str(sample.reply).partition(" ")[0] for sample in load.samples)
            print(", ".join(self.done), *(f"{n} {reply}" for reply, n in replies.items()), sep="; ")
            return list(self.mistakes(load))

    def mistakes(self, load: Load) -> Iterator[str]:
        checks: tuple[Callable[[], None], ...] = (
            lambda: outage.settle(*self.daemons),
            lambda: audit_epochs(self.database),
            lambda: assert_one_row_each(self.rows(), load.accepted()),
        )
        for check in checks:
            try:
                check()
            except AssertionError as error:
                yield str(error)
        for sample in load.samples:
            if sample.reply not in (OK, REFUSED, None) and not self.is_within(sample, self.locked):
                yield f"{sample}: deferred"
            is_late = sample.took > TIMEOUT + SLACK and sample.reply is not None
            if is_late and not self.is_within(sample, self.stopped):
                yield f"{sample}: too late"
        yield from (daemon.log() for daemon in self.daemons if "Traceback" in daemon.log())

    @staticmethod
    def is_within(sample: Sample, times: Sequence[tuple[float, float]]) -> bool:
        return any(sample.began <= end and begin <= sample.ended for begin, end in times)

    def rows(self) -> list[Entry]:
        return [row for row in outage.sends(self.database) if row.instance != "reset"]


def main() -> int:
    parser = argparse.ArgumentParser(description="random faults, under load, with _onfailure LOCAL")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mysql", action="store_true", help="MySQL in the place of MariaDB")
    options = parser.parse_args()
    ends, luck = time.monotonic() + options.minutes * 60, random.Random(options.seed)
    top, mistakes = Path(tempfile.mkdtemp(prefix="saslquota-havoc-")), 0
    for directory in (top, top / "server"):
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)
    with (MySQL if options.mysql else MariaDB)(top / "server") as server:
        for number in itertools.takewhile(lambda _: time.monotonic() < ends, itertools.count(1)):
            directory = top / f"round{number}"
            directory.mkdir()
            found = Round(server, directory, luck).run()
            mistakes += len(found)
            for line in found[:20]:
                print(f"MISTAKE: {line}", flush=True)
            if not found:
                shutil.rmtree(directory)
    shutil.rmtree(top / "server" if mistakes else top)
    print(f"{mistakes} mistakes" + f", see {top}" * bool(mistakes))
    return 1 if mistakes else 0


if __name__ == "__main__":
    raise SystemExit(main())
