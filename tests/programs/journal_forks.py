"""One scene of forking with a journal, by name: each process says what it made, and some are killed.

python journal_forks.py SCENE CONNINFO DIRECTORY [INSTANT]
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from inspect import iscoroutinefunction
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import psycopg
from prometheus_client import CollectorRegistry
from telling import WINDOW, say

from tracker_daemon import JournalError, MemorySink, Tracker, journal_keeper
from tracker_daemon.backlog import Backlog
from tracker_daemon.journal.journal import Journal
from tracker_daemon.postgres.sink import PostgresSink

if TYPE_CHECKING:
    from collections.abc import Callable

SCENE, CONNINFO, DIRECTORY = sys.argv[1:4]


def new_tracker(directory: str = DIRECTORY, **settings: Any) -> Tracker:
    """Make a tracker whose window nobody waits for."""
    options = {"flush_interval": WINDOW, "registry": CollectorRegistry(), **settings}
    return Tracker(CONNINFO, journal=directory, **options)


def make(tracker: Tracker, name: str, number: int = 20) -> None:
    """Make calls, each with a digit of its own; say which were accepted, each as soon as it was."""
    for i in range(number):
        thread_id = f"{name}-{i % 4}"
        assert tracker.record_turn(thread_id, name, 4 ** (i // 4))
        say(name, made=thread_id)


def fork(child: Callable[[], None]) -> int:
    """Run *child* in a fork; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(40)
    try:
        child()
    except BaseException as error:
        say("child", failed=repr(error))
        raise
    os._exit(0)


def join(pid: int) -> int:
    """Wait for a child; return how it ended."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def killed() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def place(tracker: Tracker) -> str:
    """Return where a process has its files."""
    assert tracker._journal is not None
    return str(tracker._journal.directory.relative_to(DIRECTORY))


def children_of(tracker: Tracker, names: list[str]) -> None:
    """Fork a child for each name at once: each makes calls and closes."""

    def work(name: str) -> None:
        make(tracker, name)
        report = tracker.close()
        stats = tracker.stats()
        say(name, place=place(tracker), lost=report.lost, stats=[stats.accepted, stats.applied])

    pids = [fork(lambda name=name: work(name)) for name in names]  # type: ignore[misc]
    assert [join(pid) for pid in pids] == [0] * len(pids)


def preload() -> None:
    """The parent makes the tracker and forks, as a server does that loads the application first."""
    tracker = new_tracker()
    children_of(tracker, ["a", "b", "c"])
    make(tracker, "parent")
    say("parent", place=place(tracker), lost=tracker.close().lost, producers=4)


def called_before() -> None:
    """The parent has calls in its journal, unflushed, when it forks."""
    tracker = new_tracker()
    make(tracker, "parent")
    children_of(tracker, ["a", "b", "c"])
    make(tracker, "later")
    say("parent", place=place(tracker), lost=tracker.close().lost, producers=4)


def nested() -> None:
    """A child forks too."""
    tracker = new_tracker()

    def child() -> None:
        make(tracker, "child")
        children_of(tracker, ["grandchild"])
        say("child", place=place(tracker), lost=tracker.close().lost)

    assert join(fork(child)) == 0
    tracker.close()


def dying(tracker: Tracker, name: str) -> None:
    """Fork a child that makes calls and is killed before any of them is flushed."""

    def child() -> None:
        make(tracker, name)
        killed()

    assert join(fork(child)) == -signal.SIGKILL


def killed_child_next_child() -> None:
    """A child is killed; the next one finds its calls. The parent never works."""
    tracker = new_tracker()
    dying(tracker, "dead")

    def child() -> None:
        make(tracker, "next")
        tracker.flush(20)
        say("next", place=place(tracker), applied=tracker.stats().applied, lost=tracker.close().lost)

    assert join(fork(child)) == 0


def killed_child_next_child_inside_with() -> None:
    """The same; the next child's worker runs before its first call."""
    tracker = new_tracker()
    dying(tracker, "dead")

    def child() -> None:
        with tracker:
            tick = Event()
            while tracker._worker._event is None:  # it has looked, found nothing, and waits
                tick.wait(0.01)
            make(tracker, "next")
            tracker.flush(20)
            say("next", place=place(tracker), applied=tracker.stats().applied)

    assert join(fork(child)) == 0


def killed_child_parent() -> None:
    """A child is killed before the parent begins to work: the parent finds its calls."""
    tracker = new_tracker()
    dying(tracker, "dead")
    make(tracker, "next")
    tracker.flush(20)
    say("next", place=place(tracker), applied=tracker.stats().applied, lost=tracker.close().lost)


