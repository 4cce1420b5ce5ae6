"""`Tracker("embedded:DIR")`: a server of the tracker's own, from its first flush to its end."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.helpers import Trackers, wait_until, watchdog
from tracker_daemon import DrainReport, FlushTimeout
from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.embedded_sink import EmbeddedSink
from tracker_daemon.errors import EmbeddedPostgresError
from tracker_daemon.sink import LedgerMissing

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for a server, in a folder that the server's user can reach; not made yet."""
    folder = Path(tempfile.mkdtemp(prefix="tracker-embedded-"))
    folder.chmod(0o755)
    yield folder / "pg"
    shutil.rmtree(folder)


@pytest.fixture
def trackers() -> Iterator[Trackers]:
    """Makes trackers that are closed at the end, in time."""
    made = Trackers()
    with watchdog(120):
        yield made
        made.close()


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[EmbeddedPostgres]:
    """The servers that sinks have, in the order of their making."""
    made: list[EmbeddedPostgres] = []
    make = EmbeddedSink.__init__

    def noted(self: EmbeddedSink, *arguments: object, **named: object) -> None:
        make(self, *arguments, **named)  # type: ignore[arg-type]
        made.append(self._server)

    monkeypatch.setattr(EmbeddedSink, "__init__", noted)
    return made


def rows_in(directory: Path) -> list[tuple[str, int]]:
    """Start a server on what a tracker left behind; return its threads and turns."""
    with EmbeddedPostgres(directory) as server, psycopg.connect(server.conninfo) as connection:
        return connection.execute("SELECT thread_id, turn_count FROM conversations ORDER BY 1").fetchall()


def test_a_life_and_another(directory: Path, trackers: Trackers, servers: list[EmbeddedPostgres]) -> None:
    """The first call makes server and tables, the end stops it, and the next tracker goes on with what is there."""
    for number in (1, 2):
        tracker = trackers(f"embedded:{directory}")
        assert len(servers) < number  # nothing is made before the first call
        assert tracker.record_turn("a", "billing", 1, 0.5)
        tracker.flush(60)
        assert servers[-1].running
        assert tracker.record_turn(f"only {number}")
        assert tracker.close(30) == DrainReport(applied=1)
        assert not servers[-1].running
    assert rows_in(directory) == [("a", 2), ("only 1", 1), ("only 2", 1)]


def test_one_directory_one_tracker(directory: Path, trackers: Trackers) -> None:
    """A second tracker on the directory is told whose server runs there; the first goes on undisturbed."""
    told: list[BaseException] = []
    first = trackers(f"embedded:{directory}")
    second = trackers(f"embedded:{directory}", on_error=told.append)
    first.record_turn("a")
    first.flush(60)
    second.record_turn("b")
    wait_until(lambda: told, "the error")
    with pytest.raises(FlushTimeout, match="a server already runs in") as late:
        second.flush(0)
    assert isinstance(late.value.__cause__, EmbeddedPostgresError)
    assert second.close(0.1) == DrainReport(lost=1)
    first.record_turn("a")
    assert first.close(30) == DrainReport(applied=1)
    assert rows_in(directory) == [("a", 2)]


def test_a_start_that_fails_half_way(
    directory: Path, trackers: Trackers, servers: list[EmbeddedPostgres], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is up and the tables could not be made: the next try makes them, on the same server."""
    from tracker_daemon import embedded_sink

    migrate, tries = embedded_sink.migrate, list[bool]()

    async def flaky(connection: psycopg.AsyncConnection[object], schema: str | None, table: str) -> list[str]:
        tries.append(servers[0].running)
        if len(tries) == 1:
            raise ConnectionResetError
        return await migrate(connection, schema, table)

    monkeypatch.setattr(embedded_sink, "migrate", flaky)
    tracker = trackers(f"embedded:{directory}")
    tracker.record_turn("a")
    tracker.flush(60)
    assert tries == [True, True]
    assert tracker.close(30).lost == 0
    assert rows_in(directory) == [("a", 1)]


def test_the_server_stops_whatever_the_ledger_says(
    directory: Path, trackers: Trackers, servers: list[EmbeddedPostgres]
) -> None:
    """A ledger that was emptied meanwhile is told of at the end, and leaves no server behind."""
    told: list[BaseException] = []
    tracker = trackers(f"embedded:{directory}", on_error=told.append)
    tracker.record_turn("a")
    tracker.flush(60)
    with psycopg.connect(servers[0].conninfo) as connection:
        connection.execute("TRUNCATE tracker_ledger")
    tracker.close(30)
    assert [type(error) for error in told] == [LedgerMissing]
    assert not servers[0].running
