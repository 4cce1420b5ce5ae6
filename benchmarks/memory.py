"""Bytes of memory for a pending thread: one agent, an id of 36 characters, the peak while a batch is in flight.

A process of its own for each round. 200,000 threads get one turn each, as fast as the worker takes them up; the ids are
made on the way, so that they count, too. Then a flush in batches of 10,000. Peak of the resident set (VmHWM), less what was
resident before the first call, by thread; and the same after the calls and before the flush.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from databases import database
from draining import drained
from harness import started
from prometheus_client import CollectorRegistry

from tracker_daemon import Tracker


def resident(name: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1_024
    raise RuntimeError(f"no {name}")


def one(conninfo: str, number: int) -> None:
    """Be the process that is measured; print bytes a thread."""
    with Tracker(conninfo, registry=CollectorRegistry(), flush_interval=3_600, max_batch_size=10_000) as tracker:
        # A flush of the same kind before: what it loads and keeps is not the threads'.
        for warm in range(6_000):
            tracker.record_turn(f"{warm:036}", "billing", 1, 0.1)
        tracker.flush()
        # More than a batch would seal the window: up to here the worker only adds up.
        tracker._backlog.max_batch_size = 10 * number  # noqa: SLF001
        before = resident("VmRSS")
        for index in range(number):
            tracker.record_turn(f"{index:036x}", "billing", 100_000 + index, 0.0041)
            if not index % 1_000:
                drained(tracker)
        drained(tracker)
        held = resident("VmRSS")
        tracker._backlog.max_batch_size = 10_000  # noqa: SLF001
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        tracker.flush()
        peak = resident("VmHWM")
    print(json.dumps({"held": (held - before) / number, "peak": (peak - before) / number}))


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    with database(run) as server:
        found: list[dict[str, float]] = []
        for _ in range(run.rounds):
            command = [sys.executable, __file__, server.conninfo, str(run.size(200_000, 20_000))]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
            found.append(json.loads(done.stdout))
        run.keep("held before the flush", "bytes", [each["held"] for each in found])
        run.keep("peak, a batch in flight", "bytes", [each["peak"] for each in found])
    peak = run.cases["peak, a batch in flight"].median
    run.goal(
        9, "memory of a pending thread, peak while a batch is in flight", "≤ 700 bytes", f"{peak:.0f}", met=peak <= 700
    )
    run.finish()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2].isdecimal():
        one(sys.argv[1], int(sys.argv[2]))
    else:
        main()
