"""Chat traffic: a few conversations busy and thousands quiet, served by asyncio tasks and by plain threads.

Rules:
1. A visit to a conversation is what a chat server does for a message: ensure it, record a turn for each agent that
   answers, now and then resolve it. Who was resolved may come back.
2. One server at a time holds a conversation, for one visit, and counts what it calls; then another may.
3. The pace is one for all: whoever wakes makes the calls that are due.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate
from random import Random
from threading import Event, Lock
from typing import TYPE_CHECKING, Final, TypeAlias
from uuid import uuid4

from psycopg_pool import AsyncConnectionPool

from tracker_daemon import PostgresConversationTracker
from tracker_daemon.demo.count import Call, Counted

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from tracker_daemon import Tracker

TASKS: Final = 24
THREADS: Final = 3
CONNECTIONS: Final = 10

_TICK: Final = 0.02
_TRIES: Final = 8

_AGENTS: Final = ("triage", "search", "billing", "shipping", "refunds", "technical", "traducción", "supervisor", None)
_AGENT_WEIGHTS: Final = tuple(accumulate((24, 20, 14, 10, 8, 8, 5, 3, 8)))
_TURNS: Final = (1, 1, 1, 2, 2, 3, 5)
_RESOLUTIONS: Final = ("resolved_by_agent", "resolved_by_agent", "escalated", "abandoned")
# US dollars a token. Binary floats and decimals, so that both ways into an exact sum are used.
_FLOAT_PRICES: Final = (1.5e-07, 6e-07, 2.75e-06, 1.1e-05)
_DECIMAL_PRICES: Final = (Decimal("0.0000031415926535"), Decimal("0.00000027182818284590452353"))


def visit(random: Random) -> Iterator[Call]:
    """Yield the calls that one message of a user brings about."""
    yield Call("ensure_conversation")
    for _ in range(random.choice(_TURNS)):
        (agent,) = random.choices(_AGENTS, cum_weights=_AGENT_WEIGHTS)
        tokens = int(random.lognormvariate(5.5, 1.0))
        yield Call("record_turn", (agent, tokens, _cost(random, tokens)))
    if random.random() < 0.08:
        yield Call("resolve", (random.choice(_RESOLUTIONS),))


def _cost(random: Random, tokens: int) -> float | Decimal:
    die = random.random()
    if die < 0.7:
        return tokens * random.choice(_FLOAT_PRICES)
    if die < 0.95:
        return tokens * random.choice(_DECIMAL_PRICES)
    return 0  # an answer from the cache


class Conversation:
    """A thread of the chat, who serves it now, and what was counted of it."""

    __slots__ = ("counted", "held", "thread_id")

    def __init__(self, thread_id: str) -> None:
        self.thread_id = thread_id
        self.held = Lock()
        self.counted = Counted()


Serving: TypeAlias = "Generator[tuple[Conversation, Call] | None, None, None]"


class Conversations:
    """*number* conversations; the n-th busiest has one n-th of the visits of the busiest."""

    def __init__(self, number: int) -> None:
        run = uuid4().hex[:6]
        self.all = [Conversation(f"chat-{run}-{rank:05}") for rank in range(1, number + 1)]
        self._weights = list(accumulate(1 / rank for rank in range(1, number + 1)))

    def take(self, random: Random) -> Conversation | None:
        """Return one that nobody serves, now held for the caller; `None` if all that were tried are served."""
        for _ in range(_TRIES):
            (found,) = random.choices(self.all, cum_weights=self._weights)
            if found.held.acquire(blocking=False):
                return found
        return None

    def serve(self, random: Random) -> Serving:
        """Yield the calls of one visit after the other, each with its conversation; `None` when none is to be had.

        The conversation is held until the step after its last call.
        """
        while True:
            conversation = self.take(random)
            if conversation is None:
                yield None
                continue
            try:
                for call in visit(random):
                    yield conversation, call
            finally:
                conversation.held.release()


class Pacer:
    """Says when the next call is due: *rate* a second over all callers. What is a quarter second late is dropped."""

    def __init__(self, rate: float) -> None:
        self._rate, self._most = rate, max(1.0, rate / 4)
        self._due, self._then = 0.0, time.monotonic()
        self._lock = Lock()

    def take(self) -> bool:
        """Take one call that is due; `False` if none is."""
        with self._lock:
            now = time.monotonic()
            self._due = min(self._due + (now - self._then) * self._rate, self._most)
            self._then = now
            if self._due < 1:
                return False
            self._due -= 1
            return True

    def give_back(self) -> None:
        """Return a call that was taken and not made."""
        with self._lock:
            self._due += 1


class Traffic:
    """Drives calls into *tracker*.

    Args:
        tracker: takes them.
        threads: distinct conversations.
        rate: calls a second, over all.
    """

    def __init__(self, tracker: Tracker, threads: int, rate: float) -> None:
        self._tracker = tracker
        self._conversations = Conversations(threads)
        self._pacer = Pacer(rate)
        self._at_once = max(1, int(rate * _TICK))

    async def run(self, stop: Event) -> None:
        """Serve the conversations until *stop* is set."""
        async with asyncio.TaskGroup() as group:
            for _ in range(THREADS):
                group.create_task(asyncio.to_thread(self._in_thread, stop))
            for _ in range(TASKS):
                group.create_task(self._in_task(stop))

    @property
    def counted(self) -> dict[str, Counted]:
        """What was counted, by thread id; conversations without an accepted call are left out."""
        return {each.thread_id: each.counted for each in self._conversations.all if each.counted.calls}

    @property
    def refused(self) -> int:
        """Calls that the tracker did not accept."""
        return sum(each.counted.refused for each in self._conversations.all)

    def _in_thread(self, stop: Event) -> None:
        random = Random()
        with closing(self._conversations.serve(random)) as serving:
            while not stop.wait(random.uniform(0, 2 * _TICK)):
                self._catch_up(serving)

    async def _in_task(self, stop: Event) -> None:
        random = Random()
        with closing(self._conversations.serve(random)) as serving:
            while not stop.is_set():
                self._catch_up(serving)
                await asyncio.sleep(random.uniform(0, 2 * _TICK))

    def _catch_up(self, serving: Serving) -> None:
        for _ in range(self._at_once):
            if not self._pacer.take():
                return
            step = next(serving)
            if step is None:
                self._pacer.give_back()
                return
            self._enter(*step)

    def _enter(self, conversation: Conversation, call: Call) -> None:
        method = getattr(self._tracker, call.method)
        before = time.time_ns()
        accepted = method(conversation.thread_id, *call.arguments)
        after = time.time_ns()
        if accepted:
            conversation.counted.add(call, (before, after))
        else:
            conversation.counted.refused += 1


@dataclass(frozen=True, slots=True)
class WrittenThrough:
    """What was measured of one statement a call."""

    calls: int
    seconds: float
    median: float
    """Of one call, seconds."""

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self.calls / self.seconds


async def write_through(conninfo: str, table: str, threads: int, *, calls: int, seconds: float) -> WrittenThrough:
    """Make the same kind of calls one statement each, at most *calls* and for at most *seconds*; return the pace."""
    tracker = PostgresConversationTracker(table)
    conversations = Conversations(threads)
    times: list[float] = []
    tickets = iter(range(calls))
    pool = AsyncConnectionPool(
        conninfo, min_size=CONNECTIONS, max_size=CONNECTIONS, kwargs={"autocommit": True}, open=False
    )

    async def work() -> None:
        random = Random()
        with closing(conversations.serve(random)) as serving:
            for _ in tickets:
                step = next(serving)
                if step is None:
                    await asyncio.sleep(_TICK)
                    continue
                conversation, call = step
                before = time.perf_counter()
                if before > deadline:
                    return
                await getattr(tracker, call.method)(pool, conversation.thread_id, *call.arguments)
                times.append(time.perf_counter() - before)

    async with pool:
        await pool.wait()
        started = time.perf_counter()
        deadline = started + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(CONNECTIONS):
                group.create_task(work())
        return WrittenThrough(len(times), time.perf_counter() - started, sorted(times)[len(times) // 2])
