"""An executor that still works while the interpreter ends."""

from __future__ import annotations

import _thread
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class LateExecutor(ThreadPoolExecutor):
    """Runs each job in a daemon thread of its own, also while the interpreter exits.

    The event loop looks host names up in its executor. The standard one refuses work once the main thread has ended,
    which is when an `atexit` drain may have to connect.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run *fn* in a thread of its own; in the caller's, where none can be started."""
        future: Future[Any] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        try:
            _thread.start_new_thread(job, ())
        except RuntimeError:  # 3.12 starts none while the interpreter ends: the worker itself waits for the answer
            job()
        return future
