"""The calls' side of the backlog: the queue, the window that they are folded into, and the bounds on both.

Rules:
1. Calls are appended to `queue` without asking while it is shorter than `gate`; else by `enter`, which keeps bounds.
2. The bound is on distinct threads in memory; a call for a thread that is pending already is accepted however long the
   database is away.
3. The gate is raised under `lock` alone. Callers take `_turn`, which the worker never does but to close.
"""

from __future__ import annotations

from collections import deque
from threading import RLock
from typing import TYPE_CHECKING, Final

from tracker_daemon.books import Totals
from tracker_daemon.call_queue import CallQueue
from tracker_daemon.generation import Generation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tracker_daemon.call_queue import Calls
    from tracker_daemon.generation import Record
    from tracker_daemon.journal.journal import Journal

# How many calls may wait in the queue before one of them wakes the worker ahead of its time.
NUDGE: Final = 1_000


class Intake:
    """The queue, the open window and their bounds.

    Args:
        max_queue_size: calls in the queue.
        max_pending: distinct threads in queue, window and sealed generations together.
        create_missing: whether a turn may create its row.
        journal: where calls are written as well, or `None`.
    """

    def __init__(self, *, max_queue_size: int, max_pending: int, create_missing: bool, journal: Journal | None) -> None:
        self.max_queue_size, self.max_pending = max_queue_size, max_pending
        self.create_missing = create_missing
        self._journal = journal
        self.queue: Calls = CallQueue() if journal is None else journal.queue
        self.gate = 0
        """Calls are appended without asking while the queue is shorter than this; 0 makes every call ask."""
        self.closed = False
        """Nothing is accepted any more."""
        self.forking = False
        self.lock = RLock()
        self.folded = 0
        """Calls taken off the queue, ever."""
        self._window = Generation(create_missing=create_missing)
        self._resident: tuple[Generation, ...] = ()
        """The sealed windows that are in memory."""
        self._threads = 0
        self._turn = RLock()
        self._waiting: set[str] | None = None
        self._moves = self._new = 0
        self._counted = -1
        self._given: deque[tuple[int, int, int]] = deque()
        """Of calls whose instant is not that of their taking: first number, the one behind the last, when taken."""
        self._totals = Totals()

    # -- the calls' side: no lock ------------------------------------------------------------------

    def enter(self, record: Record) -> str | None:
        """Append one call if it fits; return `None`, or the name of the bound that is reached, or "closed".

        Callers take turns here, and none of them waits for the worker, which never takes this lock.
        """
        with self._turn:
            waiting = len(self.queue)
            if self.closed:
                return "closed"
            if waiting >= self.max_queue_size:
                return "max_queue_size"
            if self.queue.on_disk or waiting < self.max_pending - self._threads:
                # In a file; or even if every waiting call were of a new thread, this one still fits.
                self._waiting = None
                # Raised under the lock alone, so that it never exceeds the room; who holds it raises the gate himself.
                if self.lock.acquire(blocking=False):
                    try:
                        self._raise_gate(max(NUDGE, 2 * waiting))
                    finally:
                        self.lock.release()
            elif not self._fits_near_the_bound(record[0]):
                return "max_pending"
            self.queue.append(record)
            return None

    def enter_all(self, records: Sequence[Record], taken_at: int = 0) -> str | None:
        """Append *records* if all of them fit, else none; return as `enter`. Waits for a worker that is folding.

        Args:
            records: the calls.
            taken_at: nanoseconds since 1970, where the instants in *records* may be others; else 0.
        """
        with self.lock, self._turn:
            if self.closed:
                return "closed"
            waiting = len(self.queue)
            if waiting + len(records) > self.max_queue_size:
                return "max_queue_size"
            room = self.max_pending - self._threads - waiting
            if not self.queue.on_disk and len(records) > room:
                # Near the bound it is the threads that count; what comes by the gate meanwhile counts as new.
                new = {record[0] for record in records if not self._holds(record[0])}
                if len(new) > room:
                    return "max_pending"
            self.gate = 0
            if taken_at:
                first = self.folded + len(self.queue)
                self._given.append((first, first + len(records), taken_at))
            for record in records:
                self.queue.append(record)
            self._waiting = None
            return None

    def _fits_near_the_bound(self, thread_id: str) -> bool:
        waiting, moves = self._waiting, self._moves
        if self.gate or waiting is None:
            # Calls may have come by the gate: look once which threads wait, then keep count here.
            self.gate = 0
            waiting = self._waiting = {record[0] for record in self.queue.waiting()}
            self._counted = -1
        if self._counted != moves:
            # Over a copy: a signal handler that calls in the middle adds to the set.
            self._new = sum(not self._holds(name) for name in tuple(waiting))
            self._counted = moves
        if thread_id not in waiting and not self._holds(thread_id):
            if self._new >= self.max_pending - self._threads:
                return False
            self._new += 1
        waiting.add(thread_id)
        return True

    def _holds(self, thread_id: str) -> bool:
        return thread_id in self._window or any(thread_id in generation for generation in self._resident)

    # -- the worker's side -------------------------------------------------------------------------

    def open_gate(self, *, wide: bool = False) -> None:
        """Let calls in without asking: a few, so that the next wakes the worker, or as many as the bounds allow.

        Args:
            wide: the worker is at work. To wake it would cost a call ten times as much as the call itself.
        """
        with self.lock:
            self._raise_gate(self.max_queue_size if wide else NUDGE)

    def shut_gate(self) -> None:
        """Make the next call ask, which wakes the worker."""
        self.gate = 0
        self._waiting = None  # what came by the gate is not counted there

    def shut_for_fork(self) -> None:
        """Let no call in without asking, whoever raises the gate, until `forking` is reset.

        In a fork's child a call may come before anything else is done there. Appended without asking it would be
        written into the parent's files. Without the lock, which somebody may hold for long: whoever raises the gate
        looks once more right behind it, and between the two no other thread runs.
        """
        self.forking = True
        self.gate = 0

    def close(self) -> None:
        """Accept nothing more. The gate is raised under the lock alone, so it stays shut."""
        with self.lock, self._turn:
            self.closed = True
            self.gate = 0

    @property
    def resident_threads(self) -> int:
        """Distinct threads in memory, without those that only wait in the queue."""
        return self._threads

    @property
    def window_threads(self) -> int:
        """Deltas in the open window."""
        return len(self._window)

    @property
    def accepted(self) -> int:
        """Calls accepted by this life, ever."""
        with self.lock:
            return self.folded + len(self.queue.waiting())

    def _raise_gate(self, calls: int) -> None:
        self._waiting = None  # what came by the gate is not counted there
        room = self.max_queue_size if self.queue.on_disk else self.max_pending - self._threads
        self.gate = 0 if self.closed else max(0, min(calls, room, self.max_queue_size))
        if self.forking:
            self.gate = 0

    def _drain(self, limit: int, most: int) -> int:
        is_first = not self._window.deltas
        count = self.queue.drain(self._fold_all, limit, self._window.deltas, most)
        if is_first and count and (taken_at := self._taken_at()):
            self._window.oldest_at = taken_at
        self.folded += count
        while self._given and self._given[0][1] <= self.folded:
            self._given.popleft()
        return count

    def _taken_at(self) -> int:
        """Return when the call that is folded next was taken; 0 when it is the instant that it carries."""
        if self._given and self._given[0][0] <= self.folded:
            return self._given[0][2]
        return 0

    def _fold_all(self, records: Iterable[Record]) -> None:
        self._window.fold_all(records, self._count_in, self._totals.folded)

    def _count_in(self, thread_id: str) -> None:
        """Count a thread that is new in the open window."""
        for generation in self._resident:
            if thread_id in generation:
                return
        self._threads += 1
        room = self.max_pending - self._threads
        if self.gate > room and not self.queue.on_disk:
            self.gate = max(0, room)
            if self.forking:
                self.gate = 0

    def _recount(self, resident: tuple[Generation, ...]) -> None:
        """Count anew what is in memory, after a window came or went; *resident* are the sealed ones."""
        self._resident = resident
        if not self._resident:
            self._threads = len(self._window.deltas)
        elif self._journal is not None:
            rest = self._resident[0].deltas.keys() | self._resident[0].followers.keys()
            for generation in (*self._resident[1:], self._window):
                rest = rest | generation.deltas.keys()
            self._threads = len(rest)
