"""A client's connection: bounds on their number, and on the time for a request's head and for its answer to be read.

Rules:
1. Who does not bring a head to its end, or does not take an answer off the connection, in time is cut off.
2. Who ends its own side after a request (`shutdown(SHUT_WR)`) still gets the answer; the connection is closed then.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

    from tracker_daemon.daemon.options import Options

_TOO_MANY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
)


def bounded(options: Options) -> type[H11Protocol]:  # noqa: C901 - a class of small methods
    """Return uvicorn's protocol with the bounds of *options*."""

    class Bounded(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _ended = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.client = self.client or _peer(transport)
            # What the system does not take at once is a client that does not read: it is told from the first byte on.
            transport.set_write_buffer_limits(high=0)
            if len(self.connections) > options.max_connections:
                transport.write(_TOO_MANY)
                transport.close()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._is_busy:
                self._forget()
            elif self._late is None:
                self._watch()

        def eof_received(self) -> bool:  # type: ignore[override]
            # Only the first byte after an answer would tell that the client is gone; until then it may be listening.
            self._ended = True
            return self._is_busy and not self.cycle.more_body

        def on_response_complete(self) -> None:
            super().on_response_complete()  # which begins the next request, if that has come already
            if self._ended and not self._is_busy:
                self.transport.close()
            elif self._late is None and self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._watch()  # the beginning of the next head came with this request

        def connection_lost(self, exc: Exception | None) -> None:
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
        def _is_busy(self) -> bool:
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


def _peer(transport: asyncio.Transport) -> tuple[str, int] | None:
    """Name the process at the other end of a Unix socket, if it is of this machine and container."""
    peer = transport.get_extra_info("socket")
    option = getattr(socket, "SO_PEERCRED", None)
    if peer is None or option is None or peer.family != socket.AF_UNIX:
        return None
    pid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))[0]
    return (f"process {pid}", 0) if pid else None
