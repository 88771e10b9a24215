"""saslquotawatch.py: what is noted in `events` is told once, and nothing is lost."""

import email
import email.policy
import ipaddress
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from email.message import EmailMessage
from pathlib import Path

import pytest
from ctl import spool_entries
from helpers import StartDaemon, StartPostfix
from servers.daemon import Daemon
from servers.mariadb import Database, MariaDB
from servers.ports import LOOPBACK
from servers.process import ROOT, clean_environment, pause, wait_for, wait_for_log
from servers.smtp import Received, SMTPServer

import saslquotapage
import saslquotawatch
from saslquota import Entry, SaslQuotaError, Store, load_config, make_store
from saslquotactl import clean
from saslquotawatch import Teller

SECOND, HOUR = 1_000_000, 3_600_000_000
BOB, ADMIN = "bob@example.com", "postmaster@example.com"
NOTE = (
    "rule=default, quota 1490/400 (372.50%), period=3600, client_address=177.3.0.0,"
    " sender=support@paypa1.example"
)
RULES = {
    "default": {"period": 3600, "msgquota": 400, "msg": "no more"},
    "trial.example": {"enforce": False},
}


class Place:
    """Settings, rules and a database, with `events` as the daemon writes them."""

    def __init__(self, directory: Path, settings: dict[str, object]) -> None:
        self.directory = directory
        self.settings: dict[str, object] = {"_store": "sqlite", "_notify": ADMIN} | settings
        self.path = directory / "saslquota.json"
        (directory / "quotarules.json").write_text(json.dumps(RULES), "utf-8")
        self.write()
        self.store: Store = make_store(load_config(self.path, {}))
        self.store.open()

    def write(self, **changes: object) -> None:
        self.settings |= changes
        self.path.write_text(json.dumps(self.settings), "utf-8")

    def teller(self) -> Teller:
        return Teller(load_config(self.path, {}))

    def refused(
        self, account: str = BOB, ago: float = 10, amount: int = 1, note: str = NOTE
    ) -> None:
        """Note an incident that began so many seconds ago."""
        at = self.store.now() - round(ago * SECOND)
        number = "SELECT COALESCE(MAX(number), 0) + 1 FROM events WHERE account = ?"
        ((number,),) = self.store.run(number, [account])
        bind = self.store.BIND_TIME
        self.store.run(
            "INSERT INTO events (account, number, at, kind, amount, author, note, last)"
            f" VALUES (?, ?, {bind}, 'refused', ?, 'mail1', ?, {bind})",
            [account, number, at, amount, note, at],
        )

    def state(self) -> dict[str, str]:
        """What has become of each account's incident."""
        rows = self.store.run("SELECT account, claimed, told FROM events ORDER BY account")
        return {
            account: "told" if told else "claimed" if claimed else "new"
            for account, claimed, told in rows
        }

    def let_pass(self, seconds: float) -> None:
        """Let all that is in `events` be older."""
        for name in ("at", "last", "claimed", "told"):
            if self.settings["_store"] == "sqlite":
                then = f"{name} - {round(seconds * SECOND)}"
            else:
                then = f"{name} - INTERVAL {seconds} SECOND"
            self.store.run(f"UPDATE events SET {name} = {then}")


@pytest.fixture(autouse=True)
def _fresh_complaints() -> None:
    saslquotapage.complaints.clear()


@pytest.fixture
def smtp() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


@pytest.fixture
def place(tmp_path: Path, smtp: SMTPServer) -> Iterator[Place]:
    """With SQLite."""
    made = Place(tmp_path, {"_notifyhost": smtp.where})
    yield made
    made.store.close()


@pytest.fixture
def mysql_place(tmp_path: Path, smtp: SMTPServer, database: Database) -> Iterator[Place]:
    made = Place(tmp_path, {"_notifyhost": smtp.where, **database.config()})
    yield made
    made.store.close()


