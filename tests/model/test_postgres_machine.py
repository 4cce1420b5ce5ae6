"""The real Postgres sink beside the sink in memory: after every step the same answers, whole rows and ledger.

Every producer has four connections, two that flush by arrays and two by COPY, so that a batch comes again by another way
than it came first. All examples share one database, each under thread ids and producers of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Final
from uuid import UUID, uuid4

import anyio.lowlevel
import psycopg
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
from psycopg import sql

from tests import reference_oracle as oracle
from tests.digits import CALLS_PER_THREAD, Digits
from tests.test_semantics import ALWAYS_ARRAYS, ALWAYS_COPY, as_row
from tracker_daemon.batch import Batch
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.errors import Fenced
from tracker_daemon.memory_sink import MemorySink
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import Applied, DeadLetter, LedgerMissing, LedgerRegressed, Opened, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

START: Final = 1_700_000_000_000_000
NAMES: Final = ("t", "é\\N", '{"NULL"}')
PRODUCERS: Final = 2
CONNECTIONS: Final = 4
COLUMNS: Final = sql.SQL(", ").join(map(sql.Identifier, oracle.COLUMNS))
FINAL: Final = (Fenced, LedgerMissing, LedgerRegressed)


class Ground:
    """One database, the connections to it, and the loop that they live in; for all examples.

    Attributes:
        met: what the examples have met.
    """

    def __init__(self, conninfo: str) -> None:
        self.runner = asyncio.Runner()
        self.admin = psycopg.connect(conninfo, autocommit=True)
        self.sinks = [
            [
                PostgresSink(Connector(conninfo), (None, "conversations"), copy_from=copy_from)
                for copy_from in (ALWAYS_ARRAYS, ALWAYS_COPY, ALWAYS_ARRAYS, ALWAYS_COPY)
            ]
            for _ in range(PRODUCERS)
        ]
        self.examples = count()
        self.met = Counter[str]()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run *coroutine* where the connections live."""
        return self.runner.run(coroutine)

    def close(self) -> None:
        """Close every connection."""
        for sinks in self.sinks:
            for sink in sinks:
                self.run(sink.aclose(uuid4(), 0, clean=False))
        self.admin.close()
        self.runner.close()

    def rows(self, threads: list[str]) -> dict[str, oracle.Row]:
        """Return the rows of *threads*, whole."""
        query = sql.SQL("SELECT thread_id, {} FROM conversations WHERE thread_id = ANY(%s)").format(COLUMNS)
        return {row[0]: tuple(row[1:]) for row in self.admin.execute(query, [threads])}

    def ledger(self, producers: list[UUID]) -> dict[tuple[UUID, int], Opened]:
        """Return where *producers* stand."""
        query = "SELECT producer, lane, epoch, applied_sequence FROM tracker_ledger WHERE producer = ANY(%s)"
        return {(row[0], row[1]): Opened(row[2], row[3]) for row in self.admin.execute(query, [producers])}

    def letters(self, producers: list[UUID]) -> Counter[tuple[UUID, int, str]]:
        """Return which dead letters of *producers* are stored."""
        query = "SELECT producer, sequence, thread_id FROM tracker_dead_letters WHERE producer = ANY(%s)"
        return Counter(tuple(row) for row in self.admin.execute(query, [producers]))


