"""A partition in the database: each message of its log applied once, by its owner alone."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import run_migrate
from tests.helpers import query
from tests.strategies import NOW
from tests.stream.harness import fail_rows_of_bad
from tests.test_semantics import new_database
from tracker_daemon.batch import Batch
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.errors import Fenced, SchemaError
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.leases import Leases
from tracker_daemon.postgres.many import ManySink
from tracker_daemon.postgres.partitions import Logged, Moved, PartitionSink, Place
from tracker_daemon.sink import LedgerMissing, SinkFault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tracker_daemon.embedded import EmbeddedPostgres

TABLE = (None, "conversations")
PRODUCERS = [UUID(int=number + 1) for number in range(3)]
LANE = 1
CREATED = "2026-01-01T00:00:00+00:00"


def turn(thread_id: str, agent: str = "a", tokens: int = 1, *, at: int = NOW // 1_000) -> ThreadDelta:
    """Return a delta of one turn."""
    delta = ThreadDelta(thread_id, at)
    delta.turn(agent, tokens, 0, at)
    return delta


def leases(database: str, *, lease: float = 60.0, partitions: int = 2, name: UUID | None = None) -> Leases:
    """Return what looks after the leases of a stream."""
    consumer = name or uuid4()
    return Leases(Connector(database), TABLE, stream="s", partitions=partitions, consumer=consumer, lease=lease)


@asynccontextmanager
async def owner(database: str, partition: int = 0, **settings: Any) -> AsyncIterator[tuple[PartitionSink, Place]]:
    """Yield what applies to a partition that was just claimed, and where it stands."""
    some = leases(database, **settings)
    sink = PartitionSink(Connector(database), TABLE)
    try:
        await some.prepare()
        place = await some.claim(partition, partition + LANE, CREATED)
        assert place is not None
        yield sink, place
    finally:
        await some.disconnect()
        await sink.disconnect()


# -- the same as one by one ------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A message: whose, how far from the next sequence, whether a turn may create its row, and of which threads."""

    producer: int
    offset: int
    create_missing: bool
    deltas: tuple[tuple[str, str, int, bool], ...]


@st.composite
def logs(draw: st.DrawFn) -> list[list[Step]]:
    """Windows of messages: mostly the next ones, often again, at times with data that the table refuses."""
    delta = st.tuples(
        st.sampled_from(["a", "b", "c", "é"]),
        st.sampled_from(["x", "y", "x", "y", "x", "bad"]),
        st.sampled_from([0, 1, 5, 2**61]),
        st.booleans(),
    )
    deltas = st.lists(delta, min_size=1, max_size=3, unique_by=lambda item: item[0]).map(tuple)
    step = st.builds(Step, st.integers(0, 2), st.sampled_from([0, 0, 0, 0, 3, -1, -2]), st.booleans(), deltas)
    return draw(st.lists(st.lists(step, min_size=1, max_size=6), min_size=1, max_size=5))


@pytest.fixture(scope="module")
def pair(postgres: EmbeddedPostgres) -> Iterator[tuple[str, str]]:
    """Two databases with the tables; a turn of the agent "bad" is refused."""
    with new_database(postgres) as one, new_database(postgres) as other:
        for conninfo in (one, other):
            run_migrate(conninfo)
            with psycopg.connect(conninfo) as connection:
                connection.execute(
                    "ALTER TABLE conversations ADD CHECK (NOT agents_used @> '{bad}'), ADD CHECK (total_tokens < 2 ^ 62)"
                )
        yield one, other


