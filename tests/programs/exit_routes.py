"""One way a process ends, by name; says beforehand how many calls were accepted.

No route closes the tracker itself unless its name says so.

    python exit_routes.py ROUTE CONNINFO
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import select
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

from telling import WINDOW, calls, say

from tracker_daemon import Tracker

CONNINFO = sys.argv[2] if len(sys.argv) > 2 else ""


def stand_by() -> None:
    """Wait for a signal. Not `signal.pause`: one that comes just before it would be waited for in vain."""
    while True:
        select.select([], [], [], 0.1)


def new_tracker() -> Tracker:
    """Make the tracker that the route leaves behind."""
    return Tracker(CONNINFO, flush_interval=WINDOW)


def end() -> None:
    """The script ends."""
    say("main", accepted=calls(new_tracker(), 1_000))


def end_of_one_call() -> None:
    """The script ends with its first call."""
    say("main", accepted=calls(new_tracker(), 1))


def end_in_vain() -> None:
    """The script ends, and the server is not there."""
    say("main", accepted=calls(Tracker(CONNINFO, flush_interval=WINDOW, shutdown_timeout=0.3), 1))


def end_after_flush() -> None:
    """The script ends with some calls flushed and some pending."""
    tracker = new_tracker()
    before = calls(tracker, 100)
    tracker.flush(20)
    say("main", accepted=before + calls(tracker, 50))


def end_while_flushing() -> None:
    """The script ends while batches are under way."""
    tracker = Tracker(CONNINFO, flush_interval=0.001, max_batch_size=10)
    say("main", accepted=calls(tracker, 5_000, threads=500))


def closed() -> None:
    """The script closes the tracker, and ends."""
    tracker = new_tracker()
    accepted = calls(tracker, 1_000)
    say("main", accepted=accepted, lost=tracker.close().lost)


def dropped() -> None:
    """Nobody holds the tracker any more when the script ends."""
    tracker = new_tracker()
    accepted = calls(tracker, 1_000)
    del tracker
    gc.collect()
    say("main", accepted=accepted)


def two_trackers() -> None:
    """Two trackers are alive at the end, and one was closed before."""
    one, other, third = new_tracker(), new_tracker(), new_tracker()
    accepted = calls(one, 100) + calls(other, 50) + calls(third, 25)
    third.close()
    say("main", accepted=accepted)


def uncaught() -> None:
    """An exception ends the script."""
    say("main", accepted=calls(new_tracker(), 1_000))
    raise ZeroDivisionError


def sys_exit() -> None:
    """`sys.exit` with a status."""
    say("main", accepted=calls(new_tracker(), 1_000))
    sys.exit(3)


def sys_exit_in_thread() -> None:
    """`sys.exit` ends a thread, then the script ends."""
    tracker = new_tracker()

    def work() -> None:
        say("thread", accepted=calls(tracker, 500))
        sys.exit(3)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    say("main", accepted=calls(tracker, 500))


def interrupted() -> None:
    """SIGINT, which the test sends, ends the script."""
    say("main", accepted=calls(new_tracker(), 1_000), ready=True)
    stand_by()


def interrupted_and_handled() -> None:
    """SIGINT is caught in a `with`."""
    with new_tracker() as tracker:
        say("main", accepted=calls(tracker, 1_000), ready=True)
        stand_by()


def thread_outlives_main() -> None:
    """A thread that is no daemon goes on calling after the main thread has ended."""
    tracker = new_tracker()
    accepted = calls(tracker, 100)
    main = threading.current_thread()

    def work() -> None:
        main.join()
        say("thread", accepted=calls(tracker, 500))

    threading.Thread(target=work).start()
    say("main", accepted=accepted)


def first_call_after_main() -> None:
    """The very first call comes from a thread after the main thread has ended."""
    tracker = new_tracker()
    main = threading.current_thread()

    def work() -> None:
        main.join()
        say("thread", accepted=calls(tracker, 500))

    threading.Thread(target=work).start()


def daemon_thread_calls_on() -> None:
    """A daemon thread is calling while the interpreter ends: what was accepted is in the table when it is refused."""
    tracker = new_tracker()
    begun = threading.Event()

    def work() -> None:
        accepted = 0
        while tracker.record_turn("t"):
            accepted += 1
            if accepted == 100:
                begun.set()
            if accepted > 50_000:
                break
        say("thread", accepted=accepted)
        threading.Event().wait()

    threading.Thread(target=work, daemon=True).start()
    begun.wait()


def forked() -> None:
    """A child made by `os.fork` falls off the end of the script, like its parent."""
    tracker = new_tracker()
    accepted = calls(tracker, 100)
    child = os.fork()
    if not child:
        say("child", accepted=calls(tracker, 50))
        return
    accepted += calls(tracker, 25)
    os.waitpid(child, 0)
    say("main", accepted=accepted)


def forked_and_sys_exit() -> None:
    """A child made by `os.fork` before the parent's first call ends by `sys.exit`."""
    tracker = new_tracker()
    child = os.fork()
    if not child:
        say("child", accepted=calls(tracker, 50))
        sys.exit(0)
    os.waitpid(child, 0)
    say("main", accepted=calls(tracker, 25))


