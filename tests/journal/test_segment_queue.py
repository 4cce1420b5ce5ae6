"""The queue that is a chain of files: every call is read once, in order, in the window whose file it is in."""

from __future__ import annotations

import gc
import sys
import threading
from collections import defaultdict
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.helpers import wait_until, watchdog
from tests.journal.interruptions import Interruption
from tests.journal.rig import NOW, Calls, Rig, header, recovered, small_files
from tracker_daemon.journal import records
from tracker_daemon.journal.records import FRAME, HEADER_SIZE
from tracker_daemon.journal.segment import Segment
from tracker_daemon.journal.segment_queue import SegmentQueue
from tracker_daemon.memory_sink import MemorySink

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tracker_daemon.generation import Record

NOBODY: Final[list[object]] = []
SMALL: Final = HEADER_SIZE + 150
"""A segment for two or three calls."""


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """No test waits for ever."""
    with watchdog(120):
        yield


def new_queue(size: int = SMALL) -> SegmentQueue:
    """Return a queue whose segments are in memory and have *size* bytes, or as many as a call needs."""
    numbers = count(1)

    def make(window: int, needed: int) -> Segment:
        return Segment(header(number=next(numbers), window=window), max(size, HEADER_SIZE + needed), None)

    return SegmentQueue(make, lambda _: None)


def a_call(number: int, thread: str = "t") -> Record:
    """Return a call by its number."""
    return (thread, "a", number, 0.5, NOW + number)


def drained(queue: SegmentQueue, limit: int = 10**6) -> list[Record]:
    """Read what waits, of this window."""
    found: list[Record] = []
    while queue.drain(found.extend, limit, NOBODY, 10**6):
        pass
    return found


def read_segment(segment: Segment) -> list[Record]:
    """Return the calls in a frozen segment, read from its bytes."""
    found, offset = [], HEADER_SIZE
    assert segment.frozen_at is not None
    while offset + FRAME.size <= segment.frozen_at:
        payload = records.payload_at(segment.map, offset, segment.frozen_at)
        assert payload is not None
        item = records.decode(payload)
        assert isinstance(item, tuple)
        found.append(item)
        offset += FRAME.size + len(payload)
    assert offset == segment.frozen_at
    return found


def cut(queue: SegmentQueue) -> tuple[list[Record], list[Segment]]:
    """End the window; return what was not read of it yet, and its segments."""
    queue.cut(queue.prepare_cut())
    rest = drained(queue)
    return rest, queue.take_window()


def test_in_order_through_rolls_and_cuts() -> None:
    """One thread: what goes in comes out, window by window, whatever is read at once."""
    random = Random(1)
    queue = new_queue()
    made: list[Record] = []
    window: list[Record] = []
    ever: list[Record] = []
    for number in range(2_000):
        made.append(a_call(number))
        queue.put(made[-1])
        if random.random() < 0.3:
            queue.drain(window.extend, random.randrange(1, 5), NOBODY, 10**6)
        if random.random() < 0.05:
            rest, segments = cut(queue)
            window += rest
            assert [call for segment in segments for call in read_segment(segment)] == window
            assert len({segment.header.window for segment in segments}) == 1
            ever += window
            window = []
        assert len(queue) == len(made) - len(ever) - len(window)
    assert ever + window + drained(queue) == made
    assert not queue


def test_the_bound_of_the_window() -> None:
    """`drain` stops when the window holds enough; the rest waits."""
    queue, held = new_queue(), list[Any]()
    for number in range(50):
        queue.put(a_call(number))
    assert queue.drain(held.extend, 1_000, held, 7) == 7
    assert (len(held), len(queue)) == (7, 43)
    assert queue.drain(held.extend, 1_000, held, 7) == 0
    assert len(queue.waiting()) == 43


def read_beside(queue: SegmentQueue, calls: int) -> list[tuple[list[Record], list[Segment]]]:
    """Read so many calls while they are made, and end windows in between; return each window and its segments."""
    random, windows = Random(2), []
    while calls:
        window: list[Record] = []
        for _ in range(random.randrange(1, 4)):
            queue.drain(window.extend, random.randrange(1, 200), NOBODY, 10**6)
        rest, segments = cut(queue)
        window += rest
        windows.append((window, segments))
        calls -= len(window)
    return windows


