"""README.md: its commands and statements are run, its tables and lists are compared.

Paths, ports and names that belong to the system are replaced by private ones; the rest is run as it
stands there.
"""

import json
import re
import select
import shutil
import signal
import smtplib
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import require
from servers.daemon import Daemon, PolicyClient, copy_shipped
from servers.mariadb import Database, MariaDB, session
from servers.ports import LOOPBACK, free_port, is_listening
from servers.postfix import Postfix
from servers.process import ROOT, Process, clean_environment, run, wait_for

from saslquota import Config, load_config, load_rules

README = (ROOT / "README.md").read_text("utf-8")
BOB = "bob@example.com"
START = Callable[..., Daemon]


class Block(NamedTuple):
    """A fenced block: the heading it stands under, its language and its text."""

    heading: str
    language: str
    text: str


def fenced_blocks(text: str) -> Iterator[Block]:
    heading = ""
    for found in re.finditer(
        r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        if found[1]:
            heading = found[1]
        else:
            yield Block(heading, found[2], found[3])


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)


BLOCKS = list(fenced_blocks(README))


def block(heading: str, language: str, word: str = "") -> str:
    """The only block of this language under this heading with this word in it."""
    found = [
        block.text
        for block in BLOCKS
        if (block.heading, block.language) == (heading, language) and word in block.text
    ]
    assert len(found) == 1, f"{heading}, {language}, {word}: {len(found)} blocks"
    return found[0]


def shell(script: str, *replacements: tuple[str, str], cwd: Path = ROOT) -> str:
    """Run a shell block, with some of its texts replaced; each must be there."""
    for old, new in replacements:
        assert old in script, f"no {old} in: {script}"
        script = script.replace(old, new)
    return run(["bash", "-euc", script], env=clean_environment(), cwd=cwd)


# --- What it names --------------------------------------------------------------------------------


def test_the_order_of_its_sections() -> None:
    assert [line[3:] for line in README.splitlines() if line.startswith("## ")] == [
        "Two commands",
        "Production set-up",
        "Try it",
        "Log",
        "Settings",
        "Rules",
        "Looking and unblocking",
        "Monitoring",
        "Upgrading from noskoski/postfix_saslquota 1.x",
        "How fast",
        "Licence",
    ]


def test_every_file_it_names_is_there() -> None:
    names = set(re.findall(r"(?<![\w/.-])\w[\w/-]*\.(?:py|json|sql|conf)\b", README))
    names |= {"Testfile", "LICENSE", "tests/run"}
    assert names >= {"saslquota.py", "saslquota.json", "quotarules.json", "mysql.sql"}
    for name in names:
        assert name in README
        assert (ROOT / name).is_file(), name


def test_its_links_lead_somewhere() -> None:
    anchors = [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings(README)]
    for link in re.findall(r"\]\((.*?)\)", README):
        assert link.removeprefix("#") in anchors if link[0] == "#" else (ROOT / link).exists(), link


@pytest.mark.parametrize("script", [b.text for b in BLOCKS if b.language == "sh"])
def test_shell_syntax(script: str) -> None:
    run(["bash", "-n"], stdin=script)


def test_two_commands() -> None:
    commands = [b.text for b in BLOCKS if b.heading == "Two commands"]
    assert commands == ["python3 saslquota.py\n", "tests/run\n"]
    assert (ROOT / "tests" / "run").stat().st_mode & 0o111


# --- Settings and rules ---------------------------------------------------------------------------


def settings_table() -> dict[str, tuple[str, str]]:
    """Default and meaning of each setting, as README.md has them."""
    rows = re.findall(r"^\| `(_\w+)` \| `(.*?)` \| (.+) \|$", README, re.MULTILINE)
    table = {name: (default, meaning) for name, default, meaning in rows}
    assert len(table) == len(rows), "a setting stands there twice"
    return table


def test_every_setting_is_in_the_table() -> None:
    known = [f"_{field.name}" for field in fields(Config) if field.name != "path"]
    assert list(settings_table()) == known


def test_each_default_is_the_documented_one(tmp_path: Path) -> None:
    path = tmp_path / "saslquota.json"
    path.write_text("{}")
    defaults = load_config(path, {})
    for name, (default, _) in settings_table().items():
        path.write_text(f'{{"{name}": {default}}}')
        assert load_config(path, {}) == defaults, name
        field = getattr(defaults, name[1:])
        if not isinstance(field, tuple):  # to the letter; _myhost and _allow are lists
            assert json.dumps(field) == default, name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("_store", ["sqlite", "mysql"]),
        ("_loglevel", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]),
        ("_loghandler", ["syslog", "stdout"]),
        ("_onfailure", ["DEFER_IF_PERMIT", "OK"]),
        ("_nosasl", ["REJECT", "DUNNO"]),
        ("_okaction", ["OK", "DUNNO"]),
        ("_allow", ["127.0.0.0/8, 192.0.2.7"]),
        ("_dbtimeout", ["2", "60"]),
        ("_bind", ["unix:/path"]),
        ("_myhost", ["host:port", "unix:/path"]),
    ],
)
def test_documented_values_are_taken(tmp_path: Path, name: str, words: list[str]) -> None:
    path = tmp_path / "saslquota.json"
    meaning = settings_table()[name][1]
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", meaning), f"{name}: {word}"
        path.write_text(json.dumps({name: word.replace("port", "3307")}))
        load_config(path, {})