def forked_and_closed() -> None:
    """A child made by `os.fork` closes, and leaves by `os._exit`."""
    tracker = new_tracker()
    accepted = calls(tracker, 100)
    child = os.fork()
    if not child:
        mine = calls(tracker, 50)
        say("child", accepted=mine, lost=tracker.close().lost)
        os._exit(0)
    os.waitpid(child, 0)
    say("main", accepted=accepted + calls(tracker, 25))


def in_child(number: int) -> int:
    """Make calls in a child of `multiprocessing`: on the tracker it inherited, or on its own."""
    global shared  # noqa: PLW0603 - what a fork inherits
    shared = shared or new_tracker()
    accepted = calls(shared, number)
    say("child", accepted=accepted)
    return accepted


shared: Tracker | None = None


def _processes(method: str) -> None:
    global shared  # noqa: PLW0603 - what a fork inherits
    shared = new_tracker()
    accepted = calls(shared, 100)
    context = multiprocessing.get_context(method)
    children = [context.Process(target=in_child, args=(50,)) for _ in range(2)]
    for child in children:
        child.start()
    accepted += calls(shared, 25)
    for child in children:
        child.join()
        assert child.exitcode == 0
    say("main", accepted=accepted)


def mp_fork() -> None:
    """Children of `multiprocessing` by fork."""
    _processes("fork")


def mp_spawn() -> None:
    """Children of `multiprocessing` by spawn."""
    _processes("spawn")


def mp_forkserver() -> None:
    """Children of `multiprocessing` by fork server."""
    _processes("forkserver")


def fails_in_child(number: int) -> None:
    """Make calls and fail."""
    in_child(number)
    raise SystemExit(7)


def mp_child_fails() -> None:
    """A child of `multiprocessing` that ends by an exception."""
    child = multiprocessing.get_context("fork").Process(target=fails_in_child, args=(50,))
    child.start()
    child.join()
    say("main", exitcode=child.exitcode)


def mp_pool() -> None:
    """Workers of a `multiprocessing.Pool` that is closed and joined."""
    global shared  # noqa: PLW0603 - what a fork inherits
    shared = new_tracker()
    pool = multiprocessing.get_context("fork").Pool(2)
    accepted = sum(pool.map(in_child, [50] * 6, chunksize=1))
    pool.close()
    pool.join()
    say("main", total=accepted)


def executor() -> None:
    """Workers of a `ProcessPoolExecutor`."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        accepted = sum(pool.map(in_child, [50] * 4))
    say("main", total=accepted)


def _flushed_and_pending() -> None:
    tracker = new_tracker()
    flushed = calls(tracker, 100)
    tracker.flush(20)
    flushed += calls(tracker, 60)
    tracker.flush(20)
    say("main", flushed=flushed, pending=calls(tracker, 50), ready=True)


def os_exit() -> None:
    """`os._exit` runs nothing."""
    _flushed_and_pending()
    os._exit(0)


def killed() -> None:
    """A signal, which the test sends, ends the process without a word."""
    _flushed_and_pending()
    stand_by()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