def batches(windows: list[list[Step]]) -> list[list[Logged]]:
    """Return the windows' messages; what comes again comes as it was."""
    position, clock = 0, NOW // 1_000
    next_, sent = dict.fromkeys(PRODUCERS, 1), dict[tuple[UUID, int], Logged]()
    found: list[list[Logged]] = []
    for window in windows:
        found.append([])
        for step in window:
            position, clock = position + 1, clock + 1_000
            producer = PRODUCERS[step.producer]
            sequence = max(1, next_[producer] + step.offset)
            deltas = []
            for thread_id, agent, tokens, ensured in step.deltas:
                deltas.append(turn(thread_id, agent, tokens, at=clock))
                if ensured:
                    deltas[-1].ensure(clock)
            batch = Batch(producer, LANE, 0, sequence, tuple(deltas), step.create_missing)
            before = sent.get((producer, sequence))
            message = Logged(position, batch if before is None else before.batch)
            sent[producer, sequence] = message
            next_[producer] = max(next_[producer], sequence + 1)
            found[-1].append(message)
    return found


@given(logs())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_are_as_one_by_one(pair: tuple[str, str], windows: list[list[Step]]) -> None:
    """Messages in windows leave the rows, the producers' places and the dead letters that they leave one by one."""
    one, other = pair
    for conninfo in pair:
        with psycopg.connect(conninfo) as connection:
            connection.execute(
                "TRUNCATE conversations, tracker_ledger, tracker_dead_letters, tracker_partitions, tracker_consumers"
            )
    made = batches(windows)

    async def by_windows() -> None:
        async with owner(one) as (sink, place):
            for window in made:
                await sink.apply_logged(place, window)
            assert place.position == made[-1][-1].position
            await sink.look(place)
            assert place.position == made[-1][-1].position

    async def one_by_one() -> None:
        sink = ManySink(Connector(other), TABLE)
        for window in made:
            for message in window:
                assert message.batch is not None
                [answer] = await sink.apply_many([message.batch])
                assert not isinstance(answer, Exception)
        await sink.disconnect()

    asyncio.run(by_windows())
    asyncio.run(one_by_one())
    for statement in (
        "SELECT * FROM conversations ORDER BY thread_id",
        "SELECT producer, lane, sequence, thread_id, delta FROM tracker_dead_letters ORDER BY 1, 2, 3, 4",
        "SELECT producer, lane, epoch, applied_sequence FROM tracker_ledger WHERE epoch = 0 ORDER BY 1, 2",
    ):
        assert query(one, statement) == query(other, statement), statement


# -- fences ----------------------------------------------------------------------------------------


def messages(first: int, last: int, producer: UUID = PRODUCERS[0]) -> list[Logged]:
    """Return messages of one turn each."""
    return [
        Logged(number, Batch(producer, LANE, 0, number, (turn("t", tokens=4 ** (number - 1)),)))
        for number in range(first, last + 1)
    ]


def tokens(database: str) -> int:
    """Return the tokens of all rows."""
    return int(query(database, "SELECT coalesce(sum(total_tokens), 0) FROM conversations")[0][0])


def test_an_earlier_owner_cannot_write(database: str) -> None:
    """Once another one has claimed the partition, what its earlier owner still has in hand changes nothing."""

    async def run() -> None:
        async with owner(database, lease=0.0) as (old, place):
            await old.apply_logged(place, messages(1, 2))
            async with owner(database) as (new, other):
                assert (other.epoch, other.position) == (place.epoch + 1, 2)
                with pytest.raises(Fenced):
                    await old.apply_logged(place, messages(3, 4))
                await new.apply_logged(other, messages(3, 3))
                with pytest.raises(Fenced):
                    await old.look(place)

    asyncio.run(run())
    assert tokens(database) == 1 + 4 + 16


def test_a_position_that_moved(database: str) -> None:
    """Messages that do not follow the position change nothing, and it is said where it is."""

    async def run() -> None:
        async with owner(database) as (sink, place):
            await sink.apply_logged(place, messages(1, 3))
            place.position = 1
            with pytest.raises(Moved):
                await sink.apply_logged(place, messages(2, 5))
            assert place.position == 3
            await sink.apply_logged(place, messages(4, 5))

    asyncio.run(run())
    assert tokens(database) == 1 + 4 + 16 + 64 + 256


