"""The ways a process begins and ends, and what a tracker does then.

Which exits run what (checked on CPython 3.11 to 3.13): a script's end, an uncaught exception, SIGINT, gunicorn's sync
and gthread workers and hypercorn run `atexit`; a `multiprocessing` child runs its own finalizers only; under uvicorn
SIGTERM ends in a re-raised signal, so only the ASGI lifespan runs; a script under default SIGTERM, `os._exit` and
SIGKILL run nothing.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import Protocol
from weakref import WeakSet


class Exiting(Protocol):
    """What is told of forks and exits."""

    def at_exit(self) -> None:
        """The process ends."""
        ...

    def before_fork(self) -> None:
        """The process is about to fork."""
        ...

    def after_fork(self) -> None:
        """It has, and this is the parent."""
        ...

    def at_fork(self) -> None:
        """This is a fork's child: forget the parent's calls, and start nothing."""
        ...


# Told of forks from the start: a server may fork before the first call, and call from many threads after it.
_known: WeakSet[Exiting] = WeakSet()
# Held until closed: a tracker that its owner dropped still has calls to deliver.
_alive: dict[int, Exiting] = {}
_hooked_pid = 0
_fork_hooked: list[bool] = []


def know(tracker: Exiting) -> None:
    """Have *tracker* told of forks, for as long as it lives."""
    _known.add(tracker)
    if not _fork_hooked:
        _fork_hooked.append(True)
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)


def watch(tracker: Exiting) -> None:
    """Have *tracker* told of the end, until `forget`. Again in a fork's child, when it is used there."""
    global _hooked_pid  # noqa: PLW0603 - one set of hooks a process
    _alive[id(tracker)] = tracker
    if not _hooked_pid:
        atexit.register(_at_exit)
    if _hooked_pid != os.getpid():
        _hooked_pid = os.getpid()
        _hook_multiprocessing()


def forget(tracker: Exiting) -> None:
    """Have *tracker* told of the end no more: it is closed."""
    _alive.pop(id(tracker), None)


def _hook_multiprocessing() -> None:
    # Only where it is loaded already: a process that it started has it.
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize  # noqa: PLC0415

        # A positive priority: run by the child's end, while the program's own objects still work.
        Finalize(None, _at_exit, exitpriority=100)


def _at_exit() -> None:
    for tracker in list(_alive.values()):
        tracker.at_exit()


def _before_fork() -> None:
    for tracker in list(_known):
        tracker.before_fork()


def _after_fork_in_parent() -> None:
    for tracker in list(_known):
        tracker.after_fork()


def _after_fork() -> None:
    for tracker in list(_known):
        tracker.at_fork()
