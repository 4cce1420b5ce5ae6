"""Time from a call to its commit at 10,000 calls a second over 10,000 threads, with `flush_interval=0.25`.

The calls come in bursts of ten. A sink around the tracker's own notes when it has brought in how many; calls are applied in
order, so the call number n is committed with the first batch that brings the count to n.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from random import Random
from typing import TYPE_CHECKING

from databases import database, fill, thread_ids
from harness import percentile, started
from prometheus_client import CollectorRegistry

from tracker_daemon import Tracker
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink

if TYPE_CHECKING:
    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied

RATE = 10_000


class Noting(PostgresSink):
    """Notes how many calls are committed, and when."""

    def __init__(self, conninfo: str) -> None:
        super().__init__(Connector(conninfo), (None, "conversations"))
        self.counts, self.instants = [0], [0.0]

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        applied = await super().apply(batch)
        self.counts.append(self.counts[-1] + sum(delta.calls for delta in batch.deltas))
        self.instants.append(time.perf_counter())
        return applied


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    rows = thread_ids(run.size(200_000, 2_000))
    with database(run) as server:
        fill(server.conninfo, rows)
        found = [lags(server.conninfo, rows[:10_000], run.size(5, 1)) for _ in range(run.rounds)]
    for share in (0.5, 0.99, 0.999):
        run.keep(f"p{share * 100:g}", "ms", [percentile(each, share) * 1e3 for each in found])
    p99 = run.cases["p99"].median / 1e3
    run.goal(
        11,
        "from call to commit at 10,000 calls/s, `flush_interval=0.25`, p99",
        "≤ 0.5 s",
        f"{p99:.3f} s",
        met=p99 <= 0.5,
    )
    run.finish()


def lags(conninfo: str, live: list[str], seconds: float) -> array[float]:
    """Return the lag of every call."""
    sink, made, choose = Noting(conninfo), array("d"), Random(7).choice
    with Tracker(sink, registry=CollectorRegistry(), flush_interval=0.25) as tracker:
        tracker.record_turn(live[0], "billing", 1, 0.1)
        tracker.flush()
        before = sink.counts[-1]
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            while len(made) < (now - began) * RATE:
                made.append(time.perf_counter())
                tracker.record_turn(choose(live), "billing", 812, 0.0041)
            time.sleep(0.001)  # the pace asked for
    counts = [count - before for count in sink.counts]
    return array("d", (sink.instants[bisect_left(counts, n)] - at for n, at in enumerate(made, 1)))


if __name__ == "__main__":
    main()
