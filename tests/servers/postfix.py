"""A private Postfix, and what mail programs do with it."""

import re
import shutil
import smtplib
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from servers.daemon import Daemon
from servers.ports import LOOPBACK, free_port
from servers.process import Process, run

ALICE = "alice@example.com"
MESSAGE = "Subject: test\n\nA message.\n"


def uncomment_services(master: str) -> str:
    """Take the `#` from the stock submission and submissions entries of Debian's master.cf."""

    def uncomment(entry: re.Match[str]) -> str:
        return re.sub(r"^#(?=\S|  -o)", "", entry[0], flags=re.MULTILINE)

    stock = r"^#submissions?\s+inet .*\n(?:#  .*\n)+"
    master, found = re.subn(stock, uncomment, master, flags=re.MULTILINE)
    assert found == 2, "these are not Debian's stock entries"
    return master


def hook_policy(master: str) -> str:
    """Do README.md's step in master.cf: replace the empty smtpd_client_restrictions."""
    empty = r"(-o smtpd_client_restrictions=)$"
    master, found = re.subn(empty, r"\1$saslquota", master, flags=re.MULTILINE)
    assert found == 2, "the stock entries hold no empty smtpd_client_restrictions"
    return master


class Postfix(Process):
    """A private Postfix with Debian's stock submission and submissions entries, chrooted.

    saslquota is the right side of main.cf's `saslquota = ...`. main adds to main.cf or changes it,
    options adds `-o name=value` to both entries (a later -o overrides an earlier one). Users log
    in with Cyrus SASL against a sasldb in the chroot; TLS is on as the stock entries have it; all
    mail is delivered to the discard transport.
    """

    PASSWORD = "secret"

    def __init__(
        self,
        directory: Path,
        saslquota: str,
        main: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
        users: Sequence[str] = ("alice@example.com",),
    ) -> None:
        super().__init__(directory, "postfix")
        self._starts = 0
        self.config = directory / "etc"
        self.queue = directory / "queue"
        self.port, self.tls_port = free_port(), free_port()
        for path in (self.config / "sasl", self.queue / "etc", directory / "data"):
            path.mkdir(parents=True)
        shutil.chown(directory / "data", "postfix")
        self._write_main({"saslquota": saslquota, **(main or {})})
        self._write_master(options or {})
        self._make_certificate()
        self._make_users(users)
        for name in ("services", "hosts", "nsswitch.conf", "resolv.conf", "host.conf"):
            if Path("/etc", name).exists():
                shutil.copy(Path("/etc", name), self.queue / "etc")

    def _write_main(self, changes: Mapping[str, str]) -> None:
        parameters = {
            "compatibility_level": "3.6",
            "queue_directory": str(self.queue),
            "data_directory": str(self.directory / "data"),
            "maillog_file": str(self.output),
            "maillog_file_prefixes": str(self.directory),
            "inet_interfaces": LOOPBACK,
            "inet_protocols": "ipv4",
            "myhostname": "mail.example.com",
            "mydestination": "",
            "alias_maps": "",
            "default_transport": "discard",
            # Debian 12's Postfix has this path built in, Debian 13's has it in its main.cf
            "cyrus_sasl_config_path": str(self.config / "sasl"),
            "in_flow_delay": "0",
            # a client that tries again until its window has passed is not slowed down, nor cut off
            "smtpd_error_sleep_time": "0",
            "smtpd_hard_error_limit": "10000",
            "smtpd_junk_command_limit": "10000",
            "smtpd_peername_lookup": "no",
            "smtpd_tls_cert_file": str(self.config / "cert.pem"),
            "smtpd_tls_key_file": str(self.config / "key.pem"),
            **changes,
        }
        text = "".join(f"{name} = {value}\n" for name, value in parameters.items())
        (self.config / "main.cf").write_text(text)

    def _write_master(self, options: Mapping[str, str]) -> None:
        master = Path("/usr/share/postfix/master.cf.dist").read_text()
        master = re.sub(r"^smtp +inet .*\n", "", master, flags=re.MULTILINE)
        master = hook_policy(uncomment_services(master))
        extra = "".join(f"\n  -o {{ {name} = {value} }}" for name, value in options.items())
        for service, port in (("submission", self.port), ("submissions", self.tls_port)):
            master, found = re.subn(
                rf"^{service} +inet +n +- +[yn] (.*(?:\n  .*|\n#  .*)*)",
                rf"{LOOPBACK}:{port} inet n - y \1{extra}",
                master,
                flags=re.MULTILINE,
            )
            assert found == 1, f"no {service} entry"
        (self.config / "master.cf").write_text(master)

    def _make_certificate(self) -> None:
        kind = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
        ]  # RSA takes 20 times as long
        make = ["openssl", "req", "-x509", *kind, "-nodes", "-subj", "/CN=test"]
        run([*make, "-keyout", self.config / "key.pem", "-out", self.config / "cert.pem"])

    def _make_users(self, users: Sequence[str]) -> None:
        (self.config / "sasl" / "smtpd.conf").write_text(
            "pwcheck_method: auxprop\nauxprop_plugin: sasldb\nmech_list: PLAIN LOGIN\n"
        )
        sasldb = self.queue / "etc" / "sasldb2"
        for user in users:
            name, domain = user.split("@")
            add = ["saslpasswd2", "-p", "-c", "-f", str(sasldb), "-u", domain, name]
            run(add, stdin=self.PASSWORD)
        shutil.chown(sasldb, group="postfix")

    def command(self) -> Sequence[str | Path]:
        # The master itself: `postfix start-fg` would put a shell between it and us.
        master = Path(self.postconf("-h", "daemon_directory").strip(), "master")
        return [master, "-c", self.config, "-s"]

    def start(self) -> None:
        """Let Postfix make its queue directories, and start it."""
        run(["postfix", "-c", self.config, "check"])
        self._starts += 1
        super().start()

    def is_ready(self) -> bool:
        return self.log().count("daemon started") >= self._starts

    def postconf(self, *arguments: str) -> str:
        """Return what postconf says about this instance."""
        return run(["postconf", "-c", self.config, *arguments])

    def postsuper(self, *arguments: str) -> None:
        run(["postsuper", "-c", self.config, *arguments])

    def warnings(self) -> list[str]:
        """Return the log's lines of trouble, but for `postfix check` on the private sasldb2, and
        for what a busy machine brings about."""
        trouble = re.compile(
            r" (warning|error|fatal|panic): "
            r"(?!.*/etc/sasldb2 differ$|file system clock is|resetting file time stamps)"
        )
        return [line for line in self.log().splitlines() if trouble.search(line)]

    def login(self, user: str | None = "alice@example.com") -> smtplib.SMTP:
        """Open a session at the submission entry, logged in unless user is None."""
        session = smtplib.SMTP(LOOPBACK, self.port, timeout=30)
        session.starttls(context=any_certificate())
        if user is not None:
            session.login(user, self.PASSWORD)
        return session


def any_certificate() -> ssl.SSLContext:
    """Return a client's TLS settings that take our self-signed certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def service(daemon: Daemon) -> str:
    """Return what README.md writes into main.cf."""
    return f"check_policy_service inet:{LOOPBACK}:{daemon.port}"


def recipients(number: int) -> list[str]:
    """Return so many addresses."""
    return [f"r{i}@example.net" for i in range(number)]


def send(session: smtplib.SMTP, to: list[str] | None = None) -> None:
    """Send one message; raises smtplib's errors."""
    session.sendmail(ALICE, to or recipients(1), MESSAGE)


def refusal(session: smtplib.SMTP) -> tuple[int, str]:
    """Send one message that the only recipient is refused for; return code and text."""
    with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
        send(session)
    ((code, text),) = refused.value.recipients.values()
    return code, text.decode("utf-8")


def is_accepted(session: smtplib.SMTP) -> bool:
    """Try to send one message."""
    try:
        send(session)
    except smtplib.SMTPRecipientsRefused:
        return False
    return True
