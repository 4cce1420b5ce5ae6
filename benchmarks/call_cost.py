"""What one call costs, beside one `deque.append` of a 5-tuple: the same process, interleaved rounds, ratios.

Nanoseconds drift with the machine; the ratio holds. Nothing is flushed meanwhile: this is the call alone.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
import uuid
from collections import deque
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from tracker_daemon import MemorySink, Tracker

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS, ROUNDS = 200_000, 9
IDS = [str(uuid.uuid4()) for _ in range(1_000)]


def seconds_of(call: Callable[[str], object]) -> float:
    """Return the seconds that `CALLS` calls take."""
    began = time.perf_counter()
    for _ in range(CALLS // len(IDS)):
        for thread_id in IDS:
            call(thread_id)
    return time.perf_counter() - began


def without_worker(journal: str | None = None) -> Tracker:
    """Return a tracker that takes calls and does nothing with them: the call alone."""
    tracker = Tracker(
        MemorySink(), registry=CollectorRegistry(), max_queue_size=100 * CALLS, max_pending=10**9, journal=journal
    )
    tracker._worker._may_start.clear()  # noqa: SLF001
    tracker.record_turn("first", "billing", 1, 0.1)
    return tracker


def main() -> None:
    """Print the table."""
    with TemporaryDirectory() as directory:
        measure(without_worker(), without_worker(directory))


def measure(tracker: Tracker, journaled: Tracker) -> None:
    """Measure the calls on both, and print the table."""
    backlog, files = tracker._backlog, journaled._backlog  # noqa: SLF001
    journal = journaled.journal
    assert journal is not None
    queue: deque[object] = deque()
    at = time.time_ns()
    calls: dict[str, Callable[[str], object]] = {
        "deque.append of a 5-tuple": lambda i: queue.append((i, "billing", 812, 0.0041, at)),
        "record_turn": lambda i: tracker.record_turn(i, "billing", 812, 0.0041),
        "ensure_conversation": tracker.ensure_conversation,
        "resolve": lambda i: tracker.resolve(i, "resolved_by_agent"),
        "record_turn, journal": lambda i: journaled.record_turn(i, "billing", 812, 0.0041),
    }
    # What the loop and the lambda cost is taken off each.
    taken: dict[str, list[float]] = {name: [] for name in ["empty", *calls]}
    for _ in range(ROUNDS):
        taken["empty"].append(seconds_of(lambda _: None))
        for name, call in calls.items():
            queue.clear()
            backlog.queue.clear()  # type: ignore[attr-defined]
            backlog.gate = files.gate = 10 * CALLS
            taken[name].append(seconds_of(call))
            if name.endswith("journal"):
                journal._drop(journal.queue.end())  # noqa: SLF001
    empty = statistics.median(taken.pop("empty"))
    base = statistics.median(taken["deque.append of a 5-tuple"]) - empty
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {ROUNDS} interleaved rounds of {CALLS:,} calls")
    print(f"{'':28} {'ns':>7} {'ratio':>7} {'spread':>7}")
    for name, rounds in taken.items():
        middle = statistics.median(rounds) - empty
        spread = (max(rounds) - min(rounds)) / statistics.median(rounds)
        print(f"{name:28} {middle / CALLS * 1e9:7.0f} {middle / base:7.2f} {spread:7.0%}")


if __name__ == "__main__":
    main()
