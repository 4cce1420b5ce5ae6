"""A sink behind the stream: `Tracker("nats://…/NAME")`.

Rules:
1. A batch is applied when the quorum of every partition that it touches has its messages. From there on consumers bring
   it to the database, once: each message is a batch with an identity to the producer's ledger rows there.
2. One message is in flight per partition; partitions go in parallel. A message of unknown outcome is published again,
   as it was, before anything later: of copies, however late, the ledger keeps the first.
3. Each message follows the last one of its producer that was acknowledged, or is not stored: a log that has lost it, as
   a stream made anew has, is noticed before anything is published behind the loss; what the journal has comes again.
4. There is no ledger to ask. Where a life stands is what its last messages say; where they are gone they are applied,
   since nothing else is purged. What is published again without need costs a comparison.
5. A life that was opened by anything but this stream may have been applied elsewhere: it is refused, not guessed about.
   A stream that was deleted and made again, of as many partitions, goes for the same: the ledger behind it is.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from tracker_daemon.errors import SchemaError
from tracker_daemon.logs import get_logger
from tracker_daemon.sink import Applied, LedgerMissing, LedgerRegressed, Opened, SinkFault
from tracker_daemon.stream.broker import Broker, Elsewhere
from tracker_daemon.stream.facts import has_no_leader, identity, is_same_but_for_time
from tracker_daemon.stream.messages import batch_of, encode, last_sequence

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from uuid import UUID

    from tracker_daemon.batch import Batch
    from tracker_daemon.stream.address import Address
    from tracker_daemon.stream.messages import Message

_PUBLISH: Final = 10.0
_TRIES: Final = 5
_MOST_STORED: Final = 10_000


class OpenedElsewhere(LedgerMissing):
    """What an earlier process left was begun on something else than this stream."""

    def __str__(self) -> str:
        return (
            f"producer {self.producer} was registered elsewhere than in this stream: in a database or another stream. "
            "Whether its batches were applied there cannot be known here, and nothing of it is published. Give the "
            "tracker back the address that it had, or a journal directory of its own for the stream"
        )


class LogLost(LedgerRegressed):
    """The stream has lost what it had acknowledged to this process."""

    def __str__(self) -> str:
        return (
            f"the stream has lost messages of producer {self.producer} that it had acknowledged, of sequences up to "
            f"{self.expected}: it was deleted and made again, or an older copy restored. What the journal has "
            "kept is published again; what of it the database has is not counted twice"
        )


class NatsSink:
    """A `Sink` that publishes batches.

    Args:
        address: the stream.
        publish_timeout: seconds until a message that is not acknowledged is published again.
    """

    def __init__(self, address: Address, *, publish_timeout: float = _PUBLISH) -> None:
        self._address, self._publish_timeout = address, publish_timeout
        self._broker: Broker | None = None
        self._partitions = 0
        self._identity = 0
        self._created: list[str] = []
        self._stored: dict[str, int] = {}
        """By subject, where the last message stands that was acknowledged to this process."""
        self._losses = 0
        self._is_unsure = False
        """Whether the stream may have been made again with another number of partitions."""
        self._in_hand: tuple[UUID, int] | None = None
        self._left: list[list[Message]] = []
        self._task: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    # -- the port ----------------------------------------------------------------------------------

    async def open(self, producer: UUID, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """See `Sink.open`."""
        _only_lane(lane)
        opened: Opened = await self._run(self._open(producer, known, after))
        return opened

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        _only_lane(batch.lane)
        await self._run(self._publish(batch))
        return Applied(rows=len(batch.deltas))

    def abort(self) -> None:
        """See `Sink.abort`."""
        if (under_way := self._task) is not None:
            loop, task = under_way
            try:
                loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:  # the loop has ended, and with it the task
                return

    async def aclose(self, producer: UUID, lane: int, *, clean: bool) -> None:  # noqa: ARG002 - no row to mark
        """See `Sink.aclose`. The ledger's rows behind the stream are collected a month after the last batch."""
        broker, self._broker = self._broker, None
        if broker is not None:
            await broker.aclose()

    # -- where a life stands -----------------------------------------------------------------------

    async def _open(self, producer: UUID, known: Opened | None, after: int) -> Opened:
        broker = self._connected()
        await self._look(broker)
        if known is not None and not is_same_but_for_time(known.database, self._identity):
            raise OpenedElsewhere(str(producer), 0)
        last = await asyncio.gather(*(broker.last_of(number, producer) for number in range(self._partitions)))
        published = max((batch_of(last_sequence(headers)) for headers in last if headers is not None), default=0)
        # Before a batch goes out the one before it was acknowledged in all its partitions; of itself that is not known.
        stands = max(0, published - 1)
        if known is not None and known.database == self._identity and published in (0, known.applied_sequence):
            stands = known.applied_sequence  # what is gone was purged, and with it applied
        elif known is not None and known.database != self._identity:
            get_logger().warning(
                "stream_made_anew", stream=self._address.name, producer=str(producer), stands_at=stands
            )
        epoch = 1 if known is None else known.epoch
        return Opened(epoch, max(stands, after), self._identity)

    async def _look(self, broker: Broker) -> None:
        """Learn the partitions; refuse to go on with another number of them."""
        partitions = await broker.partitions()
        self._see_that_number_is_the_same(len(partitions))
        if faults := [
            f"{self._address.name}-{each.partition}: {fault}" for each in partitions for fault in each.faults
        ]:
            raise SchemaError(f"the stream cannot be relied on: {'; '.join(faults)}. See tracker-daemon stream status")
        self._partitions = len(partitions)
        self._created = [each.created for each in partitions]
        self._identity = identity(self._address.name, partitions)

    def _see_that_number_is_the_same(self, partitions: int) -> None:
        if self._partitions and partitions != self._partitions:
            raise SchemaError(
                f"the stream {self._address.name} has {partitions} partitions now, and had {self._partitions} "
                "when this process came to it: threads would change their partition under way. Restart the process"
            )

    # -- publishing --------------------------------------------------------------------------------

    async def _publish(self, batch: Batch) -> None:
        broker = self._connected()
        if not self._partitions:
            await self._look(broker)
        if self._is_unsure:
            first = await broker.facts(0)
            if first is not None:
                self._see_that_number_is_the_same(first.partitions)
            self._is_unsure = False
        name = batch.producer, batch.sequence
        if self._in_hand != name:
            # Frozen until all of it is acknowledged; what was is taken off.
            self._left = encode(self._address.name, batch, self._partitions)
            self._in_hand = name
            if len(self._stored) > _MOST_STORED:
                self._stored.clear()
        results = await asyncio.gather(
            *(self._publish_in_order(broker, number, messages) for number, messages in enumerate(self._left)),
            return_exceptions=True,
        )
        faults = [result for result in results if isinstance(result, BaseException)]
        if faults:
            if isinstance(faults[0], SinkFault) and faults[0].kind == "connection":
                self._is_unsure = True
            raise faults[0]
        self._in_hand = None

    async def _publish_in_order(self, broker: Broker, partition: int, messages: list[Message]) -> None:
        while messages:
            subject = messages[0].subject
            after = self._stored.get(subject)
            try:
                stored = await broker.publish(partition, messages[0], self._publish_timeout, after)
            except Elsewhere:
                await self._look_for(broker, partition, subject, after or 0)
                continue
            self._stored[subject] = stored
            self._losses = 0
            del messages[0]

    async def _look_for(self, broker: Broker, partition: int, subject: str, after: int) -> None:
        """Find out why the last message of ours is not where it was acknowledged; return if that is as it should be.

        It was purged, and so applied; or a try of unknown outcome was stored behind it. Else the log has lost it.
        """
        facts = await broker.facts(partition)
        producer = self._in_hand[0] if self._in_hand is not None else None
        if facts is not None and has_no_leader(facts):
            raise SinkFault("connection", f"partition {partition} of the stream has no leader now")
        is_same = facts is not None and facts.created == self._created[partition]
        if is_same and facts is not None and facts.last >= after:
            self._stored.pop(subject, None)  # the ledger keeps the first of copies
            return
        self._losses += 1
        if is_same and self._losses < _TRIES:
            # A server that has just become the leader may not have all of it yet.
            raise SinkFault("connection", f"partition {partition} of the stream does not show what it has acknowledged")
        assert self._in_hand is not None
        expected = self._in_hand[1] - 1
        self._stored.clear()
        self._in_hand, self._losses = None, 0
        raise LogLost(str(producer), 0, expected, 0)

    # -- the loop ----------------------------------------------------------------------------------

    def _connected(self) -> Broker:
        if self._broker is None:
            self._broker = Broker(self._address)
        return self._broker

    async def _run(self, what: Coroutine[Any, Any, Any]) -> Any:
        """Run *what* as a task of its own: `abort` ends it, not the flusher."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(what)
        self._task = (loop, task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                task.cancel()
                raise
            raise SinkFault("connection", "publishing was cut short") from None
        finally:
            self._task = None


def _only_lane(lane: int) -> None:
    if lane:
        raise ValueError(f"a stream has its own lanes, one a partition; the producer's must be 0, got {lane}")
