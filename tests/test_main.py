"""The command line, and what cannot be started."""

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import example_files, saslquota_py, write_config
from servers.ports import free_port
from servers.process import ROOT, clean_environment

import saslquota

# --- --version, --help ----------------------------------------------------------------------------


def test_version() -> None:
    assert saslquota_py("--version") == (0, [f"saslquota {saslquota.__version__}"])
    assert f'version = "{saslquota.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_help_names_every_option() -> None:
    status, lines = saslquota_py("--help")
    assert status == 0
    for option in ("-c FILE", "--check", "--version"):
        assert option in "\n".join(lines)
        assert saslquota.__doc__
        assert option in saslquota.__doc__


@pytest.mark.parametrize("arguments", [["--verbose"], ["file"], ["-c"]])
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        saslquota.main(arguments)
    assert caught.value.code == 2
    assert "usage: saslquota.py" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["3, 8, 10", "3, 9, 2", "3, 10, 12"])
def test_an_older_python_gets_one_line(version: str) -> None:
    """The check stands where that Python comes to: the grammar of all is 3.8's."""
    source = (ROOT / "saslquota.py").read_text("utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    check = next(node for node in tree.body if "version_info" in ast.unparse(node))
    before = tree.body[1 : tree.body.index(check)]  # without the docstring
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in before)
    code = (
        f"import runpy, sys; sys.version_info = ({version}, 'final', 0);"
        f" runpy.run_path({str(ROOT / 'saslquota.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stderr == "saslquota: needs Python 3.11 or newer\n"
    assert (done.returncode, done.stdout) == (1, "")


def test_where_the_configuration_is_looked_for(
    shipped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside the script, else in /etc, as after `pip install`."""
    assert Path("/etc/saslquota/saslquota.json") == saslquota.SYSTEM_CONFIG
    monkeypatch.setattr(saslquota, "SYSTEM_CONFIG", shipped / "saslquota.json")
    monkeypatch.setattr(saslquota, "__file__", str(tmp_path / "saslquota.py"))
    assert saslquota.main(["--check"]) == 0
    assert f"{shipped}/saslquota.json: read" in capsys.readouterr().out
    (tmp_path / "saslquota.json").write_text('{"_nothing": 1}', "utf-8")
    assert saslquota.main(["--check"]) == 1
    assert f"{tmp_path}/saslquota.json" in capsys.readouterr().out


@pytest.mark.parametrize("lines", [1, 20_000])
def test_check_into_head(shipped: Path, lines: int) -> None:
    """Whether the pipe breaks while it prints, or at its end."""
    rule = {"period": 60, "msgquota": 1}
    rules = {"default": rule} | {f"{n}.example.com": rule for n in range(lines)}
    (shipped / "quotarules.json").write_text(json.dumps(rules), "utf-8")
    script = f"'{sys.executable}' '{shipped}/saslquota.py' --check | true"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")


# --- What cannot be started -----------------------------------------------------------------------


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Undo what a start does to the signals of our own process."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.parametrize("path", example_files("config/invalid"), ids=lambda path: path.stem)
def test_a_bad_configuration_is_one_line(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    expected = path.with_suffix(".txt").read_text("utf-8")
    assert saslquota.main(["-c", str(path), "--check"]) == 1
    assert capsys.readouterr() == (f"saslquota: {path.parent}/{expected}", "")


def test_a_missing_configuration(tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    line = f"saslquota: {path}: cannot be read: No such file or directory"
    assert saslquota_py("-c", path) == (1, [line])
    assert saslquota_py("-c", path, "--check") == (1, [line])


def test_a_bad_environment(shipped: Path) -> None:
    line = "saslquota: environment: _bindport: must be a whole number from 1 to 65535"
    assert saslquota_py("-c", shipped / "saslquota.json", _bindport="x") == (1, [line])


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("path", example_files("rules/invalid"), ids=lambda path: path.stem)
def test_bad_rules_at_the_start_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, path: Path
) -> None:
    """Nothing listens, and no database is made."""
    expected = path.with_suffix(".txt").read_text("utf-8")
    config = tmp_path / "saslquota.json"
    settings = {"_store": "sqlite", "_bindport": free_port(), "_quotafile": str(path)}
    config.write_text(json.dumps(settings), "utf-8")
    assert saslquota.main(["-c", str(config)]) == 1
    assert capsys.readouterr() == (f"saslquota: {path.parent}/{expected}", "")
    assert os.listdir(tmp_path) == ["saslquota.json"]


def test_settings_of_the_environment_need_no_file(shipped: Path) -> None:
    """Unless it was named: that is a mistake."""
    (shipped / "saslquota.json").unlink()
    done = subprocess.run(
        [sys.executable, shipped / "saslquota.py", "--check"],
        env=clean_environment({"_store": "sqlite", "_bindport": free_port()}),
        capture_output=True,
        text=True,
        timeout=30,
    )
    lines = done.stdout.splitlines()
    there = "not there, the environment has the settings"
    assert (done.returncode, lines[0]) == (0, f"{shipped}/saslquota.json: {there}")
    assert saslquota_py("-c", shipped / "saslquota.json", "--check", _store="sqlite") == (
        1,
        [f"saslquota: {shipped}/saslquota.json: cannot be read: No such file or directory"],
    )


def test_missing_rules_at_the_start(shipped: Path) -> None:
    path = shipped / "quotarules.json"
    path.unlink()
    line = f"saslquota: {path}: cannot be read: No such file or directory"
    assert saslquota_py("-c", shipped / "saslquota.json", _bindport=free_port()) == (1, [line])


@pytest.mark.parametrize(
    ("config", "rules"),
    [
        pytest.param({"\ud800": 1}, {}, id="setting"),
        pytest.param({}, {"\ud800": 1}, id="rule"),
        pytest.param({}, {"default": {"\ud800": 1}}, id="field"),
    ],
)
def test_a_name_that_is_no_utf_8_is_one_line(
    shipped: Path, config: dict[str, object], rules: dict[str, object]
) -> None:
    """JSON can hold what no terminal can show."""
    write_config(shipped, _bindport=free_port(), **config)
    (shipped / "quotarules.json").write_text(json.dumps(rules), "utf-8")
    status, lines = saslquota_py("-c", shipped / "saslquota.json")
    assert (status, len(lines)) == (1, 1)
