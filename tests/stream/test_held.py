"""A partition that is held by its first message, or changes its owner: what it says, and what lets it go on."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from tests.helpers import query, wait_until
from tests.stream.harness import Consuming, fail_rows_of_bad
from tests.stream.test_consumer import publish
from tests.stream.test_going_back import adopt, status
from tests.stream.test_sink import total
from tracker_daemon.stream.messages import partition_of

if TYPE_CHECKING:
    import pytest

    from tests.helpers import Trackers

_LETTERS = "SELECT thread_id FROM tracker_dead_letters"


def test_a_row_in_doubt_waits_for_one_behind_it(stream: str, database: str, trackers: Trackers) -> None:
    """A lone row that fails as a table at fault does holds its partition, and says so, until another one goes through."""
    held = partition_of("worse", 2)
    name = next(f"t{number}" for number in range(99) if partition_of(f"t{number}", 2) == held)
    fail_rows_of_bad(database)
    tracker = trackers(stream, flush_interval=0.01)
    assert tracker.record_turn("worse", "bad", 1)
    tracker.flush(30)
    with Consuming(stream, database) as consuming:
        # Three fail as they are; from the fourth on the row is looked for, and held back.
        wait_until(lambda: sum("no_such_function" in str(error) for error in consuming.errors) > 4, "five tries", 60)
        assert "no_such_function" in consuming.consumer.partitions[held].fault
        assert query(database, _LETTERS) == []
        assert tracker.record_turn(name, "a", 1)
        tracker.flush(30)
        wait_until(lambda: query(database, _LETTERS) == [("worse",)], "the dead letter")
        wait_until(lambda: query(database, "SELECT thread_id FROM conversations") == [(name,)], "what is behind it")
        wait_until(lambda: not any(each.fault for each in consuming.consumer.partitions), "no fault")
    assert status(stream, database)[0] == 0


def test_adopted_without_need(stream: str, database: str, caplog: pytest.LogCaptureFixture) -> None:
    """A consumer whose partitions are adopted while all is well says why it lost them, and goes on."""
    caplog.set_level("INFO", logger="tracker_daemon")
    with Consuming(stream, database):
        publish(stream, uuid4(), 1)
        wait_until(lambda: total(database) == 1, "the first batch")
        adopt(stream, database)
        publish(stream, uuid4(), 2)
        wait_until(lambda: total(database) == 1 + 4, "the second batch")
    told = [record.tracker for record in caplog.records if hasattr(record, "tracker")]
    reasons = [each["reason"] for each in told if each["event"] == "partition_lost"]
    assert len(reasons) == 2
    assert all("`stream adopt` has set where it stands" in reason for reason in reasons)
