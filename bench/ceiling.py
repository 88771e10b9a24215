"""The ceiling: the least that a policy server with one thread per connection can do in Python.

Parses each request into a dict and answers ``action=OK``: no rules, no counting, no log, no checks.
What a real daemon does on top of this is what its share of the ceiling measures.
"""

import socket
import sys
import threading


def serve(connection: socket.socket) -> None:
    """Answer requests until the client closes."""
    buffer = b""
    with connection:
        while data := connection.recv(65536):
            buffer += data
            while (end := buffer.find(b"\n\n")) >= 0:
                request = dict(line.split(b"=", 1) for line in buffer[:end].split(b"\n"))
                buffer = buffer[end + 2 :]
                if b"sasl_username" in request:
                    connection.sendall(b"action=OK\n\n")


def main() -> None:
    """Listen on the port given as the argument, for ever."""
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
