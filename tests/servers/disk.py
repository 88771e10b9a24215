"""Files and disks that break on demand."""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from servers.process import run


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep everybody else from writing to an SQLite file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA busy_timeout = 10000")
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own and of that size."""
    run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "tmpfs", directory])
    try:
        yield directory
    finally:
        run(["umount", "-l", directory])


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leave no room on the disk."""
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(b"\0" * 4096)
        yield
    finally:
        filler.unlink()


def slow_sync(directory: Path) -> dict[str, str]:
    """An environment in which a disk stalls while stalled() lasts; see slow_sync.c."""
    library = directory / "slow_sync.so"
    source = Path(__file__).with_name("slow_sync.c")
    run(["gcc", "-shared", "-fPIC", "-Wall", "-o", library, source, "-ldl"])
    return {"LD_PRELOAD": str(library), "SLOW_SYNC": str(directory / "stalled")}


@contextmanager
def stalled(environment: Mapping[str, str], seconds: int) -> Iterator[None]:
    """Let each fsync() take that long."""
    stall = Path(environment["SLOW_SYNC"])
    stall.write_text(str(seconds), "utf-8")
    try:
        yield
    finally:
        stall.unlink()