@pytest.fixture(params=["sqlite", "mariadb"])
def each_place(request: pytest.FixtureRequest) -> Place:
    name = "place" if request.param == "sqlite" else "mysql_place"
    found: Place = request.getfixturevalue(name)
    return found


def parsed(mail: Received) -> EmailMessage:
    """As mail programs read it."""
    found = email.message_from_bytes(mail.data, policy=email.policy.default)
    assert isinstance(found, EmailMessage)
    return found


def text(mail: Received) -> str:
    return str(parsed(mail).get_content()).replace("\r\n", "\n")


def only(mails: list[Received]) -> Received:
    (mail,) = mails
    return mail


# --- What is told ---------------------------------------------------------------------------------


def test_an_incident_is_told_with_all_that_helps(each_place: Place, smtp: SMTPServer) -> None:
    now = each_place.store.now()
    entries, total = [], 0
    for seq, (ago, address, sender) in enumerate(
        ((30, "192.0.2.1", ""), (2, "192.0.2.1", ""), (1, "198.51.100.7", "x@paypa1.example")), 1
    ):
        total += 10
        packed = bytes(map(int, address.split(".")))
        at = now - ago * HOUR
        entries.append(Entry(BOB, seq, 1, at, 10, total, "i", seq, packed, sender))
    each_place.store.append(entries)
    each_place.refused(amount=412)
    assert each_place.teller().look()

    mail = only(smtp.mails)
    assert (mail.sender, mail.recipients) == ("", [ADMIN])
    message, told = parsed(mail), text(mail)
    assert message["Subject"] == f"{BOB}: quota reached"
    assert message["From"] == f"saslquota <{ADMIN}>"
    assert message["To"] == ADMIN
    assert message["Auto-Submitted"] == "auto-generated"
    assert re.match(
        rf"{BOB} is refused since [0-9:]+, 412 times so far: 1490/400 in 1h, rule default,"
        r" from 177\.3\.0\.0 as <support@paypa1\.example>\.\n"
        r"Sent since .*: 20, as 2 senders, from 2 addresses, 1 of them never seen before:\n",
        told,
    ), told
    assert re.search(r"^  10  .*  198\.51\.100\.7  new$", told, re.MULTILINE), told
    assert re.search(r"^  10  .*  x@paypa1\.example$", told, re.MULTILINE), told
    for verb in ("block", "queue", "unblock", "reset"):
        assert f"  saslquotactl.py {verb} {BOB}" in told
    assert each_place.state() == {BOB: "told"}

    assert each_place.teller().look()
    assert len(smtp.mails) == 1


def test_incidents_that_begin_together_share_a_mail(each_place: Place, smtp: SMTPServer) -> None:
    for number in range(14):
        each_place.refused(f"user{number}@example.com", amount=100 - number)
    assert each_place.teller().look()
    mail = only(smtp.mails)
    told = text(mail)
    assert parsed(mail)["Subject"] == "14 accounts: quota reached"
    assert "Is a rule too low?" in told
    assert told.count("saslquotactl.py block") == 10
    for number in range(14):
        assert told.count(f"user{number}@example.com is refused since") == 1
        assert (f"block user{number}@example.com\n" in told) == (number < 10)
    assert set(each_place.state().values()) == {"told"}


def test_what_is_about_to_be_joined_by_others_waits(place: Place, smtp: SMTPServer) -> None:
    place.refused(ago=1)
    assert place.teller().look()
    assert (smtp.mails, place.state()) == ([], {BOB: "new"})
    place.let_pass(5)
    assert place.teller().look()
    assert len(smtp.mails) == 1


def test_five_minutes_are_between_two_mails_of_all_watches(
    each_place: Place, smtp: SMTPServer
) -> None:
    tellers = [each_place.teller(), each_place.teller()]
    each_place.refused("first@example.com")
    tellers[0].look()
    for name in ("second", "third"):
        each_place.refused(f"{name}@example.com")
        for teller in tellers:
            assert teller.look()
    assert len(smtp.mails) == 1
    each_place.let_pass(299)
    assert tellers[1].look()
    assert len(smtp.mails) == 1
    each_place.let_pass(2)
    assert tellers[1].look()
    assert "2 accounts have" in text(smtp.mails[1])
    assert "third@example.com" in text(smtp.mails[1])


