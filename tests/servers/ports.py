"""Loopback ports that nothing else takes."""

import random
import socket

LOOPBACK = "127.0.0.1"
_ports_given: set[int] = set()


def free_port() -> int:
    """Return a loopback port that nothing else takes.

    Below the range that the kernel gives to outgoing connections (32768 and up), so that a server
    that is stopped for a while finds its port still free.
    """
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        if port not in _ports_given:
            _ports_given.add(port)
            return port


def is_listening(port: int) -> bool:
    """Tell whether something accepts connections at the loopback port."""
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True
