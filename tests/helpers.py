"""What several test files need, and that is not a server."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
from hypothesis import HealthCheck
from servers.daemon import Daemon
from servers.mariadb import Database, MariaDB
from servers.postfix import Postfix
from servers.process import IS_ROOT, clean_environment, pause, with_module
from servers.supervisor import Supervisor

from saslquota import (
    Answer,
    Charge,
    Committer,
    Config,
    Debit,
    Ledger,
    Message,
    Outage,
    Policy,
    Request,
    RulesFile,
    Verdict,
    Window,
)

StartDaemon = Callable[..., Daemon]  # the fixtures `daemon`, `spooling`, `postfix` and `supervisor`
StartPostfix = Callable[..., Postfix]
StartSupervisor = Callable[..., Supervisor]

EXAMPLES = Path(__file__).resolve().parent
SYSTEM_PYTHON = "/usr/bin/python3"  # every user can run it

DAY = 86_400  # seconds
RETENTION = 30 * DAY  # seconds, as by default
TEXT = "Ops!!! Você já mandou o limite"
SENTENCE = (
    "Ops!!! Você já mandou o limite de {} emails no intervalo de {} segundos,"
    " tente novamente mais tarde"
)
DEFAULT_SENTENCE = SENTENCE.format("{msgquota}", "{seconds}")  # of the shipped default

EFFORT = float(os.environ.get("EFFORT", "1"))  # times as many examples of what is random

# Requests that cost nothing and are answered DUNNO.
SMALL = b"request=smtpd_access_policy\nprotocol_state=CONNECT\n\n"
WHOLE = SMALL[:-1] + b"sender=a@xx\n\n"  # 64 bytes: a recv() gives no part of one
assert len(WHOLE) == 64


def require(*commands: str, root: bool = False) -> None:
    """Skip the test unless the commands are installed (and we are root)."""
    missing = [command for command in commands if shutil.which(command) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if root and not IS_ROOT:
        pytest.skip("needs root")


def examples(number: int) -> hypothesis.settings:
    """Return settings for so many random examples, of which each may take its time."""
    return hypothesis.settings(
        max_examples=max(1, round(number * EFFORT)),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def example_files(kind: str) -> list[Path]:
    """Return the examples of a kind: `config/valid`, `rules/invalid` and so on."""
    found = sorted((EXAMPLES / kind).glob("*.json"))
    assert found, kind
    return found


def saslquota_py(*arguments: str | Path, **environ: object) -> tuple[int, list[str]]:
    """Exit status and lines of a run that must end by itself, and never with a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "saslquota", *arguments],
        env=with_module(clean_environment(environ)),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def write_config(directory: Path, **settings: object) -> None:
    """Change some settings of saslquota.json."""
    path = directory / "saslquota.json"
    found = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**found, **settings}), "utf-8")


def quota(msgquota: int, period: int = 3600) -> dict[str, object]:
    """Return quotarules.json with one rule."""
    return {"default": {"period": period, "msgquota": msgquota, "msg": f" {TEXT} "}}


def mysql_config(database: Database, **changes: object) -> Config:
    """The settings for a test's database, as load_config would give them."""
    found = {name.removeprefix("_"): value for name, value in database.config().items()}
    found |= {"myhost": ("127.0.0.1",), **changes}
    found.pop("store", None)
    return Config(path=Path("saslquota.json"), **found)  # type: ignore[arg-type]


def lone_charge(account: str, cost: int, instance: str, windows: tuple[Window, ...]) -> Charge:
    """Return a send of a sender above whom there is no pool."""
    return Charge(instance, (Debit(account, cost, windows),))


def new_committer(ledger: Ledger, timeout: float) -> Committer:
    """Return a committer that has not been started."""
    return Committer(ledger, timeout, Outage("the test waits"))


class Reply:
    """What a committer calls with its verdict; it must do so once."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict | None] = []
        self._come = threading.Event()

    def __call__(self, verdict: Verdict | None) -> None:
        self.verdicts.append(verdict)
        self._come.set()

    def wait(self, timeout: float = 60) -> Verdict | None:
        assert self._come.wait(timeout), "no verdict"
        (verdict,) = self.verdicts
        return verdict


def submit(committer: Committer, charge: Charge) -> Verdict | None:
    """Return the verdict."""
    reply = Reply()
    committer.submit(charge, reply)
    return reply.wait()


class Decider(NamedTuple):
    """A policy with a committer, put together as a connection does."""

    policy: Policy
    rules: RulesFile
    committer: Committer


def check(decider: Decider, request: Request, message: Message | None = None) -> Answer:
    """Return the answer to a request on a connection that remembers a message."""
    message = message or Message()
    charge = decider.policy.charge(request, message)
    if isinstance(charge, Answer):
        return charge
    answer = decider.policy.answer(request, submit(decider.committer, charge), message)
    message.remember(answer)
    return answer


@contextmanager
def in_background(work: Callable[[], object]) -> Iterator[None]:
    """Do it again and again, until the end of the block."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def loop() -> None:
        try:
            while not stop.is_set():
                work()
        except (OSError, AssertionError) as error:
            errors.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def kept_running(server: MariaDB) -> AbstractContextManager[None]:
    """Start a server again when it ends, as the machine's service manager does. One that aborts
    writes a backtrace before it is gone, which may take seconds."""

    def look() -> None:
        pause(0.05)
        if not server.running:
            server.start()

    return in_background(look)
