"""The journal's directory: locked, with what stands in it and what that takes; and how its errors are counted.

Rules:
1. One process has the directory; a fork's child takes a place of its own below it, at its first use.
2. An error of the disk is counted by what failed, told, and raised to no caller.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Final

from tracker_daemon.errors import JournalError
from tracker_daemon.journal.lock import DirectoryLock, try_lock
from tracker_daemon.journal.windows import Damage, producer_of
from tracker_daemon.logs import get_logger

if TYPE_CHECKING:
    from uuid import UUID

_FORKS: Final = "forks"
OPERATIONS: Final = (
    "open",
    "allocate",
    "quota",
    "rename",
    "fsync",
    "write",
    "list",
    "read",
    "delete",
    "damage",
    "ledger",
)


class NotSynced(OSError):  # noqa: N818 - says what is the case
    """A file could not be brought to the disk."""


def operation_of(error: BaseException) -> str:
    """Return what failed, of `OPERATIONS`, where what stands in the journal cannot be applied."""
    cause = error.__cause__ if isinstance(error, JournalError) and error.__cause__ is not None else error
    if isinstance(cause, Damage):
        return "damage"
    if isinstance(cause, NotSynced):
        return "fsync"
    return "read" if isinstance(cause, OSError) else "ledger"


class Directory:
    """A directory, locked.

    Args:
        directory: made if it is missing.
        forked: this is a fork's child, whose parent has the directory: it takes a place of its own below, at first use.

    Raises:
        JournalError: another process has the directory, or it cannot be written.
    """

    def __init__(self, directory: Path, *, forked: bool) -> None:
        self.base = self.directory = directory
        self.errors: Counter[str] = Counter()
        self.recovering = False
        """Whether earlier lives left something that is still to be looked at."""
        self._sizes: dict[Path, int] = {}
        self._names_changed = False
        self._lock: DirectoryLock | None = None
        self._locks: list[DirectoryLock] = []
        self._left: dict[UUID, list[Path]] = {}
        self._attaching = RLock()
        self._adopted = False
        self._forked = forked
        if not forked:
            self._attach()

    def _attach(self) -> None:
        """Take the directory, or in a fork's child a place below it, and see what was left there."""
        try:
            self.base.mkdir(parents=True, exist_ok=True)
            if self._forked:
                self._take_place()
            else:
                self._lock = DirectoryLock(self.base)
            self._look(self.directory)
            probe = self.directory / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            self._release()
            raise JournalError(f"journal {self.base} cannot be used: {error}") from error

    def _take_place(self) -> None:
        for number in range(1 << 16):
            place = self.base / _FORKS / str(number)
            place.mkdir(parents=True, exist_ok=True)
            if lock := try_lock(place):
                self._lock, self.directory = lock, place
                return
        raise JournalError(f"journal {self.base / _FORKS}: no free place")

    def adopt(self) -> None:
        """See to what children left that have died: whoever works first takes it over. May block; again: no effect.

        Not when the journal is made: a parent that only forks would hold on to it and never apply it.
        """
        if self._adopted or self._lock is None:
            return
        self._adopted = True
        try:
            for place in sorted((self.base / _FORKS).glob("*")):
                if place != self.directory and any(place.glob("*.journal")) and (lock := try_lock(place)):
                    self._locks.append(lock)
                    self._look(place)
        except OSError as error:
            self.errors["list"] += 1
            self._say("error", "journal_not_adopted", directory=str(self.base / _FORKS), error=str(error))

    def look_again(self) -> None:
        """See once more what earlier lives left: somebody who holds this journal has changed it."""
        places = {path.parent for paths in self._left.values() for path in paths}
        self._left.clear()
        self._sizes.clear()
        for place in sorted(places):
            self._look(place)

    def _look(self, directory: Path) -> None:
        with os.scandir(directory) as entries:
            for entry in entries:
                if (producer := producer_of(entry.name)) is not None:
                    path = Path(entry.path)
                    self._left.setdefault(producer, []).append(path)
                    self.recovering = True
                    self._sizes[path] = entry.stat().st_size

    @property
    def left(self) -> dict[UUID, list[Path]]:
        """The files of earlier lives that are not known to be applied, by producer."""
        return self._left

    @property
    def bytes(self) -> int:
        """What the directory takes."""
        return sum(list(self._sizes.values()))

    @property
    def files(self) -> int:
        """How many files there are."""
        return len(self._sizes)

    def forget_fork(self) -> None:
        """In a fork's child: the files and the lock are the parent's."""
        for lock in (self._lock, *self._locks):
            if lock is not None:
                lock.release()

    def _delete_all(self, paths: list[Path]) -> None:
        for path in paths:
            self._delete(path)

    def _delete(self, path: Path) -> None:
        self._sizes.pop(path, None)
        self._names_changed = True
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self.errors["delete"] += 1
            self._say("warning", "journal_delete_failed", path=str(path), error=str(error))

    def _sync_directory(self, path: Path) -> None:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _release(self) -> None:
        for lock in (self._lock, *self._locks):
            if lock is not None:
                lock.release()
        self._lock = None
        self._locks.clear()

    def _say(self, level: str, event: str, **fields: object) -> None:
        with suppress(Exception):  # the host's logging must not reach a caller
            getattr(get_logger(), level)(event, **fields)
