"""A private MySQL server: Debian sid's, as tests/get-mysql has unpacked it."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from servers.mariadb import MariaDB
from servers.ports import LOOPBACK
from servers.process import ROOT, run

MYSQL = ROOT / ".mysql-tests"
NO_MYSQL = "no MySQL: tests/get-mysql could not get it from Debian sid"


def require_mysql() -> None:
    """Skip the test unless MySQL is there: sid may lack it. It is the one skip that CI allows."""
    if not MYSQL.exists():
        pytest.skip(NO_MYSQL)


class MySQL(MariaDB):
    """A private MySQL server, used like a MariaDB one. Its users log in with caching_sha2_password,
    and it has a certificate that it has made itself."""

    USER = "root"  # user mysql may have no way to MYSQL
    CLIENT = MYSQL / "bin" / "mysql"
    SERVER = MYSQL / "bin" / "mysqld"

    def _install(self) -> None:
        """Copy an empty installation, which takes a hundredth of the time to make one."""
        data, template = self.directory / "data", MYSQL / f"empty-{os.geteuid()}"
        if template.exists():
            shutil.copytree(template, data)
            return
        run([self.SERVER, *self._options(), "--initialize-insecure"])
        (data / "auto.cnf").unlink()  # the server's UUID: each makes its own when it starts
        if os.access(MYSQL, os.W_OK):
            with tempfile.TemporaryDirectory(dir=MYSQL) as new:
                shutil.copytree(data, Path(new, "data"))
                with suppress(OSError):  # another worker has been faster
                    Path(new, "data").rename(template)

    def _options(self) -> list[str]:
        return [
            *super()._options(),
            f"--basedir={MYSQL / 'usr'}",
            f"--plugin-dir={MYSQL / 'usr' / 'lib' / 'mysql' / 'plugin'}",
            "--secure-file-priv=NULL",
        ]

    def command(self) -> Sequence[str | Path]:
        return [
            self.SERVER,
            *self._options(),
            f"--socket={self.socket}",
            f"--pid-file={self.directory / 'mysql.pid'}",
            f"--bind-address={LOOPBACK}",
            f"--port={self.port}",
            "--mysqlx=OFF",
        ]
