"""What the worker does for the journal beside the flushes: fsync by group, mending, and taking over from dead children.

Rules:
1. Nothing here holds up the pump: what blocks runs in a thread, or beside the flushes.
2. What children left that have died is taken over about once a minute, by whoever flushes well: in front of a flush, so
   that one that fails keeps it from coming back here. Where that is more than may be held at once, the rest comes right
   behind, with a flush in between.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

from tracker_daemon.mending import Mender

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup

    from tracker_daemon.backlog import Backlog
    from tracker_daemon.clock import Clock
    from tracker_daemon.journal.journal import Journal

# Seconds between two looks for what children left that have died.
_ADOPT_EVERY: Final = 60.0


class JournalKeeper:
    """Keeps the journal of one life.

    Args:
        backlog, journal, clock: of that life.
        wake: told when there is something to look at.
    """

    def __init__(self, backlog: Backlog, journal: Journal, clock: Clock, wake: Callable[[], object]) -> None:
        self._backlog, self._journal, self._clock, self._wake = backlog, journal, clock, wake
        self._synced_at = 0.0
        self._syncing = False
        self._adopt_at = -inf

    def keep(self, now: float, tasks: TaskGroup) -> None:
        """See to the journal: fsync by group, mend what cannot be trusted, let go of what is on the disk."""
        if self._syncing:
            return
        Mender(self._backlog, self._journal).mend()
        if self.sync_due <= now:
            self._syncing = True
            tasks.start_soon(self._sync)

    @property
    def sync_due(self) -> float:
        """When the next fsync is due, on the monotonic clock; `inf`: none is."""
        journal = self._journal
        if not journal.sync_interval or self._syncing or not journal.dirty:
            return inf
        return self._synced_at + journal.sync_interval

    async def _sync(self) -> None:
        import asyncio  # noqa: PLC0415 - `import tracker_daemon` need not pay for it

        try:
            await asyncio.get_running_loop().run_in_executor(None, self._journal.sync)
            self._journal.release_synced()
        finally:
            self._syncing = False
            self._synced_at = self._clock.monotonic()
            self._wake()

    @property
    def adopt_due(self) -> float:
        """When an idle worker is to look for what children left, on the monotonic clock; `inf`: nobody shares it."""
        return self._adopt_at if self._journal.shared and self._journal.attached else inf

    def adopt(self) -> None:
        """Look for what children left that have died, if that is due. May block."""
        now, journal = self._clock.monotonic(), self._journal
        if journal.attached and now >= self._adopt_at:
            more = journal.adopt()
            self._adopt_at = now if more else now + _ADOPT_EVERY

    def share(self) -> bool:
        """This process has forked: say whether that is news."""
        news, self._journal.shared = not self._journal.shared, True
        return news