def test_a_time_to_come_delays_no_mail(place: Place, smtp: SMTPServer) -> None:
    """As a clock may have been wrong when something was told."""
    place.refused("first@example.com")
    place.teller().look()
    place.let_pass(-7200)
    place.refused()
    place.teller().look()
    assert len(smtp.mails) == 2


def test_what_is_older_than_a_day_is_no_news(each_place: Place, smtp: SMTPServer) -> None:
    each_place.refused("old@example.com", ago=86_401)
    assert each_place.teller().look()
    assert (smtp.mails, each_place.state()) == ([], {"old@example.com": "new"})
    each_place.refused("new@example.com", ago=86_000)
    assert each_place.teller().look()
    assert "old@" not in text(only(smtp.mails))


def test_a_pool_has_no_password(place: Place, smtp: SMTPServer) -> None:
    place.refused("POOL @school.example", note=NOTE.replace("default", "@school.example"))
    place.teller().look()
    told = text(only(smtp.mails))
    assert told.startswith("@school.example is refused since")
    assert "saslquotactl.py show @school.example" in told
    assert "password" not in told
    assert "POOL" not in told


def test_a_quota_that_is_not_enforced_is_called_so(place: Place, smtp: SMTPServer) -> None:
    note = NOTE.replace("default", "trial.example")
    place.refused("eve@trial.example", note=note)
    place.write(_notifyuser=True)
    teller = place.teller()
    assert teller.look()
    assert teller.look()
    assert "is over a quota that is not enforced since" in text(only(smtp.mails))


def test_a_note_of_another_form_is_told_as_it_is(place: Place, smtp: SMTPServer) -> None:
    place.refused(note="sends from 40 new addresses")
    place.teller().look()
    assert "1 times so far: sends from 40 new addresses.\n" in text(only(smtp.mails))


def test_a_login_from_many_new_addresses_is_told_of_once(
    each_place: Place, smtp: SMTPServer
) -> None:
    """Slowly, under its quota. A login that is new itself is nothing unusual."""
    place, day = each_place, 86_400
    place.write(_notifyaddresses=3)

    def sent(account: str, seq: int, ago: float, address: str) -> None:
        at = place.store.now() - round(ago * SECOND)
        packed = ipaddress.ip_address(address).packed
        place.store.append([Entry(account, seq, 1, at, 1, seq, "", seq, packed, "")])

    sent(BOB, 1, 2 * day, "192.0.2.1")
    sent("few@x", 1, 2 * day, "192.0.2.1")
    for n in range(2, 6):
        sent(BOB, n, 100 - n, f"198.51.100.{n}")
        sent("new@x", n - 1, 100 - n, f"198.51.100.{n}")
    for n in range(2, 5):
        sent("few@x", n, 100 - n, f"198.51.100.{n}")
    at = place.store.now()
    older = Entry("SPOOL 1a2b", 0, 1, at - 2 * day * SECOND, 1, 1, "host", 1, bytes(4), "")
    place.store.append([older, *spool_entries(at)])
    teller = place.teller()
    for _ in range(2):
        teller._addresses_at = 0.0
        teller.look()
    assert place.state() == {BOB: "new"}
    place.let_pass(10)
    assert teller.look()
    mail = only(smtp.mails)
    assert parsed(mail)["Subject"] == f"{BOB}: many addresses"
    assert f"{BOB} sends from 4 addresses in a day, never seen before.\n" in text(mail)
    assert place.state() == {BOB: "told"}


