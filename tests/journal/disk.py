"""What a loss of power may leave of a directory: every operation is noted, and what was not synced kept or dropped.

Rules:
1. A file's bytes are on the disk when its `fdatasync` returned. What was written since is there sector by sector, or not:
   each sector as it was at the sync, or as at any look since.
2. A file's name is on the disk when the directory's `fsync` returned. Of the operations on one file since (made, renamed,
   removed) the first few are there, or all, or none; files do not wait for each other.
3. An operation that fails, as the script says, has done nothing, and a failed `fdatasync` has lost what it was to write.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tracker_daemon.journal.segment import Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    import pytest

SECTOR: Final = 512
Content = bytes


@dataclass
class File:
    """One file: what is on the disk of it, and what may be.

    Attributes:
        durable: its bytes at the last sync.
        versions: its bytes at each look since, the newest last.
        names: where its name may be: on the disk, and after each operation since; `None`: nowhere.
        lost: its bytes are only in memory: an fsync failed.
    """

    durable: Content = b""
    versions: list[Content] = field(default_factory=list)
    names: list[str | None] = field(default_factory=lambda: [None])
    lost: bool = False

    def copy(self) -> File:
        """Return it as it is now."""
        return File(self.durable, list(self.versions), list(self.names), self.lost)


@dataclass(frozen=True)
class Moment:
    """The disk at one instant, and whatever the test wants to know of it."""

    what: str
    files: tuple[File, ...]
    truth: Any

    def after(self, choose: Choice) -> dict[str, Content]:
        """Return the files that a loss of power leaves now."""
        found: dict[str, Content] = {}
        for file in self.files:
            name = choose.name(file)
            if name is not None:
                found[name] = choose.content(file)
        return found


class Choice:
    """What the disk has kept: nothing of what was not synced, all of it, or anything in between."""

    def __init__(self, random: Random, *, names: str = "some", data: str = "some") -> None:
        self._random, self._names, self._data = random, names, data

    def name(self, file: File) -> str | None:
        """Return the name that the file has afterwards."""
        if self._names == "all":
            return file.names[-1]
        return file.names[0] if self._names == "none" else self._random.choice(file.names)

    def content(self, file: File) -> Content:
        """Return the bytes that the file has afterwards."""
        if self._data == "none" or not file.versions:
            return file.durable
        newest = file.versions[-1]
        if self._data == "all" and not file.lost:
            return newest
        size = len(self._random.choice([file.durable, newest]))
        kept = bytearray(size)
        for start in range(0, size, SECTOR):
            version = self._random.choice([file.durable, file.durable, newest, self._random.choice(file.versions)])
            part = version[start : min(start + SECTOR, size)]
            kept[start : start + len(part)] = part
        return bytes(kept)


class Disk:
    """Notes what happens to the files of one directory.

    Attributes:
        moments: one for each operation.
        fails: operations to come that fail: (operation, part of the file's name).
    """

    def __init__(self, truth: Callable[[], Any]) -> None:
        self._truth = truth
        self._files: dict[str, File] = {}
        self._gone: list[File] = []
        self.moments: list[Moment] = []
        self.fails: list[tuple[str, str]] = []

    def look(self, what: str) -> None:
        """Note what the files hold now, and the moment."""
        for path, file in self._files.items():
            content = Path(path).read_bytes()
            if not file.versions or file.versions[-1] != content:
                file.versions.append(content)
        files = tuple(file.copy() for file in [*self._files.values(), *self._gone])
        self.moments.append(Moment(what, files, self._truth()))

    def made(self, path: Path) -> None:
        """A file is there."""
        file = self._files[str(path)] = File()
        file.names.append(path.name)

    def renamed(self, before: Path, after: Path) -> None:
        """A file has another name; what had it before is gone."""
        self.removed(after)
        file = self._files[str(after)] = self._files.pop(str(before))
        file.names.append(after.name)

    def removed(self, path: Path) -> None:
        """A file has no name any more."""
        if file := self._files.pop(str(path), None):
            file.names.append(None)
            self._gone.append(file)

    def synced(self, path: str) -> None:
        """What a file held is on the disk."""
        file = self._files.get(path)
        if file is not None and not file.lost:
            file.durable = Path(path).read_bytes()
            file.versions.clear()

    def names_synced(self) -> None:
        """All names are on the disk."""
        for file in [*self._files.values(), *self._gone]:
            del file.names[:-1]
        self._gone.clear()

    def _may(self, what: str, path: str) -> None:
        for failure in self.fails:
            if failure[0] == what and failure[1] in Path(path).name:
                self.fails.remove(failure)
                if what == "fdatasync":
                    self._files[path].lost = True
                raise OSError(5, f"Input/output error ({what})", path)

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Note everything that is done inside."""
        with monkeypatch.context() as patch:
            self._watch_content(patch)
            self._watch_names(patch)
            yield

    def _watch_content(self, patch: pytest.MonkeyPatch) -> None:
        real_sync, real_fsync, real_cut = os.fdatasync, os.fsync, os.ftruncate

        def fdatasync(file: int) -> None:
            self.look("before fdatasync")
            self._may("fdatasync", name_of(file))
            real_sync(file)
            self.synced(name_of(file))
            self.look("fdatasync")

        def fsync(file: int) -> None:
            self.look("before fsync")
            real_fsync(file)
            self.names_synced()
            self.look("fsync")

        def ftruncate(file: int, size: int) -> None:
            if name_of(file).endswith("/lock"):
                return real_cut(file, size)
            self.look("before ftruncate")
            self._may("ftruncate", name_of(file))
            real_cut(file, size)
            return self.look("ftruncate")

        patch.setattr(os, "fdatasync", fdatasync)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "ftruncate", ftruncate)

    def _watch_names(self, patch: pytest.MonkeyPatch) -> None:
        real_rename, real_unlink, real_make = Path.rename, Path.unlink, Segment.__init__

        def rename(path: Path, target: Path) -> Path:
            self.look("before rename")
            self._may("rename", str(path))
            done = real_rename(path, target)
            self.renamed(path, target)
            self.look("rename")
            return done

        def unlink(path: Path, missing_ok: bool = False) -> None:
            watched = path.suffix == ".journal"
            if watched:
                self.look("before unlink")
            real_unlink(path, missing_ok)
            if watched:
                self.removed(path)
                self.look("unlink")

        def make(segment: Segment, header: Any, size: int, path: Path | None) -> None:
            if path is not None:
                self._may("make", str(path))
            real_make(segment, header, size, path)
            if path is not None:
                self.made(path)
                self.look("make")

        patch.setattr(Path, "rename", rename)
        patch.setattr(Path, "unlink", unlink)
        patch.setattr(Segment, "__init__", make)


def name_of(file: int) -> str:
    """Return the path of an open file."""
    return str(Path(f"/proc/self/fd/{file}").readlink())


def write_files(directory: Path, files: dict[str, Content]) -> None:
    """Put *files* into a new directory."""
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
