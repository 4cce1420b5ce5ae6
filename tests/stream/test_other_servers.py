"""A stream of the same name on other servers, and journals that come to another address than their own."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from tests.helpers import query, wait_until
from tests.stream.cluster import Cluster
from tests.stream.conftest import make_stream
from tests.stream.harness import Consuming
from tests.stream.test_command import run
from tests.stream.test_consumer import faults
from tests.stream.test_going_back import adopt, status
from tests.stream.test_sink import log_ends, total

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers import Trackers
    from tracker_daemon import Tracker


@pytest.mark.parametrize("has_journal", [True, False])
def test_the_same_name_on_other_servers(
    database: str, trackers: Trackers, tmp_path: Path, *, has_journal: bool
) -> None:
    """Both are refused until adopted. What a journal has kept comes to the others too; all is counted once in the end."""
    settings = {"flush_interval": 0.01, "journal": tmp_path / "journal" if has_journal else None}

    def call(tracker: Tracker, number: int) -> None:
        assert tracker.record_turn("t0", "a", 4**number)
        tracker.flush(30)

    def refused(url: str) -> None:
        code, told = status(url, database)
        assert (code, "stream adopt" in told) == (1, True), told
        before = total(database)
        with Consuming(url, database) as consuming:
            wait_until(lambda: "these are other servers" in faults(consuming), "the refusal")
        assert total(database) == before
        adopt(url, database)

    with Cluster(tmp_path / "one", 1) as one, Cluster(tmp_path / "other", 1) as other:
        here, there = one.url("chat"), other.url("chat")
        for url in (here, there):
            make_stream(url, 2, replicas=1)
        first = trackers(here, **settings)
        with Consuming(here, database):
            call(first, 0)
            wait_until(lambda: total(database) == 1, "the first call")
        call(first, 1)
        first.close(30)
        call(trackers(there, **settings), 2)
        refused(there)
        with Consuming(there, database):
            expected = 1 + 4 + 16 if has_journal else 1 + 16
            wait_until(lambda: total(database) == expected, "what the other servers have")
        refused(here)
        ends = asyncio.run(log_ends(here))
        with Consuming(here, database) as consuming:
            wait_until(lambda: [each.position for each in consuming.consumer.partitions] == ends, "the logs' ends")
        assert total(database) == 1 + 4 + 16


def test_a_journal_of_a_stream_is_not_applied_to_the_database(
    stream: str, database: str, trackers: Trackers, tmp_path: Path
) -> None:
    """`journal recover` says where it belongs, forced or not; a tracker on the stream publishes it, and all is counted once."""
    journal = tmp_path / "journal"
    first = trackers(stream, journal=journal, flush_interval=0.01)
    assert first.record_turn("t0", "a", 1)
    first.flush(30)
    assert first.record_turn("t0", "a", 4)
    assert first.close(0).journaled == 1
    recover = ("journal", "recover", str(journal), "--database", database)
    done = run(*recover)
    assert (done.exit_code, "was begun on a stream" in done.stderr, "--again" in done.stderr) == (1, True, False)
    producer = json.loads(run("journal", "inspect", str(journal), "--json").stdout.splitlines()[0])["producer"]
    forced = run(*recover, "--again", producer)
    assert (forced.exit_code, "was begun on a stream" in forced.stderr) == (1, True), forced.output
    assert query(database, "SELECT count(*) FROM conversations") == [(0,)]
    errors: list[BaseException] = []
    direct = trackers(database, journal=journal, flush_interval=0.01, on_error=errors.append)
    direct.flush(30)
    direct.close(30)
    assert any("was begun on a stream" in str(error) for error in errors), errors
    with Consuming(stream, database):
        trackers(stream, journal=journal, flush_interval=0.01).flush(30)
        wait_until(lambda: total(database) == 1 + 4, "both calls")
