"""The journal of one tracker: makes its files, names them, brings them to the disk, keeps and deletes them.

Rules:
1. A window is a batch (or several) with an identity: its files are named by the producer and the first sequence when
   it is sealed. A crash between a commit and a file's deletion is resolved by the ledger.
2. Each life of a process is a producer of its own; what an earlier one left is applied under its identity.
3. A file whose fsync failed is never trusted again: what it held is written anew from memory.
4. Where no file can be had calls go to memory: the tracker goes on, `degraded`, and tries again.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Final
from uuid import UUID, uuid4

from tracker_daemon.errors import JournalError
from tracker_daemon.flush_numbers import SECONDS, Histogram
from tracker_daemon.journal.degradation import Degradation
from tracker_daemon.journal.records import HEADER_SIZE, End, Header, Opened, encode_mark, encode_sum
from tracker_daemon.journal.segment import Segment
from tracker_daemon.journal.segment_queue import SegmentQueue
from tracker_daemon.journal.windows import Window, open_name, producer_of, sealed_name

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tracker_daemon.generation import Generation

_LEAST: Final = 1 << 20
_MOST: Final = 16 << 20
_SHARE_OF_A_FILE: Final = 8
_COMPACT_FROM: Final = 32 << 20


class Journal(Degradation):
    """The files of one life in a directory, beside those that are kept and left there.

    Args:
        directory, retain, quota, forked: see `Retention`.
        sync_interval: seconds between two fsyncs; 0: each window before its flush.
        max_batch_size, create_missing: how windows are cut into batches.

    Raises:
        JournalError: another process has the directory, or it cannot be written.
    """

    lane = 0

    def __init__(
        self,
        directory: Path,
        *,
        sync_interval: float,
        retain: float,
        quota: int,
        max_batch_size: int,
        create_missing: bool,
        forked: bool = False,
    ) -> None:
        self.sync_interval = sync_interval
        self.max_batch_size, self.create_missing = max_batch_size, create_missing
        self.queue = SegmentQueue(self._make, self._note_first)
        self.fsync_seconds = Histogram(SECONDS)
        self.next_first = 1
        """The sequence of the next window's first batch."""
        self.compact_from = _COMPACT_FROM
        self._epoch = self._database = self._last_window_bytes = 0
        self._numbers = count(1)
        self._unsynced: list[Segment] = []
        self._bad: list[Segment] = []
        self._syncing = Lock()
        # The window after the last sealed one, and the sequence of its first batch.
        self._next_window = (1, 1)
        self._ended = False
        super().__init__(directory, producer=uuid4(), retain=retain, quota=quota, forked=forked)

    @property
    def stores_window(self) -> bool:
        """Whether the open window is in files; it is so, or in memory, as a whole."""
        return not self._ended and all(segment.path is not None for segment in self.queue.of_window)

    # -- making segments ---------------------------------------------------------------------------

    def next_number(self) -> int:
        """Return the number of a file to come; files are read in the order of their numbers."""
        return next(self._numbers)

    def _make(self, window: int, size: int, *, anew_as: int | None = None) -> Segment:
        """Return a new segment; in memory where no file can be had. Called by callers too."""
        wanted = size + HEADER_SIZE
        if anew_as is None:
            usual = min(_MOST, self.quota // _SHARE_OF_A_FILE, 2 * self._last_window_bytes)
            wanted = max(_LEAST, usual, wanted + 4_096)
        number = next(self._numbers) if anew_as is None else anew_as
        header = Header(
            self.producer,
            self.lane,
            self._epoch,
            self._database,
            number,
            window,
            anew_as is not None,
            self.max_batch_size,
            self.create_missing,
            time.time_ns(),
        )
        if not self._ended and self.may_try:
            self._may_try_now = False
            try:
                return self._make_file(header, wanted)
            except (OSError, JournalError, ValueError) as error:
                self.fail("allocate", error, anew=header.anew)
        return Segment(header, wanted, None)

    def _note_first(self, segment: Segment) -> None:
        window, first = self._next_window
        if segment.header.window >= window:
            # Of a later one the window before it is still open. Killed now, that one has never had a sequence.
            segment.note_first(first, final=segment.header.window == window)

    def _make_file(self, header: Header, size: int) -> Segment:
        if not self.attached:
            with self._attaching:
                if not self.attached:
                    self._attach()
        path = self.directory / open_name(self.producer, header.number)
        place = self._places[self.directory]
        place.take({path: size})  # before looking: of two that want room at once none may pass the quota
        try:
            if (taken := self.bytes) > self.quota:
                self.trim(make_room=True)
                taken = self.bytes
            if taken > self.quota:
                used = f"{taken - size} of {self.quota} bytes, {size} more needed"
                raise JournalError(f"the journal's quota is used up: {used}")
            segment = Segment(header, size, path)
        except BaseException:
            place.drop([path])
            raise
        self._names_changed = True
        self._had(anew=header.anew)
        return segment

    # -- windows -----------------------------------------------------------------------------------

    def opened(self, producer: UUID, epoch: int, database: int) -> None:
        """Note that the ledger has registered *producer*, before anything is applied under it."""
        if producer == self.producer:
            first = not self._epoch
            self._epoch, self._database = epoch, database
            if first and self.queue.segments:  # a header to come says it itself
                self.queue.note(Opened(epoch, database))

    def go_on(self, batches: int) -> int:
        """Let the window that is read now follow one of so many batches; return the sequence of that one's first."""
        first, self.next_first = self.next_first, self.next_first + batches
        with self.queue.turn:  # a segment of the next window is either there by now, or told of what is noted here
            self._next_window = (self.queue.reading, self.next_first)
            for segment in self.queue.segments:
                self._note_first(segment)
        return first

    def seal(self, segments: list[Segment], batches: int, calls: int, threads: int) -> Window | None:
        """Give the window in *segments* its identity; `None`: it is in memory alone."""
        first = self.go_on(batches)
        self._last_window_bytes = sum(segment.end for segment in segments)
        kept = all(segment.path is not None for segment in segments)
        for part, segment in enumerate(segments if kept else ()):
            segment.note_first(first)
            if segment is segments[-1]:
                segment.append(encode_mark(End(first, batches, calls)))
            kept &= self._settle_name(segment, sealed_name(self.producer, first, part))
        if not kept:  # or somebody has deleted one: what is in memory still is not to be lost with it
            self.drop(segments)
            return None
        self._unsynced += segments
        return self._window(first, batches, [s.path for s in segments if s.path is not None], calls, threads)

    def _window(self, first: int, batches: int, paths: list[Path], calls: int, threads: int) -> Window:
        cut = self.max_batch_size, self.create_missing
        return Window(self.producer, self.lane, first, batches, *cut, paths, calls, threads, counted=True)

    def _settle_name(self, segment: Segment, name: str) -> bool:
        assert segment.path is not None
        before = segment.path
        try:
            segment.trim()
            segment.move(before.parent / name)
        except OSError as error:  # the name alone: what is in the file tells the same
            self.errors["rename"] += 1
            self._say("warning", "journal_rename_failed", path=str(before), error=str(error))
        if place := self._places.get(before.parent):
            place.rename(before, segment.path, segment.size)
        self._names_changed = True
        return os.path.exists(segment.path)  # noqa: PTH110 - where nobody may look it is False

    def _delete_all(self, paths: list[Path]) -> None:
        self.drop([segment for segment in list(self._unsynced) if segment.path in paths])
        super()._delete_all(paths)

    def drop(self, segments: Iterable[Segment]) -> None:
        """Let go of segments, and delete their files: nothing of them counts, or another has taken their place."""
        for segment in segments:
            for kept in (self._unsynced, self._bad):
                if segment in kept:
                    kept.remove(segment)
            segment.close()
            if segment.path is not None:
                super()._delete_all([segment.path])

    def applied(self, window: Window) -> None:
        """*window* is in the database: keep it for a while, unless it is in a file that is not trusted."""
        if not self.trusts(window):
            self.forget(window)
            return
        super().applied(window)

    def trusts(self, window: Window) -> bool:
        """Whether no fsync of its files has failed."""
        return not any(segment.path in window.paths for segment in self._bad)

    def forget(self, window: Window) -> None:
        """Delete the files of *window*."""
        self._delete_all(window.paths)

    # -- the disk ----------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether something is written that may not be on the disk."""
        return any(segment.end > segment.synced_at for segment in self._unsynced) or any(
            s.path is not None and s.end > max(s.synced_at, HEADER_SIZE) for s in self.queue.segments
        )

    def sync(self) -> None:
        """Bring everything written until now to the disk. May block; not in the worker's own loop.

        One at a time: of two that sync one file the second would not hear of an error.
        """
        with self._syncing:
            self._sync()

    def _sync(self) -> None:
        for segment in [*self._unsynced, *self.queue.segments]:
            if segment.path is None or segment.end <= segment.synced_at or segment in self._bad:
                continue
            if not segment.first:
                # Its window is just being cut. On the disk without its sequence it would pass for the one before it,
                # should that not be there: the next sync takes it.
                continue
            began = time.monotonic()
            try:
                segment.sync()
            except (OSError, ValueError, TypeError) as error:  # the latter two of a map that was let go of meanwhile
                if not segment.closed:
                    self._bad.append(segment)
                    self.fail("fsync", error)
            else:
                self.fsync_seconds.observe(time.monotonic() - began)
        if self._names_changed:
            self._names_changed = False
            try:
                self._sync_directory(self.directory)
            except OSError as error:
                self._names_changed = True
                self.fail("fsync", error)

    def release_synced(self) -> None:
        """Let go of the maps of sealed files that are on the disk."""
        for segment in list(self._unsynced):
            if segment.end <= segment.synced_at:
                self._unsynced.remove(segment)
                segment.close()

    @property
    def untrusted(self) -> list[Segment]:
        """Segments whose fsync failed: what they held is to be written anew."""
        return self._bad

    def write_anew(
        self, generation: Generation, header: Header, number: int, first: int, *, sealed: bool
    ) -> Segment | None:
        """Write what *generation* holds to a new file, on the disk; `None`: no file can be had.

        Args:
            generation: the sums.
            header: of a file of the same window.
            number: the new file's; it takes the place of every file of the window with a lower one.
            first: the sequence of the first batch in it.
            sealed: whether the window is.
        """
        data = bytearray()
        for delta, late in generation.sums():
            data += encode_sum(delta, late=late)
        calls = generation.calls
        batches = sum(1 for _ in generation.batches(self.max_batch_size)) if sealed else 0
        data += encode_mark(End(first if sealed else 0, batches, calls))
        segment = self._make(header.window, len(data), anew_as=number)
        if segment.path is None:
            return None
        segment.write(bytes(data))
        segment.freeze()
        segment.note_first(first)
        try:
            segment.sync()
            if sealed:
                self._settle_name(segment, sealed_name(self.producer, first, number))
            self._sync_directory(self.directory)
        except OSError as error:
            self.fail("fsync", error, anew=True)
            self.drop([segment])
            return None
        return segment

    def stored(self, anew: Segment, batches: int, calls: int, threads: int) -> Window:
        """Return the window that was in memory alone, and is in *anew* now."""
        assert anew.path is not None
        window = self._window(anew.first, batches, [anew.path], calls, threads)
        anew.close()
        return window

    def replace(self, window: Window, anew: Segment, batches: int, calls: int) -> None:
        """Let *anew* take the place of the files of a sealed window; it holds *batches* of it, the last ones."""
        assert anew.path is not None
        before, window.paths = window.paths, [anew.path]
        window.first, window.batches, window.calls = anew.first, batches, calls
        self._delete_all(before)
        anew.close()

    @property
    def wants_rewriting(self) -> bool:
        """Whether the open window has files that are not to be trusted, or many times what its sum would take."""
        segments = self.queue.of_window
        if self.queue.is_cut:
            return False
        if any(segment in self._bad for segment in segments):
            return self.may_write_anew
        if not self.stores_window:
            return False
        summed = sum(segment.end for segment in segments if segment.header.anew)
        return sum(segment.end for segment in segments) > max(self.compact_from, 4 * summed)

    # -- the end -----------------------------------------------------------------------------------

    def end(self) -> None:
        """Bring everything to the disk and let go of the directory."""
        if self._ended:
            return
        self._ended = True
        left = self.queue.end()
        self._unsynced += [segment for segment in left if segment.path is not None and not segment.is_empty]
        calls = {segment.path for segment in left if not segment.is_empty}
        others = any(producer_of(path.name) == self.producer for path in self._paths() - {s.path for s in left})
        for segment in left:
            # A mark that the ledger knows this life stays as long as its windows: they may have been begun before.
            marks = segment.is_empty and segment.end > HEADER_SIZE and (others or bool(calls))
            if segment.path is None or (segment.is_empty and not marks):
                self.drop([segment])
            else:
                with suppress(OSError):
                    segment.trim()
        self.sync()
        for segment in self._unsynced:
            segment.close()
        self._unsynced.clear()
        self._release()
