"""WAL bytes and row versions by call, beside one statement a call.

10,000 threads of 100,000 rows; a million calls as fast as they are taken by the tracker, 20,000 of the reference's. What they
write for a call, times the calls that were folded into one delta, is to be no more than what one statement writes: the
delta's row is written once, and the rest (ledger, transaction) hardly counts. All pages were written since the last
checkpoint, so that no full page is in any of it.
"""

from __future__ import annotations

import asyncio
import time
from itertools import cycle, islice
from typing import Any

import psycopg
import reference
from databases import database, fill, thread_ids
from harness import started
from prometheus_client import CollectorRegistry

from tracker_daemon import Tracker


def written(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """Return WAL position and row versions of the table."""
    connection.execute("SELECT pg_stat_force_next_flush()")
    time.sleep(0.2)  # the other sessions have ended, and told their numbers with that
    row = connection.execute(
        "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn, n_tup_upd + n_tup_ins"
        " FROM pg_stat_user_tables WHERE relname = 'conversations'"
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    rows = thread_ids(run.size(100_000, 3_000))
    live = rows[: run.size(10_000, 500)]
    many, few = run.size(1_000_000, 10_000), run.size(20_000, 500)
    found: dict[str, list[float]] = {name: [] for name in ("ours wal", "ours rows", "ref wal", "ref rows", "folded")}
    with database(run) as server:
        fill(server.conninfo, rows)
        with psycopg.connect(server.conninfo, autocommit=True) as connection:
            connection.execute("ALTER TABLE conversations SET (autovacuum_enabled = off)")
            connection.execute("UPDATE conversations SET turn_count = turn_count")
            connection.execute("VACUUM conversations")
            for _ in range(run.rounds):
                before = written(connection)
                asyncio.run(reference.drive(server.conninfo, list(islice(cycle(live), few))))
                after = written(connection)
                calls = few + 20 * reference.CONCURRENCY  # with those that warm it up
                found["ref wal"].append((after[0] - before[0]) / calls)
                found["ref rows"].append((after[1] - before[1]) / calls)
                before = written(connection)
                tracked(server.conninfo, live, many)
                after = written(connection)
                found["ours wal"].append((after[0] - before[0]) / many)
                found["ours rows"].append((after[1] - before[1]) / many)
                found["folded"].append(many / (after[1] - before[1]))
    for name, values in found.items():
        unit = {"wal": "bytes/call", "rows": "rows/call"}.get(name.split()[-1], "calls")
        run.keep(name, unit, values)
    folded = run.cases["folded"].median
    wal, versions = run.ratio("ours wal", "ref wal") * folded, run.ratio("ours rows", "ref rows") * folded
    run.goal(
        10,
        "WAL bytes / row versions of a million calls beside one statement a call, times the calls folded into a delta",
        "≤ 1.3",
        f"{wal:.2f} / {versions:.2f} ({folded:.0f} calls a delta)",
        met=max(wal, versions) <= 1.3,
    )
    run.finish()


def tracked(conninfo: str, live: list[str], number: int) -> None:
    """Make *number* calls through a tracker."""
    with Tracker(conninfo, registry=CollectorRegistry()) as tracker:
        for thread_id in islice(cycle(live), number):
            while not tracker.record_turn(thread_id, "billing", 812, 0.0041):
                time.sleep(0.001)  # until there is room


if __name__ == "__main__":
    main()
