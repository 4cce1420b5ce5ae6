"""The worker's parts: all of the work, in order, in sizes that fit whoever waits for the interpreter."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections import Counter
from itertools import pairwise
from sys import getrefcount
from typing import TYPE_CHECKING

import pytest

from tests.helpers import PATIENCE
from tracker_daemon import MemorySink, Tracker, applier, breath, delta
from tracker_daemon.backlog import Backlog
from tracker_daemon.books import Totals
from tracker_daemon.breath import Breath
from tracker_daemon.generation import Generation
from tracker_daemon.postgres import encoding
from tracker_daemon.postgres.sink import COPY_FROM

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prometheus_client import CollectorRegistry


class Clock:
    """Stands in for `time`; each sleep takes as long as it is told, and work takes CPU time by `work` alone."""

    def __init__(self, *sleeps: float) -> None:
        self.now, self.worked, self._sleeps = 0.0, 0.0, list(sleeps)

    def perf_counter(self) -> float:
        """Return its own time."""
        return self.now

    def thread_time(self) -> float:
        """Return what was worked."""
        return self.worked

    def work(self, seconds: float) -> None:
        """Take so long."""
        self.now += seconds
        self.worked += seconds

    def sleep(self, seconds: float) -> None:
        """Come back late by what comes next."""
        self.now += seconds + (self._sleeps.pop(0) if self._sleeps else 0.0)


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Return what says how late each moment's end is; it returns the clock."""

    def told(*sleeps: float) -> Clock:
        clock = Clock(*sleeps)
        monkeypatch.setattr(breath, "time", clock)
        monkeypatch.setattr(breath.threading, "active_count", lambda: 2)
        return clock

    return told


def test_alone_in_a_process(tmp_path: Path) -> None:
    """A consumer's only thread sleeps for nobody; where there is another thread it does."""
    program = tmp_path / "alone.py"
    program.write_text(
        "import threading, time\n"
        "from tracker_daemon.breath import Breath\n"
        "slept = []\n"
        "time.sleep = slept.append\n"
        "list(Breath(10).parts(range(100)))\n"
        "alone, ended = len(slept), threading.Event()\n"
        "other = threading.Thread(target=ended.wait)\n"
        "other.start()\n"
        "list(Breath(10).parts(range(100)))\n"
        "ended.set()\n"
        "print(alone, len(slept) > 0)\n"
    )
    told = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert told.stdout.split() == ["0", "True"]


@pytest.mark.parametrize("number", [0, 1, 9, 10, 11, 95])
def test_parts_are_the_whole(number: int, sleeping: Callable[..., Clock]) -> None:
    """Every item comes once, in order, however the sizes change meanwhile."""
    clock = sleeping(0.006, 0.006, 0.0, 0.006)
    parts = []
    for part in Breath(10).parts(range(number)):
        parts.append(part)
        clock.work(len(part) * 0.000_03)
    assert [item for part in parts for item in part] == list(range(number))
    assert all(parts)


@pytest.mark.parametrize("number", [0, 1, 95])
def test_all_is_let_go(number: int, sleeping: Callable[..., Clock]) -> None:
    """A list is emptied, whatever its length."""
    sleeping()
    items = list(range(number))
    Breath(10).let_go(items)
    assert items == []


@pytest.mark.parametrize(("each", "fit"), [(0.000_001, 100), (0.000_005, 20), (0.000_3, 1)])
def test_parts_by_time(each: float, fit: int, sleeping: Callable[..., Clock]) -> None:
    """Parts come to be as large as a tenth of a millisecond has room for, on a machine however fast."""
    clock = sleeping()
    sizes = []
    for part in Breath(10).parts(range(2_000)):
        sizes.append(len(part))
        clock.work(len(part) * each)
    assert sizes[0] == 10
    assert all(later <= 2 * size for size, later in pairwise(sizes))
    assert sizes[-2] == fit  # the last one is a rest


def test_busy_host(sleeping: Callable[..., Clock]) -> None:
    """Beside a host that holds the interpreter parts grow, up to 2 ms; beside an idle one they are small again."""
    clock = sleeping(*[0.006] * 8, 0.0001, 0.0001, 0.006)
    held = Breath(100)
    took, told = [], []
    for part in held.parts(range(12_000)):
        clock.work(len(part) * 0.000_001)
        took.append(round(len(part) * 0.001, 1))
        told.append(held.is_held_up)
    assert took[:6] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert told[:2] == [False, True]
    assert took[9:11] == [0.1, 0.1]
    assert told[9:12] == [False, False, True]


