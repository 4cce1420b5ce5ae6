"""Inside a host's event loop: asyncio and trio alike, cancellation, signal handlers, finalizers; and the old interface."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import signal
import sys
import threading
import weakref
from contextlib import contextmanager
from decimal import Decimal
from random import Random
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from psycopg_pool import AsyncConnectionPool

from tests.helpers import GatedSink, Trackers, balanced, many_turns, query, refusing_port, turns, wait_until, watchdog
from tests.test_close import DeafSink
from tracker_daemon import (
    ConversationTrackerProtocol,
    DrainReport,
    FlushTimeout,
    InvalidCall,
    MemorySink,
    NoOpConversationTracker,
    PostgresConversationTracker,
    Tracker,
    TrackerClosed,
    WriteBehindConversationTracker,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied

LONG = 60.0
"""A window that no test waits for."""


@pytest.fixture
def trackers() -> Iterator[Trackers]:
    """Make trackers; none outlives the test."""
    with watchdog(40):
        made = Trackers()
        yield made
        made.close()


@pytest.fixture
def unwatched() -> Iterator[Trackers]:
    """Make trackers, for tests that use the watchdog's signal themselves."""
    made = Trackers()
    yield made
    made.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait for *condition*, letting the loop run."""
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - another thread brings it about
            await anyio.sleep(0.002)


# -- both loops ------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_async_with(trackers: Trackers, database: str) -> None:
    """The block's calls are in the table after a flush, and after the block."""
    async with trackers(database, flush_interval=LONG) as tracker:
        many_turns(tracker, 12)
        await tracker.aflush()
        assert turns(database) == 12
        many_turns(tracker, 30)
    assert turns(database) == 42
    assert tracker.closed


@pytest.mark.anyio
async def test_async_with_that_raises(trackers: Trackers) -> None:
    """The exception passes, and the calls before it are drained."""
    sink = GatedSink()
    sink.let_through()

    async def fail() -> None:
        async with trackers(sink, flush_interval=LONG) as tracker:
            many_turns(tracker, 12)
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert sink.turns == 12


@pytest.mark.anyio
async def test_lifespan(trackers: Trackers) -> None:
    """The lifespan of an ASGI application is the tracker's."""
    sink = GatedSink()
    sink.let_through()
    tracker = trackers(sink, flush_interval=LONG)
    app = FastAPI(lifespan=tracker.lifespan)

    @app.post("/{thread}")
    async def turn(thread: str) -> bool:
        return tracker.record_turn(thread)

    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=ASGITransport(app), base_url="http://x") as client,
    ):
        for _ in range(5):
            assert (await client.post("/t")).json() is True
        assert sink.batches == []
    assert (sink.turns, tracker.closed) == (5, True)


@pytest.mark.anyio
async def test_aflush_in_vain(trackers: Trackers) -> None:
    """It raises at its deadline, and nothing is lost."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)
    for seconds in (0, 0.02):
        with pytest.raises(FlushTimeout, match="12 calls"):
            await tracker.aflush(seconds)
    sink.let_through()
    await tracker.aflush()
    assert (sink.turns, tracker.stats().applied) == (12, 12)


@pytest.mark.anyio
async def test_aflush_of_many_tasks(trackers: Trackers) -> None:
    """Each task's barrier holds for its own calls."""
    sink = GatedSink()
    sink.let_through()
    tracker = trackers(sink, flush_interval=0.01)

    async def work(name: str) -> None:
        for number in range(1, 6):
            tracker.record_turn(name)
            await tracker.aflush(20)
            assert sink.rows[name].turn_count == number

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(work, f"t{number}")
    await tracker.aclose()
    assert sink.turns == 100


@pytest.mark.anyio
async def test_aclose_of_many_tasks(trackers: Trackers) -> None:
    """All get the one report."""
    tracker = trackers(MemorySink(), flush_interval=LONG)
    many_turns(tracker, 12)
    reports: list[DrainReport] = []

    async def work() -> None:
        reports.append(await tracker.aclose())

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(work)
    assert reports == [DrainReport(applied=12)] * 8


