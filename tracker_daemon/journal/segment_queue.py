"""The queue of calls, when it is the journal: a call is written once, and the worker reads it from there.

Rules:
1. A record is in the operating system's hands before the call returns.
2. Which calls belong to which window is decided by the files alone: a window ends where its last file was frozen.
   It is in files or in memory as a whole: where a file follows what is in memory, or no file can be had any more, the
   next window begins, whoever needed room.
3. Callers take turns when a file is full; the worker takes that lock for a few instructions and never for I/O.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from threading import RLock
from typing import TYPE_CHECKING, Any, Final

from tracker_daemon.journal import records
from tracker_daemon.journal.records import FRAME, Opened
from tracker_daemon.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sized

    from tracker_daemon.generation import Record
    from tracker_daemon.journal.segment import Segment

_KNOWN_AGENTS: Final = 4_096


class SegmentQueue(deque[None]):
    """Holds an item for each call waiting, so that its length is theirs; the calls are in the segments.

    Args:
        make: returns a new segment for a window with room for so many bytes. Must not raise.
        placed: told of a segment, of whatever window it is now, before it is written to. Must not raise.
    """

    def __init__(self, make: Callable[[int, int], Segment], placed: Callable[[Segment], object]) -> None:
        super().__init__()
        self._make, self._placed = make, placed
        self._count = super().append
        self.turn = RLock()
        """Held while a segment is made and put behind the others."""
        self._chain: deque[Segment] = deque()
        self._read: list[Segment] = []
        self._segment: Segment | None = None
        self._write: Callable[[bytes], object] = _nowhere
        self._window = 1
        self.reading = 1
        """The number of the window that is read; that of the newest segment may be higher."""
        self._passed: list[Segment] = []
        self._stop: Segment | None = None
        self._agents: dict[str | None, str | None] = {}

    @property
    def on_disk(self) -> bool:
        """Whether calls go to a file now."""
        return self._segment is not None and self._segment.path is not None

    # -- the calls' side ---------------------------------------------------------------------------

    def put(self, record: Record) -> None:
        """Write one call."""
        data = records.encode(record)
        try:
            self._write(data)
        except ValueError:
            self._put(data)
        self._count(None)

    def _put(self, data: bytes) -> None:
        while True:
            write = self._write
            try:
                write(data)
            except ValueError:  # full, or frozen meanwhile
                self._roll(write, len(data))
            else:
                return

    def _roll(self, seen: Callable[[bytes], object], size: int) -> None:
        with self.turn:
            if self._write is seen:
                segment = self._make(self._window, size)
                # A signal handler that called in between has brought a segment of its own: this one follows it.
                self._install(segment)

    def _install(self, segment: Segment, *, cut: bool = False) -> None:
        chain = self._chain
        while True:
            last = chain[-1] if chain else None
            self._place(segment, last, cut=cut)
            # For a signal handler this and the next step are one: nothing is called in between.
            if (chain[-1] if chain else None) is last:
                chain.append(segment)
                break
        self._segment, self._write = segment, segment.write
        # All before the last: a signal handler that called in between has added one behind this one, or before it.
        self._freeze_old()

    def _place(self, segment: Segment, last: Segment | None, *, cut: bool) -> None:
        window = segment.header.window
        if last is not None:
            ends = cut or (last.path is None) != (segment.path is None)
            window = max(window, last.header.window + ends)
        if window != segment.header.window:
            segment.renumber(window)
        self._window = max(self._window, window)
        self._placed(segment)

    def _freeze_old(self) -> None:
        # A copy: another thread may run amid `tuple(deque)`, where the collector may.
        chain = self._chain.copy()
        for _ in range(len(chain) - 1):
            chain.popleft().freeze()

    # -- the worker's side -------------------------------------------------------------------------

    def drain(self, fold_all: Callable[[Iterable[Record]], object], limit: int, held: Sized, most: int) -> int:
        """Read at most *limit* calls of this window, until *held* has *most* items; return how many."""
        count, chain = 0, self._chain
        while chain and count < limit:
            segment = chain[0]
            if segment.frozen_at is None and len(chain) > 1:
                with self.turn:  # it is just being done; or an asynchronous exception came in between
                    self._freeze_old()
            frozen = segment.frozen_at is not None  # looked at first: what is written later is read the next time
            count += self._drain_one(segment, fold_all, limit - count, held, most)
            if not frozen or segment.read_to < segment.end or not self._may_follow(segment):
                break
            self._read.append(chain.popleft())
        for _ in range(min(count, len(self))):
            self.popleft()
        if not count and len(self):
            self._recount()
        return count

    def _may_follow(self, segment: Segment) -> bool:
        """Whether the segment after the first one belongs to the same window, and may be read."""
        if len(self._chain) == 1:
            return False
        following = self._chain[1]
        return following is not self._stop and following.header.window == segment.header.window

    def _drain_one(
        self, segment: Segment, fold_all: Callable[[Iterable[Record]], object], limit: int, held: Sized, most: int
    ) -> int:
        agents, count = self._agents, 0
        if len(agents) > _KNOWN_AGENTS:
            agents.clear()

        def taken() -> Iterator[Record]:
            nonlocal count
            data, end, offset = segment.map, segment.end, segment.read_to
            while offset + FRAME.size <= end and count < limit and len(held) < most:
                length = FRAME.unpack_from(data, offset)[0]
                if not length:
                    break  # it is being frozen: the position is no longer the end
                offset += FRAME.size
                record = records.decode(data[offset : offset + length])
                offset += length
                if isinstance(record, tuple):
                    if isinstance(record[2], int):
                        # One string for all turns of an agent, as the door has it.
                        record = (record[0], agents.setdefault(record[1], record[1]), *record[2:])
                    yield record
                    count += 1
                segment.read_to = offset

        fold_all(taken())
        return count

    def _recount(self) -> None:
        # A call that was read before its caller counted it. Those that are counted from here on are not meant.
        counted = len(self)
        if not self.waiting():
            for _ in range(counted):
                self.popleft()

    @property
    def folding(self) -> Waiting:
        """See `Calls.folding`: a finalizer that looks in amid the fold finds these missing, until it is done."""
        return Waiting()

    @property
    def unfolded(self) -> int:
        """How many calls are not counted yet as folded: a call that is written may not have been counted here."""
        return len(self.waiting())

    def waiting(self) -> Waiting:
        """Return the calls that wait, in order. From any thread: what is read meanwhile may be among them."""
        found: list[Any] = []
        for segment in self._chain.copy():
            with suppress(ValueError):  # read and let go of meanwhile
                offset, end = segment.read_to, segment.end
                while offset + FRAME.size <= end and (length := FRAME.unpack_from(segment.map, offset)[0]):
                    offset += FRAME.size
                    record = records.decode(segment.map[offset : offset + length])
                    offset += length
                    if isinstance(record, tuple):
                        found += record
        return Waiting(found)

    def prepare_cut(self) -> Segment:
        """Return a segment for the next window. Does I/O: before anything is locked."""
        return self._make(self._window + 1, 0)

    @property
    def is_cut(self) -> bool:
        """Whether the window that is read has ended: calls go to a later one."""
        try:
            return self._chain[-1].header.window > self.reading
        except IndexError:
            return False

    def cut(self, following: Segment | None) -> None:
        """End the window, if that was not done: calls go to *following* from here on."""
        with self.turn:
            if following is not None:
                self._install(following, cut=not self.is_cut)

    def prepare_within(self) -> Segment:
        """Return a segment for this window. Does I/O: before anything is locked."""
        return self._make(self._window, 0)

    def cut_within(self, following: Segment) -> bool:
        """Go on with *following* in the same window; `drain` stops before it, until `put_back`.

        Return `False`, and do nothing, if a caller has brought a segment since it was made: that one is to be read
        after *following*, and what is written anew in place of what was read would not come before it. Nor if that has
        ended the window.
        """
        with self.turn:
            if self._segment is None or self.is_cut or self._segment.header.number > following.header.number:
                return False
            self._stop = following
            self._install(following)
        return True

    def put_back(self, segments: list[Segment]) -> None:
        """Have *segments*, which are read, in the place of those that `take_read` gave."""
        self._read = [*segments, *self._read]
        self._stop = None

    def take_read(self) -> list[Segment]:
        """Return the segments of the window that were read to their end."""
        chain = self._chain
        while len(chain) > 1 and chain[0].header.window == self.reading:
            frozen_at = chain[0].frozen_at
            if frozen_at is None or chain[0].read_to < frozen_at:
                break
            self._read.append(chain.popleft())
        read, self._read = self._read, []
        return read

    def take_window(self) -> list[Segment]:
        """Return the segments of the window, which was cut and is read to its end, and go on to the next one."""
        read = self.take_read()
        if self._chain:
            self.reading = self._chain[0].header.window
        return read

    def pass_over(self) -> None:
        """Go on to the next window; the segments of this one are given back at the end."""
        self._passed += self.take_window()

    def note(self, opened: Opened) -> None:
        """Write a mark among the calls."""
        self._put(records.encode_mark(opened))

    @property
    def segments(self) -> list[Segment]:
        """Every segment of the open window, and of those after it, where it has ended."""
        return [*self._passed, *self._read, *self._chain]

    @property
    def of_window(self) -> list[Segment]:
        """Every segment of the open window."""
        return [*self._read, *(each for each in self._chain.copy() if each.header.window == self.reading)]

    def end(self) -> list[Segment]:
        """Stop: freeze and return what is left. A call that comes later goes to memory alone."""
        with self.turn:
            self._segment, self._write = None, _nowhere
            for segment in self._chain:
                segment.freeze()
        left, self._read, self._passed = self.segments, [], []
        self._chain.clear()
        self.reading = self._window
        self.clear()
        return left


def _nowhere(_: bytes) -> None:
    raise ValueError("no segment yet")
