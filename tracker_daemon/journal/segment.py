"""One file of the journal, mapped into memory; or, when no file can be had, the same in memory alone.

Rules:
1. The file is allocated before it is mapped: a hole in it would be a SIGBUS, which kills the process, when the disk is
   full.
2. `write` is one C function that copies and moves the position while it holds the interpreter: of several threads, or
   a signal handler in the middle of one, each gets a place of its own, and no lock is taken.
3. Once frozen nobody can write: `write` raises `ValueError`, as it does when the file is full.
4. What is written is in the operating system's hands; after `sync` it is on the disk.
"""

from __future__ import annotations

import os
from dataclasses import replace
from mmap import ACCESS_READ, MAP_SHARED, PROT_READ, PROT_WRITE, mmap
from typing import TYPE_CHECKING, Any

from tracker_daemon.journal.records import (
    APPLIED_AT,
    FIRST_AT,
    FRAME,
    HEADER_SIZE,
    OPENED,
    REGISTERED_AT,
    SYNCED_AT,
    WORD,
    Blank,
    Damaged,
    Header,
    applied_word,
    word,
    word_value,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Segment:
    """A file that is written, or was.

    Attributes:
        header: what it says of itself.
        path: where it is; `None` in memory alone.
        write: appends bytes, all or none; `ValueError` when they do not fit or the segment is frozen.
        size: bytes allocated.
        frozen_at: where the records end, once frozen.
        synced_at: up to where it is on the disk.
        first: the sequence of the window's first batch; 0: not known yet.
        read_to: up to where the worker has read it.
    """

    def __init__(self, header: Header, size: int, path: Path | None) -> None:
        self.header, self.path, self.size = header, path, size
        self.frozen_at: int | None = None
        self.synced_at = self.first = 0
        self.read_to = HEADER_SIZE
        self._file = -1
        if path is None:
            self.map = mmap(-1, size)
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o600)
            try:
                os.posix_fallocate(self._file, 0, size)
                self.map = mmap(self._file, size, MAP_SHARED, PROT_READ | PROT_WRITE)
            except BaseException:
                os.close(self._file)
                path.unlink()
                raise
        data = header.encode()
        self.map[: len(data)] = data
        self.map.seek(HEADER_SIZE)
        self.write: Callable[[bytes], int] = self.map.write

    @property
    def end(self) -> int:
        """Up to where records may be read now."""
        return self.map.tell() if self.frozen_at is None else self.frozen_at

    @property
    def is_empty(self) -> bool:
        """Whether no call stands in it: nothing, or marks alone."""
        offset = HEADER_SIZE
        while offset + FRAME.size <= self.end and (length := FRAME.unpack_from(self.map, offset)[0]):
            if self.map[offset + FRAME.size] != OPENED:
                return False
            offset += FRAME.size + length
        return True

    def freeze(self) -> None:
        """Let nobody write any more. What others have written meanwhile is in."""
        if self.frozen_at is not None:
            return
        end = self.map.tell()
        if end == self.size:  # to the last byte; or an asynchronous exception came between the next step and the last
            end = HEADER_SIZE
        self.map.seek(self.size)
        # Between these two steps another thread may have written: its record stands where `end` was.
        while end + FRAME.size <= self.size and (length := FRAME.unpack_from(self.map, end)[0]):
            end += FRAME.size + length
        self.frozen_at = end

    def append(self, data: bytes) -> bool:
        """Write after the end of a frozen segment, where there is room; say whether there was."""
        assert self.frozen_at is not None
        end = self.frozen_at + len(data)
        if end > self.size:
            return False
        self.map[self.frozen_at : end] = data
        self.frozen_at = end
        return True

    def renumber(self, window: int) -> None:
        """Let it be of another window. Nothing is written to it yet."""
        self.header = replace(self.header, window=window)
        data = self.header.encode()
        self.map[: len(data)] = data
        self.note_first(0)

    def note_first(self, sequence: int, *, final: bool = True) -> None:
        """Note the sequence of the window's first batch; not *final*: what it is if the one before is never sealed."""
        self.first = sequence if final else 0
        WORD.pack_into(self.map, FIRST_AT, word(sequence))

    def sync(self) -> int:
        """Bring what is written now to the disk; return the bytes from the start that are there.

        May block for long. Raises `OSError`; the file must then not be trusted any more: what a second try reports
        says nothing of the pages that the first one gave up.
        """
        end = self.end
        if self._file >= 0:
            os.fdatasync(self._file)
            WORD.pack_into(self.map, SYNCED_AT, word(end))
        self.synced_at = end
        return end

    def trim(self) -> None:
        """Give back the allocated rest of a frozen file."""
        assert self.frozen_at is not None
        if self._file >= 0:
            os.ftruncate(self._file, self.frozen_at)
            self.size = self.frozen_at

    def move(self, path: Path) -> None:
        """Give the file another name."""
        if self.path is not None:
            self.path.rename(path)
            self.path = path

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.map.closed

    def close(self) -> None:
        """Let go of the map and the file, which stays. Nobody may read or write any more."""
        self.write = _closed
        self.map.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def mark_applied(path: Path, seconds: float, *, closed: bool = False) -> None:
    """Note in a file that its window is in the database. Not brought to the disk: without it the ledger is asked.

    Raises:
        OSError: it cannot be written.
    """
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(file, WORD.pack(applied_word(int(seconds), closed=closed)), APPLIED_AT)
    finally:
        os.close(file)


def mark_registered(path: Path, epoch: int) -> None:
    """Note in a file, on the disk, that a recovery has registered its life in the ledger. May block.

    Raises:
        OSError: it cannot be written.
    """
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(file, WORD.pack(word(epoch)), REGISTERED_AT)
        os.fdatasync(file)
    finally:
        os.close(file)


def _closed(_: object) -> int:
    raise ValueError("the segment is closed")


class Written:
    """A file of the journal that is read: of an earlier life, or after it was let go of.

    Attributes:
        applied_at: when its window was noted as applied, seconds since 1970; 0: it was not.
        closed: whether its life is noted to have ended cleanly.
        registered: the epoch under which a recovery has registered its life; 0: none has, or the life itself had.

    Args:
        path: where it is.
        copy: read it into memory: whoever writes to it may cut it shorter, and under a map that would be a SIGBUS.

    Raises:
        Blank: it has no header, and was never on the disk.
        Damaged: it was, and its header is none.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, *, copy: bool = False) -> None:
        self.path = path
        self.map: Any
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < HEADER_SIZE:
                raise Blank(f"{self.size} bytes, no header")
            if copy:
                self.map = file.read()
                self.size = len(self.map)
            else:
                self.map = mmap(file.fileno(), self.size, access=ACCESS_READ)
        try:
            self.header = Header.decode(self.map[:HEADER_SIZE])
            self.first = word_value(WORD.unpack_from(self.map, FIRST_AT)[0])
            self.synced_at = word_value(WORD.unpack_from(self.map, SYNCED_AT)[0])
            applied = self._hint(APPLIED_AT)
            self.applied_at, self.closed = applied >> 1, bool(applied & 1)
            self.registered = self._hint(REGISTERED_AT)
        except Damaged as damaged:
            synced = any(self.map[SYNCED_AT : SYNCED_AT + WORD.size])
            self.close()
            raise Damaged(str(damaged)) if synced and isinstance(damaged, Blank) else damaged from None

    def _hint(self, offset: int) -> int:
        try:
            return word_value(WORD.unpack_from(self.map, offset)[0])
        except Damaged:  # without it the ledger is asked
            return 0

    def close(self) -> None:
        """Let go of it."""
        if isinstance(self.map, mmap):
            self.map.close()