@pytest.mark.anyio
async def test_aclose_at_its_deadline(trackers: Trackers) -> None:
    """It returns by then, and counts what is lost."""
    tracker = trackers(DeafSink(), flush_interval=LONG)
    many_turns(tracker, 12)
    with anyio.fail_after(5):
        assert await tracker.aclose(0.1) == DrainReport(lost=12)
    assert balanced(tracker.stats())


@pytest.mark.anyio
async def test_host_is_not_blocked_while_postgres_is_away(trackers: Trackers) -> None:
    """With the server unreachable the host's loop goes on: through calls, a flush and the drain."""
    ticks = {"calls": 0, "aflush": 0, "aclose": 0}
    phase = "calls"

    async def tick() -> None:
        while True:
            ticks[phase] += 1
            await anyio.sleep(0.001)

    with refusing_port() as port:
        tracker = trackers(f"postgresql://nobody@127.0.0.1:{port}/x", flush_interval=0.001)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            while ticks["calls"] < 20 or not tracker._numbers.last_error:
                assert tracker.record_turn("t")
                await anyio.sleep(0.001)
            phase = "aflush"
            with pytest.raises(FlushTimeout):
                await tracker.aflush(0.3)
            phase = "aclose"
            report = await tracker.aclose(0.3)
            tasks.cancel_scope.cancel()
    assert report.lost == tracker.stats().accepted
    assert min(ticks.values()) >= 20


@pytest.mark.anyio
async def test_calls_from_everywhere(trackers: Trackers, database: str) -> None:
    """Tasks, worker threads of the loop and plain threads call the same tracker: the total is exact."""
    tracker = trackers(database, flush_interval=0.01)
    accepted: list[int] = []

    async def task() -> None:
        for _ in range(20):
            accepted.append(many_turns(tracker, 20))
            await anyio.lowlevel.checkpoint()

    def work() -> None:
        accepted.extend(many_turns(tracker, 20) for _ in range(20))

    plain = [threading.Thread(target=work) for _ in range(3)]
    for thread in plain:
        thread.start()
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(task)
            tasks.start_soon(anyio.to_thread.run_sync, work)
    for thread in plain:
        await anyio.to_thread.run_sync(thread.join)
    assert (await tracker.aclose()).lost == 0
    assert sum(accepted) == turns(database) == 9 * 400


# -- cancellation ----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_aflush_cancelled(trackers: Trackers) -> None:
    """Only the waiting ends: the calls are flushed, and nothing is left behind."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(tracker.aflush)
        await until(sink.arrived.is_set)
        tasks.cancel_scope.cancel()
    assert len(tracker._worker._barriers) == 0
    assert tracker.stats().pending == 12
    sink.let_through()
    await tracker.aflush()
    assert sink.turns == 12


@pytest.mark.anyio
async def test_aflush_cancelled_beforehand(trackers: Trackers) -> None:
    """In a scope that is cancelled already it does not wait, and loses nothing."""
    tracker = trackers(MemorySink(), flush_interval=LONG)
    many_turns(tracker, 12)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await tracker.aflush()
    assert scope.cancelled_caught
    await tracker.aflush()
    assert tracker.stats().applied == 12


@pytest.mark.anyio
@pytest.mark.parametrize("beforehand", [True, False])
async def test_aclose_cancelled(trackers: Trackers, *, beforehand: bool) -> None:
    """The drain goes on to its end, then the cancellation takes effect."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)
    went_on = False

    async def end() -> None:
        nonlocal went_on
        await tracker.aclose()
        went_on = True

    async with anyio.create_task_group() as outer:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                if beforehand:
                    scope.cancel()
                tasks.start_soon(end)
                with anyio.CancelScope(shield=True):
                    await until(sink.arrived.is_set)
                    scope.cancel()
                    outer.start_soon(anyio.to_thread.run_sync, sink.let_through)
    assert scope.cancelled_caught
    assert not went_on
    assert (sink.turns, tracker.stats().applied) == (12, 12)


