"""What signals do to the demo: the first ends the traffic, a second one everything."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Signals:
    """What SIGINT, SIGTERM and SIGHUP do, step by step: end the traffic, end the demo, nothing (it is cleaning up)."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._next = self._end_demo
        self._cancel: Callable[[], object] | None = None

    @contextmanager
    def cancelling(self) -> Iterator[None]:
        """Have the end of the demo cancel the task that runs now: an exception would hit any task of the loop."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._cancel = partial(loop.call_soon_threadsafe, task.cancel)
        try:
            yield
        finally:
            self._cancel = None

    def traffic_begins(self) -> None:
        """From now on, the first signal ends the traffic only."""
        self._next = self._end_traffic

    def ignore(self) -> None:
        """From now on, the end must not be disturbed."""
        self._next = self._nothing

    def _end_traffic(self) -> None:
        self._next = self._end_demo
        self.stop.set()

    def _end_demo(self) -> None:
        self._next = self._nothing
        self.stop.set()
        logging.disable()  # connections that are cut off are no news
        if self._cancel is None:
            raise KeyboardInterrupt
        self._cancel()

    def _nothing(self) -> None:
        pass

    def __enter__(self) -> Self:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, lambda *_: self._next())
        return self

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
        for number, handler in self._before.items():
            signal.signal(number, handler)
