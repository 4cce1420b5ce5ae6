"""A program whose handler of SIGTERM and SIGINT closes its tracker; a second signal cuts the drain short.

    python fault_signals.py SCENE CONNINFO SHUTDOWN_TIMEOUT

Says "ready" when the test may send the signal, "closing" from within the handler, and at the end what it knows.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from telling import WINDOW, say

from tracker_daemon import DrainReport, FlushTimeout, Tracker
from tracker_daemon.collector import Account, collector_of

if TYPE_CHECKING:
    from tracker_daemon.readings import Reading

SCENE, CONNINFO, SHUTDOWN_TIMEOUT = sys.argv[1], sys.argv[2], float(sys.argv[3])
REGISTRY = CollectorRegistry()

signals: list[int] = []
reports: list[DrainReport] = []


def make(window: float) -> Tracker:
    """Make the tracker."""
    return Tracker(CONNINFO, flush_interval=window, shutdown_timeout=SHUTDOWN_TIMEOUT, registry=REGISTRY)


def handle_with(tracker: Tracker) -> None:
    """Close *tracker* at a signal; at a second one without waiting any more."""

    def handle(number: int, _: object) -> None:
        signals.append(number)
        say("closing", signals=len(signals))
        reports.append(tracker.close() if len(signals) == 1 else tracker.close(0))

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def wait() -> None:
    """Wait for the signal, and for the end of its handler."""
    tick = threading.Event()
    while not reports:
        tick.wait(0.02)  # a signal in front of a wait without end would not end it


def let_go() -> None:
    """Wait until the test has got in the way of the next flush."""
    say("flushed")
    signal.sigwait({signal.SIGUSR1})


def turns(tracker: Tracker, number: int) -> int:
    """Make calls; return how many were accepted."""
    return sum(tracker.record_turn(f"t-{i % 7}", "agent", 1) for i in range(number))


def unused() -> tuple[Tracker, int]:
    """Nothing was ever called."""
    tracker = make(WINDOW)
    handle_with(tracker)
    say("ready")
    wait()
    return tracker, 0


def idle() -> tuple[Tracker, int]:
    """All is flushed."""
    tracker = make(0.01)
    handle_with(tracker)
    accepted = turns(tracker, 100)
    tracker.flush(30)
    say("ready")
    wait()
    return tracker, accepted


def window() -> tuple[Tracker, int]:
    """The window is open, for minutes to come."""
    tracker = make(WINDOW)
    handle_with(tracker)
    accepted = turns(tracker, 1_000)
    say("ready")
    wait()
    return tracker, accepted


def flushing() -> tuple[Tracker, int]:
    """A batch is under way, and further calls wait behind it."""
    tracker = make(0.01)
    handle_with(tracker)
    accepted = turns(tracker, 100)
    tracker.flush(30)
    let_go()
    accepted += turns(tracker, 50)
    say("ready")
    wait()
    return tracker, accepted


def calling() -> tuple[Tracker, int]:
    """The main thread is in the middle of a call, wherever the signal finds it; others call as well."""
    tracker = make(0.005)
    handle_with(tracker)
    counts = [0, 0, 0]

    def work(place: int) -> None:
        while not tracker.closed:
            counts[place] += tracker.record_turn(f"w-{place}", "agent", 1)
            if place or not counts[place] % 50:
                breath.wait(0.0002)  # without it the main thread alone fills the queue

    breath = threading.Event()
    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    say("ready")
    work(0)
    for thread in threads:
        thread.join()
    turns(tracker, 2)  # too late, both
    return tracker, sum(counts)


def in_flush() -> tuple[Tracker, int]:
    """The main thread waits in `flush`."""
    tracker = make(0.01)
    handle_with(tracker)
    accepted = turns(tracker, 10)
    tracker.flush(30)
    let_go()
    accepted += turns(tracker, 50)
    say("ready")
    try:
        tracker.flush()
    except FlushTimeout as error:
        say("flush", error=str(error))
    else:
        say("flush", error=None)
    return tracker, accepted


def scraping() -> tuple[Tracker, int]:
    """The signal comes in the middle of a scrape."""
    tracker = make(WINDOW)
    other = Tracker(CONNINFO, flush_interval=WINDOW, registry=REGISTRY)
    handle_with(tracker)

    class Trap:
        """A source in whose reading the signal comes."""

        def reading(self) -> Reading:
            """Interrupt, then be read."""
            if not signals:
                signal.raise_signal(signal.SIGTERM)
            return empty.reading()

    empty = make(WINDOW)
    trap = Trap()
    collector_of(REGISTRY).add(Account(trap))
    accepted = turns(tracker, 100)
    turns(other, 11)
    say("ready")
    text = generate_latest(REGISTRY).decode()
    [line] = [line for line in text.splitlines() if line.startswith('tracker_calls_accepted_total{call="record_turn"}')]
    say("scrape", accepted=float(line.split()[-1]))
    wait()
    say("other", lost=other.close().lost)
    return tracker, accepted


def in_asyncio() -> tuple[Tracker, int]:
    """The loop's own signal handler closes without blocking the loop, which goes on serving meanwhile."""
    tracker = make(WINDOW)
    accepted = 0

    async def serve() -> None:
        nonlocal accepted
        loop, closing = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, closing.set)
        accepted = turns(tracker, 500)
        say("ready")
        await closing.wait()
        say("closing", signals=1)
        reports.append(await tracker.aclose())

    asyncio.run(serve())
    return tracker, accepted


SCENES = [unused, idle, window, flushing, calling, in_flush, scraping, in_asyncio]


def main() -> None:
    """Play the scene, and say what is known."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    tracker, accepted = {scene.__name__: scene for scene in SCENES}[SCENE]()
    stats: dict[str, Any] = asdict(tracker.stats())
    say("main", counted=accepted, stats=stats, reports=[asdict(report) for report in reports], signals=len(signals))


if __name__ == "__main__":
    main()
