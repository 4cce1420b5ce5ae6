"""The daemon's HTTP interface.

Rules:
1. Nothing a client sends costs another one: sizes, times and shares are bounded before anything is read.
2. A client learns what was wrong with its own request, and never how the daemon is made.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tracker_daemon import wire
from tracker_daemon.daemon import ingest
from tracker_daemon.daemon.relay import Full
from tracker_daemon.errors import FlushTimeout, TrackerError
from tracker_daemon.logs import get_logger
from tracker_daemon.sink import LedgerMissing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tracker_daemon.batch import Batch
    from tracker_daemon.daemon.admission import Admission
    from tracker_daemon.daemon.service import Service
    from tracker_daemon.daemon.watched import Watched
    from tracker_daemon.generation import Record
    from tracker_daemon.sink import Applied

    Handler = Callable[[Request], Awaitable[Response]]

PAGE: Final = Path(__file__).parent / "page"
_POLICY: Final = "default-src 'self'; style-src 'self'; script-src 'self'; base-uri 'none'; frame-ancestors 'none'"
_RETRY: Final = {"retry-after": "1"}
_CLOSE: Final = {"connection": "close"}
_WAIT: Final = 50.0
_READERS: Final = 4


class _Json(JSONResponse):
    """A JSON answer whose body is a line, as a terminal and a log want it."""

    def render(self, content: Any) -> bytes:
        return super().render(content) + b"\n"


class Answer(Exception):  # noqa: N818 - not an error: it ends a request early
    """An answer that is no success."""

    def __init__(self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        super().__init__(status, value)
        self.status, self.value, self.headers = status, value, headers


def make_app(service: Service) -> ASGIApp:
    """Return the application that serves *service*."""
    api = _Api(service)
    guarded = api.guarded
    routes = [
        *api.for_operators(),
        Route("/v1/calls", guarded(api.calls), methods=["POST"]),
        Route("/v1/producers", guarded(api.open), methods=["POST"]),
        Route("/v1/producers/{producer:uuid}/{lane:int}", guarded(api.close), methods=["DELETE"]),
        Route("/v1/batches", guarded(api.apply), methods=["POST"]),
        Route("/v1/batches/recall", guarded(api.recall), methods=["POST"]),
    ]
    return _Policy(Starlette(routes=routes, exception_handlers=_HANDLERS))


def make_pages(service: Watched) -> ASGIApp:
    """Return the application that only shows *service*: numbers, state, status page."""
    return _Policy(Starlette(routes=_Pages(service).for_operators(), exception_handlers=_HANDLERS))


async def _as_json(_: Request, error: HTTPException) -> Response:
    return _Json({"error": error.detail}, error.status_code, headers=error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    get_logger().error("request_failed", error=repr(error), exc_info=error)
    return _Json({"error": "the daemon failed; its log says why"}, 500)


_HANDLERS: Final[Any] = {HTTPException: _as_json, Exception: _failed}


class _Policy:
    """Adds the security headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self._app(scope, receive, guarded)


