"""Waiting until the worker has added up what was called."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracker_daemon import Tracker


def drained(tracker: Tracker) -> None:
    """Return when the queue is empty: every call is in the open window. A short queue alone wakes no worker."""
    while len(tracker._backlog.queue):  # noqa: SLF001
        tracker._worker.wake()  # noqa: SLF001
        time.sleep(0.001)  # between two looks
