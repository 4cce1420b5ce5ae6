"""A worker of the daemon: calls as digits until SIGTERM, and after each call, in shared memory, how many returned.

Arguments: URL, name, file of the numbers, journal or "-". The numbers outlive a `kill -9`: calls made, batches found
done, tries that failed, left in the journal at the end.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from mmap import mmap
from pathlib import Path
from struct import pack_into

from prometheus_client import CollectorRegistry
from telling import say

from tracker_daemon import Tracker

CALLS_PER_THREAD = 31


def main(url: str, name: str, numbers: str, journal: str) -> None:
    """Make calls until told to end."""
    logging.basicConfig(format="%(asctime)s %(message)s", level="INFO")
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    with Path(numbers).open("r+b") as file:
        shared = mmap(file.fileno(), 0)
    kept = None if journal == "-" else journal
    tracker = Tracker(url, journal=kept, flush_interval=0.05, shutdown_timeout=60.0, registry=CollectorRegistry())
    flushes, made = tracker._numbers.flushes, 0
    while not told.is_set():
        group, digit = divmod(made, CALLS_PER_THREAD)
        assert tracker.record_turn(f"{name}.{group}", name.partition(".")[0], 4**digit)
        made += 1
        pack_into("<qqq", shared, 0, made, flushes["duplicate"], flushes["retry"])
        told.wait(0.002)
    report = tracker.close()
    pack_into("<qqqq", shared, 0, made, flushes["duplicate"], flushes["retry"], report.journaled)
    say(name, made=made, lost=report.lost, journaled=report.journaled)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))
    main(*sys.argv[1:])
