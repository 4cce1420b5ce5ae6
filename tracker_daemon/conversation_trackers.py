"""The interface a chat server has today, and its three implementations: none, write-through, write-behind.

A server swaps one constructor and changes no call: same method names, same positional arguments, `pool` first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import anyio

from tracker_daemon import calls
from tracker_daemon.errors import ConfigError, QueueFull, TrackerClosed
from tracker_daemon.settings import split_table

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool

    from tracker_daemon.calls import Cost
    from tracker_daemon.tracker import Tracker


@runtime_checkable
class ConversationTrackerProtocol(Protocol):
    """Tracks the life of conversations and their sums."""

    async def ensure_conversation(self, pool: AsyncConnectionPool[Any], thread_id: str) -> None:
        """Create the conversation's row if it does not exist."""
        ...

    async def record_turn(
        self, pool: AsyncConnectionPool[Any], thread_id: str, agent_name: str | None, tokens: int, cost: Cost
    ) -> None:
        """Count one turn: tokens, cost in US dollars, and the agent unless it is known already."""
        ...

    async def resolve(self, pool: AsyncConnectionPool[Any], thread_id: str, resolution_type: str) -> None:
        """Mark the conversation as resolved."""
        ...


class NoOpConversationTracker:
    """Does nothing: for tests, and for a server without a database."""

    async def ensure_conversation(self, pool: AsyncConnectionPool[Any], thread_id: str) -> None:
        """Do nothing."""

    async def record_turn(
        self, pool: AsyncConnectionPool[Any], thread_id: str, agent_name: str | None, tokens: int, cost: Cost
    ) -> None:
        """Do nothing."""

    async def resolve(self, pool: AsyncConnectionPool[Any], thread_id: str, resolution_type: str) -> None:
        """Do nothing."""


class PostgresConversationTracker:
    """Writes through: one statement and one round trip a call, durable when it returns.

    Args:
        table: the table of conversations, may be schema-qualified.
    """

    def __init__(self, table: str = "conversations") -> None:
        from tracker_daemon.postgres.write_through import statements  # noqa: PLC0415 - others need no libpq

        self._statements = statements(*split_table(table))

    async def ensure_conversation(self, pool: AsyncConnectionPool[Any], thread_id: str) -> None:
        """Insert the row; nothing changes if it exists."""
        name = calls.name("thread_id", thread_id)
        async with pool.connection() as connection:
            await connection.execute(self._statements["ensure"], {"thread_id": name})

    async def record_turn(
        self, pool: AsyncConnectionPool[Any], thread_id: str, agent_name: str | None, tokens: int, cost: Cost
    ) -> None:
        """Add one turn to the row; nothing changes if there is none."""
        parameters = {
            "thread_id": calls.name("thread_id", thread_id),
            "agent_name": calls.optional_name("agent_name", agent_name),
            "tokens": calls.tokens(tokens),
            "cost": calls.decimal(calls.cost(cost)),
        }
        async with pool.connection() as connection:
            await connection.execute(self._statements["turn"], parameters)

    async def resolve(self, pool: AsyncConnectionPool[Any], thread_id: str, resolution_type: str) -> None:
        """Set the row's resolution and end; nothing changes if there is none."""
        parameters = {
            "thread_id": calls.name("thread_id", thread_id),
            "resolution_type": calls.name("resolution_type", resolution_type),
        }
        async with pool.connection() as connection:
            await connection.execute(self._statements["resolve"], parameters)


class WriteBehindConversationTracker:
    """Hands each call to a `Tracker`; the pool is not used.

    The methods return when the call is accepted. At a bound they wait for room instead of failing.

    Args:
        tracker: takes the calls; its owner opens and closes it.

    Raises:
        InvalidCall: an argument is malformed; nothing was enqueued.
        TrackerClosed: the tracker is closed.
    """

    def __init__(self, tracker: Tracker) -> None:
        if not callable(getattr(tracker, "record_turn", None)):
            raise ConfigError("tracker", "must be a Tracker", tracker)
        self._tracker = tracker

    async def ensure_conversation(self, pool: AsyncConnectionPool[Any] | None, thread_id: str) -> None:  # noqa: ARG002
        """Create the conversation's row at the next flush if it does not exist."""
        await self._enter("ensure_conversation", thread_id)

    async def record_turn(
        self,
        pool: AsyncConnectionPool[Any] | None,  # noqa: ARG002 - the interface has it
        thread_id: str,
        agent_name: str | None,
        tokens: int,
        cost: Cost,
    ) -> None:
        """Count one turn of the conversation."""
        await self._enter("record_turn", thread_id, agent_name, tokens, cost)

    async def resolve(
        self,
        pool: AsyncConnectionPool[Any] | None,  # noqa: ARG002
        thread_id: str,
        resolution_type: str,
    ) -> None:
        """Mark the conversation as resolved."""
        await self._enter("resolve", thread_id, resolution_type)

    async def _enter(self, method: str, *arguments: Any) -> None:
        call = getattr(self._tracker, method)
        wait = 0.001
        while True:
            try:
                if call(*arguments):
                    return
            except QueueFull:
                pass
            if self._tracker.closed:
                raise TrackerClosed
            await anyio.sleep(wait)
            wait = min(2 * wait, 0.1)
