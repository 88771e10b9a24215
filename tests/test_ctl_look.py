"""saslquotactl.py: status, top and show, on real stores."""

import json
import re
import socketserver
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

import pytest
from ctl import Ctl, Site
from fleet import Fleet
from helpers import DAY, StartDaemon, examples, mysql_config, require
from hypothesis import given
from hypothesis import strategies as st
from servers.audit import SECOND
from servers.mariadb import Database, MariaDB
from servers.ports import LOOPBACK
from servers.process import ROOT, clean_environment, run, wait_for

import saslquotactl
from saslquota import Config, Entry, MySQLStore, Window, load_config
from saslquotactl import Session, measure

BOB, ANN = "bob@example.com", "ann@example.com"
HOME, CAFE, THIEF = (bytes([192, 0, 2, number]) for number in (1, 2, 3))


def rows_of(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# --- What is used ---------------------------------------------------------------------------------

MINUTE, QUARTER = Window(60, 3, rule="default"), Window(900, 9, rule="default")


def plain_use(entries: list[Entry], window: Window, now: int) -> int:
    newest = entries[-1].epoch
    start = now - window.period * SECOND
    return sum(e.recipients for e in entries if e.epoch == newest and e.at >= start)


def first_fit(entries: list[Entry], window: Window, now: int) -> int:
    """When a mail of one recipient fits, tried one by one."""
    leaving = sorted(e.at + window.period * SECOND + 1 for e in entries)
    moments = [now, *(at for at in leaving if at > now)]
    return next(at for at in moments if plain_use(entries, window, at) < window.msgquota)


@examples(60)
@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(1, 4), st.integers(0, 12)),
        min_size=1,
        max_size=90,
    )
)
def test_usage_agrees_with_a_plain_count(sends: list[tuple[int, int, int]]) -> None:
    """(seconds ago, recipients, 0: a reset before it)"""
    with tempfile.TemporaryDirectory() as directory:
        fleet = Fleet(Path(directory))
        store = fleet.stores[0]
        now, epoch, total = store.now(), 1, 0
        entries = []
        for seq, (ago, recipients, reset) in enumerate(sorted(sends, reverse=True), 1):
            epoch, total = (epoch + 1, 0) if reset == 0 else (epoch, total)
            total += recipients
            at = now - ago * SECOND - SECOND // 2  # measuring takes some microseconds
            entries.append(Entry("a@b.c", seq, epoch, at, recipients, total, "i", 7))
        store.append(entries)
        rules = {
            "default": [{"period": w.period, "msgquota": w.msgquota} for w in (MINUTE, QUARTER)]
        }
        Path(directory, "quotarules.json").write_text(json.dumps(rules))
        session = Session(Config(path=Path(directory, "saslquota.json")))
        session.store = store
        debits = saslquotactl.debits_of(session.rules, "a@b.c")
        uses = measure(session, [debits])[0]
        fleet.close()
    for use, window in zip(uses, (MINUTE, QUARTER), strict=True):
        assert use["used"] == plain_use(entries, window, now)
        fits_at = first_fit(entries, window, now)
        assert use["fits_at"] == fits_at or now <= use["fits_at"] < fits_at + SECOND == now + SECOND


def test_each_of_several_full_windows_has_its_own_time(local: Site, ctl: Ctl) -> None:
    """Also where more sends are in them than are remembered: it is searched for each."""
    for ago in range(200, 0, -1):
        local.sends(BOB, 1, ago=ago)
    now = local.store.now()
    rows = rows_of(ctl(local, "--json", "show", BOB)[1])
    for row, period, limit in zip(rows[:2], (3600, DAY), (10, 100), strict=True):
        fits_at = datetime.fromisoformat(str(row["fits_at"])).timestamp()
        assert abs(fits_at - (now / SECOND + period - limit)) < 3


def test_an_account_that_is_dated_ahead_counts_to_its_newest_send(local: Site, ctl: Ctl) -> None:
    local.sends(BOB, 3, ago=1800)
    local.sends(BOB, 2, ago=-3000)
    _, said = ctl(local, "top", "-p", "1d")
    assert "2/10 in 1h" in said


