"""When no file can be had: calls go on in memory, it is told once, and files are tried again.

Rules:
1. Each error is counted by its operation; that calls go to memory is told once, until a file can be had again.
2. A full disk is not asked at every call: once in a while. After a failed fsync another file may be had at once, once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from tracker_daemon.journal.retention import Retention

if TYPE_CHECKING:
    from pathlib import Path

    from tracker_daemon.journal.segment_queue import SegmentQueue

_RETRY_AFTER: Final = 1.0


class Degradation(Retention):
    """A directory in which at times no file can be had; the arguments are those of `Retention`."""

    queue: SegmentQueue

    def __init__(self, directory: Path, **options: Any) -> None:
        self.degraded = False
        """Whether calls go to memory alone."""
        self._failed_at = self._anew_from = float("-inf")
        self._may_try_now = self._told = False
        super().__init__(directory, **options)

    def fail(self, operation: str, error: BaseException, *, anew: bool = False) -> None:
        """Count an error, tell it once, and go on in memory. *anew*: it befell a window that was written anew."""
        self.errors["quota" if "quota" in str(error) else operation] += 1
        now = time.monotonic()
        # Another file may well be had; but of a disk where the next one fails as well, once is enough.
        self._may_try_now = operation == "fsync" and now - self._failed_at >= _RETRY_AFTER
        self._failed_at = now
        if anew:
            self._anew_from = now + _RETRY_AFTER
            if self.queue.on_disk and operation != "fsync":
                return  # calls find room all the same
        self.degraded = True
        if not self._told:
            self._told = True
            self._say("error", "journal_degraded", directory=str(self.directory), operation=operation, error=str(error))

    def _had(self, *, anew: bool) -> None:
        """A file could be had."""
        if self.degraded and (not anew or self.queue.on_disk):
            self.degraded = self._told = False
            self._say("info", "journal_recovered", directory=str(self.directory))

    @property
    def may_try(self) -> bool:
        """Whether a file may be had, or nobody has tried since an fsync failed, or for a while."""
        return not self.degraded or self._may_try_now or time.monotonic() - self._failed_at >= _RETRY_AFTER

    @property
    def may_write_anew(self) -> bool:
        """Whether a file may be had for a window as a whole, or nobody has tried for a while."""
        return self.may_try and time.monotonic() >= self._anew_from