@pytest.mark.parametrize(
    "login",
    [
        "a\r\nBcc: victim@example.com\r\n\r\nBuy!@example.com",
        "a\nBcc: victim@example.com@example.com",
        "=?utf-8?q?a=0D=0ABcc:_victim@example.com?=@example.com",
        "jürgen@münchen.example",
        "\u202emoc.elpmaxe@eve",
        "'; rm -rf / #@example.com",
        "-rf@example.com",
        "x" * 320,
        "😀" * 320,
        ".\n.\nQUIT",
    ],
)
def test_a_hostile_login_stays_text(place: Place, smtp: SMTPServer, login: str) -> None:
    place.refused(login, note=NOTE.replace("support@", login[:300]))
    place.write(_notifyuser=True)
    teller = place.teller()
    teller.look()
    teller.look()
    mail = smtp.mails[0]
    assert mail.recipients == [ADMIN]
    names = "From To Subject Date Message-ID Auto-Submitted MIME-Version"
    head, body = mail.data.decode().split("\r\n\r\n", 1)
    assert [line.split(":")[0] for line in head.split("\r\n") if line[0] != " "] == [
        *names.split(),
        *("Content-Type", "Content-Transfer-Encoding"),
    ]
    assert max(map(len, mail.data.split(b"\r\n"))) <= 998
    assert head.isascii()
    assert "\n" not in parsed(mail)["Subject"]
    for line in body.split("\r\n"):
        assert "\r" not in line
        assert line.isprintable()
    (block,) = (line for line in body.split("\r\n") if "saslquotactl.py block" in line)
    if len(login.encode()) < 900:
        words = subprocess.run(
            [
                "/bin/sh",
                "-c",
                f"f() {{ printf '%s\\0' \"$@\"; }}; {block.replace('saslquotactl.py', 'f')}",
            ],
            capture_output=True,
            check=True,
        ).stdout.split(b"\0")[:-1]
        assert words[-1].decode() == clean(login)
        assert words[:-1] == ([b"block", b"--"] if login[0] == "-" else [b"block"])


def test_the_user_is_told_in_a_mail_of_his_own(place: Place, smtp: SMTPServer) -> None:
    place.refused()
    place.refused("no address", amount=7)
    place.write(_notifyuser=True)
    teller = place.teller()
    assert teller.look()
    assert teller.look()
    admins, users = smtp.mails
    assert (admins.recipients, users.recipients) == ([ADMIN], [BOB])
    assert parsed(users)["To"] == BOB
    told = text(users)
    assert told.startswith(f"{BOB} has sent as much mail as it may: 1490/400 in 1h.\n")
    assert "saslquotactl" not in told
    assert "paypa1" not in told
    assert "\\" not in told
    assert told.count("\n") == 4


# --- To whom --------------------------------------------------------------------------------------


