"""The embedded ledger, the rules file and the clock break under load: every request is answered,
the log names the trouble, and counting goes on as soon as it can."""

import os
import re
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from helpers import DAY, SYSTEM_PYTHON, StartDaemon, require
from servers.audit import SECOND, audit, audit_all, entries
from servers.clock import (
    CLOCK_RULES,
    ClockedDaemon,
    audit_clocked,
    libfaketime,
    set_clock,
    set_clock_under_load,
)
from servers.daemon import SERVICE, Daemon, Unprivileged, as_user
from servers.disk import full, locked, slow_sync, small_disk, stalled
from servers.load import (
    CONFIG,
    DEFERRED,
    LATEST,
    NARROW,
    OK,
    REFUSED,
    RETURN,
    RULES,
    SLACK,
    Load,
    outlast,
)
from servers.process import IS_ROOT, pause, wait_for, wait_for_log

pytestmark = pytest.mark.slow


@pytest.fixture
def counting(daemon: StartDaemon) -> Iterator[Daemon]:
    """A daemon with a ledger of its own, in whose log no bug may show."""
    running = daemon(CONFIG, RULES)
    yield running
    assert "Traceback" not in running.log()


# --- The daemon -----------------------------------------------------------------------------------


def test_the_daemon_is_killed(counting: Daemon) -> None:
    with Load(counting.port) as load:
        for _ in range(5):
            load.wait(OK, 10, 200)
            counting.kill9()
            counting.start()
            load.counts_within()
    audit(entries(counting.ledger), load.accepted())
    assert None in {sample.reply for sample in load.samples}


# --- The file -------------------------------------------------------------------------------------


def test_the_file_is_deleted(counting: Daemon) -> None:
    """Its sends are gone, which nobody can mend; within a second it counts in a new one."""
    path = counting.ledger
    with Load(counting.port) as load:
        load.wait(OK, 10, 100)
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink()
        wait_for(path.exists, RETURN + SLACK, "a new file")
        noticed = time.monotonic()
        load.counts_within()
    load.assert_answered(LATEST)
    audit(entries(path), [sample for sample in load.accepted() if sample.began > noticed])
    wait_for_log(counting, f"{path}: No such file or directory")


def test_the_file_is_replaced_by_a_backup(counting: Daemon) -> None:
    path, backup = counting.ledger, counting.directory / "backup"
    with Load(counting.port) as load:
        load.wait(OK, 10, 100)
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(backup)) as copy:
            source.backup(copy)
        load.wait(OK, 10, 100)
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink()
        backup.replace(path)
        wait_for(Path(f"{path}-wal").exists, RETURN + SLACK, "the copy is in use")
        noticed = time.monotonic()
        load.counts_within()
    load.assert_answered(LATEST)
    audit(entries(path), [sample for sample in load.accepted() if sample.began > noticed])
    wait_for_log(counting, f"{path}: replaced by another file")


def test_the_file_is_locked_for_long(counting: Daemon) -> None:
    with Load(counting.port) as load:
        outlast(counting, load, locked(counting.ledger), "database is locked", seconds=8)
    audit_all(counting.ledger, load)


def test_the_file_is_locked_for_a_moment(counting: Daemon) -> None:
    """For less than a decision may take: nobody is told."""
    with Load(counting.port) as load:
        for _ in range(5):
            load.wait(OK, 10, 100)
            with locked(counting.ledger):
                pause(0.5)
        load.counts_within()
    audit_all(counting.ledger, load)
    assert DEFERRED not in {sample.reply for sample in load.samples}


