"""What saslquotawatch.py serves over HTTP: a page, and metrics. Not run by itself.

Logins, senders and notes are chosen by thieves, too: everything that is not an Html is escaped, and
the page needs no script, so the browser is told to run none. A request has a thread, of which there
are few, and ends in time. Page and metrics are kept for some seconds, and have a connection to the
database each.
"""

from __future__ import annotations

import collections
import contextlib
import html
import http.server
import ipaddress
import math
import re
import shlex
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import saslquota
import saslquotactl as ctl
from saslquota import POOL_PREFIX, Config, RateLimit, SaslQuotaError, SQLiteStore, Store
from saslquotactl import HOUR, Row, Session, clean, format_moment, spelled

DAY = 24 * HOUR  # microseconds
complaints: dict[str, RateLimit] = collections.defaultdict(lambda: RateLimit(60.0))  # by kind


def complain(kind: str, text: object) -> None:
    """Say what does not work, each kind of it once a minute."""
    if complaints[kind].allows():
        print(f"saslquotawatch: {kind}: {clean(text)}", file=sys.stderr, flush=True)


class Database:
    """Hands out a Session to one thread at a time, a new one after an error."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._session: Session | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        session, self._session = self._session or Session(self._config), None
        try:
            yield session
        except BaseException:
            session.close()
            raise
        for name in ("now", "rules"):  # to be read again
            vars(session).pop(name, None)
        self._session = session


# --- Incidents ------------------------------------------------------------------------------------

NOTE = re.compile(  # see saslquota.incident_text()
    r"rule=(?P<rule>.*), quota (?P<quota>\S+) \(.*?\), period=(?P<period>[0-9]{1,9})"
    r", client_address=(?P<address>.*?), sender=(?P<sender>.*)"
)


def run(store: Store, sql: str, values: Sequence[int]) -> list[Any]:
    """As Store.run(); TIME stands for a value."""
    return store.run(re.sub(r"\bTIME\b", store.BIND_TIME, sql), values)


def why(event: Row) -> tuple[str, str]:
    """What an incident's note says: which quota; from where, as whom."""
    if not (found := NOTE.fullmatch(event["note"])):
        return event["note"], ""
    quota = f"{found['quota']} in {saslquota.format_time(int(found['period']))}"
    return f"{quota}, rule {found['rule']}", f", from {found['address']} as <{found['sender']}>"


def is_enforced(session: Session, event: Row) -> bool:
    """Whether an incident's quota refuses anything, as the rules are now."""
    account, note = event["account"], NOTE.fullmatch(event["note"])
    with contextlib.suppress(saslquota.ConfigError):
        debits = ctl.debits_of(session.rules, account)[:1]
        for window in (window for debit in debits for window in debit.windows):
            if note and note.group("rule", "period") == (window.rule, str(window.period)):
                return window.refuses
    return True


def command(verb: str, account: str) -> str:
    """A command line to be copied."""
    name = clean(spelled(account))
    return f"saslquotactl.py {verb} {'-- ' if name[:1] == '-' else ''}{shlex.quote(name)}"


def origins(store: Store, account: str, start: int) -> tuple[list[Row], list[Row], int, str]:
    """Senders and addresses of what was sent since then, see sends_of(); how many are new."""
    senders, addresses = ctl.sends_of(store, account, start)
    new = [row["new"] for row in addresses]
    number = sum(map(bool, new))
    seen = f", {number} of them never seen before" if None not in new else ""
    return senders, addresses, number, f", from {len(new)} addresses{seen}" if new else ""


# --- Page -----------------------------------------------------------------------------------------

FEW = 20  # rows of a list
UNUSUAL = 5  # addresses in a day that a login has never had before
STYLE = """
:root{color-scheme:light dark;--s:#2a78d0;--r:#d43a3a;--l:#8884}
body{font:15px/1.45 system-ui,sans-serif;margin:1em auto;max-width:80em;padding:0 .8em}
h1{font-size:1.3em}h2{font-size:1em;margin:1.6em 0 .3em}p{margin:.3em 0}b{color:var(--r)}
pre{white-space:pre-wrap}table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.25em .8em .25em 0;border-top:1px solid var(--l)}
td{overflow-wrap:anywhere;min-width:5em}td:first-child{min-width:11em}
code{display:block;user-select:all;font-size:.85em;min-width:24em}
svg{width:100%;height:7em;border-bottom:1px solid var(--l)}
.s{fill:var(--s);color:var(--s)}.r{fill:var(--r);color:var(--r)}
.x{display:flex;justify-content:space-between;font-size:.8em}
@media(max-width:56em){tr,td{display:block}th,tr:first-child{display:none}td{border:0;padding:0}
tr{border-top:1px solid var(--l);padding:.4em 0}code{min-width:0}
td::before{content:attr(data-of)": ";opacity:.6}
.x :nth-child(even){display:none}}
"""
CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


