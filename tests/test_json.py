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
