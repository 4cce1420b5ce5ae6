"""The journal's directory: locked, with what stands in it and what that takes; and how its errors are counted.

Rules:
1. One process has the directory; a fork's child takes a place of its own below it, at its first use.
2. What children left that have died is taken over, with the place's lock, by whoever works; the lock is given back once
   it is applied, and what is kept of it has gone into the own place.
3. The quota is that of all places together. Each holder writes into its places' locks what they take.
4. An error of the disk is counted by what failed, told, and raised to no caller.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Final

from tracker_daemon.errors import JournalError
from tracker_daemon.journal.lock import DirectoryLock, noted, try_lock
from tracker_daemon.journal.place import Place
from tracker_daemon.journal.windows import Damage, producer_of
from tracker_daemon.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

_FORKS: Final = "forks"
# A child leaves a place to whoever adopts where dead ones have left more than this share of the quota: so there are
# few places, and none that always has somebody living in it and grows.
_SHARE_OF_A_PLACE: Final = 64
MOST_ADOPTED: Final = 64
"""Places of dead children that are held at once: a file descriptor each."""
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
        quota: bytes that it may take, with all places below it.
        forked: this is a fork's child, whose parent has the directory: it takes a place of its own below, at first use.

    Raises:
        JournalError: another process has the directory, or it cannot be written.
    """

    def __init__(self, directory: Path, *, quota: int, forked: bool) -> None:
        self.base = self.directory = directory
        self.quota = quota
        self.errors: Counter[str] = Counter()
        self.recovering = False
        """Whether earlier lives left something that is still to be looked at."""
        self.shared = forked
        """Whether others may have places here: this process has forked, is a child, or has found some."""
        self.not_adopted: dict[Path, Exception] = {}
        """Where `adopt` could not look the last time, and why."""
        self._places: dict[Path, Place] = {}
        self._names_changed = False
        self._left: dict[UUID, list[Path]] = {}
        self._aside: set[UUID] = set()
        self._attaching = RLock()
        self._forked = forked
        if not forked:
            self._attach()

    @property
    def attached(self) -> bool:
        """Whether this process has its place: a fork's child has it from its first call on."""
        return self.directory in self._places

    def _attach(self) -> None:
        """Take the directory, or in a fork's child a place below it, and see what was left there."""
        try:
            self.base.mkdir(parents=True, exist_ok=True)
            if self._forked:
                self._take_place()
            else:
                self._places[self.base] = Place(DirectoryLock(self.base))
            probe = self.directory / ".writable"
            probe.touch()
            probe.unlink()
            self._look(self.directory)
        except OSError as error:
            self._release()
            raise JournalError(f"journal {self.base} cannot be used: {error}") from error

    def _take_place(self) -> None:
        for number in range(1 << 16):
            place = self.base / _FORKS / str(number)
            if noted(place)[0] >= self.quota // _SHARE_OF_A_PLACE:
                continue
            new = not place.exists()
            place.mkdir(parents=True, exist_ok=True)
            try:
                lock = try_lock(place)
            except JournalError:
                if not new:  # another user's: told by whoever adopts
                    continue
                with suppress(OSError):
                    place.rmdir()  # none can be had, as with no file descriptor left
                raise
            if lock:
                self._places[place] = Place(lock)
                self.directory = place
                return
        raise JournalError(f"journal {self.base / _FORKS}: no free place")

    def adopt(self, most: int = MOST_ADOPTED) -> bool:
        """See to what children left that have died: whoever works takes it over. May block.

        At most so many places are held; return whether there may be more, to be had when these are done. Not when the
        journal is made: a parent that only forks would hold on to them and never apply it. Nothing happens before a
        fork's child has a place of its own.
        """
        if not self.attached:
            return False
        self._give_back()
        self.not_adopted, adopted = {}, False
        try:
            places = self._all_places()[1:]
        except OSError as error:
            places = []
            self._cannot_adopt(self.base / _FORKS, error)
        for path in places:
            self.shared = True
            if len(self._places) > most:
                return adopted
            try:
                if path not in self._places and self._is_wanted(path) and (lock := try_lock(path)):
                    self._places[path], adopted = Place(lock), True
                    self._look(path)
            except (OSError, JournalError) as error:  # another user's: it does not hold up the others
                self._cannot_adopt(path, error)
        return False

    def _cannot_adopt(self, directory: Path, error: Exception) -> None:
        self.errors["list"] += 1
        self.not_adopted[directory] = error
        self._say("error", "journal_not_adopted", directory=str(directory), error=str(error))

    def _is_wanted(self, path: Path) -> bool:
        """Whether somebody's files are there that were not set aside; or none, and the lock tells of some."""
        try:
            with os.scandir(path) as entries:
                producers = {producer for entry in entries if (producer := producer_of(entry.name)) is not None}
        except NotADirectoryError:
            return False
        return bool(producers - self._aside or (not producers and noted(path)[0]))

    def _give_back(self) -> None:
        """Let go of the places of others in which nothing is left but what cannot be applied."""
        for path, place in list(self._places.items()):
            done = not place.sums[1] and all(producer_of(file.name) in self._aside for file in list(place.sizes))
            if done and path not in (self.base, self.directory):
                for producer in [producer for producer, paths in self._left.items() if paths[0].parent == path]:
                    del self._left[producer]
                del self._places[path]
                place.lock.release()

    def look_again(self) -> None:
        """See once more what earlier lives left: somebody who holds this journal has changed it."""
        self._left.clear()
        for path, place in self._places.items():
            place.drop(list(place.sizes))
            self._look(path)

    def _look(self, directory: Path) -> None:
        with os.scandir(directory) as entries:
            sizes = {Path(each.path): each.stat().st_size for each in entries if producer_of(each.name) is not None}
        self._places[directory].take(sizes)
        for path in sizes:
            producer = producer_of(path.name)
            if producer is not None and producer not in self._aside:
                self._left.setdefault(producer, []).append(path)
                self.recovering = True

    def end_recovery(self) -> None:
        """What earlier lives left is applied; or it stays where it is, and this process does not try it again."""
        self._aside.update(self._left)
        self.recovering = False

    @property
    def left(self) -> dict[UUID, list[Path]]:
        """The files of earlier lives that are not known to be applied, by producer."""
        return self._left

    @property
    def waiting(self) -> dict[UUID, list[Path]]:
        """Those of `left` that were not set aside."""
        return {producer: paths for producer, paths in list(self._left.items()) if producer not in self._aside}

    @property
    def bytes(self) -> int:
        """What the directory takes, with the places of all processes that share it."""
        return self._sums()[0]

    def _sums(self) -> tuple[int, int]:
        """Return the bytes of all files in all places, and of those that are kept in case the database forgets them."""
        try:
            places = self._all_places()
        except OSError:  # told when it is to be adopted from
            places = list(self._places)
        taken = kept = 0
        for path in places:
            place = self._places.get(path)
            here = noted(path) if place is None else place.sums
            taken, kept = taken + here[0], kept + here[1]
        return taken, kept

    def _all_places(self) -> list[Path]:
        forks = self.base / _FORKS
        try:
            return [self.base, *(forks / name for name in sorted(os.listdir(forks)))]  # noqa: PTH208 - the names alone
        except FileNotFoundError:
            return [self.base]

    @property
    def files(self) -> int:
        """How many files there are in the places that this process holds."""
        return len(self._paths())

    def _paths(self) -> set[Path]:
        return {path for place in list(self._places.values()) for path in list(place.sizes)}

    def _size(self, paths: Iterable[Path]) -> int:
        return sum(place.sizes.get(path, 0) for path in paths if (place := self._places.get(path.parent)))

    def forget_fork(self) -> None:
        """In a fork's child: the files and the locks are the parent's."""
        for place in list(self._places.values()):
            place.lock.release()

    def _delete_all(self, paths: list[Path]) -> None:
        self._names_changed = True
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self.errors["delete"] += 1
                self._say("warning", "journal_delete_failed", path=str(path), error=str(error))
        for directory in {path.parent for path in paths}:
            if place := self._places.get(directory):
                place.drop(path for path in paths if path.parent == directory)

    def _sync_directory(self, path: Path) -> None:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _release(self) -> None:
        self.forget_fork()
        self._places.clear()

    def _say(self, level: str, event: str, **fields: object) -> None:
        with suppress(Exception):  # the host's logging must not reach a caller
            getattr(get_logger(), level)(event, **fields)