def group_killed() -> None:
    """Parent and children make calls, and all are killed."""
    tracker = new_tracker()
    make(tracker, "parent")
    read, write = os.pipe()

    def child(name: str) -> None:
        make(tracker, name)
        os.write(write, b".")
        signal.pause()

    pids = [fork(lambda name=name: child(name)) for name in ("a", "b", "c")]  # type: ignore[misc]
    done = b""
    while len(done) < len(pids):
        done += os.read(read, 1)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        join(pid)
    killed()


def orphan() -> None:
    """The parent is killed, a child of it lives on, until there is a file `over` beside the journal."""
    tracker = new_tracker()
    make(tracker, "parent")

    def child() -> None:
        os.setpgid(0, 0)  # not ended with the rest; an alarm ends it
        make(tracker, "child")
        silence = os.open(os.devnull, os.O_WRONLY)
        os.write(write, b".")
        for stream in (1, 2):  # whoever waits for the parent's end waits for its output's
            os.dup2(silence, stream)
        over, tick = Path(f"{DIRECTORY}-over"), Event()
        while not over.exists():
            tick.wait(0.01)
        tracker.close()
        over.unlink()

    read, write = os.pipe()
    fork(child)
    os.read(read, 1)
    killed()


def parent_that_only_forks() -> None:
    """A parent that never works, and one child: what children of an earlier process left is applied."""
    tracker = new_tracker()

    def child() -> None:
        make(tracker, "next")
        tracker.flush(20)
        say("next", place=place(tracker), applied=tracker.stats().applied, lost=tracker.close().lost)

    assert join(fork(child)) == 0
    say("parent", applied=tracker.stats().applied)


def parent_that_works() -> None:
    """A parent that works: what the earlier one and its children left is applied."""
    tracker = new_tracker()
    make(tracker, "next")
    tracker.flush(20)
    say("next", place=place(tracker), applied=tracker.stats().applied, lost=tracker.close().lost)


def again() -> None:
    """Begin with what is left, make no call, and close."""
    say("again", lost=new_tracker().close().lost)


def several() -> None:
    """Two trackers in one host, a directory each, over a fork; then both are killed."""
    one, two = new_tracker(f"{DIRECTORY}/one"), new_tracker(f"{DIRECTORY}/two")
    make(one, "one")
    make(two, "two")

    def child() -> None:
        make(one, "child-one")
        make(two, "child-two")
        killed()

    join(fork(child))
    killed()


def several_again() -> None:
    """The two again: each applies its own."""
    for name in ("one", "two"):
        with new_tracker(f"{DIRECTORY}/{name}") as tracker:
            tracker.flush(20)
            say(name, applied=tracker.stats().applied)


