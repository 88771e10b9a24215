"""How the spellings of a login become one account, and those of a rule's key one key."""

import json
import os
import re
import unicodedata
from pathlib import Path

import pytest
from helpers import RETENTION
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saslquota import (
    IGNORABLE,
    MAX_ACCOUNT,
    POOL_PREFIX,
    SPOOL_ACCOUNT,
    ConfigError,
    fold,
    fold_characters,
    load_rules,
)

EVERY = [chr(number) for number in range(0x110000)]


def encoded(label: str) -> str:
    return "xn--" + label.encode("punycode").decode()


SPELLINGS = {
    "bob@example.com": [
        "Bob@Example.COM",
        " bob@example.com\t",
        "bob @example.com",
        "bob@ example.com",
        "bob \u3000@\u2003example.com",
        "bob@example.com@",
        "bob@example.com @ @@ ",
        "b\u00adob@exam\u200bple.com",  # soft hyphen, zero width space
        "\ufeffbob\ufe0f@\u2060example.com\U000e0041",
        "ｂｏｂ＠ｅｘａｍｐｌｅ．ｃｏｍ",  # full width
        "𝒷𝓸ⓑ@example.com",
        "bob@example.ⅽom",  # a roman numeral
        f"bob@{encoded('ｅｘａｍｐｌｅ')}.com",
    ],
    "böb@example.com": ["BÖB@example.com", "bo\u0308b@example.com", "bo\u034f\u0308b@example.com"],
    "strasse@example.com": ["Straße@example.com", "STRAẞE@example.com"],
    "ὀδυσσεύσ@example.com": ["Ὀδυσσεύς@example.com"],
    "file@example.com": ["ﬁle@example.com"],
    "bob@münchen.de": [
        "bob@xn--mnchen-3ya.de",
        "BOB@XN--MNCHEN-3YA.DE",
        "bob@ｘｎ－－mnchen-3ya.de",
    ],
    "bob@☃.net": ["bob@xn--n3h.net"],  # Python's idna codec raises
    "bob@i\u2764.ws": ["bob@xn--i-7iq.ws"],
    "münchen.de": ["xn--mnchen-3ya.de", "MU\u0308NCHEN.de"],  # a domain, as in a rule's key
    "bob smith": ["Bob  Smith", "bob\u00a0smith", "bob \t smith "],
    "a@b@c": ["a@b @ c", "a@b@c@"],
    "a @b@c": ["a @b@c", "a \u00a0@b@c"],  # only beside the last @
    "alice": ["ALICE", "alice@", "alice @ "],
    "@": ["@", " @ "],
    "@ @": ["@ @", " @ @ "],
    "\u200b": ["\u200b"],
    "": ["", " ", "\t\u3000"],
}


@pytest.mark.parametrize(
    ("login", "account"), [(login, to) for to, logins in SPELLINGS.items() for login in logins]
)
def test_the_account_of_a_login(login: str, account: str) -> None:
    assert fold(login) == account
    assert fold(account) == account


@pytest.mark.parametrize(
    "label",
    [
        "xn--",
        "xn--a",  # not punycode
        "xn--é",
        "xn--a\x80b",
        "xn--99999999999999999",  # beyond Unicode
        "xn--" + "z" * 60,
        "xn--abc-",  # decodes to ASCII only
        encoded("a@é"),
        encoded("é＠a"),
        encoded("a.é"),
        encoded("é．a"),
        encoded("a é"),
        encoded("é\u3000a"),
        encoded("é\x7f"),
        encoded("é\ue000"),
        encoded("xn--é"),
        encoded("ｘn--é"),
        encoded("\u200b"),  # nothing would be left of it
        "bücher-xn--3ya",
    ],
)
def test_a_label_that_stays_as_it_is(label: str) -> None:
    assert fold(f"bob@{label}.example") == f"bob@{label}.example"


def test_only_labels_of_the_domain_are_decoded() -> None:
    assert fold("xn--mnchen-3ya@example.com") == "xn--mnchen-3ya@example.com"
    assert fold("xn--mnchen-3ya", "example.com") == "xn--mnchen-3ya@example.com"


# --- Whatever somebody may log in as --------------------------------------------------------------

CHANGED = [c for c in EVERY if unicodedata.normalize("NFKC", c).casefold() != c]
IGNORED = [c for c in EVERY if IGNORABLE.match(c)]
COMBINING = [c for c in EVERY if unicodedata.combining(c)]
CHARACTERS = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from(CHANGED),
    st.sampled_from(COMBINING),
    st.sampled_from(IGNORED),
    st.sampled_from("@@@... aAzZ-\t\u3000\u00a8＠．ǅŉﷺß\u0345ͺİı"),
)
TEXTS = st.text(CHARACTERS, max_size=12)
LABELS = st.one_of(
    TEXTS, TEXTS.map(encoded), st.text("abz059-é@. ", max_size=8).map("xn--{}".format)
)
LOGINS = st.one_of(
    TEXTS, st.tuples(TEXTS, st.lists(LABELS, max_size=3).map(".".join)).map("@".join)
)
HARD = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "400")), deadline=None)