def test_what_the_shipped_settings_differ_in() -> None:
    shipped = json.loads((ROOT / "saslquota.json").read_text("utf-8"))
    for name, (default, meaning) in settings_table().items():
        if name in shipped and name != "_mypasswd" and json.dumps(shipped[name]) != default:
            assert f"the shipped file says `{shipped[name]}`" in meaning, name


def test_the_rules_are_the_shipped_ones() -> None:
    assert block("Rules", "json") == (ROOT / "quotarules.json").read_text("utf-8")


RULE_EXAMPLES = [
    *re.findall(r"^\| [^|]+ \| `(.*)` \|$", README[README.index("| I want to") :], re.MULTILINE),
    *(block.text for block in BLOCKS if block.language == "json" and block.heading != "Rules"),
]


@pytest.mark.parametrize("example", RULE_EXAMPLES)
def test_every_rule_can_be_copied(tmp_path: Path, example: str) -> None:
    """Beside what the shipped file has for everybody else."""
    assert len(RULE_EXAMPLES) > 15
    if '"default"' not in example:
        example += ', "default": {"period": 120, "msgquota": 500}'
    (tmp_path / "quotarules.json").write_text(f"{{{example}}}", "utf-8")
    load_rules(tmp_path / "quotarules.json", 30 * 86400)


def test_the_rules_as_described(daemon: START) -> None:
    """msg may be left out, msgquota 0 refuses everything, a domain's logins count apart."""
    rules = {
        "default": {"period": 60, "msgquota": 0},
        "Example.com": {"period": 60, "msgquota": 1, "msg": "no more"},
    }
    with daemon(rules=rules).policy() as policy:
        assert policy.ask(sasl_username="a@other.example").startswith("REJECT ")
        assert policy.ask(sasl_username="Bob@EXAMPLE.com") == "OK"
        assert policy.ask(sasl_username="ann@example.com") == "OK"
        assert policy.ask(sasl_username="bob@example.COM") == "REJECT no more"


# --- The production set-up ------------------------------------------------------------------------

USER, SETTINGS = "2. User, directories, Python", "3. Settings and rules"


class EmptySupervisor(Process):
    """A supervisord that runs nothing yet, with Debian's include line for a private conf.d."""

    def __init__(self, directory: Path, port: int) -> None:
        super().__init__(directory, "supervisord")
        self.port = port
        self.socket = directory / "control.sock"
        self.config = directory / "supervisord.conf"
        for name in ("conf.d", "log"):
            (directory / name).mkdir()
        self.config.write_text(
            f"[unix_http_server]\nfile={self.socket}\n"
            f"[supervisord]\nlogfile={directory}/supervisord.log\npidfile={directory}/pid\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
            f"[supervisorctl]\nserverurl=unix://{self.socket}\n"
            f"[include]\nfiles={directory}/conf.d/*.conf\n"
        )

    def command(self) -> Sequence[str | Path]:
        return ["supervisord", "--nodaemon", "--configuration", self.config]

    def environment(self) -> dict[str, str]:
        return clean_environment({"_bindport": self.port, "_loghandler": "stdout"})

    def is_ready(self) -> bool:
        return self.socket.exists()


def set_up(directory: Path) -> Path:
    """Do the step with the directories below another one, as whoever runs the tests."""
    steps = block(USER, "sh").splitlines(keepends=True)
    assert steps[0].startswith("useradd --system ")
    shell(
        "".join(steps[1:]),
        ("-o saslquota -g saslquota ", ""),
        ("-g saslquota ", ""),
        ("/opt/saslquota", f"{directory}/opt"),
        ("/var/lib/saslquota", f"{directory}/lib"),
    )
    return directory / "opt"


def modes(*paths: Path) -> list[str]:
    return [oct(path.stat().st_mode & 0o777) for path in paths]


