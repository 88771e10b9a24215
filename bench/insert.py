"""The floor of a durable decision: one committed INSERT after the other, of one row or of several.

Uses the table, the connector and the C extension that saslquota uses, on one connection in
autocommit, so the figure is what the disk and the database can do at all for a lone request.
"""

import contextlib
import datetime
import json
import statistics
import sys
import time

with contextlib.suppress(ImportError):
    import _mysql_connector  # noqa: F401  (before ssl is imported, or it fails on Debian 12)

import mysql.connector

INSERT = "INSERT INTO sends (account, seq, epoch, at, recipients, total, instance, token) VALUES "
ROW = "(%s, %s, 1, %s, 1, %s, %s, %s)"


def main() -> None:
    """Arguments: port, user, password, database, seconds, seconds of warm-up, rows at a time."""
    port, user, password, database = sys.argv[1:5]
    seconds, warmup = map(float, sys.argv[5:7])
    rows = int(sys.argv[7])
    connection = mysql.connector.connect(
        host="127.0.0.1", port=int(port), user=user, password=password, database=database,
        autocommit=True,
    )  # fmt: skip
    cursor = connection.cursor()
    statement = INSERT + ", ".join([ROW] * rows)
    seq = 0
    latencies: list[float] = []
    begin = time.perf_counter() + warmup
    while (started := time.perf_counter()) < begin + seconds or len(latencies) < 2:
        at = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
        values: list[str | int | datetime.datetime] = []
        for _ in range(rows):
            seq += 1
            values += ["insert", seq, at, seq, "1a2b.6553f100.a1b2c.0", seq]
        cursor.execute(statement, values)
        if started >= begin:
            latencies.append((time.perf_counter() - started) * 1e6)
    quantiles = statistics.quantiles(latencies, n=100)
    figures = {
        "rate": rows * len(latencies) / seconds,
        "p50": quantiles[49],
        "p99": quantiles[98],
        "longest": max(latencies),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