class Html(str):
    """A text that is HTML already."""


def escaped(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(clean(value))


def tag(element: str, *content: object, **attributes: object) -> Html:
    """An element. What is not Html is escaped: thieves choose logins and senders."""
    given = "".join(f' {name.strip("_")}="{escaped(v)}"' for name, v in attributes.items())
    return Html(f"<{element}{given}>{''.join(map(escaped, content))}</{element}>")


def listed(title: str, heading: str, rows: Iterable[Sequence[object]]) -> Html:
    names = heading.split(", ")
    head = tag("tr", *(tag("th", name) for name in names))
    lines = []
    for row in rows:
        cells = [
            tag("td", cell, **{"data-of": name}) for name, cell in zip(names, row, strict=False)
        ]
        lines.append(tag("tr", *cells))
    body = tag("table", head, *lines) if lines else tag("p", "nobody")
    return Html(tag("h2", title) + body)


def chart(title: str, sent: Mapping[int, int], refused: Mapping[int, int], hours: range) -> Html:
    """A bar for each hour since 1970: what was refused stands on what was sent."""
    most = max(1, *(sent.get(hour, 0) + refused.get(hour, 0) for hour in hours))
    bars = []
    for place, hour in enumerate(hours):
        y, at = 100.0, time.strftime("%d %b %H:%M", time.localtime(hour * 3600))
        for kind, of in (("sent", sent), ("refused", refused)):
            if number := of.get(hour, 0):
                high = 100 * number / most
                y -= high
                words = tag("title", f"{at}: {number} {kind}")
                size: dict[str, object] = {"y": f"{y:.2f}", "height": f"{high:.2f}", "width": 0.9}
                bars.append(tag("rect", words, class_=kind[0], x=place, **size))
    sums = [sum(of.get(hour, 0) for hour in hours) for of in (sent, refused)]
    blue, red = (tag("span", "\u25a0", class_=kind) for kind in "sr")
    text = f" {sums[1]} refused; {most} in an hour at most"
    legend = tag("p", blue, f" {sums[0]} sent ", red, text)
    box = {"viewBox": f"0 0 {len(hours)} 100", "preserveAspectRatio": "none", "role": "img"}
    times = [time.localtime(3600 * hours[part * (len(hours) - 1) // 4]) for part in range(5)]
    axis = tag("p", *(tag("span", time.strftime("%d %b %H:%M", at)) for at in times), class_="x")
    return Html(tag("h2", title) + legend + tag("svg", *bars, **box) + axis)


def recipients_by_hour(store: Store, known: dict[int, int], hour: int) -> None:
    """Bring what is known of each hour up to date: what is older than the last two stays."""
    divided = f"{'/' if isinstance(store, SQLiteStore) else 'DIV'} {HOUR}"
    what = f"{store.TIME.format('at')} {divided}"
    sql = f"SELECT {what}, CAST(SUM(recipients) AS SIGNED) FROM sends WHERE at >= TIME"
    first = max(hour - 24 * 7, min(hour, max(known, default=0)) - 1)
    known.update(run(store, f"{sql} AND {ctl.IS_LOGIN} GROUP BY {what}", [first * HOUR]))


def refused_by_hour(events: Iterable[Row], now: int) -> dict[int, int]:
    """When is not known: evenly from an incident's first to its last."""
    found: collections.Counter[int] = collections.Counter()
    for event in events:
        hours = range(event["at"] // HOUR, min(event["last"] or event["at"], now) // HOUR + 1)
        parts = [event["amount"] * place // len(hours) for place in range(len(hours) + 1) if hours]
        found.update({hour: b - a for hour, a, b in zip(hours, parts, parts[1:], strict=False)})
    return found


def refused_now(session: Session, events: Iterable[Row]) -> Iterator[Sequence[object]]:
    now = session.now
    recent = [event for event in events if (event["last"] or event["at"]) >= now - HOUR]
    for event in sorted(recent, key=lambda event: -event["at"])[:FEW]:
        account, since = event["account"], format_moment(event["at"], now)
        verbs, text = ["show", "reset"], ""
        if not account.startswith(POOL_PREFIX):
            verbs = ["show", "block", "queue", "reset"]
            text = origins(session.store, account, event["at"] - DAY)[3]
        todo = Html("".join(tag("code", command(verb, account)) for verb in verbs))
        told, reason = "yes" if event["told"] else "no", "".join(why(event)) + text
        yield spelled(account), since, event["amount"], told, reason, todo


def ordered(session: Session, kind: str, verb: str) -> Iterator[Sequence[object]]:
    for order in ctl.newest_orders(session.store):
        if ctl.is_in_force(order, kind, session.now):
            todo = tag("code", command(verb, order["account"]))
            yield spelled(order["account"]), ctl.describe_event(order, session.now), todo


def top(session: Session, rows: Sequence[Row]) -> Iterator[Sequence[object]]:
    found: list[list[Row]] = [[] for _ in rows]
    with contextlib.suppress(saslquota.ConfigError):
        found = ctl.measure(session, [ctl.debits_of(session.rules, row["account"]) for row in rows])
    now = session.store.now()
    for row, uses in zip(rows, found, strict=True):
        use = ctl.fullest(uses)
        quota = ctl.describe_fullness(use, now) if use else ""
        meter = tag("meter", max=100, high=ctl.NEAR, value=use.get("percent", 0))
        yield row["account"], row["sent"], row["addresses"], meter, quota


def unusual(session: Session, rows: Iterable[Row]) -> Iterator[Sequence[object]]:
    start = session.now - DAY
    for row in [row for row in rows if row["addresses"] >= UNUSUAL][:FEW]:
        _, _, new, text = origins(session.store, row["account"], start)
        if new >= UNUSUAL:
            todo = tag("code", command("show", row["account"]))
            yield row["account"], f"{row['sent']} sent{text}", todo


def rules_line(session: Session) -> Html:
    try:
        return tag("span", f"rules    {session.config.quotafile}: {len(list(session.rules))} rules")
    except saslquota.ConfigError as error:
        return tag("b", f"rules    {error}")


class Page:
    """Makes the page. Used by one thread at a time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._database = Database(config)
        self._sent: dict[int, int] = {}  # by hour

    def make(self) -> bytes:
        level, said, _ = ctl.daemon_part(Session(self._config))
        lines = [tag("b" if level else "span", line) for line in said]
        parts: list[Html] = []
        try:
            with self._database.session() as session:
                lines += [tag("span", f"store    {session.store}"), rules_line(session)]
                parts = list(self._tables(session))
        except SaslQuotaError as error:
            lines.append(tag("b", f"database {error}"))
        parts.insert(0, tag("pre", Html("\n".join(lines))))
        title = f"saslquota on {socket.gethostname()}"
        head = (
            '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">'
            '<meta name="viewport" content="width=device-width"><meta http-equiv="refresh"'
            f' content="60"><style>{STYLE}</style>{tag("title", title)}{tag("h1", title)}'
        )
        return f"{head}{''.join(parts)}</html>\n".encode()

    def _tables(self, session: Session) -> Iterator[Html]:
        store, now = session.store, session.now
        hour = now // HOUR
        recipients_by_hour(store, self._sent, hour)
        events = ctl.read_events(store, "kind = 'refused' AND at >= TIME", [now - 8 * DAY])
        for title, hours in (("Last 24 hours", 24), ("Last 7 days", 24 * 7)):
            span = range(hour - hours + 1, hour + 1)
            yield chart(title, self._sent, refused_by_hour(events, now), span)
        heading = "who, since, refused, told, why, what to do"
        yield listed("Refused in the last hour", heading, refused_now(session, events))
        for title, kind, verb in (("Blocked", "block", "unblock"), ("Granted", "grant", "show")):
            yield listed(title, "who, order, what to do", ordered(session, kind, verb))
        heading = "who, sent, addresses, used, of its fullest window"
        rows = ctl.tally(store, "account", f"at >= TIME AND {ctl.IS_LOGIN}", [now - HOUR])[:FEW]
        yield listed("Most sent in the last hour", heading, top(session, rows))
        rows = ctl.tally(store, "account", f"at >= TIME AND {ctl.IS_LOGIN}", [now - DAY])
        rows.sort(key=lambda row: -row["addresses"])
        title = f"Unusual: {UNUSUAL} or more new addresses in a day"
        yield listed(title, "who, what, what to do", unusual(session, rows))


# --- HTTP -----------------------------------------------------------------------------------------

MAX_REQUESTS = 16  # at once
REBIND = 60.0  # seconds until an address that is in use is tried again
TIMEOUT = 5.0  # seconds for a request, for another thread that makes what it wants, for the reply
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Allow": "GET, HEAD",
}


class Kept:
    """What is served for some seconds before it is made anew, by one thread."""

    def __init__(self, make: Callable[[], bytes], seconds: float) -> None:
        self._make, self._seconds = make, seconds
        self._content, self._stale_at = b"", -math.inf
        self._lock = threading.Lock()

    def get(self) -> bytes:
        """The content; an old one, or none, while another thread takes long to make it."""
        if time.monotonic() >= self._stale_at and self._lock.acquire(timeout=TIMEOUT):
            try:
                if time.monotonic() >= self._stale_at:
                    self._content = self._make()
                    self._stale_at = time.monotonic() + self._seconds
            finally:
                self._lock.release()
        return self._content


class Server(http.server.ThreadingHTTPServer):
    """Serves the page and the metrics to whoever can connect."""

    request_queue_size = 128

    def __init__(self, config: Config) -> None:
        host, port = saslquota.split_host(config.http, 10009) or ("", 0)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._config, self._database = config, Database(config)
        self.contents = {
            "/": ("text/html; charset=utf-8", Kept(Page(config).make, 15.0)),
            "/metrics": ("text/plain; version=0.0.4; charset=utf-8", Kept(self._metrics, 2.0)),
        }
        self._free = threading.Semaphore(MAX_REQUESTS)
        self.reading: dict[Any, float] = {}  # since when, in monotonic seconds
        super().__init__((host, port), Handler)

    def _metrics(self) -> bytes:
        said: dict[str, str] = {}
        counted: dict[str, int] = {}
        with contextlib.suppress(ctl.ControlError):
            said = ctl.ask_daemon(self._config)
        try:
            with self._database.session() as session:
                counted = ctl.count_for_metrics(session.store)
        except SaslQuotaError as error:
            complain("database", error)
        return ctl.metrics_text(said, counted).encode()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own; if there are too many, who is slowest to ask has to go."""
        if not self._free.acquire(blocking=False):
            for slowest in list(self.reading)[:1]:
                self._give_up(slowest)
            if not self._free.acquire(timeout=1.0):
                self.shutdown_request(request)
                return
        self.reading[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.reading.pop(request, None)
            self._free.release()

    def service_actions(self) -> None:
        """Twice a second: give up whoever takes too long to ask."""
        for request, since in list(self.reading.items()):
            if time.monotonic() - since > TIMEOUT:
                self._give_up(request)

    def _give_up(self, request: Any) -> None:
        self.reading.pop(request, None)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # else the client has gone
            complain("http", traceback.format_exc())


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    timeout = TIMEOUT

    def version_string(self) -> str:
        return "saslquota"

    def do_GET(self) -> None:
        self.server.reading.pop(self.request, None)
        kind, kept = self.server.contents.get(self.path.partition("?")[0], ("", None))
        if not is_ours(self.headers.get("Host", "")):
            self.send_error(421)
        elif not kept:
            self.send_error(404)
        elif content := kept.get():
            self._reply(200, kind, content)
        else:
            self.send_error(503)

    do_HEAD = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        code = 405 if code == 501 else code
        self._reply(code, "text/plain", f"{code} {http.HTTPStatus(code).phrase}\n".encode())

    def _reply(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        for name, value in {**HEADERS, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing: who asks is of no interest."""


def is_ours(host: str) -> bool:
    """Whether a request is for this server by address, or as localhost. Under any other name it may
    be a foreign page's, whose name has come to mean this address (DNS rebinding)."""
    name, _ = saslquota.split_host(host, 80) or ("", 0)
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in ("", "localhost", socket.gethostname())


def serve(config: Config) -> None:
    """Serve as soon as the address can be had, and for ever."""
    while True:
        try:
            with Server(config) as server:
                server.serve_forever()
        except OSError as error:
            complain("http", f"cannot listen on {config.http}: {error.strerror or error}")
        time.sleep(REBIND)
