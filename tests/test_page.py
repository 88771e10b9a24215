"""The page that saslquotawatch.py serves, in a real browser: what it shows against the database."""

import collections
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from ctl import spool_entries
from helpers import StartDaemon, require
from servers.chromium import Chromium
from servers.daemon import Daemon
from servers.mariadb import Database, MariaDB
from servers.ports import LOOPBACK, free_port

import saslquota
from saslquota import Entry, Store, load_config, make_store
from saslquotactl import clean
from saslquotapage import Server, refused_by_hour, tag

MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
IMAGE = "<img src=x onerror=\"document.title='stolen'\">@evil.example"
QUOTES = "\"a'><script>document.title='stolen'</script>\"@evil.example"
HOSTILE = [
    IMAGE,
    "</td></table></title><base href=//evil.example>",
    "'\" onclick='x' \"",
    "&lt;b&gt;\u202e@evil.example",
    "a\nb@evil.example",
]
RULES = {"default": {"period": 3600, "msgquota": 400, "msg": "no more"}}
Sends = Mapping[str, Sequence[tuple[int, int, str]]]  # how long ago, recipients, address


def note(sender: str) -> str:
    quota = "rule=default, quota 400/400 (100.00%), period=3600"
    return f"{quota}, client_address=192.0.2.7, sender={sender}"


@pytest.fixture(scope="session")
def browser(new_directory: Callable[[], Path]) -> Iterator[Chromium]:
    require("chromium")
    with Chromium(new_directory()) as made:
        yield made


def add_sends(store: Store, sends: Sends) -> int:
    """Returns when, in microseconds since 1970."""
    now = store.now()
    for account, some in sends.items():
        total = 0
        entries = []
        for seq, (ago, recipients, address) in enumerate(sorted(some, reverse=True), 1):
            total += recipients
            packed = saslquota.packed_address(address)
            entries.append(Entry(account, seq, 1, now - ago, recipients, total, "i", seq, packed))
        store.append(entries)
    return now


def add_event(store: Store, account: str, kind: str, **more: int | str | None) -> None:
    bind = store.BIND_TIME
    row: dict[str, int | str | None] = {"account": account, "number": 1, "at": store.now()}
    row |= {"kind": kind, "author": "root", "note": "", **more}
    marks = [bind if name in ("at", "until", "last", "told") else "?" for name in row]
    store.run(f"INSERT INTO events ({', '.join(row)}) VALUES ({', '.join(marks)})", [*row.values()])


@contextmanager
def served(running: Daemon) -> Iterator[tuple[str, Store]]:
    """The page's address, and the store it shows."""
    config = load_config(running.config_file, {"_http": f"{LOOPBACK}:{free_port()}"})
    store = make_store(config)
    store.open()
    with Server(config) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield f"http://{config.http}/", store
        finally:
            server.shutdown()
            thread.join()
            store.close()


def table(browser: Chromium, title: str) -> list[list[str]]:
    """The cells of the table below a heading, as a reader sees them."""
    found: list[list[str]] = browser.run(
        f"""[...document.querySelectorAll('h2')].filter(one => one.innerText == '{title}').map(
        one => [...one.nextElementSibling.querySelectorAll('tr')].slice(1).map(
        row => [...row.cells].map(cell => cell.innerText)))[0]"""
    )
    return found


def bars(browser: Chromium, kind: str) -> list[dict[str, int]]:
    """What the bars of each chart say, by hour; and that they are as high as that."""
    found: list[list[list[str]]] = browser.run(
        f"""[...document.querySelectorAll('svg')].map(svg => [...svg.querySelectorAll('.{kind}')]
        .map(bar => [bar.querySelector('title').textContent, bar.getAttribute('height')]))"""
    )
    charts = []
    for chart in found:
        numbers = {}
        heights = set()
        for text, height in chart:
            hour, number = re.fullmatch(r"(.*): (\d+) \w+", text).groups()  # type: ignore[union-attr]
            numbers[hour] = int(number)
            heights.add(round(float(height) / int(number), 1) if int(number) > 20 else 0)
        assert len(heights - {0}) <= 1, chart
        charts.append(numbers)
    return charts


def by_hour(now: int, sends: Sends, hours: int) -> dict[str, int]:
    """What a chart must say of sends that were written then."""
    found: collections.Counter[str] = collections.Counter()
    for some in sends.values():
        for ago, recipients, _ in some:
            hour = (now - ago) // HOUR
            if hour > now // HOUR - hours:
                found[time.strftime("%d %b %H:%M", time.localtime(hour * 3600))] += recipients
    return found


