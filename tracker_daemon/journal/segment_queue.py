"""The queue of calls, when it is the journal: a call is written once, and the worker reads it from there.

Rules:
1. A record is in the operating system's hands before the call returns.
2. Which calls belong to which window is decided by the files alone: a window ends where its last file was frozen.
3. Callers take turns when a file is full; the worker takes that lock for a few instructions and never for I/O.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from threading import RLock
from typing import TYPE_CHECKING, Final

from tracker_daemon.journal import records
from tracker_daemon.journal.records import FRAME, Opened

if TYPE_CHECKING:
    from collections.abc import Callable, Sized

    from tracker_daemon.generation import Record
    from tracker_daemon.journal.segment import Segment

_KNOWN_AGENTS: Final = 4_096


class SegmentQueue(deque[None]):
    """Holds an item for each call waiting, so that its length is theirs; the calls are in the segments.

    Args:
        make: returns a new segment for a window with room for so many bytes. Must not raise.
    """

    def __init__(self, make: Callable[[int, int], Segment]) -> None:
        super().__init__()
        self._make = make
        self._count = super().append
        self.turn = RLock()
        """Held while a segment is made and put behind the others."""
        self._chain: deque[Segment] = deque()
        self._read: list[Segment] = []
        self._segment: Segment | None = None
        self._write: Callable[[bytes], object] = _nowhere
        self._window = 1
        self._stop: Segment | None = None
        self._agents: dict[str | None, str | None] = {}

    @property
    def on_disk(self) -> bool:
        """Whether calls go to a file now."""
        return self._segment is not None and self._segment.path is not None

    # -- the calls' side ---------------------------------------------------------------------------

    def append(self, record: Record) -> None:  # type: ignore[override]  # what is counted and what is written differ
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

    def _install(self, segment: Segment) -> None:
        self._chain.append(segment)
        self._segment, self._write = segment, segment.write
        # All before the last: a signal handler that called in between has added one behind this one, or before it.
        self._freeze_old()

    def _freeze_old(self) -> None:
        for old in tuple(self._chain)[:-1]:
            old.freeze()

    # -- the worker's side -------------------------------------------------------------------------

    def drain(self, fold: Callable[[Record], object], limit: int, held: Sized, most: int) -> int:
        """Read at most *limit* calls of this window, until *held* has *most* items; return how many."""
        count, chain = 0, self._chain
        while chain and count < limit:
            segment = chain[0]
            if segment.frozen_at is None and len(chain) > 1:
                with self.turn:  # it is just being done; or an asynchronous exception came in between
                    self._freeze_old()
            frozen = segment.frozen_at is not None  # looked at first: what is written later is read the next time
            count += self._drain_one(segment, fold, limit - count, held, most)
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

    def _drain_one(self, segment: Segment, fold: Callable[[Record], object], limit: int, held: Sized, most: int) -> int:
        data, end, agents, offset, count = segment.map, segment.end, self._agents, segment.read_to, 0
        if len(agents) > _KNOWN_AGENTS:
            agents.clear()
        while offset + FRAME.size <= end and count < limit and len(held) < most:
            length = FRAME.unpack_from(data, offset)[0]
            if not length:
                break  # it is being frozen: the position is no longer the end
            offset += FRAME.size
            record = records.decode(data[offset : offset + length])
            offset += length
            if isinstance(record, tuple):
                if len(record) == 5:
                    # One string for all turns of an agent, as the door has it.
                    record = (record[0], agents.setdefault(record[1], record[1]), *record[2:])
                fold(record)
                count += 1
            segment.read_to = offset
        return count

    def _recount(self) -> None:
        # A call that was read before its caller counted it. Those that are counted from here on are not meant.
        counted = len(self)
        if not self.waiting():
            for _ in range(counted):
                self.popleft()

    def waiting(self) -> list[Record]:
        """Return the calls that wait, in order. From any thread: what is read meanwhile may be among them."""
        found: list[Record] = []
        for segment in tuple(self._chain):
            with suppress(ValueError):  # read and let go of meanwhile
                offset, end = segment.read_to, segment.end
                while offset + FRAME.size <= end and (length := FRAME.unpack_from(segment.map, offset)[0]):
                    offset += FRAME.size
                    record = records.decode(segment.map[offset : offset + length])
                    offset += length
                    if isinstance(record, tuple):
                        found.append(record)
        return found

    def prepare_cut(self) -> Segment:
        """Return a segment for the next window. Does I/O: before anything is locked."""
        return self._make(self._window + 1, 0)

    def cut(self, following: Segment) -> None:
        """End the window: calls go to *following* from here on."""
        with self.turn:
            self._window += 1
            self._install(following)

    def prepare_within(self) -> Segment:
        """Return a segment for this window. Does I/O: before anything is locked."""
        return self._make(self._window, 0)

    def cut_within(self, following: Segment) -> bool:
        """Go on with *following* in the same window; `drain` stops before it, until `put_back`.

        Return `False`, and do nothing, if a caller has brought a segment since it was made: that one is to be read
        after *following*, and what is written anew in place of what was read would not come before it.
        """
        with self.turn:
            if self._segment is None or self._segment.header.number > following.header.number:
                return False
            self._stop = following
            self._install(following)
        return True

    def put_back(self, segments: list[Segment]) -> None:
        """Have *segments*, which are read, in the place of those that `take_read` gave."""
        self._read = [*segments, *self._read]
        self._stop = None

    def take_read(self) -> list[Segment]:
        """Return the segments that were read to their end since the last time: those of the window that was cut."""
        chain = self._chain
        while len(chain) > 1 and chain[0].frozen_at is not None and chain[0].read_to >= chain[0].frozen_at:
            self._read.append(chain.popleft())
        read, self._read = self._read, []
        return read

    def note(self, opened: Opened) -> None:
        """Write a mark among the calls."""
        self._put(records.encode_mark(opened))

    @property
    def segments(self) -> list[Segment]:
        """Every segment of the open window, and of one that is just being cut."""
        return [*self._read, *self._chain]

    def end(self) -> list[Segment]:
        """Stop: freeze and return what is left. A call that comes later goes to memory alone."""
        with self.turn:
            self._segment, self._write = None, _nowhere
            for segment in self._chain:
                segment.freeze()
        left, self._read = [*self._read, *self._chain], []
        self._chain.clear()
        self.clear()
        return left


def _nowhere(_: bytes) -> None:
    raise ValueError("no segment yet")
