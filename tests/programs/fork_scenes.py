"""One scene of forking, by name: what parent and child see, and how many calls of each were accepted.

python fork_scenes.py SCENE CONNINFO [HOW_THE_CHILD_LEAVES]
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import weakref
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from prometheus_client import CollectorRegistry
from telling import WINDOW, calls, say

from tracker_daemon import MemorySink, Tracker

if TYPE_CHECKING:
    from collections.abc import Callable

SCENE, CONNINFO, LEAVE = [*sys.argv[1:], "os._exit"][:3]
REGISTRY = CollectorRegistry()


def new_tracker(flush_interval: float = WINDOW) -> Tracker:
    """Make a tracker on the registry that `seen` reads."""
    return Tracker(CONNINFO, flush_interval=flush_interval, registry=REGISTRY)


def counted() -> float:
    """Return the sum of all counters, gauges of pending calls, and observations."""
    wanted = ("_total", "_count", "tracker_queue_calls", "tracker_queue_depth", "timestamp_seconds")
    return sum(s.value for family in REGISTRY.collect() for s in family.samples if s.name.endswith(wanted))


def seen(tracker: Tracker) -> dict[str, Any]:
    """Return what a process sees of a tracker."""
    stats = tracker.stats()
    return {
        "producer": str(tracker._backlog.producer),  # what the ledger will have
        "stats": [stats.accepted, stats.applied, stats.dead_lettered, stats.lost, stats.pending, stats.rejected],
        "pending": tracker.pending("t0") is not None,
        "counted": counted(),
        "closed": tracker.closed,
    }


def fork(child: Callable[[], None]) -> int:
    """Run *child* in a fork; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(25)
    child()
    if LEAVE == "sys.exit":
        sys.exit(0)
    os._exit(0)


def join(pid: int) -> None:
    """Wait for a child, which must end well."""
    _, status = os.waitpid(pid, 0)
    if status:
        say("main", failed=os.waitstatus_to_exitcode(status))


def backends() -> list[int]:
    """Return the server's processes for trackers on this database."""
    statement = (
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'tracker-daemon' AND datname = current_database()"
    )
    with psycopg.connect(CONNINFO, autocommit=True) as connection:
        return [pid for (pid,) in connection.execute(statement)]


def running() -> None:
    """The parent has flushed and pending calls and a connection, a closed tracker, and counts of one that is gone."""
    closed, gone = (Tracker(MemorySink(), registry=REGISTRY) for _ in range(2))
    for each in (closed, gone):
        calls(each, 3)
        each.close()
    left = weakref.ref(gone)
    del gone, each
    while left() is not None:
        gc.collect()
    assert counted() > 0
    tracker = new_tracker()
    accepted = calls(tracker, 60)
    tracker.flush(20)
    accepted += calls(tracker, 40)
    before = backends()

    def child() -> None:
        say("child at first", **seen(tracker))
        mine = calls(tracker, 50)
        say("child with calls", **seen(tracker))
        tracker.flush(20)
        say("child", accepted=mine, **seen(tracker))
        if LEAVE != "sys.exit":
            tracker.close()

    join(fork(child))
    say("parent at first", **seen(tracker))
    accepted += calls(tracker, 25)
    tracker.flush(20)
    say("parent", accepted=accepted, kept_connection=backends() == before, **seen(tracker))


def idle_child() -> None:
    """The child does nothing with the tracker."""
    tracker = new_tracker()
    accepted = calls(tracker, 40)
    tracker.flush(20)
    before = backends()
    join(fork(lambda: None))
    accepted += calls(tracker, 25)
    tracker.flush(20)
    say("parent", accepted=accepted, kept_connection=backends() == before)


def in_flight() -> None:
    """The parent's flush waits for a lock in the server."""
    tracker = new_tracker()
    accepted = calls(tracker, 40)
    tracker.flush(20)
    with psycopg.connect(CONNINFO) as blocker, psycopg.connect(CONNINFO, autocommit=True) as watcher:
        blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        accepted += calls(tracker, 40)
        flush = threading.Thread(target=tracker.flush, args=(20,))
        flush.start()
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        deadline = monotonic() + 20
        while watcher.execute(waiting).fetchone() != (1,):
            assert monotonic() < deadline

        def child() -> None:
            mine = calls(tracker, 50)
            say("child", accepted=mine, lost=tracker.close().lost)

        pid = fork(child)
        while watcher.execute(waiting).fetchone() != (2,):
            assert monotonic() < deadline
    join(pid)
    flush.join()
    say("parent", accepted=accepted + calls(tracker, 25), **seen(tracker))


