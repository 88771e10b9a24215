"""What is answered to a request, and what it costs: Policy over a real SQLite ledger."""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from helpers import Decider, check, new_committer

from saslquota import (
    Answer,
    Config,
    Ledger,
    Message,
    Policy,
    Request,
    RulesFile,
    SQLiteStore,
    fold,
    fold_characters,
    format_time,
    format_wait,
    verdict_line,
)

RULES = {
    "default": {"period": 3600, "msgquota": 10, "msg": " over quota "},
    "small.example": {"period": 3600, "msgquota": 1, "msg": "one is enough"},
    "none.example": {"period": 3600, "msgquota": 0, "msg": "never"},
}
Make = Callable[..., Decider]


def make_decider(path: Path, content: dict[str, Any] = RULES, **settings: Any) -> Decider:
    (path / "quotarules.json").write_text(json.dumps(content), "utf-8")
    config = Config(path=path / "saslquota.json", store="sqlite", **settings)
    store = SQLiteStore(config.beside(config.sqlitefile), config.dbtimeout / 2)
    committer = new_committer(Ledger(store, config.retentiondays * 86400), config.dbtimeout)
    rules = RulesFile(config.beside(config.quotafile), config.retentiondays * 86400)
    return Decider(Policy(config, rules), rules, committer)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make policies with these settings; their committers run, and end with the test."""
    with ExitStack() as stack:

        def start(rules: dict[str, Any] = RULES, **settings: Any) -> Decider:
            decider = make_decider(tmp_path, rules, **settings)
            decider.committer.start()
            stack.callback(decider.committer.stop, 10)
            return decider

        yield start


@pytest.fixture
def policy(make: Make) -> Decider:
    return make()


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[str], list[Any]]:
    """Read columns of the ledger, as an administrator would."""

    def read(columns: str) -> list[Any]:
        with closing(sqlite3.connect(tmp_path / "saslquota.db")) as connection:
            found = connection.execute(f"SELECT {columns} FROM sends ORDER BY account, seq")
            return found.fetchall()

    return read


def request(login: str = "alice@example.com", state: str = "RCPT", **more: Any) -> Request:
    fields = {
        "protocol_state": state,
        "sasl_username": login,
        "sender": "a@x.br",
        "recipient": "b@y.br",
        "recipient_count": 0,
        "client_address": "192.0.2.1",
        "instance": "123.456.789.0",
        "size": 600,
    }
    return Request(**{**fields, **more})


def used(answer: Answer) -> int:
    assert answer.verdict, answer
    return answer.verdict.used


# --- States and what they cost --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "count", "cost"),
    [
        ("MAIL", 0, 1),
        ("MAIL", 5, 1),
        ("RCPT", 0, 1),
        ("RCPT", 5, 1),
        ("DATA", 0, 1),
        ("DATA", 1, 1),
        ("DATA", 5, 5),
        ("END-OF-MESSAGE", 0, 1),
        ("END-OF-MESSAGE", 7, 7),
    ],
)
def test_what_a_request_costs(
    policy: Decider, rows: Callable[[str], list[Any]], state: str, count: int, cost: int
) -> None:
    answer = check(policy, request(state=state, recipient_count=count))
    assert (answer.action, used(answer)) == ("OK", cost)
    assert rows("account, seq, recipients, total") == [("alice@example.com", 1, cost, cost)]


FREE = ["CONNECT", "EHLO", "HELO", "VRFY", "ETRN", "", "rcpt"]


@pytest.mark.parametrize("state", FREE)
@pytest.mark.parametrize("login", ["", "alice@example.com", "x" * 321])
@pytest.mark.parametrize("nosasl", ["REJECT", "DUNNO"])
def test_the_other_states_cost_nothing(tmp_path: Path, state: str, login: str, nosasl: str) -> None:
    """And are never refused: with smtpd_delay_reject=no nobody could log in any more."""
    policy = make_decider(tmp_path, nosasl=nosasl)  # its committer never runs
    assert check(policy, request(login, state)).action == "DUNNO"


@pytest.mark.parametrize("state", ["MAIL", "RCPT", "DATA", "END-OF-MESSAGE"])
@pytest.mark.parametrize("login", ["", " ", "\t"])
@pytest.mark.parametrize(
    ("nosasl", "action"), [("REJECT", "REJECT authentication required"), ("DUNNO", "DUNNO")]
)
def test_without_a_login(tmp_path: Path, state: str, login: str, nosasl: str, action: str) -> None:
    policy = make_decider(tmp_path, nosasl=nosasl)
    answer = check(policy, request(login, state))
    assert (answer.action, answer.verdict) == (action, None)


def test_without_a_login_is_the_default_a_refusal(policy: Decider) -> None:
    assert check(policy, request("")).action == "REJECT authentication required"


# --- The quota ------------------------------------------------------------------------------------


def test_exactly_the_quota_passes(policy: Decider) -> None:
    answers = [check(policy, request()) for _ in range(12)]
    assert [a.action for a in answers] == ["OK"] * 10 + ["REJECT over quota"] * 2
    assert [used(a) for a in answers] == [*range(1, 11), 10, 10]


def test_a_refused_send_is_not_counted(policy: Decider, rows: Callable[[str], list[Any]]) -> None:
    """What fits after it still passes."""
    sizes = [(6, "OK"), (5, "REJECT over quota"), (4, "OK"), (1, "REJECT over quota")]
    for count, action in sizes:
        assert check(policy, request(state="DATA", recipient_count=count)).action == action
    assert rows("recipients, total") == [(6, 6), (4, 10)]


def test_each_sender_has_a_quota_of_its_own(policy: Decider) -> None:
    assert [check(policy, request(f"{n}@small.example")).action for n in "abc"] == ["OK"] * 3
    assert check(policy, request("b@small.example")).action == "REJECT one is enough"


def test_a_quota_of_nothing(policy: Decider, rows: Callable[[str], list[Any]]) -> None:
    assert check(policy, request("a@none.example")).action == "REJECT never"
    assert rows("*") == []


def test_many_at_once_never_pass_the_quota(policy: Decider) -> None:
    actions: list[str] = []

    def send() -> None:
        actions.extend(check(policy, request()).action for _ in range(5))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(actions) == ["OK"] * 10 + ["REJECT over quota"] * 30


def test_the_count_outlives_the_daemon(make: Make) -> None:
    assert check(make(), request("a@small.example")).action == "OK"
    assert check(make(), request("a@small.example")).action == "REJECT one is enough"


# --- Who is charged -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("login", "account"),
    [
        pytest.param("Bob@Example.COM", "bob@example.com", id="upper-case"),
        pytest.param(" bob@example.com ", "bob@example.com", id="spaces"),
        pytest.param("JOÃO@example.com", "joão@example.com", id="not-ascii"),
        pytest.param("bob", "bob", id="no-domain"),
        pytest.param("bob'; --\\%\"?", "bob'; --\\%\"?", id="quotes"),
        pytest.param("x" * 320, "x" * 320, id="longest"),
        pytest.param("é" * 320, "é" * 320, id="longest-not-ascii"),
        pytest.param("a\0b\r\x1f", "a\0b", id="control"),
        pytest.param("ＢＯＢ ＠\u200bexample.com@", "bob@example.com", id="another-spelling"),
        pytest.param("bob@xn--mnchen-3ya.de", "bob@münchen.de", id="encoded-domain"),
        pytest.param("@", "@", id="nothing-would-be-left"),
        pytest.param("😀" * 320, "😀" * 320, id="longest-in-bytes"),
        pytest.param("jo\udce3o@example.com", "jo\\udce3o@example.com", id="latin-1"),
    ],
)
def test_the_account(
    policy: Decider, rows: Callable[[str], list[Any]], login: str, account: str
) -> None:
    assert [used(check(policy, request(who))) for who in (login, account)] == [1, 2]
    assert rows("account, seq") == [(account, 1), (account, 2)]


@pytest.mark.parametrize(
    ("defaultdomain", "ignoredomain", "accounts"),
    [
        (
            "example.com",
            False,
            {
                "alice@example.com": ["alice", "Alice@", "alice @EXAMPLE.com", "\u200balice"],
                "alice@vip.example": ["alice@vip.example", "alice＠vip.example"],
                "xn--mnchen-3ya@example.com": ["xn--mnchen-3ya", "XN--mnchen-3ya@example.com"],
                "@": ["@", " @ "],
                "\u200b": ["\u200b"],
            },
        ),
        ("xn--mnchen-3ya.de", False, {"alice@münchen.de": ["alice", "alice@münchen.de"]}),
        (
            "",
            True,
            {
                "alice": ["alice", "ALICE@1", "alice @2", "alice@x＠vip.example", "alice@"],
                "alice@b": ["alice@b@c", "alice＠b", "alice＠b@vip.example"],
                "@x": ["@x", " @X"],
                "x" * 320: ["x" * 320],
            },
        ),
        (
            "example.com",
            True,
            {
                "alice@example.com": ["alice", "alice@1", "Alice@vip.example", "alice@x＠vip"],
                "alice@b@example.com": ["alice@b@c", "alice＠b", "alice＠b@vip.example"],
                "@x": ["@x"],
                "@": ["@"],
            },
        ),
    ],
    ids=["default", "default-encoded", "ignore", "both"],
)
def test_the_domain_of_a_login(
    make: Make,
    rows: Callable[[str], list[Any]],
    defaultdomain: str,
    ignoredomain: bool,
    accounts: dict[str, list[str]],
) -> None:
    policy = make(defaultdomain=fold(defaultdomain), ignoredomain=ignoredomain)
    for logins in accounts.values():
        assert [used(check(policy, request(login))) for login in logins] == [
            *range(1, len(logins) + 1)
        ]
    assert {account for (account,) in rows("account")} == set(accounts)


@pytest.mark.parametrize("ignoredomain", [False, True])
@pytest.mark.parametrize("login", ["", " ", "\t"])
def test_no_login_has_no_domain(make: Make, ignoredomain: bool, login: str) -> None:
    policy = make(defaultdomain="example.com", ignoredomain=ignoredomain, nosasl="DUNNO")
    assert check(policy, request(login)).action == "DUNNO"


def test_a_login_that_is_too_long_with_its_domain(make: Make) -> None:
    policy = make(defaultdomain="example.com")
    assert check(policy, request("x" * 308)).action == "OK"
    assert check(policy, request("x" * 309)).action == "REJECT login name too long"


@pytest.mark.parametrize("ignoredomain", [False, True])
def test_what_is_too_long_is_not_cut(make: Make, ignoredomain: bool) -> None:
    policy = make(ignoredomain=ignoredomain)
    assert check(policy, request("x@" + "y" * 319)).action == "REJECT login name too long"


def test_no_login_chooses_a_rule_by_a_domain_that_is_ignored(make: Make) -> None:
    policy = make(defaultdomain="small.example", ignoredomain=True)
    answers = [check(policy, request(f"a@{domain}")) for domain in ("x", "none.example")]
    assert [answer.action for answer in answers] == ["OK", "REJECT one is enough"]


def test_the_log_shows_the_login_as_it_came(policy: Decider) -> None:
    asked = request("ＢＯＢ@XN--mnchen-3ya.de")
    assert verdict_line(asked, check(policy, asked)).startswith(
        "sasl_username=ＢＯＢ@XN--mnchen-3ya.de, rcpt="
    )


@pytest.mark.parametrize(
    "login",
    [
        pytest.param("x" * 321, id="ascii"),
        pytest.param("é" * 321, id="not-ascii"),
        pytest.param("İ" * 200, id="longer-in-lower-case"),
        pytest.param("ﷺ" * 18, id="longer-when-folded"),
        pytest.param(" " * 318 + "bob", id="spaces"),
        pytest.param("bob" + "\u0338" * 60_000, id="combining-marks"),
        pytest.param("\udcff" * 320, id="not-utf-8"),
        pytest.param("x" * 60_000, id="endless"),
    ],
)
def test_a_login_that_is_too_long(
    policy: Decider, rows: Callable[[str], list[Any]], login: str
) -> None:
    answer = check(policy, request(login))
    assert (answer.action, answer.verdict) == ("REJECT login name too long", None)
    assert check(policy, request("bob")).action == "OK"
    assert rows("account") == [("bob",)]


def test_logins_that_are_no_utf_8_are_told_apart(policy: Decider) -> None:
    logins = ["jo\udce3o@small.example", "jo\udce4o@small.example", "joo@small.example"]
    assert [check(policy, request(login)).action for login in logins] == ["OK"] * 3


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        pytest.param("14b4.5f3a8c2e.a1b2c.0", "14b4.5f3a8c2e.a1b2c.0", id="postfix"),
        pytest.param("", "", id="before-mail-from"),
        pytest.param("é" * 64, "é" * 64, id="longest"),
        pytest.param("é" * 65, "é" * 64, id="too-long"),
        pytest.param("\udcff" * 64, "\\udcff" * 10 + "\\udc", id="not-utf-8"),
    ],
)
def test_the_instance(
    policy: Decider, rows: Callable[[str], list[Any]], sent: str, kept: str
) -> None:
    assert check(policy, request(instance=sent)).action == "OK"
    assert rows("instance") == [(kept,)]


def test_the_largest_count_passes(policy: Decider, rows: Callable[[str], list[Any]]) -> None:
    answer = check(policy, request(state="DATA", recipient_count=1_000_000))
    assert answer.action == "REJECT over quota"
    assert rows("*") == []


# --- What is answered -----------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["OK", "DUNNO"])
def test_the_action_for_an_accepted_send(make: Make, action: str) -> None:
    policy = make(okaction=action)
    sent = [check(policy, request("a@small.example")).action for _ in range(2)]
    assert sent == [action, "REJECT one is enough"]


@pytest.mark.parametrize(
    ("onfailure", "action"),
    [
        (None, "DEFER_IF_PERMIT quota service unavailable, try again later"),
        ("DEFER_IF_PERMIT", "DEFER_IF_PERMIT quota service unavailable, try again later"),
        ("OK", "OK"),
    ],
)
def test_the_action_when_the_store_cannot_be_used(
    make: Make, tmp_path: Path, onfailure: str | None, action: str
) -> None:
    settings = {} if onfailure is None else {"onfailure": onfailure}
    policy = make(sqlitefile="missing/saslquota.db", **settings)
    answer = check(policy, request())
    assert (answer.action, answer.verdict) == (action, None)
    assert check(policy, request("")).action == "REJECT authentication required"
    assert check(policy, request(state="CONNECT")).action == "DUNNO"
    assert not (tmp_path / "missing").exists()


def test_a_rule_changes_while_it_runs(tmp_path: Path) -> None:
    """Also its period: what was sent before still counts."""
    policy = make_decider(tmp_path)
    policy.committer.start()
    assert [check(policy, request("a@small.example")).action for _ in range(2)] == [
        "OK",
        "REJECT one is enough",
    ]
    changed = {**RULES, "small.example": {"period": 7200, "msgquota": 2, "msg": "two are enough"}}
    (tmp_path / "quotarules.json").write_text(json.dumps(changed), "utf-8")
    policy.rules.reload()
    assert [check(policy, request("a@small.example")).action for _ in range(2)] == [
        "OK",
        "REJECT two are enough",
    ]
    policy.committer.stop(10)


# --- What the log tells of it ---------------------------------------------------------------------


def test_the_line_of_an_accepted_send(policy: Decider) -> None:
    sent = request("Alice@Example.com", recipient="b@y.br")
    assert verdict_line(sent, check(policy, sent)) == (
        "sasl_username=Alice@Example.com, rcpt=b@y.br, rule=default, quota 1/10 (10.00%),"
        " period=3600, action=ACCEPT, sender=a@x.br, client_address=192.0.2.1,"
        " instance=123.456.789.0"
    )


@pytest.mark.parametrize(
    ("login", "quota"),
    [("a@none.example", "0/0 (100.00%)"), ("a@small.example", "1/1 (100.00%)")],
)
def test_the_line_of_a_refused_send(policy: Decider, login: str, quota: str) -> None:
    sent = request(login)
    check(policy, sent)
    answer = check(policy, sent)
    assert answer.rule
    assert verdict_line(sent, answer) == (
        f"sasl_username={login}, rcpt=b@y.br, rule={answer.rule.key}, quota {quota},"
        " period=3600, action=REJECT, sender=a@x.br, client_address=192.0.2.1,"
        f" instance=123.456.789.0, msg={answer.msg}"
    )


# --- Messages instead of recipients ---------------------------------------------------------------

HOUR = {"period": "1h", "msg": "no"}
Rows = Callable[[str], list[Any]]


def replies(policy: Decider, message: Message, *instances: str, **more: Any) -> list[str]:
    return [check(policy, request(instance=i, **more), message).action for i in instances]


def test_a_message_is_charged_once(make: Make, rows: Rows) -> None:
    """Whatever it is asked for at which stage, and whatever it is that is answered."""
    policy = make({"default": {**HOUR, "msgquota": 2, "count": "messages"}})
    message = Message()
    assert replies(policy, message, "1", "1") == ["OK"] * 2
    assert replies(policy, message, "1", state="DATA", recipient_count=2) == ["OK"]
    assert replies(policy, message, "2", state="DATA", recipient_count=9) == ["OK"]
    assert replies(policy, message, "3", "3", "2") == ["REJECT no"] * 3
    assert rows("instance, recipients") == [("1", 1), ("2", 1)]


@pytest.mark.parametrize(
    ("second", "charged"),
    [
        pytest.param({}, 1, id="same"),
        pytest.param({"login": "Alice@example.com "}, 1, id="same-but-for-case"),
        pytest.param({"login": "bob@example.com"}, 2, id="other-login"),
        pytest.param({"instance": "2"}, 2, id="other-instance"),
        pytest.param({"message": Message()}, 2, id="other-connection"),
    ],
)
def test_what_is_one_message(make: Make, rows: Rows, second: dict[str, Any], charged: int) -> None:
    policy = make({"default": {**HOUR, "msgquota": 9, "count": "messages"}})
    message = Message()
    for more in ({}, second):
        with_defaults = {"instance": "1", "message": message, **more}
        memory = with_defaults.pop("message")
        check(policy, request(**with_defaults), memory)
    assert len(rows("*")) == charged


def test_without_an_instance_each_is_a_message(make: Make) -> None:
    policy = make({"default": {**HOUR, "msgquota": 2, "count": "messages"}})
    assert replies(policy, Message(), "", "", "") == ["OK", "OK", "REJECT no"]


def test_recipients_are_counted_on_one_connection_too(policy: Decider, rows: Rows) -> None:
    assert replies(policy, Message(), "1", "1") == ["OK"] * 2
    assert len(rows("*")) == 2


def test_a_changed_rule_is_another_answer(tmp_path: Path) -> None:
    content = {"default": {**HOUR, "msgquota": 0, "count": "messages"}}
    policy = make_decider(tmp_path, content)
    policy.committer.start()
    message = Message()
    assert replies(policy, message, "1") == ["REJECT no"]
    content["default"]["msgquota"] = 5
    (tmp_path / "quotarules.json").write_text(json.dumps(content), "utf-8")
    policy.rules.reload()
    assert replies(policy, message, "1", "1") == ["OK"] * 2
    policy.committer.stop(10)


def test_the_fallback_is_not_repeated(tmp_path: Path) -> None:
    """A store that comes back answers the rest of the message."""
    policy = make_decider(tmp_path, {"default": {**HOUR, "msgquota": 1, "count": "messages"}})
    policy.committer._outage.lasts = True
    message = Message()
    assert replies(policy, message, "1")[0].startswith("DEFER_IF_PERMIT")
    policy.committer._outage.lasts = False
    policy.committer.start()
    assert replies(policy, message, "1", "1", "2") == ["OK", "OK", "REJECT no"]
    policy.committer.stop(10)


def test_messages_of_a_sender_in_a_pool_of_recipients(make: Make, rows: Rows) -> None:
    """Each is charged by its own measure, also after a recipient was refused by the pool."""
    pool = {**HOUR, "msgquota": 3, "msg": "pool"}
    policy = make(
        {
            "default": {**HOUR, "msgquota": 9, "count": "messages"},
            "*": {**pool, "count": "recipients"},
        }
    )
    message = Message()
    assert replies(policy, message, "1", "1") == ["OK"] * 2
    big = {"state": "DATA", "recipient_count": 2}
    assert replies(policy, message, "1", **big) == ["REJECT pool"]
    assert replies(policy, message, "1", "1") == ["OK", "REJECT pool"]
    assert rows("account, SUM(recipients) OVER (PARTITION BY account)") == [
        *[("POOL *", 3)] * 3,
        ("alice@example.com", 1),
    ]


def test_recipients_of_a_sender_in_a_pool_of_messages(make: Make, rows: Rows) -> None:
    pool = {"msgquota": 2, "count": "messages", "msg": "pool"}
    policy = make({"default": {**HOUR, "msgquota": 9}, "@example.com": pool})
    message = Message()
    assert replies(policy, message, "1", "1", "2", "2") == ["OK"] * 4
    assert replies(policy, message, "3", "3") == ["REJECT pool"] * 2
    assert rows("account, recipients") == [
        *[("POOL @example.com", 1)] * 2,
        *[("alice@example.com", 1)] * 4,
    ]


# --- Pools and texts ------------------------------------------------------------------------------


def test_no_login_is_a_pool(make: Make, rows: Rows) -> None:
    policy = make({"default": {**HOUR, "msgquota": 9}, "*": {"msgquota": 1}})
    assert check(policy, request("POOL *")).action == "OK"
    assert rows("account") == [("POOL *",), ("pool *",)]
    every = "".join(map(chr, range(0x110000)))
    assert not set("POL") & set(fold_characters(every))


def test_the_shown_window_is_the_fullest(make: Make) -> None:
    policy = make(
        {
            "default": [{**HOUR, "msgquota": 10}, {**HOUR, "msgquota": 4}],
            "*": {**HOUR, "msgquota": 5},
        }
    )
    line = verdict_line(request(), check(policy, request()))
    assert "rule=default, quota 1/4 (25.00%), period=3600, action=ACCEPT, sender" in line


def test_placeholders(make: Make) -> None:
    msg = "{{{sasl_username}}} {rule} {used}/{msgquota} {period} {retry_after}"
    policy = make({"default": {"period": "90m", "msgquota": 0, "msg": msg}})
    answer = check(policy, request("Bob\x01\x7f@x.org"))
    assert answer.action == "REJECT {bob??@x.org} default 0/0 1h30m never"
    assert verdict_line(request(), answer).endswith(", msg={bob??@x.org} default 0/0 1h30m never")


@pytest.mark.parametrize(
    ("asked", "recipients", "field"),
    [
        ({"state": "RCPT", "recipient_count": 2}, "1", ""),
        ({"state": "DATA", "recipient_count": 3}, "3", ", recipients=3"),
        ({"state": "END-OF-MESSAGE", "recipient_count": 0}, "1", ", recipients=1"),
    ],
)
def test_how_many_recipients_a_message_has(
    make: Make, asked: dict[str, Any], recipients: str, field: str
) -> None:
    """The log and the text say it, also where messages are counted."""
    msg = "{recipients} in {seconds} s"
    policy = make(
        {
            "default": {"period": "10m", "msgquota": 0, "msg": msg},
            "m.example": {"count": "messages"},
        }
    )
    for login in ("a@x.example", "a@m.example"):
        sent = request(login, **asked)
        answer = check(policy, sent)
        assert answer.msg == f"{recipients} in 600 s"
        assert verdict_line(sent, answer).endswith(
            f" instance=123.456.789.0{field}, msg={recipients} in 600 s"
        )


def test_a_login_adds_no_field_to_the_log(make: Make) -> None:
    policy = make({"default": {**HOUR, "msgquota": 0, "msg": "no, {sasl_username}, no"}})
    sent = request("bob, client_address=198.51.100.1, x")
    line = verdict_line(sent, check(policy, sent))
    assert line.count(", client_address=") == 1
    assert line.endswith(r", msg=no, bob,\x20client_address=198.51.100.1,\x20x, no")


def test_no_limit(make: Make) -> None:
    policy = make({"default": {**HOUR, "msgquota": "unlimited"}})
    answer = check(policy, request(state="DATA", recipient_count=1_000_000))
    assert ", quota 1000000/unlimited (0.00%), " in verdict_line(request(), answer)


def test_what_is_not_enforced_is_counted(make: Make, rows: Rows) -> None:
    trial = {**HOUR, "msgquota": 1, "enforce": False, "action": "DEFER"}
    policy = make(
        {"default": trial, "*": {"msgquota": 2, "enforce": True, "msg": "pool"}}, okaction="DUNNO"
    )
    answers = [check(policy, request()) for _ in range(3)]
    assert [answer.action for answer in answers] == ["DUNNO", "DUNNO", "DEFER pool"]
    assert "quota 2/1 (200.00%), period=3600, action=DEFER (not enforced), " in verdict_line(
        request(), answers[1]
    )
    assert len(rows("*")) == 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (90, "1m30s"), (7500, "2h5m"), (86400, "1d"), (604800, "7d")],
)
def test_times(seconds: int, text: str) -> None:
    assert format_time(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1.0, "1s"),
        (0.1, "1s"),
        (58.9, "59s"),
        (59.1, "1m"),
        (60.0, "1m"),
        (60.1, "2m"),
        (3540.1, "1h"),
        (float("inf"), "never"),
    ],
)
def test_waits_are_rounded_up(seconds: float, text: str) -> None:
    assert format_wait(seconds) == text


# --- HOLD -----------------------------------------------------------------------------------------

HELD = {
    "default": [
        {"period": "1h", "msgquota": 2, "action": "HOLD", "msg": "look at {sasl_username}"},
        {"period": "1h", "msgquota": 4, "msg": "enough"},
    ]
}


def test_what_is_held_is_counted_until_another_window_refuses(make: Make, rows: Rows) -> None:
    policy = make(HELD)
    answers = [check(policy, request()) for _ in range(6)]
    actions = [answer.action for answer in answers]
    held = "HOLD look at alice@example.com"
    assert actions == ["OK", "OK", held, held, "REJECT enough", "REJECT enough"]
    assert [answer.outcome for answer in answers[1:5]] == ["accepted", "held", "held", "refused"]
    assert rows("total") == [(1,), (2,), (3,), (4,)]
    line = verdict_line(request(), answers[2])
    assert "quota 3/2 (150.00%), period=3600, action=HOLD, " in line


def test_hold_may_be_tried_out(make: Make) -> None:
    policy = make({"default": {**HELD["default"][0], "enforce": False}})
    answers = [check(policy, request()) for _ in range(3)]
    assert [answer.action for answer in answers] == ["OK"] * 3
    assert answers[2].outcome == "not_enforced"
    assert "action=HOLD (not enforced), " in verdict_line(request(), answers[2])


# --- Where a send came from -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "stored"),
    [
        ("192.0.2.1", bytes([192, 0, 2, 1])),
        ("2001:db8::1", bytes.fromhex("20010db8000000000000000000000001")),
        ("::ffff:192.0.2.1", bytes.fromhex("00000000000000000000ffffc0000201")),
        ("", b""),
        ("unknown", b""),
        ("1.2.3", b""),
        ("192.0.2.1\x00", b""),
        ("\udc80", b""),
    ],
)
def test_the_client_address(policy: Decider, rows: Rows, address: str, stored: bytes) -> None:
    check(policy, request(client_address=address))
    assert rows("CAST(client_address AS BLOB)") == [(stored,)]


@pytest.mark.parametrize(
    ("sender", "stored"),
    [
        ("ceo@example.com", "ceo@example.com"),
        ("alice@example.com", ""),
        ("", ""),
        ("\udcff@x", "\\udcff@x"),
        ("x" * 500, "x" * 320),
    ],
)
def test_the_sender(policy: Decider, rows: Rows, sender: str, stored: str) -> None:
    check(policy, request(sender=sender))
    assert rows("sender") == [(stored,)]


@pytest.mark.parametrize("sender", ["ALICE@example.com", "alice@example.com"])
def test_a_sender_that_is_the_login_in_either_spelling(
    policy: Decider, rows: Rows, sender: str
) -> None:
    check(policy, request("ALICE@example.com", sender=sender))
    assert rows("sender") == [("",)]


def test_addresses_need_not_be_stored(make: Make, rows: Rows) -> None:
    check(make(storeaddress=False), request())
    assert rows("CAST(client_address AS BLOB), sender") == [(b"", "a@x.br")]


def test_of_several_senders_in_a_pool_nothing_is_stored(make: Make, rows: Rows) -> None:
    check(make({**RULES, "*": {"period": "1h", "msgquota": 9}}), request())
    assert rows("CAST(client_address AS BLOB), sender")[0] == (b"", "")
