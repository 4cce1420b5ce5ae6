"""The Grafana dashboard of tracker_daemon, as code: prints `dashboard.json`.

    python deploy/grafana/dashboard.py > deploy/grafana/dashboard.json

Rules:
1. Every query names metrics of `/metrics` alone, so that it works without the recording rules.
2. A rate is over `$__rate_interval`, which Grafana makes from the scrape interval and the width of the picture.
3. A panel says in its description what it means when it moves.
"""

from __future__ import annotations

import sys
from itertools import count
from typing import TYPE_CHECKING, Final

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync
from panels import COLUMNS, WIDTH, chart, number, variable

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders.stat import Panel as Stat
    from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries

# Times 0, which it is there: so that the name goes, and an instance is one series.
_AGE: Final = (
    "time() - (tracker_oldest_pending_timestamp_seconds{WHO} > 0) or tracker_oldest_pending_timestamp_seconds{WHO} * 0"
)


def _ratio(above: str, below: str) -> str:
    return f"sum(rate({above}{{WHO}}[$__rate_interval])) / sum(rate({below}{{WHO}}[$__rate_interval]))"


def _numbers() -> list[Stat]:
    bad = [(1.0, "red")]
    return [
        number(
            "Calls a second",
            "cps",
            "Calls accepted, by all processes together.",
            "sum(rate(tracker_calls_accepted_total{WHO}[$__rate_interval]))",
        ),
        number(
            "Pending calls",
            "short",
            "Accepted and not yet committed.",
            "sum(tracker_queue_calls{WHO})",
        ),
        number(
            "Oldest pending",
            "s",
            "How long the oldest call waits for its commit. A window (flush_interval) and a flush are normal.",
            "max(time() - (tracker_oldest_pending_timestamp_seconds{WHO} > 0)) or vector(0)",
            limits=[(10.0, "orange"), (60.0, "red")],
        ),
        number(
            "Lost calls",
            "short",
            "Accepted and not kept, within the time shown.",
            "sum(increase(tracker_calls_lost_total{WHO}[$__range]))",
            limits=bad,
        ),
        number(
            "Refused calls",
            "short",
            "Not taken because a bound, or a client's share of it, was reached; within the time shown.",
            'sum(increase(tracker_calls_rejected_total{WHO, reason=~"full|share"}[$__range]))',
            limits=bad,
        ),
        number(
            "Dead letters",
            "short",
            "Calls in deltas that the database will never take, within the time shown; they are in "
            "tracker_dead_letters.",
            "sum(increase(tracker_calls_dead_lettered_total{WHO}[$__range]))",
            limits=[(1.0, "orange")],
        ),
    ]


def _calls() -> list[TimeSeries]:
    return [
        chart(
            "Calls accepted",
            "cps",
            "By kind of call.",
            ("sum by (call) (rate(tracker_calls_accepted_total{WHO}[$__rate_interval]))", "{{call}}"),
            stacked=True,
        ),
        chart(
            "Accepted and applied",
            "cps",
            "Applied follows accepted by a window and a flush; what stays between them is pending.",
            ("sum(rate(tracker_calls_accepted_total{WHO}[$__rate_interval]))", "accepted"),
            ("sum(rate(tracker_calls_applied_total{WHO}[$__rate_interval]))", "applied"),
        ),
        chart(
            "Calls that did not get through",
            "cps",
            "Refused: the caller knows; of requests to a daemon, by status, the calls are not known. "
            "Lost: accepted and not kept. Dead letters: kept in a table of their own.",
            ("sum by (reason) (rate(tracker_calls_rejected_total{WHO}[$__rate_interval]))", "refused: {{reason}}"),
            (
                "sum by (status) (rate(tracker_requests_refused_total{WHO}[$__rate_interval]))",
                "requests refused: {{status}}",
            ),
            ("sum by (reason) (rate(tracker_calls_lost_total{WHO}[$__rate_interval]))", "lost: {{reason}}"),
            (
                "sum by (reason) (rate(tracker_calls_dead_lettered_total{WHO}[$__rate_interval]))",
                "dead letter: {{reason}}",
            ),
        ),
        chart(
            "Requests refused",
            "reqps",
            "By a daemon, by status. 429: one client has too much under way; 503: the daemon has, or it is ending.",
            ("sum by (status) (rate(tracker_requests_refused_total{WHO}[$__rate_interval]))", "{{status}}"),
        ),
    ]