@pytest.mark.slow
def test_production_with_sqlite_under_supervisord(new_directory: Callable[[], Path]) -> None:
    require("supervisord", "supervisorctl")
    directory = new_directory()
    opt = set_up(directory)
    assert modes(opt, directory / "lib") == ["0o755", "0o750"]
    assert modes(opt / "saslquota.json", opt / "quotarules.json") == ["0o640", "0o644"]
    lib = ("/var/lib/saslquota", f"{directory}/lib")
    here = ("/opt/saslquota", str(opt))
    shell(block(SETTINGS, "sh", "_sqlitefile"), lib, here)
    said = shell(block(SETTINGS, "sh", "--check"), ("runuser -u saslquota -- ", ""), here)
    assert f"SQLite {directory}/lib/saslquota.db: will be made at the first start" in said
    config = load_config(opt / "saslquota.json", {})
    assert (config.loglevel, config.store) == ("INFO", "sqlite")

    with EmptySupervisor(directory, free_port()) as supervisor:
        control = f"supervisorctl --configuration {supervisor.config}"
        copy, reread, update, status = block("4. supervisord", "sh", "reread").splitlines()
        shell(copy, ("/etc/supervisor/conf.d/", f"{directory}/conf.d/"))
        conf = directory / "conf.d" / "saslquota_supervisor.conf"
        text = conf.read_text().replace("/var/log/supervisor", f"{directory}/log")
        conf.write_text(text.replace(*here).replace("user=saslquota\n", ""))
        assert "saslquota: available" in shell(reread, ("supervisorctl", control))
        assert "saslquota: added process group" in shell(update, ("supervisorctl", control))

        def is_running() -> bool:
            command = status.replace("supervisorctl", control).split()
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            return "RUNNING" in done.stdout

        log = directory / "log" / "saslquota.log"
        wait_for(is_running, 20, "RUNNING")
        if shutil.which("ss"):
            listening = block("4. supervisord", "sh", "ss -ltn")
            shell(listening, ("10008", str(supervisor.port)))
        with PolicyClient(supervisor.port) as policy:
            assert policy.ask() == "OK"
        assert (directory / "lib" / "saslquota.db").exists()

        restart, hup = block("4. supervisord", "sh", "restart").splitlines()
        assert "saslquota: signalled" in shell(hup, ("supervisorctl", control))
        wait_for(lambda: "rules reloaded" in log.read_text(), 5, "the signal has come")
        assert "saslquota: started" in shell(restart, ("supervisorctl", control))
        wait_for(lambda: is_listening(supervisor.port), 20, "it listens again")


@pytest.fixture
def named_database(mariadb: MariaDB, new_directory: Callable[[], Path]) -> Iterator[Database]:
    """The database that README.md's statements make, but for its name."""
    name, password = "readme", "change-me"
    statements = re.sub(r"\bsaslquota\b", name, block(SETTINGS, "sql"))
    client = f"mariadb --no-defaults -uroot -S{mariadb.socket} {name}"
    opt = copy_shipped(new_directory())
    try:
        mariadb.sql(statements)
        for host in ("localhost", LOOPBACK):
            grants = mariadb.sql(f"SHOW GRANTS FOR {name}@'{host}'")
            assert f"GRANT ALL PRIVILEGES ON `{name}`.* TO" in grants
        load, edit = block(SETTINGS, "sh", "mysql.sql").splitlines()
        shell(load, ("mysql saslquota", client))
        shell(edit, ("/opt/saslquota", str(opt)))
        config = load_config(opt / "saslquota.json", {})
        assert (config.store, config.mypasswd, config.loglevel) == ("mysql", password, "INFO")
        yield Database(mariadb, name, "localhost", mariadb.port, name, password)
    finally:
        mariadb.sql(f"DROP DATABASE IF EXISTS {name}")
        for host in ("localhost", LOOPBACK):
            mariadb.sql(f"DROP USER IF EXISTS {name}@'{host}'")


def test_production_with_mysql(daemon: START, named_database: Database) -> None:
    """Its user may do all that the daemon does."""
    started = daemon(named_database.config())
    with started.policy() as policy:
        assert [policy.ask() for _ in range(3)] == ["OK"] * 3
    assert named_database.sql("SELECT total FROM sends ORDER BY seq DESC LIMIT 1") == "3"
    said = shell(
        block(SETTINGS, "sh", "--check"),
        ("runuser -u saslquota -- /opt/saslquota/venv/bin/python", sys.executable),
        ("/opt/saslquota/saslquota.py", f"{ROOT}/saslquota.py -c {started.config_file}"),
    )
    assert "table sends found" in said


# --- Postfix --------------------------------------------------------------------------------------

MAIN, MASTER = "5. Postfix: main.cf", "6. Postfix: master.cf"


@pytest.fixture
def stock(new_directory: Callable[[], Path]) -> Path:
    """A configuration directory with Debian's own master.cf, where nothing is submitted yet."""
    require("postconf")
    directory = new_directory()
    shutil.copy("/usr/share/postfix/master.cf.dist", directory / "master.cf")
    (directory / "main.cf").write_text("")
    return directory


def postconf(script: str, directory: Path) -> str:
    return shell(script, ("postconf ", f"postconf -c {directory} "))


def uncomment(directory: Path) -> None:
    shell(block(MASTER, "sh", "sed -i"), ("/etc/postfix", str(directory)))


VERIFY = block(MASTER, "sh", "'*/inet/smtpd_client_restrictions'")
EXPECTED = block(MASTER, "", "submission/inet")


