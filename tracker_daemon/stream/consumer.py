"""`tracker-daemon consume`: the partitions of a stream, shared between the consumers that are there.

Rules:
1. Every third of a lease a consumer says that it is there, renews what it has, and looks who reads what. Each takes its
   share of the partitions, gives up what is above it after a commit, and takes what nobody reads for long.
2. A consumer that does not reach the servers renews nothing: another one may reach them.
3. Leases are a convenience. That two never write is the epoch of the position in the ledger: `postgres.partitions`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import anyio

from tracker_daemon.books import Books
from tracker_daemon.errors import SchemaError, TrackerError
from tracker_daemon.flush_numbers import FlushNumbers
from tracker_daemon.logs import Rated, get_logger
from tracker_daemon.readings import Reading
from tracker_daemon.sink import SinkFault
from tracker_daemon.stream.broker import Broker
from tracker_daemon.stream.messages import lane_of
from tracker_daemon.stream.partition import Following, Partition, PartitionNumbers
from tracker_daemon.stream.shares import Free, share_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from tracker_daemon.clock import Clock
    from tracker_daemon.postgres.leases import Leases, Standing
    from tracker_daemon.postgres.partitions import Outcome, PartitionSink
    from tracker_daemon.sink import FaultKind
    from tracker_daemon.stream.address import Address
    from tracker_daemon.stream.facts import Facts

_TOLD: Final = 10
_LAST: Final = 2.0
_COLLECT: Final = 3_600.0


class Renumbered(TrackerError):  # noqa: N818 - says what is the case
    """The stream was made again with another number of partitions."""


@dataclass(slots=True, eq=False)
class _Owned:
    partition: Partition
    task: asyncio.Task[None]


class Consumer:
    """Brings a stream into a database, together with the others.

    Args:
        address: the stream.
        leases: makes what looks after the leases, of so many partitions, for this consumer.
        sink: makes what applies a partition's messages.
        clock: its time.
        following: how partitions are followed.
        lease: seconds for which a claim holds without being renewed.
        note: called with every error.
    """

    def __init__(
        self,
        address: Address,
        leases: Callable[[int, UUID], Leases],
        sink: Callable[[], PartitionSink],
        clock: Clock,
        following: Following,
        *,
        lease: float = 6.0,
        note: Callable[[BaseException], object] | None = None,
    ) -> None:
        self.address, self._clock, self._following, self._lease = address, clock, following, lease
        self._make_leases, self._make_sink, self._note = leases, sink, note
        self.name = uuid4()
        self._broker = Broker(address)
        self._owned: dict[int, _Owned] = {}
        self._free = Free()
        self._stop, self._woken = anyio.Event(), anyio.Event()
        self._leases: Leases | None = None
        self._looking: anyio.CancelScope | None = None
        self._severed = False
        self._rated = Rated(clock)
        self._lost_sight: float | None = None
        self._hurried = False
        self._collected_at = float("-inf")
        self.partitions: list[PartitionNumbers] = []
        self.members = 0
        self.fault: str | None = "the stream was not reached yet"
        """Why nothing is read, or `None`."""
        self._numbers = FlushNumbers()
        self._applied: Counter[str] = Counter()
        self._dead: Counter[str] = Counter()
        self._skipped = 0
        self.deltas = self.messages = self.duplicates = self.unreadable = 0
        self._regressions = 0
        self.producers: dict[UUID, float] = {}
        self.closed = self.folded = self.ended = False

    # -- the loop ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read until `stop`; what is owned is given up then."""
        try:
            with anyio.CancelScope() as self._looking:
                await self._look_after_all()
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(self._leases)

    async def _look_after_all(self) -> None:
        facts: list[Facts] = []
        while not self._stop.is_set():
            try:
                if self._leases is None:
                    facts = await self._broker.partitions()
                    if not self.partitions:
                        self.partitions = [PartitionNumbers() for _ in facts]
                    self._leases = self._make_leases(len(facts), self.name)
                    await self._leases.prepare()
                await self._look_after(self._leases, facts)
            except Renumbered as renumbered:
                get_logger().warning("stream_renumbered", stream=self.address.name, reason=str(renumbered))
                self.fault = str(renumbered)
                if self._leases is not None:
                    await self._give_up_all(self._leases)
                self._leases, self.partitions = None, []
                self._woken.set()
                continue
            except TrackerError as error:
                self._failed(error)
                self.fault = str(error)
                if self._leases is not None and not self.members:
                    await self._leases.disconnect()
                    self._leases = None
            else:
                self.fault = next((each.fault for each in self.partitions if each.fault), None)
            self._woken = anyio.Event()
            with anyio.move_on_after(self._lease / 3):
                await self._woken.wait()

    def stop(self) -> None:
        """End after the transactions that run."""
        if not self._stop.is_set():
            # A database that is deaf is not waited for: leases end by themselves.
            asyncio.get_running_loop().call_later(_LAST, self._look_no_more)
        self._stop.set()
        self._woken.set()
        for owned in self._owned.values():
            owned.partition.stop()

    def hurry(self) -> None:
        """End now, whatever runs."""
        self._hurried = True
        self.stop()
        self._look_no_more()
        for owned in self._owned.values():
            owned.partition.abort()

    def _look_no_more(self) -> None:
        if self._leases is not None and self._leases.is_connected:
            self._severed = True
            self._leases.abort()  # to cancel it the driver would ask the server, and wait for that
        elif self._looking is not None:
            self._looking.cancel()

    async def _give_up_all(self, leases: Leases) -> None:
        for owned in self._owned.values():
            owned.partition.stop()
        if self._owned:
            await asyncio.wait([owned.task for owned in self._owned.values()], timeout=self._lease)
            for owned in self._owned.values():
                owned.task.cancel()  # what still runs has no lease any more
        self._owned.clear()
        await leases.leave()

    async def _end(self, leases: Leases | None) -> None:
        for owned in self._owned.values():
            owned.partition.stop()
        if self._owned:
            await asyncio.wait(
                [owned.task for owned in self._owned.values()], timeout=0 if self._hurried else self._lease
            )
            late = [owned for owned in self._owned.values() if not owned.task.done()]
            for owned in late:
                # Severed first: the driver would ask a server that may be deaf to cancel, and wait for that.
                owned.partition.abort()
                owned.task.cancel()
            if late:
                await asyncio.wait([owned.task for owned in late], timeout=_LAST)
        if leases is not None:
            patience = asyncio.get_running_loop().call_later(_LAST, leases.abort)
            try:
                async with asyncio.timeout(2 * _LAST):  # a server that is deaf when it is connected to
                    if self._severed:
                        await leases.disconnect()
                    for number in list(self._owned):
                        await leases.release(number)
                    await leases.leave()
            except TrackerError as error:
                self._failed(error)
                await leases.disconnect()
            except TimeoutError:
                await leases.disconnect()
            finally:
                patience.cancel()
        await self._broker.aclose()

    async def _look_after(self, leases: Leases, facts: list[Facts]) -> None:
        if not await self._sees_the_servers():
            raise SinkFault("connection", f"the servers of {self.address} are away; leases are not renewed")
        standing = await leases.beat()
        if (now := self._clock.monotonic()) - self._collected_at >= _COLLECT:
            await leases.collect()
            self._collected_at = now
        self.members = len(standing.members)
        for number, owned in list(self._owned.items()):
            if owned.task.done():
                del self._owned[number]
                self._regressions += owned.partition.regressions
                if not owned.task.cancelled() and (error := owned.task.exception()) is not None:
                    get_logger().error("partition_failed", partition=number, error=repr(error), exc_info=error)
            elif number not in standing.owned:
                owned.partition.stop()
        for number in standing.owned - self._owned.keys():
            await leases.release(number)
        for number, numbers in enumerate(self.partitions):
            if number not in self._owned and number not in standing.free:
                numbers.fault = ""  # another one has it, and says what is wrong with it
        self._free.see(standing.free)
        await self._balance(leases, standing, facts)

    async def _sees_the_servers(self) -> bool:
        """Whether the servers answer; for a while the leases are renewed without, as when a leader is chosen."""
        now = self._clock.monotonic()
        heard = max((owned.partition.heard_at for owned in self._owned.values()), default=0.0)
        if now - heard <= self._lease:
            self._lost_sight = None
            return True
        try:
            await self._broker.facts(0)
        except TrackerError:
            if self._lost_sight is None:
                self._lost_sight = now
            return bool(self._owned) and now - self._lost_sight <= self._lease
        self._lost_sight = None
        return True

    async def _balance(self, leases: Leases, standing: Standing, facts: list[Facts]) -> None:
        share = share_of(self.name, standing.members, len(facts))
        mine = [number for number, owned in self._owned.items() if not owned.task.done()]
        for number in standing.free:
            if number in self._owned:
                continue
            if len(mine) >= share and not self._free.for_long(number):
                continue
            try:
                if await self._claim(leases, number):
                    mine.append(number)
            except SchemaError as error:  # of this partition; the others go on
                self._failed(error)
                self.partitions[number].fault = str(error)
        for number in mine[share:] if not standing.free and len(standing.members) > 1 else ():
            owned = self._owned[number]
            get_logger().info("partition_given_up", partition=number, members=len(standing.members))
            owned.partition.stop()
            await asyncio.wait([owned.task], timeout=self._lease)
            if owned.task.done():
                del self._owned[number]
                await leases.release(number)

    async def _claim(self, leases: Leases, number: int) -> bool:
        # Asked anew: the stream may have been made again since.
        facts = await self._broker.facts(number)
        there = facts if facts is not None or not number else await self._broker.facts(0)
        if there is not None and there.partitions != len(self.partitions):
            raise Renumbered(f"it has {there.partitions} partitions now, and had {len(self.partitions)}")
        if facts is None:
            raise SchemaError(f"partition {number} of the stream {self.address.name} is gone")
        place = await leases.claim(number, lane_of(number), facts.created)
        if place is None:
            return False
        get_logger().info("partition_claimed", partition=number, epoch=place.epoch, position=place.position)
        partition = Partition(
            number,
            facts.created,
            place,
            self._broker,
            self._make_sink(),
            self._clock,
            self._following,
            self.partitions[number],
            self._count,
            self._failed,
        )
        task = asyncio.create_task(partition.run())
        task.add_done_callback(lambda _: self._woken.set())
        self._owned[number] = _Owned(partition, task)
        return True

    # -- what is counted ---------------------------------------------------------------------------

    def _failed(self, error: TrackerError) -> None:
        kind: FaultKind = error.kind if isinstance(error, SinkFault) else "schema"
        self._numbers.errors[kind] += 1
        self._numbers.flushes["retry" if isinstance(error, SinkFault) else "error"] += 1
        self._numbers.last_error = error
        if (rated := self._rated.due(f"{kind}:{type(error).__name__}")) is not None:
            get_logger().warning("consume_failed", kind=kind, error=str(error), **rated)
        if self._note is not None:
            self._note(error)

    def _count(self, outcome: Outcome, seconds: float) -> None:
        numbers, now = self._numbers, self._clock.wall()
        self.messages += len(outcome.new) + outcome.duplicates + outcome.unreadable
        self.duplicates += outcome.duplicates
        self.unreadable += outcome.unreadable
        numbers.flushes["duplicate"] += outcome.duplicates
        numbers.last_success, numbers.last_error = now, None
        if not outcome.new:
            return
        numbers.flushes["ok"] += 1
        numbers.flush_seconds.observe(seconds)
        numbers.flush_rows.observe(outcome.rows)
        self._skipped += outcome.skipped
        # A thread stands once in a batch, and in several batches of a window.
        dead = {
            (batch.producer, batch.sequence, letter.delta.thread_id): letter.reason for batch, letter in outcome.letters
        }
        oldest = now
        for batch in outcome.new:
            self.producers[batch.producer] = now
            self.deltas += len(batch.deltas)
            for delta in batch.deltas:
                oldest = min(oldest, delta.first_at / 1e6)
                if reason := dead and dead.get((batch.producer, batch.sequence, delta.thread_id)):
                    self._dead[reason] += delta.calls
                else:
                    self._applied["ensure_conversation"] += delta.ensures
                    self._applied["record_turn"] += delta.turns
                    self._applied["resolve"] += delta.resolves
        numbers.commit_lag_seconds.observe(max(0.0, now - oldest))
        if len(self.producers) > _MOST_PRODUCERS:
            self.producers = {name: at for name, at in self.producers.items() if now - at < _PRODUCER_IS_GONE}
        for _, letter in outcome.letters[:_TOLD]:
            get_logger().error(
                "dead_letter",
                thread_id=letter.delta.thread_id,
                calls=letter.delta.calls,
                reason=letter.reason,
                sqlstate=letter.sqlstate,
                error=letter.error,
            )

    @property
    def numbers(self) -> FlushNumbers:
        """What is counted of the transactions."""
        self._numbers.regressions = self._regressions + sum(
            owned.partition.regressions for owned in list(self._owned.values())
        )
        return self._numbers

    def live_producers(self) -> int:
        """How many producers' batches were applied in the last minutes."""
        now = self._clock.wall()
        return sum(now - at < _PRODUCER_IS_GONE for at in list(self.producers.values()))

    def collected(self) -> Reading:
        """Return the numbers of this instant: a call counts once it is in the database."""
        applied, dead = dict(self._applied), dict(self._dead)
        accepted: Counter[str] = Counter(applied)
        # Which kind of call a dead letter's were is not kept; they are turns, for all that anybody asks.
        accepted["record_turn"] += sum(dead.values())
        books = Books(
            accepted=dict(accepted),
            applied=applied,
            dead_lettered=dead,
            lost={},
            queue_calls=0,
            threads=0,
            oldest_at=0,
            rows_skipped=self._skipped,
        )
        return Reading(books=books, rejected={}, numbers=self.numbers, queue_limit=0)


_MOST_PRODUCERS: Final = 10_000
_PRODUCER_IS_GONE: Final = 300.0
