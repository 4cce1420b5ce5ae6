"""A small chat server: each request is one call; the tracker lives as long as the application, or the process.

CONNINFO in the environment. As an ASGI application `asgi`, its tracker in the lifespan; as a WSGI application `wsgi`,
its tracker left to the end of the process. `POST /t-1` is a turn of thread t-1; the answer is 204 when it was accepted.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from tracker_daemon import Tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starlette.requests import Request

tracker = Tracker(os.environ["CONNINFO"], flush_interval=600)


async def turn(request: Request) -> Response:
    """Take one call."""
    accepted = tracker.record_turn(request.path_params["thread"], "web", 3, 0.002)
    return Response(status_code=204 if accepted else 503, headers={"process": str(os.getpid())})


asgi = Starlette(routes=[Route("/{thread}", turn, methods=["POST"])], lifespan=tracker.lifespan)


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Take one call."""
    accepted = tracker.record_turn(environ["PATH_INFO"].strip("/"), "web", 3, 0.002)
    start_response("204 No Content" if accepted else "503 Full", [("process", str(os.getpid()))])
    return [b""]


if os.environ.get("CALL_AT_IMPORT"):
    tracker.ensure_conversation("import")
