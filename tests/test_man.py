"""contrib/mkman.py: the man pages that a release step makes of the docstrings."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import require
from servers.process import ROOT, run

SCRIPTS = [
    path for path in sorted(ROOT.glob("saslquota*.py")) if '\n"""NAME\n' in path.read_text("utf-8")
]
IDS = [path.stem for path in SCRIPTS]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man") / "man8"
    run([sys.executable, ROOT / "contrib/mkman.py", directory])
    return directory


def test_each_script_has_a_page(pages: Path) -> None:
    assert {"saslquota", "saslquotactl"} <= set(IDS)
    assert [path.name for path in sorted(pages.iterdir())] == [f"{name}.8" for name in IDS]


@pytest.mark.parametrize("linter", ["mandoc -Tlint -Wwarning", "groff -man -ww -z -Tutf8"])
@pytest.mark.parametrize("name", IDS)
def test_no_warning(pages: Path, name: str, linter: str) -> None:
    command = linter.split()
    require(command[0])
    done = subprocess.run([*command, pages / f"{name}.8"], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("script", SCRIPTS, ids=IDS)
def test_it_says_what_the_docstring_does(pages: Path, script: Path) -> None:
    """Each word, in this order, but for what is for developers."""
    require("mandoc")
    shown = run(["mandoc", "-Tutf8", "-O", "width=500", pages / f"{script.stem}.8"])
    shown = re.sub(".\b", "", shown)  # bold, by overstriking
    text = ast.get_docstring(ast.parse(script.read_text("utf-8"))) or ""
    text = re.sub(r"^HOW IT WORKS\n(?:    .*\n?|\n)*", "", text, flags=re.M)
    _title, *lines, _footer = shown.strip().splitlines()
    body, _, _ = "\n".join(lines).partition("SEE ALSO")
    assert body.split() == text.split()
