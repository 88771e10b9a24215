"""README.md, docs/ and the other documents: their commands and statements are run, their tables and
lists compared.

Each fenced block is run by a test, or listed in NOT_RUN with the reason. Paths, ports and names
that belong to the system are replaced by private ones; the rest is run as it is in the document.
"""

import ast
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
from ctl import Site
from fleet import StartFleet
from helpers import DAY, in_background, require
from servers.daemon import Daemon, PolicyClient, copy_shipped
from servers.mariadb import Database, MariaDB, session
from servers.mysql import MySQL
from servers.ports import LOOPBACK, free_port, is_listening
from servers.postfix import Postfix, any_certificate, is_accepted
from servers.process import ROOT, Process, clean_environment, run, wait_for, wait_for_log
from servers.supervisor import EmptySupervisor

import saslquota
import saslquotawatch
from saslquota import Config, Window, load_config, load_rules

NAMES = ["README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"]
NAMES += [
    f"docs/{name}.md" for name in ("install", "rules", "operation", "upgrading", "saslquotactl")
]
DOCUMENTS = {name: (ROOT / name).read_text("utf-8") for name in NAMES}
README, INSTALL, RULES, OPERATION, UPGRADING = (
    "README.md",
    "docs/install.md",
    "docs/rules.md",
    "docs/operation.md",
    "docs/upgrading.md",
)
BOB = "bob@example.com"
START = Callable[..., Daemon]


class Block(NamedTuple):
    """A fenced block: its document, the heading above it, its language and its text."""

    document: str
    heading: str
    language: str
    text: str


def fenced_blocks(document: str) -> Iterator[Block]:
    heading = ""
    for found in re.finditer(
        r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", DOCUMENTS[document], re.MULTILINE | re.DOTALL
    ):
        if found[1]:
            heading = found[1]
        else:
            yield Block(document, heading, found[2], found[3])


BLOCKS = [block for document in DOCUMENTS for block in fenced_blocks(document)]
_taken: set[Block] = set()  # by block(), while this file is loaded


def block(document: str, heading: str, language: str, word: str = "") -> str:
    """Take the only block of this language under this heading with this word in it, to run it."""
    found = [b for b in BLOCKS if b[:3] == (document, heading, language) and word in b.text]
    assert len(found) == 1, f"{document}, {heading}, {language}, {word}: {len(found)} blocks"
    _taken.add(found[0])
    return found[0].text


def shell(script: str, *replacements: tuple[str, str], cwd: Path = ROOT, stdin: str = "") -> str:
    """Run a shell block, with some of its texts replaced; each must be there."""
    for old, new in replacements:
        assert old in script, f"no {old} in: {script}"
        script = script.replace(old, new)
    command = ["setsid", "--wait", "bash", "-euc", script]  # without a terminal to ask at
    return run(command, env=clean_environment(), cwd=cwd, stdin=stdin)


# --- The documents themselves ---------------------------------------------------------------------


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)


def test_the_sections_of_the_readme() -> None:
    lines = DOCUMENTS[README].splitlines()
    assert len(lines) <= 250
    assert [line[3:] for line in lines if line.startswith("## ")] == [
        "Two commands",
        "Production set-up",
        "Try it",
        "Rules",
        "Settings",
        "Read on",
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_it_names_is_there(document: str) -> None:
    text = DOCUMENTS[document]
    for name in re.findall(r"(?<![\w/.-])\w[\w/-]*\.(?:py|json|sql|conf|service)\b", text):
        assert "NAME" in name or (ROOT / name).is_file(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_its_links_lead_somewhere(document: str) -> None:
    for link in re.findall(r"\]\((.*?)\)", DOCUMENTS[document]):
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), link
        if anchor:
            names = headings(target.read_text("utf-8"))
            anchors = [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in names]
            assert anchor in anchors, link


@pytest.mark.parametrize("script", [b.text for b in BLOCKS if b.language == "sh"])
def test_shell_syntax(script: str) -> None:
    run(["bash", "-n"], stdin=script)


NOT_RUN: Mapping[str, str] = {  # by the beginning of their text
    "apt-get install ": "tests/run has installed these packages, see test_packages",
    "tests/run\n": "it runs this file",
    "saslquotactl.py queue ": "it needs Postfix: see the tests of that command",
    "PROBLEM  postfix ": "test_ctl_doctor.py compares it with what doctor says",
    "supervisorctl restart saslquota-watch\n": "see test_supervisor.py",
    "Subject: bob@example.com: quota reached\n": "a sample: see test_watch.py",
    "* * * * * root saslquotactl.py metrics": "a line for cron: see test_metrics.py",
    "ssh -L 10009:": "it needs another machine",
}


def test_packages() -> None:
    (install,) = [b.text for b in BLOCKS if b.text.startswith("apt-get install ")]
    installs = re.findall(r"[\w-]+", (ROOT / "tests" / "run").read_text("utf-8"))
    for package in install.split()[2:]:
        assert package in installs


def test_every_block_is_run() -> None:
    """A new block needs a test that takes it with block(), or a reason."""
    for document, text in DOCUMENTS.items():
        fences = re.findall(r"^\s*```", text, re.MULTILINE)
        assert len(fences) == 2 * sum(b.document == document for b in BLOCKS), "an indented one"
    not_run = [b for b in BLOCKS if b not in RUN]
    for reason in NOT_RUN:
        assert sum(b.text.startswith(reason) for b in not_run) == 1, reason
    assert len(not_run) == len(NOT_RUN), not_run


# --- Two commands ---------------------------------------------------------------------------------

TWO = "Two commands"
FIRST_START = block(README, TWO, "sh", "python3")
FIRST_LINES = block(README, TWO, "", "listening")
FIRST_REQUEST = block(README, TWO, "sh", "Testfile")
FIRST_ANSWER = block(README, TWO, "", "action=OK")
FIRST_VERDICT = block(README, TWO, "", "sasl_username")

netcats = pytest.mark.parametrize("netcat", ["nc.openbsd", "nc.traditional"])


class FreshClone(Process):
    """The first command, in a copy of the shipped files; it logs to standard output."""

    def __init__(self, directory: Path) -> None:
        super().__init__(copy_shipped(directory), "daemon")
        self.port = free_port()

    def command(self) -> Sequence[str | Path]:
        python, *arguments = FIRST_START.split()
        assert python == "python3"
        return [sys.executable, *arguments]

    def environment(self) -> dict[str, str]:
        return clean_environment({"_bindport": self.port, "_loghandler": "stdout"})

    def is_ready(self) -> bool:
        return is_listening(self.port)


@netcats
def test_the_first_command(new_directory: Callable[[], Path], netcat: str) -> None:
    require(netcat)
    directory = new_directory()
    with FreshClone(directory) as daemon:
        *lines, _where_it_logs = FIRST_LINES.splitlines(keepends=True)

        def printed() -> str:
            output = daemon.log().replace(str(directory), "/root/saslquota")
            return re.sub(r"\d+\.\d+\.\d+ (listening .*):\d+,", r"2.1.0 \1:10008,", output)

        for line in lines:
            wait_for(lambda expected=line: expected in printed(), 5, line)  # type: ignore[misc]
        request = FIRST_REQUEST.replace("| netcat", f"| {netcat}")
        assert shell(request, ("10008", str(daemon.port))) == FIRST_ANSWER + "\n"
        verdict = shape(FIRST_VERDICT)
        wait_for(lambda: verdict in shape(daemon.log()), 5, verdict)
    assert (directory / "saslquota.db").exists()


def test_the_first_command_says_where_it_logs() -> None:
    """Where there is a /dev/log, which belongs to the system: so its parts are looked for."""
    *_, line = FIRST_LINES.splitlines()
    assert (
        line == "logging to syslog, facility mail: /var/log/mail.log or journalctl --facility=mail"
    )
    for part in (
        "logging to",
        "syslog, facility ",
        "/var/log/mail.log or ",
        "journalctl --facility=",
    ):
        assert in_script(part)


def test_ctrl_c(new_directory: Callable[[], Path]) -> None:
    with FreshClone(new_directory()) as daemon:
        assert daemon.stop(signal.SIGINT, timeout=5) == 0


def test_the_second_command() -> None:
    script = ROOT / "tests" / "run"
    assert script.stat().st_mode & 0o111
    assert "--unit" in script.read_text("utf-8")


# --- Settings and rules ---------------------------------------------------------------------------


WATCH_SETTINGS = block(OPERATION, "Told by mail, metrics, page", "json", "_notify")


def test_the_settings_of_the_watch(tmp_path: Path) -> None:
    path = tmp_path / "saslquota.json"
    path.write_text(f"{{{WATCH_SETTINGS}}}", "utf-8")
    config = load_config(path, {})
    assert (config.notify, config.http) == (("postmaster@example.com",), "127.0.0.1:10009")


def test_its_sample_mail_names_the_commands() -> None:
    (sample,) = [b.text for b in BLOCKS if b.text.startswith("Subject: bob@example.com")]
    lines = "\n".join(saslquotawatch.advice("bob@example.com"))
    assert sample.endswith(f"{lines}\n")


def settings_table() -> dict[str, tuple[str, str]]:
    """Default and meaning of each setting, as README.md has them."""
    row = r"^\| `(_\w+)` \| `(.*?)` \| (.+) \|$"
    rows = re.findall(row, DOCUMENTS[README], re.MULTILINE)
    table = {name: (default, meaning) for name, default, meaning in rows}
    assert len(table) == len(rows), "a setting is listed twice"
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
        ("_onfailure", ["DEFER_IF_PERMIT", "OK", "LOCAL"]),
        ("_nosasl", ["REJECT", "DUNNO"]),
        ("_okaction", ["OK", "DUNNO"]),
        ("_ignoredomain", ["true"]),
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


JSON_BLOCKS = [block(*b[:3], b.text) for b in BLOCKS if b.language == "json"]
SHIPPED_RULES = block(RULES, "Rules", "json")
SETTING_EXAMPLES = [text for text in JSON_BLOCKS if text.startswith('"_')]
RULE_EXAMPLES = [
    *re.findall(r"^\| [^|`]+ \| `(.*)` \|$", DOCUMENTS[README], re.MULTILINE),
    *(text for text in JSON_BLOCKS if text not in (SHIPPED_RULES, *SETTING_EXAMPLES)),
]


@pytest.mark.parametrize("example", SETTING_EXAMPLES)
def test_every_setting_can_be_copied(tmp_path: Path, example: str) -> None:
    path = tmp_path / "saslquota.json"
    path.write_text(f"{{{example}}}", "utf-8")
    load_config(path, {})


def test_the_rules_are_the_shipped_ones() -> None:
    assert (ROOT / "quotarules.json").read_text("utf-8") == SHIPPED_RULES


@pytest.mark.parametrize("example", RULE_EXAMPLES)
def test_every_rule_can_be_copied(tmp_path: Path, example: str) -> None:
    """Together with what the shipped file has for everybody else."""
    assert len(RULE_EXAMPLES) > 20
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


# --- Limits from a database -----------------------------------------------------------------------

LIMITS = "Limits from a database"
LIMITS_QUERY = block(RULES, LIMITS, "sql")
LIMITS_SCRIPT = block(RULES, LIMITS, "sh")
LIMITS_CRON = block(RULES, LIMITS, "")
MAILBOXES = (
    "CREATE TABLE mailbox (username VARCHAR(255) CHARACTER SET {} NOT NULL PRIMARY KEY,"
    " msgquota INT NULL)"
)


class Panel:
    """A panel's database, and the files of an /opt/saslquota that is the daemon's directory."""

    def __init__(self, server: MariaDB, started: Daemon, charset: str = "utf8mb4") -> None:
        self.database = server.create_database(with_table=False)
        self.database.sql(MAILBOXES.format(charset))
        self.directory = started.directory
        self.rules = self.directory / "quotarules.json"
        (self.directory / "quotarules.sql").write_text(LIMITS_QUERY)

    def add(self, *rows: tuple[str, int | None]) -> None:
        values = ", ".join(f"('{name}', {'NULL' if n is None else n})" for name, n in rows)
        self.database.sql(f"SET NAMES utf8mb4; INSERT INTO mailbox VALUES {values}")

    def update(self) -> str:
        """Do what cron does."""
        server = self.database.server
        script = self.directory / "saslquota-rules"
        shell_script = LIMITS_SCRIPT
        for old, new in (
            ("/opt/saslquota", f"{self.directory}"),
            ("mysql --", f"{server.CLIENT} --no-defaults -uroot -S{server.socket} --"),
            ("runuser -u saslquota -- ", ""),
            (
                "venv/bin/python saslquota.py",
                f"{sys.executable} {ROOT}/saslquota.py -c saslquota.json",
            ),
        ):
            assert old in shell_script
            shell_script = shell_script.replace(old, new)
        script.write_text(shell_script)
        times, _root, command = LIMITS_CRON.strip().partition(" root ")
        assert times == "*/5 * * * *"
        return shell(
            command,
            ("/usr/local/sbin/saslquota-rules", f"{script}"),
            (" vmail", f" {self.database.name}"),
        )

    def stamp(self) -> tuple[int, int]:
        """It changes when the file of the rules is replaced or written."""
        found = self.rules.stat()
        return found.st_ino, found.st_mtime_ns

    def files(self) -> set[str]:
        return {path.name for path in self.directory.glob("quotarules.*")}


def test_limits_from_a_database(daemon: START, each_server: MariaDB) -> None:
    """50,000 of them, while the daemon serves. (MySQL need not show the same again.)"""
    boxes = 500 if isinstance(each_server, MySQL) else 50_000
    started = daemon()
    panel = Panel(each_server, started)
    panel.add(*((f"box{number}@example.com", number % 100) for number in range(boxes)))
    panel.add(("josé@example.com", 2), ('"a b"@example.com', 1), ("o''neil@example.com", 1))

    def serve() -> None:
        assert policy.ask(sasl_username="ann@example.net").startswith(("OK", "REJECT "))

    with started.policy() as policy, in_background(serve):
        assert panel.update() == ""
        wait_for_log(started, "rules reloaded: ")
    assert modes(panel.rules) == ["0o644"]
    assert panel.files() == {"quotarules.json", "quotarules.sql", "quotarules.check"}
    assert len(json.loads(panel.rules.read_text("utf-8"))) == 1 + boxes * 99 // 100 + 3
    with started.policy() as policy:
        for login, quota in (
            (f"box{boxes - 97}@example.com", 3),
            ("josé@example.com", 2),
            ('"a b"@example.com', 1),
            ("o'neil@example.com", 1),
        ):
            answers = [policy.ask(sasl_username=login)[:6] for _ in range(quota + 1)]
            assert answers == ["OK"] * quota + ["REJECT"], login
        assert policy.ask(sasl_username="box100@example.com") == "OK"  # 0: it has the default
    assert "unavailable" not in started.log()


def test_limits_that_did_not_change(daemon: START, each_server: MariaDB) -> None:
    panel = Panel(each_server, daemon(), "latin1")
    panel.add(("josé@example.com", 2), ("none@example.com", None))
    panel.update()
    rules = json.loads(panel.rules.read_text("utf-8"))
    assert rules == {
        "default": {"period": "1h", "msgquota": 200},
        "josé@example.com": {"msgquota": 2},
    }
    before = panel.stamp()
    panel.update()
    assert panel.stamp() == before
    panel.database.sql("DELETE FROM mailbox")
    panel.update()
    rules = json.loads(panel.rules.read_text("utf-8"))
    assert rules == {"default": {"period": "1h", "msgquota": 200}}


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("DROP TABLE mailbox", "mailbox' doesn't exist"),
        ("INSERT INTO mailbox VALUES ('a b.example', 1), ('a@b c', 1)", "no login has a space"),
    ],
    ids=["query", "mistake"],
)
def test_limits_that_cannot_be_had(
    daemon: START, each_server: MariaDB, cause: str, reason: str
) -> None:
    """The old file stays, and somebody is told."""
    panel = Panel(each_server, daemon())
    panel.add(("ann@example.com", 2))
    panel.update()
    before = panel.stamp(), panel.files()
    panel.database.sql(cause)
    with pytest.raises(AssertionError, match=reason):
        panel.update()
    assert (panel.stamp(), panel.files()) == before