def overwrite_the_middle(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(os.urandom(size - 4096))


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwrite_the_beginning(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(os.urandom(4096))


@pytest.mark.parametrize(
    "corrupt", [overwrite_the_middle, overwrite_the_beginning, cut_in_half, empty]
)
def test_the_file_is_corrupted(counting: Daemon, corrupt: Callable[[Path], None]) -> None:
    """The daemon lives and answers; the log says so, at a restart at the latest; once the broken
    file is out of the way it counts in a new one."""
    path = counting.ledger
    with Load(counting.port) as load:
        load.wait(OK, 10, 500)
        with closing(sqlite3.connect(path)) as other, suppress(sqlite3.Error):
            other.execute("PRAGMA wal_checkpoint(FULL)")  # the file itself holds something
        corrupt(path)
        pause(2)
        assert counting.running
        counting.kill9()
        Path(f"{path}-wal").unlink(missing_ok=True)  # else SQLite mends the file out of it
        corrupt(path)
        counting.start()
        if corrupt is not empty:  # which is how every ledger begins
            load.wait(DEFERRED, LATEST + SLACK, 50)
            wait_for_log(
                counting, r"database unavailable.*(malformed|not a database|disk I/O error)"
            )
            path.rename(path.with_suffix(".broken"))
        noticed = time.monotonic()
        load.counts_within()
    audit(entries(path), [sample for sample in load.accepted() if sample.began > noticed + 1])
    assert {s.reply for s in load.samples} <= {OK, REFUSED, DEFERRED, None}
    assert max(s.took for s in load.samples) < LATEST + SLACK


@pytest.fixture
def disk(new_directory: Callable[[], Path]) -> Iterator[Path]:
    require("mount", root=True)
    with small_disk(new_directory(), 20) as path:
        yield path


def test_a_full_disk(disk: Path, daemon: StartDaemon) -> None:
    """The log says so once, not at each attempt."""
    path = disk / "saslquota.db"
    counting = daemon({**CONFIG, "_sqlitefile": str(path)}, RULES)
    with Load(counting.port) as load:
        for _ in range(2):
            load.wait(OK, 10, 100)
            before = len(counting.log())
            with full(disk):
                load.wait(DEFERRED, 30, 50)
                wait_for_log(counting, "database unavailable.*(full|disk I/O error)")
                pause(6)
                log = counting.log()[before:]
            load.counts_within()
            others = re.compile("sasl_username=|incident: ")
            lines = [line for line in log.splitlines() if not others.search(line)]
            assert sum("connected: " in line for line in lines) <= 1, lines  # one page had room
            assert sum("connected: " not in line for line in lines) == 1, lines
    audit_all(path, load)
    assert "Traceback" not in counting.log()


def test_a_file_that_may_not_be_written(new_directory: Callable[[], Path]) -> None:
    require("setpriv") if IS_ROOT else None
    counting = Unprivileged(new_directory(), CONFIG, RULES)
    path = counting.ledger
    path.touch()
    path.chmod(0o444)
    with counting, Load(counting.port) as load:
        load.wait(DEFERRED, LATEST + SLACK, 50)
        wait_for_log(counting, f"database unavailable.*{path}.*readonly")
        path.chmod(0o666)
        load.counts_within()
    audit_all(counting.ledger, load)


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_file_that_belongs_to_root(new_directory: Callable[[], Path], suffix: str) -> None:
    """As after a look at it by root: --check and the log say so before the first send."""
    require("setpriv", root=True)
    counting = Unprivileged(new_directory(), CONFIG, RULES)
    with counting, counting.policy() as policy:
        assert policy.ask() == OK
        counting.kill9()
    path = Path(f"{counting.ledger}{suffix}")
    os.chown(path, 0, 0)
    remedy = f"{path} belongs to root, nobody may not write to it: run chown nobody {path}"
    users = [as_user(SERVICE)]
    if not suffix:  # SQLite as root mends the owner of a -wal
        users.append([SYSTEM_PYTHON])
    for user in users:
        command = [*user, counting.directory / "saslquota.py", "--check"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (1, "")
        assert remedy in done.stdout
    with counting:
        wait_for_log(counting, f"database unavailable.*{remedy}")


def test_a_directory_that_may_not_be_written(new_directory: Callable[[], Path]) -> None:
    require("setpriv") if IS_ROOT else None
    elsewhere = new_directory()
    elsewhere.chmod(0o555)
    path = elsewhere / "ledger.db"
    counting = Unprivileged(new_directory(), {**CONFIG, "_sqlitefile": str(path)}, RULES)
    with counting, Load(counting.port) as load:
        load.wait(DEFERRED, LATEST + SLACK, 50)
        wait_for_log(counting, f"database unavailable.*{path}: unable to open")
        elsewhere.chmod(0o777)
        load.counts_within()
    audit_all(path, load)


# --- The rules ------------------------------------------------------------------------------------


def test_the_rules_file_breaks(new_directory: Callable[[], Path]) -> None:
    """In every way, as a daemon that is not root meets it; the rules in force stay."""
    require("setpriv") if IS_ROOT else None
    counting = Unprivileged(new_directory(), CONFIG, RULES)
    path = counting.directory / "quotarules.json"
    good = path.read_text("utf-8")
    aside = path.with_suffix(".aside")

    def unreadable() -> None:
        path.write_text(good + " ", "utf-8")
        path.chmod(0)

    def directory() -> None:
        path.rename(aside)
        path.mkdir()

    breakages: list[tuple[Callable[[], object], str]] = [
        (lambda: path.write_text(good[: len(good) // 2], "utf-8"), "not JSON"),
        (lambda: path.write_text("", "utf-8"), "not JSON"),
        (lambda: path.write_text("{}", "utf-8"), '"default" is missing'),
        (lambda: path.write_bytes(b"\xff\xfe\x00"), "not UTF-8"),
        (unreadable, "Permission denied"),
        (path.unlink, "No such file"),
        (directory, "Is a directory"),
    ]
    with counting, Load(counting.port) as load:
        for breakage, complaint in breakages:
            load.wait(OK, 10, 50)
            breakage()
            wait_for_log(counting, f"ERROR.*{complaint}|rules not reloaded.*{complaint}")
            load.wait(REFUSED, 10, 20)
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_text(good, "utf-8")
            path.chmod(0o644)
        before = counting.log().count("rules reloaded")
        for _ in range(3):  # replaced, as editors do
            aside.write_text(good + "\n", "utf-8")
            aside.chmod(0o644)
            aside.replace(path)
        wait_for(lambda: counting.log().count("rules reloaded") > before, 5, "the rules are read")
        load.counts_within()
    audit_all(counting.ledger, load)
    assert DEFERRED not in {sample.reply for sample in load.samples}


# --- The clock ------------------------------------------------------------------------------------


def test_the_daemons_clock_is_set(new_directory: Callable[[], Path]) -> None:
    if not libfaketime():
        pytest.skip("not installed: libfaketime")
    with (
        ClockedDaemon(new_directory(), CONFIG, CLOCK_RULES) as counting,
        Load(counting.port, NARROW) as load,
    ):
        set_clock_under_load(counting.clock, load, counting.ledger)
    audit_clocked(entries(counting.ledger), load)


def test_a_clock_that_was_a_day_ahead_for_a_moment(new_directory: Callable[[], Path]) -> None:
    """One send meanwhile: afterwards all senders are counted as ever. (libfaketime breaks the sleep
    of the log's thread when the clock goes back that far: what is logged is in test_clock.py.)"""
    if not libfaketime():
        pytest.skip("not installed: libfaketime")
    rules = {"default": {"period": 4, "msgquota": 5, "msg": "in {retry_after}"}}
    with ClockedDaemon(new_directory(), CONFIG, rules) as counting:
        set_clock(counting.clock, DAY)
        pause(2.5)  # until the file and then the clock are read
        with counting.policy() as policy:
            assert policy.ask(sasl_username="somebody") == OK
            set_clock(counting.clock, 0)
            pause(2.5)
            for sender in ("bob", "somebody", "bob"):
                answers = [policy.ask(sasl_username=sender) for _ in range(6)]
                assert answers[:4] == [OK] * 4
                assert answers[5] in ("REJECT in 4s", "REJECT in 3s", "REJECT in 2s")
                wait_for(lambda who=sender: policy.ask(sasl_username=who) == OK, 6, sender)  # type: ignore[misc]
                pause(4.5)  # a period in which nobody sends
    ahead = max(row.at for row in entries(counting.ledger))
    assert ahead > time.time_ns() // 1000 + 23 * 3600 * SECOND, "the clock was not faked"


@pytest.mark.parametrize("dbtimeout", [2, 3])
def test_a_stuck_commit_holds_up_nobody_twice(
    daemon: StartDaemon, new_directory: Callable[[], Path], dbtimeout: int
) -> None:
    """A disk stalls: the requests at that moment wait for `_dbtimeout`, all others for nothing,
    those on the same connections too."""
    require("gcc")
    environment = slow_sync(new_directory())
    config = {**CONFIG, "_dbtimeout": dbtimeout}
    counting = daemon(config, RULES, environment)
    with Load(counting.port) as load:
        load.wait(OK, 10, 100)
        began = time.monotonic()
        with stalled(environment, 25):
            load.wait(DEFERRED, dbtimeout + SLACK, 12)
            noticed = time.monotonic()
            wait_for_log(counting, 'database unavailable, senders get "450 .*: timed out')
            pause(10 - (noticed - began))
            over = time.monotonic()
        load.counts_within()
    load.assert_answered(dbtimeout + 0.5)
    load.assert_at_once(noticed, over)
    audit(entries(counting.ledger), load.accepted())
    wait_for_log(counting, "sends are counted again")
