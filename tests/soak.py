"""A soak test, by hand: `.venv-tests/bin/python tests/soak.py [--minutes N]`.

Half of what the machine can do, on a private MariaDB, while the rules are rewritten every few
seconds and the database is restarted every three minutes, in turn by SIGTERM and by SIGKILL. Each
minute a line says what the daemon takes and what it has done; "mistakes" must stay 0. At the end
the ledger is compared with every reply. Exit status 1 when there was a mistake.
"""

import argparse
import itertools
import json
import signal
import socket
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from contextlib import ExitStack
from pathlib import Path

from servers.daemon import Daemon, PolicyClient
from servers.load import DEFERRED
from servers.mariadb import Database, MariaDB
from servers.process import Footprint

WORKERS = 8  # connections
SENDERS = 200
PERIOD = 10  # seconds
TIMEOUT = 5  # seconds, _dbtimeout
RESTART = 180.0  # seconds between two restarts of the database
REWRITE = 5.0  # seconds between two versions of the rules
BACK = 3.0  # seconds that the daemon may take to count again
EXPORT = (
    "SELECT account, instance, recipients, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', at)"
    " FROM sends ORDER BY account, seq"
)


def rules(quota: int) -> dict[str, object]:
    return {"default": {"period": PERIOD, "msgquota": quota, "msg": "over quota"}}


class Soak:
    def __init__(self, daemon: Daemon, server: MariaDB, database: Database) -> None:
        self.daemon, self.server, self.database = daemon, server, database
        self.replies: Counter[str] = Counter()
        self.mistakes: list[str] = []
        self.slowest = 0.0
        self.highest = 0  # quota that was ever in the rules
        self.restarts = 0
        self.excused = time.monotonic() + BACK  # until then the database may be away
        self.accepted = [bytearray() for _ in range(WORKERS)]  # by worker and number
        self.stop = threading.Event()

    def mistake(self, what: str) -> None:
        self.mistakes.append(what)
        if len(self.mistakes) <= 20:
            print(f"MISTAKE: {what}", flush=True)

    def ask(self, policy: PolicyClient, worker: int) -> None:
        """One request, and whether its reply is one that may be."""
        taken = self.accepted[worker]
        number = len(taken)
        sender = f"user{(number * WORKERS + worker) % SENDERS}@example.com"
        start = time.monotonic()
        action = policy.ask(sasl_username=sender, instance=f"{worker:x}.{number:x}")
        end = time.monotonic()
        self.slowest = max(self.slowest, end - start)
        taken.append(action == "OK")
        self.replies[action] += 1
        if end - start > TIMEOUT + 1:
            self.mistake(f"a reply took {end - start:.1f} s")
        if action == DEFERRED and start > self.excused:
            self.mistake("not counted while the database was there")
        elif action not in ("OK", DEFERRED, "REJECT over quota"):
            self.mistake(f"action={action}")

    def work(self, worker: int, pause: float) -> None:
        """Ask once in `pause` seconds, and never faster to catch up."""
        try:
            with self.daemon.policy() as policy:
                due = time.monotonic()
                while not self.stop.is_set():
                    self.ask(policy, worker)
                    due = max(due + pause, time.monotonic() - pause)
                    time.sleep(max(0.0, due - time.monotonic()))
        except (OSError, AssertionError) as error:
            self.mistake(f"worker {worker}: {error!r}")

    def run_workers(self, pause: float) -> list[threading.Thread]:
        self.stop.clear()
        threads = [threading.Thread(target=self.work, args=[n, pause]) for n in range(WORKERS)]
        for thread in threads:
            thread.start()
        return threads

    def end_workers(self, threads: list[threading.Thread]) -> None:
        self.stop.set()
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                self.mistake("a worker hangs")

    def measure(self, seconds: float) -> float:
        """Requests per second when each worker asks as fast as it can."""
        self.write_rules(10**6)
        threads = self.run_workers(0)
        time.sleep(seconds)
        self.end_workers(threads)
        return self.replies.total() / seconds

    def write_rules(self, quota: int) -> None:
        """In one step: the daemon never sees half a file."""
        self.highest = max(self.highest, quota)
        written = self.daemon.directory / "written"
        written.write_text(json.dumps(rules(quota)), "utf-8")
        written.replace(self.daemon.directory / "quotarules.json")

    def restart_database(self) -> None:
        self.excused = float("inf")
        self.server.stop(signal.SIGKILL if self.restarts % 2 else signal.SIGTERM, 60)
        time.sleep(2)
        self.server.start()
        self.excused = time.monotonic() + BACK
        self.restarts += 1

    def report(self, started: float) -> None:
        taken = Footprint.of(self.daemon)
        rows = self.database.sql("SELECT COUNT(*) FROM sends")
        deferred, refused = self.replies[DEFERRED], self.replies["REJECT over quota"]
        print(
            f"| {(time.monotonic() - started) / 60:.1f} | {taken.memory / 1024:.1f}"
            f" | {taken.threads} | {taken.descriptors} | {rows} | {self.replies['OK']} | {refused}"
            f" | {deferred} | {self.restarts} | {self.slowest * 1e3:.0f} | {len(self.mistakes)} |",
            flush=True,
        )
        self.slowest = 0.0

    def run(self, minutes: float, rate: float) -> None:
        """The soak itself."""
        threads = self.run_workers(WORKERS / rate)
        started = time.monotonic()
        quotas = itertools.cycle(int(rate / SENDERS * PERIOD * share) for share in (0.8, 1.2))
        restart, rewrite, report = started + RESTART, started, started
        while (now := time.monotonic()) < started + minutes * 60:
            if now >= rewrite:
                self.write_rules(next(quotas))
                rewrite = now + REWRITE
            if now >= report:
                self.report(started)
                report += 60
            if now >= restart:
                self.restart_database()
                restart += RESTART
            time.sleep(0.1)
        self.end_workers(threads)
        self.report(started)

    def compare(self, began: int) -> None:
        """Every accepted reply has one row; no row is there twice; no window holds too much."""
        seen: set[tuple[int, int]] = set()
        windows: dict[str, deque[int]] = defaultdict(deque)
        for line in self.database.sql(EXPORT).splitlines():
            account, instance, recipients, at = line.split("\t")
            worker, _, number = instance.partition(".")
            key = int(worker, 16), int(number, 16)
            if key in seen or recipients != "1":
                self.mistake(f"row of {instance}: twice, or not of one recipient")
            seen.add(key)
            if int(at) < began:
                continue
            window = windows[account]
            window.append(int(at))
            while window[0] < int(at) - PERIOD * 1_000_000:
                window.popleft()
            if len(window) > self.highest:
                self.mistake(f"{account}: {len(window)} in {PERIOD} s, {self.highest} are allowed")
        for index, taken in enumerate(self.accepted):
            lost = sum(1 for n, ok in enumerate(taken) if ok and (index, n) not in seen)
            if lost:
                self.mistake(f"{lost} accepted sends have no row")
        accepted = sum(map(sum, self.accepted))
        print(f"{len(seen)} rows, {accepted} accepted sends")
        if len(seen) - accepted > self.replies[DEFERRED]:
            self.mistake("more rows than sends that were accepted or given up")


