"""Figures for Prometheus: their text, the alerts on them, and the server that saslquotawatch.py
gives them by."""

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import StartDaemon, require
from servers.daemon import Daemon
from servers.mariadb import Database
from servers.ports import LOOPBACK, free_port
from servers.process import ROOT, clean_environment, run, wait_for

import saslquotapage
from saslquota import load_config, make_store
from saslquotactl import metrics_text
from saslquotapage import Server

CONTRIB = ROOT / "contrib/prometheus"
SAID = {
    "version": "2.1.0",
    "uptime": "1036800",
    "store": "up",
    "down_since": "",
    "connections": "37",
    "incidents": "4",
    "requests_accepted": "216000",
    "requests_not_enforced": "0",
    "recipients": "431000",
    "decision_seconds_le_0.001": "200000",
    "decision_seconds_le_0.005": "215000",
    "decision_seconds_le_0.025": "215900",
    "decision_seconds_le_0.1": "216000",
    "decision_seconds_le_1": "216000",
    "decision_seconds_le_inf": "216000",
    "decision_seconds_sum": "123.456000",
    "first_request_at": "1795730003",
    "rules_valid": "no",
    "log_lines_lost": "0",
}
SPOOLING = {  # with _onfailure LOCAL, while the database is away
    **SAID,
    "store": "probing",
    "spool": "/var/lib/saslquota/saslquota.spool",
    "spooled_sends": "812",
    "spooled_since": "1795730000",
    "outages": "2",
    "sends_carried_over": "4711",
    "spool_errors": "1",
    "last_error": "2003: Can't connect",
}
COUNTED = {"refused_senders": 3, "blocked_senders": 1, "incidents_untold": 2}


def values(text: str) -> dict[str, float]:
    """As Prometheus reads it."""
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


# --- The text -------------------------------------------------------------------------------------


def test_what_the_daemon_says_and_what_is_in_the_tables() -> None:
    found = values(metrics_text(SAID, COUNTED))
    assert found == {
        "saslquota_up": 1,
        'saslquota_info{version="2.1.0"}': 1,
        "saslquota_uptime_seconds": 1036800,
        "saslquota_store_up": 1,
        "saslquota_rules_valid": 0,
        "saslquota_connections": 37,
        "saslquota_recipients_total": 431000,
        "saslquota_incidents_total": 4,
        "saslquota_log_lines_lost_total": 0,
        'saslquota_requests_total{verdict="accepted"}': 216000,
        'saslquota_requests_total{verdict="not_enforced"}': 0,
        'saslquota_decision_seconds_bucket{le="0.001"}': 200000,
        'saslquota_decision_seconds_bucket{le="0.005"}': 215000,
        'saslquota_decision_seconds_bucket{le="0.025"}': 215900,
        'saslquota_decision_seconds_bucket{le="0.1"}': 216000,
        'saslquota_decision_seconds_bucket{le="1"}': 216000,
        'saslquota_decision_seconds_bucket{le="+Inf"}': 216000,
        "saslquota_decision_seconds_sum": 123.456,
        "saslquota_decision_seconds_count": 216000,
        "saslquota_refused_senders": 3,
        "saslquota_blocked_senders": 1,
        "saslquota_incidents_untold": 2,
    }


@pytest.mark.parametrize(
    ("store", "is_up", "spooling"),
    [("up", 1, 0), ("starting", 0, 0), ("probing", 0, 1), ("back", 1, 1), ("down", 0, 0)],
)
def test_what_the_daemon_says_of_its_spool(store: str, is_up: int, spooling: int) -> None:
    found = values(metrics_text({**SPOOLING, "store": store}, {}))
    without = values(metrics_text(SAID, {}))
    assert {name: value for name, value in found.items() if value != without.get(name)} == {
        **({} if is_up else {"saslquota_store_up": 0}),
        "saslquota_spooling": spooling,
        "saslquota_spooled_sends": 812,
        "saslquota_outages_total": 2,
        "saslquota_carried_total": 4711,
        "saslquota_spool_errors_total": 1,
    }


def test_a_daemon_that_does_not_answer_is_down() -> None:
    assert values(metrics_text({}, {})) == {"saslquota_up": 0}


