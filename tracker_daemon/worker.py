"""The one thread behind a tracker: it drains the queue, decides when a window is sealed, and ends in order.

Rules:
1. The thread has an event loop and connections of its own: the host's loop is never blocked, and asyncio, trio and
   plain threads are alike to it.
2. It holds the interpreter for a small chunk of calls at a time, and lets go between two of them.
3. With nothing pending it sleeps until a call wakes it, and wakes nothing itself; with a journal once a week, to give
   the ledger a sign of life, and, where processes share it, once a minute, to take over what dead children left.
4. Once told to stop it ends by the deadline, whatever the sink does; what is then pending is counted as lost.
"""

from __future__ import annotations

import _thread
import sys
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from importlib import import_module
from math import inf
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from tracker_daemon.barriers import Barriers
from tracker_daemon.books import DrainReport
from tracker_daemon.breath import Breath
from tracker_daemon.journal_keeper import JournalKeeper
from tracker_daemon.late_executor import LateExecutor
from tracker_daemon.logs import get_logger
from tracker_daemon.young_rows import YoungRows

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from anyio.abc import TaskGroup

    from tracker_daemon.backlog import Backlog
    from tracker_daemon.books import Books
    from tracker_daemon.clock import Clock
    from tracker_daemon.flusher import Flusher
    from tracker_daemon.journal.journal import Journal

# Calls folded at once: the first time, and when the queue is full.
_CHUNK: Final = 60
_FULL_CHUNK: Final = 20_000
_WHILE: Final = 0.001
_FILLING: Final = 0.25
# A caller may be suspended between looking at the gate and appending. Its call is found by these second looks
# before the worker sleeps for good; one that stays suspended for longer is found by the next call, flush or close.
_SECOND_LOOKS: Final = (0.005, 0.5, 0.5)
# Kept back from the shutdown deadline, to end the connection and to answer in time.
_RESERVE: Final = 0.1
_STRAGGLERS: Final = 0.02  # four switch intervals of the interpreter
_REST_AFTER_FAILURE: Final = 1.0
# Loaded before there is a thread: a fork beside an import leaves the child with half a module, for ever.
_NEEDED: Final = (
    "asyncio",
    "anyio._backends._asyncio",
    "encodings.idna",
    "importlib.readers",
    "importlib.resources._adapters",
)