def drain(syslog: socket.socket, complaints: list[str]) -> None:
    """Be the syslog daemon."""
    while line := syslog.recv(1 << 16):
        if b"Traceback" in line:
            complaints.append(line.decode())


def main() -> int:
    parser = argparse.ArgumentParser(description="a soak test of saslquota on MariaDB")
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what it has started is stopped
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saslquota-soak-")))
        top.chmod(0o755)
        for name in ("mariadb", "daemon"):
            (top / name).mkdir()
        log = str(top / "log")
        syslog = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        syslog.bind(log)
        complaints: list[str] = []
        threading.Thread(target=drain, args=[syslog, complaints], daemon=True).start()
        server = stack.enter_context(MariaDB(top / "mariadb"))
        database = server.create_database()
        config = {**database.config(), "_dbtimeout": TIMEOUT, "_loglevel": "INFO"}
        config |= {"_loghandler": "syslog", "_logaddress": log}
        daemon = stack.enter_context(Daemon(top / "daemon", config, rules(10**6)))
        soak = Soak(daemon, server, database)
        top_rate = soak.measure(5)
        rate = top_rate / 2
        print(f"{top_rate:.0f} requests/s at most, {rate:.0f} from now on for {minutes:g} minutes")
        print(
            "| minute | MiB | threads | descriptors | rows | OK | REJECT | DEFER | restarts", end=""
        )
        print(" | slowest ms | mistakes |", flush=True)
        time.sleep(PERIOD + 1)  # what was measured has left the window
        soak.highest = 0
        soak.replies.clear()
        soak.slowest = 0.0
        began = time.time_ns() // 1000
        soak.run(minutes, rate)
        if daemon.terminate() != 0:
            soak.mistake("the daemon did not end with status 0")
        for line in complaints:
            soak.mistake(line)
        soak.compare(began)
        print(f"{len(soak.mistakes)} mistakes")
        return 1 if soak.mistakes else 0


if __name__ == "__main__":
    raise SystemExit(main())
