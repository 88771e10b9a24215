"""A private saslauthd, which asks PAM, as Debian sets it up."""

from collections.abc import Sequence
from pathlib import Path

from servers.postfix import Postfix
from servers.process import Process


class Saslauthd(Process):
    """saslauthd with PAM's service `smtp`, for a Postfix's smtpd in its chroot.

    PAM knows one user, alice. Its configuration is that of a mount namespace of our own: nobody
    else sees it.
    """

    USER = "alice"

    def __init__(self, directory: Path, postfix: Postfix, *options: str) -> None:
        super().__init__(directory, "saslauthd")
        self.options = options
        self.run = postfix.queue / "run" / "saslauthd"
        self.run.mkdir(parents=True)
        self.pam = directory / "pam.d"
        self.pam.mkdir()
        password = directory / "password"
        is_right = f'[ "$PAM_USER" = {self.USER} ] && [ "$(tr -d \'\\0\')" = {Postfix.PASSWORD} ]'
        password.write_text(f"#!/bin/sh\n{is_right}\n")
        password.chmod(0o755)
        (self.pam / "smtp").write_text(
            f"auth required pam_exec.so quiet expose_authtok {password}\n"
            "account required pam_permit.so\n"
        )
        (postfix.config / "sasl" / "smtpd.conf").write_text(
            "pwcheck_method: saslauthd\n"
            "saslauthd_path: /run/saslauthd/mux\n"
            "mech_list: PLAIN LOGIN\n"
        )

    def command(self) -> Sequence[str | Path]:
        start = 'mount --bind "$1" /etc/pam.d && shift && exec saslauthd -d -n 1 -a pam "$@"'
        return ["unshare", "-m", "sh", "-ec", start, "sh", self.pam, "-m", self.run, *self.options]

    def is_ready(self) -> bool:
        return (self.run / "mux").exists()