@pytest.mark.parametrize("kind", ["sqlite", "mariadb"])
def test_it_shows_what_is_in_the_database(
    kind: str, browser: Chromium, daemon: StartDaemon, request: pytest.FixtureRequest
) -> None:
    config: dict[str, object] = {}
    if kind == "mariadb":
        database: Database = request.getfixturevalue("database")
        config = database.config()
    bob, eve, pool = "bob@example.com", "eve@law.example", "POOL @example.com"
    sends = {
        bob: [(MINUTE * i, 7, "192.0.2.7") for i in range(1, 55)],
        eve: [(HOUR * 3 + MINUTE * i, 1, f"198.51.100.{i}") for i in range(9)]
        + [(DAY * 2, 30, "192.0.2.1")],
        "old@example.com": [(DAY * 5 + i * HOUR, 100, "192.0.2.2") for i in range(9)],
    }
    with served(daemon(config, RULES)) as (url, store):
        now = add_sends(store, sends)
        add_sends(store, {pool: sends[bob]})  # is not counted twice
        store.append(spool_entries(now))  # nor at all
        last = {"at": now - 2 * HOUR, "last": now - MINUTE, "amount": 90}
        add_event(store, bob, "refused", note=note("x@y.example"), told=now, **last)
        add_event(store, pool, "refused", note=note("z@y.example"), amount=3, last=now)
        over = now - 2 * HOUR
        add_event(store, "past@example.com", "refused", amount=1, at=over, last=over)
        add_event(store, "thief@example.com", "block", note="ticket 4711")
        add_event(store, "news@example.com", "grant", amount=500, epoch=1, until=now + HOUR)
        add_event(store, "ended@example.com", "grant", amount=500, epoch=1, until=now - HOUR)
        browser.open(url)
        assert bars(browser, "s") == [by_hour(now, sends, 24), by_hour(now, sends, 168)]
        refused = [sum(one.values()) for one in bars(browser, "r")]
    assert refused == [94, 94]
    first, second = table(browser, "Refused in the last hour")
    assert first[0] == "@example.com"
    assert first[2:4] == ["3", "no"]
    assert second[0] == bob
    assert second[2:4] == ["90", "yes"]
    assert second[4] == (
        "400/400 in 1h, rule default, from 192.0.2.7 as <x@y.example>, from 1 addresses"
    )
    verbs = ("show", "block", "queue", "reset")
    assert second[5].split("\n") == [f"saslquotactl.py {verb} {bob}" for verb in verbs]
    ((who, order, todo),) = table(browser, "Blocked")
    assert (who, order) == ("thief@example.com", "block, by root: ticket 4711")
    assert todo == "saslquotactl.py unblock thief@example.com"
    ((who, order, _),) = table(browser, "Granted")
    assert who == "news@example.com"
    assert order.startswith("grant +500 until ")
    ((who, sent, addresses, _, quota),) = table(browser, "Most sent in the last hour")
    assert (who, sent, addresses, quota) == (bob, "378", "1", "378/400 in 1h, rule default (94%)")
    assert browser.run("document.querySelector('meter').value") == 94
    ((who, what, _),) = table(browser, "Unusual: 5 or more new addresses in a day")
    assert (who, what) == (eve, "9 sent, from 9 addresses, 9 of them never seen before")
    (top,) = browser.texts("pre")
    assert "saslquota 2." in top
    assert str(store) in top


def test_hostile_names_stay_text_and_nothing_leaves_the_host(
    browser: Chromium, daemon: StartDaemon
) -> None:
    with served(daemon(rules=RULES)) as (url, store):
        for account in HOSTILE:
            add_sends(store, {account: [(MINUTE, 1, "192.0.2.7")]})
            add_event(store, account, "refused", note=note(QUOTES), amount=2, last=store.now())
        for kind, account in (("block", QUOTES), ("grant", IMAGE + "2")):
            more: dict[str, int | str | None] = {"note": IMAGE, "amount": 1, "epoch": 1}
            add_event(store, account, kind, author=IMAGE, **more)
        browser.open(url)
        assert browser.requested() == [url, "data:,"] or browser.requested() == [url]
        assert browser.complaints() == []
    assert browser.run("document.title") == f"saslquota on {clean(socket.gethostname())}"
    forbidden = "img,script,base,a,iframe,object,form,input,link:not([rel=icon])"
    assert browser.run(f"document.querySelectorAll('{forbidden}').length") == 0
    handlers = "[...document.querySelectorAll('*')].flatMap(one => [...one.attributes])"
    assert browser.run(f"{handlers}.filter(one => one.name.startsWith('on')).length") == 0
    rows = table(browser, "Refused in the last hour")
    assert {row[0] for row in rows} == set(map(clean, HOSTILE))
    assert {row[4] for row in rows} == {
        f"400/400 in 1h, rule default, from 192.0.2.7 as <{QUOTES}>, from 1 addresses"
    }
    ((who, order, _),) = table(browser, "Blocked")
    assert (who, order) == (QUOTES, f"block, by {IMAGE}: {IMAGE}")


