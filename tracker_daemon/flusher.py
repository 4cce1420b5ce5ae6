"""Sealed batches into the sink: one in flight, the same identity on every retry, until the sink has it.

Rules:
1. A batch leaves the backlog only after `Sink.apply` returned.
2. How one batch is applied, and what an error means, is decided in `applier`; what earlier lives left is applied first,
   by the same step, in `recovery`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from tracker_daemon.applier import DAY, SIGN_OF_LIFE, Halted, kind_of
from tracker_daemon.batch import Batch
from tracker_daemon.errors import Fenced
from tracker_daemon.journal.directory import operation_of
from tracker_daemon.journal.windows import Damage
from tracker_daemon.mending import Mender
from tracker_daemon.recovery import Recovery
from tracker_daemon.sink import LedgerMissing, LedgerRegressed

if TYPE_CHECKING:
    from tracker_daemon.journal.windows import Window

_TRIES_OF_GONE: Final = 3
_NEXT_TRY: Final = 3_600.0


class Flusher(Recovery):
    """Applies the backlog's sealed batches in order; the arguments are those of `Applier`."""

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
                # Rows without a sign of life for a month are collected: far enough from it.
                name = backlog.name(renew=bool(last) and self._clock.wall() - last > DAY)
                self._producer = name[0]
                batch = Batch(name[0], self.lane, 0, name[1], deltas, backlog.create_missing)
                applied = await self._apply(batch, backlog.head_oldest_at)
                window = backlog.settle(deltas, applied)
                rows = list(deltas.rows)
                del batch, deltas
                self._letting_go.let_go(rows)
                if self._journal is not None and window is not None:
                    self._journal.applied(window)
                if self._in_doubt:
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
            mender = Mender(self._backlog, journal)
            mender.rewrite_sealed()
            if cut and not journal.trusts(window):
                # Half of it gone with the power, it would be cut otherwise, and what is applied be applied again.
                mender.unstore_head()
