"""Several connections flush disjoint threads of one batch: each exactly once by itself, together the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import anyio
import psycopg
import pytest
from prometheus_client import CollectorRegistry

from tests.helpers import PATIENCE, balanced, query
from tracker_daemon import Fenced, MemorySink, Tracker, TrackerError
from tracker_daemon.batch import Batch
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.errors import ConfigError
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.lanes import Lanes
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import LedgerMissing, LedgerRegressed, SinkFault

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tracker_daemon.sink import Applied, Sink

NAMES = [f"thread-{number}" for number in range(40)]
TABLE = (None, "conversations")


def sink_of(database: str, lanes: int) -> Lanes:
    """Return a sink of its own."""
    return Lanes(Connector(database), TABLE, lanes)


def batch_of(producer: UUID, sequence: int, epoch: int = 1, names: list[str] = NAMES) -> Batch:
    """Return a batch of one turn for each of *names*."""
    deltas = []
    for name in names:
        delta = ThreadDelta(name, 1_000_000)
        delta.ensures = delta.turns = 1
        delta.last_turn_at = 1_000_000
        deltas.append(delta)
    return Batch(producer, 0, epoch, sequence, tuple(deltas))


def turns(database: str) -> set[tuple[int, int]]:
    """Return how many threads have how many turns."""
    return set(query(database, "SELECT turn_count, count(*) FROM conversations GROUP BY 1"))


def ledger(database: str, producer: UUID) -> list[tuple[Any, ...]]:
    """Return the lanes of a producer."""
    statement = "SELECT lane, epoch, applied_sequence FROM tracker_ledger WHERE producer = '{}' ORDER BY lane DESC"
    return query(database, statement.format(producer))


def run(database: str, lanes: int, do: Callable[[Lanes], Awaitable[None]]) -> None:
    """Do something with a sink that is let go of afterwards."""

    async def main() -> None:
        sink = sink_of(database, lanes)
        try:
            await do(sink)
        finally:
            await sink.aclose(uuid4(), 0, clean=False)

    anyio.run(main)


class Failing:
    """Makes one lane fail at its next try, before it or after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lane: int | None = None
        self.after = False
        apply = PostgresSink.apply

        async def applied(sink: PostgresSink, batch: Batch) -> Applied:
            failing = batch.lane == self.lane
            if not failing or self.after:
                done = await apply(sink, batch)
            if failing:
                self.lane = None
                raise SinkFault("connection", "the answer was lost")
            return done

        monkeypatch.setattr(PostgresSink, "apply", applied)


@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_a_tracker(database: str, registry: CollectorRegistry, lanes: int) -> None:
    """Sums are exact, and each lane has its row in the ledger."""
    with Tracker(database, registry=registry, lanes=lanes, flush_interval=0.01, max_batch_size=16) as tracker:
        for _ in range(5):
            for name in NAMES:
                tracker.record_turn(name, "agent", 3, 0.5)
            tracker.flush(PATIENCE)
        producer = tracker.backlog.producer
    assert balanced(tracker.stats())
    assert query(
        database, "SELECT DISTINCT turn_count, total_tokens, total_cost_usd, agents_used FROM conversations"
    ) == [(5, 15, 2.5, ["agent"])]
    assert turns(database) == {(5, 40)}
    rows = ledger(database, producer)
    assert [row[0] for row in rows] == [-number for number in range(lanes)]
    assert len({row[1:] for row in rows}) == 1
    assert query(database, "SELECT count(*) FROM tracker_ledger WHERE closed_at IS NULL") == [(0,)]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("lane", [0, -1, -2])
def test_one_lane_fails(
    database: str, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, lane: int, after: bool
) -> None:
    """The others' shares are there, and the batch comes again."""
    failing = Failing(monkeypatch)
    with Tracker(database, registry=registry, lanes=3, flush_interval=600) as tracker:
        for _ in range(3):
            for name in NAMES:
                tracker.record_turn(name)
            failing.lane, failing.after = lane, after
            tracker.flush(PATIENCE)
    assert turns(database) == {(3, 40)}
    assert balanced(tracker.stats())
    assert tracker.stats().applied == 120


