"""The metrics: their identity, their names, and what an operator reads from them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tracker_daemon import InvalidCall, MemorySink, Tracker
from tracker_daemon.sink import SinkFault

if TYPE_CHECKING:
    from tracker_daemon.batch import Batch
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
    calls_each = 20_000
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