def test_the_windows_of_a_thousand_logins(local: Site, ctl: Ctl) -> None:
    """More than are read at once."""
    for number in range(450):
        local.sends(f"user{number}@example.com", 1 + number % 3)
    _, said = ctl(local, "--json", "top", "-n", "1000")
    rows = rows_of(said)
    assert len(rows) == 450
    assert all(row["used"] == row["sent"] for row in rows)


# --- top ------------------------------------------------------------------------------------------


def test_who_sends_most_is_first(site: Site, ctl: Ctl) -> None:
    site.sends(ANN, 4, client_address=HOME)
    site.sends(BOB, 5, ago=7200)
    site.sends(BOB, 5, client_address=HOME)
    site.sends("POOL @example.com", 9)
    site.sends("POOL *", 9)
    status, said = ctl(site, "top")
    assert status == 0
    heading, *found = words(said)
    assert heading == ["SENT", "ADDRESSES", "QUOTA", "LAST", "LOGIN"]
    assert [(row[0], row[1], row[2], row[-1]) for row in found] == [
        ("5", "1", "5/10", BOB),
        ("4", "1", "4/10", ANN),
    ]
    _, said = ctl(site, "top", "-n", "1")
    assert BOB in said
    assert ANN not in said
    _, said = ctl(site, "--json", "top", "-p", "3h")
    assert [(row["login"], row["sent"], row["limit"]) for row in rows_of(said)] == [
        (BOB, 10, 10),
        (ANN, 4, 10),
    ]


def test_the_slow_botnet_is_first_by_addresses(site: Site, ctl: Ctl) -> None:
    site.sends(ANN, 9, client_address=HOME)
    for address in (HOME, CAFE, THIEF):
        site.sends(BOB, 1, client_address=address)
    site.sends("old@example.com", 5)  # of a table of before: no address is known
    site.sends("six@example.com", 1, client_address=bytes(15) + b"\1")
    _, said = ctl(site, "--json", "top", "--addresses")
    assert [(row["login"], row["addresses"]) for row in rows_of(said)] == [
        (BOB, 3),
        (ANN, 1),
        ("six@example.com", 1),
        ("old@example.com", 0),
    ]


def test_a_reset_is_nobodys_send(local: Site, ctl: Ctl) -> None:
    local.sends(BOB, 2, ago=7200)
    local.sends(BOB, 1, recipients=0, epoch=2, total=0)
    assert ctl(local, "top") == (1, "nobody has sent anything in the last 1h\n")


def test_the_window_nearest_its_limit_may_be_a_pools(local: Site, ctl: Ctl) -> None:
    local.sends("kim@school.example", 2)
    local.sends("POOL @school.example", 9)
    _, said = ctl(local, "top")
    assert "9/10 in 1d, pool @school.example" in said


@pytest.mark.parametrize("account", [BOB, "POOL @example.com", "POOL *"])
def test_a_blocked_sender_is_called_so(local: Site, ctl: Ctl, account: str) -> None:
    local.sends(BOB, 12)
    local.event(account, "block")
    _, said = ctl(local, "--json", "top")
    assert rows_of(said)[0]["blocked"] is True
    assert "  blocked  " in ctl(local, "top")[1]


def test_show_of_a_blocked_sender(local: Site, ctl: Ctl) -> None:
    local.sends(BOB, 12)
    local.event(BOB, "block", note="phished")
    lines = ctl(local, "show", BOB)[1].splitlines()
    assert lines[:2] == [f"{BOB}:", "  blocked"]
    assert lines[-1].endswith("block, by root: phished")


def test_a_block_that_is_over_is_none(local: Site, ctl: Ctl) -> None:
    local.sends(BOB, 12)
    local.event(BOB, "block", until=-1)
    assert "12/10 in 1h" in ctl(local, "top")[1]


def test_a_grant_raises_the_limit_while_it_lasts(site: Site, ctl: Ctl) -> None:
    site.sends(BOB, 12)
    site.event(BOB, "grant", amount=20, epoch=1, until=3600)
    assert "12/30 in 1h" in ctl(site, "top")[1]


@pytest.mark.parametrize(("epoch", "used"), [(1, 0), (2, 12)])
def test_after_a_grant_the_count_begins_anew_where_it_stands_in_the_way(
    local: Site, ctl: Ctl, epoch: int, used: int
) -> None:
    local.sends(BOB, 12)
    local.event(BOB, "grant", amount=20, epoch=epoch, until=-1)
    assert f"{used}/10 in 1h" in ctl(local, "top")[1]


