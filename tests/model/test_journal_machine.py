"""Lives with a journal, one after the other in one directory, against a sink whose every attempt ends as chosen.

The model is a dictionary of sums: every call ever accepted is in the sink's rows once, or still to come. It is never there
twice, after no step; and once the sink works and the last life has drained, every call is there: through deaths, ends
at a deadline, commits that the database forgot, fsyncs that failed, files that are written anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.digits import CALLS_PER_THREAD
from tests.journal.rig import Calls, Rig
from tests.model.manual_clock import Driven, ManualClock
from tests.model.scripted_sink import DONE, Outcome, ScriptedSink
from tracker_daemon.generation import Generation
from tracker_daemon.journal.journal import Journal
from tracker_daemon.journal.records import FRAME, HEADER_SIZE, decode, payload_at
from tracker_daemon.memory_sink import MemorySink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracker_daemon.journal.windows import Window

THREADS: Final = ("t0", "t1", "t2", "t3", "t4")
SEEDS: Final = Path(__file__).parents[1] / "seeds" / "journal_machine.txt"
OUTCOMES = st.builds(
    Outcome,
    how=st.sampled_from(
        ["done", "done", "done", "fails", "unanswered", "unanswered", "late", "cancelled", "cancelled_after"]
    ),
    fault=st.sampled_from(["connection", "readonly", "lock", "other"]),
    first=st.booleans(),
)
SCRIPT = st.lists(OUTCOMES, max_size=8)
CALLS = st.lists(st.sampled_from(THREADS), min_size=1, max_size=6)
SELDOM = st.integers(0, 2).map(lambda number: number == 2)


class JournalMachine(RuleBasedStateMachine):
    """See the module.

    Attributes:
        met: what the histories of the class have met.
    """

    met: ClassVar[Counter[str]] = Counter()

    @initialize(max_batch_size=st.integers(1, 3), sync_interval=st.sampled_from([0.0, 0.1]))
    def begin(self, **options: Any) -> None:
        """Choose the settings, and begin the first life."""
        self.options = options
        self.directory = Path(tempfile.mkdtemp(prefix="journal-machine-"))
        self.failing = 0
        self.patches = ExitStack()
        put = self.patches.enter_context
        put(patch.object(os, "fdatasync", self._fdatasync))
        put(patch.object(os, "fsync", lambda _: None))
        self.room = True
        real_allocate = os.posix_fallocate

        def allocate(file: int, offset: int, size: int) -> None:
            if not self.room:
                self.met["files not to be had"] += 1
                raise OSError(28, "No space left on device")
            real_allocate(file, offset, size)

        put(patch.object(os, "posix_fallocate", allocate))
        put(patch("tracker_daemon.journal.journal._LEAST", 1_024))
        put(patch("tracker_daemon.journal.place.BLOCK", 1))
        # After an error a file is tried again at once: what goes to memory meanwhile dies with the process.
        put(patch("tracker_daemon.journal.degradation._RETRY_AFTER", 0.0))
        self.unkept = set[tuple[str, int]]()
        self.gone = set[tuple[str, int]]()
        real_forget = Journal.forget

        def forget(journal: Journal, window: Window) -> None:
            # Its fsync failed, and it was applied before it was written anew: should the database forget it, it is gone.
            self.met["windows not kept"] += 1
            rows = MemorySink()
            for deltas in window.load().batches(1_000):
                for delta in deltas:
                    rows._merge(delta, create_missing=True)
            self.unkept |= Calls.counted(rows.rows)
            real_forget(journal, window)

        put(patch.object(Journal, "forget", forget))
        self.clock = ManualClock()
        self.sink = ScriptedSink(self.clock)
        self.calls = Calls()
        self.count = Counter[str]()
        self.forgotten = False
        self._new_life()

    def _fdatasync(self, _: int) -> None:
        if self.failing:
            self.failing -= 1
            self.met["fsyncs failed"] += 1
            raise OSError(5, "Input/output error")

    def _new_life(self) -> None:
        self.rig = Rig(self.directory, self.sink, clock=self.clock, **self.options)
        self.rig.flusher._random = Random(0)
        self.work: Driven | None = None

    # -- the process -------------------------------------------------------------------------------

    @rule(threads=CALLS, pad=st.sampled_from([0, 0, 300]))
    def call(self, threads: list[str], pad: int) -> None:
        """Some calls."""
        for thread_id in threads:
            name = thread_id + "x" * pad
            if self.count[name] < CALLS_PER_THREAD:
                self.count[name] += 1
                self.rig.call(self.calls.next(name))
        if not self.rig.journal.queue.on_disk:
            # Applied from there, and forgotten by the database, it is in no file that would give it back.
            self.unkept |= self._in_memory()

    @rule(limit=st.integers(1, 5))
    def drain(self, limit: int) -> None:
        """The worker takes calls off the queue."""
        self.rig.backlog.drain(limit)

    @rule()
    def seal(self) -> None:
        """The window ends; while another one is in flight it goes to its files alone."""
        self.rig.drain()
        self.met["windows spilled"] += self.rig.backlog.in_flight and bool(self.rig.backlog.window_threads)
        self.rig.seal()

    @rule(script=SCRIPT)
    def flush(self, script: list[Outcome]) -> None:
        """The recovery, or a flush, begins or goes on; its attempts end by the script, and then it stands where it is."""
        self._start()
        for outcome in script:
            self._past_the_wait()
            self._step(outcome)

    @rule(threads=CALLS, script=SCRIPT)
    def call_and_flush(self, threads: list[str], script: list[Outcome]) -> None:
        """Calls, and a flush of them."""
        self.call(threads, 0)
        self.flush(script)

    @rule()
    def flush_all(self) -> None:
        """The sink works: everything goes through."""
        self._finish()
        backlog = self.rig.backlog
        assert backlog.is_empty
        assert backlog.books().queue_calls == 0
        assert all(backlog.pending(name) is None for name in self.count)
        if not self.forgotten:
            assert self.calls.made - self.gone <= Calls.counted(self.sink.rows)

    @rule(fails=SELDOM)
    def sync(self, fails: bool) -> None:
        """Everything is brought to the disk, or not."""
        self.failing = int(fails)
        self.rig.sync()
        self.failing = 0

    @rule(fails=SELDOM)
    def keep(self, fails: bool) -> None:
        """The worker mends what cannot be trusted."""
        self.failing = int(fails)
        self.met["files mended"] += bool(self.rig.journal.untrusted)
        self.rig.keep()
        self.failing = 0

    @rule(some=st.booleans())
    def disk(self, *, some: bool) -> None:
        """There is room for files from here on, or none."""
        self.room = some

    @rule()
    def compact(self) -> None:
        """The open window is written anew."""
        self.rig.drain()
        if self.rig.backlog.window_threads and self.rig.journal.stores_window:
            self.rig.backlog.rewrite()
            self.met["compactions"] += 1

    def _start(self) -> None:
        if self.work is None or self.work.at is None:
            self.rig.seal()
            self.work = None
            with suppress(asyncio.CancelledError):
                self.work = Driven(self._flush_loop())

    async def _flush_loop(self) -> None:
        if self.rig.backlog.recovering:
            self.met["recoveries"] += 1
            await self.rig.flusher.recover()
        await self.rig.flusher.flush()

    def _step(self, outcome: Outcome) -> None:
        if self.work is not None and self.work.at is not None:
            if self.work.at != "wait":
                self.sink.script.append(outcome)
            with suppress(asyncio.CancelledError):
                self.work.resume()

    def _past_the_wait(self) -> None:
        while self.work is not None and self.work.at == "wait":
            self._step(DONE)

    def _finish(self) -> None:
        for _ in range(1_000):
            self._start()
            if self.work is None or self.work.at is None:
                if self.rig.backlog.is_empty:
                    return
                continue
            while self.work.at is not None:
                self._step(DONE)
        raise AssertionError("it does not end")

    # -- what happens to it ------------------------------------------------------------------------

    @rule(really=SELDOM, late=st.booleans())
    def kill(self, *, really: bool, late: bool) -> None:
        """The process dies as by `kill -9`, and another begins; what was under way arrives before that, or after."""
        if really:
            self.met["kills"] += 1
            self.met["kills in a recovery"] += self.rig.backlog.recovering
            self.met["kills with a batch on its way"] += bool(self.sink.late)
            if late:
                self.sink.arrive()
            self._in_memory_is_gone()
            self.rig.crash()
            self._next()

    @rule(really=SELDOM)
    def end(self, *, really: bool) -> None:
        """`close` reaches its deadline: what is pending stays in the journal."""
        if really:
            in_memory = len(self._in_memory())
            self._in_memory_is_gone()
            self.rig.end()
            books = self.rig.backlog.books()
            assert sum(books.lost.values()) == in_memory
            self.met["calls journaled"] += books.journaled
            self._next()

    def _in_memory(self) -> set[tuple[str, int]]:
        """Return the calls that are pending in memory alone."""
        backlog, rows = self.rig.backlog, MemorySink()
        deltas = [
            delta for sealed in backlog.sealed if sealed.stored is None for batch in sealed.batches for delta in batch
        ]
        for segment in self.rig.journal.queue.segments:
            if segment.path is None:
                generation, offset = Generation(create_missing=True), HEADER_SIZE
                while offset < segment.end:
                    payload = payload_at(segment.map, offset, segment.end)
                    assert payload is not None
                    item = decode(payload)
                    if isinstance(item, tuple):
                        generation.fold(item)
                    offset += FRAME.size + len(payload)
                deltas += generation.all()
        for delta in deltas:
            rows._merge(delta, create_missing=True)
        return Calls.counted(rows.rows)

    def _in_memory_is_gone(self) -> None:
        gone = self._in_memory()
        self.met["calls gone with the memory"] += len(gone)
        self.gone |= gone

    def _next(self) -> None:
        self._told()
        self._new_life()

    @precondition(lambda self: self.sink.late)
    @rule()
    def arrive(self) -> None:
        """What was late arrives."""
        self.sink.arrive()

    @rule(commits=st.integers(1, 4), really=SELDOM)
    def fail_over(self, commits: int, *, really: bool) -> None:
        """The database forgets its last commits: what it forgot of this life it gets again, the rest at the next start."""
        if really:
            self.sink.fail_over(commits, opens=False)
            self.forgotten = True

    # -- what is so --------------------------------------------------------------------------------

    @invariant()
    def nothing_is_doubled(self) -> None:
        """No call is counted twice, and none that was not made."""
        if hasattr(self, "sink"):
            assert Calls.counted(self.sink.rows) <= self.calls.made

    @invariant()
    def the_books_balance(self) -> None:
        """Accepted is applied, lost or pending, exactly."""
        if hasattr(self, "rig"):
            books = self.rig.backlog.books()
            settled = sum(books.applied.values()) + sum(books.dead_lettered.values()) + sum(books.lost.values())
            assert sum(books.accepted.values()) == settled + books.queue_calls
            assert books.queue_calls >= 0
            assert not any(books.lost.values())

    def _told(self) -> None:
        """Nothing was said that would be an operator's affair."""
        assert self.rig.flusher.halted is None
        assert not self.rig.journal.errors["damage"]
        assert not self.rig.journal.errors["read"]

    def teardown(self) -> None:
        """The sink works again; the last life drains, and so does one after it."""
        if not hasattr(self, "rig"):
            return
        try:
            self.failing = 0
            self._finish()
            self.sink.arrive()
            self.room = True
            self.rig.crash()
            self._next()
            self._finish()
            self._told()
            self.nothing_is_doubled()
            missing = self.calls.made - Calls.counted(self.sink.rows) - self.gone
            assert missing <= (self.unkept if self.forgotten else set())
            self.rig.end()
            self.met.update(self.sink.met)
        finally:
            self.patches.close()
            shutil.rmtree(self.directory)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Thousands of faults are logged: nobody reads them."""
    logger = logging.getLogger("tracker_daemon")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(before)


BASE: Final = settings(deadline=None, database=None, stateful_step_count=40, suppress_health_check=list(HealthCheck))
TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.__doc__ = "Fresh histories, others in every run."
TestJournalMachine.settings = settings(BASE, max_examples=60)


def kept_seeds() -> list[int]:
    """Return the seeds of the file: those that once failed, and enough to meet everything."""
    return [int(line) for line in SEEDS.read_text().splitlines() if line and not line.startswith("#")]


def test_kept_seeds_meet_everything() -> None:
    """The same histories in every run; together they meet each thing that the journal is there for."""

    class Kept(JournalMachine):
        met: ClassVar[Counter[str]] = Counter()

    for number in kept_seeds():
        few = settings(BASE, max_examples=20, phases=[Phase.generate])
        run_state_machine_as_test(seed(number)(Kept), settings=few)
    for name in (
        "kills",
        "kills in a recovery",
        "kills with a batch on its way",
        "recoveries",
        "calls journaled",
        "windows spilled",
        "compactions",
        "fsyncs failed",
        "files mended",
        "files not to be had",
        "calls gone with the memory",
        "ambiguous_commits",
        "zombie_commits",
        "LedgerRegressed",
        "commits_forgotten",
        "cancelled",
    ):
        assert Kept.met[name] > 0, (name, Kept.met)


AWAY: Final = Outcome("cancelled")
HISTORIES: Final[dict[str, list[tuple[str, dict[str, Any]]]]] = {
    "the database forgets a batch of the window in hand": [
        ("call_and_flush", {"threads": ["t0", "t1"], "script": [DONE, DONE]}),
        ("fail_over", {"commits": 1, "really": True}),
    ],
    "it forgets one of the window that is recovered": [
        ("call", {"threads": ["t0", "t1", "t2"], "pad": 0}),
        ("kill", {"really": True, "late": False}),
        ("flush", {"script": [DONE, DONE, DONE]}),
        ("fail_over", {"commits": 2, "really": True}),
    ],
    "a recovery is cut short and begins anew": [
        ("call", {"threads": ["t0", "t1"], "pad": 0}),
        ("kill", {"really": True, "late": False}),
        ("flush", {"script": [DONE, DONE, AWAY]}),
        ("flush_all", {}),
    ],
    "a recovery is cut short right behind a commit": [
        ("call", {"threads": ["t0"], "pad": 0}),
        ("kill", {"really": True, "late": False}),
        ("flush", {"script": [DONE, Outcome("cancelled_after")]}),
        ("flush_all", {}),
    ],
    "the last commits of two lives are forgotten": [
        ("call_and_flush", {"threads": ["t0", "t1"], "script": [DONE] * 4}),
        ("kill", {"really": True, "late": False}),
        ("call_and_flush", {"threads": ["t2"], "script": [DONE] * 4}),
        ("fail_over", {"commits": 4, "really": True}),
        ("call", {"threads": ["t3"], "pad": 0}),
    ],
}


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_kept_history(name: str, max_batch_size: int) -> None:
    """Histories worth keeping, each checked after every step."""
    machine = JournalMachine()
    machine.begin(max_batch_size=max_batch_size, sync_interval=0.1)
    for rule_name, arguments in HISTORIES[name]:
        getattr(machine, rule_name)(**arguments)
        machine.nothing_is_doubled()
        machine.the_books_balance()
    machine.teardown()