@pytest.mark.parametrize("missing", SPOOLING)
def test_a_line_that_the_daemon_does_not_say_takes_no_other_along(missing: str) -> None:
    some = {name: value for name, value in SPOOLING.items() if name != missing}
    everything = values(metrics_text(SPOOLING, COUNTED))
    found = values(metrics_text(some, COUNTED))
    assert found.items() <= everything.items()
    needed = {"decision_seconds_le_inf": 8, "decision_seconds_sum": 8, "store": 2}
    assert len(everything) - len(found) <= needed.get(missing, 1)


@pytest.mark.parametrize("value", ["", "many", '1"} 5\nsaslquota_up 0', "-1", "1e5", "0x10"])
def test_a_value_that_is_no_number_is_left_out(value: str) -> None:
    said = {"version": f"{value} ", "connections": value, "requests_refused": value}
    assert values(metrics_text(said, {})) == {"saslquota_up": 1}


def check_metrics(text: str) -> None:
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_promtool_takes_the_text() -> None:
    require("promtool")
    check_metrics(metrics_text(SPOOLING, COUNTED))
    check_metrics(metrics_text({}, {}))


# --- Alerts ---------------------------------------------------------------------------------------

FIRES = [  # a series every minute, the alert, and when
    ('saslquota_up{instance="a"}', "1 0x9", "SaslquotaDown", "3m"),
    ('up{job="saslquota",instance="a"}', "1 0x9", "SaslquotaDown", "3m"),
    ('saslquota_store_up{instance="a"}', "1 0x9", "SaslquotaStoreDown", "3m"),
    ('saslquota_requests_total{verdict="fallback"}', "0 0 7x9", "SaslquotaFallback", "3m"),
    ('saslquota_requests_total{verdict="uncounted"}', "0 0 7x9", "SaslquotaUncounted", "3m"),
    ("saslquota_incidents_total", "0+1x70", "SaslquotaManyIncidents", "70m"),
    ("saslquota_incidents_untold", "1x30", "SaslquotaIncidentsUntold", "16m"),
    ("saslquota_rules_valid", "0x30", "SaslquotaRulesInvalid", "6m"),
    ("saslquota_log_lines_lost_total", "0 5x9", "SaslquotaLogLinesLost", "3m"),
    ("saslquota_spooling", "0 1x30", "SaslquotaSpooling", "12m"),
    ("saslquota_spooled_sends", "0 5x30", "SaslquotaSpooling", "12m"),
    ("saslquota_spool_errors_total", "0 1x9", "SaslquotaSpoolFails", "3m"),
]
QUIET = [
    ('saslquota_up{instance="a"}', "1x9", "SaslquotaDown", "3m"),
    ('saslquota_requests_total{verdict="fallback"}', "7x9", "SaslquotaFallback", "3m"),
    ('saslquota_requests_total{verdict="refused"}', "0+50x9", "SaslquotaFallback", "3m"),
    ("saslquota_incidents_total", "0+0.05x70", "SaslquotaManyIncidents", "70m"),
    ("saslquota_incidents_untold", "1x5 0x30", "SaslquotaIncidentsUntold", "16m"),
    ("saslquota_spooling", "0 1x8 0x30", "SaslquotaSpooling", "12m"),
    ("saslquota_spooled_sends", "0x30", "SaslquotaSpooling", "12m"),
    ("saslquota_spool_errors_total", "1x9", "SaslquotaSpoolFails", "3m"),
]


def test_promtool_finds_the_alerts_right(tmp_path: Path) -> None:
    require("promtool")
    rules = CONTRIB / "saslquota.rules.yml"
    run(["promtool", "check", "rules", rules])
    alerts = {alert for _, _, alert, _ in FIRES} | {"SaslquotaSlow"}
    assert set(re.findall(r"alert: (\w+)", rules.read_text("utf-8"))) == alerts
    command = ["promtool", "test", "rules"]
    for fires, cases in ((True, FIRES), (False, QUIET)):
        for number, (series, numbers, alert, at) in enumerate(cases):
            path = tmp_path / f"{fires}{number}.yml"
            path.write_text(json.dumps(alert_test(rules, series, numbers, alert, at)), "utf-8")
            done = subprocess.run([*command, path], capture_output=True, text=True, timeout=60)
            # It is expected not to fire: what it says it has found instead is the alert.
            assert (done.returncode != 0) == fires, (series, done.stdout, done.stderr)
            assert ("alertname" in done.stdout + done.stderr) == fires


