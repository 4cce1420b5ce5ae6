"""Time for the worker: what it is now, and waiting. Tests hand in a clock that they move."""

from __future__ import annotations

import time
from typing import Protocol

import anyio


class Clock(Protocol):
    """The worker's only source of time."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back."""
        ...

    def wall(self) -> float:
        """Seconds since 1970."""
        ...

    async def wait(self, event: anyio.Event, timeout: float | None) -> bool:  # noqa: ASYNC109
        """Wait until *event* is set or *timeout* seconds have passed; return whether it is set."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return time.monotonic()

    def wall(self) -> float:
        """See `Clock.wall`."""
        return time.time()

    async def wait(self, event: anyio.Event, timeout: float | None) -> bool:  # noqa: ASYNC109 - it is the point
        """See `Clock.wait`."""
        with anyio.move_on_after(timeout):
            await event.wait()
        return event.is_set()
