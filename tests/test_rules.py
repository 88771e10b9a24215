"""quotarules.json: which rule a sender gets, and what happens when the file changes.

rules/invalid holds files that must be refused, each beside the message it must get; rules/valid
holds files that must be taken, each beside the rule that some logins must get.
"""

import itertools
import json
import logging
import os
from pathlib import Path

import pytest
from helpers import DEFAULT_SENTENCE, EFFORT, RETENTION, SENTENCE, example_files
from hypothesis import given
from hypothesis import strategies as st
from servers.process import ROOT

from saslquota import (
    ConfigError,
    Patterns,
    Rule,
    Rules,
    RulesFile,
    Verdict,
    Window,
    load_rules,
    refusal_text,
)


@pytest.mark.parametrize("path", example_files("rules/invalid"), ids=lambda path: path.stem)
def test_an_invalid_file_gets_its_message(path: Path) -> None:
    expected = path.with_suffix(".txt").read_text("utf-8").removesuffix("\n")
    with pytest.raises(ConfigError) as caught:
        load_rules(path, RETENTION)
    assert str(caught.value) == f"{path.parent}/{expected}"


def peculiar(window: Window) -> str:
    """What is not as it is by default."""
    count = "" if window.count == "recipients" else f" {window.count}"
    action = "" if window.action == "REJECT" else f" {window.action}"
    return f"{count}{action}{'' if window.enforce else ' (not enforced)'}"


@pytest.mark.parametrize("path", example_files("rules/valid"), ids=lambda path: path.stem)
def test_a_valid_file_gives_its_rules(path: Path) -> None:
    rules = load_rules(path, RETENTION)
    for line in path.with_suffix(".txt").read_text("utf-8").splitlines():
        login, _, expected = line.partition(" -> ")
        rule = rules.select(login)
        windows = [f"{window}: {window.msg}{peculiar(window)}" for window in rule.windows]
        pools = [f" + {pool.key}" for pool in rules.pools(login)]
        assert f"{rule.key}: {', '.join(windows)}{''.join(pools)}" == expected, login


def test_the_shipped_rules() -> None:
    path = ROOT / "quotarules.json"
    shipped = [
        ("default", 120, 500, DEFAULT_SENTENCE),
        ("localhost", 1200, 5000, SENTENCE.format(5000, 1200)),
        ("root@localhost", 300, 50, SENTENCE.format(50, 300)),
    ]
    assert json.loads(path.read_text("utf-8")) == {
        "$schema": "schema/quotarules.schema.json",
        **{
            key: {"period": period, "msgquota": quota, "msg": f" {msg} "}
            for key, period, quota, msg in shipped
        },
    }
    assert list(load_rules(path, RETENTION)) == [
        Rule(key, (Window(period, quota, key, msg),)) for key, period, quota, msg in shipped
    ]


def test_the_shipped_text_is_the_owners_and_true_for_what_inherits_it(tmp_path: Path) -> None:
    path = tmp_path / "quotarules.json"
    rules = json.loads((ROOT / "quotarules.json").read_text("utf-8"))
    rules["ten.example"] = {"period": "10m", "msgquota": 5}
    path.write_text(json.dumps(rules), "utf-8")
    for login, quota, period in [("a@b.example", 500, 120), ("a@ten.example", 5, 600)]:
        (window,) = load_rules(path, RETENTION).select(login).windows
        refusal = Verdict(False, quota, window, over_quota=True)
        assert refusal_text(login, refusal, 1) == SENTENCE.format(quota, period)


