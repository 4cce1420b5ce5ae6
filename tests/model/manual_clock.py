"""Time that stands until it is moved, and coroutines that are run by hand, without a loop, a thread or a wait.

Rules:
1. `pause` hands control to whoever drives the coroutine; `Driven` goes from one pause to the next, `run` to the end.
2. A wait takes no time but the clock's own: when it is resumed and its event is not set, the clock has moved on by
   the seconds that were asked for.
"""

from __future__ import annotations

import types
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator

    import anyio

T = TypeVar("T")
START: Final = 1_700_000_000.0
"""Seconds since 1970 when a clock is made."""
MOST_PAUSES: Final = 10_000
"""What takes more never ends."""


@types.coroutine
def pause(at: str) -> Generator[str, None, None]:
    """Hand control to the driver; *at* says where."""
    yield at


class ManualClock:
    """A `Clock` that only its waits and `advance` move.

    Attributes:
        waits: the seconds of every wait, in order.
    """

    def __init__(self) -> None:
        self.waits: list[float | None] = []
        self._passed = self._set = 0.0

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._passed += seconds

    def set_wall(self, seconds: float) -> None:
        """Set the wall clock on, or back, while no time passes."""
        self._set += seconds

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return self._passed

    def wall(self) -> float:
        """See `Clock.wall`."""
        return START + self._passed + self._set

    async def wait(self, event: anyio.Event, timeout: float | None) -> bool:  # noqa: ASYNC109 - the protocol's
        """See `Clock.wait`; pauses at "wait"."""
        self.waits.append(timeout)
        await pause("wait")
        if not event.is_set() and timeout is not None:
            self.advance(timeout)
        return event.is_set()


class Driven:
    """A coroutine that is run by hand.

    Attributes:
        at: the pause where it stands; `None` when it has ended.
    """

    def __init__(self, coroutine: Coroutine[Any, None, object]) -> None:
        self._coroutine = coroutine
        self._pauses = 0
        self.at: str | None = None
        self.resume()

    def resume(self) -> None:
        """Go on to the next pause, or to the end. Raises what the coroutine raises."""
        self._go(lambda: self._coroutine.send(None))

    def throw(self, error: BaseException) -> None:
        """Go on with *error* raised at the pause."""
        self._go(lambda: self._coroutine.throw(error))

    def _go(self, step: Any) -> None:
        self.at = None
        self._pauses += 1
        assert self._pauses < MOST_PAUSES, f"it is still running after {MOST_PAUSES} pauses"
        with suppress(StopIteration):
            self.at = step()


def run(coroutine: Coroutine[Any, None, T]) -> T:
    """Run *coroutine* through all its pauses, `MOST_PAUSES` at most; return what it returns."""
    for _ in range(MOST_PAUSES):
        try:
            coroutine.send(None)
        except StopIteration as end:
            result: T = end.value
            return result
    coroutine.close()
    raise AssertionError(f"it is still running after {MOST_PAUSES} pauses")