@pytest.mark.parametrize("later", [1, 2, 5])
def test_a_later_life_with_another_setting(database: str, later: int) -> None:
    """What a life with three lanes has done by halves is done by one with another number, as it was cut."""
    producer = uuid4()

    async def half(sink: Lanes) -> None:
        opened = await sink.open(producer, 0)
        await sink.apply(batch_of(producer, 1, opened.epoch))
        shares = sink._shares(batch_of(producer, 2, opened.epoch))
        assert min(len(share.deltas) for share in shares) > 0
        for share in shares[1:]:
            await sink._sinks[-share.lane].apply(share)

    async def rest(sink: Lanes) -> None:
        opened = await sink.open(producer, 0)
        assert (opened.epoch, opened.applied_sequence) == (2, 1)
        assert not (await sink.apply(batch_of(producer, 2, opened.epoch))).duplicate
        assert (await sink.apply(batch_of(producer, 2, opened.epoch))).duplicate
        assert (await sink.apply(batch_of(producer, 3, opened.epoch))).rows == 40

    run(database, 3, half)
    assert turns(database) != {(2, 40)}
    run(database, later, rest)
    assert turns(database) == {(3, 40)}
    assert ledger(database, producer) == [(0, 2, 3), (-1, 2, 3), (-2, 2, 3)]


def test_who_has_no_lanes(database: str) -> None:
    """A sink that would apply all by one lane refuses a producer with several, and not one of a stream."""
    producer, other = uuid4(), uuid4()

    async def opened(sink: Lanes) -> None:
        await sink.open(producer, 0)

    run(database, 2, opened)
    with psycopg.connect(database) as connection:
        connection.execute("INSERT INTO tracker_ledger VALUES (%s, 1, 0, 7), (%s, 2, 0, 7)", [other, other])

    async def alone() -> None:
        sink = PostgresSink(Connector(database), TABLE)
        with pytest.raises(SinkFault, match="has 2 lanes"):
            await sink.open(producer, 0)
        assert (await sink.open(other, 0)).applied_sequence == 0
        await sink.aclose(other, 0, clean=False)

    anyio.run(alone)
    run(database, 3, lambda sink: opened_at(sink, other, 1, 0))


async def opened_at(sink: Sink, producer: UUID, epoch: int, sequence: int) -> None:
    """Open, and look where the producer stands."""
    opened = await sink.open(producer, 0)
    assert (opened.epoch, opened.applied_sequence) == (epoch + 1, sequence)


def test_dead_letters(database: str, registry: CollectorRegistry) -> None:
    """A row that the database refuses is set aside by its lane; all else goes through; a repeat tells of it again."""
    with psycopg.connect(database) as connection:
        connection.execute("ALTER TABLE conversations ADD CHECK (NOT agents_used @> '{bad}')")
    with Tracker(database, registry=registry, lanes=4, flush_interval=600) as tracker:
        for number, name in enumerate(NAMES):
            tracker.record_turn(name, "good" if number % 4 else "bad")
        tracker.flush(PATIENCE)
        producer = tracker.backlog.producer
    stats = tracker.stats()
    assert (stats.applied, stats.dead_lettered) == (30, 10)
    letters = query(database, "SELECT lane, sequence, thread_id FROM tracker_dead_letters")
    assert sorted(letter[2] for letter in letters) == sorted(NAMES[::4])
    assert len({letter[0] for letter in letters}) > 1

    async def again(sink: Lanes) -> None:
        opened = await sink.open(producer, 0)
        found = await sink.recall(batch_of(producer, 1, opened.epoch))
        assert found.duplicate
        assert sorted(letter.delta.thread_id for letter in found.dead_letters) == sorted(NAMES[::4])

    run(database, 4, again)


def test_the_database_forgot_what_one_lane_did(database: str, registry: CollectorRegistry, tmp_path: Path) -> None:
    """A standby without the last commit, which is one lane's: the journal brings that share again, and no other."""
    with Tracker(database, registry=registry, lanes=3, flush_interval=600, journal=tmp_path) as tracker:
        for _ in range(2):
            for name in NAMES:
                tracker.record_turn(name)
            tracker.flush(PATIENCE)
        producer = tracker.backlog.producer
        names = [each.thread_id for each in sink_of_three(producer)]
        with psycopg.connect(database) as connection:
            connection.execute("UPDATE conversations SET turn_count = 1 WHERE thread_id = ANY (%s)", [names])
            connection.execute("UPDATE tracker_ledger SET applied_sequence = 1 WHERE lane = -2")
        assert turns(database) == {(2, 40 - len(names)), (1, len(names))}
        for name in NAMES:
            tracker.record_turn(name)
        tracker.flush(PATIENCE)
    assert turns(database) == {(3, 40)}
    assert {row[2] for row in ledger(database, producer)} == {3}


