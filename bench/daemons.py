"""Several daemons on one database: sharing it, at a distance, on a cluster, one after another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import table
from galera import LIBRARY, galera_cluster
from rounds import Round, loaded, measure_pair
from servers import (
    Daemon,
    Load,
    MariaDB,
    Result,
    far_away,
    ledger,
    run_load,
    say,
)

SHARED: tuple[tuple[str, int, Sequence[str]], ...] = (
    (table.MANY_SENDERS, 1000, ()),
    (table.FEW_SENDERS, 50, ()),
    (table.POOLED_SENDERS, 1000, ("*",)),
)
SLICE = 0.2  # seconds
RECOVERED = 0.9  # of the rate before


def three_daemons(this: Round) -> None:
    """Three daemons on one database that share their senders, or a pool, beside one: every append
    may meet another's."""
    one_and_three(this, "shared", [this.database] * 3)
    for daemons in one_or_three(this):
        load = this.load(connections=48, senders=1000 // daemons, own_senders=True)
        share(this, f"own{daemons}", table.OWN_SENDERS, [this.database] * daemons, load)


def galera(this: Round) -> None:
    """The same with three nodes of a cluster, each daemon on its own, beside one on one node."""
    if not LIBRARY.exists():
        say("no Galera: install galera-4")
        return
    nodes = galera_cluster(this.bench)
    there = dataclasses.replace(this, database=nodes[0])
    one_and_three(there, "galera", nodes, table.on_galera, table.ON_GALERA_48)


def one_and_three(
    this: Round,
    name: str,
    databases: Sequence[MariaDB],
    title: Callable[[str], str] = str,
    label: str = table.ON_MARIADB_48,
) -> None:
    """One daemon, and three that share their senders or a pool: each on its own of the databases,
    which hold the same."""
    for case, (what, senders, pools) in enumerate(SHARED):
        for daemons in one_or_three(this):
            load = this.load(connections=48, senders=senders)
            where = databases[:daemons]
            share(this, f"{name}{daemons}case{case}", title(what), where, load, pools, label)


def one_or_three(this: Round) -> tuple[int, int]:
    """How many daemons are measured first, and then."""
    return (1, 3) if this.turn % 2 == 0 else (3, 1)


def share(
    this: Round, name: str, what: str, databases: Sequence[MariaDB], load: Load,
    pools: Sequence[str] = (), label: str = table.ON_MARIADB_48,
) -> None:  # fmt: skip
    """Measure daemons on one ledger, one for each way to it."""
    this.create(name)
    started = [this.start(database, name, pools=pools) for database in databases]
    measure = functools.partial(run_side_by_side, this, name, started, load)
    this.record(table.by_daemons(what, len(started)), label, measure)


def far(this: Round) -> None:
    """A database a millisecond away: one daemon, and three that share their senders."""
    there = far_away(this.bench, this.database, 0.001)
    for name in ("near", "far"):
        this.create(name)
    near = this.start(this.database, "near")
    distant = this.start(there, "far")
    load = this.load()
    measure_pair(this, (table.NEAR, loaded(near, load)), (table.FAR, loaded(distant, load)))
    load = this.load(connections=48)
    for daemons in one_or_three(this):
        share(this, f"far{daemons}", table.FAR_SENDERS, [there] * daemons, load)


def run_side_by_side(
    this: Round, name: str, started: list[dict[str, Daemon]], load: Load, program: str
) -> Result:
    """Load several daemons with one database; each accepted send must have its row."""
    result = run_load([daemons[program] for daemons in started], load)
    this.database.check_count(ledger(name, program), result.all_accepted)
    return result


def handover(this: Round) -> None:
    """A daemon that knows all senders, after another one has written a send for each of them."""
    this.create("handover")
    knowing, writing = (this.start(this.database, "handover") for _ in range(2))
    this.record(
        table.HANDOVER,
        table.ON_MARIADB,
        lambda program: after_another(this, knowing[program], writing[program]),
    )


def after_another(this: Round, knowing: Daemon, writing: Daemon) -> Result:
    """A measurement right after another daemon's sends, and for how many seconds the rate is below
    what it was before them."""
    load = this.load(slice=SLICE)
    before = run_load([knowing], load)
    run_load([writing], Load(requests=load.senders, in_turn=True))
    after = run_load([knowing], dataclasses.replace(load, warmup=0))
    slow = [rate < RECOVERED * before.rate for rate in after.slices] + [False]
    return dataclasses.replace(after, extra=slow.index(False) * SLICE)
