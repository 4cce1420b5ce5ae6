"""The worker's parts: all of the work, in order, in sizes that fit whoever waits for the interpreter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tracker_daemon import breath
from tracker_daemon.breath import Breath

if TYPE_CHECKING:
    from collections.abc import Callable


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
