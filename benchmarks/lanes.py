"""Rows a second of 1, 2 and 4 connections that flush disjoint threads at once, each with a ledger row of its own.

Sinks alone, in one process and one event loop, batches of 5,000, 1,000,000 rows. Whether parallel lanes would be worth
it on this machine; the tracker has one.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING
from uuid import uuid4

from databases import database, fill, thread_ids
from flushes import Flushes, batch_of
from harness import started

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 5_000


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    rows = thread_ids(run.size(1_000_000, 20_000))
    total = run.size(40_000, 20_000)
    with database(run) as server, asyncio.Runner() as loop:
        fill(server.conninfo, rows)
        batches = [batch_of(rows[start : start + SIZE]) for start in range(0, total, SIZE)]
        producer = uuid4()
        lanes = [Flushes(server.conninfo, producer, lane) for lane in range(4)]

        async def flush(number: int) -> float:
            async def one(lane: int) -> None:
                for batch in batches[lane::number]:
                    await lanes[lane].apply(batch)

            began = time.perf_counter()
            await asyncio.gather(*(one(lane) for lane in range(number)))
            return total / (time.perf_counter() - began)

        loop.run(flush(4))  # all connected
        cases: dict[str, Callable[[], float]] = {
            f"{number} connection{'s' * (number > 1)}": lambda number=number: loop.run(flush(number))
            for number in (1, 2, 4)
        }
        run.measure("rows/s", cases)
        run.series["beside one"] = {name: round(run.ratio(name, "1 connection"), 2) for name in cases}
        for each in lanes:
            loop.run(each.close())
    run.finish()


if __name__ == "__main__":
    main()
