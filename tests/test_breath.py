"""The worker's parts: all of the work, in order, in sizes that fit whoever waits for the interpreter."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.helpers import PATIENCE
from tracker_daemon import Tracker, breath
from tracker_daemon.backlog import Backlog
from tracker_daemon.breath import Breath
from tracker_daemon.generation import Generation
from tracker_daemon.postgres import encoding
from tracker_daemon.postgres.sink import COPY_FROM

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry


class Clock:
    """Stands in for `time`; each sleep takes as long as it is told."""

    def __init__(self, *sleeps: float) -> None:
        self.now, self._sleeps = 0.0, list(sleeps)

    def perf_counter(self) -> float:
        """Return its own time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Come back late by what comes next."""
        self.now += seconds + (self._sleeps.pop(0) if self._sleeps else 0.0)


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what says how late each moment's end is."""

    def told(*sleeps: float) -> None:
        monkeypatch.setattr(breath, "time", Clock(*sleeps))

    return told


@pytest.mark.parametrize("number", [0, 1, 9, 10, 11, 95])
def test_parts_are_the_whole(number: int, sleeping: Callable[..., None]) -> None:
    """Every item comes once, in order, however the sizes change meanwhile."""
    sleeping(0.006, 0.006, 0.0, 0.006)
    parts = list(Breath(10, 40).parts(range(number)))
    assert [item for part in parts for item in part] == list(range(number))
    assert all(parts)


def test_sizes(sleeping: Callable[..., None]) -> None:
    """Beside a host that holds the interpreter parts grow to the most; beside an idle one they are the least again."""
    sleeping(0.006, 0.006, 0.006, 0.0001, 0.006)
    found = Breath(10, 40)
    sizes = []
    for _ in range(5):
        found.take()
        sizes.append(found.size)
    assert sizes == [20, 40, 40, 10, 20]


@pytest.mark.parametrize("fills", [False, True])
def test_no_step_is_long(
    database: str, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, fills: bool
) -> None:
    """Between two moments the worker folds, checks, encodes and lets go of few rows, however many there are.

    Only of a queue that fills up it takes more at once: calls refused are worse than a slow loop.
    """
    monkeypatch.setattr(breath, "_LATE", float("inf"))  # the host is idle, whatever the machine is at
    longest: Counter[str] = Counter()

    def watch(owner: object, name: str, size: Callable[..., int]) -> None:
        do = getattr(owner, name)

        def watched(*given: object) -> object:
            done = do(*given)
            longest[name] = max(longest[name], size(done, given))
            return done

        monkeypatch.setattr(owner, name, watched)

    watch(Backlog, "drain", lambda done, _: done)
    watch(encoding, "fits_stage", lambda _, given: len(given[0]))
    watch(encoding.StageRows, "block", lambda _, given: len(given[1]))
    watch(Generation, "release", lambda _, given: len(given[1]))
    number = 3 * COPY_FROM
    with Tracker(
        database, registry=registry, flush_interval=600, max_queue_size=number if fills else 10 * number
    ) as tracker:
        for thread in range(number):
            assert tracker.record_turn(f"thread-{thread}", "agent", 1, 0.1)
        tracker.flush(PATIENCE)
    assert set(longest) == {"drain", "fits_stage", "block", "release"}
    assert (longest.pop("drain") > 2_000) is fills
    assert max(longest.values()) <= 500
