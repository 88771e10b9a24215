"""delay.py PORT TARGET SECONDS: passes connections on to TARGET, as if it were that far away.

Each direction is held up by half of SECONDS. It is meant for a protocol in which one side waits for
the other, as MySQL's: what comes meanwhile is held up once more.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time


def main() -> None:
    port, target, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    with socket.create_server(("127.0.0.1", port)) as server:
        while True:
            client, _ = server.accept()
            database = socket.create_connection(("127.0.0.1", target))
            for side in (client, database):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((client, database), (database, client)):
                threading.Thread(
                    target=pass_on, args=[source, sink, seconds / 2], daemon=True
                ).start()


def pass_on(source: socket.socket, sink: socket.socket, seconds: float) -> None:
    """One direction, until its end."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 20):
            time.sleep(seconds)
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main()
