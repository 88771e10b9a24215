"""--check: it names what is wrong, puts every rule in words, and changes nothing."""

import hashlib
import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from helpers import SENTENCE, StartDaemon, saslquota_py, write_config
from servers.audit import count_rows
from servers.mariadb import Database
from servers.ports import free_port
from servers.process import ROOT, clean_environment


def state(path: Path) -> str:
    """What would show that a file was touched."""
    if path.suffix in {".out", ".db-shm"}:  # the daemon's output; memory that readers lock
        return "there"
    return f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def snapshot(directory: Path) -> dict[str, str]:
    return {path.name: state(path) for path in directory.iterdir()}


def check(directory: Path, **environ: object) -> tuple[int, list[str]]:
    """Run --check, which creates and changes nothing."""
    before = snapshot(directory)
    found = saslquota_py("-c", directory / "saslquota.json", "--check", **environ)
    assert snapshot(directory) == before
    return found


def in_words(directory: Path) -> list[str]:
    return [
        f"{directory}/quotarules.json: {key}: {who}: {quota} recipients in any {period} seconds"
        f" ({minutes}m); beyond that: {SENTENCE.format(quota, period)}"
        for key, who, period, minutes, quota in [
            ("default", "each sender without another rule", 120, 2, 500),
            ("localhost", "each sender of localhost", 1200, 20, 5000),
            ("root@localhost", "this sender", 300, 5, 50),
        ]
    ]


def test_check_before_the_first_start(shipped: Path) -> None:
    """What a fresh clone finds; each finding and each rule has a line."""
    assert check(shipped) == (
        0,
        [
            f"{shipped}/saslquota.json: read",
            *in_words(shipped),
            f"SQLite {shipped}/saslquota.db: will be made at the first start",
        ],
    )


def test_check_uses_the_files_beside_the_script(shipped: Path) -> None:
    done = subprocess.run(
        [sys.executable, shipped / "saslquota.py", "--check"],
        cwd="/",
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{shipped}/saslquota.json: read\n{shipped}/quotarules.json: ")


def test_check_while_a_daemon_counts(daemon: StartDaemon) -> None:
    running = daemon()
    with running.policy() as policy:
        assert policy.ask() == "OK"
        assert "saslquota.db-wal" in snapshot(running.directory)
        status, lines = check(running.directory)
        assert policy.ask() == "OK"
    assert status == 0
    assert lines[-1] == f"SQLite {running.directory}/saslquota.db: table sends found"
    assert count_rows(running.ledger) == 2


def test_check_after_a_clean_end(daemon: StartDaemon) -> None:
    running = daemon()
    with running.policy() as policy:
        assert policy.ask() == "OK"
    assert running.terminate() == 0
    assert "saslquota.db-wal" not in snapshot(running.directory)
    status, lines = check(running.directory)
    assert (status, lines[-1]) == (
        0,
        f"SQLite {running.directory}/saslquota.db: table sends found",
    )
    assert count_rows(running.ledger) == 1


def test_check_after_a_power_failure(daemon: StartDaemon) -> None:
    """The sends are in the -wal file still."""
    running = daemon()
    with running.policy() as policy:
        assert policy.ask() == "OK"
    running.kill9()
    status, lines = check(running.directory)
    assert (status, lines[-1]) == (
        0,
        f"SQLite {running.directory}/saslquota.db: table sends found",
    )
    assert count_rows(running.ledger) == 1


def test_check_of_something_that_is_no_database(shipped: Path) -> None:
    path = shipped / "saslquota.db"
    path.write_text("not a database, but a text that somebody keeps here", "utf-8")
    status, lines = check(shipped)
    assert (status, lines[-1]) == (1, f"{path}: file is not a database")


def test_check_of_another_database(shipped: Path) -> None:
    path = shipped / "saslquota.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE other (x)")
    status, lines = check(shipped)
    assert (status, lines[-1]) == (1, f"{path}: no such table: sends")


def test_check_of_a_directory_that_does_not_exist(shipped: Path) -> None:
    write_config(shipped, _sqlitefile="data/saslquota.db")
    status, lines = check(shipped)
    assert status == 1
    assert lines[-1].startswith(f"{shipped}/data/saslquota.db: ")
    assert "directory" in lines[-1]