def _queue() -> list[TimeSeries]:
    return [
        chart(
            "Threads with uncommitted change",
            "short",
            "The bound is on threads, not on calls. With a journal windows wait in files, and none is refused.",
            ("tracker_queue_depth{WHO}", "{{instance}}"),
        ),
        chart(
            "Pending calls",
            "short",
            "Accepted and neither applied, dead-lettered nor lost.",
            ("tracker_queue_calls{WHO}", "{{instance}}"),
        ),
        chart(
            "Oldest pending call",
            "s",
            "Grows by a second a second while nothing is committed.",
            (_AGE, "{{instance}}"),
        ),
        chart(
            "How full",
            "percentunit",
            "Threads of max_pending, at which new threads are refused; with a journal its files of their quota count.",
            ("tracker_queue_depth{WHO} / (tracker_queue_limit{WHO} > 0)", "threads {{instance}}"),
            ("tracker_journal_bytes{WHO} / (tracker_journal_quota_bytes{WHO} > 0)", "journal {{instance}}"),
        ),
    ]


def _quantiles(metric: str) -> list[tuple[str, str]]:
    text = f"histogram_quantile(QUANTILE, sum by (le) (rate({metric}_bucket{{WHO}}[$__rate_interval])))"
    return [(text.replace("QUANTILE", quantile), f"p{quantile[2:]:0<2}") for quantile in ("0.5", "0.9", "0.99")]


def _flush() -> list[TimeSeries]:
    return [
        chart(
            "Commit lag",
            "s",
            "From the oldest call of a batch to its commit: how far a reader of the table is behind.",
            *_quantiles("tracker_commit_lag_seconds"),
        ),
        chart(
            "Flush duration", "s", "One transaction, begin to commit.", *_quantiles("tracker_flush_duration_seconds")
        ),
        chart(
            "Threads in a flush",
            "short",
            "Rows a transaction inserts or updates, on average, and calls that each of them stands for.",
            (_ratio("tracker_flush_rows_sum", "tracker_flush_rows_count"), "threads a flush"),
            (_ratio("tracker_calls_applied_total", "tracker_flush_rows_sum"), "calls a row"),
        ),
        chart(
            "Flushes by outcome",
            "ops",
            "duplicate: found applied already, after an answer that was lost. retry: tried again soon. "
            "error: tried again slowly, somebody has to mend something.",
            ("sum by (outcome) (rate(tracker_flushes_total{WHO}[$__rate_interval]))", "{{outcome}}"),
            stacked=True,
        ),
        chart(
            "Errors of the database",
            "ops",
            "By class. readonly, auth and schema do not pass by themselves.",
            ("sum by (class) (rate(tracker_database_errors_total{WHO}[$__rate_interval]))", "{{class}}"),
            stacked=True,
        ),
        chart(
            "Ledger",
            "short",
            "Regressions: the database forgot commits. Fenced: a process that may not write any more. Rows skipped: "
            "turns whose thread has no row, with create_missing=False.",
            ("increase(tracker_ledger_regressions_total{WHO}[$__rate_interval])", "regressions {{instance}}"),
            ("tracker_fenced{WHO}", "fenced {{instance}}"),
            ("increase(tracker_rows_skipped_total{WHO}[$__rate_interval])", "rows skipped {{instance}}"),
        ),
    ]


def _journal() -> list[TimeSeries]:
    return [
        chart(
            "Journal",
            "bytes",
            "Up to a quarter of the quota is windows that are applied and kept for a database that forgets them.",
            ("tracker_journal_bytes{WHO}", "{{instance}}"),
        ),
        chart(
            "Trouble with the journal",
            "short",
            "Degraded: calls are held in memory alone.",
            ("tracker_journal_degraded{WHO}", "degraded {{instance}}"),
            ("sum by (op) (increase(tracker_journal_errors_total{WHO}[$__rate_interval]))", "errors: {{op}}"),
        ),
        chart("fsync", "s", "One fsync of the journal.", *_quantiles("tracker_journal_fsync_duration_seconds")),
        chart(
            "Calls applied from the journal",
            "short",
            "Recovered: accepted by an earlier process. Replayed: the database had forgotten them.",
            ("increase(tracker_journal_recovered_calls_total{WHO}[$__rate_interval])", "recovered {{instance}}"),
            ("increase(tracker_journal_replayed_calls_total{WHO}[$__rate_interval])", "replayed {{instance}}"),
        ),
    ]


