"""The metrics: their identity, their names, and what an operator reads from them."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers import wait_until
from tracker_daemon import FlushTimeout, InvalidCall, MemorySink, Tracker
from tracker_daemon.collector import Account, collector_of
from tracker_daemon.sink import SinkFault

if TYPE_CHECKING:
    from tracker_daemon.batch import Batch
    from tracker_daemon.readings import Reading
    from tracker_daemon.sink import Applied

NAMES = {
    "tracker_calls_accepted",
    "tracker_calls_applied",
    "tracker_calls_rejected",
    "tracker_calls_lost",
    "tracker_calls_dead_lettered",
    "tracker_queue_depth",
    "tracker_queue_calls",
    "tracker_queue_limit",
    "tracker_oldest_pending_timestamp_seconds",
    "tracker_last_success_timestamp_seconds",
    "tracker_flush_duration_seconds",
    "tracker_flush_rows",
    "tracker_commit_lag_seconds",
    "tracker_flushes",
    "tracker_rows_skipped",
    "tracker_database_errors",
    "tracker_ledger_regressions",
    "tracker_fenced",
    "tracker_build_info",
}


class Closed(MemorySink):
    """A sink that is away until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.away = True

    async def apply(self, batch: Batch) -> Applied:
        """Fail while away."""
        if self.away:
            raise SinkFault("connection", "away")
        return await super().apply(batch)