@pytest.mark.anyio
async def test_aclose_cancelled_before_its_deadline(trackers: Trackers) -> None:
    """A cancellation does not lengthen the drain: at the deadline the rest is counted as lost."""
    tracker = trackers(DeafSink(), flush_interval=LONG)
    many_turns(tracker, 12)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await tracker.aclose(0.1)
    assert scope.cancelled_caught
    assert tracker.close() == DrainReport(lost=12)


@pytest.mark.anyio
async def test_cancelled_block(trackers: Trackers) -> None:
    """A timeout around `async with` drains as well."""
    sink = GatedSink()
    sink.let_through()
    with anyio.move_on_after(0.02) as scope:
        async with trackers(sink, flush_interval=LONG) as tracker:
            many_turns(tracker, 12)
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert sink.turns == 12


@pytest.mark.parametrize("times", [1, 2, 3])
def test_aclose_with_task_cancel(trackers: Trackers, times: int) -> None:
    """`asyncio.Task.cancel`, once or again and again, waits for the drain; then the task is cancelled."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)

    async def main() -> None:
        task = asyncio.create_task(tracker.aclose())
        await until(sink.arrived.is_set)
        for _ in range(times):
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not task.done()
        sink.let_through()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(main())
    assert (sink.turns, tracker.close()) == (12, DrainReport(applied=12))


def test_aclose_of_a_task_cancelled_before_it_ran(trackers: Trackers) -> None:
    """Such a task never gets to aclose: the tracker is as it was."""
    tracker = trackers(MemorySink(), flush_interval=LONG)
    many_turns(tracker, 12)

    async def main() -> None:
        task = asyncio.create_task(tracker.aclose())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not tracker.closed
    assert tracker.close() == DrainReport(applied=12)


def test_aclose_in_asyncio_timeout(trackers: Trackers) -> None:
    """A timeout around aclose becomes TimeoutError once the drain is done."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(0.02) as limit:
            loop.call_at((limit.when() or 0) + 0.05, sink.let_through)
            await tracker.aclose()

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert (sink.turns, tracker.close()) == (12, DrainReport(applied=12))


def test_interrupted_asyncio_host(trackers: Trackers) -> None:
    """Ctrl-C in `asyncio.run` cancels the main task, whose `async with` drains."""
    sink = GatedSink()
    sink.let_through()

    async def main() -> None:
        async with trackers(sink, flush_interval=LONG) as tracker:
            many_turns(tracker, 12)
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(LONG)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert sink.turns == 12


def test_interrupted_trio_host(trackers: Trackers) -> None:
    """Ctrl-C in `trio.run`, too."""
    sink = GatedSink()
    sink.let_through()

    async def main() -> None:
        async with trackers(sink, flush_interval=LONG) as tracker:
            many_turns(tracker, 12)
            signal.raise_signal(signal.SIGINT)
            await trio.sleep(LONG)

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert sink.turns == 12


@pytest.mark.anyio
async def test_waiters_at_the_same_time_as_the_end(trackers: Trackers) -> None:
    """Cancelling waiters just when their barrier is reached wakes nobody wrongly and loses nothing."""
    sink = GatedSink()
    sink.let_through()
    tracker = trackers(sink, flush_interval=LONG)
    random = Random(7)
    for _ in range(40):
        many_turns(tracker, 3)
        with anyio.move_on_after(random.uniform(0, 0.004)):
            await tracker.aflush()
    await tracker.aclose()
    assert (sink.turns, tracker.stats().applied) == (120, 120)


RUNS: dict[str, Callable[[Callable[[], Coroutine[Any, Any, None]]], None]] = {
    "asyncio": lambda main: asyncio.run(main()),
    "trio": trio.run,
}