def test_a_database_that_the_spool_stands_in_for_is_no_alarm_yet(tmp_path: Path) -> None:
    require("promtool")
    rules = CONTRIB / "saslquota.rules.yml"
    test = alert_test(rules, "saslquota_store_up", "1 0x9", "SaslquotaStoreDown", "3m")
    for spooling in (1, 0):
        series = {"series": "saslquota_spooling", "values": f"0 {spooling}x9"}
        test["tests"][0]["input_series"][1:] = [series]
        path = tmp_path / f"{spooling}.yml"
        path.write_text(json.dumps(test), "utf-8")
        done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True)
        assert (done.returncode == 0) == bool(spooling), done


def alert_test(rules: Path, series: str, numbers: str, alert: str, at: str) -> dict[str, Any]:
    """A test of promtool's that fails if the alert fires. JSON is YAML, too."""
    return {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": numbers}],
                "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": []}],
            }
        ],
    }


@pytest.mark.parametrize("name", ["saslquota.rules.yml", "grafana-dashboard.json"])
def test_what_is_asked_for_exists(name: str) -> None:
    asked = set(re.findall(r"\bsaslquota_\w+", (CONTRIB / name).read_text("utf-8")))
    known = {re.split("[{ ]", line)[0] for line in metrics_text(SPOOLING, COUNTED).splitlines()}
    assert len(asked) > 5
    assert asked <= known


