"""Traffic through a tracker, watched: what both demos have in common."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tracker_daemon.demo.figures import Figure, Progress, milliseconds
from tracker_daemon.demo.traffic import TASKS, THREADS, Traffic

if TYPE_CHECKING:
    from threading import Event

    from tracker_daemon import Tracker
    from tracker_daemon.demo.screen import Screen

_LOOK: Final = 0.05  # seconds between two looks at the queue


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    calls: int
    rows: int


class Driving:
    """One run of the traffic.

    Args:
        tracker: takes the calls; it is closed at the end of the run.
        shown: shows how it goes.
        stop: ends the traffic; set by the run itself when its time is up.
        seconds: how long the traffic lasts.
        rate: calls a second.
        threads: distinct conversations.
    """

    def __init__(
        self, tracker: Tracker, shown: Screen, stop: Event, *, seconds: float, rate: float, threads: int
    ) -> None:
        self._tracker, self._screen, self._stop = tracker, shown, stop
        self._seconds = seconds
        self.traffic = Traffic(tracker, threads, rate)
        self._phase = "chat traffic"
        self._started = self._traffic_seconds = 0.0
        self._peak_threads = self._peak_calls = 0
        self._looks: deque[_Look] = deque(maxlen=int(1 / _LOOK) + 1)

    async def run(self) -> None:
        """Drive the traffic until it is to stop, and drain."""
        async with self._tracker, asyncio.TaskGroup() as group:
            self._started = time.monotonic()
            watching = group.create_task(self._watch())
            await self.traffic.run(self._stop)
            self._traffic_seconds = time.monotonic() - self._started
            self._phase = "draining"
            await self._tracker.aclose()
            watching.cancel()

    def show(self, phase: str) -> None:
        """Show the numbers of this moment."""
        self._look(time.monotonic())
        reading = self._tracker.reading()
        numbers = reading.numbers
        first, last = self._looks[0], self._looks[-1]
        passed = (last.at - first.at) or 1.0
        self._screen.show(
            Progress(
                phase=phase,
                elapsed=self._traffic_seconds or last.at - self._started,
                seconds=self._seconds,
                calls=last.calls,
                calls_rate=(last.calls - first.calls) / passed,
                waiting_calls=reading.books.queue_calls,
                waiting_threads=reading.books.threads,
                rows=last.rows,
                rows_rate=(last.rows - first.rows) / passed,
                flushes=numbers.flushes.total(),
                recent=tuple(numbers.flush_seconds.recent.copy()),
                p50=numbers.flush_seconds.quantile(0.5),
                p99=numbers.flush_seconds.quantile(0.99),
            )
        )

    def figures(self) -> list[Figure]:
        """Return what the report says of the traffic."""
        stats = self._tracker.stats()
        numbers = self._tracker.reading().numbers
        rows, flushes = int(numbers.flush_rows.total), numbers.flushes["ok"] + numbers.flushes["duplicate"]
        calls, refused = sum(each.calls for each in self.traffic.counted.values()), self.traffic.refused
        p50, p99 = (milliseconds(numbers.flush_seconds.quantile(share)) for share in (0.5, 0.99))
        who = f"in {self._traffic_seconds:.1f} s by {TASKS} asyncio tasks, {THREADS} threads"
        return [
            Figure("calls made", f"{calls + refused:,}", who),
            Figure("calls refused", f"{refused:,}"),
            Figure("calls lost", f"{stats.lost:,}"),
            Figure("rows written", f"{rows:,}", f"in {flushes:,} transactions"),
            Figure("calls per row written", f"{calls / rows:.1f}" if rows else "none"),
            Figure("flush p50", p50),
            Figure("flush p99", p99),
            Figure("peak queue depth", f"{self._peak_threads:,}", f"threads, {self._peak_calls:,} calls"),
        ]

    async def _watch(self) -> None:
        """Look at the tracker twenty times a second, show what is seen, and end the traffic when its time is up."""
        show_at = self._started
        try:
            while True:
                now = time.monotonic()
                self._look(now)
                if now >= show_at:
                    self.show(self._phase)
                    show_at = now + self._screen.every
                if now - self._started >= self._seconds:
                    self._stop.set()
                await asyncio.sleep(_LOOK)
        finally:
            self._stop.set()  # the threads must not outlive the tasks

    def _look(self, now: float) -> None:
        reading = self._tracker.reading()
        books = reading.books
        self._peak_threads = max(self._peak_threads, books.threads)
        self._peak_calls = max(self._peak_calls, books.queue_calls)
        self._looks.append(_Look(now, sum(books.accepted.values()), int(reading.numbers.flush_rows.total)))
