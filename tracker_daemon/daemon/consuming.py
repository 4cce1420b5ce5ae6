"""The state of a consumer, as operators see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tracker_daemon.daemon.history import Ledger, Status, StreamPartition
from tracker_daemon.daemon.watched import Watched
from tracker_daemon.stream.metrics import StreamCollector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client.registry import CollectorRegistry

    from tracker_daemon.daemon.options import Options
    from tracker_daemon.stream.consumer import Consumer


class ConsumerService(Watched):
    """A consumer and its state.

    Args:
        consumer: what works.
        options, registry, config: see `Watched`.
    """

    name = "consumer"

    def __init__(
        self, consumer: Consumer, options: Options | None, registry: CollectorRegistry, config: Mapping[str, Any]
    ) -> None:
        super().__init__(options, registry, config)
        self.consumer = consumer
        self.collector.add(consumer)
        registry.register(StreamCollector(consumer))

    @property
    def fault(self) -> str | None:
        """Why it does not read or write, or `None`."""
        fault = self.consumer.fault
        return None if fault is None else self.shown(Exception(fault))

    @property
    def waiting(self) -> str:
        """How many messages wait in its partitions."""
        return f"{sum(each.lag for each in self.consumer.partitions)} messages wait"

    def status(self, since: str | None) -> Status:
        """Return the status page's document."""
        consumer = self.consumer
        return {
            **self.general(since),
            "ledger": Ledger(
                producer=str(consumer.name),
                epoch=0,
                sequence=0,
                relayed=0,
                regressions=consumer.numbers.regressions,
                fenced=False,
            ),
            "journal": None,
            "clients": consumer.live_producers(),
            "stream": [
                StreamPartition(
                    partition=number,
                    owned=each.owned,
                    position=each.position,
                    lag=each.lag,
                    bytes=each.bytes,
                    max_bytes=each.max_bytes,
                    fault="" if not each.fault else self.shown(Exception(each.fault)),
                )
                for number, each in enumerate(consumer.partitions)
            ],
        }