# --- The production set-up, and what comes after it -----------------------------------------------

INSTALLS = [
    block(README, "1. Install", "sh", "./install"),
    block(INSTALL, "MySQL or MariaDB", "sh", "./install"),
    block(UPGRADING, "From 2.0 on", "sh", "./install"),
    block(UPGRADING, "Uninstalling", "sh", "./install"),
]
USER = block(INSTALL, "The program", "sh", "useradd")
USE_SQLITE = block(INSTALL, "The settings", "sh", "_sqlitefile")
CHECK = block(README, "2. Configure", "sh", "--check")
UNDER_SUPERVISORD = block(INSTALL, "The service", "sh", "reread")
STATUS_OF_SERVICE = block(README, "3. Look", "sh", "supervisorctl")
LISTENS = block(README, "3. Look", "sh", "ss -ltn")
RESTART_AND_RELOAD = block(OPERATION, "Restart and reload", "sh", "HUP")
CHECK_AND_RESTART = block(OPERATION, "Restart and reload", "sh", "--check")
CHECK_AT_NIGHT = block(OPERATION, "When something is down", "sh", "--check")
START_AT_NIGHT = block(OPERATION, "When something is down", "sh", "supervisorctl start")
UPGRADE = block(UPGRADING, "From 2.0 on", "sh", "install -m")
WAY_BACK = block(UPGRADING, "From 2.0 on", "sh", "py.old; do cp")
STOP_THE_OLD = block(UPGRADING, "From noskoski/postfix_saslquota 1.x", "sh")
UNINSTALL = block(UPGRADING, "Uninstalling", "sh", "userdel")
UNINSTALL_DATABASE = block(UPGRADING, "Uninstalling", "sql")
UNINSTALL_POSTFIX = block(UPGRADING, "Uninstalling", "sh", "postconf")


class Production:
    """README.md's production set-up below a directory, as the user who runs the tests."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.opt = directory / "opt"
        self.log = directory / "log" / "saslquota.log"
        (directory / "sbin").mkdir()
        self.supervisor = EmptySupervisor(directory, free_port())

    def private(self, text: str) -> str:
        """The commands with everything that belongs to the system replaced."""
        for old, new in (
            ("/opt/saslquota", f"{self.opt}"),
            ("/usr/local/sbin", f"{self.directory}/sbin"),
            ("/var/lib/saslquota", f"{self.directory}/lib"),
            ("/etc/supervisor/conf.d", f"{self.directory}/conf.d"),
            ("/var/log/supervisor", f"{self.directory}/log"),
            ("supervisorctl ", f"supervisorctl --configuration {self.supervisor.config} "),
            ("runuser -u saslquota -- ", ""),
            ("-o saslquota -g saslquota ", ""),
            ("-g saslquota ", ""),
            ("10008", str(self.supervisor.port)),
        ):
            text = text.replace(old, new)
        assert not re.search(r"[\s'\"=]/(?:opt|etc|var)/", text), text
        return text

    def run(self, script: str) -> str:
        return shell(self.private(script))

    def is_running(self) -> bool:
        """As the last of README.md's commands says."""
        command = self.private(UNDER_SUPERVISORD.splitlines()[-1]).split()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return "RUNNING" in done.stdout

    def wait(self) -> None:
        wait_for(self.is_running, 20, "RUNNING")
        wait_for(lambda: is_listening(self.supervisor.port), 20, "it listens")


INSTALL_FILES = "".join(USER.splitlines(keepends=True)[1:])  # all but useradd


@contextmanager
def installed(directory: Path) -> Iterator[Production]:
    """The set-up, made and started step by step."""
    require("supervisord", "supervisorctl")
    made = Production(directory)
    made.run(INSTALL_FILES)
    made.run(USE_SQLITE)
    assert "will be made at the first start" in made.run(CHECK)
    with made.supervisor:
        copy, reread, update, _status = UNDER_SUPERVISORD.splitlines()
        made.run(copy)
        conf = made.directory / "conf.d" / "saslquota_supervisor.conf"
        conf.write_text(made.private(conf.read_text()).replace("user=saslquota\n", ""))
        assert "saslquota: available" in made.run(reread)
        assert "saslquota: added process group" in made.run(update)
        made.wait()
        yield made


@pytest.fixture(scope="module")
def production(new_directory: Callable[[], Path]) -> Iterator[Production]:
    with installed(new_directory()) as made:
        yield made


def modes(*paths: Path) -> list[str]:
    return [oct(path.stat().st_mode & 0o777) for path in paths]