@pytest.mark.parametrize("backend", RUNS)
def test_host_loop_ends_before_the_flush(trackers: Trackers, backend: str) -> None:
    """A loop that is gone when its flush is done disturbs nobody: the worker goes on."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)

    async def main() -> None:
        with anyio.move_on_after(0.02):
            await tracker.aflush()

    RUNS[backend](main)
    sink.let_through()
    tracker.flush()
    many_turns(tracker, 3)
    assert tracker.close() == DrainReport(applied=3)
    assert sink.turns == 15


def test_host_loop_closed_under_a_waiter(trackers: Trackers) -> None:
    """A loop closed with a waiter still in it (its program gave up) does not stop the worker."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=LONG)
    many_turns(tracker, 12)
    loop = asyncio.new_event_loop()
    waiter = tracker.aflush()
    task = loop.create_task(waiter)
    loop.run_until_complete(until(sink.arrived.is_set))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    sink.let_through()
    tracker.flush()
    assert tracker.close() == DrainReport()
    assert sink.turns == 12
    del task, waiter


# -- signal handlers and finalizers ----------------------------------------------------------------


@contextmanager
def interrupting(handler: Callable[[], object], every: float = 0.000_3) -> Iterator[None]:
    """Run *handler* in the main thread, wherever that is, every so many seconds; it interrupts itself, too."""
    under_way: list[None] = []

    def interrupt(*_: object) -> None:
        if len(under_way) < 3:  # else the machine is slow: those may end first
            under_way.append(None)
            handler()
            under_way.pop()

    # Coverage takes a lock at each line. A handler that interrupts this thread while it holds that one waits for the
    # backlog's, and the worker, which has it, for coverage's: for ever.
    tracer = sys.gettrace()
    sys.settrace(None)
    # The watchdog's signal is taken: a hang is ended by the interpreter.
    faulthandler.dump_traceback_later(300, exit=True)
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, every, every)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        # One that is on its way in another thread may still arrive.
        signal.signal(signal.SIGALRM, lambda *_: None)
        faulthandler.cancel_dump_traceback_later()
        sys.settrace(tracer)


def test_calls_in_a_signal_handler(unwatched: Trackers, database: str) -> None:
    """A handler that interrupts the main thread's own calls, thousands of times, loses and doubles nothing."""
    tracker = unwatched(database, flush_interval=0.02)
    taken: list[bool] = []  # handlers interrupt each other: a count would not be exact

    def handler() -> None:
        taken.append(tracker.record_turn(f"s{len(taken) % 11}", "signal", 1))
        if len(taken) % 97 == 0:
            tracker.stats()
            tracker.pending("s1")

    accepted = number = 0
    with interrupting(handler):
        while len(taken) < 3_000:
            number += 1
            accepted += tracker.record_turn(f"t{number % 11}", "main", 1)
            if number % 50 == 0:
                tracker.stats()
                tracker.pending("t1")
                if number % 1_000 == 0:
                    tracker.flush(20)
    assert tracker.close().lost == 0
    stats = tracker.stats()
    assert stats.accepted == stats.applied == accepted + sum(taken)
    assert query(
        database, "SELECT sum(turn_count) FILTER (WHERE thread_id ^@ 's'), sum(turn_count) FROM conversations"
    ) == [(sum(taken), accepted + sum(taken))]


def test_first_call_in_a_signal_handler(unwatched: Trackers) -> None:
    """A handler may make the call that starts the worker, in the middle of another first call."""
    for _ in range(20):
        sink = GatedSink()
        sink.let_through()
        tracker = unwatched(sink, flush_interval=LONG)
        taken: list[bool] = []

        def handler(tracker: Tracker = tracker, taken: list[bool] = taken) -> None:
            taken.append(tracker.record_turn("s"))

        with interrupting(handler, 0.000_05):
            while len(taken) < 20:
                taken.append(tracker.record_turn("t"))
        assert all(taken)
        assert tracker.close() == DrainReport(applied=len(taken))
        assert sink.turns == len(taken)


