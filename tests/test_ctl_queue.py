"""queue: a login's mail that waits in Postfix's queues."""

import json
import os
import shutil
import smtplib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import StartPostfix, require
from servers.daemon import as_user
from servers.postfix import Postfix
from servers.process import ROOT, clean_environment, run, wait_for

import saslquota
import saslquotactl

ALICE, BRAZIL, BOB = "alice@example.com", "alice@example.com.br", "bob@example.com"
QUEUES = "incoming", "active", "deferred", "hold"


# --- With Postfix ---------------------------------------------------------------------------------


def submit(session: smtplib.SMTP, sender: str, text: str = "Subject: test\n\nA message.\n") -> str:
    """Send a mail and return its queue id."""
    session.mail(sender)
    session.rcpt("rcpt@example.net")
    code, reply = session.data(text)
    assert code == 250, reply
    return reply.decode().rsplit(maxsplit=1)[-1]


def ids_of(instance: Postfix, login: str, *options: str) -> list[str]:
    """What the command prints, run as a program."""
    command: list[str | Path] = [sys.executable, ROOT / "saslquotactl.py", *options]
    command += ["-c", instance.config / "saslquota.json"]
    command += ["queue", login, "--config-dir", instance.config]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=clean_environment())
    assert (done.returncode, bool(done.stdout)) in ((0, True), (1, False)), done.stderr
    return done.stdout.splitlines()


def in_queue(instance: Postfix, queue: str) -> set[str]:
    return {path.name for path in (instance.queue / queue).rglob("*") if path.is_file()}


@pytest.mark.parametrize("long_ids", ["no", "yes"])
def test_a_login_s_mail_is_held_released_and_deleted(postfix: StartPostfix, long_ids: str) -> None:
    instance = postfix(
        "",
        main={"defer_transports": "discard", "enable_long_queue_ids": long_ids},
        users=(ALICE, BRAZIL, BOB),
    )
    (instance.config / "saslquota.json").write_text('{"_store": "sqlite"}')
    forged = f"Subject: sasl_username={ALICE}\nsasl_username: {ALICE}\n\nsasl_username={ALICE}\n"
    with instance.login(ALICE) as session:
        hers = {submit(session, sender) for sender in (ALICE, BOB, "", f"sasl_username={BOB}@x")}
    with instance.login(BOB) as session:
        session.ehlo("sasl_username=" + ALICE)
        bobs = {submit(session, ALICE, forged), submit(session, f"sasl_username={ALICE}")}
    with instance.login(BRAZIL) as session:
        theirs = {submit(session, ALICE)}
    everybody = hers | bobs | theirs
    wait_for(lambda: in_queue(instance, "deferred") == everybody, 20, "all mail is deferred")
    assert sorted(ids_of(instance, ALICE)) == sorted(hers)
    assert sorted(ids_of(instance, BOB)) == sorted(bobs)
    assert ids_of(instance, BRAZIL) == list(theirs)
    for option, queue in ("-h", "hold"), ("-H", "deferred"), ("-h", "hold"):
        ids = "\n".join(ids_of(instance, "Alice@Example.COM")) + "\n"
        run(["postsuper", "-c", instance.config, option, "-"], stdin=ids)
        assert hers <= in_queue(instance, queue)
    found = [json.loads(line) for line in ids_of(instance, ALICE, "--json")]
    assert {(row["queue_id"], row["queue"]) for row in found} == {(id_, "hold") for id_ in hers}
    senders = ["", ALICE, BOB, f"sasl_username={BOB}@x"]
    assert sorted(row["sender"] for row in found) == senders
    run(["postsuper", "-c", instance.config, "-d", "-"], stdin="\n".join(ids_of(instance, ALICE)))
    assert ids_of(instance, ALICE) == []
    assert bobs | theirs == in_queue(instance, "deferred") | in_queue(instance, "hold")


# --- Files as Postfix writes them -----------------------------------------------------------------


