"""The calls' side of the backlog: the queue, the window that they are folded into, and the bounds on both.

Rules:
1. Calls are appended to `queue` without asking as often as `gate` says; else by `enter`, which keeps bounds.
2. The bound is on distinct threads in memory; a call for a thread that is pending already is accepted however long the
   database is away.
3. The gate is raised under `lock`, or, far from the second bound, in a caller's turn. Callers take `_turn`, which the
   worker never does but to close.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from itertools import repeat
from operator import length_hint
from threading import RLock
from typing import TYPE_CHECKING, Any, Final

from tracker_daemon.books import Totals
from tracker_daemon.call_queue import CallQueue
from tracker_daemon.free_lock import if_free, is_mine
from tracker_daemon.generation import Generation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tracker_daemon.call_queue import Calls
    from tracker_daemon.generation import Record
    from tracker_daemon.journal.journal import Journal

# How many calls may wait in the queue before one of them wakes the worker ahead of its time.
NUDGE: Final = 1_000
_SHUT: Final[repeat[Any]] = repeat(None, 0)


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
        self.gate: Iterator[Callable[[Record], object]] = _SHUT
        """Gives the queue's `put` to as many calls as may come in without asking; then, and shut, to none.

        Taking a place is one step of the interpreter, in which no other thread runs: no two calls get the same. To ask
        the queue for its length would make an integer for every call.
        """
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
        self._turn, self._raising = RLock(), RLock()
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
        if not is_mine(self.lock):
            with self._turn:
                return self._enter(record)
        # A finalizer's call amid the worker's own fold does not wait for a turn: whoever has it may wait for the lock.
        bounds: list[str | None] = []
        if not if_free(self._turn, lambda: bounds.append(self._enter(record))):
            bounds.append(self._enter(record))
        return bounds[0]

    def _enter(self, record: Record) -> str | None:
        waiting = len(self.queue)
        if self.closed:
            return "closed"
        if waiting >= self.max_queue_size:
            return "max_queue_size"
        # In a file; or even if every waiting call were of a new thread, this one still fits.
        is_room = self.queue.on_disk or waiting < self.max_pending - self._threads
        if is_room:
            self._waiting = None
        elif not self._fits_near_the_bound(record[0]):
            return "max_pending"
        self.queue.put(record)
        if is_room:
            self._raise_for_others(max(NUDGE, 2 * waiting))
        return None

    def _raise_for_others(self, calls: int) -> None:
        """Raise the gate, that who comes next need not take a turn; not where what is folded now may reach a bound."""
        if if_free(self.lock, partial(self._raise_gate, calls)):
            return
        # The worker is folding, and may be for long: it has lost the interpreter to those who call.
        if self.queue.on_disk or self.max_pending - self._threads >= 2 * self.max_queue_size:
            self._raise_gate(calls)

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
            self.gate = _SHUT
            if taken_at:
                first = self.folded + len(self.queue)
                self._given.append((first, first + len(records), taken_at))
            for record in records:
                self.queue.put(record)
            self._waiting = None
            return None

    def _fits_near_the_bound(self, thread_id: str) -> bool:
        waiting, moves = self._waiting, self._moves
        if self.gate is not _SHUT or waiting is None:
            # Calls may have come by the gate: look once which threads wait, then keep count here.
            self.gate = _SHUT
            waiting = self._waiting = set(self.queue.waiting().threads)
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
        self.gate = _SHUT
        self._waiting = None  # what came by the gate is not counted there

    def shut_for_fork(self) -> None:
        """Let no call in without asking, whoever raises the gate, until `forking` is reset.

        In a fork's child a call may come before anything else is done there. Appended without asking it would be
        written into the parent's files. Without the lock, which somebody may hold for long: whoever raises the gate
        looks once more right behind it, and between the two no other thread runs.
        """
        self.forking = True
        self.gate = _SHUT

    def close(self) -> None:
        """Accept nothing more. The gate is raised under the lock alone, so it stays shut."""
        with self.lock, self._turn:
            self.closed = True
            self.gate = _SHUT

    @property
    def places(self) -> int:
        """How many calls may come in without asking."""
        return length_hint(self.gate)

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
            return self.folded + self.queue.unfolded

    def _raise_gate(self, calls: int) -> None:
        # One thread at a time; nobody waits: a finalizer may run in here.
        if_free(self._raising, partial(self._raise_to, calls))

    def _raise_to(self, calls: int) -> None:
        self._waiting = None  # what came by the gate is not counted there
        room = self.max_queue_size if self.queue.on_disk else self.max_pending - self._threads
        most = 0 if self.closed else min(calls, room, self.max_queue_size)
        self._set_gate(most - len(self.queue))
        self._lower_gate(most)

    def _lower_gate(self, most: int) -> None:
        """See to it that by the gate the queue does not grow longer than this; calls may come meanwhile."""
        while self.places and self.places + len(self.queue) > most:
            self._set_gate(min(self.places, most - len(self.queue)))

    def _set_gate(self, places: int) -> None:
        self.gate = repeat(self.queue.put, places) if places > 0 else _SHUT
        if self.forking or self.closed:  # meanwhile: a signal's handler may close
            self.gate = _SHUT

    def _drain(self, limit: int, most: int) -> int:
        is_first = not self._window.deltas
        try:
            count = self.queue.drain(self._fold_all, limit, self._window.deltas, most)
            if is_first and count and (taken_at := self._taken_at()):
                self._window.oldest_at = taken_at
        finally:
            # An exception in the middle: those before it are folded, and taken off.
            self.folded = self._totals.folded.total()
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
        if room < self.max_queue_size and not self.queue.on_disk:
            self._lower_gate(room)

    def _recount(self, resident: tuple[Generation, ...]) -> None:
        """Count anew what is in memory, after a window came or went; *resident* are the sealed ones."""
        self._resident = resident
        if not self._resident:
            self._threads = len(self._window.deltas)
        elif len(resident) == 1 and not (self._window.deltas or resident[0].followers):
            # After most seals: no need to put the names of all together.
            self._threads = len(resident[0].deltas)
        elif self._journal is not None:
            rest = self._resident[0].deltas.keys() | self._resident[0].followers.keys()
            for generation in (*self._resident[1:], self._window):
                rest = rest | generation.deltas.keys()
            self._threads = len(rest)