def test_the_shipped_rules_are_readable_in_the_file() -> None:
    """An administrator edits `Você`, not `Voc\\u00ea`."""
    assert "Você já mandou" in (ROOT / "quotarules.json").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "number"),
    [
        pytest.param("user{}@example.com", round(100_000 * min(EFFORT, 1)), id="addresses"),
        pytest.param("d{}.example.com", round(100_000 * min(EFFORT, 1)), id="domains"),
        pytest.param("newsletter-*@d{}.example.com", 1000, id="patterns-for-addresses"),
        pytest.param("*.d{}.example.com", 1000, id="patterns-for-domains"),
    ],
)
def test_selection_among_many_rules(tmp_path: Path, key: str, number: int) -> None:
    path = tmp_path / "quotarules.json"
    found = {key.format(n): {"msgquota": 1} for n in range(number)}
    path.write_text(json.dumps({"default": {"period": 60, "msgquota": 9}, **found}), "utf-8")
    rules = load_rules(path, RETENTION)
    some = range(0, number, number // 100)
    logins = [key.format(n).replace("*", "x") for n in some]
    selected = [rules.select(login if "@" in login else f"x@{login}") for login in logins]
    assert [rule.key for rule in selected] == [key.format(n) for n in some]


def test_the_order_of_selection() -> None:
    """Each kind of key comes before the next, however long the key is."""
    keys = ["bob@example.com", "b*", "b*@example.com", "example.com", "exa*.com", "default"]
    login = "bob@example.com"
    for winner in (keys[0], keys[2], *keys[3:]):
        rules = Rules([Rule(key, (Window(60, 9),)) for key in keys])
        assert rules.select(login).key == winner
        keys.remove(winner)
        keys += ["default"] if "default" not in keys else []


@pytest.mark.parametrize(
    ("keys", "hidden"),
    [
        (["a*@example.com", "*a*@example.com"], ["a*@example.com"]),
        (["?*@example.com", "*?@example.com"], ["*?@example.com"]),
        (["*a*.com", "a*.com"], ["a*.com"]),
        (["*a*.com", "ab.*.com"], []),  # the longer one wins
        (["*a*", "a?"], ["a?"]),
        (["a*aa*", "*aa*?"], []),  # acaa: the first only
        (["a*", "b*"], []),
        (["a*b", "ab"], []),
        (["[ab]*x*", "a*x"], []),
        (["*a?", "*a*"], []),
        (["*a*", "*a?"], ["*a?"]),
    ],
)
def test_what_another_pattern_hides(keys: list[str], hidden: list[str]) -> None:
    patterns = Patterns(Rule(key, (Window(60, 9),)) for key in keys)
    assert [key for key, _ in patterns.hidden()] == hidden


@given(st.lists(st.text("ab*?", min_size=1, max_size=5), min_size=2, max_size=4, unique=True))
def test_what_is_hidden_is_never_selected(keys: list[str]) -> None:
    keys = [key for key in keys if "*" in key or "?" in key]
    patterns = Patterns(Rule(key, (Window(60, 9),)) for key in keys)
    names = ("".join(n) for length in range(8) for n in itertools.product("abc", repeat=length))
    selected = {rule.key for name in names if (rule := patterns.select(name))}
    assert not selected & {key for key, _ in patterns.hidden()}


# --- Reading them again ---------------------------------------------------------------------------


def quota(amount: int, period: int = 60) -> str:
    return json.dumps({"default": {"period": period, "msgquota": amount, "msg": "no"}})


def in_force(rules: RulesFile) -> float:
    return rules.rules.select("alice@example.com").windows[0].msgquota


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "quotarules.json"
    path.write_text(quota(10), "utf-8")
    return path


@pytest.fixture
def rules(path: Path, caplog: pytest.LogCaptureFixture) -> RulesFile:
    caplog.set_level(logging.INFO, "saslquota")
    return RulesFile(path, RETENTION)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def test_an_unchanged_file_is_not_read(rules: RulesFile, caplog: pytest.LogCaptureFixture) -> None:
    before = rules.rules
    rules.reload()
    assert rules.rules is before
    assert not caplog.messages


@pytest.mark.parametrize("amount", [20, 200])
def test_a_changed_file_is_read(
    rules: RulesFile, path: Path, caplog: pytest.LogCaptureFixture, amount: int
) -> None:
    path.write_text(quota(amount), "utf-8")
    rules.reload()
    assert in_force(rules) == amount
    assert caplog.messages == [f"rules reloaded: default {amount} in 60 s"]


def test_a_file_put_in_its_place_is_read(rules: RulesFile, path: Path) -> None:
    """As editors and configuration management do; also when it is older and as long."""
    before = path.stat()
    other = path.with_name("new")
    other.write_text(quota(20), "utf-8")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    rules.reload()
    assert in_force(rules) == 20


def test_force_reads_also_what_looks_unchanged(
    rules: RulesFile, caplog: pytest.LogCaptureFixture
) -> None:
    rules.reload(force=True)
    assert caplog.messages == ["rules reloaded: default 10 in 60 s"]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        pytest.param('{\n"default": {', ", line 2, column 13: not JSON: ", id="half-written"),
        pytest.param("", ", line 1, column 1: not JSON: empty", id="empty"),
        pytest.param(
            '{\n"default": {"period": "soon", "msgquota": 20, "msg": "no"}}',
            ', line 2: "default": "period": must be seconds from 1 to 315360000, or',
            id="bad-value",
        ),
        pytest.param(
            quota(20, RETENTION + 1),
            ', line 1: "default": "period": longer than _retentiondays keeps sends (30 days)',
            id="period-longer-than-retention",
        ),
        pytest.param(quota(20).replace("20", "2" * 5000), ", line 1", id="endless-number"),
    ],
)
def test_a_broken_file_keeps_the_old_rules(
    rules: RulesFile, path: Path, caplog: pytest.LogCaptureFixture, broken: str, reason: str
) -> None:
    path.write_text(broken, "utf-8")
    rules.reload()
    assert in_force(rules) == 10
    (error,) = errors(caplog)
    assert (
        f"the previous ones stay in force, but saslquota would not start again: {path}{reason}"
        in error
    )
    assert "\n" not in error


def test_a_broken_file_is_told_once(
    rules: RulesFile, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text("{", "utf-8")
    rules.reload()
    rules.reload()
    assert len(errors(caplog)) == 1
    path.write_text(quota(30), "utf-8")
    rules.reload()
    assert (in_force(rules), len(errors(caplog))) == (30, 1)


def test_a_missing_file_keeps_the_old_rules(
    rules: RulesFile, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.unlink()
    rules.reload()
    rules.reload()
    assert in_force(rules) == 10
    (error,) = errors(caplog)
    assert f"{path}: cannot be read: No such file or directory" in error
    path.write_text(quota(30), "utf-8")
    rules.reload()
    assert in_force(rules) == 30


def test_no_start_with_bad_rules(path: Path) -> None:
    path.write_text("{}", "utf-8")
    with pytest.raises(ConfigError, match='the rule "default" is missing'):
        RulesFile(path, RETENTION)