class Ring:
    """Garbage that only the cycle collector frees; its end is a call."""

    def __init__(self, tracker: Tracker, taken: list[bool]) -> None:
        self.me, self.tracker, self.taken = self, tracker, taken

    def __del__(self) -> None:
        self.taken.append(self.tracker.record_turn("del"))


def test_calls_in_finalizers(trackers: Trackers) -> None:
    """`__del__`, weakref callbacks and finalizers call, whichever thread the collector runs in."""
    sink = GatedSink()
    sink.let_through()
    tracker = trackers(sink, flush_interval=0.001)
    taken: list[bool] = []
    callbacks = []
    threshold = gc.get_threshold()
    gc.set_threshold(20)
    try:
        for number in range(600):
            ring = Ring(tracker, taken)
            callbacks.append(weakref.ref(ring, lambda _: tracker.record_turn("ref")))
            weakref.finalize(ring, tracker.record_turn, "finalize")
            del ring
            assert tracker.record_turn(f"t{number % 50}")
            tracker.stats()
        gc.collect()
    finally:
        gc.set_threshold(*threshold)
    assert taken == [True] * 600
    assert tracker.close().lost == 0
    stats = tracker.stats()
    assert stats.accepted == stats.applied == sink.turns
    assert (sink.rows["del"].turn_count, sink.rows["finalize"].turn_count) == (600, 600)


def test_finalizer_in_the_workers_thread(trackers: Trackers) -> None:
    """A finalizer that runs in the worker's own thread, at any point of it, makes calls as well."""
    taken: list[bool] = []
    idents, made = set(), [0]

    class Noisy(Ring):
        def __del__(self) -> None:
            idents.add(threading.get_ident())
            super().__del__()

    class Littering(GatedSink):
        async def apply(self, batch: Batch) -> Applied:
            applied = await super().apply(batch)
            for _ in range(5):
                if made[0] < 200:
                    made[0] += 1
                    Noisy(tracker, taken)
            gc.collect(0)
            return applied

    sink = Littering()
    sink.let_through()
    tracker = trackers(sink, flush_interval=0.001)
    tracker.record_turn("t")
    # Each call of a finalizer brings about the next flush.
    wait_until(lambda: len(taken) == 200)
    assert tracker._worker.ident in idents
    assert tracker.close().lost == 0
    assert sink.turns == tracker.stats().applied == 201


# -- the interface that a server has today ---------------------------------------------------------


def test_protocol(trackers: Trackers) -> None:
    """All three implementations are the protocol; a tracker itself is not."""
    tracker = trackers(MemorySink())
    for each in (
        NoOpConversationTracker(),
        PostgresConversationTracker(),
        WriteBehindConversationTracker(tracker),
    ):
        assert isinstance(each, ConversationTrackerProtocol)
    assert not isinstance(object(), ConversationTrackerProtocol)


@pytest.mark.anyio
async def test_no_op() -> None:
    """It takes every call and does nothing."""
    nothing: ConversationTrackerProtocol = NoOpConversationTracker()
    pool: Any = None
    await nothing.ensure_conversation(pool, "t")
    await nothing.record_turn(pool, "t", "a", 1, 0.5)
    await nothing.resolve(pool, "t", "done")


async def history(conversations: ConversationTrackerProtocol, pool: Any, seed: int) -> None:
    """Make a server's calls for a few threads, one of which is ensured late or never."""
    random = Random(seed)
    for name in ("t1", "t2", "t3", "é中"):
        await conversations.ensure_conversation(pool, name)
    for _ in range(60):
        name = random.choice(["t1", "t2", "t3", "é中", "late"])
        kind = random.random()
        if kind < 0.8:
            agent = random.choice([None, "billing", "sales", "ops"])
            await conversations.record_turn(pool, name, agent, random.randrange(1_000), random.random())
        elif kind < 0.9:
            await conversations.ensure_conversation(pool, name)
        else:
            await conversations.resolve(pool, name, random.choice(["agent", "user"]))