def test_repeats_are_told_by_their_producer(database: str) -> None:
    """A message that stands in the log again, at once or far later, moves the position and nothing else."""

    async def run() -> None:
        async with owner(database) as (sink, place):
            first = messages(1, 3)
            outcome = await sink.apply_logged(place, [*first, Logged(4, first[0].batch), Logged(5, first[2].batch)])
            assert (len(outcome.new), outcome.duplicates) == (3, 2)
            outcome = await sink.apply_logged(place, [Logged(6, first[1].batch)])
            assert (len(outcome.new), outcome.duplicates, place.position) == (0, 1, 6)

    asyncio.run(run())
    assert tokens(database) == 1 + 4 + 16


def test_unreadable(database: str) -> None:
    """A message that is no batch is kept as a dead letter with its bytes, and those around it are applied."""

    async def run() -> None:
        async with owner(database) as (sink, place):
            first, _, third = messages(1, 3)
            outcome = await sink.apply_logged(place, [first, Logged(2, None, unreadable="no é", body=b"\0\1"), third])
            assert (len(outcome.new), outcome.unreadable) == (2, 1)

    asyncio.run(run())
    assert tokens(database) == 1 + 16
    [letter] = query(database, "SELECT sequence, thread_id, delta, error FROM tracker_dead_letters")
    assert letter == (2, "(unreadable message)", {"unreadable": "AAE="}, "no \\xe9")


def test_bad_rows_among_many(database: str) -> None:
    """Of messages with one row that the table refuses that row becomes a dead letter of its producer; the rest is in."""
    with psycopg.connect(database) as connection:
        connection.execute("ALTER TABLE conversations ADD CHECK (NOT agents_used @> '{bad}')")

    async def run() -> None:
        async with owner(database) as (sink, place):
            some = [turn(f"t{number}") for number in range(20)]
            some[7] = turn("t7", "bad", 5)
            batch = Batch(PRODUCERS[1], LANE, 0, 9, tuple(some))
            outcome = await sink.apply_logged(place, [*messages(1, 2), Logged(3, batch), *messages(4, 4)])
            assert [(b, letter.delta.thread_id) for b, letter in outcome.letters] == [(batch, "t7")]
            assert len(outcome.new) == 4

    asyncio.run(run())
    assert query(database, "SELECT producer, lane, sequence, thread_id FROM tracker_dead_letters") == [
        (PRODUCERS[1], LANE, 9, "t7")
    ]
    assert query(database, "SELECT count(*), sum(turn_count) FROM conversations") == [(20, 22)]


def test_a_row_in_doubt_alone_in_its_message(database: str) -> None:
    """A message whose only row fails by what may be the table's fault is set aside once one behind it goes through."""
    fail_rows_of_bad(database)

    async def run() -> int:
        bad = Logged(1, Batch(PRODUCERS[1], LANE, 0, 1, (turn("worse", "bad"),)))
        async with owner(database) as (sink, place):
            for tries in range(6):
                try:
                    outcome = await sink.apply_logged(place, [bad, *messages(2, 3)])
                except (SinkFault, SchemaError):
                    await sink.look(place)
                    assert place.position == 0
                else:
                    assert [letter.delta.thread_id for _, letter in outcome.letters] == ["worse"]
                    return tries
        raise AssertionError("it is held for ever")

    assert asyncio.run(run()) == 3
    assert query(database, "SELECT thread_id, turn_count FROM conversations") == [("t", 2)]


def test_a_table_at_fault_loses_nothing(database: str) -> None:
    """While the table refuses everything nothing moves and nothing is set aside; mended, it goes on."""

    async def run() -> None:
        async with owner(database) as (sink, place):
            with psycopg.connect(database) as connection:
                connection.execute("ALTER TABLE conversations RENAME COLUMN total_tokens TO tokens")
            for _ in range(5):
                with pytest.raises((SinkFault, SchemaError)):
                    await sink.apply_logged(place, messages(1, 3))
            with psycopg.connect(database) as connection:
                connection.execute("ALTER TABLE conversations RENAME COLUMN tokens TO total_tokens")
            await sink.look(place)
            assert place.position == 0
            await sink.apply_logged(place, messages(1, 3))

    asyncio.run(run())
    assert tokens(database) == 1 + 4 + 16
    assert query(database, "SELECT count(*) FROM tracker_dead_letters") == [(0,)]


