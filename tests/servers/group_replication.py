"""A group of three MySQL servers on loopback, all of which take writes (Group Replication)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from servers.cluster import Cluster
from servers.mariadb import Database
from servers.mysql import MySQL
from servers.ports import LOOPBACK, free_port
from servers.process import wait_for

GROUP = "5e4d1f0a-0000-4000-8000-000000000001"


class GroupNode(MySQL):
    """A member of a group. Data is copied from the others when it joins."""

    def __init__(self, directory: Path, number: int) -> None:
        super().__init__(directory)
        self.number = number
        self.group_port = free_port()
        self.members: list[GroupNode] = []

    def command(self) -> Sequence[str | Path]:
        seeds = ",".join(f"{LOOPBACK}:{node.group_port}" for node in self.members)
        return [
            *super().command(),
            f"--server-id={self.number}",
            f"--report-host={LOOPBACK}",
            "--plugin-load-add=group_replication.so",
            f"--group-replication-group-name={GROUP}",
            f"--group-replication-local-address={LOOPBACK}:{self.group_port}",
            f"--group-replication-group-seeds={seeds}",
            "--group-replication-start-on-boot=OFF",
            "--group-replication-single-primary-mode=OFF",
            "--group-replication-enforce-update-everywhere-checks=ON",
            "--group-replication-recovery-get-public-key=ON",
        ]

    def join(self, *, first: bool) -> None:
        self.sql(
            "SET SQL_LOG_BIN = 0; CREATE USER IF NOT EXISTS repl@'%' IDENTIFIED BY 'repl';"
            "GRANT REPLICATION SLAVE, BACKUP_ADMIN, GROUP_REPLICATION_STREAM ON *.* TO repl@'%';"
            "RESET BINARY LOGS AND GTIDS;"
            "CHANGE REPLICATION SOURCE TO SOURCE_USER = 'repl', SOURCE_PASSWORD = 'repl'"
            " FOR CHANNEL 'group_replication_recovery';"
        )
        if first:
            self.sql("SET GLOBAL group_replication_bootstrap_group = ON")
        self.sql("START GROUP_REPLICATION")
        if first:
            self.sql("SET GLOBAL group_replication_bootstrap_group = OFF")

    def online(self) -> str:
        """How many members this one sees."""
        return self.sql(
            "SELECT COUNT(*) FROM performance_schema.replication_group_members"
            " WHERE MEMBER_STATE = 'ONLINE'"
        )


class Group(Cluster[GroupNode]):
    """Three nodes, all of which take writes."""

    def __init__(self, new_directory: Callable[[], Path]) -> None:
        super().__init__([GroupNode(new_directory(), number) for number in (1, 2, 3)])
        for node in self.nodes:
            node.members = self.nodes

    def _start(self, stack: ExitStack) -> None:
        for node in self.nodes:
            stack.enter_context(node)
            node.join(first=node is self.nodes[0])
            wait_for(lambda n=node: n.online() == str(n.number), 60, "it has joined")  # type: ignore[misc]

    def create_database(self) -> Database:
        database = super().create_database()
        look = f"SHOW TABLES FROM {database.name}"
        for node in self.nodes[1:]:
            wait_for(lambda n=node: "sends" in n._client(look).stdout, 20, "the table is there")  # type: ignore[misc]
        return database
