"""How costs grow: of a call with the number of pending threads, of a flush with the number of its deltas.

A call: 200,000 turns, each for a random one of N threads that are pending already, whose flush waits; the caller's own time,
and all CPU time of the process by a call, the worker's adding up included. A flush: the sink alone, 200,000 rows.
"""

from __future__ import annotations

import asyncio
import threading
import time
from random import Random
from typing import TYPE_CHECKING

from databases import database, fill, thread_ids
from draining import drained
from flushes import Flushes, batch_of
from harness import Run, started
from prometheus_client import CollectorRegistry

from tracker_daemon import MemorySink, Tracker

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied


class Waiting(MemorySink):
    """A sink that takes nothing before it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        while not self.let.is_set():  # noqa: ASYNC110 - set from another thread
            await asyncio.sleep(0.05)
        return await super().apply(batch)


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    pending = [10**3, 10**4, 10**5, 10**6] if not run.quick else [100, 1_000]
    calls_growth(run, pending, run.size(200_000, 2_000))
    deltas = [10**2, 10**3, 10**4, 10**5] if not run.quick else [100, 1_000]
    with database(run) as server:
        rows = thread_ids(run.size(200_000, 2_000))
        fill(server.conninfo, rows)
        flush_growth(run, server.conninfo, rows, deltas)
    tell(run, pending, deltas)
    run.finish()


def calls_growth(run: Run, pending: list[int], calls: int) -> None:
    """Measure calls beside more and more pending threads."""
    trackers: list[tuple[int, Tracker, Waiting, list[str]]] = []
    for number in pending:
        ids, sink = thread_ids(number, seed=number), Waiting()
        tracker = Tracker(
            sink, registry=CollectorRegistry(), flush_interval=3_600, max_pending=10**7, max_queue_size=10**7
        )
        for thread_id in ids:
            tracker.record_turn(thread_id, "billing", 1, 0.1)
        drained(tracker)
        trackers.append((number, tracker, sink, Random(number).choices(ids, k=calls)))
    own: dict[int, list[float]] = {number: [] for number in pending}

    def turn(number: int, tracker: Tracker, chosen: list[str]) -> Callable[[], float]:
        def once() -> float:
            record = tracker.record_turn
            began, all_began = time.thread_time_ns(), time.process_time_ns()
            for thread_id in chosen:
                record(thread_id, "billing", 812, 0.0041)
            own[number].append((time.thread_time_ns() - began) / len(chosen))
            drained(tracker)
            return (time.process_time_ns() - all_began) / len(chosen)

        return once

    run.measure("CPU ns", {f"call, {n:,} pending": turn(n, tracker, chosen) for n, tracker, _, chosen in trackers})
    for number, found in own.items():
        run.keep(f"its caller, {number:,} pending", "CPU ns", found)
    for _, tracker, sink, _ in trackers:
        sink.let.set()
        tracker.close(0)


def flush_growth(run: Run, conninfo: str, rows: list[str], deltas: list[int]) -> None:
    """Measure flushes of more and more deltas; each round about as many rows in all."""
    with asyncio.Runner() as loop:
        flushes = Flushes(conninfo)
        batches = {size: batch_of(Random(size).sample(rows, size)) for size in deltas}

        def turn(size: int) -> Callable[[], float]:
            repeats = max(1, min(20, 10_000 // size))

            async def some() -> float:
                began = time.perf_counter()
                for _ in range(repeats):
                    await flushes.apply(batches[size])
                return (time.perf_counter() - began) / repeats * 1e3

            return lambda: loop.run(some())

        for size in deltas:
            turn(size)()
        run.measure("ms", {f"flush of {size:,}": turn(size) for size in deltas})
        run.series["flush"] = [
            {"deltas": size, "ms": round(run.cases[f"flush of {size:,}"].median, 3)} for size in deltas
        ]
        loop.run(flushes.close())


def tell(run: Run, pending: list[int], deltas: list[int]) -> None:
    """Say what the goals make of it."""
    first, last = f"call, {pending[0]:,} pending", f"call, {pending[-1]:,} pending"
    own = run.ratio(f"its caller, {pending[-1]:,} pending", f"its caller, {pending[0]:,} pending")
    whole = run.ratio(last, first)
    run.goal(
        12,
        "cost of a call from 10³ to 10⁶ pending threads: its caller's / with the worker's",
        "≤ 1.5×",
        f"{own:.2f}× / {whole:.2f}×",
        met=max(own, whole) <= 1.5,
    )
    a_row = {size: run.cases[f"flush of {size:,}"].median / size for size in deltas}
    over = a_row[deltas[-1]] / a_row[deltas[-2]], a_row[deltas[-1]] / a_row[deltas[1]]
    run.goal(
        13,
        "flush time from 10² to 10⁵ deltas: a row of 10⁵ beside one of 10⁴ / 10³",
        "linear: ≤ 1.5×",
        f"{over[0]:.2f}× / {over[1]:.2f}×",
        met=max(over) <= 1.5,
    )


if __name__ == "__main__":
    main()
