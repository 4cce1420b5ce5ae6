"""How a tracker ends: close and aclose, their deadlines and reports; and the barrier beside them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from prometheus_client import CollectorRegistry

from tests.helpers import (
    GatedSink,
    Trackers,
    balanced,
    deaf_listener,
    ledger,
    many_turns,
    query,
    refusing_port,
    turns,
    wait_until,
    watchdog,
)
from tracker_daemon import DrainReport, FlushTimeout, InvalidCall, MemorySink, TrackerClosed, TrackerError, host
from tracker_daemon.sink import LedgerMissing, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied

LONG = 60.0
"""A window that no test waits for: what is written in it was written by a barrier or a close."""


@pytest.fixture
def trackers() -> Iterator[Trackers]:
    """Make trackers; none outlives the test."""
    with watchdog(30):
        made = Trackers()
        yield made
        made.close()


def in_threads(number: int, target: Callable[[], Any]) -> list[Any]:
    """Run *target* in that many threads at once; return what each returned."""
    start, results = threading.Barrier(number), []

    def run() -> None:
        start.wait()
        results.append(target())

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# -- the report ------------------------------------------------------------------------------------


def test_close_reports_what_was_pending(trackers: Trackers) -> None:
    """The report counts the calls that were pending at close, not those flushed before."""
    tracker = trackers(MemorySink(), flush_interval=LONG)
    many_turns(tracker, 5)
    tracker.flush()
    many_turns(tracker, 12)
    assert tracker.close() == DrainReport(applied=12, dead_lettered=0, journaled=0, lost=0)
    assert (tracker.stats().accepted, tracker.stats().applied) == (17, 17)


def test_close_again(trackers: Trackers) -> None:
    """Further closes return the same report, whichever of the two forms they take."""
    tracker = trackers(MemorySink(), flush_interval=LONG)
    many_turns(tracker, 12)
    first = tracker.close()
    assert first.applied == 12
    assert tracker.close() == tracker.close(0) == asyncio.run(tracker.aclose()) == first


def test_close_of_one_never_used(trackers: Trackers) -> None:
    """A tracker without a call starts no thread to end."""
    before = set(threading.enumerate())
    tracker = trackers(MemorySink())
    assert tracker.close() == DrainReport()
    assert set(threading.enumerate()) <= before
    assert tracker.record_turn("t") is False


def test_close_of_one_entered_and_not_used(trackers: Trackers) -> None:
    """`with` starts the thread; without a call there is nothing to drain."""
    sink = MemorySink()
    with trackers(sink) as tracker:
        pass
    assert tracker.close() == DrainReport()
    assert sink.batches == []


def test_with_block_that_raises(trackers: Trackers) -> None:
    """The exception passes, and the calls before it are drained."""
    sink = GatedSink()
    sink.let_through()

    def fail() -> None:
        with trackers(sink, flush_interval=LONG) as tracker:
            many_turns(tracker, 12)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sink.turns == 12


def test_eight_closes_at_once(trackers: Trackers) -> None:
    """Closes from many threads wait for one drain and return one report."""
    sink = GatedSink()
    sink.let_through()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 500)
    reports = in_threads(8, tracker.close)
    assert reports == [DrainReport(applied=500)] * 8
    assert sink.turns == 500


def test_close_marks_the_ledger(trackers: Trackers, database: str) -> None:
    """A clean close says so in the ledger, so that the row can be collected."""
    tracker = trackers(database, flush_interval=LONG)
    many_turns(tracker, 12)
    tracker.close()
    assert turns(database) == 12
    assert query(database, "SELECT applied_sequence, closed_at IS NOT NULL FROM tracker_ledger") == [(1, True)]


# -- deadlines -------------------------------------------------------------------------------------


class DeafSink(MemorySink):
    """Its `apply` never returns."""

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        del batch
        await anyio.sleep_forever()
        raise AssertionError


class StubbornSink(MemorySink):
    """Its `apply` never returns, and does not let itself be cancelled."""

    released = False

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        with anyio.CancelScope(shield=True):
            while not self.released:  # noqa: ASYNC110 - set from another thread
                await anyio.sleep(0.01)
        return await super().apply(batch)


class BlockingSink(MemorySink):
    """Its `apply` blocks the worker's own thread."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        self.release.wait()
        return await super().apply(batch)


