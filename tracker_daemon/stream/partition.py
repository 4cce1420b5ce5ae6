"""One partition, followed by its owner: from the log into the database.

Rules:
1. What is read follows the position in the ledger without a gap; else nothing of it is used, and it is read again from
   where the ledger stands. So it is after every error, that of a commit whose outcome is unknown among them. Which
   message the position is of is compared after every read: a log that went back uses positions again.
2. While a transaction runs, what comes next is read already.
3. What is applied is purged from the log after a while, for a database that forgets commits; sooner when the log fills.
   What is not applied never is, by what the database says at that moment, nor is the last message applied.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Final

import anyio

from tracker_daemon import wire
from tracker_daemon.backoff import PASSING, STANDING
from tracker_daemon.errors import Fenced, SchemaError, TrackerError
from tracker_daemon.logs import Rated, get_logger
from tracker_daemon.postgres.partitions import Logged, Moved
from tracker_daemon.sink import LedgerMissing, SinkFault
from tracker_daemon.stream.facts import has_no_leader, hole, misfit
from tracker_daemon.stream.messages import Newer, decode, stream_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracker_daemon.clock import Clock
    from tracker_daemon.postgres.partitions import Outcome, PartitionSink, Place
    from tracker_daemon.stream.broker import Broker, Raw
    from tracker_daemon.stream.facts import Facts

_READ_MESSAGES: Final = 1_000
_READ_BYTES: Final = 4 << 20
_FULL: Final = 0.5
"""From this share of `max_bytes` on what is applied is purged at once."""
_STANDING: Final = frozenset({"auth", "schema", "data", "other"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """How a partition is followed.

    Attributes:
        window: seconds from one transaction to the next while the log's end is in reach.
        max_threads: distinct threads in a transaction, at least one message. What waits goes into it, however many
            messages that are: when the database is slow windows grow, and each thread is still written once in each.
        max_bytes: of messages in a transaction.
        retain: seconds for which what is applied stays in the log.
        look_every: seconds between two looks at the log's state.
    """

    window: float = 0.25
    max_threads: int = 100_000
    max_bytes: int = 64 << 20
    retain: float = 600.0
    look_every: float = 1.0


@dataclass(slots=True)
class PartitionNumbers:
    """What is shown of a partition; of one that is not read here zeros."""

    owned: bool = False
    position: int = 0
    lag: int = 0
    bytes: int = 0
    max_bytes: int = 0
    oldest: float = 0.0
    """When the first message that is not applied was taken, seconds since 1970; 0: there is none."""
    fault: str = ""


@dataclass(slots=True)
class _Taken:
    messages: list[Logged] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    bytes: int = 0


class Remade(TrackerError):  # noqa: N818 - says what is the case
    """The stream was made again: to be claimed anew, which the database refuses until it is adopted."""


class Refused(SchemaError):  # noqa: N818 - says what is the case
    """The log and the ledger do not fit together; the message says what to do."""


class Partition:
    """Follows one partition until told to stop, or until another owner has it.

    Args:
        number: which.
        created: when its stream was made.
        place: where it stands.
        broker, sink, clock: the log, the database, and time.
        following: how.
        numbers: what is shown.
        applied: called with every outcome, the seconds it took, and the messages.
        failed: called with every error.
    """

    def __init__(
        self,
        number: int,
        created: str,
        place: Place,
        broker: Broker,
        sink: PartitionSink,
        clock: Clock,
        following: Following,
        numbers: PartitionNumbers,
        applied: Callable[[Outcome, float], None],
        failed: Callable[[TrackerError], None],
    ) -> None:
        self._number, self._created, self.place = number, created, place
        self._broker, self._sink, self._clock, self._following = broker, sink, clock, following
        self.numbers, self._applied, self._failed = numbers, applied, failed
        self._stop = anyio.Event()
        self._buffer: deque[Raw] = deque()
        self._ahead: asyncio.Task[list[Raw]] | None = None
        self._looked_at = float("-inf")
        self._marks: deque[tuple[float, int]] = deque()
        self._random = Random()  # noqa: S311 - jitter
        self._rated = Rated(clock)
        self._highest = 0
        self._is_behind = False
        self.heard_at = clock.monotonic()
        """When the servers answered last."""
        self.regressions = 0

    def stop(self) -> None:
        """End after the transaction that runs."""
        self._stop.set()

    def abort(self) -> None:
        """Make what is under way in the database fail now."""
        self._sink.abort()

    async def run(self) -> None:
        """Follow the log; return when told to stop, or when another owner has the partition."""
        tries = 0
        name = stream_of(self._broker.address.name, self._number)
        self.numbers.owned = True
        try:
            while not self._stop.is_set():
                before = self.place.position
                try:
                    await self._follow()
                except (Fenced, Remade) as lost:
                    get_logger().info("partition_lost", stream=name, reason=_why(lost))
                    return
                except TrackerError as error:
                    tries = 1 if self.place.position > before else tries + 1
                    await self._wait_after(error, tries, name)
                finally:
                    await self._drop_reads()
        finally:
            self.numbers.owned = False
            await self._sink.disconnect()

    # -- the loop ----------------------------------------------------------------------------------

    async def _follow(self) -> None:
        await self._sink.look(self.place)
        if self.place.position < self._highest:
            self.regressions += 1
            self._marks.clear()  # of what is not applied any more
            get_logger().error(
                "database_forgot_commits", partition=self._number, was=self._highest, found=self.place.position
            )
        self._highest = self.place.position
        await self._look()
        while not self._stop.is_set():
            began = self._clock.monotonic()
            if began - self._looked_at > self._following.look_every:
                await self._look()
            taken = await self._take(began + self._following.window)
            if taken.messages:
                await self._see_that_it_fits()
                started = self._clock.monotonic()
                outcome = await self._sink.apply_logged(self.place, taken.messages)
                self._highest = self.place.position
                self.numbers.fault = ""
                self._applied(outcome, self._clock.monotonic() - started)
                self._count()
            if not self._is_full(taken):
                await self._clock.wait(self._stop, max(0.0, began + self._following.window - self._clock.monotonic()))

    async def _take(self, until: float) -> _Taken:
        """Return the messages of the next transaction: all that wait; none at the end of the log.

        What comes meanwhile is taken until *until*; from there on only as long as there is more than a read takes.
        """
        taken = _Taken()
        after = self.place.position
        while not self._is_full(taken):
            if not self._buffer:
                if taken.messages and not self._is_behind and self._clock.monotonic() >= until:
                    break
                if not await self._fill(after):
                    break
            raw = self._buffer.popleft()
            if raw.position != after + 1:
                self._buffer.appendleft(raw)
                if taken.messages:
                    break  # what stands before the hole is applied first
                raise Refused(hole(stream_of(self._broker.address.name, self._number), after, raw.position))
            if not taken.messages:
                self.numbers.oldest = raw.taken_at
            message = self._decoded(raw)
            after = raw.position
            taken.messages.append(message)
            taken.bytes += len(raw.body)
            if message.batch is not None:
                taken.threads.update(delta.thread_id for delta in message.batch.deltas)
            await asyncio.sleep(0)  # others are served too
        if taken.messages and self._ahead is None and not self._buffer:
            self._ahead = asyncio.create_task(self._read(after))
        return taken

    def _is_full(self, taken: _Taken) -> bool:
        return len(taken.threads) >= self._following.max_threads or taken.bytes >= self._following.max_bytes

    async def _fill(self, after: int) -> bool:
        ahead, self._ahead = self._ahead, None
        found = await (self._read(after) if ahead is None else ahead)
        if ahead is not None and not found:
            found = await self._read(after)
        self._buffer.extend(found)
        return bool(found)

    async def _read(self, after: int) -> list[Raw]:
        found = await self._broker.read(self._number, after, messages=_READ_MESSAGES, size=_READ_BYTES)
        self.heard_at = self._clock.monotonic()
        self._is_behind = len(found) >= _READ_MESSAGES or sum(len(raw.body) for raw in found) > _READ_BYTES // 2
        return found

    def _decoded(self, raw: Raw) -> Logged:
        try:
            return Logged(raw.position, decode(raw.headers, raw.body, self._number), stamp=raw.stamp)
        except Newer as newer:
            raise Refused(
                f"message {raw.position} of partition {self._number}: {newer}. Upgrade the consumers"
            ) from newer
        except wire.Malformed as error:
            get_logger().error("message_unreadable", partition=self._number, position=raw.position, error=str(error))
            return Logged(raw.position, None, unreadable=str(error), body=raw.body, stamp=raw.stamp)

    async def _drop_reads(self) -> None:
        self._buffer.clear()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)

    async def _wait_after(self, error: TrackerError, tries: int, name: str) -> None:
        if isinstance(error, Moved):
            return  # what is there is known by now
        self._failed(error)
        kind = error.kind if isinstance(error, SinkFault) else "schema"
        self.numbers.fault = str(error)
        if (rated := self._rated.due(f"{kind}:{type(error).__name__}")) is not None:
            get_logger().warning("partition_waits", stream=name, kind=kind, tries=tries, error=str(error), **rated)
        plan = STANDING if kind in _STANDING or isinstance(error, LedgerMissing) else PASSING
        await self._clock.wait(self._stop, plan.wait(tries, self._random))

    # -- the log's state ---------------------------------------------------------------------------

    async def _look(self) -> None:
        """See that log and ledger fit together, how far behind this is, and purge."""
        facts = await self._broker.facts(self._number)
        now = self._looked_at = self._clock.monotonic()
        self.heard_at = now
        name, position = stream_of(self._broker.address.name, self._number), self.place.position
        if facts is None:
            raise Refused(f"the stream {name} is gone: it was deleted. To make it: tracker-daemon stream create")
        if facts.created != self._created:
            raise Remade(f"the stream {name} was made {facts.created}, and what was read was made {self._created}")
        if has_no_leader(facts):
            raise SinkFault("connection", f"the stream {name} has no leader now")
        await self._see_that_it_fits(facts)
        numbers = self.numbers
        numbers.bytes, numbers.max_bytes = facts.bytes, facts.max_bytes
        numbers.position, numbers.lag = position, facts.last - position
        if not numbers.lag:
            numbers.fault, numbers.oldest = "", 0.0
        await self._purge(facts, now)

    async def _see_that_it_fits(self, facts: Facts | None = None) -> None:
        """See that the log has at the position what was applied; after a read that tells of which log it was."""
        name, place = stream_of(self._broker.address.name, self._number), self.place
        found = None if place.stamp is None else await self._broker.stamp_at(self._number, place.position)
        if facts is None:
            if found == place.stamp:
                return
            facts = await self._broker.facts(self._number)
        if facts is None or has_no_leader(facts):
            raise SinkFault("connection", f"the stream {name} is gone, or has no leader now")
        if (words := misfit(name, facts, place.position, place.stamp, found)) is not None:
            raise Refused(words)

    def _count(self) -> None:
        numbers = self.numbers
        numbers.lag = max(0, numbers.lag - (self.place.position - numbers.position))
        numbers.position = self.place.position
        numbers.oldest = self._buffer[0].taken_at if self._buffer else 0.0

    async def _purge(self, facts: Facts, now: float) -> None:
        marks, position = self._marks, self.place.position
        if not marks or marks[-1][1] < position:
            marks.append((now, position))
        until = 0
        while marks and marks[0][0] <= now - self._following.retain:
            until = marks.popleft()[1]
        if facts.max_bytes > 0 and facts.bytes > facts.max_bytes * _FULL:
            until = position
        if until > facts.first:
            # The database may be back as an older copy since it was asked last.
            await self._sink.look(self.place)
            if self.place.position != position:
                raise Moved(f"the partition stands at {self.place.position}")
            # The last one applied stays: by it a log that went back is told.
            await self._broker.purge(self._number, until)


def _why(lost: Fenced | Remade) -> str:
    if isinstance(lost, Remade):
        return str(lost)
    return (
        f"epoch {lost.found} has replaced this one's {lost.epoch}: another consumer has claimed the partition, or "
        "`stream adopt` has set where it stands; it is claimed anew when it is free"
    )
