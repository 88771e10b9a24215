#!/usr/bin/env python3
"""Make man pages of the docstrings: contrib/mkman.py DIRECTORY writes saslquota.8 and the others.

It is a step of a release: `contrib/mkman.py build/man`. HOW IT WORKS, for developers, is left out.
"""

import ast
import datetime
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"^([A-Z][A-Z ]+)\n", re.MULTILINE)
ITEM = re.compile(r"(\S.*?)  +(\S.*)")  # a term and, from a column on, what it means


def escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\\&" + text if text.startswith(".") else text


def paragraph(lines: list[str]) -> Iterator[str]:
    """Running text, a list of terms, or, if all of it is indented, an example."""
    if all(line.startswith(" ") for line in lines):
        yield from (".PP", ".RS 4", ".nf", *map(escaped, lines), ".fi", ".RE")
    elif any(ITEM.fullmatch(line) for line in lines if not line.startswith(" ")):
        for line in lines:
            found = None if line.startswith(" ") else ITEM.fullmatch(line)
            if found:
                yield from (".TP", f".B {escaped(found[1])}", escaped(found[2]))
            else:
                yield escaped(line.strip())
    else:
        yield from (".PP", *map(escaped, lines))


def page(script: Path, names: list[str], version: str, date: str) -> str:
    """The man page of a script whose docstring begins with NAME."""
    text = ast.get_docstring(ast.parse(script.read_text("utf-8"))) or ""
    _, *parts = SECTION.split(text)
    lines = [f'.TH {script.stem.upper()} 8 {date} "saslquota {version}" "System Administration"']
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        if title == "HOW IT WORKS":
            continue
        paragraphs = re.split(r"\n{2,}", textwrap.dedent(body).strip("\n"))
        found = [list(paragraph(part.splitlines())) for part in paragraphs]
        if title == "SYNOPSIS":
            found = [[".nf", *map(escaped, "\n".join(paragraphs).splitlines()), ".fi"]]
        elif found[0][0] == ".PP":
            del found[0][0]
        lines += [f".SH {title}", *(line for part in found for line in part)]
    others = [f"{name}(8)" for name in names if name != script.stem]
    lines += [".SH SEE ALSO", ", ".join([*others, "postconf(5)"])]
    return "\n".join(lines) + "\n"


def main(directory: Path) -> None:
    scripts = [
        path
        for path in sorted(ROOT.glob("saslquota*.py"))
        if '"""NAME\n' in path.read_text("utf-8")
    ]
    (version,) = re.findall(
        '^__version__ = "(.*)"$', (ROOT / "saslquota.py").read_text("utf-8"), re.M
    )
    now = float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = datetime.datetime.fromtimestamp(now, datetime.UTC).date().isoformat()
    directory.mkdir(parents=True, exist_ok=True)
    for script in scripts:
        text = page(script, [path.stem for path in scripts], version, date)
        (directory / f"{script.stem}.8").write_text(text, "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: contrib/mkman.py DIRECTORY")
    main(Path(sys.argv[1]))