COLUMNS = "thread_id, turn_count, agents_used, total_tokens, total_cost_usd, resolution_type, ended_at IS NULL"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_write_through_and_write_behind(trackers: Trackers, database: str, seed: int) -> None:
    """One history gives the same rows by either, with the server's own pool, and times in the same order."""
    look = f'SELECT {COLUMNS} FROM conversations ORDER BY thread_id COLLATE "C"'
    order = "SELECT thread_id FROM conversations ORDER BY last_activity"

    async def main() -> None:
        async with AsyncConnectionPool(database, min_size=1, max_size=2, open=False) as pool:
            await history(PostgresConversationTracker(), pool, seed)
            through = query(database, look), query(database, order)
            query(database, "DELETE FROM conversations RETURNING 1")
            tracker = trackers(pool, flush_interval=0.01, create_missing=False)
            async with tracker:
                await history(WriteBehindConversationTracker(tracker), pool, seed)
            assert (query(database, look), query(database, order)) == through
            assert len(through[0]) >= 4
            assert pool.get_stats()["pool_size"] >= 1  # its connections were left alone

    asyncio.run(main())


@pytest.mark.anyio
async def test_malformed_calls_of_the_interface() -> None:
    """Write-through refuses what write-behind refuses, before it touches the pool."""
    pool: Any = None
    conversations = PostgresConversationTracker()
    with pytest.raises(InvalidCall, match="thread_id"):
        await conversations.ensure_conversation(pool, "")
    with pytest.raises(InvalidCall, match="cost"):
        await conversations.record_turn(pool, "t", None, 1, Decimal("NaN"))
    with pytest.raises(InvalidCall, match="resolution_type"):
        await conversations.resolve(pool, "t", "a\0b")


@pytest.mark.anyio
@pytest.mark.parametrize("overflow", ["drop", "raise"])
async def test_write_behind_waits_for_room(trackers: Trackers, overflow: str) -> None:
    """At the bound of threads its methods wait, and the host's loop goes on; room lets all of them in."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=0.001, max_pending=3, overflow=overflow)
    conversations = WriteBehindConversationTracker(tracker)
    for number in range(3):
        await conversations.ensure_conversation(None, f"t{number}")
    entered: list[str] = []

    async def enter(name: str) -> None:
        await conversations.record_turn(None, name, "a", 1, 0.5)
        entered.append(name)

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(enter, f"new{number}")
        tasks.start_soon(enter, "t1")  # pending already: needs no room
        await until(lambda: entered == ["t1"] and tracker.stats().rejected > 20)
        sink.let_through()
    await tracker.aclose()
    assert len(entered) == 7
    assert sink.turns == 7


@pytest.mark.anyio
async def test_write_behind_cancelled_while_it_waits(trackers: Trackers) -> None:
    """A call that is cancelled while it waits for room was not made."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=0.001, max_pending=1)
    conversations = WriteBehindConversationTracker(tracker)
    await conversations.record_turn(None, "t", None, 1, 0)
    with anyio.move_on_after(0.03) as scope:
        await conversations.record_turn(None, "other", None, 1, 0)
    assert scope.cancelled_caught
    sink.let_through()
    await tracker.aclose()
    assert list(sink.rows) == ["t"]


@pytest.mark.anyio
async def test_write_behind_closed_while_it_waits(trackers: Trackers) -> None:
    """Whoever waits for room when the tracker is closed is told so, and so is whoever comes later."""
    sink = GatedSink()
    tracker = trackers(sink, flush_interval=0.001, max_pending=1)
    conversations = WriteBehindConversationTracker(tracker)
    await conversations.record_turn(None, "t", None, 1, 0)
    told: list[str] = []

    async def enter() -> None:
        try:
            await conversations.record_turn(None, "other", None, 1, 0)
        except TrackerClosed:
            told.append("closed")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(enter)
        await until(lambda: tracker.stats().rejected > 2)
        sink.let_through()
        await tracker.aclose()
    with pytest.raises(TrackerClosed):
        await conversations.resolve(None, "t", "done")
    assert told == ["closed"] or sink.rows["other"].turn_count == 1  # it may have slipped in first
