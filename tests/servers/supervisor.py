"""A private supervisord with the shipped program."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from servers.daemon import copy_shipped
from servers.process import ROOT, Process, clean_environment


class Supervisor(Process):
    """A private supervisord that includes the shipped configuration, with its paths replaced.

    /opt/saslquota becomes a fresh copy of the shipped files, its Python the one that runs the
    tests, /var/log/supervisor a private directory, and the user root where the service's own does
    not exist. env reaches the daemon through supervisord's environment.
    """

    def __init__(self, directory: Path, env: Mapping[str, object] | None = None) -> None:
        super().__init__(directory, "supervisord")
        self.env = env
        self.config = directory / "supervisord.conf"
        (directory / "log").mkdir()
        copy_shipped(directory / "opt")
        (directory / "saslquota_supervisor.conf").write_text(self._program(), "utf-8")
        self.config.write_text(
            f"[unix_http_server]\nfile={directory}/control.sock\n"
            f"[supervisord]\nlogfile={directory}/supervisord.log\npidfile={directory}/pid\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
            f"[supervisorctl]\nserverurl=unix://{directory}/control.sock\n"
            f"[include]\nfiles={directory}/saslquota_supervisor.conf\n",
            "utf-8",
        )

    def _program(self) -> str:
        text = (ROOT / "saslquota_supervisor.conf").read_text("utf-8")
        for shipped, private in (
            ("/opt/saslquota/venv/bin/python", sys.executable),
            ("/opt/saslquota", str(self.directory / "opt")),
            ("/var/log/supervisor", str(self.directory / "log")),
        ):
            assert shipped in text, f"saslquota_supervisor.conf does not name {shipped}"
            text = text.replace(shipped, private)
        text, found = re.subn(r"^user=saslquota\n", "", text, flags=re.MULTILINE)
        assert found == 2, "saslquota_supervisor.conf does not run both as user saslquota"
        return text

    def command(self) -> Sequence[str | Path]:
        return ["supervisord", "--nodaemon", "--configuration", self.config]

    def environment(self) -> dict[str, str]:
        return clean_environment(self.env)

    def is_ready(self) -> bool:
        return (self.directory / "control.sock").exists()

    def ctl(self, *arguments: str) -> str:
        """Run supervisorctl and return what it says (its exit status tells states apart)."""
        control = ["supervisorctl", "--configuration", str(self.config), *arguments]
        return subprocess.run(control, capture_output=True, text=True, timeout=60).stdout

    def program_log(self) -> str:
        """Return what the daemon has printed."""
        path = self.directory / "log" / "saslquota.log"
        return path.read_text("utf-8") if path.exists() else ""

    def program_pid(self) -> int:
        """Return the daemon's process id while it is RUNNING, else 0."""
        match = re.search(r"RUNNING\s+pid (\d+)", self.ctl("status", "saslquota"))
        return int(match[1]) if match else 0


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
