"""What several test files need, and that is not a server."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck
from servers.daemon import Daemon
from servers.mariadb import Database
from servers.postfix import Postfix
from servers.process import IS_ROOT, ROOT, clean_environment
from servers.supervisor import Supervisor

from saslquota import (
    Answer,
    Charge,
    Committer,
    Config,
    Debit,
    Message,
    Policy,
    Request,
    Verdict,
    Window,
)

StartDaemon = Callable[..., Daemon]  # the fixtures `daemon`, `postfix` and `supervisor`
StartPostfix = Callable[..., Postfix]
StartSupervisor = Callable[..., Supervisor]

EXAMPLES = Path(__file__).resolve().parent

DAY = 86_400  # seconds
RETENTION = 30 * DAY  # seconds, as by default
TEXT = "Ops!!! Você já mandou o limite"
SENTENCE = (
    "Ops!!! Você já mandou o limite de {} emails no intervalo de {} segundos,"
    " tente novamente mais tarde"
)

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
        [sys.executable, ROOT / "saslquota.py", *arguments],
        env=clean_environment(environ),
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


def submit(committer: Committer, charge: Charge) -> Verdict | None:
    """Return what is delivered; it must be one verdict."""
    verdicts: list[Verdict | None] = []
    if job := committer.submit(charge, verdicts.append):
        job.wait()
    (verdict,) = verdicts
    return verdict


def check(policy: Policy, request: Request, message: Message | None = None) -> Answer:
    """Return what is delivered; it must be one answer."""
    answers: list[Answer] = []
    if job := policy.check(request, message or Message(), answers.append):
        job.wait()
    (answer,) = answers
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