class Worker:
    """Starts with the first call that wakes it; ends by `stop`.

    Args:
        backlog: what it empties.
        make_flusher: called once in the worker's thread.
        clock: its time.
        flush_interval: the window, seconds.
        on_start: called by whoever starts the thread.
        journal: what is brought to the disk from time to time, and ended at the end, or `None`.
    """

    def __init__(
        self,
        backlog: Backlog,
        make_flusher: Callable[[], Flusher],
        clock: Clock,
        flush_interval: float,
        on_start: Callable[[], None],
        journal: Journal | None = None,
    ) -> None:
        for module in _NEEDED:
            with suppress(ImportError):
                import_module(module)
        self._backlog, self._make_flusher, self._clock = backlog, make_flusher, clock
        self._on_start, self._journal = on_start, journal
        self._breath, self._young = Breath(_CHUNK), YoungRows()
        self._keeper = None if journal is None else JournalKeeper(backlog, journal, clock, self._on_wake)
        self._flush_interval = flush_interval
        self.finished: Future[DrainReport] = Future()
        """Set when the thread has ended what it had to do."""
        self.ident: int | None = None
        self._may_start = [True]
        self._may_run = [True]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last_moment = inf
        self._sealed: anyio.Event
        self._at_stop: Books | None = None
        self._barriers = Barriers(backlog)
        self._woken = self._hurry = self._stopping = False
        self._event: anyio.Event | None = None
        self._flusher: Flusher | None = None

    # -- from any thread ---------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether no call is accepted any more."""
        return self._backlog.closed

    @property
    def started(self) -> bool:
        """Whether the thread was started."""
        return not self._may_start

    @property
    def halted(self) -> BaseException | None:
        """Why nothing is written any more, if so."""
        return self._flusher.halted if self._flusher else None

    def start(self) -> None:
        """Start the thread, once. Takes no lock: a signal handler may get here."""
        with suppress(IndexError):
            self._may_start.pop()  # atomic: of several callers one gets it
            try:
                self._on_start()
                _thread.start_new_thread(self._run, ())
            except RuntimeError as error:  # no thread to be had: the next call, flush or close tries again
                self._may_start.append(True)
                with suppress(Exception):
                    get_logger().error("worker_not_started", error=str(error))
            except BaseException:  # Ctrl-C in between; should the thread run all the same, a second one ends at once
                self._may_start.append(True)
                raise

    def run_here(self) -> None:
        """Do the thread's work in the caller's, if no thread could be started: CPython 3.12 starts none at exit."""
        if self._may_start and not self.finished.done():
            self._may_start.clear()
            self._run()
            self.ident = None

    def wake(self) -> None:
        """Have the worker look around now; start it if need be."""
        loop = self._loop
        # Woken already, and at work, it is to look once more: what the caller has put it finds. A call at a bound need
        # not write to the loop's pipe each time, which costs twenty times what the call does.
        if not (self._woken and self._event is None) or loop is None or self._hurry:
            self._woken = True
            if self._may_start:
                self.start()
            if loop is not None:
                with suppress(RuntimeError):  # the loop has just closed: nobody needs waking
                    loop.call_soon_threadsafe(self._on_wake)
        if self.finished.done():
            self._backlog.abandon("closed")  # a call that overlapped with the very end of `close`

    def after_fork(self) -> None:
        """This process has forked, and is the parent: it may not sleep for as long as before."""
        self._backlog.forking = False
        if self._keeper is not None and self._keeper.share() and self.started:
            self.wake()

    def barrier(self) -> Future[bool]:
        """Return a future that is done when every call accepted until now is settled: `False` if some are lost."""
        with self._backlog.lock:
            done = self._barriers.add()
            if done.done():
                return done
            self._hurry = True
        self.wake()
        if self.finished.done():
            self._barriers.release(everyone=True)
        return done

    def leave(self, done: Future[bool]) -> None:
        """Forget a barrier's future: nobody waits for it any more."""
        self._barriers.leave(done)

    def stop(self, timeout: float) -> Future[DrainReport]:
        """Accept no more, drain for at most *timeout* seconds. Again: the earlier of the deadlines holds."""
        last_moment = self._clock.monotonic() + timeout - min(_RESERVE, timeout / 4)
        with self._backlog.lock:
            self._last_moment = min(last_moment, self._last_moment)
            if self._at_stop is None:
                self._at_stop = self._backlog.books()
            self._stopping = self._barriers.ending = True
            self._backlog.close()
            self._hurry = True
            unused = bool(self._may_start) and self._backlog.is_empty
            if unused:
                self._may_start.clear()
        if unused and not self.finished.done():
            self._finish("deadline")
        else:
            self.wake()
        return self.finished

    def give_up(self) -> DrainReport:
        """End without the thread, which did not answer: what is pending is lost."""
        self._finish("deadline")
        return self.finished.result(0)

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._may_run.pop()
        except IndexError:
            return
        sys.settrace(threading.gettrace())  # for debuggers and coverage; a `threading.Thread` does so by itself
        self.ident = threading.get_ident()
        threading.current_thread().name = "tracker-daemon"
        self._flusher = flusher = self._make_flusher()
        while not self.finished.done():
            try:
                anyio.run(self._main, flusher, backend="asyncio")
            except BaseException as error:
                if self.finished.done():  # 3.12 starts no thread while the interpreter ends; closing a loop takes one
                    return
                # Nothing may vanish with the thread: a fresh loop goes on with the same flusher, whose batch in
                # hand keeps its identity.
                get_logger().critical("worker_failed", error=repr(error), exc_info=error)
                flusher.abort()
                if self._stopping:
                    self._finish("worker_failed")
                time.sleep(_REST_AFTER_FAILURE)

    def _finish(self, reason: str) -> None:
        self._backlog.abandon(reason)
        if self._journal is not None:
            self._journal.end()
        with suppress(InvalidStateError):  # `give_up` was first
            self.finished.set_result(self._report())
        self._barriers.release(everyone=True)

    async def _main(self, flusher: Flusher) -> None:
        import asyncio  # noqa: PLC0415 - `import tracker_daemon` need not pay for it

        loop = asyncio.get_running_loop()
        loop.set_default_executor(LateExecutor())
        self._sealed = anyio.Event()
        if self._backlog.in_flight:
            self._sealed.set()
        self._woken = True
        self._loop = loop
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._flush_loop, flusher)
                await self._pump(tasks)
                await self._end(flusher)
                tasks.cancel_scope.cancel()
        finally:
            self._loop = None
        self._finish("deadline")

    async def _pump(self, tasks: TaskGroup) -> None:
        idle_looks = 0
        seen_empty = self._clock.monotonic()
        backlog = self._backlog
        while not await self._stopped():
            self._woken = False
            now = self._clock.monotonic()
            if idle_looks:
                seen_empty = now
            part = self._part()
            drained = self._breath.measured(backlog.drain, part)
            self._young.made(drained, backlog.window_threads, hurry=self._breath.is_held_up)
            backlog.open_gate(wide=bool(backlog.queue))
            if self.halted is not None:
                backlog.close()  # what will never be written is not accepted
            self._barriers.release(everyone=self.halted is not None)
            self._seal_if_due(now, seen_empty)
            if backlog.window_threads == 0:  # before calls that wait already are folded into the next one
                seen_empty = now
            if self._keeper is not None:
                self._keeper.keep(now, tasks)
            if backlog.queue:
                if len(backlog.queue) >= part:
                    self._breath.take()
                    await anyio.lowlevel.checkpoint()
                else:  # what comes in slowly is gathered for a while, not fetched one by one
                    await anyio.sleep(_WHILE)
                continue
            idle_looks = 0 if drained or not backlog.is_empty else idle_looks + 1
            if idle_looks > len(_SECOND_LOOKS) and self._until_due(now) == 0.0:
                self._sealed.set()  # nothing is: the flusher is to give a sign, or to look for what children left
            await self._rest(seen_empty, idle_looks)

    def _part(self) -> int:
        """Return how many calls to fold at once: in a queue that fills up, calls refused are worse than a slow loop."""
        full = len(self._backlog.queue) / self._backlog.max_queue_size
        return max(self._breath.size, int((full - _FILLING) / (1 - _FILLING) * _FULL_CHUNK))

    async def _rest(self, seen_empty: float, idle_looks: int) -> None:
        """Wait for a call, the end of the window, the end of a flush, or the deadline."""
        now = self._clock.monotonic()
        timeout: float | None = self._flush_interval
        if idle_looks:
            self._backlog.shut_gate()
            timeout = _SECOND_LOOKS[idle_looks - 1] if idle_looks <= len(_SECOND_LOOKS) else self._until_due(now)
        elif self._backlog.window_threads and not self._backlog.in_flight:
            timeout = max(0.0, seen_empty + self._flush_interval - now)
        if self._keeper is not None and (due := self._keeper.sync_due) != inf:
            timeout = max(0.0, due - now) if timeout is None else min(timeout, max(0.0, due - now))
        if self._stopping:
            left = max(0.0, self._last_moment - now)
            timeout = left if timeout is None else min(timeout, left)
        if not (self._woken or (idle_looks and self._backlog.queue)):
            event = self._event = anyio.Event()
            try:
                await self._clock.wait(event, timeout)
            finally:
                self._event = None
        await anyio.lowlevel.checkpoint()

    def _until_due(self, now: float) -> float | None:
        """Return how long an idle worker may sleep."""
        sign = self._flusher.sign_due if self._flusher is not None else None
        due = inf if sign is None else sign
        if self._keeper is not None and self.halted is None:
            due = min(due, self._keeper.adopt_due)
        return None if due == inf else max(0.0, due - now)

    def _seal_if_due(self, now: float, opened: float) -> None:
        backlog = self._backlog
        if backlog.in_flight or not backlog.window_threads:
            if backlog.must_seal:
                backlog.seal()
            return
        if (
            now - opened >= self._flush_interval
            or backlog.window_threads >= backlog.max_batch_size
            or backlog.must_seal
            or self._stopping
            or self._barriers.are_folded
        ):
            backlog.seal()
            self._sealed.set()

    async def _flush_loop(self, flusher: Flusher) -> None:
        await self._recover(flusher)
        while True:
            await self._sealed.wait()
            self._sealed = anyio.Event()
            await self._recover(flusher)  # a fork's child has its place from its first call on
            await flusher.flush()
            await flusher.give_sign()
            self._on_wake()

    async def _recover(self, flusher: Flusher) -> None:
        if self._keeper is not None and self.halted is None:
            self._keeper.adopt()
        if self._backlog.recovering:
            await flusher.recover()
            self._on_wake()

    def _on_wake(self) -> None:
        self._woken = True
        if self._event is not None:
            self._event.set()
        if self._flusher is not None and self._hurry:
            # Once for each that waits: a call refused at a bound wakes as well, and must not defeat the backoff.
            self._hurry = False
            self._flusher.hurry()

    async def _end(self, flusher: Flusher) -> None:
        """Leave the sink: cleanly when everything is settled, at once when the deadline has passed."""
        if not self._backlog.is_empty:
            flusher.abort()
            with anyio.move_on_after(_RESERVE):
                while self._backlog.in_flight and flusher.halted is None:
                    event = self._event = anyio.Event()
                    await event.wait()
            lost = self._backlog.abandon("halted" if flusher.halted else "deadline")
            if lost:
                get_logger().error("calls_lost_at_shutdown", calls=lost, error=str(flusher.last_error))
        left = self._last_moment - self._clock.monotonic()
        with anyio.move_on_after(max(left, _RESERVE)):
            await flusher.aclose(clean=left > 0)

    async def _stopped(self) -> bool:
        """Say whether `_pump` has nothing left to do."""
        if not self._stopping:
            return False
        if self.halted is not None or self._clock.monotonic() >= self._last_moment:
            return True
        if self._backlog.is_empty:
            # A thread may still stand between the gate and its append.
            await anyio.sleep(_STRAGGLERS)
        return self._backlog.is_empty

    def _report(self) -> DrainReport:
        return DrainReport.between(self._at_stop, self._backlog.books())
