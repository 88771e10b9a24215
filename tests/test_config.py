"""saslquota.json and the environment.

config/invalid holds files that must be refused, each beside the message it must get; config/valid
holds files that must be taken, each beside the settings it must give.
"""

import json
import re
from pathlib import Path

import pytest
from helpers import EXAMPLES, example_files
from servers.process import ROOT

from saslquota import Config, ConfigError, load_config, split_host

OWNERS_KEYS = [
    "_bind",
    "_bindport",
    "_bindtimeout",
    "_myhost",
    "_myuser",
    "_mypasswd",
    "_mydb",
    "_logfacility",
    "_loglevel",
    "_quotafile",
]
SHIPPED_KEYS = ["$schema", *OWNERS_KEYS[:3], "_store", "_sqlitefile", *OWNERS_KEYS[3:]]


def written(tmp_path: Path, **settings: object) -> Path:
    path = tmp_path / "saslquota.json"
    path.write_text(json.dumps(settings), "utf-8")
    return path


def refusal(path: Path, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ)
    return str(caught.value)


@pytest.mark.parametrize("path", example_files("config/invalid"), ids=lambda path: path.stem)
def test_an_invalid_file_gets_its_message(path: Path) -> None:
    expected = path.with_suffix(".txt").read_text("utf-8").removesuffix("\n")
    assert refusal(path) == f"{path.parent}/{expected}"


@pytest.mark.parametrize("path", example_files("config/valid"), ids=lambda path: path.stem)
def test_a_valid_file_gives_its_settings(path: Path) -> None:
    config = load_config(path, {})
    expected = path.with_suffix(".txt").read_text("utf-8")
    names = re.findall(r"^(\w+) = ", expected, re.MULTILINE)
    assert "".join(f"{name} = {getattr(config, name)!r}\n" for name in names) == expected


def test_the_valid_files_show_every_setting() -> None:
    for name in ("nothing", "every-setting"):
        lines = (EXAMPLES / "config/valid" / f"{name}.txt").read_text("utf-8").splitlines()
        names = {line.partition(" = ")[0] for line in lines}
        assert names == set(Config.__dataclass_fields__) - {"path"}


def test_the_owners_file_has_the_owners_keys() -> None:
    """The ten keys of his README, which knows no _store: his file means MySQL."""
    assert (
        list(json.loads((EXAMPLES / "config/valid/owners-ten-keys.json").read_text()))
        == OWNERS_KEYS
    )


def test_the_shipped_file() -> None:
    shipped = json.loads((ROOT / "saslquota.json").read_text("utf-8"))
    assert list(shipped) == SHIPPED_KEYS
    config = load_config(ROOT / "saslquota.json", {})
    assert (config.bind, config.bindport, config.bindtimeout) == ("127.0.0.1", 10008, 45)
    assert (config.store, config.sqlitefile) == ("sqlite", "saslquota.db")
    assert (config.myhost, config.myuser, config.mydb) == (("localhost",), *["saslquota"] * 2)
    assert (config.logfacility, config.loglevel) == ("mail", "DEBUG")
    assert config.quotafile == "quotarules.json"


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    config = load_config(written(tmp_path), {})
    assert config.beside(config.sqlitefile) == tmp_path / "saslquota.db"
    assert config.beside("data/rules.json") == tmp_path / "data/rules.json"
    assert config.beside("/etc/rules.json") == Path("/etc/rules.json")


def test_the_environment_wins(tmp_path: Path) -> None:
    path = written(tmp_path, _bindport=1, _store="sqlite", _myhost=["a", "b"], _mydb="mail")
    environ = {"_bindport": "10009", "_myhost": "db1,db2:3307", "_mypasswd": "s e=cret"}
    config = load_config(path, {**environ, "_": "/usr/bin/env", "_unknown": "1", "PATH": "/bin"})
    assert (config.bindport, config.store, config.mydb) == (10009, "sqlite", "mail")
    assert (config.myhost, config.mypasswd) == (("db1", "db2:3307"), "s e=cret")


def test_the_environment_mends_a_bad_value(tmp_path: Path) -> None:
    path = written(tmp_path, _bindport="smtp")
    assert load_config(path, {"_bindport": "10009"}).bindport == 10009


@pytest.mark.parametrize("value", ["", "smtp", "0", "-1", "1e3", "1_0", "٣", "10008 10009"])
def test_a_bad_value_in_the_environment(tmp_path: Path, value: str) -> None:
    expected = "environment: _bindport: must be a whole number from 1 to 65535"
    assert refusal(written(tmp_path), _bindport=value) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("db1", ("db1", 3306)),
        ("db1:3307", ("db1", 3307)),
        ("192.0.2.1:3307", ("192.0.2.1", 3307)),
        ("2001:db8::1", ("2001:db8::1", 3306)),
        ("[2001:db8::1]", ("2001:db8::1", 3306)),
        ("[2001:db8::1]:3307", ("2001:db8::1", 3307)),
    ],
)
def test_split_host(name: str, expected: tuple[str, int]) -> None:
    assert split_host(name, 3306) == expected


@pytest.mark.parametrize(("value", "expected"), [("true", True), (" False ", False)])
def test_a_switch_in_the_environment(tmp_path: Path, value: str, expected: bool) -> None:
    path = written(tmp_path, _ignoredomain=not expected)
    assert load_config(path, {"_ignoredomain": value}).ignoredomain is expected


@pytest.mark.parametrize("value", ["yes", "1", ""])
def test_a_bad_switch_in_the_environment(tmp_path: Path, value: str) -> None:
    expected = "environment: _ignoredomain: must be true or false"
    assert refusal(written(tmp_path), _ignoredomain=value) == expected


@pytest.mark.parametrize("value", ["a＠b", "a b", "a．．b"])
def test_a_default_domain_that_folds_to_none(tmp_path: Path, value: str) -> None:
    assert "must be a domain such as example.com" in refusal(
        written(tmp_path, _defaultdomain=value)
    )
