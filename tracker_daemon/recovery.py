"""What earlier lives left in the journal, applied under their own identities.

Rules:
1. What cannot be applied of one life is set aside and told; it holds up neither the others nor this one.
2. It may be cut short at every step, and begins anew: what was settled is not settled twice.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from tracker_daemon.applier import Applier, Halted
from tracker_daemon.errors import JournalError
from tracker_daemon.journal.windows import Damage
from tracker_daemon.sink import LedgerMissing, Opened

if TYPE_CHECKING:
    from tracker_daemon.journal.journal import Journal
    from tracker_daemon.journal.lives import Life
    from tracker_daemon.journal.windows import Window


class Recovery(Applier):
    """Applies what earlier lives left; the arguments are those of `Applier`."""

    async def recover(self) -> None:
        """Apply what earlier processes left, each life under its own identity; return when that is done."""
        journal = self._journal
        if journal is None or not journal.waiting:
            return
        self._forget_done(journal)
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
                told.__cause__ = cause
                self._tell(told, "journal_set_aside", level="error", always=True)
        self._numbers.fenced = False
        self._backlog.end_recovery()

    def _forget_done(self, journal: Journal) -> None:
        """Forget earlier lives of which nothing is here any more: children come and go without end."""
        known = {journal.producer, *journal.left, *journal.retained_producers}
        for by_producer in (self._acknowledged, self._positions, self._recovered_until):
            for producer in by_producer.keys() - known:
                del by_producer[producer]

    async def _recover(self, journal: Journal, life: Life) -> None:
        producer = life.producer
        if not life.windows:  # what was never on the disk needs no place in the ledger
            journal.recovered_life(life)
            return
        # A window is noted as applied only once the ledger has registered its life.
        epoch = life.epoch or int(any(window.applied_at for window in life.windows))
        # What stood before the first window that is left was applied.
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
        if known is None:
            await self._in_thread(journal.note_registered, life, position.epoch)
        # What the database forgets of it before this life's next commit, its own ledger cannot show.
        self._in_doubt.add(producer)
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
        position = self._positions.get(window.producer)
        if window.applied_at and position and (not batches or batches[-1].sequence <= position.applied_sequence):
            return 0  # whoever noted it has counted it
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

    async def _repair_earlier_lives(self) -> None:
        """Apply again what the database may have forgotten of earlier lives since they were recovered."""
        assert self._journal is not None
        in_doubt, self._in_doubt = self._in_doubt, set()
        for producer in self._journal.retained_producers:
            if producer in in_doubt and producer != self._journal.producer:
                with suppress(Halted):
                    position = await self._persist(lambda producer=producer: self._open(producer))  # type: ignore[misc]
                    await self._apply_again(producer, position.applied_sequence, sys.maxsize)
