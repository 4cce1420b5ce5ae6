"""Publishing: acknowledged by the quorum, the same messages on every try, and nothing guessed about earlier lives."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest

from tests.helpers import query, wait_until
from tests.strategies import NOW
from tests.stream.cluster import Cluster
from tests.stream.conftest import make_stream
from tests.stream.harness import Consuming
from tracker_daemon.batch import Batch
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.errors import JournalError, SchemaError
from tracker_daemon.sink import LedgerMissing, Opened, Sink, SinkFault
from tracker_daemon.stream.address import address
from tracker_daemon.stream.broker import Broker
from tracker_daemon.stream.messages import stream_of
from tracker_daemon.stream.sink import NatsSink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from uuid import UUID

    from tests.helpers import Trackers


@asynccontextmanager
async def opened_sink(url: str, **settings: Any) -> AsyncIterator[NatsSink]:
    """Yield a sink, closed afterwards."""
    sink = NatsSink(address(url), **settings)
    try:
        yield sink
    finally:
        await sink.aclose(uuid4(), 0, clean=True)


@asynccontextmanager
async def opened_broker(url: str) -> AsyncIterator[Broker]:
    """Yield a connection, closed afterwards."""
    broker = Broker(address(url))
    try:
        yield broker
    finally:
        await broker.aclose()


def batch(producer: UUID, sequence: int, threads: int = 20) -> Batch:
    """Return a batch with a turn of each of some threads."""
    deltas = [ThreadDelta(f"t{number}", NOW // 1_000) for number in range(threads)]
    for delta in deltas:
        delta.turn("a", 4 ** (sequence - 1), 0, NOW // 1_000)
    return Batch(producer, 0, 1, sequence, tuple(deltas))


async def log_ends(url: str) -> list[int]:
    """Return the last position of every partition."""
    async with opened_broker(url) as broker:
        return [facts.last for facts in await broker.partitions()]


async def delete(url: str) -> None:
    """Delete the stream."""
    async with opened_broker(url) as broker:
        js = await broker._js()
        for facts in await broker.partitions():
            await js.delete_stream(stream_of(broker.address.name, facts.partition))


def total(database: str) -> int:
    """Return the tokens of the first thread."""
    return int(query(database, "SELECT coalesce(sum(total_tokens), 0) FROM conversations WHERE thread_id = 't0'")[0][0])


def test_it_is_a_sink(stream: str) -> None:
    """It has the port's methods."""
    assert isinstance(NatsSink(address(stream)), Sink)


def test_a_repeat_within_the_window_is_not_stored(stream: str) -> None:
    """A batch that another try publishes again is acknowledged, and the servers store none of it twice."""
    producer = uuid4()

    async def run() -> None:
        async with opened_sink(stream) as one, opened_sink(stream) as other:
            await one.apply(batch(producer, 1))
            before = await log_ends(stream)
            await other.apply(batch(producer, 1))
            assert await log_ends(stream) == before == [1, 1]

    asyncio.run(run())


def test_a_repeat_after_the_window_is_applied_once(cluster: Cluster, database: str) -> None:
    """A batch that is published again when the servers have forgotten it is stored again, and counted once."""
    url = cluster.url(f"s{uuid4().hex[:8]}")
    make_stream(url, 2, duplicate_window=1)
    producer = uuid4()

    async def publish(*sequences: int) -> None:
        async with opened_sink(url) as sink:
            for sequence in sequences:
                await sink.apply(batch(producer, sequence))

    def stored_again() -> bool:
        asyncio.run(publish(1))
        return min(asyncio.run(log_ends(url))) > 2

    asyncio.run(publish(1, 2))
    wait_until(stored_again, "a repeat that is stored")
    ends = asyncio.run(log_ends(url))
    with Consuming(url, database) as consuming:
        wait_until(lambda: [each.position for each in consuming.consumer.partitions] == ends, "the logs' ends")
        assert consuming.consumer.duplicates >= 2
    assert total(database) == 1 + 4