def test_the_user(new_directory: Callable[[], Path]) -> None:
    require("useradd", root=True)
    root = new_directory()
    (root / "etc").mkdir()
    for name in ("passwd", "group", "shadow", "gshadow"):
        (root / "etc" / name).touch()
    (root / "etc" / "login.defs").write_text("USERGROUPS_ENAB yes\n")  # as Debian's
    shell(USER.splitlines()[0], ("useradd ", f"useradd --prefix {root} "))
    (user,) = (root / "etc" / "passwd").read_text().splitlines()
    assert re.fullmatch(r"saslquota:x:(\d+):\1::/var/lib/saslquota:/usr/sbin/nologin", user)
    shell(UNINSTALL.splitlines()[-1], ("userdel ", f"userdel --prefix {root} "))
    assert (root / "etc" / "passwd").read_text() == (root / "etc" / "group").read_text() == ""


@pytest.mark.parametrize("script", INSTALLS)
def test_install(script: str) -> None:
    """It is run by test_install.py, and as it is shipped by test_install_on_debian.py."""
    program, *options = script.split()
    assert (ROOT / program).stat().st_mode & 0o111
    usage = subprocess.run(["sh", ROOT / program, "--help"], capture_output=True, text=True).stdout
    assert set(options) <= set(re.findall(r"--\w+", usage))


@pytest.mark.slow
def test_production(production: Production) -> None:
    opt, lib = production.opt, production.directory / "lib"
    assert modes(opt, lib) == ["0o755", "0o750"]
    assert modes(opt / "saslquota.json", opt / "quotarules.json") == ["0o640", "0o644"]
    config = load_config(opt / "saslquota.json", {})
    assert (config.loglevel, config.store) == ("INFO", "sqlite")
    assert UNDER_SUPERVISORD.splitlines(keepends=True)[-1] == STATUS_OF_SERVICE
    if shutil.which("ss"):
        production.run(LISTENS)
    with PolicyClient(production.supervisor.port) as policy:
        assert policy.ask() == "OK"
    assert (lib / "saslquota.db").exists()
    control = production.directory / "sbin" / "saslquotactl.py"
    environment = production.supervisor.environment()  # has the daemon's port
    assert "alice@example.com" in run([control, "top"], env=environment)
    assert run([control, "status", "-q"], env=environment) == ""


@pytest.mark.slow
def test_production_restarts_and_reloads(production: Production) -> None:
    restart, hup = RESTART_AND_RELOAD.splitlines()
    assert "saslquota: signalled" in production.run(hup)
    wait_for(lambda: "rules reloaded" in production.log.read_text(), 5, "the signal has come")
    assert "saslquota: started" in production.run(restart)
    production.wait()


@pytest.mark.slow
def test_production_was_stopped(production: Production) -> None:
    assert "saslquota: stopped" in production.run(STOP_THE_OLD)
    status, tail, start = START_AT_NIGHT.splitlines()
    assert "STOPPED" in production.run(f"{status} || true")
    assert "stopped by SIGTERM" in production.run(tail)
    assert "saslquota: started" in production.run(start)
    production.wait()
    assert CHECK_AT_NIGHT == CHECK


@pytest.mark.slow
def test_production_rules_with_a_mistake(production: Production) -> None:
    """The running daemon keeps the previous ones; a restart would be the end of it."""
    rules = production.opt / "quotarules.json"
    good = rules.read_text("utf-8")
    rules.write_text(good.replace('"period": 120', '"period": 120s'), "utf-8")
    try:
        wait_for(lambda: "rules not reloaded" in production.log.read_text(), 5, "it is noticed")
        with pytest.raises(AssertionError, match=r"quotarules.json, line"):
            production.run(CHECK_AND_RESTART)
        with PolicyClient(production.supervisor.port) as policy:
            assert policy.ask() == "OK"
            production.run(f"{RESTART_AND_RELOAD.splitlines()[0]} || true")
            wait_for(policy.is_closed, 10, "the old one ends")
        wait_for(lambda: "saslquota: /" in production.log.read_text(), 20, "it says why not")
        assert not is_listening(production.supervisor.port)
    finally:
        rules.write_text(good, "utf-8")
    assert "saslquota: started" in production.run(CHECK_AND_RESTART)
    production.wait()


def test_the_steps_again_change_nothing(new_directory: Callable[[], Path]) -> None:
    """Settings and rules of an administrator's, in the two places where they may be."""
    made = Production(new_directory())
    venv = INSTALL_FILES.splitlines(keepends=True)[-1]
    etc = made.directory / "etc"
    assert "venv" in venv
    steps = made.private(INSTALL_FILES.replace(venv, "") + USE_SQLITE)
    steps += PIP_FILES.replace("/etc/saslquota", str(etc)).replace("-g saslquota ", "")
    shell(steps)
    settings = '{"_store": "sqlite", "_loglevel" : "WARNING", "_sqlitefile": "/srv/quota.db"}'
    files = [at / name for at in (made.opt, etc) for name in ("saslquota.json", "quotarules.json")]
    for path in files:
        path.write_text(settings)
    shell(steps + made.private(UPGRADE.splitlines()[1]))
    assert [path.read_text() for path in files] == [settings] * 4


@pytest.mark.slow
def test_production_upgrade_and_the_way_back(production: Production) -> None:
    script = production.opt / "saslquota.py"
    new = script.read_text("utf-8")
    old = new.replace('__version__ = "', '__version__ = "0.')
    assert old != new
    script.write_text(old, "utf-8")
    for steps, version in ((UPGRADE, new), (WAY_BACK, old), (UPGRADE, new)):
        assert "saslquota: started" in production.run(steps)
        assert script.read_text("utf-8") == version
        production.wait()
        with PolicyClient(production.supervisor.port) as policy:
            assert policy.ask() == "OK"


@pytest.mark.slow
def test_production_is_uninstalled(production: Production) -> None:
    """The last one of these."""
    *commands, userdel = UNINSTALL.splitlines(keepends=True)
    assert userdel == "userdel saslquota\n"
    assert "saslquota: removed process group" in production.run("".join(commands))
    assert not is_listening(production.supervisor.port)
    for name in ("opt", "lib", "conf.d/saslquota_supervisor.conf", "sbin/saslquotactl.py"):
        assert not (production.directory / name).exists()


# --- systemd, a Unix-domain socket ----------------------------------------------------------------

UNDER_SYSTEMD = block(INSTALL, "systemd", "sh")
SOCKET_DIRECTORY = block(INSTALL, "A Unix-domain socket", "sh", "install")
SOCKET_SETTING = block(INSTALL, "A Unix-domain socket", "json")
SOCKET_MAIN = block(INSTALL, "A Unix-domain socket", "sh", "postconf")
UNIT = ROOT / "contrib" / "systemd" / "saslquota.service"


def test_systemd(new_directory: Callable[[], Path]) -> None:
    """As far as it goes without being process 1; tests/test_systemd.py verifies the unit."""
    require("systemctl")
    root = new_directory()
    units = root / "etc" / "systemd" / "system"
    units.mkdir(parents=True)
    copy, reload, enable = UNDER_SYSTEMD.splitlines()
    shell(copy, ("/etc/systemd/system/", f"{units}/"))
    assert reload == "systemctl daemon-reload"
    shell(enable, ("systemctl enable --now ", f"systemctl --root={root} enable "))
    assert (units / "multi-user.target.wants" / "saslquota.service").is_symlink()


def test_the_commands_of_systemd() -> None:
    """Those of supervisord are run above; a reload is SIGHUP."""
    rows = re.findall(r"^\| `(supervisorctl .*)` \| `(.*)` \|$", DOCUMENTS[INSTALL], re.MULTILINE)
    assert [systemd.split()[1] for _, systemd in rows] == ["status", "restart", "reload"]
    for supervisord, _ in rows:
        assert f"{supervisord}\n" in UNDER_SUPERVISORD + RESTART_AND_RELOAD
    assert "ExecReload=/bin/kill -HUP $MAINPID\n" in UNIT.read_text("utf-8")


def test_the_unix_socket(daemon: START, stock: Path, new_directory: Callable[[], Path]) -> None:
    """tests/test_unix_socket.py shows who can connect to it, from a chroot too."""
    queue = new_directory()
    private = ("/var/spool/postfix", str(queue))
    shell(SOCKET_DIRECTORY, ("-o saslquota -g postfix ", ""), private)
    assert oct((queue / "saslquota").stat().st_mode & 0o7777) == "0o2750"
    started = daemon(json.loads(f"{{{SOCKET_SETTING.replace(*private)}}}"))
    assert "listening on unix:" in started.log()
    assert modes(queue / "saslquota" / "policy") == ["0o660"]
    postconf(SOCKET_MAIN, stock)
    (path,) = re.findall("^saslquota = check_policy_service unix:(.*)$", main_cf(stock), re.M)
    assert (queue / path).is_socket()


PIP_FILES = block(INSTALL, "With pip", "sh")


def test_settings_after_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script lies in site-packages then, without any settings beside it."""
    etc, packages = tmp_path / "etc", tmp_path / "packages"
    shell(PIP_FILES.replace("/etc/saslquota", str(etc)), ("-g saslquota ", ""))
    assert modes(etc, etc / "saslquota.json") == ["0o755", "0o640"]
    packages.mkdir()
    monkeypatch.setattr(saslquota, "__file__", str(packages / "saslquota.py"))
    monkeypatch.setattr(saslquota, "SYSTEM_CONFIG", etc / "saslquota.json")
    assert saslquota.main(["--check"]) == 0


# --- MySQL ----------------------------------------------------------------------------------------

MYSQL = "MySQL or MariaDB"
PIP = block(INSTALL, MYSQL, "sh", "pip install")
CREATE = block(INSTALL, MYSQL, "sql")
USE_MYSQL = block(INSTALL, MYSQL, "sh", "mysql.sql")
SET_PASSWORD = block(INSTALL, MYSQL, "sh", "getpass")
AWKWARD = "&| \\/\"'$` %*ü "
LEAST_RIGHTS = block("SECURITY.md", "The database account", "sql")


@pytest.fixture
def server(each_server: MariaDB) -> MariaDB:
    """What the documents say of MySQL and MariaDB is tried on both."""
    return each_server


def test_pip() -> None:
    """The tests' own environment has it already."""
    pip = ("/opt/saslquota/venv/bin/pip", f"{sys.executable} -m pip")
    upgrade = (" -U ", " ")  # which would change it
    assert "already satisfied: mysql-connector-python" in shell(PIP, pip, upgrade)


