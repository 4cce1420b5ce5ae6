"""What was accepted and is not settled: the queue of calls, the open window, the sealed windows, the books.

Calls enter by `queue.put` alone; one worker moves them on:

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
from typing import TYPE_CHECKING, Final
from uuid import UUID, uuid4

from tracker_daemon.breath import Breath
from tracker_daemon.delta import unpacked
from tracker_daemon.generation import Generation, summed
from tracker_daemon.intake import Intake
from tracker_daemon.sealed import Sealed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from random import Random

    from tracker_daemon.books import Books
    from tracker_daemon.delta import Deltas, ThreadDelta
    from tracker_daemon.journal.journal import Journal
    from tracker_daemon.journal.windows import Window
    from tracker_daemon.sink import Applied

# Rows settled at once, the first time.
_SETTLED: Final = 200


class Backlog(Intake):
    """The stages between a call and its commit.

    Args:
        max_queue_size, max_pending, create_missing, journal: see `Intake`.
        max_batch_size: deltas in one batch.
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
        super().__init__(
            max_queue_size=max_queue_size, max_pending=max_pending, create_missing=create_missing, journal=journal
        )
        self.max_batch_size = max_batch_size
        self.settled = 0
        """Every call up to this many, in order of acceptance, is settled."""
        self.sealed: deque[Sealed] = deque()
        """The windows that are sealed and not settled, the oldest first."""
        # A sealed window in memory, an open one, and what waits in the queue for it: together within the bound. Where
        # the queue alone may pass it, not less than a quarter: each window is a file.
        self._most_in_window = max(1, max_pending // 4, max_pending // 2 - max_queue_size)
        self._producer, self._next = uuid4(), 1
        self._breath = Breath(_SETTLED)

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

    @property
    def recovering(self) -> bool:
        """Whether an earlier life's calls are still to be applied."""
        return self._journal is not None and self._journal.recovering

    def end_recovery(self) -> None:
        """What earlier lives left is applied, or stays where it is."""
        if self._journal is not None:
            self._journal.end_recovery()

    @property
    def in_flight(self) -> bool:
        """Whether a sealed window is not settled yet."""
        return bool(self.sealed)

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all is pending."""
        return not (self.queue or self._window.deltas or self.sealed or self.recovering)

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
            batches: deque[Deltas] = deque()
            for batch in generation.batches(self.max_batch_size):
                batches.append(batch)
                self._breath.take()
            sealed = Sealed(generation, None, self.folded, generation.oldest_at, len(generation.deltas))
            sealed.batches = batches
            if journal is not None:
                sealed.producer, sealed.first = journal.producer, journal.next_first
                sealed.header = segments[0].header
                sealed.stored = journal.seal(segments, len(batches), generation.calls, len(generation.deltas))
            if self.sealed and sealed.stored is not None:
                sealed.generation = None
                sealed.batches.clear()
            self.sealed.append(sealed)
            self._recount(self._in_memory)

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

    def store(self, sealed: Sealed, window: Window) -> None:
        """A window that was in memory alone is in files; in both, if it is the oldest."""
        with self.lock:
            sealed.stored = window
            if sealed is not self.sealed[0]:
                sealed.generation = None
                sealed.batches.clear()
                self._recount(self._in_memory)

    @property
    def _in_memory(self) -> tuple[Generation, ...]:
        return tuple(sealed.generation for sealed in self.sealed if sealed.generation is not None)

    def head(self) -> Deltas | None:
        """Return the oldest sealed batch; it stays until `settle`. `None`: there is none, or it must be `load`ed."""
        return self.sealed[0].batches[0] if self.sealed and self.sealed[0].batches else None

    @property
    def head_oldest_at(self) -> int:
        """When the oldest call of the oldest sealed window was taken, nanoseconds since 1970."""
        return self.sealed[0].oldest_at if self.sealed else 0

    @property
    def stored_head(self) -> Window | None:
        """The oldest sealed window, when it is in files alone."""
        return self.sealed[0].stored if self.sealed and self.sealed[0].generation is None else None

    @property
    def head_window(self) -> Window | None:
        """Where the oldest sealed window is stored, if it is."""
        return self.sealed[0].stored if self.sealed else None

    def load(self, window: Window, generation: Generation) -> None:
        """Take back what was read of a stored window."""
        with self.lock:
            if self.stored_head is window:
                sealed = self.sealed[0]
                sealed.generation = generation
                sealed.batches = deque(generation.batches(self.max_batch_size))
                self._recount(self._in_memory)

    def following(self, batch: Sequence[ThreadDelta], most: int, random: Random) -> list[ThreadDelta]:
        """Return a few deltas of those in memory that wait beside *batch*, of other batches and of the window.

        Each of them may be among those: were they always the first ones, a few bad rows there would hide all others.
        """
        with self.lock:
            first = random.randrange(max(1, len(self._window) - most + 1))
            found = self._window.part(first, most)
            for window in self.sealed:
                for each in window.batches:
                    if each is not batch:
                        found += map(unpacked, random.sample(each.rows, min(most, len(each))))
        return random.sample(found, min(most, len(found)))

    def lose_stored_head(self, window: Window) -> None:
        """Give up a stored window whose files are gone: count it as lost."""
        with self.lock:
            if self.stored_head is window:
                sealed = self.sealed.popleft()
                self._totals.lost["journal_gone"] += sealed.calls
                self.settled = sealed.sealed_at
                self._recount(self._in_memory)

    @property
    def producer(self) -> UUID:
        """Whose batches the next ones are."""
        return self._producer if self._journal is None else self._journal.producer

    def name(self, *, renew: bool = False) -> tuple[UUID, int]:
        """Return the producer and the sequence of the head.

        Args:
            renew: go on under a new producer, where the head has no name yet.
        """
        sealed = self.sealed[0]
        if sealed.producer is None:
            if renew:
                self._producer, self._next = uuid4(), 1
            sealed.producer, sealed.first = self._producer, self._next
            self._next += len(sealed.batches)
        return sealed.producer, sealed.first + sealed.settled

    def settle(self, batch: Deltas, applied: Applied) -> Window | None:
        """Forget *batch*, the oldest sealed one: the sink has it. Return its window if that is done and stored."""
        self._breath.take()
        with self.lock:
            if self.head() is not batch:
                return None  # given up at a deadline, and counted as lost there
            sealed = self.sealed[0]
            sealed.batches.popleft()
            sealed.settled += 1
            released = self._release(batch, applied)
            # In this order: until the room grows, whoever counts finds the released threads that wait again.
            self._moves += 1
            self._threads -= released
            if sealed.batches:
                return None
            self.sealed.popleft()
            self.settled = sealed.sealed_at
            self._recount(self._in_memory)
            return sealed.stored

    def recover(self, batches: Iterable[Iterable[ThreadDelta]]) -> None:
        """See `Totals.recover`."""
        with self.lock:
            self._totals.recover(batches)

    def settle_recovered(self, batch: Iterable[ThreadDelta], applied: Applied) -> None:
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
            for sealed in self.sealed:
                if sealed.stored is None:
                    lost += sealed.calls
                else:
                    self._totals.journaled += sealed.calls
            lost += self._abandon_open()
            self.set_aside()
            self.end_recovery()
            if lost:
                self._totals.lost[reason] += lost
            self.sealed.clear()
            self._recount(self._in_memory)
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
            stored = [sealed.stored for sealed in self.sealed if sealed.generation is None]
            parts = [part for generation in self._resident for part in generation.of(thread_id)]
            late = list(self._window.of(thread_id))
            waiting = self.queue.waiting().of(thread_id)
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
            unseen = sum(not self._holds(thread_id) for thread_id in set(waiting.threads))
            oldest = self.sealed[0].oldest_at if self.sealed else self._window.oldest_at
            oldest = oldest or next((self._taken_at() or record[-1] for record in waiting), 0)
            stored = sum(sealed.threads for sealed in self.sealed if sealed.generation is None)
            uncounted = self.queue.folding.methods + waiting.methods
            return self._totals.reading(uncounted, self._threads + unseen + stored, oldest)

    # -- inside ------------------------------------------------------------------------------------

    def _release(self, batch: Deltas, applied: Applied) -> int:
        """Count a settled batch and let go of it; return of how many of its threads nothing more is held."""
        generation = self.sealed[0].generation
        assert generation is not None  # it was the head
        released, dead = 0, applied.dead
        self._totals.rows_skipped += applied.skipped
        for part in self._breath.parts(batch.rows):
            self._totals.settle(part, dead)
            left = generation.release(part)
            for other in (*self._resident, self._window):
                left = other.without(left)
            released += len(left)
        return released
