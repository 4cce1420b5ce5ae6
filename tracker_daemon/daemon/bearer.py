"""The bearer token, from a file that may change while the daemon runs."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from tracker_daemon.clock import SystemClock
from tracker_daemon.errors import ConfigError
from tracker_daemon.logs import Rated, get_logger

if TYPE_CHECKING:
    from pathlib import Path

_LEAST = 16


def first_line(data: bytes) -> bytes:
    """Return the first line, without what surrounds it."""
    return data.partition(b"\n")[0].strip()


class Token:
    """The token in a file; read again when the file's time or inode changes, or by `reload`.

    Raises:
        ConfigError: the file cannot be read, or its first line holds less than 16 characters.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._value = b""
        self._rated = Rated(SystemClock())
        self.reload()

    def reload(self) -> None:
        """Read the file now."""
        try:
            status = self._path.stat()
            value = first_line(self._path.read_bytes())
        except OSError as error:
            raise ConfigError("token_file", f"cannot be read: {error.strerror}", str(self._path)) from None
        if len(value) < _LEAST or not value.isascii():
            raise ConfigError(
                "token_file", f"must hold at least {_LEAST} characters, of ASCII, in its first line", str(self._path)
            )
        self._value, self._seen = value, (status.st_mtime_ns, status.st_ino, status.st_size)

    def admits(self, header: str) -> bool:
        """Say whether *header* carries the token; in constant time, whatever it carries."""
        self._look()
        scheme, _, given = header.partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._value)
        return same and scheme.lower() == "bearer"

    def _look(self) -> None:
        # It may be replaced just now: what was read last holds until there is something better.
        try:
            status = self._path.stat()
            if (status.st_mtime_ns, status.st_ino, status.st_size) == self._seen:
                return
            before = self._value
            self.reload()
        except (OSError, ConfigError) as error:
            if (due := self._rated.due("token")) is not None:
                get_logger().error("token_unreadable", error=str(error), holds="the token read last", **due)
        else:
            if self._value != before:
                get_logger().info("token_changed", file=str(self._path))
