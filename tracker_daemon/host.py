"""Waiting, on the host's own event loop, for what happens in the worker's thread.

asyncio and trio alike, without a thread of the host's and without the worker ever waiting for the host.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

_LOOK_UP: Final = 0.25


def _call_soon() -> Callable[[Callable[[], Any]], Any]:
    """Return how another thread has a function called on the running loop, without waiting."""
    if trio := sys.modules.get("trio"):
        # This may not be one of trio's tasks; or another thread is just importing it.
        with suppress(RuntimeError, AttributeError):
            return trio.lowlevel.current_trio_token().run_sync_soon  # type: ignore[no-any-return]
    import asyncio  # noqa: PLC0415 - a trio program may never have imported it

    return asyncio.get_running_loop().call_soon_threadsafe


def result(future: Future[Any], timeout: float | None) -> Any:
    """Return the result of *future*, as its `result` does; raise `TimeoutError` after so many seconds.

    A signal that comes right before the interpreter blocks does not break off the wait, and its handler would run only
    behind it: a second Ctrl-C would wait for the whole drain. So it looks up now and then.
    """
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _LOOK_UP if end is None else max(0.0, min(_LOOK_UP, end - time.monotonic()))
        try:
            return future.result(left)
        except TimeoutError:
            if end is not None and time.monotonic() >= end:
                raise


async def wait_done(future: Future[Any], timeout: float | None) -> bool:  # noqa: ASYNC109 - it is the point
    """Wait until *future* is done, at most *timeout* seconds; return whether it is. Cancellable."""
    if future.done():
        await anyio.lowlevel.checkpoint()
        return True
    event, call_soon = anyio.Event(), _call_soon()

    def wake(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # the host's loop is gone, and with it whoever waited
            call_soon(event.set)

    future.add_done_callback(wake)
    with anyio.move_on_after(timeout):
        await event.wait()
    return future.done()


async def wait_shielded(future: Future[Any], timeout: float) -> bool:  # noqa: ASYNC109
    """Like `wait_done`, but a cancellation is held back until the future is done or *timeout* has passed."""
    cancelled: BaseException | None = None
    deadline = anyio.current_time() + timeout
    with anyio.CancelScope(shield=True):
        while not future.done() and (left := deadline - anyio.current_time()) > 0:
            try:
                await wait_done(future, left)
            except anyio.get_cancelled_exc_class() as error:
                # Only `asyncio.Task.cancel` gets through the shield, once a call; it takes effect when we are done.
                cancelled = error
    if cancelled is not None:
        raise cancelled
    await anyio.lowlevel.checkpoint_if_cancelled()  # a scope's cancellation, which the shield held back
    return future.done()
