"""Lives to be killed: a tracker with a journal, called by several threads that note each call once it was accepted.

python journal_victim.py, then one JSON object a line on standard input, each a life to begin in a fork of its own:

    {"url": ..., "journal": DIR, "name": ..., "notes": FILE, "callers": 3, "close_within": seconds,
     "forks": how many children it forks, one after the other, that call and end without closing, "tracker": {settings}}

Answers with {"pid": N}, and {"ended": N, "status": S} when that life has. `tests/soak_journal.py` has the meaning of
the notes: one word each, in shared memory, so that what was noted outlives the process.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import random
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from tests import soak_journal
from tests.soak_journal import MOST_CALLS, Note
from tracker_daemon import Tracker, journal_keeper
from tracker_daemon.backlog import Backlog
from tracker_daemon.flusher import Flusher
from tracker_daemon.postgres.sink import PostgresSink

if TYPE_CHECKING:
    from tracker_daemon.batch import Batch
    from tracker_daemon.journal.windows import Window
    from tracker_daemon.sink import Applied


class Words:
    """The notes, to which this process alone writes: not a fork's child."""

    def __init__(self, words: memoryview) -> None:
        self._words, self._pid = words, os.getpid()

    def __getitem__(self, index: int) -> int:
        return int(self._words[index])

    def __setitem__(self, index: int, value: int) -> None:
        if os.getpid() == self._pid:
            self._words[index] = value


def watch(notes: Words) -> None:
    """Have the tracker's own steps noted, from now on in this process."""
    seal, settle = Backlog.seal, Backlog.settle
    settle_recovered, recover_window, recover = Backlog.settle_recovered, Flusher._recover_window, Flusher.recover
    apply = PostgresSink.apply

    async def watched_apply(self: PostgresSink, batch: Batch) -> Applied:
        notes[Note.FLUSHING] += 1
        try:
            return await apply(self, batch)
        finally:
            notes[Note.FLUSHED] += 1

    def watched_seal(self: Backlog) -> None:
        seal(self)
        notes[Note.SPILLED] += bool(self.sealed) and self.sealed[-1].generation is None

    def watched_settle(self: Backlog, batch: Any, applied: Applied) -> Window | None:
        notes[Note.SETTLED] = self.name()[1]
        return settle(self, batch, applied)

    def watched_settle_recovered(self: Backlog, batch: Any, applied: Applied) -> None:
        notes[Note.FOUND_APPLIED] += applied.duplicate
        settle_recovered(self, batch, applied)

    async def watched_recover_window(self: Flusher, window: Window) -> int:
        notes[Note.RECOVERING] += 1
        calls = await recover_window(self, window)
        notes[Note.RECOVERED] += bool(calls)
        notes[Note.TORN] += bool(window.torn)
        return calls

    async def watched_recover(self: Flusher) -> None:
        late = notes[Note.RECOVERED_ALL]
        notes[Note.TAKING_OVER] += late
        await recover(self)
        notes[Note.TAKEN_OVER] += late
        notes[Note.RECOVERED_ALL] = 1

    Flusher.recover = watched_recover  # type: ignore[method-assign]
    Backlog.seal, Backlog.settle = watched_seal, watched_settle  # type: ignore[method-assign]
    Backlog.settle_recovered = watched_settle_recovered  # type: ignore[method-assign]
    Flusher._recover_window = watched_recover_window  # type: ignore[method-assign]
    PostgresSink.apply = watched_apply  # type: ignore[method-assign]


def call(tracker: Tracker, name: str, caller: int, notes: memoryview, most: int = MOST_CALLS) -> None:
    """Make calls, until there are enough or the tracker takes no more; note each that was accepted."""
    pause, number = threading.Event(), 0
    while not tracker.closed and number < most:
        thread_id, tokens = soak_journal.call(name, caller, number)
        # First the row: a window is applied with the setting of whoever recovers it, which may make none for a turn.
        if tokens == 1 and not tracker.ensure_conversation(thread_id):
            notes[Note.REFUSED] += 1
            pause.wait(0.001)
            continue
        if tracker.record_turn(thread_id, f"agent-{caller}", tokens, 0.001):
            number += 1
            notes[Note.CALLS + caller] = number
        else:
            notes[Note.REFUSED] += 1
            pause.wait(0.001)
        if not number % 5:
            pause.wait(0.001)


def fork(tracker: Tracker, life: dict[str, Any], notes: memoryview) -> None:
    """Fork children, one after the other: each calls, and ends without closing."""
    for number in range(life["forks"]):
        if tracker.closed:
            return
        pid = os.fork()
        if not pid:
            status = 1
            try:
                notes[Note.CHILD] = os.getpid()
                call(tracker, life["name"], life["callers"] + number, notes, random.randrange(1, 60))
                status = 0
            finally:
                os._exit(status)
        _, ended = os.waitpid(pid, 0)
        if ended:
            logging.getLogger().critical("a child failed: %s", ended)


def live(life: dict[str, Any]) -> None:
    """Be one life: calls until SIGTERM, then close."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with Path(life["notes"]).open("r+b") as file:
        notes = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
    watch(Words(notes))
    tracker = Tracker(life["url"], journal=life["journal"], registry=CollectorRegistry(), **life["tracker"])
    notes[Note.RECOVERED_ALL] = not tracker._backlog.recovering
    notes[Note.PRODUCER], notes[Note.PRODUCER + 1] = divmod(tracker._backlog.producer.int, 1 << 64)
    callers = [
        threading.Thread(target=call, args=(tracker, life["name"], caller, notes), daemon=True)
        for caller in range(life["callers"])
    ]
    callers.append(threading.Thread(target=fork, args=(tracker, life, notes), daemon=True))
    for each in callers:
        each.start()
    notes[Note.READY] = 1
    signal.sigwait({signal.SIGTERM})
    notes[Note.CLOSING] = 1
    tracker.close(life["close_within"])


def serve() -> None:
    """Begin a life for each line, in a process forked for it; tell when it began and how it ended."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.setpgid(0, 0)  # it is killed with its child
                live(json.loads(line))
                status = 0
            except BaseException:
                logging.getLogger().critical("the life failed", exc_info=True)
            finally:
                os._exit(status)
        with suppress(OSError):  # it did so itself
            os.setpgid(pid, pid)
        say(pid=pid)
        _, status = os.waitpid(pid, 0)
        say(ended=pid, status=os.waitstatus_to_exitcode(status))


def say(**fields: int) -> None:
    """Answer."""
    os.write(1, f"{json.dumps(fields)}\n".encode())


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    journal_keeper._ADOPT_EVERY = 0.02  # type: ignore[misc]
    serve()
