"""The real backlog and flusher, driven by hand against a sink whose every attempt ends as chosen, beside a model.

The model knows of each life its calls that are pending, and of each thread the digits (see `tests.digits`) of the calls
that are gone for a reason: lost with a life, forgotten by a failover. Every other digit stands once in the sink's rows,
dead letters or skipped deltas, or once in a backlog, after every step; in both only while its batch is in doubt.
Which name each batch bears is known beforehand, and where the ledger must stand before it is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.digits import CALLS_PER_THREAD, Digits
from tests.model.manual_clock import START, Driven, ManualClock, run
from tests.model.scripted_sink import DONE, FAULTS, MONTH, Outcome, ScriptedSink, identity
from tracker_daemon.backlog import Backlog
from tracker_daemon.errors import Fenced, SchemaError
from tracker_daemon.flush_numbers import FlushNumbers
from tracker_daemon.flusher import Flusher
from tracker_daemon.generation import RESOLVE, TURN, ensure, method_of, resolve
from tracker_daemon.memory_sink import MemoryRow
from tracker_daemon.sink import Applied, LedgerMissing, LedgerRegressed, Opened, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tracker_daemon.batch import Batch
    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.generation import Record

THREADS: Final = ("t0", "t1", "t2", "t3", "t4")
DAY: Final = 86_400.0
MOST_LIVES: Final = 3
SEEDS: Final = Path(__file__).parents[1] / "seeds" / "tracker_machine.txt"
PASSING: Final = ("connection", "timeout", "lock", "capacity", "readonly")


def longest_wait(kind: str, tries: int) -> tuple[float, float]:
    """Return the least and the most seconds to wait after *tries* failures, the last one of *kind*."""
    if kind in PASSING or (kind == "other" and tries <= 3):
        return 0.0, min(5.0, 0.05 * 2 ** (tries - 1))
    return 0.5, max(0.5, min(15.0, 1.0 * 2 ** (tries - 1)))


def ones(number: int) -> set[int]:
    """Return which digits of *number* are 1. The others are 0: nothing is counted twice."""
    found, place = set[int](), 0
    assert number >= 0
    while number:
        number, digit = divmod(number, 4)
        assert digit < 2, f"call {place} is counted {digit} times"
        if digit:
            found.add(place)
        place += 1
    return found


def disjoint(parts: Iterable[set[int]]) -> set[int]:
    """Return the union of *parts*, of which no two share a digit."""
    union = set[int]()
    for part in parts:
        assert not union & part, f"calls {union & part} are counted twice"
        union |= part
    return union


class Log:
    """Takes the place of a flusher's log.

    Attributes:
        missing: what was told of batches that the ledger lacks: of whom, the first, the last, how many, whether forgotten.
    """

    def __init__(self) -> None:
        self.missing: list[tuple[str, int, int, int, bool]] = []

    def __getattr__(self, level: str) -> Callable[..., None]:
        return self._say

    def _say(self, event: str, **fields: Any) -> None:
        if event == "batches_missing":
            names = ("producer", "first", "last", "batches", "forgotten")
            self.missing.append(tuple(fields[name] for name in names))  # type: ignore[arg-type]


class Life:
    """One process: a backlog, a flusher, and what the model expects of them.

    Attributes:
        rival: the highest epoch under which somebody else has opened the same identity.
        flushing: the flush under way, if any.
        pending: calls by thread, of those that are not settled.
        errors: what the sink has raised, as `on_error` must have been told.
        position: where the ledger was when it last answered; `None`: the next thing is `open`.
        name: producer and sequence of the batch that is flushed, or that a cancellation left in place.
        next, rest: the sequence of the next window's first batch, and how many more the window at the head has.
        acknowledged, given_up: the names of those batches.
        missing: what must have been told of batches that the ledger lacks.
        in_hand: the deltas of the batch that has `name`; `None` when it was given up.
        tries: failures since the flush of this batch began, or began again.
    """

    def __init__(self, sink: ScriptedSink, clock: ManualClock, options: dict[str, Any]) -> None:
        self.rival = 0
        self.sink, self.clock = sink, clock
        self.backlog, self.numbers = Backlog(**options), FlushNumbers()
        self.told: list[BaseException] = []
        self.flusher = Flusher(self.backlog, sink, clock, self.numbers, self.told.append)
        self.log = Log()
        self.flusher._log = self.log  # type: ignore[assignment]
        self.flusher._random = Random(0)
        self.flushing: Driven | None = None
        self.closed = False
        self.halted: BaseException | None = None
        self.pending = Counter[str]()
        self.accepted, self.applied, self.dead, self.lost = (Counter[str]() for _ in range(4))
        self.flushes, self.kinds = Counter[str](), Counter[str]()
        self.regressions = self.skipped = 0
        self.errors: list[BaseException] = []
        self.last_error: BaseException | None = None
        self.producer = self.backlog.producer
        self.position: Opened | None = None
        self.just_opened = False
        self.name: tuple[UUID, int] | None = None
        self.next, self.rest = 1, 0
        self.acknowledged, self.given_up = set[tuple[UUID, int]](), set[tuple[UUID, int]]()
        self.missing: list[tuple[str, int, int, int, bool]] = []
        self.ledger: tuple[str, int, int] = ("", 0, 0)
        self.last_success = 0.0
        self.in_hand: tuple[ThreadDelta, ...] | None = None
        self.sent_at = 0.0
        self.found_applied = False
        self.tries = self.regressions_in_a_row = 0
        self.hurried = False

    # -- driving -----------------------------------------------------------------------------------

    @property
    def at(self) -> str | None:
        """Where the flush stands; `None` when none is under way."""
        return self.flushing.at if self.flushing is not None else None

    @property
    def runs(self) -> bool:
        """Whether a flush is under way."""
        return self.at is not None

    def start(self) -> None:
        """Begin a flush; a life that was halted sends nothing."""
        before = len(self.sink.received), len(self.sink.opened)
        self.tries = self.regressions_in_a_row = 0
        self.flushing = Driven(self.flusher.flush())
        self.look()
        if self.halted is not None:
            assert not self.runs
            assert before == (len(self.sink.received), len(self.sink.opened)), "sent after the end"

    def step(self, outcome: Outcome = DONE) -> None:
        """Let the flush under way go on from where it stands; an attempt there ends as *outcome*."""
        driven = self.flushing
        assert driven is not None
        at, now = driven.at, self.clock.monotonic()
        if at == "wait":
            driven.resume()
            if self.hurried:
                assert self.clock.monotonic() == now, "the wait was not cut short"
            self.hurried = False
        else:
            self.sink.script.append(outcome)
            with suppress(asyncio.CancelledError):
                driven.resume()
            self._answered(self.sink.answer)
        self.look()

    def hurry(self) -> None:
        """Cut the wait short."""
        self.flusher.hurry()
        self.hurried = True

    def drain_and_flush(self, outcomes: Iterable[Outcome] = ()) -> None:
        """Empty the backlog; the first attempts end as *outcomes*, the others succeed."""
        script = iter(outcomes)
        while not self.backlog.is_empty and self.halted is None:
            if not self.runs:
                self.backlog.drain(1_000)
                if not self.backlog.in_flight:
                    self.backlog.seal()
                self.start()
            while self.runs:
                self.step(DONE if self.at == "wait" else next(script, DONE))

    # -- what is expected --------------------------------------------------------------------------

    def look(self) -> None:
        """Check where the flush stands now."""
        at = self.at
        if at == "open":
            self._look_at_open(*self.sink.asked[-1])
        elif at == "apply":
            self._look_at_batch(self.sink.received[-1])
        elif at is None:
            assert self.flusher.halted is self.halted
            assert self.halted or self.last_answer_cancelled or not self.backlog.in_flight
            if self.in_hand is None:
                self.name = None

    @property
    def last_answer_cancelled(self) -> bool:
        """Whether the last flush ended by a cancellation."""
        return isinstance(self.sink.answer, asyncio.CancelledError)

    @property
    def is_old(self) -> bool:
        """Whether the identity has not been used for more than a day, as far as this process knows."""
        return bool(self.last_success) and self.clock.wall() - self.last_success > DAY

    def _look_at_name(self, producer: UUID, sequence: int | None) -> tuple[UUID, int]:
        """Return the name of the batch under way; if it is a new one, check who gives it."""
        if self.name is None:
            self.in_hand = self.backlog.head()
            # A batch that was in doubt and is found applied is no sign of life: the ledger's row is as old as its first try.
            if not self.found_applied:
                self.sent_at = self.clock.monotonic()
            assert self.in_hand is not None
            if self.rest:
                self.rest -= 1
            else:
                self.rest = self.batches_at_head - 1
                if self.is_old:
                    self._renew(producer)
                self.next += self.rest + 1
            self.name = (self.producer, self.next - self.rest - 1)
            assert self.name not in self.sink.named, "a name is used twice"
            self.sink.named[self.name] = self.in_hand
        assert producer == self.name[0]
        assert sequence in (None, self.name[1]), "the sequence of a batch has changed"
        return self.name

    @property
    def batches_at_head(self) -> int:
        """How many batches the oldest sealed window has left."""
        return len(self.backlog.sealed[0].batches)

    def _renew(self, producer: UUID) -> None:
        assert producer != self.producer, "an old identity is used"
        assert not any(producer in name for name in self.sink.named)
        assert (producer, 0) not in self.sink.ledger
        self.sink.met["renewals"] += 1
        self.producer, self.position, self.next = producer, None, 1

    def _look_at_open(self, producer: UUID, known: Opened | None, after: int) -> None:
        _, sequence = self._look_at_name(producer, None)
        position = self.position
        short = position is not None and position.applied_sequence < sequence - 1
        assert (known is None) == (producer not in self.sink.last), "it is not said what is known"
        if not after:
            assert position is None or (short and not self.just_opened), "opened again for nothing"
            return
        assert position is not None
        assert self.just_opened, "it goes on without having asked"
        assert short, "it goes on though nothing is missing"
        assert after == sequence - 1
        assert self.sink.ledger[producer, 0] == position
        lacking = [(producer, number) for number in range(position.applied_sequence + 1, sequence)]
        assert set(lacking) <= self.acknowledged | self.given_up
        in_effect = {(name[0], name[3]) for name in self.sink.applied}
        assert not in_effect & set(lacking), "it goes on over what is there"
        forgotten = not self.acknowledged.isdisjoint(lacking)
        told = (str(producer), lacking[0][1], after, len(lacking), forgotten)
        if self.missing[-1:] != [told]:
            self.missing.append(told)
        assert self.log.missing == self.missing
        self.sink.met["jumps_forgotten" if forgotten else "jumps_given_up"] += 1

    def _look_at_batch(self, batch: Batch) -> None:
        name = self._look_at_name(batch.producer, batch.sequence)
        position = self.position
        assert position is not None, "sent without having opened"
        assert identity(batch) == (name[0], 0, position.epoch, position.applied_sequence + 1)
        assert batch.deltas is self.sink.named[name], "another batch has its name"
        assert self.in_hand is None or batch.deltas is self.in_hand is self.backlog.head()

    def _answered(self, answer: object) -> None:
        self.just_opened = isinstance(answer, Opened)
        if isinstance(answer, Opened):
            self.position = answer
        elif isinstance(answer, Applied):
            self._applied(answer)
        elif isinstance(answer, LedgerRegressed):
            self.position = None
            self.regressions += 1
            self.regressions_in_a_row += 1
            self._failed(answer)
            if self.regressions_in_a_row > 1:
                self._look_at_wait(answer, self.regressions_in_a_row)
        elif isinstance(answer, Fenced | LedgerMissing):
            if isinstance(answer, Fenced):
                assert self.position is not None
                assert self.rival > self.position.epoch, "fenced by itself"
            self.halted = answer
            self.kinds["other"] += 1
            self._failed(answer)
            collected = self.producer in self.sink.collected and not self.sink.met["commits_forgotten"]
            if isinstance(answer, LedgerMissing) and collected:
                assert self.clock.monotonic() - self.sent_at > MONTH - 2 * DAY, "halted by idleness alone"
        elif isinstance(answer, Exception):
            self.tries += 1
            self._look_at_wait(answer, self.tries)

    def _applied(self, applied: Applied) -> None:
        self.found_applied = applied.duplicate
        assert self.position is not None
        assert self.name is not None
        self.position = Opened(self.position.epoch, self.name[1])
        self.ledger = (str(self.name[0]), self.position.epoch, self.name[1])
        self.acknowledged.add(self.name)
        self.name = None
        self.last_success, self.last_error = self.clock.wall(), None
        self.flushes["duplicate" if applied.duplicate else "ok"] += 1
        self.tries = self.regressions_in_a_row = 0
        self.hurried = False
        deltas, self.in_hand = self.in_hand, None
        if deltas is None:
            return  # given up meanwhile
        dead = {letter.delta.thread_id: letter.reason for letter in applied.dead_letters}
        for delta in deltas:
            self.pending[delta.thread_id] -= delta.calls
            if delta.thread_id in dead:
                self.dead[dead[delta.thread_id]] += delta.calls
            else:
                self.applied += Counter(
                    ensure_conversation=delta.ensures, record_turn=delta.turns, resolve=delta.resolves
                )
        self.skipped += applied.skipped

    def _failed(self, error: BaseException) -> None:
        self.errors.append(error)
        self.last_error = error

    def _look_at_wait(self, error: Exception, tries: int) -> None:
        self._failed(error)
        kind = error.kind if isinstance(error, SinkFault) else "schema" if isinstance(error, SchemaError) else "other"
        self.kinds[kind] += 1
        self.flushes["retry" if kind in PASSING else "error"] += 1
        assert self.at == "wait", "it is tried again without a wait"
        least, most = (0.0, 0.0) if self.hurried else longest_wait(kind, tries)
        seconds = self.clock.waits[-1]
        assert seconds is not None
        assert least <= seconds <= most, (kind, tries, seconds)

    def left(self, clean: bool, ledger: Opened | None, last: Opened | None) -> None:
        """The sink was left: after a clean end the ledger stands where it was last seen, or it was told."""
        if clean and ledger != last:
            self._failed(self.told[-1])
            rival = ledger is not None and last is not None and ledger.epoch > last.epoch
            assert not rival or ledger.epoch <= self.rival  # type: ignore[union-attr]
            expected = LedgerMissing if ledger is None else Fenced if rival else LedgerRegressed
            assert isinstance(self.told[-1], expected)
            self.regressions += expected is LedgerRegressed

    def abandoned(self, reason: str, *, ends: bool = True) -> None:
        """Everything pending was given up, and if the life *ends* nothing is accepted any more."""
        if self.in_hand is not None and self.name is not None:
            self.given_up.update((self.name[0], self.name[1] + number) for number in range(self.rest + 1))
        self.rest = 0
        if not self.runs:
            self.name = None
        if calls := self.pending.total():
            self.lost[reason] += calls
        self.pending.clear()
        self.in_hand = None
        if ends:
            self.closed = True
            self.backlog.close()

    @property
    def in_effect(self) -> Batch | None:
        """The batch that the sink has and the backlog does not know of."""
        head = self.backlog.head()
        return next((batch for batch in self.sink.applied.values() if batch.deltas is head), None)

    def check(self) -> None:
        """Compare the books and the numbers."""
        books, numbers = self.backlog.books(), self.numbers
        assert sum(books.accepted.values()) == (
            sum(books.applied.values())
            + sum(books.dead_lettered.values())
            + sum(books.lost.values())
            + books.queue_calls
        )
        assert Counter(books.accepted) == self.accepted
        assert Counter(books.applied) == self.applied
        assert Counter(books.dead_lettered) == self.dead
        assert Counter(books.lost) == self.lost
        assert books.queue_calls == self.pending.total()
        assert books.threads == len(+self.pending)
        assert bool(books.oldest_at) == bool(books.queue_calls)
        assert books.rows_skipped == self.skipped
        assert numbers.regressions == self.regressions
        assert numbers.flushes == self.flushes
        assert numbers.errors == self.kinds
        assert numbers.fenced == (self.halted is not None)
        assert numbers.last_error is self.last_error
        assert numbers.last_success == self.last_success
        assert numbers.ledger == self.ledger
        assert self.log.missing == self.missing
        assert len(self.told) == len(self.errors)
        assert all(map(lambda told, error: told is error, self.told, self.errors))


OUTCOMES = st.builds(
    Outcome,
    how=st.sampled_from(
        ["done", "done", "fails", "unanswered", "unanswered", "late", "late", "cancelled", "cancelled_after"]
    ),
    fault=st.sampled_from(FAULTS),
    dead=st.sampled_from([0, 0, 0, 1, 2, 3]),
    first=st.booleans(),
)
SCRIPT = st.lists(OUTCOMES, max_size=6)
OPENING = st.sampled_from([DONE] * 4 + [Outcome(how) for how in ("fails", "unanswered", "late", "cancelled")])  # type: ignore[arg-type]
CALLS = st.lists(
    st.tuples(st.sampled_from(["turn", "turn", "turn", "ensure", "resolve"]), st.sampled_from(THREADS)),
    min_size=1,
    max_size=6,
)
LIFE = st.integers(0, MOST_LIVES - 1)
SELDOM = st.integers(0, 5).map(lambda number: number == 5)


class TrackerMachine(RuleBasedStateMachine):
    """Lives that share one sink; see the module.

    Attributes:
        met: what the histories of the class have met.
    """

    met: ClassVar[Counter[str]] = Counter()

    @initialize(
        max_batch_size=st.integers(1, 3),
        create_missing=st.sampled_from([True, True, True, False]),
    )
    def begin(self, **options: Any) -> None:
        """Choose the bounds, and begin the first life."""
        self.options = {"max_queue_size": 1_000, "max_pending": 1_000, **options}
        self.clock = ManualClock()
        self.sink = ScriptedSink(self.clock)
        self.digits = Digits()
        self.calls: dict[str, list[Record]] = {thread_id: [] for thread_id in THREADS}
        self.gone: dict[str, set[int]] = {thread_id: set() for thread_id in THREADS}
        self.lost: dict[str, set[int]] = {thread_id: set() for thread_id in THREADS}
        self.hit: set[str] = set()
        self.ticks = 0
        self.lives: list[Life] = []
        self.ended: list[Life] = []
        self._new_life()

    def _new_life(self) -> None:
        """Begin a life; nobody has had its identity."""
        life = Life(self.sink, self.clock, self.options)
        assert all(life.producer != other.producer for other in [*self.lives, *self.ended])
        assert (life.producer, 0) not in self.sink.ledger
        self.lives.append(life)

    def _life(self, number: int) -> Life:
        return self.lives[number % len(self.lives)]

    # -- calls -------------------------------------------------------------------------------------

    def _call(self, life: Life, kind: str, thread_id: str) -> None:
        self.ticks += 1
        at = int(START * 1e6 + self.ticks) * 1_000  # ever later, so that nothing hangs on a tie
        made = self.digits.made.get(thread_id, 0)
        record: Record
        if kind == "turn" and made < CALLS_PER_THREAD:
            record = (thread_id, f"a{made % 3}", self.digits.tokens(thread_id), 0.1, at)
        elif kind == "resolve":
            record = resolve(thread_id, f"r{self.ticks}", at)
        else:
            record = ensure(thread_id, at)
        assert life.backlog.enter(record) is None
        life.accepted[method_of(record)] += 1
        life.pending[thread_id] += 1
        self.calls[thread_id].append(record)

    @rule(number=LIFE, calls=CALLS)
    def call(self, number: int, calls: list[tuple[str, str]]) -> None:
        """Some calls."""
        for kind, thread_id in calls:
            if not self._life(number).closed:
                self._call(self._life(number), kind, thread_id)

    # -- the worker --------------------------------------------------------------------------------

    @precondition(lambda self: any(life.backlog.queue for life in self.lives))
    @rule(number=LIFE, limit=st.integers(1, 5), seal=st.booleans())
    def drain(self, number: int, limit: int, seal: bool) -> None:
        """The worker takes calls off the queue, and may end the window."""
        life = self._life(number)
        life.backlog.drain(limit)
        if seal and not life.backlog.in_flight:
            life.backlog.seal()

    @rule(number=LIFE, calls=CALLS, script=SCRIPT, opening=OPENING)
    def work(self, number: int, calls: list[tuple[str, str]], script: list[Outcome], opening: Outcome) -> None:
        """Calls, then a flush begins or goes on; its attempts end by the script, and then it stands where it stands."""
        self.call(number, calls)
        self.flush(number, script, opening)

    @precondition(lambda self: any(life.pending.total() or life.runs for life in self.lives))
    @rule(number=LIFE, script=SCRIPT, opening=OPENING)
    def flush(self, number: int, script: list[Outcome], opening: Outcome) -> None:
        """A flush begins or goes on."""
        life = self._life(number)
        if not life.runs:
            life.backlog.drain(1_000)
            if not life.backlog.in_flight:
                life.backlog.seal()
            life.start()
        for outcome in script:
            if life.at == "wait":
                life.step()
            if life.at == "open":
                life.step(opening)
                opening = DONE
            if life.at == "wait":
                life.step()
            if life.at == "apply":
                life.step(outcome)

    @precondition(lambda self: any(life.runs for life in self.lives))
    @rule(number=LIFE, outcome=OUTCOMES)
    def step(self, number: int, outcome: Outcome) -> None:
        """A flush goes on by one step."""
        if self._life(number).runs:
            self._life(number).step(outcome)

    @precondition(lambda self: any(life.pending.total() for life in self.lives))
    @rule(number=LIFE)
    def flush_all(self, number: int) -> None:
        """The sink works: everything goes through."""
        life = self._life(number)
        life.drain_and_flush()
        assert life.halted or not life.pending.total()

    @precondition(lambda self: any(life.runs for life in self.lives))
    @rule(number=LIFE)
    def hurry(self, number: int) -> None:
        """Somebody waits: the wait under way, or the next one, is cut short."""
        life = self._life(number)
        if life.runs:
            life.hurry()

    # -- what happens to the database ---------------------------------------------------------------

    @precondition(lambda self: self.sink.late)
    @rule()
    def arrive(self) -> None:
        """What was late arrives."""
        self.sink.arrive()

    @rule(commits=st.sampled_from([1, 1, 2, 3]), opens=SELDOM)
    def fail_over(self, commits: int, *, opens: bool) -> None:
        """The database forgets its last commits."""
        before = {thread_id: self._held(thread_id) for thread_id in THREADS}
        applied = dict(self.sink.applied)
        self.sink.fail_over(commits, opens=opens)
        heads = [life.backlog.head() for life in self.lives]
        for name, batch in applied.items():
            if self.sink.applied.get(name) is not batch and not any(batch.deltas is head for head in heads):
                self.hit.update(delta.thread_id for delta in batch.deltas)
        for thread_id in THREADS:
            vanished = before[thread_id] - self._held(thread_id)
            self.gone[thread_id] |= vanished - self._pending(thread_id)

    @precondition(lambda self: self.sink.ledger)
    @rule(number=LIFE, really=SELDOM)
    def remove_row(self, number: int, really: bool) -> None:
        """Somebody deletes a row of the ledger."""
        if really:
            self.sink.remove_row(self._life(number).producer)

    @precondition(lambda self: self.sink.ledger)
    @rule(number=LIFE, really=SELDOM)
    def rival(self, number: int, really: bool) -> None:
        """Somebody opens the same identity: who had opened it before is fenced."""
        life = self._life(number)
        if really and (life.producer, 0) in self.sink.ledger:
            life.rival = max(life.rival, self.sink.rival(life.producer))

    # -- what happens to processes -----------------------------------------------------------------

    def _lose(self, life: Life) -> None:
        for thread_id in THREADS:
            if life.pending[thread_id]:
                self.hit.add(thread_id)
                delta = life.backlog.pending(thread_id)
                assert delta is not None
                self.lost[thread_id] |= ones(delta.tokens)
                self.gone[thread_id] |= ones(delta.tokens)

    def _end(self, life: Life) -> None:
        self.lives.remove(life)
        self.ended.append(life)
        if not self.lives:
            self._new_life()

    @precondition(lambda self: len(self.lives) > 1 or self.lives[0].accepted)
    @rule(number=LIFE, really=SELDOM)
    def crash(self, number: int, *, really: bool) -> None:
        """A process dies: what was pending is gone."""
        if not really:
            return
        life = self._life(number)
        self._lose(life)
        life.closed = True
        self.lives.remove(life)  # nobody looks at its books again
        if not self.lives:
            self._new_life()

    @precondition(lambda self: len(self.lives) < MOST_LIVES)
    @rule()
    def fork(self) -> None:
        """A child, or another process: empty, with an identity of its own; the parent goes on."""
        self._new_life()

    @rule(number=LIFE, really=SELDOM, drains=st.booleans(), script=SCRIPT)
    def close(self, number: int, *, really: bool, drains: bool, script: list[Outcome]) -> None:
        """The end in order; at the deadline, what is pending is lost, and counted."""
        if not really:
            return
        life = self._life(number)
        if drains:
            life.drain_and_flush(script)
        if not life.backlog.is_empty:
            self._lose(life)
            if life.runs:
                with suppress(asyncio.CancelledError):
                    life.flushing.throw(asyncio.CancelledError())  # type: ignore[union-attr]
            reason = "halted" if life.halted else "deadline"
            assert life.backlog.abandon(reason) == life.pending.total()
            life.abandoned(reason)
        clean = not life.lost and not life.halted
        ledger, last = self.sink.ledger.get((life.producer, 0)), self.sink.last.get(life.producer)
        run(life.flusher.aclose(clean=clean or bool(life.halted)))
        assert self.sink.closed[-1] == (life.producer, clean)
        life.left(clean and last is not None, ledger, last)
        self._end(life)

    @precondition(lambda self: any(life.pending.total() for life in self.lives))
    @rule(number=LIFE, really=st.sampled_from([False, False, True]), ends=SELDOM)
    def give_up(self, number: int, *, really: bool, ends: bool) -> None:
        """Everything pending is given up, also while an attempt is under way, whose answer comes afterwards.

        If the life does not end by it, the next calls go out behind what was given up, in doubt or not.
        """
        life = self._life(number)
        if really and life.pending.total() and not life.closed and not (life.halted and not ends):
            if life.in_hand is not None and life.in_effect is not None:
                self.sink.met["given_up_in_effect"] += 1
            self._lose(life)
            assert life.backlog.abandon("deadline") == life.pending.total()
            life.abandoned("deadline", ends=ends)

    @rule(seconds=st.sampled_from([60.0, DAY - 1, DAY + 1, 2 * DAY, 31 * DAY]), wall=st.sampled_from([0, 0, -1, 1]))
    def idle(self, seconds: float, wall: int) -> None:
        """Time passes; somebody may set the wall clock an hour back, or ten years on."""
        self.clock.advance(seconds)
        self.clock.set_wall({0: 0.0, -1: -3_600.0, 1: 3_650 * DAY}[wall])

    # -- what holds --------------------------------------------------------------------------------

    def _held(self, thread_id: str) -> set[int]:
        """Return the digits that the sink has: in the row, in a dead letter, or skipped with a delta."""
        row = self.sink.rows.get(thread_id)
        letters = [letter.delta for letters in self.sink.letters.values() for letter in letters]
        aside = [delta for delta in [*letters, *self.sink.skipped] if delta.thread_id == thread_id]
        return disjoint([ones(row.total_tokens) if row else set(), *(ones(delta.tokens) for delta in aside)])

    def _pending(self, thread_id: str) -> set[int]:
        deltas = [life.backlog.pending(thread_id) for life in self.lives]
        return disjoint(ones(delta.tokens) for delta in deltas if delta is not None)

    def _twice(self, thread_id: str) -> set[int]:
        """Return the digits of a batch in doubt: in the sink, and pending still."""
        batches = [life.in_effect for life in self.lives]
        found = [delta for batch in batches if batch is not None for delta in batch.deltas]
        return disjoint(ones(delta.tokens) for delta in found if delta.thread_id == thread_id)

    @invariant()
    def books_are_true(self) -> None:
        """Of every life, the ended ones too."""
        for life in [*self.lives, *self.ended]:
            life.check()

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        """Every digit made is in the sink, pending or gone for a reason; in two of them only while in doubt."""
        for thread_id in THREADS:
            made = set(range(self.digits.made.get(thread_id, 0)))
            held, pending, gone = self._held(thread_id), self._pending(thread_id), self.gone[thread_id]
            assert held | pending | gone == made
            assert held & pending == self._twice(thread_id)
            assert not pending & gone
            # What a life gave up may have been done all the same; what was forgotten never comes again.
            assert held & gone <= self.lost[thread_id]

    @invariant()
    def rows_are_true(self) -> None:
        """Row and pending together are the sum of all calls, where nothing was lost and nothing is in doubt."""
        self._mark_set_aside()
        for thread_id in THREADS:
            if thread_id in self.hit or any(self._in_doubt(life, thread_id) for life in self.lives):
                continue
            row = self.sink.rows.get(thread_id)
            total = row_of(self.calls[thread_id])
            for life in self.lives:
                delta = life.backlog.pending(thread_id)
                assert (delta is not None) == bool(life.pending[thread_id])
                if delta is not None:
                    row = MemoryRow(delta.first_at, delta.first_at) if row is None else replace(row)
                    row.add(delta)
            assert comparable(row) == comparable(total)

    def _mark_set_aside(self) -> None:
        for letters in self.sink.letters.values():
            self.hit.update(letter.delta.thread_id for letter in letters)
        self.hit.update(delta.thread_id for delta in self.sink.skipped)

    def _in_doubt(self, life: Life, thread_id: str) -> bool:
        batch = life.in_effect
        return batch is not None and any(delta.thread_id == thread_id for delta in batch.deltas)

    # -- the end -----------------------------------------------------------------------------------

    def teardown(self) -> None:
        """The sink works again: everything pending is applied, once; what is late finds nothing to do."""
        if not hasattr(self, "lives"):
            return
        for life in self.lives:
            while life.runs:
                life.step()
            life.drain_and_flush()
            if life.halted is None:
                assert life.backlog.is_empty
                assert not life.pending.total()
            else:
                life.start()
        self.check_all()
        sums = {thread_id: row.total_tokens for thread_id, row in self.sink.rows.items() if row.turn_count}
        self.sink.arrive()
        self.check_all()
        halted = {thread_id for life in self.lives if life.halted for thread_id in +life.pending}
        verdict = self.digits.read(sums)
        assert not verdict.doubled
        assert {thread_id for thread_id, _ in verdict.missing} <= self.hit | halted
        lives = [*self.lives, *self.ended]
        self.met.update(self.sink.met)
        self.met.update(
            duplicates=sum(life.flushes["duplicate"] for life in lives),
            regressions=sum(life.regressions for life in lives),
            halted=sum(life.halted is not None for life in lives),
            lost=sum(map(len, self.lost.values())),
            forgotten=sum(len(gone - self.lost[thread_id]) for thread_id, gone in self.gone.items()),
            exact_rows=len(set(THREADS) - self.hit),
            examples=1,
        )

    def check_all(self) -> None:
        """Check all invariants."""
        self.books_are_true()
        self.nothing_is_lost_or_doubled()
        self.rows_are_true()


def row_of(calls: list[Record]) -> MemoryRow | None:
    """Return the row of a thread after *calls*, in plain sums."""
    if not calls:
        return None
    turns = [record for record in calls if method_of(record) == TURN]
    resolves = [record for record in calls if method_of(record) == RESOLVE]
    first = calls[0][-1] // 1_000
    row = MemoryRow(first, turns[-1][-1] // 1_000 if turns else first)
    row.turn_count, row.total_tokens = len(turns), sum(record[2] for record in turns)
    row.total_cost_usd = Decimal(len(turns)) / 10
    row.agents_used = tuple(dict.fromkeys(str(record[1]) for record in turns))
    if resolves:
        row.resolution_type, row.ended_at = resolves[-1][1], resolves[-1][-1] // 1_000
    return row


def comparable(row: MemoryRow | None) -> tuple[Any, ...] | None:
    """Return what does not hang on which of several processes came first."""
    if row is None:
        return None
    return (
        row.started_at,
        row.last_activity,
        row.turn_count,
        sorted(row.agents_used),
        row.total_tokens,
        row.total_cost_usd,
        row.resolution_type,
        row.ended_at,
    )


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Thousands of faults are logged: nobody reads them."""
    logger = logging.getLogger("tracker_daemon")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(before)


