"""One place of the journal that this process holds: its lock, its files, and what they take, for all others to read.

Rules:
1. A file counts before it is there, and until it is gone: the places' sum is never less than what the files take.
2. A file takes whole blocks of the disk: a window of one call takes one, though it has a few hundred bytes.
"""

from __future__ import annotations

from threading import RLock
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tracker_daemon.journal.lock import DirectoryLock

BLOCK: Final = 4_096


def on_disk(size: int) -> int:
    """Return what a file of *size* bytes takes."""
    return -(-size // BLOCK) * BLOCK


class Place:
    """A directory that is locked; `sizes` are the bytes that its files take."""

    def __init__(self, lock: DirectoryLock) -> None:
        self.lock = lock
        self.sizes: dict[Path, int] = {}
        self._kept: set[Path] = set()
        self._telling = RLock()

    @property
    def sums(self) -> tuple[int, int]:
        """The bytes of all its files, and of those that are kept in case the database forgets them."""
        sizes = self.sizes
        return sum(list(sizes.values())), sum(sizes.get(path, 0) for path in list(self._kept))

    def take(self, sizes: dict[Path, int]) -> None:
        """Count files, by how many bytes they have."""
        self.sizes.update({path: on_disk(size) for path, size in sizes.items()})
        self._tell()

    def rename(self, before: Path, path: Path, size: int) -> None:
        """Count a file under its new name."""
        self.sizes[before] = self.sizes[path] = on_disk(size)  # at no instant not at all
        if path != before:
            del self.sizes[before]
        self._tell()

    def keep(self, paths: Iterable[Path]) -> None:
        """Files are kept only in case the database forgets what they hold."""
        self._kept.update(paths)
        self._tell()

    def drop(self, paths: Iterable[Path]) -> None:
        """Count files no more."""
        for path in paths:
            self.sizes.pop(path, None)
            self._kept.discard(path)
        self._tell()

    def _tell(self) -> None:
        with self._telling:
            while True:
                sums = self.sums
                self.lock.note(*sums)
                if sums == self.sums:  # else a signal handler, or another thread, has changed it meanwhile
                    return
