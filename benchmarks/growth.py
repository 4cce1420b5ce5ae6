"""How costs grow: of a call with the number of pending threads, of a flush with the number of its deltas.

A call: 200,000 turns, each for a random one of N threads that are pending already, whose flush waits; CPU time of the
caller, of the worker that adds them up meanwhile, and both. A server parses the id anew from each request: so here, in blocks
of 200, whose making is not timed. Beside them a `deque.append` of such ids. A flush: the sink alone, 200,000 rows.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from random import Random
from typing import TYPE_CHECKING

from databases import database, fill, thread_ids
from draining import drained
from flushes import Flushes, batch_of
from harness import Run, started
from prometheus_client import CollectorRegistry

from tracker_daemon import MemorySink, Tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied


BLOCK = 200
APPEND = "a deque.append"


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


class Calls:
    """Calls on *number* threads that are pending.

    Attributes:
        own, workers: CPU nanoseconds a call of its caller and of the worker, each round's.
    """

    def __init__(self, number: int, calls: int) -> None:
        self.own: list[float] = []
        self.workers: list[float] = []
        self._sink = Waiting()
        self._tracker = Tracker(
            self._sink, registry=CollectorRegistry(), flush_interval=3_600, max_pending=10**7, max_queue_size=10**7
        )
        ids = thread_ids(number, seed=number)
        for thread_id in ids:
            self._tracker.record_turn(thread_id, "billing", 1, 0.1)
        drained(self._tracker)
        self._chosen = Random(number).choices(ids, k=calls)

    def turn(self) -> float:
        """Call; return what it costs caller and worker."""
        record, own = self._tracker.record_turn, 0
        here, everywhere = time.thread_time_ns(), time.process_time_ns()
        for block in anew(self._chosen):
            began = time.thread_time_ns()
            for thread_id in block:
                record(thread_id, "billing", 812, 0.0041)
            own += time.thread_time_ns() - began
        drained(self._tracker)
        # What this thread has not spent the worker has.
        worker = (time.process_time_ns() - everywhere) - (time.thread_time_ns() - here)
        self.own.append(own / len(self._chosen))
        self.workers.append(worker / len(self._chosen))
        return self.own[-1] + self.workers[-1]

    def append(self) -> float:
        """Append the same to a deque."""
        waiting, own, at = deque[object](), 0, time.time_ns()
        for block in anew(self._chosen):
            began = time.thread_time_ns()
            for thread_id in block:
                waiting.append((thread_id, "billing", 812, 0.0041, at))
            own += time.thread_time_ns() - began
        return own / len(self._chosen)

    def close(self) -> None:
        """Give up what is pending."""
        self._sink.let.set()
        self._tracker.close(0)


def calls_growth(run: Run, pending: list[int], calls: int) -> None:
    """Measure calls beside more and more pending threads."""
    made = {number: Calls(number, calls) for number in pending}
    cases = {f"call, {number:,} pending": each.turn for number, each in made.items()}
    run.measure("CPU ns", cases | {f"{APPEND}, {number:,} ids": each.append for number, each in made.items()})
    for number, each in made.items():
        run.keep(f"its caller, {number:,} pending", "CPU ns", each.own)
        run.keep(f"its worker, {number:,} pending", "CPU ns", each.workers)
        each.close()


def anew(chosen: list[str]) -> Iterator[list[str]]:
    """Yield the ids in blocks, equal strings that nobody has met."""
    for start in range(0, len(chosen), BLOCK):
        yield [f"{each[:18]}{each[18:]}" for each in chosen[start : start + BLOCK]]


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
    few, many = f"{pending[0]:,}", f"{pending[-1]:,}"
    own, worker, whole = (
        run.ratio(f"{what}, {many} pending", f"{what}, {few} pending") for what in ("its caller", "its worker", "call")
    )
    control = run.ratio(f"{APPEND}, {many} ids", f"{APPEND}, {few} ids")
    run.goal(
        12,
        "cost of a call from 10³ to 10⁶ pending threads: its caller's / with the worker's",
        "≤ 1.5×",
        f"{own:.2f}× (a `deque.append`: {control:.2f}×) / {whole:.2f}× (the worker's alone: {worker:.2f}×)",
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
