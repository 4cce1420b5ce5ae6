"""A sink behind a daemon: `Tracker("http://…")`, `Tracker("unix:/run/…")`.

Rules:
1. The daemon answers a batch once it is in the database: until then the tracker keeps it. A repeat, to this daemon or
   another one on the same database, is found done by the tracker's own ledger row.
2. What goes wrong on the way is a `SinkFault`: the flusher's plans hold for a daemon as for a database.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import httpx

from tracker_daemon import wire
from tracker_daemon.sink import Applied, Opened, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from tracker_daemon.batch import Batch

# The daemon answers after its own window and the database's commit; its statements have deadlines of 30 s.
_READ: Final = 60.0
_CONNECT: Final = 5.0
_CLOSE: Final = 2.0


class HttpSink:
    """A `Sink` that hands batches to a daemon.

    Args:
        base_url: where the daemon is; for a socket its host is only a name.
        socket: the path of its Unix socket, or `None`.
        token: returns the bearer token at each connection attempt, or `None`.
    """

    def __init__(self, base_url: str, *, socket: str | None, token: Callable[[], str | None]) -> None:
        self._base_url, self._socket, self._token = base_url, socket, token
        self._client: httpx.AsyncClient | None = None
        self._last: dict[tuple[UUID, int], Opened] = {}
        self._task: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    async def open(self, producer: UUID, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """See `Sink.open`."""
        last = self._last.get((producer, lane), known)
        asked = {
            "producer": str(producer),
            "lane": lane,
            "known": None if last is None else wire.opened_json(last),
            "after": after,
        }
        answer = await self._ask("POST", "/v1/producers", json=asked)
        opened: Opened = _read(wire.opened_from, answer)
        self._last[producer, lane] = opened
        return opened

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        answer = await self._ask(
            "POST", "/v1/batches", headers=wire.batch_headers(batch), content=wire.encode_deltas(batch.deltas)
        )
        applied: Applied = _read(lambda value: wire.applied_from(value, batch), answer)
        self._last[batch.producer, batch.lane] = Opened(batch.epoch, batch.sequence)
        return applied

    async def recall(self, batch: Batch) -> Applied:
        """See `Recalls.recall`."""
        headers, content = wire.batch_headers(batch), wire.encode_deltas(batch.deltas)
        try:
            answer = await self._ask("POST", "/v1/batches/recall", headers=headers, content=content)
        except SinkFault as fault:
            if fault.kind == "schema":  # not found: a daemon of an older version, which cannot tell
                return Applied(rows=0, duplicate=True)
            raise
        applied: Applied = _read(lambda value: wire.applied_from(value, batch), answer)
        return applied

    def abort(self) -> None:
        """See `Sink.abort`."""
        if (under_way := self._task) is not None:
            loop, task = under_way
            with suppress(RuntimeError):  # the loop has ended, and with it the request
                loop.call_soon_threadsafe(task.cancel)

    async def aclose(self, producer: UUID, lane: int, *, clean: bool) -> None:
        """See `Sink.aclose`."""
        last = self._last.get((producer, lane))
        try:
            if clean and last is not None:
                path = f"/v1/producers/{producer}/{lane}"
                where = {"epoch": last.epoch, "sequence": last.applied_sequence}
                with suppress(SinkFault):  # the mark only lets the row be collected sooner
                    await self._ask("DELETE", path, params=where, timeout=_CLOSE)
        finally:
            client, self._client = self._client, None
            if client is not None:
                with suppress(Exception):
                    await client.aclose()

    # -- one request -------------------------------------------------------------------------------

    async def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        loop = asyncio.get_running_loop()
        # A task of its own: `abort` ends the request, not the flusher.
        task = loop.create_task(self._send(method, path, request))
        self._task = (loop, task)
        try:
            answer = await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                task.cancel()
                raise
            raise SinkFault("connection", "the request to the daemon was cut short") from None
        except httpx.TimeoutException as error:
            raise SinkFault("timeout", f"the daemon at {self._where} did not answer: {_words(error)}") from error
        except (httpx.HTTPError, OSError) as error:
            raise SinkFault("connection", f"the daemon at {self._where}: {_words(error)}") from error
        finally:
            self._task = None
        if answer.status_code >= 300:
            raise wire.error_from(answer.status_code, answer.content)
        return answer

    async def _send(self, method: str, path: str, request: dict[str, Any]) -> httpx.Response:
        if self._client is None:
            self._client = httpx.AsyncClient(
                base_url=self._base_url,
                transport=httpx.AsyncHTTPTransport(uds=self._socket),
                timeout=httpx.Timeout(_READ, connect=_CONNECT),
                trust_env=False,
            )
        if token := self._token():
            request = {**request, "headers": {**request.get("headers", {}), "authorization": f"Bearer {token}"}}
        return await self._client.request(method, path, **request)

    @property
    def _where(self) -> str:
        return self._socket or self._base_url


def _read(convert: Callable[[Any], Any], answer: httpx.Response) -> Any:
    try:
        return convert(answer.json())
    except (ValueError, KeyError, TypeError) as error:
        raise SinkFault("other", f"the daemon's answer cannot be read: {error!r}") from error


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