def test_a_small_part_tells_nothing(sleeping: Callable[..., Clock]) -> None:
    """A rest of two items, of which each call's own cost is the most, does not make the next parts small."""
    sleeping()
    held = Breath(100)
    held.took(2, 0.000_05)
    assert held.size == 100


@pytest.mark.parametrize(("each", "size"), [(0.0, 160), (1.0, 1)])
def test_a_clock_that_lies(each: float, size: int, sleeping: Callable[..., Clock]) -> None:
    """One that stands still does not make a part of everything; one that jumps does not stop the work for ever."""
    clock = sleeping()
    held = Breath(10)
    for part in held.parts(range(2_000)):
        assert len(part) <= 160
        clock.work(each)
    assert held.size == size
    for part in held.parts(range(2_000)):
        clock.work(len(part) * 0.000_001)
    assert held.size == 100


def test_waiting_is_no_work(sleeping: Callable[..., Clock]) -> None:
    """A part in which the thread waited, for the interpreter or a core, is not a long one."""
    clock = sleeping()
    held = Breath(100)
    for part in held.parts(range(500)):
        clock.work(len(part) * 0.000_001)
        clock.now += 1.0
    assert held.size == 100


@pytest.mark.parametrize("fills", [False, True])
def test_no_step_is_long(
    database: str, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, fills: bool
) -> None:
    """Between two moments the worker folds, checks, encodes and lets go of few rows, however many there are.

    Only of a queue that fills up it takes more at once: calls refused are worse than a slow loop.
    """
    monkeypatch.setattr(breath, "_LATE", float("inf"))  # the host is idle, whatever the machine is at,
    monkeypatch.setattr(Breath, "took", lambda *_: None)  # and the parts stay as they were at first
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
    watch(Totals, "settle", lambda _, given: len(given[1]))
    watch(delta, "earliest", lambda _, given: len(given[0]))
    monkeypatch.setattr(applier, "earliest", delta.earliest)
    watch(Generation, "release", lambda _, given: len(given[1]))
    kept: list[int] = []

    def let_go(self: Breath, items: list[object]) -> None:
        kept.append(getrefcount(items[0]))
        emptied(self, items)

    emptied = Breath.let_go
    monkeypatch.setattr(Breath, "let_go", let_go)
    number = 3 * COPY_FROM
    with Tracker(
        database, registry=registry, flush_interval=600, max_queue_size=number if fills else 10 * number
    ) as tracker:
        for thread in range(number):
            assert tracker.record_turn(f"thread-{thread}", "agent", 1, 0.1)
        tracker.flush(PATIENCE)
    assert set(longest) == {"drain", "fits_stage", "block", "release", "settle", "earliest"}
    assert (longest.pop("drain") > 2_000) is fills
    assert max(longest.values()) <= 500
    # Each batch's rows are nobody else's when they are let go of: in the list, and on the way here.
    assert len(kept) >= 2
    assert set(kept) == {2}


@pytest.mark.parametrize("how", ["on", "off", "threshold of 0"])
def test_the_collector_meets_few_rows_at_once(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """New rows are looked at as they come, not all of them in one go; a host that has switched it off has it off."""
    monkeypatch.setattr(breath, "_LATE", float("inf"))
    met: list[int] = []
    enabled, thresholds = how == "on", gc.get_threshold()

    def look(phase: str, _: object) -> None:
        if phase == "start" and threading.current_thread().name == "tracker-daemon":
            met.append(len(gc.get_objects(generation=0)))

    gc.callbacks.append(look)
    try:
        if how == "off":
            gc.disable()
        elif not enabled:
            gc.set_threshold(0)
        with Tracker(MemorySink(), registry=registry, flush_interval=600) as tracker:
            for thread in range(20_000):
                assert tracker.record_turn(f"thread-{thread}", "agent", 1, 0.1)
            tracker.flush(PATIENCE)
    finally:
        gc.callbacks.remove(look)
        gc.enable()
        gc.set_threshold(*thresholds)
    assert bool(met) is enabled
    assert len(met) >= 10 * enabled
    assert max(met, default=0) <= 5_000