@HARD
@given(LOGINS)
@example("a\u0345\u0301\u034fΑ@xn--0")
def test_folding_twice_is_folding_once(login: str) -> None:
    folded = fold(login)
    assert fold(folded) == folded


def test_folding_twice_is_folding_once_for_each_character() -> None:
    for character in {*CHANGED, *COMBINING, *IGNORED, *filter(str.isspace, EVERY)}:
        for login in (character, f"a{character}@b{character}c"):
            folded = fold(login)
            assert fold(folded) == folded, ascii(login)


@HARD
@given(LOGINS)
def test_what_an_account_is_like(login: str) -> None:
    """It is no pool, and no spool; and MySQL, to which texts are equal but for spaces at the end,
    tells it from any other."""
    folded = fold(login)
    assert not folded.startswith((POOL_PREFIX, SPOOL_ACCOUNT))
    assert folded == folded.strip()
    assert bool(folded) is bool(login.strip())


@HARD
@given(st.text(st.characters(max_codepoint=127), max_size=12))
def test_ascii_folds_like_all_others(login: str) -> None:
    assert fold_characters(login) == login.lower()


@HARD
@given(LOGINS)
def test_a_default_domain(login: str) -> None:
    """alice and alice@example.com are one account; no other login gets it."""
    completed = fold(login, "example.com")
    if "@" in fold(login) or not fold_characters(login).strip():
        assert completed == fold(login)
    else:
        user = re.sub(r"[\s@]+$", "", fold_characters(login))
        assert completed == fold(user + "@example.com")


@pytest.mark.parametrize(
    "login",
    [
        pytest.param("x" * 321, id="ascii"),
        pytest.param("a" + "\u0338" * 60_000, id="combining-marks"),
        pytest.param(" " * 317 + "bob@", id="spaces"),
        pytest.param("a@xn--" + "9a" * 30_000, id="label"),
    ],
)
def test_what_is_too_long_is_not_looked_at(login: str) -> None:
    assert fold(login) is login


@pytest.mark.parametrize("character", ["ﷺ", "İ", "ß", "㋿"])
def test_an_account_may_be_longer_than_its_login(character: str) -> None:
    assert len(fold(character * MAX_ACCOUNT)) > MAX_ACCOUNT


# --- Characters that have no width ----------------------------------------------------------------


def test_what_has_no_width() -> None:
    """As DerivedCoreProperties.txt derives Default_Ignorable_Code_Point: format characters and
    variation selectors, without the visible ones; and Other_Default_Ignorable_Code_Point."""
    visible = [*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD]
    visible += [*range(0xFFF9, 0xFFFC), *range(0x13430, 0x13441)]
    other = [0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2065, 0x3164, 0xFFA0]
    other += [*range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000)]
    derived = {
        number
        for number, character in enumerate(EVERY)
        if unicodedata.category(character) == "Cf"
        or "VARIATION SELECTOR" in unicodedata.name(character, "")
    }
    ignorable = set(map(ord, IGNORED))
    assert ignorable == derived - set(visible) | set(other)
    assert len(ignorable) == 4174  # "Total code points" in the file


# --- Keys of rules --------------------------------------------------------------------------------


def written(path: Path, *keys: str) -> Path:
    rules = {key: {"period": 60, "msgquota": number} for number, key in enumerate(keys)}
    (path / "quotarules.json").write_text(json.dumps(rules), "utf-8")
    return path / "quotarules.json"


@pytest.mark.parametrize(
    ("key", "login"),
    [(key, account) for account, keys in SPELLINGS.items() for key in keys if "b@" in account],
)
def test_keys_of_rules_go_the_same_way(tmp_path: Path, key: str, login: str) -> None:
    rules = load_rules(written(tmp_path, "default", key), RETENTION)
    assert rules.select(login).key == login


@pytest.mark.parametrize(
    ("key", "folded"),
    [
        ("XN--MNCHEN-3YA.de", "münchen.de"),
        ("@xn--mnchen-3ya.de", "@münchen.de"),
        ("*.xn--mnchen-3ya.de", "*.münchen.de"),
        ("Büro-*@xn--mnchen-3ya.de", "büro-*@münchen.de"),
        ("＊", "*"),
    ],
)
def test_domains_pools_and_patterns_too(tmp_path: Path, key: str, folded: str) -> None:
    rules = load_rules(written(tmp_path, "ＤＥＦＡＵＬＴ", key), RETENTION)
    assert [rule.key for rule in rules] == ["default", folded]


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("münchen.de", "xn--mnchen-3ya.de"),
        ("böb@x.org", "bo\u0308b@x.org"),
        ("bob@x.org", "ｂob@x.org"),
    ],
)
def test_two_spellings_of_a_key(tmp_path: Path, key: str, other: str) -> None:
    with pytest.raises(ConfigError, match=f'differs from "{key}" only in spelling, remove one'):
        load_rules(written(tmp_path, "default", key, other), RETENTION)


@pytest.mark.parametrize("key", ["\u0338" * 60_000, "ﷺ" * 320])
def test_a_key_that_is_too_long(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="not a usable key"):
        load_rules(written(tmp_path, "default", key), RETENTION)
