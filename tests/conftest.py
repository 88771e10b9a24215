"""Fixtures that hand out real servers, and the rule for skipped tests.

A test that needs a server which is not installed, or which only root can run, is skipped. The
run's last lines say so loudly, and with CI=true in the environment it fails the run. There is one
exception: MySQL comes from Debian sid, which changes every day and may lack it for a while.
"""

import os
import re
import shlex
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType

import pytest
from ctl import Ctl, Site
from execnet import XSpec
from fleet import Fleet, StartFleet
from helpers import (
    EXAMPLES,
    StartDaemon,
    StartPostfix,
    StartSupervisor,
    mysql_config,
    require,
)
from servers import outage
from servers.clock import forget_clocks_of_the_dead
from servers.daemon import Daemon, copy_shipped
from servers.disk import small_disk
from servers.mariadb import Database, MariaDB, SmallMariaDB
from servers.mysql import NO_MYSQL, MySQL, require_mysql
from servers.postfix import Postfix
from servers.process import Process
from servers.supervisor import Supervisor
from xdist.scheduler import LoadScopeScheduling

import saslquota
import saslquotactl
from saslquota import MySQLStore, SQLiteStore, Store


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs a server: its directories tell, or the server's name among its parameters.
    Workers begin with what takes longest."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        is_named = any(server in parameters for server in ("mariadb", "mysql", "shared"))
        if is_named or "new_directory" in getattr(item, "fixturenames", ()):
            item.add_marker("server")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


# --- Workers, and the end of them -----------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: Sequence[XSpec]) -> None:
    """Let workers begin as this process has, see __main__.py."""
    for spec in specs:
        spec.python = shlex.join([sys.executable, str(EXAMPLES)])


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Tests go to the workers one by one, those that share what takes long to make to the same one.
    (Its own way to say so, xdist_group, has no effect with pytest 9.2.)"""

    SHARED = re.compile(r"/test_galera\.py::|/test_readme\.py::test_production")

    def _split_scope(self, nodeid: str) -> str:
        shared = self.SHARED.search(nodeid)
        return shared[0] if shared else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduling:
    return Scheduling(config, log)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end the test, all servers and the run.

    When the run ends, its workers get SIGINT after 5 s (execnet), and SIGKILL after 10 s (xdist).
    """

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        Process.interrupted = True
        session.shouldstop = signal.Signals(signum).name  # also when the exception gets lost
        raise KeyboardInterrupt

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)


# --- Skipped tests --------------------------------------------------------------------------------


