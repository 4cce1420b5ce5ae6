"""What the host's event loop feels while 200,000 calls are drained and 50,000 deltas flushed into Postgres.

The host is an asyncio loop that does nothing but look at the clock every millisecond; its lag is how much later than asked
it comes back. The calls are made in one go while the loop stands still, which is the host's own affair and not measured:
measured is from there on, until all is committed, with the default settings. Added lag: beyond the same percentile of the same loop at rest, a
second of it before each round. Two hosts: one with nothing else in memory, and one with 300,000 objects of its own, which
the garbage collector has to look through whenever something makes it. The control: the same loop in the same two seconds with no
tracker, while two other processes keep two cores busy, as the worker and Postgres do: what the kernel's scheduler adds.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
from array import array
from typing import Any

from databases import database, fill, thread_ids
from harness import Run, percentile, started
from prometheus_client import CollectorRegistry

from tracker_daemon import Tracker

TICK = 0.001


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    ids = thread_ids(run.size(50_000, 2_000))
    calls = ids * 4
    with database(run) as server:
        fill(server.conninfo, ids)
        added: dict[str, list[tuple[float, float]]] = {"": [], " with 300,000 objects": []}
        for _ in range(run.rounds):
            for kind, found in added.items():
                heap = [{"n": n, "l": [n]} for n in range(run.size(100_000, 100))] if kind else []
                gc.collect()  # of the host's own objects, as they were made
                rest, loaded, series = asyncio.run(host(server.conninfo, calls, run.size(1, 1)))
                del heap
                found.append((percentile(loaded, 0.99) - percentile(rest, 0.99), max(loaded) - max(rest)))
                run.series[f"lag{kind.replace(' ', '_')}"] = series
        added[", control"] = [control(run) for _ in range(run.rounds)]
        for kind, found in added.items():
            run.keep(f"added lag, p99{kind}", "ms", [each[0] * 1e3 for each in found])
            run.keep(f"added lag, longest{kind}", "ms", [each[1] * 1e3 for each in found])
    tell(run)
    run.finish()


def control(run: Run) -> tuple[float, float]:
    """Return the lag that two busy processes add."""

    async def beside(*, busy: bool) -> array[float]:
        found, end = array("d"), asyncio.Event()
        code = "import time; until = time.time() + 5\nwhile time.time() < until: pass"
        others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * busy)]  # noqa: ASYNC220
        await asyncio.sleep(0.3)
        ticking = asyncio.create_task(ticks(found, end))
        await asyncio.sleep(run.size(2, 1))
        end.set()
        await ticking
        for other in others:
            other.kill()
            other.wait()
        return found

    rest, loaded = asyncio.run(beside(busy=False)), asyncio.run(beside(busy=True))
    return percentile(loaded, 0.99) - percentile(rest, 0.99), max(loaded) - max(rest)


async def ticks(found: array[float], until: asyncio.Event) -> None:
    """Note how late each tick is, in seconds."""
    clock = time.perf_counter
    while not until.is_set():
        began = clock()
        await asyncio.sleep(TICK)
        found.append(max(0.0, clock() - began - TICK))


async def host(conninfo: str, calls: list[str], rest_s: float) -> tuple[array[float], array[float], Any]:
    """Return the lags at rest and under load, and the latter over time for the picture."""
    rest, loaded, end = array("d"), array("d"), asyncio.Event()
    async with Tracker(
        conninfo,
        registry=CollectorRegistry(),
        max_queue_size=10 * len(calls),
    ) as tracker:
        tracker.record_turn(calls[0], "billing", 1, 0.1)
        await tracker.aflush()
        at_rest = asyncio.create_task(ticks(rest, end))
        await asyncio.sleep(rest_s)
        end.set()
        await at_rest
        end = asyncio.Event()
        for thread_id in calls:
            tracker.record_turn(thread_id, "billing", 812, 0.0041)
        ticking = asyncio.create_task(ticks(loaded, end))
        await tracker.aflush()
        end.set()
        await ticking
    at, series = 0.0, []
    for lag in loaded:
        at += lag + TICK
        if lag > 0.0002 or not len(series) % 10:
            series.append((round(at * 1e3, 2), round(lag * 1e3, 3)))
    return rest, loaded, series[:3_000]


def tell(run: Run) -> None:
    """Say what the goals make of it."""
    own = " with 300,000 objects"
    p99 = [run.cases[f"added lag, p99{kind}"].median for kind in ("", own)]
    longest = [run.cases[f"added lag, longest{kind}"].median for kind in ("", own)]
    machine = [run.cases[f"added lag, {name}, control"].median for name in ("p99", "longest")]
    run.goal(
        8,
        "the host's loop while 200,000 calls are drained and 50,000 deltas flushed: added lag, p99, longest",
        "≤ 0.5 ms, ≤ 5 ms",
        f"{p99[0]:.2f}, {longest[0]:.1f} ms; host with 300,000 objects of its own: {p99[1]:.2f}, {longest[1]:.1f} ms"
        f" (two busy processes and no tracker: {machine[0]:.2f}, {machine[1]:.1f} ms)",
        met=max(p99) <= 0.5 and max(longest) <= 5.0,
    )


if __name__ == "__main__":
    main()