def test_what_a_thief_writes_does_not_reach_the_terminal(local: Site, ctl: Ctl) -> None:
    local.sends("b\x1b[2j@example.com", 1, sender="s\x07\u202e@x", client_address=HOME)
    local.event("b\x1b[2j@example.com", "refused", amount=1, note="\x1b]0;x\x07")
    for command in (["top"], ["status"], ["show", "b\x1b[2j@example.com"]):
        _, said = ctl(local, *command)
        assert all(line.isprintable() for line in said.splitlines()), said
        assert "b\\x1b[2j@example.com" in said


@pytest.mark.parametrize("arguments", [["-p", "1y"], ["-p", "0"], ["-n", "0"], ["-n", "x"]])
def test_a_wrong_number_is_an_error_of_use(local: Site, ctl: Ctl, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        ctl(local, "top", *arguments)


# --- show -----------------------------------------------------------------------------------------


def test_show_tells_a_thief_from_the_owner(site: Site, ctl: Ctl) -> None:
    site.sends(BOB, 2, ago=3 * DAY, client_address=HOME)
    site.sends(BOB, 3, ago=600, client_address=HOME)
    site.sends(BOB, 5, ago=60, client_address=THIEF, sender="support@paypa1.example")
    site.event(BOB, "block", ago=60, note="ticket 4711", author="kim")
    site.event(BOB, "unblock", ago=30, number=2)
    status, said = ctl(site, "show", "BOB@example.com")
    assert status == 0
    assert "8/10 in 1h, rule default (80%)\n" in said
    assert ": 8, as 2 senders, from 2 addresses, 1 of them never seen before" in said
    lines = [line.split() for line in said.splitlines()]
    assert [(x[0], *x[3:]) for x in lines if x and x[0] in "35"] == [
        ("5", "support@paypa1.example"),
        ("3", BOB),
        ("5", "192.0.2.3", "new"),
        ("3", "192.0.2.1"),
    ]
    assert "block, by kim: ticket 4711" in said
    _, said = ctl(site, "--json", "show", BOB, "-n", "1")
    rows = rows_of(said)
    assert [row["what"] for row in rows] == ["window", "window", "sender", "address", "event"]
    assert rows[3]["client_address"] == "192.0.2.3"
    assert rows[3]["new"] is True
    assert rows[4]["kind"] == "unblock"


def test_nothing_is_called_new_where_no_address_is_known_from_before(local: Site, ctl: Ctl) -> None:
    local.sends(BOB, 2, ago=3 * DAY)
    local.sends(BOB, 3, client_address=HOME)
    assert "from 1 address, none known from before\n" in ctl(local, "show", BOB)[1]


@pytest.mark.parametrize(
    ("login", "said"),
    [
        (BOB, "12/10 in 1h, rule default (120%): refused until "),
        ("free@example.com", "12/unlimited in 1h, rule free@example.com (0%)\n"),
        ("none@example.com", "12/0 in 1h, rule none@example.com (1200%): refused\n"),
        ("soft@example.com", "12/5 in 1h, rule soft@example.com, not enforced (240%)\n"),
        ("held@example.com", "(240%): held until "),
    ],
)
def test_show_says_when_a_mail_fits_again(local: Site, ctl: Ctl, login: str, said: str) -> None:
    local.sends(login, 12)
    assert said in ctl(local, "show", login)[1]


def test_show_of_a_pool_names_who_fills_it(site: Site, ctl: Ctl) -> None:
    for login, number in (("kim@school.example", 6), ("lee@school.example", 2), (BOB, 1)):
        site.sends(login, number, client_address=HOME)
        site.sends(login, 1, ago=2 * DAY, client_address=HOME)
    site.sends("POOL @school.example", 8)
    _, said = ctl(site, "--json", "show", "@School.example")
    found = rows_of(said)
    assert [(r["account"], r["used"]) for r in found if r["what"] == "window"] == [
        ("@school.example", 8)
    ]
    assert [(r["sender"], r["sent"]) for r in found if r["what"] == "sender"] == [
        ("kim@school.example", 6),
        ("lee@school.example", 2),
    ]
    assert [r["new"] for r in found if r["what"] == "address"] == [None]
    site.event("POOL *", "block")
    _, said = ctl(site, "--json", "show", "*")
    assert [(r["what"]) for r in rows_of(said)] == ["sender"] * 3 + ["address", "event"]


def test_show_of_an_unknown_login_names_the_nearest(site: Site, ctl: Ctl) -> None:
    for login in (BOB, "bobby@example.com", "bob@example.net", "zoe@example.com", "rob@x.example"):
        site.sends(login, 1)
    status, said = ctl(site, "show", "bobb@example.com")
    assert (status, said) == (
        1,
        "saslquotactl: bobb@example.com: has never sent anything;"
        " known: bobby@example.com, bob@example.com\n",
    )
    status, said = ctl(site, "show", "bob@example.nett")
    assert said.endswith("; known: bob@example.net, bob@example.com\n")


def test_a_spool_is_no_sender(site: Site, ctl: Ctl) -> None:
    site.sends("spoo@x.example", 1)
    site.spooled()
    assert [row["login"] for row in rows_of(ctl(site, "--json", "top")[1])] == ["spoo@x.example"]
    with answering(site):
        status, said = ctl(site, "status")
    assert (status, "1 sent by 1 sender in" in said) == (0, True), said
    said = ctl(site, "show", "x 1a2b")[1] + ctl(site, "show", "*", "-p", "2d")[1]
    assert "SPOOL" not in said


@pytest.mark.parametrize("name", ["SPOOL", "SPOOL 1a2b"])
@pytest.mark.parametrize(
    "command",
    [["show"], ["reset"], ["block"], ["unblock"], ["grant"], ["queue"], ["backtest", "--login"]],
    ids=" ".join,
)
def test_there_are_no_orders_for_a_spool(
    local: Site, ctl: Ctl, command: list[str], name: str
) -> None:
    local.spooled()
    status, said = ctl(local, *command, name, *(["9"] if command == ["grant"] else []))
    what = f"saslquotactl: {name} belongs to the daemons' spools, not to a sender;"
    assert (status, said) == (2, f"{what} a login of that name is: {name.lower()}\n")


# --- status ---------------------------------------------------------------------------------------

REPLY = {
    "version": "2.1.0",
    "uptime": 90_000,
    "store": "up",
    "down_since": "",
    "connections": 3,
    "requests_accepted": 10,
    "requests_refused": 2,
    "requests_held": 0,
    "last_request_at": 1_700_000_000,
    "rules_valid": "yes",
}


class Answering(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.rfile.readline()
        reply: dict[str, object] = self.server.reply  # type: ignore[attr-defined]
        self.wfile.write("".join(f"{n}={v}\n" for n, v in reply.items()).encode() + b"\n")


@contextmanager
def answering(site: Site, **changes: object) -> Iterator[None]:
    """A stand-in for the daemon; None leaves a field out."""
    address = LOOPBACK, int(str(site.settings["_bindport"]))
    with socketserver.TCPServer(address, Answering, bind_and_activate=False) as server:
        server.allow_reuse_address = True
        server.server_bind()
        server.server_activate()
        found = {**REPLY, **changes}
        server.reply = {n: v for n, v in found.items() if v is not None}  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def test_a_real_daemon_that_is_well(daemon: StartDaemon, ctl: Ctl) -> None:
    started = daemon()
    site = Site.__new__(Site)
    site.config = started.config_file
    with started.policy() as policy:
        assert policy.ask() == "OK"
        status, said = ctl(site, "status")
        assert ctl(site, "status", "-q") == (0, "")
    assert status == 0, said
    assert "1 accepted" in said
    assert "asked last: never" not in said
    assert "1 sent by 1 sender" in said
    started.stop()
    status, said = ctl(site, "status")
    assert status == 2
    assert "Connection refused" in said
    assert "1 sent by 1 sender" in said, "the store is looked at all the same"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 0),
        ({"store": "down", "down_since": 1_700_000_000}, 2),
        ({"rules_valid": "no"}, 1),
        ({"last_request_at": ""}, 1),
        ({"last_request_at": "", "uptime": 60}, 0),
        ({**dict.fromkeys(REPLY), "version": "3.0"}, 0),
    ],
    ids=str,
)
def test_what_the_daemon_says_of_itself(
    local: Site, ctl: Ctl, change: dict[str, object], status: int
) -> None:
    with answering(local, **change):
        found, said = ctl(local, "status")
        assert found == status, said
        assert ctl(local, "status", "-q") == (status, "")
        assert rows_of(ctl(local, "--json", "status")[1])[0]["what"] == "daemon"


