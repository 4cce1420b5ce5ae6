"""Work done while a lock is held, if nobody else has it: nobody waits, and no signal leaves the lock held.

`with lock:` is safe from an exception that a signal's handler raises, but it waits. An `acquire(blocking=False)` in
front of a `try` is not: the exception may come between the two, and the lock is held for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import RLock as Lock


def is_mine(lock: Lock) -> bool:
    """Whether this thread holds *lock*."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]  # noqa: SLF001 - as `threading.Condition` asks


def if_free(lock: Lock, do: Callable[[], object]) -> bool:
    """Call *do* while *lock* is held, if no other thread has it; return whether that was so."""
    if is_mine(lock):
        do()
        return True
    try:
        if held := lock.acquire(blocking=False):
            do()
    except BaseException:
        if is_mine(lock):
            lock.release()
        raise
    if held:
        lock.release()
    return held