class FailingSink(MemorySink):
    """Its `apply` fails each time, with what it was given."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        del batch
        raise self.error


class Stop(BaseException):
    """What no `except Exception` holds."""


HOPELESS = {
    "never answers": DeafSink,
    "cannot be opened": lambda: "postgresql://nobody@127.0.0.1:1/x?connect_timeout=2",
    "fails": lambda: FailingSink(SinkFault("connection", "refused")),
    "fails for a standing reason": lambda: FailingSink(SinkFault("schema", "no table")),
    "fails for no reason": lambda: FailingSink(RuntimeError("a bug")),
    "stops the worker": lambda: FailingSink(Stop()),
    "is final": lambda: FailingSink(LedgerMissing("p", 0)),
}


@pytest.mark.parametrize("make_sink", HOPELESS.values(), ids=HOPELESS.keys())
@pytest.mark.parametrize("seconds", [0, 0.2])
def test_deadline_with_a_hopeless_sink(trackers: Trackers, make_sink: Callable[[], Any], seconds: float) -> None:
    """Whatever the sink does, close ends by its deadline and counts every pending call as lost."""
    tracker = trackers(make_sink(), flush_interval=0.001)
    many_turns(tracker, 12)
    with watchdog(5):
        assert tracker.close(seconds) == DrainReport(lost=12)
    stats = tracker.stats()
    assert (stats.accepted, stats.lost, stats.pending) == (12, 12, 0)
    assert tracker.pending("t1") is None


def test_deadline_with_a_sink_that_blocks_the_worker(trackers: Trackers) -> None:
    """A worker that cannot even look at the clock is given up, and what it finishes later is not counted twice."""
    sink = BlockingSink()
    tracker = trackers(sink, flush_interval=0.001)
    many_turns(tracker, 12)
    with watchdog(5):
        assert tracker.close(0.2) == DrainReport(lost=12)
    sink.release.set()
    wait_until(lambda: sink.batches, "the late answer")
    stats = tracker.stats()
    assert (stats.accepted, stats.applied, stats.lost, stats.pending) == (12, 0, 12, 0)


def test_deadline_with_a_sink_that_is_not_cancelled(trackers: Trackers) -> None:
    """A sink that shields itself holds up its own thread only."""
    sink = StubbornSink()
    tracker = trackers(sink, flush_interval=0.001)
    many_turns(tracker, 12)
    with watchdog(5):
        assert tracker.close(0.2) == DrainReport(lost=12)
    sink.released = True
    assert balanced(tracker.stats())


def test_deadline_with_a_deaf_server(trackers: Trackers) -> None:
    """A server that takes the connection and stays silent does not hold up close."""
    with deaf_listener() as port:
        tracker = trackers(f"postgresql://nobody@127.0.0.1:{port}/x", flush_interval=0.001)
        many_turns(tracker, 12)
        with watchdog(5):
            assert tracker.close(0.3) == DrainReport(lost=12)


def test_deadline_while_connecting_is_refused(trackers: Trackers) -> None:
    """A server that is not there is tried until the deadline; the wait between tries does not pass it."""
    with refusing_port() as port:
        tracker = trackers(f"postgresql://nobody@127.0.0.1:{port}/x", flush_interval=0.001)
        many_turns(tracker, 12)
        with watchdog(5):
            assert tracker.close(0.3) == DrainReport(lost=12)


def test_deadline_with_a_stopped_server(trackers: Trackers, database: str) -> None:
    """A server process that is stopped in mid-connection does not hold up close; what it had committed stays."""
    tracker = trackers(database, flush_interval=0.01)
    many_turns(tracker, 12)
    tracker.flush()
    [(backend,)] = query(
        database,
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'tracker-daemon' AND datname = current_database()",
    )
    os.kill(backend, signal.SIGSTOP)
    try:
        many_turns(tracker, 30)
        with watchdog(6):
            report = tracker.close(0.3)
        # What was on its way may get there at the last moment, on a new connection: all of it, or nothing.
        assert (report.applied, report.lost) in ((0, 30), (30, 0))
        stats = tracker.stats()
        assert (stats.accepted, stats.applied, stats.lost) == (42, 12 + report.applied, report.lost)
        assert stats.applied <= turns(database)
        assert turns(database) in (12, 42)
    finally:
        os.kill(backend, signal.SIGCONT)


def test_report_adds_up_when_cut_short(trackers: Trackers) -> None:
    """With a part applied before the deadline, applied and lost add up to what was pending."""

    class TwoBatches(GatedSink):
        async def apply(self, batch: Batch) -> Applied:
            if len(self.batches) < 2:
                return await MemorySink.apply(self, batch)
            return await super().apply(batch)

    sink = TwoBatches()
    tracker = trackers(sink, flush_interval=LONG, max_batch_size=3)
    many_turns(tracker, 70, threads=10)
    report = tracker.close(0.3)
    # How many calls were in the two batches depends on when the window was sealed.
    assert report.applied == sink.turns
    assert 0 < report.applied < 70
    assert report == DrainReport(applied=report.applied, lost=70 - report.applied)


def test_close_at_once_of_what_is_flushed(trackers: Trackers) -> None:
    """close(0) loses nothing when nothing is pending."""
    tracker = trackers(MemorySink())
    many_turns(tracker, 12)
    tracker.flush()
    assert tracker.close(0) == DrainReport()
    assert tracker.stats().applied == 12


def test_close_at_once_after_a_call(trackers: Trackers) -> None:
    """close(0) right behind the first calls counts each of them once, whatever the worker had begun."""
    for _ in range(30):
        sink = GatedSink()
        sink.let_through()
        tracker = trackers(sink, flush_interval=0.001)
        accepted = many_turns(tracker, 12)
        report = tracker.close(0)
        stats = tracker.stats()
        assert accepted == stats.accepted == stats.applied + stats.lost
        assert stats.lost == report.lost
        assert sink.turns >= stats.applied


def test_earlier_deadline_cuts_the_drain_short(trackers: Trackers) -> None:
    """A second close with less time ends the first one too."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)
    reports: list[DrainReport] = []
    patient = threading.Thread(target=lambda: reports.append(tracker.close(LONG)))
    patient.start()
    assert sink.arrived.wait(10)
    with watchdog(5):
        assert tracker.close(0.05) == DrainReport(lost=12)
        patient.join()
    assert reports == [DrainReport(lost=12)]


