"""A log that goes back, or of which the database has lost the place: refused until adopted, and every call counted once."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from tests.helpers import query, wait_until
from tests.stream.cluster import Cluster
from tests.stream.conftest import make_stream
from tests.stream.harness import Consuming
from tests.stream.test_command import run
from tests.stream.test_consumer import faults, publish
from tests.stream.test_sink import delete, log_ends, opened_broker, total
from tracker_daemon.stream.messages import Message

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
    assert status(stream, database)[0] == 0  # nobody has read it yet
    with Consuming(stream, database):
        wait_until(lambda: total(database) == 1, "the batch")
    query(database, "DELETE FROM tracker_ledger WHERE epoch > 0 RETURNING 1")
    code, said = status(stream, database)
    assert (code, said.count("gone from tracker_ledger")) == (1, 2), said
    adopt(stream, database)
    assert status(stream, database)[0] == 0
    asyncio.run(delete(stream))
    make_stream(stream, 2)
    code, said = status(stream, database)
    assert (code, said.count("has applied one made")) == (1, 2), said
    adopt(stream, database)
    assert status(stream, database)[0] == 0


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
