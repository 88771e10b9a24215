"""./install below a private directory, with real supervisord where the service has to run.

tests/test_install_on_debian.py runs it as it is shipped, on an empty Debian.
"""

import getpass
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import require
from servers.daemon import PolicyClient
from servers.ports import free_port, is_listening
from servers.process import ROOT, clean_environment
from servers.supervisor import EmptySupervisor

CONF, UNIT = "saslquota_supervisor.conf", "saslquota.service"
SHIPPED = ["install", "saslquota.json", "quotarules.json", "mysql.sql", "Testfile", CONF]
PLACES = [
    ("/etc/supervisor/conf.d", "conf.d"),
    ("/var/log/supervisor", "log"),
    ("/etc/systemd/system", "units"),
    ("/opt/saslquota", "opt"),
    ("/var/lib/saslquota", "lib"),
    ("/var/backups/saslquota", "backup"),
    ("/usr/local/sbin", "sbin"),
]
ASKED = "postconf -P 'submission/inet/smtpd_client_restrictions=$saslquota'"


class Site:
    """A copy of the shipped files with private paths, and commands that stand in for the system's:
    users and groups are ours, systemd and supervisord only note what they are told."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.source, self.opt = directory, directory / "source", directory / "opt"
        self.port = free_port()
        self.bin, self.calls, self.pid = (directory / name for name in ("bin", "calls", "pid"))
        for name in ("source/contrib/systemd", "bin", "conf.d", "log", "units"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        units = [f"contrib/systemd/{path.name}" for path in (ROOT / "contrib/systemd").iterdir()]
        for name in SHIPPED + units + [path.name for path in ROOT.glob("saslquota*.py")]:
            shutil.copy(ROOT / name, self.source / name)
            if not name.endswith(".py"):
                self.change(self.source / name, self.private)
        self.pid.write_text("77\n")
        note = f'echo "${{0##*/}} $*" >>{self.calls}\n'
        main_pid = f'case $* in *MainPID*|"pid saslquota") cat {self.pid} ;; esac\n'
        for name in ("useradd", "userdel", "systemctl", "supervisorctl", "journalctl"):
            self.stand_in(name, note + main_pid)
        self.stand_in("id", 'if [ "$*" = -u ]; then echo 0; else exec /usr/bin/id "$@"; fi\n')
        self.stand_in("runuser", 'shift 3; exec "$@"\n')
        self.stand_in("sleep", "exec /bin/sleep 0.5\n")
        self.stand_in("postconf", "exit 1\n")
        self.stand_in(self.opt / "venv/bin/python", f'exec {sys.executable} "$@"\n')

    def private(self, text: str) -> str:
        for shipped, name in PLACES:
            text = text.replace(shipped, str(self.directory / name))
        text = re.sub("^user=saslquota\n", "", text, flags=re.M).replace(
            "startsecs=2", "startsecs=1"
        )
        text = text.replace("user=saslquota ", f"user={getpass.getuser()} ")
        return text.replace("10008", str(self.port))

    def change(self, path: Path, change: Callable[[str], str]) -> None:
        before = path.read_text("utf-8")
        path.write_text(change(before), "utf-8")

    def stand_in(self, name: str | Path, script: str) -> None:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)

    def release(self, version: str, old: str = "", new: str = "") -> None:
        """Let the shipped script have this version, and another change."""

        def change(text: str) -> str:
            text = re.sub('^__version__ = .*"$', f'__version__ = "{version}"', text, flags=re.M)
            assert old in text
            return text.replace(old, new) if old else text

        self.change(self.source / "saslquota.py", change)

    def version(self, suffix: str = "") -> str:
        """The one that is installed."""
        text = (self.opt / f"saslquota.py{suffix}").read_text("utf-8")
        return re.findall('^__version__ = "(.*)"$', text, re.M)[0]  # type: ignore[no-any-return]

    def install(self, *arguments: str, **environ: str) -> tuple[int, str]:
        """Exit status and output."""
        path = f"{self.bin}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", self.source / "install", *arguments],
            env=clean_environment({"PATH": path, **environ}),
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout + done.stderr

    def told(self, program: str) -> list[str]:
        """What it was told, besides to show something."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        found = [line.removeprefix(f"{program} ") for line in lines if line.startswith(program)]
        return [line for line in found if not re.match("pid|show", line)]


