"""The other programs that can do the same job, configured as their own manuals say.

Each gets the same requests and a limit that is never reached. README.md beside this file tells what
each of them makes durable.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from servers import (
    OTHER,
    PLENTY,
    PYTHON,
    START_SECONDS,
    STOP_SECONDS,
    VENV,
    WORK,
    Bench,
    BenchError,
    Daemon,
    MariaDB,
    accepts,
    apt_get,
    free_port,
    has_module,
    install_packages,
    pip_install,
)

# Debian's packages of postfwd and of the Perl modules that it loads, all without compiled code.
POSTFWD = WORK / "postfwd"
POSTFWD_PACKAGES = ("postfwd", "libnet-server-perl", "libio-multiplex-perl", "libnet-dns-perl")
PERL = {"pod2usage": "perl"}  # perl-base is always there and not enough
# What builds mysqlclient, which policyd-rate-limit wants for MySQL.
MYSQLCLIENT = {
    "mariadb_config": "libmariadb-dev",
    "pkg-config": "pkg-config",
    "python3-config": "python3-dev",
}

POSTFWD_RATE = f"id=RATE; action=rate(sasl_username/{PLENTY}/3600/REJECT over quota)\n"
POSTFWD_LOGGED = "id=PASS; action=OK\n"  # postfwd logs a line for each rule that hits

# postfwd logs to /dev/log and nowhere else. It gets a /dev of its own where that is our sink, so
# that neither the machine's log nor another program notices; this needs root.
PRIVATE_DEV = (
    "mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    ' && ln -s "$0" /dev/log && exec "$@"'
)


def install_peers(rows: Sequence[str]) -> None:
    """Bring the peers of some rows, and leave nothing of theirs outside this directory."""
    if "postfwd" in rows or "postfwd-silent" in rows:
        install_packages(PERL)
        unpack_postfwd()
    if ("prl-mysql" in rows or "prl-sqlite" in rows) and not has_module("policyd_rate_limit"):
        # Without a wheel of its own in between, its setup.py writes into /etc.
        pip_install("policyd-rate-limit", "--use-pep517", required=False)
    if "prl-mysql" in rows and not has_module("MySQLdb"):
        install_packages(MYSQLCLIENT)
        pip_install("mysqlclient", required=False)


def unpack_postfwd() -> None:
    """Unpack postfwd instead of installing it, which would set up and start its service."""
    if POSTFWD.exists():
        return
    if os.geteuid() == 0:
        apt_get("update")
    with tempfile.TemporaryDirectory(dir=WORK) as directory:
        if apt_get("download", *POSTFWD_PACKAGES, directory=Path(directory)):
            for package in Path(directory).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", package, POSTFWD], check=True)


def postfwd(bench: Bench, *, logged: bool) -> Daemon:
    """Debian's postfwd 1 with one rate() rule. It counts in memory only."""
    if not POSTFWD.exists():
        raise BenchError("postfwd could not be downloaded")
    port, pid_file, rules = free_port(), bench.sockets / f"postfwd-{logged}", bench.path(".cf")
    rules.write_text(POSTFWD_RATE + (POSTFWD_LOGGED if logged else ""))
    command = ["perl", "-T", f"-I{POSTFWD}/usr/share/perl5", f"{POSTFWD}/usr/sbin/postfwd1"]
    command += ["--daemon", "-i", "127.0.0.1", "-p", str(port), "--nodns"]
    command += ["-f", str(rules), "--pidfile", str(pid_file), *drop_nothing()]
    if os.geteuid() == 0:
        command = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            PRIVATE_DEV,
            str(bench.log_socket(OTHER)),
            *command,
        ]
    bench.stack.callback(stop_detached, pid_file)
    subprocess.run(command, stdout=bench.log, stderr=bench.log, check=False)
    deadline = time.monotonic() + START_SECONDS
    while not (pid_file.exists() and accepts(port)):
        if time.monotonic() > deadline:
            raise BenchError("postfwd1 did not start")
        time.sleep(0.05)
    return Daemon(port, int(pid_file.read_text()))


def drop_nothing() -> list[str]:
    """Let postfwd stay who we are: its files are in a directory of ours."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    return ["-u", user, "-g", grp.getgrgid(os.getegid()).gr_name]


def stop_detached(pid_file: Path) -> None:
    """End a process that has detached itself, so that it is no child to wait for."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        process = os.pidfd_open(int(pid_file.read_text()))
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not select.select([process], [], [], STOP_SECONDS)[0]:
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def policyd_rate_limit(bench: Bench, database: MariaDB | None) -> Daemon:
    """policyd-rate-limit from PyPI, on MySQL when a database is given, else on SQLite."""
    if not has_module("policyd_rate_limit"):
        raise BenchError("policyd-rate-limit does not run on this Python")
    if database and not has_module("MySQLdb"):
        raise BenchError("mysqlclient could not be installed")
    port = free_port()
    config: dict[str, object] = {
        "debug": False,
        "user": pwd.getpwuid(os.geteuid()).pw_name,
        "group": grp.getgrgid(os.getegid()).gr_name,
        "pidfile": str(bench.path(".pid")),
        "SOCKET": ["127.0.0.1", port],
        "backend": 1 if database else 0,
        "sqlite_config": {"database": str(bench.data / "policyd-rate-limit.db")},
        "limits": [[PLENTY, 3600]],
        "limit_by_sasl": True,
        "sql_limits_by_id": "",
        "report": False,
        "delay_to_close": 300,
        "count_mode": 0,
        "success_action": "OK",
        "fail_action": "REJECT over quota",
        "db_error_action": "DEFER database error",
    }
    if database:
        config["mysql_config"] = {
            "host": "127.0.0.1", "port": database.port, "charset": "utf8",
            "user": database.user, "passwd": database.password, "db": "policyd_rate_limit",
        }  # fmt: skip
        database.sql("CREATE OR REPLACE DATABASE policyd_rate_limit")
    path = bench.path(".yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    program = VENV / "bin" / "policyd-rate-limit"
    process = bench.start([PYTHON, program, "--file", path], lambda: accepts(port))
    return Daemon(port, process.pid)
