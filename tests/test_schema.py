"""The JSON Schemas, by which editors complete and check the two files, say of every example what
the loaders say. What a schema cannot express is listed here, each with the reason."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers import RETENTION, example_files, examples
from hypothesis import given
from hypothesis import strategies as st
from servers.process import ROOT

import saslquota
from saslquota import ConfigError, load_config, load_rules

Load = Callable[[Path], object]

TWICE = "JSON keeps the last of two equal keys; a schema sees only that one"
CASE = "a schema does not compare keys with each other"
COMPARED = "a schema does not compare values with each other"
WHOLE = "to a schema 10008.0 is an integer"
NETWORK = "a schema does not compute with addresses"
INEXPRESSIBLE: Mapping[str, Mapping[str, str]] = {
    "config": {
        "duplicate": TWICE,
        "allow-host-bits": NETWORK,
        "bindport-fraction": WHOLE,
        "onfailure-local-sqlite": COMPARED,
        "onfailure-local-dbtimeout": COMPARED,
    },
    "rules": {
        "duplicate": TWICE,
        "duplicate-field": TWICE,
        "duplicate-field-of-a-window": TWICE,
        "duplicate-but-for-case": CASE,
        "duplicate-but-for-spaces": CASE,
        "duplicate-but-for-spelling": CASE,
        "duplicate-pattern-but-for-case": CASE,
        "duplicate-pool-but-for-case": CASE,
        "count-not-the-same": COMPARED,
        "period-longer-than-retention": "it depends on _retentiondays, in the other file",
        "period-longer-than-retention-in-words": "it depends on _retentiondays, in the other file",
        "period-beyond-ten-years-in-words": "a schema does not compute with times",
    },
}


def schema(name: str) -> Any:
    found = json.loads((ROOT / f"schema/{name}.schema.json").read_text("utf-8"))
    jsonschema.Draft7Validator.check_schema(found)
    return jsonschema.Draft7Validator(found)


KINDS: Mapping[str, tuple[Any, Load]] = {
    "config": (schema("saslquota"), lambda path: load_config(path, {})),
    "rules": (schema("quotarules"), lambda path: load_rules(path, RETENTION)),
}


def editor_takes(validator: Any, path: Path) -> bool:
    """Whether an editor shows no mistake in the file."""
    try:
        return bool(validator.is_valid(json.loads(path.read_text("utf-8-sig"))))
    except ValueError:  # not JSON, or not UTF-8
        return False


def loader_takes(load: Load, path: Path) -> bool:
    try:
        load(path)
    except ConfigError:
        return False
    return True


EXAMPLES = [
    (kind, path)
    for kind in KINDS
    for verdict in ("valid", "invalid")
    for path in example_files(f"{kind}/{verdict}")
]


@pytest.mark.parametrize(
    ("kind", "path"), EXAMPLES, ids=[f"{kind}-{path.stem}" for kind, path in EXAMPLES]
)
def test_schema_and_loader_agree(kind: str, path: Path) -> None:
    validator, load = KINDS[kind]
    taken = loader_takes(load, path)
    assert taken is (path.parent.name == "valid")
    beyond = path.stem in INEXPRESSIBLE[kind]
    assert editor_takes(validator, path) is (taken or beyond)


def test_what_is_inexpressible_has_an_example() -> None:
    for kind, names in INEXPRESSIBLE.items():
        assert {path.stem for k, path in EXAMPLES if k == kind} >= set(names)


@pytest.mark.parametrize(("name", "kind"), [("saslquota", "config"), ("quotarules", "rules")])
def test_the_shipped_file_refers_to_its_schema(name: str, kind: str) -> None:
    path = ROOT / f"{name}.json"
    assert (ROOT / json.loads(path.read_text("utf-8"))["$schema"]).is_file()
    validator, load = KINDS[kind]
    assert editor_takes(validator, path)
    load(path)


def test_every_setting_with_its_default() -> None:
    properties = dict(KINDS["config"][0].schema["properties"])
    del properties["$schema"]
    fields = saslquota.Config.__dataclass_fields__
    assert list(properties) == [f"_{name}" for name in fields if name != "path"]
    for name, found in properties.items():
        default = fields[name[1:]].default
        expected = ",".join(default) if isinstance(default, tuple) else default
        assert found["default"] == expected, name


def test_every_field_of_a_rule() -> None:
    fields = KINDS["rules"][0].schema["definitions"]["window"]["properties"]
    assert list(fields) == list(saslquota.RULE_FIELDS)


# --- Whatever somebody may write ------------------------------------------------------------------

VALUES: Mapping[str, list[object]] = {
    "period": [
        1,
        60,
        0,
        -1,
        1.5,
        True,
        None,
        "60",
        "90s",
        "1w",
        "1 h",
        "h",
        "",
        "00",
        "5y",
        "2h5m",
    ],
    "msgquota": [0, 5, -1, 0.5, "7", "unlimited", "UNLIMITED", "lots", None, False, [1]],
    "msg": [
        *["", "no", " no \n", "a\nb", "{used}", "{{", "}", "{{}}", "{ used}", "{used}}", "{x}", 5],
        *["{{{rule}}}", "\t", "a\u2028b", "é{period}{retry_after}"],
    ],
    "count": ["recipients", "Messages", "bytes", None],
    "action": ["REJECT", "defer", "HOLD", 450],
    "enforce": [True, False, "true", 1, None],
    "perod": [1],
}
FIELDS = st.fixed_dictionaries(
    {},
    optional={name: st.sampled_from(values) for name, values in VALUES.items() if name != "perod"},
)
GOOD = st.fixed_dictionaries({"period": st.just("1h"), "msgquota": st.integers(0, 5)})
WINDOWS = st.one_of(FIELDS, FIELDS, st.lists(FIELDS, max_size=2), st.just(7), GOOD)
KEYS = st.one_of(
    st.sampled_from(
        ["bob@x.org", "x.org", "@x.org", "*", "*.x.org", "a*@x.org", "@*.org", "@", ""]
    ),
    st.text("a@.* ?[]", max_size=6),
)
LOADED = st.one_of(GOOD, GOOD, st.lists(GOOD, min_size=1, max_size=2), WINDOWS)
COMPARISONS = ("but for case", "same in all windows", "comes first and matches")


@pytest.mark.slow
@examples(500)
@given(default=LOADED, key=KEYS, rule=WINDOWS)
def test_they_agree_whatever_is_written(
    tmp_path_factory: pytest.TempPathFactory, default: object, key: str, rule: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.json"
    path.write_text(json.dumps({"default": default, key: rule}), "utf-8")
    validator, load = KINDS["rules"]
    try:
        load(path)
        taken = True
    except ConfigError as error:
        if any(words in str(error) for words in COMPARISONS):
            return
        taken = False
    assert editor_takes(validator, path) is taken