SPOOL = {  # what the daemon says of it, while its database is away
    "store": "probing",
    "down_since": 1_700_000_000,
    "spool": "/var/lib/saslquota/saslquota.spool",
    "spooled_sends": 12,
    "spooled_since": 1_700_000_060,
    "outages": 2,
    "sends_carried_over": 40,
    "spool_errors": 0,
    "last_error": "2003: Can't connect",
}
WELL: dict[str, object] = {"store": "up", "spooled_sends": 0, "last_error": ""}


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        (
            {},
            1,
            r"database down since 14 .*, the daemon counts here: 12 sends since .*: 2003: Can't",
        ),
        (
            {"store": "back"},
            1,
            r"database back, still to be carried over: 12 sends since [\w ]+ [\d:]{5}$",
        ),
        ({"store": "starting"}, 1, "the daemon has just started .* requests wait"),
        (WELL, 0, "empty; since the start 2 outages, 40 sends carried over$"),
        ({**WELL, "spooled_sends": 1}, 1, "still to be carried over: 1 send since "),
        ({**WELL, "last_error": "disk is full"}, 1, "cannot be used, .* 0 sends: disk is full"),
        (
            {"store": "down"},
            2,
            "cannot be used, without it _onfailure is DEFER_IF_PERMIT; holds 12",
        ),
        (
            {name: None for name in SPOOL if name not in ("spool", "store")},
            1,
            "database down, .* here: 0 sends$",
        ),
    ],
    ids=["probing", "back", "starting", "up", "rest", "trouble", "down", "little"],
)
def test_what_the_daemon_says_of_its_spool(
    local: Site, change: dict[str, object], status: int, says: str
) -> None:
    settings = {**local.settings, "_store": "mysql", "_onfailure": "LOCAL"}
    local.config.write_text(json.dumps(settings))
    with answering(local, **{**SPOOL, **change}):
        level, lines, _ = saslquotactl.daemon_part(Session(load_config(local.config, {})))
    assert level == status
    assert re.search(rf"spool    {SPOOL['spool']}: .*{says}", lines[-1]), lines


