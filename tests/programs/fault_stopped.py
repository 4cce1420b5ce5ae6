"""Calls that stream in until SIGTERM; the test stops this process and lets it go on.

    python fault_stopped.py CONNINFO COPY_FROM STATEMENT_TIMEOUT

Says "flushed" whenever a barrier is reached, and at the end what was made and what became of it.
"""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry
from telling import say

from tracker_daemon import Tracker
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink

THREADS = 20
DIGITS = 31


def main(conninfo: str, copy_from: int, timeout: float) -> None:
    """Call until told to end."""
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    registry = CollectorRegistry()
    sink = PostgresSink(Connector(conninfo), (None, "conversations"), statement_timeout=timeout, copy_from=copy_from)
    tracker = Tracker(sink, flush_interval=0.01, registry=registry)
    made: dict[str, int] = {}
    number = 0
    while not done.is_set():
        round_, place = divmod(number, THREADS)
        thread_id = f"t-{round_ // DIGITS}-{place}"
        k = made.get(thread_id, 0)
        assert tracker.record_turn(thread_id, "agent", 4**k)
        made[thread_id] = k + 1
        number += 1
        if not number % THREADS:
            tracker.flush(30)
            say("flushed", calls=number)
            done.wait(0.005)
    tracker.close(20)
    stats: dict[str, Any] = asdict(tracker.stats())
    retries = registry.get_sample_value("tracker_flushes_total", {"outcome": "retry"})
    say("main", **stats, made=made, retries=retries)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
