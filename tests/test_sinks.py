"""One suite for every sink: what `sink.Sink` promises, held by memory, by both forms of Postgres, and by a daemon."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tests import reference_oracle as oracle
from tests.conftest import run_migrate
from tests.daemon.harness import Daemon, serving
from tests.strategies import NOW, Process
from tests.test_semantics import ALWAYS_ARRAYS, ALWAYS_COPY, as_row, new_database
from tracker_daemon import Fenced, MemorySink, Sink
from tracker_daemon.batch import Batch
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.generation import ensure, resolve
from tracker_daemon.http_sink import HttpSink
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import Applied, LedgerMissing, LedgerRegressed, Opened

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from tracker_daemon.embedded import EmbeddedPostgres

FORMS = ("memory", "arrays", "copy", "daemon")


daemons = ExitStack()
running: dict[str, Daemon] = {}


def daemon_on(conninfo: str) -> str:
    """Return the socket of a daemon on the database, which serves until the end of the module."""
    if conninfo not in running:
        running[conninfo] = daemons.enter_context(serving(conninfo, "--relay-interval", "0"))
    return running[conninfo].path


class Subject:
    """A sink under test, and a look at what it holds.

    Attributes:
        form: one of `FORMS`.
        sink: the sink.
    """

    def __init__(self, form: str, conninfo: str) -> None:
        self.form, self._conninfo = form, conninfo
        self._runner = asyncio.Runner()
        self._made: list[Sink] = []
        self.sink = self.another()

    def another(self) -> Any:
        """Return a second sink on the same rows, as another process has it."""
        if self.form == "memory":
            found: Sink = self._made[0] if self._made else MemorySink()
        elif self.form == "daemon":
            found = HttpSink("http://daemon", socket=daemon_on(self._conninfo), token=lambda: None)
        else:
            found = PostgresSink(
                Connector(self._conninfo),
                (None, "conversations"),
                copy_from=ALWAYS_COPY if self.form == "copy" else ALWAYS_ARRAYS,
            )
        self._made.append(found)
        return found

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run *coroutine* in the loop of the connections."""
        return self._runner.run(coroutine)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._made:
            self.run(sink.aclose(uuid4(), 0, clean=False))
        self._runner.close()

    def rows(self) -> dict[str, oracle.Row]:
        """Return every row by thread id."""
        if isinstance(self.sink, MemorySink):
            return {thread_id: as_row(row) for thread_id, row in self.sink.rows.items()}
        with psycopg.connect(self._conninfo) as connection:
            return oracle.rows(connection, "conversations")

    def ledger(self) -> dict[tuple[UUID, int], Opened]:
        """Return where each (producer, lane) stands."""
        if isinstance(self.sink, MemorySink):
            return dict(self.sink.ledger)
        with psycopg.connect(self._conninfo) as connection:
            found = connection.execute("SELECT producer, lane, epoch, applied_sequence FROM tracker_ledger").fetchall()
        return {(row[0], row[1]): Opened(row[2], row[3]) for row in found}

    def set_ledger(self, producer: UUID, lane: int, applied_sequence: int | None) -> None:
        """Put the ledger elsewhere, as a restored backup would; `None` takes the row away."""
        if isinstance(self.sink, MemorySink):
            before = self.sink.ledger.pop((producer, lane))
            if applied_sequence is not None:
                self.sink.ledger[producer, lane] = Opened(before.epoch, applied_sequence)
            return
        with psycopg.connect(self._conninfo) as connection:
            if applied_sequence is None:
                connection.execute("DELETE FROM tracker_ledger WHERE (producer, lane) = (%s, %s)", [producer, lane])
            else:
                connection.execute(
                    "UPDATE tracker_ledger SET applied_sequence = %s WHERE (producer, lane) = (%s, %s)",
                    [applied_sequence, producer, lane],
                )


