"""Loopback ports that nothing else takes."""

import random
import socket
from collections.abc import Iterator
from contextlib import suppress

LOOPBACK = "127.0.0.1"

# Below the range that the kernel gives to outgoing connections (32768 and up), so that a server
# that is stopped for a while finds its port still free. Each process of the tests takes blocks of
# ports that no other one uses.
BLOCKS = range(20000, 30000, 100)

_claims: list[socket.socket] = []


def _claim_block() -> range:
    """Take a block of ports until this process ends: the name of a socket in the abstract namespace
    is taken by one process at a time."""
    for first in random.sample(BLOCKS, len(BLOCKS)):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0saslquota-tests-ports-{first}")
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return range(first, first + BLOCKS.step)
    raise AssertionError("no block of ports is free")


def _ports() -> Iterator[int]:
    while True:
        yield from _claim_block()


_untaken = _ports()


def free_port() -> int:
    """Return a loopback port that nothing else takes."""
    for port in _untaken:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, port))
            return port
    raise AssertionError


def is_listening(port: int) -> bool:
    """Tell whether something accepts connections at the loopback port."""
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True