class _Pages:
    def __init__(self, shown: Watched) -> None:
        self._shown = shown
        self._page = PAGE / "index.html"

    def for_operators(self) -> list[BaseRoute]:
        """Return the routes that change nothing."""
        return [
            Route("/metrics", self.metrics),
            Route("/livez", self.live),
            Route("/readyz", self.ready),
            Route("/status.json", self.status),
            Route("/", self.page),
            Mount("/page", StaticFiles(directory=PAGE)),
        ]

    async def metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        data = await anyio.to_thread.run_sync(encode, self._shown.registry)
        return Response(data, headers={"content-type": content_type})

    async def live(self, _: Request) -> Response:
        return _Json({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        state, reason = self._shown.state, self._shown.reason
        if state == "ready":
            return _Json({"status": "ready"})
        return _Json({"status": state, "reason": reason}, 503, headers=_RETRY)

    async def status(self, request: Request) -> Response:
        since = request.query_params.get("since")
        document = self._shown.status(since)
        return _Json(document, headers={"cache-control": "no-store"})

    async def page(self, _: Request) -> Response:
        return FileResponse(self._page, headers={"cache-control": "no-cache"})


class _Api(_Pages):
    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self._service = service
        # Few: what is read in threads takes the interpreter in turns, and each of them makes the others late.
        self._readers = anyio.CapacityLimiter(_READERS)

    # -- the frame of a request --------------------------------------------------------------------

    def guarded(self, handler: Handler) -> Handler:
        """Return *handler* behind the token and the state of the service."""

        async def run(request: Request) -> Response:
            answer = await answered(request)
            self._service.refused.count(answer.status_code)
            return answer

        async def answered(request: Request) -> Response:  # noqa: PLR0911 - one a kind of end
            try:
                self._admit(request)
                return await handler(request)
            except Answer as answer:
                return _Json(answer.value, answer.status, headers=answer.headers)
            except wire.Malformed as error:
                return _Json({"error": str(error)}, 400)
            except Full as full:
                whose = "of this client's" if full.status == 429 else "of the clients'"
                text = f"too much {whose} waits for the database already"
                return _Json({"error": text}, full.status, headers=_RETRY)
            except FlushTimeout as error:
                return _Json({"error": str(error)}, 503, headers=_RETRY)
            except ClientDisconnect:
                return Response(status_code=400)  # to nobody
            except TrackerError as error:
                if (status := wire.STATUS.get(type(error))) is None:
                    raise
                headers = _RETRY if status == 503 else None
                return _Json(wire.error_json(error), status, headers=headers)

        return run

    def _admit(self, request: Request) -> None:
        token = self._service.token
        if token is not None and not token.admits(request.headers.get("authorization", "")):
            raise Answer(401, {"error": "the bearer token is missing or wrong"}, {"www-authenticate": "Bearer"})
        if self._service.state == "draining":
            raise Answer(503, {"error": "the daemon is shutting down"}, _RETRY | _CLOSE)

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """Read the body, within its bounds, and account for it until it is dealt with."""
        share = _Share(self._service.admission, _client(request))
        try:
            yield await self._read(request, share)
        finally:
            share.release()

    async def _read(self, request: Request, share: _Share) -> bytes:
        most, timeout = self._service.options.max_body, self._service.options.read_timeout
        announced = request.headers.get("content-length", "0")
        if not announced.isdigit() or len(announced) > 15 or int(announced) > most:
            raise Answer(413, {"error": f"the body has {announced[:80]} bytes, more than {most}"}, _CLOSE)
        body = bytearray()
        parts = request.stream().__aiter__()
        # The whole within a time that a slow but honest client meets; each part within its own.
        with anyio.move_on_after(timeout * 3):
            while True:
                with anyio.move_on_after(timeout) as slow:
                    try:
                        part = await parts.__anext__()
                    except StopAsyncIteration:
                        return bytes(body)
                if slow.cancelled_caught:
                    break
                if len(body) + len(part) > most:
                    raise Answer(413, {"error": f"the body has more than {most} bytes"}, _CLOSE)
                share.take(len(part))
                body += part
        raise Answer(408, {"error": "the body did not come in time"}, _CLOSE)

    # -- calls -------------------------------------------------------------------------------------

    async def calls(self, request: Request) -> Response:
        service, options = self._service, self._service.options
        wait = request.query_params.get("wait")
        if wait not in (None, "committed"):
            raise Answer(400, {"error": "wait must be committed"})
        async with self._body(request) as body:
            now = time.time_ns()
            try:
                records = await anyio.to_thread.run_sync(
                    lambda: ingest.read_calls(body, now=now, max_line=options.max_line, max_calls=service.max_calls),
                    limiter=self._readers,
                )
            except ingest.Refused as refused:
                service.count_malformed(len(refused.errors))
                raise Answer(400, {"errors": refused.errors}) from None
            if "tracker-producer" in request.headers or "tracker-sequence" in request.headers:
                batch = self._batch(request, records)
                applied = await self._identified(request, batch)
                dead = sum(letter.delta.calls for letter in applied.dead_letters)
                answer = {"accepted": len(records), "duplicate": applied.duplicate, "dead_lettered": dead}
                return _Json(answer, 200 if wait else 202)
            # In a thread: it waits while the tracker's worker folds.
            no = None
            if records:
                no = await anyio.to_thread.run_sync(
                    service.shares.take, _client(request), records, now, limiter=self._readers
                )
            if no is not None:
                raise Answer(no[0], {"error": f"not accepted: {no[1]}"}, _RETRY)
        if wait:
            try:
                await service.tracker.aflush(_WAIT)
            except FlushTimeout:
                wait = None  # the calls are taken: an answer that asks for them again would count them twice
        return _Json({"accepted": len(records)}, 200 if wait else 202)

    async def _identified(self, request: Request, batch: Batch) -> Applied:
        try:
            return await self._service.relay.apply(batch, _client(request))
        except LedgerMissing:
            text = (
                "the database has forgotten this Tracker-Producer (restored, or emptied): whether this request was"
                " applied before cannot be known. It was not applied now; it is taken if it is sent again"
            )
            raise Answer(409, {"error": text}) from None

    def _batch(self, request: Request, records: list[Record]) -> Batch:
        producer, sequence = wire.producer(request.headers), wire.sequence(request.headers)
        try:
            return ingest.batch_of(producer, sequence, records, create_missing=self._service.tracker.create_missing)
        except ingest.Refused as refused:
            raise Answer(400, {"errors": refused.errors}) from None

    # -- trackers ----------------------------------------------------------------------------------

    async def open(self, request: Request) -> Response:
        async with self._body(request) as body:
            producer, lane, known, after = wire.open_request(body)
            opened = await self._service.relay.open(producer, lane, known, after)
        return _Json(wire.opened_json(opened))

    async def apply(self, request: Request) -> Response:
        client = _client(request)
        return await self._batched(request, lambda batch: self._service.relay.apply(batch, client))

    async def recall(self, request: Request) -> Response:
        return await self._batched(request, self._service.relay.recall)

    async def _batched(self, request: Request, do: Callable[[Batch], Awaitable[Applied]]) -> Response:
        if request.headers.get("content-type") != wire.BATCH_TYPE:
            raise Answer(415, {"error": f"the body must be {wire.BATCH_TYPE}"})
        async with self._body(request) as body:
            default = self._service.tracker.create_missing
            batch = await anyio.to_thread.run_sync(
                lambda: wire.decode_batch(request.headers, body, create_missing=default), limiter=self._readers
            )
            if batch.epoch == 0:
                raise wire.Malformed("Tracker-Epoch must be at least 1: open the producer first")
            applied = await do(batch)
        return _Json(wire.applied_json(applied))

    async def close(self, request: Request) -> Response:
        producer = request.path_params["producer"]
        last, lane = wire.closed_at(request.query_params), request.path_params["lane"]
        if lane >= 2**15:
            raise wire.Malformed("the lane is out of range")
        await self._service.relay.mark_closed(producer, lane, last)
        return Response(status_code=204)


class _Share:
    """What one request has taken of its client's share."""

    def __init__(self, admission: Admission, client: str) -> None:
        self._admission, self._client, self._taken = admission, client, 0

    def take(self, size: int) -> None:
        if status := self._admission.admit(self._client, size):
            whose = "this client has" if status == 429 else "there are"
            raise Answer(status, {"error": f"{whose} too many requests under way"}, _RETRY | _CLOSE)
        self._taken += size

    def release(self) -> None:
        self._admission.release(self._client, self._taken)


def _client(request: Request) -> str:
    """Name a client for its share: its process where a socket tells, the producer that it names, its address."""
    if request.client and not request.client.port:
        return request.client.host
    if name := request.headers.get("tracker-producer"):
        return name[:64]
    return request.client.host if request.client else "socket"