@pytest.fixture(scope="module")
def shared_database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The conninfo of one database with the tables, for this module."""
    with new_database(postgres) as conninfo:
        run_migrate(conninfo)
        with daemons:
            yield conninfo
        running.clear()


@pytest.fixture
def conninfo(shared_database: str) -> str:
    """The same, emptied."""
    with psycopg.connect(shared_database) as connection:
        connection.execute("TRUNCATE conversations, tracker_ledger, tracker_dead_letters")
    return shared_database


@pytest.fixture(params=FORMS)
def subject(request: pytest.FixtureRequest, conninfo: str) -> Iterator[Subject]:
    """A sink of each form, empty."""
    found = Subject(request.param, conninfo)
    yield found
    found.close()


def delta(thread_id: str = "t", number: int = 0) -> ThreadDelta:
    """Return one turn whose tokens are the digit *number* in base 4."""
    found = ThreadDelta(thread_id, NOW // 1_000 + number)
    found.ensure(NOW // 1_000 + number)
    found.turn(f"agent{number}", 4**number, 4**number, NOW // 1_000 + number)
    return found


def batch_of(producer: UUID, opened: Opened, number: int, *deltas: ThreadDelta, lane: int = 0) -> Batch:
    """Return the batch number *number* of a life."""
    return Batch(producer, lane, opened.epoch, number, deltas or (delta(number=number),))


def test_is_a_sink(subject: Subject) -> None:
    """It is a `Sink`, also for `isinstance`."""
    assert isinstance(subject.sink, Sink)


def test_contiguous_batches(subject: Subject) -> None:
    """Batches of one life are applied in sequence, and the ledger says so."""
    producer, sink = uuid4(), subject.sink
    opened = subject.run(sink.open(producer, 0))
    assert opened == Opened(1, 0)
    for number in range(1, 5):
        assert subject.run(sink.apply(batch_of(producer, opened, number))) == Applied(rows=1)
        assert subject.ledger() == {(producer, 0): Opened(1, number)}
    assert subject.rows()["t"][2:5] == (4, ["agent1", "agent2", "agent3", "agent4"], 4 + 16 + 64 + 256)


def test_twice(subject: Subject) -> None:
    """A batch that comes again, on the same sink or another, is a duplicate and changes nothing."""
    producer = uuid4()
    opened = subject.run(subject.sink.open(producer, 0))
    batch = batch_of(producer, opened, 1, delta("t"), delta("u"))
    assert subject.run(subject.sink.apply(batch)) == Applied(rows=2)
    rows, ledger = subject.rows(), subject.ledger()
    for sink in (subject.sink, subject.another(), subject.sink):
        assert subject.run(sink.apply(batch)) == Applied(rows=0, duplicate=True)
        assert (subject.rows(), subject.ledger()) == (rows, ledger)
    assert subject.run(subject.sink.apply(batch_of(producer, opened, 2))) == Applied(rows=1)


def test_open_fences_the_older_life(subject: Subject) -> None:
    """Opening again is a new epoch that stands where the old one stood; the old one is fenced, whatever it sends."""
    producer, old = uuid4(), subject.sink
    first = subject.run(old.open(producer, 0))
    applied = batch_of(producer, first, 1)
    subject.run(old.apply(applied))
    new = subject.another()
    second = subject.run(new.open(producer, 0))
    assert second == Opened(2, 1)
    rows = subject.rows()
    for batch in (batch_of(producer, first, 2), batch_of(producer, first, 3), applied):
        with pytest.raises(Fenced) as fenced:
            subject.run(old.apply(batch))
        assert (fenced.value.epoch, fenced.value.found) == (1, 2)
    assert subject.rows() == rows
    assert subject.run(new.apply(batch_of(producer, second, 2))) == Applied(rows=1)
    assert subject.ledger() == {(producer, 0): Opened(2, 2)}


def test_older_than_the_last(subject: Subject) -> None:
    """A batch of this life from before the last one comes from a writer that was overtaken: it is fenced."""
    producer, sink = uuid4(), subject.sink
    opened = subject.run(sink.open(producer, 0))
    for number in (1, 2):
        subject.run(sink.apply(batch_of(producer, opened, number)))
    rows = subject.rows()
    with pytest.raises(Fenced):
        subject.run(sink.apply(batch_of(producer, opened, 1)))
    assert (subject.rows(), subject.ledger()) == (rows, {(producer, 0): Opened(1, 2)})


def test_gap(subject: Subject) -> None:
    """A batch that is not the next one means that the database forgot commits; nothing of it is applied."""
    producer, sink = uuid4(), subject.sink
    opened = subject.run(sink.open(producer, 0))
    subject.run(sink.apply(batch_of(producer, opened, 1)))
    rows = subject.rows()
    with pytest.raises(LedgerRegressed) as found:
        subject.run(sink.apply(batch_of(producer, opened, 3)))
    assert (found.value.expected, found.value.found) == (2, 1)
    assert (subject.rows(), subject.ledger()) == (rows, {(producer, 0): Opened(1, 1)})
    assert subject.run(sink.apply(batch_of(producer, opened, 2))) == Applied(rows=1)


def test_forgotten_commits(subject: Subject) -> None:
    """A ledger that went back is found at the next batch; a new life goes on from where it stands."""
    producer, sink = uuid4(), subject.sink
    opened = subject.run(sink.open(producer, 0))
    for number in (1, 2, 3):
        subject.run(sink.apply(batch_of(producer, opened, number)))
    subject.set_ledger(producer, 0, 1)
    with pytest.raises(LedgerRegressed) as found:
        subject.run(sink.apply(batch_of(producer, opened, 4)))
    assert (found.value.expected, found.value.found) == (3, 1)
    again = subject.run(sink.open(producer, 0))
    assert again == Opened(2, 1)
    assert subject.run(sink.apply(batch_of(producer, again, 2))) == Applied(rows=1)


def test_epoch_that_was_never_opened(subject: Subject) -> None:
    """A life that the database has forgotten altogether is a regression too."""
    producer, sink = uuid4(), subject.sink
    opened = subject.run(sink.open(producer, 0))
    with pytest.raises(LedgerRegressed):
        subject.run(sink.apply(batch_of(producer, replace(opened, epoch=2), 1)))
    assert subject.rows() == {}


def test_missing_ledger_row(subject: Subject) -> None:
    """An open producer without a row is told so; nothing is applied, and no row is made up."""
    producer, sink = uuid4(), subject.sink
    opened = subject.run(sink.open(producer, 0))
    subject.run(sink.apply(batch_of(producer, opened, 1)))
    subject.set_ledger(producer, 0, None)
    rows = subject.rows()
    for batch in (batch_of(producer, opened, 1), batch_of(producer, opened, 2)):
        with pytest.raises(LedgerMissing):
            subject.run(sink.apply(batch))
    assert (subject.rows(), subject.ledger()) == (rows, {})


def test_never_opened(subject: Subject) -> None:
    """A producer that nobody opened has no row either."""
    with pytest.raises(LedgerMissing):
        subject.run(subject.sink.apply(batch_of(uuid4(), Opened(1, 0), 1)))


def test_lanes_and_producers_are_apart(subject: Subject) -> None:
    """Every producer and every lane of it has a sequence and an epoch of its own."""
    ours, theirs, sink = uuid4(), uuid4(), subject.sink
    for producer, lane in ((ours, 0), (ours, 1), (theirs, 0)):
        opened = subject.run(sink.open(producer, lane))
        assert opened == Opened(1, 0)
        assert subject.run(sink.apply(batch_of(producer, opened, 1, lane=lane))) == Applied(rows=1)
    subject.run(sink.open(ours, 1))
    assert subject.ledger() == {(ours, 0): Opened(1, 1), (ours, 1): Opened(2, 1), (theirs, 0): Opened(1, 1)}
    assert subject.rows()["t"][2] == 3
    assert subject.run(sink.apply(batch_of(ours, Opened(1, 1), 2))) == Applied(rows=1)


def test_after_aclose(subject: Subject) -> None:
    """A sink that was closed serves again when it is opened again; what it held is there."""
    producer, sink = uuid4(), subject.sink
    opened = subject.run(sink.open(producer, 0))
    batch = batch_of(producer, opened, 1)
    subject.run(sink.apply(batch))
    subject.run(sink.aclose(producer, 0, clean=True))
    assert subject.run(sink.open(producer, 0)) == Opened(2, 1)
    assert subject.rows()["t"][2] == 1


def test_abort_with_nothing_under_way(subject: Subject) -> None:
    """`abort` at rest costs at most one try: the batch is applied once all the same."""
    producer, sink = uuid4(), subject.sink
    opened = subject.run(sink.open(producer, 0))
    sink.abort()
    batch, tries = batch_of(producer, opened, 1), 0
    while True:
        tries += 1
        try:
            applied = subject.run(sink.apply(batch))
        except Exception:
            assert tries == 1
        else:
            break
    assert applied == Applied(rows=1)
    assert subject.rows()["t"][2] == 1


@pytest.mark.parametrize("form", FORMS)
def test_skipped(conninfo: str, form: str) -> None:
    """`create_missing=False`: a delta without an `ensure` and without a row is skipped and counted; also twice.

    It is the batch that says so: the same sink makes the rows of the next one.
    """
    subject = Subject(form, conninfo)
    producer, sink = uuid4(), subject.sink
    opened = subject.run(sink.open(producer, 0))
    turn = ThreadDelta("orphan", NOW // 1_000)
    turn.turn("a", 1, 1, NOW // 1_000)
    resolve = ThreadDelta("other", NOW // 1_000)
    resolve.resolve("done", NOW // 1_000)
    batch = replace(batch_of(producer, opened, 1, turn, delta("t"), resolve), create_missing=False)
    assert subject.run(sink.apply(batch)) == Applied(rows=1, skipped=2)
    assert subject.run(sink.apply(batch)).duplicate
    only_orphans = replace(batch_of(producer, opened, 2, turn, resolve), create_missing=False)
    assert subject.run(sink.apply(only_orphans)) == Applied(rows=0, skipped=2)
    assert subject.run(sink.apply(only_orphans)).duplicate
    assert list(subject.rows()) == ["t"]
    assert subject.run(sink.apply(batch_of(producer, opened, 3, turn, resolve))) == Applied(rows=2)
    assert sorted(subject.rows()) == ["orphan", "other", "t"]
    subject.close()


@pytest.mark.parametrize("form", [form for form in FORMS if form != "memory"])
def test_recall(conninfo: str, form: str) -> None:
    """Of a batch that the ledger stands behind its dead letters are told again; nothing is written."""
    subject = Subject(form, conninfo)
    producer, sink = uuid4(), subject.sink
    opened = subject.run(sink.open(producer, 0))
    bad = delta("bad")
    bad.tokens = 2**70
    batch = batch_of(producer, opened, 1, delta("t"), bad)
    first = subject.run(sink.apply(batch))
    assert [letter.delta.thread_id for letter in first.dead_letters] == ["bad"]
    assert subject.run(sink.apply(batch_of(producer, opened, 2, delta("t")))).rows == 1
    before, ledger = subject.rows(), subject.ledger()
    again = subject.run(sink.recall(batch))
    assert (again.rows, again.duplicate) == (0, True)
    assert [(x.delta.thread_id, x.reason, x.sqlstate) for x in again.dead_letters] == [
        (x.delta.thread_id, x.reason, x.sqlstate) for x in first.dead_letters
    ]
    assert subject.run(sink.recall(batch_of(producer, opened, 2, delta("t")))) == Applied(rows=0, duplicate=True)
    assert (subject.rows(), subject.ledger()) == (before, ledger)
    subject.close()


def test_same_rows(conninfo: str) -> None:
    """The same batches leave the same rows in memory and in the table, by either form."""
    windows: list[list[Any]] = [
        [ensure("t", NOW), ("t", "\\.", 5, 0.1, NOW + 1_000), ("u", "x\ty", 1, 0.2, NOW)],
        [
            ("t", "\\N", 5, 0.1, NOW + 5_000),
            ensure("u", NOW),
            resolve("u", 'q"{}', NOW),
            ("v" * 512, None, 1, 10**30, NOW),
        ],
        [("t", "\\.", -5, 0.30, NOW + 9_000), resolve("t", "done", NOW), ("v" * 512, "NULL", 0, 1e-300, NOW)],
    ]
    found = []
    for form in FORMS:
        with psycopg.connect(conninfo) as connection:
            connection.execute("TRUNCATE conversations, tracker_ledger")
        subject, process = Subject(form, conninfo), Process([list(window) for window in windows], batch_size=2)
        while subject.run(process.send([subject.sink])):
            pass
        found.append(subject.rows())
        subject.close()
    assert all(each == found[0] for each in found)
    assert len(found[0]) == 3