@pytest.fixture
def site(new_directory: Callable[[], Path]) -> Site:
    return Site(new_directory())


@contextmanager
def supervised(site: Site) -> Iterator[EmptySupervisor]:
    """Let a real supervisord run, and supervisorctl reach it."""
    require("supervisord", "supervisorctl")
    for name in ("conf.d", "log"):
        (site.directory / name).rmdir()
    supervisor = EmptySupervisor(site.directory, site.port)
    real = shutil.which("supervisorctl")
    site.stand_in("supervisorctl", f'exec {real} --configuration {supervisor.config} "$@"\n')
    with supervisor:
        yield supervisor


def answer(site: Site) -> str:
    with PolicyClient(site.port) as policy:
        return policy.ask()


DOES_NOT_START = ("return run_daemon(config)", "raise SystemExit('boom')")  # --check finds nothing


# --- With supervisord -----------------------------------------------------------------------------


@pytest.mark.slow
def test_set_up_and_uninstall(site: Site) -> None:
    with supervised(site):
        status, said = site.install()
        assert status == 0, said
        assert answer(site) == "OK"
        assert ASKED in said
        assert "postfix reload" in said
        command = site.directory / "sbin" / "saslquotactl.py"
        assert subprocess.check_output([command, "--version"], text=True).startswith("saslquota ")
        found = json.loads((site.opt / "saslquota.json").read_text("utf-8"))
        assert found["_loglevel"] == "INFO"
        assert found["_sqlitefile"] == f"{site.directory}/lib/saslquota.db"
        modes = {"opt": 0o755, "lib": 0o750, "opt/saslquota.json": 0o640, "opt/saslquota.py": 0o644}
        for name, mode in modes.items():
            assert (site.directory / name).stat().st_mode & 0o777 == mode, name

        status, said = site.install("--uninstall")
        assert status == 0, said
        assert not is_listening(site.port)
        for name in ("opt", "lib", f"conf.d/{CONF}", "sbin/saslquotactl.py"):
            assert not (site.directory / name).exists(), name
        assert {path.name for path in (site.directory / "backup").iterdir()} == {
            "saslquota.json",
            "quotarules.json",
        }
        assert len(site.told("userdel")) == 1


@pytest.mark.slow
def test_an_upgrade_and_one_that_does_not_start(site: Site) -> None:
    with supervised(site):
        site.release("3.0.0")
        status, said = site.install()
        assert status == 0, said
        site.release("3.1.0")
        status, said = site.install()
        assert (status, site.version(), site.version(".old")) == (0, "3.1.0", "3.0.0"), said
        assert answer(site) == "OK"

        site.release("3.2.0", *DOES_NOT_START)
        site.change(site.source / CONF, lambda text: text + "; new\n")
        status, said = site.install()
        assert (status, site.version()) == (1, "3.1.0"), said
        assert "boom" in said
        assert "the old one is back, and runs" in said
        assert answer(site) == "OK"
        assert "; new" not in (site.directory / "conf.d" / CONF).read_text()


# --- What is there already ------------------------------------------------------------------------


