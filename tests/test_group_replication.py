"""Three daemons on the three nodes of a MySQL group, all of which take writes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import StartDaemon
from servers.audit import Entry, audit, entries
from servers.group_replication import Group
from servers.load import DEFERRED, OK, REFUSED, Load
from servers.mariadb import Database
from servers.mysql import require_mysql
from servers.process import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SENDERS = tuple(f"shared{n}@example.com" for n in range(4))


@pytest.fixture(scope="module")
def group(new_directory: Callable[[], Path]) -> Iterator[Group]:
    require_mysql()
    with Group(new_directory) as three:
        yield three


def assert_same_everywhere(group: Group, shared: Database) -> Sequence[Entry]:
    rows = entries(shared)
    for node in group.nodes[1:]:
        if node.running:
            other = replace(shared, server=node, port=node.port)
            wait_for(lambda o=other: entries(o) == rows, 20, "the same rows on all nodes")  # type: ignore[misc]
    return rows


def test_nodes_that_write_the_same_accounts(group: Group, daemon: StartDaemon) -> None:
    """They collide all the time, at commit too (1180, error 149): never one too many, and nobody
    is deferred. Nor is anybody over quota when a node is gone."""
    shared = group.create_database()
    rules: dict[str, dict[str, object]]
    rules = {"default": {"period": 5, "msgquota": 60, "msg": "over quota"}}
    rules |= {"busy@example.com": {"msgquota": "unlimited"}}
    config = {**shared.config(), "_loglevel": "INFO", "_dbtimeout": 30}  # a busy machine
    daemons = [daemon({**config, "_myhost": group.hosts(n)}, rules) for n in range(3)]
    ports = [running.port for running in daemons]
    with Load(ports, ["busy@example.com"], connections=6, pause=0) as busy:
        busy.wait(OK, 120, 600)
    assert {sample.reply for sample in busy.samples} == {OK}
    with Load(ports, SENDERS, connections=9, pause=0.01) as load:
        load.wait(OK, 60, 300)
        load.wait(REFUSED, 20, 50)
        assert DEFERRED not in {sample.reply for sample in load.samples}
        group.nodes[2].kill()
        load.wait(OK, 30, 200)
    load.assert_answered(30)  # as _dbtimeout says
    rows = [row for row in assert_same_everywhere(group, shared) if row.account in SENDERS]
    audit(rows, load.accepted(), lambda _: (5, 60))
