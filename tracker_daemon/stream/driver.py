"""The driver of NATS, where it does not do by itself what is needed here."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from nats.aio.client import Client as _Client

from tracker_daemon.stream.faults import Unencrypted

_AGAIN: Final = 0.05


class Client(_Client):
    """A connection that sends a login to nobody who does not encrypt where `tls://` asks for it."""

    def _connect_command(self) -> bytes:
        # The driver encrypts when the server asks for it, whatever the URL says; here the login goes out.
        server = self._current_server
        if server is not None and server.uri.scheme == "tls" and not self._server_info.get("tls_required"):
            raise Unencrypted(f"{server.uri.hostname}:{server.uri.port} does not encrypt; no login was sent")
        command: bytes = super()._connect_command()
        return command


async def within(seconds: float, task: asyncio.Task[None]) -> None:
    """Wait for *task*, which has ended afterwards.

    Raises:
        TimeoutError: it took longer.
    """
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            raise TimeoutError
        await task
    finally:
        while not task.done():
            task.cancel()  # more than once: the driver, in its loop over servers that refuse, may swallow one
            await asyncio.wait([task], timeout=_AGAIN)
        with suppress(asyncio.CancelledError):
            task.exception()  # seen, if it was raised in the last moment
