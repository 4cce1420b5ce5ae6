"""The log of a process, on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time

from tracker_daemon.logs import get_logger


class _Json(logging.Formatter):
    """A JSON object a line: time, level, logger, event, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "tracker", None) or {"event": record.getMessage()})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name}
        line |= {"event": fields.pop("event", None), **fields}
        return json.dumps(line, default=str, ensure_ascii=False)


def log_to_stderr(level: str, format_: str) -> None:
    """Send the package's log from *level* on, and others' warnings, to stderr: as text, or as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = _Json() if format_ == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format, formatter.default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel("WARNING")
    # What is wrong with a request is its sender's to know: any client would write the log at its own rate.
    logging.getLogger("uvicorn").setLevel("ERROR")
    logging.getLogger("tracker_daemon").setLevel(level.upper())


def set_level(level: str) -> None:
    """Set the log's level, and say so under the one of the two that lets more through."""
    logger = logging.getLogger("tracker_daemon")
    old, new = logger.level, logging.getLevelNamesMapping()[level.upper()]
    logger.setLevel(min(old, new))
    if old != new:
        get_logger().warning("log_level_changed", to=level)
    logger.setLevel(new)
