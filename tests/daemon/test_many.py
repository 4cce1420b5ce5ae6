"""Batches of many producers in one transaction leave what they leave one by one."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import reference_oracle as oracle
from tests.conftest import run_migrate
from tests.digits import Digits
from tests.helpers import query, totals, wait_until
from tests.strategies import NOW
from tests.test_lock_order import deadlocks
from tests.test_semantics import new_database
from tracker_daemon.batch import Batch
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.errors import Fenced, TrackerError
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.many import ManySink
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import Applied, LedgerMissing, LedgerRegressed, SinkFault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracker_daemon.embedded import EmbeddedPostgres

PRODUCERS = [UUID(int=number + 1) for number in range(5)]
"""The first three have lives, the last two have none."""
THREADS = ("a", "b", "c", "é")
TABLES = ("conversations", "tracker_ledger", "tracker_dead_letters")


@pytest.fixture(scope="module")
def pair(postgres: EmbeddedPostgres) -> Iterator[tuple[str, str]]:
    """Two databases with the tables; a turn of the agent "bad" is refused, one of "wrong" in doubt."""
    with new_database(postgres) as one, new_database(postgres) as other:
        for conninfo in (one, other):
            run_migrate(conninfo)
            with psycopg.connect(conninfo) as connection:
                connection.execute(
                    "ALTER TABLE conversations ADD CHECK (NOT agents_used @> '{bad}'), ADD CHECK (total_tokens < 2 ^ 62)"
                )
        yield one, other


@dataclass(frozen=True)
class Step:
    """One batch of a round: whose, how far from the next sequence, of which life, and of which threads."""

    producer: int
    offset: int
    epoch: int
    deltas: tuple[tuple[str, str, int], ...]


@st.composite
def rounds(draw: st.DrawFn) -> list[list[Step]]:
    """Rounds of batches, at most one of each producer: mostly the next one, sometimes again, too far, of an old life."""
    agent = st.sampled_from(["x", "y", "x", "y", "bad"])
    tokens = st.sampled_from([0, 1, 5, 2**61])
    delta = st.tuples(st.sampled_from(THREADS), agent, tokens)
    deltas = st.lists(delta, max_size=3, unique_by=lambda item: item[0]).map(tuple)
    step = st.builds(
        Step, st.integers(0, 4), st.sampled_from([0, 0, 0, 0, -1, -2, 1]), st.sampled_from([1, 1, 1, 3, 2]), deltas
    )
    some = st.lists(step, min_size=1, max_size=5, unique_by=lambda item: item.producer)
    return draw(st.lists(some, min_size=1, max_size=6))


def batches_of(
    steps: list[Step], positions: dict[UUID, int], opened: set[UUID], sent: dict[tuple[UUID, int], Batch]
) -> list[Batch]:
    """Return the round's batches; what was sent under an identity is sent again as it was."""
    found = []
    for step in steps:
        producer = PRODUCERS[step.producer]
        has_lives = step.producer < 3
        sequence = max(1, positions.get(producer, 0) + 1 + step.offset)
        epoch = step.epoch if has_lives else 0
        batch = sent.get((producer, sequence))
        if batch is None or batch.epoch != epoch:
            batch = Batch(producer, 0, epoch, sequence, tuple(_delta(*each, at=sequence) for each in step.deltas))
        found.append(batch)
        if producer in opened or not has_lives:
            sent.setdefault((producer, sequence), batch)
    return found


