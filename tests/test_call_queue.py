"""The queue in memory: what is put comes out once, in order, whatever comes in between."""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.helpers import PATIENCE
from tests.strategies import NOW
from tracker_daemon.backlog import Backlog
from tracker_daemon.call_queue import CallQueue
from tracker_daemon.generation import ensure, method_of, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tracker_daemon.generation import Record


def a_call(number: int) -> Record:
    """Return one that is not equal to another one's."""
    kind = number % 5
    if kind == 0:
        return ensure(f"t{number}", NOW + number)
    if kind == 1:
        return resolve(f"t{number}", "done", NOW + number)
    return f"t{number}", "agent" if kind == 2 else None, number, number / 8, NOW + number


class Stopped(Exception):  # noqa: N818 - says what is the case
    """Comes in between."""


class Model(RuleBasedStateMachine):
    """A queue beside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = CallQueue()
        self.put: list[Record] = []
        self.taken: list[Record] = []

    def _make(self) -> None:
        self.put.append(a_call(len(self.put)))
        self.queue.put(self.put[-1])

    @rule(number=st.one_of(st.integers(1, 5), st.integers(900, 2_500)))
    def calls(self, number: int) -> None:
        """Some calls."""
        for _ in range(number):
            self._make()

    @rule(limit=st.one_of(st.integers(0, 7), st.integers(500, 3_000)), fails=st.integers(0, 3_000), calls=st.booleans())
    def drain(self, limit: int, fails: int, calls: bool) -> None:
        """Some are folded; an exception at one of them leaves it and those behind it; calls come meanwhile."""
        before = len(self.taken)

        def fold(records: Iterable[Record]) -> None:
            for number, record in enumerate(records):
                if number == fails:
                    raise Stopped
                self.looked_at(before)
                self.taken.append(record)
                if calls and not number % 100:
                    self._make()

        wanted = min(limit, len(self.put) - before)
        try:
            assert self.queue.drain(fold, limit, (), 0) == wanted
        except Stopped:
            wanted = fails
        assert len(self.taken) - before == wanted

    def looked_at(self, before: int) -> None:
        """Amid a fold, every hundredth time: what is in is taken off, what is asked for is not."""
        if len(self.taken) % 100 == 0:
            assert list(self.queue.folding) == self.taken[before:]
            assert list(self.queue.waiting()) == self.put[len(self.taken) :]
            assert len(self.queue) == len(self.put) - len(self.taken)
            assert self.queue.unfolded == len(self.put) - before

    @invariant()
    def all_there(self) -> None:
        """In order, each once."""
        waiting, rest = self.queue.waiting(), self.put[len(self.taken) :]
        assert self.taken == self.put[: len(self.taken)]
        assert len(self.queue) == len(waiting) == self.queue.unfolded == len(rest)
        assert list(waiting) == rest
        assert list(waiting.threads) == [record[0] for record in rest]
        assert waiting.methods == Counter(map(method_of, rest))
        assert waiting.of("t7") == [record for record in rest if record[0] == "t7"]
        assert not len(self.queue.folding)

    @invariant()
    def nothing_is_held(self) -> None:
        """What was taken is let go of, and of its places no more are left than calls wait, or a thousand."""
        fields = self.queue._fields
        assert not any(fields[: self.queue._blank])
        assert self.queue._blank == self.queue._taken
        assert self.queue._blank <= max(5_000 + 5 * 3_000, len(fields) - self.queue._blank)


TestCallQueue = Model.TestCase
TestCallQueue.settings = settings(max_examples=60, stateful_step_count=12, deadline=None, database=None)


def test_threads_that_put_while_it_is_drained() -> None:
    """Each thread's calls come out in its order, each once, however often the interpreter goes from one to the other."""
    queue, threads, each = CallQueue(), 4, 20_000
    found: list[Record] = []

    def work(number: int) -> None:
        put = queue.put
        for i in range(each):
            put((f"t{number}", None, i, 0, NOW))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        working = [threading.Thread(target=work, args=[number]) for number in range(threads)]
        for thread in working:
            thread.start()
        while any(thread.is_alive() for thread in working) or len(queue):
            queue.drain(found.extend, 700, (), 0)
        for thread in working:
            thread.join(PATIENCE)
    finally:
        sys.setswitchinterval(interval)
    for number in range(threads):
        assert [record[2] for record in found if record[0] == f"t{number}"] == list(range(each))
    assert len(found) == threads * each


def test_calls_bring_no_collection_about() -> None:
    """A call leaves nothing that the garbage collector looks at: however many wait, none is due."""
    queue, collected = CallQueue(), []

    def note(phase: str, info: dict[str, int]) -> None:
        collected.append((phase, info))

    put = queue.put
    gc.collect()
    gc.callbacks.append(note)
    try:
        for number in range(50_000):
            put(("t", "a", number, 0.5, NOW))
        assert len(queue.waiting().threads) == 50_000
    finally:
        gc.callbacks.remove(note)
    assert collected == []


@pytest.mark.parametrize("far", [True, False], ids=["far from max_pending", "near it"])
def test_a_call_while_the_worker_folds(far: bool) -> None:
    """It raises the gate for those behind it, though the worker holds the lock; not where a bound may be near."""
    backlog = Backlog(max_queue_size=100, max_pending=200 if far else 199, max_batch_size=100, create_missing=True)
    backlog.shut_gate()
    done: list[Any] = []
    with backlog.lock:
        thread = threading.Thread(target=lambda: done.append(backlog.enter(a_call(2))))
        thread.start()
        thread.join(PATIENCE)
    assert done == [None]
    assert backlog.places == (99 if far else 0)


@pytest.mark.parametrize("where", ["_end_part", "_let_go"])
def test_no_memory_to_let_go(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails behind a fold, what is folded is so, and the next drain goes on where it ended."""
    queue = CallQueue()
    found: list[Record] = []

    def fold(records: Iterable[Record]) -> None:
        for record in records:
            if where == "_end_part" and len(found) == 7:
                raise MemoryError
            found.append(record)

    calls = [a_call(number) for number in range(20)]
    for call in calls[:10]:
        queue.put(call)
    with monkeypatch.context() as patched:

        def fail(_: CallQueue) -> None:
            if where == "_let_go" or queue._is_folding:
                raise MemoryError

        patched.setattr(CallQueue, where, fail)
        with pytest.raises(MemoryError) if where == "_end_part" else nullcontext():
            queue.drain(fold, 100, (), 0)
    assert list(queue.waiting()) == calls[len(found) : 10]
    for call in calls[10:]:
        queue.put(call)
    where = "nowhere"
    while len(queue):
        queue.drain(fold, 100, (), 0)
    assert found == calls
    assert not len(queue.folding)
    assert queue.unfolded == 0
