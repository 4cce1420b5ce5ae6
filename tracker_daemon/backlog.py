"""What was accepted and is not settled: the queue of calls, the open window, the sealed generation, the books.

Calls enter by `queue.append` alone; one worker moves them on:

    queue --drain--> open window --seal--> sealed generation --settle--> the books
                     (threads: deltas)     (batches in order)            (applied, dead-lettered, lost)

Rules:
1. Two generations, swapped whole: what is sealed is never touched by new calls, and leaves only when settled.
2. At every instant a call is in the queue or in a window: `drain` folds a record before it takes it off the queue.
3. The bound is on distinct threads; a call for a thread that is pending already is accepted however long the
   database is away.
4. Whoever reads several numbers holds `lock`; the three calls never do.
5. `create_missing=False`: what comes to a thread from its first `ensure` on is kept apart (`followers`) when earlier
   calls of the window may find no row, and goes in a later batch. So the outcome does not depend on windows.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import chain, islice
from threading import RLock
from typing import TYPE_CHECKING, Final, TypeAlias

from tracker_daemon.delta import ThreadDelta

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tracker_daemon.calls import Cost
    from tracker_daemon.sink import Applied

# A call in the queue; its length tells its kind. The instant comes last, in nanoseconds since 1970.
Ensure: TypeAlias = "tuple[str, int]"
Resolve: TypeAlias = "tuple[str, str, int]"
Turn: TypeAlias = "tuple[str, str | None, int, Cost, int]"
Record: TypeAlias = "Ensure | Resolve | Turn"

KINDS: Final = {2: "ensure_conversation", 5: "record_turn", 3: "resolve"}
_ENSURE: Final = 2
LOST_REASONS: Final = ("deadline", "halted", "worker_failed", "closed")

# How many calls may wait in the queue before one of them wakes the worker ahead of its time.
NUDGE: Final = 1_000


class Generation:
    """The deltas of one window by thread, in order of first call."""

    __slots__ = ("deltas", "followers", "oldest_at")

    def __init__(self) -> None:
        self.deltas: dict[str, ThreadDelta] = {}
        self.followers: dict[str, ThreadDelta] = {}
        self.oldest_at = 0

    def __contains__(self, thread_id: str) -> bool:
        return thread_id in self.deltas or thread_id in self.followers

    def of(self, thread_id: str) -> Iterator[ThreadDelta]:
        """Yield what the generation holds of one thread, in order."""
        for part in (self.deltas, self.followers):
            if thread_id in part:
                yield part[thread_id]

    def batches(self, size: int) -> Iterator[tuple[ThreadDelta, ...]]:
        """Yield the deltas in order, at most *size* at once and no thread twice in one of them."""
        for part in (self.deltas, self.followers):
            deltas = iter(part.values())
            while batch := tuple(islice(deltas, size)):
                yield batch


@dataclass(frozen=True, slots=True)
class Books:
    """One consistent reading, in calls; by kind of call or by reason where it is a mapping."""

    accepted: dict[str, int]
    applied: dict[str, int]
    dead_lettered: dict[str, int]
    lost: dict[str, int]
    queue_calls: int
    """Accepted and neither applied, dead-lettered nor lost."""
    threads: int
    """Distinct threads with uncommitted change."""
    oldest_at: int
    """Nanoseconds since 1970 of the oldest pending call; 0 when nothing is pending."""
    rows_skipped: int


@dataclass(slots=True)
class _Totals:
    folded: Counter[str] = field(default_factory=Counter)
    applied: Counter[str] = field(default_factory=Counter)
    dead_lettered: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    rows_skipped: int = 0


class Backlog:
    """The stages between a call and its commit.

    Args:
        max_queue_size: calls in the queue.
        max_pending: distinct threads in queue, window and sealed generation together.
        max_batch_size: deltas in one batch.
        create_missing: whether a turn may create its row (rule 5).
    """

    def __init__(self, *, max_queue_size: int, max_pending: int, max_batch_size: int, create_missing: bool) -> None:
        self.max_queue_size, self.max_pending, self.max_batch_size = (
            max_queue_size,
            max_pending,
            max_batch_size,
        )
        self.create_missing = create_missing
        self.queue: deque[Record] = deque()
        self.gate = 0
        """Calls are appended without asking while the queue is shorter than this; 0 makes every call ask."""
        self.closed = False
        """Nothing is accepted any more."""
        self.lock = RLock()
        self.folded = 0
        """Calls taken off the queue, ever."""
        self.settled = 0
        """Every call up to this many, in order of acceptance, is settled."""
        self._window = Generation()
        self._sealed = Generation()
        self._batches: deque[tuple[ThreadDelta, ...]] = deque()
        self._sealed_at = 0
        self._threads = 0
        self._turn = RLock()
        self._waiting: set[str] | None = None
        self._moves = self._new = 0
        self._counted = -1
        self._totals = _Totals()

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
            if waiting < self.max_pending - self._threads:
                # Even if every waiting call were of a new thread, this one still fits.
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

    def _fits_near_the_bound(self, thread_id: str) -> bool:
        waiting, moves = self._waiting, self._moves
        if self.gate or waiting is None:
            # Calls may have come by the gate: look once which threads wait, then keep count here.
            self.gate = 0
            waiting = self._waiting = {record[0] for record in self.queue.copy()}
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
        return thread_id in self._window or thread_id in self._sealed

    # -- the worker's side -------------------------------------------------------------------------

    def drain(self, limit: int) -> int:
        """Fold at most *limit* calls from the queue into the open window; return how many."""
        queue = self.queue
        with self.lock:
            count = min(limit, len(queue))
            folded = self._totals.folded
            for _ in range(count):
                record = queue[0]
                self._fold(record)
                queue.popleft()
                folded[KINDS[len(record)]] += 1
            self.folded += count
            self._waiting = None
            self._moves += 1
        return count

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
    def window_threads(self) -> int:
        """Deltas in the open window."""
        return len(self._window.deltas) + len(self._window.followers)

    @property
    def in_flight(self) -> bool:
        """Whether a sealed generation is not settled yet."""
        return bool(self._batches)

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all is pending."""
        return not (self.queue or self._window.deltas or self._batches)

    @property
    def accepted(self) -> int:
        """Calls accepted, ever."""
        with self.lock:
            return self.folded + len(self.queue)

    def seal(self) -> None:
        """Swap the generations: the open window becomes the sealed one. Nothing may be in flight."""
        with self.lock:
            self._sealed, self._window = self._window, Generation()
            self._batches.extend(self._sealed.batches(self.max_batch_size))
            self._sealed_at = self.folded

    def head(self) -> tuple[ThreadDelta, ...] | None:
        """Return the oldest sealed batch; it stays until `settle`."""
        return self._batches[0] if self._batches else None

    def settle(self, batch: tuple[ThreadDelta, ...], applied: Applied) -> None:
        """Forget *batch*, the oldest sealed one: the sink has it."""
        dead = {letter.delta.thread_id: letter.reason for letter in applied.dead_letters}
        with self.lock:
            if self.head() is not batch:
                return  # given up at a deadline, and counted as lost there
            released = 0
            for delta in self._batches.popleft():
                released += self._release(delta)
                if reason := dead.get(delta.thread_id):
                    self._totals.dead_lettered[reason] += delta.calls
                else:
                    _count(self._totals.applied, delta)
            self._totals.rows_skipped += applied.skipped
            # In this order: until the room grows, whoever counts finds the released threads that wait again.
            self._moves += 1
            self._threads -= released
            if not self._batches:
                self.settled = self._sealed_at
                self._sealed = Generation()

    def abandon(self, reason: str) -> int:
        """Give up everything pending, counted as lost for *reason*; return the calls."""
        with self.lock:
            while self.drain(len(self.queue)):
                pass
            lost = sum(delta.calls for delta in chain(*self._batches, *self._window.batches(self.max_batch_size)))
            if lost:
                self._totals.lost[reason] += lost
            self._window, self._sealed = Generation(), Generation()
            self._batches.clear()
            self._threads = 0
            self._waiting = None
            self._moves += 1
            self.settled = self.folded
            return lost

    # -- whoever asks ------------------------------------------------------------------------------

    def pending(self, thread_id: str) -> ThreadDelta | None:
        """Return the sum of what is uncommitted of one thread, or `None`."""
        with self.lock:
            parts = [*self._sealed.of(thread_id), *self._window.of(thread_id)]
            waiting = [record for record in self.queue.copy() if record[0] == thread_id]
        if waiting:
            parts.append(_sum(waiting))
        if not parts:
            return None
        total = parts[0].copy()
        for part in parts[1:]:
            total = total.merge(part)
        return total

    def books(self) -> Books:
        """Read all numbers at one instant."""
        with self.lock:
            waiting = self.queue.copy()
            totals = self._totals
            accepted = totals.folded + Counter(KINDS[len(record)] for record in waiting)
            settled = totals.applied.total() + totals.dead_lettered.total() + totals.lost.total()
            unseen = {record[0] for record in waiting if record[0] not in self._window}
            oldest = self._sealed.oldest_at or self._window.oldest_at or (waiting[0][-1] if waiting else 0)
            return Books(
                accepted=dict(accepted),
                applied=dict(totals.applied),
                dead_lettered=dict(totals.dead_lettered),
                lost=dict(totals.lost),
                queue_calls=accepted.total() - settled,
                threads=self._threads + sum(thread_id not in self._sealed for thread_id in unseen),
                oldest_at=oldest,
                rows_skipped=totals.rows_skipped,
            )

    # -- inside ------------------------------------------------------------------------------------

    def _raise_gate(self, calls: int) -> None:
        self._waiting = None  # what came by the gate is not counted there
        self.gate = 0 if self.closed else max(0, min(calls, self.max_pending - self._threads, self.max_queue_size))

    def _fold(self, record: Record) -> None:
        thread_id = record[0]
        at = record[-1] // 1_000
        window = self._window
        delta = window.deltas.get(thread_id)
        if delta is None:
            delta = ThreadDelta(thread_id, at)
            if not window.oldest_at:
                window.oldest_at = record[-1]
            if thread_id not in self._sealed:
                self._threads += 1
                room = self.max_pending - self._threads
                if self.gate > room:
                    self.gate = room
            window.deltas[thread_id] = delta
        elif not self.create_missing and not delta.ensures:
            delta = self._follower(thread_id, delta, record)
        add(delta, record)

    def _follower(self, thread_id: str, delta: ThreadDelta, record: Record) -> ThreadDelta:
        followers = self._window.followers
        if thread_id not in followers and len(record) == _ENSURE:
            followers[thread_id] = ThreadDelta(thread_id, record[-1] // 1_000)
        return followers.get(thread_id, delta)

    def _release(self, delta: ThreadDelta) -> bool:
        """Let go of a settled delta; say whether nothing more of its thread is held."""
        thread_id, sealed = delta.thread_id, self._sealed
        part = sealed.deltas if sealed.deltas.get(thread_id) is delta else sealed.followers
        del part[thread_id]
        return not self._holds(thread_id)


def add(delta: ThreadDelta, record: Record) -> None:
    """Add one queued call to *delta*."""
    at = record[-1] // 1_000
    if len(record) == 2:
        delta.ensure(at)
    elif len(record) == 3:
        delta.resolve(record[1], at)
    else:
        delta.turn(record[1], record[2], record[3], at)


def _sum(records: Sequence[Record]) -> ThreadDelta:
    delta = ThreadDelta(records[0][0], records[0][-1] // 1_000)
    for record in records:
        add(delta, record)
    return delta


def _count(counter: Counter[str], delta: ThreadDelta) -> None:
    counter["ensure_conversation"] += delta.ensures
    counter["record_turn"] += delta.turns
    counter["resolve"] += delta.resolves
