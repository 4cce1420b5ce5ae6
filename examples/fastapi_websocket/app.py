"""A chat server on websockets that records every conversation.

    pip install fastapi uvicorn websockets             # beside tracker_daemon and psycopg[binary]
    tracker-daemon migrate --database postgresql:///chat
    CHAT_TRACKER=postgresql:///chat uvicorn app:app    # in this folder

A client connects to ws://127.0.0.1:8000/chat/THREAD and sends text; each text gets one JSON object back.
"""

import os
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tracker_daemon import Tracker
from tracker_daemon.errors import InvalidCall

# Nothing connects or starts here: the worker starts with the lifespan, in the process that serves.
tracker = Tracker(os.environ.get("CHAT_TRACKER", "postgresql:///chat"))

# Under uvicorn the lifespan is all that runs at SIGTERM. It drains for `shutdown_timeout` (10 s), so whoever stops
# this process must wait for longer than that.
app = FastAPI(lifespan=tracker.lifespan)


@dataclass
class Answer:
    """What the model said, and what it took."""

    agent: str
    text: str
    tokens: int
    cost: str


async def ask(text: str) -> Answer:
    """Your model goes here."""
    agent = "billing" if "invoice" in text else "general"
    tokens = len(text)
    return Answer(agent, text.upper(), tokens, f"{tokens * 0.000002:.6f}")


@app.websocket("/chat/{thread_id}")
async def chat(socket: WebSocket, thread_id: str) -> None:
    """Talk until the client leaves."""
    try:
        tracker.ensure_conversation(thread_id)
    except InvalidCall:  # the id came from outside: too long, or with a NUL
        await socket.close(1008)
        return
    await socket.accept()
    resolution = "abandoned"
    try:
        while True:
            answer = await ask(await socket.receive_text())
            # Before the answer is sent: the tokens are spent whether or not the client still reads it.
            tracker.record_turn(thread_id, answer.agent, answer.tokens, float(answer.cost))
            await socket.send_json(asdict(answer))
    except WebSocketDisconnect as end:
        if end.code == 1000:  # the client said goodbye
            resolution = "resolved_by_agent"
    finally:
        # At SIGTERM too: uvicorn ends the connections first and the lifespan after them.
        tracker.resolve(thread_id, resolution)


@app.get("/threads/{thread_id}/pending")
async def pending(thread_id: str) -> dict[str, Any]:
    """Say what the row does not show yet."""
    delta = tracker.pending(thread_id)
    return {"turns": delta.turns, "tokens": delta.tokens} if delta else {"turns": 0, "tokens": 0}


@app.get("/metrics")
async def metrics() -> Response:
    """What Prometheus scrapes; with `uvicorn --workers` a scrape meets one of them."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
