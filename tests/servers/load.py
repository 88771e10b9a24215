"""A load of policy requests, and what must be true of the replies."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Self

from servers.daemon import Daemon, PolicyClient
from servers.process import pause, wait_for, wait_for_log

DBTIMEOUT = 2  # seconds: the least that may be configured
LATEST = DBTIMEOUT + 1  # when the fallback must have come
RETURN = 2  # seconds, within which sends are counted again
SLACK = 2.0  # seconds more than promised, for a machine that is busy with other things
CONFIG: Mapping[str, object] = {"_dbtimeout": DBTIMEOUT, "_loglevel": "INFO"}
OK = "OK"
REFUSED = "REJECT over quota"
DEFERRED = "DEFER_IF_PERMIT quota service unavailable, try again later"
# Two kinds of senders: four whose quota bites all the time, four who never reach it.
SHORT, QUOTA = 3, 30  # seconds, sends: a busy machine asks so often, too
NARROW = tuple(f"narrow{n}@quota.example" for n in range(4))
WIDE = tuple(f"wide{n}@example.com" for n in range(4))
RULES: Mapping[str, object] = {
    "quota.example": {"period": SHORT, "msgquota": QUOTA, "msg": "over quota"},
    "default": {"period": 3600, "msgquota": 1_000_000, "msg": "over quota"},
}


def limit(account: str) -> tuple[int, int]:
    """Period in seconds and quota of an account under RULES."""
    return (SHORT, QUOTA) if account in NARROW else (3600, 1_000_000)


class Sample(NamedTuple):
    """A request that was sent, and what came back; reply is None when the connection broke."""

    account: str
    instance: str
    reply: str | None
    began: float  # monotonic seconds
    took: float  # seconds

    @property
    def ended(self) -> float:
        return self.began + self.took


class Load:
    """Some smtpd processes: persistent connections, each request with an instance of its own.

    A connection that breaks (the daemon was killed) is opened again until the load is over.
    """

    _numbers = itertools.count(1)

    def __init__(
        self,
        ports: int | Sequence[int],
        accounts: Sequence[str] = NARROW + WIDE,
        *,
        connections: int = 12,
        pause: float = 0.03,
    ) -> None:
        self.samples: list[Sample] = []
        self._ports = [ports] if isinstance(ports, int) else list(ports)
        self._accounts = accounts
        self._pause = pause
        self._name = f"{next(self._numbers):x}"
        self._stopping = threading.Event()
        self._template = PolicyClient.block(sasl_username="{account}", instance="{instance}")
        self._threads = [
            threading.Thread(target=self._run, args=[number]) for number in range(connections)
        ]

    def _run(self, number: int) -> None:
        port = self._ports[number % len(self._ports)]
        policy: PolicyClient | None = None
        for count in itertools.count():
            if self._stopping.wait(self._pause):
                break
            account = self._accounts[(number // len(self._ports) + count) % len(self._accounts)]
            instance = f"{self._name}.{number:x}.{count:x}"
            block = self._template.replace(b"{account}", account.encode())
            block = block.replace(b"{instance}", instance.encode())
            began, reply = time.monotonic(), None
            try:
                policy = policy or PolicyClient(port, timeout=60)
                policy.send(block)
                reply = policy.reply()
            except (OSError, AssertionError):
                if policy:
                    policy.close()
                policy = None
            took = time.monotonic() - began
            self.samples.append(Sample(account, instance, reply, began, took))
        if policy:
            policy.close()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(70)

    def wait(
        self, reply: str, timeout: float, number: int = 1, after: float | None = None
    ) -> float:
        """Wait for so many such replies to requests that begin after now, or after another moment;
        return the seconds that this took."""
        start = time.monotonic() if after is None else after
        seen, found = len(self.samples) if after is None else 0, 0

        def arrived() -> bool:
            nonlocal seen, found
            fresh = self.samples[seen:]
            seen += len(fresh)
            found += sum(s.reply == reply and s.began >= start for s in fresh)
            return found >= number

        try:
            wait_for(arrived, timeout, f"{number} x {reply}")
        except AssertionError as error:
            got = Counter(sample.reply for sample in self.samples if sample.ended >= start)
            raise AssertionError(f"{error}; got {got}") from None
        return time.monotonic() - start

    def counts_within(self, seconds: float = RETURN) -> None:
        """Make sure that it counts again so many seconds from now."""
        took = self.wait(OK, seconds + SLACK + 5)
        assert took <= seconds + SLACK, f"it took {took:.2f} s until sends were counted again"
        self.wait(OK, 5, 50)
        self.wait(REFUSED, 10, 20)  # and the quota holds

    def accepted(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.reply == OK]

    def between(self, start: float, end: float) -> list[Sample]:
        """The requests that began in that time."""
        return [sample for sample in self.samples if start <= sample.began < end]

    def longest_wait(self) -> float:
        """The longest time that any sender was not let through, in seconds."""
        accounts = {sample.account for sample in self.samples}
        times = [[s.ended for s in self.accepted() if s.account == a] for a in accounts]
        ends = max(sample.ended for sample in self.samples)
        return max(
            later - earlier
            for account in times
            for earlier, later in itertools.pairwise([*sorted(account), ends])
        )

    def assert_never_over_quota(self, quota: int) -> None:
        """In no SHORT was more accepted of a NARROW sender's, as far as the replies' times tell."""
        for account in NARROW:
            mine = [sample for sample in self.accepted() if sample.account == account]
            for first in mine:
                within = [
                    s for s in mine if first.began <= s.began and s.ended < first.began + SHORT
                ]
                assert len(within) <= quota, f"{len(within)} of {quota} in {SHORT} s since {first}"

    def assert_answered(self, seconds: float) -> None:
        """Every request got one of our replies, and none waited longer."""
        replies = Counter(sample.reply for sample in self.samples)
        assert set(replies) <= {OK, REFUSED, DEFERRED}, replies
        assert replies[OK] > 100, replies
        slowest = max(self.samples, key=lambda sample: sample.took)
        assert slowest.took <= seconds + SLACK, slowest

    def assert_at_once(self, start: float, end: float) -> None:
        """The requests of that time were answered with the fallback, and waited for nothing."""
        samples = self.between(start, end)
        assert len(samples) > 50
        others = [s for s in samples if s.reply != DEFERRED and s.ended < end]
        assert not others, others[:5]
        assert max(sample.took for sample in samples) < SLACK


def outlast(
    counting: Daemon,
    load: Load,
    trouble: AbstractContextManager[object],
    complaint: str = "",
    seconds: float = 0,
) -> None:
    """Let trouble come under load, and last: the first requests wait for the deadline, later ones
    for nothing; the log tells; and when the trouble is over, sends are counted again."""
    load.wait(OK, 10, 100)
    ends = time.monotonic() + seconds
    with trouble:
        load.wait(DEFERRED, LATEST + SLACK, 50)
        noticed = time.monotonic()
        wait_for_log(counting, f"database unavailable.*{complaint}")
        pause(ends - time.monotonic())
        over = time.monotonic()
    load.counts_within()
    if seconds:
        load.assert_at_once(noticed, over)
