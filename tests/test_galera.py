"""Three daemons on the three nodes of a real Galera cluster: together they never let one too many
through, whichever node is killed or frozen."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import StartDaemon, require
from servers import outage
from servers.audit import Entry, assert_never_over_quota, audit, entries
from servers.clock import libfaketime, set_clock
from servers.daemon import Daemon
from servers.galera import LIBGALERA, Galera, GaleraNode
from servers.load import DEFERRED, OK, REFUSED, SLACK, Load
from servers.mariadb import Database
from servers.process import pause, wait_for, wait_for_log

from saslquota import Config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LATEST = Config.dbtimeout + 1  # seconds until the fallback must have come
SENDERS = tuple(f"shared{n}@example.com" for n in range(4))


@pytest.fixture(scope="module")
def galera(new_directory: Callable[[], Path]) -> Iterator[Galera]:
    require("mariadbd", "mariadb-install-db", "mariadb", "rsync")
    if not LIBGALERA.exists():
        pytest.skip("not installed: galera-4")
    with Galera(new_directory) as cluster:
        yield cluster


@pytest.fixture
def shared(galera: Galera) -> Database:
    """A fresh database on all nodes, all of which are up."""
    for node in galera.nodes:
        if node.running:
            node.thaw()
        else:
            node.start()
    galera.wait_for_size(3)
    return galera.create_database()


def three_daemons(
    galera: Galera, shared: Database, daemon: StartDaemon, period: int, quota: int
) -> list[Daemon]:
    rules = {"default": {"period": period, "msgquota": quota, "msg": "over quota"}}
    config = {**shared.config(), "_loglevel": "INFO"}
    return [daemon({**config, "_myhost": galera.hosts(n)}, rules) for n in range(3)]


def assert_same_everywhere(galera: Galera, shared: Database) -> Sequence[Entry]:
    """All nodes hold the same rows, which are returned."""
    rows = entries(shared)
    for node in galera.nodes[1:]:
        other = Database(node, shared.name, shared.host, node.port, shared.user, shared.password)
        wait_for(lambda o=other: entries(o) == rows, 20, "the same rows on all nodes")  # type: ignore[misc]
    return rows


def wait_until_it_counts(running: Daemon) -> None:
    with running.policy() as policy:
        wait_for(
            lambda: policy.ask(sasl_username="probe@example.com", instance="probe") == OK,
            LATEST + 2,
            "each daemon counts",
        )


def use_up(daemons: Sequence[Daemon]) -> list[str]:
    """Ask every daemon for every sender until all say no; return the instances let through."""
    accepted = []
    for number, running in enumerate(daemons):
        with running.policy() as policy:
            for sender in SENDERS:
                count = 0
                while (
                    reply := policy.ask(sasl_username=sender, instance=f"{number}.{sender}.{count}")
                ) != REFUSED:
                    if reply == OK:
                        accepted.append(f"{number}.{sender}.{count}")
                    count += 1
    return accepted


def test_a_node_is_killed_and_comes_back(
    galera: Galera, shared: Database, daemon: StartDaemon
) -> None:
    quota = 1200
    daemons = three_daemons(galera, shared, daemon, 3600, quota)
    ports = [running.port for running in daemons]
    with Load(ports, SENDERS, connections=9, pause=0.1) as load:
        load.wait(OK, 20, 100)
        for victim in (galera.nodes[1], galera.nodes[0]):
            victim.kill()
            load.wait(OK, 20, 100)
            victim.start()
            galera.wait_for_size(3)
            load.wait(OK, 20, 100)
        assert REFUSED not in {sample.reply for sample in load.samples}, "the quota came too early"
    accepted = use_up(daemons)
    load.assert_answered(LATEST)
    rows = assert_same_everywhere(galera, shared)
    audit(rows, load.accepted(), lambda _: (3600, quota))
    assert set(accepted) <= {row.instance for row in rows}
    assert len(rows) == quota * len(SENDERS), "exactly the quota"
    given_up = len(rows) - len(accepted) - len(load.accepted())
    assert 0 <= given_up <= sum(s.reply == DEFERRED for s in load.samples)


def test_a_node_is_frozen(galera: Galera, shared: Database, daemon: StartDaemon) -> None:
    """The others drop it after a while; when it wakes it joins them again, and its daemons'
    INSERTs, which it still holds, do no harm."""
    quota = 1200
    daemons = three_daemons(galera, shared, daemon, 3600, quota)
    ports = [running.port for running in daemons]
    with Load(ports, SENDERS, connections=9, pause=0.1) as load:
        load.wait(OK, 20, 100)
        for victim in (galera.nodes[2], galera.nodes[0]):
            victim.freeze()
            pause(8)
            for running in daemons:  # also the one whose node it was
                wait_until_it_counts(running)
            victim.thaw()
            galera.wait_for_size(3)
            load.wait(OK, 20, 100)
        assert REFUSED not in {sample.reply for sample in load.samples}, "the quota came too early"
    accepted = use_up(daemons)
    load.assert_answered(LATEST)
    rows = assert_same_everywhere(galera, shared)
    ours = [row for row in rows if row.account in SENDERS]
    audit(ours, load.accepted(), lambda _: (3600, quota))
    assert set(accepted) <= {row.instance for row in ours}
    assert len(ours) == quota * len(SENDERS), "exactly the quota"


def test_all_nodes_are_killed_and_come_back_one_by_one(
    galera: Galera, shared: Database, spooling: StartDaemon
) -> None:
    """Each daemon counts on in a spool of its own; nothing is lost, or twice."""
    rules = {"default": {"period": 3600, "msgquota": 10**6, "msg": "over quota"}}
    config = {**shared.config(), "_dbtimeout": Config.dbtimeout}
    daemons = [spooling({**config, "_myhost": galera.hosts(n)}, rules) for n in range(3)]
    with Load([d.port for d in daemons], SENDERS, connections=9, pause=0.05) as load:
        load.wait(OK, 20, 100)
        for node in reversed(galera.nodes):
            node.kill()
        load.wait(OK, 20, 300)
        galera.nodes[0].is_the_newest()
        for node in galera.nodes:
            node.start()
            load.wait(OK, 20, 100)
        galera.wait_for_size(3)
        for running in daemons:
            wait_for_log(running, outage.BACK)
    outage.settle(*daemons)
    rows = assert_same_everywhere(galera, shared)
    ours = [row for row in rows if not row.account.startswith("SPOOL")]
    audit(ours, load.accepted(), lambda _: (3600, 10**6))
    assert {sample.reply for sample in load.samples} == {OK}
    assert max(sample.took for sample in load.samples) <= Config.dbtimeout + SLACK


@contextmanager
def cut_off(node: GaleraNode, database: str) -> Iterator[None]:
    """A node that runs, but no longer belongs to the cluster."""
    node.sql("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=1'")
    look = "SELECT COUNT(*) FROM sends"
    try:
        wait_for(lambda: "ERROR 1047" in node._client(look, database).stderr, 20, "not ready")
        yield
    finally:
        node.sql("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=0'")


def test_a_node_that_is_not_ready(galera: Galera, shared: Database, daemon: StartDaemon) -> None:
    """Error 1047: its daemon goes on with the next one."""
    running, *_ = three_daemons(galera, shared, daemon, 3600, 10**6)
    with Load(running.port, SENDERS, connections=4, pause=0.02) as load:
        load.wait(OK, 20, 50)
        with cut_off(galera.nodes[0], shared.name):
            load.wait(OK, 20, 100)
            wait_for_log(running, f"connected: .*:{galera.nodes[1].port},")
        galera.wait_for_size(3)
        load.wait(OK, 20, 100)
    load.assert_answered(LATEST)
    audit(assert_same_everywhere(galera, shared), load.accepted(), lambda _: (3600, 10**6))


@pytest.fixture
def clocked(galera: Galera, shared: Database) -> Iterator[Database]:
    """As `shared`, with clocks that may be set."""
    if not libfaketime():
        pytest.skip("not installed: libfaketime")
    yield shared
    for node in galera.nodes:
        set_clock(node.clock, 0)


def test_clocks_minutes_apart(galera: Galera, clocked: Database, daemon: StartDaemon) -> None:
    """Exact by the ledger's own times, which are those of the fastest clock."""
    daemons = three_daemons(galera, clocked, daemon, 2, 60)
    with Load([d.port for d in daemons], SENDERS, connections=9, pause=0.01) as load:
        load.wait(REFUSED, 20, 20)
        for offsets in ((0, 240, -180), (240, -180, 0)):
            for node, seconds in zip(galera.nodes, offsets, strict=True):
                set_clock(node.clock, seconds)
            pause(5)
            load.wait(OK, 20, 100)
            load.wait(REFUSED, 20, 20)
    load.assert_answered(LATEST)
    rows = assert_same_everywhere(galera, clocked)
    audit(rows, load.accepted(), lambda _: (2, 60))
    wait_for_log(daemons[0], r"a send is dated \d+ s ahead of the clock")


def test_nobody_is_locked_out_for_longer_than_a_period(
    galera: Galera, clocked: Database, daemon: StartDaemon
) -> None:
    """Used up by the daemon whose clock is 30 s ahead, and asked again at another one."""
    ahead, _, behind = three_daemons(galera, clocked, daemon, 2, 60)
    set_clock(galera.nodes[0].clock, 30)
    pause(2.5)  # until the file and then the clock are read
    use_up([ahead, behind])
    used_up = time.monotonic()
    with behind.policy() as policy:
        wait_for(
            lambda: all(policy.ask(sasl_username=sender) == OK for sender in SENDERS),
            20,
            "all are let in",
        )
    assert time.monotonic() - used_up <= 2 + 1 + 1 + SLACK
    for sender in SENDERS:
        rows = [row for row in assert_same_everywhere(galera, clocked) if row.account == sender]
        assert_never_over_quota(rows, 2, 60)
