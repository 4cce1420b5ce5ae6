"""The state of a consumer, as operators see it."""

from __future__ import annotations

import time
from collections import deque
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio

from tracker_daemon.applier import kind_of
from tracker_daemon.clock import SystemClock
from tracker_daemon.collector import collector_of
from tracker_daemon.daemon.history import Error, History, Ledger, Status, StreamPartition, Totals
from tracker_daemon.daemon.service import shown
from tracker_daemon.stream.metrics import StreamCollector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client.registry import CollectorRegistry

    from tracker_daemon.daemon.options import Options
    from tracker_daemon.stream.consumer import Consumer

_SAMPLE: Final = 1.0
_ERRORS: Final = 50


class ConsumerService:
    """A consumer and its state.

    Args:
        consumer: what works.
        options: where it is shown, or `None`.
        registry: what `/metrics` shows.
        config: what the status page shows of the settings; no secrets.
    """

    def __init__(
        self, consumer: Consumer, options: Options | None, registry: CollectorRegistry, config: Mapping[str, Any]
    ) -> None:
        self.consumer, self.options, self.registry = consumer, options, registry
        self._config = dict(config)
        self._clock = SystemClock()
        self._history = History(interval=_SAMPLE)
        self._started_at = self._clock.wall()
        self._collector = collector_of(registry)
        self._collector.add(consumer)
        registry.register(StreamCollector(consumer))
        self._errors: deque[Error] = deque(maxlen=_ERRORS)
        self.draining = False

    @property
    def state(self) -> Literal["ready", "not_ready", "draining"]:
        """Whether it reads and writes."""
        if self.draining:
            return "draining"
        return "ready" if self.consumer.fault is None else "not_ready"

    @property
    def reason(self) -> str | None:
        """Why it is not ready, or `None`."""
        if self.draining:
            return "the consumer is shutting down"
        fault = self.consumer.fault
        return None if fault is None else shown(Exception(fault), self.options)

    def note(self, error: BaseException) -> None:
        """Keep an error for the status page."""
        self._errors.appendleft(
            {"at": round(time.time(), 3), "class": kind_of(error), "text": shown(error, self.options)}
        )

    async def run(self) -> None:
        """Take samples until cancelled."""
        while True:
            reading = await anyio.to_thread.run_sync(self._collector.reading)
            self._history.add(reading, at=self._clock.wall(), monotonic=self._clock.monotonic())
            await anyio.sleep(_SAMPLE)

    def status(self, since: str | None) -> Status:
        """Return the status page's document; *since* as `history` says."""
        try:
            after = None if since is None else float(since)
        except ValueError:
            after = None
        reading, consumer = self._collector.reading(), self.consumer
        books, numbers = reading.books, consumer.numbers
        return Status(
            version=version("tracker-daemon"),
            now=round(self._clock.wall(), 3),
            started_at=round(self._started_at, 3),
            state=self.state,
            reason=self.reason,
            history=self._history.columns(after),
            totals=Totals(
                accepted=sum(books.accepted.values()),
                applied=sum(books.applied.values()),
                dead_lettered=sum(books.dead_lettered.values()),
                lost=0,
                rejected=0,
                pending=0,
            ),
            queue_limit=0,
            ledger=Ledger(
                producer=str(consumer.name),
                epoch=0,
                sequence=0,
                relayed=0,
                regressions=numbers.regressions,
                fenced=False,
            ),
            journal=None,
            clients=consumer.live_producers(),
            errors=list(self._errors),
            stream=[
                StreamPartition(
                    partition=number,
                    owned=each.owned,
                    position=each.position,
                    lag=each.lag,
                    bytes=each.bytes,
                    max_bytes=each.max_bytes,
                    fault="" if not each.fault else shown(Exception(each.fault), self.options),
                )
                for number, each in enumerate(consumer.partitions)
            ],
            config=self._config,
        )
