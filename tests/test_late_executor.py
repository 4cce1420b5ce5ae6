"""The executor that the worker's loop looks host names up in."""

from __future__ import annotations

import _thread
import threading

import pytest

from tracker_daemon.late_executor import LateExecutor


def refuse(*_: object) -> int:
    """Start no thread, as an interpreter does that ends."""
    raise RuntimeError("can't create new thread at interpreter shutdown")


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_job(monkeypatch: pytest.MonkeyPatch, *, at_the_end: bool) -> None:
    """A job runs in a thread of its own; in the caller's where none can be had. Its answer or its error comes back."""
    if at_the_end:
        monkeypatch.setattr(_thread, "start_new_thread", refuse)
    executor = LateExecutor()
    where = executor.submit(threading.get_ident).result(30)
    assert (where == threading.get_ident()) is at_the_end
    assert executor.submit(divmod, 7, 2).result(30) == (3, 1)
    for error in (ZeroDivisionError, SystemExit):
        failed = executor.submit(_raise, error)
        assert isinstance(failed.exception(30), error)


def _raise(error: type[BaseException]) -> None:
    raise error
