"""The Prometheus collector: reads the trackers' plain integers when it is scraped.

Rules:
1. One collector a registry; several trackers on it add up.
2. What a tracker counted stays, closed or dropped; of those that are gone one sum is kept, however many they were. No
   tracker is held here: one that nobody else holds is freed.
3. No counter ever goes back, whatever is closed or freed meanwhile: an account leaves, and the sum of those that are
   gone grows, in one step.
4. Every child exists from the first scrape; no label has values that a caller chooses.
5. `accepted = applied + dead_lettered + lost + queue_calls` in every scrape: one reading of the books gives them all.
"""

from __future__ import annotations

import os
from threading import Lock
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary, ref

from prometheus_client.registry import Collector, CollectorRegistry

from tracker_daemon.families import families
from tracker_daemon.readings import Reading, Sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client.core import Metric

    from tracker_daemon.backlog import Backlog
    from tracker_daemon.flush_numbers import FlushNumbers
    from tracker_daemon.front_door import Refusals
    from tracker_daemon.journal.journal import Journal


class Source(Protocol):
    """A tracker, as the collector sees it."""

    def reading(self) -> Reading:
        """Read all numbers now."""
        ...


class Counted(Protocol):
    """What is summed up at a scrape.

    Attributes:
        closed: whether its limit and state count no more.
        folded: whether what it counted is in the sum of those that are gone.
    """

    closed: bool
    folded: bool

    @property
    def ended(self) -> bool:
        """Whether it is gone, and nothing is counted any more."""
        ...

    def collected(self) -> Reading:
        """Read all numbers now."""
        ...


class Account:
    """Where one tracker counts, apart from it: what it counted outlives it.

    Nothing here may lead back to the tracker, or it would live as long as the registry.

    Attributes:
        started: whether the worker was started; from then on the tracker lives until it is closed.
        closed: whether the tracker's limit and state count no more.
        folded: whether what was counted is in the sum of those that are gone.
    """

    def __init__(self, owner: Source) -> None:
        self._owner = ref(owner)
        self.started = self.closed = self.folded = False

    def begin(
        self, backlog: Backlog, refusals: Refusals, numbers: FlushNumbers, journal: Journal | None = None
    ) -> None:
        """Count from zero: a life begins."""
        self._parts = backlog, refusals, numbers, journal  # in one step: a scrape finds one life or the other
        self.started = False

    @property
    def ended(self) -> bool:
        """Whether the tracker is gone, and nothing is counted any more."""
        # In a cycle of garbage the reference dies before the finalizers run, and one of them may make the first call.
        return self._owner() is None and (self.closed or not self.started)

    def collected(self) -> Reading:
        """Read all numbers now; through the tracker, which knows of a fork, while it lives."""
        owner = self._owner()
        if owner is not None:
            return owner.reading()
        if self.closed:
            self._parts[0].abandon("closed")  # a call that overlapped with the very end of `close`
        return self.reading()

    def reading(self) -> Reading:
        """Read all numbers now."""
        backlog, refusals, numbers, journal = self._parts
        return Reading(
            books=backlog.books(),
            rejected=dict(refusals.counts),
            numbers=numbers,
            queue_limit=backlog.max_pending,
            journal=journal,
        )


class TrackerCollector(Collector):
    """Exposes every tracker of one registry."""

    def __init__(self) -> None:
        # First the sum of those that are gone, then an account each. Changed by single steps, and read by one: a signal
        # handler may open or close a tracker in the middle of a scrape, the garbage collector may free one anywhere.
        self._entries: list[Sum | Counted] = [Sum()]
        self._folding = Lock()
        self._pid = os.getpid()

    def add(self, account: Counted) -> None:
        """Include *account* in every scrape."""
        self._entries.append(account)
        self._fold()

    def start(self, account: Account) -> None:
        """The tracker of *account* is about to work."""
        account.started = True
        if account.folded:
            # A finalizer made the first call of a tracker that was taken for gone: its refused calls count twice.
            account.folded = False
            self._entries.append(account)

    def retire(self, account: Account) -> None:
        """The tracker of *account* is closed: its limit and state count no more, what it counted stays."""
        account.closed = True

    def after_fork(self) -> None:
        """In a fork's child, once: nothing of trackers that are gone in the parent is counted here."""
        if self._pid != os.getpid():
            living = (each for each in self._entries if not isinstance(each, Sum) and not each.ended)
            self._entries, self._folding, self._pid = [Sum(), *living], Lock(), os.getpid()

    def _fold(self) -> None:
        """Put those that are gone into the sum."""
        if not self._folding.acquire(blocking=False):
            return  # somebody does it, perhaps below this very call
        try:
            entries = self._entries.copy()
            total, living, ended = Sum(), list[Counted](), list[Counted]()
            for entry in entries:
                if isinstance(entry, Sum):
                    total = entry
                else:
                    (ended if entry.ended else living).append(entry)
            if ended:
                total = total.copy()
                for account in ended:
                    account.folded = True
                    total.add(account.collected(), alive=False)
                self._entries[: len(entries)] = [total, *living]  # what was added meanwhile stands behind them
        finally:
            self._folding.release()

    def describe(self) -> Iterable[Metric]:
        """The names, for the registry to find duplicates."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Read everything once and yield the families."""
        yield from families(self._total())

    def reading(self) -> Reading:
        """Read everything once, as if it were one tracker's."""
        return self._total().reading()

    def _total(self) -> Sum:
        self.after_fork()  # the process may have forked without Python's knowledge
        self._fold()
        total = Sum()
        for entry in self._entries.copy():
            if isinstance(entry, Sum):
                total = entry.copy()
            else:
                total.add(entry.collected(), alive=not (entry.closed or entry.ended))
        return total


_collectors: WeakKeyDictionary[CollectorRegistry, TrackerCollector] = WeakKeyDictionary()
_collectors_lock = Lock()


def collector_of(registry: CollectorRegistry) -> TrackerCollector:
    """Return the one collector of *registry*, registered."""
    with _collectors_lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = TrackerCollector()
            registry.register(collector)
            _collectors[registry] = collector
        return collector
