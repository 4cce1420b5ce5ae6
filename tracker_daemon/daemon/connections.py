"""A client's connection: bounds on their number, and on the time for a request's head and for its answer to be read.

Rules:
1. Who does not bring a head to its end, or does not take an answer off the connection, in time is cut off.
2. Where all are taken, or a client has its share of them (`admission`), a new one takes the place of the one that is
   idle for longest, with no request under way and none that waits to be read: of the client's own, or of whoever has
   the most. Only where each of them is busy it is refused.
3. Who ends its own side after a request (`shutdown(SHUT_WR)`) still gets the answer; the connection is closed then.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import TYPE_CHECKING, Final, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tracker_daemon.clock import SystemClock
from tracker_daemon.daemon.admission import refusal
from tracker_daemon.logs import Rated, get_logger

if TYPE_CHECKING:
    import asyncio

    from tracker_daemon.daemon.options import Options

_TOO_MANY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
)


class _Connection(Protocol):
    name: str
    transport: asyncio.Transport

    idle_since: float

    @property
    def is_busy(self) -> bool: ...


class _Places:
    """Which client holds which connections, oldest first."""

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._of: dict[str, dict[_Connection, None]] = {}
        self._rated = Rated(SystemClock())

    def enter(self, new: _Connection) -> bool:
        """Give *new* a place, if need be that of an idle one; say whether there was one."""
        mine = self._of.get(new.name, {})
        if refusal(len(mine), 1, self._limit - self._total):
            crowd = mine or max(self._of.values(), key=len)
            name = next(iter(crowd)).name
            if (due := self._rated.due(name)) is not None:
                has, limit = len(crowd), self._limit
                get_logger().warning("connections_full", client=name, has=has, open=self._total, limit=limit, **due)
            idle = sorted((each for each in crowd if not each.is_busy), key=lambda each: each.idle_since)
            if (oldest := next((each for each in idle if not _has_unread(each.transport)), None)) is None:
                return False
            self.leave(oldest)
            oldest.transport.close()
        self._of.setdefault(new.name, {})[new] = None
        self._total += 1
        return True

    def leave(self, connection: _Connection) -> None:
        """Give the place of *connection* back, if it has one."""
        held = self._of.get(connection.name, {})
        if connection in held:
            del held[connection]
            self._total -= 1
        if not held:
            self._of.pop(connection.name, None)


def bounded(options: Options) -> type[H11Protocol]:  # noqa: C901 - a class of small methods
    """Return uvicorn's protocol with the bounds of *options*."""
    places = _Places(options.max_connections)

    class Bounded(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _ended = False
        name = ""
        idle_since = 0.0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.client = self.client or _peer(transport)
            # What the system does not take at once is a client that does not read: it is told from the first byte on.
            transport.set_write_buffer_limits(high=0)
            self.name = self.client[0] if self.client else ""
            self.idle_since = self.loop.time()
            if not places.enter(self):
                transport.write(_TOO_MANY)
                transport.close()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.is_busy:
                self._forget()
            elif self._late is None:
                self._watch()

        def eof_received(self) -> bool:  # type: ignore[override]
            # Only the first byte after an answer would tell that the client is gone; until then it may be listening.
            self._ended = True
            return self.is_busy and not self.cycle.more_body

        def on_response_complete(self) -> None:
            self.idle_since = self.loop.time()
            super().on_response_complete()  # which begins the next request, if that has come already
            if self._ended and not self.is_busy:
                self.transport.close()
            elif self._late is None and self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._watch()  # the beginning of the next head came with this request

        def connection_lost(self, exc: Exception | None) -> None:
            places.leave(self)
            self._forget()
            self._is_read()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._is_read()
            self._unread = self.loop.call_later(options.read_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            self._is_read()
            super().resume_writing()

        @property
        def is_busy(self) -> bool:
            """Whether a request is under way."""
            return self.cycle is not None and not self.cycle.response_complete

        def _watch(self) -> None:
            self._late = self.loop.call_later(options.read_timeout, self.transport.close)

        def _forget(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _is_read(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

    return Bounded


def _has_unread(transport: asyncio.Transport) -> bool:
    """Say whether something has come that the loop has not read yet: a request, as like as not."""
    poll = select.poll()
    try:
        poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return False


def _peer(transport: asyncio.Transport) -> tuple[str, int] | None:
    """Name who is at the other end of a Unix socket: the process, with port 0, or, in another container, its user.

    A process of another namespace has no number here. By the port it is told that others may have the same name.
    """
    peer = transport.get_extra_info("socket")
    option = getattr(socket, "SO_PEERCRED", None)
    if peer is None or option is None or peer.family != socket.AF_UNIX:
        return None
    pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    return (f"process {pid}", 0) if pid else (f"user {uid} of a container", 1)
