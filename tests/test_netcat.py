"""README.md's netcat lines, with both netcats and the shipped rules."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import require
from servers import LOOPBACK, ROOT, Daemon, run

REFUSAL = (
    "action=REJECT Ops!!! Você já mandou o limite de 50 emails no intervalo de 300 segundos, "
    "tente novamente mais tarde\n\n"
)
TESTFILE = ROOT / "Testfile"

netcats = pytest.mark.parametrize("netcat", ["nc.openbsd", "nc.traditional"])


@pytest.fixture
def port(daemon: Callable[..., Daemon]) -> int:
    """The port of a daemon with the shipped rules."""
    rules = json.loads((ROOT / "quotarules.json").read_text("utf-8"))
    return daemon(rules=rules).port


def cat(path: Path, netcat: str, port: int) -> str:
    """Do `cat FILE | netcat 127.0.0.1 PORT` and return what it prints."""
    require(netcat.split()[0])
    return run(["sh", "-c", f"cat {path} | {netcat} {LOOPBACK} {port}"])


@netcats
def test_testfile_prints_ok_and_returns(netcat: str, port: int) -> None:
    begin = time.monotonic()
    assert cat(TESTFILE, netcat, port) == "action=OK\n\n"
    assert time.monotonic() - begin < 1


@netcats
def test_fifty_first_run_is_refused(netcat: str, port: int) -> None:
    for _ in range(50):
        assert cat(TESTFILE, netcat, port) == "action=OK\n\n"
    assert cat(TESTFILE, netcat, port) == REFUSAL


@pytest.mark.parametrize("netcat", ["nc.openbsd -N", "nc.traditional -q1"])
def test_block_without_the_closing_empty_request(netcat: str, port: int, tmp_path: Path) -> None:
    block = tmp_path / "block"
    block.write_text(TESTFILE.read_text("utf-8").removesuffix("\n"), "utf-8")
    begin = time.monotonic()
    assert cat(block, netcat, port) == "action=OK\n\n"
    assert time.monotonic() - begin < 3
