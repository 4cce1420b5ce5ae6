"""Whether a turn may create its row was decided when it was accepted, whoever applies it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import PATIENCE, Trackers, query
from tests.journal.forgetful import ForgetfulSink
from tests.journal.rig import Calls, Rig, recovered, small_files
from tests.test_sinks import daemon_on, daemons, running
from tracker_daemon import MemorySink
from tracker_daemon.generation import ensure

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOWHERE = "host=127.0.0.1 port=1 user=postgres dbname=postgres"
BOTH = pytest.mark.parametrize("create_missing", [True, False])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)


@pytest.fixture
def socket(database: str) -> Iterator[str]:
    """The socket of a daemon that creates rows for the calls it takes itself."""
    with daemons:
        yield daemon_on(database)
    running.clear()


def some_calls(rig: Rig, calls: Calls) -> set[tuple[str, int]]:
    """Make a turn on a thread that nobody ensures, and turns on one that is; return those of the latter."""
    rig.call(ensure("there", 1_700_000_000_000_000_000))
    rig.call(calls.next("there"))
    before = set(calls.made)
    rig.call(calls.next("missing"))
    rig.seal()
    rig.call(calls.next("there"))
    return before | {("there", 1)}


@BOTH
def test_recovered_by_a_process_that_is_set_otherwise(create_missing: bool, tmp_path: Path) -> None:
    """What an earlier life accepted is applied by its own setting; what the next one accepts by the next one's."""
    sink, calls = MemorySink(), Calls()
    rig = Rig(tmp_path, sink, create_missing=create_missing)
    there = some_calls(rig, calls)
    rig.crash()
    after = Rig(tmp_path, sink, create_missing=not create_missing)
    after.recover()
    assert Calls.counted(sink.rows) == (calls.made if create_missing else there)
    assert after.backlog.books().rows_skipped == (0 if create_missing else 1)
    after.call(calls.next("of the next"))
    after.flush()
    assert ("of the next" in sink.rows) is not create_missing
    after.crash()


@BOTH
def test_applied_again_by_a_process_that_is_set_otherwise(create_missing: bool, tmp_path: Path) -> None:
    """So is what the database has forgotten since it was applied, and the journal still has."""
    sink, calls = ForgetfulSink(back_to=1), Calls()
    rig = Rig(tmp_path, sink, create_missing=create_missing)
    rig.call(ensure("first", 1_700_000_000_000_000_000))
    rig.flush()
    there = some_calls(rig, calls)
    rig.flush()
    rig.crash()
    sink.forget()
    assert list(sink.rows) == ["first"]
    recovered(tmp_path, sink, create_missing=not create_missing)
    assert Calls.counted(sink.rows) == (calls.made if create_missing else there)


@pytest.mark.parametrize("through", ["database", "daemon"])
@BOTH
def test_on_the_database(
    create_missing: bool, through: str, tmp_path: Path, database: str, socket: str, trackers: Trackers
) -> None:
    """The same on Postgres, and behind a daemon, whose own setting is for the calls that it takes itself."""
    options: dict[str, Any] = {"journal": tmp_path, "flush_interval": 600}
    before = trackers(NOWHERE, create_missing=create_missing, **options)
    assert before.record_turn("missing", "a", 1)
    assert before.close(0).journaled == 1
    where = database if through == "database" else f"unix:{socket}"
    after = trackers(where, create_missing=not create_missing, **options)
    assert after.record_turn("of the next", "a", 1)
    after.flush(PATIENCE)
    assert after.close().lost == 0
    [found] = query(database, "SELECT thread_id FROM conversations")
    assert found == ("missing" if create_missing else "of the next",)