async def outcome(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return what *coroutine* returns, or the final exception that it raises."""
    try:
        return await coroutine
    except FINAL as error:
        return error


async def cut(sink: PostgresSink, batch: Batch, turns: int) -> bool:
    """Apply *batch* and cut the connection after so many turns of the loop; return whether the answer came first."""
    task = asyncio.ensure_future(outcome(sink.apply(batch)))
    while turns and not task.done():
        turns -= 1
        await anyio.lowlevel.checkpoint()
    if not task.done():
        sink.abort()
    try:
        await task
    except SinkFault:
        return False
    return True


def alike(outcome: Any) -> Any:
    """Return what two sinks must have in common of an answer or a final exception."""
    if isinstance(outcome, Applied):
        letters = tuple((letter.delta, letter.reason) for letter in outcome.dead_letters)
        return (outcome.rows, outcome.skipped, outcome.duplicate, letters)
    return (type(outcome), *outcome.args) if isinstance(outcome, BaseException) else outcome


@dataclass
class Producer:
    """One identity, as its processes know it.

    Attributes:
        sinks: its connections.
        lives: where each `open` found the ledger, the last one last.
        last: of each connection that has opened it or sent for it, where it was told that the ledger stands.
        sent: every batch sent, the last one last.
        next: the sequence of the next batch.
        collected: whether the ledger has forgotten it. Sequences begin anew then, and its dead letters bear them already.
    """

    sinks: list[PostgresSink]
    name: UUID = field(default_factory=uuid4)
    lives: list[Opened] = field(default_factory=list)
    last: dict[int, Opened] = field(default_factory=dict)
    sent: list[Batch] = field(default_factory=list)
    next: int = 1
    collected: bool = False

    def told(self, connection: int, batch: Batch, answer: object) -> None:
        """A connection was answered."""
        if isinstance(answer, Applied):
            self.last[connection] = Opened(batch.epoch, batch.sequence)


NUMBER: Final = st.integers(0, PRODUCERS - 1)
CONNECTION: Final = st.integers(0, CONNECTIONS - 1)
CALLS: Final = st.lists(
    st.tuples(st.sampled_from(["turn", "turn", "ensure", "resolve"]), st.sampled_from(NAMES), st.integers(-3, 3)),
    min_size=1,
    max_size=5,
)
TURNS: Final = st.sampled_from([0, 1, 2, 5, 10, 15, 20, 30, 50, 100])
SEEDS: Final = (1, 2, 3, 4)
POISON: Final = st.sampled_from([False, False, False, True])


class PostgresMachine(RuleBasedStateMachine):
    """Two producers on one table."""

    ground: ClassVar[Ground]

    @initialize()
    def begin(self) -> None:
        """Threads and producers of this example's own."""
        prefix = f"{next(self.ground.examples)}:"
        self.threads = {name: prefix + name for name in NAMES}
        self.memory = MemorySink()
        self.producers = [Producer(sinks) for sinks in self.ground.sinks]
        self.digits = Digits()
        self.letters = dict[tuple[UUID, int, int], tuple[DeadLetter, ...]]()
        self.stored = Counter[tuple[UUID, int, str]]()
        self.ticks = 0
        for number in range(PRODUCERS):
            self.open(number, number)

    # -- both sides --------------------------------------------------------------------------------

    def _model(self, batch: Batch) -> Any:
        """Apply *batch* to the memory, and return what Postgres is to answer."""
        poison = tuple(delta for delta in batch.deltas if delta.tokens >= 2**63)
        kept = tuple(delta for delta in batch.deltas if delta.tokens < 2**63)
        found = self.ground.run(outcome(self.memory.apply(replace(batch, deltas=kept))))
        if not isinstance(found, Applied):
            self.ground.met[type(found).__name__] += 1
            return found
        key = (batch.producer, batch.epoch, batch.sequence)
        if not found.duplicate:
            self.letters[key] = tuple(DeadLetter(delta, "overflow", "", "") for delta in poison)
            self.stored.update((batch.producer, batch.sequence, delta.thread_id) for delta in poison)
            self.ground.met["dead letters"] += len(poison)
        else:
            self.ground.met["duplicates"] += 1
            self.ground.met["duplicates with dead letters"] += bool(self.letters[key])
        return replace(found, dead_letters=self.letters[key])

    def _real(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return what Postgres answers. A connection that was cut costs one try."""
        try:
            return self.ground.run(outcome(make()))
        except SinkFault as fault:
            if fault.kind != "connection":
                raise
        return self.ground.run(outcome(make()))

    def _apply(self, producer: Producer, connection: int, batch: Batch) -> Any:
        sink = producer.sinks[connection]
        expected = self._model(batch)
        assert alike(self._real(lambda: sink.apply(batch))) == alike(expected)
        producer.told(connection, batch, expected)
        return expected

    def _delta(self, thread_id: str, calls: list[tuple[str, int]]) -> ThreadDelta:
        delta = None
        for kind, shift in calls:
            self.ticks += 1
            at = START + 1_000 * self.ticks + shift * 4_000  # some arrive out of order
            delta = ThreadDelta(thread_id, at) if delta is None else delta
            made = self.digits.made.get(thread_id, 0)
            if kind == "turn" and made < CALLS_PER_THREAD - 1:
                delta.turn(f"a{made % 3}\t", self.digits.tokens(thread_id), made / 10, at)
            elif kind == "resolve":
                delta.resolve(f"r{self.ticks}\\", at)
            else:
                delta.ensure(at)
        assert delta is not None
        return delta

    def _batch(self, producer: Producer, calls: list[tuple[str, str, int]], *, poison: bool) -> Batch:
        by_thread: dict[str, list[tuple[str, int]]] = {}
        for kind, name, shift in calls:
            by_thread.setdefault(self.threads[name], []).append((kind, shift))
        deltas = [self._delta(thread_id, each) for thread_id, each in by_thread.items()]
        if poison and not producer.collected:
            bad = ThreadDelta(self.threads["t"] + "bad", START)
            bad.turn(None, 2**63, 0, START)
            deltas.insert(len(deltas) // 2, bad)
        batch = Batch(producer.name, 0, producer.lives[-1].epoch, producer.next, tuple(deltas))
        producer.sent.append(batch)
        return batch

    # -- what happens ------------------------------------------------------------------------------

    @rule(number=NUMBER, connection=CONNECTION)
    def open(self, number: int, connection: int) -> None:
        """A new life of a producer, where the ledger stands; not where its row is known to be gone."""
        producer, sink = self.producers[number], self.producers[number].sinks[connection]
        found = self._real(lambda: sink.open(producer.name, 0))
        if (producer.name, 0) not in self.memory.ledger and connection in producer.last:
            assert alike(found) == alike(LedgerMissing(str(producer.name), 0))
            return
        if (producer.name, 0) not in self.memory.ledger:
            # From the beginning again: nobody has kept what the former row was about.
            producer.lives.clear()
            producer.sent.clear()
        here = self.memory.ledger.get((producer.name, 0), Opened(0, 0))
        epoch = max(here.epoch, producer.last.get(connection, Opened(0, 0)).epoch) + 1
        expected = self.memory.ledger[producer.name, 0] = Opened(epoch, here.applied_sequence)
        assert found == expected
        producer.last[connection] = expected
        producer.lives.append(expected)
        producer.next = expected.applied_sequence + 1

    @rule(number=NUMBER, connection=CONNECTION, calls=CALLS, poison=POISON)
    def apply(self, number: int, connection: int, calls: list[tuple[str, str, int]], *, poison: bool) -> None:
        """The next batch."""
        producer = self.producers[number]
        found = self._apply(producer, connection, self._batch(producer, calls, poison=poison))
        producer.next += isinstance(found, Applied)

    @precondition(lambda self: any(producer.sent for producer in self.producers))
    @rule(number=NUMBER, connection=CONNECTION, back=st.sampled_from([1, 1, 1, 2, 5]))
    def again(self, number: int, connection: int, back: int) -> None:
        """A batch of before comes again, mostly the last one."""
        producer = self.producers[number]
        if producer.sent:
            self._apply(producer, connection, producer.sent[-min(back, len(producer.sent))])

    @rule(number=NUMBER, first=CONNECTION, second=CONNECTION, calls=CALLS, turns=TURNS, poison=POISON)
    def lose_answer(
        self, number: int, first: int, second: int, calls: list[tuple[str, str, int]], turns: int, *, poison: bool
    ) -> None:
        """The connection is cut somewhere on the way; the same batch comes again on another, or on a new one."""
        producer = self.producers[number]
        batch = self._batch(producer, calls, poison=poison)
        answered = self.ground.run(cut(producer.sinks[first], batch, turns))
        expected = self._model(batch)
        sink = producer.sinks[second]
        found = self._real(lambda: sink.apply(batch))
        if isinstance(found, Applied) and found.duplicate:
            self.ground.met["answer lost"] += 1
            expected = replace(expected, rows=0, duplicate=True)
        elif isinstance(found, Applied):
            self.ground.met["cut before the commit"] += 1
            assert not answered
        assert alike(found) == alike(expected)
        producer.next += isinstance(found, Applied)
        producer.told(second, batch, found)
        if answered:
            producer.told(first, batch, found)

    @rule(number=NUMBER, first=CONNECTION, second=CONNECTION, calls=CALLS, poison=POISON)
    def race(self, number: int, first: int, second: int, calls: list[tuple[str, str, int]], *, poison: bool) -> None:
        """The same batch on two connections at once: one of them applies it, the other finds it applied."""
        producer = self.producers[number]
        if first == second:
            return
        batch = self._batch(producer, calls, poison=poison)
        sinks = [producer.sinks[connection] for connection in (first, second)]
        for sink in sinks:
            # Connected, and not by a connection that was cut just behind an answer.
            self._real(lambda sink=sink: sink.apply(replace(batch, producer=uuid4(), deltas=())))

        async def both() -> list[Any]:
            return list(await asyncio.gather(*(outcome(sink.apply(batch)) for sink in sinks)))

        expected = self._model(batch)
        found = [alike(each) for each in self.ground.run(both())]
        for connection in (first, second):
            producer.told(connection, batch, expected)
        if isinstance(expected, Applied):
            late = alike(replace(expected, rows=0, duplicate=True))
            assert found in ([alike(expected), late], [late, alike(expected)])
            self.ground.met["races"] += 1
            producer.next += 1
        else:
            assert found == [alike(expected)] * 2

    @rule(number=NUMBER, connection=CONNECTION, calls=CALLS, life=st.integers(0, 5), ahead=st.integers(-1, 2))
    def stray(self, number: int, connection: int, calls: list[tuple[str, str, int]], life: int, ahead: int) -> None:
        """A batch of an older life, or out of turn: refused, unless it is the very next of the last life."""
        producer = self.producers[number]
        opened = producer.lives[-1 - min(life, len(producer.lives) - 1)]
        sequence = max(1, producer.next + ahead)
        here = self.memory.ledger.get((producer.name, 0))
        if here is not None and here.epoch == opened.epoch and sequence - here.applied_sequence in (0, 1):
            return  # an identity names one batch for ever: this one would name a second
        batch = self._batch(producer, calls, poison=False)
        producer.sent.pop()
        found = self._apply(producer, connection, replace(batch, epoch=opened.epoch, sequence=sequence))
        assert isinstance(found, FINAL)

    @rule(number=NUMBER, connection=CONNECTION)
    def close(self, number: int, connection: int) -> None:
        """A clean close marks the row that stands where its connection last saw it, or says what else the ledger says."""
        producer = self.producers[number]
        sink, last = producer.sinks[connection], producer.last.get(connection)
        expected = None
        if last is not None and self.memory.ledger.get((producer.name, 0)) != last:
            following = Batch(producer.name, 0, last.epoch, last.applied_sequence + 1, ())
            expected = self.ground.run(outcome(self.memory.apply(following)))
            expected = None if isinstance(expected, Applied) else expected
        # Over a new connection, if the one it had is lost.
        assert alike(self.ground.run(outcome(sink.aclose(producer.name, 0, clean=True)))) == alike(expected)

    @rule(number=NUMBER, days=st.sampled_from([0.5, 2, 31]), other=CONNECTION)
    def collect(self, number: int, days: float, other: int) -> None:
        """Days pass: whoever opens next collects what was closed a day ago, or gave no sign for a month."""
        producer, name = self.producers[number], self.producers[number].name
        back = "now() - make_interval(hours => %s)"
        row = self.ground.admin.execute(
            f"UPDATE tracker_ledger SET closed_at = {back} WHERE producer = %s AND closed_at IS NOT NULL RETURNING 1",
            [int(days * 24), name],
        ).fetchone()
        self.ground.admin.execute(
            f"UPDATE tracker_ledger SET updated_at = {back} WHERE producer = %s", [int(days * 24), name]
        )
        rival = self.producers[1 - number].sinks[other]
        self._real(lambda: rival.open(uuid4(), 0))
        if (row is not None and days > 1) or days > 30:
            producer.collected = True
            self.ground.met["collected"] += self.memory.ledger.pop((name, 0), None) is not None

    # -- what holds --------------------------------------------------------------------------------

    @invariant()
    def rows_are_the_same(self) -> None:
        """Whole rows, and nothing of a dead letter."""
        names = [*self.threads.values(), self.threads["t"] + "bad"]
        rows = self.ground.rows(names)
        assert rows == {thread_id: as_row(row) for thread_id, row in self.memory.rows.items()}

    @invariant()
    def ledger_is_the_same(self) -> None:
        """Epochs and sequences, and the letters of the batches in effect."""
        names = [producer.name for producer in self.producers]
        assert self.ground.ledger(names) == self.memory.ledger
        assert self.ground.letters(names) == self.stored

    @invariant()
    def nothing_is_doubled(self) -> None:
        """No digit is counted twice."""
        for row in self.memory.rows.values():
            total = row.total_tokens
            while total:
                total, digit = divmod(total, 4)
                assert digit < 2


@contextmanager
def on(conninfo: str) -> Iterator[type[PostgresMachine]]:
    """Make a machine on one database."""
    ground = Ground(conninfo)
    try:
        yield type("Here", (PostgresMachine,), {"ground": ground})
    finally:
        ground.close()


BASE: Final = settings(
    deadline=None,
    database=None,
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)


def test_postgres_is_as_memory(database: str) -> None:
    """Fresh histories, others in every run."""
    with on(database) as machine:
        run_state_machine_as_test(machine, settings=settings(BASE, max_examples=12))


def test_kept_seeds_meet_everything(database: str) -> None:
    """The same histories in every run; together they meet each answer that the ledger can give."""
    with on(database) as machine:
        few = settings(BASE, max_examples=10, phases=[Phase.generate])
        for number in SEEDS:
            run_state_machine_as_test(seed(number)(machine), settings=few)
    met = machine.ground.met
    for name in (
        "Fenced",
        "LedgerMissing",
        "LedgerRegressed",
        "duplicates",
        "dead letters",
        "duplicates with dead letters",
        "answer lost",
        "cut before the commit",
        "races",
        "collected",
    ):
        assert met[name] > 0, (name, met)