def test_its_policy_stops_what_would_not_be_escaped(browser: Chromium, daemon: StartDaemon) -> None:
    with served(daemon(rules=RULES)) as (url, _):
        browser.open(url)
        browser.run(f"document.body.insertAdjacentHTML('beforeend', `{IMAGE}`)")
        browser.run("new Promise(done => setTimeout(done, 200))")
        assert browser.run("document.title") != "stolen"
        complaints = str(browser.complaints())
        for directive in ("img-src", "script-src"):
            assert re.search(f"Content Security Policy.*{directive}", complaints), complaints


def test_it_fits_a_phone_and_light_and_dark(browser: Chromium, daemon: StartDaemon) -> None:
    with served(daemon(rules=RULES)) as (url, store):
        long = "x" * 60 + "@example.com"
        add_event(store, long, "refused", note=note(QUOTES), amount=2, last=store.now())
        colours = set()
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.call("Emulation.setEmulatedMedia", features=[feature])
            size = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
            browser.call("Emulation.setDeviceMetricsOverride", **size)
            browser.open(url)
            assert browser.run("document.documentElement.scrollWidth") <= 360
            assert browser.run("innerWidth") == 360
            style = "getComputedStyle(document.querySelector('h1')).color"
            colours.add(browser.run(style))
        browser.call("Emulation.clearDeviceMetricsOverride")
        browser.call("Emulation.setEmulatedMedia", features=[])
        assert len(colours) == 2
        refresh = "document.querySelector('meta[http-equiv=refresh]').content"
        assert browser.run(refresh) == "60"


def test_it_says_what_is_down(browser: Chromium, daemon: StartDaemon) -> None:
    running = daemon(rules=RULES)
    with served(running) as (url, _):
        running.kill9()
        running.ledger.rename(running.ledger.with_suffix(".away"))
        browser.open(url)
        complaints = browser.texts("b")
    assert len(complaints) == 2
    assert complaints[0].startswith(f"daemon   {LOOPBACK}")
    assert complaints[1].startswith("database ")


def test_it_says_that_the_daemon_counts_on_without_its_database(
    browser: Chromium, daemon: StartDaemon, server: MariaDB, database: Database
) -> None:
    running = daemon({**database.config(), "_onfailure": "LOCAL"}, RULES)
    with served(running) as (url, _), running.policy() as policy:
        server.kill()
        assert policy.ask() == "OK"
        browser.open(url)
        *_, spool, away = browser.texts("b")
    assert re.match(r"spool    .*: database down since .* counts here: 1 send since ", spool)
    assert away.startswith("database ")


def test_broken_rules_leave_the_rest(browser: Chromium, daemon: StartDaemon) -> None:
    running = daemon(rules=RULES)
    with served(running) as (url, store):
        add_sends(store, {"bob@example.com": [(MINUTE, 1, "192.0.2.7")]})
        add_event(store, "bob@example.com", "refused", note=note("a@b"), amount=2, last=store.now())
        (running.directory / "quotarules.json").write_text("{")
        browser.open(url)
        assert len(table(browser, "Refused in the last hour")) == 1
        assert "quotarules.json" in "".join(browser.texts("b"))


# --- Without a browser ----------------------------------------------------------------------------


def test_all_that_is_no_html_is_escaped() -> None:
    found = tag("td", IMAGE, tag("b", "<i>"), title='"><script>', class_=QUOTES)
    assert re.findall("<(/?[a-z]+)", found) == ["td", "b", "/b", "/td"]
    assert found.count('"') == 4


def test_refusals_are_spread_from_the_first_to_the_last() -> None:
    now = 100 * HOUR

    def spread(at: int, last: int | None, amount: int) -> dict[int, int]:
        return {
            h: n
            for h, n in refused_by_hour([{"at": at, "last": last, "amount": amount}], now).items()
            if n
        }

    assert spread(90 * HOUR, None, 7) == {90: 7}
    assert spread(90 * HOUR, 92 * HOUR, 8) == {90: 2, 91: 3, 92: 3}
    assert spread(99 * HOUR, 10**9 * HOUR, 2) == {99: 1, 100: 1}
    assert spread(90 * HOUR, 10 * HOUR, 7) == {}
