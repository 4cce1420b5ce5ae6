"""What a consumer shows to Prometheus beside what every flush does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import Metric

    from tracker_daemon.stream.consumer import Consumer
    from tracker_daemon.stream.partition import PartitionNumbers


class StreamCollector(Collector):
    """Exposes a consumer's partitions: a child each, from when their number is known."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def describe(self) -> Iterable[Metric]:
        """The names, for the registry to find duplicates."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Read everything once and yield the families."""
        consumer = self._consumer
        partitions = list(consumer.partitions)

        def gauge(name: str, text: str, value: Callable[[PartitionNumbers], float]) -> GaugeMetricFamily:
            family = GaugeMetricFamily(f"tracker_stream_{name}", text, labels=["partition"])
            for number, each in enumerate(partitions):
                shown = each.owned or name in ("partition_owned", "partition_faulty")
                family.add_metric([str(number)], value(each) if shown else 0.0)
            return family

        yield gauge("partition_owned", "1 when this process reads the partition.", lambda each: each.owned)
        yield gauge("partition_faulty", "1 when it does not go on; the log says why.", lambda each: bool(each.fault))
        yield gauge("lag_messages", "Messages in the log that are not applied, of partitions read here.", _lag)
        yield gauge(
            "oldest_unapplied_timestamp_seconds",
            "When the log took the oldest message that is not applied; 0 when there is none.",
            lambda each: each.oldest,
        )
        yield gauge("position", "The last message applied, of partitions read here.", lambda each: each.position)
        yield gauge("bytes", "Bytes in the log of the partition.", lambda each: each.bytes)
        yield gauge("max_bytes", "Bytes that the log of the partition may take.", lambda each: each.max_bytes)
        yield GaugeMetricFamily("tracker_stream_partitions", "Partitions of the stream.", len(partitions))
        yield GaugeMetricFamily("tracker_stream_consumers", "Consumers that share the stream.", consumer.members)
        for name, text, value in (
            ("messages", "Messages applied, or found applied.", consumer.messages),
            ("deltas", "Deltas in the messages applied, before they are summed.", consumer.deltas),
            ("duplicates", "Messages that had been applied before.", consumer.duplicates),
            ("unreadable", "Messages that were no batches, kept as dead letters.", consumer.unreadable),
        ):
            family = CounterMetricFamily(f"tracker_stream_{name}", text)
            family.add_metric([], value)
            yield family


def _lag(each: PartitionNumbers) -> float:
    return each.lag