def _skips(config: pytest.Config) -> Counter[str]:
    """Return the reasons of all skips, of tests and of whole files, with their numbers."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    return Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)


ALLOWED_SKIPS = {NO_MYSQL}  # also in CI


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a CI run in which anything was skipped that may not be."""
    is_ci = os.environ.get("CI") == "true"
    forbidden = _skips(session.config).keys() - ALLOWED_SKIPS
    if is_ci and session.exitstatus == pytest.ExitCode.OK and forbidden:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say what was not tested, after everything else."""
    skips = _skips(config)
    if not skips:
        return
    print(f"\n{'!' * 78}\n!! NOT TESTED: {skips.total()} tests were SKIPPED")
    for reason, number in skips.items():
        print(f"!!   {number} x {reason}")
    if os.environ.get("CI") == "true" and skips.keys() - ALLOWED_SKIPS:
        print("!! With CI=true that is a failure.")
    print("!" * 78)


# --- Fixtures -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def new_directory() -> Iterator[Callable[[], Path]]:
    """Make directories that other users can enter, as servers that drop root need; removed at last.

    (pytest's own tmp_path is closed to them.)
    """
    with tempfile.TemporaryDirectory(prefix="saslquota-tests-") as top:
        Path(top).chmod(0o755)
        count = iter(range(1, 100_000))

        def make() -> Path:
            path = Path(top, str(next(count)))
            path.mkdir()
            return path

        yield make
    forget_clocks_of_the_dead()


@pytest.fixture(scope="session")
def _session_mariadb(new_directory: Callable[[], Path]) -> Iterator[MariaDB]:
    require("mariadbd", "mariadb-install-db", "mariadb")
    with MariaDB(new_directory()) as server:
        yield server


@pytest.fixture(scope="session")
def _session_mysql(new_directory: Callable[[], Path]) -> Iterator[MySQL]:
    require_mysql()
    with MySQL(new_directory()) as server:
        yield server


@contextmanager
def _well(server: MariaDB, test: pytest.Item) -> Iterator[MariaDB]:
    """Let it run, also when the test before has stopped, frozen or killed it."""
    assert test.get_closest_marker("server"), "a test that needs a server has the mark `server`"
    if not server.running:
        server.start()
    yield server
    if server.running:
        server.thaw()


@pytest.fixture
def mariadb(_session_mariadb: MariaDB, request: pytest.FixtureRequest) -> Iterator[MariaDB]:
    with _well(_session_mariadb, request.node) as server:
        yield server


@pytest.fixture
def mysql(_session_mysql: MySQL, request: pytest.FixtureRequest) -> Iterator[MariaDB]:
    with _well(_session_mysql, request.node) as server:
        yield server


@pytest.fixture
def server(mariadb: MariaDB) -> MariaDB:
    """The server of `database`. A file whose tests run on MySQL, too, says: each_server."""
    return mariadb


@pytest.fixture(params=["mariadb", "mysql"])
def each_server(request: pytest.FixtureRequest) -> MariaDB:
    found: MariaDB = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def database(server: MariaDB) -> Database:
    """A fresh database with our table in it."""
    return server.create_database()


@pytest.fixture
def daemon(new_directory: Callable[[], Path]) -> Iterator[StartDaemon]:
    """Start daemons: daemon(config, rules, env), see servers.daemon."""
    with ExitStack() as stack:

        def start(*arguments: object, **options: object) -> Daemon:
            started = Daemon(new_directory(), *arguments, **options)  # type: ignore[arg-type]
            return stack.enter_context(started)

        yield start


@pytest.fixture
def spooling(daemon: StartDaemon) -> StartDaemon:
    """Start daemons with a spool that have reached their database: until then they count in it."""

    def start(config: Mapping[str, object], *arguments: object) -> Daemon:
        started = daemon({**outage.CONFIG, **config}, *arguments)
        outage.settle(started)
        return started

    return start


@pytest.fixture
def disk(new_directory: Callable[[], Path]) -> Iterator[Path]:
    """A file system of 200 MB, with room for a SmallMariaDB."""
    require("mount", root=True)
    with small_disk(new_directory(), 200) as path:
        yield path


@pytest.fixture
def small_server(disk: Path) -> Iterator[MariaDB]:
    """The SmallMariaDB on that disk."""
    require("mariadbd", "mariadb-install-db", "mariadb")
    with SmallMariaDB(disk) as running:
        yield running


@pytest.fixture
def postfix(new_directory: Callable[[], Path]) -> Iterator[StartPostfix]:
    """Start Postfix instances: postfix(saslquota, main, options, users), see servers.postfix."""
    require("postfix", "postconf", "saslpasswd2", "openssl", root=True)
    with ExitStack() as stack:

        def start(*arguments: object, **options: object) -> Postfix:
            started = Postfix(new_directory(), *arguments, **options)  # type: ignore[arg-type]
            return stack.enter_context(started)

        yield start


@pytest.fixture
def no_warning(postfix: StartPostfix) -> Iterator[StartPostfix]:
    """Start Postfix instances whose logs may not show any trouble at the end."""
    started: list[Postfix] = []

    def start(*arguments: object, **options: object) -> Postfix:
        started.append(postfix(*arguments, **options))
        return started[-1]

    yield start
    for instance in started:
        assert not instance.warnings(), instance.log()


@pytest.fixture
def supervisor(new_directory: Callable[[], Path]) -> Iterator[StartSupervisor]:
    """Start supervisord with the shipped program: supervisor(env), see servers.supervisor."""
    require("supervisord", "supervisorctl")
    with ExitStack() as stack:

        def start(*arguments: object, **options: object) -> Supervisor:
            started = Supervisor(new_directory(), *arguments, **options)  # type: ignore[arg-type]
            return stack.enter_context(started)

        yield start


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[StartFleet]:
    """Ledgers on one file: fleet(daemons), see fleet.Fleet."""
    made: list[Fleet] = []

    def make(daemons: int = 1) -> Fleet:
        made.append(Fleet(tmp_path, daemons))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(params=["sqlite", "mariadb"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """A ledger that saslquotactl.py looks at, on each kind of store."""
    if request.param == "sqlite":
        store: Store = SQLiteStore(tmp_path / "saslquota.db", 5)
        settings: dict[str, object] = {"_store": "sqlite"}
    else:
        database: Database = request.getfixturevalue("database")
        store, settings = MySQLStore(mysql_config(database)), database.config()
    with closing(store):
        yield Site(tmp_path, store, settings)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Site]:
    """As site, where the store makes no difference."""
    with closing(SQLiteStore(tmp_path / "saslquota.db", 5)) as store:
        yield Site(tmp_path, store, {"_store": "sqlite"})


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Run saslquotactl.py on a site: ctl(site, "top"); its exit status, and what it prints."""

    def run(site: Site, *arguments: str) -> tuple[int, str]:
        status = saslquotactl.main(["-c", str(site.config), *arguments])
        done = capsys.readouterr()
        return status, done.out + done.err

    return run


@pytest.fixture(scope="module")
def exact_retries() -> Iterator[None]:
    """Let every refusal's time be searched for, however many there are in a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saslquota, "RETRY_SEARCH_INTERVAL", 0.0)
        yield


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """The files of a fresh clone."""
    return copy_shipped(tmp_path / "clone")
