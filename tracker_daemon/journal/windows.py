"""The windows that stand in files: which they are, and what is in them.

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
    END,
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
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.generation import Record

SUFFIX: Final = ".journal"
_SEALED: Final = re.compile(r"([0-9a-f]{32})-(\d{16})-(\d{4,})\.journal")
_OPEN: Final = re.compile(r"([0-9a-f]{32})-open-(\d{8})\.journal")
_END_SIZE: Final = len(encode_mark(End(0, 0, 0)))


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
    match = _SEALED.fullmatch(name) or _OPEN.fullmatch(name)
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
        at: when it was last written, seconds since 1970.
        calls, threads: what it holds, where that is known.
    """

    producer: UUID
    lane: int
    first: int
    batches: int | None
    max_batch_size: int
    create_missing: bool
    paths: list[Path]
    at: float
    calls: int = 0
    threads: int = 0
    torn: int = field(default=0, compare=False)
    """Bytes that were passed over when it was read."""
    damage: list[Damage] = field(default_factory=list, compare=False)
    """What was passed over when it was read although it had been on the disk."""

    @property
    def last(self) -> int | None:
        """The sequence of its last batch, where known."""
        return None if self.batches is None else self.first + self.batches - 1

    def read(self, *, skip_damage: bool = False) -> Iterator[Record | Sum]:
        """Yield what is in it, in order.

        Raises:
            Damage: and *skip_damage* is not set: then it goes on with the next good record.
            OSError: a file cannot be read.
        """
        self.torn = 0
        self.damage.clear()
        for path in self.paths:
            file = _written(path)
            try:
                yield from self._records(file, skip_damage=skip_damage)
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
        return generation

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

    def _records(self, file: Written, *, skip_damage: bool) -> Iterator[Record | Sum]:
        offset = HEADER_SIZE
        while True:
            try:
                payload = payload_at(file.map, offset, file.size)
                item = None if payload is None else decode(payload)
            except Damaged as damaged:
                if offset < file.synced_at and not skip_damage:
                    raise Damage(file.path, offset, str(damaged)) from damaged
                item, payload = None, None
            if payload is None:
                rest = file.map[offset : file.size]
                torn = bool(rest.strip(b"\0"))
                if offset < file.synced_at and not skip_damage:
                    fault = "bytes that are no record" if torn else "nothing, where records were"
                    raise Damage(file.path, offset, fault)
                # The disk may have kept what came later, and lost this.
                written = min(file.size, offset + len(rest.rstrip(b"\0")) + _END_SIZE)  # a mark may end in zeros
                found = find_record(file.map, offset + 1, written) if torn else None
                passed = len(rest[: None if found is None else found - offset].rstrip(b"\0"))
                if offset < file.synced_at:
                    self.damage.append(Damage(file.path, offset, f"{passed} bytes that are no record"))
                else:
                    self.torn += passed
                if found is None:
                    return
                offset = found
                continue
            offset += FRAME.size + len(payload)
            if isinstance(item, End):
                return
            if item is not None and not isinstance(item, Opened):
                yield item


def _written(path: Path) -> Written:
    try:
        return Written(path)
    except Blank:
        raise
    except Damaged as damaged:
        raise Damage(path, 0, str(damaged)) from damaged


def _is_whole(file: Written, end: End) -> bool:
    """Whether a file written anew has all the sums that its end tells of."""
    offset, calls = HEADER_SIZE, 0
    try:
        while (payload := payload_at(file.map, offset, file.size)) is not None:
            item = decode(payload)
            if isinstance(item, End):
                return item == end and calls == end.calls
            if isinstance(item, Sum):
                calls += item.delta.calls
            offset += FRAME.size + len(payload)
    except Damaged:
        pass
    return False


def _end(file: Written) -> End | None:
    """Return the mark at the end of a file that was sealed."""
    offset = file.size - _END_SIZE
    if offset < HEADER_SIZE:
        return None
    try:
        payload = payload_at(file.map, offset, file.size)
        if payload is None or payload[0] != END:
            return None
        item = decode(payload)
    except Damaged:
        return None
    return item if isinstance(item, End) else None