def test_main_cf(stock: Path) -> None:
    plain = block(MAIN, "sh", "inet:127.0.0.1:10008'")
    postconf(plain, stock)
    line = "saslquota = check_policy_service inet:127.0.0.1:10008\n"
    assert (stock / "main.cf").read_text() == line
    postconf(block(MAIN, "sh", "default_action"), stock)
    line = (
        "saslquota = check_policy_service"
        " { inet:127.0.0.1:10008, timeout=10s, default_action=DUNNO }\n"
    )
    assert (stock / "main.cf").read_text() == line
    default = run(["postconf", "-d", "-h", "smtpd_policy_service_default_action"]).strip()
    assert default in README


def test_master_cf(stock: Path) -> None:
    """Both stock entries are hooked, once, and nothing else is."""
    postconf(block(MAIN, "sh", "inet:127.0.0.1:10008'"), stock)
    uncomment(stock)
    before = postconf("postconf -M; postconf -P", stock)
    replace = block(MASTER, "sh", "submission/inet/smtpd_client_restrictions=$")
    postconf(replace, stock)
    assert postconf(VERIFY, stock) == EXPECTED
    after = postconf("postconf -M; postconf -P", stock)
    assert after.count("$saslquota") == 4  # twice in either list
    assert after.replace("$saslquota", "").split() == before.split()
    assert (stock / "master.cf").read_text().count("smtpd_client_restrictions=$saslquota") == 2


def test_master_cf_twice_changes_nothing(stock: Path) -> None:
    postconf(block(MAIN, "sh", "inet:127.0.0.1:10008'"), stock)
    for _ in range(2):
        uncomment(stock)
        postconf(block(MASTER, "sh", "submission/inet/smtpd_client_restrictions=$"), stock)
        assert postconf(VERIFY, stock) == EXPECTED


def test_a_line_above_the_empty_one_shows_when_verifying(stock: Path) -> None:
    """What README.md warns of: the last one counts."""
    uncomment(stock)
    path = stock / "master.cf"
    empty = "  -o smtpd_client_restrictions=\n"
    path.write_text(path.read_text().replace(empty, empty.strip("\n") + "$saslquota\n" + empty))
    assert "saslquota" not in postconf(VERIFY, stock)


def test_master_cf_per_message(stock: Path) -> None:
    postconf(block(MAIN, "sh", "inet:127.0.0.1:10008'"), stock)
    uncomment(stock)
    postconf(block(MASTER, "sh", "submission/inet/smtpd_client_restrictions=$"), stock)
    postconf(block(MASTER, "sh", "smtpd_data_restrictions"), stock)
    assert "saslquota" not in postconf(VERIFY, stock)
    assert postconf("postconf -P '*/inet/smtpd_data_restrictions'", stock) == EXPECTED.replace(
        "client", "data"
    )


def test_the_reply_a_sender_sees(daemon: START, postfix: Callable[..., Postfix]) -> None:
    rules = json.loads((ROOT / "quotarules.json").read_text("utf-8"))
    policy = f"check_policy_service inet:{LOOPBACK}:{daemon(rules=rules).port}"
    instance = postfix(policy, users=["root@localhost"])
    with instance.login("root@localhost") as session:
        session.mail("root@localhost")
        for number in range(50):
            assert session.rcpt(f"r{number}@example.net")[0] == 250
        code, text = session.rcpt("r50@example.net")
    seen = f"{code} {text.decode('utf-8')}\n"
    assert seen.replace(LOOPBACK, "192.0.2.1") == block("saslquota", "")


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({"smtpd_client_restrictions": "permit_mynetworks, $saslquota"}, 0),
        ({"smtpd_client_restrictions": "permit_sasl_authenticated, $saslquota"}, 0),
        ({"smtpd_client_restrictions": "$saslquota, permit_mynetworks"}, 3),
        ({"smtpd_recipient_restrictions": "$saslquota, permit_sasl_authenticated, reject"}, 6),
    ],
    ids=["behind-mynetworks", "behind-authenticated", "before", "twice"],
)
def test_wrong_places(
    daemon: START, postfix: Callable[..., Postfix], options: dict[str, str], counted: int
) -> None:
    """What three recipients cost."""
    started = daemon()
    instance = postfix(f"check_policy_service inet:{LOOPBACK}:{started.port}", options=options)
    with instance.login() as session:
        to = [f"r{number}@example.net" for number in range(3)]
        session.sendmail("alice@example.com", to, "Subject: x\n\n")
    rows = sqlite_rows(started.directory / "saslquota.db", "SELECT seq FROM sends")
    assert len(rows) == counted