def test_later_deadline_does_not_lengthen_the_drain(trackers: Trackers) -> None:
    """A second close with more time keeps to the first one's deadline."""
    tracker = trackers(DeafSink(), flush_interval=LONG)
    many_turns(tracker, 12)
    impatient = threading.Thread(target=tracker.close, args=(0.2,))
    impatient.start()
    wait_until(lambda: tracker.closed)
    with watchdog(5):
        assert tracker.close(LONG) == DrainReport(lost=12)
    impatient.join()


def test_interrupted_close(trackers: Trackers) -> None:
    """Ctrl-C ends the waiting, not the drain: a further close goes on with it."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)

    def interrupt() -> None:
        sink.arrived.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        tracker.close()
    thread.join()
    sink.let_through()
    assert tracker.close() == DrainReport(applied=12)


# -- calls at and after the end --------------------------------------------------------------------


def test_calls_after_close(trackers: Trackers) -> None:
    """They are refused and counted as such."""
    tracker = trackers(MemorySink())
    many_turns(tracker, 12)
    tracker.close()
    assert tracker.ensure_conversation("t") is False
    assert tracker.record_turn("t", "a", 1, 0.5) is False
    assert tracker.resolve("t", "done") is False
    stats = tracker.stats()
    assert (stats.accepted, stats.rejected, stats.pending) == (12, 3, 0)


def test_calls_after_close_raise_if_asked_to(trackers: Trackers) -> None:
    """With overflow="raise" a refused call is an exception; a malformed one is still told so."""
    tracker = trackers(MemorySink(), overflow="raise")
    tracker.close()
    for call in (
        lambda: tracker.ensure_conversation("t"),
        lambda: tracker.record_turn("t"),
        lambda: tracker.resolve("t", "done"),
    ):
        with pytest.raises(TrackerClosed):
            call()
    with pytest.raises(InvalidCall):
        tracker.record_turn("")
    assert tracker.stats().rejected == 4


@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("deadline", [20.0, 0.0])
def test_close_beside_calls(trackers: Trackers, deadline: float, attempt: int) -> None:
    """Every call that returned True beside a close is applied or counted as lost, and none after it is taken."""
    del attempt  # threads meet differently each time
    sink = GatedSink()
    sink.let_through()
    tracker = trackers(sink, flush_interval=0.01)
    begun = threading.Barrier(4)

    def hammer() -> int:
        accepted = 0
        begun.wait()
        while not tracker.closed:
            accepted += tracker.record_turn(f"t{accepted % 50}")
        return accepted

    reports: list[DrainReport] = []

    def end() -> None:
        wait_until(lambda: tracker.stats().accepted > 100)
        reports.append(tracker.close(deadline))

    closer = threading.Thread(target=end)
    closer.start()
    counts = in_threads(4, hammer)
    closer.join()
    assert [tracker.record_turn("late") for _ in range(10)] == [False] * 10
    stats = tracker.stats()
    assert sum(counts) == stats.accepted == stats.applied + stats.lost
    assert stats.pending == 0
    assert sink.turns == stats.applied
    if deadline:
        assert (reports[0].lost, stats.lost) == (0, 0)


def test_close_beside_calls_on_postgres(trackers: Trackers, database: str) -> None:
    """The table has what the books say was applied."""
    tracker = trackers(database, flush_interval=0.01)
    pause = threading.Event()

    def hammer() -> int:
        accepted = 0
        while not tracker.closed:
            accepted += many_turns(tracker, 100)
            pause.wait(0.0005)
        return accepted

    def end() -> None:
        wait_until(lambda: tracker.stats().applied > 0)
        tracker.close()

    closer = threading.Thread(target=end)
    closer.start()
    counts = in_threads(4, hammer)
    closer.join()
    stats = tracker.stats()
    assert sum(counts) == stats.accepted == stats.applied + stats.lost
    assert turns(database) == stats.applied


@pytest.mark.parametrize("opens", ["open_gate", "enter"])
def test_no_way_in_opens_after_close(trackers: Trackers, opens: str) -> None:
    """The worker or a caller that was about to let calls in when close came does not let them in after it."""
    tracker = trackers(GatedSink(), flush_interval=LONG)
    backlog = tracker._backlog
    open_now = getattr(backlog, opens)
    about_to = threading.Event()

    def late(*arguments: Any, **options: Any) -> Any:
        about_to.set()
        wait_until(lambda: tracker._worker.closed and not backlog.places)
        return open_now(*arguments, **options)

    setattr(backlog, opens, late)
    caller = threading.Thread(target=tracker.record_turn, args=("t",))
    caller.start()
    assert about_to.wait(10)
    tracker.close(0.3)
    caller.join()
    wait_until(tracker._worker.finished.done)
    setattr(backlog, opens, open_now)
    assert tracker.record_turn("t") is False
    stats = tracker.stats()
    # The call that came beside close was taken and lost, or refused.
    assert (stats.accepted + stats.rejected, stats.pending) == (2, 0)
    assert balanced(stats)


# -- the worker's own thread -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flush", "close"])
def test_waiting_in_the_workers_thread(trackers: Trackers, name: str) -> None:
    """A flush or close in on_error would wait for itself: it raises instead."""
    raised: list[BaseException] = []

    def on_error(_: BaseException) -> None:
        try:
            getattr(tracker, name)()
        except TrackerError as error:
            raised.append(error)

    tracker = trackers(FailingSink(SinkFault("connection", "refused")), flush_interval=0.001, on_error=on_error)
    tracker.record_turn("t")
    wait_until(lambda: raised)
    assert f"{name}() was called in the worker's own thread" in str(raised[0])
    assert tracker.closed is False


def test_calls_in_the_workers_thread(trackers: Trackers) -> None:
    """on_error may make calls: they are taken like any other."""
    sink = FailingSink(SinkFault("connection", "refused"))
    taken: list[bool] = []

    def on_error(_: BaseException) -> None:
        if len(taken) < 5:
            taken.append(tracker.record_turn("errors"))

    tracker = trackers(sink, flush_interval=0.001, on_error=on_error)
    tracker.record_turn("t")
    wait_until(lambda: len(taken) == 5)
    stats = tracker.stats()
    assert taken == [True] * 5
    assert (stats.accepted, stats.pending) == (6, 6)


# -- the barrier -----------------------------------------------------------------------------------


def test_flush_in_vain(trackers: Trackers) -> None:
    """It says how many calls wait and why, and nothing is lost: they are flushed later."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)
    with pytest.raises(FlushTimeout, match="12 calls are still pending") as raised:
        tracker.flush(0.05)
    assert isinstance(raised.value, TimeoutError)
    assert raised.value.pending == 12
    assert raised.value.waited >= 0.05
    assert tracker.stats().pending == 12
    sink.let_through()
    tracker.flush()
    assert (tracker.stats().applied, sink.turns) == (12, 12)


