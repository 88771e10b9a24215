"""A private Galera cluster of three nodes, each with MariaDB's defaults as the single server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from servers import HERE, Bench, MariaDB, free_port

LIBRARY = Path("/usr/lib/galera/libgalera_smm.so")  # of Debian's package galera-4


class Node(MariaDB):
    """A server of a cluster. It begins with the data of a seed, which was alone and has ended, and
    lacks only what the others have done since then. (That a node copies another one with Debian's
    script needs mariadb-server, which sets up a service, and does not work as root.)"""

    NAME = "galera"
    # As it is when all that other nodes have committed is applied here.
    COUNT = f"SET wsrep_sync_wait = 1; {MariaDB.COUNT}"

    def __init__(self, bench: Bench, seed: Node | None, members: Sequence[Node]) -> None:
        self.seed = seed
        self.group, transfer = (f"127.0.0.1:{free_port()}" for _ in range(2))
        provider = f"gmcast.listen_addr=tcp://{self.group};ist.recv_addr={transfer}"
        provider += f";base_port={self.group.rpartition(':')[2]}"
        options = [
            "--wsrep-on=ON",
            "--loose-plugin-wsrep-provider=OFF",  # since 11.8 it keeps its options from changing
            f"--wsrep-provider={LIBRARY}",
            f"--wsrep-provider-options={provider}",
            "--wsrep-cluster-name=saslquota-bench",
            f"--wsrep-cluster-address=gcomm://{','.join(node.group for node in members)}",
            f"--wsrep-node-address={self.group}",
            "--wsrep-sst-method=shared_seed",
            "--binlog-format=ROW",
            "--innodb-autoinc-lock-mode=2",
        ]
        super().__init__(bench, options)

    def install(self, bench: Bench, options: Sequence[str | Path]) -> None:
        if self.seed:
            without_cache = shutil.ignore_patterns("galera.cache")
            shutil.copytree(self.seed.directory, self.directory, ignore=without_cache)
        else:
            super().install(bench, options)

    def make_user(self) -> tuple[str, str]:
        return (self.seed.user, self.seed.password) if self.seed else super().make_user()

    def is_ready(self) -> bool:
        return super().is_ready() and self.sql(
            "SHOW STATUS LIKE 'wsrep_local_state_comment'"
        ).endswith("Synced")


def galera_cluster(bench: Bench) -> list[Node]:
    """Three nodes in sync."""
    os.environ["PATH"] += f":{HERE}"  # for wsrep_sst_shared_seed
    with bench.section():
        seed = Node(bench, None, ())
    nodes: list[Node] = []
    for _ in range(3):
        nodes.append(Node(bench, seed, nodes))
    return nodes
