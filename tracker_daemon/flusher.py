"""Sealed batches into the sink: one in flight, the same identity on every retry, until the sink has it.

Rules:
1. A batch leaves the backlog only after `Sink.apply` returned.
2. What an error means is decided here alone, by its kind: `_PLANS`. Nothing is dropped on an error.
3. `Fenced` and `LedgerMissing` are final for this life: whether the batch was applied must not be guessed.
4. `LedgerRegressed` proves that the batch in hand is not in the database: it goes again under a new epoch.
"""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import anyio

from tracker_daemon.backoff import PASSING, STANDING, Backoff
from tracker_daemon.batch import Batch
from tracker_daemon.errors import Fenced, SchemaError
from tracker_daemon.logs import Rated, get_logger
from tracker_daemon.sink import Applied, FaultKind, LedgerMissing, LedgerRegressed, Opened, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from tracker_daemon.backlog import Backlog
    from tracker_daemon.clock import Clock
    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.flush_numbers import FlushNumbers
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
# Ledger rows without a sign of life for a month are collected: far enough from it.
_DAY: Final = 86_400.0


class Halted(Exception):  # noqa: N818 - not an error of its own: the reason is its cause
    """The ledger forbids this life to write any more."""


class Flusher:
    """Applies the backlog's sealed batches in order.

    Args:
        backlog, sink, clock, numbers: the stages it joins, time, and where it counts.
        producer: this life's identity.
        on_error: called with every error of the sink, in the worker's thread; its own exceptions are logged.
    """

    lane = 0

    def __init__(
        self,
        backlog: Backlog,
        sink: Sink,
        clock: Clock,
        numbers: FlushNumbers,
        producer: UUID,
        on_error: Callable[[BaseException], object] | None,
    ) -> None:
        self._backlog, self._sink, self._clock, self._numbers = backlog, sink, clock, numbers
        self._producer, self._on_error = producer, on_error
        self._position: Opened | None = None
        self._batch: Batch | None = None
        self._log = get_logger()
        self._rated = Rated(clock)
        self._random = Random()  # noqa: S311 - jitter
        self._hurry: anyio.Event | None = None
        self._hurried = False
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
        while self.halted is None and (deltas := self._backlog.head()) is not None:
            try:
                await self._apply(deltas)
            except Halted as halted:
                self.halted = halted.__cause__

    async def aclose(self, *, clean: bool) -> None:
        """Let go of the sink; what its ledger says at the end is told."""
        try:
            await self._sink.aclose(self._producer, self.lane, clean=clean and self.halted is None)
        except (LedgerRegressed, LedgerMissing, Fenced) as error:
            self._numbers.regressions += isinstance(error, LedgerRegressed)
            self._tell(error, "ledger_at_close", level="error", always=True)

    async def _apply(self, deltas: tuple[ThreadDelta, ...]) -> None:
        tries = regressed = 0
        while True:
            try:
                batch = await self._identify(deltas)
                started = self._clock.monotonic()
                applied = await self._sink.apply(batch)
                if not isinstance(applied, Applied):
                    raise TypeError(f"{type(self._sink).__name__}.apply must return Applied, got {applied!r}")
            except LedgerRegressed as error:
                # Proof that the batch in hand is not there: it may take a new identity, under a new epoch.
                self._batch = self._position = None
                self._numbers.regressions += 1
                self._tell(error, "database_forgot_commits", level="error", always=True)
                regressed += 1
                if regressed > 1:
                    await self._wait_after(error, regressed)
            except (Fenced, LedgerMissing) as final:
                self._numbers.fenced = True
                self._count("other")
                self._tell(final, "flush_halted", level="critical", always=True)
                raise Halted from final
            except Exception as error:
                tries += 1
                await self._wait_after(error, tries)
            else:
                break
        self._backlog.settle(deltas, applied)
        self._position, self._batch = Opened(batch.epoch, batch.sequence), None
        self._hurried = False
        self._record(applied, deltas, self._clock.monotonic() - started)
        if tries:
            self._say("info", "flush_recovered", tries=tries)

    async def _identify(self, deltas: tuple[ThreadDelta, ...]) -> Batch:
        """Return *deltas* under their identity, which they keep from the first try on."""
        if self._batch is not None and self._batch.deltas is deltas:
            return self._batch
        if self._batch is not None:
            # Given up in doubt: only a new epoch tells where the ledger stands.
            self._batch = self._position = None
        last = self._numbers.last_success
        if self._position is not None and last and self._clock.wall() - last > _DAY:
            # The old identity's ledger row may be collected soon; nothing is in doubt under it.
            self._producer, self._position = uuid4(), None
        if self._position is None:
            self._position = await self._sink.open(self._producer, self.lane)
        position = self._position
        self._batch = Batch(self._producer, self.lane, position.epoch, position.applied_sequence + 1, deltas)
        return self._batch

    def _record(self, applied: Applied, deltas: tuple[ThreadDelta, ...], seconds: float) -> None:
        numbers, now = self._numbers, self._clock.wall()
        numbers.flushes["duplicate" if applied.duplicate else "ok"] += 1
        numbers.flush_seconds.observe(seconds)
        numbers.flush_rows.observe(len(deltas))
        numbers.commit_lag_seconds.observe(max(0.0, now - min(delta.first_at for delta in deltas) / 1e6))
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
            getattr(self._log, level)(event, producer=str(self._producer), **fields)


def kind_of(error: BaseException) -> FaultKind:
    """Return what kind of fault *error* is."""
    if isinstance(error, SchemaError):
        return "schema"
    return error.kind if isinstance(error, SinkFault) else "other"
