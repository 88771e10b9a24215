"""saslquotactl.py backtest and recommend: whom other rules would have refused, how to choose one.

A part of saslquotactl.py, which has its frame: Session, texts, exit statuses. Replayed decides the
sends of an account anew; they are read in slices, so that the daemon is not disturbed.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import math
import operator
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import saslquota
from saslquota import POOL_PREFIX, Rule, Rules, Store, Window
from saslquotactl import (
    IS_LOGIN,
    OK,
    RAW,
    WARNING,
    ControlError,
    Item,
    Session,
    counted,
    format_moment,
    json_time,
    progress,
    table,
)

SLICE = 20_000  # rows of one SELECT: none takes long
Row = tuple[str, int, int, int, int, str]  # account, seq, epoch, at, recipients, instance


class Replayed:
    """An account whose sends are decided anew. As in the ledger, what a window holds is the
    difference of two totals. To `measure`, it accepts all, and makes its windows that large."""

    def __init__(self, rule: Rule, pools: Iterable[Replayed], *, measure: bool) -> None:
        self.by_message, self.measure = rule.per_message, measure
        refusing = (w for w in rule.windows if w.enforce and w.action != "HOLD")
        self.windows = rule.windows if measure else tuple(refusing)
        self.quotas = [0 if measure else window.msgquota for window in self.windows]
        self.due = [(account, 1) for account in (self, *pools)]  # charged for one recipient
        self.accepted: dict[str, bool] = {}  # messages by their instance
        self.sends = self.sent = self.refused = self.first = 0  # `sent`, `refused`: recipients
        self.limit = Window(0, 0)  # what refused first
        self.begin(1)

    def begin(self, epoch: int) -> None:
        self.epoch, self.total = epoch, 0
        self.ats, self.befores = array("q"), array("q")  # of each send; the totals before them
        self.starts = [0] * len(self.windows)  # the first send that is in each window
        self.room = -1.0  # what certainly fits into all; for more full() must look

    def full(self, cost: int, at: int) -> list[Window]:
        """The windows that have no room for the cost."""
        found, self.room = [], math.inf
        for number, window in enumerate(self.windows):
            oldest = at - window.period * 1_000_000  # it still counts
            start = self.starts[number] = bisect_left(self.ats, oldest, self.starts[number])
            used = self.total - self.befores[start] if start < len(self.ats) else 0
            if self.measure:
                self.quotas[number] = max(self.quotas[number], used + cost)
            elif used + cost > self.quotas[number]:
                found.append(window)
            self.room = min(self.room, self.quotas[number] - used)
        return found

    def send(self, recipients: int, at: int, instance: str) -> None:
        """Charge it and its pools, or none. Where messages count, each is charged once, or stays
        refused."""
        self.sends += 1
        self.sent += recipients
        accepted = self.accepted.get(instance)
        due = self.due
        if accepted or recipients > 1:
            due = [
                (account, 1 if account.by_message else recipients)
                for account, _ in due
                if not (accepted and account.by_message)
            ]
        full: list[Window] = []
        for account, cost in due:
            if account.room < cost:
                full += account.full(cost, at)
        if full or accepted is False:
            longest = max(full, key=lambda window: window.period, default=self.limit)
            if longest.count == "messages" and instance:
                self.accepted[instance] = False
            if not self.refused:
                self.first, self.limit = at, longest
            self.refused += recipients
            return
        for account, cost in due:
            account.ats.append(at)
            account.befores.append(account.total)
            account.total += cost
            account.room -= cost
        if instance:
            self.accepted[instance] = True


def replay(rules: Rules, rows: Iterable[Row], *, measure: bool = False) -> dict[str, Replayed]:
    """The accounts, once their sends are decided anew as the ledger would by these rules."""
    new = functools.partial(Replayed, measure=measure)
    found = {POOL_PREFIX + rule.key: new(rule, ()) for rule in rules if rule.is_pool}
    for name, _, epoch, at, recipients, instance in rows:
        account = found.get(name)
        if account is None:
            pools = [found[POOL_PREFIX + pool.key] for pool in rules.pools(name)]
            account = found[name] = new(rules.select(name), pools)
        if epoch != account.epoch:  # it was reset
            account.begin(epoch)
        if recipients:
            account.send(recipients, at, instance)
    return found


def read_sends(store: Store, rules: Rules, since: int, login: str) -> Iterator[list[Row]]:
    """The sends of all logins, or of one, by the primary key: the daemon goes on meanwhile."""
    instance = "instance" if any(rule.per_message for rule in rules) else "''"
    select = (
        f"SELECT account, seq, epoch, {store.SELECT_AT}, recipients, {instance} FROM sends"
        f" WHERE {IS_LOGIN} AND {store.SELECT_AT} + 0 >= ?"  # by no index
    )
    one = f"{select} AND account = ? AND seq > ? ORDER BY seq LIMIT {SLICE}"
    others = f"{select} AND account > ? ORDER BY account, seq LIMIT {SLICE}"
    rows: list[Any] = [(login, 0)]
    while rows:
        account, seq = rows[-1][:2]
        rows = store.run(one, (since, account, seq))
        if len(rows) < SLICE and not login:
            rows += store.run(others, (since, account))
        yield rows


def recorded(store: Store, rules: Rules, since: int, login: str) -> Iterable[Row]:
    """The sends since a time; where there are pools, in the order of time and with their resets."""
    pools = [POOL_PREFIX + rule.key for rule in rules if rule.is_pool]
    slices = read_sends(store, rules, since, "" if pools else login)
    rows = itertools.chain.from_iterable(progress(slices, "sends read", SLICE))
    if not pools:
        return rows
    epochs = f"SELECT account, 0, epoch, MIN({store.SELECT_AT}), 0, '' FROM sends"
    by_epoch = "WHERE account = ? GROUP BY account, epoch"
    begun = [row for pool in pools for row in store.run(f"{epochs} {by_epoch}", (pool,))]
    names: dict[str, str] = {}  # one text for each account, not for each row
    compact = ((names.setdefault(row[0], row[0]), *row[1:]) for row in rows)
    return sorted([*begun, *compact], key=operator.itemgetter(3))


# --- Backtest and recommend -----------------------------------------------------------------------

BACKTEST_HELP = """\
Tell whom rules would have refused: those of --rules, or one --limit for each
login, or those in force.

    saslquotactl.py backtest --limit 200/1h
    saslquotactl.py backtest --rules /root/quotarules.new.json -p 7d

