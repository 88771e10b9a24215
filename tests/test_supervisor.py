"""End to end: the shipped configuration under real supervisord."""

import os
import signal
import time
import urllib.request

from helpers import StartSupervisor
from servers.daemon import PolicyClient
from servers.ports import free_port, is_listening
from servers.process import wait_for

STOPWAITSECS = 10  # as saslquota_supervisor.conf has it


def test_start_crash_and_stop(supervisor: StartSupervisor) -> None:
    port = free_port()
    started = supervisor({"_bindport": port, "_loghandler": "stdout"})
    first = wait_for(started.program_pid, 20, "RUNNING")
    with PolicyClient(port) as policy:
        assert policy.ask() == "OK"

    wait_for(lambda: "action=ACCEPT" in started.program_log(), 5, "the log line")
    os.kill(first, signal.SIGKILL)
    second = wait_for(started.program_pid, 20, "RUNNING again")
    assert second != first
    with PolicyClient(port) as policy:
        assert policy.ask() == "OK"

        begin = time.monotonic()
        assert "saslquota: stopped" in started.ctl("stop", "saslquota")
        assert time.monotonic() - begin < STOPWAITSECS
    assert not is_listening(port)
    assert "exited: saslquota (terminated by SIGKILL; not expected)" in started.log()
    assert "stopped: saslquota (exit status 0)" in started.log()

    log = started.program_log()
    assert f"listening on 127.0.0.1:{port}" in log
    assert log.count("action=ACCEPT") == 2


def test_bad_configuration_says_so_in_its_log(supervisor: StartSupervisor) -> None:
    started = supervisor({"_bindport": "many"})
    wait_for(lambda: "_bindport" in started.program_log(), 20, "the reason")


def test_the_watch_runs_beside_it(supervisor: StartSupervisor) -> None:
    """It serves what it is told to, and ends in good order."""
    port, http = free_port(), free_port()
    started = supervisor({"_bindport": port, "_http": f"127.0.0.1:{http}"})
    for name in ("saslquota", "saslquota-watch"):
        wait_for(lambda: "RUNNING" in started.ctl("status", name), 20, name)  # noqa: B023
    wait_for(lambda: is_listening(http), 20, "it listens")
    with urllib.request.urlopen(f"http://127.0.0.1:{http}/metrics", timeout=20) as reply:
        assert b"\nsaslquota_up 1\n" in reply.read()
    assert "saslquota-watch: stopped" in started.ctl("stop", "saslquota-watch")
    assert "stopped: saslquota-watch (exit status 0)" in started.log()
    assert is_listening(port)