def test_check_says_all_that_is_wrong(shipped: Path) -> None:
    """Bad rules do not hide a bad store."""
    (shipped / "quotarules.json").write_text("{}", "utf-8")
    write_config(shipped, _sqlitefile="data/saslquota.db")
    status, lines = check(shipped)
    assert status == 1
    assert lines[1] == f'{shipped}/quotarules.json: the rule "default" is missing'
    assert lines[2].startswith(f"{shipped}/data/saslquota.db: ")


def test_check_of_mysql_that_is_not_there(shipped: Path) -> None:
    port = free_port()
    status, lines = check(shipped, _store="mysql", _myhost="127.0.0.1", _myport=port)
    assert status == 1
    assert lines[:-1] == [f"{shipped}/saslquota.json: read", *in_words(shipped)]
    assert f"127.0.0.1:{port}" in lines[-1]
    assert "is the server running? check _myhost and _myport" in lines[-1]


def test_check_without_the_mysql_package(shipped: Path, tmp_path: Path) -> None:
    """The remedy is in the line."""
    blocked = "raise ImportError"
    (tmp_path / "mysql.py").write_text(blocked, "utf-8")
    (tmp_path / "_mysql_connector.py").write_text(blocked, "utf-8")
    status, lines = check(shipped, _store="mysql", PYTHONPATH=tmp_path)
    assert status == 1
    assert re.match("mysql-connector-python is missing: run .*pip install", lines[-1])


def mysql_check(shipped: Path, database: Database, **settings: object) -> tuple[int, str]:
    status, lines = check(shipped, **{**database.config(), **settings})
    assert lines[:-1] == [f"{shipped}/saslquota.json: read", *in_words(shipped)]
    return status, lines[-1]


def test_check_of_mysql(shipped: Path, database: Database) -> None:
    status, line = mysql_check(shipped, database)
    assert status == 0
    assert f"MySQL {database.name} on 127.0.0.1: " in line
    assert "table sends found" in line
    assert count_rows(database) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"_mypasswd": "wrong"},
            ["Access denied for user 'saslquota'@", "check _myuser and _mypasswd in", "grant"],
        ),
        ({"_mydb": "elsewhere"}, ["elsewhere"]),
    ],
    ids=["password", "database"],
)
def test_check_of_mysql_that_lets_nobody_in(
    shipped: Path, database: Database, settings: dict[str, object], words: list[str]
) -> None:
    status, line = mysql_check(shipped, database, **settings)
    assert status == 1
    for word in words:
        assert word in line


def test_check_of_mysql_without_the_table(shipped: Path, database: Database) -> None:
    database.sql("DROP TABLE sends")
    status, line = mysql_check(shipped, database)
    assert status == 1
    assert f"run mysql {database.name} < mysql.sql" in line
    assert database.sql("SHOW TABLES") == ""


def test_check_without_rules(shipped: Path) -> None:
    path = shipped / "quotarules.json"
    path.unlink()
    status, lines = check(shipped)
    assert (status, lines[1]) == (1, f"{path}: cannot be read: No such file or directory")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_will_do(shipped: Path, encoding: str) -> None:
    """Rules hold what the terminal's encoding may lack."""
    rules = {"default": {"period": 60, "msgquota": 5, "msg": "Você já mandou 送信 🐁"}}
    (shipped / "quotarules.json").write_text(json.dumps(rules), "utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "saslquota.py", "-c", shipped / "saslquota.json", "--check"],
        env=clean_environment({"PYTHONIOENCODING": encoding}),
        capture_output=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout.splitlines()) == 3


def test_check_warns_of_a_rule_that_is_never_selected(shipped: Path) -> None:
    """Which does not keep the daemon from starting."""
    rules = {"default": {"period": 60, "msgquota": 9}, "*a*.com": {}, "a*.com": {}, "b*.com": {}}
    path = shipped / "quotarules.json"
    path.write_text(json.dumps(rules), "utf-8")
    status, lines = check(shipped)
    assert status == 0
    assert [line for line in lines if "warning" in line] == [
        f'{path}: warning: "a*.com" is never selected, "*a*.com" comes first and matches as much'
    ]
