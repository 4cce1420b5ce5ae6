"""The backlog against a dictionary: nothing lost, nothing twice, the bounds exact, the books true at every step."""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tracker_daemon.backlog import Backlog
from tracker_daemon.call_queue import CallQueue
from tracker_daemon.clock import SystemClock
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.errors import QueueFull
from tracker_daemon.front_door import FrontDoor, Refusals
from tracker_daemon.generation import ENSURE, add, method_of
from tracker_daemon.sink import Applied, DeadLetter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tracker_daemon.generation import Record

THREADS = [f"t{number}" for number in range(4)]


class Sleeper:
    """A worker that only counts how often it is woken."""

    closed = False
    woken = 0

    def wake(self) -> None:
        """See `front_door.Worker`."""
        self.woken += 1


class Door(FrontDoor):
    """The real front door before a backlog whose worker is the test."""

    def __init__(self, backlog: Backlog, *, overflow: str = "raise") -> None:
        self._backlog, self._worker, self._refusals = backlog, Sleeper(), Refusals(SystemClock())
        self._raise, self._pid, self._agents = overflow == "raise", os.getpid(), {None: None}


def summed(records: Iterable[Record]) -> ThreadDelta | None:
    """Return the sum of calls on one thread, `None` of none."""
    found: ThreadDelta | None = None
    for record in records:
        found = found or ThreadDelta(record[0], record[-1] // 1_000)
        add(found, record)
    return found


def kinds(records: Iterable[Record]) -> Counter[str]:
    """Count calls by kind."""
    return Counter(map(method_of, records))


class Model(RuleBasedStateMachine):
    """Calls in lists: those in the queue, those of the open window, those of each sealed batch, those settled."""

    @initialize(
        max_queue_size=st.sampled_from([3, 50]),
        max_pending=st.sampled_from([1, 2, 3, 50]),
        max_batch_size=st.integers(1, 3),
        create_missing=st.booleans(),
    )
    def begin(self, **options: Any) -> None:
        """Choose the bounds."""
        self.options = options
        self.backlog = Backlog(**options)
        self.door = Door(self.backlog)
        self.queue: list[Record] = []
        self.window: list[Record] = []
        self.sealed: list[dict[str, list[Record]]] = []
        self.heads: list[tuple[tuple[ThreadDelta, ...], list[ThreadDelta]]] = []
        self.applied, self.lost = Counter[str](), Counter[str]()
        self.dead = Counter[str]()
        self.order: list[Record] = []
        self.open: set[int] = set()
        self.skipped = self.rejected = 0

    # -- what is expected --------------------------------------------------------------------------

    @property
    def in_flight(self) -> list[Record]:
        """The calls of all sealed batches."""
        return [record for batch in self.sealed for records in batch.values() for record in records]

    @property
    def unsettled(self) -> list[Record]:
        """Every call that is pending."""
        return [*self.in_flight, *self.window, *self.queue]

    def parts(self) -> Iterator[dict[str, list[Record]]]:
        """Yield the open window's calls by thread; then those that follow an `ensure` behind other calls."""
        whole: dict[str, list[Record]] = {}
        followers: dict[str, list[Record]] = {}
        for record in self.window:
            thread_id = record[0]
            earlier = whole.get(thread_id)
            late = (
                earlier and method_of(earlier[0]) != ENSURE and (thread_id in followers or method_of(record) == ENSURE)
            )
            part = followers if late and not self.options["create_missing"] else whole
            part.setdefault(thread_id, []).append(record)
        yield whole
        yield followers

    # -- what happens ------------------------------------------------------------------------------

    @rule(
        thread_id=st.sampled_from(THREADS),
        kind=st.sampled_from(["ensure", "turn", "resolve"]),
        name=st.sampled_from(["a", "b"]),
        n=st.integers(-3, 3),
    )
    def call(self, thread_id: str, kind: str, name: str, n: int) -> None:
        """A call: it is refused just when a bound is reached."""
        pending = {record[0] for record in self.unsettled}
        bound = None
        if len(self.queue) >= self.options["max_queue_size"]:
            bound = "max_queue_size"
        elif thread_id not in pending and len(pending) >= self.options["max_pending"]:
            bound = "max_pending"
        make = {
            "ensure": partial(self.door.ensure_conversation, thread_id),
            "turn": partial(self.door.record_turn, thread_id, name, n, n / 10),
            "resolve": partial(self.door.resolve, thread_id, name),
        }[kind]
        if bound:
            with pytest.raises(QueueFull) as full:
                make()
            assert full.value.bound == bound
            self.rejected += 1
        else:
            assert make() is True
            record = [*self.backlog.queue.waiting()][-1]
            self.queue.append(record)
            self.open.add(id(record))
            self.order.append(record)

    @rule(limit=st.sampled_from([0, 1, 2, 100]))
    def drain(self, limit: int) -> None:
        """The worker folds some calls; callers may come before it sets the gate."""
        assert self.backlog.drain(limit) == min(limit, len(self.queue))
        self.window += self.queue[:limit]
        del self.queue[:limit]

    @rule(opens=st.booleans())
    def set_gate(self, opens: bool) -> None:
        """The worker sets the gate, or goes to sleep."""
        if opens:
            self.backlog.open_gate()
        else:
            self.backlog.shut_gate()

    @precondition(lambda self: self.window and not self.sealed)
    @rule()
    def seal(self) -> None:
        """The window ends."""
        size = self.options["max_batch_size"]
        for part in self.parts():
            items = list(part.items())
            self.sealed += [dict(items[i : i + size]) for i in range(0, len(items), size)]
        self.window = []
        self.backlog.seal()

    @precondition(lambda self: self.sealed)
    @rule(dead=st.lists(st.sampled_from(["overflow", "constraint"]), max_size=2), skipped=st.integers(0, 1))
    def settle(self, dead: list[Any], skipped: int) -> None:
        """The sink has the oldest batch, some of it as dead letters."""
        batch = self.backlog.head()
        assert batch is not None
        letters = tuple(DeadLetter(delta, reason, "", "") for delta, reason in zip(batch, dead, strict=False))
        calls = self.sealed.pop(0)
        for number, records in enumerate(calls.values()):
            if number < len(dead):
                self.dead[dead[number]] += len(records)
            else:
                self.applied += kinds(records)
            self.open -= {id(record) for record in records}
        self.skipped += skipped
        applied = Applied(rows=len(batch) - len(letters), skipped=skipped, dead_letters=letters)
        self.backlog.settle(batch, applied)
        self.backlog.settle(batch, applied)  # a second time: nothing
        if not self.sealed:
            assert self.backlog.settled == len(self.order) - len(self.queue) - len(self.window)

    @rule(reason=st.sampled_from([None, None, None, None, None, None, "deadline", "closed"]))
    def abandon(self, reason: str | None) -> None:
        """Rarely, the end: everything pending is lost, and counted."""
        if reason is None:
            return
        calls = self.unsettled
        assert self.backlog.abandon(reason) == len(calls)
        self.lost += Counter({reason: len(calls)}) if calls else Counter()
        self.queue, self.window, self.sealed = [], [], []
        self.open.clear()

    # -- what holds --------------------------------------------------------------------------------

    @invariant()
    def books_are_true(self) -> None:
        """Every number is the model's, and the calls add up."""
        books, pending = self.backlog.books(), self.unsettled
        assert sum(books.accepted.values()) == (
            sum(books.applied.values())
            + sum(books.dead_lettered.values())
            + sum(books.lost.values())
            + books.queue_calls
        )
        assert Counter(books.accepted) == kinds(self.order)
        assert Counter(books.applied) == self.applied
        assert Counter(books.dead_lettered) == self.dead
        assert Counter(books.lost) == self.lost
        assert books.queue_calls == len(pending)
        assert books.threads == len({record[0] for record in pending})
        assert books.rows_skipped == self.skipped
        assert bool(books.oldest_at) == bool(pending)
        assert books.oldest_at <= min((record[-1] for record in pending), default=0)
        assert self.door._refusals.total == self.rejected
        assert self.backlog.accepted == len(self.order)

    @invariant()
    def bounds_hold(self) -> None:
        """Neither bound is ever passed."""
        assert len(self.backlog.queue) <= self.options["max_queue_size"]
        assert len({record[0] for record in self.unsettled}) <= self.options["max_pending"]

    @invariant()
    def pending_is_true(self) -> None:
        """`pending` is the sum of the thread's calls that are not settled."""
        for thread_id in THREADS:
            expected = summed(record for record in self.unsettled if record[0] == thread_id)
            assert self.backlog.pending(thread_id) == expected

    @invariant()
    def barriers_are_true(self) -> None:
        """Every call up to `settled`, in order of acceptance, is settled."""
        settled = self.backlog.settled
        assert not any(id(record) in self.open for record in self.order[:settled])
        assert bool(self.open) or settled == len(self.order)

    @invariant()
    def batch_is_sealed(self) -> None:
        """The oldest batch holds the calls that it was sealed with, each thread once, and not too many."""
        batch = self.backlog.head()
        assert (batch is not None) == bool(self.sealed) == self.backlog.in_flight
        if batch is not None:
            assert len({delta.thread_id for delta in batch}) == len(batch) <= self.options["max_batch_size"]
            assert list(batch) == [summed(records) for records in self.sealed[0].values()]
        assert self.backlog.window_threads == sum(map(len, self.parts()))
        assert self.backlog.is_empty == (not self.unsettled)


TestBacklog = Model.TestCase
TestBacklog.__doc__ = "The state machine above."
TestBacklog.settings = settings(
    deadline=None,
    database=None,
    max_examples=200,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)


class Walk(Model):
    """The same steps taken at random, without a search for the smallest: many more of them in the time."""

    def take(self, chance: random.Random, steps: int) -> None:
        """Take *steps* steps, most of them calls, and look after each."""
        self.begin(
            max_queue_size=chance.choice([3, 50]),
            max_pending=chance.choice([1, 2, 3]),
            max_batch_size=chance.choice([1, 2]),
            create_missing=chance.random() < 0.5,
        )
        for _ in range(steps):
            self.step(chance)
            self.bounds_hold()
            self.books_are_true()
            self.batch_is_sealed()
            self.barriers_are_true()
        self.pending_is_true()

    def step(self, chance: random.Random) -> None:
        """Take one step that is possible now."""
        kind = chance.choices(["call", "drain", "gate", "seal", "settle", "abandon"], [10, 4, 2, 3, 3, 0.1])[0]
        if kind == "call":
            names = ["ensure", "turn", "resolve"]
            self.call(thread_id=chance.choice(THREADS), kind=chance.choice(names), name=chance.choice("ab"), n=1)
        elif kind == "drain":
            self.drain(limit=chance.choice([1, 2, 100]))
        elif kind == "gate":
            self.set_gate(opens=chance.random() < 0.7)
        elif kind == "seal" and self.window and not self.sealed:
            self.seal()
        elif kind == "settle" and self.sealed:
            self.settle(dead=chance.choice([[], [], ["overflow"]]), skipped=0)
        elif kind == "abandon":
            self.abandon(reason="deadline")


def kept_seeds() -> list[int]:
    """Return every seed whose walk has ever failed."""
    lines = (Path(__file__).parent / "seeds" / "backlog.txt").read_text(encoding="utf-8").splitlines()
    return [int(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]


@pytest.mark.parametrize("seed", kept_seeds())
def test_kept_walks(seed: int) -> None:
    """A walk that failed once passes."""
    Walk().take(random.Random(seed), 60)


def test_walks() -> None:
    """Fresh walks pass; a failure names its seed, to be kept in `seeds/backlog.txt`."""
    for _ in range(400):
        seed = random.randrange(10**9)
        try:
            Walk().take(random.Random(seed), 60)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


# -- explicit cases --------------------------------------------------------------------------------


def backlog_of(**options: Any) -> Backlog:
    """Return a backlog with room enough for most."""
    defaults = {"max_queue_size": 100, "max_pending": 100, "max_batch_size": 100, "create_missing": True}
    return Backlog(**{**defaults, **options})


def test_calls_on_pending_threads_go_on() -> None:
    """At the bound on threads, with the database away, calls on known threads are taken for ever; new ones never."""
    backlog = backlog_of(max_pending=3)
    door = Door(backlog, overflow="drop")
    for round_ in range(50):
        assert all(door.record_turn(f"t{number}", "a", 1) for number in range(3))
        assert not door.ensure_conversation(f"new{round_}")
        backlog.drain(2)
        backlog.open_gate()
        if round_ == 5:
            backlog.drain(100)
            backlog.seal()
    assert backlog.books().threads == 3
    assert sum(backlog.books().accepted.values()) == 150


def test_the_gate_never_lets_in_more_than_there_is_room_for() -> None:
    """A gate set with room, then a drain: what comes before the gate is set anew finds the room that is left."""
    backlog = backlog_of(max_pending=10)
    door = Door(backlog, overflow="drop")
    backlog.open_gate()
    accepted = 0
    for number in range(40):
        accepted += door.ensure_conversation(f"t{number}")
        backlog.drain(1)
    assert accepted == backlog.books().threads == 10


class Interrupted(CallQueue):
    """A queue during whose next measuring a signal handler makes a call."""

    handler: Callable[[], object] | None = None

    def __len__(self) -> int:
        length = super().__len__()
        handler, self.handler = self.handler, None
        if handler is not None:
            handler()
        return length


@pytest.mark.parametrize("bound", ["max_queue_size", "max_pending"])
@pytest.mark.parametrize("waiting", [0, 4])
def test_a_call_while_the_gate_is_raised(bound: str, waiting: int) -> None:
    """Of the places that are given out anew, the one that a signal handler's call takes meanwhile is one."""
    backlog = backlog_of(**{bound: 10})
    queue = backlog.queue = Interrupted()
    door = Door(backlog, overflow="drop")
    accepted = sum(door.ensure_conversation(f"before{number}") for number in range(waiting))
    backlog.shut_gate()
    handled = []
    queue.handler = lambda: handled.append(door.ensure_conversation("handled"))
    backlog.open_gate()
    accepted += sum(door.ensure_conversation(f"t{number}") for number in range(20))
    assert handled == [True]
    assert accepted + 1 == len(queue) == 10


def test_places_for_which_there_is_no_room_any_more() -> None:
    """A drain that finds new threads takes back places at once; those that wait are not counted twice."""
    backlog = backlog_of(max_queue_size=8, max_pending=10)
    door = Door(backlog, overflow="drop")
    for number in range(4):
        assert door.ensure_conversation(f"t{number}")
    assert backlog.places == 4
    backlog._threads = 5  # as when a window comes back from its files
    backlog.drain(1)
    assert backlog.places + len(backlog.queue) <= backlog.max_pending - backlog.resident_threads == 4


def test_what_waits_is_looked_at_anywhere() -> None:
    """Of what waits beside the batch in hand any delta may be looked at, and never one of that batch."""
    backlog = Backlog(max_queue_size=10_000, max_pending=10_000, max_batch_size=50, create_missing=True)
    door = Door(backlog)
    for thread_id in (f"sealed-{number}" for number in range(150)):
        assert door.record_turn(thread_id)
        backlog.drain(10)
    backlog.seal()
    for thread_id in (f"open-{number}" for number in range(150)):
        assert door.record_turn(thread_id)
        backlog.drain(10)
    head, seen, chance = backlog.head(), set[str](), random.Random(7)
    assert head is not None
    for _ in range(1_000):
        some = backlog.following(head, 16, chance)
        assert len(some) == 16
        seen |= {delta.thread_id for delta in some}
    assert seen == {f"sealed-{number}" for number in range(50, 150)} | {f"open-{number}" for number in range(150)}
    assert len(backlog.following((), 1_000, chance)) == 300


def test_room_that_a_waiting_call_needs() -> None:
    """A thread leaves the sealed generation while a call on it waits: it still counts, and a new one is refused."""
    backlog = backlog_of(max_pending=1)
    door = Door(backlog, overflow="drop")
    assert door.ensure_conversation("a")
    backlog.drain(1)
    backlog.seal()
    assert door.ensure_conversation("a")
    assert not door.ensure_conversation("b")
    backlog.settle(backlog.head() or (), Applied(rows=1))
    assert not door.ensure_conversation("b")
    assert backlog.books().threads == 1


def test_a_call_refused_wakes_the_worker() -> None:
    """Whoever is refused, and whoever finds the gate shut, wakes the worker; an ordinary call does not."""
    backlog = backlog_of(max_queue_size=2)
    door = Door(backlog, overflow="drop")
    door.ensure_conversation("a")
    assert door._worker.woken == 1  # type: ignore[attr-defined]
    door.ensure_conversation("b")
    assert door._worker.woken == 1  # type: ignore[attr-defined]
    assert not door.ensure_conversation("c")
    assert door._worker.woken == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
def test_from_four_threads(seed: int) -> None:
    """Four threads call while a worker drains, seals and settles: every call once, the bound passed by four at most."""
    bound, callers, each = 300, 4, 6_000
    backlog = backlog_of(max_queue_size=1_000, max_pending=bound, max_batch_size=64)
    door = Door(backlog, overflow="drop")
    accepted = [Counter[str]() for _ in range(callers)]
    start, most, applied = Event(), 0, Counter[str]()

    def make_calls(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        start.wait()
        for _ in range(each):
            thread_id = f"t{chance.randrange(5_000)}"
            if door.record_turn(thread_id, None, 1, 0.1):
                accepted[number][thread_id] += 1

    threads = [Thread(target=make_calls, args=(number,)) for number in range(callers)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        start.set()
        chance = random.Random(seed)
        while any(thread.is_alive() for thread in threads) or not backlog.is_empty:
            backlog.drain(chance.choice([1, 10, 1_000]))
            most = max(most, backlog.books().threads)
            backlog.open_gate()
            if backlog.window_threads and not backlog.in_flight and chance.random() < 0.3:
                backlog.seal()
            if (batch := backlog.head()) and chance.random() < 0.5:
                for delta in batch:
                    applied[delta.thread_id] += delta.tokens
                backlog.settle(batch, Applied(rows=len(batch)))
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    made = sum(accepted, Counter[str]())
    assert applied == made
    books = backlog.books()
    assert Counter(books.accepted) == Counter(books.applied) == Counter({"record_turn": made.total()})
    assert door._refusals.total == callers * each - made.total()
    assert door._refusals.total > 0, "the bound was never reached: the test shows nothing"
    assert bound - 4 <= most <= bound + callers