@pytest.fixture(params=["all rights", "least rights"])
def named_database(
    request: pytest.FixtureRequest, server: MariaDB, new_directory: Callable[[], Path]
) -> Iterator[Database]:
    """The database that docs/install.md's statements make, but for its name."""
    name, password = "readme", AWKWARD
    doubled = password.replace("'", "''").replace("\\", "\\\\")
    create, rights = CREATE.replace("change-me", doubled), ""
    if request.param == "least rights":
        create = "".join(s for s in create.splitlines(keepends=True) if "GRANT" not in s)
        rights = LEAST_RIGHTS + LEAST_RIGHTS.replace("localhost", f"'{LOOPBACK}'")
    client = f"{server.CLIENT} --no-defaults -uroot -S{server.socket} {name}"
    opt = copy_shipped(new_directory())
    try:
        server.sql(re.sub(r"\bsaslquota\b", name, create))
        load, edit = USE_MYSQL.splitlines()
        shell(load, ("mysql saslquota", client))
        shell(edit, ("/opt/saslquota", str(opt)))
        shell(SET_PASSWORD, ("/opt/saslquota", str(opt)), stdin=password + "\n")
        server.sql(re.sub(r"\bsaslquota\b", name, rights))
        config = load_config(opt / "saslquota.json", {})
        assert (config.store, config.mypasswd, config.loglevel) == ("mysql", password, "INFO")
        yield Database(server, name, "localhost", server.port, name, password)
    finally:
        server.sql(re.sub(r"\bsaslquota\b", name, UNINSTALL_DATABASE))
    assert name not in server.sql("SHOW DATABASES; SELECT user FROM mysql.user")


@pytest.mark.parametrize("password", [*AWKWARD, AWKWARD, "a\\n&b", "$HOME", '"}'])
def test_any_password_can_be_set(tmp_path: Path, password: str) -> None:
    """The other settings stay, and so do the owner and mode of the file."""
    path = copy_shipped(tmp_path / "opt") / "saslquota.json"
    path.chmod(0o640)
    before = json.loads(path.read_text("utf-8"))
    shell(SET_PASSWORD, ("/opt/saslquota", str(path.parent)), stdin=password + "\n")
    assert json.loads(path.read_text("utf-8")) == {**before, "_mypasswd": password}
    assert modes(path) == ["0o640"]
    load_config(path, {})


def test_production_with_mysql(daemon: START, named_database: Database) -> None:
    """Its user may do all that the daemon and saslquotactl.py do."""
    started = daemon(named_database.config())
    with started.policy() as policy:
        assert [policy.ask() for _ in range(3)] == ["OK"] * 3
    assert named_database.sql("SELECT total FROM sends ORDER BY seq DESC LIMIT 1") == "3"
    for command in ("status", "show alice@example.com", "reset alice@example.com"):
        control(f"saslquotactl.py {command}", started.config_file)
    assert named_database.sql("SELECT kind FROM events") == "reset"
    said = shell(
        CHECK,
        ("runuser -u saslquota -- /opt/saslquota/venv/bin/python", sys.executable),
        ("/opt/saslquota/saslquota.py", f"{ROOT}/saslquota.py -c {started.config_file}"),
    )
    assert "table sends found" in said


# --- Postfix --------------------------------------------------------------------------------------

MAIN = block(README, "4. Postfix: main.cf", "sh", "inet:127.0.0.1:10008'")
MAIN_WITHOUT_DAEMON = block(README, "4. Postfix: main.cf", "sh", "default_action")
MASTER = block(README, "5. Postfix: master.cf", "sh", "=$saslquota")
VERIFY = block(README, "5. Postfix: master.cf", "sh", "'*/inet/")
VERIFIED = block(README, "5. Postfix: master.cf", "", "submission/inet")
RELOAD = block(README, "5. Postfix: master.cf", "sh", "reload")
REFUSAL = block(README, "saslquota", "")
UNCOMMENT = block(INSTALL, "Postfix: submission", "sh")
PER_MESSAGE = block(INSTALL, "Recipients or messages", "sh")
OTHER_MASTER = block(INSTALL, "Other mail systems", "sh")
PORT_25 = block(INSTALL, "Port 25", "sh")
BYPASS = block(OPERATION, "When something is down", "sh", "saslquota ='")


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


def main_cf(directory: Path) -> str:
    return (directory / "main.cf").read_text()


def uncomment(directory: Path) -> None:
    shell(UNCOMMENT, ("/etc/postfix", str(directory)))


def test_main_cf(stock: Path) -> None:
    postconf(MAIN, stock)
    line = "saslquota = check_policy_service inet:127.0.0.1:10008\n"
    assert main_cf(stock) == line
    postconf(MAIN_WITHOUT_DAEMON, stock)
    line = (
        "saslquota = check_policy_service"
        " { inet:127.0.0.1:10008, timeout=10s, default_action=DUNNO }\n"
    )
    assert main_cf(stock) == line
    default = run(["postconf", "-d", "-h", "smtpd_policy_service_default_action"]).strip()
    assert f"`{default}`" in DOCUMENTS[README]


def test_master_cf(stock: Path) -> None:
    """Both stock entries are hooked, once, and nothing else is."""
    postconf(MAIN, stock)
    uncomment(stock)
    before = postconf("postconf -M; postconf -P", stock)
    postconf(MASTER, stock)
    assert postconf(VERIFY, stock) == VERIFIED
    after = postconf("postconf -M; postconf -P", stock)
    assert after.count("$saslquota") == 4  # twice in either list
    assert after.replace("$saslquota", "").split() == before.split()
    assert (stock / "master.cf").read_text().count("smtpd_client_restrictions=$saslquota") == 2


def test_master_cf_twice_changes_nothing(stock: Path) -> None:
    postconf(MAIN, stock)
    for _ in range(2):
        uncomment(stock)
        postconf(MASTER, stock)
        assert postconf(VERIFY, stock) == VERIFIED


def test_a_line_above_the_empty_one_shows_when_verifying(stock: Path) -> None:
    """Postfix uses only the last one."""
    uncomment(stock)
    path = stock / "master.cf"
    empty = "  -o smtpd_client_restrictions=\n"
    path.write_text(path.read_text().replace(empty, empty.strip("\n") + "$saslquota\n" + empty))
    assert "saslquota" not in postconf(VERIFY, stock)


def test_master_cf_per_message(stock: Path) -> None:
    postconf(MAIN, stock)
    uncomment(stock)
    postconf(MASTER, stock)
    postconf(PER_MESSAGE, stock)
    assert "saslquota" not in postconf(VERIFY, stock)
    assert postconf("postconf -P '*/inet/smtpd_data_restrictions'", stock) == VERIFIED.replace(
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
    assert seen.replace(LOOPBACK, "192.0.2.1") == REFUSAL


EXEMPT = "check_recipient_access inline:{r1@example.net=OK}"


def send_to_three(instance: Postfix) -> None:
    with instance.login() as client:
        to = [f"r{number}@example.net" for number in range(3)]
        client.sendmail("alice@example.com", to, "Subject: x\n\n")


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({"smtpd_client_restrictions": "permit_mynetworks, $saslquota"}, 0),
        ({"smtpd_client_restrictions": "permit_sasl_authenticated, $saslquota"}, 0),
        ({"smtpd_client_restrictions": f"{EXEMPT}, $saslquota"}, 2),
        ({"smtpd_client_restrictions": "$saslquota, permit_mynetworks"}, 3),
        ({"smtpd_recipient_restrictions": "$saslquota, permit_sasl_authenticated, reject"}, 6),
    ],
    ids=["behind-mynetworks", "behind-authenticated", "behind-a-table", "before", "twice"],
)
def test_wrong_places(
    daemon: START, postfix: Callable[..., Postfix], options: dict[str, str], counted: int
) -> None:
    """What three recipients cost."""
    started = daemon()
    instance = postfix(f"check_policy_service inet:{LOOPBACK}:{started.port}", options=options)
    send_to_three(instance)
    rows = sqlite_rows(started.directory / "saslquota.db", "SELECT seq FROM sends")
    assert len(rows) == counted


@pytest.mark.parametrize(
    ("value", "okaction", "code"),
    [
        ("$saslquota,reject_sender_login_mismatch", "OK", 250),
        ("$saslquota,reject_sender_login_mismatch", "DUNNO", 553),
        ("reject_sender_login_mismatch,$saslquota", "OK", 553),
    ],
)
def test_before_a_check_that_refuses(
    daemon: START, postfix: Callable[..., Postfix], value: str, okaction: str, code: int
) -> None:
    """OK ends the list, DUNNO does not."""
    policy = f"check_policy_service inet:{LOOPBACK}:{daemon({'_okaction': okaction}).port}"
    owner = {"smtpd_sender_login_maps": "inline:{ceo@example.com=ceo@example.com}"}
    options = {"smtpd_client_restrictions": value}
    with postfix(policy, owner, options).login() as client:
        client.mail("ceo@example.com")
        assert client.rcpt("r0@example.net")[0] == code


AT = {
    "RCPT": {},
    "DATA": {"smtpd_client_restrictions": "", "smtpd_data_restrictions": "$saslquota"},
}


@pytest.mark.parametrize("stage", AT)
def test_what_a_message_costs(daemon: START, postfix: Callable[..., Postfix], stage: str) -> None:
    """The rows of docs/install.md's table, and what is said below it."""
    started = daemon(rules={"default": {"period": 3600, "msgquota": 7}})
    refuse = "check_recipient_access inline:{unknown@example.net=REJECT}, permit_sasl_authenticated"
    policy = f"check_policy_service inet:{LOOPBACK}:{started.port}"
    main = {
        "header_checks": "regexp:{{/^Subject: refused/ REJECT}}",
        "smtpd_recipient_limit": "5",
    }
    instance = postfix(
        policy, main, {**AT[stage], "smtpd_recipient_restrictions": f"{refuse}, reject"}
    )
    charged: list[int] = []

    def cost() -> int:
        rows = sqlite_rows(started.ledger, "SELECT recipients FROM sends ORDER BY seq")
        found = [int(row) for row in rows[len(charged) :]]
        charged.extend(found)
        return sum(found)

    with instance.login() as client:

        def name(*recipients: str) -> list[int]:
            client.mail("alice@example.com")
            return [client.rcpt(f"{name}@example.net")[0] for name in recipients]

        at_rcpt = stage == "RCPT"
        assert name("a", "unknown") == [250, 554]
        assert client.data("Subject: x\n\n")[0] == 250
        assert cost() == (2 if at_rcpt else 1)
        assert name("a") == [250]
        client.rset()
        assert cost() == (1 if at_rcpt else 0)
        assert name("a") == [250]
        assert client.data("Subject: refused\n\n")[0] == 550
        assert cost() == 1
        if at_rcpt:
            assert name("a", "b", "c", "d") == [250, 250, 250, 554]
            client.rset()
            assert cost() == 3
        else:
            assert name("a", "b", "c") == [250] * 3
            assert client.data("Subject: x\n\n")[0] == 250
            assert cost() == 3
            assert name("a", "b", "c", "d", "e", "f") == [250] * 5 + [452]
            with pytest.raises(smtplib.SMTPDataError, match="554"):
                client.data("Subject: x\n\n")
            assert cost() == 0
    limit = run(["postconf", "-d", "-h", "smtpd_recipient_limit"]).strip()
    assert f"`smtpd_recipient_limit` recipients ({limit})" in DOCUMENTS[INSTALL]


