"""Consumers: who reads what, what they refuse, and what stays in the log."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import psycopg
import pytest
from click.testing import CliRunner

from tests.conftest import run_migrate
from tests.digits import Digits
from tests.faults.proxy import Blackhole, FaultProxy
from tests.helpers import query, wait_until
from tests.stream.conftest import make_stream
from tests.stream.harness import Consuming
from tests.stream.kills import ConsumerProcess
from tests.stream.test_sink import batch, delete, log_ends, opened_broker, opened_sink, total
from tracker_daemon.cli import program as command_line
from tracker_daemon.stream import operations
from tracker_daemon.stream.address import address
from tracker_daemon.stream.messages import Message, encode
from tracker_daemon.stream.shares import share_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers import Trackers
    from tests.stream.cluster import Cluster


def publish(url: str, producer: UUID, *sequences: int) -> None:
    """Publish those batches."""

    async def run() -> None:
        async with opened_sink(url) as sink:
            for sequence in sequences:
                await sink.apply(batch(producer, sequence))

    asyncio.run(run())


def owned(consuming: Consuming) -> set[int]:
    """Return the partitions that it reads."""
    return {number for number, each in enumerate(consuming.consumer.partitions) if each.owned}


def faults(consuming: Consuming) -> str:
    """Return why partitions do not go on, and what else went wrong."""
    partitions = [each.fault for each in consuming.consumer.partitions]
    return " ".join([*partitions, *map(str, consuming.errors)])


@pytest.mark.parametrize("partitions", range(6))
@pytest.mark.parametrize("members", range(1, 6))
def test_shares(partitions: int, members: int) -> None:
    """The shares of all consumers are all partitions, and differ by one at most."""
    names = tuple(UUID(int=number) for number in range(members))
    shares = [share_of(name, names, partitions) for name in names]
    assert sum(shares) == partitions
    assert max(shares) - min(shares) <= 1
    assert share_of(UUID(int=99), names, partitions) == 0


def test_consumers_share(stream: str, database: str) -> None:
    """Each reads its share; when one goes, or comes, the partitions are dealt anew, and each has one owner."""
    with Consuming(stream, database) as one:
        wait_until(lambda: owned(one) == {0, 1}, "both partitions")
        with Consuming(stream, database) as other:
            wait_until(lambda: len(owned(one)) == len(owned(other)) == 1, "one partition each")
            assert owned(one) | owned(other) == {0, 1}
            publish(stream, uuid4(), 1, 2)
            wait_until(lambda: total(database) == 1 + 4, "what was published")
        wait_until(lambda: owned(one) == {0, 1}, "both partitions again")
    assert query(database, "SELECT count(*) FROM tracker_partitions WHERE owner IS NOT NULL") == [(0,)]
    assert query(database, "SELECT count(*) FROM tracker_consumers") == [(0,)]


def test_one_table_has_all_of_it(stream: str, database: str) -> None:
    """A consumer with another table of the schema would get a part of the sums: it is refused, until it is adopted."""
    run_migrate(database, None, "other")

    def command(name: str) -> tuple[int, str]:
        asked = ["stream", name, "--stream", stream, "--database", database, "--table", "other"]
        done = CliRunner().invoke(command_line, asked)
        return done.exit_code, done.output

    with Consuming(stream, database) as one:
        wait_until(lambda: owned(one) == {0, 1}, "both partitions")
        with Consuming(stream, database, table="other") as other:
            wait_until(lambda: "read into the table conversations" in faults(other), "the refusal")
            publish(stream, uuid4(), 1, 2)
            wait_until(lambda: total(database) == 1 + 4, "what was published")
            assert (owned(one), owned(other)) == ({0, 1}, set())
            code, said = command("status")
            assert (code, "read into the table conversations" in said) == (1, True), said
            assert command("adopt")[0] == 0
            wait_until(lambda: owned(other) == {0, 1}, "the other table's consumer")
            publish(stream, uuid4(), 3)
            wait_until(lambda: query(database, "SELECT max(total_tokens) FROM other") == [(16,)], "the other table")
    assert total(database) == 1 + 4


def test_a_stream_made_anew_is_refused_until_adopted(stream: str, database: str) -> None:
    """A stream that was deleted and made again is not read, whether by who reads or by who comes; adopted, it is."""
    producer = uuid4()
    publish(stream, producer, 1)
    with Consuming(stream, database) as consuming:
        wait_until(lambda: total(database) == 1, "the first batch")
        asyncio.run(delete(stream))
        make_stream(stream, 2)
        publish(stream, producer, 1, 2)
        wait_until(lambda: "stream adopt" in faults(consuming), "the refusal")
    with Consuming(stream, database) as consuming:
        wait_until(lambda: "stream adopt" in faults(consuming), "the refusal")
        assert total(database) == 1
        asyncio.run(operations.adopt(address(stream), database, (None, "conversations")))
        wait_until(lambda: total(database) == 1 + 4, "the second batch")


def test_a_log_that_went_back_is_refused(stream: str, database: str) -> None:
    """A log that ends before what is applied, as an older copy of it does, is not read."""
    publish(stream, uuid4(), 1)
    with Consuming(stream, database) as consuming:
        wait_until(lambda: total(database) == 1, "the first batch")
        query(
            database,
            "UPDATE tracker_ledger SET applied_sequence = applied_sequence + 9 WHERE epoch > 0 RETURNING 1",
        )
        publish(stream, uuid4(), 1)
        wait_until(lambda: "older copy" in faults(consuming), "the refusal")
        assert total(database) == 1


def test_a_beginning_that_is_gone_is_refused(stream: str, database: str) -> None:
    """A database that has not seen what was purged, as one from an old backup, does not go on behind it."""
    publish(stream, uuid4(), 1, 2)

    async def purge() -> None:
        async with opened_broker(stream) as broker:
            for partition in range(2):
                await broker.purge(partition, 2)

    asyncio.run(purge())
    with Consuming(stream, database) as consuming:
        wait_until(lambda: "are gone from it" in faults(consuming), "the refusal")
        assert total(database) == 0
    seen = asyncio.run(operations.status(address(stream), database, (None, "conversations")))
    assert all("begins at 2" in " ".join(each.faults) for each in seen), seen


def test_a_database_that_forgets_is_repaired(stream: str, database: str) -> None:
    """What the database has forgotten is read again from where its ledger stands, and counted once."""
    producer = uuid4()
    publish(stream, producer, 1)
    with Consuming(stream, database) as consuming:
        wait_until(lambda: total(database) == 1, "the first batch")
        wait_until(lambda: not any(each.lag for each in consuming.consumer.partitions), "the logs' ends")
        names = ("conversations", "tracker_ledger")
        with psycopg.connect(database) as connection:
            for name in names:
                connection.execute(f"CREATE TABLE saved_{name} AS TABLE {name}")
        publish(stream, producer, 2, 3)
        wait_until(lambda: total(database) == 1 + 4 + 16, "all batches")
        wait_until(lambda: [each.position for each in consuming.consumer.partitions] == [3, 3], "both positions")
        with psycopg.connect(database) as connection:
            for name in names:
                connection.execute(f"DELETE FROM {name}")
                connection.execute(f"INSERT INTO {name} TABLE saved_{name}")
        publish(stream, producer, 4)
        wait_until(lambda: total(database) == 1 + 4 + 16 + 64, "all batches again")
        wait_until(lambda: consuming.consumer.numbers.regressions == 2, "both partitions to be counted")


def test_what_is_applied_is_purged_and_nothing_else(stream: str, database: str) -> None:
    """Applied messages leave the log after a while; those that are not applied stay, however old."""
    producer = uuid4()

    async def firsts() -> list[int]:
        async with opened_broker(stream) as broker:
            return [facts.first for facts in await broker.partitions()]

    publish(stream, producer, 1, 2)
    with Consuming(stream, database, retain=0.2):
        wait_until(lambda: asyncio.run(firsts()) == [2, 2], "the purge of all but the last")
    publish(stream, producer, 3)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE conversations RENAME TO away")
        with Consuming(stream, database, retain=0.0) as consuming:
            wait_until(lambda: "does not exist" in faults(consuming), "the fault")
        assert asyncio.run(firsts()) == [2, 2]
        connection.execute("ALTER TABLE away RENAME TO conversations")
    with Consuming(stream, database, retain=0.2):
        wait_until(lambda: total(database) == 1 + 4 + 16, "all batches")


def test_a_newer_message_holds_its_partition(stream: str, database: str) -> None:
    """A message of a newer version is not passed over: its partition waits, and says what to do."""
    [[message], _] = encode(address(stream).name, batch(uuid4(), 1), 2)
    newer = Message(message.subject, {**message.headers, "tracker-format": "2"}, message.body)

    async def run() -> None:
        async with opened_broker(stream) as broker:
            await broker.publish(0, newer, 5.0)

    asyncio.run(run())
    publish(stream, uuid4(), 1)
    with Consuming(stream, database) as consuming:
        wait_until(lambda: "Upgrade the consumers" in faults(consuming), "the refusal")
        wait_until(lambda: consuming.consumer.partitions[1].position == 1, "the other partition")
        assert consuming.consumer.partitions[0].position == 0


def test_rubbish_is_set_aside(stream: str, database: str) -> None:
    """What somebody else published there is kept as a dead letter, and holds nothing up."""
    name = address(stream).name

    async def run() -> None:
        async with opened_broker(stream) as broker:
            await broker.publish(0, Message(f"{name}.0.somebody", {}, b"hello"), 5.0)

    asyncio.run(run())
    publish(stream, uuid4(), 1)
    with Consuming(stream, database) as consuming:
        wait_until(lambda: [each.position for each in consuming.consumer.partitions] == [2, 1], "both logs' ends")
    assert query(database, "SELECT thread_id, delta FROM tracker_dead_letters") == [
        ("(unreadable message)", {"unreadable": "aGVsbG8="})
    ]
    retried = CliRunner().invoke(command_line, ["dead-letters", "retry", "--all", "--database", database])
    assert (retried.exit_code, "refused again 1" in retried.output) == (1, True), retried.output


def test_a_partitioned_table(stream: str, empty_database: str, trackers: Trackers) -> None:
    """Conversations that are partitioned by a hash of the thread are written like others, directly and by the stream."""
    with psycopg.connect(empty_database) as connection:
        connection.execute(
            "CREATE TABLE conversations (thread_id text PRIMARY KEY, started_at timestamptz, last_activity timestamptz,"
            " turn_count integer, agents_used text[], total_tokens bigint, total_cost_usd numeric,"
            " resolution_type text, ended_at timestamptz) PARTITION BY HASH (thread_id)"
        )
        for number in range(4):
            connection.execute(
                f"CREATE TABLE conversations_{number} PARTITION OF conversations"
                f" FOR VALUES WITH (MODULUS 4, REMAINDER {number})"
            )
    run_migrate(empty_database)
    digits = Digits()
    made = [trackers(stream, flush_interval=0.01), trackers(empty_database, flush_interval=0.01)]
    with Consuming(stream, empty_database):
        for _ in range(20):
            for tracker in made:
                for number in range(30):
                    assert (
                        tracker.record_turn(f"t{number}", "a", digits.tokens(f"t{number}"))
                        if (digits.made.get(f"t{number}", 0) < 31)
                        else True
                    )
        for tracker in made:
            tracker.flush(30)
        statement = "SELECT thread_id, total_tokens::bigint FROM conversations"
        wait_until(lambda: digits.read(dict(query(empty_database, statement))).exact, "every call")
    assert query(empty_database, "SELECT count(DISTINCT tableoid) FROM conversations") == [(4,)]


def test_a_number_of_partitions_is_for_ever(stream: str) -> None:
    """Making the stream again changes nothing; with another number of partitions it is refused."""
    assert make_stream(stream, 2) == []
    with pytest.raises(Exception, match="with 2 partitions, not 3"):
        make_stream(stream, 3)
    assert asyncio.run(log_ends(stream)) == [0, 0]


def test_leaders_are_spread(cluster: Cluster) -> None:
    """Each server leads its share of a new stream."""
    url = cluster.url(f"s{uuid4().hex[:8]}")
    make_stream(url, 3)

    def leaders() -> set[str]:
        return {each.facts.leader for each in asyncio.run(operations.status(address(url), None, (None, "c")))}

    wait_until(lambda: len(leaders()) == 3, "three leaders")


def test_a_consumer_stopped_past_its_lease(stream: str, database: str, trackers: Trackers, tmp_path: Path) -> None:
    """While a consumer stands still another takes its partitions; continued, it writes nothing of what it has in hand."""
    digits = Digits()
    tracker = trackers(stream, flush_interval=0.01)

    def call(rounds: int) -> None:
        for _ in range(rounds):
            for number in range(10):
                assert tracker.record_turn(f"t{number}", "a", digits.tokens(f"t{number}"))
            tracker.flush(30)

    def exact() -> bool:
        return digits.read(dict(query(database, "SELECT thread_id, total_tokens::bigint FROM conversations"))).exact

    stopped = ConsumerProcess(stream, database, "stopped", tmp_path, lease=1.5)
    stopped.start()
    try:
        wait_until(lambda: stopped.log.count("partition_claimed") == 2, "both partitions")
        call(5)
        wait_until(exact, "the first calls")
        with psycopg.connect(database) as lock:
            # It has messages in hand, and waits within its transaction, when it is stopped.
            lock.execute("LOCK TABLE conversations IN SHARE MODE")
            call(5)
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            wait_until(lambda: query(database, waiting)[0][0] >= 2, "two transactions that wait")
            stopped.process.send_signal(signal.SIGSTOP)
        with Consuming(stream, database, lease=1.5) as other:
            wait_until(lambda: owned(other) == {0, 1}, "both partitions at the other one")
            call(5)
            wait_until(exact, "all calls")
            stopped.process.send_signal(signal.SIGCONT)
            wait_until(lambda: "partition_lost" in stopped.log or len(owned(other)) < 2, "the loss to be seen")
            call(5)
            wait_until(exact, "all calls again")
        assert stopped.stop() == 0
        assert exact()
    finally:
        stopped.process.send_signal(signal.SIGCONT)
        stopped.process.kill()
        stopped.process.wait()


@pytest.mark.parametrize("calls", [False, True])
def test_stopped_while_the_database_is_deaf(
    stream: str, database: str, trackers: Trackers, tmp_path: Path, calls: bool
) -> None:
    """Neither the leases nor a transaction holds the end up: what is not applied stays in the stream."""
    digits = Digits()
    tracker = trackers(stream, flush_interval=0.01)

    def call() -> None:
        for number in range(10):
            assert tracker.record_turn(f"t{number}", "a", digits.tokens(f"t{number}"))
        tracker.flush(30)

    def exact() -> bool:
        return digits.read(dict(query(database, "SELECT thread_id, total_tokens::bigint FROM conversations"))).exact

    with FaultProxy(database) as proxy:
        consumer = ConsumerProcess(stream, proxy.conninfo, "deaf", tmp_path, lease=1.5)
        consumer.start()
        try:
            wait_until(lambda: consumer.log.count("partition_claimed") == 2, "both partitions")
            call()
            wait_until(exact, "the first calls")
            proxy.arm(Blackhole("client", repeat=None))
            if calls:
                call()
            proxy.wait_fired(count=3 if calls else 1)  # the leases wait for an answer; both partitions too
            consumer.process.send_signal(signal.SIGTERM)
            assert consumer.process.wait(25) == 0  # a statement of its own would take 30 s to give up
        finally:
            consumer.process.kill()
            consumer.process.wait()
    assert "stopped" in consumer.log
    with Consuming(stream, database, lease=1.5):
        call()
        wait_until(exact, "all calls")