def test_where_a_life_stands(stream: str) -> None:
    """A new producer stands at 0; a known one right before its last batch, of which not all may be there."""
    producer = uuid4()

    async def run() -> None:
        async with opened_sink(stream) as sink:
            opened = await sink.open(producer, 0)
            assert (opened.epoch, opened.applied_sequence) == (1, 0)
            for sequence in (1, 2, 3):
                await sink.apply(batch(producer, sequence))
        async with opened_sink(stream) as sink:
            known = Opened(1, 0, opened.database)
            assert (await sink.open(producer, 0, known=known)).applied_sequence == 2
            assert (await sink.open(producer, 0, known=known, after=7)).applied_sequence == 7
            # What was purged was applied: then the life stands where it was known to.
            async with opened_broker(stream) as broker:
                for partition in range(2):
                    await broker.purge(partition, 100)
            known = Opened(1, 3, opened.database)
            assert (await sink.open(producer, 0, known=known)).applied_sequence == 3

    asyncio.run(run())


def test_a_life_of_something_else_is_refused(stream: str, cluster: Cluster) -> None:
    """What was registered in a database, or in another stream, is not published here; in this one made anew it is."""
    other = cluster.url(f"s{uuid4().hex[:8]}")
    make_stream(other, 2)

    async def run() -> None:
        producer = uuid4()
        async with opened_sink(stream) as sink, opened_sink(other) as elsewhere:
            known = await elsewhere.open(producer, 0)
            for database in (0, 7_594_000_000_000_000_000, known.database):
                with pytest.raises(LedgerMissing, match="registered elsewhere"):
                    await sink.open(producer, 0, known=Opened(1, 5, database))
            own = await sink.open(producer, 0)
            await delete(stream)
            await asyncio.to_thread(make_stream, stream, 2)
            again = await sink.open(producer, 0, known=Opened(1, 5, own.database))
            assert again.applied_sequence == 0
            assert again.database != own.database
            # With another number of partitions threads would be elsewhere.
            await delete(stream)
            await asyncio.to_thread(make_stream, stream, 3)
            with pytest.raises(SchemaError, match="3 partitions now, and had 2"):
                await sink.open(producer, 0, known=own)
        async with opened_sink(stream) as sink:
            with pytest.raises(LedgerMissing, match="registered elsewhere"):
                await sink.open(producer, 0, known=own)

    asyncio.run(run())


def test_a_journal_of_a_database_is_set_aside(stream: str, database: str, trackers: Trackers, tmp_path: Path) -> None:
    """A journal begun on a database is not published: what was in the tables already would be counted again."""
    journal = tmp_path / "journal"
    first = trackers(database, journal=journal, flush_interval=0.01)
    assert first.record_turn("t", "a", 1)
    first.flush(30)
    with psycopg.connect(database) as connection:
        connection.execute("ALTER TABLE conversations RENAME TO away")
    assert first.record_turn("t", "a", 4)
    report = first.close(0.2)
    assert report.journaled == 1
    errors: list[BaseException] = []
    second = trackers(stream, journal=journal, flush_interval=0.01, on_error=errors.append)
    assert second.record_turn("t", "a", 16)
    second.flush(30)
    assert any(isinstance(error, JournalError) and "registered elsewhere" in str(error) for error in errors), errors
    assert sum(asyncio.run(log_ends(stream))) == 1


