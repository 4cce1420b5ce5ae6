"""One batch into the sink, under the same identity on every try, until the sink has it.

Rules:
1. What an error means is decided here alone, by its kind: `_PLANS`. Nothing is dropped on an error.
2. `Fenced` and `LedgerMissing` are final for a life: whether the batch was applied must not be guessed.
3. Before a batch is applied its ledger stands right before it. What it lacks is applied again from the journal, where
   that has kept it; the rest is reported, and the ledger moved on.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from tracker_daemon.backoff import PASSING, STANDING, Backoff
from tracker_daemon.batch import Batch
from tracker_daemon.breath import Breath
from tracker_daemon.delta import earliest, rows_of
from tracker_daemon.errors import Fenced, SchemaError
from tracker_daemon.generation import Generation
from tracker_daemon.journal.directory import operation_of
from tracker_daemon.journal.windows import Damage, take
from tracker_daemon.logs import Rated, get_logger
from tracker_daemon.sink import Applied, FaultKind, LedgerMissing, LedgerRegressed, Looks, Opened, Recalls, SinkFault

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from uuid import UUID

    from tracker_daemon.backlog import Backlog
    from tracker_daemon.clock import Clock
    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.flush_numbers import FlushNumbers
    from tracker_daemon.journal.journal import Journal
    from tracker_daemon.journal.windows import Window
    from tracker_daemon.sink import Sink

_PLANS: Final[dict[FaultKind, Backoff]] = {
    "connection": PASSING,
    "timeout": PASSING,
    "lock": PASSING,
    "capacity": PASSING,
    "readonly": PASSING,
    "auth": STANDING,
    "schema": STANDING,
    "data": STANDING,
    "other": STANDING,
}
_QUICK_TRIES_OF_OTHER: Final = 3
_LETTERS_TOLD: Final = 10
_LOOKED_AT: Final = 16
_BREATH: Final = 1_000
_PART: Final = 500  # rows looked at, or let go of, at once, the first time
DAY: Final = 86_400.0
SIGN_OF_LIFE: Final = 7 * DAY


class Halted(Exception):  # noqa: N818 - not an error of its own: the reason is its cause
    """The ledger forbids this life to write any more."""


class Applier:
    """Applies batches, of this life and of others.

    Args:
        backlog, sink, clock, numbers: the stages it joins, time, and where it counts.
        on_error: called with every error of the sink, in the worker's thread; its own exceptions are logged.
        journal: where applied windows are kept, and what earlier lives left, or `None`.
    """

    lane = 0

    def __init__(
        self,
        backlog: Backlog,
        sink: Sink,
        clock: Clock,
        numbers: FlushNumbers,
        on_error: Callable[[BaseException], object] | None,
        journal: Journal | None = None,
    ) -> None:
        self._backlog, self._sink, self._clock, self._numbers = backlog, sink, clock, numbers
        self._on_error, self._journal = on_error, journal
        self._positions: dict[UUID, Opened] = {}
        self._acknowledged: dict[UUID, Opened] = {}
        self._missing: tuple[UUID, int, int] | None = None
        self._producer: UUID | None = None
        self._in_doubt: set[UUID] = set()
        """Earlier lives of which the database may have forgotten what it had, unseen by this life's own ledger."""
        self._in_hand: Window | None = None
        self._recovered_until: dict[UUID, int] = {}
        """Of each earlier life, the sequence up to which it is settled here."""
        self._log = get_logger()
        self._rated = Rated(clock)
        self._random = random = Random()  # noqa: S311 - jitter, and which deltas are looked at
        if isinstance(sink, Looks):
            sink.following = lambda batch: backlog.following(batch.deltas, _LOOKED_AT, random)
        self._looking, self._letting_go = Breath(_PART), Breath(_PART)
        self._hurry: anyio.Event | None = None
        self._hurried = False
        self._signing: anyio.Event | None = None
        self._sign_at = clock.monotonic() + SIGN_OF_LIFE
        """When the ledger is to be given a sign of life, on the monotonic clock."""
        self.halted: BaseException | None = None
        """Why nothing is written any more, if so."""

    def hurry(self) -> None:
        """Cut a wait between two tries short: somebody waits, or the end is near."""
        self._hurried = True
        if self._hurry is not None:
            self._hurry.set()

    def abort(self) -> None:
        """Make what is under way in the sink fail now."""
        self._sink.abort()

    @property
    def last_error(self) -> BaseException | None:
        """What the sink raised last, until a batch goes through."""
        return self._numbers.last_error

    async def _apply(self, batch: Batch, taken_at: int = 0) -> Applied:
        """Apply one batch, under whatever epoch its producer has, however long it takes; return what became of it.

        *taken_at*: when the oldest call of its window was taken, nanoseconds since 1970; 0: as its calls say.
        """
        producer = batch.producer
        tries = regressed = 0
        started = self._clock.monotonic()
        while True:
            try:
                position = await self._reach(producer, batch.sequence)
                started = self._clock.monotonic()
                applied = await self._try(position, batch)
            except LedgerRegressed as error:
                # Proof that the batch in hand is not there: it goes again under a new epoch.
                self._positions.pop(producer, None)
                self._regressed(error)
                regressed += 1
                if regressed > 1:
                    await self._wait_after(error, regressed)
            except (Fenced, LedgerMissing) as final:
                self._count("other")
                if producer == self._backlog.producer:
                    self._numbers.fenced = True
                    self._tell(final, "flush_halted", level="critical", always=True)
                # Else it is an earlier life's: what it left is set aside, and this one goes on.
                raise Halted from final
            except Halted:
                raise
            except Exception as error:
                tries += 1
                await self._wait_after(error, tries)
            else:
                break
        self._hurried = False
        self._record(applied, batch.deltas, self._clock.monotonic() - started, taken_at)
        if tries:
            self._say("info", "flush_recovered", tries=tries)
        return applied

    async def _try(self, position: Opened, batch: Batch) -> Applied:
        producer, sequence = batch.producer, batch.sequence
        if position.applied_sequence >= sequence:
            if isinstance(self._sink, Recalls):
                return await self._sink.recall(replace(batch, epoch=position.epoch))
            return Applied(rows=0, duplicate=True)
        applied = await self._sink.apply(replace(batch, epoch=position.epoch))
        if not isinstance(applied, Applied):
            raise TypeError(f"{type(self._sink).__name__}.apply must return Applied, got {applied!r}")
        self._positions[producer] = self._acknowledged[producer] = Opened(position.epoch, sequence, position.database)
        self._numbers.ledger = (str(producer), position.epoch, sequence)
        self._sign_at = self._clock.monotonic() + SIGN_OF_LIFE
        return applied

    # -- the ledger -----------------------------------------------------------------------------------

    async def _reach(self, producer: UUID, sequence: int) -> Opened:
        """Return where the ledger stands: right before *sequence*, or at or after it if that is applied already."""
        position = self._positions.get(producer)
        if position is None or position.applied_sequence < sequence - 1:
            # What was given up in doubt may be there: asked, not guessed.
            position = await self._open(producer)
        if position.applied_sequence < sequence - 1 and self._journal is not None:
            await self._apply_again(producer, position.applied_sequence, sequence)
            position = self._positions.get(producer) or await self._open(producer)
        if position.applied_sequence < sequence - 1:
            self._tell_missing(producer, position.applied_sequence + 1, sequence - 1)
            position = await self._open(producer, position, after=sequence - 1)
        return position

    def _tell_missing(self, producer: UUID, first: int, last: int) -> None:
        """Say what the ledger lacks, once, however often moving it on is tried."""
        if self._missing != (producer, first, last):
            self._missing = (producer, first, last)
            known = self._acknowledged.get(producer)
            forgotten = known is not None and known.applied_sequence >= first
            self._say("error", "batches_missing", first=first, last=last, batches=last - first + 1, forgotten=forgotten)

    async def _open(self, producer: UUID, known: Opened | None = None, *, after: int = 0) -> Opened:
        if known is None or not after:
            known = self._acknowledged.get(producer, known)
        position = await self._sink.open(producer, self.lane, known=known, after=after)
        if self._journal is not None:
            self._journal.opened(producer, position.epoch, position.database)
        self._positions[producer] = position
        if producer not in self._acknowledged:
            self._acknowledged[producer] = position
        return position

    def _regressed(self, error: LedgerRegressed) -> None:
        self._numbers.regressions += 1
        if self._journal is not None:
            self._in_doubt.update(self._journal.retained_producers)
        self._tell(error, "database_forgot_commits", level="error", always=True)

    # -- the journal ----------------------------------------------------------------------------------

    async def _apply_again(self, producer: UUID, after: int, before: int) -> None:
        """Apply what the journal has of *producer*'s batches after the first and before the second sequence."""
        assert self._journal is not None
        windows, in_hand = self._journal.retained(producer), self._in_hand
        if in_hand is not None and in_hand.producer == producer and in_hand not in windows:
            windows.append(in_hand)  # its first batches may be among what the database forgot
        for window in windows:
            if window.first < before and (window.last is None or window.last > after):
                try:
                    batches = await self._batches(window)
                except (OSError, Damage) as error:
                    # It is said what is missing when the ledger is moved on; a file that is gone holds nothing up.
                    self._journal.errors[operation_of(error)] += 1
                    self._tell(error, "journal_unreadable", level="error", always=True)
                    continue
                calls = 0
                for batch in batches:
                    if after < batch.sequence < before:
                        await self._apply(batch)
                        calls += sum(delta.calls for delta in batch.deltas)
                if calls:
                    self._journal.replayed += calls
                    self._say("warning", "applied_again", first=window.first, calls=calls)

    async def _persist(self, do: Callable[[], Awaitable[Opened]]) -> Opened:
        tries = 0
        while True:
            try:
                return await do()
            except (Fenced, LedgerMissing) as final:
                raise Halted from final
            except Exception as error:
                tries += 1
                await self._wait_after(error, tries)

    async def _batches(self, window: Window) -> list[Batch]:
        return self._cut(window, await self._read(window))

    def _cut(self, window: Window, generation: Generation) -> list[Batch]:
        """Return the batches of a stored window, as they were when it was taken."""
        return [
            Batch(window.producer, window.lane, 0, sequence, deltas, window.create_missing)
            for sequence, deltas in enumerate(generation.batches(window.max_batch_size), window.first)
        ]

    async def _read(self, window: Window) -> Generation:
        generation = Generation(create_missing=window.create_missing)
        for number, item in enumerate(window.read()):
            take(generation, item)
            if not number % _BREATH:
                await anyio.lowlevel.checkpoint()  # lets go of the interpreter
        window.check(generation)
        return generation

    async def _in_thread(self, do: Callable[..., object], *arguments: object) -> None:
        import asyncio  # noqa: PLC0415 - `import tracker_daemon` need not pay for it

        await asyncio.get_running_loop().run_in_executor(None, do, *arguments)

    # -- what is told ---------------------------------------------------------------------------------

    def _record(self, applied: Applied, deltas: Sequence[ThreadDelta], seconds: float, taken_at: int) -> None:
        numbers, now = self._numbers, self._clock.wall()
        # An instant that a client gave may be of any time: it tells nothing about when its call came.
        oldest = min(map(earliest, self._looking.parts(rows_of(deltas)))) / 1e6
        taken = taken_at / 1e9
        since = oldest if not taken or taken <= oldest <= now else taken
        numbers.flushes["duplicate" if applied.duplicate else "ok"] += 1
        numbers.flush_seconds.observe(seconds)
        numbers.flush_rows.observe(len(deltas))
        numbers.commit_lag_seconds.observe(max(0.0, now - since))
        numbers.last_success = now
        numbers.last_error = None
        if applied.duplicate:
            self._say("info", "batch_was_applied_already", deltas=len(deltas))
        if len(applied.dead_letters) > _LETTERS_TOLD:
            self._say("error", "dead_letters", letters=len(applied.dead_letters), told=_LETTERS_TOLD)
        for letter in applied.dead_letters[:_LETTERS_TOLD]:
            self._say(
                "error",
                "dead_letter",
                thread_id=letter.delta.thread_id,
                calls=letter.delta.calls,
                reason=letter.reason,
                sqlstate=letter.sqlstate,
                error=letter.error,
            )

    async def _wait_after(self, error: Exception, tries: int) -> None:
        kind = kind_of(error)
        passing = _PLANS[kind] is PASSING
        self._count(kind)
        self._numbers.flushes["retry" if passing else "error"] += 1
        self._tell(error, "flush_failed", level="warning" if passing else "error", kind=kind, tries=tries)
        plan = PASSING if kind == "other" and tries <= _QUICK_TRIES_OF_OTHER else _PLANS[kind]
        hurry = self._hurry = anyio.Event()
        await self._clock.wait(hurry, 0.0 if self._hurried else plan.wait(tries, self._random))
        self._hurried = False

    def _count(self, kind: FaultKind) -> None:
        self._numbers.errors[kind] += 1

    def _tell(self, error: BaseException, event: str, *, level: str, always: bool = False, **fields: object) -> None:
        self._numbers.last_error = error
        rated = {} if always else self._rated.due(f"{event}:{fields.get('kind')}:{type(error).__name__}")
        if rated is not None:
            books = self._backlog.books()
            self._say(level, event, error=str(error), pending_calls=books.queue_calls, **fields, **rated)
        if self._on_error is not None:
            try:
                self._on_error(error)
            except BaseException:
                # The host's handler must not stop the flush, not even by sys.exit.
                self._say("exception", "on_error_failed")

    def _say(self, level: str, event: str, **fields: object) -> None:
        # What the host's logging raises must not stop the flush, nor pass for an error of the sink.
        with suppress(Exception):
            getattr(self._log, level)(event, producer=str(self._producer or self._backlog.producer), **fields)


def kind_of(error: BaseException) -> FaultKind:
    """Return what kind of fault *error* is."""
    if isinstance(error, SchemaError):
        return "schema"
    return error.kind if isinstance(error, SinkFault) else "other"
