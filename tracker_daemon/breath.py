"""How long the worker holds the interpreter at a time.

CPython hands the interpreter on when its holder sleeps or waits, else only five milliseconds after somebody has asked
(`sys.getswitchinterval`). So the worker does its work in parts of a tenth of a millisecond and sleeps a moment in
between: an idle host is held up for no longer. How many items that is, is measured from part to part: machines differ,
and one that is shared has good and bad hours. A host that is busy itself keeps the worker waiting for those five
milliseconds after each part; then parts grow, or it would fall behind.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Item = TypeVar("Item")

_SHORT: Final = 0.000_1
_LONG: Final = 0.002
_MOMENT: Final = 0.000_05
# Whoever sleeps for a moment and comes back later than this has waited for the interpreter.
_LATE: Final = 0.003
# How far the size may come from the first one, either way: a clock may be coarse, or stand still.
_FACTOR: Final = 16


class Breath:
    """The size of the parts of one kind of work, and the moment between two of them.

    Args:
        first: the size of the first part; none is larger by more than 16 times in the same time.
        hold: how long one may take beside an idle host, seconds.
    """

    def __init__(self, first: int, hold: float = _SHORT) -> None:
        self._least = self._hold = hold
        self._first = self._rate = first / hold

    @property
    def size(self) -> int:
        """How much to do next."""
        return max(1, round(self._rate * self._hold))

    @property
    def is_held_up(self) -> bool:
        """Whether another thread has the interpreter whenever it can."""
        return self._hold > self._least

    def took(self, items: int, seconds: float) -> None:
        """Learn from a part how much fits: *seconds* of the thread's CPU time, so that waiting does not count."""
        if 2 * items >= self.size:  # a much smaller one tells little
            most = min(2 * self._rate, self._first * _FACTOR)
            self._rate = max(self._first / _FACTOR, min(items / max(seconds, 1e-9), most))

    def take(self) -> None:
        """Let go of the interpreter, for a moment that hurts no event loop. Alone in a process: no need."""
        if threading.active_count() == 1:
            return
        before = time.perf_counter()
        time.sleep(_MOMENT)
        late = time.perf_counter() - before > _LATE
        self._hold = min(2 * self._hold, _LONG) if late else self._least

    def measured(self, do: Callable[[int], int], most: int) -> int:
        """Have *do* done with at most so many items; return how many it was done with, as *do* does."""
        began = time.thread_time()
        done = do(most)
        self.took(done, time.thread_time() - began)
        return done

    def parts(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Yield *items* part by part, with a moment after each."""
        start = 0
        while start < len(items):
            end = min(start + self.size, len(items))
            began = time.thread_time()
            yield items[start:end]
            self.took(end - start, time.thread_time() - began)
            start = end
            self.take()

    def let_go(self, items: list[Any]) -> None:
        """Empty *items* part by part: what nobody else holds is freed so."""

        def free(count: int) -> int:
            del items[-count:]
            return count

        while items:
            self.measured(free, min(self.size, len(items)))
            self.take()