def test_from_recipients_to_messages(daemon: START, postfix: Callable[..., Postfix]) -> None:
    """The statements that change the entries of a Postfix that runs, and the reload."""
    started = daemon()
    instance = postfix(f"check_policy_service inet:{LOOPBACK}:{started.port}")
    ledger = started.directory / "saslquota.db"

    def rows_of_a_message() -> list[str]:
        before = len(sqlite_rows(ledger, "SELECT seq FROM sends"))
        with instance.login() as session:
            to = [f"r{number}@example.net" for number in range(3)]
            session.sendmail("alice@example.com", to, "Subject: x\n\n")
        return sqlite_rows(ledger, f"SELECT recipients FROM sends WHERE seq > {before}")

    assert rows_of_a_message() == ["1", "1", "1"]
    change = block(MASTER, "sh", "smtpd_data_restrictions")
    change = change.replace("submission/", f"{LOOPBACK}:{instance.port}/")
    postconf(change.replace("submissions/", f"{LOOPBACK}:{instance.tls_port}/"), instance.config)
    shell(block(MASTER, "sh", "reload"), ("postfix ", f"postfix -c {instance.config} "))
    wait_for(lambda: rows_of_a_message() == ["3"], 20, "Postfix has read it")


def test_on_port_25_nobody_could_deliver(daemon: START, postfix: Callable[..., Postfix]) -> None:
    policy = f"check_policy_service inet:{LOOPBACK}:{daemon().port}"
    instance = postfix(policy)
    with instance.login(None) as session, pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
        session.sendmail("a@example.net", ["b@example.com"], "Subject: x\n\n")
    assert "authentication required" in str(refused.value)
    assert "`authentication required`" in README


# --- netcat ---------------------------------------------------------------------------------------

netcats = pytest.mark.parametrize("netcat", ["nc.openbsd", "nc.traditional"])


def shipped_rules(daemon: START) -> int:
    """The port of a daemon with the shipped rules."""
    return daemon(rules=json.loads((ROOT / "quotarules.json").read_text("utf-8"))).port


@netcats
def test_try_it(daemon: START, netcat: str) -> None:
    require(netcat)
    port = ("10008", str(shipped_rules(daemon)))
    line = block("Try it", "sh")
    assert shell(line, ("netcat", netcat), port) == block("Try it", "") + "\n"


@netcats
def test_monitoring(daemon: START, netcat: str) -> None:
    require(netcat)
    port = ("10008", str(shipped_rules(daemon)))
    line = block("Monitoring", "sh", "| netcat")
    assert shell(line, ("netcat", netcat), port) == "action=OK\n\n"


@pytest.mark.parametrize("netcat", ["nc.openbsd -N", "nc.traditional -q1"])
def test_monitoring_without_the_empty_request(daemon: START, netcat: str) -> None:
    require(netcat.split()[0])
    assert f"`{re.sub(r'[.]openbsd|[.]traditional', '', netcat)}`" in README
    port = ("10008", str(shipped_rules(daemon)))
    line = block("Monitoring", "sh", "| nc -N")
    assert shell(line, ("nc -N", netcat), port) == "action=OK\n\n"


def test_monitoring_sees_a_database_that_is_down(daemon: START) -> None:
    require("nc.openbsd")
    started = daemon({"_sqlitefile": "missing/saslquota.db"})
    line = block("Monitoring", "sh", "| netcat")
    said = shell(line, ("netcat", "nc.openbsd"), ("10008", str(started.port)))
    assert said.startswith("action=DEFER_IF_PERMIT ")


# --- The log --------------------------------------------------------------------------------------


def shape(line: str) -> str:
    """A line without what differs from one time and connection to the next."""
    line = re.sub(r"^(?:<\d+>|\w{3} \d+ [\d:]{8} mail )", "", line)
    line = re.sub(r"postfix/saslquota\[\d+\]:", "postfix/saslquota[]:", line)
    line = re.sub(r":\[\d+\] ", ":[] ", line)
    return re.sub(r"(end of recv: |thread stopped : )\([\d.]+\)", r"\1()", line)


def logged(daemon: START, directory: Path, level: str, asks: int) -> list[str]:
    """What syslog gets of the last of so many equal requests; the quota is 4/1500 at the fourth."""
    rules = {"default": {"period": 86400, "msgquota": 1500, "msg": "too many mails today"}}
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as syslog:
        syslog.bind(str(directory / "log"))
        config = {"_loghandler": "syslog", "_logaddress": str(directory / "log")}
        started = daemon({**config, "_loglevel": level}, rules)
        lines: list[str] = []

        def read() -> list[str]:
            while select.select([syslog], [], [], 0)[0]:
                lines.append(syslog.recv(65536).decode("utf-8"))
            return lines

        request = {"sasl_username": BOB, "sender": BOB, "recipient": "ann@example.net"}
        client = {"client_address": "192.0.2.1", "instance": "14b4.5f3a8c2e.a1b2c.0"}
        for number in range(asks):
            with started.policy() as policy:
                assert policy.ask(**request, **client) == "OK"
            if level == "DEBUG":  # else the next connection's lines may come in between
                ended = number + 1
                wait_for(lambda n=ended: "".join(read()).count("thread stopped") >= n, 5, "its end")  # type: ignore[misc]
        with started.policy() as policy:
            rest = {"protocol_state": "DATA", "recipient_count": 1500 - asks}
            assert policy.ask(**request, **client, **rest) == "OK"
            client["instance"] = "14b4.5f3a8c2e.a1b2d.0"
            assert policy.ask(**request, **client) == "REJECT too many mails today"
        wait_for(lambda: "action=REJECT" in "".join(read()), 5, "the last line")
        return [shape(line) for line in lines]


