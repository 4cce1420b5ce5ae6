"""What a call costs its caller with four threads calling, and while a flush of 50,000 deltas runs, beside its quiet self.

CPU time of the calling threads (`time.thread_time`), divided by calls: what is spent in waiting for the interpreter is in
the latencies instead, each call's own by the wall clock, while the flush runs: from callers that never pause, and from
one that makes 10,000 calls a second. Whole trackers on Postgres, their workers at work.
On cores that are hardware threads of one another all CPU time grows when both are busy: a `deque.append` tells how much.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from typing import TYPE_CHECKING

from databases import database, fill, thread_ids
from draining import drained
from harness import Run, percentile, started
from prometheus_client import CollectorRegistry

from tracker_daemon import Tracker

if TYPE_CHECKING:
    from collections.abc import Callable

LIVE = thread_ids(1_000, seed=2)
clock, cpu = time.perf_counter_ns, time.thread_time_ns


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    deltas = run.size(50_000, 2_000)
    ids = thread_ids(deltas)
    with database(run) as server:
        fill(server.conninfo, [*ids, *LIVE])
        bench = Bench(server.conninfo, ids, run.size(200_000, 4_000))
        cases: dict[str, Callable[[], float]] = {
            "one thread, no flush": bench.quiet,
            "a deque.append, no flush": bench.control,
            "four threads, no flush": bench.four,
            "one thread, during a flush": bench.during_a_flush,
            "10,000 calls/s, no flush": bench.paced_quiet,
            "10,000 calls/s, during a flush": bench.paced,
        }
        run.measure("CPU ns", cases)
        run.keep("a deque.append, during a flush", "CPU ns", bench.controls)
        run.keep("p99.9 of a call during a flush", "µs", [percentile(found, 0.999) / 1e3 for found in bench.latencies])
        run.keep("p99.9 of a call, 10,000/s", "µs", [percentile(found, 0.999) / 1e3 for found in bench.paced_latencies])
        run.keep("longest call during a flush", "µs", [max(found) / 1e3 for found in bench.latencies])
        run.keep("longest call, 10,000/s", "µs", [max(found) / 1e3 for found in bench.paced_latencies])
    tell(run)
    run.finish()


class Bench:
    """The cases.

    Args:
        conninfo: the database.
        ids: the threads of the flush.
        calls: how many a round, where no flush ends it.
    """

    def __init__(self, conninfo: str, ids: list[str], calls: int) -> None:
        self._conninfo, self._ids, self._calls = conninfo, ids, calls
        self.latencies: list[array[int]] = []
        self.controls: list[float] = []
        self.paced_latencies: list[array[int]] = []

    def _tracker(self) -> Tracker:
        return Tracker(
            self._conninfo,
            registry=CollectorRegistry(),
            flush_interval=3_600,
            max_batch_size=100_000,
            max_queue_size=10**7,
        )

    def quiet(self) -> float:
        """One thread, nothing flushed meanwhile."""
        return self._callers(1)

    def control(self) -> float:
        """Something that is not this package's: what the machine itself makes of a core that has company."""
        others: deque[object] = deque()
        began = cpu()
        for _ in range(self._calls // len(LIVE)):
            for thread_id in LIVE:
                others.append((thread_id, "billing", 812, 0.0041, began))
        return (cpu() - began) / self._calls

    def four(self) -> float:
        """Four threads share the calls."""
        return self._callers(4)

    def _callers(self, number: int) -> float:
        spent: list[int] = []
        with self._tracker() as tracker:
            tracker.record_turn(LIVE[0], "billing", 1, 0.1)
            tracker.flush()

            def work() -> None:
                began = cpu()
                for _ in range(self._calls // number // len(LIVE)):
                    for thread_id in LIVE:
                        tracker.record_turn(thread_id, "billing", 812, 0.0041)
                spent.append(cpu() - began)

            workers = [threading.Thread(target=work) for _ in range(number)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        return sum(spent) / self._calls

    def _flushing(self, work: Callable[[Tracker, threading.Thread | None], float], *, flush: bool = True) -> float:
        with self._tracker() as tracker:
            for thread_id in self._ids:
                tracker.record_turn(thread_id, "billing", 812, 0.0041)
            drained(tracker)
            flusher = threading.Thread(target=tracker.flush) if flush else None
            if flusher:
                flusher.start()
            found = work(tracker, flusher)
            if flusher:
                flusher.join()
        return found

    def during_a_flush(self) -> float:
        """One thread that pauses only when the queue is full, until the flush has ended."""

        def work(tracker: Tracker, flusher: threading.Thread | None) -> float:
            assert flusher is not None
            taken = array("q")
            record, keep, calls = tracker.record_turn, taken.append, 0
            spent = control = 0
            others: deque[object] = deque()
            while flusher.is_alive():
                while len(tracker._backlog.queue) > 100_000:  # noqa: SLF001 - so many fit by default
                    time.sleep(0.001)  # until there is room
                began = cpu()
                for thread_id in LIVE:
                    others.append((thread_id, "billing", 812, 0.0041, began))
                control += cpu() - began
                # Half of the calls are timed by themselves, which is not to be in the CPU time of the other half.
                for thread_id in LIVE:
                    before = clock()
                    record(thread_id, "billing", 812, 0.0041)
                    keep(clock() - before)
                began = cpu()
                for thread_id in LIVE:
                    record(thread_id, "billing", 812, 0.0041)
                spent += cpu() - began
                calls += len(LIVE)
            self.latencies.append(taken)
            self.controls.append(control / calls)
            return spent / calls

        return self._flushing(work)

    def paced(self) -> float:
        """10,000 calls a second, until the flush has ended."""
        return self._flushing(self._pace)

    def paced_quiet(self) -> float:
        """10,000 calls a second for a second, nothing flushed."""
        return self._flushing(self._pace, flush=False)

    def _pace(self, tracker: Tracker, flusher: threading.Thread | None) -> float:
        taken = array("q")
        record, keep, calls = tracker.record_turn, taken.append, 0
        spent = 0
        until = time.monotonic() + 1.0
        while flusher.is_alive() if flusher else time.monotonic() < until:
            burst = LIVE[calls % 1_000 : calls % 1_000 + 20]
            began = cpu()
            for thread_id in burst:
                before = clock()
                record(thread_id, "billing", 812, 0.0041)
                keep(clock() - before)
            spent += cpu() - began
            calls += len(burst)
            time.sleep(0.002)  # the pace asked for
        if flusher:
            self.paced_latencies.append(taken)
        return spent / calls


def tell(run: Run) -> None:
    """Say what the goals make of it."""
    four = run.ratio("four threads, no flush", "one thread, no flush")
    flush = run.ratio("one thread, during a flush", "one thread, no flush")
    control = run.ratio("a deque.append, during a flush", "a deque.append, no flush")
    worst = max(run.cases["p99.9 of a call during a flush"].median, run.cases["p99.9 of a call, 10,000/s"].median)
    run.goal(
        3,
        "CPU time a call with 4 calling threads / during a flush of 50,000 deltas, beside its quiet self; p99.9 of a call",
        "≤ 1.5×, ≤ 1.5×, < 1 ms",
        f"{four:.2f}×, {flush:.2f}× (a `deque.append`: {control:.2f}×), {worst / 1e3:.3f} ms",
        met=four <= 1.5 and flush <= 1.5 and worst < 1_000,
    )


if __name__ == "__main__":
    main()