def test_a_spool_that_is_left_of_another_onfailure(local: Site, ctl: Ctl) -> None:
    with answering(local, **{**SPOOL, "store": "down"}):
        status, said = ctl(local, "status")
    assert status == 2
    assert ": not used, _onfailure is not LOCAL; holds 12 sends since 14 " in said


def test_an_outage_in_which_the_daemon_counts_on_is_a_warning(
    server: MariaDB, database: Database, daemon: StartDaemon, ctl: Ctl
) -> None:
    started = daemon({**database.config(), "_onfailure": "LOCAL"})
    site = Site.__new__(Site)
    site.config = started.config_file
    with started.policy() as policy:
        assert policy.ask() == "OK"
        assert ctl(site, "status", "-q") == (0, "")
        server.kill()
        assert policy.ask() == "OK"
        status, said = ctl(site, "status")
        assert (status, ctl(site, "status", "-q")) == (1, (1, "")), said
        assert re.search("spool    .*: database down since .* counts here: 1 send since .*", said)
        assert "\nstore    127.0.0.1: " in said
        assert ctl(site, "top")[0] == 2
        assert "\nsaslquota_spooling 1\n" in ctl(site, "metrics")[1]
        server.start()
        wait_for(lambda: "spool: empty;" in ctl(site, "status")[1], 20, "an empty spool")
        status, said = ctl(site, "status")
    assert (status, ": empty; since the start 1 outage, 1 send carried over\n" in said) == (0, True)
    assert "2 sent by 1 sender" in said


def test_somebody_is_near_the_limit(site: Site, ctl: Ctl) -> None:
    site.sends(ANN, 7)
    site.sends(BOB, 8)
    for login in ("free", "soft", "none"):
        site.sends(f"{login}@example.com", 20)
    site.sends("POOL @school.example", 9)
    site.sends("gone@example.com", 9, ago=7200)
    site.sends("both@example.com", 9)
    with answering(site):
        status, said = ctl(site, "--json", "status")
    assert status == 1
    near = [row for row in rows_of(said) if row["what"] == "near the limit"]
    assert [(row["account"], row["percent"]) for row in near] == [
        ("@school.example", 90),
        ("both@example.com", 90),
        (BOB, 80),
    ]


