"""Sealed batches into the sink: one in flight, the same identity on every retry, until the sink has it.

Rules:
1. A batch leaves the backlog only after `Sink.apply` returned.
2. What an error means is decided here alone, by its kind: `_PLANS`. Nothing is dropped on an error.
3. `Fenced` and `LedgerMissing` are final for this life: whether the batch was applied must not be guessed.
4. Before a batch is applied its ledger stands right before it. What it lacks is applied again from the journal, where
   that has kept it; the rest is reported, and the ledger moved on. The same step repairs what the database forgot
   (`LedgerRegressed`) and applies what an earlier process left.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from tracker_daemon.backoff import PASSING, STANDING, Backoff
from tracker_daemon.batch import Batch
from tracker_daemon.errors import Fenced, JournalError, SchemaError
from tracker_daemon.generation import Generation
from tracker_daemon.journal.journal import operation_of
from tracker_daemon.journal.windows import Damage, take
from tracker_daemon.logs import Rated, get_logger
from tracker_daemon.sink import Applied, FaultKind, LedgerMissing, LedgerRegressed, Opened, Recalls, SinkFault

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    from tracker_daemon.backlog import Backlog
    from tracker_daemon.clock import Clock
    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.flush_numbers import FlushNumbers
    from tracker_daemon.journal.journal import Journal
    from tracker_daemon.journal.lives import Life
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
_TRIES_OF_GONE: Final = 3
_LETTERS_TOLD: Final = 10
# Ledger rows without a sign of life for a month are collected: far enough from it.
_DAY: Final = 86_400.0
_BREATH: Final = 1_000
SIGN_OF_LIFE: Final = 7 * _DAY
_NEXT_TRY: Final = 3_600.0


class Halted(Exception):  # noqa: N818 - not an error of its own: the reason is its cause
    """The ledger forbids this life to write any more."""


class Flusher:
    """Applies the backlog's sealed batches in order.

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
        self._forgotten = False
        self._in_hand: Window | None = None
        self._recovered_until: dict[UUID, int] = {}
        self._log = get_logger()
        self._rated = Rated(clock)
        self._random = Random()  # noqa: S311 - jitter
        self._hurry: anyio.Event | None = None
        self._hurried = False
        self._signing: anyio.Event | None = None
        self._sign_at = clock.monotonic() + SIGN_OF_LIFE
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

    async def flush(self) -> None:
        """Apply everything sealed; return when all of it is settled, or the flusher has halted."""
        backlog = self._backlog
        try:
            while self.halted is None and backlog.in_flight:
                deltas = backlog.head()
                if deltas is None:
                    await self._load_head()
                    continue
                window = self._in_hand = backlog.head_window
                if self._journal is not None and window is not None:
                    await self._make_durable(window)
                self._in_hand = backlog.head_window
                last = self._numbers.last_success
                # The old identity's ledger row may be collected soon.
                name = backlog.name(renew=bool(last) and self._clock.wall() - last > _DAY)
                self._producer = name[0]
                batch = Batch(name[0], self.lane, 0, name[1], deltas, backlog.create_missing)
                applied = await self._apply(batch, backlog.head_oldest_at)
                window = backlog.settle(deltas, applied)
                if self._journal is not None and window is not None:
                    self._journal.applied(window)
                if self._forgotten:
                    self._forgotten = False
                    await self._repair_earlier_lives()
        except Halted as halted:
            self.halted = halted.__cause__

    @property
    def sign_due(self) -> float | None:
        """When the ledger is to be given a sign of life, on the monotonic clock; `None`: it need not.

        What the journal's files hold is known by the ledger's row, which is collected after a month without one.
        Without a journal a new identity is taken instead (`flush`).
        """
        known = self._journal is not None and self._backlog.producer in self._acknowledged
        return self._sign_at if known and self.halted is None else None

    async def give_sign(self) -> None:
        """Give the ledger a sign of life, if it is due: while this process lives its row is not collected."""
        due, now, producer = self.sign_due, self._clock.monotonic(), self._backlog.producer
        if due is None or now < due:
            return
        self._sign_at = now + _NEXT_TRY
        self._signing = done = anyio.Event()
        try:
            await self._open(producer)
        except (Fenced, LedgerMissing) as final:
            self._numbers.fenced = True
            self.halted = final
            self._tell(final, "flush_halted", level="critical", always=True)
        except Exception as error:
            self._count(kind_of(error))
            self._tell(error, "sign_of_life_failed", level="warning")
        else:
            self._sign_at = now + SIGN_OF_LIFE
        finally:
            self._signing = None
            done.set()

    async def aclose(self, *, clean: bool) -> None:
        """Let go of the sink; what its ledger says at the end is told."""
        try:
            producer = self._producer or self._backlog.producer
            if self._signing is not None:
                self._sink.abort()
                await self._signing.wait()
            await self._sink.aclose(producer, self.lane, clean=clean and self.halted is None)
            if clean and self.halted is None and self._journal is not None:
                self._journal.closed()
        except (LedgerRegressed, LedgerMissing, Fenced) as error:
            self._numbers.regressions += isinstance(error, LedgerRegressed)
            self._tell(error, "ledger_at_close", level="error", always=True)

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
                self._numbers.fenced = True
                self._count("other")
                self._tell(final, "flush_halted", level="critical", always=True)
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

    # -- the ledger --------------------------------------------------------------------------------

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
        self._forgotten = self._journal is not None
        self._tell(error, "database_forgot_commits", level="error", always=True)

    # -- the journal -------------------------------------------------------------------------------

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

    async def _repair_earlier_lives(self) -> None:
        """Apply again what the database may have forgotten of earlier lives since they were recovered."""
        assert self._journal is not None
        for producer in self._journal.retained_producers:
            if producer != self._journal.producer:
                with suppress(Halted):
                    position = await self._persist(lambda producer=producer: self._open(producer))  # type: ignore[misc]
                    await self._apply_again(producer, position.applied_sequence, sys.maxsize)

    async def recover(self) -> None:
        """Apply what earlier processes left, each life under its own identity; return when that is done."""
        journal = self._journal
        if journal is None or not journal.left:
            return
        await self._in_thread(journal.sync_left)
        for life, error in journal.lives():
            try:
                if life is None:
                    raise JournalError(str(error)) from error
                await self._recover(journal, life)
            except (Damage, OSError, JournalError, Halted) as problem:
                self._backlog.set_aside()
                cause = problem.__cause__ if isinstance(problem, Halted) else problem
                journal.set_aside(cause or problem)
                told = JournalError(
                    f"what an earlier process left in {journal.directory} is not applied: {cause}. It stays there; "
                    "see `tracker-daemon journal inspect`"
                )
                self._tell(told, "journal_set_aside", level="error", always=True)
        self._numbers.fenced = False
        # What the database forgets before this life is registered there, its own ledger cannot show.
        self._forgotten = bool(journal.retained_producers)
        self._backlog.end_recovery()

    async def _recover(self, journal: Journal, life: Life) -> None:
        producer = life.producer
        if not life.windows:  # what was never on the disk needs no place in the ledger
            journal.recovered_life(life)
            return
        # A window is noted as applied only once the ledger has registered its life. What stood before the first window
        # that is left was applied.
        epoch = life.epoch or int(any(window.applied_at for window in life.windows))
        known = Opened(epoch, life.windows[0].first - 1, life.database) if epoch else None
        if known is not None:
            self._acknowledged[producer] = known
        try:
            position = await self._persist(lambda: self._open(producer, known))
        except Halted as halted:
            if not (isinstance(halted.__cause__, LedgerMissing) and journal.is_done_with(life)):
                raise
            journal.recovered_life(life)
            self._say("info", "journal_collected", life=str(producer))
            return
        calls = 0
        for number, window in enumerate(life.windows):
            following = life.windows[number + 1].first if number + 1 < len(life.windows) else None
            last = window.last if window.last is not None else following and following - 1
            position = self._positions.get(producer, position)
            begun = self._in_hand is not None and (self._in_hand.producer, self._in_hand.first) == (
                producer,
                window.first,
            )
            if begun or last is None or last > position.applied_sequence:
                calls += await self._recover_window(window)
            elif window.batches is None:
                window.batches = last + 1 - window.first
            journal.recovered_window(window)
        journal.recovered_life(life)
        self._positions.pop(producer, None)
        if calls:
            self._say("info", "journal_applied", life=str(producer), calls=calls)

    async def _recover_window(self, window: Window) -> int:
        assert self._journal is not None
        self._journal.check_synced(window.paths)
        generation = await self._read(window)
        settled = self._recovered_until.get(window.producer, 0)
        batches = self._cut(window, generation)
        window.batches = len(batches)
        left = [batch for batch in batches if batch.sequence > settled]
        self._backlog.recover(batch.deltas for batch in left)
        self._in_hand = window
        calls = 0
        for batch in left:
            applied = await self._apply(batch)
            self._backlog.settle_recovered(batch.deltas, applied)
            self._recovered_until[window.producer] = batch.sequence
            found = sum(delta.calls for delta in batch.deltas)
            self._journal.recovered += found
            calls += found
        return calls

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

    async def _load_head(self) -> None:
        """Read the oldest sealed window back from its files."""
        window = self._backlog.stored_head
        if window is not None:
            tries = 0
            while True:
                try:
                    generation = await self._read(window)
                    break
                except (OSError, Damage) as error:
                    # Written by this process: the disk is failing. Held, not guessed; but what was deleted is gone.
                    tries += 1
                    assert self._journal is not None
                    self._journal.errors[operation_of(error)] += 1
                    if isinstance(error, FileNotFoundError) and tries >= _TRIES_OF_GONE:
                        self._tell(error, "journal_window_gone", level="error", always=True, calls=window.calls)
                        self._backlog.lose_stored_head(window)
                        return
                    await self._wait_after(error, tries)
            self._backlog.load(window, generation)

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

    async def _make_durable(self, window: Window) -> None:
        """Bring a window to the disk where its cut into batches, or the setting, asks for it before its flush."""
        assert self._journal is not None
        journal = self._journal
        cut = (window.batches or 2) > 1
        if journal.sync_interval == 0 or cut:
            await self._in_thread(journal.sync)
            if journal.trusts(window):
                journal.release_synced()
                return
            self._backlog.rewrite_sealed()
            if cut and not journal.trusts(window):
                # Half of it gone with the power, it would be cut otherwise, and what is applied be applied again.
                self._backlog.unstore_head()

    async def _in_thread(self, do: Callable[..., object], *arguments: object) -> None:
        import asyncio  # noqa: PLC0415 - `import tracker_daemon` need not pay for it

        await asyncio.get_running_loop().run_in_executor(None, do, *arguments)

    # -- what is told ------------------------------------------------------------------------------

    def _record(self, applied: Applied, deltas: tuple[ThreadDelta, ...], seconds: float, taken_at: int) -> None:
        numbers, now = self._numbers, self._clock.wall()
        # An instant that a client gave may be of any time: it tells nothing about when its call came.
        oldest, taken = min(delta.first_at for delta in deltas) / 1e6, taken_at / 1e9
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