_STREAM_AGE = (
    "time() - (tracker_stream_oldest_unapplied_timestamp_seconds{WHO} > 0)"
    " or tracker_stream_oldest_unapplied_timestamp_seconds{WHO} * 0"
)


def _stream() -> list[TimeSeries]:
    return [
        chart(
            "Behind in the stream",
            "s",
            "How long the oldest message waits that is not applied, by partition.",
            (_STREAM_AGE, "partition {{partition}} {{instance}}"),
        ),
        chart(
            "Messages not applied",
            "short",
            "By partition, and how many are applied a second.",
            ("tracker_stream_lag_messages{WHO}", "partition {{partition}} {{instance}}"),
            ("rate(tracker_stream_position{WHO}[$__rate_interval])", "applied a second: {{partition}} {{instance}}"),
        ),
        chart(
            "How full the stream is",
            "percentunit",
            "Of max_bytes; at 1 publishers wait. From a half on what is applied is purged at once.",
            (
                "tracker_stream_bytes{WHO} / (tracker_stream_max_bytes{WHO} > 0)",
                "partition {{partition}} {{instance}}",
            ),
        ),
        chart(
            "Who reads",
            "short",
            "Partitions read by each consumer, of all; those that do not go on; consumers that share them.",
            ("sum by (instance) (tracker_stream_partition_owned{WHO})", "read by {{instance}}"),
            ("sum by (instance) (tracker_stream_partition_faulty{WHO})", "held at {{instance}}"),
            ("max(tracker_stream_partitions{WHO})", "partitions"),
            ("max(tracker_stream_consumers{WHO})", "consumers"),
        ),
        chart(
            "Through the stream",
            "ops",
            "Deltas in messages before they are summed, and messages; duplicates were published twice, unreadable ones "
            "are dead letters.",
            ("sum(rate(tracker_stream_deltas_total{WHO}[$__rate_interval]))", "deltas"),
            ("sum(rate(tracker_stream_messages_total{WHO}[$__rate_interval]))", "messages"),
            ("sum(rate(tracker_stream_duplicates_total{WHO}[$__rate_interval]))", "duplicates"),
            ("sum(rate(tracker_stream_unreadable_total{WHO}[$__rate_interval]))", "unreadable"),
        ),
    ]


def _process() -> list[TimeSeries]:
    return [
        chart(
            "CPU",
            "percentunit",
            "Of one core.",
            ("rate(process_cpu_seconds_total{WHO}[$__rate_interval])", "{{instance}}"),
        ),
        chart("Memory", "bytes", "Resident.", ("process_resident_memory_bytes{WHO}", "{{instance}}")),
        chart(
            "Versions and restarts",
            "short",
            "Processes by version; a restart shows as a step.",
            ("count by (version) (tracker_build_info{WHO})", "{{version}}"),
            ("changes(process_start_time_seconds{WHO}[$__rate_interval])", "restarted {{instance}}"),
        ),
    ]


def dashboard() -> str:
    """Return the dashboard as JSON."""
    board = (
        builders.Dashboard("tracker_daemon")
        .uid("tracker-daemon")
        .description("Write-behind tracking: what is accepted, what waits, what is committed.")
        .tags(["tracker_daemon"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(variable("job", "Job", "label_values(tracker_build_info, job)"))
        .with_variable(variable("instance", "Instance", 'label_values(tracker_build_info{job=~"$job"}, instance)'))
    )
    numbers = count(1)
    for panel in _numbers():
        board = board.with_panel(panel.id(next(numbers)))
    for title, panels in (
        ("Calls", _calls()),
        ("Waiting", _queue()),
        ("Flush", _flush()),
        ("Journal", _journal()),
        ("Stream", _stream()),
        ("Process", _process()),
    ):
        board = board.with_row(builders.Row(title).id(next(numbers)))
        for panel in panels:
            # Three or four fill a row of the grid.
            board = board.with_panel(panel.id(next(numbers)).span(COLUMNS // 4 if len(panels) == 4 else WIDTH))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(dashboard())
