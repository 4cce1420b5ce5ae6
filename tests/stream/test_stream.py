"""From a tracker through the stream into the database: once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.digits import Digits
from tests.helpers import query, wait_until
from tests.stream.harness import Consuming

if TYPE_CHECKING:
    from tests.helpers import Trackers


def sums(database: str) -> dict[str, int]:
    """Return the tokens of each thread."""
    return dict(query(database, "SELECT thread_id, total_tokens::bigint FROM conversations"))


def test_calls_arrive_once(stream: str, database: str, trackers: Trackers) -> None:
    """What several trackers were called with is in the table, each call once, whatever partition it went through."""
    digits = Digits()
    made = [trackers(stream, flush_interval=0.02) for _ in range(3)]
    with Consuming(stream, database):
        for round_ in range(20):
            for number, tracker in enumerate(made):
                for thread in range(10):
                    name = f"t{thread}-{round_ // 10}" if number else f"own{round_}-{thread}"
                    assert tracker.record_turn(name, "billing", digits.tokens(name), 0.5)
        for tracker in made:
            tracker.flush(30)
        wait_until(lambda: digits.read(sums(database)).exact, "every call")