def sink_of_three(producer: UUID) -> list[ThreadDelta]:
    """Return what the third of three lanes has of a batch."""
    sink = Lanes(Connector(""), TABLE, 3)
    sink._first._standing[producer] = {0: 0, -1: 0, -2: 0}
    return list(sink._shares(batch_of(producer, 1))[2].deltas)


def test_the_ledger_is_gone(database: str) -> None:
    """Of one lane, or of lane 0, by which it is known how many there were: nothing is guessed."""
    for lane in (0, -1):
        producer = uuid4()

        async def lost(sink: Lanes, lane: int = lane, producer: UUID = producer) -> None:
            opened = await sink.open(producer, 0)
            await sink.apply(batch_of(producer, 1, opened.epoch))
            with psycopg.connect(database) as connection:
                connection.execute("DELETE FROM tracker_ledger WHERE producer = %s AND lane = %s", [producer, lane])
            with pytest.raises(LedgerMissing):
                await sink.apply(batch_of(producer, 2, opened.epoch))

        run(database, 2, lost)

    async def reopened(sink: Lanes) -> None:
        with pytest.raises(LedgerMissing):
            await sink.open(one, 0)

    with psycopg.connect(database) as connection:
        (one,) = connection.execute("SELECT producer FROM tracker_ledger WHERE lane = -1").fetchone() or [None]
    run(database, 2, reopened)


def test_another_life_fences_all_lanes(database: str) -> None:
    """Its epoch is above that of each lane, whichever is asked first."""
    producer = uuid4()

    async def paused(sink: Lanes) -> None:
        opened = await sink.open(producer, 0)
        await sink.apply(batch_of(producer, 1, opened.epoch))
        run_inner = sink_of(database, 2)
        await run_inner.open(producer, 0)
        await run_inner.aclose(producer, 0, clean=False)
        with pytest.raises(Fenced):
            await sink.apply(batch_of(producer, 2, opened.epoch))

    run(database, 2, paused)
    assert turns(database) == {(1, 40)}


def test_the_gravest_error_is_told(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane's connection is lost, another's ledger says something: the latter decides."""
    producer = uuid4()
    errors: dict[int, TrackerError] = {
        0: SinkFault("connection", "gone"),
        -1: LedgerRegressed(str(producer), -1, 4, 2),
        -2: LedgerMissing(str(producer), -2),
    }

    async def fail(_: PostgresSink, batch: Batch) -> Applied:
        raise errors[batch.lane]

    async def applied(sink: Lanes) -> None:
        await sink.open(producer, 0)
        monkeypatch.setattr(PostgresSink, "apply", fail)
        with pytest.raises(LedgerMissing):
            await sink.apply(batch_of(producer, 1))
        errors[-2] = errors[0]
        with pytest.raises(LedgerRegressed):
            await sink.apply(batch_of(producer, 1))

    run(database, 3, applied)


def test_collected(database: str) -> None:
    """Lane 0 goes first: as long as it is there the others tell how many lanes there were."""
    producer = uuid4()

    async def opened(sink: Lanes) -> None:
        await sink.open(producer, 0)

    run(database, 3, opened)
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE tracker_ledger SET updated_at = now() - interval '31 days' WHERE lane < 0")
    run(database, 1, lambda sink: opened_at(sink, uuid4(), 0, 0))
    assert [row[0] for row in ledger(database, producer)] == [0, -1, -2]
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE tracker_ledger SET updated_at = now() - interval '31 days' WHERE lane = 0")
    for left in ([-1, -2], []):
        run(database, 1, lambda sink: opened_at(sink, uuid4(), 0, 0))
        assert [row[0] for row in ledger(database, producer)] == left


@pytest.mark.parametrize(
    "sink", [MemorySink(), "embedded:here", "unix:/run/x", "nats://127.0.0.1/S", "http://127.0.0.1:1"]
)
def test_for_postgres_alone(sink: Any) -> None:
    """Elsewhere more lanes would do nothing, which is said."""
    with pytest.raises(ConfigError, match="lanes must be 1 where the sink is no"):
        Tracker(sink, lanes=2, registry=CollectorRegistry())


@pytest.mark.parametrize("lanes", [0, 33, 1.0, True])
def test_how_many(lanes: Any) -> None:
    """One to 32."""
    with pytest.raises(ConfigError, match="lanes must be"):
        Tracker("postgresql:///x", lanes=lanes, registry=CollectorRegistry())
