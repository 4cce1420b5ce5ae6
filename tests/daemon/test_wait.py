"""`?wait=committed` while the database does not take what the daemon took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from tests.helpers import GatedSink
from tracker_daemon import Tracker
from tracker_daemon.clock import SystemClock
from tracker_daemon.daemon import app
from tracker_daemon.daemon.options import Listen, Options
from tracker_daemon.daemon.relay import Relay
from tracker_daemon.daemon.service import Service

if TYPE_CHECKING:
    import pytest
    from prometheus_client import CollectorRegistry


def test_not_committed_in_time(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that were taken and cannot be written yet are answered as taken: a client that tries again doubles none."""
    monkeypatch.setattr(app, "_WAIT", 0.01)
    sink = GatedSink()
    nothing: Any = None

    async def ask() -> tuple[int, object]:
        tracker = Tracker(sink, registry=registry, flush_interval=0.01)
        relay = Relay(nothing, SystemClock(), window=1, max_batch_size=1, max_waiting=1)
        options = Options(listen=(Listen(path=Path("unused")),))
        service = Service(options, tracker, relay, None, registry, {}, max_calls=10)
        transport = httpx.ASGITransport(app.make_app(service))
        async with tracker, httpx.AsyncClient(transport=transport, base_url="http://daemon") as client:
            answer = await client.post("/v1/calls?wait=committed", content='{"call": "record_turn", "thread_id": "t"}')
            sink.let_through()
        return answer.status_code, answer.json()

    assert anyio.run(ask) == (202, {"accepted": 1})
    assert sink.turns == 1
