"""README.md's netcat lines, with both netcats and the shipped rules."""

import json
import time
from pathlib import Path

import pytest
from helpers import SENTENCE, StartDaemon, require
from servers.ports import LOOPBACK
from servers.process import ROOT, run

REFUSAL = f"action=REJECT {SENTENCE.format(50, 300)}\n\n"
TESTFILE = ROOT / "Testfile"

netcats = pytest.mark.parametrize("netcat", ["nc.openbsd", "nc.traditional"])


@pytest.fixture
def port(daemon: StartDaemon) -> int:
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
    assert time.monotonic() - begin < 5


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
    assert time.monotonic() - begin < 5
