"""What an earlier life left behind: from its files to its windows, in order, each with its identity.

Rules:
1. What the headers and marks say decides; the names only where they say nothing.
2. Of a window that was written anew only the newest whole file and what follows it count; the rest is left over.
3. A window whose first sequence is nowhere noted, or only as that of the one before it, follows that one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

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
    payload_at,
)
from tracker_daemon.journal.windows import OPEN, SEALED, Damage, Window, written

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from uuid import UUID

    from tracker_daemon.journal.segment import Written

_END_SIZE: Final = len(encode_mark(End(0, 0, 0)))


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
        closed: it noted that it had ended cleanly.
    """

    producer: UUID
    lane: int
    epoch: int
    database: int
    windows: list[Window]
    begun_at: int
    leftover: list[Path] = field(default_factory=list)
    torn: int = 0
    closed: bool = False

    @property
    def applied_at(self) -> int:
        """When the last of its windows was noted as applied, seconds since 1970; 0: there is one that was not.

        One without calls need not be. Reads those that are not.

        Raises:
            Damage, OSError: see `Window.read`.
        """
        noted = [window.applied_at for window in self.windows if window.applied_at or next(window.read(), None)]
        return max(noted) if noted and all(noted) else 0


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
    def bears_its_sequence(self) -> bool:
        """Whether its name tells what its header does, which may never have been on the disk."""
        return self.part == 0 and self.first == self.file.first

    @property
    def order(self) -> tuple[bool, int]:
        return (self.part is None, self.number if self.part is None else self.part)


def life_of(producer: UUID, paths: Iterable[Path], *, copy: bool = False) -> Life:
    """Return the windows in *paths*, all of one producer; *copy*: they may be written to meanwhile.

    A file of zeros was only being made, and is passed over.

    A window whose first sequence is nowhere noted, or only as that of the one before, follows that one; to know how
    many batches that has it is read.

    Raises:
        Damage: a file has no readable header, or another's name.
        OSError: a file cannot be read.
    """
    by_window: dict[int, list[_Found]] = {}
    blank: list[Path] = []
    life = Life(producer, 0, 0, 0, [], 2**63)
    for path in sorted(paths):
        try:
            file = written(path, copy=copy)
        except Blank:
            life.leftover.append(path)
            blank.append(path)
            life.torn += len(path.read_bytes().rstrip(b"\0"))
            continue
        try:
            header = file.header
            life.closed |= file.closed
            life.lane, life.begun_at = header.lane, min(life.begun_at, header.created_at)
            if header.epoch >= life.epoch:
                life.epoch, life.database = header.epoch, header.database
            life.epoch = max(life.epoch, file.registered)
            for mark in _marks(file):
                if mark.epoch >= life.epoch:
                    life.epoch, life.database = mark.epoch, mark.database
            sealed = SEALED.fullmatch(path.name)
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
    everything = [found for files in by_window.values() for found in files]
    _check_names(producer, everything)
    _check_blank(blank, everything)
    for number in sorted(by_window):
        found_files = sorted(by_window[number], key=lambda found: found.order)
        counting = _counting(found_files)
        life.leftover += [found.path for found in found_files if found not in counting]
        life.windows.append(_window(life, counting))
    return life


def _check_names(producer: UUID, files: list[_Found]) -> None:
    """See that each file bears the name that it was given, and is there once.

    Raises:
        Damage: one does not: somebody has copied or renamed it, and it would count twice.
    """
    numbers: dict[int, _Found] = {}
    for found in files:
        header, named = found.file.header, OPEN.fullmatch(found.path.name)
        # A sequence in the header that was never on the disk may be an older one.
        sequence = found.file.first if found.file.synced_at else 0
        if header.producer != producer or (named and int(named[2]) != found.number):
            raise Damage(found.path, 0, f"it is file {found.number} of {header.producer}, under another's name")
        if found.part is not None and sequence and sequence != found.first:
            raise Damage(found.path, 0, f"it begins with sequence {sequence}, under another's name")
        if (other := numbers.setdefault(found.number, found)) is not found:
            copy, original = (other, found) if found.bears_its_sequence else (found, other)
            raise Damage(copy.path, 0, f"it is the same file as {original.path.name}")


def _check_blank(paths: list[Path], files: list[_Found]) -> None:
    """See that what has no header was never on the disk: files go there in order.

    Raises:
        Damage: a later one of the life is there.
    """
    synced = max((found.first for found in files if found.file.synced_at), default=0)
    anew = {found.first for found in files if found.whole}
    for path in paths:
        sealed = SEALED.fullmatch(path.name)
        if sealed and int(sealed[2]) < synced and int(sealed[2]) not in anew:
            raise Damage(path, 0, "no header, where there was one: a later file was on the disk")


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
    before = life.windows[-1] if life.windows else None
    if before is not None and first <= before.first:  # not known, or as it is if the one before was never sealed
        first = before.first + batches_of(before)
    first = first or 1
    header = files[0].file.header
    return Window(
        life.producer,
        life.lane,
        first,
        end.batches if end else None,
        header.max_batch_size,
        header.create_missing,
        [found.path for found in files],
        calls=end.calls if end else 0,
        applied_at=min(found.file.applied_at for found in files),
    )


def batches_of(window: Window) -> int:
    """Return how many batches *window* is cut into; reads it if need be."""
    if window.batches is None:
        window.batches = sum(1 for _ in window.load().batches(window.max_batch_size))
    return window.batches