@pytest.mark.parametrize(("stage", "rows"), [("RCPT", 3), ("DATA", 1)])
def test_messages_with_a_connection_for_each_request(
    daemon: START, postfix: Callable[..., Postfix], stage: str, rows: int
) -> None:
    started = daemon(rules={"default": {"period": 3600, "msgquota": 7, "count": "messages"}})
    policy = f"check_policy_service inet:{LOOPBACK}:{started.port}"
    send_to_three(postfix(policy, {"smtpd_policy_service_request_limit": "1"}, AT[stage]))
    assert sqlite_rows(started.ledger, "SELECT recipients FROM sends") == ["1"] * rows


def test_mail_of_sendmail_is_not_counted(daemon: START, postfix: Callable[..., Postfix]) -> None:
    """As of cron and PHP's mail(), which use it."""
    require("sendmail")
    started = daemon()
    instance = postfix(f"check_policy_service inet:{LOOPBACK}:{started.port}")
    sendmail = ["sendmail", "-C", str(instance.config), "-f", "alice@example.com"]
    run([*sendmail, "r0@example.net"], stdin="Subject: x\n\n")
    wait_for_log(instance, "to=<r0@example.net>.* status=sent")
    assert "sasl_username" not in started.log()


def test_from_recipients_to_messages(daemon: START, postfix: Callable[..., Postfix]) -> None:
    """The statements that change the entries of a Postfix that runs, and the reload."""
    started = daemon()
    instance = postfix(f"check_policy_service inet:{LOOPBACK}:{started.port}")
    ledger = started.directory / "saslquota.db"

    def rows_of_a_message() -> list[str]:
        before = len(sqlite_rows(ledger, "SELECT seq FROM sends"))
        send_to_three(instance)
        return sqlite_rows(ledger, f"SELECT recipients FROM sends WHERE seq > {before}")

    assert rows_of_a_message() == ["1", "1", "1"]
    change = PER_MESSAGE
    change = change.replace("submission/", f"{LOOPBACK}:{instance.port}/")
    postconf(change.replace("submissions/", f"{LOOPBACK}:{instance.tls_port}/"), instance.config)
    shell(RELOAD, ("postfix ", f"postfix -c {instance.config} "))
    wait_for(lambda: rows_of_a_message() == ["3"], 20, "Postfix has read it")


def test_on_port_25_nobody_could_deliver(daemon: START, postfix: Callable[..., Postfix]) -> None:
    policy = f"check_policy_service inet:{LOOPBACK}:{daemon().port}"
    instance = postfix(policy)
    with instance.login(None) as session, pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
        session.sendmail("a@example.net", ["b@example.com"], "Subject: x\n\n")
    assert "authentication required" in str(refused.value)
    assert "`authentication required`" in DOCUMENTS[README]


def test_port_25(daemon: START, new_directory: Callable[[], Path]) -> None:
    """A sender who is refused sends on there, until its entry says no."""
    require("postfix", "postconf", "saslpasswd2", "openssl", root=True)
    rules = {"default": {"period": 3600, "msgquota": 1}}
    policy = f"check_policy_service inet:{LOOPBACK}:{daemon(rules=rules).port}"
    main = {"smtpd_sasl_auth_enable": "yes", "smtpd_tls_security_level": "may"}
    instance = Postfix(new_directory(), policy, main)
    port_25 = free_port()
    entry = f"{LOOPBACK}:{port_25}"
    instance.postconf("-M", f"{entry}/inet={entry} inet n - y - - smtpd")

    def passes(port: int) -> bool:
        with smtplib.SMTP(LOOPBACK, port, timeout=30) as client:
            client.starttls(context=any_certificate())
            client.ehlo()
            if not client.has_extn("auth"):
                return False
            client.login("alice@example.com", Postfix.PASSWORD)
            return is_accepted(client)

    with instance:
        assert [passes(instance.port) for _ in range(2)] == [True, False]
        assert passes(port_25)
        postconf(PORT_25.replace("smtp/", f"{entry}/"), instance.config)
        shell(RELOAD, ("postfix ", f"postfix -c {instance.config} "))
        wait_for(lambda: not passes(port_25), 20, "Postfix has read it")
        with instance.login():  # still
            pass


OTHER_SYSTEMS = re.findall(
    r"^\| [^|]+ \| (?:`(.*)`|\(empty.*\)) \| `(.*\$saslquota.*)` \|$",
    DOCUMENTS[INSTALL],
    re.MULTILINE,
)


@pytest.mark.parametrize(("before", "after"), OTHER_SYSTEMS)
def test_other_mail_systems(
    daemon: START, new_directory: Callable[[], Path], before: str, after: str
) -> None:
    """Each value that an entry may hold, and the one that takes its place."""
    assert len(OTHER_SYSTEMS) == 5
    assert after.replace("$saslquota", "").replace(",,", ",").strip(",") == before
    require("postfix", "postconf", "saslpasswd2", "openssl", root=True)
    started = daemon()
    policy = f"check_policy_service inet:{LOOPBACK}:{started.port}"
    main = {
        "mua_client_restrictions": "permit_sasl_authenticated,reject",
        "smtpd_sender_login_maps": "inline:{alice@example.com=alice@example.com}",
    }
    options = {"smtpd_client_restrictions": before}
    instance = Postfix(new_directory(), policy, main, options)
    (value,) = re.findall(r"=(.*)'", OTHER_MASTER)
    change = OTHER_MASTER.replace(value, after)
    postconf(change.replace("submission/", f"{LOOPBACK}:{instance.port}/"), instance.config)
    with instance:
        send_to_three(instance)
        assert len(sqlite_rows(started.directory / "saslquota.db", "SELECT seq FROM sends")) == 3
        with instance.login(None) as client, pytest.raises(smtplib.SMTPRecipientsRefused):
            client.sendmail("a@example.net", ["b@example.com"], "Subject: x\n\n")


@pytest.mark.parametrize("nosasl", ["REJECT", "DUNNO"])
def test_without_login_in_mynetworks(
    daemon: START, postfix: Callable[..., Postfix], nosasl: str
) -> None:
    value = "$saslquota,permit_mynetworks,permit_sasl_authenticated,reject"
    options = {
        "smtpd_client_restrictions": value,
        "smtpd_recipient_restrictions": "permit_mynetworks,reject",
    }
    policy = f"check_policy_service inet:{LOOPBACK}:{daemon({'_nosasl': nosasl}).port}"
    with postfix(policy, options=options).login(None) as client:
        client.mail("a@example.net")
        code, text = client.rcpt("b@example.com")
    assert (code, b"authentication required" in text) == ((554, True), (250, False))[
        nosasl == "DUNNO"
    ]


@pytest.fixture
def counted(
    daemon: START, postfix: Callable[..., Postfix]
) -> tuple[Daemon, Postfix, Callable[[], bool]]:
    """A daemon, Postfix before it, and whether a message sent now is counted."""
    started = daemon()
    instance = postfix(f"check_policy_service inet:{LOOPBACK}:{started.port}")

    def is_counted() -> bool:
        before = len(sqlite_rows(started.ledger, "SELECT seq FROM sends"))
        send_to_three(instance)
        return len(sqlite_rows(started.ledger, "SELECT seq FROM sends")) > before

    return started, instance, is_counted


def test_uninstalling_from_postfix(
    counted: tuple[Daemon, Postfix, Callable[[], bool]],
) -> None:
    _, instance, is_counted = counted
    assert is_counted()
    shell(
        UNINSTALL_POSTFIX,
        ("postconf ", f"postconf -c {instance.config} "),
        ("postfix ", f"postfix -c {instance.config} "),
        ("submission/", f"{LOOPBACK}:{instance.port}/"),
        ("submissions/", f"{LOOPBACK}:{instance.tls_port}/"),
    )
    wait_for(lambda: not is_counted(), 20, "Postfix has read it")
    assert "saslquota =" not in main_cf(instance.config)
    assert "$saslquota" not in instance.postconf("-P")


def test_bypass(counted: tuple[Daemon, Postfix, Callable[[], bool]]) -> None:
    """Mail passes uncounted, and is counted again later."""
    started, instance, is_counted = counted
    assert is_counted()
    private = (
        ("postconf ", f"postconf -c {instance.config} "),
        ("postfix ", f"postfix -c {instance.config} "),
    )
    shell(BYPASS, *private)
    wait_for(lambda: not is_counted(), 20, "Postfix has read it")
    shell(MAIN + RELOAD, *private, ("10008", str(started.port)))
    wait_for(is_counted, 20, "Postfix has read it")


# --- netcat ---------------------------------------------------------------------------------------

TRY_51 = block(README, "Try it", "sh", "seq 51")
TRIED_51 = block(README, "Try it", "", "action=REJECT")
LAST_VERDICT = block(README, "Try it", "sh", "/var/log/mail.log")
MONITOR = block(OPERATION, "Monitoring", "sh", "| netcat")
MONITOR_SHORTER = block(OPERATION, "Monitoring", "sh", "| nc -N")


STATUS = block(OPERATION, "Monitoring", "", "version=")


def names(reply: str) -> list[str]:
    return [line.partition("=")[0] for line in reply.splitlines() if line]


def shipped_rules(daemon: START) -> Daemon:
    """A daemon with the shipped rules."""
    return daemon(rules=json.loads((ROOT / "quotarules.json").read_text("utf-8")))


def test_try_it(daemon: START) -> None:
    require("nc.openbsd")
    started = shipped_rules(daemon)
    netcat = ("netcat", "nc.openbsd")
    assert shell(TRY_51, netcat, ("10008", str(started.port))) == TRIED_51

    def last_verdict() -> str:
        return shell(LAST_VERDICT, ("/var/log/mail.log", str(started.output)))

    wait_for(lambda: "action=REJECT" in last_verdict(), 5, "its verdict")