def scrape(registry: CollectorRegistry) -> dict[str, float]:
    """Return every sample of one scrape, with its labels as they are printed."""
    text = generate_latest(registry).decode()
    return {
        sample.name + "".join(f"|{k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: dict[str, float], name: str) -> float:
    """Return the sum of a counter over its labels."""
    return sum(value for key, value in samples.items() if key.split("|")[0] == name)


def assert_identity(samples: dict[str, float]) -> None:
    """The contract's identity, in one scrape."""
    assert total(samples, "tracker_calls_accepted_total") == (
        total(samples, "tracker_calls_applied_total")
        + total(samples, "tracker_calls_dead_lettered_total")
        + total(samples, "tracker_calls_lost_total")
        + samples["tracker_queue_calls"]
    )


def test_every_name_and_child_exists_from_the_start(registry: CollectorRegistry) -> None:
    """Before any call every family has its children, all zero: an alert on a rate works from the first scrape."""
    Tracker(MemorySink(), registry=registry)
    families = {family.name for family in registry.collect()}
    assert families == NAMES
    samples = scrape(registry)
    assert samples["tracker_calls_accepted_total|call=record_turn"] == 0
    assert samples["tracker_calls_rejected_total|reason=full"] == 0
    assert samples["tracker_calls_lost_total|reason=deadline"] == 0
    assert samples["tracker_flushes_total|outcome=duplicate"] == 0
    assert samples["tracker_database_errors_total|class=readonly"] == 0
    assert samples["tracker_flush_duration_seconds_count"] == 0
    assert samples["tracker_queue_limit"] == 1_000_000
    assert any(key.startswith("tracker_build_info|version=") for key in samples)


def test_counts_of_a_life(registry: CollectorRegistry) -> None:
    """Calls by kind, rows, lag and the last success are what happened."""
    with Tracker(MemorySink(), registry=registry, flush_interval=60) as tracker:
        tracker.ensure_conversation("a")
        tracker.record_turn("a", "x", 1, 0.5)
        tracker.record_turn("b")
        tracker.resolve("a", "done")
        with pytest.raises(InvalidCall):
            tracker.record_turn("")
        waiting = scrape(registry)
        assert waiting["tracker_queue_depth"] == 2
        assert waiting["tracker_queue_calls"] == 4
        assert waiting["tracker_oldest_pending_timestamp_seconds"] > 1e9
        assert_identity(waiting)
        tracker.flush(10)
        samples = scrape(registry)
    assert samples["tracker_calls_applied_total|call=ensure_conversation"] == 1
    assert samples["tracker_calls_applied_total|call=record_turn"] == 2
    assert samples["tracker_calls_applied_total|call=resolve"] == 1
    assert samples["tracker_calls_rejected_total|reason=invalid"] == 1
    assert samples["tracker_queue_depth"] == samples["tracker_queue_calls"] == 0
    assert samples["tracker_oldest_pending_timestamp_seconds"] == 0
    assert samples["tracker_last_success_timestamp_seconds"] > 1e9
    assert samples["tracker_flush_rows_sum"] == 2
    assert samples["tracker_commit_lag_seconds_count"] == samples["tracker_flush_duration_seconds_count"] == 1
    assert samples["tracker_flush_rows_bucket|le=+Inf"] == 1
    assert samples["tracker_flush_rows_bucket|le=1.0"] == 0
    assert_identity(samples)


def test_errors_are_counted_while_the_sink_is_away(registry: CollectorRegistry) -> None:
    """A sink that is away shows as retries and errors by class; the calls stay pending, and go through later."""
    sink = Closed()
    errors: list[BaseException] = []
    seen = threading.Event()

    def on_error(error: BaseException) -> None:
        errors.append(error)
        if len(errors) >= 2:
            seen.set()

    with Tracker(sink, registry=registry, flush_interval=0.001, on_error=on_error) as tracker:
        tracker.record_turn("a")
        assert seen.wait(30)
        samples = scrape(registry)
        assert samples["tracker_flushes_total|outcome=retry"] >= 2
        assert samples["tracker_database_errors_total|class=connection"] >= 2
        assert samples["tracker_queue_calls"] == 1
        assert_identity(samples)
        sink.away = False
        tracker.flush(30)
    assert sink.rows["a"].turn_count == 1
    assert scrape(registry)["tracker_flushes_total|outcome=ok"] == 1


def test_identity_in_every_scrape_under_load(registry: CollectorRegistry) -> None:
    """Four threads call and one sink comes and goes while scrapes are taken: each adds up, none goes back."""
    sink = Closed()
    calls_each = 8_000
    with Tracker(sink, registry=registry, flush_interval=0.002, max_batch_size=50, max_queue_size=10**6) as tracker:

        def work(number: int) -> None:
            for i in range(calls_each):
                tracker.record_turn(f"{number}-{i % 300}", "agent", 1, 0.01)

        threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        before, scrapes = 0.0, 0
        while any(thread.is_alive() for thread in threads) or scrapes < 50:
            samples = scrape(registry)
            assert_identity(samples)
            accepted = total(samples, "tracker_calls_accepted_total")
            assert accepted >= before
            before, scrapes = accepted, scrapes + 1
            sink.away = scrapes % 3 == 0
            stats = tracker.stats()
            assert stats.accepted == stats.applied + stats.dead_lettered + stats.lost + stats.pending
        sink.away = False
        tracker.flush(60)
    samples = scrape(registry)
    assert_identity(samples)
    assert total(samples, "tracker_calls_applied_total") == 4 * calls_each
    assert sum(row.turn_count for row in sink.rows.values()) == 4 * calls_each


def test_two_trackers_on_one_registry_add_up(registry: CollectorRegistry) -> None:
    """One registry shows the sum of its trackers, and a closed one's counts stay."""
    first = Tracker(MemorySink(), registry=registry)
    second = Tracker(MemorySink(), registry=registry)
    first.record_turn("a")
    first.close()
    second.record_turn("b")
    second.close()
    samples = scrape(registry)
    assert samples["tracker_calls_applied_total|call=record_turn"] == 2
    assert samples["tracker_queue_limit"] == 0
    assert_identity(samples)


RECORD_TURN = "tracker_calls_applied_total|call=record_turn"


def lived(registry: CollectorRegistry) -> weakref.ref[Tracker]:
    """Return what is left of a tracker that took a call, refused two, was closed and let go."""
    with Tracker(MemorySink(), registry=registry) as tracker:
        tracker.record_turn("a")
        with pytest.raises(InvalidCall):
            tracker.record_turn("")
    assert tracker.record_turn("late") is False
    return weakref.ref(tracker)


def wait_freed(*left: weakref.ref[Tracker]) -> None:
    """Return once nobody holds what is *left*; a worker's thread ends a moment after `close` returns."""

    def gone() -> bool:
        gc.collect()
        return all(each() is None for each in left)

    wait_until(gone, "the end of every tracker")


def test_memory_does_not_grow_with_closed_trackers(registry: CollectorRegistry) -> None:
    """Of trackers that are gone one sum is kept; it has all that they counted, also after they were closed."""
    wait_freed(*[lived(registry) for _ in range(30)])
    samples = scrape(registry)
    assert len(collector_of(registry)._entries) == 1
    assert samples[RECORD_TURN] == samples["tracker_flushes_total|outcome=ok"] == 30
    assert samples["tracker_calls_rejected_total|reason=invalid"] == 30
    assert samples["tracker_calls_rejected_total|reason=closed"] == 30
    assert samples["tracker_flush_rows_count"] == samples["tracker_flush_rows_sum"] == 30
    assert samples["tracker_queue_limit"] == samples["tracker_queue_calls"] == 0
    assert samples["tracker_last_success_timestamp_seconds"] > 1e9
    assert_identity(samples)
    # Nobody scrapes: making one tidies up as well.
    for _ in range(10):
        wait_freed(lived(registry))
    assert len(collector_of(registry)._entries) <= 3
    assert scrape(registry)[RECORD_TURN] == 40


def test_an_unused_tracker_that_is_dropped_is_freed(registry: CollectorRegistry) -> None:
    """It holds nothing for ever, and what it refused stays counted."""
    tracker = Tracker(MemorySink(), registry=registry)
    with pytest.raises(InvalidCall):
        tracker.ensure_conversation("")
    assert scrape(registry)["tracker_queue_limit"] == 1_000_000
    left = weakref.ref(tracker)
    del tracker
    wait_freed(left)
    for _ in range(2):
        samples = scrape(registry)
        assert samples["tracker_calls_rejected_total|reason=invalid"] == 1
        assert samples["tracker_queue_limit"] == 0


def test_an_error_does_not_hold_a_closed_tracker(registry: CollectorRegistry) -> None:
    """The last error's traceback leads to `on_error`, and that to the tracker: it is freed all the same."""
    failed = threading.Event()

    class Host:
        """Has the tracker, and is told of its errors."""

        def __init__(self) -> None:
            self.tracker = Tracker(Closed(), registry=registry, flush_interval=0.001, on_error=self.on_error)

        def on_error(self, _: BaseException) -> None:
            """Tell the test."""
            failed.set()

    host = Host()
    host.tracker.record_turn("a")
    assert failed.wait(30)
    assert host.tracker.close(0).lost == 1
    with pytest.raises(FlushTimeout) as late:
        host.tracker.flush(0)
    assert isinstance(late.value.__cause__, SinkFault)
    left = weakref.ref(host.tracker)
    del host, late
    wait_freed(left)
    assert scrape(registry)["tracker_calls_lost_total|reason=deadline"] == 1


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("freed", [False, True])
def test_a_tracker_that_goes_in_the_middle_of_a_scrape(
    registry: CollectorRegistry, position: str, *, freed: bool
) -> None:
    """A tracker closed, freed and added to the sum while a scrape runs counts in it once, wherever the scrape is."""
    collector, trackers = collector_of(registry), list[Tracker]()
    empty = Tracker(MemorySink(), registry=CollectorRegistry())

    class Trap:
        """A source in whose reading the other tracker ends."""

        def reading(self) -> Reading:
            """Close, free and make another, which tidies up."""
            for _ in range(2 * len(trackers)):
                trackers[0].close()
            if freed and trackers:
                left = weakref.ref(trackers.pop())
                wait_freed(left)
            collector.add(Account(empty))
            return empty.reading()

    trap = Trap()
    if position == "before":
        collector.add(Account(trap))
    trackers.append(Tracker(MemorySink(), registry=registry))
    if position == "after":
        collector.add(Account(trap))
    trackers[0].record_turn("a")
    trackers[0].flush(30)
    for _ in range(3):
        samples = scrape(registry)
        assert samples[RECORD_TURN] == 1
        assert_identity(samples)


def test_no_counter_goes_back_while_trackers_come_and_go(registry: CollectorRegistry) -> None:
    """Threads make, use, close and drop trackers; in each scrape every counter is at least what it was."""
    rounds, before, done = 25, dict[str, float](), threading.Event()

    def live() -> None:
        for number in range(rounds):
            tracker = Tracker(MemorySink(), registry=registry, flush_interval=0.001)
            with pytest.raises(InvalidCall):
                tracker.record_turn("")
            if number % 3:
                tracker.record_turn("a")
                tracker.close()
            del tracker
            gc.collect()

    threads = [threading.Thread(target=live) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not done.is_set():
        if not any(thread.is_alive() for thread in threads):
            done.set()
        samples = scrape(registry)
        assert_identity(samples)
        counters = {key: value for key, value in samples.items() if key.split("|")[0].endswith(("_total", "_count"))}
        assert all(value >= before.get(key, 0) for key, value in counters.items())
        before = counters
    assert before["tracker_calls_rejected_total|reason=invalid"] == 3 * rounds
    assert before[RECORD_TURN] == 3 * sum(number % 3 > 0 for number in range(rounds))


def test_first_call_by_a_finalizer_in_a_cycle(registry: CollectorRegistry) -> None:
    """In a cycle of garbage weak references die before finalizers run: a tracker used by one of them still counts."""
    sink = MemorySink()
    survivors: list[Tracker] = []

    class Host:
        """Garbage whose end is a call."""

        def __init__(self) -> None:
            self.me, self.tracker = self, Tracker(sink, registry=registry)

        def __del__(self) -> None:
            scrape(registry)  # by now the tracker is taken for gone
            self.tracker.record_turn("a")
            survivors.append(self.tracker)

    Host()
    gc.collect()
    [tracker] = survivors
    tracker.flush(30)
    samples = scrape(registry)
    assert samples[RECORD_TURN] == 1
    assert samples["tracker_queue_limit"] == 1_000_000
    tracker.close()
    del tracker
    survivors.clear()
    gc.collect()
    assert scrape(registry)[RECORD_TURN] == sink.rows["a"].turn_count == 1


def test_openmetrics(registry: CollectorRegistry) -> None:
    """The same registry speaks OpenMetrics."""
    Tracker(MemorySink(), registry=registry).close()
    text = generate_openmetrics(registry).decode()
    assert text.endswith("# EOF\n")
    assert "tracker_calls_accepted_total" in text


def test_no_label_of_a_callers_choice(registry: CollectorRegistry) -> None:
    """Ten thousand threads and agents add no time series."""
    with Tracker(MemorySink(), registry=registry) as tracker:
        before = len(scrape(registry))
        for i in range(10_000):
            tracker.record_turn(f"thread-{i}", f"agent-{i}")
        tracker.flush(30)
        assert len(scrape(registry)) == before
