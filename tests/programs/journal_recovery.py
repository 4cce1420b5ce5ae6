"""The two halves of a recovery: a life that only writes and is killed, and one that only recovers.

python journal_recovery.py write CONNINFO DIRECTORY CALLS THREADS SETTINGS
python journal_recovery.py recover CONNINFO DIRECTORY
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time

from prometheus_client import CollectorRegistry
from telling import say

from tracker_daemon import Tracker


def write(conninfo: str, directory: str, calls: str, threads: str, settings: str) -> None:
    """Make calls that no database takes, each round over all threads with the next digit; then be killed."""
    tracker = Tracker(conninfo, journal=directory, registry=CollectorRegistry(), **json.loads(settings))
    pause, began, wide = threading.Event(), time.monotonic(), int(threads)
    for number in range(int(calls)):
        digit, place = divmod(number, wide)
        while not tracker.record_turn(f"conversation-{place:08}", "agent", 4**digit, 0.001):
            pause.wait(0.01)  # the queue is full: the worker folds what is there
    assert tracker._journal is not None
    degraded, size = tracker._journal.degraded, tracker._journal.bytes
    say("writer", seconds=time.monotonic() - began, degraded=degraded, bytes=size, peak=peak())
    os.kill(os.getpid(), signal.SIGKILL)


def recover(conninfo: str, directory: str) -> None:
    """Apply what is left."""
    before, began = peak(), time.monotonic()
    with Tracker(conninfo, journal=directory, registry=CollectorRegistry()) as tracker:
        say("recoverer", before=before)
        tracker.flush(1_800)
        assert tracker._journal is not None
        recovered = tracker._journal.recovered
    say("recovered", seconds=time.monotonic() - began, calls=recovered, before=before, peak=peak())


def peak() -> int:
    """Return the most memory that this process ever had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(*sys.argv[2:])
    else:
        recover(*sys.argv[2:])