@netcats
def test_monitoring(daemon: START, netcat: str) -> None:
    require(netcat)
    port = ("10008", str(shipped_rules(daemon).port))
    assert names(shell(MONITOR, ("netcat", netcat), port)) == names(STATUS)


@pytest.mark.parametrize("netcat", ["nc.openbsd -N", "nc.traditional -q1"])
def test_monitoring_without_the_empty_request(daemon: START, netcat: str) -> None:
    require(netcat.split()[0])
    documented = re.sub(r"[.]openbsd|[.]traditional", "", netcat)
    assert f"`{documented}`" in DOCUMENTS[OPERATION]
    port = ("10008", str(shipped_rules(daemon).port))
    assert names(shell(MONITOR_SHORTER, ("nc -N", netcat), port)) == names(STATUS)


def test_monitoring_sees_a_database_that_is_down(daemon: START) -> None:
    require("nc.openbsd")
    started = daemon({"_sqlitefile": "missing/saslquota.db"})

    def said() -> str:
        return shell(MONITOR, ("netcat", "nc.openbsd"), ("10008", str(started.port)))

    wait_for(lambda: "store=down" in said().splitlines(), 10, "it has tried")


# --- The log --------------------------------------------------------------------------------------


INFO_LINES = block(OPERATION, "Log", "", "action=REJECT")
DEBUG_LINES = block(OPERATION, "Log", "", "thread started")


def shape(line: str) -> str:
    """A line without what differs from one time and connection to the next."""
    line = re.sub(r"^(?:<\d+>|\w{3} \d+ [\d:]{8} mail )", "", line.strip())
    line = re.sub(r"postfix/saslquota\[\d+\]:", "postfix/saslquota[]:", line)
    line = re.sub(r":\[\d+\] ", ":[] ", line)
    return re.sub(r"(end of recv: |thread stopped : )\([\d.]+\)", r"\1()", line)


def logged(daemon: START, directory: Path, level: str, asks: int) -> list[str]:
    """What syslog gets of equal requests; the quota is 4/1500 at the fourth."""
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
    documented = [shape(line) for line in INFO_LINES.splitlines()]
    assert [line for line in lines if "4/1500" in line or "REJECT" in line] == documented
    assert sum("sasl_username" in line for line in lines) == 6
    assert not any("thread" in line for line in lines)


def test_log_lines_of_debug(daemon: START, new_directory: Callable[[], Path]) -> None:
    lines = logged(daemon, new_directory(), "DEBUG", 4)
    documented = [shape(line) for line in DEBUG_LINES.splitlines()]
    verdict = next(number for number, line in enumerate(lines) if "4/1500" in line)
    assert lines[verdict - 4 : verdict + 2] == documented


SCRIPT = (ROOT / "saslquota.py").read_text("utf-8")
STRINGS = [
    node.value
    for node in ast.walk(ast.parse(SCRIPT))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
]
CAPITALS = re.compile(r"\b[A-Z]{4,}\b")  # in a documented line: what differs


def in_script(line: str) -> bool:
    """Whether the script holds the fixed parts of a documented line."""
    return all(any(part in string for string in STRINGS) for part in CAPITALS.split(line))


def pattern(line: str) -> str:
    return ".+".join(map(re.escape, CAPITALS.split(line)))


LINES = re.findall(r"^\| `(.+?)` \| (ERROR|WARNING|INFO) \|", DOCUMENTS[OPERATION], re.MULTILINE)


def test_each_log_line_of_the_script_is_documented() -> None:
    """Those of the level DEBUG are for developers; a text that is a variable is found elsewhere."""
    texts = re.findall(r"""\blog\.(info|warning|error|exception)\(\s*["'](.*)["'][,)]""", SCRIPT)
    assert len(texts) > 10
    for name, text in texts:
        level = "ERROR" if name == "exception" else name.upper()
        logged = ".+".join(map(re.escape, re.split(r"%(?:\.0f|[ds])", text)))
        assert text == "%s" or any(
            re.match(logged, line) or re.match(pattern(line), text)
            for line, its_level in LINES
            if its_level == level
        ), text


def take_the_file_away(started: Daemon, policy: PolicyClient) -> None:
    ledger = started.directory / "saslquota.db"
    assert policy.ask() == "OK"
    ledger.rename(started.directory / "away")
    ledger.mkdir()
    wait_for(lambda: policy.ask().startswith("DEFER_IF_PERMIT"), 10, "the file is missed")


def date_a_send_ahead(started: Daemon, policy: PolicyClient) -> None:
    assert policy.ask() == "OK"
    started.stop()
    sqlite_rows(started.directory / "saslquota.db", "UPDATE sends SET at = at + 7200000000")
    started.start()
    with started.policy() as another:
        assert another.ask() == "OK"


def connect_again(started: Daemon, policy: PolicyClient) -> None:
    assert policy.ask() == "OK"
    with started.policy() as another:
        assert another.ask() == "OK"


def break_the_rules(started: Daemon, _policy: PolicyClient) -> None:
    (started.directory / "quotarules.json").write_text("{")


def ask_at_connect(_started: Daemon, policy: PolicyClient) -> None:
    assert policy.ask(protocol_state="CONNECT", sasl_username="") == "DUNNO"


def send_junk(_started: Daemon, policy: PolicyClient) -> None:
    policy.send(b"junk\n\n")


Provoke = Callable[[Daemon, PolicyClient], None]
PROVOKED: Mapping[str, tuple[Mapping[str, object], Provoke]] = {
    "database unavailable, CONSEQUENCE": ({}, take_the_file_away),
    "is lost": ({}, take_the_file_away),
    "is dated": ({}, date_a_send_ahead),
    "rules not reloaded": ({}, break_the_rules),
    "nothing is counted": ({}, ask_at_connect),
    "malformed input": ({}, send_junk),
    "make room": ({"_maxconnections": 1}, connect_again),
    "see _allow": ({"_allow": "192.0.2.1"}, lambda _started, _policy: None),
}


SEEN = (*PROVOKED, "rows locked")  # in the log of a daemon, below


@pytest.mark.parametrize("line", [a for a, _ in LINES if not any(word in a for word in SEEN)])
def test_log_lines_that_are_in_the_script(line: str) -> None:
    assert in_script(line)


@pytest.mark.parametrize("word", PROVOKED)
def test_log_lines_to_alert_on(daemon: START, word: str) -> None:
    (line,) = [line for line, _ in LINES if word in line]
    settings, provoke = PROVOKED[word]
    started = daemon({**settings, "_loglevel": "WARNING"})
    with started.policy() as policy:
        provoke(started, policy)
        wait_for(lambda: re.search(pattern(line), started.log()), 10, line)


def test_the_database_comes_back(daemon: START) -> None:
    started = daemon()
    with started.policy() as policy:
        take_the_file_away(started, policy)
        (started.directory / "saslquota.db").rmdir()
        (started.directory / "away").rename(started.directory / "saslquota.db")
        wait_for(lambda: policy.ask() == "OK", 10, "the file is found")
    wait_for(lambda: "sends are counted again" in started.log(), 5, "the end of it")


def test_mail_passes_uncounted(daemon: START) -> None:
    started = daemon({"_onfailure": "OK", "_sqlitefile": "missing/saslquota.db"})
    with started.policy() as policy:
        assert policy.ask() == "OK"
    (line,) = [line for line, _ in LINES if "database unavailable, CONSEQUENCE" in line]
    assert "`mail passes uncounted`" in DOCUMENTS[OPERATION]
    line = line.replace("CONSEQUENCE", "mail passes uncounted")
    wait_for(lambda: re.search(pattern(line), started.log()), 5, line)


def test_rows_that_are_locked(daemon: START, database: Database) -> None:
    (line,) = [line for line, _ in LINES if "rows locked" in line]
    started = daemon({**database.config(), "_dbtimeout": 5})
    with started.policy() as policy, session(database.server, database.name) as locker:
        wait_for(lambda: policy.ask(sasl_username="bob") == "OK", 10, "it counts")
        locker.execute("BEGIN")
        locker.execute("SELECT seq FROM sends WHERE account = 'bob' FOR UPDATE")
        locker.fetchall()
        assert policy.ask(sasl_username="bob").startswith("DEFER_IF_PERMIT")
        wait_for(lambda: re.search(pattern(line), started.log()), 10, line)


# --- At 3 a.m. ------------------------------------------------------------------------------------

WHO_IS_IT = block(OPERATION, "Who is it?", "sh", "top")
WHO_IT_IS = block(OPERATION, "Who is it?", "", "QUOTA")
SHOW_HIM = block(OPERATION, "Who is it?", "sh", "show")
SHOWN = block(OPERATION, "Who is it?", "", "refused until")
BLOCK_HIM = block(OPERATION, "A password was stolen", "sh", "py block")
UNBLOCK_HIM = block(OPERATION, "A password was stolen", "sh", "unblock")
LET_HIM_SEND = block(OPERATION, "One sender is refused and must send now", "sh")
STATUS_QUIET = block(OPERATION, "Monitoring", "sh", "status -q")
SQLITE_CLIENT = block(OPERATION, "Logins that are not used any more", "sh")
QUOTA = {"default": {"period": 3600, "msgquota": 5, "msg": "no more"}}
Sql = Callable[[str], list[str]]


def sqlite_rows(path: Path, statement: str) -> list[str]:
    """Run a statement and return its rows, columns with tabs between."""
    with closing(sqlite3.connect(path, timeout=10)) as connection, connection:
        return ["\t".join(map(str, row)) for row in connection.execute(statement)]


@pytest.fixture(params=["sqlite", "mariadb", "mysql"])
def counting(request: pytest.FixtureRequest, daemon: START) -> tuple[Daemon, Sql]:
    """A daemon, and what runs SQL in its ledger."""
    if request.param == "sqlite":
        started = daemon(rules=QUOTA)

        def run_sql(statement: str) -> list[str]:
            return sqlite_rows(started.directory / "saslquota.db", statement)
    else:
        database: Database = request.getfixturevalue(request.param).create_database()
        started = daemon(database.config(), QUOTA)

        def run_sql(statement: str) -> list[str]:
            return database.sql(statement).splitlines()

    return started, run_sql


Counting = tuple[Daemon, Sql]


def is_sqlite(started: Daemon) -> bool:
    return started.config["_store"] == "sqlite"


