"""--check: it names what is wrong, puts every rule in words, and changes nothing."""

import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from helpers import (
    DEFAULT_SENTENCE,
    SENTENCE,
    SYSTEM_PYTHON,
    StartDaemon,
    require,
    saslquota_py,
    write_config,
)
from servers.audit import count_rows
from servers.daemon import copy_shipped
from servers.mariadb import Database
from servers.ports import free_port
from servers.process import IS_ROOT, ROOT, clean_environment


def state(path: Path) -> str:
    """What would show that a file was touched."""
    if path.suffix in {".out", ".db-shm"}:  # the daemon's output; memory that readers lock
        return "there"
    return f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def snapshot(directory: Path) -> dict[str, str]:
    return {path.name: state(path) for path in directory.iterdir()}


def check(
    directory: Path, *arguments: str, address: bool = False, **environ: object
) -> tuple[int, list[str]]:
    """Run --check, which creates and changes nothing. Returns its status and lines; that about the
    address, which another program may use, only with `address`."""
    before = snapshot(directory)
    config = directory / "saslquota.json"
    status, lines = saslquota_py("-c", config, "--check", *arguments, **environ)
    assert snapshot(directory) == before
    return status, [x for x in lines if address or not re.match(r"[0-9.]+:[0-9]+: ", x)]


def in_words(directory: Path) -> list[str]:
    """What --check says of the shipped rules, run by who is not root."""
    path = directory / "quotarules.json"
    name = "this login, and each login of a domain of that name"
    return [
        *(
            f"{path}: {key}: {who}: {quota} recipients in any {period} seconds"
            f" ({minutes}m); beyond that: {msg}"
            for key, who, period, minutes, quota, msg in [
                ("default", "each sender without another rule", 120, 2, 500, DEFAULT_SENTENCE),
                ("localhost", name, 1200, 20, 5000, SENTENCE.format(5000, 1200)),
                ("root@localhost", "this sender", 300, 5, 50, SENTENCE.format(50, 300)),
            ]
        ),
        f'{path}: note: msg of "default", "localhost", "root@localhost" is not ASCII, which mail'
        " programs without SMTPUTF8 may show wrongly",
        *(["warning: running as root is not needed; use the user saslquota"] if IS_ROOT else []),
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
    assert lines[-1].startswith(f"{shipped}/data/saslquota.db: ")


def test_check_of_mysql_that_is_not_there(shipped: Path) -> None:
    port = free_port()
    (shipped / "saslquota.json").chmod(0o640)
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


def mysql_check(shipped: Path, database: Database, **settings: str) -> tuple[int, str]:
    (shipped / "saslquota.json").chmod(0o640)
    status, lines = check(shipped, **{**database.config(), **settings})  # type: ignore[arg-type]
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
        ({"_mydb": "elsewhere"}, ["the database elsewhere does not exist, or grant all"]),
    ],
    ids=["password", "database"],
)
def test_check_of_mysql_that_lets_nobody_in(
    shipped: Path, database: Database, settings: dict[str, str], words: list[str]
) -> None:
    status, line = mysql_check(shipped, database, **settings)
    assert status == 1
    for word in words:
        assert word in line


def test_check_of_mysql_without_the_table(shipped: Path, database: Database) -> None:
    database.sql("DROP TABLE sends, events")
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
    assert len(done.stdout.splitlines()) == 5 + IS_ROOT


def test_check_warns_of_a_rule_that_is_never_selected(shipped: Path) -> None:
    """Which does not keep the daemon from starting."""
    rules = {"default": {"period": 60, "msgquota": 9}, "*a*.com": {}, "a*.com": {}, "b*.com": {}}
    path = shipped / "quotarules.json"
    path.write_text(json.dumps(rules), "utf-8")
    status, lines = check(shipped)
    assert status == 0
    assert [line for line in lines if f"{path}: warning" in line] == [
        f'{path}: warning: "a*.com" is never selected, "*a*.com" comes first and matches as much'
    ]


