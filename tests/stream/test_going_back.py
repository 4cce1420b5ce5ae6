"""A log that goes back, or of which the database has lost the place: refused until adopted, and every call counted once."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest

from tests.helpers import query, wait_until
from tests.stream.cluster import Cluster
from tests.stream.conftest import make_stream
from tests.stream.harness import Consuming
from tests.stream.test_command import run
from tests.stream.test_consumer import faults, owned, publish
from tests.stream.test_sink import batch, delete, log_ends, opened_broker, opened_sink, total
from tracker_daemon.errors import SchemaError
from tracker_daemon.sink import SinkFault
from tracker_daemon.stream.messages import Message, stream_of, subject_of
from tracker_daemon.stream.metrics import StreamCollector

if TYPE_CHECKING:
    from pathlib import Path


def status(url: str, database: str) -> tuple[int, str]:
    """Return the exit status of `stream status`, and what it says."""
    found = run("stream", "status", "--stream", url, "--database", database)
    return found.exit_code, found.output


def adopt(url: str, database: str) -> None:
    """Run `stream adopt`."""
    done = run("stream", "adopt", "--stream", url, "--database", database)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("running", [True, False], ids=["running", "away"])
@pytest.mark.parametrize("grown", [2, 3], ids=["as long", "longer"])
def test_an_older_copy_of_the_log(database: str, tmp_path: Path, *, running: bool, grown: int) -> None:
    """A log that lost its end is refused however far it grows again, by who reads and who comes; adopted, nothing is missing."""
    store, copy = tmp_path / "nats" / "n0", tmp_path / "copy"
    with Cluster(tmp_path / "nats", 1) as one:
        url = one.url("s")
        make_stream(url, 1, replicas=1)

        def restart(between: str = "") -> None:
            one.kill()
            if between == "save":
                shutil.copytree(store, copy)
            elif between == "restore":
                shutil.rmtree(store)
                shutil.copytree(copy, store)
            one.start()
            wait_until(lambda: one.answers(0), "the server")

        publish(url, uuid4(), 1)
        with Consuming(url, database):
            wait_until(lambda: total(database) == 1, "the first batch")
            restart("save")
            publish(url, uuid4(), 1)
            publish(url, uuid4(), 1)
            wait_until(lambda: total(database) == 3, "what the copy lacks")
        assert status(url, database)[0] == 0

        def go_back() -> None:
            restart("restore")
            assert asyncio.run(log_ends(url)) == [1]

        def grow() -> None:
            for _ in range(grown):
                publish(url, uuid4(), 2)
            assert asyncio.run(log_ends(url)) == [1 + grown]

        if running:
            with Consuming(url, database) as consuming:
                wait_until(
                    lambda: [each.position for each in consuming.consumer.partitions] == [3], "the end of the log"
                )
                go_back()
                wait_until(lambda: "older copy" in faults(consuming), "the refusal")
                grow()
                seen = len(consuming.errors)
                wait_until(lambda: len(consuming.errors) > seen + 1, "the log to be looked at again")
                assert "older copy" in str(consuming.errors[-1])
                assert total(database) == 3
        else:
            go_back()
            grow()
        with Consuming(url, database) as consuming:
            wait_until(lambda: "older copy" in faults(consuming), "the refusal")
            code, said = status(url, database)
            assert (code, "stream adopt" in said, total(database)) == (1, True, 3), said
            adopt(url, database)
            wait_until(
                lambda: total(database) == 3 + 4 * grown, "what the new log has, and nothing of the old one again"
            )
        assert status(url, database)[0] == 0


def test_status_of_what_is_refused(stream: str, database: str) -> None:
    """Of a stream that consumers refuse the status says so, and ends with 1: until it is adopted."""
    publish(stream, uuid4(), 1)
    with Consuming(stream, database):
        wait_until(lambda: total(database) == 1, "the batch")
    query(database, "DELETE FROM tracker_ledger WHERE epoch > 0 RETURNING 1")
    code, said = status(stream, database)
    assert (code, said.count("gone from tracker_ledger")) == (1, 2), said
    adopt(stream, database)
    code, said = status(stream, database)
    assert (code, said.count("1 messages wait"), "ledger" in said) == (1, 2, False), said
    with Consuming(stream, database):
        wait_until(lambda: status(stream, database)[0] == 0, "both logs' ends")
    asyncio.run(delete(stream))
    make_stream(stream, 2)
    code, said = status(stream, database)
    assert (code, said.count("has applied one made")) == (1, 2), said
    adopt(stream, database)
    assert status(stream, database)[0] == 0


def test_adopted_while_it_is_read(stream: str, database: str) -> None:
    """A consumer that reads a stream made again goes on when it is adopted, without being started anew."""
    publish(stream, uuid4(), 1)
    with Consuming(stream, database) as consuming:
        wait_until(lambda: total(database) == 1, "the first batch")
        asyncio.run(delete(stream))
        make_stream(stream, 2)
        publish(stream, uuid4(), 2)
        wait_until(lambda: "stream adopt" in faults(consuming), "the refusal")
        adopt(stream, database)
        wait_until(lambda: total(database) == 1 + 4, "the second batch")
        wait_until(lambda: not any(each.fault for each in consuming.consumer.partitions), "no fault")


@pytest.mark.parametrize("partitions", [1, 3])
def test_another_number_of_partitions(stream: str, database: str, partitions: int) -> None:
    """A stream made again with more or fewer partitions has all of them read once adopted; publishers say what to do."""
    producer = uuid4()

    async def go_on() -> None:
        async with opened_sink(stream, publish_timeout=1.0) as sink:
            await sink.apply(batch(producer, 1))
            await asyncio.to_thread(wait_until, lambda: total(database) == 1, "the first batch")
            await delete(stream)
            with pytest.raises(SinkFault):
                await sink.apply(batch(producer, 2))
            await asyncio.to_thread(make_stream, stream, partitions)
            with pytest.raises(SchemaError, match="Restart the process"):
                await sink.apply(batch(producer, 2))

    with Consuming(stream, database) as consuming:
        wait_until(lambda: owned(consuming) == {0, 1}, "both partitions")
        asyncio.run(go_on())
        publish(stream, uuid4(), 3)
        adopt(stream, database)
        wait_until(lambda: owned(consuming) == set(range(partitions)), "all partitions")
        wait_until(lambda: total(database) == 1 + 16, "what is in the new one")


def test_one_partition_that_is_refused(stream: str, database: str) -> None:
    """Of a stream of which one partition was made again the others are read, and the metric shows which one is not."""
    with Consuming(stream, database) as consuming:
        wait_until(lambda: owned(consuming) == {0, 1}, "both partitions")
    query(database, "UPDATE tracker_partitions SET created = 'earlier' WHERE partition = 0 RETURNING 1")
    publish(stream, uuid4(), 1)
    with Consuming(stream, database) as consuming:
        wait_until(lambda: [each.position for each in consuming.consumer.partitions] == [0, 1], "the other one")
        wait_until(lambda: "made again" in consuming.consumer.partitions[0].fault, "the refusal")
        families = {each.name: each for each in StreamCollector(consuming.consumer).collect()}
        assert [each.value for each in families["tracker_stream_partition_faulty"].samples] == [1, 0]


def test_leases_that_are_gone_come_back(stream: str, database: str) -> None:
    """Consumers whose rows were truncated away claim their partitions again."""
    with Consuming(stream, database) as consuming:
        wait_until(lambda: len(owned(consuming)) == 2, "both partitions")
        with psycopg.connect(database) as connection:
            connection.execute("TRUNCATE tracker_partitions, tracker_consumers")
        publish(stream, uuid4(), 1)
        owners = "SELECT count(*) FROM tracker_partitions WHERE owner IS NOT NULL"
        wait_until(lambda: query(database, owners) == [(2,)], "both partitions again")
        wait_until(lambda: total(database) == 1, "the batch")


def test_a_hole_in_the_log(stream: str, database: str) -> None:
    """Where somebody purged what was not applied, what stands before is applied; it is said, and adopted what is behind."""
    gone = uuid4()
    publish(stream, uuid4(), 1)
    publish(stream, gone, 2)
    publish(stream, uuid4(), 3)

    async def purge() -> None:
        async with opened_broker(stream) as broker:
            js, name = await broker._js(), broker.address.name
            for partition in range(2):
                await js.purge_stream(stream_of(name, partition), subject=subject_of(name, partition, gone))

    asyncio.run(purge())
    with Consuming(stream, database) as consuming:
        wait_until(lambda: "purge of a subject" in faults(consuming), "the refusal")
        wait_until(lambda: total(database) == 1, "what is before it")
        code, said = status(stream, database)
        assert (code, said.count("follows 1")) == (1, 2), said
        adopt(stream, database)
        wait_until(lambda: total(database) == 1 + 16, "what is behind it")


def test_without_a_leader_nothing_is_told(database: str, tmp_path: Path) -> None:
    """While nobody leads a partition it waits, and what a replica says that is behind is not taken for the log."""
    with Cluster(tmp_path / "nats") as three:
        url = three.url("s")
        make_stream(url, 1)
        for _ in range(3):
            publish(url, uuid4(), 1)
        with Consuming(url, database) as consuming:
            wait_until(lambda: total(database) == 3, "the batches")
            three.kill(0, 1)
            wait_until(lambda: "no leader" in faults(consuming), "the loss of the leader")
            # What a replica that lacks the log's end would have it compared with.
            query(database, "UPDATE tracker_ledger SET applied_sequence = 9 WHERE epoch > 0 RETURNING 1")
            seen = len(consuming.errors)
            wait_until(lambda: len(consuming.errors) > seen + 2, "more looks")
            assert "older copy" not in faults(consuming)
            done = run("stream", "adopt", "--stream", url, "--database", database)
            assert done.exit_code == 1
            query(database, "UPDATE tracker_ledger SET applied_sequence = 3 WHERE epoch > 0 RETURNING 1")
            three.start()
            wait_until(lambda: status(url, database)[0] == 0, "a leader")
            publish(url, uuid4(), 1)
            wait_until(lambda: total(database) == 4, "all batches")


def test_a_login_is_not_sent_in_clear(cluster: Cluster) -> None:
    """Where the URL asks for TLS a server without it gets no login, and it is said."""
    done = run("stream", "status", "--stream", f"tls://me:secret@127.0.0.1:{cluster.ports[0]}/first")
    assert (done.exit_code, "does not encrypt" in done.output, "secret" in done.output) == (1, True, False), done.output


def test_an_older_copy_of_the_database_before_a_purge(stream: str, database: str) -> None:
    """What a database has forgotten while nothing came is not purged: it is asked right before."""
    producer = uuid4()

    async def firsts() -> list[int]:
        async with opened_broker(stream) as broker:
            return [facts.first for facts in await broker.partitions()]

    with Consuming(stream, database, retain=4.0) as consuming:
        publish(stream, producer, 1)
        wait_until(lambda: total(database) == 1, "the first batch")
        wait_until(lambda: [each.position for each in consuming.consumer.partitions] == [1, 1], "both positions")
        with psycopg.connect(database) as connection:
            for name in ("conversations", "tracker_ledger"):
                connection.execute(f"CREATE TABLE saved_{name} AS TABLE {name}")
        publish(stream, producer, 2, 3)
        wait_until(lambda: total(database) == 1 + 4 + 16, "all batches")
        wait_until(lambda: [each.position for each in consuming.consumer.partitions] == [3, 3], "both positions")
        with psycopg.connect(database) as connection:
            for name in ("conversations", "tracker_ledger"):
                connection.execute(f"DELETE FROM {name}")
                connection.execute(f"INSERT INTO {name} TABLE saved_{name}")
        wait_until(lambda: total(database) == 1 + 4 + 16, "what was forgotten")
        wait_until(lambda: consuming.consumer.numbers.regressions == 2, "both partitions to be counted")
        wait_until(lambda: asyncio.run(firsts()) == [3, 3], "the purge of all but the last")


def test_rubbish_that_is_read_again(stream: str, database: str) -> None:
    """A truncated ledger, adopted, has what is no message set aside again: once, and nothing waits behind it."""
    publish(stream, uuid4(), 1)

    async def rubbish() -> None:
        async with opened_broker(stream) as broker:
            for partition in range(2):
                await broker.publish(partition, Message(f"{broker.address.name}.{partition}.x", {}, b"hello"), 5.0)

    asyncio.run(rubbish())
    with Consuming(stream, database):
        wait_until(lambda: query(database, "SELECT count(*) FROM tracker_dead_letters") == [(2,)], "the dead letters")
    query(database, "DELETE FROM tracker_ledger WHERE epoch > 0 RETURNING 1")
    adopt(stream, database)
    publish(stream, uuid4(), 2)
    with Consuming(stream, database):
        wait_until(lambda: total(database) == 1 + 4, "what is behind it")
    assert query(database, "SELECT count(*) FROM tracker_dead_letters") == [(2,)]


@pytest.mark.parametrize("words", ["404", "204", "200"])
def test_rubbish_that_looks_like_an_answer(stream: str, database: str, words: str) -> None:
    """A message with a header of the name in which the servers say that there is no more is read like any other."""

    async def rubbish() -> None:
        async with opened_broker(stream) as broker:
            for partition in range(2):
                message = Message(f"{broker.address.name}.{partition}.x", {"Status": words}, b"hello")
                await broker.publish(partition, message, 5.0)

    asyncio.run(rubbish())
    publish(stream, uuid4(), 1)
    with Consuming(stream, database):
        wait_until(lambda: total(database) == 1, "what is behind it")
