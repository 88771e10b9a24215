"""A TCP connection that is slow on demand."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Self

from servers.ports import LOOPBACK


class SlowProxy:
    """Hands connections on to a loopback port; what a client sends goes on after `delay` seconds.
    So each statement to a database takes that much longer."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        self._target = port
        self._closing = threading.Event()
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        self._open.close()

    @contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """For as long as the block lasts."""
        self.delay = seconds
        try:
            yield
        finally:
            self.delay = 0.0

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((LOOPBACK, self._target))
                for ends in ((client, server, True), (server, client, False)):
                    thread = threading.Thread(target=self._pump, args=ends)
                    thread.start()
                    self._open.callback(thread.join, 10)
                for end in (client, server):
                    self._open.callback(end.close)
                    self._open.callback(self._hang_up, end)

    def _pump(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if is_request:
                    self._closing.wait(self.delay)
                target.sendall(data)
        for end in (source, target):
            self._hang_up(end)

    @staticmethod
    def _hang_up(end: socket.socket) -> None:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