def record(kind: str, data: str | bytes) -> bytes:
    """A record: type, length, data."""
    content = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    length, coded = len(content), b""
    while length > 0x7F:
        coded += bytes([length & 0x7F | 0x80])
        length >>= 7
    return kind.encode() + coded + bytes([length]) + content


def mail(login: str, *more: bytes, sender: str = "x@example.org", body: bytes = b"") -> bytes:
    """A queue file; `more` comes before the login."""
    return b"".join(
        [
            record("C", f"{1000:15} {500:15} {1:15} {0:15} {1000:15} {0:15}"),
            record("T", "1700000000 123456"),
            record("A", "rewrite_context=remote"),
            *more,
            record("A", "sasl_method=PLAIN"),
            record("A", f"sasl_username={login}") if login else b"",
            record("S", sender),
            record("A", "log_client_name=localhost"),
            record("R", "rcpt@example.net"),
            record("M", ""),
            body or record("N", "Subject: test"),
            record("X", ""),
            record("E", ""),
        ]
    )


class Spool:
    """A queue directory, and the command on it."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self._capsys = directory, capsys
        self.root = directory / "queue"
        for queue in QUEUES:
            (self.root / queue).mkdir(parents=True)
        self.configure()
        (directory / "main.cf").write_text(f"queue_directory = {self.root}\n")

    def configure(self, **settings: object) -> None:
        config = {"_store": "sqlite", **settings}
        (self.directory / "saslquota.json").write_text(json.dumps(config))

    def add(self, path: str, content: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(content)

    def run(self, *arguments: str, options: Sequence[str] = ()) -> tuple[int, list[str], list[str]]:
        config = str(self.directory / "saslquota.json")
        where = ["--config-dir", str(self.directory)]
        status = saslquotactl.main(["-c", config, *options, "queue", *arguments, *where])
        out, err = self._capsys.readouterr()
        return status, sorted(out.splitlines()), err.splitlines()


@pytest.fixture
def spool(new_directory: Any, capsys: pytest.CaptureFixture[str]) -> Spool:
    require("postconf")
    return Spool(new_directory(), capsys)


def test_all_queues_are_searched_and_their_hashed_directories(spool: Spool) -> None:
    for path in (
        *("incoming/4D2F81", "active/4D2F82", "hold/4Sd2yz3LRGz1b", "deferred/4D2F83"),
        *("deferred/4/4D2F84", "deferred/4/D/4D2F85", "maildrop/4D2F86", "corrupt/4D2F87"),
    ):
        spool.add(path, mail(ALICE))
    ids = ["4D2F81", "4D2F82", "4D2F83", "4D2F84", "4D2F85", "4Sd2yz3LRGz1b"]
    assert spool.run(ALICE) == (0, ids, [])


def test_mail_that_moves_meanwhile_is_named_once(spool: Spool) -> None:
    for queue in ("active", "deferred", "hold"):
        spool.add(f"{queue}/4D2F81", mail(ALICE))
    assert spool.run(ALICE) == (0, ["4D2F81"], [])


def test_mail_that_is_delivered_meanwhile_is_no_error(spool: Spool) -> None:
    spool.add("active/4D2F81", mail(ALICE))
    (spool.root / "active/4D2F82").symlink_to("gone")
    assert spool.run(ALICE) == (0, ["4D2F81"], [])


def test_another_queue_file_fools_nobody(spool: Spool) -> None:
    fake = record("A", f"sasl_username={ALICE}")
    for number, content in enumerate(
        [
            mail(BOB, body=fake + record("N", fake)),
            mail(BOB, record("N", fake), record("A", fake)),
            mail(BOB, sender=f"sasl_username={ALICE}"),
            mail(BOB, record("A", f"log_helo_name=sasl_username={ALICE}")),
            mail(BOB) + mail(ALICE),
            mail("", body=fake),
            mail(BRAZIL),
            mail(f"{ALICE}\n"[:-1] + "x"),
            mail("x" + ALICE),
            mail(BRAZIL)[: mail(BRAZIL).index(b".br")],
            mail(BOB).replace(record("S", "x@example.org"), fake),  # the first login counts
            fake[:1] + b"\xff" * 5000 + fake,
            b"\xff" * 100_000,
            b"",
        ]
    ):
        spool.add(f"deferred/F{number}", content)
    assert spool.run(ALICE) == (1, [], [f"{ALICE}: no mail waits"])
    assert len(spool.run(BOB)[1]) == 6


@pytest.mark.parametrize("size", [127, 128, 1000, 4080, 20_000])
def test_a_login_is_found_behind_whatever_length(spool: Spool, size: int) -> None:
    spool.add("active/4D2F81", mail(ALICE, record("A", "log_helo_name=" + "x" * size)))
    assert spool.run(ALICE) == (0, ["4D2F81"], [])


def test_all_spellings_of_a_login_are_found(spool: Spool) -> None:
    logins = ["alice@example.com", "Alice@EXAMPLE.com", "ＡＬＩＣＥ@example.com", "alice"]
    for number, login in enumerate(logins):
        spool.add(f"hold/A{number}", mail(login))
    spool.add("hold/B", mail("alice@vip.example"))
    assert spool.run("ALICE@example.com")[1] == ["A0", "A1", "A2"]
    spool.configure(_defaultdomain="example.com")
    assert spool.run("alice")[1] == ["A0", "A1", "A2", "A3"]
    spool.configure(_defaultdomain="example.com", _ignoredomain=True)
    assert spool.run("alice@anything")[1] == ["A0", "A1", "A2", "A3", "B"]


def test_a_login_that_is_not_utf8_is_found_as_the_daemon_counts_it(spool: Spool) -> None:
    spool.add("hold/A1", mail("jos\udce9@example.com"))
    account = saslquota.fold(saslquota.valid_utf8("jos\udce9@example.com"))
    assert spool.run(account)[1] == ["A1"]


def test_a_file_that_does_not_say_when_it_came_is_found(spool: Spool) -> None:
    spool.add("hold/A1", mail(ALICE).replace(record("T", "1700000000 123456"), record("T", "x")))
    (line,) = spool.run(ALICE, options=["--json"])[1]
    assert json.loads(line)["arrival"] is None


def test_json_tells_when_a_mail_came_and_its_sender(spool: Spool) -> None:
    spool.add("hold/A1", mail(ALICE, sender="thief\x1b@example.org"))
    (line,) = spool.run(ALICE, options=["--json"])[1]
    assert json.loads(line) == {
        "queue_id": "A1",
        "queue": "hold",
        "arrival": "2023-11-14T22:13:20+00:00",
        "sender": "thief\x1b@example.org",
    }
    assert "\x1b" not in line


@pytest.mark.parametrize("login", ["*", "@example.com", "", " "])
@pytest.mark.parametrize("domain", ["", "example.com"])
def test_a_pool_has_no_mail_of_its_own(spool: Spool, login: str, domain: str) -> None:
    spool.configure(_defaultdomain=domain)
    spool.add("hold/A1", mail(""))
    complaint = f'saslquotactl: "{login}" is not a login: name one'
    assert spool.run(login) == (2, [], [complaint])


def test_who_may_not_read_the_queues_is_told_so(spool: Spool) -> None:
    require("postconf", root=True)
    (spool.root / "incoming").chmod(0o700)
    for path in ROOT.glob("saslquota*.py"):
        shutil.copy(path, spool.directory)
    command = [*as_user("nobody"), "saslquotactl.py", "queue", ALICE, "--config-dir", "."]
    done = subprocess.run(command, cwd=spool.directory, capture_output=True, encoding="utf-8")
    complaint = f"saslquotactl: {spool.root}/incoming: Permission denied: run this as root\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", complaint)


def test_a_machine_without_postfix_is_told_so(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    complaint = "saslquotactl: postconf: No such file or directory"
    assert spool.run(ALICE) == (2, [], [complaint])
    monkeypatch.undo()
    os.rename(spool.directory / "main.cf", spool.directory / "other.cf")
    status, _, (error,) = spool.run(ALICE)
    assert (status, "main.cf: No such file" in error) == (2, True)