def test_a_journal_of_the_stream_goes_on(stream: str, database: str, trackers: Trackers, tmp_path: Path) -> None:
    """What a tracker left in its journal while no server answered is published by the next one, and counted once."""
    journal = tmp_path / "journal"
    first = trackers(stream, journal=journal, flush_interval=0.01)
    for number in range(5):
        assert first.record_turn("t0", "a", 4**number)
        first.flush(30)
    assert first.record_turn("t0", "a", 4**5)
    first.close(0)
    second = trackers(stream, journal=journal, flush_interval=0.01)
    assert second.record_turn("t0", "a", 4**6)
    second.flush(30)
    with Consuming(stream, database):
        wait_until(lambda: total(database) == (4**7 - 1) // 3, "every call")


def test_a_log_that_was_lost_comes_again(stream: str, database: str, trackers: Trackers, tmp_path: Path) -> None:
    """A stream that is made anew under a tracker gets again what the tracker's journal has kept, before what follows."""
    tracker = trackers(stream, journal=tmp_path / "journal", flush_interval=0.01)
    for number in range(5):
        assert tracker.record_turn("t0", "a", 4**number)
        tracker.flush(30)
    asyncio.run(delete(stream))
    make_stream(stream, 2)
    for number in range(5, 8):
        assert tracker.record_turn("t0", "a", 4**number)
        tracker.flush(30)
    with Consuming(stream, database):
        wait_until(lambda: total(database) == (4**8 - 1) // 3, "every call")
    assert tracker.stats().applied == 8


def test_what_is_purged_is_not_lost(stream: str, database: str, trackers: Trackers) -> None:
    """That its last messages were applied and purged is nothing to a tracker."""
    errors: list[BaseException] = []
    tracker = trackers(stream, flush_interval=0.01, on_error=errors.append)

    async def purge() -> None:
        async with opened_broker(stream) as broker:
            for facts in await broker.partitions():
                await broker.purge(facts.partition, facts.last + 1)

    with Consuming(stream, database):
        for number in range(4):
            assert tracker.record_turn("t0", "a", 4**number)
            tracker.flush(30)
            wait_until(lambda number=number: total(database) == (4 ** (number + 1) - 1) // 3, "the call")  # type: ignore[misc]
            asyncio.run(purge())
    assert errors == []


def test_a_full_stream_holds_publishers_back(cluster: Cluster, database: str, trackers: Trackers) -> None:
    """A stream that is full takes nothing and drops nothing: calls wait, and go through once there are consumers."""
    url = cluster.url(f"s{uuid4().hex[:8]}")
    make_stream(url, 2, max_bytes=1 << 20)
    errors: list[BaseException] = []
    tracker = trackers(url, flush_interval=0.01, on_error=errors.append)
    calls = 0
    while not errors:
        for _ in range(500):
            calls += tracker.record_turn(f"{calls:0>400}", "a", 1)
        wait_until(lambda: errors or not tracker.stats().pending, "a full stream, or room in it")
    assert isinstance(errors[0], SinkFault)
    assert (errors[0].kind, "the stream is full" in str(errors[0])) == ("capacity", True)
    for _ in range(500):
        calls += tracker.record_turn(f"{calls:0>400}", "a", 1)
    with Consuming(url, database):
        tracker.flush(60)
        statement = "SELECT count(*), coalesce(sum(total_tokens), 0)::bigint FROM conversations"
        wait_until(lambda: query(database, statement) == [(calls, calls)], "every call")


def test_without_a_stream(cluster: Cluster) -> None:
    """A stream that is not there is told with the command that makes it."""

    async def run() -> None:
        async with opened_sink(cluster.url("nothing")) as sink:
            with pytest.raises(SchemaError, match="tracker-daemon stream create"):
                await sink.open(uuid4(), 0)

    asyncio.run(run())


def test_servers_away(tmp_path: Path) -> None:
    """With no server there it is a fault of the connection, and once they are back the same batch goes through."""
    with Cluster(tmp_path, nodes=1) as single:
        url = single.url("alone")
        make_stream(url, 1, replicas=1)
        producer = uuid4()

        async def run() -> None:
            async with opened_sink(url, publish_timeout=1.0) as sink:
                await sink.apply(batch(producer, 1))
                single.kill()
                for _ in range(3):
                    with pytest.raises(SinkFault) as raised:
                        await sink.apply(batch(producer, 2))
                    assert raised.value.kind in ("connection", "timeout")
                single.start()
                for _ in range(100):
                    try:
                        await sink.apply(batch(producer, 2))
                        break
                    except SinkFault:
                        await asyncio.sleep(0.1)
                assert await log_ends(url) == [2]

        asyncio.run(run())


def test_abort(stream: str, cluster: Cluster) -> None:
    """What is under way ends at once when it is told to, and the sink works on."""

    async def run() -> None:
        async with opened_sink(stream) as sink:
            task = asyncio.create_task(sink.apply(batch(uuid4(), 1, threads=5_000)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.to_thread(sink.abort)
            with pytest.raises(SinkFault, match="cut short"):
                await task
            await sink.apply(batch(uuid4(), 1))

    asyncio.run(run())
    assert cluster.pids()