REFUSED and SENT are recipients; LIMIT is what refused first, and FIRST when.
Windows begin empty: let -p be several times their periods. "enforce": false and
HOLD refuse nobody; blocks and grants are left out. What a login sent under one
instance is one message."""
UNKNOWN = (
    "Not recorded: what was refused; how many recipients it was where a rule counted messages."
)
RECOMMEND_HELP = """\
Tell how much each window of the rules has held at most. Half of its logins
never had more in it than 50%, all but one in a hundred not more than 99%. The
limit REFUSE 3 would have refused three of them. A pool (@domain, *) is one.

To choose a first limit, count for some weeks with "enforce": false, then take
somewhat more than REFUSE 0. Where REFUSE 1 or 3 is far less, a few stand out:
backtest --limit names them. Give them rules of their own, if they are no
thieves. A limit for 1h stops a thief sooner than one for 1d; have both."""
MAY_REFUSE = 0, 1, 3, 10  # logins


def read_option(option: str, value: str, read: Callable[[str], Item]) -> Item:
    try:
        return read(value)
    except ValueError as error:
        raise ControlError(f"{option}: must be {error}") from None


def rules_to_test(session: Session, arguments: argparse.Namespace) -> Rules:
    if arguments.rules:
        return saslquota.load_rules(arguments.rules, session.config.retentiondays * 86_400)
    if not arguments.limit:
        return session.rules
    msgquota, _, period = arguments.limit.partition("/")
    number = read_option(f"--limit {arguments.limit}", msgquota, saslquota.read_msgquota)
    length = read_option(f"--limit {arguments.limit}", period, saslquota.read_period)
    return Rules([Rule("default", (Window(length, number, "default"),))])


def replay_period(
    session: Session, arguments: argparse.Namespace, rules: Rules, *, measure: bool = False
) -> tuple[dict[str, Replayed], str]:
    """The accounts of the last -p, and how much they sent, in words."""
    seconds = read_option(f"-p {arguments.period}", arguments.period, saslquota.read_period)
    login = session.account(arguments.login) if arguments.login else ""
    rows = recorded(session.store, rules, session.now - seconds * 1_000_000, login)
    found = replay(rules, rows, measure=measure)
    accounts = {name: account for name, account in found.items() if login in ("", name)}
    sends = [account.sends for account in accounts.values() if account.sends]
    period = saslquota.format_time(seconds)
    what = f"{counted(sum(sends), 'send')} of {counted(len(sends), 'sender')}"
    return accounts, f"{what} in the last {period}"


def backtest(accounts: Mapping[str, Replayed]) -> list[dict[str, Any]]:
    """Who would have been refused, most first."""
    rows = []
    for login, account in accounts.items():
        if account.refused:
            period = saslquota.format_time(account.limit.period)
            messages = " messages" if account.limit.count == "messages" else ""
            rule = f", rule {account.limit.rule}" if account.limit.rule != "default" else ""
            limit = f"{account.limit.limit_text}{messages} in {period}{rule}"
            row = {"refused": account.refused, "sent": account.sent, "limit": limit}
            rows.append(row | {"first": account.first, "login": login})
    return sorted(rows, key=lambda row: (-row["refused"], row["login"]))


def run_backtest(session: Session, arguments: argparse.Namespace) -> int:
    accounts, what = replay_period(session, arguments, rules_to_test(session, arguments))
    rows = backtest(accounts)
    cells = [[*(r | {"first": format_moment(r["first"], session.now)}).values()] for r in rows]
    lines = table(cells, ("REFUSED", "SENT", "LIMIT", "FIRST", "LOGIN"))
    in_json = [row | {"first": json_time(row["first"])} for row in rows]
    who = f"{counted(len(rows), 'sender')} would have been refused"
    session.show(in_json, [f"{what}: {who}", *lines, UNKNOWN])
    return WARNING if what.startswith("0 ") else OK


def recommend(rules: Rules, accounts: Iterable[Replayed]) -> list[dict[str, Any]]:
    """For each window what it held at most, of the login that has a certain rank by that."""
    held = collections.defaultdict(list)
    for account in accounts:
        for number, window in enumerate(account.windows):
            held[window.rule, number].append(account.quotas[number])
    rows = []
    for rule in rules:
        for number, window in enumerate(rule.windows):
            found = sorted(held[rule.key, number], reverse=True)
            limit = None if window.msgquota == math.inf else window.msgquota
            row = {"rule": rule.key, "period": window.period, "limit": limit, "logins": len(found)}
            ranks = {"p50": len(found) // 2, "p99": len(found) // 100, "highest": 0}
            ranks |= {f"refuse_{n}": n for n in MAY_REFUSE}
            rows.append(row | {name: (*found, *[None] * 11)[n] for name, n in ranks.items()})
    return rows


def run_recommend(session: Session, arguments: argparse.Namespace) -> int:
    accounts, what = replay_period(session, arguments, session.rules, measure=True)
    rows = recommend(session.rules, accounts.values())
    cells = [[*(r | {"period": saslquota.format_time(r["period"])}).values()] for r in rows]
    heading = "RULE", "PERIOD", "LIMIT", "LOGINS", "50%", "99%", "HIGHEST"
    lines = table(cells, (*heading, *(f"REFUSE {n}" for n in MAY_REFUSE)))
    session.show(rows, [what, *lines])
    return WARNING if what.startswith("0 ") else OK


def add_commands(commands: Any) -> None:
    for name, run, about, text in (
        ("recommend", run_recommend, "how to choose the first limit", RECOMMEND_HELP),
        ("backtest", run_backtest, "whom other rules would have refused", BACKTEST_HELP),
    ):
        parser = commands.add_parser(name, help=about, description=text, formatter_class=RAW)
        parser.add_argument(
            "-p", dest="period", metavar="TIME", default="30d", help="how far back (30d)"
        )
        parser.set_defaults(command=run, login="")
    parser.add_argument("--login", metavar="LOGIN", help="only this one")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rules", metavar="FILE", type=Path, help="as quotarules.json")
    which.add_argument("--limit", metavar="N/TIME", help="for each login, such as 200/1h")