def contents(directory: Path) -> dict[Path, tuple[bytes, int]]:
    """Each file with what it holds, and when it was written."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_again_changes_nothing(site: Site) -> None:
    assert site.install()[0] == 0
    places = [site.opt, site.directory / "conf.d", site.directory / "sbin"]
    before = [contents(place) for place in places], site.told("supervisorctl")
    status, said = site.install()
    assert status == 0, said
    assert "up to date, and runs" in said
    assert ([contents(place) for place in places], site.told("supervisorctl")) == before


def test_settings_and_rules_stay(site: Site) -> None:
    """Also those that look as the shipped ones do before step 2."""
    settings = (ROOT / "saslquota.json").read_text("utf-8").replace("10008", str(site.port))
    rules = '{"default": {"period": "1h", "msgquota": 7}}'
    (site.opt / "saslquota.json").write_text(settings, "utf-8")
    (site.opt / "quotarules.json").write_text(rules)
    status, said = site.install()
    assert status == 0, said
    assert (site.opt / "saslquota.json").read_text("utf-8") == settings
    assert (site.opt / "quotarules.json").read_text() == rules


def test_an_edited_service_file_stays(site: Site) -> None:
    conf = site.directory / "conf.d" / CONF
    assert site.install()[0] == 0
    site.change(site.source / CONF, lambda text: text + "; of 3.0.0\n")
    assert site.install()[0] == 0
    assert conf.read_text().endswith("; of 3.0.0\n")
    site.change(conf, lambda text: text + "; mine\n")
    site.change(site.source / CONF, lambda text: text + "; of 3.1.0\n")
    status, said = site.install()
    assert status == 0
    assert f"{conf}: left as it is" in said
    assert conf.read_text().endswith("; of 3.0.0\n; mine\n")


# --- Upgrades that fail ---------------------------------------------------------------------------


def test_a_mistake_leaves_the_old_version(site: Site) -> None:
    site.release("3.0.0")
    assert site.install()[0] == 0
    before = contents(site.opt), site.told("supervisorctl")
    site.release("3.1.0")
    (site.opt / "quotarules.json").write_text("{")
    status, said = site.install()
    assert status == 1
    assert re.search("quotarules.json, line 1", said)
    assert "--check finds a mistake" in said
    (site.opt / "quotarules.json").write_bytes(before[0][site.opt / "quotarules.json"][0])
    after = contents(site.opt)
    assert {path: held for path, (held, _) in after.items()} == {
        path: held for path, (held, _) in before[0].items()
    }
    assert site.told("supervisorctl") == before[1]


def test_an_interrupted_upgrade_is_taken_up_again(site: Site) -> None:
    """The scripts are in place, but those that run are the old ones."""
    site.release("3.0.0")
    assert site.install()[0] == 0
    site.release("3.1.0")
    site.stand_in("supervisorctl", f'[ "$1" != update ] || kill -9 $PPID\ncat {site.pid}\n')
    assert site.install()[0] != 0
    assert site.version() == "3.1.0"
    site.stand_in("supervisorctl", f'echo "supervisorctl $*" >>{site.calls}\ncat {site.pid}\n')
    told = len(site.told("supervisorctl"))
    status, said = site.install()
    assert status == 0, said
    update, restart = site.told("supervisorctl")[told:]
    assert (update, restart.split()[:2]) == ("update", ["restart", "saslquota"])
    assert site.version(".old") == "3.0.0"


def test_a_service_that_does_not_start_without_a_new_version(site: Site) -> None:
    """Then an older one, which is still there, is of no use."""
    site.release("3.1.0")
    assert site.install()[0] == 0
    shutil.copy(site.opt / "saslquota.py", site.opt / "saslquota.py.old")
    site.change(site.opt / "saslquota.py.old", lambda text: text.replace("3.1.0", "3.0.0"))
    site.pid.write_text("0\n")
    status, said = site.install()
    assert (status, site.version()) == (1, "3.1.0")
    assert "it does not start, see above; correct it" in said


# --- systemd --------------------------------------------------------------------------------------


def test_systemd(site: Site) -> None:
    status, said = site.install("--systemd")
    assert status == 0, said
    assert (site.directory / "units" / UNIT).read_text() == (site.opt / UNIT).read_text()
    told = site.told("systemctl")
    assert told[0] == "daemon-reload"
    assert re.match("enable -q .*saslquota.service", told[1])
    assert re.match("restart .*saslquota.service", told[2])
    assert not site.told("supervisorctl")
    assert site.install()[1].count("up to date, and runs") == 1  # it is known next time
    assert not site.told("supervisorctl")

    status, said = site.install("--uninstall")
    assert status == 0, said
    assert re.match("disable -q --now .*saslquota.service", site.told("systemctl")[-2])
    assert not list((site.directory / "units").iterdir())


def test_a_new_version_that_systemd_starts_in_vain(site: Site) -> None:
    site.release("3.0.0")
    assert site.install("--systemd")[0] == 0
    site.release("3.1.0")
    new_each_time = (
        f'grep -q "3.1.0" {site.opt}/saslquota.py && date +%N | sed "s/^0*//" || echo 77'
    )
    site.stand_in("systemctl", f"case $* in *MainPID*) {new_each_time} ;; esac\n")
    status, said = site.install()
    assert (status, site.version()) == (1, "3.0.0"), said
    assert "the old one is back, and runs" in said


def test_two_masters(site: Site) -> None:
    assert site.install()[0] == 0
    status, said = site.install("--systemd")
    assert status == 1
    assert "supervisorctl update" in said
    assert not site.told("systemctl")


# --- What is missing ------------------------------------------------------------------------------

REAL_PYTHON = shutil.which("python3")


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("[ $1 != -c ] || exit 1", "first: apt-get install python3 python3-venv"),
        (
            'case $2 in *version_info*) exit 2 ;; esac; [ $1 = -c ] || echo "Python 3.9.2"',
            "3.9.2 is too old",
        ),
    ],
    ids=["no-venv", "too-old"],
)
def test_python_is_missing(site: Site, python: str, message: str) -> None:
    site.stand_in("python3", python + "\n")
    assert_refused(site, message)


def assert_refused(site: Site, message: str, *arguments: str) -> None:
    """One line, and nothing is done."""
    before = contents(site.directory)
    status, said = site.install(*arguments)
    assert status == 1
    assert len(said.splitlines()) == 1
    assert message in said
    assert contents(site.directory).keys() - before.keys() <= {site.calls}


def test_supervisor_is_not_installed(site: Site) -> None:
    (site.directory / "conf.d").rmdir()
    assert_refused(site, "first: apt-get install supervisor")


def test_supervisord_does_not_run(site: Site) -> None:
    site.stand_in("supervisorctl", "echo no such file; exit 4\n")
    assert_refused(site, "first: service supervisor start")


def test_systemd_does_not_run(site: Site) -> None:
    site.stand_in("systemctl", "exit 1\n")
    assert_refused(site, "leave out --systemd", "--systemd")


def test_not_root(site: Site) -> None:
    site.stand_in("id", "echo 1000\n")
    assert_refused(site, "root")


def test_a_wrong_option_does_nothing(site: Site) -> None:
    status, said = site.install("--systemD")
    assert status == 2
    assert "./install [--mysql] [--systemd]" in said
    assert not site.calls.exists()


def test_the_user_is_made(site: Site) -> None:
    made = site.directory / "made"
    site.stand_in("id", f'if [ "$*" = -u ]; then echo 0; else [ -e {made} ]; fi\n')
    site.stand_in("useradd", f'echo "useradd $*" >>{site.calls}; touch {made}\n')
    status, said = site.install()
    assert status == 0, said
    home = site.directory / "lib"
    (told,) = site.told("useradd")
    assert told == (
        f"--system --user-group --home-dir {home} --shell /usr/sbin/nologin {getpass.getuser()}"
    )


# --- Postfix --------------------------------------------------------------------------------------


@pytest.fixture
def postfix(site: Site) -> Callable[..., str]:
    """Debian's own configuration of Postfix, for install and for postconf(...)."""
    require("postconf")
    config = site.directory / "postfix"
    config.mkdir()
    master = Path("/usr/share/postfix/master.cf.dist").read_text()
    entries = r"^#(submissions?|smtps) +inet.*\n(?:#  -o.*\n)*"
    master = re.sub(entries, lambda m: re.sub("^#", "", m[0], flags=re.M), master, flags=re.M)
    (config / "master.cf").write_text(master)
    (config / "main.cf").touch()
    real = shutil.which("postconf")
    site.stand_in("postconf", f'exec {real} -c {config} "$@"\n')

    def postconf(*arguments: str) -> str:
        return subprocess.check_output([site.bin / "postconf", *arguments], text=True)

    return postconf