def taken() -> int:
    """Return the bytes that all files in the directory take, in whole blocks."""
    found = 0
    for path in Path(DIRECTORY).rglob("*.journal"):
        with suppress(FileNotFoundError):
            found += -(-path.stat().st_size // 4_096) * 4_096
    return found


def briefly(tracker: Tracker, name: str) -> None:
    """Fork a child that makes calls and ends at once, without closing; say what it made if that is in a file."""

    def child() -> None:
        made = [f"{name}-{i}" for i in range(4)]
        assert all(tracker.record_turn(thread_id, name, 1) for thread_id in made)
        journal = tracker._journal
        assert journal is not None
        errors = journal.errors["quota"]
        for thread_id in made if journal.stores_window else ():
            say(name, made=thread_id)
        say(name, stored=journal.stores_window, degraded=journal.degraded, errors=errors)

    assert join(fork(child)) == 0


def one_after_another() -> None:
    """A parent that lives, and hundreds of children that call and end without closing: it takes over what they left."""
    journal_keeper._ADOPT_EVERY = 0.01  # type: ignore[misc]
    quota, most, flushes, children = 32 << 20, 0, 0, 300
    tracker = new_tracker(journal_quota=quota)
    for number in range(children):
        briefly(tracker, f"c{number}")
        most = max(most, now := taken())
        while now > quota // 2:  # as children that are not so many at once
            make(tracker, f"parent{flushes}", 1)
            tracker.flush(20)
            flushes += 1
            most = max(most, now := taken())
    tick = Event()
    with psycopg.connect(CONNINFO, autocommit=True) as connection:  # what is left is found with nothing to flush
        while connection.execute("SELECT sum(turn_count) FROM conversations").fetchone() != (children * 4 + flushes,):
            tick.wait(0.01)
    tracker.flush(20)
    journal = tracker._journal
    assert journal is not None
    errors, held = dict(journal.errors), len(journal._places)
    say("parent", most=most, quota=quota, held=held, errors=errors, recovered=journal.recovered)
    say("parent", told=journal.bytes, taken=taken(), lost=tracker.close().lost)


def database_away() -> None:
    """The same with the database away: beyond the quota children go on in memory. Then the parent is killed."""
    quota, most = 16 << 20, 0
    tracker = new_tracker(journal_quota=quota)
    make(tracker, "parent", 4)
    for number in range(40):
        briefly(tracker, f"c{number}")
        most = max(most, taken())
    assert tracker._journal is not None
    say("parent", most=most, quota=quota, told=tracker._journal.bytes, taken=taken())
    killed()


def killed_while_it_takes_over() -> None:
    """A parent that works is killed in the middle of taking over what two children left, after the step named."""
    journal_keeper._ADOPT_EVERY = 0.05  # type: ignore[misc]
    tracker = new_tracker(flush_interval=0.02)
    make(tracker, "parent", 4)
    tracker.flush(20)
    owner, name = {
        "registered": (PostgresSink, "open"),
        "noted": (Journal, "note_registered"),
        "committed": (PostgresSink, "apply"),
        "settled": (Backlog, "settle_recovered"),
        "kept": (Journal, "recovered_window"),
        "moved": (Journal, "_bring_home"),
    }[sys.argv[4]]
    step = getattr(owner, name)

    def last(*arguments: Any) -> Any:
        step(*arguments)
        killed()

    async def last_of_all(*arguments: Any, **options: Any) -> Any:
        await step(*arguments, **options)
        killed()

    setattr(owner, name, last_of_all if iscoroutinefunction(step) else last)
    for child in ("a", "b"):
        briefly(tracker, child)
    signal.pause()


def hold() -> None:
    """Have the directory, until killed."""
    tracker = new_tracker()
    make(tracker, "held")
    say("holder", ready=True)
    signal.pause()


def intrude() -> None:
    """Try to have the same directory."""
    try:
        new_tracker()
    except JournalError as error:
        say("intruder", refused=str(error), files=sorted(path.name for path in Path(DIRECTORY).iterdir()))


def twice_in_one_process() -> None:
    """Make two trackers on one directory."""
    first = Tracker(MemorySink(), journal=DIRECTORY, registry=CollectorRegistry())
    try:
        new_tracker()
    except JournalError as error:
        say("second", refused=str(error))
    first.close()
    second = new_tracker()
    say("third", accepted=int(second.record_turn("a")), lost=second.close().lost)


def hook_that_calls() -> None:
    """A hook that was registered before the tracker's own calls in the child; then the parent is killed."""
    made: list[Tracker] = []

    def hook() -> None:
        for tracker in made:
            make(tracker, "hook", 8)

    os.register_at_fork(after_in_child=hook)
    make_hooked = new_tracker()
    made.append(make_hooked)
    make(make_hooked, "before")

    def child() -> None:
        make(make_hooked, "child")
        say("child", lost=make_hooked.close().lost, applied=make_hooked.stats().applied)

    pid = fork(child)
    assert not make_hooked._backlog.forking, "that the process forks is over for its parent"
    make(make_hooked, "after")
    join(pid)
    killed()


def handler_in_the_beginning() -> None:
    """In the child a signal handler calls while the tracker begins its life there; then the parent is killed."""
    tracker, came = new_tracker(), list[int]()
    make(tracker, "before")
    make_journal = tracker._make_journal

    def interrupted(*, forked: bool) -> Any:
        journal = make_journal(forked=forked)
        if not came:
            came.append(1)
            make(tracker, "handler", 8)
        return journal

    vars(tracker)["_make_journal"] = interrupted

    def child() -> None:
        make(tracker, "child")
        say("child", lost=tracker.close().lost, applied=tracker.stats().applied)

    join(fork(child))
    killed()


def shooting() -> Event:
    """Send a signal to this process and its children, over and over, until the event is set."""
    assert os.getpgrp() == os.getpid(), "a group of its own"
    ended = Event()

    def shoot() -> None:
        while not ended.wait(0.000_2):
            os.killpg(0, signal.SIGALRM)

    Thread(target=shoot, daemon=True).start()
    return ended


def handler_that_calls() -> None:
    """A signal handler calls in parent and children, at any instant of the forks; then the parent is killed."""
    tracker, me, busy = new_tracker(), os.getpid(), list[int]()
    numbers = {"main": 0, "handler": 0}

    def one(name: str) -> None:
        number = numbers[name]
        numbers[name] += 1
        assert tracker.record_turn(f"{name}-{number // 31}", name, 4 ** (number % 31))

    def handler(*_: object) -> None:
        if not busy:
            busy.append(1)
            if os.getpid() == me:
                one("handler")
            else:
                tracker.record_turn("of a child", "child", 1)
            busy.pop()

    signal.signal(signal.SIGALRM, handler)
    ended = shooting()
    for _ in range(150):
        one("main")
        pid = os.fork()
        if not pid:
            os._exit(0)
        for _ in range(20):
            one("main")
        os.waitpid(pid, 0)
    ended.set()
    for name, number in numbers.items():
        for made in range(number):
            say(name, made=f"{name}-{made // 31}")
    killed()


if __name__ == "__main__":
    globals()[SCENE]()
