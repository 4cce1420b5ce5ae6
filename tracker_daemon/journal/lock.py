"""One process a directory: a lock that its holder's death frees."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from tracker_daemon.errors import JournalError

if TYPE_CHECKING:
    from pathlib import Path

_NAME: Final = "lock"


class DirectoryLock:
    """Held from the making to `release`, or to the end of the process.

    Raises:
        JournalError: another process has it (the message names its pid), or the directory cannot be written.
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
            holder = os.pread(self._file, 32, 0).decode("ascii", "replace").strip()
            self.release()
            if not isinstance(error, BlockingIOError):
                raise JournalError(f"journal {directory}: {path} cannot be locked: {error.strerror}") from error
            raise JournalError(
                f"journal {directory} is in use by process {holder or '(unknown)'}: give each tracker a directory "
                "of its own, or end that process"
            ) from None
        with suppress(OSError):  # a full disk: the lock holds, it only names nobody
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Let go."""
        file, self._file = self._file, -1  # a signal handler may come here in between
        if file >= 0:
            os.close(file)


def try_lock(directory: Path) -> DirectoryLock | None:
    """Return the lock, or `None` where another process has it."""
    try:
        return DirectoryLock(directory)
    except JournalError:
        return None
