"""What both files have in common: they are JSON, and their mistakes are named."""

from pathlib import Path

import pytest

from saslquota import ConfigError, load_json


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_json(path)
    return str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    assert refusal(missing) == f"{missing}: cannot be read: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


@pytest.mark.parametrize("opening", ["[", '{"_bind":'])
def test_a_file_that_is_nested_too_deep(tmp_path: Path, opening: str) -> None:
    path = tmp_path / "deep.json"
    path.write_text(opening * 200_000, "utf-8")
    assert refusal(path) == f"{path}: nested too deep"


@pytest.mark.parametrize(
    ("content", "place", "remedy"),
    [
        ('{"a": 1,}', (1, 8), "remove the comma before the }"),
        ('{"a": [1,\n ] }', (1, 9), "remove the comma before the ]"),
        ('{"a": 1,\n\n}\n', (1, 8), "remove the comma before the }"),
        ('{"a": 1 // x\n}', (1, 9), "remove the comment"),
        ('{# c\n"a":1}', (1, 2), "remove the comment"),
        ('{"a":1,\n/* x */ "b":2}', (2, 1), "remove the comment"),
        ("{'a': 1}", (1, 2), 'write " around names and texts'),
        ("{\"a\": 'x'}", (1, 7), 'write " around names and texts'),
        ("{\u201ca\u201d: 1}", (1, 2), 'write " around names and texts'),
        ('{"a": "x\ty"}', (1, 9), "a tab, line break or the like in a text"),
        ('{"a": "x\n}', (1, 9), 'is its second " missing?'),
        ('{"a": "x', (1, 7), 'the second " of this text is missing'),
        ('{"a": "c:\\dir"}', (1, 10), r"write \\ for a backslash"),
        ('{"a": 1', (1, 8), "the file ends too soon"),
        ('{"a": 1,\n', (2, 1), "the file ends too soon"),
        (" \n", (1, 1), "empty"),
        ('{"a" 1}', (1, 6), "a colon is missing"),
        ('{"a": 1\n "b": 2}', (2, 2), "a comma is missing"),
        ('{"a":1,,"b":2}', (1, 9), 'a name in " must stand here'),
        ("{a: 1}", (1, 2), 'a name in " must stand here'),
        ('{"a": True}', (1, 7), "a value must stand here"),
        ('{"a":1}}', (1, 8), "nothing may follow the last }"),
    ],
)
def test_what_is_not_json(
    tmp_path: Path, content: str, place: tuple[int, int], remedy: str
) -> None:
    """The place and the remedy are the same with all versions of Python."""
    path = tmp_path / "file.json"
    path.write_text(content, "utf-8")
    line, column = place
    assert refusal(path).startswith(f"{path}, line {line}, column {column}: not JSON: ")
    assert remedy in refusal(path)


def test_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes('{"msg":\n"Você"}'.encode("latin-1"))
    assert refusal(path) == f"{path}, line 2: not UTF-8: save it in that encoding"