def control(script: str, config: Path) -> str:
    """Run documented commands of saslquotactl.py; status 1 is what needs a look."""
    command = f"{sys.executable} {ROOT}/saslquotactl.py -c {config} "
    lines = [f"{line} || [ $? = 1 ]\n" for line in script.splitlines()]
    return shell("".join(lines), ("saslquotactl.py ", command))


def used(config: Path) -> int:
    """What Bob has used of his first window."""
    lines = control(f"saslquotactl.py --json show {BOB}", config).splitlines()
    return int(json.loads(lines[0])["used"])


def test_a_password_was_stolen(counting: Counting) -> None:
    """What the thief sends is refused within a second; the owner can send again at last."""
    started, _ = counting
    config = started.config_file
    with started.policy() as policy:
        for number in range(6):
            policy.ask(sasl_username=BOB, client_address=f"192.0.2.{number}")
        assert BOB in control(WHO_IS_IT, config)
        assert "5/5 in 1h, rule default (100%): refused until" in control(SHOW_HIM, config)
        control(BLOCK_HIM, config)
        wait_for(lambda: "may not send" in policy.ask(sasl_username=BOB), 1.2, "he is blocked")
        assert f"blocked: 1\n  {BOB}: " in control("saslquotactl.py status", config)
        control(UNBLOCK_HIM, config)
        wait_for(lambda: policy.ask(sasl_username=BOB) == "OK", 1.2, "he may send")
    assert "unavailable" not in started.log()


def test_he_must_send_now(counting: Counting) -> None:
    """He is accepted within a second, the others are as before."""
    started, sql = counting
    reset, grant = LET_HIM_SEND.splitlines()
    with started.policy() as policy:
        for user in (BOB, "ann@x.org"):
            answers = [policy.ask(sasl_username=user) for _ in range(6)]
            assert answers == ["OK"] * 5 + ["REJECT no more"]
        control(reset, started.config_file)
        assert used(started.config_file) == 0
        wait_for(lambda: policy.ask(sasl_username=BOB) == "OK", 1.2, "he is accepted")
        answers = [policy.ask(sasl_username=BOB) for _ in range(5)]
        assert answers == ["OK"] * 4 + ["REJECT no more"]
        assert used(started.config_file) == 5
        control(grant.replace("18:00", "3h"), started.config_file)
        wait_for(lambda: policy.ask(sasl_username=BOB) == "OK", 1.2, "he is accepted")
        assert policy.ask(sasl_username="ann@x.org") == "REJECT no more"
    assert sql(f"SELECT MAX(epoch) FROM sends WHERE account = '{BOB}'") == ["2"]


def shapes(text: str) -> set[str]:
    """The lines without what differs from one time and ledger to the next."""
    text = re.sub(r"\d\d \w{3} \d\d:\d\d|\d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"\d+(?:\.\d+){3}", "ADDRESS", text)
    return {" ".join(re.sub(r"\d+", "N", line).split()) for line in text.splitlines()}


def test_what_it_shows(local: Site) -> None:
    home, cafe, *thief = (bytes([192, 0, 2, number]) for number in range(5))
    local.sends(BOB, 3, ago=2 * DAY, client_address=home)
    local.sends(BOB, 3, ago=7200, client_address=home)
    for address in (cafe, *thief):
        local.sends(BOB, 3, ago=60, client_address=address)
        local.sends(BOB, 3, ago=60, client_address=address, sender="support@paypa1.example")
    local.sends("newsletter@example.net", 60, ago=7200, client_address=home)
    local.sends("newsletter@example.net", 1, client_address=home)
    assert shapes(WHO_IT_IS) <= shapes(control("saslquotactl.py top", local.config))
    assert shapes(SHOWN) <= shapes(control(SHOW_HIM, local.config))


def test_nagios(daemon: START) -> None:
    started = daemon()
    with started.policy() as policy:
        assert policy.ask() == "OK"
    command = f"{sys.executable} {ROOT}/saslquotactl.py -c {started.config_file} "
    assert shell(STATUS_QUIET, ("saslquotactl.py ", command)) == ""


def test_reset_with_a_clock_that_went_back(counting: Counting) -> None:
    """It is dated now, and takes the sender back to now."""
    started, sql = counting
    later = "at + 7200000000" if is_sqlite(started) else "at + INTERVAL 7200 SECOND"
    with started.policy() as policy:
        assert [policy.ask(sasl_username=BOB) for _ in range(5)] == ["OK"] * 5
        sql(f"UPDATE sends SET at = {later}")
        before = sql("SELECT MAX(at) FROM sends WHERE epoch = 1")
        assert used(started.config_file) == 5, "it counts to the newest send"
        control(LET_HIM_SEND.splitlines()[0], started.config_file)
        wait_for(lambda: policy.ask(sasl_username=BOB) == "OK", 1.2, "he is accepted")
        assert [policy.ask(sasl_username=BOB) for _ in range(5)] == ["OK"] * 4 + ["REJECT no more"]
        assert sql("SELECT MAX(at) FROM sends WHERE epoch = 1") == before
        assert sql("SELECT MAX(at) FROM sends WHERE epoch = 2") < before
        assert used(started.config_file) == 5


REMOVE_UNUSED = {
    heading: block(OPERATION, "Logins that are not used any more", "sql", word)
    for heading, word in (("MySQL, MariaDB", "UTC_TIMESTAMP"), ("SQLite", "strftime"))
}


def test_remove_unused_logins(counting: Counting) -> None:
    """No count changes; whoever was removed begins as new."""
    started, sql = counting
    with started.policy() as policy:
        for user, number in ((BOB, 5), ("ann@x.org", 2), ("ghost@x.org", 2), ("late@x.org", 1)):
            assert [policy.ask(sasl_username=user) for _ in range(number)] == ["OK"] * number
    started.stop()

    def date_back(days: int, which: str) -> None:
        older = f"at - {days * 86400}000000" if is_sqlite(started) else f"at - INTERVAL {days} DAY"
        sql(f"UPDATE sends SET at = {older} WHERE {which}")

    if not is_sqlite(started):  # where sends of a spool were carried over
        now = "UTC_TIMESTAMP(6)"
        marks = f"('SPOOL', 1, 1, {now}, 0, 0, '', 1), ('SPOOL 1a2b', 1, 1, {now}, 9, 9, '', 2)"
        columns = "account, seq, epoch, at, recipients, total, instance, token"
        sql(f"INSERT INTO sends ({columns}) VALUES {marks}")
    ghosts = "account = 'ghost@x.org' OR account LIKE 'SPOOL%'"
    date_back(31, f"{ghosts} OR (account = 'ann@x.org' AND seq = 1)")
    date_back(29, "account = 'late@x.org'")
    sql(REMOVE_UNUSED["SQLite" if is_sqlite(started) else "MySQL, MariaDB"])
    left = sql("SELECT account, COUNT(*) FROM sends GROUP BY account ORDER BY account")
    kept = [] if is_sqlite(started) else ["SPOOL\t1", "SPOOL 1a2b\t1"]
    assert left == [*kept, "ann@x.org\t2", f"{BOB}\t5", "late@x.org\t1"]
    assert used(started.config_file) == 5
    started.start()
    with started.policy() as policy:
        assert policy.ask(sasl_username=BOB) == "REJECT no more"
        for user, number in (("ann@x.org", 4), ("ghost@x.org", 5), ("late@x.org", 5)):
            answers = [policy.ask(sasl_username=user) for _ in range(number + 1)]
            assert answers == ["OK"] * number + ["REJECT no more"]


@pytest.mark.parametrize("stopped", [True, False])
def test_why_all_daemons_are_stopped_for_that(fleet: StartFleet, stopped: bool) -> None:
    """One that runs goes on where the account was, another one begins anew."""
    two, quota = fleet(2), (Window(3600, 5, "default", "no more"),)
    assert [two.send("ghost", quota, daemon=0) for _ in range(3)] == [True] * 3
    two.world.now += 40 * DAY * 1_000_000
    sqlite_rows(two.path, "DELETE FROM sends WHERE account = 'ghost'")
    if stopped:
        two.ledgers = [two.ledger(store) for store in two.stores]
    accepted = 0
    for number in range(20):
        two.world.now += 100_000
        accepted += two.send("ghost", quota, daemon=(number + 1) % 2)
    assert (accepted == 5) is stopped


def test_the_sqlite_client(daemon: START) -> None:
    require("sqlite3")
    started = daemon(rules=QUOTA)
    with started.policy() as policy:
        assert policy.ask(sasl_username=BOB) == "OK"
    place = ("/var/lib/saslquota/saslquota.db", f"{started.directory}/saslquota.db")
    script = f"{SQLITE_CLIENT.strip()} <<'END'\n{REMOVE_UNUSED['SQLite']}"
    script += "SELECT changes();\nEND\n"
    assert shell(script, ("runuser -u saslquota -- ", ""), place) == "0\n"


# --- Upgrading ------------------------------------------------------------------------------------

CARRY_OVER = block(UPGRADING, "From noskoski/postfix_saslquota 1.x", "sql")
DROP_INDEX = {
    "MySQL": block(UPGRADING, "From 2.0.0 to 2.1.0", "sql", "ALTER TABLE"),
    "SQLite": block(UPGRADING, "From 2.0.0 to 2.1.0", "sql", "IF EXISTS"),
}
ADD_TO_TABLES = block(UPGRADING, "From 2.0.0 to 2.1.0", "sh", "ADD COLUMN")
# What 2.0's mysql.sql made, and how 2.0 writes into it.
TABLE_OF_2_0 = """
DROP TABLE IF EXISTS events, sends;
CREATE TABLE sends (account VARCHAR(320) NOT NULL, seq BIGINT NOT NULL, epoch INT NOT NULL,
    at DATETIME(6) NOT NULL, recipients INT NOT NULL, total BIGINT NOT NULL,
    instance VARCHAR(64) NOT NULL, token BIGINT NOT NULL, PRIMARY KEY (account, seq),
    KEY sends_at (at)) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
"""
INSERT_OF_2_0 = (
    "INSERT INTO sends (account, seq, epoch, at, recipients, total, instance, token)"
    " VALUES ('{}', {}, 1, UTC_TIMESTAMP(6), 1, {}, '', 1)"
)
OLD_INDEX = "CREATE INDEX sends_window ON sends (account, epoch, at, seq, total, recipients)"
OLD_TABLE = (
    "CREATE TABLE `{}` (`sasl_username` VARCHAR(320) NOT NULL, `date` DATETIME(6) NOT NULL,"
    " PRIMARY KEY (`sasl_username`, `date`)) ENGINE = InnoDB"
)


def test_the_tables_of_2_0_are_changed_while_it_counts(daemon: START, database: Database) -> None:
    database.sql(TABLE_OF_2_0)
    database.sql(INSERT_OF_2_0.format(BOB, 1, 1))
    rules = {"default": {"period": "1h", "msgquota": 3, "msg": "enough"}}
    old = daemon(database.config(), rules)
    with old.policy() as policy:
        assert policy.ask(sasl_username=BOB).startswith("DEFER_IF_PERMIT ")
        said = wait_for_log(old, r'run mysql \S+ -e "ALTER TABLE sends')[0]
        assert said[said.index('"ALTER') :] + "\n" in ADD_TO_TABLES
        server = database.server
        client = f"{server.CLIENT} --no-defaults -uroot -S{server.socket} {database.name}"
        shell(ADD_TO_TABLES, ("mysql saslquota", client))
        wait_for(lambda: policy.ask(sasl_username=BOB) == "OK", 10, "it counts")
        database.sql(INSERT_OF_2_0.format(BOB, 3, 3))
        assert policy.ask(sasl_username=BOB) == "REJECT enough"
    assert database.sql("SELECT COUNT(*) FROM events") == "0"


def test_a_sqlite_file_of_2_0_is_changed_at_the_start(
    daemon: START, new_directory: Callable[[], Path]
) -> None:
    path = new_directory() / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "CREATE TABLE sends (account TEXT NOT NULL, seq INTEGER NOT NULL, epoch INTEGER"
            " NOT NULL, at INTEGER NOT NULL, recipients INTEGER NOT NULL, total INTEGER NOT NULL,"
            " instance TEXT NOT NULL, token INTEGER NOT NULL, PRIMARY KEY (account, seq))"
            " WITHOUT ROWID"
        )
        now = "CAST(strftime('%s', 'now') AS INTEGER) * 1000000"
        connection.execute(f"INSERT INTO sends VALUES ('{BOB}', 1, 1, {now}, 1, 1, '', 1)")
        connection.commit()
    rules = {"default": {"period": "1h", "msgquota": 3, "msg": "enough"}}
    one, two = (daemon({"_sqlitefile": str(path)}, rules) for _ in range(2))
    for started, answer in ((one, "OK"), (two, "OK"), (one, "REJECT enough")):
        with started.policy() as policy:
            assert policy.ask(sasl_username=BOB, client_address="192.0.2.7") == answer
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT CAST(client_address AS BLOB) FROM sends ORDER BY seq")
        assert found.fetchall() == [(b"",), (b"\xc0\x00\x02\x07",), (b"\xc0\x00\x02\x07",)]


