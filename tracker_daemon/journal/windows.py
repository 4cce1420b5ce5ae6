"""The windows that stand in files: how the files are named, and what is in them.

Rules:
1. The ledger decides what was applied; a name only says which batches a window holds.
2. A window's files are read in the order of their parts, or, not sealed yet, of their numbers. A file written anew
   takes the place of those with a lower number once it is whole; until then it is passed over.
3. What was on the disk must be whole: damage there stops the reading. After it a record may be torn by a loss of power;
   it is passed over and counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import UUID

from tracker_daemon.generation import Generation
from tracker_daemon.journal.records import (
    FRAME,
    HEADER_SIZE,
    Blank,
    Damaged,
    End,
    Opened,
    Sum,
    decode,
    encode_mark,
    find_record,
    payload_at,
)
from tracker_daemon.journal.segment import Written

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.generation import Record

SUFFIX: Final = ".journal"
_END_SIZE: Final = len(encode_mark(End(0, 0, 0)))
SEALED: Final = re.compile(r"([0-9a-f]{32})-(\d{16})-(\d{4,})\.journal")
OPEN: Final = re.compile(r"([0-9a-f]{32})-open-(\d{8})\.journal")


def sealed_name(producer: UUID, first: int, part: int) -> str:
    """Return the name of a file of a sealed window: the identity of its first batch, and which part it is.

    A file written anew has its number there: no part has one as high.
    """
    return f"{producer.hex}-{first:016d}-{part:04d}{SUFFIX}"


def open_name(producer: UUID, number: int) -> str:
    """Return the name of a file of the window that is open."""
    return f"{producer.hex}-open-{number:08d}{SUFFIX}"


def producer_of(name: str) -> UUID | None:
    """Return whose file *name* is; `None`: not a journal's file."""
    match = SEALED.fullmatch(name) or OPEN.fullmatch(name)
    return UUID(match[1]) if match else None


class Damage(Exception):  # noqa: N818 - says what is the case
    """A file that was on the disk is not whole. Nothing of its window, nor of what follows it, is applied."""

    def __init__(self, path: Path, offset: int, fault: str) -> None:
        super().__init__(path, offset, fault)
        self.path, self.offset, self.fault = path, offset, fault

    def __str__(self) -> str:
        return f"{self.path} is damaged at byte {self.offset}: {self.fault}"


@dataclass(slots=True)
class Window:
    """A sealed window in files.

    Attributes:
        producer, lane: whose it is.
        first: the sequence of its first batch.
        batches: how many batches it is cut into; `None` where only reading it tells.
        max_batch_size, create_missing: how it is cut.
        paths: its files in order.
        calls, threads: what it holds, where that is known.
        counted: `calls` is what must be read: this process has sealed it.
        applied_at: when it was noted that all of it is applied, seconds since 1970; 0: it was not.
        kept_since: the same by the clock of this process that is never set, once it is kept.
    """

    producer: UUID
    lane: int
    first: int
    batches: int | None
    max_batch_size: int
    create_missing: bool
    paths: list[Path]
    calls: int = 0
    threads: int = 0
    counted: bool = False
    applied_at: int = 0
    kept_since: float = field(default=0.0, compare=False)
    torn: int = field(default=0, compare=False)
    """Bytes that were passed over when it was read."""

    @property
    def last(self) -> int | None:
        """The sequence of its last batch, where known."""
        return None if self.batches is None else self.first + self.batches - 1

    def read(self) -> Iterator[Record | Sum]:
        """Yield what is in it, in order.

        Raises:
            Damage: what was on the disk is not whole.
            OSError: a file cannot be read.
        """
        self.torn = 0
        for path in self.paths:
            file = written(path)
            try:
                yield from self._records(file)
            finally:
                file.close()

    def load(self) -> Generation:
        """Return what is in it.

        Raises:
            Damage, OSError: see `read`.
        """
        generation = Generation(create_missing=self.create_missing)
        for item in self.read():
            take(generation, item)
        self.check(generation)
        return generation

    def check(self, generation: Generation) -> None:
        """See whether what was read is all that this process sealed there.

        Of an earlier life's window a loss of power may have taken a part that nothing tells of.

        Raises:
            Damage: it is not.
        """
        if self.counted and generation.calls != self.calls:
            fault = f"{generation.calls} calls where {self.calls} were sealed"
            raise Damage(self.paths[-1], HEADER_SIZE, fault)

    def of(self, thread_id: str) -> list[ThreadDelta]:
        """Return what it holds of one thread, in order. Reads the files; nothing where they are gone."""
        generation = Generation(create_missing=self.create_missing)
        try:
            for item in self.read():
                if (item.delta.thread_id if isinstance(item, Sum) else item[0]) == thread_id:
                    take(generation, item)
        except (OSError, Damage):
            return []
        return list(generation.of(thread_id))

    def _records(self, file: Written) -> Iterator[Record | Sum]:
        for piece in pieces(file):
            if isinstance(piece, Lost):
                if piece.synced:
                    raise Damage(file.path, piece.offset, piece.fault)
                self.torn += piece.size
            elif not isinstance(piece, Opened):
                yield piece


@dataclass(frozen=True, slots=True)
class Lost:
    """Bytes of a file that are no record.

    Attributes:
        offset, size: where, and how many; zeros at their end do not count.
        fault: what is wrong there.
        synced: they were on the disk: this is damage, not what a loss of power leaves.
    """

    offset: int
    size: int
    fault: str
    synced: bool


def pieces(file: Written) -> Iterator[Record | Sum | Opened | Lost]:
    """Yield what is in a file up to its end, or to its mark."""
    offset = HEADER_SIZE
    while True:
        fault, payload = "", None
        try:
            payload = payload_at(file.map, offset, file.size)
            item = None if payload is None else decode(payload)
        except Damaged as damaged:
            fault, item = str(damaged), None
        if payload is not None and item is not None:
            offset += FRAME.size + len(payload)
            if isinstance(item, End):
                return
            yield item
            continue
        rest, synced = file.map[offset : file.size], offset < file.synced_at
        torn = bool(rest.strip(b"\0"))
        # The disk may have kept what came later, and lost this. A mark may end in zeros.
        end = min(file.size, offset + len(rest.rstrip(b"\0")) + _END_SIZE)
        found = find_record(file.map, offset + 1, end) if torn else None
        if torn or synced:
            size = len(rest[: None if found is None else found - offset].rstrip(b"\0"))
            fault = fault or ("bytes that are no record" if torn else "nothing, where records were")
            yield Lost(offset, size, fault, synced)
        if found is None:
            return
        offset = found


def written(path: Path, *, copy: bool = False) -> Written:
    """Open a file of the journal; its header's faults are `Blank` or `Damage`."""
    try:
        return Written(path, copy=copy)
    except Blank:
        raise
    except Damaged as damaged:
        raise Damage(path, 0, str(damaged)) from damaged


def take(generation: Generation, item: Record | Sum) -> None:
    """Add what was read to *generation*."""
    if isinstance(item, Sum):
        generation.put(item.delta, late=item.late, more=item.more)
    else:
        generation.fold(item)
