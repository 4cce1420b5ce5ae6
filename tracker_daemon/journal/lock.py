"""One process a directory: a lock that its holder's death frees; and in its file what the directory's files take.

Rules:
1. The first line names the holder. The second is how much the files there take, and how much of it is kept only in case
   the database forgets it, in bytes: written by the holder, read by whoever shares the journal, true after its death.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from tracker_daemon.errors import JournalError

if TYPE_CHECKING:
    from pathlib import Path

_NAME: Final = "lock"
_LINE: Final = 48


class JournalInUse(JournalError):  # noqa: N818 - says what is the case
    """Another process has the directory."""


class DirectoryLock:
    """Held from the making to `release`, or to the end of the process.

    Raises:
        JournalInUse: another process has it (the message names its pid).
        JournalError: the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._file = -1
        path = directory / _NAME
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"journal {directory}: {path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._file, _LINE, 0).split(b"\n")[0].decode("ascii", "replace").strip()
            self.release()
            if not isinstance(error, BlockingIOError):
                raise JournalError(f"journal {directory}: {path} cannot be locked: {error.strerror}") from error
            raise JournalInUse(
                f"journal {directory} is in use by process {holder or '(unknown)'}: give each tracker a directory "
                "of its own, or end that process"
            ) from None
        self._write(0, str(os.getpid()))

    def note(self, taken: int, kept: int) -> None:
        """Write how many bytes the files there take, and how many of them are kept in case the database forgets."""
        self._write(_LINE, f"{taken} {kept}")

    def _write(self, offset: int, line: str) -> None:
        file = self._file
        if file >= 0:
            with suppress(OSError):  # a full disk: the lock holds, it only tells nothing
                os.pwrite(file, line.ljust(_LINE - 1).encode() + b"\n", offset)

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Let go."""
        file, self._file = self._file, -1  # a signal handler may come here in between
        if file >= 0:
            os.close(file)


def try_lock(directory: Path) -> DirectoryLock | None:
    """Return the lock, or `None` where another process has it.

    Raises:
        JournalError: the directory cannot be written.
    """
    try:
        return DirectoryLock(directory)
    except JournalInUse:
        return None


def noted(directory: Path) -> tuple[int, int]:
    """Return what was written by `DirectoryLock.note`, last; zeros where nothing was."""
    try:
        file = os.open(directory / _NAME, os.O_RDONLY | os.O_CLOEXEC)
        try:
            taken, kept = os.pread(file, _LINE, _LINE).split()
        finally:
            os.close(file)
        return int(taken), int(kept)
    except (OSError, ValueError):
        return 0, 0
