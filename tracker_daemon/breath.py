"""How much is done at a time while other threads want the interpreter.

CPython hands the interpreter on when its holder sleeps or waits, else only five milliseconds after somebody has asked
(`sys.getswitchinterval`). So the worker does its work in small parts and sleeps a moment in between: an idle host is
held up for a fraction of a millisecond. A host that is busy itself keeps the worker waiting for that interval after
each part; then parts grow, or it would fall behind.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Item = TypeVar("Item")

_MOMENT: Final = 0.000_05
# Whoever sleeps for a moment and comes back later than this has waited for the interpreter.
_LATE: Final = 0.003


class Breath:
    """The size of the parts, and the moment between two of them.

    Args:
        least: the size beside an idle host.
        most: beside a busy one.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self.size = least
        """How much to do next."""

    def take(self) -> None:
        """Let go of the interpreter, for a moment that hurts no event loop."""
        before = time.perf_counter()
        time.sleep(_MOMENT)
        late = time.perf_counter() - before > _LATE
        self.size = min(2 * self.size, self._most) if late else self._least

    def parts(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Yield *items* part by part, with a moment after each."""
        start = 0
        while start < len(items):
            end = start + self.size
            yield items[start:end]
            start = end
            self.take()