@dataclass(slots=True)
class Life:
    """What one producer left behind.

    Attributes:
        producer, lane: whose it is.
        epoch: the highest in the ledger that its files tell of; 0: it may never have been registered.
        windows: in order.
        begun_at: nanoseconds since 1970.
        leftover: files without a content that counts: never on the disk, or replaced by one written anew.
        torn: bytes in those that a loss of power has left without a header.
    """

    producer: UUID
    lane: int
    epoch: int
    database: int
    windows: list[Window]
    begun_at: int
    leftover: list[Path] = field(default_factory=list)
    torn: int = 0


@dataclass(slots=True)
class _Found:
    path: Path
    number: int
    window: int
    part: int | None
    first: int
    file: Written
    end: End | None
    anew: bool
    whole: bool

    @property
    def order(self) -> tuple[bool, int]:
        return (self.part is None, self.number if self.part is None else self.part)


def life_of(producer: UUID, paths: Iterable[Path]) -> Life:
    """Return the windows in *paths*, all of one producer. A file of zeros was only being made, and is passed over.

    A window whose first sequence is nowhere noted follows the one before it; to know how many batches that has it is
    read.

    Raises:
        Damage: a file has no readable header.
        OSError: a file cannot be read.
    """
    by_window: dict[int, list[_Found]] = {}
    life = Life(producer, 0, 0, 0, [], 2**63)
    for path in sorted(paths):
        try:
            file = _written(path)
        except Blank:
            life.leftover.append(path)
            life.torn += len(path.read_bytes().rstrip(b"\0"))
            continue
        try:
            header = file.header
            life.lane, life.begun_at = header.lane, min(life.begun_at, header.created_at)
            if header.epoch >= life.epoch:
                life.epoch, life.database = header.epoch, header.database
            for mark in _marks(file):
                if mark.epoch >= life.epoch:
                    life.epoch, life.database = mark.epoch, mark.database
            sealed = _SEALED.fullmatch(path.name)
            end = _end(file)
            found = _Found(
                path,
                header.number,
                header.window,
                int(sealed[3]) if sealed else None,
                int(sealed[2]) if sealed else file.first,
                file,
                end,
                header.anew,
                header.anew and end is not None and _is_whole(file, end),
            )
            by_window.setdefault(header.window, []).append(found)
        finally:
            file.close()
    for number in sorted(by_window):
        found_files = sorted(by_window[number], key=lambda found: found.order)
        counting = _counting(found_files)
        life.leftover += [found.path for found in found_files if found not in counting]
        life.windows.append(_window(life, counting))
    return life


def _counting(files: list[_Found]) -> list[_Found]:
    """Return those of a window's files that hold it: the newest whole one written anew and what follows, or all."""
    newest = max((found.number for found in files if found.whole), default=0)
    counting = [found for found in files if found.number >= newest]
    oldest = min(found.number for found in counting)
    # One that is not whole has everything before it still beside it, unless nothing is beside it.
    counting = [found for found in counting if found.whole or not found.anew or found.number == oldest]
    return sorted(counting, key=lambda found: (found.number != newest, found.order))


def _marks(file: Written) -> Iterator[Opened]:
    # Marks of an opening stand in the first file of a life only; later headers carry the epoch.
    if file.header.epoch:
        return
    offset = HEADER_SIZE
    while True:
        try:
            payload = payload_at(file.map, offset, file.size)
            item = None if payload is None else decode(payload)
        except Damaged:
            return
        if payload is None:
            return
        if isinstance(item, Opened):
            yield item
        offset += FRAME.size + len(payload)


def _window(life: Life, files: list[_Found]) -> Window:
    end = next((found.end for found in reversed(files) if found.end is not None and found.end.batches), None)
    first = next((found.first for found in files if found.first), 0) or (end.first if end else 0)
    if not first:
        first = 1
        if life.windows:
            before = life.windows[-1]
            first = before.first + batches_of(before)
    header = files[0].file.header
    return Window(
        life.producer,
        life.lane,
        first,
        end.batches if end else None,
        header.max_batch_size,
        header.create_missing,
        [found.path for found in files],
        max(found.path.stat().st_mtime for found in files),
        calls=end.calls if end else 0,
    )


def batches_of(window: Window) -> int:
    """Return how many batches *window* is cut into; reads it if need be."""
    if window.batches is None:
        window.batches = sum(1 for _ in window.load().batches(window.max_batch_size))
    return window.batches


def take(generation: Generation, item: Record | Sum) -> None:
    """Add what was read to *generation*."""
    if isinstance(item, Sum):
        generation.put(item.delta, late=item.late, more=item.more)
    else:
        generation.fold(item)
