"""A Django application under gunicorn's preforked workers that records every turn.

    pip install django gunicorn                        # beside tracker_daemon[daemon]
    CHAT_TRACKER=postgresql:///chat gunicorn --preload --workers 2 chat:application     # in this folder

    curl -d '{"agent_name": "billing", "tokens": 812, "cost": 0.0041}' http://127.0.0.1:8000/threads/t-1/turns
    curl -d '{"resolution_type": "resolved_by_agent"}' http://127.0.0.1:8000/threads/t-1/resolution

CHAT_TRACKER: a database, or a daemon that all workers share (unix:/run/tracker-daemon/tracker.sock).
CHAT_JOURNAL: a directory, so that a worker's `kill -9` loses nothing either.
"""

import json
import os
from collections.abc import Callable
from decimal import Decimal
from functools import partial

from django.conf import settings
from django.core.management.utils import get_random_secret_key
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_POST

from tracker_daemon import Tracker
from tracker_daemon.errors import InvalidCall

settings.configure(
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
    ROOT_URLCONF=__name__,
    SECRET_KEY=os.environ.get("CHAT_SECRET_KEY") or get_random_secret_key(),
)

# One for the process. With --preload this is gunicorn's first process: each worker, forked from it, starts empty, as a
# producer of its own, and below CHAT_JOURNAL takes a place of its own. It drains when the worker ends (`atexit`).
tracker = Tracker(
    os.environ.get("CHAT_TRACKER", "postgresql:///chat"),
    journal=os.environ.get("CHAT_JOURNAL") or None,
    overflow="drop",  # a chat goes on when the tracker is full; the answer below says so
)


@require_POST
def turn(request: HttpRequest, thread_id: str) -> JsonResponse:
    """Record one turn: agent_name, tokens and cost in the body, as JSON."""
    return answer(request, partial(tracker.record_turn, thread_id), may=("agent_name", "tokens", "cost"))


@require_POST
def resolution(request: HttpRequest, thread_id: str) -> JsonResponse:
    """Record how the conversation ended: resolution_type in the body, as JSON."""
    return answer(request, partial(tracker.resolve, thread_id), must=("resolution_type",))


def answer(
    request: HttpRequest, call: Callable[..., bool], *, must: tuple[str, ...] = (), may: tuple[str, ...] = ()
) -> JsonResponse:
    """Make *call* with those names that the body has; 400 if it is malformed, 503 if there is no room for it."""
    try:
        # Decimal: the cost counts digit by digit as it was sent.
        body = json.loads(request.body, parse_float=Decimal)
    except ValueError:
        return JsonResponse({"error": "the body must be JSON"}, status=400)
    if not isinstance(body, dict) or not set(must) <= set(body):
        return JsonResponse({"error": " with ".join(["the body must be an object", *must])}, status=400)
    try:
        accepted = call(**{name: body[name] for name in must + may if name in body})
    except InvalidCall as error:  # it names the argument and the fault, and nothing of this program
        return JsonResponse({"error": str(error)}, status=400)
    return JsonResponse({"accepted": accepted, "process": os.getpid()}, status=200 if accepted else 503)


urlpatterns = [path("threads/<thread_id>/turns", turn), path("threads/<thread_id>/resolution", resolution)]
application = get_wsgi_application()
