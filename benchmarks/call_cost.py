"""What one call costs beside one `deque.append` of a 5-tuple, and beside what else a server would call.

One thread, 1,000 threads' ids in turn, in one process, in interleaved rounds. Whoever would empty the queue is asleep,
ours and the others': it is the call alone, in CPU time of its thread. A peer that takes one number a call gets one.
Each case is called through a lambda, and what an empty one costs is taken off. Beside that the plain reading, as one writes
it: `for t in ids: record_turn(t, "billing", 812, 0.0041)` and `for t in ids: append((t, "billing", 812, 0.0041, at))`, inlined, nothing taken off.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections import deque
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from databases import thread_ids
from harness import Run, started
from prometheus_client import CollectorRegistry

from tracker_daemon import MemorySink, Tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Case = tuple[Callable[[str], object], Callable[[], object]]

IDS = thread_ids(1_000)
BASE = "deque.append of a 5-tuple"
TELEMETRY = "OpenTelemetry BatchSpanProcessor.on_end"
WRITTEN = "as written: record_turn"
WRITTEN_BASE = "as written: append"


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    calls = run.size(30_000, 2_000)
    with TemporaryDirectory() as directory:
        measure(run, calls, {**ours(calls, directory), **theirs(run, calls)})
    nothing = run.cases["nothing"].median
    shown = [name for name in run.cases if name not in ("nothing", BASE, WRITTEN, WRITTEN_BASE)]
    run.series["ratios"] = {name: round(run.ratio(name, BASE, nothing), 2) for name in shown}
    tell(run, nothing)
    run.finish()


def measure(run: Run, calls: int, cases: dict[str, Case]) -> None:
    """Run the cases; nanoseconds a call, of a peer that waits for a loop inside one."""

    def plain(call: Callable[[str], object], reset: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            reset()
            began = time.thread_time()
            for _ in range(calls // len(IDS)):
                for thread_id in IDS:
                    call(thread_id)
            return (time.thread_time() - began) / calls * 1e9

        return once

    made = {name: plain(*case) for name, case in cases.items()}
    made |= as_written(calls)
    with absent(run):
        made["LiteLLM SpendUpdateQueue.add_update"] = litellm(calls)
    run.measure("ns", made, rounds=1 if run.quick else 25)


def asleep(calls: int, journal: str | None = None) -> Tracker:
    """Return a tracker that takes calls and does nothing with them."""
    made = Tracker(
        MemorySink(), registry=CollectorRegistry(), max_queue_size=100 * calls, max_pending=10**9, journal=journal
    )
    made._worker._may_start.clear()  # noqa: SLF001
    made.record_turn("first", "billing", 1, 0.1)
    return made


def empty(tracker: Tracker, calls: int) -> None:
    """Make room for a round."""
    tracker._backlog.queue.drain(deque(maxlen=0).extend, 10**9, (), 0)  # noqa: SLF001
    tracker._backlog._set_gate(10 * calls)  # noqa: SLF001


def as_written(calls: int) -> dict[str, Callable[[], float]]:
    """Return the two loops as one writes them; nanoseconds a turn of the loop."""
    tracker, waiting, at, rounds = asleep(calls), deque[object](), time.time_ns(), range(calls // len(IDS))

    def turns() -> float:
        empty(tracker, calls)
        record_turn = tracker.record_turn
        began = time.thread_time()
        for _ in rounds:
            for thread_id in IDS:
                record_turn(thread_id, "billing", 812, 0.0041)
        return (time.thread_time() - began) / calls * 1e9

    def appends() -> float:
        waiting.clear()
        append = waiting.append
        began = time.thread_time()
        for _ in rounds:
            for thread_id in IDS:
                append((thread_id, "billing", 812, 0.0041, at))
        return (time.thread_time() - began) / calls * 1e9

    return {WRITTEN_BASE: appends, WRITTEN: turns}


def ours(calls: int, directory: str) -> dict[str, Case]:
    """Return the cases of this package, and what they are measured by."""
    waiting: deque[object] = deque()
    at = time.time_ns()
    memory, files = asleep(calls), asleep(calls, directory)

    def reset_memory() -> None:
        empty(memory, calls)

    def reset_files() -> None:
        journal = files.journal
        assert journal is not None
        written = [segment for segment in journal.queue.segments if segment.path is not None]
        assert written or not journal.queue, "the calls of the last round went to memory alone"
        journal.drop(journal.queue.end())
        files._backlog._set_gate(10 * calls)  # noqa: SLF001

    return {
        "nothing": (lambda _: None, lambda: None),
        BASE: (lambda i: waiting.append((i, "billing", 812, 0.0041, at)), waiting.clear),
        "record_turn": (lambda i: memory.record_turn(i, "billing", 812, 0.0041), reset_memory),
        "ensure_conversation": (memory.ensure_conversation, reset_memory),
        "resolve": (lambda i: memory.resolve(i, "resolved_by_agent"), reset_memory),
        "record_turn with a journal": (lambda i: files.record_turn(i, "billing", 812, 0.0041), reset_files),
    }


def theirs(run: Run, calls: int) -> dict[str, Case]:
    """Return the cases of others, as far as they are installed."""
    found = {"queue.Queue.put_nowait": standard_queue()}
    with absent(run):
        found[TELEMETRY] = opentelemetry(calls)
    with absent(run):
        found["datadog increment, aggregation in the client"] = datadog()
    with absent(run):
        found["Sentry 2.20 metrics, buckets in the client"] = sentry()
    return found


@contextmanager
def absent(run: Run) -> Iterator[None]:
    """Note who is not installed, and go on without."""
    try:
        yield
    except ImportError as error:
        run.series.setdefault("absent", []).append(error.name)


def standard_queue() -> Case:
    """A bounded queue of the standard library, which takes a lock."""
    waiting: queue.Queue[object] = queue.Queue(10**9)
    at = time.time_ns()
    return lambda i: waiting.put_nowait((i, "billing", 812, 0.0041, at)), waiting.queue.clear


def opentelemetry(calls: int) -> Case:
    """Spans that have ended already, into a processor whose queue holds all of a round and that exports none."""
    from opentelemetry.sdk.trace import ReadableSpan  # noqa: PLC0415 - only where it is installed
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult  # noqa: PLC0415
    from opentelemetry.trace import SpanContext, TraceFlags  # noqa: PLC0415

    class Nowhere(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:  # noqa: ARG002
            return SpanExportResult.SUCCESS

    size = 2 * calls
    processor = BatchSpanProcessor(
        Nowhere(), max_queue_size=size, max_export_batch_size=size, schedule_delay_millis=3_600_000
    )
    context = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    spans = {i: ReadableSpan(i, context=context, attributes={"tokens": 812}) for i in IDS}
    waiting = processor._batch_processor._queue  # noqa: SLF001
    return lambda i: processor.on_end(spans[i]), waiting.clear


def datadog() -> Case:
    """A counter with a tag, added up in the client and not sent."""
    from datadog import DogStatsd  # noqa: PLC0415 - only where it is installed

    client = DogStatsd(disable_aggregation=False, flush_interval=3_600, disable_telemetry=True)
    tags = {i: [f"thread:{i}"] for i in IDS}
    return lambda i: client.increment("turns", 1, tags[i]), client.aggregator.flush_aggregated_metrics


def sentry() -> Case:
    """A counter with a tag, added up in buckets and not sent."""
    from sentry_sdk.metrics import MetricsAggregator  # noqa: PLC0415 - only where it is installed

    metrics = MetricsAggregator(capture_func=lambda _: None)
    metrics.FLUSHER_SLEEP_TIME = 3_600
    tags = {i: {"thread": i} for i in IDS}
    return lambda i: metrics.add("c", "turns", 1, "none", tags[i], stacklevel=None), metrics.buckets.clear


def litellm(calls: int) -> Callable[[], float]:
    """Sums of spend by entity, awaited; emptied, uncounted, before it is full and aggregates in the call."""
    from litellm.proxy.db.db_transaction_queue.spend_update_queue import SpendUpdateQueue  # noqa: PLC0415

    made = SpendUpdateQueue()
    updates: dict[str, Any] = {i: {"entity_type": "user", "entity_id": i, "response_cost": 0.0041} for i in IDS[:500]}

    async def turn() -> float:
        took, number = 0.0, calls // len(updates)
        for _ in range(number):
            began = time.thread_time()
            for update in updates.values():
                await made.add_update(update)
            took += time.thread_time() - began
            while not made.update_queue.empty():
                made.update_queue.get_nowait()
        return took / number / len(updates) * 1e9

    return lambda: asyncio.run(turn())


def tell(run: Run, nothing: float) -> None:
    """Say what the goals make of it. The stricter reading decides."""
    own, written = run.ratio("record_turn", BASE, nothing), run.ratio(WRITTEN, WRITTEN_BASE)
    run.goal(
        1,
        "a `record_turn` beside one `deque.append` of a 5-tuple, the loop's cost taken off (decides) / two loops as written",
        "≤ 4.0×",
        f"{own:.2f}× / {written:.2f}×",
        met=own <= 4.0,
    )
    peers = [name for name in run.series["ratios"] if " " in name or "." in name]
    peers.remove("record_turn with a journal")
    beside = {name: run.ratio(name, "record_turn", nothing) for name in peers}
    told = ", ".join(f"{name.split()[0]} {ratio:.1f}×" for name, ratio in beside.items())
    if missing := run.series.get("absent"):
        told += f"; not installed: {', '.join(missing)}"
    run.goal(
        2,
        "what others cost beside it",
        "each > 1×, OpenTelemetry's ≥ 2×",
        told,
        met=min(beside.values()) > 1 and beside.get(TELEMETRY, 0.0) >= 2,
    )


if __name__ == "__main__":
    main()
