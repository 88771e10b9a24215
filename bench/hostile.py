"""hostile.py PORT CONNECTIONS READY: clients that do a policy server harm, until they are ended.

The connections are dealt out over seven ways to be hostile. Each acts once in PERIOD seconds, and
opens a new connection when its own has been closed. The file READY is made when all are open. The
pace is fixed: as fast as they are served they would be nothing but more load, and would take the
processors from those that are measured.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

PERIOD = 1.0  # seconds
HALF = b"request=smtpd_access_policy\nprotocol_state=RCPT\nsasl_username=hostile@"
WHOLE = HALF + b"example.org\nrecipient=b@example.com\ninstance=1\n\n"
LONGEST = WHOLE[:-1] + b"".join(b"%03d=%s\n" % (n, b"x" * 250) for n in range(240)) + b"\n"


class Client:
    """One connection. What it does is one of WAYS, a method that is called once in a period."""

    def __init__(self, port: int, act: Callable[[Client], None]) -> None:
        self.port = port
        self.act = act
        self.open()

    def open(self) -> None:
        """Connect, and begin from the start."""
        self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        self.socket.setblocking(False)
        self.drops = itertools.cycle(WHOLE[:-1])

    def step(self) -> None:
        """What it does, or a new connection when its own has been closed."""
        try:
            with contextlib.suppress(BlockingIOError):
                self.act(self)
        except OSError:
            self.reconnect()

    def reconnect(self) -> None:
        self.socket.close()
        self.open()

    def read(self) -> None:
        """Take what has come; the end is an error, as a reset is."""
        if not self.socket.recv(65536):
            raise ConnectionError

    def say_nothing(self) -> None:
        self.read()

    def send_a_byte(self) -> None:
        self.socket.send(bytes([next(self.drops)]))
        self.read()

    def send_half(self) -> None:
        """And leave, in the next period."""
        self.reconnect()
        self.socket.send(HALF)

    def send_garbage(self) -> None:
        self.socket.send(b"\x16\x03\x01\0\xff no attribute\n" * 50)
        self.read()

    def send_the_longest(self) -> None:
        """The longest request that is allowed, or nearly."""
        self.socket.send(LONGEST)
        self.read()

    def take_no_reply(self) -> None:
        self.socket.send(WHOLE)

    def come_and_go(self) -> None:
        self.reconnect()


WAYS = (
    Client.say_nothing,
    Client.send_a_byte,
    Client.send_half,
    Client.send_garbage,
    Client.send_the_longest,
    Client.take_no_reply,
    Client.come_and_go,
)


def main() -> None:
    port, connections, ready = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    clients = [Client(port, act) for _, act in zip(range(connections), itertools.cycle(WAYS))]
    ready.touch()
    due = time.monotonic()
    for client in itertools.cycle(clients):
        client.step()
        due += PERIOD / connections
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main()