@pytest.mark.parametrize(
    ("key", "doubt"),
    [
        ("192.0.2.7", "selects no client address"),
        ("10.0.0.0/8", "selects no client address"),
        ("2001:db8::/32", "selects no client address"),
        ("10.1.*", "selects no client addresses"),
        ("10.1.2.[3-7]", "selects no client addresses"),
        ("bob@[192.0.2.7]", "selects no client address"),
        ("user[1-20]@example.com", "selects no numbers"),
        ("user[01-50]@example.com", "selects no numbers"),
        ("user[0-9]@example.com", ""),
        ("user1[0-9]@example.com", ""),
        ("a1.example.com", ""),
        ("12345", ""),
        ("alice", ""),
    ],
)
def test_check_doubts_keys(shipped: Path, key: str, doubt: str) -> None:
    path = shipped / "quotarules.json"
    path.write_text(json.dumps({"default": {"period": 60, "msgquota": 9}, key: {}}), "utf-8")
    status, lines = check(shipped)
    assert status == 0
    found = [line for line in lines if f"{path}: warning" in line]
    assert len(found) == bool(doubt)
    assert not doubt or found[0].startswith(f'{path}: warning: "{key}" {doubt}: ')


@pytest.mark.parametrize(
    ("windows", "warns"),
    [
        ([("1h", 9, "HOLD")], True),
        ([("1h", 9, "HOLD"), ("1d", "unlimited", "REJECT")], True),
        ([("1h", 9, "HOLD"), ("1d", 99, "HOLD")], True),
        ([("1h", 9, "HOLD"), ("1d", 99, "DEFER")], False),
        ([("1h", "unlimited", "HOLD")], False),
        ([("1h", 9, "REJECT")], False),
    ],
)
def test_check_wants_a_bound_for_what_is_held(
    shipped: Path, windows: list[tuple[object, ...]], warns: bool
) -> None:
    path = shipped / "quotarules.json"
    rule = [dict(zip(("period", "msgquota", "action"), w, strict=True)) for w in windows]
    path.write_text(json.dumps({"default": rule}), "utf-8")
    _, lines = check(shipped)
    text = f'{path}: warning: "default": HOLD, and no other window refuses: '
    assert any(line.startswith(text) for line in lines) is warns


def test_check_of_a_login_without_a_domain(shipped: Path) -> None:
    path = shipped / "quotarules.json"
    path.write_text(json.dumps({"default": {"period": 60, "msgquota": 9}, "alice": {}}), "utf-8")
    _, lines = check(shipped)
    who = "this login, and each login of a domain of that name"
    assert any(line.startswith(f"{path}: alice: {who}: 9 recipients") for line in lines)
    _, lines = check(shipped, _defaultdomain="Example.com")
    reason = "selects no login without a domain: with _defaultdomain that is "
    assert f'{path}: warning: "alice" {reason}"alice@example.com"' in lines


@pytest.mark.parametrize(
    ("msg", "words"),
    [
        ("554 no more", "leave out the SMTP code"),
        ("450-no more", "leave out the SMTP code"),
        ("5.7.1 no more", ""),  # Postfix takes it (access(5), "ENHANCED STATUS CODES")
        ("5000 mails are enough", ""),
        ("não", "is not ASCII"),
    ],
)
def test_check_doubts_texts(shipped: Path, msg: str, words: str) -> None:
    path = shipped / "quotarules.json"
    rules = {"default": {"period": 60, "msgquota": 9, "msg": msg}}
    path.write_text(json.dumps(rules), "utf-8")
    status, lines = check(shipped)
    assert status == 0
    found = [line for line in lines if 'msg of "default"' in line]
    assert len(found) == bool(words)
    assert not words or words in found[0]