def test_flush_in_vain_names_the_cause(trackers: Trackers) -> None:
    """The sink's last error is the timeout's cause."""
    sink = FailingSink(SinkFault("auth", "password authentication failed"))
    tracker = trackers(sink, flush_interval=0.001)
    tracker.record_turn("t")
    wait_until(lambda: tracker._numbers.last_error)
    with pytest.raises(FlushTimeout, match="password authentication failed") as raised:
        tracker.flush(0.01)
    assert raised.value.__cause__ is sink.error


def test_flushes_in_vain_leave_nothing_behind(trackers: Trackers) -> None:
    """A server that polls flush while the database is away does not fill the memory with waiters."""
    tracker = trackers(GatedSink(), flush_interval=LONG)
    tracker.record_turn("t")
    for _ in range(200):
        with pytest.raises(FlushTimeout):
            tracker.flush(0)
    wait_until(lambda: len(tracker._worker._barriers) < 10)


def test_flush_beside_a_stream_of_calls(trackers: Trackers) -> None:
    """The barrier holds for what was called before it, however many calls follow."""
    sink = GatedSink()
    sink.let_through()
    tracker = trackers(sink, flush_interval=0.005)
    done = threading.Event()

    def stream() -> None:
        while not done.is_set():
            if not tracker.record_turn("other"):
                done.wait(0.001)  # the queue is full

    threads = [threading.Thread(target=stream) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 6):
            wait_until(lambda: tracker.record_turn("mine"))
            tracker.flush(20)
            assert sink.rows["mine"].turn_count == number
    finally:
        done.set()
        for thread in threads:
            thread.join()
    tracker.close()
    assert tracker.stats().accepted == tracker.stats().applied == sink.turns


