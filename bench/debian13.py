"""Debian 13's Python, in a root directory of its own, with its C library and its SQLite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from servers import WORK, Bench, BenchError, install_packages, pip_install, say

ROOT = WORK / "trixie"
CONNECTOR = WORK / "connector313"
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
# The program finds its files at the same paths as outside, and keeps the process id: only execs.
ENTER = (
    'root=$0; mount -t tmpfs tmpfs "$root/tmp"; for directory in "$1" "$2"; do'
    ' mkdir -p "$root$directory" && mount --bind "$directory" "$root$directory" || exit; done;'
    ' shift 2; exec chroot "$root" "$@"'
)


def install_debian13(rows: list[str]) -> None:
    """Unpack it when one of its rows is measured; as root only, as debootstrap wants."""
    if not any(row.endswith("-313") for row in rows) or os.geteuid() != 0:
        return
    if not ROOT.exists():
        install_packages({"debootstrap": "debootstrap"})
        debootstrap()
    if not CONNECTOR.exists():
        wheel = ("--target", str(CONNECTOR), "--python-version", "3.13", "--only-binary", ":all:")
        pip_install("mysql-connector-python", *wheel, required=False)


def debootstrap() -> None:
    """The smallest Debian with Python, from the mirror that this machine uses."""
    say("unpacking Debian 13")
    form = ["$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
    targets = ["apt-get", "indextargets", "--format", *form]
    mirror = subprocess.run(targets, capture_output=True, text=True, check=False).stdout.split()
    new = WORK / "trixie.new"
    shutil.rmtree(new, ignore_errors=True)
    make = ["debootstrap", "--variant=minbase", "--include=python3", "trixie", str(new)]
    command = [*NAMESPACES, *make, *mirror[:1]]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0:
        new.rename(ROOT)


def debian13(bench: Bench) -> list[str | Path]:
    """The command that is its Python."""
    if not (ROOT.exists() and CONNECTOR.exists()):
        raise BenchError("Debian 13 could not be unpacked: this needs root, and debootstrap")
    enter: list[str | Path] = ["unshare", "--mount", "sh", "-c", ENTER, ROOT, WORK, bench.sockets]
    return [*enter, "env", f"PYTHONPATH={CONNECTOR}", "/usr/bin/python3"]
