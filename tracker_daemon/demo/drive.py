"""`tracker-daemon demo --daemon URL`: the demo's traffic against a daemon that runs already.

Rules:
1. Nothing but the daemon is needed: no server, no database's URL. What the rows say is not compared, since others may
   write to them.
2. The first signal ends the traffic; what was called is still handed over. A second one ends everything at once.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import start_http_server

from tracker_daemon import Tracker
from tracker_daemon.demo.driving import Driving
from tracker_daemon.demo.figures import Report
from tracker_daemon.demo.screen import screen
from tracker_daemon.demo.signals import Signals

if TYPE_CHECKING:
    from collections.abc import Iterator


def drive(url: str, *, seconds: float, rate: float, threads: int, metrics: tuple[str, int] | None = None) -> int:
    """Drive the traffic; return the exit status: 0 only if the daemon has brought every call to the database.

    Args:
        url: the daemon's, as a `Tracker` takes it.
        seconds: how long the traffic lasts.
        rate: calls a second.
        threads: distinct conversations.
        metrics: host and port where Prometheus finds the tracker's numbers, as in a chat server.

    Raises:
        ConfigError: *url* cannot be used.
        OSError: *metrics* cannot be had.
    """
    tracker = Tracker(url)
    with screen() as shown, Signals() as signals, _served(metrics):
        shown.head(f"tracker-daemon {version('tracker-daemon')} demo")
        where, _, _ = url.partition("?")
        shown.say(f"chat traffic against {where} for {seconds:g} s at {rate:,.0f} calls a second; Ctrl-C ends it early")
        driving = Driving(tracker, shown, signals.stop, seconds=seconds, rate=rate, threads=threads)

        async def work() -> None:
            with signals.cancelling():
                signals.traffic_begins()
                await driving.run()

        try:
            asyncio.run(work())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        signals.ignore()
        report = _report(driving, tracker)
        shown.report(report)
    return 0 if report.exact else 1


@contextmanager
def _served(metrics: tuple[str, int] | None) -> Iterator[None]:
    if metrics is None:
        yield
        return
    host, port = metrics
    server, thread = start_http_server(port, host)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _report(driving: Driving, tracker: Tracker) -> Report:
    stats = tracker.stats()
    faults = {
        "CALLS LOST": stats.lost,
        "CALLS DEAD-LETTERED": stats.dead_lettered,
        "CALLS REFUSED": driving.traffic.refused,
    }
    verdict = next((word for word, number in faults.items() if number), "APPLIED")
    made = stats.accepted + driving.traffic.refused
    number = f"{faults[verdict]:,} of {made:,}" if verdict in faults else f"{stats.applied:,}"
    return Report(
        exact=not any(faults.values()),
        verdict=verdict,
        headline=f"{number} calls on {len(driving.traffic.counted):,} conversations"
        f"; {sum(faults.values()):,} refused, set aside or lost",
        differences=[],
        sections=[("Through the daemon", driving.figures())],
    )