def test_somebody_is_refused(site: Site, ctl: Ctl) -> None:
    site.sends(BOB, 12)
    site.event(BOB, "refused", ago=9000, amount=40, last=-60)
    site.event(ANN, "refused", ago=9000, amount=3, last=-4000)
    with answering(site):
        status, said = ctl(site, "status")
    assert status == 1
    assert "refused in the last hour: 1\n" in said
    (line,) = [" ".join(line.split()) for line in said.splitlines() if " 40 " in line]
    assert line.endswith(f" 40 no {BOB} 12/10 in 1h, rule default")
    site.store.run(f"UPDATE events SET told = {site.store.BIND_TIME}", [site.store.now()])
    with answering(site):
        assert f" 40  yes   {BOB}" in ctl(site, "status")[1]


def test_who_is_blocked_needs_a_look_and_who_is_granted_more_does_not(site: Site, ctl: Ctl) -> None:
    site.event(BOB, "grant", amount=2000, epoch=1, until=3600, note="summer sale")
    site.event("old@example.com", "block", until=-1)
    site.event("free@example.com", "block")
    site.event("free@example.com", "unblock", number=2)
    with answering(site):
        status, said = ctl(site, "status")
        assert status == 0
        assert "granted more: 1\n" in said
        assert "grant +2000 until " in said
        assert "\nblocked" not in said
        site.event("POOL @school.example", "block", author="kim")
        status, said = ctl(site, "status")
    assert status == 1
    assert "blocked: 1\n  @school.example: block, by kim\n" in said


def test_rules_with_a_mistake_leave_the_rest(local: Site, ctl: Ctl) -> None:
    local.rules.write_text("{")
    local.event(BOB, "block")
    with answering(local):
        status, said = ctl(local, "status")
    assert status == 1
    assert "quotarules.json" in said
    assert "blocked: 1" in said


def test_no_database(local: Site, ctl: Ctl) -> None:
    local.store.close()
    for path in local.config.parent.glob("saslquota.db*"):
        path.unlink()
    with answering(local):
        status, said = ctl(local, "status")
    assert status == 2
    assert "store    " in said
    assert ctl(local, "top")[0] == 2


@pytest.mark.parametrize("command", [["top"], ["status", "-q"], ["show", BOB]])
def test_without_the_table_of_events(
    tmp_path: Path, database: Database, ctl: Ctl, command: list[str]
) -> None:
    with closing(MySQLStore(mysql_config(database))) as store:
        site = Site(tmp_path, store, database.config())
        site.sends(BOB, 1)
        database.sql("DROP TABLE events")
        with answering(site):
            status, said = ctl(site, *command)
            assert status == 2
            if command != ["status", "-q"]:
                assert said.count("\n") == 1
                assert f"run mysql {database.name} < mysql.sql" in said


# --- Completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("saslquotactl.py ", {"status", "top", "show", "reset", "grant", "block", "unblock"}),
        ("saslquotactl.py -c /etc/x.json un", {"unblock"}),
        ("saslquotactl.py top --", {"--help", "--addresses"}),
        ("saslquotactl.py -c x block -", {"-h", "--help", "--until", "-m"}),
        ("saslquotactl.py -", {"-h", "--help", "-c", "--json", "--version"}),
        ("saslquotactl.py show bo", set()),
    ],
)
def test_completion(tmp_path: Path, line: str, offered: set[str]) -> None:
    """What bash offers at the end of a line."""
    require("bash")
    script = tmp_path / "saslquotactl.py"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/saslquotactl.py "$@"\n')
    script.chmod(0o755)
    words = line.split(" ")
    words[0] = str(script)
    code = '. "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _saslquotactl'
    code += '; printf "%s\\n" "${COMPREPLY[@]}"'
    completion = ROOT / "contrib" / "completion" / "saslquotactl.bash"
    said = run(["bash", "-c", code, completion, *words], env=clean_environment())
    found = set(said.split())
    assert found >= offered
    assert bool(found) is bool(offered)
