"""What was accepted and is not settled: the queue of calls, the open window, the sealed windows, the books.

Calls enter by `queue.append` alone; one worker moves them on:

    queue --drain--> open window --seal--> sealed windows --settle--> the books
                     (threads: deltas)     (batches in order)         (applied, dead-lettered, lost)

Rules:
1. Windows are swapped whole: what is sealed is never touched by new calls, and leaves only when settled.
2. At every instant a call is in the queue or in a window: `drain` folds a record before it takes it off the queue.
3. The bound is on distinct threads in memory; a call for a thread that is pending already is accepted however long the
   database is away. With a journal a window that would pass the bound waits in its files.
4. Whoever reads several numbers holds `lock`; the three calls never do.
5. A batch has its name, (producer, sequence), from the sealing on, or, in memory, from its first try on; a sequence is
   never used twice.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from itertools import chain
from threading import RLock
from typing import TYPE_CHECKING, Final
from uuid import UUID, uuid4

from tracker_daemon.books import Totals
from tracker_daemon.call_queue import CallQueue
from tracker_daemon.generation import KINDS, Generation, Record, summed
from tracker_daemon.journal.journal import operation_of
from tracker_daemon.journal.windows import Damage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tracker_daemon.books import Books
    from tracker_daemon.call_queue import Calls
    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.journal.journal import Journal
    from tracker_daemon.journal.records import Header
    from tracker_daemon.journal.windows import Window
    from tracker_daemon.sink import Applied

# How many calls may wait in the queue before one of them wakes the worker ahead of its time.
NUDGE: Final = 1_000


@dataclass(slots=True)
class _Sealed:
    """A sealed window: in memory, or in the journal's files alone."""

    generation: Generation | None
    stored: Window | None
    sealed_at: int
    oldest_at: int
    threads: int
    producer: UUID | None = None
    first: int = 0
    settled: int = 0
    header: Header | None = None
    """Of its first file, or of what would have been one."""
    batches: deque[tuple[ThreadDelta, ...]] = field(default_factory=deque)

    @property
    def calls(self) -> int:
        """Not settled yet."""
        if self.generation is None:
            return self.stored.calls if self.stored is not None else 0
        return sum(delta.calls for delta in chain(*self.batches))


