"""What a recovery finds applied is told as what a retry finds applied; what reads back short is damage."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import anyio
import psycopg
import pytest

from tests.helpers import PATIENCE, Trackers, balanced, query
from tests.journal.forgetful import told
from tests.journal.rig import NOW, Calls, Rig, small_files
from tests.model.manual_clock import Driven
from tests.test_sinks import daemon_on, daemons, running
from tracker_daemon import MemorySink
from tracker_daemon.batch import Batch
from tracker_daemon.journal.lives import life_of
from tracker_daemon.journal.records import HEADER_SIZE
from tracker_daemon.journal.windows import Damage
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)


@pytest.fixture
def where(request: pytest.FixtureRequest, database: str) -> Iterator[str]:
    """The database, or a daemon before it."""
    if request.param == "database":
        yield database
        return
    with daemons:
        yield f"unix:{daemon_on(database)}"
    running.clear()


@pytest.mark.parametrize("where", ["database", "daemon"], indirect=True)
def test_dead_letters_of_a_batch_that_was_applied(
    where: str, database: str, tmp_path: Path, trackers: Trackers, caplog: pytest.LogCaptureFixture
) -> None:
    """A process dies in the middle of a window, two batches of which are applied, each with a dead letter."""
    with psycopg.connect(database) as connection:
        connection.execute("ALTER TABLE conversations ADD CHECK (NOT agents_used @> '{bad}')")
    rig = Rig(tmp_path, MemorySink(), max_batch_size=2)
    for name in ("t0", "bad1", "t1", "bad2", "t2"):
        rig.call((name, "bad" if name.startswith("bad") else "good", 1, 0, NOW))
    rig.seal()
    rig.sync()
    rig.crash()
    window, *_ = life_of(rig.journal.producer, sorted(tmp_path.glob("*.journal"))).windows

    async def apply() -> None:
        sink = PostgresSink(Connector(database), (None, "conversations"))
        opened = await sink.open(window.producer, 0)
        for sequence, deltas in list(enumerate(window.load().batches(2), 1))[:2]:
            applied = await sink.apply(Batch(window.producer, 0, opened.epoch, sequence, deltas))
            assert len(applied.dead_letters) == 1
        await sink.aclose(window.producer, 0, clean=False)

    anyio.run(apply)
    with caplog.at_level(logging.INFO, "tracker_daemon"):
        tracker = trackers(where, journal=tmp_path, flush_interval=600)
        tracker.flush(PATIENCE)
    stats = tracker.stats()
    assert balanced(stats)
    assert (stats.accepted, stats.applied, stats.dead_lettered) == (5, 3, 2)
    assert [each["thread_id"] for each in told(caplog, "dead_letter")] == ["bad1", "bad2"]
    assert len(query(database, "SELECT thread_id FROM tracker_dead_letters")) == 2
    tracker.close()


def test_a_spilled_window_that_reads_back_short(tmp_path: Path) -> None:
    """Records of a window that waits in files are gone, and nothing else tells of it: it is held, as with any damage."""
    sink, calls = MemorySink(), Calls()
    rig = Rig(tmp_path, sink)
    for thread_id in ("t0", "t1"):
        rig.call(calls.next(thread_id))
        rig.call(calls.next(thread_id))
        rig.seal()
    spilled = rig.backlog.sealed[1].stored
    assert spilled is not None
    [path] = spilled.paths
    data = path.read_bytes()
    path.write_bytes(data[:HEADER_SIZE])  # the disk has lost what it had
    work = Driven(rig.flusher.flush())
    assert work.at == "wait"
    assert Calls.counted(sink.rows) == {("t0", 0), ("t0", 1)}
    assert isinstance(rig.told[-1], Damage)
    assert "0 calls where 2 were sealed" in str(rig.told[-1])
    assert rig.journal.errors == {"damage": 1}
    path.write_bytes(data)  # and gives it again
    while work.at is not None:
        work.resume()
    assert Calls.counted(sink.rows) == calls.made
    rig.crash()


def test_a_kept_window_that_reads_back_short(tmp_path: Path) -> None:
    """What is to be applied again is not there as a whole: none of it is, and what is missing is told."""
    from tests.journal.forgetful import ForgetfulSink

    sink, calls = ForgetfulSink(at=4, back_to=1), Calls()
    rig = Rig(tmp_path, sink)
    for number in range(4):
        rig.call(calls.next("t0"))
        rig.call(calls.next("t1"))
        rig.seal()
        rig.sync()
        if number == 3:
            [path] = tmp_path.glob("*-0000000000000002-0000.journal")
            path.write_bytes(path.read_bytes()[:HEADER_SIZE])
        rig.flush()
    assert Calls.counted(sink.rows) == calls.made - {("t0", 1), ("t1", 1)}
    assert set(rig.journal.errors) == {"damage"}
    rig.crash()
