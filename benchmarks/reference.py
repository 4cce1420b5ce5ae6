"""The tracker that is compared with: one statement and one round trip a call, through a pool of psycopg's.

The cast in its statement is ours: without it psycopg 3 cannot tell the type of a parameter that is only tested for NULL.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from psycopg_pool import AsyncConnectionPool

if TYPE_CHECKING:
    from collections.abc import Iterator

CONCURRENCY = 10

TURN = """
    UPDATE conversations
    SET
        turn_count = turn_count + 1,
        agents_used = CASE
            WHEN %(agent_name)s::text IS NOT NULL AND NOT (agents_used @> ARRAY[%(agent_name)s]::text[])
                THEN agents_used || ARRAY[%(agent_name)s]::text[]
            ELSE agents_used
        END,
        total_tokens = total_tokens + %(tokens)s,
        total_cost_usd = total_cost_usd + %(cost)s,
        last_activity = NOW()
    WHERE thread_id = %(thread_id)s
"""


async def record_turn(
    pool: AsyncConnectionPool[Any], thread_id: str, agent_name: str, tokens: int, cost: float
) -> None:
    """Do as the reference does."""
    params = {"thread_id": thread_id, "agent_name": agent_name, "tokens": tokens, "cost": cost}
    async with pool.connection() as connection:
        await connection.execute(TURN, params)


async def drive(conninfo: str, ids: list[str], concurrency: int = CONCURRENCY) -> float:
    """Make one call for each of *ids* through a pool, *concurrency* at a time; return the seconds."""
    async with AsyncConnectionPool(conninfo, min_size=concurrency, max_size=concurrency, open=False) as pool:
        await pool.wait()
        left = iter(ids)

        async def work(left: Iterator[str]) -> None:
            for thread_id in left:
                await record_turn(pool, thread_id, "billing", 812, 0.0041)

        # Connections are warm, statements prepared.
        await asyncio.gather(*(work(iter(ids[:20])) for _ in range(concurrency)))
        time = asyncio.get_running_loop().time
        began = time()
        await asyncio.gather(*(work(left) for _ in range(concurrency)))
        return time() - began