def test_log_lines_of_info(daemon: START, new_directory: Callable[[], Path]) -> None:
    lines = logged(daemon, new_directory(), "INFO", 4)
    documented = [shape(line) for line in block("Log", "", "action=REJECT").splitlines()]
    assert [line for line in lines if "4/1500" in line or "REJECT" in line] == documented
    assert sum("sasl_username" in line for line in lines) == 6
    assert not any("thread" in line for line in lines)


def test_log_lines_of_debug(daemon: START, new_directory: Callable[[], Path]) -> None:
    lines = logged(daemon, new_directory(), "DEBUG", 4)
    documented = [shape(line) for line in block("Log", "", "thread started").splitlines()]
    verdict = next(number for number, line in enumerate(lines) if "4/1500" in line)
    assert lines[verdict - 4 : verdict + 2] == documented


def alarm(word: str) -> str:
    """The beginning of a line that README.md calls worth an alarm, or its end."""
    alarms = README.partition("Worth an\nalarm:")[2].partition("\n## ")[0]
    lines: list[str] = re.findall(r"`([^`]+)`", alarms)
    (found,) = [line for line in lines if word in line]
    return found.removesuffix("...")


def test_log_lines_worth_an_alarm(daemon: START) -> None:
    started = daemon()
    ledger = started.directory / "saslquota.db"

    def see(word: str) -> None:
        wait_for(lambda: alarm(word) in started.log(), 10, word)

    with started.policy() as policy:
        assert policy.ask(protocol_state="CONNECT", sasl_username="") == "DUNNO"
        see("nothing is counted")
        (started.directory / "quotarules.json").write_text("{")
        see("rules not read")
        assert policy.ask() == "OK"
        away = started.directory / "away"
        ledger.rename(away)
        ledger.mkdir()
        wait_for(lambda: policy.ask().startswith("DEFER_IF_PERMIT"), 10, "the file is missed")
        see("cannot be used")
        ledger.rmdir()
        away.rename(ledger)
        wait_for(lambda: policy.ask() == "OK", 10, "the file is found")
        see("counted again")
        policy.send(b"junk\n\n")
        see("malformed")


def test_the_alarm_about_locked_rows(daemon: START, database: Database) -> None:
    started = daemon({**database.config(), "_dbtimeout": 5})
    with started.policy() as policy, session(database.server, database.name) as locker:
        wait_for(lambda: policy.ask(sasl_username="bob") == "OK", 10, "it counts")
        locker.execute("BEGIN")
        locker.execute("SELECT seq FROM sends WHERE account = 'bob' FOR UPDATE")
        locker.fetchall()
        assert policy.ask(sasl_username="bob").startswith("DEFER_IF_PERMIT")
        line = alarm("has locked its rows").partition("...")[2]
        wait_for(lambda: line in started.log(), 10, line)


# --- Looking and unblocking -----------------------------------------------------------------------

QUOTA = {"default": {"period": 3600, "msgquota": 5, "msg": "no more"}}
Sql = Callable[[str], list[str]]


def sqlite_rows(path: Path, statement: str) -> list[str]:
    """Run a statement and return its rows, columns with tabs between."""
    with closing(sqlite3.connect(path, timeout=10)) as connection, connection:
        return ["\t".join(map(str, row)) for row in connection.execute(statement)]


@pytest.fixture(params=["SQLite", "MySQL, MariaDB"])
def counting(
    request: pytest.FixtureRequest, daemon: START
) -> tuple[Daemon, Sql, Callable[[str], str]]:
    """A daemon, what runs SQL in its ledger, and README.md's statement with a word in it."""
    heading = str(request.param)
    if heading == "SQLite":
        started = daemon(rules=QUOTA)

        def run_sql(statement: str) -> list[str]:
            return sqlite_rows(started.directory / "saslquota.db", statement)
    else:
        database: Database = request.getfixturevalue("database")
        started = daemon(database.config(), QUOTA)

        def run_sql(statement: str) -> list[str]:
            return database.sql(statement).splitlines()

    return started, run_sql, lambda word: block(heading, "sql", word)


Counting = tuple[Daemon, Sql, Callable[[str], str]]


