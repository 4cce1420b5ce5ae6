"""An exception, or a finalizer, in the middle of a fold: every call counts once."""

from __future__ import annotations

import gc
import threading
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import PATIENCE, wait_until
from tracker_daemon import MemorySink, Tracker
from tracker_daemon.backlog import Backlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry


def _backlog() -> Backlog:
    return Backlog(max_queue_size=100, max_pending=100, max_batch_size=100, create_missing=True)


def test_calls_taken_off_before_an_exception_count_as_folded() -> None:
    """Else `settled` never reaches what a barrier waits for, and a flush that waits hangs for ever."""
    backlog = _backlog()
    for name in ("a", "b"):
        backlog.enter((name, None, 1, 1, 1_000))
    accepted = backlog.accepted
    backlog.queue.put(("c", None, 1, object(), 1_000))  # type: ignore[arg-type]  # stands for a MemoryError
    with pytest.raises(Exception):  # noqa: B017
        backlog.drain(10)
    assert len(backlog.queue) == 1
    assert backlog.folded == accepted


def test_an_exception_after_a_call_is_in_does_not_fold_it_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised where a new thread is counted leaves the call in the queue, and out of the window."""
    backlog = _backlog()
    backlog.enter(("a", None, 1, 1, 1_000))
    with monkeypatch.context() as patched:

        def fail(_: str) -> None:
            raise MemoryError

        patched.setattr(backlog, "_count_in", fail)
        with pytest.raises(MemoryError):
            backlog.drain(10)
    backlog.drain(10)
    found = backlog.pending("a")
    assert found is not None
    assert found.turns == 1
    assert backlog.books().queue_calls == 1


def test_stats_in_a_finalizer_amid_a_fold_has_every_call(registry: CollectorRegistry) -> None:
    """The collector runs in the worker's thread as well, and the lock lets its holder in."""
    tracker = Tracker(MemorySink(), registry=registry, flush_interval=3600, max_queue_size=20_000)
    with tracker:
        tracker.record_turn("first")
        tracker.flush(PATIENCE)
        seen: list[int] = []

        class Garbage:
            def __init__(self) -> None:
                self.me = self

            def __del__(self) -> None:
                if threading.current_thread().name == "tracker-daemon":
                    seen.append(tracker.stats().accepted)
                    Garbage()

        with tracker.backlog.lock:
            for number in range(19_000):
                assert tracker.record_turn(f"t-{number}")
            gc.collect()
            Garbage()
        tracker.flush(PATIENCE)
        wait_until(lambda: seen, "a finalizer in the worker")
        assert min(seen) >= 19_001


def test_a_finalizer_s_call_does_not_wait_for_a_turn() -> None:
    """Amid the worker's fold it holds the lock, for which whoever has the turn may wait: neither would go on."""
    backlog = _backlog()
    backlog.shut_gate()
    has_turn, done = threading.Event(), threading.Event()

    def caller() -> None:
        with backlog._turn:  # as in `enter`, where a signal's handler asks for the numbers
            has_turn.set()
            with backlog.lock:
                done.set()

    with backlog.lock:
        thread = threading.Thread(target=caller, daemon=True)
        thread.start()
        assert has_turn.wait(PATIENCE)
        assert backlog.enter(("a", None, 1, 1, 1_000)) is None
    assert done.wait(PATIENCE)
    thread.join(PATIENCE)


def test_a_busy_worker_is_woken_once(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call at a bound writing to the loop's pipe would cost twenty times the call; whoever waits is heard all the same."""
    with Tracker(MemorySink(), registry=registry, flush_interval=3600) as tracker:
        tracker.record_turn("first")
        tracker.flush(PATIENCE)
        worker, loop = tracker._worker, tracker._worker._loop
        assert loop is not None
        wakings: list[object] = []
        really = loop.call_soon_threadsafe

        def counted(do: Callable[..., object], *arguments: object) -> object:
            wakings.append(do)
            return really(do, *arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        with tracker.backlog.lock:
            worker.wake()
            wait_until(lambda: not worker._woken, "the worker to look, and to stand at the lock")
            wakings.clear()
            for number in range(100):
                tracker.backlog.shut_gate()
                assert tracker.record_turn(f"t-{number}")
            assert len(wakings) == 1
            barrier = worker.barrier()
            assert len(wakings) == 2
        assert barrier.result(PATIENCE)
    assert tracker.stats().applied == 101


def test_what_is_raised_while_a_call_wakes_the_worker(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception of a signal's handler there: the next call wakes it, without a flush."""
    with Tracker(MemorySink(), registry=registry, flush_interval=0.01) as tracker:
        tracker.record_turn("first")
        tracker.flush(PATIENCE)
        wait_until(lambda: not tracker.backlog.places, "an idle worker")
        loop = tracker._worker._loop
        assert loop is not None
        with monkeypatch.context() as patched:

            def interrupted(*_: object) -> None:
                raise KeyboardInterrupt

            patched.setattr(loop, "call_soon_threadsafe", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tracker.record_turn("second")
        assert tracker.record_turn("third")
        wait_until(lambda: tracker.stats().applied == 3, "all calls to be applied")


@pytest.mark.parametrize("at", ["from the lock", "from the turn"])
def test_what_is_raised_behind_an_acquire_leaves_no_lock_held(at: str) -> None:
    """Else no call, or no fold, would ever go on."""
    backlog = _backlog()

    class Interrupted:
        """A lock behind whose taking a signal's handler raises."""

        def __init__(self, lock: Any) -> None:
            self.lock = lock
            self._is_owned, self.release = lock._is_owned, lock.release

        def acquire(self, *, blocking: bool = True) -> bool:
            self.lock.acquire(blocking)
            raise KeyboardInterrupt

    if at == "from the lock":
        backlog.lock = Interrupted(backlog.lock)  # type: ignore[assignment]
    else:
        backlog._raising = Interrupted(backlog._raising)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        backlog.enter(("a", None, 1, 1, 1_000))
    locks = [backlog.lock, backlog._raising, backlog._turn]
    assert not any(lock._is_owned() for lock in locks)  # type: ignore[attr-defined]
    assert len(backlog.queue) == 1, "the call is in"


def test_closed_by_a_handler_while_the_gate_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays shut: what came in then would be counted, and never applied."""
    backlog = _backlog()
    really = Backlog._set_gate

    def closing(self: Backlog, places: int) -> None:
        monkeypatch.undo()
        self.close()
        really(self, places)

    monkeypatch.setattr(Backlog, "_set_gate", closing)
    backlog.open_gate()
    assert backlog.closed
    assert backlog.places == 0


@pytest.mark.parametrize("error", [TimeoutError, RuntimeError, KeyboardInterrupt])
def test_what_a_handler_raises_amid_a_call_reaches_the_caller(
    registry: CollectorRegistry, error: type[BaseException]
) -> None:
    """Right behind the call's taking: it is not taken again, and the exception is not lost."""
    tracker = Tracker(MemorySink(), registry=registry)
    assert tracker.record_turn("t", "a")
    really = tracker.backlog.queue.put

    def interrupted(record: Any) -> None:
        really(record)
        raise error

    tracker.backlog.gate = repeat(interrupted, 10)
    for call in (partial(tracker.record_turn, "t", "a"), partial(tracker.ensure_conversation, "t")):
        with pytest.raises(error):
            call()
    assert tracker.close(PATIENCE).applied == 3