def test_many_threads_beside_the_worker() -> None:
    """Eight threads append while the worker reads, and ends windows: each call once, in its thread's order."""
    queue, each, burst, threads = new_queue(1_000), 3_000, 100, 8
    go = threading.Barrier(threads + 1)
    windows: list[tuple[list[Record], list[Segment]]] = []

    def call(name: str) -> None:
        for number in range(each):
            if not number % burst:
                go.wait()
            queue.put(a_call(number, name))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        callers = [threading.Thread(target=call, args=(f"t{number}",), daemon=True) for number in range(threads)]
        for caller in callers:
            caller.start()
        for _ in range(each // burst):
            go.wait()
            wait_until(lambda: queue.segments, "a call")  # none ends a window that has not begun
            windows += read_beside(queue, burst * threads)
        for caller in callers:
            caller.join()
    finally:
        sys.setswitchinterval(before)
    by_thread = defaultdict(list)
    for window, segments in windows:
        # A segment's calls are read while the window is cut: by then all of them are in.
        assert [call for segment in segments for call in read_segment(segment)] == window
        assert len({segment.header.window for segment in segments}) <= 1
        for call_ in window:
            by_thread[call_[0]].append(call_)
    assert len(by_thread) == threads
    assert all(calls == [a_call(number, name) for number in range(each)] for name, calls in by_thread.items())
    assert drained(queue) == []
    assert not queue
    assert len(windows) > each // burst
    assert sum(len(segments) > 1 for _, segments in windows) > 10


def test_another_thread_amid_a_look() -> None:
    """The collector runs where something is made, and there another thread may: the chain is looked at in one step."""
    queue = new_queue()
    for number in range(200):
        queue.put(a_call(number))

    def other(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            queue._chain.append(queue._chain.pop())

    threshold = gc.get_threshold()
    gc.callbacks.append(other)
    gc.set_threshold(1)
    try:
        for _ in range(50):
            queue._freeze_old()
            assert len(queue.of_window) == len(queue.segments) > 50
            assert len(queue.waiting()) == 200
            assert not queue.is_cut
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(other)


def test_looking_from_another_thread() -> None:
    """`waiting` beside a worker that reads, cuts and lets go never fails, and never shows what is not a call."""
    queue, done = new_queue(), threading.Event()
    problems: list[BaseException] = []

    def look() -> None:
        try:
            while not done.is_set():
                assert all(call[0] == "t" for call in queue.waiting())
        except BaseException as problem:
            problems.append(problem)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    looker = threading.Thread(target=look)
    try:
        looker.start()
        for number in range(6_000):
            queue.put(a_call(number))
            if not number % 5:
                drained(queue, 3)
            if not number % 17:
                for segment in cut(queue)[1]:
                    segment.close()
    finally:
        done.set()
        looker.join()
        sys.setswitchinterval(before)
    assert problems == []


@pytest.mark.parametrize("filled", [0, 1, 2, 3])
def test_a_signal_handler_in_the_middle_of_a_call(filled: int) -> None:
    """Before every instruction of a call, also of one that brings a new file: the handler's call and all others count."""
    number = 0
    while True:
        queue = new_queue()
        first = [a_call(each) for each in range(filled)]
        for call in first:
            queue.put(call)
        interruption = Interruption(number, lambda queue=queue: queue.put(a_call(0, "handler")))  # type: ignore[misc]
        interruption.during(lambda queue=queue: queue.put(a_call(filled)))  # type: ignore[misc]
        if not interruption.happened:
            break
        window = drained(queue)
        later = [a_call(each) for each in range(filled + 1, filled + 8)]
        for call in later:
            queue.put(call)
        window += drained(queue)
        assert [call for call in window if call[0] == "t"] == [*first, a_call(filled), *later]
        assert [call for call in window if call[0] != "t"] == [a_call(0, "handler")]
        assert not queue
        rest, segments = cut(queue)
        assert rest == []
        assert [call for segment in segments for call in read_segment(segment)] == window
        number += 1
    assert number > 10


@pytest.mark.parametrize("filled", [0, 1, 2, 3])
def test_ctrl_c_in_the_middle_of_a_call(filled: int) -> None:
    """Before every instruction of a call: it is there or it is not, and nothing after it is held up or miscounted."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    number, there = 0, set[bool]()
    while True:
        queue = new_queue()
        first = [a_call(each) for each in range(filled)]
        for call in first:
            queue.put(call)
        interruption = Interruption(number, interrupt)
        try:
            interruption.during(lambda queue=queue: queue.put(a_call(-1)))  # type: ignore[misc]
        except KeyboardInterrupt:
            pass
        else:
            break
        window = drained(queue)
        later = [a_call(each) for each in range(filled, filled + 8)]
        for call in later:
            queue.put(call)
        window += drained(queue)
        assert [call for call in window if call != a_call(-1)] == [*first, *later]
        there.add(len(window) > filled + 8)
        assert len(window) <= filled + 9
        assert drained(queue) == []
        assert not queue, "a call that was read still counts"
        rest, segments = cut(queue)
        assert [call for segment in segments for call in read_segment(segment)] == window
        assert rest == []
        number += 1
    assert there == {True, False}


def test_the_count_heals() -> None:
    """A call that was written and not counted, and one that was counted late, leave the length right."""
    queue = new_queue()
    queue._put(records.encode(a_call(1)))
    assert (len(queue), len(queue.waiting())) == (0, 1)
    queue.put(a_call(2))
    assert drained(queue) == [a_call(1), a_call(2)]
    assert len(queue) == 0
    queue._put(records.encode(a_call(3)))
    assert drained(queue) == [a_call(3)]
    queue._count(None)
    assert len(queue) == 1
    assert drained(queue) == []
    assert len(queue) == 0


def test_a_call_larger_than_a_file() -> None:
    """It gets a file of its own."""
    queue = new_queue()
    calls: list[Record] = [a_call(1), ("t", "x" * 40_000, 2, 0.5, NOW), a_call(3)]
    for call in calls:
        queue.put(call)
    assert drained(queue) == calls
    assert [segment.size > 40_000 for segment in queue.segments] == [False, True, False]


def test_a_file_that_is_full_to_the_last_byte() -> None:
    """Its end is found without a mark."""
    size = len(records.encode(a_call(1)))
    queue = new_queue(HEADER_SIZE + 2 * size)
    for number in range(5):
        queue.put(a_call(number))
    assert len(queue.segments) == 3
    rest, segments = cut(queue)
    assert rest == [a_call(number) for number in range(5)]
    assert [len(read_segment(segment)) for segment in segments] == [2, 2, 1]


def test_after_the_end() -> None:
    """What comes after the end goes somewhere, and does not raise."""
    queue = new_queue()
    queue.put(a_call(1))
    left = queue.end()
    assert read_segment(left[0]) == [a_call(1)]
    queue.put(a_call(2))
    assert drained(queue) == [a_call(2)]


def test_a_signal_handler_while_a_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the journal's files: after `kill -9` each call is there once."""
    small_files(monkeypatch)
    number = 0
    while True:
        sink, calls = MemorySink(), Calls()
        rig = Rig(tmp_path / str(number), sink)
        rig.call(calls.next("t" + "x" * 500))
        while rig.journal.queue.segments[-1].size - rig.journal.queue.segments[-1].end > 600:
            rig.call(calls.next("t" + "x" * 500))
        handled = calls.next("handler")
        interruption = Interruption(number, lambda rig=rig, call=handled: rig.journal.queue.put(call))  # type: ignore[misc]
        one = calls.next("u" * 500)
        interruption.during(lambda rig=rig, call=one: rig.journal.queue.put(call))  # type: ignore[misc]
        if not interruption.happened:
            rig.crash()
            break
        if number % 2:
            rig.flush()
        rig.call(calls.next("handler"))
        rig.crash()
        recovered(tmp_path / str(number), sink)
        assert Calls.counted(sink.rows) == calls.made
        number += 7
    assert number > 100
