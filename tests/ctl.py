"""What the tests of saslquotactl.py have in common: a ledger to look at."""

import json
from collections.abc import Callable
from pathlib import Path

from servers.audit import SECOND
from servers.ports import LOOPBACK, free_port

from saslquota import Entry, Store

RULES = {
    "default": [{"period": "1h", "msgquota": 10}, {"period": "1d", "msgquota": 100}],
    "@school.example": {"period": "1d", "msgquota": 10},
    "free@example.com": {"period": "1h", "msgquota": "unlimited"},
    "none@example.com": {"period": "1h", "msgquota": 0},
    "soft@example.com": {"period": "1h", "msgquota": 5, "enforce": False},
    "both@example.com": [
        {"period": "1h", "msgquota": 5, "enforce": False},
        {"period": "1h", "msgquota": 10, "msg": "no more"},
    ],
    "held@example.com": {"period": "1h", "msgquota": 5, "action": "HOLD"},
}


def spool_entries(now: int) -> list[Entry]:
    """The database's id, and marks of a spool, with as much as could be mistaken for a sender's."""
    home = Entry("SPOOL", 1, 1, now - 60 * SECOND, 0, 0, "5eed", 1)
    marks = [
        Entry(
            "SPOOL 1a2b",
            n,
            1,
            now - (60 - n) * SECOND,
            500,
            500 * n,
            "host",
            7,
            bytes([9] * 3 + [n]),
        )
        for n in range(1, 21)
    ]
    return [home, *marks]


class Site:
    """A ledger, its settings and rules, and the script that looks at it."""

    def __init__(
        self, directory: Path, store: Store, settings: dict[str, object], rules: object = RULES
    ) -> None:
        self.config = directory / "saslquota.json"
        self.store = store
        self.settings = {"_bind": LOOPBACK, "_bindport": free_port(), **settings}
        self.config.write_text(json.dumps(self.settings))
        self.rules = directory / "quotarules.json"
        self.rules.write_text(json.dumps(rules))
        store.open()
        self._chains: dict[str, tuple[int, int, int]] = {}

    def sends(self, account: str, number: int, ago: float = 60, **changes: object) -> None:
        """Sends of one recipient each, so many seconds ago."""
        seq, epoch, total = self._chains.get(account, (0, 1, 0))
        at = self.store.now() - round(ago * SECOND)
        entries = [
            Entry(account, seq + n, epoch, at, 1, total + n, "i", 7)._replace(**changes)  # type: ignore[arg-type]
            for n in range(1, number + 1)
        ]
        self._chains[account] = seq + number, epoch, total + number
        self.store.append(entries)

    def spooled(self) -> None:
        """What a spool leaves in the table: no sender of that name may be seen anywhere."""
        self.store.append(spool_entries(self.store.now()))

    def event(self, account: str, kind: str, ago: float = 60, **values: object) -> None:
        """Times among the values are seconds from now."""
        names = {"until", "last", "told"}
        now = self.store.now()
        given = {"author": "root", "note": "", "number": 1, "at": now - round(ago * SECOND)}
        given |= {
            n: now + round(v * SECOND) if n in names else v  # type: ignore[operator]
            for n, v in values.items()
        }
        given |= {"account": account, "kind": kind}
        marks = [self.store.BIND_TIME if n in (*names, "at") else "?" for n in given]
        sql = f"INSERT INTO events ({', '.join(given)}) VALUES ({', '.join(marks)})"
        self.store.run(sql, list(given.values()))  # type: ignore[arg-type]


Ctl = Callable[..., tuple[int, str]]  # the fixture `ctl`