def test_used_by(counting: Counting) -> None:
    started, sql, statement = counting
    used = statement("AS used")
    with started.policy() as policy:
        assert policy.ask(sasl_username="ann@example.com") == "OK"
        assert sql(used) == []
        assert policy.ask(sasl_username="Bob@Example.com") == "OK"
        assert sql(used) == ["1"]
        assert policy.ask(sasl_username=BOB, protocol_state="DATA", recipient_count=3) == "OK"
        assert sql(used) == ["4"]
        assert policy.ask(sasl_username=BOB, protocol_state="DATA", recipient_count=3)[:6] == (
            "REJECT"
        )
        assert sql(used) == ["4"]
        hour = "3600 SECOND" if "3600 SECOND" in used else "- 3600)"
        in_the_future = used.replace(hour, hour.replace("3600", "-3600"))
        assert sql(in_the_future) == ["0"], "nothing that late: 0, not all"


def age(sql: Sql, statement: Callable[[str], str], number: int) -> None:
    """Let the first sends of each account leave the window."""
    # SQLite's statements are exact to the second
    older = "at - 3601000000" if "strftime" in statement("AS used") else "at - INTERVAL 1 HOUR"
    sql(f"UPDATE sends SET at = {older} WHERE seq <= {number}")


def test_used_by_leaves_out_what_is_older(counting: Counting) -> None:
    started, sql, statement = counting
    with started.policy() as policy:
        assert [policy.ask(sasl_username=BOB) for _ in range(4)] == ["OK"] * 4
    age(sql, statement, 3)
    assert sql(statement("AS used")) == ["1"]
    assert [row.split("\t")[:2] for row in sql(statement("AS sent"))] == [[BOB, "1"]]


def test_top_senders(counting: Counting) -> None:
    started, sql, statement = counting
    with started.policy() as policy:
        for user, number in (("ann@x.org", 2), (BOB, 5), ("eve@x.org", 1)):
            assert (
                policy.ask(sasl_username=user, protocol_state="DATA", recipient_count=number)
                == "OK"
            )
    rows = [row.split("\t") for row in sql(statement("AS sent"))]
    assert [row[:2] for row in rows] == [[BOB, "5"], ["ann@x.org", "2"], ["eve@x.org", "1"]]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?", rows[0][2])


def test_unblock(counting: Counting) -> None:
    """The sender is accepted within a second, the others are as before; again and again."""
    started, sql, statement = counting
    with started.policy() as policy:
        for user in (BOB, "ann@x.org"):
            assert [policy.ask(sasl_username=user) for _ in range(6)] == ["OK"] * 5 + [
                "REJECT no more"
            ]
        for epoch in (2, 3):
            sql(statement("'reset'"))
            assert sql(statement("AS used")) == ["0"]
            wait_for(lambda: policy.ask(sasl_username=BOB) == "OK", 1.2, "he is accepted")
            assert [policy.ask(sasl_username=BOB) for _ in range(5)] == ["OK"] * 4 + [
                "REJECT no more"
            ]
            assert sql(statement("AS used")) == ["5"]
            assert sql(f"SELECT MAX(epoch) FROM sends WHERE account = '{BOB}'") == [str(epoch)]
        assert policy.ask(sasl_username="ann@x.org") == "REJECT no more"
    age(sql, statement, 3)
    assert sql(statement("AS used")) == ["5"], "what stands before the reset is not counted"
    assert "cannot be used" not in started.log()


def test_unblock_nobody(counting: Counting) -> None:
    started, sql, statement = counting
    with started.policy() as policy:
        assert policy.ask(sasl_username="ann@x.org") == "OK"
    sql(statement("'reset'"))
    assert sql("SELECT COUNT(*) FROM sends") == ["1"]


def test_unblock_with_a_clock_that_went_back(counting: Counting) -> None:
    """`at` never falls."""
    started, sql, statement = counting
    with started.policy() as policy:
        assert policy.ask(sasl_username=BOB) == "OK"
    later = "at + 30000000" if "strftime" in statement("'reset'") else "at + INTERVAL 30 SECOND"
    sql(f"UPDATE sends SET at = {later}")
    sql(statement("'reset'"))
    assert sql("SELECT COUNT(DISTINCT at), COUNT(*) FROM sends") == ["1\t2"]


def test_the_sqlite_client(daemon: START) -> None:
    require("sqlite3")
    started = daemon(rules=QUOTA)
    with started.policy() as policy:
        assert [policy.ask(sasl_username=BOB) for _ in range(6)][5] == "REJECT no more"
        command = block("SQLite", "sh").strip()
        place = ("/var/lib/saslquota/saslquota.db", f"{started.directory}/saslquota.db")
        script = f"{command} <<'END'\n{block('SQLite', 'sql', chr(39) + 'reset')}"
        script += "SELECT changes();\nEND\n"
        assert shell(script, ("runuser -u saslquota -- ", ""), place) == "1\n"
        wait_for(lambda: policy.ask(sasl_username=BOB) == "OK", 1.2, "he is accepted")


# --- Upgrading ------------------------------------------------------------------------------------

UPGRADE = "Upgrading from noskoski/postfix_saslquota 1.x"
OLD_TABLE = (
    "CREATE TABLE `log` (`sasl_username` VARCHAR(320) NOT NULL, `date` DATETIME(6) NOT NULL,"
    " PRIMARY KEY (`sasl_username`, `date`)) ENGINE = InnoDB"
)