def test_check_of_the_address(shipped: Path, daemon: StartDaemon) -> None:
    port = free_port()
    assert (
        f"127.0.0.1:{port}: can be listened on" in check(shipped, address=True, _bindport=port)[1]
    )
    started = daemon()
    with started.policy() as policy:
        assert policy.ask() == "OK"  # it has its file open
        status, lines = check(started.directory, address=True)
    assert status == 0
    (line,) = [line for line in lines if f":{started.port}: " in line]
    assert line.endswith(": in use; that is right if it is by saslquota itself")


@pytest.mark.parametrize(
    ("bind", "words"),
    [
        ("192.0.2.7", "cannot listen on 192.0.2.7:10008: "),
        ("no-such-host.invalid", "cannot listen on no-such-host.invalid:10008: "),
        ("unix:none/policy", "/none does not exist, see _bind"),
        ("unix:" + "x" * 120, "too long for a socket, see _bind"),
    ],
)
def test_check_of_an_address_that_cannot_be_listened_on(
    shipped: Path, bind: str, words: str
) -> None:
    status, lines = check(shipped, _bind=bind)
    assert status == 1
    assert any(words in line for line in lines)


def test_check_tells_the_risks(shipped: Path) -> None:
    port = free_port()
    _, lines = check(shipped, _bind="0.0.0.0", _bindport=port)
    assert "warning: _bind 0.0.0.0 is open to other machines: set _allow" in lines
    (shipped / "saslquota.json").chmod(0o644)
    _, lines = check(shipped, _store="mysql", _mypasswd="secret", _myhost="unix:/none")
    holds = f"{shipped}/saslquota.json holds a password and is readable by everybody"
    assert any(line.startswith(f"warning: {holds}") for line in lines)


def check_by_system_python(directory: Path, *arguments: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [SYSTEM_PYTHON, directory / "saslquota.py", "--check", *arguments],
        env=clean_environment({"_bindport": free_port()}),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.fixture
def owned(new_directory: Callable[[], Path]) -> Path:
    """What the user nobody owns, in a directory that he can enter."""
    require(SYSTEM_PYTHON, root=True)
    directory = copy_shipped(new_directory() / "clone")
    shutil.chown(directory, "nobody")
    return directory


def test_root_checks_as_the_owner(owned: Path) -> None:
    """With the rights of the user who the daemon will run as."""
    status, lines = check_by_system_python(owned)
    assert (status, [line for line in lines if "cannot" in line]) == (0, [])
    assert lines[0] == "checked with the rights of the user nobody, see --user"
    assert not any("running as root" in line for line in lines)
    (owned / "quotarules.json").chmod(0o600)
    status, lines = check_by_system_python(owned)
    assert status == 1
    assert lines[-1].startswith(f"the user nobody cannot read {owned}/quotarules.json: run chgrp ")
    status, lines = check_by_system_python(owned, "--user", "root")
    assert status == 0
    (owned / "quotarules.json").chmod(0o644)
    shutil.chown(owned, "root")
    status, lines = check_by_system_python(owned, "--user", "nobody")
    assert status == 1
    assert lines[-1] == f"{owned}/saslquota.db: cannot be made, its directory is not writable"


def test_root_checks_settings_that_the_owner_cannot_reach(owned: Path) -> None:
    """They lie in a directory of root's, and the database in the daemon's."""
    data = owned.parent
    shutil.chown(data, "nobody")
    write_config(owned, _sqlitefile=str(data / "saslquota.db"))
    shutil.chown(owned, "root")
    owned.chmod(0o700)
    status, lines = check_by_system_python(owned)
    assert status == 1
    assert lines[1] == f"{owned}/saslquota.json: read"
    assert re.match(f"the user nobody cannot read .*: run chmod a\\+x {owned}$", lines[-1])


def test_check_as_nobody_there(shipped: Path) -> None:
    require(root=True)
    status, lines = check(shipped, "--user", "no-such-user")
    assert (status, lines) == (1, ["saslquota: --user no-such-user: no such user"])