def test_the_dashboard_is_one() -> None:
    found = json.loads((CONTRIB / "grafana-dashboard.json").read_text("utf-8"))
    places = [tuple(panel["gridPos"].values()) for panel in found["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in found["panels"]}) == len(places)
    assert not re.search(r"https?://", json.dumps(found))


# --- saslquotactl.py metrics ----------------------------------------------------------------------


def add_events(config_file: Path) -> None:
    """Two incidents, one of them told, and a block."""
    store = make_store(load_config(config_file, {}))
    store.open()
    now, bind = store.now(), store.BIND_TIME
    for account, kind, told in (
        ("a@x", "refused", now),
        ("b@x", "refused", None),
        ("c@x", "block", None),
    ):
        at = now - 60_000_000
        store.run(
            "INSERT INTO events (account, number, at, kind, amount, author, note, last, told)"
            f" VALUES (?, 1, {bind}, ?, 5, 'me', '', {bind}, {bind if told else '?'})",
            [account, at, kind, at, told],
        )
    store.close()


def saslquotactl_metrics(running: Daemon) -> str:
    command = [sys.executable, ROOT / "saslquotactl.py", "-c", running.config_file, "metrics"]
    return run([str(one) for one in command], env=clean_environment())


@pytest.mark.parametrize("kind", ["sqlite", "mariadb"])
def test_the_command_prints_them(
    kind: str, daemon: StartDaemon, request: pytest.FixtureRequest
) -> None:
    config = {}
    if kind == "mariadb":
        database: Database = request.getfixturevalue("database")
        config = database.config()
    running = daemon(config)
    add_events(running.config_file)
    with running.policy() as policy:
        policy.ask()
        text = saslquotactl_metrics(running)
    found = values(text)
    assert found["saslquota_up"] == found["saslquota_store_up"] == 1
    assert found['saslquota_requests_total{verdict="accepted"}'] == 1
    assert found["saslquota_refused_senders"] == 2
    assert found["saslquota_blocked_senders"] == found["saslquota_incidents_untold"] == 1
    assert "@" not in text
    if kind == "sqlite":
        require("promtool")
        check_metrics(text)
    running.kill9()
    down = values(saslquotactl_metrics(running))
    assert down["saslquota_up"] == 0
    assert down["saslquota_refused_senders"] == 2


# --- HTTP -----------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    """Serves an empty database; no daemon answers."""
    path = tmp_path / "saslquota.json"
    settings = {"_store": "sqlite", "_http": f"{LOOPBACK}:{free_port()}", "_bindport": 1}
    path.write_text(json.dumps(settings), "utf-8")
    (tmp_path / "quotarules.json").write_text('{"default": {"period": 60, "msgquota": 5}}')
    config = load_config(path, {})
    store = make_store(config)
    store.open()
    store.close()
    with Server(config) as made:
        thread = threading.Thread(target=made.serve_forever, args=[0.02])
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(
    served: Server, method: str, path: str, headers: Mapping[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(LOOPBACK, served.server_port, timeout=20)
    connection.request(method, path, headers=headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def test_metrics_and_the_page_are_served(served: Server) -> None:
    response, content = ask(served, "GET", "/metrics")
    assert response.status == 200
    assert str(response.headers["Content-Type"]).startswith("text/plain; version=0.0.4")
    assert values(content.decode())["saslquota_up"] == 0
    response, content = ask(served, "GET", "/?refresh")
    assert (response.status, content[:15]) == (200, b"<!DOCTYPE html>")
    policy = str(response.headers["Content-Security-Policy"])
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_head_is_get_without_a_body(served: Server) -> None:
    for path in ("/", "/metrics"):
        response, content = ask(served, "HEAD", path)
        assert (response.status, content) == (200, b"")
        assert int(response.headers["Content-Length"]) > 20


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "<b>"])
def test_nothing_but_get_and_head(served: Server, method: str) -> None:
    response, content = ask(served, method, "/")
    assert (response.status, content) == (405, b"405 Method Not Allowed\n")
    assert response.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/<script>", "/saslquota.json", "/../etc/passwd", "*"])
def test_there_are_no_other_files(served: Server, path: str) -> None:
    response, content = ask(served, "GET", path)
    assert (response.status, content) == (404, b"404 Not Found\n")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:10009", 200),
        ("[::1]:10009", 200),
        ("192.0.2.7", 200),
        (socket.gethostname(), 200),
        ("attacker.example", 421),
        ("127.0.0.1.attacker.example:10009", 421),
    ],
)
def test_a_foreign_name_gets_nothing(served: Server, host: str, status: int) -> None:
    """A page of that name, whose name server says 127.0.0.1, could read the answer."""
    response, _ = ask(served, "GET", "/", {"Host": host})
    assert response.status == status


@contextmanager
def slow_clients(served: Server, number: int, begin: bytes) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        made = []
        for _ in range(number):
            client = socket.create_connection((LOOPBACK, served.server_port))
            made.append(stack.enter_context(client))
            client.sendall(begin)
        yield made


@pytest.mark.parametrize("begin", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nX: y\r\n"])
def test_slow_clients_cost_others_nothing(served: Server, begin: bytes) -> None:
    before = threading.active_count()
    began = time.monotonic()
    with slow_clients(served, 3 * saslquotapage.MAX_REQUESTS, begin):
        response, _ = ask(served, "GET", "/metrics")
        assert response.status == 200
        assert time.monotonic() - began < 4
        assert threading.active_count() <= before + saslquotapage.MAX_REQUESTS + 1


def test_who_drips_is_hung_up_on(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saslquotapage, "TIMEOUT", 0.5)
    with slow_clients(served, 1, b"GET / HTTP/1.1\r\n") as (client,):
        client.settimeout(0.1)

        def is_closed() -> bool:
            try:
                client.sendall(b"X")
                return client.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        wait_for(is_closed, 10, "the end of a connection")


def test_many_at_once_are_all_answered(served: Server) -> None:
    found: list[int] = []

    def get() -> None:
        found.append(ask(served, "GET", "/")[0].status)

    threads = [threading.Thread(target=get) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 12


def test_a_database_that_hangs_gives_the_old_page(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saslquotapage, "TIMEOUT", 0.3)
    _, kept = served.contents["/"]
    assert ask(served, "GET", "/")[0].status == 200
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> bytes:
        hangs.set()
        goes_on.wait(30)
        return b"new"

    monkeypatch.setattr(kept, "_make", hang)
    monkeypatch.setattr(kept, "_stale_at", 0.0)
    first = threading.Thread(target=ask, args=[served, "GET", "/"])
    first.start()
    assert hangs.wait(20)
    assert ask(served, "GET", "/")[1].startswith(b"<!DOCTYPE")
    monkeypatch.setattr(kept, "_content", b"")
    assert ask(served, "GET", "/")[0].status == 503
    goes_on.set()
    first.join()
    assert ask(served, "GET", "/")[1] == b"new"


def test_a_mistake_in_the_program_is_one_line_a_minute(
    served: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    saslquotapage.complaints.clear()

    def fail() -> bytes:
        raise KeyError("bug")

    _, kept = served.contents["/"]
    monkeypatch.setattr(kept, "_make", fail)
    for _ in range(2):
        with pytest.raises(http.client.RemoteDisconnected):
            ask(served, "GET", "/")
    (line,) = capfd.readouterr().err.splitlines()
    assert "KeyError: 'bug'" in line
    assert ask(served, "GET", "/metrics")[0].status == 200