def at_once() -> None:
    """The fork comes right behind the first call: the parent's worker is starting up."""
    for number in range(6):
        tracker = new_tracker()
        accepted = calls(tracker, 10)

        def child(tracker: Tracker = tracker) -> None:
            say("child", accepted=calls(tracker, 5), lost=tracker.close().lost)

        pid = fork(child)
        say("parent", accepted=accepted, lost=tracker.close().lost, number=number)
        join(pid)


def not_started() -> None:
    """The tracker is made before the fork, and used after it: by many threads of the child at once."""
    tracker = new_tracker()
    producer = seen(tracker)["producer"]

    def child() -> None:
        start, counts = threading.Barrier(16), []

        def work() -> None:
            start.wait()
            counts.append(calls(tracker, 20))

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        say("child", accepted=sum(counts), **seen(tracker))
        tracker.close()

    pids = [fork(child) for _ in range(3)]
    for pid in pids:
        join(pid)
    accepted = calls(tracker, 40)
    say("parent", accepted=accepted, same_producer=seen(tracker)["producer"] == producer, **seen(tracker))


def in_thread() -> None:
    """A thread forks, beside the main thread's calls."""
    tracker = new_tracker()
    accepted = calls(tracker, 40)

    def child() -> None:
        mine = calls(tracker, 50)
        say("child", accepted=mine, lost=tracker.close().lost)

    thread = threading.Thread(target=lambda: join(fork(child)))
    thread.start()
    while thread.is_alive() and accepted < 20_000:
        accepted += calls(tracker, 10)
    thread.join()
    say("parent", accepted=accepted)


def nested() -> None:
    """The child forks too, and its child again."""
    tracker = new_tracker()

    def generation(depth: int) -> None:
        before = seen(tracker)
        mine = calls(tracker, 10 * depth)
        if depth < 4:
            join(fork(lambda: generation(depth + 1)))
        mine += calls(tracker, 1)
        tracker.flush(20)
        say(f"generation {depth}", accepted=mine, at_first=before, **seen(tracker))
        tracker.close()

    generation(1)


def many() -> None:
    """Twenty forks in a row while threads call and flush in the parent."""
    tracker = new_tracker(0.01)
    done, counts = threading.Event(), []

    def work() -> None:
        accepted = 0
        while not done.wait(0.0005):
            accepted += calls(tracker, 10)
            tracker.stats()
            counted()
        counts.append(accepted)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()

    def child() -> None:
        mine = calls(tracker, 30)
        say("child", accepted=mine, lost=tracker.close().lost)

    for _ in range(10):
        for pid in [fork(child), fork(child)]:
            join(pid)
    done.set()
    for thread in threads:
        thread.join()
    say("parent", accepted=sum(counts))


def locks_held() -> None:
    """Every lock of the tracker is held by another thread at the fork."""
    tracker = new_tracker()
    accepted = calls(tracker, 40)
    held, free = threading.Event(), threading.Event()
    parts = (tracker, tracker._backlog, tracker._refusals, tracker._collector, tracker._worker)
    kinds = (type(threading.Lock()), type(threading.RLock()))
    locks = [each for part in parts for each in vars(part).values() if isinstance(each, kinds)]

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            free.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def child() -> None:
        before = seen(tracker)
        mine = calls(tracker, 50)
        tracker.flush(20)
        refused = 0
        try:
            tracker.record_turn("")
        except ValueError:
            refused = 1
        say("child", accepted=mine, refused=refused, locks=len(locks), at_first=before, **seen(tracker))
        tracker.close()

    pid = fork(child)
    join(pid)
    free.set()
    thread.join()
    say("parent", accepted=accepted + calls(tracker, 25))


def in_with() -> None:
    """The fork is inside a `with`, which the child leaves too."""
    accepted = 0
    with new_tracker() as tracker:
        accepted += calls(tracker, 40)
        pid = os.fork()
        accepted = calls(tracker, 50) + (accepted if pid else 0)
    say("parent" if pid else "child", accepted=accepted, **seen(tracker))
    if pid:
        join(pid)


def closing() -> None:
    """The fork comes while another thread waits in close."""
    sink = MemorySink()
    tracker = Tracker(CONNINFO, flush_interval=WINDOW, registry=REGISTRY)
    other = Tracker(sink, flush_interval=WINDOW, registry=REGISTRY)
    accepted = calls(tracker, 40)
    tracker.flush(20)
    with psycopg.connect(CONNINFO) as blocker:
        blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        accepted += calls(tracker, 40)
        thread = threading.Thread(target=tracker.close)
        thread.start()
        while not tracker.closed:
            pass

        def child() -> None:
            mine = calls(other, 50)
            other.flush(20)
            say("child", memory=mine, turns=sum(row.turn_count for row in sink.rows.values()))

        join(fork(child))
    thread.join()
    say("parent", accepted=accepted)


if __name__ == "__main__":
    globals()[SCENE]()
