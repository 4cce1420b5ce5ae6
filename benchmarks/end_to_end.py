"""Calls a second into Postgres, from the first call until all are committed, beside one statement a call.

One process. The reference: ten tasks on asyncio, each its calls one after the other, through psycopg's pool of ten. The
tracker: one thread that calls as fast as it is let, then `flush`; its settings are the defaults. 1,000,000 rows, random
UUIDs. Once with 10,000 live threads; once where each call is for another thread, so that nothing adds up; and for the
curve with 1 to 128 calls on each of 10,000 threads of a window.
"""

from __future__ import annotations

import asyncio
import time
from itertools import cycle, islice
from random import Random
from typing import TYPE_CHECKING

import reference
from databases import database, fill, thread_ids
from harness import Run, started
from prometheus_client import CollectorRegistry

from tracker_daemon import Tracker

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LIVE = 10_000


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    rows = thread_ids(run.size(1_000_000, 20_000))
    live = rows[:LIVE]
    few = Random(5).choices(live, k=run.size(12_000, 200))
    many = run.size(2_500_000, 20_000)
    with database(run) as server:
        fill(server.conninfo, rows)
        others = chunks(rows[LIVE:], run.size(100_000, 2_000))
        run.measure(
            "calls/s",
            {
                "one statement a call": lambda: len(few) / asyncio.run(reference.drive(server.conninfo, few)),
                "tracker, 10,000 live threads": lambda: tracked(server.conninfo, islice(cycle(live), many), many),
                "tracker, each call another thread": lambda: tracked(server.conninfo, part := next(others), len(part)),
            },
        )
        curve(run, server.conninfo, rows)
    tell(run)
    run.finish()


def chunks(ids: list[str], size: int) -> Iterator[list[str]]:
    """Yield *ids* in parts, over and over."""
    while True:
        for start in range(0, len(ids) - size + 1, size):
            yield ids[start : start + size]


def tracked(conninfo: str, ids: Iterable[str], number: int) -> float:
    """Return calls a second through a tracker."""
    with Tracker(conninfo, registry=CollectorRegistry()) as tracker:
        tracker.record_turn("warm", "billing", 1, 0.1)  # its connection is there
        tracker.flush()
        record, refused = tracker.record_turn, 0
        began = time.perf_counter()
        for thread_id in ids:
            while not record(thread_id, "billing", 812, 0.0041):
                refused += 1
                time.sleep(0.001)  # until there is room
        tracker.flush()
        took = time.perf_counter() - began
        assert tracker.stats().applied == number + 1
    return number / took


def curve(run: Run, conninfo: str, rows: list[str]) -> None:
    """Keep calls a second by how many calls a window adds up to one delta."""
    found = []
    for calls in (1, 2, 4, 8, 16, 32, 64, 128):
        rounds = max(1, run.size(4, 1) // (1 if calls < 32 else 2))
        parts = chunks(rows[LIVE:], LIVE if not run.quick else 1_000)
        pattern = [i for _ in range(rounds) for part in [next(parts)] for _ in range(calls) for i in part]
        rate = tracked(conninfo, pattern, len(pattern))
        found.append({"calls": calls, "calls/s": round(rate)})
    run.series["coalescing"] = found


def tell(run: Run) -> None:
    """Say what the goals make of it."""
    base = "one statement a call"
    live, alone = run.ratio("tracker, 10,000 live threads", base), run.ratio("tracker, each call another thread", base)
    rate, other = run.cases["tracker, 10,000 live threads"].median, run.cases[base].median
    run.goal(
        4,
        "calls/s end to end, 10,000 live threads, beside one statement a call ×10",
        "≥ 100×",
        f"{live:.0f}× ({rate:,.0f} beside {other:,.0f})",
        met=live >= 100,
    )
    rate = run.cases["tracker, each call another thread"].median
    run.goal(5, "the same, each call another thread", "≥ 8×", f"{alone:.1f}× ({rate:,.0f})", met=alone >= 8)


if __name__ == "__main__":
    main()
