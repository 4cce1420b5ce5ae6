"""How much of the daemon one client may take, so that none starves the others.

Rules:
1. What is taken is given back when it is dealt with: bytes and batches with the answer, calls once they are settled.
2. A client that holds something may hold no more than then stays free: one alone gets half, two a third each, and there
   is always room for one more. (Dynamic thresholds: Choudhury and Hahne, 1998.)
3. Who passes that is told to come again (429), who finds all taken by others as well (503).
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracker_daemon.backlog import Backlog
    from tracker_daemon.generation import Record
    from tracker_daemon.tracker import Tracker


def refusal(mine: int, size: int, free: int) -> int | None:
    """Return the status that refuses *size* more to a client that holds *mine* of what is bounded, or `None`.

    A client that holds nothing is refused only when *free* is too little; who asks for nothing, never.
    """
    if not size:
        return None
    if size > free:
        return 429 if mine else 503
    return 429 if mine and mine + size > free - size else None


class Admission:
    """Counts what is under way, in all and by client.

    Args:
        limit: what may be under way at once: bytes, or threads in batches.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: Counter[str] = Counter()
        self.total = 0

    def admit(self, client: str, size: int) -> int | None:
        """Take *size* for *client*; return the status that refuses it, or `None`.

        Where nothing at all is under way anything is admitted: it would never be.
        """
        if self.total and (status := refusal(self._taken[client], size, self._limit - self.total)):
            return status
        self._taken[client] += size
        self.total += size
        return None

    def release(self, client: str, size: int) -> None:
        """Give back what was taken."""
        self.total -= size
        self._taken[client] -= size
        if self._taken[client] <= 0:
            del self._taken[client]


@dataclass(frozen=True, slots=True)
class _Room:
    """How far the calls have come, and what is free for more."""

    accepted: int
    folded: int
    settled: int
    free_calls: int
    free_threads: int | None
    """`None`: threads are not bounded, they wait in the journal's files."""

    @classmethod
    def of(cls, backlog: Backlog) -> _Room:
        """Read it without a lock; a little behind at worst."""
        waiting = len(backlog.queue)  # first: what is folded in between counts twice, never not at all
        folded, threads = backlog.folded, backlog.resident_threads + waiting
        return cls(
            accepted=folded + waiting,
            folded=folded,
            settled=backlog.settled,
            free_calls=backlog.max_queue_size - waiting,
            free_threads=None if backlog.queue.on_disk else backlog.max_pending - threads,
        )


@dataclass(slots=True)
class _Held:
    """What one client's calls hold in the tracker. Calls are numbered in the order in which they were taken."""

    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    """Of each request that may wait in the queue still: the number of its last call, and how many there are."""
    threads: dict[str, int] = field(default_factory=dict)
    """Threads that may be pending, each with the number of a call that is not before the client's last one on it."""
    last: int = 0
    looked: int = 0
    """How many calls were settled when `threads` was last gone through."""
    most: int = 0
    """From how many threads on it is gone through again."""

    def calls(self, folded: int) -> int:
        while self.waiting and self.waiting[0][0] <= folded:
            self.waiting.popleft()
        return sum(number for _, number in self.waiting)

    def forget(self, settled: int) -> None:
        if self.last <= settled:
            self.threads.clear()
        elif self.looked < settled:
            self.threads = {name: last for name, last in self.threads.items() if last > settled}
        self.looked, self.most = settled, 2 * len(self.threads) + _FEW

    def add(self, names: set[str], calls: int, last: int) -> None:
        self.waiting.append((last, calls))
        self.threads.update(dict.fromkeys(names, last))
        self.last = last


class Shares:
    """Hands calls to the tracker, within each client's share of its queue and of the threads that may be pending.

    Args:
        tracker: takes them.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._held: dict[str, _Held] = {}
        self._lock = Lock()

    def take(self, client: str, records: Sequence[Record], taken_at: int) -> tuple[int, str] | None:
        """Take *records* of *client*, all or none; return the status that refuses them and the reason, or `None`.

        Waits for a tracker that is folding: call it from a thread.
        """
        with self._lock:
            room = _Room.of(self._tracker.backlog)
            held = self._of(client, room)
            names = {record[0] for record in records}
            status, kept = self._refusal(held, names, len(records), room)
            if status is not None:
                self._tracker.count_rejected("share", len(records))
                return status, "this client has as much waiting for the database as its share allows"
            if (bound := self._tracker.take(records, taken_at)) is not None:
                return (503, "the daemon is shutting down") if bound == "closed" else (429, f"{bound} is reached")
            held.add(
                names if kept else names & held.threads.keys(), len(records), _Room.of(self._tracker.backlog).accepted
            )
            return None

    def _refusal(self, held: _Held, names: set[str], calls: int, room: _Room) -> tuple[int | None, bool]:
        """Return the status that refuses, if any, and whether the new threads are to be remembered."""
        if status := refusal(held.calls(room.folded), calls, room.free_calls):
            return self._only_share(status, calls, room.free_calls), False
        if len(held.threads) > held.most:
            held.forget(room.settled)
        if room.free_threads is None:
            # With a journal its files are the bound. Remembered for when it cannot be written, but not without end.
            return None, len(held.threads) + len(names) <= _MOST_IN_FILES
        new = len(names - held.threads.keys())
        if (status := refusal(len(held.threads), new, room.free_threads)) and held.looked < room.settled:
            held.forget(room.settled)
            new = len(names - held.threads.keys())
            status = refusal(len(held.threads), new, room.free_threads)
        return self._only_share(status, new, room.free_threads), True

    @staticmethod
    def _only_share(status: int | None, size: int, free: int) -> int | None:
        """Return *status*, unless it is the bound itself that is reached: the tracker knows that, and exactly."""
        return None if size > free else status

    def _of(self, client: str, room: _Room) -> _Held:
        held = self._held.get(client)
        if held is None:
            if len(self._held) >= _MOST_IDLE:
                self._held = {name: each for name, each in self._held.items() if each.last > room.settled}
            held = self._held[client] = _Held()
        return held


_FEW: Final = 1_024
_MOST_IDLE: Final = 1_024
_MOST_IN_FILES: Final = 100_000
