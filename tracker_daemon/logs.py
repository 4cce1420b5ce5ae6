"""The package's logger: structlog's bound logger over the standard library's `tracker_daemon` logger.

A library does not configure the host's logging: events go out as logfmt lines through `logging`, and each record
carries its fields as `record.tracker` for formatters that want them apart.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict

    from tracker_daemon.clock import Clock

_logfmt = structlog.processors.LogfmtRenderer(key_order=["event"], bool_as_flag=False)


def _render(logger: Any, method: str, event: EventDict) -> dict[str, Any]:
    exc_info = event.pop("exc_info", None)
    fields = dict(event)
    text = {key: value if isinstance(value, str | int | float) else str(value) for key, value in event.items()}
    return {"msg": _logfmt(logger, method, text), "exc_info": exc_info, "extra": {"tracker": fields}}


def get_logger() -> structlog.stdlib.BoundLogger:
    """Return the package's logger.

    psycopg_pool, which logs three lines for each use, is raised to WARNING unless the host has set its level.
    """
    pool = logging.getLogger("psycopg.pool")
    if pool.level == logging.NOTSET:
        pool.setLevel(logging.WARNING)
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger("tracker_daemon"),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[structlog.stdlib.filter_by_level, _render],
        cache_logger_on_first_use=False,
    )
    return logger


class Rated:
    """Lets an event through at most once in *every* seconds, and says how many were held back."""

    def __init__(self, clock: Clock, every: float = 30.0) -> None:
        self._clock, self._every = clock, every
        self._next: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def due(self, event: str) -> dict[str, int] | None:
        """Return the fields to add (`suppressed`), or `None` when *event* is to be held back."""
        now = self._clock.monotonic()
        if now < self._next.get(event, now):
            self._held[event] = self._held.get(event, 0) + 1
            return None
        self._next[event] = now + self._every
        held = self._held.pop(event, 0)
        return {"suppressed": held} if held else {}
