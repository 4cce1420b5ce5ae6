"""Rows a second of a tracker with 1, 2 and 4 lanes: connections that flush disjoint threads at once.

First the sink alone, batches of 10,000 out of 1,000,000 rows; then trackers end to end: each call is for another thread,
so that nothing coalesces, from the first call until all is committed. Lanes need cores: Postgres takes one for each.
"""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import TYPE_CHECKING

from databases import database, fill, thread_ids
from flushes import Flushes, batch_of
from harness import started
from prometheus_client import CollectorRegistry

from tracker_daemon import Tracker

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 10_000
LANES = (1, 2, 4)


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    rows = thread_ids(run.size(1_000_000, 20_000))
    total = run.size(40_000, 20_000)
    with database(run) as server, asyncio.Runner() as loop:
        fill(server.conninfo, rows)
        chosen = Random(1).sample(rows, total)
        batches = [batch_of(chosen[start : start + SIZE]) for start in range(0, total, SIZE)]
        sinks = {number: Flushes(server.conninfo, number) for number in LANES}

        async def flush(number: int) -> float:
            began = time.perf_counter()
            for batch in batches:
                await sinks[number].apply(batch)
            return total / (time.perf_counter() - began)

        for number in LANES:
            loop.run(flush(number))  # connected
        alone: dict[str, Callable[[], float]] = {
            f"sink, {_lanes(number)}": lambda number=number: loop.run(flush(number)) for number in LANES
        }
        run.measure("rows/s", alone)
        for each in sinks.values():
            loop.run(each.close())

        def whole(number: int) -> float:
            with Tracker(
                server.conninfo, lanes=number, registry=CollectorRegistry(), max_queue_size=2 * total
            ) as tracker:
                tracker.record_turn(chosen[0], "billing", 812, 0.0041)
                tracker.flush()
                began = time.perf_counter()
                for thread_id in chosen:
                    tracker.record_turn(thread_id, "billing", 812, 0.0041)
                tracker.flush()
                return total / (time.perf_counter() - began)

        run.measure("rows/s", {f"tracker, {_lanes(number)}": lambda number=number: whole(number) for number in LANES})
    run.series["beside one"] = {
        f"{what}, {_lanes(number)}": round(run.ratio(f"{what}, {_lanes(number)}", f"{what}, {_lanes(1)}"), 2)
        for what in ("sink", "tracker")
        for number in LANES
    }
    run.finish()


def _lanes(number: int) -> str:
    return f"{number} lane{'s' * (number > 1)}"


if __name__ == "__main__":
    main()