class OldLog(NamedTuple):
    """A database in which 1.x counted, and the name of its table."""

    database: Database
    table: str

    def carry_over(self) -> None:
        assert CARRY_OVER.count("FROM log ") == 1
        self.database.sql(CARRY_OVER.replace("FROM log ", f"FROM {self.table} "))


@pytest.fixture(params=[("utf8mb4", "log"), ("latin1", "Log"), ("utf8mb3", "saslquota_log")])
def old_log(request: pytest.FixtureRequest, database: Database) -> OldLog:
    """What 1.x left: local time, logins as they were typed, rows too old to matter."""
    charset, table = request.param
    # 1.x stored now(6); here that is three hours behind UTC.
    offset = database.sql("SELECT TIMESTAMPDIFF(HOUR, UTC_TIMESTAMP(), NOW())")
    assert offset == "-3"
    database.sql(f"{OLD_TABLE.format(table)} DEFAULT CHARSET = {charset}")
    assert f"`{table}`" in DOCUMENTS[UPGRADING]
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
            when = f"NOW(6) - INTERVAL {ago} SECOND"
            database.sql(f"INSERT INTO {table} VALUES ('{login}', {when})")
    return OldLog(database, table)


def totals(database: Database) -> dict[str, str]:
    rows = database.sql("SELECT account, MAX(total) FROM sends GROUP BY account")
    return dict(row.split("\t") for row in rows.splitlines())


CARRIED = {BOB: "6", "ann@example.com": "2", "jose@example.com": "2", "josé@example.com": "2"}


def test_carry_the_counts_over(daemon: START, old_log: OldLog) -> None:
    database = old_log.database
    before = database.sql(f"SELECT * FROM {old_log.table}")
    old_log.carry_over()
    assert totals(old_log.database) == CARRIED
    rows = old_log.database.sql(
        "SELECT seq, epoch, recipients, total,"
        " ROUND(TIMESTAMPDIFF(SECOND, at, UTC_TIMESTAMP(6)), -2)"
        f" FROM sends WHERE account = '{BOB}' ORDER BY at, seq"
    )
    assert rows.splitlines() == [
        f"{number}\t1\t1\t{number}\t{ago}"
        for number, ago in enumerate((86300, 7000, 6000, 5000, 0, 0), 1)
    ]
    assert database.sql(f"SELECT * FROM {old_log.table}") == before

    rules = {
        "default": {"period": 86400, "msgquota": 8, "msg": "day"},
        "ann@example.com": {"period": 60, "msgquota": 8, "msg": "minute"},
        "josé@example.com": {"period": 20, "msgquota": 8, "msg": "less"},
    }
    with daemon(old_log.database.config(), rules).policy() as policy:

        def accepted(login: str) -> int:
            answers = [policy.ask(sasl_username=login) for _ in range(10)]
            return answers.index(next(filter(lambda text: text.startswith("REJECT"), answers)))

        assert accepted("BOB@example.com") == 2
        assert accepted("ann@example.com") == 7
        assert accepted("josé@example.com") == 7
        assert accepted("jose@example.com") == 6
        assert accepted("old@example.com") == 8
    rows = old_log.database.sql(f"SELECT MAX(total) FROM sends WHERE account = '{BOB}'")
    assert rows == "8"  # six were carried over


def test_carry_over_twice(old_log: OldLog) -> None:
    for _ in range(2):
        old_log.carry_over()
        assert totals(old_log.database) == CARRIED
        assert old_log.database.sql("SELECT COUNT(*) FROM sends") == "12"


def test_carry_over_leaves_what_is_counted_already(daemon: START, old_log: OldLog) -> None:
    """A sender whom the new daemon has counted keeps that count."""
    with daemon(old_log.database.config()).policy() as policy:
        assert policy.ask(sasl_username=BOB) == "OK"
        old_log.carry_over()
        assert totals(old_log.database) == {**CARRIED, BOB: "1"}
        assert policy.ask(sasl_username=BOB) == "OK"
        assert policy.ask(sasl_username="ann@example.com") == "OK"
    assert totals(old_log.database) == {**CARRIED, BOB: "2", "ann@example.com": "3"}


def test_the_old_settings_go_on_working(tmp_path: Path) -> None:
    """The ten keys of 1.x's own file."""
    assert "without `_store`, the database is MySQL" in DOCUMENTS[UPGRADING]
    path = tmp_path / "saslquota.json"
    names = "bind bindport bindtimeout myhost myuser mypasswd mydb logfacility loglevel quotafile"
    table = settings_table()
    settings = [f'"_{name}": {table["_" + name][0]}' for name in names.split()]
    path.write_text("{" + ", ".join(settings) + "}")
    assert load_config(path, {}).store == "mysql"
    load_rules(ROOT / "quotarules.json", 30 * 86400)


def test_the_variables_of_the_docker_image(tmp_path: Path) -> None:
    """Those of 1.x's Dockerfile, with the files of ours."""
    path = copy_shipped(tmp_path / "image") / "saslquota.json"
    image = (
        "_bind=0.0.0.0 _bindport=10008 _bindtimeout=120 _myhost=mysql _myuser=saslquota"
        " _mypasswd=1a2b3c _mydb=saslquota _logfacility=mail _logaddress=localhost _logport=514"
        " _loglevel=DEBUG _quotafile=quotarules.json"
    )
    variables = dict(variable.split("=") for variable in image.split())
    assert load_config(path, variables).store == "sqlite"
    config = load_config(path, {**variables, "_store": "mysql", "_allow": "192.0.2.7"})
    assert (config.store, config.myhost, config.mypasswd) == ("mysql", ("mysql",), "1a2b3c")
    assert (config.bind, config.bindtimeout, config.logaddress) == ("0.0.0.0", 120, "localhost")
    for name in ("_store=mysql", "_logaddress=localhost", "_loghandler=stdout", "_bind=0.0.0.0"):
        assert f"`{name}`" in DOCUMENTS[UPGRADING]


def test_the_old_steps_go_on_working(daemon: START, mariadb: MariaDB) -> None:
    """The statements of 1.x's README, for a database in which its settings count."""
    name, password = "owner", "*******"
    steps = (
        "create database saslquota; "
        f"grant all on saslquota.* to saslquota@localhost identified by '{password}' ; "
        "flush privileges;"
    )
    try:
        mariadb.sql(steps.replace("saslquota", name))
        mariadb.sql((ROOT / "mysql.sql").read_text("utf-8"), name)
        database = Database(mariadb, name, "localhost", mariadb.port, name, password)
        with daemon(database.config()).policy() as policy:
            assert policy.ask() == "OK"
        assert database.sql("SELECT COUNT(*) FROM sends") == "1"
    finally:
        mariadb.sql(f"DROP DATABASE IF EXISTS {name}; DROP USER IF EXISTS {name}@localhost")


def test_the_index_of_early_tables(daemon: START, database: Database) -> None:
    database.sql(OLD_INDEX)
    database.sql(DROP_INDEX["MySQL"])
    assert "sends_window" not in database.sql("SHOW INDEX FROM sends")
    started = daemon()
    path = started.directory / "saslquota.db"
    with started.policy() as policy:
        assert policy.ask() == "OK"
        for statement in (OLD_INDEX, DROP_INDEX["SQLite"]):
            sqlite_rows(path, statement)
            assert policy.ask() == "OK"
    assert "sends_window" not in str(sqlite_rows(path, "SELECT name FROM sqlite_master"))


def test_the_new_log_lines() -> None:
    """The lines to watch for from 2.1.0 on are those of docs/operation.md."""
    table = re.findall(r"^\| `.+` \| `(.+)` \|$", DOCUMENTS[UPGRADING], re.MULTILINE)
    assert len(table) == 5
    assert set(table) <= {line for line, _ in LINES}


RUN = frozenset(_taken)  # nothing is taken from here on: a test that runs may not be the only one
