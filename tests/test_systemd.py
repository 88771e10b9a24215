"""The shipped systemd units: valid, closed up, and like the supervisord configuration."""

import configparser
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import require
from servers.process import ROOT

UNITS = sorted((ROOT / "contrib/systemd").glob("*.service"))
PROGRAMS = ["saslquota", "saslquota-watch"]
SUPERVISOR = ROOT / "saslquota_supervisor.conf"
EXPOSURE = 2.0  # of 10, the most that `systemd-analyze security` may find


def settings(program: str) -> dict[str, list[str]]:
    """Each setting of the unit with its values."""
    found: dict[str, list[str]] = {}
    (unit,) = (unit for unit in UNITS if unit.stem == program)
    for name, value in re.findall(r"^(\w+)=(.*)$", unit.read_text("utf-8"), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


@pytest.fixture(params=UNITS, ids=lambda unit: unit.stem)
def unit(new_directory: Callable[[], Path], request: pytest.FixtureRequest) -> Path:
    """A unit with a program that exists and a user that exists."""
    require("systemd-analyze")
    shipped_unit: Path = request.param
    text = shipped_unit.read_text("utf-8")
    for shipped, here in (
        ("ExecStart=/opt/saslquota/venv/bin/python ", "ExecStart=/bin/sh "),
        ("User=saslquota\nGroup=saslquota", "User=daemon\nGroup=daemon"),
    ):
        assert shipped in text
        text = text.replace(shipped, here)
    path = new_directory() / shipped_unit.name
    path.write_text(text, "utf-8")
    return path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_verify(unit: Path) -> None:
    done = analyze("verify", "--man=no", unit)
    ours = [line for line in done.stderr.splitlines() if unit.name in line]
    assert not ours, done.stderr
    assert done.returncode == 0, done.stderr


def test_verify_finds_mistakes(unit: Path) -> None:
    """Also in the names of settings, which systemd itself only warns of."""
    unit.write_text(unit.read_text("utf-8").replace("ProtectSystem=", "ProtectSytem="), "utf-8")
    assert "ProtectSytem" in analyze("verify", "--man=no", unit).stderr


def test_exposure(unit: Path) -> None:
    threshold = str(int(EXPOSURE * 10))
    done = analyze("security", "--offline=true", f"--threshold={threshold}", unit)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_as_under_supervisord(name: str) -> None:
    shipped = configparser.ConfigParser(interpolation=None)
    shipped.read_string(SUPERVISOR.read_text("utf-8"))
    assert [unit.stem for unit in UNITS] == sorted(PROGRAMS, reverse=True)
    program, unit = shipped[f"program:{name}"], settings(name)
    assert unit["ExecStart"] == [program["command"]]
    assert unit["WorkingDirectory"] == [program["directory"]]
    assert unit["User"] == [program["user"]]
    assert unit["TimeoutStopSec"] == [program["stopwaitsecs"]]
    assert unit["KillSignal"] == [f"SIG{program['stopsignal']}"]
    assert unit["Restart"] == ["always"]


def test_it_starts_with_the_right_time_and_before_postfix() -> None:
    """It does not pull the target in (systemd.special(7)): not every machine has such a service."""
    unit = settings("saslquota")
    (after,), (before,) = unit["After"], unit["Before"]
    assert {"network.target", "time-sync.target", "mariadb.service"} <= set(after.split())
    assert before == "postfix.service"
    assert "time-sync" not in str(unit.get("Wants")) + str(unit.get("Requires"))
