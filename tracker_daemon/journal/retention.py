"""What is applied and kept, in case the database forgets it; and what earlier lives left, until it is applied.

Rules:
1. A window is kept from the moment it is applied, for `retain` seconds of a clock that is never set, while there is
   room.
2. That it is applied is noted in its files. The ledger decides; the note tells that its row was there.
3. That a recovery has registered a life is noted in its files before any of it is applied: should the ledger's row be
   gone afterwards, its absence does not mean that nothing was.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from tracker_daemon.journal.directory import MOST_ADOPTED, Directory, NotSynced, operation_of
from tracker_daemon.journal.lives import Life, life_of
from tracker_daemon.journal.segment import mark_applied, mark_registered
from tracker_daemon.journal.windows import Damage, Window

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from uuid import UUID

# What is applied and kept takes at most this share of the quota, of all places together.
_RETAINED_SHARE: Final = 4
# As in postgres/sql/collect.sql, by the database's clock.
_COLLECTED_CLOSED: Final = 86_400.0
_COLLECTED: Final = 30 * 86_400.0
_CLOCKS_DIFFER: Final = 3_600.0


class Retention(Directory):
    """A directory whose applied windows are kept for a while.

    Args:
        directory, quota, forked: see `Directory`.
        producer: this life's.
        retain: how long an applied window is kept, seconds, in case the database forgets it.
    """

    def __init__(self, directory: Path, *, producer: UUID, retain: float, quota: int, forked: bool) -> None:
        self.producer, self.retain = producer, retain
        self.torn = 0
        """Bytes of torn records that recovery passed over."""
        self.recovered = 0
        """Calls that were accepted by an earlier process and applied, or found applied, by this one."""
        self.replayed = 0
        """Calls applied again because the database had forgotten them."""
        self._retained: deque[Window] = deque()
        self._not_synced: dict[Path, OSError] = {}
        self._recovered_windows: set[tuple[UUID, int]] = set()
        super().__init__(directory, quota=quota, forked=forked)

    def applied(self, window: Window) -> None:
        """*window* is in the database: keep it for a while."""
        now = int(time.time())
        age = max(0, now - window.applied_at) if window.applied_at else 0
        window.kept_since = time.monotonic() - age
        if not window.applied_at:
            window.applied_at = now
            self._mark(window.paths)
        for path in window.paths:
            if place := self._places.get(path.parent):
                place.keep([path])
        self._retained.append(window)
        self.trim()

    def closed(self) -> None:
        """The ledger was told that this life has ended cleanly: a day later its row may be gone."""
        if kept := self.retained(self.producer):
            self._mark(kept[-1].paths, closed=True)

    def _mark(self, paths: list[Path], *, closed: bool = False) -> None:
        try:
            for path in paths:
                mark_applied(path, time.time(), closed=closed)
        except OSError as error:
            self.errors["write"] += 1
            self._say("warning", "journal_mark_failed", path=str(path), error=str(error))

    def retained(self, producer: UUID) -> list[Window]:
        """Return what is kept of a producer's applied windows, in order."""
        return sorted((window for window in self._retained if window.producer == producer), key=lambda w: w.first)

    @property
    def retained_producers(self) -> list[UUID]:
        """Those of whom something is kept."""
        return list(dict.fromkeys(window.producer for window in self._retained))

    def adopt(self, most: int = MOST_ADOPTED) -> bool:
        """See `Directory.adopt`; what was kept long enough is let go of before, also where nothing is applied now."""
        self.trim()
        return super().adopt(most)

    def trim(self, *, make_room: bool = False) -> None:
        """Delete applied windows: those kept long enough, and the oldest where the quota is passed.

        The newest of all and the newest of this life stay: a window whose own identity a crash has lost follows the one
        before it.
        """
        now, kept = time.monotonic(), list(self._retained)
        taken, all_kept = self._sums()
        too_much, too_much_kept = taken - self.quota, all_kept - self.quota // _RETAINED_SHARE
        own = next((window for window in reversed(kept) if window.producer == self.producer), None)
        for window in kept[:-1]:
            if window is own:
                continue
            kept_long_enough = now - window.kept_since > self.retain
            if not (kept_long_enough or too_much_kept > 0 or (make_room and too_much > 0)):
                break
            with suppress(ValueError):  # another thread was first
                self._retained.remove(window)
                size = self._size(window.paths)
                too_much, too_much_kept = too_much - size, too_much_kept - size
                self._delete_all(window.paths)

    def lives(self) -> Iterator[tuple[Life | None, BaseException | None]]:
        """Yield every earlier life, the oldest first; or the error instead of one that cannot be read."""
        found: list[Life] = []
        for producer, paths in self.waiting.items():
            try:
                found.append(life_of(producer, paths))
            except (Damage, OSError) as error:
                yield None, error
        for life in sorted(found, key=lambda life: life.begun_at):
            yield life, None

    def recovered_window(self, window: Window) -> None:
        """All of *window* is in the database. Told again when the recovery was cut short and has begun anew."""
        if (name := (window.producer, window.first)) not in self._recovered_windows:
            self._recovered_windows.add(name)
            self.torn += window.torn
            self.applied(window)

    def recovered_life(self, life: Life) -> None:
        """All of *life* is in the database: what is kept of it goes into this process's own place."""
        self.torn += life.torn
        windows = self.retained(life.producer)
        kept = {path for window in windows for path in window.paths}
        self._delete_all(list({*life.leftover, *self._left.pop(life.producer, ())} - kept))
        self._recovered_windows = {name for name in self._recovered_windows if name[0] != life.producer}
        for window in windows:
            self._bring_home(window)

    def _bring_home(self, window: Window) -> None:
        """Move the files of a kept window into the own place: where they were left may be given back."""
        try:
            self._retained.remove(window)  # as long as it moves no other thread is to delete it
        except ValueError:  # one was first
            return
        home = self._places[self.directory]
        for number, path in enumerate(window.paths):
            place = self._places.get(path.parent)
            if place is None or place is home:
                continue
            here = self.directory / path.name
            home.take({here: self._size([path])})
            try:
                path.rename(here)
            except OSError as error:  # it is kept where it is
                home.drop([here])
                self.errors["rename"] += 1
                self._say("warning", "journal_rename_failed", path=str(path), error=str(error))
                continue
            window.paths[number] = here
            home.keep([here])
            place.drop([path])
            self._names_changed = True
        self._retained.append(window)

    def note_registered(self, life: Life, epoch: int) -> None:
        """Note on the disk that a recovery has registered *life*, before any of it is applied. May block.

        Raises:
            NotSynced: it cannot be written; so nothing of that life may be applied.
        """
        path = life.windows[0].paths[0]
        try:
            mark_registered(path, epoch)
        except OSError as error:
            raise NotSynced(error.errno, f"its registration cannot be noted: {error.strerror}", str(path)) from error

    def is_done_with(self, life: Life) -> bool:
        """Whether a life whose row the ledger does not have is one that the ledger has collected, as it does.

        All of it was applied, and the row was due: a day after a clean end, a month after the last sign of life.
        Sooner, or with something not known to be applied, the row's absence is not explained.

        Raises:
            Damage, OSError: a window cannot be read.
        """
        due = (_COLLECTED_CLOSED if life.closed else _COLLECTED) - _CLOCKS_DIFFER
        return bool(at := life.applied_at) and time.time() - at >= due

    def set_aside(self, error: BaseException) -> None:
        """Something of an earlier life cannot be applied: it stays where it is."""
        self.errors[operation_of(error)] += 1

    def sync_left(self) -> None:
        """Bring the files of earlier lives to the disk, before any of it is applied. May block.

        A loss of power must not change then how a window is cut into batches; nor take what was accepted long ago.
        """
        left = [path for paths in self.waiting.values() for path in paths]
        for path in left:
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(file)
                finally:
                    os.close(file)
            except OSError as error:
                self._not_synced[path] = error
                self.errors["fsync"] += 1
        for directory in {path.parent for path in left}:
            try:
                self._sync_directory(directory)
            except OSError as error:
                self._not_synced |= dict.fromkeys((path for path in left if path.parent == directory), error)
                self.errors["fsync"] += 1

    def check_synced(self, paths: list[Path]) -> None:
        """Raise the error of the first of *paths* that `sync_left` could not bring to the disk."""
        for path in paths:
            if error := self._not_synced.get(path):
                raise NotSynced(error.errno, f"its fsync failed: {error.strerror}", str(path))
