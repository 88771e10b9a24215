"""A Galera cluster of three nodes on loopback."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import ClassVar

from servers.clock import faked_clock, libfaketime, set_clock
from servers.cluster import Cluster
from servers.mariadb import MariaDB
from servers.ports import LOOPBACK, free_port
from servers.process import IS_ROOT, wait_for

LIBGALERA = Path("/usr/lib/galera/libgalera_smm.so")


class GaleraNode(MariaDB):
    """A member of a cluster on loopback. Only the first one's data is installed; the others copy
    it when they join."""

    OPTIONS: ClassVar[Mapping[str, str]] = {
        "gcache.size": "32M",
        "evs.keepalive_period": "PT0.3S",
        "evs.inactive_check_period": "PT0.2S",
        "evs.suspect_timeout": "PT5S",  # shorter, and a busy machine loses a node that is well
        "evs.inactive_timeout": "PT8S",
        "evs.install_timeout": "PT8S",
    }

    def __init__(self, directory: Path, number: int) -> None:
        self.number = number
        super().__init__(directory)
        self.group, self.ist, self.sst = free_port(), free_port(), free_port()
        self.members: list[GaleraNode] = []
        self.clock = directory / "clock"
        set_clock(self.clock, 0)

    def _install(self) -> None:
        if self.number == 1:
            super()._install()
        else:
            self._make_directories("data")

    def command(self) -> Sequence[str | Path]:
        others = [node for node in self.members if node is not self and node.running]
        options = {
            "gmcast.listen_addr": f"tcp://{LOOPBACK}:{self.group}",
            "ist.recv_addr": f"{LOOPBACK}:{self.ist}",
            "base_port": str(self.group),
            **self.OPTIONS,
        }
        # The members take one that is late for dead: with all tests beside it, none must be.
        first = ["nice", "-n", "-10"] if IS_ROOT else []
        return [
            *first,
            *super().command(),
            "--wsrep-on=ON",
            "--loose-plugin-wsrep-provider=OFF",  # since 11.8 it keeps its options from changing
            f"--wsrep-provider={LIBGALERA}",
            "--wsrep-cluster-name=saslquota-tests",
            "--wsrep-cluster-address=gcomm://"
            + ",".join(f"{LOOPBACK}:{node.group}" for node in others),
            f"--wsrep-node-name=node{self.number}",
            f"--wsrep-node-address={LOOPBACK}:{self.group}",
            "--wsrep-sst-method=rsync",
            f"--wsrep-sst-receive-address={LOOPBACK}:{self.sst}",
            "--wsrep-provider-options=" + ";".join(f"{k}={v}" for k, v in options.items()),
            "--binlog-format=ROW",
            "--innodb-autoinc-lock-mode=2",
            "--innodb-log-file-size=16M",
        ]

    def environment(self) -> dict[str, str]:
        return super().environment() | (faked_clock(self.clock) if libfaketime() else {})

    def start(self) -> None:
        """Start it, once more if it gives up: when the cluster changes while it joins, it does."""
        with suppress(AssertionError):
            super().start()
        if not self.running:
            super().start()

    def status(self, name: str) -> str:
        """A value of SHOW STATUS; empty when the node does not answer."""
        done = self._client(f"SHOW STATUS LIKE '{name}'")
        return done.stdout.rpartition("\t")[2].strip() if done.returncode == 0 else ""

    def is_ready(self) -> bool:
        return self.status("wsrep_local_state_comment") == "Synced"

    def is_the_newest(self) -> None:
        """Let it be the first to start after the end of all, as an administrator does."""
        state = self.directory / "data" / "grastate.dat"
        text = state.read_text("utf-8")
        state.write_text(text.replace("safe_to_bootstrap: 0", "safe_to_bootstrap: 1"), "utf-8")


class Galera(Cluster[GaleraNode]):
    """Three nodes, in sync."""

    def __init__(self, new_directory: Callable[[], Path]) -> None:
        super().__init__([GaleraNode(new_directory(), number) for number in (1, 2, 3)])
        for node in self.nodes:
            node.members = self.nodes

    def _start(self, stack: ExitStack) -> None:
        for node in self.nodes:
            stack.enter_context(node)
        self.wait_for_size(3)

    def wait_for_size(self, size: int, timeout: float = 30) -> None:
        """Wait until the running, thawed nodes agree that they are so many."""
        wait_for(
            lambda: all(
                node.status("wsrep_cluster_size") == str(size) and node.is_ready()
                for node in self.nodes
                if node.running
            ),
            timeout,
            f"a cluster of {size}",
        )