def test_many_flushes_at_once(trackers: Trackers, database: str) -> None:
    """Barriers from many threads each see their own calls in the table."""
    tracker = trackers(database, flush_interval=LONG)
    names = iter(range(8))

    def work() -> bool:
        name = f"t{next(names)}"
        seen = []
        for number in range(1, 4):
            tracker.record_turn(name)
            tracker.flush(20)
            [(count,)] = query(database, f"SELECT turn_count FROM conversations WHERE thread_id = '{name}'")
            seen.append(count == number)
        return all(seen)

    assert in_threads(8, work) == [True] * 8


def test_flush_of_what_close_gave_up(trackers: Trackers) -> None:
    """A barrier never says that calls are applied which a close beside it has lost."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            tracker.flush()
        except TrackerError as error:
            raised.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert sink.arrived.wait(10)
    assert tracker.close(0.05) == DrainReport(lost=12)
    waiter.join()
    assert [type(error) for error in raised] == [FlushTimeout]


def test_flush_after_close(trackers: Trackers) -> None:
    """With everything applied there is nothing to wait for."""
    tracker = trackers(MemorySink())
    many_turns(tracker, 12)
    tracker.close()
    tracker.flush()
    asyncio.run(tracker.aflush())


# -- several trackers ------------------------------------------------------------------------------


def test_two_trackers(trackers: Trackers, database: str) -> None:
    """They are apart: two producers, and the end of one is not the other's."""
    registry = CollectorRegistry()
    one, other = (trackers(database, flush_interval=LONG, registry=registry) for _ in range(2))
    many_turns(one, 12)
    many_turns(other, 30)
    assert one.close() == DrainReport(applied=12)
    assert many_turns(other, 5) == 5
    assert other.close() == DrainReport(applied=35)
    assert turns(database) == 47
    assert len(ledger(database)) == 2
    assert registry.get_sample_value("tracker_calls_applied_total", {"call": "record_turn"}) == 47


def test_two_trackers_on_one_sink(trackers: Trackers) -> None:
    """A sink that is handed to two trackers keeps their ledgers apart."""
    sink = GatedSink()
    sink.let_through()
    one, other = trackers(sink, flush_interval=LONG), trackers(sink, flush_interval=LONG)
    many_turns(one, 12)
    many_turns(other, 30)
    one.close()
    other.close()
    assert sink.turns == 42
    assert len(sink.ledger) == 2


def test_a_signal_that_comes_right_before_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not break the wait off; its handler runs soon all the same, not when the wait is over."""
    future: Future[None] = Future()
    handled = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: (handled.set(), future.set_result(None)))
    really = future.result
    waits: list[float] = []

    def blocking(timeout: float) -> None:
        waits.append(timeout)
        if len(waits) == 1:
            # As if nobody heard it: the handler waits for the main thread's next step in Python.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            os.kill(os.getpid(), signal.SIGUSR1)
            try:
                really(timeout)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        really(timeout)

    monkeypatch.setattr(future, "result", blocking)
    try:
        host.result(future, 60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled.is_set()
    assert max(waits) < 1
    with pytest.raises(TimeoutError):
        host.result(Future(), 0.01)
