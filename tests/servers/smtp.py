"""A mail server that takes mail, or does what a broken one does."""

import socketserver
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from servers.process import wait_for


class Received(NamedTuple):
    sender: str
    recipients: list[str]
    data: bytes  # without the dots of the protocol, lines end in CRLF


class SMTPServer(socketserver.ThreadingTCPServer):
    """Listens on a free port of 127.0.0.1. `mood` says how it behaves:

    take         as it should
    451, 554     answers DATA with that
    hang         takes the connection, and says nothing
    hang at end  says nothing once it has the mail
    drop         closes the connection once it has the mail
    drip         says one character of its greeting every 0.1 s, and never all
    """

    allow_reuse_address = daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        self.mood = "take"
        self.refuses: dict[str, str] = {}  # recipients, with the reply
        self.asked_for: list[str] = []  # recipients
        self.before_250: Callable[[], object] = lambda: None
        self.mails: list[Received] = []  # for which it said 250
        self.connections = self.reached_end = 0
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), _Dialogue)
        self.where = "127.0.0.1:{1}".format(*self.server_address)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client has gone."""

    def wait_for_mails(self, number: int, timeout: float = 20) -> list[Received]:
        wait_for(lambda: len(self.mails) >= number, timeout, f"{number} mails")
        return self.mails


class _Dialogue(socketserver.StreamRequestHandler):
    server: SMTPServer

    def say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())

    def handle(self) -> None:
        server = self.server
        server.connections += 1
        if server.mood == "hang":
            server.closing.wait(60)
            return
        while server.mood == "drip" and not server.closing.wait(0.1):
            self.wfile.write(b"2")
        self.say("220 stand-in ESMTP")
        self.sender, self.recipients = "", list[str]()
        while line := self.rfile.readline().decode().strip():
            if not self.answer(line[:4].upper(), line.partition("<")[2].partition(">")[0]):
                return

    def answer(self, verb: str, address: str) -> bool:
        """Whether it goes on."""
        if verb == "DATA" and not self.server.mood.isdecimal():
            return self.take(self.sender, self.recipients)
        if verb == "MAIL":
            self.sender = address
        if verb == "RCPT":
            self.server.asked_for.append(address)
            self.recipients += [address] * (address not in self.server.refuses)
        replies = {
            "EHLO": "250-stand-in\r\n250 8BITMIME",
            "RCPT": self.server.refuses.get(address, "250 ok"),
            "DATA": f"{self.server.mood} not now",
        }
        self.say(replies.get(verb, "250 ok"))
        return verb != "QUIT"

    def take(self, sender: str, recipients: list[str]) -> bool:
        server = self.server
        self.say("354 go on")
        lines = []
        while (line := self.rfile.readline()) != b".\r\n":
            if not line:
                return False
            lines.append(line[1:] if line.startswith(b".") else line)
        server.reached_end += 1
        if server.mood == "hang at end":
            server.closing.wait(60)
        if server.mood != "take":
            return False
        server.before_250()
        server.mails.append(Received(sender, recipients, b"".join(lines)))
        self.say("250 taken")
        return True