def test_a_command_gets_the_mail_on_stdin(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_mypasswd", "secret")
    found = place.directory / "found"
    place.write(_notify=[f"|cat > {found}; env >> {found}"], _notifyhost="127.0.0.1:1")
    place.refused()
    assert place.teller().look()
    written = found.read_text("utf-8")
    head, _, body = written.partition("\n\n")
    assert f"Subject: {BOB}: quota reached\n" in head
    assert body.startswith(f"{BOB} is refused since")
    assert "secret" not in written
    assert place.state() == {BOB: "told"}


def test_a_command_that_fails_has_not_told(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write(_notify=["|cat > /dev/null; exit 3"])
    place.refused()
    assert not place.teller().look()
    assert place.state() == {BOB: "new"}
    assert "not delivered: |cat > /dev/null; exit 3: exit status 3\n" in capsys.readouterr().err


def test_a_command_that_hangs_is_ended_with_its_children(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saslquotawatch, "DELIVERY_TIME", 0.5)
    pid = place.directory / "pid"
    place.write(_notify=[f"|sleep 600 & echo $! > {pid}; wait"])
    place.refused()
    assert not place.teller().look()
    assert place.state() == {BOB: "new"}
    wait_for(lambda: not is_running(int(pid.read_text())), 10, "the child's end")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_who_cannot_be_reached_is_tried_again_when_others_have_it(
    place: Place, smtp: SMTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saslquotawatch, "RETRY", 0.05)
    place.write(_notify=[ADMIN, "full@example.com", "gone@example.com"])
    smtp.refuses = {"full@example.com": "452 full", "gone@example.com": "550 no such user"}
    place.refused()
    teller = place.teller()
    assert teller.look()
    assert place.state() == {BOB: "told"}
    del smtp.refuses["full@example.com"]
    wait_for(lambda: teller.look() and len(smtp.mails) > 1, 20, "the other mail")
    assert teller.look()
    first, second = smtp.mails
    assert (first.recipients, second.recipients) == ([ADMIN], ["full@example.com"])
    assert first.data == second.data
    full, gone = smtp.asked_for[1:3]
    assert smtp.asked_for == [ADMIN, full, gone, full]


def test_a_real_postfix_takes_it(place: Place, no_warning: StartPostfix) -> None:
    """As its port 25 is set up: no TLS needed, relaying for this machine."""
    options = {
        "smtpd_tls_security_level": "may",
        "smtpd_client_restrictions": "permit",
        "smtpd_relay_restrictions": "permit_mynetworks,reject",
        "smtpd_recipient_restrictions": "permit",
    }
    postfix = no_warning("DUNNO", options=options)
    place.write(_notifyhost=f"{LOOPBACK}:{postfix.port}", _notify=[ADMIN, "root@example.org"])
    place.refused("jürgen@münchen.example")
    assert place.teller().look()
    (queued,) = wait_for_log(postfix, "from=<>, size=")
    assert "nrcpt=2" in queued
    wait_for_log(postfix, "status=sent", 2)
    wait_for_log(postfix, "disconnect from .* quit=1 ")
    assert set(place.state().values()) == {"told"}


# --- When something is down -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("451", "451 not now"),
        ("554", "554 not now"),
        ("hang", "took too long"),
        ("hang at end", "took too long"),
        ("drip", "took too long"),
        ("drop", "Connection unexpectedly closed"),
    ],
)
def test_a_mail_server_that_does_not_take_it(
    place: Place,
    smtp: SMTPServer,
    mood: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(saslquotawatch, "DELIVERY_TIME", 1.0)
    monkeypatch.setattr(saslquotawatch, "RETRY", 0.0)
    smtp.mood = mood
    place.refused()
    teller = place.teller()
    assert not teller.look()
    assert not teller.look()
    assert (smtp.mails, place.state()) == ([], {BOB: "new"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"saslquotawatch: not delivered: {ADMIN}: ")
    assert reason in line
    smtp.mood = "take"
    assert teller.look()
    assert len(smtp.mails) == 1
    assert place.state() == {BOB: "told"}


def test_a_mail_server_that_is_down_is_asked_once_a_minute(
    place: Place, smtp: SMTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write(_notifyhost="127.0.0.1:1")
    place.refused()
    teller = place.teller()
    assert [teller.look() for _ in range(3)] == [False, False, False]
    assert place.state() == {BOB: "new"}
    assert len(capsys.readouterr().err.splitlines()) == 1
    place.write(_notifyhost=smtp.where)
    assert place.teller().look()  # a watch whose mail server is up need not wait
    assert len(smtp.mails) == 1


def test_without_notify_nothing_is_claimed(
    place: Place, smtp: SMTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write(_notify="")
    place.refused()
    teller = place.teller()
    assert not teller.look()
    assert not teller.look()
    assert (smtp.mails, place.state()) == ([], {BOB: "new"})
    error = "saslquotawatch: _notify is empty: 1 incidents are not told\n"
    assert capsys.readouterr().err == error


def test_a_database_that_is_away_loses_nothing(
    mysql_place: Place,
    smtp: SMTPServer,
    mariadb: MariaDB,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And a mail that was taken meanwhile is not sent again."""
    mysql_place.refused()
    teller = mysql_place.teller()
    smtp.before_250 = mariadb.kill
    assert not teller.look()
    assert len(smtp.mails) == 1
    assert not teller.look()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("saslquotawatch: database: ")
    mariadb.start()
    smtp.before_250 = lambda: None
    assert teller.look()
    mysql_place.store.open()
    assert mysql_place.state() == {BOB: "told"}
    mysql_place.let_pass(600)
    assert teller.look()
    assert len(smtp.mails) == 1


def test_details_that_the_database_cannot_tell_are_left_out(
    place: Place, smtp: SMTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SaslQuotaError("took too long")

    monkeypatch.setattr(saslquotawatch, "origins", fail)
    place.refused()
    place.refused("carol@example.com")
    assert place.teller().look()
    assert text(only(smtp.mails)).count("is refused since") == 2


# --- Several, and the end of one ------------------------------------------------------------------


def test_several_watches_tell_each_incident_once(each_place: Place, smtp: SMTPServer) -> None:
    tellers = [each_place.teller() for _ in range(4)]
    for round_ in range(5):
        for number in range(3):
            each_place.refused(f"user{round_}-{number}@example.com")
        start = threading.Barrier(len(tellers))
        errors: list[BaseException] = []

        def look(teller: Teller, start: threading.Barrier = start) -> None:
            start.wait()
            for _ in range(3):
                teller.look()

        threads = [threading.Thread(target=look, args=[teller]) for teller in tellers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert len(smtp.mails) == round_ + 1
        each_place.let_pass(301)
    told = "".join(map(text, smtp.mails))
    for account, state in each_place.state().items():
        assert state == "told"
        assert told.count(f"{account} is refused since") == 1


@contextmanager
def shipped_watch(running: Daemon) -> Iterator[None]:
    """The program as it is, beside a daemon."""
    command = [sys.executable, str(ROOT / "saslquotawatch.py"), "-c", str(running.config_file)]
    output = (running.directory / "watch.out").open("ab")
    with output, subprocess.Popen(command, stdout=output, stderr=output) as one:
        try:
            yield
        finally:
            one.terminate()


HASTY = (
    "import sys, saslquotawatch as w;"
    "w.LOOK_INTERVAL = 0.02; w.GATHERING = w.PAUSE = 0; w.CLAIM = {claim};"
    "sys.exit(w.main(sys.argv[1:]))"
)


@contextmanager
def watch(place: Place, claim: float = 120) -> Iterator[subprocess.Popen[bytes]]:
    code = HASTY.format(claim=round(claim * SECOND))
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "-c", str(place.path)]
    output = (place.directory / "watch.out").open("ab")
    with output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as one:
        try:
            yield one
        finally:
            one.kill()


def test_what_a_killed_watch_has_claimed_is_told_by_another(
    each_place: Place, smtp: SMTPServer
) -> None:
    smtp.mood = "hang at end"
    each_place.refused()
    with watch(each_place) as one:
        wait_for(lambda: smtp.reached_end, 20, "the mail")
        assert each_place.state() == {BOB: "claimed"}
        one.kill()
        one.wait()
    smtp.mood = "take"
    other = each_place.teller()
    each_place.let_pass(118)
    assert other.look()
    assert smtp.mails == []
    each_place.let_pass(4)
    assert other.look()
    assert len(smtp.mails) == 1
    assert each_place.state() == {BOB: "told"}


def test_nothing_is_lost_when_watches_are_killed_at_any_moment(
    place: Place, smtp: SMTPServer
) -> None:
    """The dice have a fixed seed, but not what is under way at that time."""
    dice = random.Random(5)
    killed = 5
    for number in range(killed):
        place.refused(f"user{number}@example.com")
        with watch(place, claim=0.3) as one:
            wait_for(lambda: smtp.connections > number, 20, "a look")  # noqa: B023
            wait_for(lambda: dice.random() < 0.3, 5, "a moment")
            one.kill()
            one.wait()
    with watch(place, claim=0.3):
        wait_for(lambda: set(place.state().values()) == {"told"}, 20, "the end")
    told = "".join(map(text, smtp.mails))
    for number in range(killed):
        assert 1 <= told.count(f"user{number}@example.com is refused since") <= 1 + killed


def test_sigterm_ends_it_at_once_and_in_good_order(place: Place, smtp: SMTPServer) -> None:
    smtp.mood = "hang"
    place.refused()
    with watch(place) as one:
        wait_for(lambda: smtp.connections, 20, "a connection")
        one.send_signal(signal.SIGTERM)
        assert one.wait(5) == 0


# --- The program ----------------------------------------------------------------------------------


def saslquotawatch_py(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "saslquotawatch.py", "-c", place.path, *arguments],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_once_tells_and_ends(place: Place, smtp: SMTPServer) -> None:
    place.refused()
    done = saslquotawatch_py(place, "--once")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(smtp.mails) == 1
    place.write(_notifyhost="127.0.0.1:1")
    place.let_pass(301)
    place.refused()
    assert saslquotawatch_py(place, "--once").returncode == 1


def test_bad_configuration_is_one_line(place: Place) -> None:
    place.write(_notify="not an address")
    done = saslquotawatch_py(place)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "_notify" in line


def test_the_daemon_runs_without_it() -> None:
    for name in ("saslquota.py", "saslquotactl.py"):
        assert "saslquotawatch" not in re.findall(r"import (\w+)", (ROOT / name).read_text("utf-8"))


# --- All together ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_storm_on_two_daemons_is_one_mail(
    daemon: StartDaemon, database: Database, smtp: SMTPServer
) -> None:
    """10,000 requests for 20 logins from 250 addresses, two watches; nothing is told that the
    table does not hold."""
    config = {**database.config(), "_notify": ADMIN, "_notifyhost": smtp.where}
    running = [daemon({**config, "_loglevel": "ERROR"}, RULES) for _ in range(2)]
    logins = [f"user{number}@example.com" for number in range(20)]

    def ask(number: int) -> None:
        with running[number % 2].policy() as policy:
            for one in range(10_000 // 8):
                address = f"192.0.2.{one % 250}"
                policy.ask(sasl_username=logins[one % 20], client_address=address)

    began = time.monotonic()
    with ExitStack() as stack:
        for one in running:
            stack.enter_context(shipped_watch(one))
        threads = [threading.Thread(target=ask, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        smtp.wait_for_mails(1, 60)
        assert time.monotonic() - began < 60
        untold = "SELECT COUNT(*) FROM events WHERE told IS NULL"
        wait_for(lambda: database.sql(untold) == "0", 20, "the mark")
        pause(3 * saslquotawatch.LOOK_INTERVAL)
    told = text(only(smtp.mails))
    assert told.startswith("20 accounts have reached their quota.\n")
    for login in logins:
        sql = f"FROM sends WHERE account = '{login}'"
        assert database.sql(f"SELECT SUM(recipients) {sql}") == "400"
        (line,) = (line for line in told.splitlines() if line.startswith(f"{login} is refused"))
        found = re.search(r", (\d+) times so far: 400/400 in 1h, rule default, from (\S+) as", line)
        assert found, line
        assert f"192.0.2.{found[2].rpartition('.')[2]}" == found[2]
        amount = database.sql(f"SELECT amount FROM events WHERE account = '{login}'")
        assert 1 <= int(found[1]) <= int(amount) <= 104
    addresses = re.findall(r"^  .* (192[0-9.]+)(?:  new)?$", told, re.MULTILINE)
    known = database.sql("SELECT DISTINCT INET6_NTOA(client_address) FROM sends").split()
    assert len(addresses) == 100
    assert set(addresses) <= set(known)