class Backlog:
    """The stages between a call and its commit.

    Args:
        max_queue_size: calls in the queue.
        max_pending: distinct threads in queue, window and sealed generation together.
        max_batch_size: deltas in one batch.
        create_missing: whether a turn may create its row.
        journal: where calls are written as well, or `None`.
    """

    def __init__(
        self,
        *,
        max_queue_size: int,
        max_pending: int,
        max_batch_size: int,
        create_missing: bool,
        journal: Journal | None = None,
    ) -> None:
        self.max_queue_size, self.max_pending, self.max_batch_size = (
            max_queue_size,
            max_pending,
            max_batch_size,
        )
        self.create_missing = create_missing
        self._journal = journal
        self.queue: Calls = CallQueue() if journal is None else journal.queue
        self.gate = 0
        """Calls are appended without asking while the queue is shorter than this; 0 makes every call ask."""
        self.closed = False
        """Nothing is accepted any more."""
        self.lock = RLock()
        self.folded = 0
        """Calls taken off the queue, ever."""
        self.settled = 0
        """Every call up to this many, in order of acceptance, is settled."""
        self._window = Generation(create_missing=create_missing)
        self._sealed: deque[_Sealed] = deque()
        self._resident: tuple[Generation, ...] = ()
        # A sealed window in memory, an open one, and what waits in the queue for it: together within the bound. Where
        # the queue alone may pass it, not less than a quarter: each window is a file.
        self._most_in_window = max(1, max_pending // 4, max_pending // 2 - max_queue_size)
        self._producer, self._next = uuid4(), 1
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

    def drain(self, limit: int) -> int:
        """Fold at most *limit* calls from the queue into the open window; return how many."""
        with self.lock:
            count = self._drain(limit, self._most_in_window if self._can_store else sys.maxsize)
            self._waiting = None
            self._moves += 1
        return count

    @property
    def _can_store(self) -> bool:
        return self._journal is not None and self._journal.stores_window

    @property
    def must_seal(self) -> bool:
        """Whether the open window must be sealed before more is folded: it is full, or has ended where files did."""
        if self._journal is None:
            return False
        return self._journal.queue.is_cut or (len(self._window.deltas) >= self._most_in_window and self._can_store)

    def open_gate(self) -> None:
        """Let calls in without asking, as far as the bounds allow."""
        with self.lock:
            self._raise_gate(NUDGE)

    def close(self) -> None:
        """Accept nothing more. The gate is raised under the lock alone, so it stays shut."""
        with self.lock, self._turn:
            self.closed = True
            self.gate = 0

    def shut_gate(self) -> None:
        """Make the next call ask, which wakes the worker."""
        self.gate = 0
        self._waiting = None  # what came by the gate is not counted there

    @property
    def resident_threads(self) -> int:
        """Distinct threads in memory, without those that only wait in the queue."""
        return self._threads

    @property
    def window_threads(self) -> int:
        """Deltas in the open window."""
        return len(self._window)

    @property
    def recovering(self) -> bool:
        """Whether an earlier life's calls are still to be applied."""
        return self._journal is not None and self._journal.recovering

    def end_recovery(self) -> None:
        """What earlier lives left is applied, or stays where it is."""
        if self._journal is not None:
            self._journal.recovering = False

    @property
    def in_flight(self) -> bool:
        """Whether a sealed window is not settled yet."""
        return bool(self._sealed)

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all is pending."""
        return not (self.queue or self._window.deltas or self._sealed or self.recovering)

    @property
    def accepted(self) -> int:
        """Calls accepted by this life, ever."""
        with self.lock:
            return self.folded + len(self.queue.waiting())

    def seal(self) -> None:
        """Swap the windows: the open one is sealed. It stays in memory if it is the only one, or is in no file.

        An empty one is left open: there would be no batch whose end unseals it.
        """
        journal = self._journal
        if not (self._window.deltas or (journal is not None and (self.queue or journal.queue.is_cut))):
            return
        following = None if journal is None or journal.queue.is_cut else journal.queue.prepare_cut()
        with self.lock:
            segments = []
            if journal is not None:
                journal.queue.cut(following)
                while self._drain(sys.maxsize, sys.maxsize):
                    pass
                segments = journal.queue.take_window()
                if not self._window.deltas:  # callers needed room twice
                    journal.go_on(0)
                    journal.drop(segments)
                    return
            generation, self._window = self._window, Generation(create_missing=self.create_missing)
            batches = deque(generation.batches(self.max_batch_size))
            sealed = _Sealed(generation, None, self.folded, generation.oldest_at, len(generation.deltas))
            sealed.batches = batches
            if journal is not None:
                sealed.producer, sealed.first = journal.producer, journal.next_first
                sealed.header = segments[0].header
                sealed.stored = journal.seal(segments, len(batches), generation.calls, len(generation.deltas))
            if self._sealed and sealed.stored is not None:
                sealed.generation = None
                sealed.batches.clear()
            self._sealed.append(sealed)
            self._recount()

    def mend(self) -> None:
        """See to the windows whose files are not to be trusted, have grown long, or could not be had."""
        journal = self._journal
        assert journal is not None
        if journal.untrusted or any(sealed.stored is None for sealed in self._sealed):
            self.rewrite_sealed()
        if not (journal.stores_window or journal.queue.is_cut) and journal.may_try:
            self.leave_memory()
        if journal.wants_rewriting:
            self.rewrite()

    def leave_memory(self) -> None:
        """End an open window that is in memory, if a file can be had for the calls to come."""
        journal = self._journal
        assert journal is not None
        following = journal.queue.prepare_cut()
        if following.path is None:
            journal.drop([following])
        else:
            journal.queue.cut(following)

    def rewrite(self) -> None:
        """Write the open window anew, as sums: its files are not to be trusted, or have grown long."""
        journal = self._journal
        assert journal is not None
        number = journal.next_number()
        following = journal.queue.prepare_within()
        with self.lock:
            # No room: what is there is better than memory.
            if following.path is None or not journal.queue.cut_within(following):
                journal.drop([following])
                return
            while self._drain(sys.maxsize, sys.maxsize):
                pass
            before = journal.queue.take_read()
            anew = None
            if before:
                header = before[0].header
                anew = journal.write_anew(self._window, header, number, journal.next_first, sealed=False)
            journal.queue.put_back(before if anew is None else [anew])
            if anew is not None:
                journal.drop(before)

    def rewrite_sealed(self) -> None:
        """Write sealed windows anew that are in no file, or in one that is not to be trusted: what is not settled."""
        journal = self._journal
        assert journal is not None
        for sealed in list(self._sealed):
            window, header = sealed.stored, sealed.header
            bad = window is not None and not journal.trusts(window)
            if header is None or (window is not None and not bad) or not journal.may_write_anew:
                continue
            generation = sealed.generation
            if generation is None:
                assert window is not None
                try:
                    generation = window.load()
                except (Damage, OSError) as error:  # held, not guessed: it is read again when its turn comes
                    journal.fail(operation_of(error), error)
                    continue
            first = sealed.first + sealed.settled
            anew = journal.write_anew(generation, header, journal.next_number(), first, sealed=True)
            if anew is not None:
                batches, calls = sum(1 for _ in generation.batches(self.max_batch_size)), generation.calls
                if window is None:
                    self._store(sealed, journal.stored(anew, batches, calls, len(generation.deltas)))
                else:
                    journal.replace(window, anew, batches, calls)

    def _store(self, sealed: _Sealed, window: Window) -> None:
        """A window that was in memory alone is in files; in both, if it is the oldest."""
        with self.lock:
            sealed.stored = window
            if sealed is not self._sealed[0]:
                sealed.generation = None
                sealed.batches.clear()
                self._recount()

    def unstore_head(self) -> None:
        """Let the oldest sealed window, which is in memory, go on there alone: its files are not to be trusted."""
        sealed, journal = self._sealed[0], self._journal
        assert journal is not None
        assert sealed.stored is not None
        journal.forget(sealed.stored)
        sealed.stored = None

    def head(self) -> tuple[ThreadDelta, ...] | None:
        """Return the oldest sealed batch; it stays until `settle`. `None`: there is none, or it must be `load`ed."""
        return self._sealed[0].batches[0] if self._sealed and self._sealed[0].batches else None

    @property
    def head_oldest_at(self) -> int:
        """When the oldest call of the oldest sealed window was taken, nanoseconds since 1970."""
        return self._sealed[0].oldest_at if self._sealed else 0

    @property
    def stored_head(self) -> Window | None:
        """The oldest sealed window, when it is in files alone."""
        return self._sealed[0].stored if self._sealed and self._sealed[0].generation is None else None

    @property
    def head_window(self) -> Window | None:
        """Where the oldest sealed window is stored, if it is."""
        return self._sealed[0].stored if self._sealed else None

    def load(self, window: Window, generation: Generation) -> None:
        """Take back what was read of a stored window."""
        with self.lock:
            if self.stored_head is window:
                sealed = self._sealed[0]
                sealed.generation = generation
                sealed.batches = deque(generation.batches(self.max_batch_size))
                self._recount()

    def lose_stored_head(self, window: Window) -> None:
        """Give up a stored window whose files are gone: count it as lost."""
        with self.lock:
            if self.stored_head is window:
                sealed = self._sealed.popleft()
                self._totals.lost["journal_gone"] += sealed.calls
                self.settled = sealed.sealed_at
                self._recount()

    @property
    def producer(self) -> UUID:
        """Whose batches the next ones are."""
        return self._producer if self._journal is None else self._journal.producer

    def name(self, *, renew: bool = False) -> tuple[UUID, int]:
        """Return the producer and the sequence of the head.

        Args:
            renew: go on under a new producer, where the head has no name yet.
        """
        sealed = self._sealed[0]
        if sealed.producer is None:
            if renew:
                self._producer, self._next = uuid4(), 1
            sealed.producer, sealed.first = self._producer, self._next
            self._next += len(sealed.batches)
        return sealed.producer, sealed.first + sealed.settled

    def settle(self, batch: tuple[ThreadDelta, ...], applied: Applied) -> Window | None:
        """Forget *batch*, the oldest sealed one: the sink has it. Return its window if that is done and stored."""
        with self.lock:
            if self.head() is not batch:
                return None  # given up at a deadline, and counted as lost there
            sealed = self._sealed[0]
            sealed.batches.popleft()
            sealed.settled += 1
            self._totals.settle(batch, applied)
            released = sum(self._release(delta) for delta in batch)
            # In this order: until the room grows, whoever counts finds the released threads that wait again.
            self._moves += 1
            self._threads -= released
            if sealed.batches:
                return None
            self._sealed.popleft()
            self.settled = sealed.sealed_at
            self._recount()
            return sealed.stored

    def recover(self, batches: Iterable[tuple[ThreadDelta, ...]]) -> None:
        """See `Totals.recover`."""
        with self.lock:
            self._totals.recover(batches)

    def settle_recovered(self, batch: tuple[ThreadDelta, ...], applied: Applied) -> None:
        """See `Totals.settle_recovered`."""
        with self.lock:
            self._totals.settle_recovered(batch, applied)

    def set_aside(self) -> None:
        """See `Totals.set_aside`."""
        with self.lock:
            self._totals.set_aside()

    def abandon(self, reason: str) -> int:
        """Give up everything pending: what the journal has stays there, the rest is lost for *reason*; return that."""
        with self.lock:
            lost = 0
            for sealed in self._sealed:
                if sealed.stored is None:
                    lost += sealed.calls
                else:
                    self._totals.journaled += sealed.calls
            lost += self._abandon_open()
            self.set_aside()
            self.end_recovery()
            if lost:
                self._totals.lost[reason] += lost
            self._sealed.clear()
            self._recount()
            self._waiting = None
            self._moves += 1
            self.settled = self.folded
            return lost

    def _abandon_open(self) -> int:
        """Give up the open window, and those after it: of each all is in files, or nothing. Return what is lost."""
        journal, lost = self._journal, 0
        while True:
            while self._drain(sys.maxsize, sys.maxsize):
                pass
            window, self._window = self._window, Generation(create_missing=self.create_missing)
            if self._can_store:
                self._totals.journaled += window.calls
            else:
                lost += window.calls
            if journal is None or not journal.queue.is_cut:
                return lost
            batches = sum(1 for _ in window.batches(self.max_batch_size))
            journal.queue.pass_over()
            journal.go_on(batches)

    # -- whoever asks ------------------------------------------------------------------------------

    def pending(self, thread_id: str) -> ThreadDelta | None:
        """Return the sum of what is uncommitted of one thread, or `None`. Reads the files of stored windows."""
        with self.lock:
            stored = [sealed.stored for sealed in self._sealed if sealed.generation is None]
            parts = [part for generation in self._resident for part in generation.of(thread_id)]
            late = list(self._window.of(thread_id))
            waiting = [record for record in self.queue.waiting() if record[0] == thread_id]
            late = [part.copy() for part in late]
        for window in stored:
            if window is not None:
                parts += window.of(thread_id)
        parts += late
        if waiting:
            parts.append(summed(waiting))
        if not parts:
            return None
        total = parts[0].copy()
        for part in parts[1:]:
            total = total.merge(part)
        return total

    def books(self) -> Books:
        """Read all numbers at one instant."""
        with self.lock:
            waiting = self.queue.waiting()
            unseen = {record[0] for record in waiting if not self._holds(record[0])}
            oldest = self._sealed[0].oldest_at if self._sealed else self._window.oldest_at
            oldest = oldest or next((self._taken_at() or record[-1] for record in waiting), 0)
            stored = sum(sealed.threads for sealed in self._sealed if sealed.generation is None)
            return self._totals.reading(waiting, self._threads + len(unseen) + stored, oldest)

    # -- inside ------------------------------------------------------------------------------------

    def _raise_gate(self, calls: int) -> None:
        self._waiting = None  # what came by the gate is not counted there
        room = self.max_queue_size if self.queue.on_disk else self.max_pending - self._threads
        self.gate = 0 if self.closed else max(0, min(calls, room, self.max_queue_size))

    def _drain(self, limit: int, most: int) -> int:
        is_first = not self._window.deltas
        count = self.queue.drain(self._fold, limit, self._window.deltas, most)
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

    def _fold(self, record: Record) -> None:
        if self._window.fold(record):
            thread_id = record[0]
            for generation in self._resident:
                if thread_id in generation:
                    break
            else:
                self._threads += 1
                room = self.max_pending - self._threads
                if self.gate > room and not self.queue.on_disk:
                    self.gate = max(0, room)
        self._totals.folded[KINDS[len(record)]] += 1

    def _release(self, delta: ThreadDelta) -> bool:
        """Let go of a settled delta; say whether nothing more of its thread is held."""
        generation = self._sealed[0].generation
        assert generation is not None  # it was the head
        generation.release(delta)
        return not self._holds(delta.thread_id)

    def _recount(self) -> None:
        """Count anew what is in memory, after a window came or went."""
        self._resident = tuple(sealed.generation for sealed in self._sealed if sealed.generation is not None)
        if not self._resident:
            self._threads = len(self._window.deltas)
        elif self._journal is not None:
            rest = self._resident[0].deltas.keys() | self._resident[0].followers.keys()
            for generation in (*self._resident[1:], self._window):
                rest = rest | generation.deltas.keys()
            self._threads = len(rest)