# -- leases ----------------------------------------------------------------------------------------


def test_one_owner(database: str) -> None:
    """A partition whose lease holds is claimed by nobody else; one that was given up, or has run out, is."""

    async def run() -> None:
        one, other = leases(database), leases(database)
        await one.prepare()
        await other.prepare()
        first = await one.claim(0, LANE, CREATED)
        assert first is not None
        assert await other.claim(0, LANE, CREATED) is None
        assert (await one.beat()).owned == {0}
        assert (await other.beat()).free == (1,)
        assert len((await other.beat()).members) == 2
        await one.release(0)
        taken = await other.claim(0, LANE, CREATED)
        assert taken is not None
        assert taken.epoch == first.epoch + 1
        assert (await one.beat()).owned == set()
        query(database, "UPDATE tracker_partitions SET expires_at = now() - interval '1 second' RETURNING 1")
        assert (await one.beat()).free == (0, 1)
        assert await one.claim(0, LANE, CREATED) is not None
        await one.leave()
        assert len((await other.beat()).members) == 1
        await other.leave()

    asyncio.run(run())


def test_another_stream_is_refused(database: str) -> None:
    """A stream that was made anew is not read on from the old one's position, until somebody says so."""

    async def run() -> None:
        async with owner(database, lease=0.0) as (sink, place):
            await sink.apply_logged(place, messages(1, 3))
        some = leases(database, lease=0.0)
        with pytest.raises(SchemaError, match="deleted and made again"):
            await some.claim(0, LANE, "2027-01-01T00:00:00+00:00")
        await some.adopt(0, LANE, "2027-01-01T00:00:00+00:00", 11)
        place_of_new = await some.claim(0, LANE, "2027-01-01T00:00:00+00:00")
        assert place_of_new is not None
        assert place_of_new.position == 10
        await some.disconnect()

    asyncio.run(run())


def test_a_ledger_that_is_gone_is_refused(database: str) -> None:
    """A partition whose position was truncated away is not begun anew, by its owner or by another one."""

    async def run() -> None:
        async with owner(database, lease=0.0) as (sink, place):
            await sink.apply_logged(place, messages(1, 3))
            query(database, "DELETE FROM tracker_ledger RETURNING 1")
            with pytest.raises(LedgerMissing):
                await sink.apply_logged(place, messages(4, 4))
        with pytest.raises(SchemaError, match="tracker_ledger"):
            async with owner(database):
                pass

    asyncio.run(run())
    assert tokens(database) == 1 + 4 + 16


def test_a_position_is_never_collected(database: str) -> None:
    """However long nothing happens in a partition, its position stays when producers long gone are forgotten."""

    async def run() -> None:
        async with owner(database) as (sink, place):
            await sink.apply_logged(place, messages(1, 1))
        query(database, "UPDATE tracker_ledger SET updated_at = now() - interval '9 years' RETURNING 1")
        some = leases(database)
        await some.collect()
        await some.disconnect()

    asyncio.run(run())
    assert query(database, "SELECT epoch, lane, applied_sequence FROM tracker_ledger") == [(1, LANE, 1)]


def test_without_the_tables(database: str) -> None:
    """A database that was not migrated since is told what to run."""
    with psycopg.connect(database) as connection:
        connection.execute("DROP TABLE tracker_partitions")

    async def run() -> None:
        some = leases(database)
        with pytest.raises(SchemaError, match="tracker-daemon migrate"):
            await some.prepare()
        await some.disconnect()

    asyncio.run(run())