def test_what_postfix_lacks(site: Site, postfix: Callable[..., str]) -> None:
    def remaining() -> list[str]:
        status, said = site.install()
        assert status == 0, said
        _, _, after = said.partition("What remains:\n")  # doctor's lines come behind
        lines = itertools.takewhile(lambda line: line.startswith("    "), after.splitlines())
        return [line.strip() for line in lines]

    main = f"postconf -e 'saslquota = check_policy_service inet:127.0.0.1:{site.port}'"
    assert remaining() == [
        main,
        ASKED,
        ASKED.replace("submission/", "submissions/"),
        "postfix reload",
    ]
    subprocess.check_call(["sh", "-ec", main], env={"PATH": f"{site.bin}:{os.environ['PATH']}"})
    postfix("-P", "submission/inet/smtpd_client_restrictions=$saslquota")
    postfix("-P", "submissions/inet/smtpd_client_restrictions=permit_mynetworks,reject")
    value = 'submissions has a value already: docs/install.md, "Other mail systems"'
    assert remaining() == [value, "postfix reload"]
    postfix("-P", "submissions/inet/smtpd_client_restrictions=$saslquota,permit_mynetworks,reject")
    assert remaining() == []


def test_it_stays_while_postfix_asks(site: Site, postfix: Callable[..., str]) -> None:
    assert site.install()[0] == 0
    before = contents(site.opt)
    postfix("-P", "submission/inet/smtpd_data_restrictions=$saslquota")
    status, said = site.install("--uninstall")
    assert status == 1
    assert "submission/inet/smtpd_data_restrictions = $saslquota" in said
    assert contents(site.opt) == before


