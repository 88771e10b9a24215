"""What private clusters of database servers have in common."""

from contextlib import ExitStack
from typing import Generic, Self, TypeVar

from servers.mariadb import Database, MariaDB
from servers.ports import LOOPBACK

Node = TypeVar("Node", bound=MariaDB)


class Cluster(Generic[Node]):
    """Nodes, all of them members on entry, and gone on exit."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self._stack = ExitStack()

    def _start(self, stack: ExitStack) -> None:
        """Enter all nodes, and wait until they are members."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        for node in self.nodes:  # they need not agree on each one's end
            if node.running:
                node.kill()
        self._stack.close()

    def create_database(self) -> Database:
        """A database on all nodes, of user saslquota."""
        return self.nodes[0].create_database()

    def hosts(self, first: int) -> list[str]:
        """What a daemon beside that node lists as _myhost: each has an order of its own."""
        ports = [node.port for node in self.nodes]
        return [f"{LOOPBACK}:{port}" for port in ports[first:] + ports[:first]]