@pytest.fixture(params=["utf8mb4", "latin1", "utf8mb3"])
def old_log(request: pytest.FixtureRequest, database: Database) -> Database:
    """What 1.x left: local time, logins as they were typed, rows too old to matter."""
    # 1.x stored now(6); here that is three hours behind UTC.
    offset = database.sql("SELECT TIMESTAMPDIFF(HOUR, UTC_TIMESTAMP(), NOW())")
    assert offset == "-3"
    database.sql(f"{OLD_TABLE} DEFAULT CHARSET = {request.param}")
    for login, seconds in (
        ("Bob@Example.com", (90000, 86300, 7000, 3)),
        ("bob@example.com", (6000, 2)),
        (" BOB@example.com ", (5000,)),
        ("ann@example.com", (100, 50)),
        ("jose@example.com", (40, 20)),
        ("josé@example.com", (30, 10)),
        ("old@example.com", (100000,)),
        ("", (60,)),
    ):
        for ago in seconds:
            database.sql(f"INSERT INTO log VALUES ('{login}', NOW(6) - INTERVAL {ago} SECOND)")
    return database


def totals(database: Database) -> dict[str, str]:
    rows = database.sql("SELECT account, MAX(total) FROM sends GROUP BY account")
    return dict(row.split("\t") for row in rows.splitlines())


CARRIED = {BOB: "6", "ann@example.com": "2", "jose@example.com": "2", "josé@example.com": "2"}


def test_carry_the_counts_over(daemon: START, old_log: Database) -> None:
    before = old_log.sql("SELECT * FROM log")
    old_log.sql(block(UPGRADE, "sql"))
    assert totals(old_log) == CARRIED
    rows = old_log.sql(
        "SELECT seq, epoch, recipients, total,"
        " ROUND(TIMESTAMPDIFF(SECOND, at, UTC_TIMESTAMP(6)), -2)"
        f" FROM sends WHERE account = '{BOB}' ORDER BY at, seq"
    )
    assert rows.splitlines() == [
        f"{number}\t1\t1\t{number}\t{ago}"
        for number, ago in enumerate((86300, 7000, 6000, 5000, 0, 0), 1)
    ]
    assert old_log.sql("SELECT * FROM log") == before

    rules = {
        "default": {"period": 86400, "msgquota": 8, "msg": "day"},
        "ann@example.com": {"period": 60, "msgquota": 8, "msg": "minute"},
        "josé@example.com": {"period": 20, "msgquota": 8, "msg": "less"},
    }
    with daemon(old_log.config(), rules).policy() as policy:

        def accepted(login: str) -> int:
            answers = [policy.ask(sasl_username=login) for _ in range(10)]
            return answers.index(next(filter(lambda text: text.startswith("REJECT"), answers)))

        assert accepted("BOB@example.com") == 2
        assert accepted("ann@example.com") == 7
        assert accepted("josé@example.com") == 7
        assert accepted("jose@example.com") == 6
        assert accepted("old@example.com") == 8
    used = block("MySQL, MariaDB", "sql", "AS used")
    assert old_log.sql(used) == "4"  # two were carried over


def test_carry_over_twice(old_log: Database) -> None:
    for _ in range(2):
        old_log.sql(block(UPGRADE, "sql"))
        assert totals(old_log) == CARRIED
        assert old_log.sql("SELECT COUNT(*) FROM sends") == "12"


def test_carry_over_beside_what_is_counted_already(daemon: START, old_log: Database) -> None:
    """Whoever the new daemon has counted keeps that count."""
    with daemon(old_log.config()).policy() as policy:
        assert policy.ask(sasl_username=BOB) == "OK"
        old_log.sql(block(UPGRADE, "sql"))
        assert totals(old_log) == {**CARRIED, BOB: "1"}
        assert policy.ask(sasl_username=BOB) == "OK"
        assert policy.ask(sasl_username="ann@example.com") == "OK"
    assert totals(old_log) == {**CARRIED, BOB: "2", "ann@example.com": "3"}


def test_the_old_settings_go_on_working(tmp_path: Path) -> None:
    """The ten keys of 1.x's own file."""
    assert "without `_store` it means MySQL" in README
    path = tmp_path / "saslquota.json"
    names = "bind bindport bindtimeout myhost myuser mypasswd mydb logfacility loglevel quotafile"
    table = settings_table()
    settings = [f'"_{name}": {table["_" + name][0]}' for name in names.split()]
    path.write_text("{" + ", ".join(settings) + "}")
    assert load_config(path, {}).store == "mysql"
    load_rules(ROOT / "quotarules.json", 30 * 86400)


def test_stopping_is_as_it_says(daemon: START) -> None:
    """Ctrl-C ends it."""
    assert daemon().stop(signal.SIGINT, timeout=5) == 0
