"""Small disks: mounted for a test, filled, freed, made read-only."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def _mount(*arguments: str) -> None:
    ended = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"mount {' '.join(arguments)}: {ended.stderr.strip()}")


def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")


class SmallDisk:
    """A file system of its own; `free` bytes are left on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._filler = folder, folder / "filler"

    @property
    def free(self) -> int:
        """Bytes that can still be written."""
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def leave(self, size: int) -> None:
        """Fill it until *size* bytes are left, about."""
        self.relieve()
        if (rest := self.free - size) > 0:
            with self._filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, rest)
        assert self.free <= size

    def relieve(self) -> None:
        """Give back what `leave` took."""
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[SmallDisk]:
    """Mount a file system of *size* bytes, in memory; skip the test where that is not allowed."""
    _needs_root()
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size},mode=0700", "tracker-test", str(folder))
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Have nothing made, renamed or deleted in *folder*, for as long as the block."""
    if os.geteuid() != 0:
        before = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(before)
        return
    # Modes do not hold root back: the same folder over itself, read-only.
    _mount("--bind", str(folder), str(folder))
    try:
        _mount("-o", "remount,bind,ro", str(folder))
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