BASE: Final = settings(
    deadline=None,
    database=None,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestTrackerMachine = TrackerMachine.TestCase
TestTrackerMachine.__doc__ = "Fresh histories, others in every run."
TestTrackerMachine.settings = settings(BASE, max_examples=100)


def test_collected_behind_a_month_of_doubt() -> None:
    """A batch in doubt for a month is found applied, which is no sign of life: the next one may find the row collected."""
    unanswered = Outcome("unanswered", "connection")
    state = TrackerMachine()
    state.begin(max_batch_size=1, create_missing=True)
    state.fork()
    state.call(number=1, calls=[("turn", "t0")])
    state.flush(number=1, opening=DONE, script=[unanswered])
    state.idle(seconds=MONTH + DAY, wall=0)
    state.call(number=0, calls=[("turn", "t0")])
    state.work(number=1, calls=[("turn", "t0")], opening=DONE, script=[DONE])
    state.teardown()
    assert state.sink.met["LedgerMissing"]


def kept_seeds() -> list[int]:
    """Return the seeds of the file: those that once failed, and enough to meet everything."""
    return [int(line) for line in SEEDS.read_text().splitlines() if line and not line.startswith("#")]


def test_kept_seeds_meet_everything() -> None:
    """The same histories in every run; together they meet each thing that the ledger is there for."""

    class Kept(TrackerMachine):
        met: ClassVar[Counter[str]] = Counter()

    for number in kept_seeds():
        few = settings(BASE, max_examples=25, phases=[Phase.generate])
        run_state_machine_as_test(seed(number)(Kept), settings=few)
    for name in (
        "ambiguous_commits",
        "ambiguous_opens",
        "zombie_commits",
        "zombie_commits_in_vain",
        "zombie_opens_in_vain",
        "duplicates",
        "regressions",
        "commits_forgotten",
        "forgotten",
        "dead_letters",
        "skipped",
        "renewals",
        "cancelled",
        "halted",
        "lost",
        "jumps_forgotten",
        "jumps_given_up",
        "given_up_in_effect",
        "Fenced",
        "LedgerMissing",
        "ledger_at_close",
        "exact_rows",
        *(f"{fault} faults" for fault in FAULTS),
    ):
        assert Kept.met[name] > 0, (name, Kept.met)


CALL: Final = [("turn", "t0"), ("ensure", "t1"), ("turn", "t1")]
CALLS_AND = {"number": 0, "calls": CALL, "opening": DONE}
CANCELLED: Final = Outcome("cancelled_after")
HISTORIES: Final[dict[str, list[tuple[str, dict[str, Any]]]]] = {
    "a batch in doubt keeps its identity however long it takes": [
        ("work", {**CALLS_AND, "script": [DONE]}),
        ("work", {**CALLS_AND, "script": [CANCELLED]}),
        ("idle", {"seconds": 2 * DAY, "wall": 0}),
        ("flush_all", {"number": 0}),
    ],
    "a batch on its way keeps its identity, too": [
        ("work", {**CALLS_AND, "script": [DONE]}),
        ("work", {**CALLS_AND, "script": [Outcome("late"), Outcome("cancelled")]}),
        ("idle", {"seconds": DAY + 1, "wall": 0}),
        ("flush_all", {"number": 0}),
        ("arrive", {}),
    ],
    "an open that arrives late fences nobody": [
        ("work", {**CALLS_AND, "opening": Outcome("late"), "script": []}),
        ("work", {**CALLS_AND, "script": [Outcome("unanswered", first=True)]}),
        ("work", {**CALLS_AND, "script": [Outcome("unanswered", first=True), DONE]}),
    ],
    "dead letters of a commit whose answer is lost are told": [
        ("work", {**CALLS_AND, "script": [Outcome("unanswered", dead=1), DONE]}),
    ],
    "a commit that arrives between two tries": [
        ("work", {**CALLS_AND, "script": [Outcome("late"), Outcome("fails", "lock"), Outcome("done", first=True)]}),
    ],
    "forgotten, opened again, and forgotten again": [
        ("work", {**CALLS_AND, "script": [DONE] * 4}),
        ("work", {**CALLS_AND, "script": [DONE] * 4}),
        ("fail_over", {"commits": 2, "opens": False}),
        ("work", {**CALLS_AND, "script": [DONE, Outcome("unanswered")]}),
        ("fail_over", {"commits": 3, "opens": True}),
        ("flush_all", {"number": 0}),
    ],
    "given up while the answer is on its way": [
        ("work", {**CALLS_AND, "script": []}),
        ("give_up", {"number": 0, "really": True, "ends": True}),
        ("step", {"number": 0, "outcome": Outcome("unanswered")}),
        ("close", {"number": 0, "really": True, "drains": False, "script": []}),
    ],
    "given up in doubt, and in effect": [
        ("work", {**CALLS_AND, "script": [CANCELLED]}),
        ("give_up", {"number": 0, "really": True, "ends": False}),
        ("work", {**CALLS_AND, "script": [DONE] * 4}),
    ],
    "given up on its way, which it never ends": [
        ("work", {**CALLS_AND, "script": [Outcome("late"), Outcome("cancelled")]}),
        ("give_up", {"number": 0, "really": True, "ends": False}),
        ("work", {**CALLS_AND, "opening": Outcome("unanswered"), "script": []}),
        ("arrive", {}),
        ("flush_all", {"number": 0}),
    ],
    "the ledger moves on at the second try, whose answer is lost": [
        ("work", {**CALLS_AND, "script": [DONE] * 4}),
        ("work", {**CALLS_AND, "script": [DONE] * 4}),
        ("fail_over", {"commits": 1, "opens": False}),
        ("call", {"number": 0, "calls": CALL}),
        ("flush", {"number": 0, "script": [DONE], "opening": DONE}),
        ("step", {"number": 0, "outcome": DONE}),
        ("step", {"number": 0, "outcome": Outcome("fails")}),
        *[("step", {"number": 0, "outcome": DONE})] * 2,
        ("step", {"number": 0, "outcome": Outcome("unanswered")}),
        ("flush_all", {"number": 0}),
    ],
    "a rival": [
        ("work", {**CALLS_AND, "script": [DONE] * 4}),
        ("rival", {"number": 0, "really": True}),
        ("work", {**CALLS_AND, "script": [DONE]}),
    ],
    "idle for a month": [
        ("work", {**CALLS_AND, "script": [DONE] * 3}),
        ("idle", {"seconds": 31 * DAY, "wall": 0}),
        ("fork", {}),
        ("work", {**CALLS_AND, "number": 1, "script": [DONE] * 3}),
        ("work", {**CALLS_AND, "script": [DONE] * 3}),
    ],
}


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_kept_history(name: str, max_batch_size: int) -> None:
    """Histories worth keeping, each checked after every step."""
    machine = TrackerMachine()
    machine.begin(create_missing=True, max_batch_size=max_batch_size)
    for rule_name, arguments in HISTORIES[name]:
        getattr(machine, rule_name)(**arguments)
        machine.check_all()
    machine.teardown()
