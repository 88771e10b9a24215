"""A Unix-domain socket that a chrooted smtpd reaches, as SECURITY.md describes it: in a directory
`2750 saslquota:postfix` inside Postfix's queue directory."""

import grp
import os
import pwd
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import StartDaemon, StartPostfix, quota, require
from servers.daemon import SERVICE, Daemon, Unprivileged, as_user
from servers.postfix import Postfix, is_accepted, refusal, send
from servers.process import run, wait_for_log

STRANGER = "daemon"
NAME = "saslquota/policy"  # as Postfix names it: relative to its queue directory


def make_directory(instance: Postfix) -> Path:
    """What the administrator does."""
    directory = instance.queue / "saslquota"
    group = grp.getgrnam("postfix").gr_name
    run(["install", "-d", "-m", "2750", "-o", SERVICE, "-g", group, directory])
    return directory


@pytest.fixture
def unprivileged(new_directory: Callable[[], Path]) -> Iterator[StartDaemon]:
    require("setpriv", root=True)
    with ExitStack() as stack:

        def start(*arguments: object) -> Daemon:
            return stack.enter_context(Unprivileged(new_directory(), *arguments))

        yield start


@pytest.mark.slow
def test_a_chrooted_smtpd(postfix: StartPostfix, unprivileged: StartDaemon) -> None:
    instance = postfix(f"check_policy_service unix:{NAME}")
    directory = make_directory(instance)
    daemon = unprivileged({"_bind": f"unix:{instance.queue / NAME}"}, quota(3))

    found = os.stat(directory / "policy")
    assert stat.S_IMODE(found.st_mode) == 0o660
    assert pwd.getpwuid(found.st_uid).pw_name == SERVICE
    assert grp.getgrgid(found.st_gid).gr_name == "postfix"  # from the directory

    with instance.login() as session:
        send(session)
        send(session)
        assert daemon.terminate() == 0
        assert daemon.log().count("action=ACCEPT") == 2
        assert not (directory / "policy").exists()
        daemon.start()  # smtpd still has its connection to the socket before
        send(session)
        code, text = refusal(session)
    assert (code, "Você já mandou" in text) == (554, True)
    run(["postfix", "-c", instance.config, "check"])
    assert not instance.warnings()


@pytest.mark.slow
def test_nobody_else_can_connect(postfix: StartPostfix, unprivileged: StartDaemon) -> None:
    instance = postfix(f"check_policy_service unix:{NAME}")
    make_directory(instance)
    path = instance.queue / NAME
    unprivileged({"_bind": f"unix:{path}"})
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"
    for user, connects in (("postfix", True), (STRANGER, False)):
        done = subprocess.run([*as_user(user), "-c", connect], capture_output=True, text=True)
        assert ("PermissionError" not in done.stderr, done.returncode == 0) == (connects,) * 2


@pytest.mark.slow
def test_a_socket_outside_the_chroot_is_not_found(
    postfix: StartPostfix, unprivileged: StartDaemon, new_directory: Callable[[], Path]
) -> None:
    directory = new_directory()
    directory.chmod(0o777)
    path = directory / "policy"
    unprivileged({"_bind": f"unix:{path}"})
    path.chmod(0o666)  # it is not for the mode
    instance = postfix(f"check_policy_service unix:{path}")
    with instance.login() as session:
        assert not is_accepted(session)
    wait_for_log(instance, f"{path}: No such file or directory")