# --- pip ------------------------------------------------------------------------------------------


def make_wheel(directory: Path) -> None:
    """A package of the connector's name, of a version that no index has."""
    directory.mkdir()
    info = "mysql_connector_python-99.0.dist-info"
    with zipfile.ZipFile(directory / "mysql_connector_python-99.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mysql/connector/__init__.py", "")
        meta = "Metadata-Version: 2.1\nName: mysql-connector-python\nVersion: 99.0\n"
        wheel.writestr(f"{info}/METADATA", meta)
        tags = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_a_real_environment_and_a_sites_own_wheels(site: Site) -> None:
    """The password is not known yet: what is next in docs/install.md can be done, nothing runs."""
    shutil.rmtree(site.opt)
    wheels = site.directory / "wheels"
    make_wheel(wheels)
    status, said = site.install("--mysql", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    python = site.opt / "venv/bin/python"
    found = subprocess.check_output([python, "-m", "pip", "list"], text=True)
    assert re.search(r"mysql-connector-python +99.0\n", found)
    assert status == 1
    assert "--check finds a mistake" in said
    assert json.loads((site.opt / "saslquota.json").read_text("utf-8"))["_store"] == "mysql"
    assert (site.opt / "saslquota.py").exists()
    assert not list((site.directory / "conf.d").iterdir())


def test_no_connector_to_be_had(site: Site) -> None:
    assert site.install()[0] == 0
    site.stand_in(site.opt / "venv/bin/python", "case $* in *install*) exit 1 ;; esac\n")
    before = contents(site.opt)
    status, said = site.install("--mysql")
    assert status == 1
    assert "pip cannot install mysql-connector-python" in said
    assert contents(site.opt) == before
