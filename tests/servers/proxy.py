"""A TCP connection that is slow on demand."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Self

from servers.ports import LOOPBACK


class Stuck:
    """An INSERT that is held up on its way to a database, or its answer on the way back; nothing
    passes it on its connection."""

    def __init__(self, way: str, number: int = 0) -> None:
        self._is_request = way == "request"
        self._left = number  # of INSERTs to come, the last of which gets stuck
        self._lock = threading.Lock()
        self._port = 0  # the proxy's end of its connection
        self.is_there, self.goes_on = threading.Event(), threading.Event()
        self.answer = b""

    def look_at(self, data: bytes, is_request: bool, port: int) -> None:
        """Called with all that is about to be handed on to, or from, a port of the proxy's."""
        with self._lock:
            if is_request and self._left and data[5:11] == b"INSERT" and b"VALUES" in data:
                self._left -= 1
                self._port = 0 if self._left else port
            is_held = self._port == port and is_request == self._is_request
            if self._port == port and not is_request:
                self.answer += data
        if is_held:
            self.is_there.set()
            self.goes_on.wait(60)


class SlowProxy:
    """Hands connections on to a loopback port; what a client sends goes on after `delay` seconds.
    So each statement to a database takes that much longer."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        self.is_refusing = False
        self.stuck = Stuck("")
        self._target = port
        self._closing = threading.Event()
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = ExitStack()
        self._ends: list[socket.socket] = []

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

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Take no new connection, for as long as the block lasts."""
        self.is_refusing = True
        try:
            yield
        finally:
            self.is_refusing = False

    @contextmanager
    def down(self) -> Iterator[None]:
        """Hang up on everybody, and take no new connection."""
        with self.refusing():
            for end in self._ends:
                self._hang_up(end)
            self._ends.clear()
            yield

    @contextmanager
    def insert_stuck(self, way: str, number: int) -> Iterator[Stuck]:
        """The INSERT of that number from now on gets stuck until the end of the block, or its
        answer does."""
        self.stuck = Stuck(way, number)
        try:
            yield self.stuck
        finally:
            self.stuck.goes_on.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = None if self.is_refusing else self._connect()
                if not server:
                    client.close()
                    continue
                for ends in ((client, server, True), (server, client, False)):
                    thread = threading.Thread(target=self._pump, args=ends)
                    thread.start()
                    self._open.callback(thread.join, 10)
                for end in (client, server):
                    self._ends.append(end)
                    self._open.callback(end.close)
                    self._open.callback(self._hang_up, end)

    def _connect(self) -> socket.socket | None:
        with suppress(OSError):  # the server is not there: as if the client had asked it itself
            return socket.create_connection((LOOPBACK, self._target))
        return None

    def _pump(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        try:
            while data := source.recv(65536):
                if is_request:
                    self._closing.wait(self.delay)
                near = target if is_request else source
                self.stuck.look_at(data, is_request, near.getsockname()[1])
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)  # the other way may still be in use
        except OSError:
            for end in (source, target):
                self._hang_up(end)

    @staticmethod
    def _hang_up(end: socket.socket) -> None:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