def _delta(thread_id: str, agent: str, tokens: int, *, at: int) -> ThreadDelta:
    found = ThreadDelta(thread_id, NOW // 1_000 + at)
    found.turn(agent, tokens, 1, NOW // 1_000 + at)
    return found


async def one_by_one(sink: PostgresSink, batch: Batch) -> Applied | TrackerError:
    """Apply one batch; return what became of it."""
    try:
        return await sink.apply(batch)
    except (Fenced, LedgerMissing, LedgerRegressed) as error:
        return error


def state(conninfo: str) -> tuple[Any, ...]:
    """Return the rows, the ledger and the dead letters."""
    with psycopg.connect(conninfo) as connection:
        rows = oracle.rows(connection, "conversations")
        ledger = connection.execute(
            "SELECT producer, lane, epoch, applied_sequence FROM tracker_ledger ORDER BY 1"
        ).fetchall()
        dead = connection.execute(
            "SELECT producer, sequence, thread_id FROM tracker_dead_letters ORDER BY 1, 2, 3"
        ).fetchall()
    # Agents come in the order of the flushes, which one transaction of many leaves open.
    return {name: (*row[:3], sorted(row[3]), *row[4:]) for name, row in rows.items()}, ledger, dead


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(rounds())
def test_as_one_by_one(pair: tuple[str, str], history: list[list[Step]]) -> None:
    """Rows, ledger and dead letters, and each batch's answer, are those of the batches applied one after the other."""
    for conninfo in pair:
        with psycopg.connect(conninfo) as connection:
            connection.execute(f"TRUNCATE {', '.join(TABLES)}")
            # The register of clients without lives, as the sink beside has no way to make it.
            for producer in PRODUCERS[3:]:
                connection.execute(
                    "INSERT INTO tracker_ledger (producer, lane, epoch, applied_sequence) VALUES (%s, 0, 0, 0)",
                    [producer],
                )

    async def run() -> None:
        many = ManySink(Connector(pair[0]), (None, "conversations"))
        single = PostgresSink(Connector(pair[1]), (None, "conversations"))
        opened, positions, sent = set(PRODUCERS[:2]), dict[UUID, int](), dict[tuple[UUID, int], Batch]()
        for producer in opened:  # the third is never opened: its row is missing
            assert await many.open(producer, 0) == await single.open(producer, 0)
        for steps in history:
            batches = batches_of(steps, positions, opened, sent)
            together = await many.apply_many(batches)
            for batch, answer in zip(batches, together, strict=True):
                alone = await one_by_one(single, batch)
                assert type(answer) is type(alone), (batch, answer, alone)
                if isinstance(answer, Applied) and isinstance(alone, Applied):
                    assert answer.duplicate == alone.duplicate
                    assert [each.delta.thread_id for each in answer.dead_letters] == [
                        each.delta.thread_id for each in alone.dead_letters
                    ]
                    positions[batch.producer] = max(positions.get(batch.producer, 0), batch.sequence)
                else:
                    assert str(answer) == str(alone)
            assert state(pair[0]) == state(pair[1])
        await many.disconnect()
        await single.aclose(PRODUCERS[0], 0, clean=False)

    asyncio.run(run())


def test_two_at_once(database: str) -> None:
    """Two sinks bring the same batches of the same producers at once: each counts once, and none fails."""
    digits = Digits()
    duplicates = 0

    async def bring(sink: ManySink, batches: list[Batch]) -> int:
        answers = await sink.apply_many(batches)
        assert all(isinstance(answer, Applied) for answer in answers), answers
        return sum(isinstance(answer, Applied) and answer.duplicate for answer in answers)

    async def run() -> None:
        nonlocal duplicates
        first, second = (ManySink(Connector(database), (None, "conversations")) for _ in range(2))
        producers = [UUID(int=number + 1) for number in range(12)]
        epochs = {producer: (await first.open(producer, 0)).epoch for producer in producers[:6]}
        for sequence in range(1, 16):
            batches = []
            for producer in producers:
                deltas = []
                for thread_id in ("t", "u", f"own-{producer.int}"):
                    name = f"{thread_id}-{sequence // 3}"
                    delta = ThreadDelta(name, NOW // 1_000)
                    if digits.made.get(name, 0) < 31:
                        delta.turn("a", digits.tokens(name), 0, NOW // 1_000)
                        deltas.append(delta)
                batches.append(Batch(producer, 0, epochs.get(producer, 0), sequence, tuple(deltas)))
            found = await asyncio.gather(bring(first, batches), bring(second, batches[::-1]))
            duplicates += sum(found)
        for sink in (first, second):
            await sink.disconnect()

    asyncio.run(run())
    with psycopg.connect(database) as connection:
        sums = dict(connection.execute("SELECT thread_id, total_tokens::bigint FROM conversations").fetchall())
    verdict = digits.read(sums)
    assert verdict.exact, verdict
    assert duplicates == 12 * 15
    assert deadlocks(database) == 0


def many_ledgers(conninfo: str) -> None:
    """Fill the ledger with so many rows that the planner looks those of a batch up one by one."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO tracker_ledger (producer, lane, epoch, applied_sequence)"
            " SELECT gen_random_uuid(), 0, 1, 0 FROM generate_series(1, 20000)"
        )
        connection.execute("ANALYZE tracker_ledger")


def test_two_in_a_tight_loop_do_not_deadlock(database: str) -> None:
    """The same clients' rows moved over two connections, each time in another order, of clients new and known."""
    rounds, chance = 30, random.Random(5)
    known = [UUID(int=number + 1) for number in range(12)]
    many_ledgers(database)

    async def bring(sink: ManySink, first: int) -> int:
        moved = 0
        for sequence in range(first, 2 * rounds, 2):
            new = [UUID(int=1_000 * (sequence // 2 + 1) + number) for number in range(12)]
            batches = [Batch(client, 0, 0, sequence, (_delta(str(client), "a", 1, at=1),)) for client in known + new]
            answers = await sink.apply_many(chance.sample(batches, len(batches)))
            assert all(isinstance(answer, Applied) for answer in answers), answers
            moved += sum(isinstance(answer, Applied) and not answer.duplicate for answer in answers)
        return moved

    async def run() -> int:
        sinks = [ManySink(Connector(database), (None, "conversations")) for _ in range(2)]
        moved = await asyncio.gather(*(bring(sink, first) for first, sink in enumerate(sinks, 1)))
        for sink in sinks:
            await sink.disconnect()
        return sum(moved)

    moved = asyncio.run(run())
    assert deadlocks(database) == 0
    assert totals(database).turns == moved


@pytest.mark.parametrize("known", [True, False])
def test_one_order_of_locks(database: str, *, known: bool) -> None:
    """Two that bring the same clients' batches in opposite orders stand in line where a third holds one of the rows.

    In two orders each of them would hold what the other one needs next, once the third lets go.
    """
    clients = [UUID(int=number + 1) for number in range(9)]
    middle = clients[4]
    many_ledgers(database)

    def batches(sequence: int) -> list[Batch]:
        return [Batch(client, 0, 0, sequence, (_delta(str(client), "a", 1, at=1),)) for client in clients]

    async def run() -> None:
        first, second = (ManySink(Connector(database), (None, "conversations")) for _ in range(2))
        if known:
            await first.apply_many(batches(1))
            await second.apply_many(batches(1))
        with psycopg.connect(database) as third:
            if known:
                third.execute("SELECT FROM tracker_ledger WHERE producer = %s FOR UPDATE", [middle])
            else:
                third.execute(
                    "INSERT INTO tracker_ledger (producer, lane, epoch, applied_sequence) VALUES (%s, 0, 0, 0)",
                    [middle],
                )
            both = asyncio.gather(first.apply_many(batches(2)), second.apply_many(batches(3)[::-1]))
            waiting = "SELECT count(*) = 2 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            await asyncio.to_thread(wait_until, lambda: query(database, waiting) == [(True,)], "both in the line")
            third.commit()
        assert all(isinstance(answer, Applied) for answers in await both for answer in answers)
        for sink in (first, second):
            await sink.disconnect()

    asyncio.run(run())
    assert deadlocks(database) == 0


def break_rows(conninfo: str, name: str) -> None:
    """Make rows of threads like *name* fail in a trigger without RAISE: it may be the table's fault."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" IF NEW.thread_id LIKE '{name}' THEN PERFORM * FROM nowhere; END IF; RETURN NEW; END $$"
        )
        connection.execute(
            "CREATE TRIGGER broken BEFORE INSERT OR UPDATE ON conversations FOR EACH ROW EXECUTE FUNCTION broken()"
        )


def test_a_row_that_may_be_the_tables_fault(database: str) -> None:
    """A batch whose only row fails so is answered with that, thrice; then another's row beside it sets it aside."""
    break_rows(database, "poison%")
    clients = [UUID(int=number + 1) for number in range(6)]

    async def run() -> None:
        sink = ManySink(Connector(database), (None, "conversations"))
        for sequence in range(1, 6):
            names = ["poison", *(f"good-{number}" for number in range(5))]
            batches = [
                Batch(client, 0, 0, 1 if name == "poison" else sequence, (_delta(name, "a", 1, at=1),))
                for client, name in zip(clients, names, strict=True)
            ]
            bad, *good = await sink.apply_many(batches)
            assert all(isinstance(answer, Applied) and not answer.duplicate for answer in good), good
            if sequence <= 3:
                assert isinstance(bad, SinkFault)
                assert bad.kind == "schema"
                assert await alone(sink, batches[0]) == "schema"  # without another's row nothing is proven
            else:
                assert isinstance(bad, Applied)
                assert bad.duplicate == (sequence == 5)
                assert [letter.sqlstate for letter in bad.dead_letters] == ["42P01"]
        await sink.disconnect()

    async def alone(sink: ManySink, batch: Batch) -> str:
        if not sink._in_doubt.is_due(batch):
            return "schema"
        [answer] = await sink.apply_many([batch])
        assert isinstance(answer, SinkFault)
        return answer.kind

    asyncio.run(run())
    assert totals(database).turns == 5 * 5
    assert query(database, "SELECT count(*) FROM tracker_dead_letters") == [(1,)]


def test_a_table_at_fault(database: str) -> None:
    """Where every row fails, few batches are tried and all are answered with the fault; nothing is set aside."""
    break_rows(database, "%")
    batches = [Batch(UUID(int=n + 1), 0, 0, 1, (_delta(f"t{n}", "a", 1, at=1),)) for n in range(20)]

    async def run() -> None:
        sink, tried = ManySink(Connector(database), (None, "conversations")), list[Batch]()
        real = sink.apply

        async def counted(batch: Batch) -> Applied:
            tried.append(batch)
            return await real(batch)

        sink.apply = counted  # type: ignore[method-assign]
        for tries in range(1, 6):
            answers = await sink.apply_many(batches)
            assert all(isinstance(answer, SinkFault) and answer.kind == "schema" for answer in answers)
            assert len(tried) == 3 * tries
        await sink.disconnect()

    asyncio.run(run())
    assert query(database, "SELECT count(*) FROM tracker_dead_letters") == [(0,)]


def test_client_collected_in_between(database: str) -> None:
    """A client without lives whose row was collected is registered again a day later; sooner, its loss is told, once."""
    client = UUID(int=9)

    def batch(sequence: int) -> Batch:
        return Batch(client, 0, 0, sequence, (_delta("t", "a", 1, at=sequence),))

    async def run() -> None:
        sink = ManySink(Connector(database), (None, "conversations"))
        assert await sink.apply_many([batch(1)]) == [Applied(rows=1)]
        with psycopg.connect(database) as connection:
            connection.execute("DELETE FROM tracker_ledger")
        [answer] = await sink.apply_many([batch(2)])
        assert isinstance(answer, LedgerMissing)
        assert await sink.apply_many([batch(2)]) == [Applied(rows=1)]
        with psycopg.connect(database) as connection:
            connection.execute("DELETE FROM tracker_ledger")
        sink._registered = {key: at - 90_000 for key, at in sink._registered.items()}
        assert await sink.apply_many([batch(3)]) == [Applied(rows=1)]
        await sink.disconnect()

    asyncio.run(run())


def test_batches_of_both_settings(database: str) -> None:
    """Of batches that come together each creates missing rows, or leaves them, as it says itself."""

    async def run() -> None:
        sink = ManySink(Connector(database), (None, "conversations"))
        for producer in PRODUCERS[:3]:
            await sink.open(producer, 0)
        for sequence in (1, 2):
            deltas = [_delta(name, "x", 1, at=sequence) for name in THREADS]
            batches = [
                Batch(PRODUCERS[0], 0, 1, sequence, (deltas[0],), create_missing=False),
                Batch(PRODUCERS[1], 0, 1, sequence, (deltas[1],)),
                Batch(PRODUCERS[2], 0, 1, sequence, (deltas[2],)),
            ]
            expected = [Applied(rows=0, skipped=1), Applied(rows=1), Applied(rows=1)]
            assert await sink.apply_many(batches) == expected
            assert await sink.apply_many(batches[:2]) == [Applied(rows=0, duplicate=True)] * 2
        await sink.disconnect()

    asyncio.run(run())
    with psycopg.connect(database) as connection:
        assert {name: row[2] for name, row in oracle.rows(connection, "conversations").items()} == {"b": 2, "c": 2}


def test_connection_lost_in_a_rollback(database: str) -> None:
    """What the driver raises when the connection goes while bad data is looked for is a `SinkFault` like any other."""

    async def run() -> None:
        sink = ManySink(Connector(database), (None, "conversations"))
        await sink.open(PRODUCERS[0], 0)
        await sink.open(PRODUCERS[1], 0)
        bad = _delta("t", "a", 1, at=1)
        bad.turns = 2**40
        batches = [Batch(producer, 0, 1, 1, (bad,)) for producer in PRODUCERS[:2]]
        session = await sink._connected()
        real = session.connection.rollback

        async def lost() -> None:
            session.sever()
            await real()

        session.connection.rollback = lost  # type: ignore[method-assign]
        with pytest.raises(SinkFault) as found:
            await sink.apply_many(batches)
        assert found.value.kind == "connection"
        answers = await sink.apply_many(batches)
        assert all(isinstance(answer, Applied) and len(answer.dead_letters) == 1 for answer in answers)
        await sink.disconnect()

    asyncio.run(run())
